"""`python -m spatialvla_jax.cli COMMAND …` is `spatialvla-jax COMMAND …`."""

import os
import signal
import sys
from functools import partial

from spatialvla_jax.cli import main
from spatialvla_jax.utils.process import PARENT, end_with

if __name__ == "__main__":
    if parent := os.environ.pop(PARENT, ""):
        end_with(int(parent), partial(os.kill, os.getpid(), signal.SIGTERM))
    sys.exit(main())
