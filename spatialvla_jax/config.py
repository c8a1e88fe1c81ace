"""Configs: plain ml_collections trees from a file with `get_config()`, overridden from the command line and checked."""

import copy
import json
import math
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spatialvla_jax.errors import InputError
from spatialvla_jax.models.presets import CHOICES, PRESETS
from spatialvla_jax.utils.renames import CONFIG_KEYS, renamed
from spatialvla_jax.utils.schema import LARGEST, Field, check, nearest_name, parse, shown
from spatialvla_jax.utils.shipped import shipped
from spatialvla_jax.utils.storage import AnyPath, absolute, as_path, is_dir, is_file, is_url, read_text

# Keys that may change on resuming: they affect logging, checkpointing and placement, but not the result.
FREE_ON_RESUME = (
    "checkpoint",
    "mesh",
    "train.max_skipped",
    "train.log_every",
    "train.eval_every",
    "train.eval_frames",
    "train.spikes",  # changes the result only of a run that has a loss spike
    "data.root",
    "data.cache_dir",
    "data.workers",
    "data.memory_gb",
    "data.faults",
    # How a step fits its devices:
    "train.grad_accum_steps",
    "train.gather_once",
    "model.remat",
    "model.unroll",
)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        return f"is not a regular expression: {error}"
    return ""


def _json(value: Any) -> str:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return f"cannot be stored in the run's config.json: {error}"
    return ""


def _path(text: str) -> str:
    return "has a NUL character" if "\0" in text else ""


def _packed(value: Any) -> str:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return "cannot be read as a dict: {'FILE': weight, 'FILE': weight} is expected"
    for path, weight in value.items() if isinstance(value, dict) else [(value, 1.0)]:
        if not isinstance(path, str) or (not path and isinstance(value, dict)):
            return "has a key that names no file: {FILE: weight} is expected"
        if wrong := _path(path):
            return wrong
        if type(weight) not in (int, float) or not 0 < weight <= LARGEST[float]:
            return f"gives {path} the weight {shown(weight)}, which must be a number above 0, at most {LARGEST[float]}"
    return "" if value or isinstance(value, str) else "names no file"


