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


def rates_of(name: str) -> tuple[float, float]:
    return CHIPS[name].peak, CHIPS[name].hbm_bandwidth


# Dense bf16 FLOP/s and memory bytes/s per device, for the first entry whose name is contained in JAX's device kind.
PEAKS = (
    *(("TPU v4", *rates_of("v4")), ("TPU v5 lite", *rates_of("v5e")), ("TPU v5e", *rates_of("v5e"))),
    *(("TPU v5", *rates_of("v5p")), ("TPU v6", *rates_of("v6e"))),
    *(("A100", 312e12, 2.0e12), ("H100", 989e12, 3.35e12), ("H200", 989e12, 4.8e12), ("4090", 165e12, 1.0e12)),
)


def peak() -> float | None:
    """Peak FLOP/s of this run's devices; None if unknown."""
    return next((flops for name, flops, _ in PEAKS if name in jax.devices()[0].device_kind), None)


def memory_bandwidth() -> float | None:
    """Memory bandwidth in bytes/s of this run's devices; None if unknown."""
    return next((rate for name, _, rate in PEAKS if name in jax.devices()[0].device_kind), None)
