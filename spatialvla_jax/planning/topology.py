"""TPU pod shapes, and libtpu's devices to compile for them on any CPU machine."""

import importlib.util
import re
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from jax.experimental import topologies

from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.chips import CHIPS, Chip
from spatialvla_jax.utils.quiet import quiet_libtpu
from spatialvla_jax.utils.signals import keep_handlers

FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # slice shapes of v5e and v6e, from one host up


@dataclass(frozen=True)
class Topology:
    """`slices` slices of `dims` chips each; `str` gives "v5e:16x16" or "2 × v5e:16x16"."""

    generation: str
    dims: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        return prod(self.dims) * self.slices

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.dims))}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} × {self.name}"

    def devices(self) -> list[Any]:
        """Devices to compile for, one per chip. Raises InputError if libtpu is missing or has no such topology."""
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                "compiling for TPUs needs libtpu, which is not installed: pip install 'spatialvla-jax[tpu]'"
            )
        quiet_libtpu()
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.cores == 2:
            options["chip_config_name"] = "megacore"  # both cores of a chip are one device
        try:
            return list(topologies.get_topology_desc(self.name, platform="tpu", **options).devices)
        except Exception as error:
            raise InputError(f"libtpu has no topology {self}: {str(error).splitlines()[0]}") from None
        finally:
            keep_handlers()


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Parse a shape, "v5e:16x16", or a product name: "v5e-256" (256 chips), "v4-128" (128 TensorCores, 64 chips).

    Raises InputError for a topology that does not exist.
    """
    found = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)*)|-(\d+))", text)
    if not found or found[1] not in CHIPS:
        raise InputError(f"topology {text!r} does not exist; write one of {', '.join(CHIPS)} and a shape: v5e:16x16")
    if slices < 1:
        raise InputError(f"--slices must be at least 1, not {slices}")
    generation, chip = found[1], CHIPS[found[1]]
    shapes = FLAT if chip.sides == 2 else cubes(chip.largest)
    dims = tuple(map(int, found[2].split("x"))) if found[2] else ()
    count = prod(dims) if dims else int(found[3]) / chip.cores
    # Given only a size, take the shape nearest to a cube or square.
    fitting = [s for s in sorted(shapes, key=lambda s: max(s) - min(s)) if (s == dims if dims else prod(s) == count)]
    if fitting:
        return Topology(generation, fitting[0], slices)
    near = min(shapes, key=lambda s: abs(np.log(prod(s) / max(1, count))))
    kind = (
        "2-D, from 2x2 to 16x16" if chip.sides == 2 else f"3-D, to {chip.largest} chips, its sides 2 or multiples of 4"
    )
    raise InputError(
        f"topology {text} does not exist: {generation} is {kind}; the nearest is {Topology(generation, near).name}"
    )


def cubes(largest: int) -> list[tuple[int, ...]]:
    """Slice shapes of v4 and v5p: 2x2x1, and those with sides of 2 or multiples of 4, shortest side first."""
    sides = [2, *range(4, 33, 4)]
    shapes = [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c and a * b * c <= largest]
    return [(2, 2, 1), *shapes]