PATTERN = Field("", "", problem=_pattern)
NAME = Field("", "")
# All keys, with the published recipe as defaults; files in `configs/` override some of them.
KEYS: dict[str, Field] = {
    "seed": Field(
        0, "random seed of the parameters, the order of the data and the augmentation", low=0, high=2**32 - 1
    ),
    "init": Field(
        "",
        "checkpoint to start from, in any format that load_pretrained reads, or its id on the Hugging Face Hub; empty: "
        "random",
        problem=_path,
    ),
    "init_zoedepth": Field(
        "",
        "directory or Hub id of a ZoeDepth, if init is a PaliGemma 2 and model.depth_source is zoedepth",
        problem=_path,
    ),
    # Paper III-B, for an `init` with another action grid than this config's.
    "adapt.embedding": Field(False, "interpolate init's spatial table at the centres of the new grid's bins"),
    "adapt.head": Field(False, "interpolate the action rows of init's LM head too"),
    # Published: rank 32, alpha 32, all linear layers.
    "lora.rank": Field(
        0, "rank of the adapters; only they and the spatial table are then trained; 0: no adapters", low=0
    ),
    "lora.alpha": Field(32.0, "the change of a kernel is alpha / rank · B A", above=0),
    "lora.targets": Field(
        ("llm", "img", "ego3d"), "regular expressions for the paths of the adapted kernels", items=PATTERN
    ),
    "model.preset": Field("spatialvla-4b-224", "sizes of the model", choices=tuple(PRESETS)),
    "model.image_size": Field(
        0, "side of the images, a multiple of the patch's 14; 0: the preset's", low=0, high=1792, unit="pixels"
    ),
    "model.depth_source": Field(
        "zoedepth", "where Ego3D's depth comes from; none: no Ego3D", choices=CHOICES["depth_source"]
    ),
    "model.mask": Field(
        "prefix", "attention in image and prompt; causal: as in the release's training scripts", choices=CHOICES["mask"]
    ),
    "model.dtype": Field("bfloat16", "dtype of the computation; parameters are float32", choices=CHOICES["dtype"]),
    "model.remat": Field("dots", "what the backward pass recomputes to save memory", choices=CHOICES["remat"]),
    # A loop copies what the backward pass needs, but compiles one layer instead of all.
    "model.unroll": Field(False, "unroll the layers instead of looping over them: faster steps, slower compilation"),
    "model.action_chunk": Field(4, "actions predicted at once", low=1, high=1000),
    "data.mixture": Field("", "mixture of the catalogue, such as oxe_spatial_vla_plus"),
    "data.root": Field("", "directory that holds the mixture's datasets", problem=_path),
    "data.datasets": Field(
        [], "further datasets: {name, spec, path, weight, splits}", items=Field({}, "", problem=_json)
    ),
    "data.packed": Field(
        "",
        "file written by `data pack` or `record`, used instead of the datasets; or several, {FILE: weight of its "
        "frames}, with the statistics and tokenizer of the first",
        problem=_packed,
        kinds=(str, dict),
    ),
    "data.drop": Field(
        {},
        "{dataset: the part of the run after which it is no longer sampled}",
        items=Field(0.5, "", above=0, below=1, unit="fraction of the steps"),
    ),
    "data.split": Field("train", "training split, or a part of it: train[:95%]"),
    "data.precomputed_depth": Field(False, "use the depth that `data depth` stored, not the datasets' own"),
    "data.statistics": Field(
        "", "file written by `spatialvla-jax stats`; empty: computed when a run starts", problem=_path
    ),
    "data.balance": Field(True, "multiply weights by the sizes of the datasets, as published"),
    "data.faults.policy": Field(
        "fail", "what to do with damaged data; skip: omit and count it", choices=("fail", "skip")
    ),
    "data.faults.limit": Field(100, "how many faults may be skipped before the run fails", low=0),
    "data.read_block": Field(
        0,
        "consecutive frames read at once, more for spinning disks; 0: one, or for a bucket a number chosen from its "
        "latency and bandwidth",
        low=0,
    ),
    "data.shuffle_frames": Field(100_000, "frames shuffled together where read_block > 1", low=1),
    "data.memory_gb": Field(8.0, "memory that a process may use for data", above=0, unit="GB"),
    "data.cache_dir": Field("", "directory of the dataset indexes; empty: ~/.cache/spatialvla_jax", problem=_path),
    "data.workers": Field(0, "decoding threads; 0: one per core", low=0, high=4096),
    # The length is that of a GPU-friendly 320 tokens in all, with image and actions.
    "data.prompt.length": Field(
        52, "padded length of the prompt, including <bos> and newline", low=2, high=8192, unit="tokens"
    ),
    "data.prompt.template": Field(
        "{instruction}",
        "prompt of the model",
        problem=lambda text: "" if "{instruction}" in text else "must contain {instruction}",
    ),
    "data.prompt.model": Field(
        "", "PaliGemma's SentencePiece file; empty: a small one trained on the instructions", problem=_path
    ),
    "data.prompt.vocab_size": Field(256, "largest vocabulary of the small tokenizer", low=1, high=1_000_000),
    "grid.kind": Field(
        "gaussian",
        "linear: 256 bins per dimension, 7 tokens per action; checkpoint: the grid of init",
        choices=("gaussian", "uniform", "linear", "checkpoint"),
    ),
    "grid.num_bins": Field(
        (16, 32, 8, 16, 16, 16), "bins of theta, phi, r, roll, pitch, yaw", size=6, items=Field(1, "", low=1, high=4096)
    ),
    "grid.min_sigma": Field(0.5, "smallest standard deviation of a fitted Gaussian", low=0, unit="normalised action"),
    # The release's OXE_EXCLUDE_MIXTURE: planar, or of poor quality.
    "grid.exclude": Field(
        ("language_table", "berkeley_fanuc_manipulation", "cmu_stretch", "jaco_play"),
        "datasets excluded when the Gaussians are fitted, as published",
        items=NAME,
    ),
    "augment.enabled": Field(True, "crop and colour jitter"),
    "augment.crop_area": Field(
        0.9, "area of the random crop; 1: no crop", above=0, high=1, unit="fraction of the image"
    ),
    "augment.crop_area_max": Field(
        0.0, "if above crop_area, each example's area is drawn between the two", low=0, high=1
    ),
    "augment.brightness": Field(0.2, "largest change of the brightness", low=0, high=1),
    "augment.contrast": Field(0.2, "largest change of the contrast's factor from 1", low=0, high=1),
    "augment.saturation": Field(0.2, "largest change of the saturation's factor from 1", low=0, high=1),
    "augment.hue": Field(0.05, "largest change of the hue", low=0, high=0.5, unit="turns of the colour wheel"),
    "augment.move_intrinsics": Field(True, "move the camera's intrinsics with the crop"),
    "loss.soft_sigma": Field(
        0.0,
        "standard deviation of Gaussian targets around the true cell, in training; 0: only the true cell",
        low=0.1,
        high=8,
        also=(0,),
        unit="cells",
    ),
    "loss.target": Field(
        "none",
        "in training, also predict the position of the task's object: in the picture (sides of the image), in the "
        "camera's frame, or also relative to the hand, with the fingers' opening; needs packed recordings",
        choices=("none", "pixels", "metres", "reach"),
    ),
    "loss.target_weight": Field(1.0, "weight of its mean absolute error, added to the cross-entropy", above=0),
    "optimizer.learning_rate": Field(2e-5, "peak of the rate, which then decays linearly to 0", low=0),
    "optimizer.warmup": Field(0.005, "linear warm-up", low=0, high=1, unit="fraction of all steps"),
    "optimizer.b1": Field(0.9, "decay of AdamW's first moment", low=0, below=1),
    "optimizer.b2": Field(0.999, "decay of AdamW's second moment", low=0, below=1),
    "optimizer.eps": Field(1e-8, "AdamW's epsilon, against division by zero", low=1e-20),
    "optimizer.weight_decay": Field(0.0, "AdamW's weight decay", low=0, high=1),
    "optimizer.grad_clip_norm": Field(
        1.0, "largest norm of the gradient", above=0, unit="0 would freeze the model; 1e9 clips nothing"
    ),
    "optimizer.mu_dtype": Field("float32", "dtype of AdamW's first moment", choices=("float32", "bfloat16")),
    "optimizer.ema": Field(
        0.0, "decay of the averaged parameters, which are then validated and exported; 0: none", low=0, below=1
    ),
    "optimizer.frozen": Field(
        ("llm/embedder", "zoe"), "regular expressions for the paths of frozen parameters", items=PATTERN
    ),
    "train.steps": Field(120_000, "steps of the whole run", low=1),
    "train.batch_size": Field(128, "examples per step, over all devices", low=1, unit="examples"),
    "train.grad_accum_steps": Field(1, "parts of a batch that are computed one after another", low=1),
    "train.max_skipped": Field(
        100, "steps with a non-finite loss or gradient that are skipped before the run fails", low=0
    ),
    "train.spikes.factor": Field(
        0.0,
        "a loss above this many medians is a spike: return to a checkpoint and continue with later batches; 0: off",
        also=(0,),
        above=1,
    ),
    "train.spikes.window": Field(100, "preceding steps whose median loss is taken", low=1, high=10_000, unit="steps"),
    "train.spikes.rewind": Field(0, "smallest distance to go back", low=0, unit="steps"),
    "train.spikes.limit": Field(10, "spikes after which the run fails", low=0),
    "train.gather_once": Field(
        False,
        "cast matrices, and gather those split over mesh.fsdp, once a step instead of in every layer; takes 2 bytes a "
        "parameter more memory",
    ),
    "train.log_every": Field(50, "interval between records of the metrics", low=1, unit="steps"),
    "train.eval_every": Field(5_000, "interval between validations; 0: none", low=0, unit="steps"),
    "train.eval_split": Field(
        "val", "validation split, or a part of one", problem=lambda text: "" if text else "names no split"
    ),
    "train.eval_frames": Field(0, "validated frames, evenly spaced; 0: all", low=0),
    "checkpoint.every": Field(5_000, "interval between checkpoints", low=1, unit="steps"),
    "checkpoint.keep_last": Field(2, "how many of the newest checkpoints are kept", low=1),
    "checkpoint.keep_every": Field(0, "also keep every checkpoint at this interval; 0: none", low=0, unit="steps"),
    "mesh.data": Field(1, "replicas; -1: all remaining devices", low=1, also=(-1,), unit="devices"),
    "mesh.fsdp": Field(
        -1, "devices that split batch and parameters; -1: all that remain", low=1, also=(-1,), unit="devices"
    ),
    "mesh.tensor": Field(1, "devices that split heads and MLP; -1: all that remain", low=1, also=(-1,), unit="devices"),
}
MAX_TOKENS = 1_000_000  # of a grid, each a row of a table in the model
GROUPS = {key[:n] for key in KEYS for n, char in enumerate(key) if char == "."}


