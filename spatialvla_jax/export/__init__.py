"""Conversion between checkpoint formats, and the proof that an export acts the same. PyTorch lives here."""

from spatialvla_jax.export.convert import convert
from spatialvla_jax.export.verify import VerificationError, verify

__all__ = ["VerificationError", "convert", "verify"]
