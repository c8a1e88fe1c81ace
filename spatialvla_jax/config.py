"""Configs: plain ml_collections trees from a file with `get_config()`, overridden from the command line and checked."""

import ast
import contextlib
import difflib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.renames import CONFIG_KEYS, renamed
from spatialvla_jax.utils.shipped import shipped
from spatialvla_jax.utils.storage import local_path

# Keys that may change when a run goes on: they touch what is watched, kept and where it runs, not what is computed.
FREE_ON_RESUME = (
    *("checkpoint", "mesh", "train.max_skipped", "train.log_every", "train.eval_every", "train.eval_frames"),
    *("data.root", "data.packed", "data.cache_dir", "data.workers", "data.memory_gb", "data.faults"),
)


def default_config() -> ConfigDict:
    """Every key there is, with the recipe as published; the files in `configs/` change what they need."""
    return ConfigDict(
        {
            "seed": 0,
            "init": "",  # a checkpoint to start from, in any format that `load_pretrained` reads; empty: random
            # Where `init` is a PaliGemma 2 and model.depth_source is zoedepth: the directory of a ZoeDepth.
            "init_zoedepth": "",
            # Where `init` carries an action grid and this config makes another one (paper III-B): make the new spatial
            # table from the old one, and the action rows of the LM head, by interpolation at the new bins' centres.
            "adapt": {"embedding": False, "head": False},
            # Low-rank adapters on the linear layers of `init`, and the spatial table in full, instead of all weights
            # less `optimizer.frozen`. Published: rank 32, alpha 32, all linear layers.
            "lora": {
                "rank": 0,  # 0: none
                "alpha": 32.0,  # the change of a kernel is alpha / rank · B A
                "targets": ("llm", "img", "ego3d"),  # patterns of the kernels' paths
            },
            "model": {
                "preset": "spatialvla-4b-224",
                "depth_source": "zoedepth",  # zoedepth | dataset | none
                "mask": "prefix",  # prefix | causal (the release's training scripts)
                "dtype": "bfloat16",  # of the computation; parameters are float32
                "remat": "dots",  # none | dots | full
                # Compile layer by layer, not a loop over them, which copies what the backward pass needs: 5 % faster at
                # full size on an H100, minutes slower to start.
                "unroll": False,
                "action_chunk": 4,
            },
            "data": {
                "mixture": "",  # of the catalogue, such as oxe_spatial_vla_plus; its datasets lie in the directory root
                "root": "",
                "datasets": [],  # further ones, each {"name", "spec", "path", "weight"}
                "packed": "",  # a file of `data pack` that takes the place of the datasets
                "drop": {},  # {dataset: fraction of the steps after which it gives no more samples}
                "split": "train",  # or a part of it: train[:95%]
                "precomputed_depth": False,  # the depth of `data depth` instead of the datasets' own
                "statistics": "",  # a file of `spatialvla-jax stats`; empty: made from the data when a run begins
                "balance": True,  # multiply weights by dataset sizes, as published
                "faults": {
                    "policy": "fail",
                    "limit": 100,
                },  # skip: leave out damaged data and count it, up to the limit
                "read_block": 1,  # consecutive frames read at once; more for spinning disks and remote storage
                "shuffle_frames": 100_000,  # frames shuffled together where read_block > 1
                "memory_gb": 8.0,  # what a process may hold of data
                "cache_dir": "",  # of the dataset indexes; empty: ~/.cache/spatialvla_jax
                "workers": 0,  # decoding threads; 0: one a core
                "prompt": {
                    "length": 52,  # tokens, <bos> and newline included; 320 in all with image and actions suits GPUs
                    "template": "{instruction}",
                    "model": "",  # PaliGemma's SentencePiece file; empty: a small one trained on the instructions
                    "vocab_size": 256,  # of the small one, at most
                },
            },
            "grid": {
                # gaussian | uniform | linear (256 bins a dimension, 7 tokens an action) | checkpoint (that of init)
                "kind": "gaussian",
                "num_bins": (16, 32, 8, 16, 16, 16),
                "min_sigma": 0.5,
                # Datasets that the Gaussians are not fitted to, as published.
                "exclude": ("language_table", "berkeley_fanuc_manipulation", "cmu_stretch", "jaco_play"),
            },
            "augment": {
                "enabled": True,
                "crop_area": 0.9,
                "crop_area_max": 0.0,  # above it: each example's area is drawn from between the two
                "brightness": 0.2,
                "contrast": 0.2,
                "saturation": 0.2,
                "hue": 0.05,
                "move_intrinsics": True,
            },
            "optimizer": {
                "learning_rate": 2e-5,
                "warmup": 0.005,  # fraction of all steps
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "grad_clip_norm": 1.0,
                "mu_dtype": "float32",  # float32 | bfloat16, of AdamW's first moment
                "ema": 0.0,  # decay of averaged parameters, which are then validated and kept for use; 0: none
                "frozen": ("llm/embedder", "zoe"),  # patterns of parameter paths
            },
            "train": {
                "steps": 120_000,
                "batch_size": 128,
                "grad_accum_steps": 1,
                "max_skipped": 100,  # steps whose loss or gradient is not finite, before the run ends with an error
                "log_every": 50,
                "eval_every": 5_000,
                "eval_split": "val",
                "eval_frames": 0,  # of it, evenly spaced; 0: all
            },
            "checkpoint": {"every": 5_000, "keep_last": 2, "keep_every": 0},
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        }
    )


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """`get_config()` of a Python file with `{"train.steps": "100", …}` applied, over `default_config()`. The file is
    given as for `find_config`.

    Raises InputError for a missing file, a key that does not exist or a value of another type.
    """
    return completed(call_function(find_config(path), "get_config"), overrides or {})


