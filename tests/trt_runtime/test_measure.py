from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from trt_runtime import measure
from trt_runtime.measure import Latency, Ratio, StageTimer, speed_ratio, take_turns


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


# what a time depends on


def test_the_environment_names_versions_and_what_is_missing() -> None:
    found = measure.environment("numpy", "no-such-package", "opencv-python")
    assert list(found["versions"]) == ["python", "numpy", "no-such-package", "opencv-python"]
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["opencv-python"] == importlib.metadata.version("opencv-python")
    assert found["versions"]["no-such-package"] is None
    assert found["machine"] == measure.machine()
    assert found["machine"]["cpu"]
    assert list(found) == ["date", "command", "machine", "versions"]


def test_the_day_is_that_of_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the far side of the date line, whichever half of the day it is."""
    days = set()
    for zone in ("UTC+14", "UTC-14"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        days.add(measure.environment()["date"])
    monkeypatch.undo()
    time.tzset()
    today = datetime.now(timezone.utc)
    assert len(days) == 1
    assert days <= {(today - timedelta(minutes=minutes)).strftime("%Y-%m-%d") for minutes in (0, 5)}


def test_the_command_can_be_typed_again(tmp_path: Path) -> None:
    (tmp_path / "asked.py").write_text("from trt_runtime import measure\nprint(measure.environment()['command'])\n")
    result = subprocess.run(
        [sys.executable, "-m", "asked", "--model", "m.onnx", "--batch", "1,4"], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True,
    )  # fmt: skip
    assert result.stdout == "python -m asked --model m.onnx --batch 1,4\n"


CPUINFO = """processor\t: 0
model name\t: AMD EPYC 9R14  
flags\t\t: fpu sse4_2 avx2 {flags}

processor\t: 1
model name\t: another
flags\t\t: fpu sse4_2 avx2 {flags}
"""


@pytest.mark.parametrize(
    ("flags", "avx512", "amx"),
    [("", False, False), ("avx512f avx512bw", True, False), ("avx512f amx_bf16 amx_tile", True, True)],
)
def test_the_processor_of_another_machine(
    flags: str, avx512: bool, amx: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(flags=flags))
    monkeypatch.setattr(measure, "Path", lambda name: tmp_path / Path(name).name)
    assert measure.machine() == {
        "cpu": "AMD EPYC 9R14", "cores": measure.cores(), "avx512": avx512, "amx": amx, "system": platform.system(),
        "gpu": None,
    }  # fmt: skip


@pytest.mark.parametrize("content", [None, "processor: 0\nBogoMIPS: 50.00\n"])
def test_a_processor_without_a_name(content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on ARM, and where there is no /proc."""
    if content:
        (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr(measure, "Path", lambda name: tmp_path / Path(name).name)
    found = measure.machine()
    assert found["cpu"] == (platform.processor() or platform.machine())
    assert not found["avx512"]
    assert not found["amx"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_cores_are_those_that_may_be_used() -> None:
    code = (
        "import os\nfrom trt_runtime.measure import cores\nbefore = cores()\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(before, cores())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(len(os.sched_getaffinity(0))), "1"]


def test_cores_where_no_one_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for count, expected in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert measure.cores() == expected


def test_the_load_is_that_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 2.5, 3.5), raising=False)
    assert measure.load_average() == 1.5
    monkeypatch.delattr(os, "getloadavg")
    assert measure.load_average() is None


def test_a_machine_is_busy_when_more_than_a_quarter_of_its_cores_are() -> None:
    assert [measure.busy(load, 4) for load in (0.0, 1.0, 1.01, 4.0)] == [False, False, True, True]
    assert not measure.busy(None, 4)
    assert [measure.busy(1.5, cores) for cores in (2, 8)] == [True, False]


# stages of a frame


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows, in seconds; a test sets it."""
    now = [100.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    return now


def test_stages_add_up_in_milliseconds_in_the_order_they_first_occur(clock: list[float]) -> None:
    timer = StageTimer()
    for stage, seconds in (("read", 0.25), ("network", 0.5), ("read", 1.0)):
        with timer(stage):
            clock[0] += seconds
        clock[0] += 10  # between stages
    timer.add("encode", 3.5)
    timer.add("network", 1.5)
    assert list(timer.total_ms.items()) == [("read", 1250.0), ("network", 501.5), ("encode", 3.5)]


def test_a_stage_that_fails_has_taken_its_time(clock: list[float]) -> None:
    timer = StageTimer()

    def write() -> None:
        with timer("write"):
            clock[0] += 0.125
            raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        write()
    assert timer.total_ms == {"write": 125.0}


def test_stages_may_lie_in_each_other(clock: list[float]) -> None:
    timer = StageTimer()
    with timer("outer"):
        clock[0] += 1
        with timer("inner"):
            clock[0] += 2
    assert timer.total_ms == {"inner": 2000.0, "outer": 3000.0}


def test_graphs_are_not_taken_apart_unless_asked_for() -> None:
    assert not StageTimer().fine
    assert StageTimer(fine=True).fine
    assert StageTimer().total_ms == {}


def test_a_stage_lasts_until_the_next_begins(clock: list[float]) -> None:
    timer = StageTimer()
    for stage, seconds in (("upload", 0.25), ("graph", 0.5), ("", 4.0), ("upload", 1.0), ("", 8.0), ("", 16.0)):
        timer.begin(stage)
        clock[0] += seconds
    assert timer.total_ms == {"upload": 1250.0, "graph": 500.0}
