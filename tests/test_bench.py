import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.processes import child_ends_with
from helpers.recordings import write_recording

from spatialvla_jax.cli import main
from spatialvla_jax.config import default_config
from spatialvla_jax.errors import InputError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_a_killed_bench_ends_its_benchmark(tmp_path):
    pid = tmp_path / "pid"
    (tmp_path / "slow.py").write_text(
        f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)"
    )
    code = "from argparse import Namespace; from spatialvla_jax.cli import bench; "
    code += f"bench.BENCHMARKS = {{'slow': {str(tmp_path / 'slow.py')!r}}}; "
    code += "bench.run_bench(Namespace(benchmark='slow', arguments=[]))"
    assert child_ends_with([sys.executable, "-c", code], pid)


@pytest.mark.slow
def test_bench_loader(tmp_path, capfd):
    """Runs every part at the smallest sizes. Only the consistency of the numbers is checked, not their values."""
    sizes = {"datasets": 2, "frames": 60, "copies": 3, "batch-size": 4, "workers": 2, "repeats": 1}
    sizes |= {"repeat-samples": 8, "samples": 400, "read-block": 8, "shuffle-frames": 100, "memory-gb": 2}
    sizes |= {"buffered-samples": 400, "buffer": 16, "overlap-steps": 3, "chip-rate": 10}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    assert main(["bench", "loader", "--root", str(tmp_path), *options]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])

    assert result["benchmark"] == "loader" and result["cores"] == 2
    assert result["datasets"] == 2 and result["frames"] == 2 * 60 * 3
    links = sorted((tmp_path / "60x3").rglob("*.tfrecord-*"))
    assert len(links) == 6 and len({file.stat().st_ino for file in links}) == 2

    for run, budget in zip(result["memory"], (2048, None), strict=True):
        assert run["samples"] == 400 and run["budget_mb"] == budget and run["samples_per_second"] > 0
        assert list(run["rss_mb"]) == ["20", "40", "60", "80", "100"]
        assert 0 < max(run["rss_mb"].values()) <= run["peak_mb"]
        assert run["growth"] == pytest.approx(run["rss_mb"]["100"] / run["rss_mb"]["20"] - 1, abs=1e-4)

    assert result["start"]["first_step"] > 0 and result["start"]["deep_step"] > 0

    speed = result["speed"]
    for name in ("ceiling", "loader", "buffered", "buffered_colour"):
        figures = speed[name]
        assert figures["per_core"] == pytest.approx(figures["samples_per_second"] / 2, abs=0.1)
        ceiling = speed["ceiling"]
        ratio = figures["samples_per_second"] / ceiling["samples_per_second"]
        assert figures["of_ceiling"] == pytest.approx(ratio, rel=0.02)
        ratio = figures["per_cpu_second"] / ceiling["per_cpu_second"]
        assert figures["of_ceiling_cpu"] == pytest.approx(ratio, rel=0.02)
    for chips in (4, 8):
        needed = chips * 10 / speed["loader"]["per_core"]
        assert speed["cores_per_host"][str(chips)] == pytest.approx(needed, abs=0.1)

    assert 100 <= result["packed"]["frames"] <= 120 and result["packed"]["per_cpu_second"] > 0

    overlap = result["overlap"]
    assert overlap["step_ms"] > overlap["decode_ms"] and overlap["wait_ms_median"] <= overlap["wait_ms_max"]
    events = json.loads(Path(overlap["trace"]).read_text())["traceEvents"]
    waits = [event for event in events if event["name"] == "wait for data"]
    assert len(waits) == 3
    assert max(event["dur"] for event in waits) == pytest.approx(1e3 * overlap["wait_ms_max"], abs=10)


def test_frames_of_the_benchmark():
    """The same frames every time, all different, and as large as a camera's."""
    spec = importlib.util.spec_from_file_location("bench_loader", BENCHMARKS / "loader.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for seed in (0, 1):
        one, two = (list(module.make_trajectories(seed, 160)) for _ in range(2))
        images = np.concatenate([episode["observation"]["image"] for episode in one])
        assert len(images) == 160 == len(set(images))
        assert 20_000 < np.mean([len(image) for image in images]) < 60_000
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a["observation"]["image"], b["observation"]["image"])
            np.testing.assert_array_equal(a["action"], b["action"])


