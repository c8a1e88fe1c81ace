"""`python -m spatialvla_jax COMMAND …` is `spatialvla-jax COMMAND …`."""

import sys

from spatialvla_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
