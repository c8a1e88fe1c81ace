"""Random keys and values from file, flag and sweep are accepted, or refused in a sentence; nothing is left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.cli import main
from spatialvla_jax.config import KEYS, completed, load_config
from spatialvla_jax.sweep.plan import load_sweep
from spatialvla_jax.utils.schema import Field

FILE = """
import numpy as np
from numpy import inf, nan
from pathlib import Path
from spatialvla_jax.config import default_config

def get_config():
    config = default_config()
    config.model.update(preset="nano", depth_source="dataset")
    config.data.datasets = [{{"name": "toy", "spec": "libero", "path": "."}}]
    {assignment}
    return config

def get_sweep():
    return {{"base": get_config(), "axes": {axes}, "seeds": {seeds}}}
"""
# Python source of values, most of them invalid.
ODD = (
    *(
        "None",
        "True",
        "-1",
        "0",
        "-0.0",
        "0.5",
        "1.5",
        "inf",
        "nan",
        "1e999",
        "10**400",
        "2**31",
        "'x'",
        "''",
        "'1e-4'",
    ),
    *("'4'", "'\\0'", "[]", "()", "{}", "{'a': 1}", "{1: {}}", "[None]", "[[]]", "(1,) * 6", "Path('a')", "{1, 2}"),
    *("b'a'", "1j", "len", "np.float64(0.5)", "np.int64(3)", "np.array(2)", "np.zeros(2)", "np.float32('nan')"),
    *("np.bool_(1)", "[{'name': 'a'}]", "[{'name': 'a', 'spec': ['libero'], 'path': 3}]", "default_config().train"),
)
UNKNOWN = ("train", "train.step", "train.steps.x", "nothing", "data.prompt", "model.depth.x")


def valid(field: Field) -> st.SearchStrategy[Any]:
    """Values in the field's range."""
    low, high = field.low or field.above or 0, field.high or field.below or 1000
    if field.choices:
        return st.sampled_from(field.choices)
    if bool in field.types:
        return st.booleans()
    if int in field.types:
        return st.integers(int(low), min(int(high), 1000))
    if float in field.types:
        inside = {"exclude_min": field.above is not None, "exclude_max": field.below is not None}
        return st.floats(low, high, **inside)
    return st.just(field.default)


@st.composite
def draws(draw: st.DrawFn) -> tuple[str, str, str]:
    """(file, flag or sweep; key; Python source of a value)"""
    way = draw(st.sampled_from(("file", "flag", "sweep")))
    key = draw(st.sampled_from([*KEYS, *UNKNOWN] if draw(st.integers(0, 9)) == 0 else [*KEYS]))
    if key in KEYS and key != "model.preset" and draw(st.booleans()):  # the presets' shapes take seconds
        return way, key, repr(draw(valid(KEYS[key])))
    return way, key, draw(st.sampled_from(ODD))


def try_one(folder: Path, way: str, key: str, source: str, capsys: pytest.CaptureFixture) -> bool:
    """Whether it is accepted."""
    path = folder / "mine.py"
    part, _, name = key.rpartition(".")
    assignment = f"config[{part!r}][{name!r}] = {source}" if part else f"config[{name!r}] = {source}"
    axes, seeds = (f"{{{key!r}: [{source}]}}", "[0]") if key != "seed" else ("{}", f"[{source}]")
    filled = {"file": (assignment, "{}", "[0]"), "sweep": ("pass", axes, seeds), "flag": ("pass", "{}", "[0]")}[way]
    path.write_text(FILE.format(assignment=filled[0], axes=filled[1], seeds=filled[2]))
    if way == "sweep":
        command = ["sweep", "--config", str(path), "--workdir", str(folder / "run"), "--dry-run"]
    else:
        flags = [f"--config.{key}={source}"] if way == "flag" else []
        command = ["config", "show", "--config", str(path), *flags]
    code, message = main(command), capsys.readouterr().err
    assert (code, message.count("\n")) in ((0, 0), (2, 1)), message
    assert [*folder.iterdir()] == [path]
    if code == 0:
        config = load_sweep(path).trials[0].config if way == "sweep" else load_config(path)
        assert completed(config, {}).to_dict() == config.to_dict()
        json.dumps(config.to_dict(), allow_nan=False)
    return code == 0


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_value_is_taken_or_refused(examples: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    taken = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(draws())
    def one(drawn: tuple[str, str, str]) -> None:
        taken.append(try_one(tmp_path, *drawn, capsys))

    one()
    assert len(taken) >= examples and sum(taken) >= 0.3 * len(taken)
