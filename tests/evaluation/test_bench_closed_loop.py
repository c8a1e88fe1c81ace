"""`benchmarks/closed_loop.py`: its stages, what a stop keeps, what another machine needs. Its commands are stubs."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.processes import child_ends_with

from spatialvla_jax.utils.process import try_lock

AGAIN = "rerun the same command to resume"
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/closed_loop.py"))


@pytest.fixture
def environments() -> dict[str, dict[str, str]]:
    """The environment of each command that `bench` called."""
    return {}


@pytest.fixture
def bench(monkeypatch, tmp_path, environments):
    """Run the script; returns the commands that it called, up to one that contains `stop`."""

    def run(
        *arguments: object,
        stop: str = "nothing",
        ended: threading.Event | None = None,
        number: int = signal.SIGTERM,
        told: str = AGAIN,
    ) -> list[str]:
        called: list[str] = []

        class Command:
            def __init__(self, argv, env):
                self.text = " ".join(argv[3:]).replace(f"{tmp_path}/", "")
                called.append(self.text)
                environments[self.text] = env
                if stop not in self.text:
                    out = Path(argv[argv.index("--out" if "--out" in argv else "--workdir") + 1])
                    out.touch() if argv[3] == "record" else out.mkdir(exist_ok=True)
                    if argv[3] == "train":
                        (out / "finished").touch()
                    if argv[3] == "evaluate":
                        protocol = {
                            "episodes": 20,
                            "seeds": sorted(map(int, argv[argv.index("--seeds") + 1].split(","))),
                        }
                        result = {"success": 0.9, "standard_error": 0.02} | protocol
                        (out / "result.json").write_text(json.dumps(result))
                        (out / "settings.json").write_text('{"policy": "weights (1), 224 px"}')

            def wait(self, timeout=None):
                if stop in self.text and ended:
                    os.kill(os.getpid(), number)
                    assert ended.wait(120)
                    return 143
                if stop in self.text and timeout is not None:
                    raise subprocess.TimeoutExpired(self.text, timeout)
                return 0

            def terminate(self):
                if ended:
                    ended.set()

        monkeypatch.setitem(SCRIPT["main"].__globals__, "fingerprint", lambda run: "weights (1)")
        stand_in = SimpleNamespace(Popen=Command, TimeoutExpired=subprocess.TimeoutExpired)
        monkeypatch.setitem(SCRIPT["main"].__globals__, "subprocess", stand_in)
        few = ["--setting", "reduced", "--tasks", "3,5", "--record", 400, "--added", 50]
        monkeypatch.setattr(sys, "argv", ["closed_loop.py", "--workdir", str(tmp_path), *map(str, (*few, *arguments))])
        if stop == "nothing":
            SCRIPT["main"]()
        else:
            with pytest.raises(SystemExit, match=told):
                SCRIPT["main"]()
        return called

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def kinds(called: list[str]) -> list[str]:
    return ["render" if "--render" in text else text.split()[0] for text in called]


WHOLE = ["record", "record", "render", "render", "train", "record", "render", "train", "evaluate"]


def test_the_stages_in_their_order(bench, tmp_path, capsys, environments, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # the tests' own
    called = bench("--config.train.batch_size=9")
    assert kinds(called) == WHOLE
    caches = {environments[text]["JAX_COMPILATION_CACHE_DIR"] for text in called}
    assert caches == {str(tmp_path / "compiled")}, "the commands share their compiled programs"
    first, second, *_, added, _, on, evaluated = called
    assert "--episodes 300 --val-episodes 16 --seed 0" in first and "--out motions/first-00.npz" in first
    assert "--episodes 100 --val-episodes 0 --seed 1" in second
    assert (
        "--episodes 50 --val-episodes 0 --seed 1000" in added and "--policy full-0 --out motions/full-1-00.npz" in added
    )
    packs = {
        f"pictures/{name}.pack": weight for name, weight in (("first-00", 1.0), ("first-01", 1.0), ("full-1-00", 2.0))
    }
    assert f"--config.data.packed={packs} --config.train.steps=2000" in on and "--config.train.batch_size=9" in on
    assert "--config.init=full-0 --config.grid.kind=checkpoint" in on
    assert "--checkpoint full-1" in evaluated and evaluated.endswith("--out results/full-1-open_loop")
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["results"]["full"]["success"] == 0.9 and set(result) > {"seconds", "commit", "versions", "arguments"}
    assert "90.0 ± 2.0 %" in capsys.readouterr().out
    assert bench("--config.train.batch_size=9") == [], "all is done"
    for other in ((), ("--config.train.batch_size=9", "--noise", 0.5)):
        with pytest.raises(SystemExit, match=r"^2$"):  # a rerun would not help
            bench(*other)
        told = capsys.readouterr().err
        assert re.search(r"was started with (overrides '--config|--noise '0.2', not '0.5': use another)", told)


@pytest.mark.parametrize("stop", ["first-01.npz", "first-00.pack", "--workdir full-0", "--policy", "--closed-loop"])
def test_after_a_stop_the_same_command_goes_on(bench, stop):
    assert kinds(bench(stop=stop)[:-1] + bench()) == WHOLE


def test_on_another_machine_motions_and_results_are_enough(bench, tmp_path):
    bench(stop="--closed-loop")
    for folder in tmp_path.iterdir():
        if folder.is_dir() and folder.name not in ("motions", "results"):
            shutil.rmtree(folder)
    assert kinds(bench()) == ["render", "render", "train", "render", "train", "evaluate"]
    for folder in tmp_path.iterdir():
        if folder.is_dir() and folder.name != "results":
            shutil.rmtree(folder)
    assert bench() == [] and kinds(bench("--episodes", 20)) == WHOLE, "another protocol is another result"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["first-00.npz", "--workdir full-0", "--closed-loop"])
def test_a_signal_ends_the_stage_and_the_same_command_goes_on(bench, stage, number):
    """A command left running would run beside its own repetition."""
    assert kinds(bench(stop=stage, ended=threading.Event(), number=number)[:-1] + bench()) == WHOLE


@pytest.mark.parametrize("name", ["arguments.json", "full-1-open_loop/settings.json", "full-1-open_loop/result.json"])
def test_damaged_files_are_named(bench, tmp_path, capsys, name):
    bench(stop="--closed-loop")
    (tmp_path / "results" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "results" / name).write_text('{"epis')
    capsys.readouterr()
    bench(stop="anything", told="^2$")
    (told,) = capsys.readouterr().err.splitlines()
    assert f"results/{name} cannot be read as JSON" in told


def test_a_file_that_takes_all_minutes_is_no_progress(bench, capsys):
    for file in ("first-00.npz", "first-01.npz", "first-00.pack"):
        kind = "record" if file.endswith("npz") else "render"
        if file != "first-00.npz":
            bench(stop=file)  # an earlier call makes the files before it
        capsys.readouterr()
        bench("--minutes", 2, stop=file, told="^2$")
        told = "first has not finished one file in --minutes 2, and a rerun would start it again: allow more"
        assert capsys.readouterr().err == f"{kind} {told}\n"


def test_two_processes_do_not_train_one_policy(bench, tmp_path, capsys):
    with (tmp_path / "lock").open("w") as lock:
        assert try_lock(lock)
        assert bench(stop="anything", told="^2$") == []
    assert f"another process is at work in {tmp_path}: wait for it" in capsys.readouterr().err
    assert kinds(bench()) == WHOLE


SLOW = """
import os, sys, time
from pathlib import Path

