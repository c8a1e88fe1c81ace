"""Checkpoints in and out: our Orbax runs, the published Hugging Face layout, big_vision. PyTorch lives here only."""

from spatialvla_jax.checkpoints.big_vision import read_big_vision, write_big_vision
from spatialvla_jax.checkpoints.huggingface import read_huggingface, write_huggingface
from spatialvla_jax.checkpoints.load import convert, fingerprint, load_pretrained, read_checkpoint
from spatialvla_jax.checkpoints.orbax import read_orbax, write_orbax
from spatialvla_jax.checkpoints.paligemma import start_from_paligemma
from spatialvla_jax.checkpoints.types import Checkpoint
from spatialvla_jax.export.verify import VerificationError, verify

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
