import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from helpers.checkpoints import equal
from helpers.full_disk import no_room
from safetensors.numpy import load_file

from spatialvla_jax.checkpoints import (
    Checkpoint,
    load_pretrained,
    read_checkpoint,
    read_huggingface,
    write_huggingface,
    write_orbax,
)
from spatialvla_jax.checkpoints.types import LazyArray
from spatialvla_jax.cli import main
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.card import model_card
from spatialvla_jax.export.convert import WRITERS, convert, write_pytorch


def test_published_to_orbax_and_back(checkpoint, tmp_path):
    published, run, again = (tmp_path / name for name in ("published", "run", "again"))
    write_pytorch(published, checkpoint)
    figures = convert(published, run, to="orbax")
    assert figures["bit_exact"] and figures["parameters"] == 90_160 and figures["bytes"] == 4 * 90_160
    assert figures["release_differences"] == []
    assert convert(run, again, to="pytorch", verify=False)["bit_exact"]
    for file in published.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    json.dumps(figures)


@pytest.mark.slow
def test_the_published_model_with_zoedepth(golden, tmp_path):
    """The golden directory to Orbax and back keeps all 380 tensors byte for byte, and PyTorch runs them like JAX."""
    assert convert(golden, tmp_path / "run", to="orbax")["bit_exact"]
    figures = convert(tmp_path / "run", tmp_path / "again", to="pytorch")
    assert figures["bit_exact"] and figures["verification"]["tokens_equal"] == 48
    assert all(figures["verification"]["differences"][s]["max"] < 2e-4 for s in ("depth", "image_features", "logits"))
    before, after = load_file(golden / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys() and len(after) == 380
    for key, x in before.items():
        np.testing.assert_array_equal(after[key].view("u4"), x.view("u4"), key, strict=True)


def test_an_export_says_what_the_release_cannot_run(checkpoint, golden, tmp_path, capsys):
    """`convert` prints it, and the card says it too, with data, template and parameters."""
    write_pytorch(tmp_path / "source", checkpoint)
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--to", "pytorch", "--no-verify"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    card = (tmp_path / "out" / "README.md").read_text()
    assert len(figures["release_differences"]) == 2
    for sentence in figures["release_differences"]:
        assert f"- {sentence}\n" in card
        assert f"the release's own code acts differently: {sentence}" in lines
    assert checkpoint.processor.prompt_template in card and "unnorm_key='toy'" in card and "| 90,160 |" in card
    assert "There it acts as here." in model_card(read_huggingface(golden))


def test_load_pretrained_recognises_both(checkpoint, tmp_path):
    write_huggingface(tmp_path / "published", checkpoint)
    convert(tmp_path / "published", tmp_path / "run", to="orbax")
    for path in (tmp_path / "published", tmp_path / "run", tmp_path / "run" / "checkpoints" / "0"):
        model, params, processor = load_pretrained(path)
        assert model.config == checkpoint.config and processor is not None
        np.testing.assert_array_equal(params["ego3d"]["norm"]["scale"], checkpoint.params()["ego3d"]["norm"]["scale"])


def test_convert_to_bfloat16(checkpoint, tmp_path):
    write_huggingface(tmp_path / "a", checkpoint)
    figures = convert(tmp_path / "a", tmp_path / "b", to="orbax", dtype="bfloat16")
    assert figures["bit_exact"] and figures["bytes"] == 2 * 90_160
    assert not equal(read_checkpoint(tmp_path / "a"), read_checkpoint(tmp_path / "b"))


@pytest.mark.parametrize("to", WRITERS)
def test_a_run_of_any_training_options_reads_back_equal(checkpoint, tmp_path, to):
    config = replace(checkpoint.config, remat="dots", unroll=True, mask="causal", dtype="bfloat16")
    write_orbax(tmp_path / "run", replace(checkpoint, config=config))
    assert convert(tmp_path / "run", tmp_path / "b", to=to, verify=False)["bit_exact"]
    assert read_checkpoint(tmp_path / "b").config == config


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("source", WRITERS)
def test_every_tensor_is_read_once(checkpoint, tmp_path, reads, source, to):
    """Opening reads no tensor. Writing reads each once, and the check reads each new one once."""
    WRITERS[source](tmp_path / "a", checkpoint)
    reads.clear()
    read_checkpoint(tmp_path / "a")
    assert reads and all(count == [0] for count in reads)
    reads.clear()
    assert convert(tmp_path / "a", tmp_path / "b", to=to, verify=False)["bit_exact"]
    assert all(count == [1] for count in reads)


@pytest.mark.parametrize("to", WRITERS)
def test_what_is_not_finite_leaves_nothing(checkpoint, tmp_path, to):
    """it was stored like this, or was too large for the new dtype"""
    params = checkpoint.params()
    params["spatial_embedding"] = np.full_like(params["spatial_embedding"], 1e6)
    write_orbax(tmp_path / "large", Checkpoint.of(checkpoint.config, params, None))
    params["spatial_embedding"][3, 5] = np.nan
    params["llm"]["lm_head"] = np.full_like(params["llm"]["lm_head"], np.inf)
    write_orbax(tmp_path / "nan", Checkpoint.of(checkpoint.config, params, None))
    with pytest.raises(InputError, match="nan/checkpoints/0: 2 tensors not finite: llm/lm_head, spatial_embedding"):
        convert(tmp_path / "nan", tmp_path / "b", to=to)
    with pytest.raises(InputError, match="in float16: 1 tensor not finite: spatial_embedding"):
        convert(tmp_path / "large", tmp_path / "b", to=to, dtype="float16")
    assert {p.name for p in tmp_path.iterdir()} == {"large", "nan"}


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("limit", [1, 2000, 20_000])
def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, capfd, to, limit):
    """Wherever writing fails, Orbax's threads print nothing."""
    write_huggingface(tmp_path / "a", checkpoint)
    out = tmp_path / "new" / "b"
    capfd.readouterr()
    with no_room(limit), pytest.raises(InputError, match=f"^{out} cannot be written: File too large$"):
        convert(tmp_path / "a", out, to=to)
    assert capfd.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
