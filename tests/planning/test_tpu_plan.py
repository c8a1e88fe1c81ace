"""Ahead-of-time compilation: libtpu compiles the step of a nano model; everything else runs on small inputs."""

import gzip
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.batches import GRID
from helpers.own_process import die, refuse
from helpers.setups import setup_of
from hypothesis import given
from hypothesis import strategies as st

from spatialvla_jax.actions import PRETRAIN_GAUSSIANS
from spatialvla_jax.cli import main
from spatialvla_jax.config import default_config, load_config
from spatialvla_jax.errors import InputError
from spatialvla_jax.planning import topology as topology_module
from spatialvla_jax.planning import tpu_plan
from spatialvla_jax.planning.hlo_cost import read_program, replica_groups, valid_places
from spatialvla_jax.planning.topology import Topology, parse_topology
from spatialvla_jax.planning.tpu_compiler import buffers_of, in_own_process, out_of_memory
from spatialvla_jax.planning.tpu_plan import (
    Plan,
    advise,
    compile_for,
    compile_plan,
    line,
    meshes,
    search,
    smaller,
)
from spatialvla_jax.training.flops import model_flops, product_flops
from spatialvla_jax.training.grid_fit import make_grid
from spatialvla_jax.training.setup import make_setup
from spatialvla_jax.training.sharding import make_mesh

