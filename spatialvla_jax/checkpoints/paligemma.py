"""Start pre-training: a SpatialVLA from PaliGemma 2 and, for depth inside the model, ZoeDepth."""

import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatialvla_jax.checkpoints.big_vision import FACTS, open_npz
from spatialvla_jax.checkpoints.hub import find_checkpoint
from spatialvla_jax.checkpoints.huggingface import open_published, open_zoedepth, stacked_arrays
from spatialvla_jax.checkpoints.mapping import check_arrays, flatten, param_shapes
from spatialvla_jax.checkpoints.published_config import (
    CONFIG,
    PART,
    check_fixed,
    gemma2_from_published,
    siglip_from_published,
)
from spatialvla_jax.checkpoints.published_fields import NAMES, PALIGEMMA_FIXED
from spatialvla_jax.checkpoints.regrid import EMBEDDING, HEAD, TABLE
from spatialvla_jax.checkpoints.types import Checkpoint, LazyArray, read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.ego3d import Ego3D
from spatialvla_jax.models.fields import config_from_dict, field_of
from spatialvla_jax.models.gemma2 import Gemma2Config
from spatialvla_jax.models.siglip import SiglipConfig
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.utils.schema import check_stored
from spatialvla_jax.utils.storage import AnyPath, is_file


def is_paligemma(path: AnyPath) -> bool:
    """Whether `path` is a PaliGemma: a Hugging Face directory with its `model_type`, or a .npz without our metadata."""
    if is_file(path):
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                return f"{FACTS}.npy" not in archive.namelist()
        except Exception:  # a damaged file, which its reader will report
            return False
    return is_file(path / CONFIG) and read_json(path / CONFIG).get("model_type") == "paligemma"


def start_from_paligemma(
    paligemma: str | AnyPath, zoedepth: str | AnyPath | None = None, *, seed: int = 0, **changes: Any
) -> Checkpoint:
    """A SpatialVLA ready for pre-training.

    `paligemma` is a Hugging Face directory (names of transformers 4 or 5), its Hub id, or big_vision's .npz. `zoedepth`
    is a Hugging Face directory or Hub id; without it the model takes depth from its data. `changes` are fields of
    SpatialVLAConfig.

    As in the release, the vocabulary gains `<image>` and the action tokens, all initialised to the mean text row. The
    LM head is untied and starts with the same rows; the spatial embedding starts as its action rows. Ego3D is
    initialised from `seed`. Raises InputError for inconsistent inputs.
    """
    path = find_checkpoint(paligemma)
    img, llm, text_vocab, arrays = (_from_npz if path.suffix == ".npz" else _from_directory)(path)
    config = replace(SpatialVLAConfig(img=img, llm=llm, text_vocab=text_vocab, depth_source="dataset"), **changes)
    if zoedepth is not None:
        zoe, zoe_arrays = open_zoedepth(find_checkpoint(zoedepth, "ZoeDepth"))
        arrays |= zoe_arrays
        config = replace(config, depth_source="zoedepth", zoe=zoe)
    config = replace(config, llm=replace(llm, vocab_size=config.action_offset + config.spatial_tokens))
    config.check_sizes(lambda field: f"{path}: {field}")
    shapes = param_shapes(config)
    text, dtype = arrays.pop(TABLE), arrays["img/head/kernel"].dtype

    def rows(first: int, count: int) -> Callable[[], np.ndarray]:
        """Rows [first, first + count) of the extended table."""

        def read() -> np.ndarray:
            table = text.read()[:text_vocab]
            mean = table.mean(axis=0, dtype=np.float64).astype(table.dtype)
            grown = max(first + count - text_vocab, 0)
            return np.concatenate([table, np.broadcast_to(mean, (grown, len(mean)))])[first : first + count]

        return read

    vocabulary = shapes[TABLE][0]
    arrays[TABLE] = arrays[HEAD] = LazyArray(shapes[TABLE], text.dtype, rows(0, vocabulary))
    action_rows = rows(config.action_offset, config.spatial_tokens)
    arrays[EMBEDDING] = LazyArray(shapes[EMBEDDING], text.dtype, action_rows)
    if config.depth_source != "none":
        arrays |= {name: LazyArray.of(x.astype(dtype)) for name, x in _fresh_ego3d(config, seed).items()}
    check_arrays(path, arrays, shapes)
    return Checkpoint(config, {name: arrays[name] for name in shapes}, None)


