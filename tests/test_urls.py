"""Whatever takes a path takes a URL or says that it does not. None creates a local folder "gs:"."""

import argparse
from pathlib import Path

import pytest

from spatialvla_jax.cli import main, make_parser
from spatialvla_jax.cli.arguments import local_path, path
from spatialvla_jax.config import KEYS

# The arguments of every command that takes paths. Words in capitals stand for paths; each is tried in turn.
COMMANDS = (
    "demo --workdir WORKDIR",
    "train --config toy.py --workdir WORKDIR",
    "sweep --config sweeps/grid_resolution --workdir WORKDIR",
    "sweep report DIR",
    "sweep collect DIR --out out",
    "sweep collect dir --out OUT",
    "report RUN",
    "report . --out OUT",
    "convert SRC dst --to orbax",
    "convert src DST --to orbax",
    "convert SRC DST --to orbax --zoedepth ZOEDEPTH",
    "convert SRC DST --to peft --base BASE",
    "evaluate --checkpoint CHECKPOINT --config toy.py",
    "evaluate --checkpoint . --closed-loop libero_spatial --out OUT",
    "serve --checkpoint CHECKPOINT",
    "serve --checkpoint . --compile-cache CACHE",
    "serve --checkpoint . --token-file FILE",
    "data show --config toy.py --out OUT",
    "data lerobot SRC dst",
    "data lerobot src DST",
    "data import --from my_data:trajectories --out OUT",
    "data depth SRC --spec libero --checkpoint . --out out",
    "data depth --config toy.py --checkpoint CHECKPOINT --out out",
    "data depth --config toy.py --checkpoint . --out OUT",
    "data pack --config toy.py --out OUT",
    "data index --config toy.py --out OUT",
    "stats --config toy.py --out OUT",
    "grid fit --config toy.py --out OUT",
    "grid fit --config toy.py --stats STATS --out out.json",
    "grid show GRID --out out.png",
    "grid show grid.json --out OUT",
    "grid show grid.json --stats STATS --out out.png",
    "grid compare GRID",
    "grid compare grid.json --stats STATS",
    "fetch me/policy --to TO",
    "view data --config toy.py --out OUT",
    "view policy --checkpoint CHECKPOINT",
    "view policy --checkpoint . --out OUT",
    "view rollout --checkpoint CHECKPOINT --suite libero_spatial",
    "view rollout --checkpoint . --suite libero_spatial --out OUT",
    "record libero --render MOTIONS --out out",
    "record libero --episodes 1 --out OUT",
    "record libero --policy POLICY --episodes 1 --out out",
)
# ZoeDepth's weights are read after those of a PaliGemma 2; `convert --zoedepth` names the same.
LATER = {"init_zoedepth"}
PATHS = {key for key, field in KEYS.items() if field.problem and field.problem.__name__ == "_path"}


def paths_of(parser: argparse.ArgumentParser, name: str = "") -> set[tuple[str, str]]:
    """(command, argument) for all paths that the commands take."""
    found = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                found |= paths_of(below, f"{name} {word}".strip())
        elif action.type in (path, local_path):
            found.add((name, action.option_strings[0] if action.option_strings else "an argument"))
    return found


def test_every_path_is_tried() -> None:
    for command, option in paths_of(make_parser()):
        lines = [line for line in COMMANDS if line.startswith(command)]
        assert any(option in line or option == "an argument" for line in lines), f"{command} {option}"


@pytest.fixture
def here(gcs, config_file: Path, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(config_file.read_text())
    (tmp_path / "grid.json").write_text('{"kind": "linear", "levels": [-1, 0, 1]}')
    return tmp_path


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    try:
        code = main([*words])
    except SystemExit as error:  # argparse
        code = error.code
    printed = capsys.readouterr().err.strip().splitlines()
    assert code == 2, printed
    return printed[-1]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line: str, gcs, here: Path, capsys) -> None:
    url = f"{gcs.url}-wrong/x"
    before = sorted(here.rglob("*"))
    sentence = refused(capsys, *(url if word.isupper() else word for word in line.split()))
    assert url in sentence and ("there is no bucket" in sentence or "only a local path is accepted" in sentence)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("key", sorted(PATHS - LATER))
def test_config_keys(key: str, gcs, here: Path, capsys) -> None:
    url = f"{gcs.url}-wrong/x"
    own = ("--config.data.mixture=bridge", "--config.data.datasets=[]") if key == "data.root" else ()
    sentence = refused(capsys, "train", "--config", "toy.py", "--workdir", "run", f"--config.{key}={url}", *own)
    assert url in sentence and "there is no bucket" in sentence
    assert not (here / "gs:").exists()


def test_a_dataset_of_the_config(gcs, here: Path, capsys, monkeypatch) -> None:
    def sentence(path: str) -> str:
        entry = {"name": "toy", "spec": "libero", "path": path}
        return refused(capsys, "train", "--config", "toy.py", "--workdir", "run", f"--config.data.datasets=[{entry}]")

    assert f"{gcs.url}-wrong/1.0.0: there is no bucket" in sentence(f"{gcs.url}-wrong/1.0.0")
    monkeypatch.setenv("HOME", str(here))
    assert f"{here / 'toy' / '1.0.0'} does not exist" in sentence("~/toy/1.0.0")
    assert "config files are only read from the local disk" in refused(
        capsys, "train", "--config", f"{gcs.url}/toy.py", "--workdir", "run"
    )
    assert not (here / "gs:").exists()
