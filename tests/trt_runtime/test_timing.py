from __future__ import annotations

import pytest

from trt_runtime import timing
from trt_runtime.timing import StageTimer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows, in seconds; a test sets it."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
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
