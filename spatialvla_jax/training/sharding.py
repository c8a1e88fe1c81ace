"""The device mesh and where every array lives on it: one table of parameter path patterns → PartitionSpec.

Axes: `data` (replicas; only gradients cross it), `fsdp` (batch and parameters split), `tensor` (heads and MLP split).
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spatialvla_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# First match wins; a path is "llm/layers/attn/q_einsum/w". Stacked layers lead with an unsplit L. What matches nothing
# (norms, biases, the small Ego3D) is replicated. The vocabulary tables split over their width, because their number of
# rows (265,347 published) is odd.
RULES: tuple[tuple[str, P], ...] = (
    (r"llm/embedder/input_embedding|llm/lm_head|spatial_embedding", P(None, "fsdp")),
    (r"llm/layers/attn/q_einsum/w", P(None, "tensor", "fsdp", None)),
    (r"llm/layers/attn/kv_einsum/w", P(None, None, "tensor", "fsdp", None)),
    (r"llm/layers/attn/attn_vec_einsum/w", P(None, "tensor", None, "fsdp")),
    (r"llm/layers/mlp/gating_einsum", P(None, None, "fsdp", "tensor")),
    (r"llm/layers/mlp/linear", P(None, "tensor", "fsdp")),
    (r"img/.*/(query|key|value)/kernel", P(None, "fsdp", "tensor", None)),
    (r"img/.*/out/kernel", P(None, "tensor", None, "fsdp")),
    (r"img/.*/Dense_0/kernel", P(None, "fsdp", "tensor")),
    (r"img/.*/Dense_1/kernel", P(None, "tensor", "fsdp")),
    (r"img/head/kernel", P("fsdp", None)),
)


def make_mesh(shape: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over all devices; one axis may be −1, "whatever is left".

    Raises InputError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = set(shape) - set(AXES)
    if unknown:
        raise InputError(f"mesh has no axis {sorted(unknown)[0]!r}; its axes are {', '.join(AXES)}")
    sizes = [shape.get(axis, 1) for axis in AXES]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if any(s < 1 for s in sizes) or int(np.prod(sizes)) != len(devices):
        asked = " × ".join(f"{a} {shape.get(a, 1)}" for a in AXES)
        raise InputError(f"mesh {asked} does not fit {len(devices)} devices; the axes must multiply to that number")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises InputError unless the batch divides evenly over accumulation steps and the mesh's batch axes."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (accumulate * parts):
        raise InputError(
            f"train.batch_size {batch_size} does not divide by train.accumulate {accumulate} × "
            f"mesh data × fsdp = {parts}; choose a multiple of {accumulate * parts}"
        )


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of one parameter; a dimension that the mesh does not divide stays whole."""
    for pattern, spec in RULES:
        if re.fullmatch(pattern, path):
            return P(*(a if a and d % mesh.shape[a] == 0 else None for a, d in zip(spec, shape, strict=True)))
    return P()


def param_shardings(params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The same tree with a NamedSharding for every array (or ShapeDtypeStruct)."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    return unflatten_dict({k: NamedSharding(mesh, spec_of(k, v.shape, mesh)) for k, v in flat.items()}, sep="/")


def like_params(tree: Any, params: dict[str, Any], mesh: Mesh) -> Any:
    """Shardings for a tree with copies of the parameter tree in it, as optimizer states are; the rest is replicated."""
    flat = flatten_dict(params, sep="/")

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        name = "/".join(map(str, keys))
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh) if name in flat else P())

    return jax.tree_util.tree_map_with_path(sharding, tree)
