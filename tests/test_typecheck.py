"""Shapes, dtypes and axes in the package's annotations are checked wherever a test calls its functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import TypeCheckError

from spatialvla_jax.batch import Observation
from spatialvla_jax.models.gemma2 import rms_norm
from spatialvla_jax.models.presets import preset

X, SCALE = jnp.ones((2, 3, 4)), jnp.ones(4)
WRONG = {
    "rank": (X, X),
    "dtype": (X.astype(int), SCALE),
    "axes disagree": (X, SCALE[:3]),
    "no array": (X, 1.0),
    "rank in NumPy": (X, np.ones((1, 4))),
}


@pytest.mark.parametrize(("x", "scale"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("run", [lambda f, *args: f(*args), jax.eval_shape], ids=["called", "traced"])
def test_wrong_arrays_raise(run, x, scale):
    with pytest.raises(TypeCheckError, match="rms_norm"):
        run(rms_norm, x, scale)


def test_right_arrays_pass():
    expected = rms_norm(X, SCALE)
    np.testing.assert_allclose(jax.jit(rms_norm)(X, SCALE), expected, rtol=1e-6)  # on some CPUs, jit rounds differently
    np.testing.assert_array_equal(rms_norm(X, np.ones(4, np.float32)), expected)
    assert jax.eval_shape(rms_norm, X, SCALE).shape == X.shape


def test_structs():
    """Structs that our code builds hold arrays or abstract values; those that JAX builds hold anything."""
    abstract = Observation.abstract(preset("nano"), 2)
    seen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    with pytest.raises(TypeCheckError, match="prompt_ids"):
        seen.replace(prompt_ids=seen.prompt_ids[:1])
    with pytest.raises(TypeCheckError, match="image"):
        seen.replace(image=None)
    assert jax.tree.map(lambda _: P("data"), seen).image == P("data")
    assert seen.replace(image=P("data")).image == P("data")
    assert jax.tree.map(lambda x: x[0], seen).image.ndim == 3
    assert jax.vmap(lambda one: one.image.mean())(seen).shape == (2,)