@pytest.mark.parametrize("when", ["writing", "reading back"])
def test_a_conversion_that_is_stopped_leaves_nothing(checkpoint, tmp_path, capfd, monkeypatch, to, number, word, when):
    def stop() -> np.ndarray:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was not heard")

    last = list(checkpoint.arrays)[-1]
    stopping = {
        name: LazyArray(x.shape, x.dtype, stop if name == last else x.read) for name, x in checkpoint.arrays.items()
    }
    reads = iter([stopping] if when == "writing" else [checkpoint.arrays, stopping])
    monkeypatch.setattr(
        "spatialvla_jax.export.convert.read_checkpoint", lambda *_: replace(checkpoint, arrays=next(reads))
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    try:
        assert (
            main(["convert", str(tmp_path), str(tmp_path.with_name(f"{tmp_path.name}-b")), "--to", to]) == 128 + number
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == f"spatialvla-jax convert: {word}\n"
    assert not list(tmp_path.parent.glob(f"*{tmp_path.name}-b"))


def test_bad_requests(checkpoint, tmp_path):
    write_huggingface(tmp_path / "a", checkpoint)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for arguments, says in [
        ((tmp_path / "none", tmp_path / "b", "orbax"), "none does not exist"),
        ((tmp_path / "empty", tmp_path / "b", "orbax"), "is not a checkpoint"),
        ((tmp_path / "a", tmp_path / "b", "onnx"), "cannot convert to 'onnx'"),
        ((tmp_path / "a", tmp_path / "b", "orbax", "int8"), "dtype 'int8' is not one of"),
        ((tmp_path / "a", tmp_path / "empty", "orbax"), "empty exists"),
        ((tmp_path / "a", tmp_path / "a" / "b", "orbax"), "b lies inside .*a: choose a destination outside it"),
        ((tmp_path / "a", tmp_path / "link", "orbax"), "link exists"),
        ((tmp_path / "a", tmp_path / ("n" * 300), "orbax"), "cannot be written: File name too long"),
    ]:
        with pytest.raises(InputError, match=says):
            convert(*arguments)
    assert not (tmp_path / "b").exists()
