"""Instructions to token ids, with PaliGemma's SentencePiece model or one trained on a dataset's instructions."""

import functools
import io
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int

from spatialvla_jax.errors import InputError

PAD, EOS, BOS, UNKNOWN = 0, 1, 2, 3
# A small model is trained on these characters too, so that it can spell unseen instructions.
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'?!-"


class Tokenizer:
    """A SentencePiece model in PaliGemma's conventions (pad 0, eos 1, bos 2, unk 3; "\\n" is one piece)."""

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise InputError("The tokenizer is not a SentencePiece model") from error
        self._newline = self._processor.PieceToId("\n")
        ids = [self._processor.pad_id(), self._processor.eos_id(), self._processor.bos_id(), self._processor.unk_id()]
        if ids != [PAD, EOS, BOS, UNKNOWN] or self._newline == UNKNOWN:
            raise InputError(
                f"The tokenizer has pad, eos, bos, unk = {ids} and {'no' if self._newline == UNKNOWN else 'a'} newline "
                f"piece; PaliGemma's conventions are {[PAD, EOS, BOS, UNKNOWN]} and a newline piece"
            )

    @classmethod
    def from_bytes(cls, model: bytes) -> "Tokenizer":
        """From the bytes of a .model file; the inverse of `to_bytes`."""
        return cls(model)

    def to_bytes(self) -> bytes:
        """The serialized model, to be stored beside a checkpoint."""
        return self._model

    @property
    def vocab_size(self) -> int:
        return self._processor.GetPieceSize()

    def encode_prompt(
        self, instruction: str, *, template: str = "{instruction}", length: int
    ) -> tuple[Int[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
        """ids i32[P] = <bos> prompt "\\n", right-padded with 0, and the mask bool[P], False for padding.

        The prompt is the lower-cased instruction in the template. Raises InputError when it exceeds `length` tokens.
        """
        ids, mask = self.encode_prompts([instruction], template=template, length=length)
        return ids[0], mask[0]

    def encode_prompts(
        self, instructions: Sequence[str], *, template: str = "{instruction}", length: int
    ) -> tuple[Int[np.ndarray, "N P"], Bool[np.ndarray, "N P"]]:
        """`encode_prompt` for many instructions: i32[N, P] and bool[N, P]. Large mixtures have over 100 000 of them."""
        prompts = [render(instruction, template) for instruction in instructions]
        encode = self._processor.EncodeAsIds
        # SentencePiece starts one thread per core for a list, which is much slower for a single prompt.
        tokens = encode(prompts) if len(prompts) > 1 else list(map(encode, prompts))
        lengths = np.asarray([len(row) + 2 for row in tokens], np.int64)
        if (long := np.flatnonzero(lengths > length)).size:
            prompt = prompts[long[0]]
            shown = prompt if len(prompt) <= 80 else f"{prompt[:79]}…"
            raise InputError(
                f"The prompt {shown!r} needs {lengths[long[0]]} tokens, more than the {length} of data.prompt.length"
            )
        mask = np.arange(length) < lengths[:, None]
        ids = np.full(mask.shape, PAD, np.int32)
        rows = ((BOS, *row, self._newline) for row in tokens)
        ids[mask] = np.fromiter(itertools.chain.from_iterable(rows), np.int32, lengths.sum())
        return ids, mask

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of token ids, without special tokens."""
        return self._processor.DecodeIds([int(i) for i in ids])


def render(instruction: str, template: str) -> str:
    """The instruction, stripped and lower-cased, in the template. Raises InputError for a bad template."""
    if wrong := template_problem(template):
        raise InputError(f"data.prompt.template is {template!r}: it {wrong}")
    return template.replace("{instruction}", instruction.strip().lower())


@functools.lru_cache
def template_problem(template: str) -> str:
    """What is wrong with a prompt template, or ""."""
    if "{instruction}" not in template:
        return "must contain {instruction}"
    surrogate = any("\ud800" <= character <= "\udfff" for character in template)
    return "must be Unicode text, without half of a surrogate pair" if surrogate else ""


def train_tokenizer(instructions: Iterable[str], vocab_size: int, *, template: str = "{instruction}") -> Tokenizer:
    """A small BPE model of at most `vocab_size` pieces; the same instructions give the same bytes. Raises InputError if
    the characters alone need more pieces."""
    prompts = sorted({render(instruction, template) for instruction in instructions})
    minimum = 6 + len(set("".join(prompts)) | set(_CHARACTERS))
    if vocab_size < minimum:
        raise InputError(f"data.prompt.vocab_size is {vocab_size}: these instructions need at least {minimum} pieces")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([*prompts, " ".join(_CHARACTERS)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNKNOWN,
        num_threads=1,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())
