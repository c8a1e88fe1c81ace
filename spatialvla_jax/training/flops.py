"""FLOPs per training sample, counted from the matrix products in the traced gradient."""

from collections.abc import Iterator
from math import prod
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from spatialvla_jax.actions import ActionTokenizer
from spatialvla_jax.batch import Batch
from spatialvla_jax.models import Params
from spatialvla_jax.models.linear import BESIDE
from spatialvla_jax.models.lora import put_beside
from spatialvla_jax.training.optimizer import split_frozen
from spatialvla_jax.training.setup import TrainSetup
from spatialvla_jax.training.state import abstract_params
from spatialvla_jax.training.step import loss_and_metrics, prepare


def model_flops(setup: TrainSetup, grid: ActionTokenizer) -> float:
    """FLOPs that the model itself needs per sample: the forward pass and the backward pass to all trainable parameters,
    without augmentation, rematerialisation and optimizer. Counted over the products of `traced_gradient`.
    """
    return product_flops(traced_gradient(setup, grid))


def traced_gradient(setup: TrainSetup, grid: ActionTokenizer) -> Any:
    """The jaxpr of one sample's gradient; adapters are merged into the weights outside it."""
    setup, params = setup.with_remat("none"), abstract_params(setup)
    weights: dict[str, Any] = jax.eval_shape(lambda p: put_beside(p, setup.lora_scale), params)
    flat, learn = flatten_dict(weights, sep="/"), flatten_dict(split_frozen(params, setup.frozen)[0], sep="/")
    trained = {path: x for path, x in flat.items() if path in learn or BESIDE in path}

    def gradient(trained: Params, weights: Params, batch: Batch) -> Params:
        inputs = prepare(batch, None, None)

        def loss(trained: Params) -> Any:
            params = unflatten_dict({**weights, **trained}, sep="/")
            return loss_and_metrics(setup.model, params, inputs, grid)[0].mean()

        return jax.grad(loss)(trained)

    batch = Batch.abstract(setup.model.config, 1, grid.action_dim)
    return jax.make_jaxpr(gradient)(trained, flat, batch).jaxpr


def product_flops(jaxpr: Any) -> float:
    """FLOPs of a jaxpr's matrix products and convolutions. A scan counts its length times; a multiply-add counts 2."""
    return sum(flops for _, flops in products(jaxpr))


def products(jaxpr: Any, path: str = "", times: int = 1) -> Iterator[tuple[str, float]]:
    """(the operation's path, FLOPs) of each product. Fused attention kernels count as 0."""
    for equation in jaxpr.eqns:
        name = f"{path}/{equation.source_info.name_stack}"
        operation = f"{name}/{equation.primitive.name}"
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            yield operation, 2.0 * times * prod(equation.outvars[0].aval.shape) * prod(lhs[d] for d in contracting)
        elif equation.primitive.name == "conv_general_dilated":
            out, kernel = equation.outvars[0].aval.shape, equation.invars[1].aval.shape
            features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            work = 2 * prod(out) * prod(kernel) / features / equation.params["batch_group_count"]
            yield operation, times * work / prod(equation.params["lhs_dilation"])
        length = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner, name, times * length)
