"""Peak rates of accelerators from the vendors' data sheets."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """Peak bf16 FLOP/s, HBM bytes and bytes/s, bytes/s into one chip over all its ICI links and from the data-center
    network, dimensions of the torus, largest slice in chips, TensorCores.

    Source: the vendor's page of each generation, cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e (ICI is half of the
    bidirectional figure; DCN a chip's share of its host's). v4's ICI: six links of 50 GB/s (arXiv 2304.01433).
    """

    peak: float
    hbm: float
    hbm_bandwidth: float
    ici: float
    dcn: float
    sides: int
    largest: int
    cores: int


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9, 6.25e9, sides=3, largest=4096, cores=2),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 3.125e9, sides=2, largest=256, cores=1),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9, sides=3, largest=6144, cores=2),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9, 12.5e9, sides=2, largest=256, cores=1),
}


# Keys of the two tables below are parts of JAX's device kind; the first match counts.
GENERATIONS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6": "v6e"}
# Dense bf16 FLOP/s and memory bytes/s of a device.
RATES = {kind: (CHIPS[name].peak, CHIPS[name].hbm_bandwidth) for kind, name in GENERATIONS.items()}
RATES |= {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "4090": (165e12, 1.0e12)}


def generation_of(device_kind: str) -> str | None:
    """The key in `CHIPS` for JAX's device kind; None for other devices."""
    return next((name for kind, name in GENERATIONS.items() if kind in device_kind), None)


def peak() -> float | None:
    """Peak FLOP/s of this run's devices; None if unknown."""
    return _rates()[0]


def memory_bandwidth() -> float | None:
    """Memory bandwidth in bytes/s of this run's devices; None if unknown."""
    return _rates()[1]


def _rates() -> tuple[float, float] | tuple[None, None]:
    device_kind = jax.devices()[0].device_kind
    return next((rates for kind, rates in RATES.items() if kind in device_kind), (None, None))