def test_bench_passes_arguments_on(capfd):
    assert main(["bench", "tokenizer", "--actions", "1000", "--repeats", "1"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (result["benchmark"], result["actions"], result["repeats"]) == ("tokenizer", 1000, 1)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "loader", "--no-such-option"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("infer", ["--variants", "bfloat16,int4"], "argument --variants: 'int4' is none of plain, bfloat16, int8"),
        ("infer", ["--variants", "bfloat16,"], "argument --variants: '' is none of plain, bfloat16"),
        ("infer", ["--batch-sizes", "1,64"], "--batch-sizes has 64: expected some of 1,2,4,8,16,32"),
        ("train_step", ["--gather", "ones"], "argument --gather: 'ones' is not layer, once or layer,once"),
        ("train_step", ["--devices", "1,0"], "argument --devices: '0' is not an integer from 1"),
        ("train_step", ["--devices", "1,4096"], "--devices has 4096, and there are "),
        ("matvec", ["--rows", "1,0"], "argument --rows: '0' is not an integer from 1"),
        ("matvec", ["--rows", "1,17"], "--rows has 17, and the kernel takes 16 at most"),
    ],
)
def test_what_a_benchmark_does_not_know_is_not_measured_as_something_else(
    monkeypatch, capsys, script, arguments, sentence
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert ended.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("options", "passes"), [({}, 8), ({"constrained": False}, 12), ({"speculate": True}, 0)])
def test_passes_of_a_variant_are_those_of_its_decoding(monkeypatch, options, passes):
    monkeypatch.syspath_prepend(BENCHMARKS)
    infer = importlib.import_module("infer")
    weights = Namespace(llm=Namespace(layers=[np.zeros(6)]), head=np.zeros(2))
    policy = Namespace(**{"weights": weights, "constrained": True, "speculate": False} | options)
    found = infer.floors(infer.preset("nano"), policy, rate=64e3)
    assert (found["passes"], found["pass_ms"]) == (passes, 1)


def test_speculation_is_not_simulated_where_steps_are_missing(monkeypatch, tmp_path):
    """Between two images of a recording with --every 3 are three steps, and the draft would be shifted by one."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    decoding = importlib.import_module("decoding")
    processor, config = Namespace(statistics=None, tokenizer=None), default_config()
    config.model.update(preset="nano", image_size=56)
    monkeypatch.setattr(decoding, "Policy", Namespace(load=lambda path: Namespace(processor=processor)))
    monkeypatch.setattr(decoding, "train_config_of", lambda path: config)
    config.data.packed = str(write_recording(tmp_path / "whole.pack"))
    assert len(decoding.load_episodes(tmp_path, "train", 3)) == 3
    config.data.packed = str(write_recording(tmp_path / "some.pack", every=3))
    with pytest.raises(InputError, match="split 'train' has images of some steps only"):
        decoding.load_episodes(tmp_path, "train", 3)


def test_a_tile_that_multiplies_wrongly_is_not_among_the_best(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    matvec = importlib.import_module("matvec")
    monkeypatch.setattr(matvec, "CACHE", 1)
    monkeypatch.setattr(matvec, "UNDERWAY", 0)
    monkeypatch.setattr(matvec.kernels, "multiply", lambda x, matrix, **_: jnp.zeros((*x.shape[:-1], len(matrix))))
    found = matvec.measure("out", (64, 256), 1, Namespace(tiles=2, repeats=1))
    assert found["tried"] == 2 and found["best"] == [] and found["failed"].startswith("2: (")
    assert "is wrong by 1 of the largest product" in found["failed"]


def test_a_trace_adds_up_and_every_kernel_belongs_to_a_part(monkeypatch):
    """Two steps of 100 and 110 ns: a product of the language model, the optimizer, and copies that overlap them."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    trace_table = importlib.import_module("trace_table")
    hlo = """
%fused.1 (p: f32[2]) -> f32[2] {
  ROOT %multiply.3 = f32[2] multiply(%p, %p), metadata={op_name="jit(step)/adam/mul"}
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %custom-call.1 = f32[2] custom-call(%a), metadata={op_name="jit(step)/jvp(SpatialVLA)/llm/layers/mlp/dot_general"}
  ROOT %fusion.1 = f32[2] fusion(%custom-call.1), kind=kLoop, calls=%fused.1
}
"""
    one = [(0, 60, "nvjet_a", "custom-call.1"), (50, 70, "MemcpyD2D", "added.9"), (80, 100, "loop_1", "fusion.1")]
    events = [
        trace_table.Event(start + 110 * step, stop + 110 * step, *rest) for step in (0, 1) for start, stop, *rest in one
    ]
    text, parts = trace_table.attribute(events, 2, hlo, {"language": 35e-6})
    ns = {part: 1e6 * ms for part, ms in parts.items()}
    assert trace_table.attribute(events, 2, hlo)[1] == parts
    assert (ns["language"], ns["optimizer"], ns["idle"], ns["step"]) == (70, 20, 15, 105)
    assert set(parts) == {"language", "optimizer", "idle", "step"}
    (row,) = [line.split() for line in text.splitlines() if line.startswith("language")]
    assert row[-1] == "2.00"
