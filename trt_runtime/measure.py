"""Timing stages of a frame and calls against each other, what the samples say, and what they depend on."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from facespec.cli import PROGRAM, package_version

Samples = NDArray[np.float64]
"""(rounds, calls) milliseconds of each call."""

ROUNDS = 25
PAUSE_S = 0.1
SETTLE_CALLS = 2
RESAMPLES = 2000

BUSY_SHARE = 0.25
"""Share of the cores that others may use before a measurement is doubtful."""


class StageTimer:
    """Adds up the time spent in named stages, in the order they first occur. One thread at a time may use it.

    Args:
        fine: On a GPU, time what otherwise runs as one graph, part by part; the parts together take longer.
    """

    def __init__(self, fine: bool = False) -> None:
        self.fine = fine
        self.total_ms: dict[str, float] = {}
        self._stage, self._start = "", 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block as part of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, (time.perf_counter() - start) * 1e3)

    def begin(self, stage: str) -> None:
        """End the stage that was begun before, if one was, and begin another; "" is none."""
        now = time.perf_counter()
        if self._stage:
            self.add(self._stage, (now - self._start) * 1e3)
        self._stage, self._start = stage, now

    def add(self, stage: str, ms: float) -> None:
        """Add a time that was measured elsewhere."""
        self.total_ms[stage] = self.total_ms.get(stage, 0.0) + ms

    def add_all(self, other: StageTimer) -> None:
        """Add what another has measured."""
        for stage, ms in other.total_ms.items():
            self.add(stage, ms)


class Latency(NamedTuple):
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
        return {name: round(value, 4) for name, value in self._asdict().items()}


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
    machine was in one state, and treating them as independent would make the interval too narrow. The samples must have
    been measured in turns.
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


def environment(*packages: str) -> dict[str, Any]:
    """Return date, command line, machine and versions of the named packages; what is not installed is None."""
    module = sys.modules["__main__"].__spec__
    program = sys.argv[0] if module is None or sys.argv[0].startswith(PROGRAM) else f"python -m {module.name}"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join([program, *sys.argv[1:]]),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in packages}},
    }


def machine() -> dict[str, Any]:
    """Return processor, cores that may be used, vector extensions and system; a caller that uses a GPU sets `gpu`."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*: (.*)", cpuinfo)
    return {
        "cpu": cpu[1].strip() if cpu else platform.processor() or platform.machine(),
        "cores": cores(),
        "avx512": "avx512f" in cpuinfo,
        "amx": "amx_tile" in cpuinfo,
        "system": platform.system(),
        "gpu": None,
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """Return how many processes ran or waited to run, averaged over the last minute; None if unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busy(load: float | None, cores: int) -> bool:
    """Whether a load leaves too little of the machine for a measurement to be trusted."""
    return load is not None and load > BUSY_SHARE * cores
