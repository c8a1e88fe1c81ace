"""Convert checkpoints from one format to another."""

import time
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TypedDict

import jax.numpy as jnp

from spatialvla_jax.checkpoints import safetensors_io as safetensors
from spatialvla_jax.checkpoints.big_vision import write_big_vision
from spatialvla_jax.checkpoints.hub import check_push, find_checkpoint, push_export
from spatialvla_jax.checkpoints.huggingface import write_huggingface
from spatialvla_jax.checkpoints.load import read_checkpoint
from spatialvla_jax.checkpoints.orbax import write_orbax
from spatialvla_jax.checkpoints.peft import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    in_float32,
    is_adapter_run,
    read_adapters,
    write_peft,
)
from spatialvla_jax.checkpoints.release import release_differences
from spatialvla_jax.checkpoints.types import Checkpoint, digest, finite, read_json, recorded
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.card import Origin, export_files, origin_of
from spatialvla_jax.export.verify import MISSING, Verification, VerificationError, available
from spatialvla_jax.export.verify import verify as run_both
from spatialvla_jax.utils import camera
from spatialvla_jax.utils.atomic import kept_after, parents_of
from spatialvla_jax.utils.storage import AnyPath, as_path, exists, occupied, resolved, to_path

PEFT = "peft"
VERIFIED = ("pytorch", PEFT)  # formats that can be run and compared with JAX
DTYPES = ("float32", "bfloat16", "float16")

# Larger exports are only compared with JAX on request: both sides compute in float32 on the host.
VERIFIED_BY_DEFAULT = 500_000_000  # parameters


def torch_code() -> dict[str, str]:
    """{file name: text} of the PyTorch code: configuration, model and processor, as named in `auto_map`. The camera and
    depth checks, which they share with this package, come along."""
    files = Path(__file__).with_name("transformers").glob("*_spatialvla.py")
    code = {file.name: file.read_text().replace(camera.__name__, ".camera_spatialvla") for file in sorted(files)}
    return code | {"camera_spatialvla.py": Path(camera.__file__).read_text()}


def write_pytorch(path: str | AnyPath, checkpoint: Checkpoint, origin: Origin | None = None, name: str = ".") -> None:
    """Write a published directory that transformers can load: `write_huggingface` plus our PyTorch code and a card."""
    write_huggingface(path, checkpoint, files=torch_code() | export_files(checkpoint, origin, name=name))


WRITERS = {"orbax": write_orbax, "pytorch": write_pytorch, "big_vision": write_big_vision}


class Conversion(TypedDict):
    """The result of `convert`; `bit_exact` is determined by reading the destination back."""

    source: str
    destination: str
    format: str
    parameters: int
    tensors: int
    bytes: int
    bit_exact: bool
    verification: Verification | str  # the result of `verify`, or why it was not run
    release_differences: list[str]  # how the published model's own code would act differently from a PyTorch export
    pushed: str  # ORG/NAME@COMMIT on the Hugging Face Hub, or ""
    seconds: float


