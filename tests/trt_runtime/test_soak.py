"""benchmarks.soak in small: threads that share a detector, detectors opened and closed, and that it would notice."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from benchmarks.soak import DETECTORS, SIDES, main, make_frames, soak_apart, soak_frames, soak_reopens
from facespec.detections import Detections
from facespec.letterbox import Frame
from trt_runtime import OrtRetinaFace
from trt_runtime.measure import StageTimer

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")

FRAMES = {"calls": 300, "settle": 100, "threads": 4}
REOPENS = {"calls": 20, "settle": 5}
SANE_MB = 60
"""What allocators and other tests may hold on to; to keep every frame, or every detector, would take more."""


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return make_frames()


def test_frames_are_many_sizes_with_faces_and_without(frames: list[Frame], plugin_form: Path) -> None:
    sides = np.array([frame.shape[:2] for frame in frames])
    assert len({tuple(side) for side in sides.tolist()}) == len(frames) == 60
    assert SIDES[0] <= sides.min() < 60
    assert 1000 < sides.max() <= SIDES[1]
    with DETECTORS["OrtRetinaFace"](plugin_form) as detector:
        found = [len(detector.detect(frame)) for frame in frames]
    assert sum(count > 0 for count in found) >= 20
    assert sum(count == 0 for count in found) >= 15


@pytest.mark.parametrize("name", DETECTORS)
def test_threads_get_the_same_bits_and_memory_does_not_grow(name: str, frames: list[Frame], plugin_form: Path) -> None:
    soaked = soak_frames(lambda: DETECTORS[name](plugin_form), frames, **FRAMES)
    assert soaked["identical"] == soaked["calls"] == 400
    assert soaked["growth_mb"] < SANE_MB


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_what_is_closed_gives_its_memory_back(name: str, frames: list[Frame], plugin_form: Path) -> None:
    soaked = soak_reopens(lambda: DETECTORS[name](plugin_form), frames, **REOPENS)
    assert soaked["identical"] == soaked["calls"] == 25
    assert soaked["growth_mb"] < SANE_MB


@pytest.mark.parametrize("name", DETECTORS)
def test_what_is_closed_does_not_wait_for_the_garbage_collector(
    name: str, frames: list[Frame], plugin_form: Path
) -> None:
    gc.disable()  # what is in no circle goes at once, all the same
    try:
        with DETECTORS[name](plugin_form) as detector:
            detector.detect(frames[0])
            alive = weakref.ref(detector)
        del detector
        assert alive() is None
    finally:
        gc.enable()


def test_a_process_of_its_own_gives_the_same(plugin_form: Path) -> None:
    soaked = soak_apart("OrtRetinaFace", "frames", plugin_form, 10, 10, 4)
    assert soaked["identical"] == soaked["calls"] == 20


class _Hoarder(OrtRetinaFace):
    """Keeps a copy of every frame, and tells of its two hundredth result what is not so."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, size_hw=(160, 160))
        self._numbers = itertools.count(1)
        self._kept: list[Frame] = []

    def detect(self, frame: Frame, timer: StageTimer | None = None) -> Detections:
        self._kept.append(frame.copy())
        found = super().detect(frame, timer)
        return dataclasses.replace(found, truncated=not found.truncated) if next(self._numbers) == 200 else found


def test_a_leak_and_a_wrong_result_are_noticed(frames: list[Frame], plugin_form: Path) -> None:
    hoarders: list[OrtRetinaFace] = []  # never let go of

    def opener() -> OrtRetinaFace:
        hoarders.append(_Hoarder(plugin_form))
        return hoarders[-1]

    soaked = soak_frames(opener, frames, **FRAMES)
    assert soaked["identical"] == soaked["calls"] - 1
    assert soaked["growth_mb"] > SANE_MB
    soaked = soak_reopens(opener, frames, **REOPENS)
    assert soaked["identical"] == soaked["calls"]
    assert soaked["growth_mb"] > SANE_MB
    assert not soaked["passed"]


@pytest.mark.parametrize("field", ["frames", "threads", "reopens", "settle"])
def test_no_numbers_below_one(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["soak", "--out", str(tmp_path / "o.json"), f"--{field}", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"--{field} 0: give at least 1" in capsys.readouterr().err
