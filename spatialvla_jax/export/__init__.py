"""Conversion between checkpoint formats, and verification that an export acts the same. All PyTorch code is here."""
