"""Overlapping calls of a detector."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from facespec.detections import Detections
from facespec.errors import ClosedError, FrameError, SpecError

MAX_DEPTH = 256


class DetectionStream:
    """Runs up to `depth` calls of a detector at once, each on a thread and a lane of its own. A context manager.

    Frames that were handed over must not be changed until their result is there.

    Args:
        detect_batch: Of the detector.
        depth: Calls that run at once, 1 to `MAX_DEPTH`.

    Raises:
        SpecError: Not such a depth.
    """

    def __init__(self, detect_batch: Callable[..., list[Detections]], depth: int) -> None:
        if type(depth) is not int or not 1 <= depth <= MAX_DEPTH:
            raise SpecError(f"the depth of a stream must be a number from 1 to {MAX_DEPTH}, got {depth!r}")
        self._detect_batch = detect_batch
        self._depth = depth
        self._free = threading.BoundedSemaphore(depth)
        self._threads = ThreadPoolExecutor(depth, thread_name_prefix="detect")
        self._closed = False

    def submit(self, frames: Sequence[Any], *options: Any) -> Future[list[Detections]]:
        """Hand over frames; return what will hold their faces. It blocks while `depth` calls are under way.

        Args:
            frames: As for `detect_batch`.
            options: Passed on to `detect_batch`, for instance a `StageTimer` that no other call uses meanwhile.

        Raises:
            ClosedError: Its context has been left.
        """
        self._free.acquire()
        try:
            future = self._threads.submit(self._detect_batch, frames, *options)
        except BaseException:
            self._free.release()
            if self._closed:
                raise ClosedError("the stream is closed: frames go to it inside its with block") from None
            raise
        future.add_done_callback(lambda _: self._free.release())
        return future

    def map(self, frames: Iterable[Any]) -> Iterator[tuple[Any, Detections]]:
        """Yield each frame with its faces, in order; at most `depth` frames are taken ahead."""
        if getattr(frames, "ndim", 4) < 4:
            raise FrameError("map takes the frames of a video; one frame goes to detect")
        waiting: deque[tuple[Any, Future[list[Detections]]]] = deque()
        for frame in frames:
            done = None
            if len(waiting) == self._depth:
                ready, future = waiting.popleft()
                done = ready, future.result()[0]
            waiting.append((frame, self.submit([frame])))
            if done is not None:  # after the next is under way: the caller takes its time
                yield done
        while waiting:
            ready, future = waiting.popleft()
            yield ready, future.result()[0]

    def __enter__(self) -> DetectionStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._threads.shutdown(wait=True)
