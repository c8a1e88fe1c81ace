"""No command replaces or removes what it did not make, and none starts if it cannot write its output."""

import json
from pathlib import Path

import pytest

from spatialvla_jax.cli import main
from spatialvla_jax.cli.demo import make_room


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# The arguments of every command that writes, without its output, which comes last; and whether that is a file.
COMMANDS = {
    "demo": ("demo --workdir", False),
    "train": ("train --config demo --workdir", False),
    "sweep": ("sweep --config sweeps/grid_resolution --workdir", False),
    "convert": ("convert nowhere --to orbax", False),
    "data show": ("data show --config demo --out", True),
    "data lerobot": ("data lerobot nowhere", False),
    "data import": ("data import --from my_data:trajectories --out", False),
    "data depth": ("data depth --config demo --checkpoint nowhere --out", False),
    "data pack": ("data pack --config demo --out", True),
    "stats": ("stats --config demo --out", True),
    "grid fit": ("grid fit --config demo --out", True),
    "grid show": ("grid show nowhere --out", True),
    "record": ("record libero --episodes 1 --out", False),
    "record a file": ("record libero --episodes 1 --out", True),
}
FILES = [name for name, (_, file) in COMMANDS.items() if file]
FOLDERS = [name for name, (_, file) in COMMANDS.items() if not file]


def refused(capsys: pytest.CaptureFixture, command: str, out: Path) -> str:
    assert main([*COMMANDS[command][0].split(), str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("spatialvla-jax ")
    return printed.err


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "mine\n",
        '{"mine": 1}',
        '{"kind": "Pod"}',
        '{"statistics": ""}',
        "from spatialvla_jax import Policy",
        "<html>",
    ],
)
def test_a_file_of_the_users_is_kept(command: str, text: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.npz"
    out.write_text(text)
    said = "already exists" if command == "record a file" else "exists and was not written by this command"
    assert f"{out} {said}" in refused(capsys, command, out)
    assert contents(tmp_path) == {"out.npz": text.encode()}


@pytest.mark.parametrize("command", FILES)
def test_a_file_needs_its_folder(command: str, tmp_path: Path, capsys) -> None:
    assert f"the folder {tmp_path / 'new'} does not exist" in refused(capsys, command, tmp_path / "new" / "out.npz")
    (tmp_path / "out.npz").mkdir()
    assert "out.npz is a folder: expected the name of a file" in refused(capsys, command, tmp_path / "out.npz")
    (tmp_path / "file").touch()
    assert "file is a file, but a folder is expected" in refused(capsys, command, tmp_path / "file" / "out.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out.npz"]


@pytest.mark.parametrize("command", ["data show", "data pack", "stats", "grid fit", "grid show"])
def test_a_slash_at_the_end_means_a_folder(command: str, tmp_path: Path, capsys) -> None:
    for out in (f"{tmp_path}/new/", "gs://bucket/new/"):
        with pytest.raises(SystemExit, match="2"):
            main([*COMMANDS[command][0].split(), out])
        assert f"argument --out: {out} is a folder: expected the name of a file" in capsys.readouterr().err
    assert not contents(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_names_that_no_output_can_have(command: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (
        ("link", f"is a link to {tmp_path / 'nowhere'}, which does not exist"),
        ("loop", "is a link to loop, which does not exist"),
        ("n" * 300, "File name too long"),
        ("link/out", f"{tmp_path / 'link'} is a link to {tmp_path / 'nowhere'}, which does not exist"),
    ):
        assert reason in refused(capsys, command, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "loop"]


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_is_none_where_a_file_is(command: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert f"{tmp_path / 'file'}" in refused(capsys, command, out)
    assert "has the name of a .json file" in refused(capsys, command, tmp_path / "out.json")
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("demo", ["notes.txt"]),
        ("demo", ["run/config.json"]),
        ("demo", ["demo.json"]),
        ("train", ["checkpoints/100/weights"]),
        ("train", ["metrics.jsonl"]),
        ("train", ["config.json"]),
        ("sweep", ["sweep.json"]),
        ("sweep", ["trials/mine/checkpoints/weights"]),
        ("convert", ["weights"]),
    ],
)
def test_a_folder_of_the_users_is_kept(command: str, names: list[str], tmp_path: Path, capsys) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"mine": 1}')
    before = contents(tmp_path)
    sentence = refused(capsys, command, tmp_path)
    assert f"holds {names[0].split('/')[0]}, which" in sentence or "exists; choose" in sentence
    assert contents(tmp_path) == before


@pytest.mark.parametrize("marker", ["not json", "{}", '{"made_by": "me"}', "[]"])
def test_a_marker_of_the_users_is_none(marker: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "demo.json").write_text(marker)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    assert "which this command did not make" in refused(capsys, "demo", tmp_path)
    assert contents(tmp_path) == before


def test_the_demo_removes_what_a_demo_made(tmp_path: Path) -> None:
    make_room(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    make_room(tmp_path)
    assert contents(tmp_path).keys() == {"demo.json", "notes.txt"}


def test_a_demo_that_cannot_run_removes_nothing(tmp_path: Path, capsys) -> None:
    make_room(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    before = contents(tmp_path)
    for wrong in ("train.steps=1", "model.preset=huge", "train.eval_split=none", "data.datasets=[]"):
        assert main(["demo", "--workdir", str(tmp_path), f"--config.{wrong}"]) == 2
        assert contents(tmp_path) == before


def test_a_command_replaces_what_it_wrote(tmp_path: Path, capsys) -> None:
    grid = tmp_path / "grid.json"
    fit = ["grid", "fit", "--config", "demo", "--config.grid.kind=uniform", "--out", str(grid)]
    for bins in (4, 8):
        assert main([*fit, f"--config.grid.num_bins={(bins,) * 6}"]) == 0
    assert len(json.loads(grid.read_text())["theta"]) == 9
