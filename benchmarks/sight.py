"""How precisely a policy has to see: behaviour cloning from the simulator's state instead of pictures.

    spatialvla-jax record libero --episodes 1400 --val-episodes 100 --initial-states drawn --noise 0.2 --spread 0 \\
        --out runs/motions.npz
    python benchmarks/sight.py --motions runs/motions.npz [--offsets 0,0.01,0.02,0.04] [--episodes 10]

A small network learns chunks of four actions from where the hand and the objects are (positions relative to the hand)
and which task it is, and is evaluated closed loop on LIBERO-Spatial as a policy with a camera is. What it fails at, no
camera would help. Then the same network believes the bowl to be elsewhere, by a normal offset of so many metres along
each axis that stays for an episode: the success that is left is what a policy of that precision can have. Ends with a
table and one line of JSON; the same command goes on after an interruption.
"""

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from tqdm import tqdm

from spatialvla_jax.evaluation import closed_loop
from spatialvla_jax.sim import libero_env as libero
from spatialvla_jax.sim import scripted_expert as expert
from spatialvla_jax.sim.libero import proprioception
from spatialvla_jax.sim.motions import load_motions
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.utils.progress import progress_bar

SUITE, CHUNK, WIDTH = "libero_spatial", 4, 512
OBJECTS = slice(9, 44)  # of the simulator's coordinates: after arm and fingers, five objects' positions and quaternions
TAKEN = slice(9, 12)  # the position of the bowl that every task of the suite is about


class WithState(libero.Libero):
    """Without pictures: observations have "qpos" f32[Q], "state" f32[8], "task" and "direction" f32[3], the offset in
    units of its standard deviation."""

    def __init__(self) -> None:
        super().__init__(image_size=0)

    def reset(self, episode: closed_loop.Episode) -> tuple[str, dict[str, Any]]:
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
    """About 1 in size: what is metres here is decimetres there."""
    hand = np.stack([expert.rotation_matrix(row[3:6].astype(float)).ravel() for row in state])
    objects = qpos[:, OBJECTS].reshape(len(qpos), -1, 7)
    relative = (objects[:, :, :3] - state[:, None, :3]).reshape(len(qpos), -1)
    turned = objects[:, 0, 3:] * np.sign(objects[:, 0, 3:4] + 1e-9)
    columns = [5 * state[:, :3], hand, 25 * state[:, 6:], 10 * relative, turned, np.eye(libero.NUM_TASKS)[list(task)]]
    return np.concatenate(columns, axis=1).astype(np.float32)


def examples(files: Sequence[Path], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and chunks f32[B, CHUNK · 7] of a split's steps; the last action is repeated beyond an episode's end."""
    inputs, targets = [], []
    for motion in (motion for file in files for motion in load_motions(file) if motion.split == split):
        length = len(motion.action)
        inputs.append(features(motion.qpos, motion.state, [motion.task_id] * length))
        steps = np.minimum(np.arange(length)[:, None] + np.arange(CHUNK), length - 1)
        targets.append(motion.action[steps].reshape(length, -1))
    return np.concatenate(inputs), np.concatenate(targets)


def network(params: Any, x: Float[jax.Array, "B F"]) -> Float[jax.Array, "B O"]:
    *hidden, (w, b) = params
    for weight, bias in hidden:
        x = jax.nn.gelu(x @ weight + bias)
    return x @ w + b


def fit(inputs: np.ndarray, targets: np.ndarray, steps: int, batch: int = 256, seed: int = 0) -> Any:
    """Least absolute errors with AdamW and one cycle of the rate."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--motions", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/sight"))
    parser.add_argument("--offsets", default="0,0.01,0.02,0.04", help="metres, standard deviation along each axis")
    parser.add_argument("--steps", type=int, default=12_000, help="of training")
    parser.add_argument("--episodes", type=int, default=10, help="a task")
    parser.add_argument("--execute", default="open_loop")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()

    inputs, targets = examples(args.motions, "train")
    mean, std = inputs.mean(0), inputs.std(0) + 1e-2
    params = fit((inputs - mean) / std, targets, args.steps)
    predict = jax.jit(network)
    seen, wanted = examples(args.motions, "val")
    errors = {
        "val_l1": float(np.abs(predict(params, (seen - mean) / std) - wanted).mean()),
        "val_l1_median_action": float(np.abs(np.median(targets, 0) - wanted).mean()),
    }
    print(f"{len(inputs)} steps, {errors}", flush=True)

    episodes = libero.episodes([SUITE], args.episodes, [0], None)
    settings, results = closed_loop.Settings(libero.MAX_STEPS, args.execute, args.workers), {}
    for text in args.offsets.split(","):

        def infer(observations: list[dict[str, Any]], offset: float = float(text)) -> list[dict[str, Any]]:
            qpos = np.stack([o["qpos"] for o in observations])
            qpos[:, TAKEN] += offset * np.stack([o["direction"] for o in observations])
            x = features(qpos, np.stack([o["state"] for o in observations]), [o["task"] for o in observations])
            chunks = np.array(predict(params, (x - mean) / std)).reshape(len(x), CHUNK, 7)
            chunks[..., :6] = np.clip(chunks[..., :6], -1, 1)
            chunks[..., 6] = chunks[..., 6] < 0  # recorded as -1 open, 1 closed
            return [{"actions": chunk} for chunk in chunks]

        with progress_bar(f"{text} m", "episode") as show:
            result = closed_loop.evaluate(
                WithState,
                closed_loop.padded(infer, args.workers),
                episodes,
                settings,
                LogFolder(args.out / text),
                policy=f"from state, {[str(path) for path in args.motions]}, {args.steps} steps, {text} m",
                progress=lambda done, successes, show=show: show(done, len(episodes), note=f"{successes} successes"),
            )
        results[text] = {key: result[key] for key in ("success", "standard_error", "episodes", "faults")}
    print("bowl's offset (m)  success (%)")
    for text, row in results.items():
        print(f"{text:>17}  {100 * row['success']:5.1f} ± {100 * row['standard_error']:.1f} of {row['episodes']}")
    print(json.dumps(errors | {"success": results}))


if __name__ == "__main__":
    main()
