"""Check that an export acts the same in the release's own code, on the same images and instructions.

    python benchmarks/release.py --release SpatialVLA --checkpoint export --python venv-4.47/bin/python

`--release` is a checkout of the published PyTorch code, `--checkpoint` an export (`convert --to pytorch`) or the
released weights, and `--python` a Python with transformers 4.47.0, torch, torchvision, scipy, sentencepiece and pillow.
The release's five files are added to a copy of the checkpoint (by links; the checkpoint does not change), its processor
is given the rendered prompts, and its `generate` stops after one chunk. Both sides run in float32 and are
unconstrained. Images have the model's size, since the release resizes bicubically but training used Lanczos. The number
of equal tokens for images of 640×480, where each side resizes, is reported but not judged.

Prints a table and one line of JSON; exits with 1 if an id, a prompt, a token or an action differs.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from spatialvla_jax.checkpoints import load_pretrained
from spatialvla_jax.checkpoints.release import release_differences
from spatialvla_jax.errors import InputError
from spatialvla_jax.export.verify import INSTRUCTIONS, make_probes
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.text import BOS, EOS, PAD, render

FILES = (
    "action_tokenizer",
    "configuration_spatialvla",
    "modeling_gemma2",
    "modeling_spatialvla",
    "processing_spatialvla",
)
SENTENCES = (*INSTRUCTIONS, "  Put the   GREEN cup\tback ", "Wipe 3 plates, then stop!", "naïve café – 開ける", "")
CAMERA = (640, 480)
LONGEST_PROMPT = 128  # tokens
LIMIT = 1e-4  # for actions in robot units, decoded in float32 here and in float64 by the release

PROGRAM = """
import sys
import numpy as np, torch, transformers
from PIL import Image
from transformers import AutoModel, AutoProcessor

directory, given, out = sys.argv[1:]
x = np.load(given)
device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
model = AutoModel.from_pretrained(directory, trust_remote_code=True, torch_dtype=torch.float32).to(device).eval()
tokenizer, key = processor.tokenizer, str(x["key"])
images = [Image.fromarray(image) for image in x["image"]]
prompts = [str(prompt) for prompt in x["prompt"]]
one = processor(images=images[:1] * len(prompts), text=prompts, unnorm_key=key, padding=True, return_tensors="pt")
first = processor.action_tokenizer.action_token_begin_idx
results = {
    "layout": [processor.image_token_id, first, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id],
    "prompt_ids": one["input_ids"].numpy(),
    "prompt_mask": one["attention_mask"].numpy(),
    "versions": [f"transformers {transformers.__version__}", f"torch {torch.__version__}", f"release on {device}"],
}
for name in ("image", "camera"):
    tokens, actions = [], []
    for image, prompt in zip(x[name], prompts):
        inputs = processor(images=Image.fromarray(image), text=prompt, unnorm_key=key, return_tensors="pt").to(device)
        with torch.no_grad():
            out_ids = model.generate(**inputs, max_new_tokens=int(x["tokens"]), do_sample=False)
        ids = out_ids[:, inputs["input_ids"].shape[1] :]
        actions.append(processor.decode_actions(ids, unnorm_key=key)["actions"])
        tokens.append(np.pad(ids[0].cpu().numpy(), (0, int(x["tokens"]) - ids.shape[1]), constant_values=-1))
    results |= {f"{name}_tokens": np.stack(tokens), f"{name}_actions": np.stack(actions)}
