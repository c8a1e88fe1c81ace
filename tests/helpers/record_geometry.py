"""Unprojects the pixels of a recorded step."""

import numpy as np


def unproject(step: dict, extrinsics: np.ndarray) -> np.ndarray:
    """World points f32[S, S, 3] (metres) of every pixel's centre."""
    depth, intrinsics = step["observation"]["depth"][..., 0] / 1000, step["observation"]["intrinsics"]
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]] + 0.5
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(intrinsics).T
    return (rays * depth[..., None]) @ extrinsics[:3, :3].T + extrinsics[:3, 3]
