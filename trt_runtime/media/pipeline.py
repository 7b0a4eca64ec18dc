"""Several videos through one detector at once: reading, the network and what becomes of its results overlap.

Every source has a thread that reads it and one that uses its results. Between them a single thread feeds the detector
with the frames that are ready, of all sources together:

    read -> ready -> feed (detector.stream) -> pending -> use

Both queues of a source are bounded. A file waits where they are full, so that no frame of it is lost; a live source
loses its oldest frame, so that its results are never late. Batches are whatever is ready while the network is busy:
no frame waits for a full one.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

from facespec.detections import Detections
from facespec.errors import ConfigError, RetinaFaceError, VideoError
from facespec.letterbox import Frame
from trt_runtime.detector import DetectionStream, RetinaFaceDetector
from trt_runtime.measure import StageTimer
from trt_runtime.media.files import Source

WAIT = "wait"
"""Stage in which a live source has no frame yet; no work is done in it."""

FILES_AT_ONCE = 8
"""Sources that run at once of those that can wait."""

PATIENCE_S = 60.0
"""How long a source may take to open, and one that is not live to give a frame."""

_GRACE_S = 1.0
"""How long a source may take to end once it is stopped; what it reads then is left to its thread."""


class SeenFrame(NamedTuple):
    """A frame and its faces.

    Attributes:
        image: uint8 (H, W, 3) BGR; it is not used afterwards, so that it may be drawn on.
        number: Of the frame in its source, from 0.
        seconds: Time since the start of the source.
        faces: What was found in it or, if it was not `detected`, in the last frame that was.
        detected: The network ran on this frame.
    """

    image: Frame
    number: int
    seconds: float
    faces: Detections
    detected: bool


Use = Callable[[SeenFrame, StageTimer], None]
"""Uses a frame; called in order, and always in the same thread. What takes time goes into the timer."""


@dataclass(frozen=True)
class Job:
    """A source, and what becomes of its frames.

    Attributes:
        name: For reports.
        open: Opens the source, in the thread that reads it.
        output: Makes what uses the frames, in the thread that does. It is left without an exception at the end of the
            source, however that came, and with one where frames are missing that were read.
        waits: It can wait, as a file: of such only `FILES_AT_ONCE` run at once, and one begins where another has ended.
    """

    name: str
    open: Callable[[], Source]
    output: Callable[[Source], AbstractContextManager[Use]]
    waits: bool = False


@dataclass(frozen=True)
class PipelineOptions:
    """How frames flow.

    Attributes:
        batch: Frames in a call of the network at most; None: as many as the detector finds worth it.
        depth: Calls of the network at once.
        stride: The network runs on one frame of so many; the others pass with the result of the last.
        queue: Frames of a source that may wait for the network.

    Raises:
        ConfigError: One of them is not a whole number from 1 to 4096.
    """

    batch: int | None = None
    depth: int = 2
    stride: int = 1
    queue: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (name == "batch" and value is None) and (not isinstance(value, int) or not 1 <= value <= 4096):
                raise ConfigError(f"{name} must be a number from 1 to 4096, got {value!r}")


@dataclass
class SourceReport:
    """What became of a source so far.

    Attributes:
        name: As in its `Job`.
        frame_count: Frames it announces; 0 if unknown.
        decoded: Frames read.
        dropped: Frames of a live source that came faster than they could be used.
        frames: Frames used.
        detected: Those of them the network ran on.
        faces: Faces found.
        truncated: Frames with more faces than the model's limits.
        damaged: Parts passed over because they could not be decoded.
        reconnects: Connections after the first.
        seconds: From its opening to the last use.
        complete: Every frame read was used, or dropped.
        error: Why it ended early.
    """

    name: str
    frame_count: int = 0
    decoded: int = 0
    dropped: int = 0
    frames: int = 0
    detected: int = 0
    faces: int = 0
    truncated: int = 0
    damaged: int = 0
    reconnects: int = 0
    seconds: float = 0.0
    complete: bool = False
    error: RetinaFaceError | None = None


@dataclass(frozen=True)
class PipelineReport:
    """What a run did.

    Attributes:
        sources: In the order of the jobs.
        timer: Sums over all threads. Stages take longer than alone where they wait for a core.
        interrupted: Ctrl-C ended it.
    """

    sources: list[SourceReport]
    timer: StageTimer
    interrupted: bool


def run_pipeline(
    detector: RetinaFaceDetector,
    jobs: Sequence[Job],
    options: PipelineOptions | None = None,
    *,
    tick: Callable[[list[SourceReport]], bool] = lambda reports: True,
    tick_s: float = 0.1,
) -> PipelineReport:
    """Run a detector over sources until they end.

    A source that fails is reported, and the others go on; so is one that neither opens nor gives a frame within
    `PATIENCE_S`. KeyboardInterrupt ends all sources: what is in the network is still used, what waits for it is not.
    Threads that C code keeps busy, or that wait for what never comes, are left behind.

    Args:
        detector: What runs the frames.
        jobs: The sources and their outputs.
        options: How frames flow.
        tick: Called here, in the caller's thread, every `tick_s` seconds; False ends the sources.
        tick_s: Seconds.

    Raises:
        Exception: Whatever is not a source's own failure: what an output raises that is no RetinaFaceError, say.
    """
    return _Pipeline(detector, jobs, options or PipelineOptions()).run(tick, tick_s)


class _AbortedError(Exception):
    """The run has failed elsewhere."""


@dataclass
class _Item:
    """A frame on its way; `call` gives the faces of its batch, in which it has a `slot`."""

    image: Frame
    given: Any  # to the network: the image, as the thread that read it handed it over
    number: int
    seconds: float
    call: Future[list[Detections]] | None = None
    slot: int = 0


@dataclass(eq=False)
class _Lane:
    """A source on its way; every field but the timers is guarded by the lock of the pipeline."""

    job: Job
    lock: threading.Lock
    source: Source | None = None
    ready: deque[_Item] = field(default_factory=deque)
    pending: deque[_Item] = field(default_factory=deque)
    taken: int = 0  # frames that have left `ready`
    in_flight: int = 0  # those of them that are not used yet
    ended: bool = False  # nothing more gets ready
    given_up: bool = False  # nothing more is used
    asked: float = math.inf  # since when the source is opening or reading
    start: float = 0.0  # when its opening began

    def __post_init__(self) -> None:
        self.report = SourceReport(self.job.name)
        self.reading, self.using = StageTimer(), StageTimer()
        self.room = threading.Condition(self.lock)  # in `ready`
        self.results = threading.Condition(self.lock)  # in `pending`


class _Pipeline:
    """The threads and what they share. One lock guards it all: it is held for bookkeeping alone, never for work."""

    def __init__(self, detector: RetinaFaceDetector, jobs: Sequence[Job], options: PipelineOptions) -> None:
        self.detector, self.depth, self.stride = detector, options.depth, options.stride
        self.batch = options.batch or detector.max_batch
        self.lock = threading.Lock()
        self.lanes = [_Lane(job, self.lock) for job in jobs]
        self.waiting = deque(lane for lane in self.lanes if lane.job.waits)  # that have not begun
        self.active = [lane for lane in self.lanes if not lane.job.waits]
        self.active += [self.waiting.popleft() for _ in range(min(FILES_AT_ONCE, len(self.waiting)))]
        share = -(-self.batch // max(len(self.active), 1))  # frames of a source in a call, where all have some
        self.ready_limit = max(options.queue, share)
        self.flight_limit = self.depth * share + options.queue
        self.work = threading.Condition(self.lock)  # for the feeder
        self.network = StageTimer()
        self.calls = 0  # of the network, unfinished
        self.turn = 0  # calls of the network, begun
        self.stopping = self.aborted = False
        self.stopped_at = math.inf
        self.error: Exception | None = None
        self.unused = len(jobs)  # lanes whose output is not done
        self.finished = threading.Event()
        self.stream: DetectionStream
        self.readers: list[threading.Thread] = []
        self.threads = [threading.Thread(target=self._feed, name="feed")]

    def run(self, tick: Callable[[list[SourceReport]], bool], tick_s: float) -> PipelineReport:
        reports = [lane.report for lane in self.lanes]
        interrupted = False

        def wait() -> None:
            while self.unused and not self.finished.wait(tick_s):
                self._leave_behind()
                if not tick(reports):
                    self._stop()

        with self.detector.stream(self.depth) as self.stream:
            try:
                for lane in tuple(self.active):
                    self._begin(lane)
                self.threads[0].start()
                try:
                    wait()
                except KeyboardInterrupt:
                    interrupted = True
                    self._stop()
                    wait()  # a second one goes through
            except BaseException:
                self._stop(abort=True)
                raise
            finally:
                for thread in self.threads:  # one that ends may begin others
                    if thread.ident is not None:  # it was started
                        thread.join()
                end = monotonic() + _GRACE_S
                for thread in self.readers:
                    if thread.ident is not None:
                        thread.join(max(end - monotonic(), 0))
        if self.error:
            raise self.error
        timer = StageTimer()
        for part in (*(lane.reading for lane in self.lanes), self.network, *(lane.using for lane in self.lanes)):
            timer.add_all(part)
        return PipelineReport(reports, timer, interrupted)

    def _begin(self, lane: _Lane) -> None:
        """Start the threads of a lane."""
        reader = threading.Thread(target=self._read, args=[lane], name=f"read {lane.job.name}", daemon=True)
        user = threading.Thread(target=self._use, args=[lane], name=f"use {lane.job.name}")
        self.readers.append(reader)
        self.threads.append(user)
        reader.start()
        user.start()

    def _read(self, lane: _Lane) -> None:
        report, lane.start = lane.report, time.perf_counter()
        try:
            lane.asked = monotonic()
            with lane.job.open() as source:
                with self.lock:
                    lane.source, stopped = source, self.stopping or lane.given_up
                report.frame_count, source.new_frame = source.frame_count, self.detector.pinned_frame
                frames = iter(source)
                try:
                    while not stopped:
                        lane.asked = math.inf if source.live else monotonic()
                        with lane.reading(WAIT if source.live else "read"):
                            frame = next(frames, None)
                        lane.asked = math.inf
                        if frame is None:
                            break
                        given = self.stream.hand_over(frame.image)  # only here its CUDA stream is known
                        item = _Item(frame.image, given, report.decoded, frame.seconds)
                        report.decoded += 1
                        del frame, given
                        stopped = not self._offer(lane, item, source.live)
                finally:
                    report.damaged, report.reconnects = source.damaged, source.reconnects
        except RetinaFaceError as error:
            if not (self.stopping or lane.ended):  # what a source says when it is stopped is of no interest
                report.error = error
        except Exception as error:
            if not lane.ended:
                self._stop(abort=True, error=error)
        finally:
            self._end(lane)

    def _end(self, lane: _Lane) -> None:
        with self.lock:
            lane.ended = True
            lane.results.notify()
            self.work.notify()

    def _leave_behind(self) -> None:
        """End the lanes whose sources do not come back: where all are stopped, or after `PATIENCE_S`."""
        now = monotonic()
        for lane in self.lanes:
            if lane.ended:
                continue
            if now > self.stopped_at + _GRACE_S:
                self._end(lane)
            elif now > lane.asked + PATIENCE_S:
                lane.report.error = VideoError(f"{lane.job.name}: nothing could be read within {PATIENCE_S:g} s")
                self._end(lane)
                if lane.source:
                    lane.source.stop()

    def _offer(self, lane: _Lane, item: _Item, live: bool) -> bool:
        """Put a frame where the feeder takes it; return whether more are wanted."""
        with self.lock:
            while len(lane.ready) >= self.ready_limit and not (self.stopping or lane.given_up):
                if live:
                    lane.ready.popleft()
                    lane.report.dropped += 1
                else:
                    lane.room.wait()
            if self.stopping or lane.given_up or lane.ended:
                return False
            lane.ready.append(item)
            self.work.notify()
            return True

    def _feed(self) -> None:
        try:
            while chosen := self._take():
                self._call([item for _, item, wanted in chosen if wanted])
                with self.lock:
                    for lane, item, _ in chosen:
                        if not lane.given_up:
                            lane.pending.append(item)
                            lane.results.notify()
                del chosen, lane, item  # or their memory would wait with this thread
        except Exception as error:
            self._stop(abort=True, error=error)

    def _take(self) -> list[tuple[_Lane, _Item, bool]]:
        """Return the frames that go on now, and whether the network runs on them; none: all sources have ended."""
        with self.lock:
            while not (chosen := self._choose()) and (
                self.waiting or not all(lane.ended and not lane.ready for lane in self.active)
            ):
                self.work.wait()
            begun = any(wanted for *_, wanted in chosen)
            self.calls += begun
            self.turn += begun
            return chosen

    def _choose(self) -> list[tuple[_Lane, _Item, bool]]:
        room = self.batch if self.calls < self.depth else 0
        chosen: list[tuple[_Lane, _Item, bool]] = []
        start = self.turn % max(len(self.active), 1)  # each lane is first in turn
        moved = True
        while moved:  # a frame of each source, then the next of each
            moved = False
            for lane in (*self.active[start:], *self.active[:start]):
                wanted = lane.taken % self.stride == 0
                if not lane.ready or lane.in_flight >= self.flight_limit or (wanted and not room):
                    continue
                chosen.append((lane, lane.ready.popleft(), wanted))
                lane.taken += 1
                lane.in_flight += 1
                lane.room.notify()
                room -= wanted
                moved = True
        return chosen

    def _call(self, batch: list[_Item]) -> None:
        if not batch:
            return
        timer = StageTimer()
        try:
            call = self.stream.submit([item.given for item in batch], timer)
        except RetinaFaceError as error:  # it refuses a frame; `_faces` finds out which
            call = Future()
            call.set_exception(error)
        for slot, item in enumerate(batch):
            item.call, item.slot = call, slot
        call.add_done_callback(lambda _: self._called(timer))

    def _called(self, timer: StageTimer) -> None:
        with self.lock:
            self.calls -= 1
            self.network.add_all(timer)
            self.work.notify()

    def _use(self, lane: _Lane) -> None:
        report = lane.report
        try:
            if item := self._next(lane):
                assert lane.source is not None
                with lane.job.output(lane.source) as use:
                    while item:
                        detected = item.call is not None
                        if detected:
                            faces = self._faces(item)
                        use(SeenFrame(item.image, item.number, item.seconds, faces, detected), lane.using)
                        report.seconds = time.perf_counter() - lane.start
                        report.frames += 1
                        report.detected += detected
                        report.faces += detected * len(faces)
                        report.truncated += detected * faces.truncated
                        del item
                        item = self._next(lane, used=True)
            report.complete = True
        except _AbortedError:
            pass
        except RetinaFaceError as error:
            report.error = error
            self._give_up(lane)
        except Exception as error:
            self._stop(abort=True, error=error)
        finally:
            self._begin_another(lane)

    def _begin_another(self, lane: _Lane) -> None:
        """Note that a lane is done, and begin one that waits for it."""
        with self.lock:
            self.unused -= 1
            following = self.waiting.popleft() if lane.job.waits and self.waiting else None
            if following:
                self.active[self.active.index(lane)] = following
            if not self.unused:
                self.finished.set()
        if following:
            try:
                self._begin(following)
            except RuntimeError as error:  # there is no thread to be had
                self._stop(abort=True, error=error)
                self._end(following)
                self._begin_another(following)

    def _next(self, lane: _Lane, used: bool = False) -> _Item | None:
        """Return the next frame to use; None: there will be no more."""
        with self.lock:
            if used:
                lane.in_flight -= 1
                self.work.notify()
            while not lane.pending and not self.aborted:
                if lane.ended and not lane.ready and not lane.in_flight:
                    return None
                lane.results.wait()
            if self.aborted:
                raise _AbortedError
            return lane.pending.popleft()

    def _faces(self, item: _Item) -> Detections:
        assert item.call is not None
        try:
            return item.call.result()[item.slot]
        except RetinaFaceError:  # a batch fails as one, though it is one frame's fault: run this one alone
            return self.stream.submit([item.given], StageTimer()).result()[0]

    def _give_up(self, lane: _Lane) -> None:
        with self.lock:
            lane.given_up = True
            lane.ready.clear()
            lane.pending.clear()
            lane.room.notify()
            self.work.notify()
        if lane.source:
            lane.source.stop()

    def _stop(self, abort: bool = False, error: Exception | None = None) -> None:
        """End the sources; what is in the network is still used unless the run is aborted."""
        with self.lock:
            self.stopping = True
            self.stopped_at = min(self.stopped_at, monotonic())
            self.aborted |= abort
            self.error = self.error or error
            for lane in self.lanes:
                lane.ready.clear()
                lane.room.notify()
                lane.results.notify()
            for lane in self.waiting:
                lane.ended = True
            self.unused -= len(self.waiting)
            self.waiting.clear()
            if not self.unused:
                self.finished.set()
            self.work.notify()
            sources = [lane.source for lane in self.lanes if lane.source]
        for source in sources:
            source.stop()
