"""Runs of low-rank adapters: what they train and store, that they resume exactly, and what they merge to."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.checkpoints import with_lora
from jax.sharding import PartitionSpec as P

from spatialvla_jax.actions import adapt_embeddings
from spatialvla_jax.checkpoints import load_pretrained, read_checkpoint
from spatialvla_jax.checkpoints.mapping import flatten
from spatialvla_jax.checkpoints.orbax import read_metadata
from spatialvla_jax.checkpoints.peft import read_adapters
from spatialvla_jax.cli import main
from spatialvla_jax.config import train_config_of
from spatialvla_jax.data import open_data
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.convert import convert
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.models.lora import is_linear
from spatialvla_jax.training.loop import train
from spatialvla_jax.training.metrics import read_metrics
from spatialvla_jax.training.setup import make_setup
from spatialvla_jax.training.sharding import make_mesh, spec_of
from spatialvla_jax.training.step import make_eval_step


def test_adapters_and_the_spatial_table_alone_are_trained_and_kept(adapted: Path, trained: Path) -> None:
    run, before = read_adapters(adapted, read_checkpoint), read_checkpoint(trained)
    kernels = {path for path in before.arrays if is_linear(path)}
    assert run.trained.keys() == {f"lora/{path}/{x}" for path in kernels for x in "ab"} | {"spatial_embedding"}
    for path, leaf in run.whole.arrays.items():
        changed = not np.array_equal(leaf.read(), before.arrays[path].read())
        assert changed == (path in kernels or path == "spatial_embedding"), path
    log = read_metrics(adapted / "metrics.jsonl")
    parts = {key for record in log for key in record if key.startswith(("gradient_norm/", "update_norm/"))}
    assert parts == {f"{kind}_norm/{part}" for kind in ("gradient", "update") for part in ("lora", "spatial_embedding")}
    losses = [record["loss"] for record in log if "loss" in record]
    assert losses[-1] < losses[0] and "val/loss" in log[-1]


def test_the_table_started_from_the_adapted_one(adapted: Path, trained: Path) -> None:
    """Trained for six small steps, so close to the start and far from the table that was not adapted."""
    before, after = read_checkpoint(trained), read_checkpoint(adapted)
    assert before.processor is not None and after.processor is not None
    assert before.processor.tokenizer.to_bytes() == after.processor.tokenizer.to_bytes()
    old = before.arrays["spatial_embedding"].read()
    start = adapt_embeddings(before.processor.grid, after.processor.grid, old)  # pyright: ignore[reportArgumentType]
    new = after.arrays["spatial_embedding"].read()
    assert np.abs(new - start).max() < 0.03 < 3 * 0.03 < np.abs(old - start).max()


def test_a_run_of_adapters_goes_on_in_the_same_bits(adapted: Path, tmp_path: Path) -> None:
    """Resumes from step 3 and reads the base again; also with averaged parameters."""
    shutil.copytree(adapted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    result = train(train_config_of(adapted), tmp_path / "run")
    assert result["step"] == 6 and result["trainable"] < result["params"]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == read_metrics(adapted / "metrics.jsonl")
    a, b = (read_checkpoint(run).arrays for run in (adapted, tmp_path / "run"))
    assert all(np.array_equal(a[path].read(), b[path].read()) for path in a)


def test_merged_it_acts_as_unmerged(adapted: Path, tmp_path: Path) -> None:
    """Merged weights give the validation loss that the run logged with separate adapters."""
    assert convert(adapted, tmp_path / "merged", to="orbax", merge=True)["bit_exact"]
    model, params, processor = load_pretrained(tmp_path / "merged")
    assert processor is not None
    assert jax.tree.all(jax.tree.map(np.array_equal, params, load_pretrained(adapted)[1]))
    config = train_config_of(adapted)
    setup = make_setup(config, processor.grid, num_datasets=1, text_vocab=processor.tokenizer.vocab_size)
    assert setup.model == model
    step = jax.jit(make_eval_step(setup))
    loss, count = 0.0, 0
    for batch in open_data(config, processor.statistics, processor.tokenizer).epoch(8, "val"):
        sums, n = step(params, batch.replace(sample_id=None), processor.grid)
        loss, count = loss + float(sums["loss"]), count + int(n)
    assert loss / count == pytest.approx(read_metrics(adapted / "metrics.jsonl")[-1]["val/loss"], rel=1e-5)
    # Another step's checkpoint is another policy.
    earlier = flatten(load_pretrained(adapted / "checkpoints" / "3")[1])
    assert not np.array_equal(earlier["img/head/kernel"], flatten(params)["img/head/kernel"])


def test_a_base_that_is_not_the_same_is_refused(adapted: Path, tmp_path: Path) -> None:
    step = adapted / "checkpoints" / "6"
    base = read_metadata(step)["lora"]["base"]
    with pytest.raises(InputError, match=r"adapters of /gone, which does not exist: put it"):
        Policy.load(with_lora(step, tmp_path / "gone", base=base | {"path": "/gone"}))
    other = base["digests"] | {"img/head/kernel": "0"}
    with pytest.raises(InputError, match="which has changed since"):
        load_pretrained(with_lora(step, tmp_path / "changed", base=base | {"digests": other}))


def test_conversions_that_make_no_sense_are_refused(adapted: Path, trained: Path, tmp_path: Path, capsys) -> None:
    for source, options, sentence in (
        (adapted, ("--to", "orbax"), "--merge gives a whole checkpoint, --to peft only the adapters"),
        (adapted, ("--to", "peft", "--merge"), "--merge gives a whole checkpoint"),
        (adapted, ("--to", "peft", "--dtype", "bfloat16"), "omit --dtype"),
        (trained, ("--to", "peft"), "holds no adapters for peft"),
        (trained, ("--to", "orbax", "--merge"), "holds no adapters to merge"),
    ):
        assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_adapters_lie_where_their_kernels_do() -> None:
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    kernel = "llm/layers/attn/q_einsum/w"
    assert spec_of(f"lora/{kernel}/a", (3, 8, 32), mesh) == P(None, None, "fsdp")
    assert spec_of(f"lora/{kernel}/b", (3, 4, 8, 8), mesh) == P(None, "tensor", None, None)
    assert spec_of(f"lora/{kernel}/b", (3, 3, 8, 8), mesh) == P(None, None, None, None)
    assert spec_of("lora/llm/layers/mlp/linear/a", (3, 8, 32), mesh) == P(None, None, "tensor")
    assert spec_of("lora/img/head/kernel/a", (8, 32), mesh) == P(None, "fsdp")
    assert spec_of("lora/ego3d/dense_0/kernel/a", (8, 204), mesh) == P(None, None)
