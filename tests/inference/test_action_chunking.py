import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spatialvla_jax.errors import InputError
from spatialvla_jax.inference.action_chunking import ChunkExecutor, adaptive, combine, executor, newest, recent

NUMBERS = st.floats(-2, 2, width=32)
WEIGHS = st.sampled_from([newest, adaptive, recent])
T = 4


def chunks(count: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (count, T, 7), elements=NUMBERS)


def action(x: float, gripper: float, y: float = 0.0) -> np.ndarray:
    return np.array([x, y, 0, 0, 0, 0, gripper], np.float32)


def numbered(plan: int) -> np.ndarray:
    """A chunk whose x encodes the plan and the step of each action."""
    return np.stack([action(10 * plan + step, 1) for step in range(T)])


def run(executor: ChunkExecutor, plans: int, steps: int) -> tuple[list[float], list[int]]:
    """The x of each action, and the steps at which a chunk was due."""
    made, xs, due = iter(range(plans)), [], []
    for step in range(steps):
        if executor.due:
            due.append(step)
        xs.append(float(executor.step(numbered(next(made)) if executor.due else None)[0]))
    return xs, due


def test_open_loop_uses_up_each_chunk() -> None:
    assert run(ChunkExecutor(), 3, 9) == ([0, 1, 2, 3, 10, 11, 12, 13, 20], [0, 4, 8])


@pytest.mark.parametrize(
    ("every", "xs", "due"),
    [
        (1, [0, 10, 20, 30, 40], [0, 1, 2, 3, 4]),
        (2, [0, 1, 10, 11, 20], [0, 2, 4]),
        (3, [0, 1, 2, 10, 11], [0, 3]),
        (9, [0, 1, 2, 3, 10], [0, 4]),
    ],
)
def test_receding_horizon_plans_every_k_steps(every: int, xs: list[float], due: list[int]) -> None:
    assert run(ChunkExecutor(every=every), 9, 5) == (xs, due)


def test_an_ensemble_sees_what_each_chunk_says_about_this_step() -> None:
    seen = []

    def weigh(predictions: np.ndarray) -> np.ndarray:
        seen.append(predictions[:, 0].tolist())
        return np.ones(len(predictions))

    xs, _ = run(ChunkExecutor(weigh, every=1), 6, 6)
    # Plan p starts at step p and covers four steps.
    assert seen == [[0], [1, 10], [2, 11, 20], [3, 12, 21, 30], [13, 22, 31, 40], [23, 32, 41, 50]]
    np.testing.assert_allclose(xs, [np.mean(row) for row in seen])


def test_an_ensemble_with_gaps_between_plans() -> None:
    seen = []
    executor = ChunkExecutor(
        lambda predictions: seen.append(predictions[:, 0].tolist()) or np.ones(len(predictions)), 2
    )
    run(executor, 3, 6)
    assert seen == [[0], [1], [2, 10], [3, 11], [12, 20], [13, 21]]


def test_adaptive_weights_by_hand() -> None:
    """Cosine similarities with the newest: 0 (orthogonal), -1 (opposite), 0.6 and 1; each times 0.1."""
    predictions = np.array([action(0, 0, 5), action(-3, 1), action(0.6, 0, 0.8), action(2, 1)], np.float64)
    expected = np.exp([0, -0.1, 0.06, 0.1])
    np.testing.assert_allclose(adaptive(predictions), expected, rtol=1e-6)
    # The gripper does not affect the similarity. It is voted: the two open predictions have 0.9048 + 1.1052 of 4.0718.
    mean = expected @ predictions / expected.sum()
    np.testing.assert_allclose(combine(predictions, adaptive)[:6], mean[:6], rtol=1e-6)
    assert combine(predictions, adaptive)[6] == 0


def test_recent_weights_by_hand() -> None:
    """The release weights the i-th oldest by exp(0.8 i), and opens the gripper if its mean is above one half."""
    predictions = np.array([action(1, 1), action(2, 1), action(3, 0)], np.float64)
    np.testing.assert_allclose(recent(predictions) / recent(predictions)[0], np.exp([0, 0.8, 1.6]))
    weights = np.array([1.0, 2.2255409, 4.9530324])
    np.testing.assert_allclose(combine(predictions, recent)[0], weights @ [1, 2, 3] / weights.sum(), rtol=1e-6)
    assert combine(predictions, recent)[6] == 0  # open has 3.23, closed 4.95


@pytest.mark.parametrize(
    ("grippers", "expected"), [([1, 0], 0), ([0, 1], 0), ([1, 1, 0], 1), ([0, 1, 0, 1], 0), ([0.25, 0.5, 0.875], 0.5)]
)
def test_the_gripper_is_one_that_was_predicted(grippers: list[float], expected: float) -> None:
    predictions = [action(1, gripper) for gripper in grippers]
    assert combine(predictions, lambda p: np.ones(len(p)))[6] == expected


@given(chunks(1), WEIGHS)
def test_one_chunk_is_itself(chunk: np.ndarray, weigh) -> None:
    executor = ChunkExecutor(weigh)
    np.testing.assert_array_equal([executor.step(chunk[0]), *(executor.step() for _ in range(T - 1))], chunk[0])
    assert executor.due


@given(arrays(np.float32, 7, elements=NUMBERS), WEIGHS, st.integers(1, 3))
def test_equal_predictions_are_themselves(value: np.ndarray, weigh, every: int) -> None:
    executor = ChunkExecutor(weigh, every)
    for _ in range(9):
        np.testing.assert_array_equal(executor.step(np.tile(value, (T, 1)) if executor.due else None), value)


@given(chunks(5), WEIGHS)
def test_an_ensemble_stays_within_its_predictions(plans: np.ndarray, weigh) -> None:
    executor = ChunkExecutor(weigh, every=1)
    for step, plan in enumerate(plans):
        overlapping = np.stack([plans[s][step - s] for s in range(max(0, step - T + 1), step + 1)])
        result = executor.step(plan)
        assert (result >= overlapping.min(axis=0) - 1e-6).all() and (result <= overlapping.max(axis=0) + 1e-6).all()
        assert result[6] in overlapping[:, 6]


@given(chunks(6), WEIGHS)
def test_reset_forgets(plans: np.ndarray, weigh) -> None:
    used, fresh = ChunkExecutor(weigh, every=1), ChunkExecutor(weigh, every=1)
    for plan in plans[:3]:
        used.step(plan)
    used.reset()
    for plan in plans[3:]:
        np.testing.assert_array_equal(used.step(plan), fresh.step(plan))


def test_a_chunk_may_be_changed_by_its_owner() -> None:
    executor, chunk = ChunkExecutor(), numbered(0)
    executor.step(chunk)
    chunk[:] = 99
    assert executor.step()[0] == 1


def test_modes_by_name() -> None:
    assert run(executor("open_loop"), 2, 5)[1] == [0, 4]
    assert run(executor("receding:3"), 2, 5)[1] == [0, 3]
    assert (executor("adaptive").weigh, executor("recent").weigh, executor("recent").every) == (adaptive, recent, 1)
    for mode in ("receding", "receding:0", f"receding:{'9' * 5000}", "adaptive:2", ""):
        with pytest.raises(InputError, match="choose open_loop, receding:K, adaptive or recent"):
            executor(mode)


def test_a_step_without_a_chunk() -> None:
    with pytest.raises(InputError, match="needs a new one"):
        ChunkExecutor().step()
    with pytest.raises(InputError, match="every 0 steps"):
        ChunkExecutor(every=0)