def completed(given: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """`default_config()` with the keys of `given`, under their old or new names, then those of the command line."""
    config = default_config()
    set_keys(config, flatten(renamed(given.to_dict(), CONFIG_KEYS)))
    set_keys(config, {CONFIG_KEYS.get(key, key): text for key, text in overrides.items()})
    for key in ("init", "init_zoedepth"):
        if config[key]:
            config[key] = str(local_path(config[key], f"config key {key}"))
    return config


def check_post_training(config: ConfigDict) -> None:
    """Raises InputError where `adapt`, `lora` and `grid.kind` can't go together; looks at no file."""
    adapting = [f"adapt.{name}" for name, asked in config.adapt.to_dict().items() if asked]
    if adapting and config.grid.kind == "linear":
        raise InputError(f"{adapting[0]} interpolates between bins in space, which grid.kind=linear does not have")
    if not config.init:
        if config.grid.kind == "checkpoint":
            raise InputError("grid.kind=checkpoint keeps the grid of init, and init is empty")
        if config.lora.rank:
            raise InputError(f"lora.rank={config.lora.rank} adapts the weights of init, and init is empty")
        if adapting:
            raise InputError(f"{adapting[0]} adapts the weights of init, and init is empty")
    if config.lora.rank < 0 or config.lora.alpha <= 0:
        raise InputError(f"lora.rank {config.lora.rank} must be 0 or more, lora.alpha {config.lora.alpha} more than 0")


def find_config(path: str | Path) -> Path:
    """A config file by its path or its name: `sweeps/ego3d` is `configs/sweeps/ego3d.py` of the working directory or of
    this project. Raises InputError."""
    for file in (local_path(path, "--config"), shipped(f"configs/{path}.py")):
        if file.is_file():
            return file
    folder = shipped("configs/demo.py").parent
    names = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.py"))
    raise InputError(f"config file {path} does not exist; the configs with a name are {', '.join(names)}")


def call_function(path: Path, name: str) -> Any:
    """What the function `name` of a Python file returns. Raises InputError for a missing function."""
    spec = importlib.util.spec_from_file_location("_user_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise InputError(f"config file {path} has no function {name}()")
    return getattr(module, name)()


def train_config_of(run: Path) -> ConfigDict:
    """The config that a run was trained with, from its directory or one of its checkpoints. Raises InputError."""
    for folder in (run, *run.absolute().parents[:2]):
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            return ConfigDict(renamed(json.loads((folder / "config.json").read_text()), CONFIG_KEYS))
    raise InputError(f"{run} is not in a training run's directory, so --config must name the data")


def set_keys(config: ConfigDict, changes: Mapping[str, Any]) -> None:
    """Set dotted keys, each in the type that it has; a text may stand for a value of that type, as on the command line.

    Raises InputError for a key that does not exist, naming the nearest one, and for a value of another type.
    """
    known = flatten(default_config().to_dict())
    for key in changes:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"config key {key} does not exist; {hint}")
    config.update_from_flattened_dict({key: parse_as(known[key], key, value) for key, value in changes.items()})


def parse_as(current: Any, key: str, value: Any) -> Any:
    kind, given = type(current), value
    if isinstance(value, str) and kind is not str:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise InputError(f"config key {key} is {kind.__name__}, and {given!r} is not")
    return value


def check_resumable(saved: dict[str, Any], config: ConfigDict, workdir: Path) -> None:
    """Raises InputError when a run began under a config that computes something else."""
    now, defaults, began = (
        flatten(json.loads(json.dumps(without_paths(tree))))
        for tree in (config.to_dict(), default_config().to_dict(), renamed(saved, CONFIG_KEYS))
    )
    before = defaults | began  # a key that is younger than the run had its default
    if gone := sorted(before.keys() - defaults.keys()):
        raise InputError(
            f"the run in {workdir} was begun by another version of this program, with {gone[0]} = "
            f"{before[gone[0]]!r}, a config key that does not exist: go on with that version, or use another workdir"
        )
    changed = [
        k
        for k in sorted(now.keys() | before.keys())
        if now.get(k) != before.get(k) and not any(k == f or k.startswith(f + ".") for f in FREE_ON_RESUME)
    ]
    if changed:
        k = changed[0]
        more = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
        raise InputError(
            f"{workdir} holds a run with {k} = {before.get(k)!r}, this config says {now.get(k)!r}{more}; "
            "use its config or another workdir"
        )


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose datasets don't say where they lie: a run may go on where they were moved to."""
    datasets = config["data"].get("datasets", ())
    entries = [{k: v for k, v in entry.items() if k != "path"} for entry in datasets]
    return config | {"data": config["data"] | {"datasets": entries}}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}; `data.drop` is one value, its keys are the user's."""
    flat: dict[str, Any] = {}
    for k, v in tree.items():
        nested = isinstance(v, dict) and f"{prefix}{k}" != "data.drop"
        flat |= flatten(v, f"{prefix}{k}.") if nested else {f"{prefix}{k}": v}
    return flat
