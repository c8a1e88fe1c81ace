"""Settings that keep libraries from printing messages of their own. Libraries read them when they are imported."""

import glob
import os

# Without a TPU, libtpu asks a metadata server what it runs on unless it is told, and prints that it got no answer.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def quiet_libraries() -> None:
    """To be called before JAX or TensorFlow is imported. Whatever the user has set stays."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/*"):  # a TPU's devices
        quiet_libtpu()


def quiet_libtpu() -> None:
    for key, value in NO_TPU.items():
        os.environ.setdefault(key, value)
