"""Read and write checkpoints: our Orbax runs, the published Hugging Face layout, PaliGemma 2, big_vision, PEFT."""

from spatialvla_jax.checkpoints.big_vision import read_big_vision, write_big_vision
from spatialvla_jax.checkpoints.huggingface import read_huggingface, write_huggingface
from spatialvla_jax.checkpoints.load import fingerprint, load_pretrained, read_checkpoint
from spatialvla_jax.checkpoints.orbax import read_orbax, write_orbax
from spatialvla_jax.checkpoints.paligemma import start_from_paligemma
from spatialvla_jax.checkpoints.types import Checkpoint

__all__ = [
    "Checkpoint",
    "fingerprint",
    "load_pretrained",
    "read_big_vision",
    "read_checkpoint",
    "read_huggingface",
    "read_orbax",
    "start_from_paligemma",
    "write_big_vision",
    "write_huggingface",
    "write_orbax",
]
