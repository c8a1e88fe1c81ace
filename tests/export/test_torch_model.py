"""The exported directory in a separate Python that cannot import JAX or this package."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from spatialvla_jax.actions import linear_grid
from spatialvla_jax.checkpoints import read_huggingface
from spatialvla_jax.export.convert import write_pytorch
from spatialvla_jax.export.verify import INSTRUCTIONS, make_probes
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.models.resize import resize_observation

PROGRAM = """
import copy
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"jax", "jaxlib", "flax", "orbax", "spatialvla_jax"}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

def load(name):
    model, info = AutoModel.from_pretrained(name, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    return model

root, golden, out = sys.argv[1:]
x = {name: torch.from_numpy(array) for name, array in np.load(golden).items()}
results = {}

with torch.no_grad():
    model = load(root + "/zoedepth")
    results["depth"] = model.estimate_depth(x["pixel_values"])  # a batch: every example votes for itself
    results["image_features"] = model.get_image_features(x["pixel_values"], x["intrinsic"])
    prompts = [x[f"prompt_ids_{i}"] for i in range(3)]
    for i, ids in enumerate(prompts):
        results[f"logits_{i}"] = model(ids, None, x["pixel_values"][i : i + 1], x["intrinsic"][i : i + 1]).logits
    types, first = x["train_token_type_ids"][:1], x["pixel_values"][:1]
    results["train_logits"] = model(
        x["train_input_ids"][:1], None, first, x["intrinsic"][:1], token_type_ids=types
    ).logits
    longest = max(ids.shape[1] for ids in prompts)
    pad = lambda ids, value: torch.nn.functional.pad(ids, (longest - ids.shape[1], 0), value=value)
    batch = {
        "input_ids": torch.cat([pad(ids, 0) for ids in prompts]),
        "attention_mask": torch.cat([pad(torch.ones_like(ids), 0) for ids in prompts]),
        "pixel_values": x["pixel_values"],
        "intrinsic": x["intrinsic"],
    }
    results["greedy"] = model.predict_action(batch)
    # What a GPU records as a graph, run here step by step.
    package = type(model).__module__.rpartition(".")[0]
    generation, ego3d = (sys.modules[f"{package}.{name}_spatialvla"] for name in ("generation", "ego3d"))
    padded = generation.pad_prompt(batch)
    assert padded["input_ids"].shape[1] % 32 == 0 and padded["input_ids"].shape[1] > longest
    with ego3d.constant_position_bias(model.vision_zoe_model) as constants:
        results["graph"], failed = generation.greedy_chunk(model, padded, None)
    assert constants and not failed.any()
    broken = {**padded, "intrinsic": padded["intrinsic"].clone().fill_(torch.nan)}
    assert generation.greedy_chunk(model, broken, None)[1].all()
    model._graphs["shapes"] = sys  # a graph cannot be copied, nor can this
    assert not copy.deepcopy(model)._graphs
    model.save_pretrained(root + "/saved")

    probes = np.load(root + "/probes.npz")
    for name in ("dataset", "none"):
        model = load(f"{root}/{name}")
        processor = AutoProcessor.from_pretrained(f"{root}/{name}", trust_remote_code=True)
        for i, text in enumerate(probes["text"]):
            depth = probes["depth"][i] if name == "dataset" else None
            inputs = processor(images=probes["image"][i], text=str(text), depth=depth)
            for key in ("pixel_values", "intrinsic", *(("depth",) if name == "dataset" else ())):
                results[f"{name}_{i}_{key}"] = inputs[key][0]
            ids = model.predict_action(inputs)
            ranges = inputs.pop("token_ranges").tolist()
            again, failed = generation.greedy_chunk(model, generation.pad_prompt(inputs), ranges)
            assert torch.equal(again, ids) and not failed.any()
            results[f"{name}_{i}"] = torch.from_numpy(processor.decode_actions(ids, unnorm_key="toy/1.0.0")["actions"])

def see(**changes):
    seen = {"intrinsics": probes["intrinsics"][0], "depth": probes["depth"][0]} | changes
    return processor(probes["image"][0], "go", **seen)

def refused(**changes):
    try:
        see(**changes)
    except ValueError as error:
        return str(error)

counts = np.rint(probes["depth"][0] * 1000).astype(np.uint16)
assert torch.allclose(see(depth=counts, depth_unit=0.001)["depth"], see()["depth"], atol=5e-4)
assert "depth must be metres as floating-point numbers, got uint16" in refused(depth=counts)
assert "depth must be finite" in refused(depth=probes["depth"][0] * np.nan)
assert "depth must be metres of shape" in refused(depth=counts[1:], depth_unit=0.001)
assert "depth_unit must be metres per count" in refused(depth_unit=-1)
assert "intrinsics must have the last row" in refused(intrinsics=np.zeros((3, 3)))
assert "intrinsics looks relative to the image" in refused(intrinsics=[[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
processor.intrinsics["default"] = 2 * processor.intrinsics["toy"]
focal = [see(intrinsics=None, unnorm_key=key)["intrinsic"][0, 0, 0] for key in ("toy", "toy/1.0.0", None, "x")]
assert focal[0] == focal[1] and focal[2] == focal[3] == 2 * focal[0], focal
np.savez(out, **{name: tensor.numpy() for name, tensor in results.items()})
"""


@pytest.fixture(scope="module")
def exports(checkpoint, processor, tmp_path_factory):
    """{name: checkpoint}: depth estimated inside; depth given (causal mask, 3 steps); no depth, with a linear grid."""
    folder = tmp_path_factory.mktemp("exports")
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, prompt_length=40))
    without = {path: array for path, array in checkpoint.arrays.items() if not path.startswith("ego3d/")}
    none = replace(checkpoint.config, depth_source="none", mask="prefix", action_chunk=2, tokens_per_action=7)
    golden = read_huggingface("tests/golden/tiny_model")
    checkpoints = {
        "zoedepth": replace(golden, processor=processor),
        "dataset": checkpoint,
        "none": replace(checkpoint, config=none, arrays=without, processor=replace(processor, grid=linear_grid(128))),
    }
    for name, each in checkpoints.items():
        write_pytorch(folder / name, each)
    return folder, checkpoints


@pytest.fixture(scope="module")
def results(exports):
    folder, _ = exports
    np.savez(folder / "probes.npz", text=np.array(INSTRUCTIONS), **make_probes(56))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", PROGRAM, folder, "tests/golden/tiny_model_io.npz", folder / "out.npz"]
    done = subprocess.run([str(x) for x in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folder / "out.npz")


@pytest.fixture(scope="module")
def golden():
    return np.load("tests/golden/tiny_model_io.npz")


def test_golden_stages_and_tokens(results, golden):
    def stacked(name):
        return np.concatenate([golden[f"{name}_{i}"] for i in range(3)])

    close = {"rtol": 0, "atol": 2e-4}
    np.testing.assert_allclose(results["depth"], stacked("depth")[:, 0], **close)
    np.testing.assert_allclose(results["image_features"], stacked("image_features"), **close)
    for i in range(3):
        np.testing.assert_allclose(results[f"logits_{i}"], golden[f"prefill_logits_{i}"], **close)
    np.testing.assert_allclose(results["train_logits"], golden["train_logits"][:1], **close)
    np.testing.assert_array_equal(results["greedy"], stacked("greedy_ids"))
    np.testing.assert_array_equal(results["graph"], results["greedy"])


@pytest.mark.parametrize("name", ["dataset", "none"])
def test_processor_and_model_act_as_the_policy(results, exports, name):
    """From image and instruction to robot units, for both kinds of grid and mask.

    Resized pixels agree within one level, since two implementations round them. Equal pixels give equal actions.
    """
    checkpoint, probes = exports[1][name], make_probes(56)
    policy = Policy(SpatialVLA(checkpoint.config), checkpoint.params(), checkpoint.processor)
    for i, text in enumerate(INSTRUCTIONS):
        ready = policy.prepare({"image": probes["image"][i], "prompt": text, "depth": probes["depth"][i]})
        resized = resize_observation(ready["image"], ready.get("depth"), ready["intrinsics"], size=56)
        pixels = np.rint(results[f"{name}_{i}_pixel_values"].transpose(1, 2, 0) * 255).astype(np.uint8)
        assert np.abs(np.asarray(resized["image"], int) - pixels).max() <= 1
        np.testing.assert_allclose(resized["intrinsics"], results[f"{name}_{i}_intrinsic"], rtol=1e-6)
        seen = {"image": pixels, "intrinsics": results[f"{name}_{i}_intrinsic"], "prompt": text}
        if name == "dataset":
            np.testing.assert_array_equal(resized["depth"], depth := results[f"{name}_{i}_depth"])
            seen["depth"] = depth
        np.testing.assert_allclose(results[f"{name}_{i}"], policy.infer(seen)["actions"], rtol=0, atol=1e-5)


def test_names_and_bytes_stay_the_published_ones(results, exports):
    """In the export and in what PyTorch saves from it, whatever names transformers uses in memory."""
    published = load_file("tests/golden/tiny_model/model.safetensors")
    for name in ("zoedepth", "saved"):
        tensors = load_file(exports[0] / name / "model.safetensors")
        assert tensors.keys() == published.keys()
        assert all(tensors[key].tobytes() == published[key].tobytes() for key in published)


def test_classes_are_where_the_release_has_them(exports):
    """`auto_map` names the release's files, so the release's own code can replace ours."""
    folder = exports[0] / "zoedepth"
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_spatialvla.SpatialVLAConfig",
        "AutoModel": "modeling_spatialvla.SpatialVLAForConditionalGeneration",
    }
    for file in ("processor_config.json", "preprocessor_config.json"):
        auto_map = json.loads((folder / file).read_text())["auto_map"]
        assert auto_map == {"AutoProcessor": "processing_spatialvla.SpatialVLAProcessor"}
    assert not (exports[0] / "none" / "processor_config.json").exists()  # it has no linear grids
