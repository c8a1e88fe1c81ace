"""How precisely a policy needs to localise objects, and how precisely a trained one does.

**Needed precision:** behaviour cloning from the simulator's state instead of images.

    spatialvla-jax record libero --episodes 1400 --val-episodes 100 --initial-states drawn --noise 0.2 --spread 0 \\
        --out runs/motions.npz
    python benchmarks/sight.py --motions runs/motions.npz [--offsets 0,0.01,0.02,0.04] [--episodes 10]

A small network learns chunks of four actions from the task, the pose of the hand and the positions of objects relative
to it, and is evaluated closed loop on LIBERO-Spatial like a policy with a camera. Its failures are not due to
perception. Then the bowl's position in its input is shifted by an offset, constant during an episode and normally
distributed, with the given standard deviation along each axis: the remaining success bounds that of a policy of this
precision. Ends with a table and one line of JSON. Rerun the same command to resume after an interruption.

**Actual precision:** the position of the object to move, predicted from the features of a trained policy.

    python benchmarks/sight.py --run RUN --packed spatial.pack [--frames 4000]

Linear probes (ridge regression) from the frozen policy to the object's position are fitted on train frames and tested
on validation frames. Their inputs are the language model's state after the prompt, which determines the first action
token, and the image tokens averaged over 4×4 regions; a baseline knows only the instruction. Errors are in centimetres
along the camera's and the robot's axes, for all frames and for those before the fingers first close: afterwards the
hand shows the position. A large error does not prove that the policy lacks the information, since the policy is not
linear. Compare runs on the same file and frames, rendered without jitter. Then the open-loop error of the chunk's
translation, the sum of its commands at 5 cm per unit: of the policy, of the action grid alone, and of the mean action.
"""

import argparse
import itertools
import json
import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from tqdm import tqdm

from spatialvla_jax.actions import decode, encode
from spatialvla_jax.actions.normalization import unnormalize
from spatialvla_jax.batch import Batch
from spatialvla_jax.checkpoints import fingerprint, load_pretrained
from spatialvla_jax.cli.arguments import amount, local_path, positive
from spatialvla_jax.config import train_config_of
from spatialvla_jax.data import Loader, open_data
from spatialvla_jax.data.pack import packed_digest
from spatialvla_jax.errors import FaultsError, InputError
from spatialvla_jax.evaluation import closed_loop
from spatialvla_jax.evaluation.rollouts import Episode, Settings, padded
from spatialvla_jax.inference.action_chunking import executor
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.sim import libero_env as libero
from spatialvla_jax.sim import scripted_expert as expert
from spatialvla_jax.sim.libero import proprioception
from spatialvla_jax.sim.motions import load_motions
from spatialvla_jax.sweep.provenance import provenance
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.training.step import prepare
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.progress import progress_bar
from spatialvla_jax.utils.tables import text_table

SUITE, CHUNK, WIDTH = "libero_spatial", 4, 512
OBJECTS = slice(9, 44)  # of qpos: after arm and fingers, positions and quaternions of five objects
BOWL = slice(9, 12)  # of qpos: position of the bowl to move, the same in every task of the suite
REGIONS = 4  # per side of the image
STRENGTHS = 10.0 ** np.arange(-1, 7)  # of the ridge regression


class WithState(libero.Libero):
    """LIBERO without images. Observations have "qpos" f32[Q], "state" f32[8], "task" and "direction" f32[3], the bowl's
    offset in standard deviations."""

    def __init__(self) -> None:
        super().__init__(image_size=0)

    def reset(self, episode: Episode) -> tuple[str, dict[str, Any]]:
        instruction = self._begin(episode, render=False)
        direction = np.random.default_rng(libero.episode_seed(episode)).standard_normal(3)
        self.constant = {"task": episode.task, "direction": direction.astype(np.float32)}
        return instruction, self._look()

    def _look(self) -> dict[str, Any]:
        qpos = np.array(self.env.sim.data.qpos, np.float32)
        return {"qpos": qpos, "state": proprioception(self.state)} | self.constant


