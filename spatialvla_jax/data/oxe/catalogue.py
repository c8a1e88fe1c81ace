"""One entry per dataset; the name is what a config's `spec` or a mixture says."""

from spatialvla_jax.data.oxe.open_x import OPEN_X
from spatialvla_jax.data.oxe.published import PUBLISHED
from spatialvla_jax.data.oxe.spec import DatasetSpec
from spatialvla_jax.data.oxe.targets import TARGETS

CATALOGUE: dict[str, DatasetSpec] = PUBLISHED | OPEN_X | TARGETS
