"""Executes the notebooks where they lie and keeps their output, small: `make notebooks`."""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]


def smaller(png: str) -> str:
    """A PNG, in base64, with a palette of 64 colours."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def execute(path: Path) -> None:
    """Progress bars and warnings are left out, and paths of this machine."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1200, record_timing=False, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            for kind, text in (data := output.get("data", {})).items():
                data[kind] = smaller(text) if kind == "image/png" else text.replace(f"{ROOT}/", "")
            if "text" in output:
                output["text"] = output["text"].replace(f"{ROOT}/", "")
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(ROOT.glob("notebooks/*.ipynb")):
        execute(path)
