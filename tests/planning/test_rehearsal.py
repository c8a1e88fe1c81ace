"""A rehearsal: what makes a no-go, and that it leaves nothing behind, in one process and in two."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.processes import Server, free_port
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spatialvla_jax.cli import main
from spatialvla_jax.planning.rehearsal import fingerprint, judge, topology_of
from spatialvla_jax.training.sharding import make_mesh
from spatialvla_jax.training.state import TrainState

GOOD: dict[str, Any] = {
    **{"step_seconds": 0.5, "data_wait": 0.01, "save_seconds": 40.0, "restore_seconds": 30.0, "memory": 0.9},
    **{"host_bytes": 1e9, "planned": {"roofline": 0.25}, "loss": 2.0, "skipped": 0, "checkpoint_bytes": 10**9},
    **{"checkpoint_every": 100, "keep_last": 2, "free_bytes": 10**10, "same_bits": True, "device_kind": "TPU v5e"},
}


def verdicts(**changes: Any) -> dict[str, bool | None]:
    return {what: go for what, _, go in judge(GOOD | changes)}


def test_what_makes_a_no_go() -> None:
    assert all(verdicts().values())
    bad = {
        "a step": {"planned": {"flops": 0.1}},
        "data": {"data_wait": 0.06},
        "memory": {"memory": 0.96},
        "loss": {"loss": math.nan},
        "a save": {"save_seconds": 51.0},
        "room": {"free_bytes": 2 * 10**9},
        "a restart": {"same_bits": False},
    }
    for what, change in bad.items():
        assert [name for name, go in verdicts(**change).items() if not go] == [what]
    assert not verdicts(skipped=1)["loss"]
    unknown = verdicts(planned={}, memory=math.nan, free_bytes=math.inf)
    assert unknown["a step"] is None and unknown["memory"] is None and "room" not in unknown


def test_a_fingerprint_depends_on_every_bit_and_not_on_the_mesh() -> None:
    values = {"a": jnp.arange(32.0).reshape(8, 4), "b": jnp.ones(3, jnp.bfloat16)}
    state = TrainState(jnp.int32(3), values, ())
    mesh = make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    split = jax.device_put(values["a"], NamedSharding(mesh, P("fsdp")))
    assert fingerprint(state) == fingerprint(state.replace(params=values | {"a": split}))
    others = (
        state.replace(step=jnp.int32(4)),
        state.replace(params=values | {"a": values["a"].at[7, 3].multiply(-1)}),
        state.replace(params=values | {"a": values["a"][::-1]}),
        state.replace(params=values | {"a": values["a"].reshape(4, 8)}),
        state.replace(params=values | {"b": values["b"].at[2].add(0.0079)}),
    )
    assert len({tuple(fingerprint(other)) for other in (state, *others)}) == 6


@pytest.mark.parametrize(
    ("kind", "shape", "slices", "name"),
    [
        ("TPU v5 lite", (4, 2, 1), 1, "v5e:4x2"),
        ("TPU v5p", (2, 2, 4), 1, "v5p:2x2x4"),
        ("TPU v6 lite", (2, 2, 1), 2, "2 × v6e:2x2"),
    ],
)
def test_the_pod_that_a_run_is_on(kind: str, shape: tuple[int, int, int], slices: int, name: str) -> None:
    a, b, c = shape
    devices = [
        SimpleNamespace(device_kind=kind, coords=(x, y, z), slice_index=s)
        for s in range(slices)
        for x in range(a)
        for y in range(b)
        for z in range(c)
    ]
    assert str(topology_of(devices)) == name
    assert topology_of(jax.devices()) is None


def check_output(text: str, code: int) -> None:
    last = text.splitlines()[-1]
    assert (last == "go") == (code == 0) and code in (0, 1)
    assert "the same bits" in text and "the peak of a cpu device is unknown" in text


@pytest.mark.slow
def test_a_rehearsal_leaves_nothing(packed_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It writes beside the workdir, replaces what a killed rehearsal left, and refuses any other folder."""
    workdir = tmp_path / "runs" / "mine"
    command = ["train", "--config", str(packed_config), "--workdir", str(workdir), "--config.train.steps=10"]
    command += ["--config.mesh.fsdp=4", "--config.mesh.data=2", "--rehearse"]
    assert main([*command, "1"]) == 2 and "needs 2 steps" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main([*command, "4"]))
    check_output(capsys.readouterr().out, ended.value.code)
    assert not [*tmp_path.iterdir()]
    left = workdir.with_name("mine-rehearsal")
    left.mkdir(parents=True)
    (left / "notes.txt").write_text("mine")
    assert main([*command, "4"]) == 2
    assert f"{left} is needed for the rehearsal but was not made by one" in capsys.readouterr().err
    assert (left / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_two_processes_rehearse(server: Server, packed_config: Path, tmp_path: Path) -> None:
    common = ("--config.train.steps=10", "--rehearse", "4", "--coordinator", f"localhost:{free_port()}")
    runs = [
        server.train(
            packed_config, tmp_path / "run", *common, "--num-processes", "2", "--process-id", str(n), devices=2
        )
        for n in range(2)
    ]
    codes = [run.wait() for run in runs]
    assert codes[0] == codes[1], runs[0].errors.read_text() + runs[1].errors.read_text()
    check_output(runs[0].errors.read_text(), codes[0])
    assert not (tmp_path / "run-rehearsal").exists() and not (tmp_path / "run").exists()
