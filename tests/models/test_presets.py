import math

import jax
import pytest
import torch
from helpers.batches import GRID
from helpers.torch_reference import hf_siglip
from transformers import Gemma2Config, Gemma2ForCausalLM

from spatialvla_jax.batch import Batch
from spatialvla_jax.config import default_config
from spatialvla_jax.errors import InputError
from spatialvla_jax.models import PRESETS, SpatialVLA, preset
from spatialvla_jax.models.siglip import SiglipConfig
from spatialvla_jax.training.setup import make_setup
from spatialvla_jax.training.state import abstract_params as abstract_params_of
from spatialvla_jax.training.state import init_params
from spatialvla_jax.training.step import loss_and_metrics, prepare

GEMMA2 = {  # the published configurations of google/gemma-2-2b and -9b
    2304: {"hidden_size": 2304, "num_hidden_layers": 26, "intermediate_size": 9216, "num_attention_heads": 8},
    3584: {"hidden_size": 3584, "num_hidden_layers": 42, "intermediate_size": 14336, "num_attention_heads": 16},
}


def count(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def abstract_params(name: str, **changes) -> dict:
    return jax.eval_shape(lambda: init_params(SpatialVLA(preset(name, **changes)), 0))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.endswith("-224") else pytest.mark.slow)
        for name in PRESETS
        if name.startswith("spatialvla-")
    ],
)
def test_full_sizes_count_what_transformers_counts(name: str) -> None:
    params = abstract_params(name, depth_source="dataset")
    config = PRESETS[name]
    size = {**GEMMA2[config.llm.width], "num_key_value_heads": config.llm.num_kv_heads, "head_dim": 256}
    with torch.device("meta"):
        llm = Gemma2ForCausalLM(Gemma2Config(vocab_size=265_347, tie_word_embeddings=False, **size))
        vision = hf_siglip(SiglipConfig(config.img.image_size, 14, 1152, 27, 16, 4304))
    head = (1152 + 1) * size["hidden_size"]
    assert count(params["llm"]) == sum(p.numel() for p in llm.parameters())
    assert count(params["img"]) == sum(p.numel() for p in vision.parameters()) + head


def test_bad_preset() -> None:
    with pytest.raises(InputError, match="preset 'big' does not exist; choose one of nano"):
        preset("big")
    with pytest.raises(InputError, match="model has no field 'width'"):
        preset("tiny", width=3)


@pytest.mark.parametrize("size", [336, 448])
def test_larger_images_have_more_patches(size: int) -> None:
    """From config to loss: positions, Ego3D and the mask follow the image size."""
    config = default_config()
    config.model.update(preset="small", image_size=size, depth_source="dataset", remat="none")
    config.data.prompt.length = 32
    setup = make_setup(config, GRID)
    params, batch = abstract_params_of(setup), Batch.abstract(setup.model.config, 2, 7)
    assert params["img"]["pos_embedding"].shape == (1, (size // 14) ** 2, 512)
    assert batch.image.shape == (2, size, size, 3)
    loss, _ = jax.eval_shape(
        lambda params, batch: loss_and_metrics(setup.model, params, prepare(batch, None, None), GRID), params, batch
    )
    assert loss.shape == (2,)


def test_an_image_that_patches_do_not_cover() -> None:
    with pytest.raises(InputError, match=r"model\.image_size=230 is not a multiple of 14"):
        preset("small", image_size=230)
    assert preset("small", image_size=0) == preset("small") == preset("small", image_size=224)
