"""`benchmarks/quantisation.py` on a toy environment."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.environments import Line
from matplotlib.axes import Axes

from spatialvla_jax.errors import InputError
from spatialvla_jax.sim import libero_env as libero

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/quantisation.py"))


def run(monkeypatch, capfd, *arguments: str) -> tuple[dict, str]:
    monkeypatch.setattr(libero, "LiberoExpert", Line)
    monkeypatch.setattr(libero, "check_simulator", lambda: None)
    monkeypatch.setattr(libero, "NUM_TASKS", 2)
    monkeypatch.setattr(sys, "argv", ["quantisation.py", "--workers", "1", *arguments])
    SCRIPT["main"]()
    out = capfd.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_any_grids_one_after_the_other_and_on_where_it_stopped(config_file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # for the default of --out
    config = ("--config", str(config_file))
    first, _ = run(monkeypatch, capfd, *config, "--episodes", "1", "--only", "expert")
    assert first["expert"]["success"] == 1 and first["expert"]["episodes"] == 2
    out = tmp_path / "runs/quantisation"
    before = (out / "expert/episodes.jsonl").read_text()
    both, text = run(monkeypatch, capfd, *config, "--episodes", "1", "--only", "expert,1026,4x8x2x4x4x4")
    assert list(both) == ["expert", "1026", "4x8x2x4x4x4"] and both["expert"] == first["expert"]
    assert "1026: " in text and "4x8x2x4x4x4: " in text
    assert (out / "expert/episodes.jsonl").read_text() == before, "nothing was run twice"
    written = json.loads((out / "results.json").read_text())
    assert written["results"] == both and set(written) > {"commit", "versions", "date", "arguments"}
    assert (out / "quantisation.svg").read_text().startswith("<?xml")


def test_two_grids_of_as_many_tokens_are_two_points(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda axes, sizes, rates, errors, **_: drawn.extend((sizes, rates)))
    row = {"standard_error": 0.01, "steps": None}
    rates = {"8x4x2x4x4x4": 0.5, "expert": 1.0, "386": 0.7, "4x8x2x4x4x4": 0.6}
    SCRIPT["draw"](tmp_path / "a.svg", {name: row | {"success": rate} for name, rate in rates.items()})
    assert drawn == [[130, 130, 386], [50, 60, 70]] and (tmp_path / "a.svg").exists()


def test_steps_of_a_success_are_those_of_the_episodes_that_were_asked_for(config_file, tmp_path, monkeypatch, capfd):
    asked = ["--config", str(config_file), "--only", "expert", "--out", str(tmp_path)]
    once, _ = run(monkeypatch, capfd, *asked, "--episodes", "1")
    log = tmp_path / "expert" / "episodes.jsonl"
    first = json.loads(log.read_text().splitlines()[0])
    with log.open("a") as file:
        file.write(json.dumps(first | {"number": 7, "steps": 200}) + "\n")
    again, _ = run(monkeypatch, capfd, *asked, "--episodes", "1")
    assert again == once


def test_results_of_other_data_are_not_taken_up(config_file, tmp_path, monkeypatch, capfd):
    """A config may change without changing its name: the file was edited, or its data recorded again."""
    asked = ["--config", str(config_file), "--only", "normalised", "--out", str(tmp_path), "--episodes", "1"]
    run(monkeypatch, capfd, *asked)
    monkeypatch.setitem(SCRIPT["tokenizers"].__globals__, "unnormalize", lambda actions, statistics: actions)
    with pytest.raises(SystemExit):
        run(monkeypatch, capfd, *asked)
    assert "holds results with policy = 'expert through normalised" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minuts", "9"], "argument '--minuts' is not known"),
        (["--out", "gs://a/b"], "argument --out: gs://a/b is a URL: only a local path is accepted here"),
        (["--seeds", "a"], "argument --seeds: 'a' is not an integer"),
        (["--seeds", "0,0"], "seeds are 0,0: expected each once"),
        (["--config", "nothing"], "nothing"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, capfd, arguments, sentence):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capfd, *arguments)
    assert ended.value.code == 2 and sentence in capfd.readouterr().err.splitlines()[-1]


def test_a_name_that_is_none(config_file):
    for only in ("1027", "4x8x2"):
        with pytest.raises(InputError, match=f"--only '{only}' is none of 130, 386"):
            SCRIPT["tokenizers"](str(config_file), {}, only)


def test_a_grid_by_its_bins_is_the_one_of_that_size(config_file):
    listed, own = SCRIPT["tokenizers"](str(config_file), {}, "130,4x8x2x4x4x4").values()
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 7)).astype(np.float32)
    np.testing.assert_array_equal(listed(actions), own(actions))
