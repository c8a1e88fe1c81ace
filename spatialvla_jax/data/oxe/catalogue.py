"""One entry per dataset, under the name used in a config's `spec` or a mixture."""

from spatialvla_jax.data.oxe.open_x import OPEN_X
from spatialvla_jax.data.oxe.published import PUBLISHED
from spatialvla_jax.data.oxe.spec import DatasetSpec
from spatialvla_jax.data.oxe.targets import TARGETS

CATALOGUE: dict[str, DatasetSpec] = PUBLISHED | OPEN_X | TARGETS
