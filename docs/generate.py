"""mkdocs' hook: pages that the code itself writes when the site is built, and files from outside docs/."""

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

from spatialvla_jax.cli import make_parser
from spatialvla_jax.config import FREE_ON_RESUME, KEYS
from spatialvla_jax.data.oxe import DatasetSpec
from spatialvla_jax.data.oxe.__main__ import table

ROOT = Path(__file__).parents[1]


@event_priority(100)  # before mkdocs-jupyter, which takes the notebooks over
def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "reference/config.md": config_keys(),
        "reference/commands.md": commands(),
        "reference/catalogue.md": catalogue(),
        "reference/data.md": specs(),
        "launch.md": (ROOT / "launch/README.md").read_text(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for notebook in sorted(ROOT.glob("notebooks/*.ipynb")):
        files.append(File(f"notebooks/{notebook.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links that are right in the repository, as they are in the site."""
    if page.file.src_uri in ("launch.md", "contributing.md", "changelog.md"):
        markdown = re.sub(r"\]\((?:\.\./)?docs/", "](", markdown)
        markdown = re.sub(r"\[([^]]*)\]\(\.\./(?!docs/)[^)]*\)", r"\1", markdown)
    return markdown.replace("](../../notebooks/", "](../notebooks/").replace(
        "](../../launch/README.md", "](../launch.md"
    )


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
