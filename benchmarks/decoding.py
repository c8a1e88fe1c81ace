"""Effect of precision, unconstrained decoding and speculation, on validation episodes of a trained policy.

    python benchmarks/decoding.py --checkpoint runs/demo/run [--split val] [--episodes 0]

Compares tokens and actions of each variant with float32's, over every frame. Then simulates speculation along each
episode, with a chunk every `action_chunk` frames (open loop) or at every frame, drafted from the previous chunk: decode
passes and milliseconds, with and without a draft. Ends with one line of JSON.
"""

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spatialvla_jax.batch import Batch
from spatialvla_jax.cli.arguments import Parser, count, state_defaults
from spatialvla_jax.config import train_config_of
from spatialvla_jax.data import Episode, Loader, open_data
from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation.open_loop import predict
from spatialvla_jax.inference.action_chunking import shift
from spatialvla_jax.inference.policy import Policy

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "free": {"dtype": "float32", "constrained": False},
}


def compare(checkpoint: Path, episodes: list[Episode]) -> dict[str, Any]:
    """For each variant: share of tokens equal to float32's, L1 to its actions and to the expert's (normalised)."""
    figures, reference = {}, None
    for name, options in VARIANTS.items():
        policy = Policy.load(checkpoint, **options)
        ids, actions = (np.concatenate(x) for x in zip(*(predict(policy, e.frames, 32) for e in episodes), strict=True))
        reference = reference or (ids, actions)
        mask = np.concatenate([e.frames.action_mask for e in episodes])
        expert = np.concatenate([e.frames.actions for e in episodes])
        figures[name] = {
            "tokens_equal": round(float((ids == reference[0]).mean()), 5),
            "l1_from_float32": round(float(np.abs(actions - reference[1]).mean()), 6),
            "l1_from_expert": round(float(np.abs(actions - expert)[mask].mean()), 5),
        }
        print(f"{name:10} " + ", ".join(f"{k} {v}" for k, v in figures[name].items()), flush=True)
    return figures


def drive(policy: Policy, frames: Batch, every: int, speculate: bool) -> list[dict[str, Any]]:
    """Chunks along an episode, each drafted from the remaining actions of the previous one, its last repeated."""
    seen, chunks, draft = frames.model_inputs(), [], None
    for frame in range(0, len(frames.image), every):
        inputs = jax.tree.map(lambda x, frame=frame: x[frame : frame + 1], seen)
        if speculate:
            inputs["draft"] = policy.draft(draft)[None]
        began = time.perf_counter()
        out = jax.device_get(policy.run(inputs))
        chunks.append({"ms": 1e3 * (time.perf_counter() - began), "passes": int(out["passes"])})
        chunks[-1]["ids"] = ids = out["action_ids"][0]
        draft = shift(ids, every)
    return chunks


def speculation(checkpoint: Path, episodes: list[Episode]) -> dict[str, Any]:
    plain, guessing = Policy.load(checkpoint), Policy.load(checkpoint, speculate=True)
    figures = {}
    for name, every in (("open_loop", plain.model.config.action_chunk), ("every_frame", 1)):
        runs = {}
        for speculate, policy in ((False, plain), (True, guessing)):
            drive(policy, jax.tree.map(lambda x: x[:1], episodes[0].frames), 1, speculate)
            runs[speculate] = [chunk for e in episodes for chunk in drive(policy, e.frames, every, speculate)]
        same = all((a["ids"] == b["ids"]).all() for a, b in zip(runs[False], runs[True], strict=True))
        passes = [chunk["passes"] for chunk in runs[True]]
        figures[name] = {
            "chunks": len(passes),
            "tokens_equal": same,
            "passes_without": statistics.mean(chunk["passes"] for chunk in runs[False]),
            "passes": round(statistics.mean(passes), 2),
            "draft_right": round(passes.count(0) / len(passes), 3),
            "ms_without": round(statistics.median(chunk["ms"] for chunk in runs[False]), 2),
            "ms": round(statistics.median(chunk["ms"] for chunk in runs[True]), 2),
        }
        print(f"{name:12} " + ", ".join(f"{k} {v}" for k, v in figures[name].items()), flush=True)
    return figures


def load_episodes(checkpoint: Path, split: str, count: int) -> list[Episode]:
    processor = Policy.load(checkpoint).processor
    loader: Loader = open_data(train_config_of(checkpoint), processor.statistics, processor.tokenizer)
    if any("action_row" in index.arrays for index in loader.indexes(split)):
        raise InputError(f"split {split!r} has images of some steps only: speculation needs the chunks of every step")
    episodes = list(loader.episodes(split))
    return episodes[:count] if count else episodes


def main() -> None:
    parser = Parser(prog="spatialvla-jax bench decoding", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--episodes", type=count, default=0, help="0: all")
    state_defaults(parser)
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"Python {platform.python_version()}, JAX {jax.__version__}, {device}, {args.checkpoint}")
    episodes = load_episodes(args.checkpoint, args.split, args.episodes)
    frames = sum(len(e.frames.image) for e in episodes)
    print(f"{len(episodes)} episodes, {frames} frames")
    result = {"benchmark": "decoding", "device": device, "checkpoint": str(args.checkpoint), "frames": frames}
    result |= {"variants": compare(args.checkpoint, episodes), "speculation": speculation(args.checkpoint, episodes)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
