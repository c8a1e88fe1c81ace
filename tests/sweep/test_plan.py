"""What a sweep file means, and what is refused before anything runs."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.checkpoints import GOLDEN

from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, gaussian_grid, linear_grid, uniform_grid
from spatialvla_jax.checkpoints import read_checkpoint
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.cli import main
from spatialvla_jax.errors import InputError
from spatialvla_jax.sweep import plan
from spatialvla_jax.sweep.plan import load_sweep
from spatialvla_jax.text import train_tokenizer

SWEEP = """
from spatialvla_jax.config import default_config


def get_sweep():
    base = default_config()
    base.model.update(preset="nano", depth_source="dataset")
    base.data.datasets = [{{"name": "toy", "spec": "libero", "path": "."}}]
    return {sweep}
"""
GOOD = {"axes": {"grid.kind": ["gaussian", "uniform"]}, "seeds": [0, 1]}


def write(folder: Path, **changes) -> Path:
    sweep = ", ".join(f"{key!r}: {value!r}" for key, value in (GOOD | changes).items())
    path = folder / "mine.py"
    path.write_text(SWEEP.format(sweep=f'{{"base": base, {sweep}}}' if "base" not in changes else f"{{{sweep}}}"))
    return path


def test_trials_are_all_combinations_of_values_and_seeds(tmp_path: Path) -> None:
    grids = {"coarse one": {"grid.num_bins": (8, 16, 4, 8, 8, 8)}, "fine": {}}
    path = write(tmp_path, axes={"grid": grids, "model.depth_source": ["dataset", "none"]}, seeds=[0, 7])
    sweep = load_sweep(path, {"train.steps": "12"})
    assert sweep.name == "mine" and sweep.keep_checkpoints
    assert sweep.config == str(path) and sweep.overrides == {"train.steps": "12"}
    assert sweep.axes == {"grid": ("coarse one", "fine"), "model.depth_source": ("dataset", "none")}
    assert [trial.name for trial in sweep.trials] == [
        f"grid-{grid}_depth-source-{depth}_seed-{seed}"
        for seed in (0, 7)
        for grid in ("coarse-one", "fine")
        for depth in ("dataset", "none")
    ]
    trial = sweep.trials[5]
    assert trial.values == {"grid": "coarse one", "model.depth_source": "none"} and trial.seed == trial.config.seed == 7
    assert trial.config.grid.num_bins == (8, 16, 4, 8, 8, 8) and trial.config.model.depth_source == "none"
    assert trial.config.train.steps == 12 and sweep.trials[2].config.grid.num_bins == (16, 32, 8, 16, 16, 16)
    assert len({trial.digest for trial in sweep.trials}) == 8
    assert [trial.seed for trial in sweep.select("*coarse*seed-7")] == [7, 7]
    with pytest.raises(InputError, match="no trial of sweep mine matches 'x'; the first is grid-coarse-one_depth"):
        sweep.select("x")


def test_one_axis_at_a_time_around_a_reference(tmp_path: Path) -> None:
    """The reference is one trial, not one per axis. Its own settings do not count as changes of the others."""
    grids = {"fine": {}, "coarse": {"grid.num_bins": (8, 16, 4, 8, 8, 8)}}
    kinds = {"Gaussian": {}, "256 bins": {"grid.kind": "linear"}}
    axes = {"resolution": grids, "kind": kinds, "model.action_chunk": [1, 4, 8]}
    reference = {"model.action_chunk": 4, "kind": "Gaussian", "resolution": "fine"}
    sweep = load_sweep(write(tmp_path, axes=axes, reference=reference))
    names = ["reference", "resolution-coarse", "kind-256-bins", "action-chunk-1", "action-chunk-8"]
    assert [trial.name for trial in sweep.trials] == [f"{name}_seed-{seed}" for seed in (0, 1) for name in names]
    assert list(sweep.reference.items()) == [("resolution", "fine"), ("kind", "Gaussian"), ("model.action_chunk", "4")]
    assert sweep.trials[0].values == sweep.reference
    assert sweep.trials[4].values == sweep.reference | {"model.action_chunk": "8"}
    assert [trial.config.model.action_chunk for trial in sweep.trials[:5]] == [4, 4, 4, 1, 8]
    assert sweep.trials[2].config.grid.kind == "linear"

    axes = {"optimizer.learning_rate": [0.5, 1], "grid.num_bins": [(4, 4, 2, 4, 4, 4), (2, 4, 2, 4, 4, 4)]}
    reference = {"optimizer.learning_rate": 1, "grid.num_bins": [2, 4, 2, 4, 4, 4]}  # names are "1.0" and "(2, …)"
    assert load_sweep(write(tmp_path, axes=axes, reference=reference)).reference == {
        "optimizer.learning_rate": "1.0",
        "grid.num_bins": "(2, 4, 2, 4, 4, 4)",
    }


def test_a_trials_digest_does_not_depend_on_where_the_data_lies(tmp_path: Path) -> None:
    def digest(**changes: str) -> str:
        return load_sweep(write(tmp_path), changes, only="none").trials[0].digest

    elsewhere = {"data.packed": "elsewhere.pack", "data.cache_dir": "cache", "model.remat": "none"}
    assert digest() == digest(**elsewhere) != digest(**{"train.steps": "7"})


def test_episodes_are_those_of_the_trials_seed_unless_the_sweep_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, closed_loop={"episodes": 7})
    assert [t.closed_loop for t in load_sweep(path).trials[::2]] == [
        {"suite": "", "episodes": 7, "seeds": [seed], "tasks": []} for seed in (0, 1)
    ]
    given = {"suite": "libero_10", "episodes": 1, "seeds": [3, 4], "tasks": [2]}
    assert [t.closed_loop for t in load_sweep(write(tmp_path, closed_loop=given)).trials] == [given] * 4
    assert load_sweep(write(tmp_path)).trials[0].closed_loop == {}


def test_ranges_are_lists(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, axes={"train.steps": range(4, 6)}, seeds=range(2)))
    assert [(trial.config.train.steps, trial.seed) for trial in sweep.trials] == [(4, 0), (5, 0), (4, 1), (5, 1)]


LINEAR = {"linear": {"grid.kind": "linear"}}
BAD_AXES = [
    ({"grid.knd": ["gaussian"]}, "axis 'grid.knd' of .* is not a config key .grid.kind is one"),
    ({"a": {"b": {"grid.knd": "x"}}}, "trial a-b: config key .* did you mean grid.kind"),
    ({"grid.kind": []}, "axis 'grid.kind' of .* has no values"),
    ({"grid": {}}, "axis 'grid' of .* has no values"),
    ({"grid.kind": "uniform"}, "must be a list of values or a dict"),
    ({"loss.target_weight": [1.0, 2.0]}, "loss.target=none has no weight, so loss.target_weight would change nothing"),
    ({"loss.target": ["none", "metres"]}, "trial target-metres: loss.target=metres needs packed recordings"),
    ({"grid": {1: {}, "1": {}}}, "axis 'grid' of .* has a name twice: 1, '1'"),
    (
        {"grid": {"a": {"train.grad_accum_steps": 2, "train.accumulate": 4}}},
        "value 'a' of axis 'grid' .* has a name twice",
    ),
    ({1: {"a": {}}, "1": {"b": {}}}, "axes of .* has a name twice"),
    ({"grid": {"a\nb": {}}}, r"axis 'grid' of .* has 'a\\nb': a name is one line"),
    ({"data.prompt.template": ["{instruction}\t"]}, r"instruction}\\t': a name is one line"),
    ({"grid": {"a": 3}}, "value 'a' of axis 'grid' .* must be a dict"),
    ({"grid.kind": ["uniform", "uniform"]}, "has a value twice"),
    ({"grid": {"a b": {"grid.kind": "uniform"}, "a-b": {}}}, "two trials would be named grid-a-b_seed-0"),
    ({"grid": {"a": {}, "b": {"grid.kind": "gaussian"}}}, "grid-a_.* and grid-b_.* same"),
    ({"seed": [1, 2]}, "config key seed is set by the seeds"),
    (
        {"train.steps": ["many"]},
        "train.steps='many' is a string, but a whole number is expected; a valid value is 120000",
    ),
    (
        {"model.depth_source": ["zeodepth"]},
        "axis .*: model.depth_source='zeodepth' is not one of .*; the nearest valid value is 'zoedepth'",
    ),
    ({"model.preset": ["tny"]}, "model.preset='tny' is not one of .*; the nearest valid value is 'tiny'"),
    ({"grid.num_bins": [(4, 4)]}, r"grid.num_bins=\(4, 4\) has 2 elements, but 6 are expected"),
    ({"optimizer.ema": [0.5, 1.5]}, "optimizer.ema=1.5 is not below 1; a valid value is 0.0"),
    ({"grid.kind": ["uniform"], "grid": LINEAR}, "axes 'grid.kind' and 'grid' both set grid.kind"),
    (
        {"grid": LINEAR, "adapt.embedding": [False, True]},
        "trial grid-linear_embedding-True: adapt.embedding interpolates between bins in space",
    ),
    ({"grid": LINEAR, "bins": {"a": {"grid.num_bins": (1, 1, 1, 1, 1, 1)}}}, "a linear grid has 256 bins a dimension"),
    ({"adapt.embedding": [True]}, "adapt.embedding adapts the weights of init, but init is empty"),
    ({"lora.rank": [0, 4]}, "trial rank-4: lora.rank=4 adapts .* init is empty"),
    (
        {"grid": {"a": {"grid.kind": "checkpoint"}}, "adapt.embedding": [True]},
        "grid.kind=checkpoint keeps the grid of init",
    ),
    ({"init": ["nowhere"]}, "init is nowhere, which does not exist"),
    (
        {"optimizer.frozen": [("zoe",), ("llm/embeder",)]},
        "trial frozen-llm-embeder: optimizer.frozen pattern 'llm/embeder' matches no parameter",
    ),
    (
        {"lora": {"a": {"lora.rank": 4, "lora.targets": ("llm", "image"), "init": "nowhere"}}},
        "trial lora-a: lora.targets pattern 'image' matches no linear layer",
    ),
    ({"train.steps": [10, 0]}, "train.steps=0 is below 1; the nearest valid value is 1"),
    ({"train.batch_size": [-8]}, r"train.batch_size=-8 is below 1 .examples.; the nearest valid value is 1"),
    (
        {"model.depth_source": ["dataset", "zoedepth"]},
        "trial depth-source-zoedepth: model.depth_source=zoedepth takes the depth model of init, and init is empty",
    ),
    (
        {"data.datasets": [[{"name": "a", "spec": "libero", "path": "a/1.0.0"}]]},
        "data.datasets has a/1.0.0, which does not exist$",
    ),
    (
        {"train.steps": [10, "10"]},
        "train.steps='10' is a string, but a whole number is expected; the nearest valid value is 10",
    ),
    (
        {"train.accumulate": [1, 3]},
        "trial accumulate-3: train.batch_size=128 does not divide by .*; the nearest .* 129",
    ),
    ({"optimizer.learning_rate": [1e-3, -1]}, "learning_rate=-1.0 is below 0; the nearest valid value is 0.0"),
    ({"a": {"b": {"train.steps": True}}}, "trial a-b: train.steps=True is true or false, but a whole number is"),
    ({"data.datasets": [[]]}, "The mixture is empty"),
    ({"data.datasets": [[{"name": "a", "spec": {}, "path": ".", "weight": -1}]]}, "weight=-1.0 is not above 0"),
    ({"data.datasets": [[{"name": "a", "spec": {}, "path": "."}]]}, "'a' has no depth, which the config requires"),
    ({"data.packed": ["x.pack"]}, "data.packed names x.pack, which does not exist"),
]
BAD = [
    *(({"axes": axes}, sentence) for axes, sentence in BAD_AXES),
    ({"seeds": [0, 0]}, "two trials would be named kind-gaussian_seed-0"),
    ({"seeds": []}, r"seeds=\[\] must have at least one"),
    ({"seeds": [0.5]}, r"seeds\[0\]=0.5 is a number, but a whole number is expected; the nearest valid value is 0"),
    ({"seeds": 3}, r"seeds=3 is a whole number, but a list is expected; the nearest valid value is \[3\]"),
    ({"seeds": ["0", "1"]}, r"seeds\[0\]='0' is a string, but a whole .* expected; the nearest valid value is 0"),
    ({"seeds": [-1]}, r"seeds\[0\]=-1 is below 0; the nearest valid value is 0"),
    ({"axes": ["train.steps"]}, r"axes=\['train.steps'\] is a list, but a dict is expected"),
    ({"keep_checkpoints": "no"}, "keep_checkpoints='no' is a string, but true or false is expected"),
    ({"reference": {"grid": "uniform"}}, "reference of .* names 'grid', which is not an axis: there are grid.kind"),
    (
        {"axes": {}, "reference": {"grid": "uniform"}},
        "reference of .* names 'grid', which is not an axis: there are none",
    ),
    ({"reference": {"grid.kind": "linear"}}, "has 'linear' for axis 'grid.kind': choose one of gaussian, uniform"),
    (
        {"axes": {"grid.kind": ["uniform"], "seed x": {"a": {}}}, "reference": {"grid.kind": "uniform"}},
        "reference of .* has no value for axis 'seed x': choose one of a",
    ),
    ({"closed_loop": {"episode": 7}}, "closed_loop of .* has no key 'episode': its keys are suite, episodes, seeds"),
    ({"closed_loop": {"suite": "libero"}}, "closed_loop.suite='libero' is not a suite: there are libero_spatial, libe"),
    ({"closed_loop": {"seeds": [1, 1]}}, r"closed_loop.seeds=\[1, 1\] has a value twice"),
    ({"closed_loop": {"episodes": 0}}, "closed_loop.episodes=0 is below 1; the nearest valid value is 1"),
    ({"closed_loop": {"tasks": [10]}}, r"closed_loop.tasks\[0\]=10 is above 9; the nearest valid value is 9"),
    ({"base": 3}, "base=3 is a whole number, but a string or a dict is expected"),
    ({"base": "nowhere.py"}, "nowhere.py does not exist"),
    ({"steps": 3}, "must return a dict with the keys base, axes, reference, seeds, closed_loop, keep_checkpoints"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD)
def test_bad_sweeps_are_refused(changes: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        load_sweep(write(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_data_may_lie_in_a_bucket(gcs, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "there.pack").write_text("of no interest here")
    url = gcs.upload(tmp_path / "packed", "packed") + "/there.pack"
    assert load_sweep(write(tmp_path), {"data.packed": url}).trials[0].config.data.packed == url
    with pytest.raises(InputError, match=r"data.packed names gs://.*/other.pack, which does not exist"):
        load_sweep(write(tmp_path), {"data.packed": str({url: 1.0, url.replace("there", "other"): 1.0})})
    folder, dataset = url.rpartition("/")[0], {"name": "toy", "spec": "libero"}
    assert load_sweep(write(tmp_path), {"data.datasets": str([dataset | {"path": folder}])}).trials
    with pytest.raises(InputError, match=r"data.datasets has gs://.*/packed2, which does not exist"):
        load_sweep(write(tmp_path), {"data.datasets": str([dataset | {"path": f"{folder}2"}])})


def test_numpy_values_are_python_values(tmp_path: Path) -> None:
    path = write(tmp_path)
    changes = '"axes": {"optimizer.learning_rate": np.logspace(-4, -3, 2), "lora.alpha": [np.float32(0.5)]}, '
    changes += '"seeds": np.arange(2)'
    path.write_text("import numpy as np" + SWEEP.format(sweep=f'{{"base": base, {changes}}}'))
    sweep = load_sweep(path)
    assert sweep.seeds == (0, 1) and all(type(seed) is int for seed in sweep.seeds)
    assert [trial.config.optimizer.learning_rate for trial in sweep.trials] == [1e-4, 1e-3] * 2
    assert sweep.trials[0].name == "learning-rate-0.0001_alpha-0.5_seed-0"


def test_the_command_line_refuses_in_one_sentence_before_anything_runs(tmp_path: Path, capsys) -> None:
    path, workdir = str(write(tmp_path, axes={"grid": LINEAR, "adapt.head": [True]})), tmp_path / "out"
    assert main(["sweep", "--config", path, "--workdir", str(workdir)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "trial grid-linear_head-True: adapt.head interpolates between bins" in message
    assert not workdir.exists()
    path = str(write(tmp_path))
    assert main(["sweep", "--config", path, "--workdir", str(workdir), "--config.grid.kind=uniform"]) == 2
    assert "config key grid.kind is set by axis 'grid.kind'" in capsys.readouterr().err
    assert main(["sweep", "--config", path]) == 2
    assert "a sweep needs --config FILE and --workdir DIR" in capsys.readouterr().err
    assert main(["sweep", "--config", path, "--workdir", str(workdir), "--dry-run", "--only", "*seed-1"]) == 0
    assert capsys.readouterr().out == "kind-gaussian_seed-1\nkind-uniform_seed-1\n"
    assert not workdir.exists()


PROVIDED = {
    "grid_resolution": 8,
    "grid_distribution": 6,
    "ego3d": 6,
    "embedding": 4,
    "adaption": 8,
    "libero_small": 36,
    "libero_adaption": 8,
    "mini_ablations": 39,
    "mini_adaption": 36,
}


def start_from(monkeypatch, grid) -> None:
    """`init` is always the tiny checkpoint with this grid."""
    processor = Processor(train_tokenizer(["pick up the bowl"], 256), grid, {}, {})
    checkpoint = replace(read_checkpoint(GOLDEN), processor=processor)
    monkeypatch.setattr(plan, "read_checkpoint", lambda init: checkpoint)


@pytest.mark.parametrize("name", PROVIDED)
def test_provided_sweeps(name: str, tmp_path: Path, monkeypatch) -> None:
    pack = tmp_path / "any.pack"
    pack.touch()
    start_from(monkeypatch, gaussian_grid(PRETRAIN_GAUSSIANS))
    start = {"init": str(tmp_path)} if name in ("adaption", "libero_adaption") else {}
    files = {} if name == "mini_adaption" else {"data.packed": str(pack)}  # whose axes name the files
    only = "none" if name == "mini_adaption" else "*"
    sweep = load_sweep(f"configs/sweeps/{name}.py", files | start, only)
    assert len(sweep.trials) == PROVIDED[name]
    if name == "grid_resolution":
        assert list(sweep.axes["resolution"]) == ["1026", "4610", "6166", "8194"]
    if name == "adaption":
        adapters = [trial.values["post-training"] for trial in sweep.select("*seed-0") if trial.config.lora.rank == 32]
        assert adapters == ["with adaption, LoRA", "without, LoRA"]
        frozen = [t.name for t in sweep.trials if "spatial_embedding" in t.config.optimizer.frozen]
        assert frozen == [f"post-training-without-LoRA_seed-{seed}" for seed in (0, 1)]


def test_estimated_depth_is_made_first_or_left_out(tmp_path: Path, monkeypatch, capsys) -> None:
    sweep = str(Path("configs/sweeps/ego3d.py").absolute())
    for name in ("configs", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "configs" / "demo.py").write_text(Path("configs/demo.py").read_text())
    (tmp_path / "data" / "libero_spatial_demo" / "1.0.0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "--config", sweep, "--workdir", "out", "--dry-run"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "trial depth-zoedepth: data.datasets has data/zoedepth/libero" in message
    assert "make it with `spatialvla-jax data depth`, or leave the trials that need it out with --only" in message
    assert main([*command, "--only", "depth-[rn]*"]) == 0
    assert capsys.readouterr().out.count("depth-") == 4
    (tmp_path / "data" / "zoedepth" / "libero_spatial_demo" / "1.0.0").mkdir(parents=True)
    assert main(command) == 0
    assert capsys.readouterr().out.count("depth-zoedepth") == 2


BINS = (4, 4, 2, 4, 4, 4)
ADAPT = {"grid.num_bins": BINS, "adapt.embedding": True}
STARTS = {
    "the same bins": (uniform_grid(BINS), ADAPT, None),
    "the same grid": (uniform_grid(BINS), {"grid.num_bins": BINS, "grid.kind": "uniform"}, None),
    "a fitted grid, which may be the same": (uniform_grid(BINS), {"grid.num_bins": BINS}, None),
    "other bins": (
        uniform_grid((4, 4, 2, 4, 4, 2)),
        ADAPT,
        "has a grid of .* set adapt.head=True to adapt the LM head",
    ),
    "other bins and the head": (uniform_grid((4, 4, 2, 4, 4, 2)), ADAPT | {"adapt.head": True}, None),
    "other bins, not adapted": (uniform_grid((1,) * 6), {"grid.num_bins": BINS}, "set adapt.embedding=True"),
    "another grid, not adapted": (
        gaussian_grid(PRETRAIN_GAUSSIANS, BINS),
        {"grid.num_bins": BINS, "grid.kind": "uniform"},
        "was trained with another action grid",
    ),
    "from a linear grid": (linear_grid(), ADAPT, "a linear one can't be adapted"),
    "its own grid": (linear_grid(), {"grid.kind": "checkpoint"}, None),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_grid_that_the_checkpoint_can_not_be_taken_to_is_refused(case: str, tmp_path: Path, monkeypatch) -> None:
    grid, changes, sentence = STARTS[case]
    start_from(monkeypatch, grid)
    path = write(tmp_path, axes={"grid": {"a": changes | {"init": str(tmp_path)}}})
    if sentence is None:
        assert len(load_sweep(path).trials) == 2
    else:
        with pytest.raises(InputError, match=f"trial grid-a: .*{sentence}"):
            load_sweep(path)


def test_every_provided_sweep_is_tested() -> None:
    assert {path.removesuffix(".py") for path in os.listdir("configs/sweeps") if path.endswith(".py")} == set(PROVIDED)
