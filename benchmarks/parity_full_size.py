"""Parity of the whole model in JAX and PyTorch on one device, with the same random weights.

    python benchmarks/parity_full_size.py [--preset spatialvla-4b-224] [--observations 64] [--bf16-observations 512]

Exports the weights like `convert --to pytorch`, loads the directory like a user, and runs both on the same random
observations. In float32 (without TF32): largest differences of depth, image features and logits, and the number of
equal greedy tokens in whole chunks, unconstrained, each side with its own key/value cache. In bfloat16: how often each
side's first action token equals its own in float32. Exits with 1 if a float32 token differs, float32 logits differ by
more than 1e-3, or bfloat16 changes more tokens in JAX than in PyTorch. Needs the extra [torch]; at full size 20 GB of
disk, 45 GB of host memory and 80 GB of device memory.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves device memory to PyTorch

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModel

from spatialvla_jax.checkpoints import Checkpoint
from spatialvla_jax.export.convert import write_pytorch
from spatialvla_jax.export.verify import torch_inputs
from spatialvla_jax.inference.generate import generate
from spatialvla_jax.inference.weights import prepare_weights
from spatialvla_jax.models import PRESETS, SpatialVLA, preset
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.models.zoedepth import estimate_depth
from spatialvla_jax.training.state import init_params

LOGITS_LIMIT = 1e-3


def random_params(config: SpatialVLAConfig, seed: int) -> Any:
    """Initial weights in float32 on the host, with noise on constant leaves."""
    params = init_params(SpatialVLA(config), seed)
    leaves, tree = jax.tree.flatten(params)
    del params
    for i, leaf in enumerate(leaves):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed + 1), i), leaf.shape)
        leaves[i] = np.asarray(leaf + 0.02 * noise if leaf.std() == 0 else leaf)
    return jax.tree.unflatten(tree, leaves)


def observations(config: SpatialVLAConfig, count: int, seed: int) -> dict[str, np.ndarray]:
    """Smooth random images, prompts of random tokens and lengths, and random cameras."""
    rng, S, P = np.random.default_rng(seed), config.img.image_size, config.prompt_length
    y, x = np.mgrid[:S, :S] / S
    wave = rng.normal(0, 8, (count, 3, 5, 2))
    angle = wave[..., 0, None, None] * y + wave[..., 1, None, None] * x + rng.uniform(0, 6.3, (count, 3, 5, 1, 1))
    image = (0.5 + 0.3 * np.sin(angle).sum(2)).clip(0, 1).transpose(0, 2, 3, 1)
    mask = np.arange(P) < rng.integers(8, P + 1, (count, 1))
    focal, centre = rng.uniform(0.8, 1.5, count) * S, rng.uniform(0.45, 0.55, (count, 2)) * S
    intrinsics = np.zeros((count, 3, 3))
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, :2, 2], intrinsics[:, 2, 2] = centre, 1
    inputs = {
        "image": (np.round(image * 255) / 255).astype(np.float32),
        "prompt_ids": (rng.integers(2, config.text_vocab, (count, P)) * mask).astype(np.int32),
        "prompt_mask": mask,
        "intrinsics": intrinsics.astype(np.float32),
    }
    return inputs | ({"depth": 1 + image[..., 0].astype(np.float32)} if config.depth_source == "dataset" else {})


def batches(inputs: dict[str, np.ndarray], size: int, what: str) -> Any:
    count = len(inputs["image"])
    for start in tqdm(range(0, count, size), desc=what, mininterval=5):
        yield {name: x[start : start + size] for name, x in inputs.items()}


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def run_jax(
    config: SpatialVLAConfig, params: Any, inputs: dict[str, np.ndarray], size: int, stages: bool
) -> dict[str, np.ndarray]:
    """Ids of first tokens; with `stages` also depth, image features, their logits and the chunks' tokens."""
    model = SpatialVLA(config)

    @jax.jit
    def run(params: Any, inputs: Any) -> dict[str, Any]:
        apply: Any = partial(model.apply, {"params": params})
        nothing = jnp.zeros((len(inputs["image"]), config.num_action_tokens), int)  # the first logits don't see it
        logits = apply(**inputs, action_ids=nothing)[:, 0]
        out = {"first": logits.argmax(-1)}
        if stages:
            image = inputs["image"]
            features = apply(image, inputs.get("depth"), inputs["intrinsics"], method="embed_image")
            tokens = generate(model, prepare_weights(model, params), None, **inputs).tokens
            out |= {"logits": logits, "image_features": features, "tokens": tokens}
            if config.depth_source == "zoedepth":
                zoe_size = config.zoe.backbone.image_size
                out["depth"] = apply(image, method=lambda m, x: estimate_depth(m.zoe, x, zoe_size))
        return out

    params = jax.device_put(jax.tree.map(lambda x: jnp.asarray(x, config.dtype), params))
    with jax.default_matmul_precision("highest"):  # a bfloat16 product has one precision anyway
        return joined([jax.device_get(run(params, part)) for part in batches(inputs, size, f"JAX {config.dtype}")])


