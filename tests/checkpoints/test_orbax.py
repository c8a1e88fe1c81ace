import json
import random
import shutil
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.checkpoints import equal
from helpers.full_disk import no_room

from spatialvla_jax.checkpoints import (
    Checkpoint,
    mapping,
    orbax,
    read_checkpoint,
    read_orbax,
    write_huggingface,
    write_orbax,
)
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.convert import cast


def save_run(workdir, checkpoint, *, step=7, params=None, metadata=None):
    """A checkpoint as written by earlier versions of training: device arrays, an optimizer, no checksums."""
    params = jax.tree.map(jnp.asarray, checkpoint.params() if params is None else params)
    facts = {"model": checkpoint.config.to_dict(), "processor": checkpoint.processor.to_dict(), "train_config": {}}
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        optimizer=ocp.args.StandardSave({"mu": jnp.zeros(3)}),
        metadata=ocp.args.JsonSave({"step": step, **(facts if metadata is None else metadata)}),
    )
    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        manager.save(step, args=items)
        manager.wait_until_finished()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_we_write_we_read_back(checkpoint, tmp_path, dtype):
    stored = cast(checkpoint, dtype)
    write_orbax(tmp_path / "run", stored)
    assert equal(read_orbax(tmp_path / "run"), stored)
    assert equal(read_orbax(tmp_path / "run" / "checkpoints" / "0"), stored)


def test_leaves_larger_than_a_chunk(checkpoint, tmp_path, monkeypatch):
    """Chunks that do not divide an array evenly, and zeros of both signs."""
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 5000)
    params = checkpoint.params()
    params["spatial_embedding"] = np.full_like(params["spatial_embedding"], -0.0)
    stored = Checkpoint.of(checkpoint.config, params, checkpoint.processor)
    write_orbax(tmp_path / "run", stored)
    assert equal(read_orbax(tmp_path / "run"), stored)
    with ocp.CheckpointManager((tmp_path / "run" / "checkpoints").absolute()) as manager:
        restored = manager.restore(0, args=ocp.args.Composite(params=ocp.args.StandardRestore()))["params"]
    jax.tree.map(np.testing.assert_array_equal, restored, params)


@pytest.mark.parametrize("write", [write_orbax, write_huggingface])
def test_one_leaf_at_a_time(checkpoint, tmp_path, write):
    held = []

    def counted(array):
        def read():
            assert not any(x() is not None for x in held)
            x = array.read().copy()
            held.append(weakref.ref(x))
            return x

        return replace(array, read=read)

    write(tmp_path / "out", replace(checkpoint, arrays={path: counted(x) for path, x in checkpoint.arrays.items()}))
    assert len(held) >= len(checkpoint.arrays)


def test_a_training_run_gives_its_newest_step(checkpoint, tmp_path):
    old = jax.tree.map(np.zeros_like, checkpoint.params())
    save_run(tmp_path, checkpoint, step=3, params=old)
    save_run(tmp_path, checkpoint, step=20)
    (tmp_path / "checkpoints" / "30.orbax-checkpoint-tmp-1").mkdir()  # killed while saving
    assert equal(read_orbax(tmp_path), checkpoint)
    assert not np.any(read_orbax(tmp_path / "checkpoints" / "3").params()["spatial_embedding"])


def test_bad_runs_are_named(checkpoint, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no complete checkpoint"):
        read_orbax(tmp_path)

    llm = replace(checkpoint.config.llm, vocab_size=432)
    other = {"model": replace(checkpoint.config, spatial_tokens=131, llm=llm).to_dict(), "processor": None}
    params = checkpoint.params()
    table = params.pop("spatial_embedding")
    for name, changes, says in [
        ("a", {"metadata": {"model": {"img": {}}}}, "metadata: processor is missing"),
        ("b", {"metadata": other}, r"spatial_embedding \(130, 24\) instead of \(131, 24\)"),
        ("c", {"params": params}, "1 tensor missing for its config: spatial_embedding"),
    ]:
        save_run(tmp_path / name, checkpoint, **changes)
        with pytest.raises(InputError, match=says):
            read_orbax(tmp_path / name)
    save_run(tmp_path / "d", checkpoint, params=params | {"spatial_embedding": np.full_like(table, np.nan)})
    with pytest.raises(InputError, match="1 tensor not finite: spatial_embedding"):
        read_orbax(tmp_path / "d").params()


def test_damaged_files_are_named(checkpoint, tmp_path):
    write_orbax(tmp_path / "run", checkpoint)
    step = tmp_path / "run" / "checkpoints" / "0"
    for data in (step / "params").rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(InputError, match="params cannot be read"):
        read_orbax(tmp_path / "run").params()
    (step / "metadata" / "metadata").write_text("{")
    with pytest.raises(InputError, match="0/metadata/metadata is missing or truncated"):
        read_orbax(tmp_path / "run")


@pytest.mark.parametrize("write", [write_orbax, write_huggingface])
def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, write):
    with no_room(20_000), pytest.raises(InputError, match="run cannot be written"):
        write(tmp_path / "run", checkpoint)
    assert list(tmp_path.iterdir()) == []


