"""Random changes of what a simulated scene's camera sees; the physics stays the same."""

# The simulator is an optional extra.
# pyright: reportMissingImports=false

from typing import Any

import numpy as np

from spatialvla_jax.errors import InputError

# The largest changes, at an amount of 1.
POSITION, ROTATION, FIELD_OF_VIEW = 0.05, np.deg2rad(3), 0.05  # of the camera: metres, radians, fraction
LIGHT_POSITION, BRIGHTNESS = 1.0, 0.4  # of each light: metres, fraction
COLOUR = 0.3  # fraction by which a surface may lose red, green and blue, each for itself
STREAM = 1  # keeps these draws apart from others with the same seed


def check_jitter(amount: float) -> None:
    """Raises InputError unless `amount` is in [0, 1]."""
    if not 0 <= amount <= 1:
        raise InputError(f"jitter is {amount}: expected 0 (none) to 1")


def jitter_scene(env: Any, camera: str, seed: int, amount: float) -> None:
    """Move and turn the camera, change its field of view, the lights and the colours of surfaces and textures. The
    draws are uniform, depend only on `seed` and scale with `amount`.

    Call this once per scene, before its intrinsics and extrinsics are read. The simulator's state keeps every bit.
    """
    import mujoco

    model, data = env.sim.model._model, env.sim.data._data
    rng, number = np.random.default_rng((seed, STREAM)), env.sim.model.camera_name2id(camera)

    def draw(largest: float, *shape: int) -> np.ndarray:
        return amount * largest * rng.uniform(-1, 1, shape)

    model.cam_pos[number] += draw(POSITION, 3)
    axis, turn, turned = draw(ROTATION, 3), np.empty(4), np.empty(4)
    angle = mujoco.mju_normalize3(axis)
    mujoco.mju_axisAngle2Quat(turn, axis, angle)
    mujoco.mju_mulQuat(turned, turn, model.cam_quat[number])
    model.cam_quat[number] = turned
    model.cam_fovy[number] *= 1 + draw(FIELD_OF_VIEW).item()
    model.light_pos += draw(LIGHT_POSITION, model.nlight, 3)
    model.light_diffuse *= 1 + draw(BRIGHTNESS, model.nlight, 1)
    factor = 1 + draw(BRIGHTNESS).item()
    model.vis.headlight.ambient *= factor
    model.vis.headlight.diffuse *= factor
    model.mat_rgba[:, :3] *= 1 - amount * COLOUR * rng.uniform(0, 1, (model.nmat, 3))
    mujoco.mj_camlight(model, data)  # the poses of cameras and lights alone: `mj_forward` would also touch the physics
