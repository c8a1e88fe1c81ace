"""Change one thing at a time: plan.py makes the trials, run.py runs them, report.py sums them up."""
