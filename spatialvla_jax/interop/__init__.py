"""Checkpoints in and out: our Orbax runs, the published Hugging Face layout, big_vision. PyTorch lives here only."""

from spatialvla_jax.interop.big_vision import read_big_vision, write_big_vision
from spatialvla_jax.interop.checkpoint import Checkpoint
from spatialvla_jax.interop.formats import convert, fingerprint, load_pretrained, read_checkpoint
from spatialvla_jax.interop.huggingface import read_huggingface, write_huggingface
from spatialvla_jax.interop.orbax import read_orbax, write_orbax
from spatialvla_jax.interop.paligemma import start_from_paligemma
from spatialvla_jax.interop.verify import VerificationError, verify

__all__ = [
    "Checkpoint",
    "VerificationError",
    "convert",
    "fingerprint",
    "load_pretrained",
    "read_big_vision",
    "read_checkpoint",
    "read_huggingface",
    "read_orbax",
    "start_from_paligemma",
    "verify",
    "write_big_vision",
    "write_huggingface",
    "write_orbax",
]