CONFIG = """
from spatialvla_jax.config import default_config


def get_config():
    config = default_config()
    config.model.update(preset="nano", depth_source="dataset", dtype="float32", remat="full")
    config.data.prompt.length = 16
    config.data.cache_dir = {cache!r}
    config.grid.num_bins = (4, 4, 2, 4, 4, 4)
    config.augment.enabled = False
    config.train.batch_size = 16
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compile")
    (folder / "nano.py").write_text(CONFIG.format(cache=str(folder / "cache")))
    return folder / "nano.py"


@pytest.mark.parametrize(
    ("text", "dims", "chips"),
    [
        ("v5e:16x16", (16, 16), 256),
        ("v5e-256", (16, 16), 256),
        ("v6e-8", (2, 4), 8),
        ("v4:4x4x4", (4, 4, 4), 64),
        ("v4-128", (4, 4, 4), 64),  # 128 TensorCores
        ("v5p-8", (2, 2, 1), 4),
        ("v5p-256", (4, 4, 8), 128),
    ],
)
def test_names_of_topologies(text: str, dims: tuple[int, ...], chips: int) -> None:
    topology = parse_topology(text)
    assert (topology.dims, topology.chips) == (dims, chips)
    assert parse_topology(text, slices=3).chips == 3 * chips


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e:3x5", "nearest is v5e:4x4"),
        ("v5e:32x16", "nearest is v5e:16x16"),
        ("v4:4x4", "v4 is 3-D"),
        ("v4-100", "does not exist"),
        ("v9:2x2", "write one of v4, v5e, v5p, v6e"),
        ("v5e", "does not exist"),
        ("v5e:0x4", "does not exist"),
    ],
)
def test_topology_that_does_not_exist(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_topology(text)


def test_a_nano_step_compiles_for_a_pod(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", "--config", str(config_file), "--topology", "v5e:2x2"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert re.findall(r"^  (\w+): [\d.]+ s$", err, re.MULTILINE) == ["start", "trace", "lower", "compile", "analyse"]
    report = json.loads(out.splitlines()[-1])
    assert report["fits"] and report["mesh"] == [1, 4, 1]
    memory = report["memory"]
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total") < report["hbm"]
    # Parameters, mean and variance; the frozen table has no optimizer state.
    assert 0 < memory["params"] < memory["optimizer"] < 2 * memory["params"]
    assert report["step_seconds"] == max(report["seconds"].values())
    # At least the model's own FLOPs, plus padding and the rematerialisation of one or two layers.
    assert 1 < report["hardware_flops"] / report["model_flops"] < 2
    assert "all-gather" in out and "memory of a chip" in out

    kept = json.loads(Path(report["report"]).read_text())
    hlo = gzip.decompress(Path(report["report"]).with_suffix(".hlo.gz").read_bytes()).decode()
    assert read_program(hlo, 4).flops * 4 == report["hardware_flops"]
    # Only parameters and gradients cross the mesh. The batch is split, so no activation is all-reduced.
    activations = [c for c in kept["collectives"] if c["kind"] == "all-reduce" and c["shape"].startswith("16x")]
    assert not activations
    # The second report comes from the cache.
    topology = parse_topology("v5e:2x2")
    assert main(arguments) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again == report and topology.chips == 4


@pytest.mark.slow
def test_gradients_alone_cross_slices(config_file: Path) -> None:
    config = load_config(config_file, {"mesh.data": "2", "train.batch_size": "32"})
    ((_, report),) = compile_for(config, parse_topology("v5e:2x2", slices=2), config_file.parent / "cache")
    across = [c for c in report["collectives"] if c["across_slices"]]
    within = {c["kind"] for c in report["collectives"] if not c["across_slices"]}
    assert {c["kind"] for c in across} == {"all-reduce"} and "all-gather" in within
    # Once per step and outside loops over layers. A chip's part of the gradients has the size of its part of the
    # parameters, padded to whole tiles.
    assert all(c["count"] == 1 for c in across)
    assert 0.5 < sum(c["bytes"] for c in across) / report["memory"]["params"] < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v5e:5x5"), "topology v5e:5x5 does not exist"),
        (("--topology", "v5e:2x2", "--config.mesh.fsdp=3"), "does not fit 4 devices"),
        (("--topology", "v5e:2x2", "--config.train.batch_size=18"), "batch_size 18 does not divide"),
        (("--topology", "v5e:2x2", "--slices", "2"), "mesh data 1 does not divide by the 2 slices"),
    ],
)
def test_bad_input_is_one_sentence(
    config_file: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "--config", str(config_file), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"needs libtpu.*\[tpu\]"):
        Topology("v5e", (2, 2)).devices()


def test_slices_differ_in_data_alone() -> None:
    mesh = make_mesh({"data": 4, "fsdp": 2}, Topology("v5e", (2, 2), slices=2).devices())
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    assert (slices[:2] == slices[0, 0, 0]).all() and (slices[2:] == slices[2, 0, 0]).all()
    assert len(np.unique(slices)) == 2


FULL = Plan((2, 4, 1), "none", 64, 1)


def memory_model(limit: float):
    """A fake compiler whose programs need memory by a simple rule: → (compile, the plans it was asked for)."""
    asked: list[Plan] = []
    activations = {"none": 8.0, "dots": 3.0, "full": 1.0}

    def compile_(plan: Plan) -> dict[str, Any]:
        asked.append(plan)
        data, fsdp, _ = plan.mesh
        total = 8 / fsdp + activations[plan.remat] * plan.batch_size / plan.grad_accum_steps / (data * fsdp)
        slower = {"none": 1.0, "dots": 1.1, "full": 1.3}[plan.remat] + 0.05 * plan.grad_accum_steps
        report = {"fits": total <= limit, "used": total, "hbm": limit}
        if total > limit:
            return report
        seconds = 0.03 + slower * plan.batch_size / 64
        return report | {
            "step_seconds": seconds,
            "samples_per_second": plan.batch_size / seconds,
            "mfu_bound": 0.5 / slower,
        }

    return compile_, asked


@pytest.mark.parametrize("limit", [60.0, 30.0, 20.0, 12.0, 8.0, 5.0, 3.0])
def test_advice_was_compiled_and_fits(limit: float) -> None:
    compile_, asked = memory_model(limit)
    report = compile_(FULL)
    assert not report["fits"]
    better, tried = advise(FULL, report, 1, compile_)
    assert better is not None and better in asked and compile_(better)["fits"]
    assert all(not compile_(plan)["fits"] for plan in tried)
    assert len(tried) < tpu_plan.MAX_ADVICE


def test_out_of_memory_ends_with_the_advice(config_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = default_config()
    config.model.remat = "none"
    config.train.batch_size = 64

    def compiler(limit: float):
        compile_, _ = memory_model(limit)

        def instead(function, config, plan, *_, progress):
            return compile_(plan) | {"report": str(tmp_path / f"{limit} {plan}.json")}, ""

        monkeypatch.setattr(tpu_plan, "in_own_process", instead)

    topology = Topology("v5e", (2, 4))
    compiler(40.0)
    with pytest.raises(InputError, match=r"takes .* this fits \(compiled\): --config\.[a-z._]+=\w+"):
        compile_for(config, topology, tmp_path)
    compiler(1e-3)
    with pytest.raises(InputError, match=r"nor does it fit with .* remat full, batch 8 in 1"):
        compile_for(config, topology, tmp_path)
    with pytest.raises(InputError, match="no mesh, remat policy or accumulation"):
        compile_for(config, topology, tmp_path, searching=True)


def test_smaller_plans_divide_and_say_how_to_get_there() -> None:
    for plan in smaller(FULL, 1):
        data, fsdp, tensor = plan.mesh
        assert data * fsdp * tensor == 8 and plan.batch_size % (plan.grad_accum_steps * data * fsdp) == 0
        assert plan != FULL and plan.flags(FULL).startswith("--config.")
    assert Plan((1, 8, 1), "dots", 64, 2).flags(FULL) == (
        "--config.mesh.data=1 --config.mesh.fsdp=8 --config.model.remat=dots --config.train.grad_accum_steps=2"
    )


@pytest.mark.parametrize(("limit", "batch_size"), [(20.0, 32), (9.0, 16), (1e3, 64)])
def test_search_ranks_what_fits(limit: float, batch_size: int) -> None:
    """By samples a second; if memory is short, a smaller batch is the fastest."""
    topology = Topology("v5e", (2, 4))
    compile_, asked = memory_model(limit)
    found = search(FULL, topology, compile_, lambda _: None)
    assert found and all(report["fits"] for _, report in found)
    speeds = [report["samples_per_second"] for _, report in found]
    assert speeds == sorted(speeds, reverse=True)
    everything = [
        Plan(mesh, remat, batch, grad_accum_steps)
        for batch in (64, 32, 16)
        for mesh in meshes(topology, batch)
        for remat in ("none", "dots", "full")
        for grad_accum_steps in (1, 2, 4, 8, 16)
        if batch // (mesh[0] * mesh[1]) % grad_accum_steps == 0
    ]
    compile_again, _ = memory_model(limit)
    best = max(r["samples_per_second"] for r in map(compile_again, everything) if r["fits"])
    assert speeds[0] == best and found[0][0].batch_size == batch_size and len(asked) < len(everything)


def test_a_program_that_compiles_may_still_be_too_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler may accept more memory than the chip has, so we compare the sum ourselves."""
    buffers = {"arguments": 10 * 2**30, "temporaries": 15 * 2**30, "outputs": 5 * 2**30}
    monkeypatch.setattr(tpu_plan, "optimise", lambda *_: (HLO, buffers))
    lowered = SimpleNamespace(as_text=lambda: "")
    step = SimpleNamespace(trace=lambda *_: SimpleNamespace(lower=lambda: lowered))
    monkeypatch.setattr(tpu_plan, "jit_train_step", lambda *_: step)
    plan, topology = Plan((1, 4, 1), "dots", 16, 1), Topology("v5e", (2, 2))
    report, hlo = compile_plan(setup_of(train={}), GRID, plan, topology, tmp_path, tmp_path)
    assert hlo == HLO and not report["fits"]
    assert report["used"] == report["memory"]["total"] == 30 * 2**30
    assert line(report) == "does not fit, 30.0 of 16.0 GiB"


