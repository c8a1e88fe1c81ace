"""Every field that a checkpoint stores about its model and processor is honoured, or refused in one sentence on
reading."""

import contextlib
import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pytest

from spatialvla_jax.actions import decode
from spatialvla_jax.actions.normalization import unnormalize
from spatialvla_jax.checkpoints import Checkpoint
from spatialvla_jax.checkpoints.huggingface import read_description, write_config, write_processor
from spatialvla_jax.checkpoints.mapping import flatten
from spatialvla_jax.checkpoints.processor import Processor, parse_checkpoint
from spatialvla_jax.checkpoints.published_fields import NAMES
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.spatialvla import SpatialVLAConfig

CONFIG, OURS, RELEASE, IMAGES = "config.json", "processor.json", "processor_config.json", "preprocessor_config.json"
STORED = "metadata"  # of an Orbax run, or of a .npz
MISSING = object()


@pytest.fixture(scope="module")
def described(checkpoint: Checkpoint) -> tuple[SpatialVLAConfig, Processor]:
    assert checkpoint.processor is not None
    config = replace(checkpoint.config, depth_source="zoedepth")
    statistics = checkpoint.processor.statistics
    action = statistics["toy"]["action"] | {"q01": [-0.5] * 7, "q99": [0.25] * 6 + [1.0]}
    return config, replace(checkpoint.processor, statistics={"toy": statistics["toy"] | {"action": action}})


