import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.errors import InputError
from spatialvla_jax.text import BOS, UNKNOWN, Tokenizer, train_tokenizer

INSTRUCTIONS = ["Pick up the black bowl and place it on the plate", "open the top drawer", "put the bowl on the stove"]
TOKENIZER = train_tokenizer(INSTRUCTIONS, 128)


def test_encode():
    ids, mask = TOKENIZER.encode_prompt(" Open the TOP drawer ", length=20)
    assert ids.shape == mask.shape == (20,) and ids.dtype == np.int32 and mask.dtype == bool
    count = mask.sum()
    assert ids[0] == BOS and mask[:count].all() and (ids[count:] == 0).all()
    assert TOKENIZER.decode(ids[mask]) == "open the top drawer\n"
    assert TOKENIZER.decode(ids[count - 1 : count]) == "\n"
    assert count <= 8  # whole words, not letters


def test_template():
    ids, mask = TOKENIZER.encode_prompt("Stop", template="What now? {instruction}!", length=40)
    assert TOKENIZER.decode(ids[mask]).endswith("stop!\n")
    with pytest.raises(InputError, match="must contain"):
        TOKENIZER.encode_prompt("stop", template="no place", length=40)


@given(st.text(string.ascii_lowercase + string.digits + " .,", min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_new_words_are_spelled(text):
    ids, mask = TOKENIZER.encode_prompt(text, length=64)
    assert UNKNOWN not in ids[mask] and ids.max() < TOKENIZER.vocab_size
    assert TOKENIZER.decode(ids[mask]).split() == text.split()


def test_training_is_deterministic_and_bytes_round_trip():
    again = train_tokenizer(reversed(INSTRUCTIONS + INSTRUCTIONS[:1]), 128)
    assert again.to_bytes() == TOKENIZER.to_bytes()
    loaded = Tokenizer.from_bytes(TOKENIZER.to_bytes())
    assert loaded.vocab_size == TOKENIZER.vocab_size <= 128
    np.testing.assert_array_equal(
        loaded.encode_prompt("open it", length=16)[0], TOKENIZER.encode_prompt("open it", length=16)[0]
    )


@pytest.mark.parametrize("instructions", [["a"], ["go", "stop"], ["naïve café – 開ける"]])
def test_tiny_corpora(instructions):
    tokenizer = train_tokenizer(instructions, 96)
    ids, mask = tokenizer.encode_prompt(instructions[0], length=40)
    assert UNKNOWN not in ids[mask] and tokenizer.decode(ids[mask]) == instructions[0] + "\n"


@given(st.lists(st.text(" abcdefgh", min_size=1, max_size=12), min_size=2, max_size=5))
def test_many_at_once_are_as_one_by_one(instructions):
    tokenizer = train_tokenizer(instructions, 200)
    together = tokenizer.encode_prompts(instructions, length=16)
    for row, instruction in enumerate(instructions):
        for many, one in zip(together, tokenizer.encode_prompt(instruction, length=16), strict=True):
            np.testing.assert_array_equal(many[row], one)


def test_too_long():
    with pytest.raises(InputError, match=r"'open the top drawer' needs \d+ tokens, more than the 4"):
        TOKENIZER.encode_prompt("open the top drawer", length=4)


def test_vocabulary_too_small():
    with pytest.raises(InputError, match=r"vocab_size is 20: .* at least \d+ pieces"):
        train_tokenizer(INSTRUCTIONS, 20)


def test_not_a_model():
    with pytest.raises(InputError, match="not a SentencePiece model"):
        Tokenizer.from_bytes(b"nonsense")
