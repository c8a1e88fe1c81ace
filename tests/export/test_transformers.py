"""The exported model as used by transformers and its Trainer: loss, generation, flags, saving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from spatialvla_jax.actions import decode, encode
from spatialvla_jax.batch import Batch
from spatialvla_jax.checkpoints import load_pretrained
from spatialvla_jax.export.convert import write_pytorch
from spatialvla_jax.export.verify import INSTRUCTIONS, make_probes, torch_inputs
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.training.step import loss_and_metrics

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def load(path, **options):
    return transformers.AutoModel.from_pretrained(path, trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture
def model(loaded):
    loaded.zero_grad()
    return loaded.eval()


@pytest.fixture(scope="module")
def batch(source) -> Batch:
    """Two examples with prompts of unequal length and actions at the centres of random bins."""
    probes, size = make_probes(56), source.config.img.image_size
    rng = np.random.default_rng(0)
    grid, tokenizer = source.processor.grid, source.processor.tokenizer
    ids = np.stack([first + rng.integers(0, count, (2, 4)) for first, count in grid.token_ranges], -1)
    prompts = [tokenizer.encode_prompt(text, template="{instruction}", length=40) for text in INSTRUCTIONS[:2]]
    prompt_ids, prompt_mask = (np.stack(x) for x in zip(*prompts, strict=True))
    return Batch(
        image=(probes["image"][:2, :size, :size] / 255).astype(np.float32),
        depth=probes["depth"][:2, :size, :size],
        intrinsics=np.array([[[50, 0, 28], [0, 50, 28], [0, 0, 1]]] * 2, np.float32),
        prompt_ids=prompt_ids.astype(np.int32),
        prompt_mask=prompt_mask,
        actions=np.asarray(decode(grid, ids)),
        action_mask=np.ones((2, 4), bool),
        dataset_id=np.zeros(2, np.int32),
    )


@pytest.fixture(scope="module")
def prompt(source, batch):
    """The batch without actions, as the model takes it for prediction."""
    ranges = [[source.config.action_offset + first, count] for first, count in source.processor.grid.token_ranges]
    return torch_inputs(source.config, batch.model_inputs()) | {"token_ranges": torch.tensor(ranges)}


@pytest.fixture(scope="module")
def example(source, batch, prompt):
    """A Trainer's inputs: action tokens and <eos> follow the prompt, and have labels."""
    ids = np.asarray(encode(source.processor.grid, batch.actions)).reshape(2, -1) + source.config.action_offset
    targets = torch.from_numpy(np.concatenate([ids, np.ones((2, 1), int)], 1))
    shape = prompt["input_ids"].shape
    return {name: x for name, x in prompt.items() if name != "token_ranges"} | {
        "input_ids": torch.cat([prompt["input_ids"], targets], 1),
        "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(targets)], 1),
        "token_type_ids": torch.cat([torch.zeros(shape, dtype=int), torch.ones_like(targets)], 1),
        "labels": torch.cat([torch.full(shape, -100), targets], 1),
    }


def training_loss(source, batch):
    return lambda params: loss_and_metrics(SpatialVLA(source.config), params, batch, source.processor.grid)[0].mean()


def test_loss_is_that_of_training(source, model, batch, example):
    """With and without token types, and with padding on either side."""
    expected = float(jax.jit(training_loss(source, batch))(jax.tree.map(jnp.asarray, source.params())))
    with torch.no_grad():
        loss = model(**example).loss
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        assert model(**{name: x for name, x in example.items() if name != "token_type_ids"}).loss == loss
        for sides in ((0, 3), (3, 0)):
            padded = {
                name: torch.nn.functional.pad(x, sides, value=-100 if name == "labels" else 0)
                if x.shape == example["labels"].shape
                else x
                for name, x in example.items()
            }
            assert model(**padded).loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_gradients_are_those_of_training(source, model, batch, example, tmp_path):
    """Compares the gradient of every tensor, by its published name."""
    gradients = jax.jit(jax.grad(training_loss(source, batch)))(jax.tree.map(jnp.asarray, source.params()))
    write_pytorch(tmp_path / "gradients", source.of(source.config, jax.tree.map(np.asarray, gradients), None))
    expected = load_file(tmp_path / "gradients" / "model.safetensors")
    model(**example).loss.backward()
    found = {name: x.grad.numpy() for name, x in model.named_parameters()}
    assert len(found) == len(expected)
    for name, x in expected.items():
        ours = found[name] if name in found else found[name.replace("vision_tower.vision_model.", "vision_tower.")]
        np.testing.assert_allclose(ours, x, rtol=0, atol=1e-3 * max(np.abs(x).max(), 1e-3))


