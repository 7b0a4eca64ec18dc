"""What every detector shares: how frames become batches, how threads share a model, how calls overlap."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from facespec.detections import Detections, to_detections
from facespec.errors import ClosedError, FrameError, ModelFileError, NonFiniteError, RetinaFaceError, SpecError
from facespec.letterbox import Frame, Letterbox, check_frame
from facespec.spec import MAX_NETWORK_PIXELS, ModelSpec, NetworkSize, check_size
from trt_runtime.measure import StageTimer

SHAPES = 256
"""Shapes of frames for which a detector remembers how they lie in the network input."""

MAX_DEPTH = 256
"""Calls that a `DetectionStream` runs at once, at most."""

_Placement = tuple[Letterbox, int]

Self = TypeVar("Self", bound="RetinaFaceDetector")
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ShapeCache(Generic[Key, Value]):
    """Makes a value for each key, and keeps those that were used last. Threads may share it.

    Args:
        capacity: Values kept.
        make: Makes the value of a key, which `get` gives it, and what else `get` was given.
        drop: Frees a value that is given up.
    """

    def __init__(
        self, capacity: int, make: Callable[..., Value], drop: Callable[[Value], None] = lambda _: None
    ) -> None:
        self.capacity = capacity
        self.made = 0
        self._make = make
        self._drop = drop
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def get(self, key: Key, *parts: Any) -> Value:
        """Return the value of a key; making one gives up the one that was not used for the longest time."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            while len(self._values) >= self.capacity:  # first, so that its memory is free for the new one
                self._drop(self._values.popitem(last=False)[1])
            value = self._values[key] = self._make(key, *parts)
            self.made += 1
            return value

    def clear(self) -> None:
        """Give up everything."""
        with self._lock:
            while self._values:
                self._drop(self._values.popitem()[1])


class Lane(Protocol):
    """What one call has for itself while it runs: a session's request, or a context, a stream and buffers on a GPU."""

    def run(self, frames: Sequence[Any], boxes: Sequence[Letterbox], stage: Callable[[str], Any]) -> list[NDArray[Any]]:
        """Return the outputs of a detector graph for a batch, `DecodeSpec.outputs` in its order, batch first.

        Args:
            frames: Frames as the caller gave them, checked.
            boxes: How they lie in the network input; all of one size.
            stage: Context manager that times a stage by its name.
        """

    def close(self) -> None:
        """Free what it holds; unless a lane has more to do, its memory goes with it."""
        return


