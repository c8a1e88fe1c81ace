"""Trials run once, whoever runs them; failures and stops are reported; equal shapes compile once."""

import errno
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.environments import Counter
from helpers.recordings import write_recording
from helpers.toy_rlds import make_episodes, make_rlds
from jax.experimental.compilation_cache import compilation_cache

from spatialvla_jax.actions import adapt_embeddings, uniform_grid
from spatialvla_jax.cli import main
from spatialvla_jax.config import default_config, load_config
from spatialvla_jax.data import Loader, open_data
from spatialvla_jax.data.pack import packed_digest, write_pack
from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation.closed_loop import summary
from spatialvla_jax.evaluation.rollouts import Episode
from spatialvla_jax.sim import libero_env
from spatialvla_jax.sweep import collect, measure, run
from spatialvla_jax.sweep.plan import Sweep, Trial
from spatialvla_jax.utils.atomic import write_json

CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")  # what a sweep sets

SWEEP = """
def get_sweep():
    return {{
        "base": {base!r},
        "axes": {{
            "grid": {{
                "broken": {{"data.split": "nothing"}},  # first, so that the others show that it ends nothing
                "gaussian": {{}},
                "uniform": {{"grid.kind": "uniform"}},
            }},
        }},
        "seeds": [0, 1],
        "keep_checkpoints": False,
    }}
"""


