"""The training and validation steps: pure functions of state, batch and grid, and jitted on their mesh.

The training loop runs `jit_train_step`, and `planning/tpu_plan.py` compiles the same function ahead of time.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from spatialvla_jax.actions import ActionTokenizer, decode, encode
from spatialvla_jax.batch import Batch
from spatialvla_jax.models import Params, SpatialVLA
from spatialvla_jax.models.lora import merge_adapters, put_beside
from spatialvla_jax.models.spatialvla import TARGET_HEAD
from spatialvla_jax.text import EOS
from spatialvla_jax.training.augment import Augmentation, augment
from spatialvla_jax.training.losses import PLAIN, Loss, soft_cross_entropy, target_error
from spatialvla_jax.training.optimizer import (
    Schedule,
    make_optimizer,
    merge,
    num_updates,
    part_norms,
    split_frozen,
    update_if_finite,
    update_norms,
)
from spatialvla_jax.training.setup import Scalars, TrainSetup
from spatialvla_jax.training.sharding import BATCH, cast_split, on_mesh
from spatialvla_jax.training.state import TrainState

# Gather weights whole, which latency hiding can do before they are used. By default the compiler sends large ones
# around the ring in parts, each followed by its part of the product.
TPU_OPTIONS: dict[str, Any] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
# Don't zero a scan's stacked outputs: the scan overwrites all of them.
GPU_OPTIONS: dict[str, Any] = {"xla_gpu_enable_dus_accumulator_zero_init_elimination": True}
Metrics = dict[str, Float[Array, "..."]]  # scalars, and "datasets" f32[N,3]: see `by_dataset`
logger = logging.getLogger(__name__)
Jitted = Any  # the result of `jax.jit`: can be called, or lowered and compiled


def make_train_step(setup: TrainSetup) -> Callable[..., tuple[TrainState, Metrics]]:
    """→ `step(state, batch, grid, scalars) -> (state, metrics)`, to be jitted with the state donated.

    `grad_accum_steps` splits the batch into that many microbatches and averages their gradients, which gives the
    gradient of the whole batch. If loss or gradient is not finite, the step is counted in `skipped` (over the whole
    run) and changes nothing else. Grid, seed, learning rate and number of steps are arguments, so that runs that
    differ only in them share one compilation.
    """
    model, grad_accum_steps = setup.model, setup.grad_accum_steps

    def step(state: TrainState, batch: Batch, grid: ActionTokenizer, scalars: Scalars) -> tuple[TrainState, Metrics]:
        trainable, fixed = split_frozen(state.params, setup.frozen)
        key = jax.random.fold_in(jax.random.key(scalars.seed), state.step)
        inputs = prepare(batch, key, setup.augmentation)

        def loss_fn(trainable: Params, inputs: Batch) -> tuple[Float[Array, ""], Metrics]:
            params = put_beside(merge(trainable, fixed), setup.lora_scale, model.config.dtype)
            params = cast_split(params, model.config.dtype, setup.gather_once)
            loss, metrics = loss_and_metrics(model, params, inputs, grid, setup.loss)
            means = {k: v.mean() for k, v in metrics.items()}
            return loss.mean(), means | by_dataset(metrics, inputs.dataset_id, setup.num_datasets)

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        if grad_accum_steps == 1:
            (_, metrics), grads = gradient(trainable, inputs)
        else:
            # [B] → [B/A, A] → [A, B/A]: each device splits its own rows, so nothing moves between devices.
            micro = jax.tree.map(lambda x: x.reshape(-1, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), inputs)

            def add(total, part):
                (_, metrics), grads = gradient(trainable, part)
                return jax.tree.map(lambda a, b: a + b / grad_accum_steps, total, (grads, metrics)), None

            one = jax.tree.map(lambda x: x[0], micro)
            (_, metric_shapes), grad_shapes = jax.eval_shape(gradient, trainable, one)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grad_shapes, metric_shapes))
            (grads, metrics), _ = jax.lax.scan(add, zeros, micro)
        metrics |= part_norms(grads, "gradient_norm")
        optimizer = make_optimizer(setup.adamw, scalars.schedule)
        updated, opt_state = update_if_finite(
            optimizer, grads, state.opt_state, trainable, loss=metrics["loss"], gradient_norm=metrics["gradient_norm"]
        )
        metrics |= {
            "learning_rate": scalars.schedule(num_updates(state.opt_state)),
            "skipped": state.step + 1 - num_updates(opt_state),
        }
        return TrainState(state.step + 1, merge(updated, fixed), opt_state), metrics

    return step


def jit_train_step(setup: TrainSetup, shardings: TrainState) -> Jitted:
    """→ jitted `step(state, batch, grid, scalars) -> (state, metrics)`; the state is donated, the batch split."""
    assert setup.mesh is not None
    replicated = NamedSharding(setup.mesh, P())
    return jax.jit(
        on_mesh(make_train_step(setup), setup.mesh),
        in_shardings=(shardings, NamedSharding(setup.mesh, BATCH), replicated, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=compiler_options(setup.mesh.devices.flat[0].platform),
    )


def compiler_options(platform: str) -> dict[str, Any] | None:
    """Compiler options for the training step on `platform`. On a GPU, options unknown to this version of JAX are
    skipped: they only affect speed."""
    if platform == "tpu":
        return TPU_OPTIONS
    if platform != "gpu":
        return None
    known = {}
    for name, value in GPU_OPTIONS.items():
        try:
            jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
        except jax.errors.JaxRuntimeError:
            logger.warning("this version of JAX has no compiler option %s: the training step is slower", name)
        else:
            known[name] = value
    return known


def jit_eval_step(setup: TrainSetup, shardings: TrainState) -> Jitted:
    """→ jitted `make_eval_step`, with the batch split."""
    assert setup.mesh is not None
    batch, replicated = NamedSharding(setup.mesh, BATCH), NamedSharding(setup.mesh, P())
    return jax.jit(
        on_mesh(make_eval_step(setup), setup.mesh),
        in_shardings=(shardings.params, batch, replicated),
        out_shardings=replicated,
    )


def jit_update_norms(setup: TrainSetup, shardings: TrainState) -> Jitted:
    """→ jitted `norms(state, schedule)`, see `update_norms`."""
    assert setup.mesh is not None
    replicated = NamedSharding(setup.mesh, P())

    def norms(state: TrainState, schedule: Schedule) -> Metrics:
        return update_norms(setup.adamw, schedule, split_frozen(state.params, setup.frozen)[0], state.opt_state)

    return jax.jit(norms, in_shardings=(shardings, replicated), out_shardings=replicated)


def make_eval_step(setup: TrainSetup):
    """→ `step(params, batch, grid) -> (sums of metrics over the batch's valid examples, their number)`."""
    model, loss = setup.model, replace(setup.loss, soft_sigma=0.0)  # validation losses compare between runs

    def step(params: Params, batch: Batch, grid: ActionTokenizer):
        inputs = prepare(batch, None, None)
        assert inputs.valid is not None, "the batch does not belong to an epoch"
        params = cast_split(merge_adapters(params, setup.lora_scale, model.config.dtype), model.config.dtype)
        _, metrics = loss_and_metrics(model, params, inputs, grid, loss)
        sums = {k: jnp.where(inputs.valid, v, 0).sum() for k, v in metrics.items()}
        dataset_id = jnp.where(inputs.valid, inputs.dataset_id, -1)
        return sums | by_dataset(metrics, dataset_id, setup.num_datasets), inputs.valid.sum()

    return step


def jit_predict_step(setup: TrainSetup, shardings: TrainState, shown: int) -> Jitted:
    """Jit `predict(params, batch, grid)` for an epoch's batch → (predicted ids i32[B, T, n], actions f32[B, T, A],
    valid bool[B], the first `shown` images). Every process gets the whole result. Teacher-forced, as validation's
    metrics."""
    assert setup.mesh is not None
    model, replicated = setup.model, NamedSharding(setup.mesh, P())

    def predict(params: Params, batch: Batch, grid: ActionTokenizer):
        inputs = prepare(batch, None, None)
        params = cast_split(merge_adapters(params, setup.lora_scale, model.config.dtype), model.config.dtype)
        ids = encode(grid, inputs.actions)
        flat = ids.reshape(len(ids), -1)
        logits: Any = model.apply({"params": params}, **inputs.model_inputs(), action_ids=flat)
        predicted = constrained_argmax(logits[:, :-1], grid, model.config.action_offset).reshape(ids.shape)
        return predicted, batch.actions, batch.valid, batch.image[:shown]

    return jax.jit(
        on_mesh(predict, setup.mesh),
        in_shardings=(shardings.params, NamedSharding(setup.mesh, BATCH), replicated),
        out_shardings=replicated,
    )


def prepare(batch: Batch, key: PRNGKeyArray | None, augmentation: Augmentation | None) -> Batch:
    """Convert uint8 images to f32 in [0, 1], and augment them if asked."""
    image, depth, intrinsics = batch.image.astype(jnp.float32) / 255, batch.depth, batch.intrinsics
    if augmentation is not None:
        assert key is not None, "augmentation draws from a key"
        image, depth, intrinsics = augment(key, image, depth, intrinsics, augmentation)
    return batch.replace(image=image, depth=depth, intrinsics=intrinsics)


def by_dataset(
    metrics: dict[str, Float[Array, " B"]], dataset_id: Int[Array, " B"], num_datasets: int
) -> dict[str, Float[Array, "N 3"]]:
    """{"datasets": (examples, sum of loss, sum of accuracy) per dataset}; a dataset_id of −1 is not counted."""
    if not num_datasets:
        return {}
    columns = jnp.stack([jnp.ones_like(metrics["loss"]), metrics["loss"], metrics["accuracy"]], axis=1)
    member = dataset_id == jnp.arange(num_datasets)[:, None]
    return {"datasets": jnp.where(member[..., None], columns, 0).sum(axis=1)}


def loss_and_metrics(
    model: SpatialVLA, params: Params, inputs: Batch, grid: ActionTokenizer, terms: Loss = PLAIN
) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
    """→ (loss, metrics). The metric `loss` is the teacher-forced cross-entropy of action tokens and `<eos>` (13 for a
    4-step chunk), averaged per example. The loss may add the metric `target_error`, see `Loss`.

    Accuracies and `l1` (between decoded and true normalised actions, all dimensions) use the best token of each
    position's kind, as the policy's constrained decoding does.
    """
    cfg = model.config
    B = inputs.actions.shape[0]
    ids = encode(grid, inputs.actions)  # [B, T, tokens_per_action]
    arguments = inputs.model_inputs() | {"action_ids": ids.reshape(B, -1)}
    logits: Any
    kept: Any = {}
    if terms.recorded:
        logits, kept = model.apply({"params": params}, **arguments, mutable=["intermediates"])
    else:
        logits = model.apply({"params": params}, **arguments)
    eos = jnp.full((B, 1), EOS, jnp.int32)
    targets = jnp.concatenate([ids.reshape(B, -1) + cfg.action_offset, eos], axis=1)
    if terms.soft_sigma:
        loss = soft_cross_entropy(logits, ids, grid, cfg.action_offset, terms.soft_sigma).mean(axis=1)
    else:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(axis=1)
    predicted = constrained_argmax(logits[:, :-1], grid, cfg.action_offset).reshape(ids.shape)
    hit = (predicted == ids).astype(jnp.float32).mean(axis=1)
    kinds = grid.kinds
    metrics = {"loss": loss}
    for kind in dict.fromkeys(kinds):
        places = jnp.array([i for i, k in enumerate(kinds) if k == kind])
        metrics[f"accuracy/{kind}"] = hit[:, places].mean(axis=1)
    metrics["accuracy"] = hit.mean(axis=1)
    metrics["l1"] = jnp.abs(decode(grid, predicted) - inputs.actions).mean(axis=(1, 2))
    if terms.recorded:
        assert inputs.target is not None, "the loader was not asked for the target"
        (state,) = kept["intermediates"]["after_prompt"]
        places = inputs.target, inputs.hand, inputs.intrinsics, inputs.image.shape[1]
        error = metrics["target_error"] = target_error(terms, params[TARGET_HEAD], state, *places)
        loss = loss + terms.target_weight * error
    return loss, metrics


def constrained_argmax(logits: Float[Array, "B A V"], grid: ActionTokenizer, offset: int) -> Int[Array, "B A"]:
    """The best token of each position's kind, counted from the first action token; A covers whole actions."""
    n = grid.tokens_per_action
    best = [
        logits[:, i::n, offset + start : offset + start + size].argmax(axis=-1) + start
        for i, (start, size) in enumerate(grid.token_ranges)
    ]
    return jnp.stack(best, axis=-1).reshape(logits.shape[0], -1)
