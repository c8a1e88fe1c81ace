"""Images and words in, robot actions out."""

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
from spatialvla_jax.models import Params, SpatialVLA
from spatialvla_jax.models.resize import resize_observation
from spatialvla_jax.utils.camera import as_array, depth_problem, in_metres, intrinsics_problem, kind_of, unit_problem
from spatialvla_jax.utils.schema import shown
from spatialvla_jax.utils.storage import AnyPath

# Shapes are compiled once each: a batch takes the next larger of these sizes, a prompt the next multiple of 16.
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
PROMPT_STEP = 16
LARGE = 2**14  # elements of an input that is sent to the device as it comes


class Policy:
    """Greedy policy over a model, its parameters and its processor; `Policy.load(path)` makes one from a checkpoint.

    It keeps nothing from one call to the next. `constrained=False` lets every step choose from the whole vocabulary, as
    the release does; `int8` keeps the language model's matrices in 8 bits; with `speculate`, an observation's "draft"
    (the "action_ids" of a chunk that is likely) saves passes over the weights where it comes true.
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
        self._kept: dict[str, tuple[np.ndarray, jax.Array]] = {}
        # The program itself writes its results to the host: one wait instead of a wait and a copy.
        (device,) = self.weights.spatial.devices()
        host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        self._act = jax.jit(lambda *args: act(model, constrained, *args), out_shardings=host)

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
        """From anything `load_pretrained` reads that carries a processor.

        `dtype` (float32 or bfloat16) takes the place of the model's own, `quantize` is "" or "int8". Raises InputError.
        """
        from spatialvla_jax.checkpoints import load_pretrained

        if dtype not in ("", "float32", "bfloat16") or quantize not in ("", "int8"):
            raise InputError(
                f"dtype is {dtype!r} and quantize {quantize!r}: they can be '', float32 or bfloat16, and '' or int8"
            )
        model, params, processor = load_pretrained(path)
        if processor is None:
            raise InputError(f"{path} holds weights but no action grid and tokenizer, so it cannot act")
        model = SpatialVLA(replace(model.config, dtype=dtype or model.config.dtype))
        return cls(model, params, processor, constrained=constrained, int8=quantize == "int8", speculate=speculate)

    def infer(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        """One observation → {"actions": f32[T, A] in robot units, "action_ids": i32[T, tokens_per_action]}.

        `observation` has "image" u8[H, W, 3] and "prompt" str; "intrinsics" f32[3, 3] in pixels of that image and
        "unnorm_key" (a dataset's name) may be None or absent; "depth" f32[H, W] in metres, 0 where there is no reading,
        is needed by a model that takes depth from its data, and holds counts of any dtype where "depth_unit" says how
        many metres a count is; "draft" i32[T, tokens_per_action] is a guess of the result. Everything after the
        tokenizer, resizing included, is one jitted call. Raises InputError naming what is missing, misshapen or makes
        no sense as an image, a camera or depth, and NonFiniteError where the model's numbers are NaN or infinite: there
        is never an action made of such.
        """
        return self.infer_batch([observation])[0]

    def infer_batch(self, observations: Sequence[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
        """`infer` of each, in one call of the model for all whose images have one size and up to 32."""
        return self.act([self.prepare(observation) for observation in observations])

    def act(self, prepared: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """What `infer` returns, for each of the arrays that `prepare` has made. Raises NonFiniteError."""
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
        """An observation checked and tokenised: the arrays that `act` takes. Raises InputError."""
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
        """Height and width of the image and padded length of the prompt: `act` compiles once for each of these and each
        of BATCH_SIZES."""
        height, width, _ = prepared["image"].shape
        tokens, longest = int(prepared["prompt_mask"].sum()), len(prepared["prompt_mask"])
        return height, width, min(-(-tokens // PROMPT_STEP) * PROMPT_STEP, longest)

    def predict(self, seen: Observation) -> tuple[Int[np.ndarray, "B T n"], Float[np.ndarray, "B T A"]]:
        """Observations as the loader gives them, such as a `Batch` → (action ids, normalised actions). Raises
        NonFiniteError."""
        out = self.run(seen.model_inputs())
        _require_finite(np.asarray(out["finite"]))
        return np.asarray(out["action_ids"]), np.asarray(out["actions"])

    def run(self, inputs: dict[str, Any]) -> dict[str, jax.Array]:
        """`act` of this module, jitted, on this policy's weights and grid."""
        made = self._act(self.weights, self._grid, inputs)
        return made if self._sound else made | {"finite": jnp.zeros(made["finite"].shape, bool)}

    def intrinsics(self, observation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        """The observation's intrinsics, or those that the policy was trained with, in pixels of an image of `size`."""
        if (given := observation.get("intrinsics")) is not None:
            if wrong := intrinsics_problem(given, size):
                raise InputError(f"observation 'intrinsics' {wrong}")
            return np.asarray(given, np.float32)
        relative = np.asarray(self.processor.find_intrinsics(observation.get("unnorm_key")), np.float32)
        return relative * np.array([[size[1]], [size[0]], [1]], np.float32)

    def _run(self, inputs: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """At most 32 of one image size, padded with copies of the last to a compiled batch size."""
        count, size = len(inputs), next(b for b in BATCH_SIZES if b >= len(inputs))
        batch = {k: _stacked([x[k] for x in (*inputs, *inputs[-1:] * (size - count))]) for k in inputs[0]}
        length = max(self.shape(x)[2] for x in inputs)
        batch |= {k: batch[k][:, :length] for k in ("prompt_ids", "prompt_mask")}
        made = self.run({k: self._place(k, x) for k, x in batch.items()})
        out = jax.device_get({k: made[k] for k in ("actions", "action_ids", "finite")})
        return [{k: x[i] for k, x in out.items()} for i in range(count)]

    def _place(self, name: str, array: Any) -> Any:
        """Cache small inputs on the device: prompt, intrinsics and bounds rarely change between calls."""
        if not isinstance(array, np.ndarray) or array.size >= LARGE:
            return array
        kept = self._kept.get(name)
        if kept is None or not np.array_equal(kept[0], array):
            copy = array.copy()  # the caller may write into its own
            kept = self._kept[name] = (copy, jax.device_put(copy))
        return kept[1]

    def draft(self, draft: Any) -> np.ndarray:
        """A guess i32[T, tokens_per_action] as `act` takes it; None is the middle of every range. Raises InputError."""
        cfg = self.model.config
        shape = (cfg.action_chunk, cfg.tokens_per_action)
        ranges = self.processor.grid.token_ranges
        if draft is None:
            return np.tile(np.array([start + size // 2 for start, size in ranges], np.int32), (cfg.action_chunk, 1))
        draft = np.asarray(draft)
        if draft.shape != shape or draft.dtype.kind not in "iu":
            raise InputError(
                f"observation 'draft' must be action ids of shape {list(shape)}, got {draft.dtype}{list(draft.shape)}"
            )
        return np.clip(draft, 0, cfg.spatial_tokens - 1).astype(np.int32)


def act(
    model: SpatialVLA, constrained: bool, weights: Weights, grid: ActionTokenizer, inputs: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The jitted whole, of uint8 images [B, H, W, 3].

    → {"action_ids" [B, T, n], "actions" [B, T, A], "finite" [B], "passes" []}.

    With `inputs["bounds"]` f32[B, 3, A] (low, high, which dimensions have them) actions are in robot units, without
    normalised. An id that is no action, which an unconstrained choice can give, counts as the first. Where `finite` is
    False, the ids and actions are to be refused: logits or actions are NaN or infinite.
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


def _require_finite(finite: Bool[np.ndarray, " B"]) -> None:
    if not finite.all():
        raise NonFiniteError(finite.tolist())


@jax.jit
def _all_finite(weights: Weights) -> jax.Array:
    """Whether every weight is finite, in one program. Most that are not reach the logits, but a ReLU, ZoeDepth's choice
    between its heads or the soft cap of attention may hide one."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(weights)]))


def _stacked(arrays: list[np.ndarray]) -> Any:
    """[B, …]. Large arrays are put together on the device, so that they are copied there at once and not here first."""
    if len(arrays) == 1:
        return arrays[0][None]
    return np.stack(arrays) if arrays[0].size < LARGE else _stack(jax.device_put(arrays))


_stack = jax.jit(jnp.stack)
