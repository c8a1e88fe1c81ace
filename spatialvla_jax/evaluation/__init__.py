"""Open loop on recorded frames (`open_loop`) and closed loop in simulators (`closed_loop`)."""
