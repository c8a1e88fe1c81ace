"""`python -m spatialvla_jax.cli COMMAND …` is `spatialvla-jax COMMAND …`."""

import sys

from spatialvla_jax.cli import main
from spatialvla_jax.utils.process import end_if_tied

if __name__ == "__main__":
    end_if_tied()
    sys.exit(main())