def features(
    qpos: Float[np.ndarray, "B Q"], state: Float[np.ndarray, "B 8"], task: Sequence[int]
) -> Float[np.ndarray, "B F"]:
    """Scaled to a magnitude of about 1."""
    hand = np.stack([expert.rotation_matrix(row[3:6].astype(float)).ravel() for row in state])
    objects = qpos[:, OBJECTS].reshape(len(qpos), -1, 7)
    relative = (objects[:, :, :3] - state[:, None, :3]).reshape(len(qpos), -1)
    turned = objects[:, 0, 3:] * np.sign(objects[:, 0, 3:4] + 1e-9)
    columns = [5 * state[:, :3], hand, 25 * state[:, 6:], 10 * relative, turned, np.eye(libero.NUM_TASKS)[list(task)]]
    return np.concatenate(columns, axis=1).astype(np.float32)


def examples(files: Sequence[Path], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and chunks f32[B, CHUNK · 7] of a split's steps, padded with an episode's last action. Raises InputError
    for motions of another suite and if there are none of the split."""
    inputs, targets = [], []
    for name, motion in ((file, motion) for file in files for motion in load_motions(file)):
        if motion.suite != SUITE:
            raise InputError(f"{name} holds motions of {motion.suite}: expected {SUITE}")
        if motion.split != split:
            continue
        length = len(motion.action)
        inputs.append(features(motion.qpos, motion.state, [motion.task_id] * length))
        steps = np.minimum(np.arange(length)[:, None] + np.arange(CHUNK), length - 1)
        targets.append(motion.action[steps].reshape(length, -1))
    if not inputs:
        raise InputError(f"{', '.join(map(str, files))}: no {split} episodes, which are needed too")
    return np.concatenate(inputs), np.concatenate(targets)


def network(params: Any, x: Float[jax.Array, "B F"]) -> Float[jax.Array, "B O"]:
    *hidden, (w, b) = params
    for weight, bias in hidden:
        x = jax.nn.gelu(x @ weight + bias)
    return x @ w + b


def fit(inputs: np.ndarray, targets: np.ndarray, steps: int, batch: int = 256, seed: int = 0) -> Any:
    """Minimise the L1 loss with AdamW and a one-cycle schedule."""
    shapes = list(itertools.pairwise([inputs.shape[1], WIDTH, WIDTH, WIDTH, targets.shape[1]]))
    keys, initial = jax.random.split(jax.random.key(seed), len(shapes)), jax.nn.initializers.he_normal()
    params = [(initial(key, shape), jnp.zeros(shape[1])) for key, shape in zip(keys, shapes, strict=True)]
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 1e-3), weight_decay=0.01)
    loss = lambda params, x, y: jnp.abs(network(params, x) - y).mean()  # noqa: E731

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc="fit", mininterval=5):
        rows = rng.integers(len(inputs), size=batch)
        params, state = step(params, state, inputs[rows], targets[rows])
    return params


@dataclass(frozen=True)
class Seen:
    """Frames of a split, with the policy's features, the object's position and baselines."""

    features: dict[str, Float[np.ndarray, "N F"]]
    target: Float[np.ndarray, "N 3"]  # metres in the camera's frame
    to_robot: Float[np.ndarray, "N 3 3"]  # rotation from the camera's axes to the robot's
    instruction: np.ndarray
    episode: np.ndarray
    before_grasp: np.ndarray
    commands: dict[str, Float[np.ndarray, "N 3"]]  # translation of a chunk in cm: "true", "policy" and baselines


def look(policy: Policy, params: Any, loader: Loader, split: str, frames: int, batch_size: int) -> Seen:
    """`frames` evenly spaced frames of a split, or all."""
    index, *others = loader.indexes(split)
    if others:
        raise InputError(f"--packed holds {1 + len(others)} datasets: expected one recording")
    total = index.num_frames
    ids = np.arange(min(frames, total)) * total // min(frames, total)
    statistics = policy.processor.find_statistics(index.name)["action"]
    grid, mean = policy.processor.grid, loader.actions().mean(axis=0)
    extract = jax.jit(lambda params, batch: tokens_of(policy.model, params, batch))
    features: dict[str, list[np.ndarray]] = {}
    commands: dict[str, list[np.ndarray]] = {}
    for start in tqdm(range(0, len(ids), batch_size), desc=split, mininterval=5):
        rows = np.minimum(np.arange(start, start + batch_size), len(ids) - 1)  # padded, so that one shape is compiled
        batch = loader.frames(ids[rows], split).replace(sample_id=None)
        for name, values in jax.device_get(extract(params, batch)).items():
            features.setdefault(name, []).append(values)
        chunks = {"true": batch.actions, "policy": policy.predict(batch)[1], "grid alone": None, "mean action": mean}
        chunks["grid alone"] = np.asarray(decode(grid, encode(grid, batch.actions)))
        for name, actions in chunks.items():
            moves = unnormalize(np.broadcast_to(actions, batch.actions.shape), statistics)[..., :3]
            total_move = 100 * expert.METRES_PER_UNIT * (moves * batch.action_mask[..., None]).sum(axis=1)
            commands.setdefault(name, []).append(total_move)
    first, end = index.action_rows(ids)
    closed = np.append(np.flatnonzero(index.arrays["action"][:, 6] < 0.5), len(index.arrays["action"]))
    episode = np.asarray(index.episode(ids))
    began = first - index.step(ids)
    join = lambda parts: {name: np.concatenate(rows)[: len(ids)] for name, rows in parts.items()}  # noqa: E731
    return Seen(
        join(features),
        index.arrays["target"][ids],
        index.arrays["extrinsics"][ids, :3, :3],
        np.asarray(index.language(ids)),
        episode,
        first < np.minimum(closed[np.searchsorted(closed, began)], end),
        join(commands),
    )


def tokens_of(model: Any, params: Any, batch: Batch) -> dict[str, Float[jax.Array, "B F"]]:
    inputs, cfg = prepare(batch, None, None), model.config
    seen = inputs.model_inputs() | {"action_ids": jnp.zeros((len(batch.image), cfg.num_action_tokens), jnp.int32)}
    _, kept = model.apply({"params": params}, **seen, mutable=["intermediates"])
    side = cfg.img.patches_per_side
    tokens = model.apply({"params": params}, inputs.image, inputs.depth, inputs.intrinsics, method="embed_image")
    mean = np.zeros((REGIONS, side), np.float32)  # of the patches in each region
    for row, patches in enumerate(np.array_split(np.arange(side), REGIONS)):
        mean[row, patches] = 1 / len(patches)
    tokens = tokens.astype(jnp.float32).reshape(len(tokens), side, side, -1)
    regions = jnp.einsum("ri,sj,bijd->brsd", mean, mean, tokens).reshape(len(tokens), -1)
    (state,) = kept["intermediates"]["after_prompt"]
    return {"state after the prompt": state.astype(jnp.float32), "image tokens": regions}


def ridge(x: np.ndarray, y: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Predictions f64[N, 3] for `seen`, by ridge regression from x to y. Its strength is chosen on the last fifth of x,
    which comes from other episodes, before a fit on all of x."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, seen = ((rows.astype(np.float64) - mean) / std for rows in (x, seen))
    gram, across, middle = x @ x.T, seen @ x.T, y.mean(axis=0)

    def solve(rows: slice, strength: float) -> np.ndarray:
        kernel = gram[rows, rows]
        return np.linalg.solve(kernel + strength * np.eye(len(kernel)), y[rows] - middle)

    fitted, tested = slice(0, 4 * len(x) // 5), slice(4 * len(x) // 5, len(x))
    errors = [
        np.abs(gram[tested, fitted] @ solve(fitted, strength) + middle - y[tested]).mean() for strength in STRENGTHS
    ]
    return across @ solve(slice(None), STRENGTHS[int(np.argmin(errors))]) + middle


def of_one_instruction(train: Seen, val: Seen) -> np.ndarray:
    """Mean position in train frames with the same instruction, or in all if there are none."""
    means = {number: train.target[train.instruction == number].mean(axis=0) for number in np.unique(train.instruction)}
    return np.stack([means.get(number, train.target.mean(axis=0)) for number in val.instruction])


def in_cm(error: Float[np.ndarray, "N 3"], seen: Seen, frames: np.ndarray, turned: bool) -> dict[str, Any]:
    """Mean absolute errors along the axes, and mean distance with its standard error over episodes (None for one)."""
    error, episodes = error[frames], seen.episode[frames]
    distance = np.linalg.norm(error, axis=1)
    means = [distance[episodes == episode].mean() for episode in np.unique(episodes)]
    row = {"axes": np.abs(error).mean(axis=0).tolist(), "distance": float(distance.mean())}
    if turned:
        row["robot"] = np.abs(np.einsum("nij,nj->ni", seen.to_robot[frames], error)).mean(axis=0).tolist()
    deviation = float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
    return row | {"standard_error": deviation, "frames": len(error)}


def distance_of(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['distance']:.2f}" + ("" if error is None else f" ± {error:.2f}")


def measure_run(args: argparse.Namespace) -> None:
    config = train_config_of(args.run)
    config.data.packed = str(args.packed)
    model, params, processor = load_pretrained(args.run)
    assert processor is not None, "a run has its grid and tokenizer"
    loader = open_data(config, processor.statistics, processor.tokenizer, recorded=("target",))
    policy, params = Policy(model, params, processor), jax.device_put(params)
    train, val = (look(policy, params, loader, split, args.frames, args.batch_size) for split in ("train", "val"))
    guesses = {name: ridge(x, train.target, val.features[name]) for name, x in train.features.items()}
    guesses["instruction alone"] = of_one_instruction(train, val)
    subsets = {"before the grasp": val.before_grasp, "all": np.ones(len(val.target), bool)}
    data = f"{args.packed} ({packed_digest(args.packed)[:8]})"
    result: dict[str, Any] = {"run": fingerprint(args.run), "packed": data, "trained_on": len(train.target)}
    rows = [["error (cm)", "frames", "right", "down", "forward", "x", "y", "z", "distance"]]
    for subset, frames in subsets.items():
        for name, guess in guesses.items():
            row = result[f"{name}, {subset}"] = in_cm(100 * (guess - val.target), val, frames, turned=True)
            numbers = [f"{n:.2f}" for n in (*row["axes"], *row["robot"])]
            rows.append([f"{name}, {subset}", str(row["frames"]), *numbers, distance_of(row)])
        for name in ("policy", "grid alone", "mean action"):
            error = val.commands[name] - val.commands["true"]
            row = result[f"translation of a chunk, {name}, {subset}"] = in_cm(error, val, frames, turned=False)
            numbers = ["", "", "", *(f"{n:.2f}" for n in row["axes"])]
            rows.append([f"chunk of {name}, {subset}", str(row["frames"]), *numbers, distance_of(row)])
    print(text_table(rows, "<>"))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "sight.json", result | provenance())
    print(json.dumps(result))


def distances(text: str) -> dict[str, float]:
    """`0,0.01` → {"0": 0.0, "0.01": 0.01}."""
    try:
        return {part: amount(part) for part in text.split(",")}
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not metres, such as 0,0.01") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--motions", type=local_path, nargs="+")
    what.add_argument("--run", type=Path, help="a trained policy")
    parser.add_argument("--out", type=local_path, default=Path("runs/sight"))
    of_run, of_motions = parser.add_argument_group("with --run"), parser.add_argument_group("with --motions")
    of_run.add_argument("--packed", type=Path, help="recordings of its image size")
    of_run.add_argument("--frames", type=positive, default=4000, help="at most, in each of train and val")
    of_run.add_argument("--batch-size", type=positive, default=32)
    offsets = distances("0,0.01,0.02,0.04")
    of_motions.add_argument("--offsets", type=distances, default=offsets, help="standard deviations in metres")
    of_motions.add_argument("--steps", type=positive, default=12_000, help="training steps")
    of_motions.add_argument("--episodes", type=positive, default=10, help="per task")
    of_motions.add_argument("--execute", default="open_loop")
    of_motions.add_argument("--workers", type=positive, default=os.cpu_count())
    args = parser.parse_args()
    for action in (of_motions if args.run else of_run)._group_actions:
        if getattr(args, action.dest) != action.default:
            parser.error(f"{action.option_strings[0]} is for {'--motions' if args.run else '--run'}")
    if args.run and not args.packed:
        parser.error("--run needs --packed")
    try:
        measure_run(args) if args.run else imitate_from_state(args)
    except InputError as error:
        parser.error(str(error))
    except FaultsError as error:
        sys.exit(str(error))


def imitate_from_state(args: argparse.Namespace) -> None:
    executor(args.execute)  # raises now what it would raise after the training
    episodes = libero.episodes([SUITE], args.episodes, [0], None)
    (inputs, targets), (seen, wanted) = (examples(args.motions, split) for split in ("train", "val"))
    motions = f"{', '.join(map(str, args.motions))} ({zlib.crc32(targets.tobytes(), zlib.crc32(inputs.tobytes())):08x})"
    mean, std = inputs.mean(0), inputs.std(0) + 1e-2
    params = fit((inputs - mean) / std, targets, args.steps)
    predict = jax.jit(network)
    errors = {
        "val_l1": float(np.abs(predict(params, (seen - mean) / std) - wanted).mean()),
        "val_l1_median_action": float(np.abs(np.median(targets, 0) - wanted).mean()),
    }
    print(f"{len(inputs)} steps, {errors}", flush=True)

    settings, results = Settings(libero.MAX_STEPS, args.execute, args.workers), {}
    for text, offset in args.offsets.items():

        def infer(observations: list[dict[str, Any]], offset: float = offset) -> list[dict[str, Any]]:
            qpos = np.stack([o["qpos"] for o in observations])
            qpos[:, BOWL] += offset * np.stack([o["direction"] for o in observations])
            x = features(qpos, np.stack([o["state"] for o in observations]), [o["task"] for o in observations])
            chunks = np.array(predict(params, (x - mean) / std)).reshape(len(x), CHUNK, 7)
            chunks[..., :6] = np.clip(chunks[..., :6], -1, 1)
            chunks[..., 6] = chunks[..., 6] < 0  # recorded as -1 open, 1 closed
            return [{"actions": chunk} for chunk in chunks]

        with progress_bar(f"{text} m", "episode") as show:
            result = closed_loop.evaluate(
                WithState,
                padded(infer, args.workers),
                episodes,
                settings,
                LogFolder(args.out / text),
                policy=f"from state, {motions}, {args.steps} steps, {text} m",
                progress=lambda done, successes, show=show: show(done, len(episodes), note=f"{successes} successes"),
            )
        results[text] = {key: result[key] for key in ("success", "standard_error", "episodes", "faults")}
    print("bowl's offset (m)  success (%)")
    for text, row in results.items():
        print(f"{text:>17}  {100 * row['success']:5.1f} ± {100 * row['standard_error']:.1f} of {row['episodes']}")
    print(json.dumps(errors | {"success": results}))


if __name__ == "__main__":
    main()