def default_config() -> ConfigDict:
    """A config with the default of every key in `KEYS`. It accepts any key and value; `load_config` checks them."""
    return make_config({})


def make_config(values: Mapping[str, Any]) -> ConfigDict:
    """The defaults with dotted keys changed."""
    # `data` keeps plain dicts: names in data.drop may have dots, which ConfigDict keys must not.
    parts = {part: ConfigDict(type_safe=False, convert_dict=part != "data") for part in ("", *sorted(GROUPS))}
    for group in sorted(GROUPS):
        parent, _, name = group.rpartition(".")
        parts[parent][name] = parts[group]
    for key, value in ({key: field.default for key, field in KEYS.items()} | dict(values)).items():
        group, _, name = key.rpartition(".")
        parts[group][name] = copy.deepcopy(value)
    return parts[""]


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """`get_config()` of a Python file with `{"train.steps": "100", …}` applied, over `default_config()`. The file is
    given as for `find_config`.

    Raises InputError for a missing file, a key that does not exist or a value that `KEYS` does not allow.
    """
    path = find_config(path)
    return completed(call_function(path, "get_config"), overrides or {}, f"get_config() of {path}")


def completed(given: Any, overrides: Mapping[str, str], source: str = "the config") -> ConfigDict:
    """`default_config()` with the keys of `given` (renamed if old) and then those of the command line applied and
    checked. Raises InputError; `source` names `given` in its message."""
    if not isinstance(given, ConfigDict | dict):
        raise InputError(f"{source} must be a config or a dict of its keys, got {shown(given)}")
    try:
        given = given.to_dict() if isinstance(given, ConfigDict) else given
        values = checked(flatten(renamed(given, CONFIG_KEYS)))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    for key, text in overrides.items():
        values |= checked(_override(values, CONFIG_KEYS.get(key, key), text))
    return make_config(values)