def _from_directory(path: AnyPath) -> tuple[SiglipConfig, Gemma2Config, int, dict[str, LazyArray]]:
    data, where = read_json(path / CONFIG), f"{path / CONFIG}: "
    check_fixed(data, PALIGEMMA_FIXED, where)
    kinds = {"vision_config": PART, "text_config": PART, "image_token_index": field_of(SpatialVLAConfig, "text_vocab")}
    values = check_stored(data, kinds, where)
    img = siglip_from_published(values["vision_config"], f"{where}vision_config.")
    # Its prefix is bidirectional whether or not the config says so.
    text = {k: v for k, v in values["text_config"].items() if (k, v) != ("use_bidirectional_attention", True)}
    llm, text_vocab = gemma2_from_published(text, f"{where}text_config."), values["image_token_index"]
    if text_vocab > llm.vocab_size:
        raise InputError(f"{where}image_token_index={text_vocab} is not in the vocabulary of {llm.vocab_size}")
    _model(img, llm, text_vocab).check_sizes(lambda field: where + NAMES[field])
    return img, llm, text_vocab, stacked_arrays(path, open_published(path), _paligemma_shapes(img, llm))


def _from_npz(path: AnyPath) -> tuple[SiglipConfig, Gemma2Config, int, dict[str, LazyArray]]:
    arrays = open_npz(path)
    try:
        block = "img/Transformer/encoderblock"
        depth, width, num_heads, _ = arrays[f"{block}/MultiHeadDotProductAttention_0/query/kernel"].shape
        patch = arrays["img/embedding/kernel"].shape[0]
        image_size = patch * round(arrays["img/pos_embedding"].shape[1] ** 0.5)
        img = SiglipConfig(
            image_size, patch, width, depth, num_heads, arrays[f"{block}/MlpBlock_0/Dense_0/bias"].shape[1]
        )
        text_vocab, width = arrays[TABLE].shape
        depth, num_heads, _, head_dim = arrays["llm/layers/attn/q_einsum/w"].shape
        llm = Gemma2Config(
            vocab_size=text_vocab,
            width=width,
            depth=depth,
            mlp_dim=arrays["llm/layers/mlp/linear"].shape[1],
            num_heads=num_heads,
            num_kv_heads=arrays["llm/layers/attn/kv_einsum/w"].shape[2],
            head_dim=head_dim,
            # Only Gemma 2 27B scales by width / heads (Gemma Team 2024, table 1).
            query_pre_attn_scalar=width / num_heads if width == 4608 else head_dim,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{path} is not a PaliGemma 2 of big_vision: {error}") from error
    img = config_from_dict(SiglipConfig, asdict(img), f"{path}: img.")
    llm = config_from_dict(Gemma2Config, asdict(llm), f"{path}: llm.")
    _model(img, llm, text_vocab).check_sizes(lambda field: f"{path}: {field}")
    check_arrays(path, arrays, _paligemma_shapes(img, llm))
    return img, llm, text_vocab, arrays


def _model(img: SiglipConfig, llm: Gemma2Config, text_vocab: int) -> SpatialVLAConfig:
    """The parts in a model without depth, with the extended vocabulary."""
    config = SpatialVLAConfig(img=img, llm=llm, text_vocab=text_vocab, depth_source="none")
    return replace(config, llm=replace(llm, vocab_size=config.action_offset + config.spatial_tokens))


def _paligemma_shapes(img: SiglipConfig, llm: Gemma2Config) -> dict[str, tuple[int, ...]]:
    shapes = param_shapes(SpatialVLAConfig(img=img, llm=llm, depth_source="none"))
    return {path: shape for path, shape in shapes.items() if path not in (HEAD, EMBEDDING)}


def _fresh_ego3d(config: SpatialVLAConfig, seed: int) -> dict[str, np.ndarray]:
    S = config.img.image_size
    ego3d = Ego3D(config.img.width, config.img.patches_per_side, jnp.dtype("float32"))
    params = jax.jit(ego3d.init)(jax.random.key(seed), jnp.ones((1, S, S)), jnp.eye(3)[None])["params"]
    return {f"ego3d/{path}": np.asarray(x) for path, x in flatten(params).items()}