def test_generate_is_predict_action(model, prompt):
    """Holds for a padded batch; <eos> follows where there is room."""
    tokens, length = model.predict_action(prompt), prompt["input_ids"].shape[1]
    assert (prompt["attention_mask"] == 0).any()
    found = model.generate(**prompt)
    assert (found[:, :length] == prompt["input_ids"]).all() and (found[:, length:] == tokens).all()
    found = model.generate(**prompt, max_new_tokens=256, do_sample=False)
    assert (found[:, length:] == torch.nn.functional.pad(tokens, (0, 1), value=1)).all()
    without = {name: x for name, x in prompt.items() if name != "token_ranges"}
    assert (model.generate(**without)[:, length:] == model.predict_action(without)).all()


def test_beams_and_samples_are_chunks(model, prompt):
    """A beam's chunk is at least as likely as the greedy one; sampling also keeps to each token's kind."""
    tokens, length = model.predict_action(prompt), prompt["input_ids"].shape[1]
    beams = model.generate(**prompt, num_beams=3)[:, length:]
    samples = model.generate(**prompt, do_sample=True, num_return_sequences=4)[:, length:]
    for chunks in (beams, samples):
        for place, ids in enumerate(chunks.T):
            first, count = prompt["token_ranges"][place % 3].tolist()
            assert ((ids >= first) & (ids < first + count)).all()
    assert len(beams) == 2 and len(samples) == 8 and len({tuple(x) for x in samples.tolist()}) > 2
    assert tokens.shape == beams.shape


def test_outputs_that_are_asked_for(model, prompt, example):
    inputs = {name: x for name, x in prompt.items() if name != "token_ranges"}
    plain = model(**inputs)
    out = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=True)
    B, T = prompt["input_ids"].shape
    layers = model.config.text_config.num_hidden_layers
    assert torch.equal(out.logits, plain.logits) and plain.attentions is None and plain.past_key_values is None
    assert len(out.hidden_states) == layers + 1 and out.hidden_states[0].shape[:2] == (B, T)
    assert len(out.attentions) == layers and out.attentions[0].shape[2:] == (T, T)
    assert out.past_key_values.get_seq_length() == T
    loss, logits = model(**example, return_dict=False)
    assert loss.ndim == 0 and torch.equal(model(**example).logits, logits)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"position_ids": torch.zeros(2, 3)}, "does not support position_ids"),
        ({"inputs_embeds": torch.zeros(2, 3, 24)}, "does not support inputs_embeds"),
        ({"colour": 1, "shape": 2}, "does not support colour, shape"),
        ({"pixel_values": None}, "hold image tokens, and there are no pixel_values"),
        ({"pixel_values": torch.zeros(1, 3, 56, 56)}, "2 prompts need an image each and 16 image tokens, got 1 images"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask must have shape \[2, \d+\], got \[2, 5\]"),
        ({"token_type_ids": torch.ones(2, 1)}, r"token_type_ids must have shape"),
        ({"past_key_values": transformers.StaticCache}, r"must be a DynamicCache\(\)"),
        ({"labels": torch.zeros(2, 3, dtype=int)}, "labels must have the shape of input_ids"),
        ({"depth": None}, "needs intrinsic and depth"),
        ({"input_ids": None}, "needs input_ids"),
    ],
)
def test_what_is_not_supported_is_refused(model, prompt, options, says):
    if "past_key_values" in options:
        options = {"past_key_values": transformers.StaticCache(config=model.config.text_config, max_cache_len=64)}
    with pytest.raises(ValueError, match=says):
        model(**prompt | options)


