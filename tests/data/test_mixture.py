import numpy as np
import pytest
from helpers.streams import assert_passes
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.data.mixture import (
    BLOCK,
    count_draws,
    make_mixture,
    permute,
    permute_blocks,
    replacement_samples,
    sample_frames,
)
from spatialvla_jax.errors import InputError


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection(size, seed):
    order = permute(np.arange(size), size, np.uint64(seed))
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_permute_looks_random():
    """Uniform in the mean, uncorrelated with the position, and different for another key."""
    size = 20_000
    order, other = (permute(np.arange(size), size, np.uint64(key)) for key in (0, 1))
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.03
    assert abs(np.corrcoef(order, other)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
    assert np.sum(order == other) < 8  # 1 is expected


def test_order_is_pinned():
    """A different order would break resuming every older run."""
    dataset, frame = sample_frames(make_mixture((10, 1000), (1.0, 0.01)), 7, 10**9 + np.arange(10))
    assert dataset.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert frame.tolist() == [0, 6, 1, 2, 9, 263, 927, 516, 969, 7]


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(1, 70), st.integers(1, 50))
@settings(max_examples=80, deadline=None)
def test_permute_blocks_is_a_bijection(size, seed, block, window):
    order = permute_blocks(np.arange(size), size, np.uint64(seed), block, window)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@given(st.integers(1, 40), st.integers(2, 30), st.integers(1, 8), st.integers(0, 2**63))
@settings(max_examples=40, deadline=None)
def test_blocks_stay_together(blocks, block, window, seed):
    """If the block divides the size, each window holds whole blocks, shuffled together."""
    order = permute_blocks(np.arange(blocks * block), blocks * block, np.uint64(seed), block, window)
    seen = []
    for start in range(0, blocks, window):
        own = order[start * block : (start + window) * block]
        inside = np.unique(own // block)
        assert len(own) == len(inside) * block == min(window, blocks - start) * block
        seen += inside.tolist()
    assert sorted(seen) == list(range(blocks))


def test_blocks_are_mixed_within_their_window():
    """Neighbours are no more correlated than by chance: consecutive samples come from different blocks."""
    order = permute_blocks(np.arange(64_000), 64_000, np.uint64(3), 64, 100)
    assert np.mean(order[1:] // 64 == order[:-1] // 64) < 0.02
    assert abs(np.corrcoef(order, np.arange(64_000))[0, 1]) < 0.1


@given(st.lists(st.integers(1, 400), min_size=1, max_size=5), st.integers(0, 1000), st.integers(1, 20), st.data())
@settings(max_examples=25, deadline=None)
def test_every_frame_once_a_pass(sizes, seed, block, data):
    weights = tuple(data.draw(st.floats(0.05, 10)) for _ in sizes)
    balance, shuffle = data.draw(st.booleans()), data.draw(st.integers(1, 500))
    mixture = make_mixture(tuple(sizes), weights, balance=balance, block=block, shuffle=shuffle)
    dataset, frame = sample_frames(mixture, seed, np.arange(30_000))
    for number, size in enumerate(sizes):
        assert_passes(frame[dataset == number], size)


def test_passes_go_on_over_block_borders():
    mixture = make_mixture((1000, 777), (1.0, 1.0))
    dataset, frame = sample_frames(mixture, 3, BLOCK - 20_000 + np.arange(40_000))
    for number, size in enumerate(mixture.sizes):
        counts = np.bincount(frame[dataset == number], minlength=size)
        assert counts.max() - counts.min() <= 2  # whole passes between two partial ones


@given(st.integers(0, 10**12), st.integers(1, 300), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_draw_is_a_pure_function_of_the_sample_number(first, count, seed):
    mixture = make_mixture((10_000, 37, 5_000_000), (1.0, 3.0, 0.2))
    samples = first + np.arange(count)
    dataset, frame = sample_frames(mixture, seed, samples)
    for part in np.array_split(np.random.default_rng(0).permutation(count), 3):
        if len(part):
            np.testing.assert_array_equal(sample_frames(mixture, seed, samples[part]), (dataset[part], frame[part]))
    assert (frame < np.asarray(mixture.sizes)[dataset]).all() and (frame >= 0).all()


@given(st.lists(st.tuples(st.integers(1, 10**7), st.floats(0.01, 100)), min_size=1, max_size=28), st.booleans())
@settings(max_examples=50, deadline=None)
def test_shares_follow_the_weights(datasets, balance):
    sizes, weights = zip(*datasets, strict=True)
    mixture = make_mixture(sizes, weights, balance=balance)
    wanted = np.asarray(weights) * (np.asarray(sizes) if balance else 1)
    assert sum(mixture.counts) == BLOCK and min(mixture.counts) >= 1
    np.testing.assert_allclose(mixture.shares, wanted / wanted.sum(), atol=(len(sizes) + 1) / BLOCK)
    drawn = np.bincount(sample_frames(mixture, 0, np.arange(BLOCK))[0], minlength=len(sizes))
    np.testing.assert_array_equal(drawn, mixture.counts)


@given(st.integers(0, 3 * BLOCK), st.integers(0, 1000), st.integers(1, 8))
@settings(max_examples=15, deadline=None)
def test_passes_go_on_over_a_phase_border(border, seed, block):
    """Dropping a dataset takes nothing from the others: each still gives every frame once per pass."""
    first = make_mixture((1000, 777, 50), (1.0, 1.0, 2.0), block=block, shuffle=100)
    second = first.without((1.0, 1.0, 2.0), frozenset([0]))
    drawn = count_draws(first, seed, border)
    before = sample_frames(first, seed, np.arange(border))
    np.testing.assert_array_equal(drawn, np.bincount(before[0], minlength=3))
    after = sample_frames(second, seed, np.arange(30_000), drawn)
    assert 0 not in after[0]
    for number in (1, 2):
        own = np.concatenate([before[1][before[0] == number], after[1][after[0] == number]])
        assert_passes(own, first.sizes[number])
    kept = make_mixture((777, 50), (1.0, 2.0))
    assert second.counts == (0, *kept.counts) and second.epoch_length == kept.epoch_length


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_samples_that_stand_in(samples):
    """Replacements come from the same block, and differ at every attempt."""
    numbers = np.asarray(samples)
    found = np.stack([replacement_samples(numbers, attempt) for attempt in range(100)])
    np.testing.assert_array_equal(found[0], numbers)
    np.testing.assert_array_equal(found // BLOCK, np.tile(numbers // BLOCK, (100, 1)))
    assert all(len(set(column)) == 100 for column in found.T.tolist())


def test_epoch_length():
    assert make_mixture((1000,), (2.0,)).epoch_length == 1000
    even = make_mixture((1000, 3000), (1.0, 1.0), balance=False)
    assert even.shares == (0.5, 0.5) and even.epoch_length == 6000


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_weights_must_be_positive(weights):
    with pytest.raises(InputError, match="must be a positive number"):
        make_mixture((10, 10), weights)


def test_empty_mixture():
    with pytest.raises(InputError, match="mixture is empty"):
        make_mixture((), ())
