"""The exported directory in a Python of its own, where JAX and this package cannot be imported."""

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

PROGRAM = """
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
    model.save_pretrained(root + "/saved")

    probes = np.load(root + "/probes.npz")
    for name in ("dataset", "none"):
        model = load(f"{root}/{name}")
        processor = AutoProcessor.from_pretrained(f"{root}/{name}", trust_remote_code=True)
        for i, text in enumerate(probes["text"]):
            depth = probes["depth"][i] if name == "dataset" else None
            inputs = processor(images=probes["image"][i], text=str(text), depth=depth)
            ids = model.predict_action(inputs)
            results[f"{name}_{i}"] = torch.from_numpy(processor.decode_actions(ids, unnorm_key="toy")["actions"])
np.savez(out, **{name: tensor.numpy() for name, tensor in results.items()})
"""


@pytest.fixture(scope="module")
def exports(checkpoint, processor, tmp_path_factory):
    """{name: checkpoint}: depth inside the model, from the caller (causal, 3 steps), and none with a linear grid."""
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


@pytest.mark.parametrize("name", ["dataset", "none"])
def test_processor_and_model_act_as_the_policy(results, exports, name):
    """From image and sentence to robot units, with both kinds of grid and mask."""
    checkpoint, probes = exports[1][name], make_probes(56)
    policy = Policy(SpatialVLA(checkpoint.config), checkpoint.params(), checkpoint.processor)
    for i, text in enumerate(INSTRUCTIONS):
        observation = {"image": probes["image"][i], "prompt": text, "depth": probes["depth"][i]}
        expected = policy.infer(observation)["actions"]
        np.testing.assert_allclose(results[f"{name}_{i}"], expected, rtol=0, atol=1e-5)


def test_names_and_bytes_stay_the_published_ones(results, exports):
    """In the export and in what PyTorch saves of it, whatever transformers calls its parts in memory."""
    published = load_file("tests/golden/tiny_model/model.safetensors")
    for name in ("zoedepth", "saved"):
        tensors = load_file(exports[0] / name / "model.safetensors")
        assert tensors.keys() == published.keys()
        assert all(tensors[key].tobytes() == published[key].tobytes() for key in published)


def test_classes_are_where_the_release_has_them(exports):
    """`auto_map` names its files, so that its own code in their place is found."""
    folder = exports[0] / "zoedepth"
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_spatialvla.SpatialVLAConfig",
        "AutoModel": "modeling_spatialvla.SpatialVLAForConditionalGeneration",
    }
    for file in ("processor_config.json", "preprocessor_config.json"):
        auto_map = json.loads((folder / file).read_text())["auto_map"]
        assert auto_map == {"AutoProcessor": "processing_spatialvla.SpatialVLAProcessor"}
    assert not (exports[0] / "none" / "processor_config.json").exists()  # it has no linear grids
