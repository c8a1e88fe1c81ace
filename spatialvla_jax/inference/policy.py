"""The policy: images and instructions in, robot actions out."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from spatialvla_jax.actions import ActionTokenizer, decode
from spatialvla_jax.actions.normalization import action_bounds, to_range
from spatialvla_jax.batch import Observation
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.errors import InputError, NonFiniteError
from spatialvla_jax.inference.generate import generate
from spatialvla_jax.inference.weights import Weights, prepare_weights
from spatialvla_jax.models import Params, SpatialVLA, SpatialVLAConfig
from spatialvla_jax.models.resize import resize_observation
from spatialvla_jax.utils.camera import as_array, depth_problem, in_metres, intrinsics_problem, kind_of, unit_problem
from spatialvla_jax.utils.schema import shown
from spatialvla_jax.utils.storage import AnyPath

# Each shape compiles once. Batches are padded to the next of these sizes, prompts to the next multiple of 16.
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
PROMPT_STEP = 16
LARGE = 2**14  # inputs with at least this many elements are not cached on the device


class Policy:
    """Greedy policy from a model, its parameters and its processor; `Policy.load(path)` loads one from a checkpoint.

    Calls are independent: no state is kept between them. `constrained=False` chooses from the whole vocabulary, as the
    release does. `int8` stores the language model's matrices in 8 bits. With `speculate`, an observation's "draft" (a
    guess of the chunk's "action_ids") saves passes over the weights if it is right.
    """

    def __init__(
        self,
        model: SpatialVLA,
        params: Params,
        processor: Processor,
        *,
        constrained: bool = True,
        int8: bool = False,
        speculate: bool = False,
    ) -> None:
        self.model, self.processor = model, processor
        self.constrained, self.speculate = constrained, speculate
        self.weights = jax.device_put(prepare_weights(model, params, int8=int8, whole_vocabulary=not constrained))
        self._sound = bool(_all_finite(self.weights))
        self._grid = jax.device_put(processor.grid)
        self._cache: dict[str, tuple[np.ndarray, jax.Array]] = {}
        # The program writes its results to host memory: one wait instead of a wait and a copy.
        (device,) = self.weights.spatial.devices()
        host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        self._act = _jit_act(model.config, constrained, host)

    @classmethod
    def load(
        cls,
        path: str | AnyPath,
        *,
        dtype: str = "",
        quantize: str = "",
        constrained: bool = True,
        speculate: bool = False,
    ) -> "Policy":
        """Load any checkpoint that `load_pretrained` reads and that includes a processor.

        `dtype` (float32 or bfloat16) overrides the model's, `quantize` is "" or "int8". Raises InputError for other
        values and for a checkpoint without processor.
        """
        from spatialvla_jax.checkpoints import load_pretrained

        if dtype not in ("", "float32", "bfloat16") or quantize not in ("", "int8"):
            raise InputError(
                f"dtype is {dtype!r} and quantize {quantize!r}: they can be '', float32 or bfloat16, and '' or int8"
            )
        model, params, processor = load_pretrained(path)
        if processor is None:
            raise InputError(f"{path} has weights but no action grid and tokenizer, so it cannot act")
        model = SpatialVLA(replace(model.config, dtype=dtype or model.config.dtype))
        return cls(model, params, processor, constrained=constrained, int8=quantize == "int8", speculate=speculate)

    def infer(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        """One observation → {"actions": f32[T, A] in robot units, "action_ids": i32[T, tokens_per_action]}.

        `observation` has "image" u8[H, W, 3] and "prompt" str. Optional, or None: "intrinsics" f32[3, 3] in pixels of
        that image; "unnorm_key", a dataset's name; "draft" i32[T, tokens_per_action], a guess of the action ids. Models
        with `depth_source="dataset"` need "depth" f32[H, W] in metres, 0 for no reading. If "depth_unit"
        (metres per count) is given, depth may have any numeric dtype. Everything after tokenization, resizing included,
        is one jitted call.

        Raises InputError naming a missing, misshapen or implausible input, and NonFiniteError when the model's outputs
        are NaN or infinite: no action is returned then.
        """
        return self.infer_batch([observation])[0]

    def infer_batch(self, observations: Sequence[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
        """`infer` for each observation, in one model call per image size and up to 32 observations."""
        return self.act([self.prepare(observation) for observation in observations])

    def act(self, prepared: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """The results of `infer` for observations converted by `prepare`. Raises NonFiniteError."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, one in enumerate(prepared):
            groups[one["image"].shape].append(i)
        results: list[Any] = [None] * len(prepared)
        for rows in (g[i : i + BATCH_SIZES[-1]] for g in groups.values() for i in range(0, len(g), BATCH_SIZES[-1])):
            for i, result in zip(rows, self._run([prepared[i] for i in rows]), strict=True):
                results[i] = result
        _require_finite(np.array([result.pop("finite") for result in results], bool))
        return results

    def prepare(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        """Check and tokenize an observation: the arrays that `act` takes. Raises InputError."""
        if not isinstance(observation, dict):
            raise InputError(f"an observation must be a dict, got {type(observation).__name__}")
        image = as_array(observation.get("image"))
        if image is None or image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
            raise InputError(f"observation 'image' must be uint8[H, W, 3], got {kind_of(image)}")
        if not isinstance(prompt := observation.get("prompt"), str):
            raise InputError(f"observation 'prompt' must be a string, got {type(prompt).__name__}")
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise InputError(f"observation 'prompt' must be text without lone surrogates, got {shown(prompt)}")
        cfg, size = self.model.config, image.shape[:2]
        low, high, mask = action_bounds(self.processor.find_statistics(observation.get("unnorm_key"))["action"])
        ids, valid = self.processor.tokenizer.encode_prompt(
            prompt, template=self.processor.prompt_template, length=cfg.prompt_length
        )
        arrays = {
            "image": image,
            "intrinsics": self.intrinsics(observation, size),
            "prompt_ids": ids,
            "prompt_mask": valid,
            "bounds": np.stack([low, high, mask]).astype(np.float32),
        }
        depth, unit = observation.get("depth"), observation.get("depth_unit")
        if unit is not None and (wrong := unit_problem(unit)):
            raise InputError(f"observation 'depth_unit' {wrong}")
        if depth is not None and (wrong := depth_problem(depth, size, unit)):
            raise InputError(f"observation 'depth' {wrong}")
        if cfg.depth_source == "dataset":
            if depth is None:
                what = f"metres of shape {list(size)}, got nothing"
                raise InputError(f"observation 'depth' must be {what}: this model takes depth from its data")
            arrays["depth"] = in_metres(depth, unit)
        if self.speculate:
            arrays["draft"] = self.draft(observation.get("draft"))
        return arrays

    def shape(self, prepared: dict[str, np.ndarray]) -> tuple[int, int, int]:
        """Image height and width, and padded prompt length. `act` compiles once per such shape and batch size in
        BATCH_SIZES."""
        height, width, _ = prepared["image"].shape
        tokens, longest = int(prepared["prompt_mask"].sum()), len(prepared["prompt_mask"])
        return height, width, min(-(-tokens // PROMPT_STEP) * PROMPT_STEP, longest)

    def predict(self, seen: Observation) -> tuple[Int[np.ndarray, "B T n"], Float[np.ndarray, "B T A"]]:
        """Loader-style observations, such as a `Batch` → (action ids, normalised actions). Raises NonFiniteError."""
        out = self.run(seen.model_inputs())
        _require_finite(np.asarray(out["finite"]))
        return np.asarray(out["action_ids"]), np.asarray(out["actions"])

    def run(self, inputs: dict[str, Any]) -> dict[str, jax.Array]:
        """The module's jitted `act` with this policy's weights and grid."""
        result = self._act(self.weights, self._grid, inputs)
        return result if self._sound else result | {"finite": jnp.zeros(result["finite"].shape, bool)}

    def intrinsics(self, observation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        """f32[3, 3] in pixels of an image of `size`: the observation's intrinsics, or those used in training."""
        if (given := observation.get("intrinsics")) is not None:
            if wrong := intrinsics_problem(given, size):
                raise InputError(f"observation 'intrinsics' {wrong}")
            return np.asarray(given, np.float32)
        relative = np.asarray(self.processor.find_intrinsics(observation.get("unnorm_key")), np.float32)
        return relative * np.array([[size[1]], [size[0]], [1]], np.float32)

    def _run(self, inputs: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Run at most 32 inputs of one image size, padded with copies of the last to a compiled batch size."""
        count, size = len(inputs), next(b for b in BATCH_SIZES if b >= len(inputs))
        batch = {k: _stacked([x[k] for x in (*inputs, *inputs[-1:] * (size - count))]) for k in inputs[0]}
        length = max(self.shape(x)[2] for x in inputs)
        batch |= {k: batch[k][:, :length] for k in ("prompt_ids", "prompt_mask")}
        result = self.run({k: self._place(k, x) for k, x in batch.items()})
        out = jax.device_get({k: result[k] for k in ("actions", "action_ids", "finite")})
        return [{k: x[i] for k, x in out.items()} for i in range(count)]

    def _place(self, name: str, array: Any) -> Any:
        """Cache small inputs on the device: prompt, intrinsics and bounds rarely change between calls."""
        if not isinstance(array, np.ndarray) or array.size >= LARGE:
            return array
        cached = self._cache.get(name)
        if cached is None or not np.array_equal(cached[0], array):
            copy = array.copy()  # the caller may later write into `array`
            cached = self._cache[name] = (copy, jax.device_put(copy))
        return cached[1]

    def draft(self, draft: Any) -> np.ndarray:
        """The draft i32[T, tokens_per_action] for `act`; None gives the middle of every range. Raises InputError."""
        cfg = self.model.config
        shape = (cfg.action_chunk, cfg.tokens_per_action)
        ranges = self.processor.grid.token_ranges
        draft = as_array(draft)
        if draft is None:
            return np.tile(np.array([start + size // 2 for start, size in ranges], np.int32), (cfg.action_chunk, 1))
        if draft.shape != shape or draft.dtype.kind not in "iu":
            raise InputError(
                f"observation 'draft' must be action ids of shape {list(shape)}, got {draft.dtype}{list(draft.shape)}"
            )
        return np.clip(draft, 0, cfg.spatial_tokens - 1).astype(np.int32)


def act(
    model: SpatialVLA, constrained: bool, weights: Weights, grid: ActionTokenizer, inputs: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The whole policy as one jitted function, from u8[B, H, W, 3] images to actions.

    → {"action_ids" [B, T, n], "actions" [B, T, A], "finite" [B], "passes" []}.

    With `inputs["bounds"]` f32[B, 3, A] (low, high, mask) actions are in robot units, otherwise normalised. An id that
    is not an action, possible only in unconstrained decoding, decodes as the first action id. Where `finite` is False,
    logits or actions are NaN or infinite and the result must not be used.
    """
    cfg = model.config
    draft = inputs.get("draft")
    seen = resize_observation(inputs["image"], inputs.get("depth"), inputs["intrinsics"], size=cfg.img.image_size)
    tokens, passes, finite = generate(
        model,
        weights,
        grid.token_ranges if constrained else None,
        seen["image"].astype(jnp.float32) / 255,
        inputs["prompt_ids"],
        inputs["prompt_mask"],
        depth=seen.get("depth"),
        intrinsics=seen["intrinsics"],
        draft=None if draft is None else draft.reshape(len(draft), -1) + cfg.action_offset,
    )
    ids = (tokens - cfg.action_offset).reshape(-1, cfg.action_chunk, cfg.tokens_per_action)
    actions = decode(grid, jnp.maximum(ids, 0))
    if "bounds" in inputs:
        low, high, mask = inputs["bounds"].swapaxes(0, 1)[:, :, None]
        actions = to_range(actions, low, high, mask > 0)
    finite &= jnp.all(jnp.isfinite(actions), axis=(1, 2))
    return {"action_ids": ids, "actions": actions, "finite": finite, "passes": passes}


@functools.lru_cache(maxsize=8)
def _jit_act(config: SpatialVLAConfig, constrained: bool, out: jax.sharding.SingleDeviceSharding) -> Any:
    """`act`, shared by all policies of one config: a run that films rollouts creates one at each validation."""
    return jax.jit(functools.partial(act, SpatialVLA(config), constrained), out_shardings=out)


def _require_finite(finite: Bool[np.ndarray, " B"]) -> None:
    if not finite.all():
        raise NonFiniteError(finite.tolist())


@jax.jit
def _all_finite(weights: Weights) -> jax.Array:
    """Whether every weight is finite. Most non-finite weights show in the logits, but a ReLU, ZoeDepth's choice of head
    or the attention's soft cap may hide one."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(weights)]))


def _stacked(arrays: list[np.ndarray]) -> Any:
    """[B, …]. Large arrays are stacked on the device, which saves a copy on the host."""
    if len(arrays) == 1:
        return arrays[0][None]
    return np.stack(arrays) if arrays[0].size < LARGE else _stack(jax.device_put(arrays))


_stack = jax.jit(jnp.stack)
