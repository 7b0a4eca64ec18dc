from __future__ import annotations

import time

import numpy as np
import pytest

from trt_runtime import measure
from trt_runtime.measure import Latency, Ratio, speed_ratio, take_turns


def _samples(median: float, drift: np.ndarray, seed: int) -> np.ndarray:
    """(25, 8) times around a median, with 5 % of noise of their own, in rounds that share a drift."""
    return median * drift[:, None] * np.random.default_rng(seed).lognormal(0, 0.05, (25, 8))


@pytest.fixture
def drift() -> np.ndarray:
    return np.random.default_rng(0).lognormal(0, 0.2, 25)


# what samples say


def test_percentiles_are_those_of_the_samples() -> None:
    times = np.random.default_rng(0).permutation(np.arange(1.0, 102.0)).reshape(1, 101)  # 1 to 101 ms
    assert Latency.of(times) == Latency(mean=51, min=1, p50=51, p95=96, p99=100)
    assert Latency.of(np.array([[1.0, 2.0]])).p50 == 1.5
    assert Latency.of(np.array([[1.0, 1.0], [1.0, 9.0]])).mean == 3  # and not the median
    assert Latency.of(np.full((1, 1), 7.0)) == Latency(7, 7, 7, 7, 7)


def test_figures_are_written_to_a_tenth_of_a_microsecond() -> None:
    found = Latency(1.23456, 0.00004, 0.00006, 1e3 / 3, 2).to_dict()
    assert list(found.items()) == [("mean", 1.2346), ("min", 0.0), ("p50", 0.0001), ("p95", 333.3333), ("p99", 2)]


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (Ratio(1.5, 1.2, 1.8), "1.500 [1.200, 1.800]  1.50 times as fast"),
        (Ratio(0.5, 0.4, 0.625), "0.500 [0.400, 0.625]  2.00 times as slow"),
        (Ratio(1.1, 0.9, 1.3), "1.100 [0.900, 1.300]  no difference beyond noise"),
        (Ratio(1.1, 1.0, 1.3), "1.100 [1.000, 1.300]  no difference beyond noise"),
        (Ratio(0.9, 0.8, 1.0), "0.900 [0.800, 1.000]  no difference beyond noise"),
        (Ratio(1.1, 1.001, 1.3), "1.100 [1.001, 1.300]  1.10 times as fast"),
        (Ratio(0.9, 0.8, 0.999), "0.900 [0.800, 0.999]  1.11 times as slow"),
    ],
)
def test_a_ratio_in_words(ratio: Ratio, words: str) -> None:
    """Where the interval ends at 1 it holds it."""
    assert str(ratio) == words
    assert ratio.is_noise == ("noise" in words)


def test_a_difference_is_told_from_noise(drift: np.ndarray) -> None:
    """Rounds drift by 20 % and calls by 5 %: equal detectors are not told apart, 1.5 times as fast is found."""
    base = _samples(10, drift, 1)
    same, faster = speed_ratio(base, _samples(10, drift, 2)), speed_ratio(base, _samples(10 / 1.5, drift, 3))
    assert same.is_noise
    assert "no difference" in str(same)
    assert faster.low < 1.5 < faster.high
    assert faster.low > 1.2
    assert faster.times == pytest.approx(1.5, rel=0.1)
    assert "1.5" in str(faster)
    slower = speed_ratio(_samples(10 / 1.5, drift, 3), base)
    assert slower.times == pytest.approx(1 / faster.times)
    assert "times as slow" in str(slower)
    assert speed_ratio(base, base) == (1, 1, 1)


