"""Text tables."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], align: str = "<") -> str:
    """The rows with aligned columns, two spaces apart. `align` has "<" or ">" for each column; its last character
    applies to all remaining ones."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = align.ljust(len(widths), align[-1])
    return "\n".join(
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip() for row in rows
    )