def run_torch(
    config: SpatialVLAConfig, directory: Path, dtype: str, inputs: dict[str, np.ndarray], size: int, stages: bool
) -> dict[str, np.ndarray]:
    """The same for the exported directory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype=getattr(torch, dtype)).to(device)
    parts = []
    with torch.no_grad():
        for part in batches(inputs, size, f"PyTorch {dtype}"):
            batch = {name: x.to(device) for name, x in torch_inputs(config, part).items()}
            logits = model(**batch, logits_to_keep=1).logits[:, -1]
            out = {"first": logits.argmax(-1)}
            if stages:
                pixels = batch["pixel_values"]
                features = model.get_image_features(pixels, batch["intrinsic"], batch.get("depth"))
                out |= {"logits": logits, "image_features": features, "tokens": model.predict_action(dict(batch))}
                if config.depth_source == "zoedepth":
                    out["depth"] = model.estimate_depth(pixels)
            parts.append({name: x.float().cpu().numpy() for name, x in out.items()})
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return joined(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="spatialvla-4b-224")
    parser.add_argument("--observations", type=int, default=64, help="number for float32")
    parser.add_argument("--bf16-observations", type=int, default=512, help="number for bfloat16")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(
        f"Python {platform.python_version()}, JAX {jax.__version__} on {jax.devices()[0].device_kind}, "
        f"PyTorch {torch.__version__} on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}, "
        f"transformers {transformers.__version__}"
    )
    began = time.perf_counter()
    config = replace(preset(args.preset), dtype="float32")
    low = replace(config, dtype="bfloat16")
    params = random_params(config, args.seed)
    count = sum(x.size for x in jax.tree.leaves(params))
    many = observations(config, max(args.observations, args.bf16_observations), args.seed)
    few = {name: x[: args.observations] for name, x in many.items()}
    size = args.batch_size
    print(f"{args.preset}: {count:,} random parameters, {time.perf_counter() - began:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "export"
        write_pytorch(directory, Checkpoint.of(config, params, None))
        print(f"exported, {time.perf_counter() - began:.0f} s")
        ours = run_jax(config, params, few, size, stages=True)
        ours_full = run_jax(config, params, many, size, stages=False)["first"]
        ours_low = run_jax(low, params, many, size, stages=False)["first"]
        theirs = run_torch(config, directory, "float32", few, size, stages=True)
        theirs_full = run_torch(config, directory, "float32", many, size, stages=False)["first"]
        theirs_low = run_torch(config, directory, "bfloat16", many, size, stages=False)["first"]

    differences = {}
    for stage in ("depth", "image_features", "logits"):
        if stage in ours:
            error = np.abs(ours[stage].astype(np.float64) - theirs[stage])
            differences[stage] = {"max": float(error.max()), "mean": float(error.mean())}
            spread = float(ours[stage].std())
            print(
                f"float32 {stage:14} max {error.max():.1e}  mean {error.mean():.1e}  (standard deviation {spread:.2g})"
            )
    tokens_equal, tokens = int((ours["tokens"] == theirs["tokens"]).sum()), ours["tokens"].size
    kept = {"jax": int((ours_low == ours_full).sum()), "pytorch": int((theirs_low == theirs_full).sum())}
    N = len(ours_full)
    distinct = len(np.unique(ours["tokens"]))
    print(f"float32 greedy tokens equal: {tokens_equal} of {tokens}, {distinct} of them distinct")
    print(f"first token of bfloat16 = that of float32: JAX {kept['jax']} of {N}, PyTorch {kept['pytorch']} of {N}")
    ok = tokens_equal == tokens and differences["logits"]["max"] <= LOGITS_LIMIT and kept["jax"] >= kept["pytorch"]
    result = {
        "preset": args.preset,
        "parameters": count,
        "device": jax.devices()[0].device_kind,
        "float32": differences | {"tokens": tokens, "tokens_equal": tokens_equal, "distinct_tokens": distinct},
        "bfloat16_first_token_kept": kept
        | {"observations": N, "jax_equals_pytorch": int((ours_low == theirs_low).sum())},
        "seconds": round(time.perf_counter() - began),
        "ok": ok,
    }
    print(json.dumps(result))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