def get_config():
    if "train" in sys.argv:
        Path(__file__).with_name("pid").write_text(str(os.getpid()))
        time.sleep(300)
    return {}
"""


def test_a_killed_benchmark_ends_its_command(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    for name in ("motions/first-00.npz", "pictures/first-00.pack"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    script, pid = Path(__file__).parents[2] / "benchmarks/closed_loop.py", tmp_path / "pid"
    few = ["--workdir", tmp_path, "--config", tmp_path / "slow.py", "--record", 1, "--rounds", 0]
    assert child_ends_with([sys.executable, str(script), *map(str, few)], pid)


def test_other_seeds_are_another_result_though_as_many(bench):
    bench("--seeds", "0")
    assert kinds(bench("--seeds", "1")) == ["evaluate"] and bench("--seeds", "1") == []


def test_episodes_of_weights_that_are_gone_do_not_stop_the_evaluation_of_new_ones(bench, tmp_path):
    bench(stop="--closed-loop")
    begun = tmp_path / "results" / "full-1-open_loop"
    begun.mkdir()
    for weights, kept in (("weights (1)", True), ("weights (2)", False)):
        (begun / "settings.json").write_text(json.dumps({"policy": f"{weights}, 224 px"}))
        (begun / "episodes.jsonl").touch()
        bench(stop="--closed-loop")
        assert (begun / "episodes.jsonl").exists() == kept


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minuts", 9], "argument '--minuts' is not known"),
        (["--variants", "full,coarse"], "--variants has 'coarse': expected some of full,no_ego3d"),
        (["--variants", "full,full"], "--variants has 'full': expected some of full,no_ego3d,rgb,grid_1026, each once"),
        (["--config", "nothing"], "nothing"),
        (["--config.train.stepz=3"], "train.stepz"),
        (["--image-size", 56], "--image-size is 56, but libero_spatial needs pictures of 224"),
        (["--execute", "sometimes"], "sometimes"),
        (["--seeds", "a"], "--seeds"),
        (["--seeds", "0,1,0"], "--seeds is 0,1,0: expected each once"),
        (["--tasks", "3,3"], "--tasks is 3,3: expected each once"),
        (["--tasks", "3, 5"], "' 5' is not an integer from 0"),
        (["--episodes", 0], "argument --episodes: '0' is not an integer from 1"),
        (["--weight", 0], "--weight is 0: expected more; --rounds 0 leaves DAgger out"),
        (["--jitter", 1.5], "argument --jitter: '1.5' is more than 1"),
        (["--rounds", -1], "argument --rounds: '-1' is not an integer from 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_recorded(bench, tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as ended:
        bench(*arguments)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1] and not [*tmp_path.iterdir()]


def test_without_a_round_and_with_another_variant(bench):
    assert kinds(bench("--rounds", 0)) == ["record", "record", "render", "render", "train", "evaluate"]
    assert kinds(bench()) == ["record", "render", "train", "evaluate"], "goes on from it"
    third = bench("--variants", "full,no_ego3d")
    assert kinds(third) == ["train", "record", "render", "train", "evaluate"], "the first recording serves both"
    assert "--config.model.depth_source=none" in third[0] and "--config.model.depth_source=none" in third[3]


def test_variants_side_by_side_have_a_gpu_each(bench, environments):
    called = bench("--variants", "full,rgb", "--gpus", "2,3", "--workers", 9)
    gpus = {text: environment["CUDA_VISIBLE_DEVICES"] for text, environment in environments.items()}
    assert kinds(called[:4]) == WHOLE[:4] and all(gpus[text] == "2,3" and "--workers 9" in text for text in called[:4])
    taken = {}
    for variant in ("full", "rgb"):
        own = [text for text in called[4:] if f"{variant}-" in text]
        assert kinds(own) == WHOLE[4:] and sum("--workers 4" in text for text in own) == 3
        (taken[variant],) = {gpus[text] for text in own}
    assert set(taken.values()) == {"2", "3"} and len(called) == 14


def test_a_stop_ends_the_variants_beside_it_and_those_after(bench):
    called = bench("--variants", "full,rgb", stop="--workdir full-0")
    assert kinds(called) == ["record", "record", "render", "render", "train"]
    assert len(bench("--variants", "full,rgb")) == 10