def test_metadata_is_what_training_writes(checkpoint, tmp_path):
    write_orbax(tmp_path / "run", checkpoint)
    metadata = json.loads((tmp_path / "run" / "checkpoints" / "0" / "metadata" / "metadata").read_text())
    assert metadata.keys() == {"step", "model", "processor", "train_config"} and metadata["step"] == 0


def damages(content, rng, flips):
    """(damage, the damaged content) for one file."""
    yield from (("deleted", None), ("empty", b""), ("halved", content[: len(content) // 2]))
    yield from (("zeros", bytes(len(content))), ("noise", rng.randbytes(len(content))))
    for n in (rng.randrange(len(content)) for _ in range(flips)):
        yield f"bit in byte {n}", content[:n] + bytes([content[n] ^ 1 << rng.randrange(8)]) + content[n + 1 :]


def survives_damage(files, read, flips):
    """Damage each of `files` in turn: `read` must give its earlier result or raise one line. Returns {file: [(damage,
    line)]} of those that raised."""
    expected, rng, found = read(), random.Random(0), {}
    for file in files:
        content, found[file] = file.read_bytes(), []
        for what, damaged in damages(content, rng, flips):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            try:
                assert read() == expected, (file, what)
            except InputError as error:
                assert "\n" not in str(error)
                found[file].append((what, str(error)))
        file.write_bytes(content)
    return found


def test_each_file_damaged_in_turn(tmp_path):
    """Damages a checkpoint of training: reading raises one line or, if the file is not needed, gives the original."""
    tree = {"a": {"k": jax.random.normal(jax.random.key(0), (40, 30)), "z": jnp.zeros(5)}, "b": jnp.bfloat16([1, -0.0])}
    handlers = {"params": orbax.tree_handler(), "metadata": ocp.JsonCheckpointHandler()}
    items = ocp.args.Composite(params=ocp.args.PyTreeSave(tree), metadata=ocp.args.JsonSave({"step": 1}))
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        manager.save(1, args=items)
    step = tmp_path / "1"

    def read():
        return {path: (x.shape, x.dtype, x.read().tobytes()) for path, x in orbax.open_params(step).items()}

    assert read() == {p: (x.shape, x.dtype, np.asarray(x).tobytes()) for p, x in mapping.flatten(tree).items()}
    files = sorted(file for file in step.rglob("*") if file.is_file())
    found = survives_damage(files, read, flips=8)
    for file, name in (
        (step / "params" / "_METADATA", "_METADATA"),
        (step / "params" / "manifest.ocdbt", "manifest.ocdbt"),
    ):
        assert found[file][0] == ("deleted", f"{step / 'params' / name} is missing or truncated")
    data = max(files, key=lambda file: file.stat().st_size)
    assert len(found[data]) > 10


def test_a_flipped_bit_does_not_load(checkpoint, tmp_path):
    """Flips a bit in a run's files, and in those of a conversion."""
    write_orbax(tmp_path / "run", checkpoint)
    params = tmp_path / "run" / "checkpoints" / "0" / "params"
    data = max(params.rglob("d/*"), key=lambda file: file.stat().st_size)
    content = data.read_bytes()
    for n in range(500, len(content), len(content) // 4):
        data.write_bytes(content[:n] + bytes([content[n] ^ 1]) + content[n + 1 :])
        with pytest.raises(InputError, match="params cannot be read at"):
            read_orbax(tmp_path / "run").params()


@pytest.mark.slow
def test_each_file_of_a_run_damaged_in_turn(trained, tmp_path):
    shutil.copytree(trained / "checkpoints" / "10", tmp_path / "checkpoints" / "10")
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file() and file.parent.name != "metadata")

    def read():
        return {path: x.read().tobytes() for path, x in read_checkpoint(tmp_path).arrays.items()}

    assert survives_damage(files, read, flips=5)