@pytest.fixture(scope="module")
def swept(packed_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, int]:
    """(command line, workdir, exit code) of a small sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "grids.py").write_text(SWEEP.format(base=str(packed_config)))
    command = ["sweep", "--config", str(folder / "grids.py"), "--workdir", str(folder / "out")]
    command += ["--config.train.steps=2"]
    # Started twice, each time for one grid and one seed that train and one trial that fails.
    with compiling_in(None):  # the sweep's own folder, which it sets only if there is none
        with pytest.raises(SystemExit):
            main([*command, "--no-report", "--only", "grid-[gb]*_seed-0"])
        with pytest.raises(SystemExit) as error:
            main([*command, "--only", "grid-[ub]*_seed-1"])
    assert isinstance(error.value.code, int)
    return command, folder / "out", error.value.code


@contextmanager
def compiling_in(folder: Path | None) -> Iterator[None]:
    """With this compilation cache instead of that of all tests."""
    kept = {name: getattr(jax.config, name) for name in CACHE}
    jax.config.update("jax_compilation_cache_dir", folder and str(folder))
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in kept.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_sweep_from_end_to_end(swept: tuple[list[str], Path, int]) -> None:
    _, workdir, code = swept
    assert code == 1
    assert {path.name for path in workdir.iterdir()} >= {"report.html", "table.csv", "table.md", "sweep.json"}
    folder = workdir / "trials" / "grid-uniform_seed-1"
    result = json.loads((folder / "result.json").read_text())
    assert result["values"] == {"grid": "uniform"} and result["seed"] == 1 and result["steps"] == 2
    assert result["grid"] == {
        "kind": "spherical",
        "bins": [4, 4, 2, 4, 4, 4],
        "vocab_size": 98,
        "tokens_per_action": 3,
    }
    assert 2 < result["tokens_used"] <= 98 and 0 < result["trainable"] < result["params"]
    assert result["data"] == ["toy"] and result["train_frames"] > 0
    assert re.fullmatch(r".*/trials/grid-uniform_seed-1/checkpoints/2 \([0-9a-f]{8}\)", result["weights"])
    assert {"spatialvla_jax", "jax", "python"} <= result["provenance"]["versions"].keys()
    plan = json.loads((workdir / "sweep.json").read_text())
    assert plan["overrides"] == {"train.steps": "2"} and plan["config"].endswith("grids.py")
    assert plan["reference"] == {}
    assert result["validation"] == [] and result["plateau"] is None  # the config has no validation
    assert result["evaluation"]["episodes"] == 2 and 0 < result["step_seconds_median"] <= result["train_seconds"]
    assert not (folder / "checkpoints").exists()  # the sweep does not keep them
    failure = json.loads((workdir / "trials" / "grid-broken_seed-0" / "failed.json").read_text())
    assert "nothing" in failure["reason"] and failure["error"] == "InputError" and "Traceback" in failure["traceback"]


def test_grids_of_equal_size_share_one_compilation(swept: tuple[list[str], Path, int]) -> None:
    """Two trials with other grids and seeds compile one training step, one initial state and one decoding."""
    names = [path.name.split("-")[0] for path in (swept[1] / "compiled").glob("*-cache")]
    assert names.count("jit_step") == 1
    assert names.count("jit_norms") == 1 and 0 < names.count("jit__lambda") <= 2  # first state, and decoding


def test_a_trial_is_not_run_again(swept: tuple[list[str], Path, int], monkeypatch, capsys) -> None:
    command, workdir, _ = swept
    started = []

    def train(config, folder, **_):
        started.append(folder.name)
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "share_compilations", lambda folder: None)
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("trials/*/result.json")}
    with pytest.raises(SystemExit) as error:
        main([*command, "--no-report", "--only", "grid-[gb]*_seed-0"])
    assert error.value.code == 1 and started == ["grid-broken_seed-0"]  # failed trials are retried
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("trials/*/result.json")} == before and len(
        before
    ) == 2
    told = capsys.readouterr()
    assert "2 trials: 1 failed, 1 finished; rerun the same command to resume" in told.out
    assert "grid-broken_seed-0 failed: out of memory" in told.err and "1 failed: grid-broken_seed-0" in told.err

    assert main([*command[:-1], "--config.train.steps=3"]) == 2  # nor under another config
    message = capsys.readouterr().err
    assert "grid-gaussian_seed-0 holds a run with train.steps = 2, this config says 3; use its config" in message


def test_spatial_features_before_on_the_new_grid_and_after(tmp_path: Path, monkeypatch) -> None:
    """The middle table is the adapted one, before any training; without a new grid there is none."""
    old, new = uniform_grid((4, 8, 2, 1, 1, 1)), uniform_grid((3, 6, 4, 1, 1, 1))
    tables = {
        name: np.random.default_rng(i).normal(size=(grid.vocab_size, 5)).astype(np.float32)
        for i, (name, grid) in enumerate({"init": old, "run": new, "same": old}.items())
    }

    def read(path: str | Path) -> SimpleNamespace:
        leaf = SimpleNamespace(read=lambda: tables[Path(path).name])
        grid = new if Path(path).name == "run" else old
        return SimpleNamespace(processor=SimpleNamespace(grid=grid), arrays={"spatial_embedding": leaf})

    monkeypatch.setattr(measure, "read_checkpoint", read)
    actions = np.full((5, 7), 0.3, np.float32)  # 0.52 from the origin: the lower shell of two, the second of four
    arrays = measure.features_of("init", tmp_path / "run", actions)
    np.testing.assert_array_equal(arrays["before_features"], tables["init"][:64].reshape(4, 8, 2, 5)[:, :, 0])
    np.testing.assert_array_equal(arrays["after_features"], tables["run"][:72].reshape(3, 6, 4, 5)[:, :, 1])
    adapted = np.asarray(adapt_embeddings(old, new, tables["init"]))[:72].reshape(3, 6, 4, 5)[:, :, 1]
    np.testing.assert_array_equal(arrays["adapted_features"], adapted)
    assert arrays["adapted_phi"].shape == (7,)
    assert not any(key.startswith("adapted") for key in measure.features_of("init", tmp_path / "same", actions))


def test_trials_of_other_data_are_not_mixed(
    swept: tuple[list[str], Path, int], packed_config: Path, config_file: Path, tmp_path: Path, capsys
) -> None:
    """A moved copy of the same packed file is accepted. Another file, or unpacked data, is refused."""
    command = [*swept[0], "--no-report", "--only", "grid-gaussian_seed-0"]
    result = json.loads((swept[1] / "trials" / "grid-gaussian_seed-0" / "result.json").read_text())
    pack = Path(load_config(packed_config).data.packed)
    assert result["packed"] == packed_digest(pack)
    shutil.copy(pack, tmp_path / "moved.pack")
    assert main([*command, f"--config.data.packed={tmp_path / 'moved.pack'}"]) == 0
    data = load_config(config_file).data
    data.datasets[0]["path"] = str(make_rlds(tmp_path, {"train": make_episodes(2, seed=5), "val": make_episodes(1)}))
    loader = Loader(data, image_size=56, depth=True)
    write_pack(loader, tmp_path / "other.pack", ("train", "val"))
    for path in (str(tmp_path / "other.pack"), ""):
        capsys.readouterr()
        assert main([*command, f"--config.data.packed={path}"]) == 2
        message = capsys.readouterr().err
        assert f"was made from other data than {path or 'data.datasets'}: use another" in message
        assert message.count("\n") == 1


def test_finished_trials_come_from_elsewhere_as_small_files(
    swept: tuple[list[str], Path, int], tmp_path: Path, monkeypatch, capsys
) -> None:
    """They are not run again, and are refused under another config. Results that are already there stay."""
    command, workdir, _ = swept
    two, parts = ["grid-gaussian_seed-0", "grid-uniform_seed-1"], [tmp_path / "a", tmp_path / "b"]
    for part, name in zip(parts, two, strict=True):
        shutil.copytree(workdir / "trials" / name, part / "trials" / name)
        shutil.copy(workdir / "sweep.json", part)
    (parts[0] / "trials" / two[0] / "result.json").chmod(0o444)
    out = tmp_path / "out"
    assert main(["sweep", "collect", *map(str, parts), "--out", str(out)]) == 0
    assert f"copied 2 trials to {out}: 2 of 6 are finished" in capsys.readouterr().out
    names = {"config.json", "metrics.jsonl", "times.jsonl", "grid.json", "data.npz", "result.json", "lock"}
    assert {path.name for path in out.glob("trials/*/*")} == names
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/*.json*")}
    assert main(["sweep", "collect", str(workdir), "--out", str(out)]) == 0
    assert f"copied 0 trials to {out}: 2 of 6 are finished" in capsys.readouterr().out

    monkeypatch.setattr(run, "train", lambda config, folder, **_: pytest.fail("it is finished"))
    monkeypatch.setattr(run, "share_compilations", lambda folder: None)
    here = [*command[: command.index("--workdir")], "--workdir", str(out), "--no-report", "--config.train.steps=2"]
    for name in two:
        assert main([*here, "--only", name]) == 0
        assert "1 trial: 1 finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main([*here[:-1], "--config.train.steps=3", "--only", two[0]]) == 2
    assert "holds a run with train.steps = 2, this config says 3" in capsys.readouterr().err


def test_trials_of_other_overrides_are_not_mixed(swept: tuple[list[str], Path, int], tmp_path: Path, capsys) -> None:
    """What counts is the config that each trial was trained with, not the sweep file's commit."""
    command, workdir, _ = swept
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    other = [*command[:-1], "--config.train.steps=1", "--no-report", "--only", "grid-uniform_seed-0"]
    other[other.index("--workdir") + 1] = str(elsewhere)
    with compiling_in(workdir / "compiled"):
        assert main(other) == 0
    steps = [*(workdir / "compiled").glob("jit_step-*-cache")]
    assert len(steps) == 1, "the number of steps is not part of the program"
    capsys.readouterr()
    told = "grid-uniform_seed-0 holds a run with train.steps = 1, {}/sweep.json says 2; use its config or another"
    assert main(["sweep", "collect", str(workdir), str(elsewhere), "--out", str(out)]) == 2
    assert told.format(workdir) in capsys.readouterr().err and not out.exists()
    shutil.copytree(workdir, out, ignore=shutil.ignore_patterns("compiled", "checkpoints"))
    shutil.copytree(elsewhere / "trials", out / "trials", dirs_exist_ok=True)
    assert main(["sweep", "report", str(out)]) == 2
    message = capsys.readouterr().err
    assert told.format(out) in message and message.count("\n") == 1
    plan = json.loads((out / "sweep.json").read_text())
    for damaged in ({"config_of_each": {}}, {"config_of_all": 3}):
        write_json(out / "sweep.json", plan | damaged)
        assert main(["sweep", "report", str(out)]) == 2
        assert "sweep.json has no config of grid-" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"trials/grid-uniform_seed-1/result.json": '{"config_digest": "0"}'}, "config_digest differs in their"),
        ({"trials/grid-uniform_seed-1/data.npz": None}, "is finished, but its data.npz is missing"),
        ({"sweep.json": '{"name": "other", "trials": {}}'}, "hold different sweeps: their name differ"),
        ({"sweep.json": '{"trials": {"a": 1}}'}, "has no good 'trials': it is not the plan of a sweep"),
        ({"sweep.json": None}, "holds no sweep: it has no sweep.json"),
        ({"trials/grid-uniform_seed-1/result.json": "{"}, "cannot be read as JSON"),
    ],
)
def test_results_that_do_not_belong_together_are_not_collected(
    change: dict[str, str | None], sentence: str, swept: tuple[list[str], Path, int], tmp_path: Path, capsys
) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(swept[1], other, ignore=shutil.ignore_patterns("compiled", "checkpoints"))
    for name, text in change.items():
        (other / name).unlink() if text is None else (other / name).write_text(text)
    assert main(["sweep", "collect", str(swept[1]), str(other), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert sentence in message and message.count("\n") == 1 and not out.exists()


def test_a_trial_with_its_closed_loop_is_collected(tmp_path: Path) -> None:
    """It replaces the same trial without one. Other episodes make another trial, and folders with other files stay."""
    places = [tmp_path / name for name in ("without", "with", "longer")]
    for place, episodes in zip(places, (0, 10, 20), strict=True):
        trial = place / "trials" / "a"
        (trial / "closed_loop").mkdir(parents=True)
        write_json(place / "sweep.json", {"name": "s", "trials": {"a": {"values": {}, "seed": 0}}})
        for name in (*collect.FILES, *(collect.CLOSED_LOOP if episodes else ()), "result.json"):
            suites = {"suites": {"libero_spatial": {"tasks": {"0": {}}}}}
            write_json(trial / name, {"episodes": episodes, "seeds": [0]} | suites if "closed" in name else {})
    assert collect.collect(places[:2], places[0])["copied"] == 1
    assert json.loads((places[0] / "trials/a/closed_loop/result.json").read_text())["episodes"] == 10
    assert collect.collect(places[:2], places[0])["copied"] == 0
    with pytest.raises(InputError, match=r"longer/trials/a and .* have closed loops of different episodes: 20 and 10"):
        collect.collect(places, tmp_path / "new")
    for damaged in (
        {},
        {"suites": []},
        {"suites": {"libero_goal": {}}},
        {"suites": {"libero_goal": {"tasks": {"x": 1}}}},
    ):
        write_json(places[2] / "trials" / "a" / collect.CLOSED_LOOP[-1], {"episodes": 10, "seeds": [0]} | damaged)
        with pytest.raises(InputError, match=r"result.json is damaged: expected episodes, seeds and suites, each with"):
            collect.collect(places, tmp_path / "new")
    for suites in ({"libero_spatial": {"tasks": {"7": {}}}}, {"libero_goal": {"tasks": {"0": {}}}}):
        result = {"episodes": 10, "seeds": [0], "suites": suites}
        write_json(places[2] / "trials" / "a" / collect.CLOSED_LOOP[-1], result)
        with pytest.raises(InputError, match=r"have closed loops of different tasks: libero_.* and libero_spatial 0"):
            collect.collect(places, tmp_path / "new")
    with pytest.raises(InputError, match="is not empty and holds no sweep"):
        collect.collect(places[:2], places[0] / "trials" / "a")


def test_a_trial_that_is_running_there_is_not_counted_as_collected(tmp_path: Path) -> None:
    here, there, plan = tmp_path / "here", tmp_path / "there", {n: {"values": {}, "seed": 0} for n in "ab"}
    for trial, name in itertools.product("ab", (*collect.FILES, "result.json")):
        (here / "trials" / trial).mkdir(parents=True, exist_ok=True)
        write_json(here / "trials" / trial / name, {})
    running = there / "trials" / "a"
    running.mkdir(parents=True)
    for place in (here, there):
        write_json(place / "sweep.json", {"name": "s", "trials": plan})
    with run.claim(running):
        assert collect.collect([here], there) == {"trials": 2, "finished": 1, "copied": 1}
        assert not (running / "result.json").exists()
    assert collect.collect([here], there) == {"trials": 2, "finished": 2, "copied": 1}


def test_a_collection_that_is_stopped_halfway_leaves_no_mixture_of_two_results(tmp_path: Path, monkeypatch) -> None:
    """Replacing a trial by the same one with a closed loop stops before the last file is copied."""
    old, new = tmp_path / "old", tmp_path / "new"
    for place in (old, new):
        (place / "trials" / "a" / "closed_loop").mkdir(parents=True)
        write_json(place / "sweep.json", {"name": "s", "trials": {"a": {"values": {}, "seed": 0}}})
        for name in (*collect.FILES, *collect.CLOSED_LOOP, "result.json"):
            if place == new or "closed" not in name:
                suites = {"episodes": 10, "seeds": [0], "suites": {}}
                write_json(place / "trials" / "a" / name, {"of": place.name} | suites)
    copy = shutil.copyfile

    def stopped(source: Path, target: Path) -> None:
        if source == new / "trials" / "a" / "result.json":
            raise KeyboardInterrupt
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", stopped)
    with pytest.raises(KeyboardInterrupt):
        collect.collect([new], old)
    assert not (old / "trials" / "a" / "result.json").exists()
    monkeypatch.setattr(shutil, "copyfile", copy)
    assert collect.collect([new], old)["copied"] == 1
    assert json.loads((old / "trials" / "a" / "result.json").read_text())["of"] == "new"


@pytest.mark.parametrize("packed", ["~/a.pack", {"~/a.pack": 2.0}])
def test_a_packed_file_in_the_home_folder(packed, packed_config: Path, tmp_path: Path, monkeypatch) -> None:
    """A shell does not expand the ~ of --config.data.packed=~/a.pack; the program does."""
    path, sweep = tmp_path / "a.pack", trials("a")
    shutil.copy(load_config(packed_config).data.packed, path)
    monkeypatch.setenv("HOME", str(tmp_path))
    sweep.trials[0].config.data.packed = packed
    folder = tmp_path / "trials" / "a"
    folder.mkdir(parents=True)
    write_json(folder / "config.json", sweep.trials[0].config.to_dict())
    digest = packed_digest({str(path): 2.0} if isinstance(packed, dict) else path)
    assert measure.data_digest(sweep.trials[0].config) == digest
    write_json(folder / "result.json", {"packed": digest})
    run.prepare(sweep, tmp_path)
    write_json(folder / "result.json", {"packed": "0"})
    with pytest.raises(InputError, match="was made from other data than"):
        run.prepare(sweep, tmp_path)


def test_another_sweep_does_not_take_the_place_of_the_one_that_is_there(tmp_path: Path) -> None:
    """The report would show none of its trials."""
    run.prepare(trials("a"), tmp_path)
    before = (tmp_path / "sweep.json").read_text()
    with pytest.raises(InputError, match=f"{tmp_path} holds the sweep mine, not other: use another workdir"):
        run.prepare(replace(trials("b"), name="other"), tmp_path)
    assert (tmp_path / "sweep.json").read_text() == before
    run.prepare(trials("a", "b"), tmp_path)  # a sweep may get more trials


@pytest.mark.parametrize("file", ["sweep.json", "trials/a/result.json", "trials/a/closed_loop/result.json"])
def test_damaged_files_are_named_when_a_sweep_goes_on(file: str, tmp_path: Path) -> None:
    (trial,) = trials("a").trials
    trial = replace(trial, closed_loop={"suite": "", "episodes": 1, "seeds": [0], "tasks": []})
    (tmp_path / "trials" / "a" / "closed_loop").mkdir(parents=True)
    for name in ("trials/a/result.json", "trials/a/closed_loop/result.json", "trials/a/config.json"):
        write_json(tmp_path / name, trial.config.to_dict() if "config" in name else {})
    (tmp_path / file).write_text('{"epis')
    with pytest.raises(InputError, match=f"{file} cannot be read as JSON"):
        run.prepare(trials("a"), tmp_path)
        run.finished(tmp_path / "trials" / "a", trial)


def test_weights_that_init_no_longer_holds_are_told(trained: Path, tmp_path: Path, capsys) -> None:
    """Finished trials stay even if `init` holds other weights now: each machine may have trained its own."""
    sweep = trials("a")
    folder, config = tmp_path / "trials" / "a", sweep.trials[0].config
    config.init = str(trained)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.to_dict())
    write_json(folder / "result.json", {"init": measure.weights_digest(trained)})
    run.prepare(sweep, tmp_path)
    assert capsys.readouterr().err == ""
    write_json(folder / "result.json", {"init": "0" * 16})
    run.prepare(sweep, tmp_path)
    told = f"1 finished trial started from weights that init no longer holds: a, from {trained}"
    assert told in capsys.readouterr().err


DIES = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
from spatialvla_jax.sweep import run
from spatialvla_jax.sweep.plan import Sweep, Trial
run.share_compilations = lambda folder: None
run.train = lambda config, folder, **_: os._exit(9) if folder.name == "a" else {"step": 10}
run.measure = lambda trial, folder, trained, drawn: {}
config = SimpleNamespace(train=SimpleNamespace(steps=10))
workdir = Path(sys.argv[1])
failed = workdir / "trials" / "a" / "failed.json"
for names in sys.argv[2:]:  # each in a process of its own
    if (pid := os.fork()) == 0:
        trials = tuple(Trial(name, {}, 0, config) for name in names)
        outcomes = run.run_here(Sweep("mine", {}, {}, (0,), True, trials), workdir, trials, lambda text: None)
        os._exit(outcomes != {"a": run.FAILED, "b": run.FINISHED})
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(code, failed.exists() and "its process died" in json.loads(failed.read_text())["reason"], flush=True)
"""


def test_a_trial_that_its_process_dies_of_ends_nothing(tmp_path: Path) -> None:
    """Run alone, it resumes and dies again. Among others it then counts as failed, and is retried."""
    command = [sys.executable, "-c", DIES, str(tmp_path), "ab", "a", "ab", "ab"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *before, again = done.stdout.splitlines()
    assert before == ["9 False", "9 False", "0 True"] and again.startswith("9 ")


def trials(*names: str) -> Sweep:
    config = default_config()
    config.train.steps = 10
    made = tuple(Trial(name, {"axis": name}, 0, config) for name in names)
    return Sweep("mine", {"axis": names}, {}, (0,), True, made)


def test_a_stopped_trial_ends_the_sweep_and_a_taken_one_is_left(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run, "share_compilations", lambda folder: None)
    monkeypatch.setattr(run, "train", lambda config, folder, **_: {"step": 4 if folder.name == "b" else 10})
    monkeypatch.setattr(run, "measure", lambda trial, folder, trained, drawn: {"trial": trial.name})
    sweep = trials("a", "b", "c")
    assert run.run_here(sweep, tmp_path, sweep.trials, print) == {"a": run.FINISHED, "b": run.STOPPED}
    assert not (tmp_path / "trials" / "b" / "result.json").exists()
    monkeypatch.setattr(run, "train", lambda config, folder, **_: {"step": 10})
    with run.claim(tmp_path / "trials" / "b") as mine, run.claim(tmp_path / "trials" / "b") as again:
        assert mine and not again
        outcomes = run.run_here(sweep, tmp_path, sweep.trials, print)
        assert outcomes == {"a": run.FINISHED, "b": run.ELSEWHERE, "c": run.FINISHED}
    assert run.run_here(sweep, tmp_path, sweep.trials, print)["b"] == run.FINISHED


def test_a_trial_without_data_to_evaluate_fails_before_it_is_trained(
    packed_config: Path, tmp_path: Path, monkeypatch
) -> None:
    """Its training has no validation that would tell."""
    started = []

    def train(config, folder: Path, on_start) -> dict[str, int]:
        on_start(SimpleNamespace(start=0, loader=open_data(config)))
        started.append(folder.name)
        return {"step": 4}

    monkeypatch.setattr(run, "share_compilations", lambda folder: None)
    monkeypatch.setattr(run, "train", train)
    sweep, config = trials("a", "b"), load_config(packed_config, {"train.eval_split": "nothing"})
    lacking = replace(sweep.trials[0], config=config)
    whole = replace(sweep.trials[1], config=load_config(packed_config))
    assert run.run_here(sweep, tmp_path, [lacking, whole], print) == {"a": run.FAILED, "b": run.STOPPED}
    assert "has no split 'nothing'" in json.loads((tmp_path / "trials/a/failed.json").read_text())["reason"]
    assert started == ["b"]


def test_frames_to_train_on_are_those_with_pictures(tmp_path: Path, monkeypatch) -> None:
    """Two files of one dataset have 4 × 12 steps each and, for every third step of the second, a picture."""
    files = [str(write_recording(tmp_path / f"{every}.pack", every=every)) for every in (1, 3)]
    (trial,), grid = trials("a").trials, uniform_grid((4, 4, 2, 2, 2, 2))
    trial.config.data.packed = dict.fromkeys(files, 1.0)
    trial.config.model.update(preset="nano", image_size=56)
    processor = SimpleNamespace(statistics=None, tokenizer=None, grid=grid)
    for name, value in {
        "train_config_of": lambda folder: trial.config,
        "Policy": SimpleNamespace(load=lambda folder: SimpleNamespace(processor=processor)),
        "evaluate": lambda *_, **__: {},
        "fingerprint": str,
    }.items():
        monkeypatch.setattr(measure, name, value)
    for name in ("metrics", "times"):
        (tmp_path / f"{name}.jsonl").write_text('{"step": 4, "loss": 1.5, "step/seconds": 0.5}\n')
    result = measure.measure(trial, tmp_path, {"step": 4, "params": 3, "trainable": 2}, False)
    assert result["data"] == ["toy"] and result["train_frames"] == 4 * 12 + 4 * 4
    assert (result["loss"], result["train_seconds"]) == (1.5, 2)


def test_a_trial_without_a_finite_loss_has_no_result(packed_config: Path, tmp_path: Path) -> None:
    """The report refuses a result without a number, and with it those of all other trials."""
    (trial,) = trials("a").trials
    (tmp_path / "checkpoints").mkdir()
    write_json(tmp_path / "config.json", trial.config.to_dict())
    for name in ("metrics", "times"):
        (tmp_path / f"{name}.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n')
    with pytest.raises(InputError, match="no logged step has a finite loss, so nothing was learned"):
        measure.measure(trial, tmp_path, {"step": 2}, False)


def test_checkpoints_that_cannot_be_removed_end_no_sweep(tmp_path: Path, monkeypatch, capsys) -> None:
    """As on NFS, while a file in them is open."""

    def busy(folder: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))

    monkeypatch.setattr(run, "share_compilations", lambda folder: None)
    monkeypatch.setattr(run, "train", lambda config, folder, **_: {"step": 10})
    monkeypatch.setattr(run, "measure", lambda trial, folder, trained, drawn: {"trial": trial.name})
    monkeypatch.setattr(run.shutil, "rmtree", busy)
    sweep = replace(trials("a", "b"), keep_checkpoints=False)
    assert run.run_here(sweep, tmp_path, sweep.trials, print) == {"a": run.FINISHED, "b": run.FINISHED}
    assert capsys.readouterr().err.count("checkpoints cannot be removed: Directory not empty") == 2


def test_a_trial_is_finished_with_all_episodes_of_its_closed_loop(tmp_path: Path, monkeypatch) -> None:
    """Episodes may be missing, or the sweep may ask for more than were run, or for those of another suite."""
    calls = []

    def simulate(trial: Trial, folder: Path, workers: int) -> None:
        calls.append((trial.name, workers))
        (folder / "closed_loop").mkdir(exist_ok=True)
        asked = trial.closed_loop
        episodes = [
            Episode(asked["suite"] or "libero_goal", task, n, 0)
            for task in asked["tasks"]
            for n in range(asked["episodes"])
        ]
        record = {"success": True, "faults": [], "instruction": "go"}
        write_json(folder / "closed_loop" / "result.json", summary(dict.fromkeys(episodes, record)))

    monkeypatch.setattr(run, "share_compilations", lambda folder: None)
    monkeypatch.setattr(run, "train", lambda config, folder, **_: {"step": 10})
    monkeypatch.setattr(run, "measure", lambda *_: {"data": ["libero_goal"]})
    monkeypatch.setattr(run, "simulate", simulate)
    sweep = trials("a")

    def go_on(**closed_loop) -> list[tuple[str, int]]:
        calls.clear()
        asked = [replace(trial, closed_loop=closed_loop and {"suite": ""} | closed_loop) for trial in sweep.trials]
        assert run.run_here(sweep, tmp_path, asked, print, workers=3) == {"a": run.FINISHED}
        return list(calls)

    assert go_on() == []
    assert go_on(tasks=[0, 4], episodes=2, seeds=[0]) == [("a", 3)]
    assert go_on(tasks=[0, 4], episodes=2, seeds=[0]) == [] == go_on()
    assert go_on(tasks=[0, 4], episodes=3, seeds=[0]) == [("a", 3)]
    assert go_on(tasks=[0, 4], episodes=3, seeds=[0], suite="libero_object") == [("a", 3)]
    assert go_on(tasks=[0, 4], episodes=3, seeds=[0]) == [("a", 3)], "the suite of its data again"
    assert go_on(tasks=[0, 4], episodes=3, seeds=[0], suite="libero_goal") == []


def simulated(monkeypatch, *datasets: str) -> tuple[Trial, set[str | None]]:
    """A trial on these datasets, whose closed loop has two short episodes, and the units that its policy is asked
    for."""
    asked = set()

    def infer_batch(batch: list[dict]) -> list[dict]:
        asked.update(one.get("unnorm_key") for one in batch)
        return [{"actions": np.zeros((4, 7), np.float32)} for _ in batch]

    config = SimpleNamespace(img=SimpleNamespace(image_size=8), depth_source="none")
    policy = SimpleNamespace(
        model=SimpleNamespace(config=config),
        processor=SimpleNamespace(statistics={name: {} for name in datasets}),
        infer_batch=infer_batch,
    )
    monkeypatch.setattr(measure, "Policy", SimpleNamespace(load=lambda folder: policy))
    monkeypatch.setattr(measure, "fingerprint", str)
    monkeypatch.setattr(libero_env, "Libero", Counter)
    monkeypatch.setattr(libero_env, "check_simulator", lambda: None)
    monkeypatch.setitem(libero_env.MAX_STEPS, "libero_object", 3)
    (trial,) = trials("a").trials
    trial.config.data.datasets = [{"name": name} for name in datasets]
    return replace(trial, closed_loop={"suite": "", "episodes": 1, "seeds": [5], "tasks": [0, 1]}), asked


def test_a_trials_closed_loop_of_several_datasets(tmp_path: Path, monkeypatch) -> None:
    """A policy of several datasets acts in the units of the suite's own. A suite of none is refused before training."""
    trial, asked = simulated(monkeypatch, "libero_spatial", "libero_object")
    for suite in ("", "libero_object"):
        one = replace(trial, closed_loop=trial.closed_loop | {"suite": suite})
        monkeypatch.setitem(libero_env.MAX_STEPS, "libero_spatial", 3)
        asked.clear()
        measure.simulate(one, tmp_path / suite, workers=1)
        assert asked == {suite or "libero_spatial"}
        settings = json.loads((tmp_path / suite / "closed_loop" / "settings.json").read_text())
        assert settings["policy"].endswith(f", 8 px, {suite or 'libero_spatial'}")
    with pytest.raises(InputError, match="suite 'libero_goal': expected one dataset whose name begins with it"):
        measure.episodes_of(replace(trial, closed_loop=trial.closed_loop | {"suite": "libero_goal"}))


def test_a_trials_closed_loop_is_on_the_suite_of_its_data_and_of_its_weights(
    packed_config: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    trial, asked = simulated(monkeypatch, "libero_object")
    measure.simulate(trial, tmp_path, workers=1)
    assert asked == {None}
    path = tmp_path / "closed_loop" / "result.json"
    result = json.loads(path.read_text())
    assert list(result["suites"]) == ["libero_object"] and result["seeds"] == [5]
    assert result["episodes"] == 2 and result["success"] == 0.5
    write_json(tmp_path / "result.json", {})
    assert run.finished(tmp_path, trial)
    for other in ({"seeds": [6]}, {"suite": "libero_goal"}):
        assert not run.finished(tmp_path, replace(trial, closed_loop=trial.closed_loop | other))

    path.write_text("kept")
    write_json(path.with_name("notes.json"), {})
    measure.simulate(trial, tmp_path, workers=1)
    assert json.loads(path.read_text()) == result and path.with_name("notes.json").exists(), "the episodes are there"
    capsys.readouterr()
    monkeypatch.setattr(measure, "fingerprint", lambda folder: f"{folder} (trained anew)")
    measure.simulate(trial, tmp_path, workers=1)
    assert "closed_loop holds episodes of other weights than" in capsys.readouterr().err
    assert json.loads(path.read_text()) == result and not path.with_name("notes.json").exists()
    assert "(trained anew), 8 px" in json.loads(path.with_name("settings.json").read_text())["policy"]

    trial.config.data.packed = load_config(packed_config).data.packed
    with pytest.raises(InputError, match="unknown suite 'toy': choose from libero_spatial"):
        measure.episodes_of(trial)


def test_a_result_does_not_outlive_its_weights(tmp_path: Path, monkeypatch) -> None:
    """If a sweep kept no checkpoints and asks for a closed loop, it trains anew; its old result is removed first."""
    there = []

    def train(config, folder: Path, on_start) -> dict[str, int]:
        loader = SimpleNamespace(check_epoch=lambda split: 1)
        on_start(SimpleNamespace(start=4 if (folder / "checkpoints").exists() else 0, loader=loader))
        there.append((folder / "result.json").exists())
        return {"step": 4}

    monkeypatch.setattr(run, "share_compilations", lambda folder: None)
    monkeypatch.setattr(run, "train", train)
    (trial,), folder = trials("a").trials, tmp_path / "trials" / "a"
    trial = replace(trial, closed_loop={"suite": "", "episodes": 1, "seeds": [0], "tasks": [0]})
    for kept in (True, False):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(folder / "result.json", {})
        if not kept:
            shutil.rmtree(folder / "checkpoints")
        assert run.run_here(trials("a"), tmp_path, [trial], print) == {"a": run.STOPPED}
    assert there == [True, False]


@pytest.mark.parametrize(
    ("visible", "processes", "places"),
    [
        ("4,5,6", 2, {"4,6 with None", "5 with None"}),  # more GPUs than processes: dealt
        ("4,5", 3, {"4 with 0.375", "5 with 0.375"}),  # fewer: one each, shared by at most two
        ("", 2, {" with None"}),
    ],
)
def test_several_at_once(visible: str, processes: int, places: set[str], tmp_path: Path, monkeypatch) -> None:
    """With stubs for the processes: one finishes, one fails with a reason, one finds no device, one is killed, one is
    asked to stop."""
    script = """
import os, sys
assert os.environ["SPATIALVLA_JAX_PARENT"] == str(os.getppid())  # so that it ends with it
name, folder = sys.argv[-1], os.path.join(sys.argv[1], "trials", sys.argv[-1])
print(name, "on", os.environ.get("CUDA_VISIBLE_DEVICES"), "with", os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"))
if name == "good":
    open(os.path.join(folder, "result.json"), "w").write("{}")
if name == "bad":
    open(os.path.join(folder, "failed.json"), "w").write("{}")
sys.exit({"good": 0, "bad": 1, "lost": 1, "killed": 9, "stopped": 0}[name])
"""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    sweep = trials("good", "bad", "lost", "killed", "stopped")
    outcomes = run.run_parallel([sys.executable, "-c", script, str(tmp_path)], tmp_path, sweep.trials, processes)
    expected = {"good": "finished", "bad": "failed", "lost": "failed", "killed": "failed", "stopped": "stopped"}
    assert outcomes == expected
    failure = json.loads((tmp_path / "trials" / "killed" / "failed.json").read_text())
    assert "exit code 9" in failure["reason"]
    logs = {name: (tmp_path / "trials" / name / "log.txt").read_text().split(" on ") for name in outcomes}
    assert all(text[0] == name and text[1].rstrip() in places for name, text in logs.items())


def test_options_that_report_and_collect_would_ignore_are_refused(tmp_path: Path, capsys) -> None:
    for command in (["report", str(tmp_path)], ["collect", str(tmp_path), "--out", str(tmp_path / "out")]):
        for given in (["--only", "a*"], ["--workdir", str(tmp_path / "other")], ["--parallel", "2"]):
            assert main(["sweep", *given, *command]) == 2
            assert f"{given[0]} applies only to a sweep that runs trials" in capsys.readouterr().err
        assert main(["sweep", *command, "--config.train.steps=3"]) == 2
        assert "--config.KEY=VALUE applies only to a sweep that runs trials" in capsys.readouterr().err


def test_jobs_of_slurm_and_xpk(swept: tuple[list[str], Path, int], tmp_path: Path, capfd) -> None:
    command, _, _ = swept
    command = [*command[:3], "--workdir", str(tmp_path), "--config.train.steps=3", "--dry-run", "--only", "*gaussian*"]
    ours = f"sweep --config {command[2]} --workdir {tmp_path} --coordinator auto --only grid-gaussian_seed-{{}}"
    assert main([*command, "--launcher", "slurm"]) == 0
    jobs = capfd.readouterr().out.splitlines()
    srun = "srun --kill-on-bad-exit=1 .venv/bin/spatialvla-jax"
    assert [shlex.split(job) for job in jobs] == [
        shlex.split(f"{srun} {ours.format(seed)} --config.train.steps=3") for seed in (0, 1)
    ]
    assert main([*command, "--launcher", "xpk", "--launcher-args", "pod v5litepod-8 1 image:1"]) == 0
    job = shlex.split(capfd.readouterr().out.splitlines()[1])
    assert shlex.split(job[-1]) == shlex.split(f"spatialvla-jax {ours.format(1)} --config.train.steps=3")
    assert job[job.index("--workload") + 1] == "grid-gaussian-seed-1" and job[job.index("--cluster") + 1] == "pod"
    assert main([*command, "--launcher", "xpk", "--launcher-args", "pod"]) == 2  # too few arguments
    capfd.readouterr()
    assert main([*command, "--launcher-args=--partition=gpu"]) == 2
    assert capfd.readouterr().err.endswith("--launcher-args needs --launcher slurm or --launcher xpk\n")
    assert main([*command, "--launcher", "slurm", "--parallel", "2"]) == 2
    assert "--parallel is for trials on this machine, and --launcher slurm makes jobs" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
    submit, environment = run.job_command(
        "slurm", "--partition gpu --gpus-per-node=1", "s.py", tmp_path, trials("a").trials[0], (), False
    )
    assert environment == {"COMMAND": "sweep"}
    start = "sbatch --nodes=1 --job-name=a --partition gpu --gpus-per-node=1 launch/slurm.sbatch s.py"
    assert submit == [*shlex.split(start), str(tmp_path), "--only", "a"]


def test_xpk_jobs_of_trials_with_long_names_have_names_of_their_own(tmp_path: Path) -> None:
    ends = "_ego3d-moved-intrinsics-fixed-crop_chunk-4_seed-0"
    named = trials(f"grid-130{ends}", f"grid-386{ends}", "lr-1e+3_seed-0").trials
    jobs = [run.job_command("xpk", "pod v5e-8 1 image:1", "s.py", tmp_path, trial, (), False)[1] for trial in named]
    first, second, short = (job["NAME"] for job in jobs)
    assert first != second and short == "lr-1e-3-seed-0"
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,36}[a-z0-9]", name) for name in (first, second))
    assert first.endswith("fixed-crop-chunk-4-seed-0")
