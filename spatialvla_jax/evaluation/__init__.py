"""Evaluation: open loop on recorded frames (`open_loop`), closed loop in simulators (`closed_loop`)."""
