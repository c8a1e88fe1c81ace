"""The device mesh and how arrays are sharded over it: one table of parameter path patterns → PartitionSpec.

Axes: `data` (replicas; only gradients cross it), `fsdp` (splits batch and parameters), `tensor` (splits heads and MLP).
"""

import re
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from spatialvla_jax.errors import InputError
from spatialvla_jax.models import Params
from spatialvla_jax.models.activation_sharding import BATCH_AXES, batch_splits
from spatialvla_jax.models.lora import ADAPTERS, axes_of

AXES = ("data", "fsdp", "tensor")
BATCH = P(BATCH_AXES)

# First match wins; a path is "llm/layers/attn/q_einsum/w". Stacked layers have a leading, unsplit L. Whatever matches
# nothing (norms, biases, the small Ego3D) is replicated. The vocabulary tables are split over their width, because
# their number of rows (265,347 in the release) is odd.
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
    (r"zoe/backbone/.*/(query|key|value)/kernel", P(None, None, "fsdp", None, None)),
    (r"zoe/backbone/.*/out/kernel", P(None, None, None, None, "fsdp")),
    (r"zoe/backbone/.*/mlp_(in|out)/kernel", P(None, None, "fsdp", None)),
)
# Tables for lookups, not products: only rows cross the mesh, and their gradients are summed in float32.
LOOKED_UP = r"llm/embedder/input_embedding|spatial_embedding"
OUTSIDE_SCANS = ("llm/lm_head", "img/head/kernel")


def make_mesh(shape: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over all devices; one axis may be −1, which takes the remaining devices.

    Raises InputError if the product of the axes is not the number of devices.
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
    return Mesh(arrange(devices, sizes), AXES)


def arrange(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """The devices as an array of the mesh's shape. On TPUs, neighbours along an axis are neighbours in the torus, and
    slices differ only along `data`, so that only gradients leave a slice. Raises InputError if `data` cannot hold the
    slices.
    """
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.asarray(devices).reshape(sizes)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, *inner = sizes
    if data % slices:
        raise InputError(f"mesh data {data} does not divide by the {slices} slices: only `data` goes across slices")
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inner), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def check_batch(batch_size: int, grad_accum_steps: int, mesh: Mesh) -> None:
    """Raises InputError unless accumulation steps × the mesh's batch axes divide the batch."""
    parts = batch_splits(mesh)
    if batch_size % (grad_accum_steps * parts):
        raise InputError(
            f"train.batch_size {batch_size} does not divide by train.grad_accum_steps {grad_accum_steps} × "
            f"mesh data × fsdp = {parts}; choose a multiple of {grad_accum_steps * parts}"
        )


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh | jax.sharding.AbstractMesh) -> P:
    """The PartitionSpec of one parameter. Dimensions that the mesh does not divide are not split."""
    if (spec := rule_of(path)) is None:
        return P()
    return P(*(a if a and d % mesh.shape[a] == 0 else None for a, d in zip(spec, shape, strict=True)))


def rule_of(path: str) -> tuple[str | None, ...] | None:
    """A parameter's axes in RULES. Adapters are split like their kernel, so that B A is computed in its shards."""
    if path.startswith(f"{ADAPTERS}/"):
        kernel, _, name = path.removeprefix(f"{ADAPTERS}/").rpartition("/")
        axes, *parts = axes_of(kernel)
        by_axis = dict(zip(axes, rule_of(kernel) or (), strict=False))
        return tuple(by_axis.get(axis) for axis in parts["ab".index(name)])
    return next((tuple(spec) for pattern, spec in RULES if re.fullmatch(pattern, path)), None)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Trace the function on the mesh, where `constrain_batch` and `cast_split` take effect."""

    @wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return wrapped


def cast_split(params: Params, dtype: DTypeLike, gather: bool = False) -> Params:
    """Cast matrices that are split over `fsdp` to the computation's dtype, which halves the bytes to gather.

    By default a scan gathers each layer's matrices where they are used. With `gather`, all of them are gathered here.
    Where `fsdp` has size 1, `gather` alone casts them: nothing is gathered, but the scan then reads matrices and writes
    gradients of half the size. All other parameters are unchanged, as is everything without a mesh or a split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or (mesh.shape["fsdp"] == 1 and not gather):
        return params

    def cast(path: str, x: Any) -> Any:
        spec = spec_of(path, x.shape, mesh)
        if "fsdp" not in spec or re.fullmatch(LOOKED_UP, path):
            return x
        x = jax.lax.with_sharding_constraint(x.astype(dtype), spec)
        if mesh.shape["fsdp"] == 1:
            return x
        # Outside scans always: the compiler would gather the batch instead of reduce-scattering the gradient.
        whole = P(*(None if axis == "fsdp" else axis for axis in spec))
        return gathered(x, spec, whole) if gather or path in OUTSIDE_SCANS else x

    flat: dict[str, Any] = flatten_dict(params, sep="/")
    return unflatten_dict({k: cast(k, v) for k, v in flat.items()}, sep="/")


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: Float[Array, "..."], split: P, whole: P) -> Float[Array, "..."]:
    """`x`, which is sharded as `split`, sharded as `whole`. Its gradient is sharded as `split` again; the derivative of
    a plain constraint would gather it."""
    return jax.lax.with_sharding_constraint(x, whole)


def _gathered_backward(split: P, whole: P, _: None, gradient: Any) -> tuple[Any]:
    gradient = jax.lax.with_sharding_constraint(gradient, split)
    # With replicas the compiler would sum the gradient before splitting it.
    if gradient.ndim == 2 and split[-1] == "fsdp" and jax.sharding.get_abstract_mesh().shape["data"] == 1:
        gradient = jax.lax.platform_dependent(gradient, cuda=partial(_row_major, split), default=lambda x: x)
    return (gradient,)


def _row_major(split: P, x: Any) -> Any:
    """Transpose `x` in the memory of each GPU. A reduce-scatter over the last axis leaves the LM head's gradient
    column-major, and the optimizer would read it like that, at a fraction of the memory's bandwidth."""

    def local(x: Any) -> Any:
        return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))

    # The compiler does not split a layout's constraint: outside `shard_map` it would gather the gradient for it.
    return jax.shard_map(local, in_specs=split, out_specs=split, check_vma=False)(x)


gathered.defvjp(lambda x, split, whole: (gathered(x, split, whole), None), _gathered_backward)


def like_params(tree: Any, params: Params, mesh: Mesh) -> Any:
    """Shardings for the parameter tree or a tree with copies of it, such as a state; other leaves are replicated."""
    flat = flatten_dict(params, sep="/")

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        name = "/".join(map(str, keys))
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh) if name in flat else P())

    return jax.tree_util.tree_map_with_path(sharding, tree)