np.savez(out, **results)
"""


def make_examples(size: int, files: list[Path]) -> dict[str, Any]:
    """{"image" u8[N, S, S, 3], "camera" u8[N, 480, 640, 3], "instruction"}: all sentences, cycling through images."""
    pictures = [Image.open(file).convert("RGB") for file in files] or [
        Image.fromarray(x) for x in make_probes(CAMERA[1])["image"]
    ]
    chosen = [pictures[i % len(pictures)] for i in range(max(len(SENTENCES), len(pictures)))]
    shapes = {"image": (size, size), "camera": CAMERA}
    arrays = {name: np.stack([np.asarray(x.resize(shape)) for x in chosen]) for name, shape in shapes.items()}
    return arrays | {"instruction": [SENTENCES[i % len(SENTENCES)] for i in range(len(chosen))]}


def load_policy(checkpoint: Path) -> Policy:
    """As the release runs it: in float32, unconstrained, with room for any prompt."""
    model, params, processor = load_pretrained(checkpoint)
    if processor is None:
        raise InputError(f"{checkpoint} has weights but no action grid and tokenizer")
    if differences := release_differences(model.config, processor):
        raise InputError(f"the release does not act as {checkpoint}. {' '.join(differences)}")
    config = replace(model.config, dtype="float32", prompt_length=LONGEST_PROMPT)
    return Policy(SpatialVLA(config), params, processor, constrained=False)


def run_policy(policy: Policy, examples: dict[str, Any], key: str) -> dict[str, np.ndarray]:
    """The inputs of `compare` for this project."""
    config, processor = policy.model.config, policy.processor
    ids, mask = processor.tokenizer.encode_prompts(
        examples["instruction"], template=processor.prompt_template, length=config.prompt_length
    )
    rows = [
        [config.text_vocab] * config.img.num_tokens + row[kept].tolist() for row, kept in zip(ids, mask, strict=True)
    ]
    longest = max(map(len, rows))
    out = {
        "layout": np.array([config.text_vocab, config.action_offset, PAD, EOS, BOS]),
        "prompt_ids": np.array([[PAD] * (longest - len(row)) + row for row in rows]),
        "prompt_mask": np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    for name in ("image", "camera"):
        pairs = zip(examples[name], examples["instruction"], strict=True)
        made = [policy.infer({"image": image, "prompt": text, "unnorm_key": key}) for image, text in pairs]
        out[f"{name}_tokens"] = np.stack([x["action_ids"].reshape(-1) for x in made]) + config.action_offset
        out[f"{name}_actions"] = np.stack([x["actions"] for x in made])
    return out


def run_release(python: Path, release: Path, checkpoint: Path, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs of `compare` for the release's code, run by another Python; and "versions"."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "laid_over"
        directory.mkdir()
        for file in checkpoint.resolve().iterdir():
            if file.suffix != ".py":
                (directory / file.name).symlink_to(file)
        for name in FILES:
            shutil.copy(release / f"{name}.py", directory)
        np.savez(given := Path(folder) / "given.npz", **inputs)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{folder}/modules"}
        command = [python, "-c", PROGRAM, directory, given, f"{folder}/out.npz"]
        done = subprocess.run([str(x) for x in command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise InputError(
                f"the release's code failed in {python}: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
            )
        with np.load(f"{folder}/out.npz") as results:
            return dict(results)


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows {"what", "equal", "of", "judged"} of the table, with "difference" for actions. A chunk that the release ends
    early, by `<eos>` (then -1), is compared up to there."""

    def row(what: str, equal: np.ndarray, judged: bool = True, **more: Any) -> dict[str, Any]:
        return {"what": what, "equal": int(equal.sum()), "of": equal.size, "judged": judged, **more}

    def prompts(side: dict[str, np.ndarray]) -> list[tuple[Any, Any]]:
        return list(zip(side["prompt_ids"].tolist(), side["prompt_mask"].tolist(), strict=True))

    rows = [
        row("ids of <image>, first action, pad, eos, bos", ours["layout"] == theirs["layout"]),
        row(
            "prompts, padding included", np.array([a == b for a, b in zip(prompts(ours), prompts(theirs), strict=True)])
        ),
    ]
    for name, where in (("image", "the model's size"), ("camera", "640×480, each side's own resize")):
        judged = name == "image"
        mine, other = ours[f"{name}_tokens"], theirs[f"{name}_tokens"]
        given = other >= 0
        rows.append(row(f"tokens, images of {where}", (mine == other)[given], judged))
        if judged:
            steps = ours[f"{name}_actions"].shape[1]
            whole = given.reshape(len(given), steps, -1).all(-1) & (other != EOS).reshape(len(given), steps, -1).all(-1)
            error = np.abs(ours[f"{name}_actions"] - theirs[f"{name}_actions"])[whole]
            rows.append(row("actions of them", error.max(-1) < LIMIT, difference=float(error.max(initial=0))))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    def found(row: dict[str, Any]) -> str:
        apart = f", at most {row['difference']:.1e} apart" if "difference" in row else ""
        return f"{row['equal']} of {row['of']}{apart}{'' if row['judged'] else ' (not judged)'}"

    return "\n".join(
        ["| the release against JAX, float32 | equal |", "|---|---|", *(f"| {r['what']} | {found(r)} |" for r in rows)]
    )


def passes(rows: list[dict[str, Any]]) -> bool:
    return all(row["equal"] == row["of"] > 0 for row in rows if row["judged"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--release", type=Path, required=True, help="checkout of the release, or the folder of its five files"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="an export, or the released weights")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="with transformers 4.47.0")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="files; by default smooth patterns")
    parser.add_argument("--unnorm-key", help="dataset of statistics and camera; by default the first")
    args = parser.parse_args()

    release = args.release / "model" if (args.release / "model").is_dir() else args.release
    if missing := [name for name in FILES if not (release / f"{name}.py").is_file()]:
        raise InputError(f"{args.release} is not a checkout of the release: {release} has no {missing[0]}.py")
    policy = load_policy(args.checkpoint)
    config, key = policy.model.config, args.unnorm_key or next(iter(policy.processor.statistics))
    examples = make_examples(config.img.image_size, args.images)
    with jax.default_matmul_precision("highest"):
        ours = run_policy(policy, examples, key)
    prompts = [render(text, policy.processor.prompt_template) for text in examples["instruction"]]
    inputs = {name: examples[name] for name in ("image", "camera")}
    inputs |= {"prompt": prompts, "key": key, "tokens": config.num_action_tokens}
    theirs = run_release(args.python, release, args.checkpoint, inputs)
    ok = passes(rows := compare(ours, theirs))
    versions = [
        f"Python {platform.python_version()}",
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}",
        *theirs["versions"].tolist(),
    ]
    print(", ".join(versions))
    print(table(rows))
    print("pass" if ok else "FAIL")
    distinct = len(np.unique(ours["image_tokens"]))
    print(
        json.dumps(
            {
                "benchmark": "release",
                "checkpoint": str(args.checkpoint),
                "ok": ok,
                "rows": rows,
                "distinct_tokens": distinct,
                "versions": versions,
            }
        )
    )
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
