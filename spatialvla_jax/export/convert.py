"""Turning one checkpoint format into another."""

import hashlib
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from spatialvla_jax.checkpoints.big_vision import write_big_vision
from spatialvla_jax.checkpoints.huggingface import write_huggingface
from spatialvla_jax.checkpoints.load import read_checkpoint
from spatialvla_jax.checkpoints.orbax import write_orbax
from spatialvla_jax.checkpoints.peft import PEFT_WEIGHTS, is_adapter_run, read_adapters, same_bytes, write_peft
from spatialvla_jax.checkpoints.types import Checkpoint, LazyArray
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.verify import MISSING, available
from spatialvla_jax.export.verify import verify as run_both

PEFT = "peft"
DTYPES = ("float32", "bfloat16", "float16")

# Larger exports are run beside JAX on request only: both sides compute in float32 on the host.
VERIFIED_BY_DEFAULT = 500_000_000  # parameters


# Class → its file, as in the release. Everything is in the first; the others only point there.
CODE = {
    "SpatialVLAForConditionalGeneration": "modeling_spatialvla",
    "SpatialVLAConfig": "configuration_spatialvla",
    "SpatialVLAProcessor": "processing_spatialvla",
}


def torch_code() -> dict[str, str]:
    """{file name: text} of the PyTorch model and processor under the three names that `auto_map` refers to."""
    (_, first), *others = CODE.items()
    pointers = {
        f"{file}.py": f'"""In {first}.py."""\n\nfrom .{first} import {name}  # noqa: F401\n' for name, file in others
    }
    return {f"{first}.py": Path(__file__).with_name("torch_model.py").read_text()} | pointers


def write_pytorch(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a published directory that transformers can load: `write_huggingface` with our PyTorch code in it."""
    write_huggingface(path, checkpoint, code=torch_code())


WRITERS = {"orbax": write_orbax, "pytorch": write_pytorch, "big_vision": write_big_vision}


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    dtype: str | None = None,
    verify: bool | None = None,
    zoedepth: str | Path | None = None,
    merge: bool = False,
) -> dict[str, Any]:
    """Convert checkpoint `src` into `dst`, a new directory (orbax, pytorch, peft) or .npz file (big_vision).

    Weights are cast to `dtype` where one is given. A PaliGemma 2 becomes a SpatialVLA to pre-train, with the ZoeDepth
    in the directory `zoedepth` where one is given. A run of adapters becomes a plain checkpoint by `merge`, or to
    "peft" a directory of the adapters alone (`lora.write_peft`). `verify` runs a PyTorch export beside JAX
    (`verify.verify`); None does so up to VERIFIED_BY_DEFAULT parameters and where PyTorch is installed.

    Returns {"source", "destination", "format", "parameters", "tensors", "bytes", "bit_exact", "seconds",
    "verification"}; `bit_exact` comes from reading `dst` back, `verification` is what `verify` found, or the sentence
    that says why it was not run. Raises InputError, and `dst` is then untouched; VerificationError, and `dst` is kept.
    """
    if to not in (*WRITERS, PEFT):
        raise InputError(f"cannot convert to {to!r}; choose one of {', '.join((*WRITERS, PEFT))}")
    adapters = Path(src).exists() and is_adapter_run(src)
    if not adapters and (merge or to == PEFT):
        raise InputError(f"{src} holds no adapters {'to merge' if merge else 'for peft'}: it is no run with lora.rank")
    if adapters and merge == (to == PEFT):
        raise InputError(f"{src} holds adapters: --merge gives a whole checkpoint, --to peft the adapters alone")
    if to == PEFT and dtype:
        raise InputError(f"{src} holds adapters, which are written as they were trained: leave --dtype out")
    if verify and to == "pytorch" and not available():
        raise InputError(f"{dst} cannot be verified: {MISSING}")
    start = time.perf_counter()
    if to == PEFT:
        return _convert_to_peft(src, dst, start)
    checkpoint = cast(read_checkpoint(src, zoedepth), dtype)
    WRITERS[to](dst, checkpoint)
    arrays = checkpoint.arrays.values()
    parameters = sum(prod(array.shape) for array in arrays)
    bit_exact = equal(checkpoint, read_checkpoint(dst))
    skipped = _why_not(to, parameters, verify)
    return {
        "source": str(src),
        "destination": str(dst),
        "format": to,
        "parameters": parameters,
        "tensors": len(arrays),
        "bytes": sum(array.nbytes for array in arrays),
        "bit_exact": bit_exact,
        "verification": run_both(checkpoint, dst) if skipped is None else skipped,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _convert_to_peft(src: str | Path, dst: str | Path, start: float) -> dict[str, Any]:
    run = read_adapters(src, read_checkpoint)
    tensors = write_peft(dst, run, torch_code())
    return {
        "source": str(src),
        "destination": str(dst),
        "format": PEFT,
        "parameters": sum(prod(array.shape) for array in run.trained.values()),
        "tensors": len(tensors),
        "bytes": sum(array.nbytes for array in tensors.values()),
        "bit_exact": same_bytes(Path(dst) / PEFT_WEIGHTS, tensors),
        "verification": "adapters alone: their bytes were read back and compared",
        "seconds": round(time.perf_counter() - start, 3),
    }


def _why_not(to: str, parameters: int, verify: bool | None) -> str | None:
    """The sentence that says why an export is not run beside JAX, or None where it is."""
    if to != "pytorch":
        return f"{to} is JAX's own layout: its bytes were read back and compared"
    if verify is False:
        return "not asked for"
    if not available():
        return MISSING
    if verify is None and parameters > VERIFIED_BY_DEFAULT:
        return f"{parameters:,} parameters are more than {VERIFIED_BY_DEFAULT:,}, so the export was not run beside JAX"
    return None


def cast(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """The same checkpoint with its weights in `dtype`, one of DTYPES; unchanged for None."""
    if dtype is None:
        return checkpoint
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    arrays = {path: array.astype(jnp.dtype(dtype)) for path, array in checkpoint.arrays.items()}
    return replace(checkpoint, arrays=arrays)


def equal(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether config, processor and every byte of every array are the same; holds one array at a time."""
    processors = [c.processor and c.processor.to_dict() for c in (a, b)]
    if a.config != b.config or processors[0] != processors[1] or a.arrays.keys() != b.arrays.keys():
        return False
    return all(
        array.dtype == b.arrays[path].dtype and _digest(array) == _digest(b.arrays[path])
        for path, array in a.arrays.items()
    )


def _digest(array: LazyArray) -> tuple[tuple[int, ...], bytes]:
    x = np.ascontiguousarray(array.read())
    return x.shape, hashlib.sha256(x.view(np.uint8).data).digest()