def test_the_interval_holds_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a common drift, the hardest case: 95 % of intervals, less what 25 rounds cost a bootstrap."""
    monkeypatch.setattr(measure, "RESAMPLES", 200)
    random = np.random.default_rng(5)
    held = [
        speed_ratio(
            _samples(10, random.lognormal(0, 0.15, 25), 2 * trial),
            _samples(10, random.lognormal(0, 0.15, 25), 2 * trial + 1),
        ).is_noise
        for trial in range(100)
    ]
    assert 87 <= sum(held) <= 99


def test_both_are_resampled_by_the_same_rounds() -> None:
    """However much rounds differ: one that takes half as long in each of them is twice as fast, beyond doubt."""
    base = np.random.default_rng(1).lognormal(0, 2, (25, 1)) * np.ones(4)
    assert speed_ratio(base, base / 2) == pytest.approx((2, 2, 2))
    assert speed_ratio(base / 2, base) == pytest.approx((0.5, 0.5, 0.5))


def test_rounds_are_resampled_and_not_calls() -> None:
    """A thousand calls that are alike in each of nine rounds say as much as one."""
    times = np.random.default_rng(2).lognormal(0, 0.5, (9, 1))
    few = speed_ratio(times, np.ones_like(times))
    assert speed_ratio(np.repeat(times, 1000, axis=1), np.ones((9, 1000))) == few
    assert few.low < few.times < few.high


def test_the_interval_holds_95_percent_of_the_medians() -> None:
    """Of 17 rounds the median of a resample is at most the k-th smallest when 9 draws are: binomial. P(k = 4) = 0.8 %
    and P(k = 5) = 3.6 %, so 2.5 % end at the fifth, and by symmetry at the fifth from above; 5 % would at the sixth.
    """
    times = np.random.default_rng(3).permutation(np.arange(1.0, 18.0))[:, None]
    assert speed_ratio(times, np.ones((17, 1))) == (9, 5, 13)
    inverse = speed_ratio(np.ones((17, 1)), times)
    assert inverse == pytest.approx((1 / 9, 1 / 13, 1 / 5))


def test_the_ratio_is_that_of_the_medians_and_the_same_each_time(drift: np.ndarray) -> None:
    """One call that took a second changes nothing."""
    base, other = _samples(10, drift, 1), _samples(8, drift, 2)
    base[3, 5] = other[7, 1] = 1000
    found = speed_ratio(base, other)
    assert found.times == pytest.approx(np.median(base) / np.median(other))
    assert found.high < 1.5
    assert speed_ratio(base, other) == found


# taking turns


def test_turns_rotate_and_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 2)
    seen: list[tuple[str, int]] = []
    done: list[int] = []
    calls = [lambda index, name=name: seen.append((name, index)) for name in "ab"]
    first, second = take_turns(calls, 3, pause_s=1e-6, progress=done.append)
    # 2 rounds of 2 calls; in each turn its first call is made twice more beforehand
    turns = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert [turn[0][0] for turn in turns] == ["a", "b", "b", "a"]
    assert [index for _, index in turns[0]] == [0, 0, 0, 1]
    assert [index for _, index in turns[3]] == [2, 2, 2, 3]
    assert first.shape == second.shape == (2, 2)
    assert sum(done) == 8
    assert done == [2, 2, 2, 2]
    seen.clear()
    take_turns(calls, 3, pause_s=0)
    assert len(seen) == 8


def test_times_are_those_of_the_calls() -> None:
    (slept,) = take_turns([lambda index: time.sleep(0.002 * (index + 1))], 3, pause_s=0)
    assert (slept.ravel() >= [2, 4, 6]).all()


class Clock:
    """A clock that stands still unless it is moved, and whose pauses are written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pauses = 50.0, list[float]()
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure.time, "sleep", self.pauses.append)


def test_each_time_lies_at_its_call_its_round_and_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(measure, "ROUNDS", 3)

    def take(seconds: float) -> None:
        clock.now += seconds

    calls = [lambda index, factor=factor: take(factor * (index + 1)) for factor in (1, 8, 64)]
    for pause_s in (0.0, 0.25):
        found = take_turns(calls, 6, pause_s=pause_s)
        expected = np.arange(1, 7).reshape(3, 2) * 1e3
        for samples, factor in zip(found, (1, 8, 64), strict=True):
            np.testing.assert_array_equal(samples, factor * expected)
    assert clock.pauses == [0.25] * 9  # before every turn


def test_there_is_a_pause_unless_it_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    take_turns([lambda index: None] * 2, 1)
    assert clock.pauses == [0.1] * 2


@pytest.mark.parametrize(
    ("repeats", "shape"), [(1, (1, 1)), (2, (2, 1)), (25, (25, 1)), (26, (13, 2)), (200, (25, 8)), (201, (23, 9))]
)
def test_no_fewer_calls_than_asked_for_in_25_rounds_at_most(repeats: int, shape: tuple[int, int]) -> None:
    seen: list[int] = []
    (samples,) = take_turns([seen.append], repeats, pause_s=0)
    assert samples.shape == shape
    assert seen == list(range(shape[0] * shape[1]))
