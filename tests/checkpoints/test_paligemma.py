"""Starting a SpatialVLA from PaliGemma 2 and ZoeDepth, compared with transformers."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.torch_reference import randomise
from helpers.zoe_reference import TINY, random_hf_model
from safetensors.numpy import load_file, save_file
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from spatialvla_jax.checkpoints import read_checkpoint, start_from_paligemma
from spatialvla_jax.checkpoints.huggingface import open_zoedepth
from spatialvla_jax.checkpoints.mapping import flatten
from spatialvla_jax.cli import main
from spatialvla_jax.errors import InputError
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.models.attention import position_ids, prefix_lm_mask

TEXT_VOCAB, SPARE = 36, 4  # the published tables also have rows that no token uses


@pytest.fixture(scope="module")
def reference():
    config = PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 42,
            "patch_size": 14,
            "vision_use_head": False,
            "projection_dim": 16,
        },
        text_config={
            "model_type": "gemma2",
            "vocab_size": TEXT_VOCAB + SPARE,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
        },
        image_token_index=TEXT_VOCAB,
        projection_dim=16,
        hidden_size=16,
        attn_implementation="eager",
    )
    return randomise(PaliGemmaForConditionalGeneration(config), seed=0)


def save(folder, model, rename=lambda key: key):
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def test_logits_are_paligemmas(reference, tmp_path):
    """Without Ego3D and before training, text logits equal those of the original PaliGemma."""
    checkpoint = start_from_paligemma(
        save(tmp_path / "pg", reference), depth_source="none", dtype="float32", spatial_tokens=6
    )
    cfg, params = checkpoint.config, checkpoint.params()
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 1, (2, 42, 42, 3)).astype(np.float32)
    ids = rng.integers(3, TEXT_VOCAB, (2, 7))

    def prefix_logits(m, image, ids, mask):
        embeddings, valid = m.embed_prefix(image, ids, mask, None, None)
        hidden = m.llm(embeddings, position_ids(valid), prefix_lm_mask(valid, valid.shape[1]))
        return m.llm.logits(hidden)

    mask = np.ones(ids.shape, bool)
    ours = jax.jit(lambda p: SpatialVLA(cfg).apply({"params": p}, image, ids, mask, method=prefix_logits))(params)
    tokens = np.concatenate([np.full((2, cfg.img.num_tokens), TEXT_VOCAB), ids], axis=1)
    with torch.no_grad():
        expected = reference(
            input_ids=torch.from_numpy(tokens),
            pixel_values=torch.from_numpy(image.transpose(0, 3, 1, 2) * 2 - 1),
            attention_mask=torch.ones(tokens.shape, dtype=torch.int64),
            token_type_ids=torch.zeros(tokens.shape, dtype=torch.int64),
        ).logits
    np.testing.assert_allclose(ours[..., :TEXT_VOCAB], expected[..., :TEXT_VOCAB], rtol=0, atol=1e-4)


def test_the_vocabulary_grows_by_the_mean(reference, tmp_path):
    checkpoint = start_from_paligemma(save(tmp_path / "pg", reference), spatial_tokens=10)
    params = checkpoint.params()
    table = params["llm"]["embedder"]["input_embedding"]
    old = reference.model.language_model.embed_tokens.weight.detach().numpy()[:TEXT_VOCAB]
    assert checkpoint.config.llm.vocab_size == len(table) == TEXT_VOCAB + 1 + 10
    np.testing.assert_array_equal(table[:TEXT_VOCAB], old)
    np.testing.assert_allclose(table[TEXT_VOCAB:], np.tile(old.mean(0), (11, 1)), atol=1e-6)
    np.testing.assert_array_equal(params["llm"]["lm_head"], table)
    np.testing.assert_array_equal(params["spatial_embedding"], table[-10:])
    assert 0 < np.abs(params["ego3d"]["dense_0"]["kernel"]).max() < 0.01


def to_v4(key):
    return key.replace("vision_tower.", "vision_tower.vision_model.")


def to_memory(key):
    return "model." + key.replace("language_model.model.", "language_model.")


@pytest.mark.parametrize("rename", [to_v4, to_memory])
def test_old_and_new_names(reference, tmp_path, rename):
    disk = start_from_paligemma(save(tmp_path / "a", reference)).params()
    other = start_from_paligemma(save(tmp_path / "b", reference, rename)).params()
    jax.tree.map(np.testing.assert_array_equal, disk, other)


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_from_big_vision(reference, tmp_path, prefix):
    """big_vision's .npz, with bfloat16 stored as its void type, gives the same arrays."""
    reference = reference.to(torch.bfloat16)
    try:
        there = start_from_paligemma(save(tmp_path / "pg", reference), spatial_tokens=5)
    finally:
        reference.to(torch.float32)
    arrays = flatten(there.params())
    table = "llm/embedder/input_embedding"
    arrays[table] = arrays[table][:TEXT_VOCAB]
    ours = ("llm/lm_head", "spatial_embedding", "ego3d")
    arrays = {prefix + name: x.view("V2") for name, x in arrays.items() if not name.startswith(ours)}
    np.savez(tmp_path / "pg.npz", **arrays)
    here = start_from_paligemma(tmp_path / "pg.npz", spatial_tokens=5)
    assert here.config == there.config
    jax.tree.map(np.testing.assert_array_equal, here.params(), there.params())
    assert all(x.dtype == ml_dtypes.bfloat16 for x in jax.tree.leaves(here.params()))


