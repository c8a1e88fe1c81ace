"""Figures as PNG files: plain arrays in, a file out, written by rename. No pyplot, so no state is shared."""
