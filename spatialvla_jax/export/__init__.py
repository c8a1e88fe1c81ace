"""Conversion between checkpoint formats, and the proof that an export acts the same. PyTorch lives here."""
