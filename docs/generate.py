"""mkdocs' hook: pages that the code itself writes when the site is built, and files from outside docs/."""

import argparse
import inspect
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from spatialvla_jax.cli import make_parser
from spatialvla_jax.config import FREE_ON_RESUME, KEYS
from spatialvla_jax.data.oxe import DatasetSpec
from spatialvla_jax.data.oxe.__main__ import table

ROOT = Path(__file__).parents[1]


# Pages that lie elsewhere in the repository, where their links are right, too.
ELSEWHERE = {"launch.md": "launch/README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


@event_priority(100)  # before mkdocs-jupyter, which takes the notebooks over
def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "reference/config.md": config_keys(),
        "reference/commands.md": commands(),
        "reference/catalogue.md": catalogue(),
        "reference/data.md": specs(),
        **{page: (ROOT / source).read_text() for page, source in ELSEWHERE.items()},
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for notebook in sorted(ROOT.glob("notebooks/*.ipynb")):
        files.append(File(f"notebooks/{notebook.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """The page with links that are right in the repository made right in the site; files that are not in the site are
    only named."""
    here = page.file.src_uri
    folder = posixpath.dirname(ELSEWHERE.get(here, f"docs/{here}"))
    pages = {source: page for page, source in ELSEWHERE.items()}

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match.groups()
        file = posixpath.normpath(posixpath.join(folder, target))
        if file.startswith(("docs/", "notebooks/")) or file in pages:
            there = pages.get(file, file.removeprefix("docs/"))
            return f"[{label}]({posixpath.relpath(there, posixpath.dirname(here))}{anchor or ''})"
        return label if (ROOT / file).exists() else match[0]

    return re.sub(r"\[([^]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def config_keys() -> str:
    """Every key with its meaning, range and default, a table for each group."""
    lines = ["# Config keys", "", "`spatialvla-jax config show` prints this list, with the values of a config."]
    lines += ["Keys marked ↻ may change when a run is resumed."]
    group = None
    for key, field in KEYS.items():
        if (name := key.partition(".")[0] if "." in key else "Top level") != group:
            group = name
            lines += ["", f"## {group}", "", "| key | meaning | values | default |", "|---|---|---|---|"]
        free = any(key == name or key.startswith(f"{name}.") for name in FREE_ON_RESUME)
        values = field.range() + (f" ({field.unit})" if field.unit else "")
        cells = (f"`{key}`" + (" ↻" if free else ""), field.meaning, values, f"`{field.default!r}`")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def commands() -> str:
    """Every command's help."""
    lines = ["# Commands", "", "```text", make_parser().format_help().strip(), "```"]
    for name, parser in sorted(leaves(make_parser()), key=lambda pair: pair[0]):
        lines += ["", f"## {name}", "", "```text", parser.format_help().strip(), "```"]
    return "\n".join(lines)


def leaves(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield below.prog.partition(" ")[2], below
                yield from leaves(below)


def catalogue() -> str:
    return "\n".join(
        (
            "# Catalogue",
            "",
            "The data sets that the published code configures. *Weight* is that of `oxe_spatial_vla_plus`, which is",
            "multiplied by the data set's size. *Known* cameras come from public calibrations, *default* is the camera",
            "that the published code ships. `python -m spatialvla_jax.data.oxe` prints this table.",
            "",
            table(),
        )
    )


def specs() -> str:
    return "\n".join(
        (
            "# Data set specs",
            "",
            'A data set in a config is `{"name", "path", "spec", "weight", "splits"}`. `spec` is a name of the',
            "[catalogue](catalogue.md) or a dict of these fields:",
            "",
            "```python",
            inspect.getsource(DatasetSpec).strip(),
            "```",
            "",
            "## Operations",
            "",
            "They are applied to the joined action in order; each is `(name, *arguments)`.",
            "",
            "::: spatialvla_jax.data.oxe.operations",
        )
    )
