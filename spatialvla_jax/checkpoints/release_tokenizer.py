"""The tokenizer's files in the form that the release's processor reads.

That processor uses transformers' fast Gemma tokenizer and appends `<image>`, PaliGemma's location tokens and the action
tokens, unless the tokenizer has them. To get the published ids, the tokenizer must have as many pieces as the model has
text tokens. `<image>`, the action tokens and the location tokens that are not pieces follow them.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatialvla_jax.text import BOS, EOS, PAD, UNKNOWN
from spatialvla_jax.utils.atomic import write_json, write_text

TOKENIZER = "tokenizer.model"
LOCATIONS = [*(f"<loc{i:04}>" for i in range(1024)), *(f"<seg{i:03}>" for i in range(128))]
# SentencePiece's numbers for piece types and for byte-pair encoding.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
BPE = 2


@dataclass(frozen=True)
class SentencePieceModel:
    """The relevant content of a SentencePiece model; `pieces` are (text, score, type)."""

    pieces: list[tuple[str, float, int]]
    byte_fallback: bool
    trims_spaces: bool  # removes leading and trailing spaces, and collapses repeated ones
    problem: str  # why transformers' Gemma tokenizer splits text differently; "" if it doesn't

    @classmethod
    def parse(cls, model: bytes) -> "SentencePieceModel":
        pieces, trainer, normalizer = [], {}, {}
        for number, value in _fields(model):
            if number == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(_fields(value))
        problem = ""
        if trainer.get(3) != BPE:
            problem = "is not a byte-pair encoding"
        elif normalizer.get(2) or normalizer.get(3, True) or trainer.get(24):
            problem = "normalises text or adds a space to it"
        return cls(pieces, bool(trainer.get(35)), bool(normalizer.get(4, True)), problem)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message's fields: integers, or bytes for all other types."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            at += length
            yield number, message[at - length : at]


def padded(model: bytes, size: int) -> bytes:
    """The SentencePiece model padded with unused pieces to `size`; it splits text as before."""
    names = (b"<pad%d>" % i for i in range(len(SentencePieceModel.parse(model).pieces), size))
    # A protobuf message may be extended by appending: here pieces, each with a name (field 1) and type (field 3).
    return model + b"".join(b"\n%c\n%c%b\x18%c" % (len(name) + 4, len(name), name, UNUSED) for name in names)


def write_tokenizer(path: Path, model: bytes, text_vocab: int, action_tokens: int) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json. `<image>` has the id `text_vocab`, and the
    action tokens follow. For a model with a `problem`, only tokenizer.model is written."""
    model = padded(model, text_vocab)
    (path / TOKENIZER).write_bytes(model)
    parsed = SentencePieceModel.parse(model)
    if parsed.problem:
        return
    names = {"pad_token": PAD, "eos_token": EOS, "bos_token": BOS, "unk_token": UNKNOWN}
    about = {"processor_class": "SpatialVLAProcessor", "tokenizer_class": "GemmaTokenizer"}
    write_json(path / "tokenizer_config.json", about | {name: parsed.pieces[i][0] for name, i in names.items()})
    write_text(path / "tokenizer.json", json.dumps(fast_tokenizer(parsed, action_tokens), ensure_ascii=False))


def fast_tokenizer(model: SentencePieceModel, action_tokens: int) -> dict[str, Any]:
    """tokenizer.json: transformers' version of the model, and the tokens that the release's processor looks for."""
    vocabulary = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    # "\n" stays an ordinary piece: otherwise spaces before it could not be removed.
    special = [
        (i, text, kind == CONTROL)
        for i, (text, _, kind) in enumerate(model.pieces)
        if kind in (CONTROL, USER_DEFINED) and text != "\n"
    ]
    appended = [("<image>", True), *((f"<ACTION{i:05}>", True) for i in range(action_tokens))]
    appended += [(text, False) for text in LOCATIONS if text not in vocabulary]
    special += [(i, text, kind) for i, (text, kind) in enumerate(appended, len(vocabulary))]
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    # Spaces after another space, at the start, or at the end of the prompt, which is its newline.
    trimmed = {"type": "Replace", "pattern": {"Regex": r"(?<= ) +|\A +|[ ▁]+(?=\n?\z)"}, "content": ""}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **options, "special": kind} for i, text, kind in special],
        "normalizer": {"type": "Sequence", "normalizers": [*([trimmed] if model.trims_spaces else []), spaces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[UNKNOWN][0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges(model),
        },
    }


def merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """All pairs of pieces that merge into a third, ordered by its score, and for equal scores as in transformers."""
    ids = {text: i for i, (text, _, kind) in enumerate(model.pieces) if kind in (NORMAL, USER_DEFINED)}
    found = [
        (-model.pieces[i][1], -cut, ids[text[:cut]], (text[:cut], text[cut:]))
        for text, i in ids.items()
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return [pair for *_, pair in sorted(found)]