BUFFERS = """BufferAssignment:
allocation 0: size 1024, parameter 0, shape |f32[256]| at ShapeIndex {}, maybe-live-out:
 value: <1 p @0> (size=1024,offset=0): f32[256]{0}
allocation 1: size 2048, parameter 1, shape |f32[512]| at ShapeIndex {}:
allocation 2: size 300, output shape is |bf16[150]|, maybe-live-out:
allocation 3: size 40, constant:
allocation 4: size 5000, preallocated-temp:
 value: <4 copy @0> (size=5000,offset=0): f32[1250]{0}
allocation 5: size 113295360, color 1, preallocated-temp:
allocation 6: size 4096, thread-local:
"""


def test_buffers_in_the_chips_memory_are_counted_once_and_by_kind() -> None:
    """An output that reuses a donated argument counts as that argument; vector memory and registers are not HBM."""
    assert buffers_of(BUFFERS) == {"arguments": 3072, "temporaries": 5040, "outputs": 300}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [65536, 720896])
def test_the_executable_adds_the_heaps_fragmentation_to_its_size(rows: int) -> None:
    """So the buffers are what a program needs. Fragmentation is the heap's size minus what is live at its peak; the
    rest of the difference is tens of kilobytes of constants."""
    mesh = jax.sharding.Mesh(np.array(Topology("v5e", (2, 2)).devices()), ("fsdp",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    weights = [jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=split)] * 8
    inputs = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16, sharding=split)

    def step(weights, x):
        def loss(weights):
            h = x
            for w in weights:
                h = jnp.tanh(h @ w)
            return (h.astype(jnp.float32) ** 2).sum()

        value, gradients = jax.value_and_grad(loss)(weights)
        return [w - 1e-3 * g.astype(w.dtype) for w, g in zip(weights, gradients, strict=True)], value

    lowered = jax.jit(step, donate_argnums=0).lower(weights, inputs)
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        stated: Any = lowered.compile(compiler_options=dump).memory_analysis()
        (file,) = Path(folder).glob("*-buffer-assignment.txt")
        buffers = buffers_of(file.read_text())
    fragmentation = sum(buffers.values()) - stated.peak_memory_in_bytes
    assert fragmentation > 2e6
    assert abs(stated.temp_size_in_bytes - buffers["temporaries"] - fragmentation) < 1e5


