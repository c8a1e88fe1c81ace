"""Controlled comparisons: plan.py defines the trials, run.py runs them, reports/sweep.py summarises them."""
