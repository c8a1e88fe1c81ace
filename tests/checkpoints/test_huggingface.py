import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.checkpoints import equal
from safetensors.numpy import load_file, save_file

from spatialvla_jax.actions import linear_grid
from spatialvla_jax.checkpoints import huggingface, read_huggingface, write_huggingface
from spatialvla_jax.checkpoints import safetensors_io as safetensors
from spatialvla_jax.checkpoints.mapping import published_name
from spatialvla_jax.checkpoints.published_config import config_from_published, config_to_published
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.convert import cast
from spatialvla_jax.models import preset


@pytest.fixture
def directory(tmp_path, checkpoint):
    """A directory in our layout, to be damaged."""
    write_huggingface(tmp_path / "model", checkpoint)
    return tmp_path / "model"


def edit_json(file, **changes):
    data = json.loads(file.read_text())
    data.update(changes)
    file.write_text(json.dumps(data))


def edit_weights(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_what_we_write_we_read_back(checkpoint, directory):
    assert equal(read_huggingface(directory), checkpoint)


def test_bfloat16_in_shards(checkpoint, tmp_path, monkeypatch):
    """No shard exceeds the limit, the index names every tensor, and the bytes equal a single file's."""
    narrow = cast(checkpoint, "bfloat16")
    write_huggingface(tmp_path / "one", narrow)
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 40_000)
    write_huggingface(tmp_path / "many", narrow)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    one, many = safetensors.open_directory(tmp_path / "one"), safetensors.open_directory(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(one[key].read().tobytes() == many[key].read().tobytes() for key in one)
    assert all(tensor.dtype == ml_dtypes.bfloat16 for tensor in many.values())
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 40_000
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.read().nbytes for t in many.values())
    assert equal(read_huggingface(tmp_path / "many"), narrow)


def test_config_of_the_published_model(golden):
    """The released 4 B config relies on transformers' defaults for some fields; reading it must give ours."""
    published = {
        "model_type": "spatialvla",
        "_vocab_size": 265347,
        "action_token_begin_idx": 257153,
        "ego3d_patch_reso": 2,
        "hidden_size": 2048,  # of PaliGemma 1; nothing reads it
        "image_token_index": 257152,
        "n_freqs": 8,
        "num_hidden_layers": 26,
        "projection_dim": 2304,
        "spatial_token_num": 8194,
        "use_spatial_token": True,
        "torch_dtype": "bfloat16",
        "use_vision_zoe": True,
        "vision_zoe_config": config_to_published(preset("spatialvla-4b-224"), set())["vision_zoe_config"],
        "text_config": {
            "eos_token_id": [1, 107],
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_image_tokens": 256,
            "tie_word_embeddings": False,
            "num_key_value_heads": 4,
            "vocab_size": 265347,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_image_tokens": 256,
            "num_positions": 256,
            "patch_size": 14,
            "projection_dim": 2304,
            "vision_use_head": False,
        },
    }
    assert config_from_published(published) == preset("spatialvla-4b-224")


@pytest.mark.parametrize("name", ["tiny", "mini", "small", "spatialvla-4b-224"])
def test_config_round_trip(name):
    config = preset(name, mask="causal", prompt_length=17)
    assert config_from_published(json.loads(json.dumps(config_to_published(config, {np.dtype("f4")})))) == config


def test_published_config_fields_come_back(golden):
    """Every field that we write has the published value. Outside ZoeDepth, every published field is written."""
    published = json.loads((golden / "config.json").read_text())
    ours = config_to_published(config_from_published(published), {np.dtype("f4")})
    # transformers 4 adds its own fields to nested configs and drops the number of attractors.
    skip = {"transformers_version", "_attn_implementation_autoset", "architectures", "torch_dtype", "num_attractors"}

    def check(a, b, where):
        for key, value in a.items():
            if key in skip or (where.startswith("vision_zoe_config") and key not in b):
                continue
            assert key in b, f"{where}{key}"
            if isinstance(value, dict):
                check(value, b[key], f"{where}{key}.")
            else:
                assert b[key] == value, f"{where}{key}"

    check(published, ours, "")