def test_the_compilers_refusal_is_read() -> None:
    early = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.17G) "
    early += "exceeds available HBM (15.75G)."
    late = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.17G of 15.75G hbm. Exceeded"
    for message in (early, late):
        assert out_of_memory(message) == {"used": 33.17 * 2**30, "hbm": 15.75 * 2**30}
    with pytest.raises(InputError, match=r"libtpu cannot compile this plan.*: INTERNAL: something else"):
        out_of_memory("INTERNAL: something else")


def test_a_process_that_compiles_answers_or_says_why_not() -> None:
    said: list[str] = []
    with pytest.raises(InputError, match=r"^no such mesh$"):
        in_own_process(refuse, "no such mesh", progress=said.append)
    assert said[0].startswith("  start: ") and said[1:] == ["looking"]
    with pytest.raises(RuntimeError, match="died with exit code 3"):
        in_own_process(die, 3, progress=said.append)


HLO = """HloModule jit_step

%fused (p0: bf16[5,8,16], p1: s32[]) -> bf16[8,16] {
  %p0 = bf16[5,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %out = bf16[8,16]{1,0} bitcast(%slice)
}

%body (state: (s32[], bf16[5,8,16], bf16[4,8])) -> (s32[], bf16[5,8,16], bf16[4,8]) {
  %state = (s32[], bf16[5,8,16], bf16[4,8]) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %w = bf16[5,8,16]{2,1,0} get-tuple-element(%state), index=1
  %x = bf16[4,8]{1,0} get-tuple-element(%state), index=2
  %layer = bf16[8,16]{1,0:T(8,128)S(1)} fusion(%w, %n), kind=kLoop, calls=%fused
  %all = bf16[16,16]{1,0:T(8,128)S(1)} all-gather(%layer), replica_groups=[2,2]<=[4], dimensions={0}
  %y = bf16[4,16]{1,0:T(8,128)S(1)} convolution(%x, %layer), dim_labels=bf_io->bf
  %sum = f32[8,16]{1,0:T(8,128)S(1)} all-reduce(%y), replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %next = (s32[], bf16[5,8,16], bf16[4,8]) tuple(%n, %w, %x)
}

%condition (state: (s32[], bf16[5,8,16], bf16[4,8])) -> pred[] {
  %state = (s32[], bf16[5,8,16], bf16[4,8]) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %layers = s32[] constant(5)
  ROOT %less = pred[] compare(%n, %layers), direction=LT
}

ENTRY %main (a: s32[], b: bf16[5,8,16], c: bf16[4,8]) -> (s32[], bf16[5,8,16], bf16[4,8]) {
  %a = s32[] parameter(0)
  %b = bf16[5,8,16]{2,1,0} parameter(1)
  %c = bf16[4,8]{1,0} parameter(2)
  %start = (s32[], bf16[5,8,16], bf16[4,8]) tuple(%a, %b, %c)
  %token = token[] after-all()
  %in = (f32[3,8]{1,0}, u32[], token[]) recv(%token), x={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %loop = (s32[], bf16[5,8,16], bf16[4,8]) while(%start), condition=%condition, body=%body
}
"""


def test_costs_of_a_loop_count_every_turn() -> None:
    cost = read_program(HLO, devices_per_slice=2)
    assert cost.flops == 5 * 2 * 4 * 16 * 8
    gather, slices, total = sorted(cost.collectives, key=lambda c: (c.kind, c.count))
    assert (slices.kind, slices.shape, slices.across_slices) == ("all-reduce", "3x8", True)
    assert slices.bytes == 3 * 8 * 4 and slices.asynchronous and not gather.asynchronous
    assert (gather.kind, gather.count, gather.group, gather.across_slices) == ("all-gather", 5, 2, False)
    assert gather.bytes == 16 * 16 * 2 / 2  # half of the result comes from the other chip
    assert (total.kind, total.group, total.across_slices) == ("all-reduce", 2, True)
    assert total.bytes == 8 * 16 * 4
    # A turn reads one layer's slice and x; results stay in vector memory.
    assert cost.hbm_bytes == 5 * (8 * 16 * 2 + 4 * 8 * 2) + slices.bytes + 4  # and what comes from afar