def _override(values: Mapping[str, Any], key: str, text: str) -> dict[str, Any]:
    """{key: value} from a command line argument's text. Names in data.drop act as keys: data.drop.droid=0.5."""
    if key.startswith("data.drop."):
        name, items = key.removeprefix("data.drop."), KEYS["data.drop"].items
        return {"data.drop": {**values.get("data.drop", {}), name: parse(text, items) if items else text}}
    return {key: parse(text, KEYS[key]) if key in KEYS else text}


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value}, converted to the types in `KEYS`. Raises InputError for unknown keys and invalid values."""
    for key in values:
        if key not in KEYS:
            group = [known for known in KEYS if known.startswith(f"{key}.")]
            hint = f"{key} is a group of keys: {', '.join(group)}" if group else nearest_name(key, KEYS)
            raise InputError(f"config key {key} does not exist; {hint}")
    values = {key: check(value, KEYS[key], key) for key, value in values.items()}
    for key in ("init", "init_zoedepth"):
        if values.get(key):
            values[key] = str(as_path(values[key], f"config key {key}"))
    return values


def check_together(config: ConfigDict) -> None:
    """Raises InputError for values that are valid alone but not together in a training run. Reads no files."""
    train, areas = config.train, (config.augment.crop_area, config.augment.crop_area_max)
    if train.batch_size % train.grad_accum_steps:
        nearest = max(1, round(train.batch_size / train.grad_accum_steps)) * train.grad_accum_steps
        raise InputError(
            f"train.batch_size={train.batch_size} does not divide by train.grad_accum_steps={train.grad_accum_steps}; "
            f"the nearest valid value is {nearest}"
        )
    reach = (config.checkpoint.keep_last - 1) * config.checkpoint.every
    if train.spikes.factor and train.spikes.rewind > reach:
        raise InputError(
            f"train.spikes.rewind={train.spikes.rewind} goes back further than the oldest checkpoint that is kept: "
            f"(checkpoint.keep_last - 1) × checkpoint.every = {reach} steps"
        )
    if 0 < areas[1] < areas[0]:
        raise InputError(f"augment.crop_area_max={areas[1]} is below augment.crop_area={areas[0]}; 0 draws no areas")
    stale = config.augment.enabled and areas[0] < 1 and not config.augment.move_intrinsics
    if config.loss.target == "pixels" and stale:
        raise InputError(
            "loss.target=pixels needs the intrinsics, which augment.move_intrinsics=False leaves wrong after a crop: "
            "use loss.target=metres or augment.crop_area=1"
        )
    if (sizes := config.mesh.to_dict()) and [*sizes.values()].count(-1) > 1:
        raise InputError(f"mesh={sizes} leaves more than one size open; only one may be -1")
    theta, phi, r, *rotation = config.grid.num_bins
    if (tokens := theta * phi * r + math.prod(rotation)) > MAX_TOKENS:
        raise InputError(
            f"grid.num_bins={config.grid.num_bins} makes {tokens:,} tokens, and {MAX_TOKENS:,} are the most; the "
            "published grid has 8,194"
        )
    adapting = [f"adapt.{name}" for name, asked in config.adapt.to_dict().items() if asked]
    if adapting and config.grid.kind == "linear":
        raise InputError(f"{adapting[0]} interpolates between bins in space, which grid.kind=linear does not have")
    if not config.init:
        if config.grid.kind == "checkpoint":
            raise InputError("grid.kind=checkpoint keeps the grid of init, but init is empty")
        if config.lora.rank:
            raise InputError(f"lora.rank={config.lora.rank} adapts the weights of init, but init is empty")
        if adapting:
            raise InputError(f"{adapting[0]} adapts the weights of init, but init is empty")


def find_config(path: str | Path) -> Path:
    """Find a config file by path or by name: `sweeps/ego3d` means `configs/sweeps/ego3d.py` in the working directory or
    in this project. Raises InputError."""
    if is_url(path):
        raise InputError(f"--config {path} is a URL, but config files are only read from the local disk")
    for file in (as_path(path, "--config"), shipped(f"configs/{path}.py")):
        if file.is_file():
            return file
    folder = shipped("configs/demo.py").parent
    names = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.py"))
    raise InputError(f"config file {path} does not exist; the configs with a name are {', '.join(names)}")


def call_function(path: Path, name: str) -> Any:
    """The result of the function `name` in a Python file. Raises InputError for a missing function, and for any error
    in the file, with its line."""
    namespace: dict[str, Any] = {"__name__": "_user_config", "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), namespace)  # an import would leave a __pycache__ behind
        if callable(function := namespace.get(name)):
            return function()
    except InputError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        reason = " ".join(str(error).split())
        raise InputError(f"{path}, line {line}: {type(error).__name__}: {reason}") from error
    raise InputError(f"config file {path} has no function {name}()")


def train_config_of(run: AnyPath) -> ConfigDict:
    """The config of a training run, given its directory or one of its checkpoints. Raises InputError."""
    folders = (run, *absolute(run).parents[:2])
    for folder in (folder for folder in folders if not is_url(folder) or len(folder.parts) > 2):  # /gs/BUCKET/…
        if is_file(folder / "config.json") and is_dir(folder / "checkpoints"):
            # Not checked: an old run may have values that are no longer valid.
            return make_config(flatten(renamed(json.loads(read_text(folder / "config.json")), CONFIG_KEYS)))
    raise InputError(f"{run} is not in a training run's directory, so --config must name the data")


def check_resumable(saved: dict[str, Any], config: ConfigDict, workdir: AnyPath, source: str = "this config") -> None:
    """Raises InputError if a run's `saved` config computes something else than `config`, which is from `source`."""
    now, before = (decisive(tree) for tree in (config.to_dict(), default_config().to_dict()))
    try:
        before |= decisive(renamed(saved, CONFIG_KEYS))  # keys newer than the run have their defaults
    except (TypeError, AttributeError) as error:
        raise InputError(f"{workdir} holds a run with a damaged config: {error}") from None
    if gone := sorted(before.keys() - KEYS.keys()):
        raise InputError(
            f"the run in {workdir} was started by another version of this program, with {gone[0]} = "
            f"{before[gone[0]]!r}, a config key that does not exist here: use that version or another workdir"
        )
    now["data.packed"], before["data.packed"] = now.get("data.packed", ""), before.get("data.packed", "")
    now["data.read_block"] = now["data.read_block"] or before["data.read_block"]  # 0: chosen at the run's first start
    changed = [key for key in sorted(now) if now[key] != before[key]]
    if changed:
        k = changed[0]
        remedy = "use its config or another workdir"
        try:
            check(before[k], KEYS[k], k)
        except InputError as error:
            remedy = f"that is no longer valid ({error}), so use another workdir"
        more = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
        raise InputError(f"{workdir} holds a run with {k} = {before[k]!r}, {source} says {now[k]!r}{more}; {remedy}")


def decisive(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that determine a run's result, {dotted key: JSON value}. Paths of datasets and packed files are left
    out, since they may be moved (of several packed files, the weights remain). The preset's own image size becomes
    0."""
    values = flatten(json.loads(json.dumps(config)))
    sizes = PRESETS.get(values.get("model.preset", ""))
    if sizes and values.get("model.image_size") == sizes.img.image_size:
        values["model.image_size"] = 0
    if isinstance(packed := values.pop("data.packed", ""), dict) and len(packed) > 1:
        values["data.packed"] = {f"file {n}": weight for n, weight in enumerate(packed.values(), 1)}
    datasets = values.get("data.datasets", ())
    values["data.datasets"] = [{k: v for k, v in entry.items() if k != "path"} for entry in datasets]
    free = tuple(f"{key}." for key in FREE_ON_RESUME)
    return {key: value for key, value in values.items() if not f"{key}.".startswith(free)}


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}. The value of an unknown key is kept whole."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if key in GROUPS and isinstance(value, Mapping) else {key: value}
    return flat