def convert(
    src: str | AnyPath,
    dst: str | AnyPath,
    to: str,
    dtype: str | None = None,
    verify: bool | None = None,
    zoedepth: str | AnyPath | None = None,
    merge: bool = False,
    base: str | AnyPath | None = None,
    push: str = "",
    private: bool = False,
) -> Conversion:
    """Convert checkpoint `src` into `dst`, a new directory (orbax, pytorch, peft) or .npz file (big_vision).

    `dtype` casts the weights. A PaliGemma 2 becomes a SpatialVLA for pre-training, with the ZoeDepth in directory
    `zoedepth` if given. An adapter run becomes a plain checkpoint with `merge`. With to="peft" it becomes a directory
    of adapters for `base`, an export of the run's base (`peft.write_peft`). `verify` compares a PyTorch export with JAX
    (`verify.verify`), adapters on their base. None does so up to VERIFIED_BY_DEFAULT parameters, given PyTorch.

    Every array is read once to be checked, hashed and written. `push` is the id of a new repository on the Hugging Face
    Hub, to which a PyTorch export is uploaded once it passed these checks. Raises InputError, which leaves `dst`
    untouched, or VerificationError, which keeps `dst`. StorageError keeps it where only the upload failed.
    """
    if to not in (*WRITERS, PEFT):
        raise InputError(f"cannot convert to {to!r}; choose one of {', '.join((*WRITERS, PEFT))}")
    dst, named = as_path(dst, "DST"), src
    if occupied(dst):
        raise InputError(f"{dst} exists; choose a new destination")
    if push:
        if to != "pytorch":
            raise InputError(f"--push {push} goes with --to pytorch, the format that is read from the Hub")
        check_push(push, private)
    src, base = find_checkpoint(src, "SRC"), base and find_checkpoint(base, "--base")
    if resolved(src) in resolved(dst).parents:
        raise InputError(f"{dst} lies inside {src}: choose a destination outside it")
    adapters = exists(src) and is_adapter_run(src)
    if not adapters and (merge or to == PEFT):
        raise InputError(f"{src} holds no adapters {'to merge' if merge else 'for peft'}: the run had no lora.rank")
    if adapters and merge == (to == PEFT):
        raise InputError(f"{src} holds adapters: --merge gives a whole checkpoint, --to peft only the adapters")
    if to == PEFT and dtype:
        raise InputError(f"{src} holds adapters, which are written as they were trained: omit --dtype")
    if base is not None and to != PEFT:
        raise InputError(f"{base} is a base for adapters: --base goes with --to peft")
    if verify and to in VERIFIED and not _can_verify(to):
        raise InputError(f"{dst} cannot be verified: {MISSING}")
    start = time.perf_counter()
    if to == PEFT:
        return _convert_to_peft(src, dst, base, verify, start)
    origin = origin_of(named, src)
    checkpoint = cast(read_checkpoint(src, zoedepth), dtype)
    if to == "pytorch":
        checkpoint = _with_published_names(checkpoint)
    arrays, digests = recorded(checkpoint.arrays)
    parameters = sum(prod(x.shape) for x in arrays.values())
    skipped = _why_not(to, parameters, verify)
    with parents_of(to_path(dst)):
        about = {"origin": origin, "name": push or "."} if to == "pytorch" else {}
        WRITERS[to](dst, replace(checkpoint, arrays=arrays), **about)
        with kept_after(dst, VerificationError):
            bit_exact = _reads_back(dst, checkpoint, digests)
            verification = run_both(checkpoint, dst) if skipped is None else skipped
    pushed = f"{push}@{push_export(dst, push, private)}" if push and bit_exact else ""
    return {
        "source": str(src),
        "destination": str(dst),
        "format": to,
        "parameters": parameters,
        "tensors": len(arrays),
        "bytes": sum(x.nbytes for x in arrays.values()),
        "bit_exact": bit_exact,
        "verification": verification,
        "release_differences": release_differences(checkpoint.config, checkpoint.processor) if to == "pytorch" else [],
        "pushed": pushed,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _convert_to_peft(
    src: str | AnyPath, dst: str | AnyPath, base: str | AnyPath | None, verify: bool | None, start: float
) -> Conversion:
    run = read_adapters(src, read_checkpoint)
    run = replace(run, base=_with_published_names(run.base), whole=_with_published_names(run.whole))
    skipped = _why_not(PEFT, sum(prod(x.shape) for x in run.whole.arrays.values()), verify)
    with parents_of(to_path(dst)):
        files = torch_code() | export_files(run.whole, origin_of(src, to_path(src)), adapters=True)
        digests = write_peft(dst, run, files, base, torch_code() | export_files(run.base))
        with kept_after(dst, VerificationError):
            stored = safetensors.open_file(to_path(dst) / PEFT_WEIGHTS)
            bit_exact = {name: digest(x.read()) for name, x in stored.items()} == digests
            named = read_json(to_path(dst) / PEFT_CONFIG)["base_model_name_or_path"]
            verification = run_both(in_float32(run), named, dst) if skipped is None else skipped
    return {
        "source": str(src),
        "destination": str(dst),
        "format": PEFT,
        "parameters": sum(prod(x.shape) for x in run.trained.values()),
        "tensors": len(stored),
        "bytes": sum(x.nbytes for x in stored.values()),
        "bit_exact": bit_exact,
        "verification": verification,
        "release_differences": release_differences(run.whole.config, run.whole.processor),
        "pushed": "",
        "seconds": round(time.perf_counter() - start, 3),
    }


def _with_published_names(checkpoint: Checkpoint) -> Checkpoint:
    processor = checkpoint.processor
    return replace(checkpoint, processor=processor and processor.with_published_names())


def _reads_back(path: str | AnyPath, written: Checkpoint, digests: dict[str, str]) -> bool:
    """Whether the config, processor and (by these digests) every byte at `path` equal what was written."""
    read = read_checkpoint(path)
    processors = [c.processor and c.processor.to_dict() for c in (read, written)]
    return (
        read.config == written.config
        and processors[0] == processors[1]
        and {name: digest(x.read()) for name, x in read.arrays.items()} == digests
    )


def _why_not(to: str, parameters: int, verify: bool | None) -> str | None:
    """Why an export is not compared with JAX, as a message; None if it is."""
    if to not in VERIFIED:
        return f"{to} is JAX's own layout: its bytes were read back and compared"
    if verify is False:
        return "not requested"
    if not _can_verify(to):
        return MISSING
    if verify is None and parameters > VERIFIED_BY_DEFAULT:
        return f"{parameters:,} parameters are more than {VERIFIED_BY_DEFAULT:,}: the export was not compared with JAX"
    return None


def _can_verify(to: str) -> bool:
    return available() and (to != PEFT or find_spec("peft") is not None)


def cast(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """The checkpoint with weights in `dtype`, one of DTYPES; unchanged for None. Raises InputError."""
    if dtype is None:
        return checkpoint
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    arrays = {path: array.astype(jnp.dtype(dtype)) for path, array in checkpoint.arrays.items()}
    return replace(checkpoint, arrays=finite(f"in {dtype}", arrays))