def test_labels_that_would_teach_nothing_are_refused(model, example):
    for changed, says in [
        ({"labels": torch.full_like(example["labels"], -100)}, "hold no target"),
        ({"token_type_ids": torch.zeros_like(example["labels"])}, "must be 1 where labels count"),
        ({"logits_to_keep": 3}, "need the logits of all their places"),
    ]:
        with pytest.raises(ValueError, match=says):
            model(**example | changed)
    for call in (model.predict_action, lambda inputs: model.generate(**inputs)):
        with pytest.raises(ValueError, match="labels"):
            call(example)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cache_implementation": "static"}, "does not support cache_implementation"),
        ({"prompt_lookup_num_tokens": 2}, "does not support prompt_lookup_num_tokens"),
        ({"use_cache": False}, "does not support use_cache=False"),
        ({"colour": 1}, "colour"),
        ({"input_ids": None}, "give input_ids"),
        ({"token_ranges": [[257, 64, 3]]}, "token_ranges are"),
        ({"token_ranges": torch.tensor([[[257, 64]]])}, "token_ranges are"),
    ],
)
def test_what_generate_does_not_support_is_refused(model, prompt, options, says):
    with pytest.raises(ValueError, match=says):
        model.generate(**prompt | options)


def test_there_is_no_action_of_numbers_that_are_not_finite(folder, prompt):
    """Non-finite inputs or weights, in any row, raise. So does an infinite logit that the soft cap would hide."""
    model = load(folder)
    free = {name: x for name, x in prompt.items() if name != "token_ranges"}

    def refused(inputs, count):
        for call in (model.predict_action, lambda inputs: model.generate(**inputs)):
            with pytest.raises(
                ValueError, match=f"for {count} of 2 examples are NaN or infinite, so there is no action"
            ):
                call(inputs)

    for value in (torch.nan, 1e30):
        depth = prompt["depth"].clone()
        depth[1, 3, 4] = value
        refused(prompt | {"depth": depth}, 1)
    camera = prompt["intrinsic"].clone()
    camera[1] = 0
    refused(prompt | {"intrinsic": camera}, 1)
    with torch.no_grad():
        model.language_model.lm_head.weight[300] = torch.inf
    refused(free, 2)
    model = load(folder)
    model.predict_action(prompt)
    with torch.no_grad():  # a ReLU turns it into 0
        next(x for name, x in model.named_parameters() if name.endswith("position_embedding_head.1.bias"))[
            0
        ] = -torch.inf
    refused(prompt, 2)


def test_right_padding_is_refused(model, prompt):
    mask = prompt["attention_mask"].clone()
    mask[1, -1] = 0
    for call in (model.predict_action, lambda inputs: model.generate(**inputs)):
        with pytest.raises(ValueError, match="padded on the left"):
            call(prompt | {"attention_mask": mask})


def test_gradient_checkpointing_gives_the_same_gradients(folder, prompt, example):
    plain, checkpointed = load(folder), load(folder)
    checkpointed.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.modules())
    for model in (plain, checkpointed):
        model.train()
        model(**example).loss.backward()
    pairs = zip(plain.named_parameters(), checkpointed.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for (_, a), b in pairs)
    for call in (checkpointed.predict_action, lambda inputs: checkpointed.generate(**inputs)):
        with pytest.raises(ValueError, match=r"call eval\(\) before"):
            call(prompt)


def test_saved_and_read_back(folder, source, model, prompt, tmp_path):
    """transformers and JAX load model and processor from one directory, saved in either order, with equal tensors."""
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.statistics["new"] = processor.statistics["toy"]
    parts = [model, processor]
    for name, order in (("a", parts), ("b", parts[::-1])):
        for part in order:
            part.save_pretrained(tmp_path / name)
        again = load(tmp_path / name)
        assert not again.training
        assert (again.predict_action(prompt) == model.predict_action(prompt)).all()
        read = transformers.AutoProcessor.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert list(read.statistics) == ["toy", "new"] and repr(read) == repr(processor)
        jax_model, params, jax_processor = load_pretrained(tmp_path / name)
        jax.tree.map(np.testing.assert_array_equal, params, source.params())
        assert jax_model.config == source.config
        expected = source.processor.to_dict()
        expected["statistics"] = expected["statistics"] | {"new": expected["statistics"]["toy"]}
        assert jax_processor.to_dict() == expected


def test_dtype_device_and_embeddings(folder, prompt):
    model = load(folder, dtype=torch.bfloat16, device_map="cpu")
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert model(**prompt, logits_to_keep=1).logits.isfinite().all()
    assert model.resize_token_embeddings(model.config.text_config.vocab_size) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="resize_token_embeddings is not supported"):
        model.resize_token_embeddings(500)
    model.tie_weights()
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