@pytest.fixture(scope="module")
def files(described: tuple[SpatialVLAConfig, Processor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """{file name: content} of all JSON files in a published directory, and of our own formats."""
    config, processor = described
    folder = tmp_path_factory.mktemp("described")
    write_config(folder, config, processor, {np.dtype(np.float32)})
    write_processor(folder, processor, config)
    data = {file: json.loads((folder / file).read_text()) for file in (CONFIG, OURS, RELEASE, IMAGES)}
    return data | {STORED: {"model": config.to_dict(), "processor": processor.to_dict()}, "folder": folder}


Read = Callable[..., tuple[SpatialVLAConfig, Processor | None]]


@pytest.fixture(scope="module")
def read(files: dict[str, Any]) -> Read:
    """Read a directory with some files replaced; with `released`, without our own processor.json."""
    folder = files["folder"]

    def read(contents: dict[str, Any], released: bool = False) -> tuple[SpatialVLAConfig, Processor | None]:
        if STORED in contents:
            return parse_checkpoint(json.loads(json.dumps(contents[STORED])), f"{STORED}: ")
        for name in (CONFIG, OURS, RELEASE, IMAGES):
            (folder / name).write_text(json.dumps(contents.get(name, files[name])))
        if released:
            (folder / OURS).unlink()
        return read_description(folder)

    return read


def changed(data: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with `path` set to another value, or removed."""
    data = copy.deepcopy(data)
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


ZOE, BEIT = ("vision_zoe_config",), ("vision_zoe_config", "backbone_config")
ACTION = ("statistics", "toy", "action")
KITTI_FIRST = [
    {"name": n, "n_bins": 8, "min_depth": 0.001, "max_depth": d} for n, d in (("kitti", 80.0), ("nyu", 10.0))
]
CASES = [  # (file, path, value, words in the error): wrong types, null, missing values, values out of range.
    # Of another type, null, missing, out of range.
    (CONFIG, ("text_config",), [], "text_config=[] is a list, but a dict is expected"),
    (CONFIG, ("text_config",), None, "text_config=None is None, but a dict is expected"),
    (CONFIG, ("vision_config",), MISSING, "vision_config is missing"),
    (CONFIG, ("image_token_index",), "300", "image_token_index='300' is a string, but a whole number is expected"),
    (CONFIG, ("image_token_index",), 300.0, "is a number, but a whole number is expected"),
    (CONFIG, ("spatial_token_num",), True, "is true or false, but a whole number is expected"),
    (CONFIG, ("use_vision_zoe",), 1, "is a whole number, but true or false is expected"),
    (CONFIG, ("vision_config", "hidden_size"), -32, "vision_config.hidden_size=-32 is below 1"),
    (CONFIG, ("text_config", "num_hidden_layers"), 10**9, "is above 1024"),
    (CONFIG, ("text_config", "num_attention_heads"), 10**400, "is above"),
    (CONFIG, ("text_config", "query_pre_attn_scalar"), math.nan, "query_pre_attn_scalar=nan is not a finite number"),
    (CONFIG, ("text_config", "attn_logit_softcapping"), None, "is None, but a number is expected"),
    (CONFIG, ("text_config", "rope_theta"), math.inf, "rope_theta=inf is not a finite number"),
    (CONFIG, ("vision_config", "num_attention_heads"), 5, "width 32 must be a multiple of its number of heads, 5"),
    (CONFIG, ("vision_config", "patch_size"), 13, "image_size 56 must be a multiple of its patch_size 13"),
    (CONFIG, ("text_config", "head_dim"), 7, "head_dim 7 must be even"),
    (CONFIG, ("text_config", "num_key_value_heads"), 3, "4 heads must be a multiple of its 3"),
    (CONFIG, (*ZOE, "neck_hidden_sizes"), [16, 24, 32], "has 3 elements, but 4 are expected"),
    (CONFIG, (*ZOE, "min_temp"), 0, "min_temp=0.0 is below 1e-06"),
    (CONFIG, (*BEIT, "num_hidden_layers"), 6, "depth 6 must be a multiple of its number of taps, 4"),
    (CONFIG, ("torch_dtype",), "int8", "torch_dtype='int8' is not one of float32, bfloat16, float16"),
    (CONFIG, ("spatialvla_jax",), [], "spatialvla_jax is [], but a dict is expected"),
    (CONFIG, ("spatialvla_jax", "mask"), "sideways", "spatialvla_jax.mask='sideways' is not one of prefix, causal"),
    (CONFIG, ("spatialvla_jax", "depth_source"), "sonar", "is not one of zoedepth, dataset, none"),
    (CONFIG, ("spatialvla_jax", "remat"), 3, "remat=3 is a whole number, but a string is expected"),
    (CONFIG, ("spatialvla_jax", "prompt_lenght"), 3, "did you mean prompt_length?"),
    # Our model supports one value.
    (CONFIG, ("model_type",), "llava", "model_type='llava' is not supported: it must be 'spatialvla'"),
    (CONFIG, ("ego3d_patch_reso",), 4, "ego3d_patch_reso=4 is not supported: it must be 2"),
    (CONFIG, ("n_freqs",), 10, "n_freqs=10 is not supported: it must be 8"),
    (CONFIG, ("use_spatial_token",), False, "use_spatial_token=False is not supported: it must be True"),
    (CONFIG, ("bos_token_id",), 1, "bos_token_id=1 is not supported: it must be 2"),
    (CONFIG, ("quantization_config",), {"bits": 8}, "quantization_config={'bits': 8} is not supported"),
    (CONFIG, ("text_config", "model_type"), "gemma", "text_config.model_type='gemma' is not supported"),
    (CONFIG, ("text_config", "rms_norm_eps"), 1e-5, "rms_norm_eps=1e-05 is not supported: it must be 1e-06"),
    (CONFIG, ("text_config", "hidden_activation"), "silu", "hidden_activation='silu' is not supported"),
    (CONFIG, ("text_config", "hidden_act"), "gelu", "must be 'gelu_pytorch_tanh'"),
    (CONFIG, ("text_config", "attention_bias"), True, "attention_bias=True is not supported: it must be False"),
    (CONFIG, ("text_config", "attention_bias"), 0, "attention_bias=0 is not supported: it must be False"),
    (CONFIG, ("text_config", "attention_dropout"), 0.1, "attention_dropout=0.1 is not supported: it must be 0.0"),
    (CONFIG, ("text_config", "tie_word_embeddings"), True, "tie_word_embeddings=True is not supported"),
    (CONFIG, ("text_config", "rope_scaling"), {"type": "linear", "factor": 2.0}, "rope_scaling.type='linear' is not"),
    (CONFIG, ("text_config", "rope_parameters"), {"rope_type": "default", "factor": 2.0}, "rope_parameters.factor is"),
    (CONFIG, ("text_config", "rope_parameters"), {"rope_theta": 5.0}, "rope_theta=10000.0 differs from rope_param"),
    (
        CONFIG,
        ("text_config", "layer_types"),
        ["full_attention"] * 4,
        "it must be ['sliding_attention', 'full_attention'",
    ),
    (CONFIG, ("text_config", "use_bidirectional_attention"), True, "use_bidirectional_attention=True is not supported"),
    (CONFIG, ("vision_config", "layer_norm_eps"), 1e-5, "layer_norm_eps=1e-05 is not supported: it must be 1e-06"),
    (CONFIG, ("vision_config", "hidden_act"), "quick_gelu", "hidden_act='quick_gelu' is not supported"),
    (CONFIG, ("vision_config", "num_channels"), 4, "num_channels=4 is not supported: it must be 3"),
    (CONFIG, ("vision_config", "vision_use_head"), True, "vision_use_head=True is not supported"),
    (CONFIG, (*ZOE, "attractor_kind"), "sum", "attractor_kind='sum' is not supported: it must be 'mean'"),
    (CONFIG, (*ZOE, "attractor_alpha"), 300, "attractor_alpha=300 is not supported: it must be 1000"),
    (CONFIG, (*ZOE, "num_attractors"), [16, 8, 4], "has 3 elements, but 4 are expected"),
    (CONFIG, (*ZOE, "bin_centers_type"), "normed", "bin_centers_type='normed' is not supported"),
    (CONFIG, (*ZOE, "bin_configurations"), KITTI_FIRST, "bin_configurations=[{'name': 'kitti'"),
    (CONFIG, (*ZOE, "bin_configurations", 1, "max_depth"), 20.0, "is not supported: it must be [{'name': 'nyu'"),
    (CONFIG, (*ZOE, "bin_configurations", 1), MISSING, "has 1 elements, but 2 are expected"),
    (CONFIG, (*ZOE, "readout_type"), "add", "readout_type='add' is not supported: it must be 'project'"),
    (CONFIG, (*ZOE, "reassemble_factors"), [4, 2, 1, 1], "it must be [4, 2, 1, 0.5]"),
    (CONFIG, (*ZOE, "add_projection"), True, "add_projection=True is not supported"),
    (CONFIG, (*ZOE, "num_patch_transformer_layers"), 3, "it must be 4"),
    (CONFIG, (*ZOE, "backbone_hidden_size"), 64, "backbone_hidden_size=64 is not supported: it must be 32"),
    (
        CONFIG,
        (*BEIT, "out_features"),
        ["stage1", "stage2", "stage3", "stage3"],
        "must be ['stage1', 'stage2', 'stage3', ",
    ),
    (
        CONFIG,
        (*BEIT, "layer_norm_eps"),
        1e-6,
        "backbone_config.layer_norm_eps=1e-06 is not supported: it must be 1e-12",
    ),
    (CONFIG, (*BEIT, "use_relative_position_bias"), False, "use_relative_position_bias=False is not supported"),
    (CONFIG, (*BEIT, "layer_scale_init_value"), 0, "layer_scale_init_value=0.0 is not above 0"),
    # Fields that do not agree.
    (CONFIG, ("image_token_index",), 301, "text_config.vocab_size=431 is not 432: 301 text tokens, <image> and 130"),
    (
        CONFIG,
        ("action_token_begin_idx",),
        300,
        "action_token_begin_idx=300 does not agree with the fields that make it 301",
    ),
    (CONFIG, ("_vocab_size",), 430, "_vocab_size=430 does not agree"),
    (CONFIG, ("projection_dim",), 32, "projection_dim=32 does not agree with the fields that make it 24"),
    (CONFIG, ("text_config", "num_image_tokens"), 256, "num_image_tokens=256 does not agree"),
    (CONFIG, ("vision_config", "num_positions"), 17, "vision_config.num_positions=17 does not agree"),
    (CONFIG, ("spatialvla_jax", "tokens_per_action"), 7, "encodes an action with 3 tokens, and the model with 7"),
    # Our own processor.
    (OURS, ("tokenizer",), MISSING, "tokenizer is missing"),
    (OURS, ("tokenizer",), "…", "is not base64"),
    (OURS, ("tokenizer",), "", "tokenizer: The tokenizer is not a SentencePiece model"),
    (OURS, ("prompt_template",), "do it", "prompt_template='do it' must contain {instruction}"),
    (OURS, ("prompt_template",), "\ud800 {instruction}", "must be Unicode text, without half of a surrogate pair"),
    (OURS, ("prompt_template",), "open " * 50 + "{instruction}", "does not fit the model's prompt_length, 24, without"),
    (OURS, ("prompt_template",), None, "is None, but a string is expected"),
    (OURS, ("grid", "kind"), "cubic", "grid.kind='cubic' is not one of spherical, linear"),
    (OURS, ("grid", "theta"), None, "grid.theta=None is None, but a list is expected"),
    (OURS, ("grid", "phi"), ["a", "b"], "grid.phi[0]='a' is a string, but a number is expected"),
    (OURS, ("grid", "roll", 1), math.nan, "grid.roll[1]=nan is not a finite number"),
    (OURS, ("grid", "roll", 1), 0.99, "must be at least two increasing numbers"),
    (OURS, ("grid", "yaw", 4), 1.5, "leaves the range of yaw, -1 to 1"),
    (OURS, ("grid", "r"), [0.0, 1.0, 1.5], "the grid has 98 tokens, and the model 130"),
    (OURS, ("statistics",), {}, "statistics={} is empty"),
    (OURS, ("statistics", "toy"), [], "statistics['toy']=[] is a list, but a dict is expected"),
    (OURS, (*ACTION, "q01"), MISSING, "statistics['toy'].action.q01 is missing"),
    (OURS, (*ACTION, "q99", 2), None, "action.q99[2]=None is None, but a number is expected"),
    (OURS, (*ACTION, "q99", 2), math.inf, "action.q99[2]=inf is not a finite number"),
    (OURS, (*ACTION, "q99", 2), 1e30, "action.q99[2]=1e+30 is above"),
    (OURS, (*ACTION, "q01", 2), 0.5, "q01[2]=0.5 is above q99[2]=0.25"),
    (OURS, (*ACTION, "min", 0), 9.0, "min[0]=9.0 is above max[0]="),
    (OURS, (*ACTION, "q01", 6), MISSING, "action.q99="),
    (
        OURS,
        (*ACTION, "mask"),
        [True] * 6,
        "has 6 elements, but 7 (or 6 in every row, without the gripper) are expected",
    ),
    (OURS, (*ACTION, "mask", 0), 1, "action.mask[0]=1 is a whole number, but true or false is expected"),
    (OURS, ("intrinsics",), {}, "intrinsics={} is empty"),
    (OURS, ("intrinsics", "toy", 2), MISSING, "has 2 elements, but 3 are expected"),
    (OURS, ("intrinsics", "toy", 0, 0), math.nan, "is not a finite number"),
    (OURS, ("intrinsics", "toy", 0, 0), 0.0, "must have focal lengths above 0"),
    # The release's.
    (RELEASE, ("action_chunk_size",), 1, "action_chunk_size=1 is not the model's action_chunk, 3"),
    (RELEASE, ("action_chunk_size",), 0, "action_chunk_size=0 is below 1"),
    (RELEASE, ("num_obs_steps",), 2, "num_obs_steps=2 is not supported: it must be 1"),
    (RELEASE, ("obs_delta",), 3, "obs_delta=3 is not supported: it must be 1"),
    (RELEASE, ("min_sigma",), "0", "min_sigma='0' is a string, but a number is expected"),
    (RELEASE, ("action_config", "use_spherical"), False, "use_spherical=False is not supported: it must be True"),
    (RELEASE, ("action_config", "num_bins", "total"), 128, "num_bins.total=128 does not agree with the fields"),
    (RELEASE, ("action_config", "num_bins", "gripper"), 3, "num_bins.gripper=3 does not agree"),
    (RELEASE, ("bin_policy",), None, "bin_policy=None is None, but a dict is expected"),
    (RELEASE, ("bin_policy", "rotation", "yaw_bins"), MISSING, "bin_policy.rotation.yaw_bins is missing"),
    (RELEASE, ("bin_policy", "rotation", "yaw_bins", 1), -0.9, "differs from the grid in the processor.json beside it"),
    (RELEASE, (*ACTION, "q01", 0), -0.6, "'toy' has other statistics than in the processor.json beside it"),
    (RELEASE, ("intrinsic_config", "toy", "width"), 0, "intrinsic_config['toy'].width=0 is below 1"),
    (RELEASE, ("intrinsic_config", "toy", "intrinsic"), [[1, 0, 0]] * 3, "intrinsic must"),
    (IMAGES, ("do_normalize",), True, "do_normalize=True is not supported: it must be False"),
    (IMAGES, ("do_normalize",), MISSING, "do_normalize is missing"),
    (IMAGES, ("size", "height"), 224, "size={'height': 224, 'width': 56} is not supported"),
    (IMAGES, ("resample",), 2, "resample=2 is not supported: it must be 3"),
    (IMAGES, ("rescale_factor",), 1.0, "rescale_factor=1.0 is not supported"),
    (IMAGES, ("image_seq_length",), 256, "image_seq_length=256 is not supported: it must be 16"),
    # An Orbax run's, and a .npz file's.
    (STORED, ("processor",), [], "metadata: processor=[] is a list, but a dict is expected"),
    (STORED, ("model",), None, "metadata: model=None is None, but a dict is expected"),
    (STORED, ("model", "llm", "num_heads"), MISSING, "model.llm.num_heads is missing"),
    (STORED, ("model", "llm", "num_headz"), 4, "llm.num_headz is not a field of the model; did you mean num_heads?"),
    (STORED, ("model", "img", "depth"), "2", "model.img.depth='2' is a string"),
    (STORED, ("model", "zoe", "neck_widths"), 3, "neck_widths=3 is a whole number, but a sequence is expected"),
    (STORED, ("model", "unroll"), 0, "model.unroll=0 is a whole number, but true or false is expected"),
    (STORED, ("model", "text_vocab"), 90, "model.llm.vocab_size=431 is not 221"),
    (STORED, ("processor", "grid"), [], "processor.grid=[] is a list, but a dict is expected"),
    (STORED, ("processor", "intrinsics"), None, "processor.intrinsics=None is None, but a dict is expected"),
]


@pytest.mark.parametrize("file, path, value, words", CASES)
def test_bad_fields_are_named(files, read: Read, file: str, path, value, words: str) -> None:
    with pytest.raises(InputError) as raised:
        read({file: changed(files[file], path, value)})
    message = str(raised.value)
    assert words in message and ("json: " in message or "metadata: " in message) and "\n" not in message


HONOURED = [  # (file, path, value, field of the config, its value)
    (CONFIG, ("text_config", "sliding_window"), 17, "llm.sliding_window", 17),
    (CONFIG, ("text_config", "final_logit_softcapping"), 20, "llm.final_softcap", 20.0),
    (CONFIG, ("text_config", "rope_theta"), MISSING, "llm.rope_base", 10_000.0),
    (CONFIG, ("text_config", "head_dim"), MISSING, "llm.head_dim", 256),  # the default of transformers
    (CONFIG, ("vision_config", "num_attention_heads"), 8, "img.num_heads", 8),
    (CONFIG, (*ZOE, "max_temp"), 40, "zoe.max_temperature", 40.0),
    (
        CONFIG,
        (*ZOE, "num_attractors"),
        [4, 3, 2, 1],
        "zoe.bin_embedding_dim",
        16,
    ),  # transformers has 16 whatever it says
    (CONFIG, ("hidden_size",), 2048, "llm.width", 24),  # as in the published file
    (CONFIG, ("spatialvla_jax", "action_chunk"), MISSING, "action_chunk", 3),  # processor_config.json has it
    (CONFIG, ("spatialvla_jax",), MISSING, "dtype", "float32"),
    (STORED, ("model", "mask"), "prefix", "mask", "prefix"),
    (STORED, ("processor", *ACTION, "min", 0), -3.5e36, "mask", "causal"),  # as in a published dataset
]


@pytest.mark.parametrize("file, path, value, field, expected", HONOURED)
def test_values_are_honoured(files, read: Read, file: str, path, value, field: str, expected) -> None:
    config, processor = read({file: changed(files[file], path, value)})
    assert flatten(asdict(config))[field.replace(".", "/")] == expected and processor is not None


@pytest.mark.parametrize("size, chunk", [(1, 1), (5, 5), (MISSING, 1)])
def test_the_chunk_of_a_published_processor(files, read: Read, size, chunk: int) -> None:
    """Only this file has the chunk size if config.json does not; the release's default is 1."""
    config = changed(files[CONFIG], ("spatialvla_jax",), MISSING)
    release = changed(files[RELEASE], ("action_chunk_size",), size)
    assert read({CONFIG: config, RELEASE: release}, released=True)[0].action_chunk == chunk


def test_statistics_without_the_gripper(files, read: Read) -> None:
    """Six quantiles with a mask of six leave the gripper unchanged."""
    data = files[OURS]
    for name in ("q01", "q99", "min", "max", "mask"):
        data = changed(data, (*ACTION, name), data["statistics"]["toy"]["action"][name][:6])
    release = changed(files[RELEASE], ("statistics",), data["statistics"])
    for released in (False, True):
        _, processor = read({OURS: data, RELEASE: release}, released)
        assert processor is not None
        actions = unnormalize(
            np.array([[-1.0] * 6 + [1.0], [1.0] * 6 + [0.0]], np.float32), processor.statistics["toy"]["action"]
        )
        np.testing.assert_array_equal(actions, np.float32([[-0.5] * 6 + [1], [0.25] * 6 + [0]]))


ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    0.5,
    -0.0,
    1e-30,
    1e30,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    2**31,
    2**70,
    "",
    "x",
)
ODD += ("4", "None", "{instruction}", [], [[]], [None], [1, 2, 3], {}, {"a": 1}, [{}])
PUBLISHED = {  # for each of our fields: the files and paths that define it
    **{field.name: (f"{CONFIG}/spatialvla_jax.{field.name}",) for field in fields(SpatialVLAConfig)},
    **{ours: (f"{CONFIG}/{theirs}",) for ours, theirs in NAMES.items()},
    "depth_source": (f"{CONFIG}/spatialvla_jax.depth_source", f"{CONFIG}/use_vision_zoe"),
    "dtype": (f"{CONFIG}/spatialvla_jax.dtype", f"{CONFIG}/torch_dtype"),
    "action_chunk": (f"{CONFIG}/spatialvla_jax.action_chunk", f"{RELEASE}/action_chunk_size"),
}


def places(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """(path, value) of everything in a JSON object."""
    if path:
        yield path, data
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(value, (*path, key))


def near(value: Any, rng: random.Random) -> Any:
    """Another value of the same type, which is often valid too."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1, 8, value))
    if isinstance(value, float):
        return value + rng.choice((-1e-3, 1e-3, 1.0, value))
    if isinstance(value, str) and value:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice("Aa0/ é") + value[place + rng.choice((0, 1)) :]
    return value


def gives(file: str, path: tuple[str | int, ...], ours: str) -> bool:
    """Whether a change at `path` may change our field."""
    place = f"{file}/{'.'.join(map(str, path))}."
    paths = (f"{STORED}/model.{ours}",) if file == STORED else PUBLISHED.get(ours, ())
    return any(place.startswith(f"{other}.") or f"{other}.".startswith(place) for other in paths)


def try_one(files: dict[str, Any], read: Read, seed: int) -> bool:
    """Whether the reader accepts one random change to one file."""
    rng = random.Random(seed)
    file, released = rng.choice((CONFIG, OURS, RELEASE, IMAGES, STORED)), rng.random() < 0.5
    path, value = rng.choice([*places(files[file])])
    change = rng.choice(("near", "near", "near", "odd", "missing", "nested", "extra"))
    new = {
        "near": near(value, rng),
        "odd": rng.choice(ODD),
        "missing": MISSING,
        "nested": rng.choice(([value], {"a": value})),
    }
    if change == "extra":
        path, new[change] = (*path[:-1], "another") if isinstance(path[-1], str) else path, rng.choice(ODD)
    try:
        config, processor = read({file: changed(files[file], path, new[change])}, released)
    except InputError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 700 and (STORED if file == STORED else "json") in message, message
        return False
    original, _ = read({}, released)
    assert processor is not None
    before, after = flatten(asdict(original)), flatten(asdict(config))
    assert all(gives(file, path, name.replace("/", ".")) for name in before if before[name] != after[name]), path
    ends = np.array(
        [
            [start for start, _ in processor.grid.token_ranges],
            [start + n - 1 for start, n in processor.grid.token_ranges],
        ]
    )
    actions = np.asarray(decode(processor.grid, ends))
    for statistics in processor.statistics.values():
        robot = unnormalize(actions, statistics["action"])
        assert robot.shape == (2, 7) and np.isfinite(robot).all()
    with contextlib.suppress(InputError):  # too long for a shorter prompt
        ids, _ = processor.tokenizer.encode_prompt(
            "open it", template=processor.prompt_template, length=config.prompt_length
        )
        assert ids.min() >= 0 and ids.max() < config.text_vocab
    assert np.isfinite(np.float32(list(processor.intrinsics.values()))).all()
    return True


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_file_is_read_or_refused(files, read: Read, examples: int) -> None:
    taken = sum(try_one(files, read, seed) for seed in range(examples))
    assert taken >= 0.3 * examples
