"""What TRTRetinaFace does while a device fails: threads, a stream and a pipeline through a fault.

The engine is a stand-in on any `Device`: it copies the outputs for one face to where a network would write them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from facespec.errors import ClosedError, RetinaFaceError
from facespec.spec import ModelSpec
from trt_runtime.gpu.engine import Shape
from trt_runtime.gpu.sidecar import Profile
from trt_runtime.media.files import TimedFrame
from trt_runtime.media.pipeline import Job, PipelineOptions, run_pipeline
from trt_runtime.trt import TRTRetinaFace

FRAME = np.zeros((64, 64, 3), np.uint8)
LIMIT_S = 20.0
"""Seconds after which a call hangs."""

CALLS = 12
"""Calls of each thread."""


class StubEngine:
    """See the module."""

    backend = "stub"

    def __init__(self, device: Any) -> None:
        self.spec = ModelSpec()
        self.files: list[Path] = []
        self.profile = Profile((1, 1, 8), ((32, 32), (64, 64), (640, 640)))
        self.device = device
        self.open_contexts = 0
        self.closed = False

    def context(self, repeats: bool = True) -> StubContext:
        return StubContext(self)

    def save(self) -> None:
        pass

    def letterbox(self, frames: int, shape: Shape, images: int, stream: Any) -> None:
        pass

    def environment(self) -> dict[str, Any]:
        return {"backend": self.backend}

    def close(self) -> None:
        assert not self.open_contexts
        self.closed = True


class StubContext:
    """A context of a `StubEngine`."""

    def __init__(self, engine: StubEngine) -> None:
        self._engine = engine
        self._outputs: list[tuple[int, Any]] = []
        engine.open_contexts += 1

    def set_shape(self, shape: Shape) -> int:
        self._batch = shape[0]
        return 256

    def bind(self, addresses: dict[str, int], workspace: Any) -> None:
        engine = self._engine
        self._outputs = []
        for name, (kind, rest) in engine.spec.decode.outputs.items():
            values = np.zeros((self._batch, *rest), kind)
            if name.startswith("num"):
                values[:] = 1
            else:
                values[:, 0] = 0.9 if name == "scores" else 16
            room = engine.device.pinned(values.nbytes)
            room[:] = values.reshape(-1).view(np.uint8)
            self._outputs.append((addresses[name], room))

    def enqueue(self, stream: Any) -> None:
        for address, room in self._outputs:
            self._engine.device.copy_in(address, room, stream)

    def can_capture(self, stream: Any) -> bool:
        return True

    def plugin_share(self, stream: Any) -> float:
        return 0.0

    def close(self) -> None:
        self._outputs = []
        self._engine.open_contexts -= 1


def open_detector(device: Any, **options: Any) -> TRTRetinaFace:
    """Return a detector that finds one face in every frame."""
    return TRTRetinaFace(StubEngine(device), device=device, **{"size_hw": (64, 64), **options})


def outcome(call: Callable[[], Any]) -> str:
    """Return "ok", or the name of the error of ours that a call raises; other errors go through."""
    try:
        call()
    except RetinaFaceError as error:
        return type(error).__name__
    return "ok"


def detect(detector: TRTRetinaFace) -> str:
    """Return what came of one frame."""

    def call() -> None:
        (faces,) = detector.detect_batch([FRAME])
        assert len(faces) == 1

    return outcome(call)


def in_time(call: Callable[[], Any]) -> Any:
    """Return what a call returns on a thread of its own, which must end in time."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), f"{call} hangs"
    assert found, f"{call} failed"
    return found[0]


def by_threads(detector: TRTRetinaFace, fault: Callable[[], None], count: int = 4) -> Counter[str]:
    """Return how often each outcome came in threads that go on after errors."""
    ready = threading.Barrier(count + 1)

    def work() -> list[str]:
        ready.wait(LIMIT_S)
        return [detect(detector) for _ in range(CALLS)]

    def all_threads() -> Counter[str]:
        found: list[list[str]] = []
        threads = [threading.Thread(target=lambda: found.append(work())) for _ in range(count)]
        for thread in threads:
            thread.start()
        fault()
        ready.wait(LIMIT_S)
        for thread in threads:
            thread.join()
        assert len(found) == count
        return sum(map(Counter, found), Counter())

    return in_time(all_threads)


def by_stream(detector: TRTRetinaFace, fault: Callable[[], None]) -> Counter[str]:
    """Return the outcomes of calls through `detector.stream()`, which goes on after errors."""

    def work() -> Counter[str]:
        with detector.stream(3) as stream:
            fault()
            futures = [stream.submit([FRAME]) for _ in range(CALLS)]
            found = Counter(outcome(future.result) for future in futures)
        with detector.stream(3) as stream:
            found[outcome(lambda: list(stream.map([FRAME] * CALLS)))] += 1
        return found

    return in_time(work)


class Made:
    """A source of black frames."""

    rate, damaged, reconnects, name = 25.0, 0, 0, "made"

    def __init__(self, live: bool) -> None:
        self.live, self.frame_count, self.stopped = live, 0 if live else CALLS, False

    def __iter__(self) -> Iterator[TimedFrame]:
        number = 0
        while not self.stopped and number < (10_000 if self.live else CALLS):
            yield TimedFrame(FRAME.copy(), float(number))
            number += 1

    def stop(self) -> None:
        self.stopped = True

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def by_pipeline(detector: TRTRetinaFace, fault: Callable[[], None]) -> Counter[str]:
    """Return what became of two files and a live source."""

    @contextmanager
    def output(source: Any) -> Iterator[Callable[..., None]]:
        yield lambda seen, timer: None

    def work() -> Counter[str]:
        sources = [Made(False), Made(False), Made(True)]
        jobs: Any = [Job("made", lambda source=source: source, output) for source in sources]
        fault()
        calls = 0

        def tick(reports: Any) -> bool:
            nonlocal calls
            calls += 1
            return calls < 10  # a second: the live source has no end of its own

        # at most two frames a call: so there are calls enough, of two shapes, that each lane captures one of them
        report = run_pipeline(detector, jobs, PipelineOptions(batch=2), tick=tick)
        return Counter(type(each.error).__name__ if each.error else "ok" for each in report.sources)

    return in_time(work)


WAYS = SimpleNamespace(threads=by_threads, stream=by_stream, pipeline=by_pipeline)


def close(detector: TRTRetinaFace) -> None:
    """Close a detector from two threads at once, and see that it is closed and holds nothing."""
    assert [in_time(lambda: outcome(detector.close)) for _ in range(2)] == ["ok", "ok"]
    assert detector._idle == []
    engine: Any = detector.engine
    assert engine.closed
    assert outcome(lambda: detector.detect(FRAME)) == ClosedError.__name__
