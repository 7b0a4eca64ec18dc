"""Timing calls against each other, and what the samples say."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]
"""(rounds, calls) milliseconds of each call."""

ROUNDS = 25
PAUSE_S = 0.1
SETTLE_CALLS = 2
RESAMPLES = 2000


@dataclass(frozen=True)
class Latency:
    """How long calls took, in milliseconds."""

    mean: float
    min: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, samples_ms: Samples) -> Latency:
        """Return the figures of some samples, at least one; percentiles are interpolated."""
        p50, p95, p99 = np.percentile(samples_ms, (50, 95, 99))
        return cls(float(np.mean(samples_ms)), float(np.min(samples_ms)), float(p50), float(p95), float(p99))

    def to_dict(self) -> dict[str, float]:
        """Return the figures to a tenth of a microsecond, ready for JSON."""
        return {name: round(value, 4) for name, value in dataclasses.asdict(self).items()}


class Ratio(NamedTuple):
    """How many times as fast one is as another, by their medians, and the 95 % interval of that."""

    times: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 1, so that the samples show no difference."""
        return self.low <= 1 <= self.high

    def __str__(self) -> str:
        if self.is_noise:
            verdict = "no difference beyond noise"
        else:
            verdict = f"{self.times:.2f} times as fast" if self.times > 1 else f"{1 / self.times:.2f} times as slow"
        return f"{self.times:.3f} [{self.low:.3f}, {self.high:.3f}]  {verdict}"


def speed_ratio(base_ms: Samples, other_ms: Samples) -> Ratio:
    """Return how many times as fast `other` is as `base`.

    The interval is a bootstrap over whole rounds, the same rounds for both: calls of one round are alike because the
    machine was in one state, and treating them as independent would make the interval too narrow.

    Args:
        base_ms: (rounds, calls).
        other_ms: (rounds, calls), measured in turns with it.
    """
    random = np.random.default_rng(0)
    draws = random.integers(0, len(base_ms), (RESAMPLES, len(base_ms)))
    ratios = [np.median(base_ms[rounds]) / np.median(other_ms[rounds]) for rounds in draws]
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Ratio(float(np.median(base_ms) / np.median(other_ms)), float(low), float(high))


def take_turns(
    calls: Sequence[Callable[[int], object]],
    repeats: int,
    pause_s: float = PAUSE_S,
    progress: Callable[[int], object] = lambda calls: None,
) -> list[Samples]:
    """Time several callables in turns, so that all see the same states of the machine.

    Each round gives each of them a turn of consecutive calls, and every round begins with another one. A pause before
    a turn lets the threads of the one before go to sleep, which many libraries keep spinning for a while; after a
    pause the first calls of a turn are not recorded.

    Args:
        calls: What to time; each is given the number of the call, from 0.
        repeats: Least number of calls of each that are recorded.
        pause_s: Seconds before a turn; 0 for no pause.
        progress: Called with the number of recorded calls that were made since it was last called.

    Returns:
        For each callable (rounds, calls) milliseconds.
    """
    turn = -(-repeats // ROUNDS)
    rounds = -(-repeats // turn)
    samples = np.empty((len(calls), rounds, turn))
    for number in range(rounds):
        for step in range(len(calls)):
            which = (number + step) % len(calls)
            call, first = calls[which], number * turn
            if pause_s:
                time.sleep(pause_s)
                for _ in range(SETTLE_CALLS):
                    call(first)
            for index in range(turn):
                start = time.perf_counter()
                call(first + index)
                samples[which, number, index] = (time.perf_counter() - start) * 1e3
            progress(turn)
    return list(samples)
