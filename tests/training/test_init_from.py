"""Where runs start: on a new grid by adaption, or on the old grid; never on a spatial table whose bins have changed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spatialvla_jax.actions import ActionGrid, adapt_embeddings, uniform_grid
from spatialvla_jax.checkpoints import read_checkpoint, write_huggingface
from spatialvla_jax.checkpoints.mapping import flatten
from spatialvla_jax.checkpoints.orbax import step_directory
from spatialvla_jax.checkpoints.regrid import adapt_checkpoint
from spatialvla_jax.config import check_together, default_config, load_config
from spatialvla_jax.data import open_data
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.convert import convert
from spatialvla_jax.training.init_from import make_processor, open_start, starting_params
from spatialvla_jax.training.loop import train
from spatialvla_jax.training.setup import make_setup

TABLE, HEAD, EMBEDDING = "llm/embedder/input_embedding", "llm/lm_head", "spatial_embedding"


def start(config_file: Path, init: Path, workdir: Path, **overrides: str):
    """As `train` does: (processor, parameters or None)."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    config = load_config(config_file, {"init": str(init), **dotted})
    check_together(config)
    source, before = open_start(config, step_directory(workdir))
    loader = open_data(config, tokenizer=before and before.tokenizer)
    processor = make_processor(config, loader, before)
    setup = make_setup(config, processor.grid, text_vocab=processor.tokenizer.vocab_size)
    params, _ = starting_params(setup, step_directory(workdir), source, processor.grid)
    return processor, params and flatten(params)


@pytest.mark.parametrize("kind", ["run", "published", "uniform"])
def test_tables_of_another_number_of_bins(config_file: Path, trained: Path, tmp_path: Path, kind: str) -> None:
    """Text rows are copied, action rows interpolated; from one of our runs and from a published directory."""
    old = read_checkpoint(trained)
    assert old.processor is not None and isinstance(old.processor.grid, ActionGrid)
    init = trained
    if kind == "published":
        write_huggingface(init := tmp_path / "published", old)
    changes = {"grid__num_bins": "(5, 6, 3, 4, 4, 4)", "adapt__embedding": "True", "adapt__head": "True"}
    grid_kind = "uniform" if kind == "uniform" else "gaussian"
    processor, params = start(config_file, init, tmp_path / "new", grid__kind=grid_kind, **changes)
    assert params is not None and processor.grid.num_bins == (5, 6, 3, 4, 4, 4)  # pyright: ignore
    assert processor.tokenizer.to_bytes() == old.processor.tokenizer.to_bytes()
    first = old.config.action_offset
    for path, leaf in old.arrays.items():
        before = leaf.read()
        if path in (TABLE, HEAD):
            np.testing.assert_array_equal(params[path][:first], before[:first])
        elif path != EMBEDDING:
            np.testing.assert_array_equal(params[path], before)
    for path, skip in ((TABLE, first), (HEAD, first), (EMBEDDING, 0)):
        expected = adapt_embeddings(old.processor.grid, processor.grid, old.arrays[path].read()[skip:])  # pyright: ignore
        np.testing.assert_array_equal(params[path][skip:], expected)


def test_the_grid_of_the_checkpoint_is_kept(config_file: Path, trained: Path, tmp_path: Path) -> None:
    """With `grid.kind=checkpoint` or an equal fitted grid, every table is unchanged, whether adaption is on or off."""
    old = read_checkpoint(trained)
    other = {"grid__kind": "checkpoint", "grid__num_bins": "(9, 9, 9, 9, 9, 9)"}
    for overrides in (other, {"adapt__embedding": "True"}, {}):
        processor, params = start(config_file, trained, tmp_path / "new", **overrides)
        assert params is not None and old.processor is not None
        assert all(np.array_equal(params[path], leaf.read()) for path, leaf in old.arrays.items())
        assert processor.to_dict()["grid"] == old.processor.to_dict()["grid"]


def test_what_adapters_are_added_to_keeps_its_dtype(config_file: Path, trained: Path, tmp_path: Path) -> None:
    """Frozen weights keep their stored dtype, in half the memory; trained ones are float32."""
    convert(trained, tmp_path / "bf16", to="pytorch", dtype="bfloat16", verify=False)
    _, params = start(config_file, tmp_path / "bf16", tmp_path / "new", lora__rank="4")
    assert params is not None
    full = {path for path, x in params.items() if x.dtype == np.float32}
    assert full == {path for path in params if path.startswith("lora/")} | {EMBEDDING}
    assert {str(x.dtype) for x in params.values()} == {"float32", "bfloat16"}


def test_a_run_that_goes_on_is_not_adapted_again(config_file: Path, trained: Path) -> None:
    """Its own checkpoint is used, and the one that it started from may be gone."""
    processor, params = start(config_file, Path("gone"), trained, adapt__embedding="True")
    assert params is None and processor.to_dict() == read_checkpoint(trained).processor.to_dict()  # pyright: ignore


def test_what_does_not_fit_is_refused(config_file: Path, trained: Path, tmp_path: Path) -> None:
    for overrides, sentence in (
        ({"grid__kind": "uniform"}, r"another action grid.*adapt.embedding=True.*grid.kind=checkpoint"),
        ({"grid__kind": "uniform", "adapt__head": "True"}, "another action grid"),
        ({"grid__kind": "linear"}, "a linear one can't be adapted"),
        (
            {"grid__num_bins": "(5, 4, 2, 4, 4, 4)", "adapt__embedding": "True"},
            r"\(4, 4, 2, 4, 4, 4\) bins.*\(5, 4, 2, 4, 4, 4\): set adapt.head=True",
        ),
    ):
        with pytest.raises(InputError, match=sentence):
            start(config_file, trained, tmp_path / "new", **overrides)
    weights = replace(read_checkpoint(trained), processor=None)
    with pytest.raises(InputError, match="weights has no action grid to adapt from"):
        adapt_checkpoint("weights", weights, uniform_grid(), embedding=True, head=False)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"adapt.embedding": "True", "grid.kind": "linear", "init": "a"}, r"adapt.embedding.*grid.kind=linear"),
        ({"adapt.head": "True"}, "adapt.head adapts the weights of init, but init is empty"),
        ({"grid.kind": "checkpoint"}, "grid.kind=checkpoint keeps the grid of init, but init is empty"),
        ({"lora.rank": "8"}, "lora.rank=8 adapts the weights of init, but init is empty"),
        ({"lora.rank": "-1", "init": "a"}, "lora.rank=-1 is below 0; the nearest valid value is 0"),
    ],
)
def test_configs_that_contradict_themselves(config_file: Path, overrides: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_together(load_config(config_file, overrides))


def test_a_depth_model_without_weights_is_told(tmp_path: Path, capsys) -> None:
    for depth, told in (("zoedepth", 1), ("dataset", 0)):
        config = default_config()
        config.model.update(preset="nano", depth_source=depth)
        config.data.packed = "nowhere.pack"  # this far is enough
        with pytest.raises(InputError, match=r"nowhere\.pack cannot be read"):
            train(config, tmp_path)
        assert capsys.readouterr().err.count("init is empty: the depth model has random weights\n") == told


def test_adapters_need_a_head_that_knows_actions(config_file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "paligemma.npz", x=np.zeros(1))
    with pytest.raises(InputError, match=r"lora.rank=8 freezes the LM head.*has no action tokens"):
        start(config_file, tmp_path / "paligemma.npz", tmp_path / "new", lora__rank="8")
