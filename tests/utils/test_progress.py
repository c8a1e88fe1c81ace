"""Bars show the remaining time once it means something."""

import io
from types import SimpleNamespace

import pytest

from spatialvla_jax.utils import progress
from spatialvla_jax.utils.progress import Bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """A clock that the test advances."""
    clock = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


def test_the_first_update_is_left_out_of_the_remaining_time(clock) -> None:
    with Bar(total=10, unit="step", file=io.StringIO(), initial=2) as bar:
        assert "?" not in str(bar) and "2/10 [00:00]" in str(bar)
        clock[0] += 60  # compilation
        bar.update()
        for _ in range(2):
            assert "<" not in str(bar), "one number says nothing about the others"
            clock[0] += 3
            bar.update()
        assert "5/10" in str(bar) and "<00:15,  3.00s/step" in str(bar)
        bar.update(-3)
        assert "<" not in str(bar), "back to an earlier step"


def test_a_quick_bar_shows_no_remaining_time(clock) -> None:
    with Bar(total=100, file=io.StringIO()) as bar:
        for _ in range(50):
            clock[0] += 0.01
            bar.update()
        assert "50/100 [00:00]" in str(bar)


def test_work_of_an_earlier_run_is_not_counted(clock) -> None:
    with Bar(total=None, file=io.StringIO()) as bar:
        assert "0it" in str(bar)
        bar.total = 1000
        bar.update(900)
        for _ in range(2):
            clock[0] += 10
            bar.update(1)
        assert "<16:20" in str(bar)  # 98 of 10 s each


def test_iterating_counts_too(clock) -> None:
    def slowly():
        for i in range(4):
            clock[0] += 10
            yield i

    bar = Bar(slowly(), total=5, file=io.StringIO(), mininterval=0, miniters=1)
    assert list(bar) == [0, 1, 2, 3]
    assert "<00:10" in str(bar)
