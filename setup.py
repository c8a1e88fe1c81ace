"""The packages and where they lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# These are at the top of the repository, where people look for them, and become part of the installed package.
SHIPPED = {
    "spatialvla_jax.configs": "configs",
    "spatialvla_jax.configs.sweeps": "configs/sweeps",
    "spatialvla_jax.launch": "launch",
    "spatialvla_jax.data.libero_spatial_demo": "data/libero_spatial_demo",
}

setup(
    packages=[*find_packages(include=["spatialvla_jax", "spatialvla_jax.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "spatialvla_jax": ["py.typed"],
        "spatialvla_jax.reports": ["templates/*"],
        "spatialvla_jax.serving": ["page.html"],
        "spatialvla_jax.launch": ["*.sh", "*.sbatch", "*.md"],
        "spatialvla_jax.data.libero_spatial_demo": ["*/*"],
    },
)