class RetinaFaceDetector:
    """Base of the detectors. One object may be used by any number of threads; each call has a lane of its own.

    Attributes:
        backend: What runs the network.
        spec: The `ModelSpec` of the model.
        size_hw: What frames are letterboxed to: (height, width), the length of the longer side, or None, which runs
            each frame at its own size, padded to multiples of 32.
        files: The files of the model.
        max_batch: Frames that are worth handing over in one call.
    """

    backend = ""
    max_batch = 1

    def __init__(
        self, spec: ModelSpec, files: Sequence[Path], score_threshold: float | None, size: NetworkSize
    ) -> None:
        self.spec = spec
        self.files = list(files)
        self.size_hw = size
        self._score_threshold = spec.decode.run_threshold(score_threshold)
        self._shapes = [shape for _, shape in spec.decode.outputs.values()]
        # of a proxy: its own method would make a reference cycle, and its memory would wait for the garbage collector
        place = functools.partial(type(self)._place, weakref.proxy(self))
        self._placements: ShapeCache[tuple[tuple[int, int], NetworkSize], _Placement] = ShapeCache(SHAPES, place)
        self._changed = threading.Condition()
        self._idle: list[Lane] = []
        self._lent = 0
        self._closed = self._freed = False

    # what a backend supplies

    def _new_lane(self) -> Lane:
        raise NotImplementedError

    def _frame_hw(self, frame: Any) -> tuple[int, int]:
        """Return height and width of a frame this detector takes; raise FrameError for others."""
        height, width = check_frame(frame).shape[:2]
        return height, width

    def _batch_limit(self, size_hw: tuple[int, int]) -> int:
        """Return how many frames may run at once at a network size; raise FrameError where none may."""
        limit = MAX_NETWORK_PIXELS // (size_hw[0] * size_hw[1])
        if limit == 0:
            raise FrameError(
                f"a network input of {size_hw[0]}x{size_hw[1]} is too large: "
                "give size_hw (--size HEIGHTxWIDTH) to scale the frame down"
            )
        return limit

    def _hand_over(self, frame: Any) -> Any:
        """Return a frame as other threads may give it to `detect_batch`; see `DetectionStream.hand_over`."""
        return frame

    def environment(self) -> dict[str, Any]:
        """Return what the speed of this detector depends on: backend, versions, threads, device."""
        return {"backend": self.backend}

    def _free(self) -> None:
        """Free everything; called once, when no call is under way."""
        while self._idle:
            self._idle.pop().close()

    # what users call

    @property
    def score_threshold(self) -> float:
        """Lowest score reported; may be set, but not below the floor the model was exported with."""
        return self._score_threshold

    @score_threshold.setter
    def score_threshold(self, value: float) -> None:
        self._score_threshold = self.spec.decode.run_threshold(value)

    def detect(self, frame: Any, timer: StageTimer | None = None) -> Detections:
        """Return the faces of one frame, in its own pixels.

        Args:
            frame: uint8 (H, W, 3) BGR.
            timer: Adds up the time of each stage.

        Raises:
            FrameError: Not such a frame, or a size that the model does not take.
            NonFiniteError: The network gave NaN or infinity.
            ModelFileError: The backend failed on the model.
            ClosedError: The detector is closed.
        """
        return self.detect_batch([frame], timer)[0]

    def detect_batch(self, frames: Iterable[Any], timer: StageTimer | None = None) -> list[Detections]:
        """Return the faces of several frames, which may differ in size, in their order; see `detect`."""
        if getattr(frames, "ndim", 4) < 4:
            raise FrameError("detect_batch takes a list of frames; one frame goes to detect")
        self._check_open()
        frames = list(frames)
        placed = [self._placements.get((self._frame_hw(frame), self.size_hw)) for frame in frames]
        boxes = [box for box, _ in placed]
        results: list[Detections] = []
        while len(results) < len(frames):  # consecutive frames of one network size together
            start = len(results)
            size_hw, limit = boxes[start].size_hw, placed[start][1]
            stop = start + 1
            while stop < len(frames) and stop - start < limit and boxes[stop].size_hw == size_hw:
                stop += 1
            results += self._run(frames[start:stop], boxes[start:stop], timer)
        return results

    def stream(self, depth: int = 2) -> DetectionStream:
        """Return a context in which calls overlap: while one frame is computed the next is prepared.

        with detector.stream() as stream:
            for frame, faces in stream.map(frames):
                ...

        Args:
            depth: Calls that run at once.
        """
        return DetectionStream(self.detect_batch, depth, self._hand_over)

    def close(self) -> None:
        """Free what the detector holds; calls that are under way end first. It may be called again."""
        with self._changed:
            if self._closed:  # another thread may still be closing it
                self._changed.wait_for(lambda: self._freed)
                return
            self._closed = True
            self._changed.wait_for(lambda: not self._lent)
        try:
            self._free()
        finally:
            with self._changed:
                self._freed = True
                self._changed.notify_all()

    def __enter__(self: Self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # how a batch runs

    def _place(self, key: tuple[tuple[int, int], NetworkSize]) -> _Placement:
        """Return how frames of a (height, width) lie in a network size, and how many may run at once."""
        box = Letterbox.place(*key)
        return box, self._batch_limit(box.size_hw)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the detector is closed: make a new one")

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        """Lend a lane: an idle one, the last used first, or a new one."""
        with self._changed:
            self._check_open()
            self._lent += 1
            lane = self._idle.pop() if self._idle else None
        try:
            lane = lane or self._new_lane()
            try:
                yield lane
            except (FrameError, NonFiniteError):
                raise
            except BaseException:
                broken, lane = lane, None  # its state is unknown
                broken.close()
                raise
        finally:
            with self._changed:
                self._lent -= 1
                if lane is not None:
                    self._idle.append(lane)
                self._changed.notify_all()

    def _run(self, frames: Sequence[Any], boxes: Sequence[Letterbox], timer: StageTimer | None) -> list[Detections]:
        stage: Any = timer or nullcontext
        decode = self.spec.decode
        with self._lane() as lane:
            outputs = lane.run(frames, boxes, stage)
            with stage("results"):  # copies: the lane's buffers serve the next call
                shapes = [(len(frames), *shape) for shape in self._shapes]
                counts = outputs[0]
                if [output.shape for output in outputs] != shapes or not (
                    (counts >= 0) & (counts <= decode.max_detections)
                ).all():
                    raise ModelFileError("the model's outputs are not what it announces: export it again")
                return [
                    to_detections(box, decode, self._score_threshold, *values)
                    for box, *values in zip(boxes, *outputs, strict=True)
                ]


class DetectionStream:
    """Runs up to `depth` calls of a detector at once, each on a thread and a lane of its own. A context manager.

    Frames that were handed over must not be changed until their result is there. A frame on a GPU may still be written
    by work on the stream that is current on the thread that hands it over: it is read after that work.

    Args:
        detect_batch: Of the detector.
        depth: Calls that run at once, 1 to `MAX_DEPTH`.
        hand_over: Of the detector; see the method.

    Raises:
        SpecError: Not such a depth.
    """

    def __init__(
        self,
        detect_batch: Callable[..., list[Detections]],
        depth: int,
        hand_over: Callable[[Any], Any] = lambda frame: frame,
    ) -> None:
        if type(depth) is not int or not 1 <= depth <= MAX_DEPTH:
            raise SpecError(f"the depth of a stream must be a number from 1 to {MAX_DEPTH}, got {depth!r}")
        self._detect_batch = detect_batch
        self._hand_over = hand_over
        self._depth = depth
        self._free = threading.BoundedSemaphore(depth)
        self._threads = ThreadPoolExecutor(depth, thread_name_prefix="detect")
        self._closed = False

    def hand_over(self, frame: Any) -> Any:
        """Return a frame so that other threads may submit it: call it on the thread that has made the frame.

        Frames of the host stay what they are. Of one on the GPU it returns where that lies, and when it is complete:
        only the thread that made it knows on which stream that is. A frame that `submit` gets needs no such call if
        the same thread has made it.

        Raises:
            FrameError: It is on another device, or has another type, shape or layout.
        """
        return self._hand_over(frame)

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
            if getattr(frames, "ndim", 4) >= 4:  # else `detect_batch` refuses it
                frames = [self._hand_over(frame) for frame in frames]
            future = self._threads.submit(self._detect_batch, frames, *options)
        except RetinaFaceError as error:  # as if the call had raised it
            self._free.release()
            future = Future()
            future.set_exception(error.with_traceback(None))
            return future
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

        def oldest() -> tuple[Any, Detections]:
            frame, future = waiting.popleft()
            return frame, future.result()[0]

        for frame in frames:
            done = oldest() if len(waiting) == self._depth else None
            waiting.append((frame, self.submit([frame])))
            if done is not None:  # after the next is under way: the caller takes its time
                yield done
        while waiting:
            yield oldest()

    def __enter__(self) -> DetectionStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._threads.shutdown(wait=True)


def letterboxed(frames: Sequence[Frame], boxes: Sequence[Letterbox], spec: ModelSpec) -> Frame:
    """Return frames as the network takes them: uint8 (B, H, W, 3)."""
    mean = spec.preprocess.mean_bgr
    if len(frames) == 1:
        return boxes[0].apply(frames[0], mean)[None]
    batch = np.empty((len(frames), *boxes[0].size_hw, 3), np.uint8)
    for row, frame, box in zip(batch, frames, boxes, strict=True):
        box.apply(frame, mean, out=row)
    return batch


def network_size(fixed: tuple[int, int] | None, size: NetworkSize, path: str | Path) -> NetworkSize:
    """Return what frames are letterboxed to.

    Args:
        fixed: The one size a model takes, or None.
        size: What the caller asked for.
        path: For messages.

    Raises:
        SpecError: The model does not take that size.
    """
    if size is None:
        return fixed
    check_size(size)
    if not isinstance(size, int):
        size = size[0], size[1]  # lists pass the check, and are no keys
    if fixed is not None and size != fixed:
        asked = f"a longer side of {size}" if isinstance(size, int) else f"{size[0]}x{size[1]}"
        raise SpecError(
            f"{path} takes {fixed[0]}x{fixed[1]} only, not {asked}: leave the size out, or export it again with --size"
        )
    return size
