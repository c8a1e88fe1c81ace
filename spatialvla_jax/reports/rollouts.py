"""Videos of a training run's policy in LIBERO, for TensorBoard and Weights & Biases."""

import io
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.evaluation.rollouts import Episode, Settings, padded, rollouts
from spatialvla_jax.evaluation.video import FRAMES_PER_SECOND
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.models import Params
from spatialvla_jax.models.lora import merge_adapters
from spatialvla_jax.sim import libero_env as libero
from spatialvla_jax.training.loop import Run
from spatialvla_jax.utils.progress import warn

SIZE = 128  # pixels a side of a video
EVERY = 4  # steps between two of its frames


class ValidationRollouts:
    """Callbacks of `training.loop.train`: after each validation the policy acts in LIBERO, always from the same initial
    states. The run is not affected, but waits. It must have one process."""

    run: Run
    processor: Processor

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self.episodes = episodes

    def start(self, run: Run) -> None:
        """Raises InputError if a suite does not match exactly one dataset, whose action units it would use."""
        self.run, self.processor = run, Processor.from_dict(run.checkpoints.metadata["processor"])
        self.keys = [libero.dataset_of(episode.suite, [*self.processor.statistics]) for episode in self.episodes]

    def film(self, step: int, params: Params) -> dict[str, bytes]:
        """GIF files by name, with a green frame if the task was solved, else a red one. If an episode cannot be filmed,
        warns instead of stopping the run."""
        setup, films = self.run.setup, {}
        config, settings = setup.model.config, Settings(libero.MAX_STEPS, film=True)
        try:
            policy = Policy(setup.model, merge_adapters(jax.device_get(params), setup.lora_scale), self.processor)
            for episode, key in zip(self.episodes, self.keys, strict=True):
                depth, mirrored = config.depth_source == "dataset", libero.is_mirrored(key)
                environment = partial(libero.Libero, config.img.image_size, depth, mirrored)
                infer = padded(policy.infer_batch, 1, unnorm_key=key)
                (rollout,) = rollouts(environment, infer, [episode], settings)
                for fault in rollout.record["faults"]:
                    warn(f"rollout of step {step}, {episode.suite} task {episode.task}: {fault['reason']}")
                if rollout.frames:
                    name = f"rollouts/{episode.suite}_task{episode.task}"
                    films[name] = _gif(rollout.frames, rollout.record["success"])
        except Exception as error:
            warn(f"no rollout of step {step}: {type(error).__name__}: {error}")
        return films


def _gif(frames: Sequence[UInt8[np.ndarray, "S S 3"]], success: bool) -> bytes:
    shown = [*frames[:-1:EVERY], frames[-1]]
    first, *rest = (
        ImageOps.expand(Image.fromarray(x).resize((SIZE, SIZE)), 4, "green" if success else "red") for x in shown
    )
    stream = io.BytesIO()
    duration = [1000 * EVERY // FRAMES_PER_SECOND] * len(rest) + [1000]  # the last frame stays
    first.save(stream, "GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    return stream.getvalue()
