"""benchmarks/release.py, with a stub for the release's processor and, where no model runs, for its Python."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.checkpoints import checkpoint, processor  # noqa: F401
from helpers.release_processor import ReleaseProcessor

from spatialvla_jax.actions import decode
from spatialvla_jax.actions.normalization import unnormalize
from spatialvla_jax.checkpoints import write_huggingface
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.convert import write_pytorch
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.text import render

spec = importlib.util.spec_from_file_location("bench_release", Path(__file__).parents[1] / "benchmarks" / "release.py")
assert spec and spec.loader
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.fixture(scope="module")
def sides(checkpoint, tmp_path_factory):  # noqa: F811
    """Inputs of `compare`: from a policy that returns anything, and from the stub with that policy's tokens."""
    directory, draw = tmp_path_factory.mktemp("bench") / "export", np.random.default_rng(0)
    write_huggingface(directory, checkpoint)
    config, own = checkpoint.config, checkpoint.processor

    def infer(observation):
        ranges = own.grid.token_ranges
        ids = np.array([[draw.integers(first, first + n) for first, n in ranges] for _ in range(config.action_chunk)])
        statistics = own.statistics[observation["unnorm_key"]]["action"]
        return {"action_ids": ids, "actions": unnormalize(np.asarray(decode(own.grid, ids)), statistics)}

    policy = SimpleNamespace(model=SpatialVLA(replace(config, prompt_length=128)), processor=own, infer=infer)
    examples = bench.make_examples(config.img.image_size, [])
    assert examples["camera"].shape == (len(bench.SENTENCES), 480, 640, 3) and examples["camera"].std() > 20
    examples = {name: x[3:5] for name, x in examples.items()}
    ours = bench.run_policy(policy, examples, "toy")

    stand_in = ReleaseProcessor(directory)
    prompts = [render(text, own.prompt_template) for text in examples["instruction"]]
    ids, mask = stand_in.encode(prompts)
    layout = [stand_in.ids[name] for name in ("image", "action", "pad_token", "eos_token", "bos_token")]
    theirs = {"layout": np.array(layout), "prompt_ids": ids, "prompt_mask": mask}
    for name in ("image", "camera"):
        tokens = ours[f"{name}_tokens"]
        actions = [stand_in.decode_actions(row.reshape(-1, 3), "toy") for row in tokens]
        theirs |= {f"{name}_tokens": tokens, f"{name}_actions": np.stack(actions)}
    np.testing.assert_allclose(stand_in.pixels(examples["image"][0]), examples["image"][0].transpose(2, 0, 1) / 255)
    return ours, theirs


def test_equal_sides_pass(sides):
    rows = bench.compare(*sides)
    assert [(row["equal"], row["of"]) for row in rows] == [(5, 5), (2, 2), (18, 18), (6, 6), (18, 18)]
    assert bench.passes(rows) and "| tokens, images of the model's size | 18 of 18 |" in bench.table(rows)


def changed(name, at, by):
    def change(side):
        x = side[name].copy()
        x[at] += by
        return side | {name: x}

    return change


@pytest.mark.parametrize(
    "change, row",
    [
        (changed("layout", 1, 1109), 0),
        (changed("prompt_ids", (0, -3), 1), 1),
        (changed("prompt_mask", (0, 20), -1), 1),
        (changed("image_tokens", (1, 4), 1), 2),
        (changed("image_actions", (1, 2, 6), 1e-2), 3),
    ],
)
def test_a_difference_is_counted_and_fails(sides, change, row):
    rows = bench.compare(sides[0], change(sides[1]))
    assert [i for i, r in enumerate(rows) if r["equal"] < r["of"]] == [row]
    assert rows[row]["equal"] == rows[row]["of"] - 1 and not bench.passes(rows)


def test_the_cameras_size_is_reported_alone(sides):
    rows = bench.compare(sides[0], changed("camera_tokens", (0, 0), 1)(sides[1]))
    assert rows[-1]["equal"] == 17 and bench.passes(rows) and "17 of 18 (not judged)" in bench.table(rows)


def test_a_chunk_that_ends_early_counts_up_to_its_end(sides):
    """The release stops at `<eos>`; the policy continues to the end of the chunk."""
    ours, theirs = (side | {"image_tokens": side["image_tokens"].copy()} for side in sides)
    ours["image_tokens"][0, 4] = theirs["image_tokens"][0, 4] = bench.EOS
    theirs["image_tokens"][0, 5:] = -1
    rows = bench.compare(ours, theirs)
    assert [(row["equal"], row["of"]) for row in rows[2:4]] == [(14, 14), (4, 4)] and bench.passes(rows)


def test_the_releases_files_are_laid_over(checkpoint, tmp_path):  # noqa: F811
    """It runs in its own folder and returns its results; if its Python fails, the error is passed on."""
    write_pytorch(tmp_path / "export", checkpoint)
    before = sorted(file.name for file in (tmp_path / "export").iterdir())
    (tmp_path / "release").mkdir()
    for name in bench.FILES:
        (tmp_path / "release" / f"{name}.py").write_text("release")
    np.savez(tmp_path / "made.npz", layout=np.arange(5))
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nls "$3" > {tmp_path}/list; cat "$3"/*.py > {tmp_path}/code; cp {tmp_path}/made.npz "$5"\n'
    )
    python.chmod(0o755)
    found = bench.run_release(python, tmp_path / "release", tmp_path / "export", {"tokens": 12})
    np.testing.assert_array_equal(found["layout"], np.arange(5))
    listed = (tmp_path / "list").read_text().split()
    ours = {name for name in before if not name.endswith(".py")}
    assert (
        set(listed) == ours | {f"{name}.py" for name in bench.FILES}
        and (tmp_path / "code").read_text() == "release" * 5
    )
    assert sorted(file.name for file in (tmp_path / "export").iterdir()) == before
    python.write_text("#!/bin/sh\necho no module named torch >&2; exit 3\n")
    with pytest.raises(InputError, match="no module named torch"):
        bench.run_release(python, tmp_path / "release", tmp_path / "export", {"tokens": 12})


def test_a_model_that_the_release_cannot_run_is_refused(checkpoint, tmp_path):  # noqa: F811
    write_huggingface(tmp_path / "export", checkpoint)
    with pytest.raises(
        InputError, match=r"does not act as .*export\. Depth comes with the image.* Attention is causal"
    ):
        bench.load_policy(tmp_path / "export")
