"""Settings that stop libraries from printing their own messages. Libraries read them on import."""

import glob
import os

# Without a TPU, libtpu asks a metadata server for the hardware unless configured, and prints that there is no answer.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def quiet_libraries() -> None:
    """Call before importing JAX or TensorFlow. The user's own settings win."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/*"):  # a TPU's devices
        quiet_libtpu()


def quiet_libtpu() -> None:
    for key, value in NO_TPU.items():
        os.environ.setdefault(key, value)
