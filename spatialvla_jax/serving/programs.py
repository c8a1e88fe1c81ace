"""The compiled programs of a served policy: one for each image size, padded prompt length and batch size."""

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import numpy as np

from spatialvla_jax.errors import InputError
from spatialvla_jax.inference.policy import BATCH_SIZES, PROMPT_STEP, Policy
from spatialvla_jax.serving.protocol import Limits

Arrays = dict[str, np.ndarray]  # of `Policy.prepare`


class Programs:
    """Compiles the programs for single observations first, so that every request can be answered soon, starting with
    the one that most requests wait for. Larger batches follow in order of size; `largest` is the largest size ready."""

    def __init__(self, policy: Policy, limits: Limits) -> None:
        self.examples = {policy.shape(one): one for one in _examples(policy, limits.image_sizes)}
        self.batches = BATCH_SIZES[: bisect_left(BATCH_SIZES, limits.batch) + 1]
        self.total, self.compiled, self.largest = len(self.examples) * len(self.batches), 0, 1
        self.policy, self.waiting = policy, Counter[tuple[int, int, int]]()
        self.ready = {shape: asyncio.Event() for shape in self.examples}  # set when single observations can be answered

    async def compile(self, run: Callable[..., Awaitable]) -> AsyncIterator[str]:
        """Compile all programs with `run(function, argument)`, yielding a sentence for each. Raises what the policy
        raises for a single observation; if a larger batch fails, batches stay below that size."""
        for batch in self.batches:
            left = list(self.examples)
            while left:
                height, width, length = shape = max(left, key=self.waiting.__getitem__)
                left.remove(shape)
                try:
                    await run(self.policy.act, [self.examples[shape]] * batch)
                except Exception as error:
                    if batch == 1:
                        raise
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    yield f"batches of {batch} fail ({reason}): at most {self.largest} are answered at once"
                    return
                self.compiled += 1
                self.ready[shape].set()
                size = f"batch {batch}, images {height}x{width}, prompts up to {length} tokens"
                yield f"compiled {self.compiled} of {self.total}: {size}"
            self.largest = batch

    async def wait_for(self, prepared: Arrays) -> None:
        """Return as soon as this observation can be answered."""
        shape = self.policy.shape(prepared)
        if shape in self.ready and not self.ready[shape].is_set():
            self.waiting[shape] += 1
            await self.ready[shape].wait()


def _examples(policy: Policy, image_sizes: tuple[tuple[int, int], ...]) -> list[Arrays]:
    """An observation for each image size and each padded prompt length, shortest prompts first."""
    cfg, processor = policy.model.config, policy.processor
    prompts = {}
    for words in range(cfg.prompt_length):
        with suppress(InputError):  # the prompt is too long
            _, mask = processor.tokenizer.encode_prompt(
                "a " * words, template=processor.prompt_template, length=cfg.prompt_length
            )
            prompts.setdefault(-(-mask.sum() // PROMPT_STEP), "a " * words)
    key = next(iter(processor.statistics))
    return [
        policy.prepare(
            {"image": np.zeros((*size, 3), np.uint8), "depth": np.ones(size, np.float32)}
            | {"prompt": prompt, "unnorm_key": key}
        )
        for prompt in prompts.values()
        for size in image_sizes
    ]