def test_release_processor_files(checkpoint, directory, processor):
    """Without processor.json, the release's own files give the same grid, statistics, intrinsics and tokenizer."""
    (directory / "processor.json").unlink()
    read = read_huggingface(directory).processor
    assert read is not None
    assert read.tokenizer.vocab_size == checkpoint.config.text_vocab  # with pieces that no text produces
    for text in ("put the bowl on the plate", "open it"):
        ids = [x.encode_prompt(text, length=40)[0].tolist() for x in (read.tokenizer, processor.tokenizer)]
        assert ids[0] == ids[1]
    assert read.statistics == processor.statistics
    assert read.intrinsics == {"default": processor.intrinsics["toy"]} | processor.intrinsics
    jax.tree.map(np.testing.assert_array_equal, read.grid, processor.grid)
    release = json.loads((directory / "processor_config.json").read_text())
    assert release["action_config"]["num_bins"]["total"] == processor.grid.vocab_size
    assert release["action_chunk_size"] == checkpoint.config.action_chunk
    (directory / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.model"):
        read_huggingface(directory)


def test_a_linear_grid_has_no_release_files(checkpoint, processor, tmp_path):
    config = replace(checkpoint.config, tokens_per_action=7)
    linear = replace(checkpoint, config=config, processor=replace(processor, grid=linear_grid(130)))
    write_huggingface(tmp_path / "m", linear)
    assert not (tmp_path / "m" / "processor_config.json").exists()
    assert equal(read_huggingface(tmp_path / "m"), linear)


def weights(edit):
    return lambda d: edit_weights(d, edit)


def write(file, text):
    return lambda d: (d / file).write_text(text)


def cut(end):
    return lambda d: (d / MODEL).write_bytes((d / MODEL).read_bytes()[:end])


def not_finite(tensors):
    tensors["language_model.model.norm.weight"][3] = np.nan
    tensors["multi_modal_projector.linear.bias"][0] = np.inf


def absent_shard(d):
    weight_map = dict.fromkeys(load_file(d / MODEL), "model-00001-of-00002.safetensors")
    (d / MODEL).rename(d / "other.safetensors")
    (d / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def more_tokens(d):
    text = json.loads((d / "config.json").read_text())["text_config"]
    edit_json(d / "config.json", spatial_token_num=131, _vocab_size=432, text_config=text | {"vocab_size": 432})
    for file in d.glob("*processor*"):
        file.unlink()


def deeper_config(d):
    text = json.loads((d / "config.json").read_text())["text_config"]
    edit_json(d / "config.json", num_hidden_layers=5, text_config=text | {"num_hidden_layers": 5})


MODEL, INDEX, TABLE = "model.safetensors", "model.safetensors.index.json", "spatial_embed_tokens.weight"
EXTRA = {f"extra.{i:02}": np.zeros(2, np.float32) for i in range(12)}
ONE = "language_model.model.layers.2.mlp.down_proj.weight"
DAMAGES = {  # {fault: (how to damage the directory, words in the error)}
    "unknown": (weights(lambda t: t.update(EXTRA)), r"12 tensors unknown: extra\.00, .*extra\.09, …"),
    "missing": (weights(lambda t: t.pop(TABLE)), r"1 tensor missing: spatial_embed_tokens\.weight"),
    "misshapen": (
        weights(lambda t: t.update({TABLE: np.zeros((130, 25), np.float32)})),
        r"a shape other than .*spatial_embed_tokens\.weight \(130, 25\) instead of \(130, 24\)",
    ),
    "integer": (
        weights(lambda t: t.update({TABLE: np.zeros((130, 24), np.int32)})),
        r"a dtype other than F32, BF16, F16: spatial_embed_tokens\.weight \(I32\)",
    ),
    "mixed layers": (
        weights(lambda t: t.update({ONE: t[ONE].astype(np.float16)})),
        r"a dtype other than .*layers\.2\.mlp\.down_proj",
    ),
    "not finite": (weights(not_finite), r"2 tensors not finite: language_model\.model\.norm\.weight, multi_modal"),
    "truncated": (cut(-100), r"cut short: \d+ bytes of \d+"),
    "truncated header": (cut(100), "cut short inside its header"),
    "no weights": (lambda d: (d / MODEL).unlink(), rf"neither {MODEL} nor {INDEX}"),
    "absent shard": (
        absent_shard,
        r"93 tensors in a shard that does not exist: .*\(model-00001-of-00002\.safetensors\)",
    ),
    "wrong index": (
        write(INDEX, json.dumps({"weight_map": {"no.such.key": MODEL}})),
        r"1 tensor named but in no shard: no\.such\.key",
    ),
    "other config": (
        more_tokens,
        r"spatial_embed_tokens\.weight \(130, 24\) instead of \(131, 24\)",
    ),
    "deeper config": (deeper_config, r"11 tensors missing: language_model\.model\.layers\.4\."),
    "poor config": (
        write("config.json", '{"model_type": "paligemma", "text_config": {}, "vision_config": {}}'),
        "model_type='paligemma' is not supported: it must be 'spatialvla'",
    ),
    "no JSON": (write("config.json", "{"), "cannot be read as JSON"),
}


@pytest.mark.parametrize("damage, says", DAMAGES.values(), ids=DAMAGES)
def test_bad_directories_are_named(directory, damage, says):
    damage(directory)
    with pytest.raises(InputError, match=says) as raised:
        read_huggingface(directory).params()
    assert str(directory) in str(raised.value) and "\n" not in str(raised.value)


def test_tensors_of_an_unused_zoedepth_are_an_error(golden, tmp_path):
    """The model takes depth from its data, so ZoeDepth's tensors are unexpected."""
    shutil.copytree(golden, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", spatialvla_jax={"depth": "dataset"})
    with pytest.raises(InputError, match="287 tensors unknown: vision_zoe_model"):
        read_huggingface(tmp_path / "m")


def test_the_destination_stays_as_it_was(checkpoint, directory, tmp_path):
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    with pytest.raises(InputError, match="exists"):
        write_huggingface(directory, checkpoint)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    arrays = {path: array for path, array in checkpoint.arrays.items() if path != "spatial_embedding"}
    with pytest.raises(InputError, match=r"1 tensor missing for its config: spatial_embedding"):
        write_huggingface(tmp_path / "new", replace(checkpoint, arrays=arrays))
    assert [p.name for p in tmp_path.iterdir()] == [directory.name]


def test_casting_is_rounding(checkpoint, tmp_path):
    write_huggingface(tmp_path / "m", cast(checkpoint, "bfloat16"))
    wide, narrow = checkpoint.params(), read_huggingface(tmp_path / "m").params()
    same = jax.tree.map(lambda a, b: np.array_equal(jnp.asarray(a, jnp.bfloat16), b), wide, narrow)
    assert all(jax.tree.leaves(same))


def in_memory(key):
    """A key as transformers 5 names it in memory."""
    key = key.removeprefix("language_model.") if "lm_head" in key else key
    for old, new in (
        ("language_model.model.", "language_model."),
        ("vision_tower.vision_model.", "vision_tower."),
        (".backbone.", ".backbone.beit."),
        (".encoder.layer.", ".layers."),
        (".attention.attention.relative_position_bias.", ".relative_position_bias."),
        (".attention.attention.query.", ".attention.q_proj."),
        (".attention.attention.key.", ".attention.k_proj."),
        (".attention.attention.value.", ".attention.v_proj."),
        (".attention.output.dense.", ".attention.o_proj."),
        (".intermediate.dense.", ".mlp.fc1."),
        (".output.dense.", ".mlp.fc2."),
    ):
        key = key.replace(old, new)
    return key if key.startswith("lm_head") else f"model.{key}"


SPELLINGS = (
    in_memory,
    "model.{}".format,
    lambda key: key.removeprefix("vision_tower."),
    lambda key: key.replace("vision_model.", "") if key.startswith("vision_tower.") else key,
    lambda key: key.replace("language_model.lm_head", "lm_head"),
    lambda key: key,
)


def test_other_spellings_are_one_key(golden):
    keys = safetensors.open_directory(golden).keys()
    for spelling in SPELLINGS:
        assert [published_name(spelling(key)) for key in keys] == [*keys]


def test_other_spellings_and_buffers_are_read(golden, tmp_path):
    """A model saved under transformers 5's in-memory names, with its computed buffers, gives the same arrays."""
    shutil.copytree(golden, tmp_path / "m")
    bias = "vision_zoe_model.backbone.encoder.layer.0.attention.attention.relative_position_bias"
    buffers = {
        "vision_tower.vision_model.embeddings.position_ids": np.arange(16)[None],
        "language_model.model.rotary_emb.inv_freq": np.ones(4, np.float32),
        f"{bias}.relative_position_index": np.zeros((5, 5), np.int64),
    }
    stored = load_file(golden / MODEL) | buffers
    save_file({in_memory(key): x for key, x in stored.items()}, tmp_path / "m" / MODEL)
    assert equal(read_huggingface(tmp_path / "m"), read_huggingface(golden))


def test_one_tensor_under_two_names_is_refused(directory):
    edit_weights(directory, lambda t: t.update({f"model.{TABLE}": t[TABLE] + 1}))
    with pytest.raises(InputError, match=rf"2 tensors under two names: model\.{TABLE}, {TABLE}"):
        read_huggingface(directory)
