"""Evaluation: open loop on recorded frames (`open_loop`), closed loop in simulators (`rollouts`, `closed_loop`)."""