ASYNC = """HloModule jit_step

%beside (p: bf16[8,16]) -> bf16[16,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %held = bf16[16,16]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,2]<=[4], dimensions={0}
}

%wrapped (p: bf16[16,8]) -> bf16[8,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  ROOT %scatter = bf16[8,8]{1,0} reduce-scatter(%p), channel_id=4, replica_groups=[2,2]<=[4], dimensions={0}
}

ENTRY %main (x: bf16[8,16], y: bf16[16,8]) -> bf16[8,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %y = bf16[16,8]{1,0} parameter(1)
  %start = (bf16[8,16], bf16[8,16]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %alone = bf16[8,16]{1,0} all-reduce(%x), channel_id=2, replica_groups=[2,2]<=[4], to_apply=%add
  %fused = bf16[16,16]{1,0} fusion(%x), kind=kOutput, calls=%beside
  %begun = ((bf16[16,8]), bf16[8,8], u32[]) async-start(%y), calls=%wrapped
  %ended = bf16[8,8]{1,0} async-done(%begun)
  ROOT %done = bf16[8,16] collective-permute-done(%start)
}
"""


def test_collectives_beside_other_work_are_told_from_those_alone() -> None:
    found = {c.kind: c.asynchronous for c in read_program(ASYNC, devices_per_slice=4).collectives}
    beside = {"collective-permute": True, "all-gather": True, "reduce-scatter": True}
    assert found == beside | {"all-reduce": False}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, x", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_of_a_collective(text: str, groups: list[list[int]]) -> None:
    assert replica_groups(text) == groups


@given(
    n=st.integers(1, 9),
    window=st.integers(1, 5),
    pad=st.integers(0, 4),
    stride=st.integers(1, 3),
    lhs_dilate=st.integers(1, 3),
    rhs_dilate=st.integers(1, 3),
)
def test_places_where_a_window_meets_the_input(n, window, pad, stride, lhs_dilate, rhs_dilate) -> None:
    padded = np.zeros(pad + (n - 1) * lhs_dilate + 1 + pad + 1, int)
    padded[pad : pad + (n - 1) * lhs_dilate + 1 : lhs_dilate] = 1
    reach = (window - 1) * rhs_dilate
    out = max(0, (len(padded) - 1 - reach + stride - 1) // stride)
    expected = sum(padded[o * stride + k * rhs_dilate] for o in range(out) for k in range(window))
    assert valid_places(n, out, window, pad, stride, lhs_dilate, rhs_dilate) == expected


def test_products_of_a_jaxpr() -> None:
    def function(x, w, image, kernel):
        y, _ = jax.lax.scan(lambda y, _: (y @ w, None), x, None, length=7)
        return y.sum() + jax.lax.conv(image, kernel, (1, 1), "VALID").sum()

    shapes = [jnp.zeros(s) for s in ((3, 4), (4, 4), (2, 3, 8, 8), (5, 3, 3, 3))]
    expected = 7 * 2 * 3 * 4 * 4 + 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)
    assert product_flops(jax.make_jaxpr(function)(*shapes).jaxpr) == expected


def test_model_flops_of_the_published_model() -> None:
    """About 2 FLOPs per parameter and token in the forward pass, 6 if it is trained; remat changes nothing."""
    config = default_config()
    grid = make_grid(config.grid.to_dict(), lambda: np.asarray(PRETRAIN_GAUSSIANS))

    def flops_of(depth_source: str, remat: str) -> float:
        config.model.update(depth_source=depth_source, remat=remat)
        return model_flops(make_setup(config, grid), grid)

    flops = flops_of("none", "full")
    language, vision, head = 26 * 77_860_864, 412e6, 265_347 * 2304
    tokens = 256 + config.data.prompt.length + 12
    estimate = 6 * (language * tokens + vision * 256 + head * 13)
    assert 1 < flops / estimate < 1.06  # the rest is attention
    assert flops_of("none", "none") == flops
    assert 0.4e12 < flops_of("zoedepth", "none") - flops < 0.8e12  # frozen: only its forward pass
