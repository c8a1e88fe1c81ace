"""`python -m spatialvla_jax COMMAND …` is `spatialvla-jax COMMAND …`."""

import sys

import spatialvla_jax.cli.__main__ as cli

if __name__ == "__main__":
    sys.exit(cli.main())
