"""SpatialVLA in JAX. `load_pretrained` and `Policy` are loaded on first use, so that importing the package is cheap."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatialvla_jax.checkpoints import load_pretrained
    from spatialvla_jax.inference.policy import Policy

__version__ = "0.1.0"
__all__ = ["Policy", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name == "Policy":
        from spatialvla_jax.inference.policy import Policy

        return Policy
    if name == "load_pretrained":
        from spatialvla_jax.checkpoints import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
