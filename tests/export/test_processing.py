"""The exported processor, called as users of transformers do."""

import numpy as np
import pytest

from spatialvla_jax.actions import decode, encode
from spatialvla_jax.actions.normalization import unnormalize
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.verify import make_probes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

PROBES = make_probes(56)
IMAGES, DEPTHS = list(PROBES["image"][:2]), list(PROBES["depth"][:2])
TEXTS = ["open the drawer", "put the bowl on the plate"]


@pytest.fixture(scope="module")
def ours(folder):
    return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_a_processor_of_transformers(ours):
    assert isinstance(ours, transformers.ProcessorMixin)
    ids = ours(IMAGES[0], TEXTS[1])["input_ids"][0]
    assert ours.decode(ids).strip() == "what should the robot do to put the bowl on the plate?"
    assert ours.batch_decode(ids[None]) == [ours.decode(ids)]
    assert ours.model_input_names[0] == "input_ids"


def test_images_in_every_usual_form(ours):
    """PIL, NumPy and PyTorch; channels first or last; floating point; lists, nested lists and a batch in one array."""
    expected = ours(images=IMAGES, text=TEXTS, depth=DEPTHS)
    floats = [torch.from_numpy(image).permute(2, 0, 1) / 255 for image in IMAGES]
    for images, options in [
        ([Image.fromarray(image) for image in IMAGES], {}),
        ([[image] for image in IMAGES], {}),
        (np.stack(IMAGES), {}),
        (torch.from_numpy(np.stack(IMAGES)).permute(0, 3, 1, 2), {}),
        (floats, {"do_rescale": False}),
        ([x.numpy() for x in floats], {"images_kwargs": {"do_rescale": False, "do_normalize": False}}),
    ]:
        assert same(ours(images=images, text=TEXTS, depth=np.stack(DEPTHS), **options), expected)
    for images in (IMAGES[0], [IMAGES[0]], [[IMAGES[0]]], IMAGES[0][None]):
        one = ours(images=images, text=TEXTS[0], depth=DEPTHS[0])
        padding = (expected["attention_mask"][0] == 0).sum()
        assert torch.equal(one["input_ids"][0], expected["input_ids"][0, padding:])
        assert all(torch.equal(one[name][0], expected[name][0]) for name in ("pixel_values", "intrinsic", "depth"))
    small = np.ascontiguousarray(IMAGES[0][:56, :56])
    np.testing.assert_array_equal(
        ours(small, "go", do_resize=False)["pixel_values"][0], small.transpose(2, 0, 1) / np.float32(255)
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"images": IMAGES[0]}, "1 images for 2 sentences: each needs its own"),
        ({"text": TEXTS[0]}, "2 images for 1 sentences"),
        ({"images": [IMAGES, IMAGES]}, "one image for each sentence, got a list of 2"),
        ({"images": None}, "0 images for 2 sentences"),
        ({"text": None}, "text is a sentence or a list of them, got None"),
        ({"text": [1, 2]}, r"text is a sentence or a list of them, got \[1, 2\]"),
        ({"text": 3}, "text is a sentence or a list of them, got 3"),
        ({"text": ["\ud800", "go"]}, "text must be without lone surrogates"),
        ({"images": 3}, "0 images for 2 sentences"),
        ({"unnorm_key": 3}, "unnorm_key has 1 rows for 2 sentences"),
        ({"unnorm_key": [3, "toy"]}, "unnorm_key must be a dataset's name, got 3"),
        ({"text": ["<image>open", "go"]}, "text holds <image>"),
        ({"text": ["go", "a b c d e f g h i j k l m n o p q r s t"]}, "tokens, more than the 40 of data.prompt.length"),
        ({"images": [x / 255 for x in IMAGES]}, r"not float64\[70, 84, 3\]; do_rescale=False takes floating point"),
        ({"do_rescale": False}, "an image is floating point.*, not uint8"),
        ({"images": [x.astype(float) for x in IMAGES], "do_rescale": False}, r"values in \[0, 1\], not 8 to 223"),
        ({"images": [x[..., 0] for x in IMAGES]}, r"not uint8\[70, 84\]"),
        ({"do_resize": False}, "56×56 pixels, not 84×70"),
        ({"do_normalize": True}, "do_normalize is True: this processor only supports False"),
        ({"images_kwargs": {"image_mean": [0.5] * 3}}, "does not support image_mean"),
        ({"size": {"height": 32, "width": 32}}, "does not support size"),
        ({"colour": 1}, "does not support colour"),
        ({"truncation": True}, "truncation is True"),
        ({"padding_side": "right"}, "padding_side is 'right': this processor only supports 'left'"),
        ({"return_tensors": "np"}, "return_tensors is 'np'"),
        ({"padding": False}, "padding=False needs prompts of one length"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"padding": "some"}, "padding is 'some'"),
        ({"max_length": 3}, "more than the max_length of 3"),
        ({"unnorm_key": ["toy"]}, "unnorm_key has 1 rows for 2 sentences"),
        ({"intrinsics": np.eye(3)}, "intrinsics has 3 rows for 2 sentences"),
        ({"depth": DEPTHS[:1]}, "depth has 1 rows for 2 sentences"),
        ({"depth": [x * np.nan for x in DEPTHS]}, "depth must be finite"),
        ({"suffix_actions": np.zeros((2, 4, 6))}, r"normalised actions \[4, 7\], all finite: got \[4, 6\]"),
        ({"suffix_actions": np.full((2, 4, 7), np.nan)}, "all finite"),
    ],
)
def test_what_makes_no_sense_is_refused(ours, options, says):
    with pytest.raises(ValueError, match=says):
        ours(**{"images": IMAGES, "text": TEXTS} | options)