def test_with_zoedepth_inside(reference, tmp_path):
    zoedepth = random_hf_model(TINY, seed=1)
    zoedepth.save_pretrained(tmp_path / "zoe")
    source = save(tmp_path / "pg", reference)
    checkpoint = start_from_paligemma(source, tmp_path / "zoe")
    assert checkpoint.config.depth_source == "zoedepth" and checkpoint.config.zoe == TINY
    bias = zoedepth.relative_head.conv1.bias.detach().numpy()
    np.testing.assert_array_equal(checkpoint.params()["zoe"]["relative_head"]["conv1"]["bias"], bias)

    # The `convert` command does the same. It refuses a ZoeDepth for any other model in one line.
    assert (
        main(["convert", str(source), str(tmp_path / "start"), "--to", "orbax", "--zoedepth", str(tmp_path / "zoe")])
        == 0
    )
    assert is_same(read_checkpoint(tmp_path / "start"), read_checkpoint(source, tmp_path / "zoe"))
    with pytest.raises(InputError, match="takes no ZoeDepth"):
        read_checkpoint(tmp_path / "start", tmp_path / "zoe")

    # Also reads the names that transformers 5 uses in memory, with its buffers and a prefix.
    memory = {f"model.{key}": x.numpy() for key, x in (*zoedepth.state_dict().items(), *zoedepth.named_buffers())}
    assert not memory.keys() & load_file(tmp_path / "zoe" / "model.safetensors").keys()
    disk = {path: x.read() for path, x in open_zoedepth(tmp_path / "zoe")[1].items()}
    save_file(memory, tmp_path / "zoe" / "model.safetensors")
    arrays = open_zoedepth(tmp_path / "zoe")[1]
    assert disk.keys() == arrays.keys()
    assert all(np.array_equal(disk[path], x.read()) for path, x in arrays.items())


@pytest.mark.slow
def test_a_zoedepth_in_a_bucket(reference, gcs, tmp_path):
    """A run's `init` and `init_zoedepth` may also be in a bucket."""
    random_hf_model(TINY, seed=1).save_pretrained(tmp_path / "zoe")
    source = save(tmp_path / "pg", reference)
    here = start_from_paligemma(source, tmp_path / "zoe")
    there = start_from_paligemma(gcs.upload(source, "pg"), gcs.upload(tmp_path / "zoe", "zoe"))
    assert here.config == there.config
    jax.tree.map(np.testing.assert_array_equal, here.params(), there.params())
    with pytest.raises(InputError, match=f"{gcs.url}/other"):
        start_from_paligemma(source, f"{gcs.url}/other")


def is_same(a, b):
    return a.config == b.config and all(jax.tree.leaves(jax.tree.map(np.array_equal, a.params(), b.params())))


def test_what_is_no_paligemma_is_named(tmp_path, golden):
    np.savez(tmp_path / "x.npz", a=np.zeros(2, np.float32))
    with pytest.raises(InputError, match="is not a PaliGemma 2 of big_vision"):
        start_from_paligemma(tmp_path / "x.npz")
    with pytest.raises(InputError, match=r"config\.json: model_type='spatialvla' is not supported: it must be 'palig"):
        start_from_paligemma(golden)


CHANGES = {
    "PaliGemma 1": ({"text_config": {"model_type": "gemma"}}, "text_config.model_type='gemma' is not supported"),
    "no text": ({"text_config": None}, "text_config=None is None, but a dict is expected"),
    "image token": (
        {"image_token_index": TEXT_VOCAB + SPARE + 1},
        "image_token_index=41 is not in the vocabulary of 40",
    ),
    "a pooling head": ({"vision_config": {"vision_use_head": True}}, "vision_use_head=True is not supported"),
    "a patch size": ({"vision_config": {"patch_size": 0}}, "vision_config.patch_size=0 is below 1"),
}


@pytest.mark.parametrize("changes, says", CHANGES.values(), ids=CHANGES)
def test_configs_of_other_models_are_named(reference, tmp_path, changes, says):
    config = json.loads(reference.config.to_json_string())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "paligemma", **changes}))
    with pytest.raises(InputError, match=says) as raised:
        start_from_paligemma(tmp_path)
    assert f"{tmp_path / 'config.json'}: " in str(raised.value)


def test_the_start_trains(reference, tmp_path):
    """Every trainable part has a finite, non-zero gradient."""
    checkpoint = start_from_paligemma(save(tmp_path / "pg", reference), dtype="float32", spatial_tokens=9)
    model, params = SpatialVLA(checkpoint.config), checkpoint.params()
    rng = np.random.default_rng(0)

    def loss_of(params):
        logits = model.apply(
            {"params": params},
            rng.uniform(size=(1, 42, 42, 3)).astype(np.float32),
            np.full((1, 4), 5),
            np.ones((1, 4), bool),
            np.arange(9)[None, :4],
            depth=np.ones((1, 42, 42), np.float32),
            intrinsics=np.array([[[42.0, 0, 21], [0, 42, 21], [0, 0, 1]]], np.float32),
        )
        return -jax.nn.log_softmax(logits)[..., TEXT_VOCAB + 1].mean()

    gradients = jax.jit(jax.grad(loss_of))(params)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
    for name in ("img", "llm", "ego3d", "spatial_embedding"):
        assert max(jnp.abs(g).max() for g in jax.tree.leaves(gradients[name])) > 0, name
