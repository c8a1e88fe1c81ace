"""Every notebook runs from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path("notebooks").glob("*.ipynb"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=() if p.stem == "quickstart" else pytest.mark.slow) for p in NOTEBOOKS],
)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device, as most readers have."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": "."}}).execute()


def test_there_are_notebooks() -> None:
    assert {p.stem for p in NOTEBOOKS} >= {"quickstart", "convert", "action_grids", "adapt"}
