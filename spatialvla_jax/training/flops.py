"""FLOPs that a training sample needs, counted over the products of the traced gradient."""

from math import prod
from typing import Any

import jax

from spatialvla_jax.actions import ActionTokenizer
from spatialvla_jax.batch import Batch
from spatialvla_jax.models import Params
from spatialvla_jax.models.lora import put_beside
from spatialvla_jax.training.optimizer import merge, split_frozen
from spatialvla_jax.training.setup import TrainSetup
from spatialvla_jax.training.state import abstract_params
from spatialvla_jax.training.step import loss_and_metrics, prepare


def model_flops(setup: TrainSetup, grid: ActionTokenizer) -> float:
    """FLOPs of one sample that the model itself needs: the forward pass, and the backward pass to every trainable
    parameter, without augmentation, rematerialisation and optimizer. Counted over the products of the traced gradient.
    """
    setup = setup.with_remat("none")

    def gradient(params: Params, batch: Batch) -> Params:
        trainable, fixed = split_frozen(params, setup.frozen)
        inputs = prepare(batch, None, None)

        def loss(trainable: Params) -> Any:
            params = put_beside(merge(trainable, fixed), setup.lora_scale)
            return loss_and_metrics(setup.model, params, inputs, grid)[0].mean()

        return jax.grad(loss)(trainable)

    batch = Batch.abstract(setup.model.config, 1, grid.action_dim)
    return product_flops(jax.make_jaxpr(gradient)(abstract_params(setup), batch).jaxpr)


def product_flops(jaxpr: Any) -> float:
    """Of the matrix products and convolutions in a jaxpr, a scan's body times its length; 2 a multiply-add."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            total += 2 * prod(equation.outvars[0].aval.shape) * prod(lhs[d] for d in contracting)
        elif equation.primitive.name == "conv_general_dilated":
            out, kernel = equation.outvars[0].aval.shape, equation.invars[1].aval.shape
            features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            work = 2 * prod(out) * prod(kernel) / features / equation.params["batch_group_count"]
            total += work / prod(equation.params["lhs_dilation"])
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * product_flops(inner)
    return total
