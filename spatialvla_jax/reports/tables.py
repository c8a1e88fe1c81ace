"""Tables for a page, for Markdown and for LaTeX."""

import re
import unicodedata
from typing import NamedTuple

LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
        **{"[": "{[}", "]": "{]}"},  # otherwise a bracket at the start of the next row would be an argument
        **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
        **{"±": r"$\pm$", "−": "$-$", "×": r"$\times$", "→": r"$\to$", "≤": r"$\le$", "≥": r"$\ge$"},
        **{"–": "--", "…": r"\dots{}", "Δ": r"$\Delta$", "θ": r"$\theta$", "φ": r"$\phi$"},
        **{"°": r"$^\circ$", "µ": r"$\mu$", "²": "$^2$", "³": "$^3$", "·": r"$\cdot$"},
    }
)
# Non-ASCII characters that LaTeX's default fonts have: letters with these accents, and these.
ACCENTS = frozenset("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327")
LETTERS = frozenset("ßæÆøØœŒłŁ§¶©£¡¿")

# Characters that Markdown would not show unchanged. It shows underscores within words and brackets without links.
MARKDOWN = re.compile(r"[\\`*<|~$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|\](?=[(\[])")

COLUMN = 66  # characters that fit into a column in the table's font at three quarters of its size


class Table(NamedTuple):
    """`header` has (name, unit) of every column. The first `names` columns are words, the others numbers."""

    title: str
    caption: str
    header: list[tuple[str, str]]
    lines: list[list[str]]
    names: int


def markdown(table: Table) -> str:
    header = [f"{name} ({unit})" if unit else name for name, unit in table.header]
    sides = ["---"] * table.names + ["--:"] * (len(header) - table.names)
    rows = [[*map(plain, row)] for row in (header, sides, *table.lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plain(text: str) -> str:
    """Escape text for Markdown."""
    return MARKDOWN.sub(r"\\\g<0>", text)


def escaped(text: str) -> str:
    """Text for LaTeX; a character that its default fonts lack becomes its code."""

    def has(c: str) -> bool:
        letter, *accents = unicodedata.normalize("NFD", c)
        return (
            ord(c) in LATEX
            or c in LETTERS
            or (letter.isascii() and letter.isprintable() and ACCENTS.issuperset(accents))
        )

    return "".join(c if has(c) else f"U+{ord(c):04X}" for c in text).translate(LATEX)


def latex(table: Table, label: str) -> str:
    """A floating booktabs table. Wide ones span both columns of a two-column page; wider ones are scaled to fit."""

    def name(text: str, unit: str) -> str:
        return f"\\shortstack{{{escaped(text)}\\\\({escaped(unit)})}}" if unit else escaped(text)

    columns = zip(*table.lines, strict=True)
    widths = [max(len(n), len(u), *map(len, c)) for (n, u), c in zip(table.header, columns, strict=True)]
    kind = "table*" if sum(widths) + 2 * len(widths) > COLUMN else "table"
    rows = [" & ".join(name(*column) for column in table.header)]
    rows += [" & ".join(map(escaped, line)) for line in table.lines]
    head, *body = [f"{row} \\\\" for row in rows]
    return "\n".join(
        (
            f"\\begin{{{kind}}}",
            r"\centering",
            f"\\caption{{{escaped(f'{table.title}. {table.caption}')}}}",
            f"\\label{{tab:{label}}}",
            r"\smallskip",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            f"\\begin{{tabular}}{{{'l' * table.names}{'r' * (len(table.header) - table.names)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            f"\\end{{{kind}}}",
            "",
        )
    )
