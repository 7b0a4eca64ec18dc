"""What every detector shares: how frames become batches, how threads share a model, how calls overlap."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from facespec.detections import Detections, to_detections
from facespec.errors import ClosedError, FrameError, ModelFileError, NonFiniteError, RetinaFaceError, SpecError
from facespec.letterbox import Frame, Letterbox, check_frame
from facespec.spec import MAX_NETWORK_PIXELS, ModelSpec, NetworkSize, check_size
from trt_runtime.measure import StageTimer
from trt_runtime.regions import Region, check_region, in_frame, joined, tiles

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
        self._last: tuple[Key, Value] | None = None  # used
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def find(self, key: Key) -> Value | None:
        """Return the value of a key, or None if none is kept."""
        last = self._last
        if last is not None and last[0] == key:
            return last[1]
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            self._last = key, self._values[key]
            return self._values[key]

    def get(self, key: Key, *parts: Any) -> Value:
        """Return the value of a key; making one gives up the one that was not used for the longest time."""
        value = self.find(key)
        if value is not None:
            return value
        with self._lock:
            if key in self._values:  # another thread was faster
                return self._values[key]
            self._last = None  # it may be the one that is given up
            while len(self._values) >= self.capacity:  # first, so that its memory is free for the new one
                self._drop(self._values.popitem(last=False)[1])
            value = self._values[key] = self._make(key, *parts)
            self.made += 1
            self._last = key, value
            return value

    def clear(self) -> None:
        """Give up everything."""
        with self._lock:
            self._last = None
            while self._values:
                self._drop(self._values.popitem()[1])


class Lane(Protocol):
    """What one call has for itself while it runs: a session's request, or a context, a stream and buffers on a GPU.

    Attributes:
        keeps_shapes: Whether its outputs have the shapes of `DecodeSpec.outputs` by construction.
    """

    keeps_shapes: bool = False

    def run(self, frames: Sequence[Any], boxes: Sequence[Letterbox], timer: StageTimer | None) -> list[NDArray[Any]]:
        """Return the outputs of a detector graph for a batch, `DecodeSpec.outputs` in its order, batch first.

        Args:
            frames: Frames as the caller gave them, checked.
            boxes: How they lie in the network input; all of one size.
            timer: Is told which stage begins.
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
        min_face: Faces whose boxes have a longer side of fewer pixels of the frame are left out.
        roi: Region of the frame, x, y, width and height, that alone is looked at; None is all of it.
        tile: Whether a frame that is larger than the network size runs in overlapping tiles of it, besides as a whole:
            faces that would be too small for the network are found, at the cost of a run for each tile.
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
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._idle: list[Lane] = []
        self._opening: tuple[str | Path, dict[str, Any]] | None = None
        self._lent = 0
        self._closed = self._freed = False
        self._min_face = 0.0
        self._roi: Region | None = None
        self._tile = False
        self._special = False  # closed, or one of the three is set: so that a call looks at one flag

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

    def _opened_by(self, path: str | Path, **options: Any) -> None:
        """Note the model file and the options that another process opens this detector anew with."""
        self._opening = os.path.abspath(path), options

    # what users call

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path of the model and the options: where it is unpickled the detector is opened anew.

        Raises:
            SpecError: It was made of something that lives in this process alone.
            ClosedError: The detector is closed.
        """
        self._check_open()
        if self._opening is None:
            raise SpecError(
                "a detector is pickled as the path of its model and its options, and this one was made of an object: "
                "give it a path, and a device by name; or make one in each process"
            )
        path, options = self._opening
        options = {**options, "score_threshold": self._score_threshold, "size_hw": self.size_hw}
        return _open, (type(self), path, options), {"min_face": self.min_face, "roi": self.roi, "tile": self.tile}

    def __setstate__(self, settings: dict[str, Any]) -> None:
        """Set what no option says, of a detector that has just been opened anew."""
        for name, value in settings.items():
            setattr(self, name, value)

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
        if self._special:
            return self._detect_parts([frame], timer)[0]
        key = self._frame_hw(frame), self.size_hw
        box, _ = self._placements.find(key) or self._placements.get(key)
        return self._run([frame], [box], timer)[0]

    def detect_batch(self, frames: Iterable[Any], timer: StageTimer | None = None) -> list[Detections]:
        """Return the faces of several frames, which may differ in size, in their order; see `detect`."""
        if getattr(frames, "ndim", 4) < 4:
            raise FrameError("detect_batch takes a list of frames; one frame goes to detect")
        self._check_open()
        frames = list(frames)
        return self._detect_parts(frames, timer) if self._special else self._detect_whole(frames, timer)

    def _detect_whole(self, frames: Sequence[Any], timer: StageTimer | None) -> list[Detections]:
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

    def _detect_parts(self, frames: Sequence[Any], timer: StageTimer | None) -> list[Detections]:
        """Return the faces of frames by `roi`, `tile` and `min_face`."""
        self._check_open()
        sizes = [self._frame_hw(frame) for frame in frames]
        regions = [in_frame(self._roi, frame_hw) for frame_hw in sizes]
        parts = [tiles(region, self._tile_hw()) if self._tile else [region] for region in regions]
        cuts = [
            frame if region == (0, 0, frame_hw[1], frame_hw[0]) else self._cut(frame, region)
            for frame, frame_hw, of_frame in zip(frames, sizes, parts, strict=True)
            for region in of_frame
        ]
        found = iter(self._detect_whole(cuts, timer))
        decode, results = self.spec.decode, []
        for of_frame, frame_hw in zip(parts, sizes, strict=True):
            pairs = [(region, next(found)) for region in of_frame]
            faces = joined(pairs, frame_hw, decode.iou_threshold, decode.max_detections)
            if self._min_face:
                faces = faces[(faces.boxes[:, 2:] - faces.boxes[:, :2]).max(axis=1, initial=0) >= self._min_face]
            results.append(faces)
        return results

    def _cut(self, frame: Any, region: Region) -> Any:
        """Return a part of a frame, as one that `detect` takes."""
        x, y, width, height = region
        return frame[y : y + height, x : x + width]

    def _tile_hw(self) -> tuple[int, int]:
        size = self.size_hw
        if size is None:
            raise SpecError("tiles have the network size: give size_hw (--size) for a model that takes any")
        return (size, size) if isinstance(size, int) else size

    @property
    def min_face(self) -> float:
        """Pixels of the frame: faces whose boxes have no side as long are left out; 0 leaves out none."""
        return self._min_face

    @min_face.setter
    def min_face(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
            raise SpecError(f"min_face is a number of pixels from 0 on, got {value!r}")
        self._min_face = float(value)
        self._set_special()

    @property
    def roi(self) -> Region | None:
        """Region of the frame that alone is looked at: x, y, width, height in pixels; None is all of it."""
        return self._roi

    @roi.setter
    def roi(self, value: Region | None) -> None:
        self._roi = check_region(value)
        self._set_special()

    @property
    def tile(self) -> bool:
        """Whether frames larger than the network size run in overlapping tiles of it, besides as a whole."""
        return self._tile

    @tile.setter
    def tile(self, value: bool) -> None:
        if value:
            self._tile_hw()
        self._tile = bool(value)
        self._set_special()

    def _set_special(self) -> None:
        with self._lock:
            self._special = bool(self._closed or self._min_face or self._roi or self._tile)

    def pinned_frame(self, height: int, width: int) -> Frame:
        """Return a frame to decode into, uint8 (height, width, 3), undefined: the detector takes it without a copy.

        It is an array like any other, and its memory serves the next one when nobody refers to it any more. Fill it
        again only after the results of what it held are there.
        """
        return np.empty((height, width, 3), np.uint8)

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
            self._closed = self._special = True
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
        """Lend a lane; one that fails in an unknown state is closed."""
        lane: Lane | None = self._borrow()
        try:
            yield lane  # type: ignore[misc]
        except BaseException as error:
            lane = _unless_broken(lane, error)
            raise
        finally:
            self._give_back(lane)

    def _borrow(self) -> Lane:
        """Return an idle lane, the last used first, or a new one."""
        with self._lock:
            if self._closed:
                self._check_open()
            self._lent += 1
            if self._idle:
                return self._idle.pop()
        try:
            return self._new_lane()
        except BaseException:
            self._give_back(None)
            raise

    def _give_back(self, lane: Lane | None) -> None:
        with self._lock:
            self._lent -= 1
            if lane is not None:
                self._idle.append(lane)
            if self._closed:  # `close` waits for the last one
                self._changed.notify_all()

    def _run(self, frames: Sequence[Any], boxes: Sequence[Letterbox], timer: StageTimer | None) -> list[Detections]:
        decode = self.spec.decode
        lane: Any = self._borrow()
        try:
            outputs = lane.run(frames, boxes, timer)
            if timer is not None:
                timer.begin("results")
            if not lane.keeps_shapes and [output.shape for output in outputs] != [
                (len(frames), *shape) for shape in self._shapes
            ]:
                raise ModelFileError(_NOT_ANNOUNCED)
            num_detections, boxes_px, scores, landmarks, num_candidates = outputs
            counts, candidates = num_detections.tolist(), num_candidates.tolist()
            limit, least, results = decode.max_detections, self._score_threshold, []
            for i, box in enumerate(boxes):  # copies: the lane's buffers serve the next call
                if not 0 <= counts[i] <= limit:
                    raise ModelFileError(_NOT_ANNOUNCED)
                results.append(
                    to_detections(box, decode, least, counts[i], boxes_px[i], scores[i], landmarks[i], candidates[i])
                )
            return results
        except BaseException as error:
            lane = _unless_broken(lane, error)
            raise
        finally:
            self._give_back(lane)
            if timer is not None:
                timer.begin("")


def _open(kind: type[RetinaFaceDetector], path: str, options: dict[str, Any]) -> RetinaFaceDetector:
    make: Any = kind
    detector: RetinaFaceDetector = make(path, **options)
    return detector


def _unless_broken(lane: Any, error: BaseException) -> Any:
    """Return a lane that may be used again after an error; close one whose state is unknown, and return None."""
    if isinstance(error, (FrameError, NonFiniteError)):
        return lane
    lane.close()
    return None


_NOT_ANNOUNCED = "the model's outputs are not what it announces: export it again"


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