def test_the_prompt_limit_is_the_policys(ours, source):
    text = "a b c d e f g h i j k l m n o p q r s t"
    with pytest.raises(InputError) as policys:
        source.processor.tokenizer.encode_prompt(text, template=source.processor.prompt_template, length=40)
    with pytest.raises(ValueError) as raised:
        ours(IMAGES[0], text)
    assert str(raised.value) == str(policys.value)


def test_padding_to_a_length(ours):
    shortest = ours(IMAGES, TEXTS)
    padded = ours(IMAGES, TEXTS, text_kwargs={"padding": "max_length", "max_length": 60})
    extra = 16 + 60 - shortest["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(padded[name], torch.nn.functional.pad(shortest[name], (extra, 0)))
    assert same(ours(IMAGES, TEXTS, padding="longest", max_length=60), shortest)


def test_training_examples(ours, source):
    """Labels are the action tokens, as JAX encodes them, and <eos>. Only these count in the loss and are causal."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (2, 4, 7)).astype(np.float32)
    actions[0, 0, :3] = 0
    prompt, example = ours(IMAGES, TEXTS), ours(IMAGES, TEXTS, suffix_actions=actions)
    ids = np.asarray(encode(source.processor.grid, actions)).reshape(2, -1) + source.config.action_offset
    targets = torch.from_numpy(np.concatenate([ids, np.ones((2, 1), int)], 1))
    ignored, zeros = torch.full_like(prompt["input_ids"], -100), torch.zeros_like(prompt["input_ids"])
    assert torch.equal(example["labels"], torch.cat([ignored, targets], 1))
    assert torch.equal(example["input_ids"], torch.cat([prompt["input_ids"], targets], 1))
    assert torch.equal(example["token_type_ids"], torch.cat([zeros, torch.ones_like(targets)], 1))
    assert example["attention_mask"].sum() == prompt["attention_mask"].sum() + 26 and "token_ranges" not in example
    one = ours(IMAGES[1], TEXTS[1], suffix_actions=torch.from_numpy(actions[1]))
    assert torch.equal(one["labels"][0, -13:], example["labels"][1, -13:])


def test_decoding_of_batches_lists_and_arrays(ours, source):
    """Decodes to robot units like JAX, including ids of the wrong kind; <eos> may follow."""
    ids = np.random.default_rng(0).integers(0, source.config.llm.vocab_size, (3, 12))
    grid, statistics = source.processor.grid, source.processor.statistics["toy"]["action"]
    tokens = (ids - source.config.action_offset).reshape(3, 4, 3)
    expected = unnormalize(np.asarray(decode(grid, np.maximum(tokens, 0))), statistics)
    ended = np.concatenate([ids, np.ones((3, 1), int)], 1)
    for given in (ids, torch.from_numpy(ids), ids.tolist(), ended, torch.from_numpy(ended)):
        found = ours.decode_actions(given)
        np.testing.assert_allclose(found["actions"], expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(found["action_ids"], ids.reshape(3, 4, 3))
    for given in (ids[0], ids[:1], ids[0].tolist(), torch.from_numpy(ids[:1])):
        np.testing.assert_allclose(ours.decode_actions(given, "toy")["actions"], expected[0], rtol=0, atol=1e-6)
    assert ours.decode_actions(ids, ["toy"] * 3)["actions"].shape == (3, 4, 7)


@pytest.mark.parametrize(
    ("given", "key", "says"),
    [
        (np.zeros((2, 11), int), None, r"4 × 3 token ids, without the prompt's: got int64\[2, 11\]"),
        (np.zeros((2, 13), int), None, r"got int64\[2, 13\]"),
        (np.zeros((1, 2, 12), int), None, r"got int64\[1, 2, 12\]"),
        (np.zeros((0, 12), int), None, r"got int64\[0, 12\]"),
        (np.zeros(12), None, "got float64"),
        (np.zeros((2, 12), int), "other", "unnorm_key 'other' is not one of toy"),
        (np.zeros((2, 12), int), ["toy"], "unnorm_key has 1 rows for 2"),
    ],
)
def test_what_is_no_chunk_is_refused(ours, given, key, says):
    with pytest.raises(ValueError, match=says):
        ours.decode_actions(given, key)


def test_saved_alone_and_read_back(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert same(again(IMAGES, TEXTS), ours(IMAGES, TEXTS))
    again.save_pretrained(tmp_path)  # over itself
    for call in (
        lambda: again.save_pretrained(tmp_path, colour=1),
        lambda: type(again).from_pretrained(tmp_path, colour=1),
    ):
        with pytest.raises(ValueError, match="does not support colour"):
            call()
