"""An export in the release's own processor: same token ids as published, same prompt tokens as here."""

import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
from helpers.release_processor import LOCATIONS, ReleaseProcessor

from spatialvla_jax.actions import linear_grid
from spatialvla_jax.checkpoints import read_huggingface, write_huggingface
from spatialvla_jax.checkpoints.release import release_differences
from spatialvla_jax.checkpoints.release_tokenizer import padded
from spatialvla_jax.checkpoints.types import LazyArray
from spatialvla_jax.models import PRESETS
from spatialvla_jax.text import Tokenizer, render, train_tokenizer

SENTENCES = (
    *("put the bowl on the plate", "  Open the   TOP drawer ", "", "a", "pick up 3 cans!?", "naïve café – 開ける"),
    *("a \n b", "tab\tand\u00a0space", "aaaa aaa aaaaaaa", "<unused7> <pad99>"),
)


def like_paligemma(size: int) -> Tokenizer:
    """A tokenizer with byte fallback, preserved spaces, location tokens and pieces for runs of newlines."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["put the bowl on the plate", "open  the drawer", "aaa aa aaaa"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        user_defined_symbols=["\n", "\n\n", "<table>", *LOCATIONS],
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>"},
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


TOKENIZERS = {
    "built in": train_tokenizer(["put the bowl on the plate", "open the drawer", "aaa aa aaaa"], 128),
    "like PaliGemma's": like_paligemma(1500),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def export(request, checkpoint, tmp_path_factory):
    """(directory, checkpoint) for one of the tokenizers."""
    tokenizer = TOKENIZERS[request.param]
    text_vocab = 300 if request.param == "built in" else tokenizer.vocab_size
    config, table = checkpoint.config, "llm/embedder/input_embedding"
    shape = (text_vocab + 1 + config.spatial_tokens, config.llm.width)
    config = replace(config, text_vocab=text_vocab, llm=replace(config.llm, vocab_size=shape[0]))
    arrays = checkpoint.arrays | {
        name: LazyArray.of(np.zeros(shape, np.float32))
        for name, x in checkpoint.arrays.items()
        if name in (table, "llm/lm_head")
    }
    made = replace(
        checkpoint, config=config, arrays=arrays, processor=replace(checkpoint.processor, tokenizer=tokenizer)
    )
    directory = tmp_path_factory.mktemp("release") / "export"
    write_huggingface(directory, made)
    return directory, made


def expected(tokenizer: Tokenizer, prompts: list[str]) -> list[list[int]]:
    """Token ids of `prompts`, which are rendered already."""
    ids, mask = tokenizer.encode_prompts(prompts, length=1000)
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def test_published_ids(export):
    directory, checkpoint = export
    ids = ReleaseProcessor(directory).ids
    config = json.loads((directory / "config.json").read_text())
    assert ids["image"] == config["image_token_index"] == checkpoint.config.text_vocab
    assert ids["action"] == config["action_token_begin_idx"] == checkpoint.config.action_offset
    assert [ids[f"{name}_token"] for name in ("pad", "eos", "bos", "unk")] == [0, 1, 2, 3]
    assert [config[f"{name}_token_id"] for name in ("pad", "eos", "bos")] == [0, 1, 2]


def test_transformers_gives_them_too(export):
    from transformers import GemmaTokenizer

    directory, checkpoint = export
    tokenizer = GemmaTokenizer.from_pretrained(directory)
    text = f"<image>{tokenizer.bos_token}open the drawer<ACTION00000><ACTION00129>\n"
    first = checkpoint.config.action_offset
    (prompt,) = expected(checkpoint.processor.tokenizer, ["open the drawer"])
    wanted = [checkpoint.config.text_vocab, *prompt[:-1], first, first + 129, prompt[-1]]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == wanted


def test_prompts_are_split_as_here(export):
    """One by one and as a padded batch; the padded SentencePiece model splits them alike."""
    directory, checkpoint = export
    tokenizer, draw = checkpoint.processor.tokenizer, random.Random(0)
    words = ["put", "the", "bowl", "plate", "drawer", "aaa", "a", "zebra", "4", "?", "é", "開", "▁", " ", "  ", "\t"]
    texts = [*SENTENCES, *("".join(draw.choices([*words, *"abc .,<>"], k=draw.randrange(20))) for _ in range(100))]
    prompts = [render(text, "{instruction}") for text in texts]
    wanted = expected(tokenizer, prompts)
    ids, mask = ReleaseProcessor(directory).encode(prompts)
    images = [checkpoint.config.text_vocab] * checkpoint.config.img.num_tokens
    assert [row[kept == 1].tolist() for row, kept in zip(ids, mask, strict=True)] == [images + row for row in wanted]
    assert (ids[mask == 0] == 0).all() and (np.diff(mask) >= 0).all()
    stored = Tokenizer.from_bytes((directory / "tokenizer.model").read_bytes())
    assert stored.vocab_size == checkpoint.config.text_vocab and expected(stored, prompts) == wanted
    (directory / "processor.json").rename(directory / "away")
    read = read_huggingface(directory).processor  # from only the release's files
    (directory / "away").rename(directory / "processor.json")
    assert read is not None and expected(read.tokenizer, prompts) == wanted


def test_a_full_tokenizer_stays_as_it_is():
    model = TOKENIZERS["like PaliGemma's"].to_bytes()
    assert padded(model, Tokenizer(model).vocab_size) == model


def test_actions_are_decoded_as_here(export):
    from spatialvla_jax.actions import decode
    from spatialvla_jax.actions.normalization import unnormalize

    directory, checkpoint = export
    processor, grid = ReleaseProcessor(directory), checkpoint.processor.grid
    ids = np.stack([np.random.default_rng(0).integers(first, first + n, 50) for first, n in grid.token_ranges], 1)
    theirs = processor.decode_actions(ids + checkpoint.config.action_offset, "toy")
    ours = unnormalize(np.asarray(decode(grid, ids)), checkpoint.processor.statistics["toy"]["action"])
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def unigram() -> Tokenizer:
    model = io.BytesIO()
    symbols = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "user_defined_symbols": ["\n"]}
    sentences = iter(["put the bowl on the plate", "open the drawer"])
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=sentences, model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=2, **symbols
    )
    return Tokenizer(model.getvalue())


def test_what_the_release_cannot_run_is_said(checkpoint, processor, tmp_path):
    """config.json states it with a reason for each; reading it back gives the original config."""
    full = PRESETS["spatialvla-4b-224"]
    assert release_differences(full, processor) == release_differences(replace(full, depth_source="none"), None) == []
    assert release_differences(replace(full, action_chunk=16), processor) == []
    for config, with_processor, says in [
        (replace(full, depth_source="dataset"), processor, "omits Ego3D"),
        (replace(full, mask="causal"), processor, "Attention is causal"),
        (replace(full, action_chunk=100), processor, "300 tokens"),
        (replace(full, tokens_per_action=7), replace(processor, grid=linear_grid()), "grid is linear"),
        (full, replace(processor, tokenizer=unigram()), "not a byte-pair encoding"),
    ]:
        (difference,) = release_differences(config, with_processor)
        assert says in difference
    write_huggingface(tmp_path / "m", checkpoint)
    stated = json.loads((tmp_path / "m" / "config.json").read_text())["spatialvla_jax"]["release_differences"]
    assert len(stated) == 2 and stated == release_differences(checkpoint.config, processor)
    assert read_huggingface(tmp_path / "m").config == checkpoint.config
