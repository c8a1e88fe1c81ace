"""SpatialVLA as a model server of vla-eval: as a server process, or within a Python process.

python vla_eval_spatialvla.py --args.checkpoint=EXPORT --args.gripper='[1,-1]' --port=8000

vla_eval.evaluate(SpatialVLAServer("EXPORT", gripper=[1, -1]), "libero.yaml", docker=False)
"""

# vla-eval is installed where this runs.
# pyright: reportMissingImports=false

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.specs import (
    GRIPPER_01,
    GRIPPER_CLOSE_01,
    GRIPPER_CLOSE_NEG,
    GRIPPER_CLOSE_POS,
    GRIPPER_RAW,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    ROTATION_AA,
    ROTATION_EULER,
    DimSpec,
)

from spatialvla_jax import Policy
from spatialvla_jax.errors import InputError
from spatialvla_jax.serving.programs import Programs
from spatialvla_jax.serving.protocol import Limits

# What vla-eval calls the values of a closed and of an open gripper.
GRIPPERS: dict[tuple[float, float], DimSpec] = {
    (1, -1): GRIPPER_CLOSE_POS,
    (-1, 1): GRIPPER_CLOSE_NEG,
    (0, 1): GRIPPER_01,
    (1, 0): GRIPPER_CLOSE_01,
}


class SpatialVLAServer(PredictModelServer):
    """`Policy` behind vla-eval's protocol. The tokens are those of `Policy.infer` on the same image and sentence."""

    def __init__(
        self,
        checkpoint: str,
        unnorm_key: str | None = None,
        camera: str | None = None,
        intrinsics: list[list[float]] | None = None,
        mirror: bool = False,
        gripper: list[float] = [0, 1],  # noqa: B006 (jsonargparse shows it, nobody writes to it)
        euler: bool = False,
        dtype: str = "",
        quantize: str = "",
        image_size: list[int] | None = None,
        chunk_size: int | None = None,
        **options: Any,
    ) -> None:
        """`options` are those of `PredictModelServer`. Raises InputError.

        Args:
            checkpoint: Anything that `Policy.load` reads.
            unnorm_key: The dataset whose statistics turn the model's actions into robot units; not needed where the
                checkpoint has one dataset only.
            camera: The benchmark's name of the image that the model sees; by default its first.
            intrinsics: That camera's matrix [3, 3] in pixels of its image; by default that of the dataset.
            mirror: Swap left and right of the image. vla-eval's LIBERO shows mirrored pictures, as the *_no_noops
                datasets have them; a policy trained on pictures that are not mirrored needs this.
            gripper: What the benchmark calls closed and open; the model's own values are 0 and 1. LIBERO's are 1, -1.
            euler: The dataset's rotations are roll, pitch and yaw, as BridgeData's; they are turned into the rotation
                vectors that SimplerEnv's controller takes.
            dtype: "float32" or "bfloat16"; by default the model's own.
            quantize: "int8" keeps the language model's matrices in 8 bits.
            image_size: Height and width of the benchmark's images, to compile before the first one comes; by default
                all is compiled at its first use, and vla-eval waits only `server.timeout` (30 seconds) for an answer.
            chunk_size: How many actions of a chunk are executed before the next is predicted; by default all.
        """
        if len(gripper) != 2:
            raise InputError(f"gripper is {gripper}: expected two numbers, what closed and open are")
        self.policy = Policy.load(checkpoint, dtype=dtype, quantize=quantize)
        chunk = self.policy.model.config.action_chunk
        if chunk_size is not None and not 1 <= chunk_size <= chunk:
            raise InputError(f"chunk_size is {chunk_size}: the checkpoint predicts {chunk} actions at once")
        super().__init__(chunk_size=chunk_size or chunk, **options)
        self.policy.processor.find_statistics(unnorm_key)
        self.unnorm_key, self.camera, self.intrinsics = unnorm_key, camera, intrinsics
        self.mirror, self.gripper, self.euler = mirror, (gripper[0], gripper[1]), euler
        if image_size is not None:
            height, width = image_size
            programs = Programs(self.policy, Limits(image_sizes=((height, width),), batch=self.max_batch_size))
            for example in programs.examples.values():
                for batch in programs.batches:
                    self.policy.act([example] * batch)

    def get_action_spec(self) -> dict[str, DimSpec]:
        """What vla-eval compares with the benchmark's, and warns of a difference. SimplerEnv calls its own Euler."""
        gripper = GRIPPERS.get(self.gripper, GRIPPER_RAW)
        return {
            "position": POSITION_DELTA,
            "rotation": ROTATION_EULER if self.euler else ROTATION_AA,
            "gripper": gripper,
        }

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return {self.camera or "image": IMAGE_RGB, "language": LANGUAGE}

    def predict_batch(self, obs_batch: list[Any], ctx_batch: list[SessionContext]) -> list[dict[str, Any]]:
        """Observations with "images" and "task_description" → "actions" f32[T, 7] as the benchmark takes them, and the
        "action_ids" i32[T, tokens of an action]. Raises InputError and NonFiniteError, which vla-eval sends on."""
        results = self.policy.infer_batch([self.observation(obs) for obs in obs_batch])
        return [result | {"actions": self.to_benchmark(result["actions"])} for result in results]

    def observation(self, obs: dict[str, Any]) -> dict[str, Any]:
        """vla-eval's observation as `Policy.infer` takes it. Raises InputError."""
        images = obs.get("images") or {}
        name = self.camera or next(iter(images), None)
        if name not in images:
            raise InputError(f"the observation has no image {name!r}, only {', '.join(images) or 'none'}")
        image = np.asarray(images[name])
        return {
            "image": np.ascontiguousarray(image[:, ::-1]) if self.mirror else image,
            "prompt": obs.get("task_description"),
            "intrinsics": self.intrinsics,
            "unnorm_key": self.unnorm_key,
        }

    def to_benchmark(self, actions: Float[np.ndarray, "T 7"]) -> Float[np.ndarray, "T 7"]:
        """Robot units with gripper 0 closed .. 1 open → the benchmark's rotation and gripper."""
        move, turn, opened = np.split(actions, [3, 6], axis=1)
        closed, end = self.gripper
        turn = Rotation.from_euler("xyz", turn).as_rotvec() if self.euler else turn
        return np.concatenate([move, turn, closed + (end - closed) * opened], axis=1).astype(np.float32)


if __name__ == "__main__":
    from vla_eval.model_servers.serve import run_server

    run_server(SpatialVLAServer)
