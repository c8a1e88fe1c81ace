"""The accounts of a run's wall time over all its processes, by hand; test_watching.py checks a run that was killed."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.cli import main
from spatialvla_jax.training import goodput
from spatialvla_jax.training.goodput import CAUSES, Clock, Goodput, account, read_processes
from spatialvla_jax.training.log_folder import LogFolder


def process(began: float, *marks: tuple[float, int | None, dict[str, float]]) -> dict[str, Any]:
    """A process's record: marks of (seconds since its start, step, seconds by name)."""
    return {"began": began, "marks": [{"step": s, "seconds": {"total": t, **spent}} for t, s, spent in marks]}


def seconds(**causes: float) -> dict[str, float]:
    return dict.fromkeys(CAUSES, 0.0) | causes


FIRST = process(
    1000,
    (10, 0, {"imports": 4, "index": 5}),  # unattributed time at the start counts as start
    (100, 40, {"imports": 4, "index": 5, "compile": 20, "data": 10, "save": 2}),
    (160, 60, {"imports": 4, "index": 5, "compile": 20, "data": 22, "save": 4}),
)
ALONE = seconds(start=10, compile=20, data=22, save=4, steps=104)


def test_an_undisturbed_process() -> None:
    assert account([FIRST]) == ALONE
    assert account([]) == seconds()


def test_steps_that_are_made_again_are_lost() -> None:
    """Killed after step 60, the run resumes from step 40 a hundred seconds later. Then it resumes from step 50, between
    two marks: half of the time between them is lost."""
    second = process(1260, (5, 40, {"imports": 5}), (65, 60, {"imports": 5}))
    expected = seconds(start=15, compile=20, data=10, save=2, idle=100, lost=60, steps=58 + 60)
    assert account([FIRST, second]) == account([second, FIRST]) == expected
    assert sum(expected.values()) == 1260 + 65 - 1000
    third = process(1325, (1, 50, {}), (2, 50, {"save": 1}))
    expected |= {"start": 16, "lost": 90, "steps": 88, "save": 3}
    assert account([FIRST, second, third]) == expected


def test_a_process_that_never_made_a_step_loses_none() -> None:
    """Killed while starting, before it knew its step."""
    starts = [process(1160 + 10 * n, (10, None, {"imports": 7})) for n in range(3)]
    assert account([FIRST, *starts]) == ALONE | {"start": 40}


def test_a_process_that_is_no_longer_wanted_loses_what_it_does_beside_its_successor() -> None:
    """The second process starts while the first still runs, halfway between its last two marks."""
    second = process(1130, (5, 40, {"imports": 5}), (15, 44, {}))
    expected = seconds(start=15, compile=20, data=10, save=2, lost=30, steps=58 + 10)
    assert account([FIRST, second]) == expected


def test_the_way_back_after_a_loss_spike_is_lost() -> None:
    marks = [(10, 0, {}), (30, 10, {}), (45, 16, {}), (48, 10, {"restore": 2}), (60, 20, {"restore": 2})]
    assert account([process(0, *marks)]) == seconds(start=12, lost=16, steps=20 + 12)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 100),
            st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.integers(0, 9)), min_size=1),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=50)
def test_the_causes_add_up_to_the_wall_time(given_processes) -> None:
    """For processes in any order: overlapping, one after another, none that made a step."""
    processes = []
    for began, parts, knows_its_first_step in given_processes:
        total, spent, marks = 0, 0, []
        for duration, step, share in parts:
            total, spent = total + duration, spent + duration * share / 10
            marks.append((total, step, {"data": spent}))
        if not knows_its_first_step:
            marks[0] = (marks[0][0], None, marks[0][2])
        processes.append(process(began, *marks))
    last = max(processes, key=lambda p: p["began"])
    ends = [p["began"] + p["marks"][-1]["seconds"]["total"] for p in processes if p["began"] == last["began"]]
    whole = [end - min(p["began"] for p in processes) for end in ends]
    found = account(processes)
    assert any(sum(found.values()) == pytest.approx(w) for w in whole)
    assert min(found.values()) >= -1e-9


def test_times_within_times_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(goodput, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = Clock(age=3.0)
    with clock("start"):
        now += 1
        for _ in range(2):
            with clock("index"):
                now += 5
        now += 2
    now += 4
    assert clock.totals() == {"total": 20.0, "imports": 3.0, "start": 3.0, "index": 10.0}


def test_a_clock_behind_the_last_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its clock, the second machine started an hour before the first: it counts as started right after it."""
    now, wall = 0.0, 10_000.0
    stand_in = SimpleNamespace(**vars(time) | {"perf_counter": lambda: now, "time": lambda: wall + now})
    monkeypatch.setattr(goodput, "time", stand_in)
    for begin in (0.0, 1000.0):
        now, wall = begin, 10_000.0 if begin == 0 else 10_000.0 - 3600
        log = Goodput(LogFolder(tmp_path), Clock())
        now += 2
        log.mark(5 if begin else 0, keep=True)
        now += 8
        log.mark(5 + int(begin))
        log.close()
    processes = read_processes(tmp_path)
    assert [p["began"] for p in processes] == [10_000, 10_010]
    assert account(processes) == seconds(start=4, steps=16)
    assert log.shares()["goodput"] == pytest.approx(16 / 20) and log.shares()["goodput/start"] == pytest.approx(0.2)


def test_a_damaged_record_is_told_of_and_left_out(tmp_path: Path, capsys) -> None:
    (tmp_path / "goodput").mkdir()
    (tmp_path / "goodput" / "good.json").write_text(json.dumps(FIRST))
    backwards = FIRST | {"marks": FIRST["marks"][::-1]}
    for name, text in {"cut": '{"began": 1', "list": "[]", "none": '{"began": 1, "marks": []}'}.items():
        (tmp_path / "goodput" / f"{name}.json").write_text(text)
    (tmp_path / "goodput" / "backwards.json").write_text(json.dumps(backwards))
    assert read_processes(tmp_path) == [FIRST]
    assert capsys.readouterr().err.count("is damaged") == 4


def test_a_report_wants_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused() -> str:
        assert main(["report", str(tmp_path)]) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        return sentence

    assert f"{tmp_path} holds no config.json: expected the --workdir" in refused()
    for text in ("[1]", "{}"):
        (tmp_path / "config.json").write_text(text)
        assert f"{tmp_path / 'config.json'}" in refused()
    (tmp_path / "config.json").write_text('{"train": {"steps": 100}}')
    assert f"{tmp_path / 'goodput'} holds no record" in refused()
    (tmp_path / "sweep.json").write_text("{}")
    assert f"{tmp_path} holds a sweep, not a run" in refused()
    (tmp_path / "sweep.json").unlink()
    (tmp_path / "goodput").mkdir()
    (tmp_path / "goodput" / "1.json").write_text(json.dumps(FIRST))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 0
    assert "step 60 of 100, 1 process, goodput 65.0%" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["seconds"] == ALONE and report["wall_seconds"] == 160 and report["processes"][0]["last_step"] == 60
