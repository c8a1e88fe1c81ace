"""SpatialVLA in JAX. Its public names are loaded on first use, so that importing the package is cheap."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spatialvla_jax.checkpoints import load_pretrained
    from spatialvla_jax.export.convert import convert
    from spatialvla_jax.inference.policy import Policy

__version__ = "0.1.0"
__all__ = ["Policy", "convert", "load_pretrained"]

_MODULES = {"Policy": "inference.policy", "convert": "export.convert", "load_pretrained": "checkpoints"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
