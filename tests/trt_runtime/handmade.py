"""A detector without a model: it tells from a frame's first pixel how many faces it "finds" there, 8 at most."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from facespec.letterbox import Frame, Letterbox
from facespec.spec import DecodeSpec, ModelSpec, NetworkSize
from trt_runtime.detector import Lane, RetinaFaceDetector
from trt_runtime.measure import StageTimer

SPEC = ModelSpec(decode=DecodeSpec(max_detections=8))


def frame_of(faces: int, size_hw: tuple[int, int] = (32, 64)) -> Frame:
    return np.full((*size_hw, 3), faces, np.uint8)


class HandmadeLane:
    """Its outputs lie in buffers that serve the next call, as those of a GPU do."""

    keeps_shapes = False

    def __init__(self, detector: HandmadeDetector) -> None:
        self.detector, self.closed, self.runs = detector, False, 0
        self._buffers: dict[int, list[Any]] = {}

    def run(self, frames: Sequence[Any], boxes: Sequence[Letterbox], timer: StageTimer | None) -> list[Any]:
        assert not self.closed
        self.runs += 1
        self.detector.calls.append([int(frame.flat[0]) for frame in frames])
        if timer is not None:
            timer.begin("network")
        self.detector.on_run(self)
        outputs = self._buffers.setdefault(
            len(frames),
            [
                np.zeros((len(frames), *shape), kind)
                for kind, shape in self.detector.spec.decode.outputs.values()
            ],
        )  # fmt: skip
        counts, found_boxes, scores, landmarks, candidates = outputs
        for slot, frame in enumerate(frames):
            value = int(frame.flat[0])
            counts[slot] = candidates[slot] = min(value, 8)
            found_boxes[slot] = np.arange(32).reshape(8, 4) + value
            scores[slot] = np.linspace(0.9, 0.2, 8)
            landmarks[slot] = np.arange(80).reshape(8, 5, 2) + value
        return self.detector.change(outputs)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class HandmadeDetector(RetinaFaceDetector):
    """What a test may look at, and into what it may reach.

    Attributes:
        lanes: All that were made.
        calls: Of every run of a lane, the first pixels of its frames.
        on_run: Called in the middle of each run.
        change: What becomes of its outputs.
        on_new: Called before a lane is made.
    """

    backend = "handmade"

    def __init__(self, size: NetworkSize = None, score_threshold: float | None = 0.05) -> None:
        self.lanes: list[HandmadeLane] = []
        self.calls: list[list[int]] = []
        self.on_run: Callable[[HandmadeLane], object] = lambda lane: None
        self.on_new: Callable[[], object] = lambda: None
        self.change: Callable[[list[Any]], list[Any]] = lambda outputs: outputs
        super().__init__(SPEC, [], score_threshold, size)

    def _new_lane(self) -> Lane:
        self.on_new()
        self.lanes.append(HandmadeLane(self))
        return self.lanes[-1]


def in_time(call: Callable[[], object], seconds: float = 20) -> None:
    """Call something that might hang; fail after a while instead."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]
