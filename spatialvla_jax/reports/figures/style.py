"""Colours, fonts and file output of all figures."""

import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spatialvla_jax.utils.atomic import replacing
from spatialvla_jax.utils.storage import to_path

# Okabe-Ito: distinguishable with any colour vision and in grey print.
BLUE, ORANGE, GREEN, RED, GREY, DARK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#9A9A9A", "#222222"

# If there are more values than colours, they repeat.
SERIES = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#7A5C00", "#5E4FA2", GREY)

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": DARK,
    "mathtext.fontset": "dejavusans",
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "pdf.fonttype": 42,  # journals refuse the default, Type 3
    "svg.hashsalt": "spatialvla_jax",  # names of its parts that are the same every time
}

# No dates, so that equal data gives equal files.
MADE_BY: dict[str, Any] = {
    "png": {"Software": "spatialvla_jax"},
    "pdf": {"Creator": "spatialvla_jax", "CreationDate": None},
    "svg": {"Creator": "spatialvla_jax", "Date": None},
}

Pathlike = str | os.PathLike[str]


def fitted(text: str) -> str:
    """Break a name of any length into lines that leave room for the axes. A space goes before "_", because matplotlib
    omits labels that start with it from legends."""
    text = textwrap.fill(text, 48)
    return f" {text}" if text.startswith("_") else text


@contextmanager
def drawing(
    path: Pathlike,
    width: float,
    height: float,
    *,
    forms: Sequence[str] = ("png",),
    layout: str | None = "constrained",
    style: dict[Any, Any] | None = None,
) -> Iterator[Figure]:
    """A figure of `width` × `height` inches. When the block ends, it is written to `path` with the suffix of each of
    `forms`. `style` overrides `STYLE`."""
    with matplotlib.rc_context(STYLE | (style or {})):
        figure = Figure(figsize=(width, height), layout=layout)  # pyright: ignore[reportArgumentType]
        yield figure
        canvas = FigureCanvasAgg(figure)
        for form in forms:
            with replacing(path if form == "png" else to_path(path).with_suffix(f".{form}")) as temporary:
                canvas.print_figure(temporary, format=form, dpi=150, facecolor="white", metadata=MADE_BY[form])
