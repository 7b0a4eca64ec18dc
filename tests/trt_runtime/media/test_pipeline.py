from __future__ import annotations

import inspect
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from facespec.detections import Detections
from facespec.errors import ConfigError, RetinaFaceError, VideoError
from facespec.letterbox import Frame
from tests.trt_runtime.handmade import in_time
from trt_runtime.detector import DetectionStream
from trt_runtime.load import load_detector
from trt_runtime.measure import StageTimer
from trt_runtime.media import pipeline
from trt_runtime.media.files import Source, TimedFrame, VideoFile, VideoWriter
from trt_runtime.media.pipeline import WAIT, Job, PipelineOptions, PipelineReport, SeenFrame, Use, run_pipeline


@pytest.fixture(scope="module")
def detector(static_onnx: Path) -> Any:
    return load_detector(static_onnx, threads=1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, photographs: dict[str, Frame]) -> list[Path]:
    """Videos of different size, rate and length; the photograph moves."""
    folder = tmp_path_factory.mktemp("clips")
    sizes = [((240, 320), 25.0, 17), ((200, 160), 10.0, 9)]
    paths = []
    for (size_hw, rate, count), photograph in zip(sizes, photographs.values(), strict=True):
        small = np.asarray(cv2.resize(photograph, size_hw[::-1]), np.uint8)
        paths.append(folder / f"{rate:g}.mp4")
        with VideoWriter(paths[-1], rate) as writer:
            for number in range(count):
                writer.write(np.roll(small, 3 * number, axis=1))
    return paths


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


class Made:
    """A source that makes its frames: their number stands in every pixel, and in the first its own mark."""

    rate, damaged, reconnects = 25.0, 0, 0

    def __init__(self, count: int, live: bool = False, error: Exception | None = None, mark: int = 0) -> None:
        self.name, self.live, self.frame_count, self.error, self.mark = "made", live, count, error, mark
        self.made = self.freed = 0
        self.stopped, self.closed = threading.Event(), threading.Event()

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()

    def __iter__(self) -> Iterator[TimedFrame]:
        while self.made < self.frame_count and not self.stopped.is_set():
            image = np.full((32, 32, 3), self.made % 256, np.uint8)
            image[0, 0, 1] = self.mark
            weakref.finalize(image, self._free)
            self.made += 1
            yield TimedFrame(image, float(self.made - 1))
            del image
        if self.error:
            raise self.error

    def _free(self) -> None:
        self.freed += 1

    def stop(self) -> None:
        self.stopped.set()


class Kept:
    """An output that keeps what it is given, and how it was left."""

    def __init__(self, then: Callable[[SeenFrame], None] = lambda seen: None) -> None:
        self.frames: list[SeenFrame] = []
        self.left: BaseException | str = "never entered"
        self.then = then
        self.done = threading.Event()

    @contextmanager
    def __call__(self, source: Source) -> Iterator[Use]:
        def use(seen: SeenFrame, timer: StageTimer) -> None:
            self.then(seen)
            self.frames.append(seen)

        try:
            yield use
            self.left = "in order"
        except BaseException as error:
            self.left = error
            raise
        finally:
            self.done.set()

    @property
    def numbers(self) -> list[int]:
        return [seen.number for seen in self.frames]


class Network:
    """A detector that takes as long as a test wants. It finds what a frame says of itself, in real streams.

    In the frame `number` of the source `mark` are 1 + number % 3 faces, whose scores are the number.

    Args:
        hold: Called by each call, with the marks and numbers of its frames, before it gives its results.
    """

    def __init__(self, max_batch: int = 4, hold: Callable[[list[tuple[int, int]]], None] = lambda frames: None) -> None:
        self.max_batch, self.hold = max_batch, hold
        self.calls: list[list[tuple[int, int]]] = []
        self.depth = self.running = self.most = 0
        self.lock = threading.Lock()
        self.made: list[Frame] = []

    def pinned_frame(self, height: int, width: int) -> Frame:
        self.made.append(np.empty((height, width, 3), np.uint8))
        return self.made[-1]

    def stream(self, depth: int = 1) -> DetectionStream:
        self.depth = depth
        return DetectionStream(self.detect_batch, depth)

    def detect_batch(self, frames: list[Frame], timer: StageTimer) -> list[Detections]:
        seen = [(int(frame[0, 0, 1]), int(frame[0, 0, 0])) for frame in frames]
        with self.lock:
            self.calls.append(seen)
            self.running += 1
            self.most = max(self.most, self.running)
        self.hold(seen)
        timer.add("network", 10.0)
        with self.lock:
            self.running -= 1
        return [self.faces(number) for _, number in seen]

    @staticmethod
    def faces(number: int) -> Detections:
        count = 1 + number % 3
        boxes, landmarks = np.zeros((count, 4), np.float32), np.zeros((count, 5, 2), np.float32)
        return Detections(boxes, np.full(count, number, np.float32), landmarks, (32, 32), truncated=number % 4 == 0)


def _check(true: bool) -> None:
    assert true


def _wait_until(true: Callable[[], bool]) -> None:
    """Fail if it takes longer than any machine does."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def _run(detector: Any, work: list[tuple[Callable[[], Source], Kept]], **options: Any) -> PipelineReport:
    jobs = [Job(str(number), open_, output) for number, (open_, output) in enumerate(work)]
    return run_pipeline(detector, jobs, PipelineOptions(**options))


def test_videos_are_decoded_into_frames_of_the_detector(clips: list[Path]) -> None:
    network, kept = Network(), Kept()
    _run(network, [(lambda: VideoFile(clips[0]), kept)])
    assert len(kept.frames) == len(network.made) > 3
    assert all(seen.image is made for seen, made in zip(kept.frames, network.made, strict=True))


def _same(left: Detections, right: Detections) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("boxes", "scores", "landmarks"))


@pytest.mark.parametrize("batch", [1, 4])
def test_results_are_those_of_a_plain_loop(batch: int, detector: Any, clips: list[Path]) -> None:
    outputs = [Kept() for _ in clips]
    report = _run(
        detector, [(partial(VideoFile, path), kept) for path, kept in zip(clips, outputs, strict=True)], batch=batch
    )
    for path, kept, source in zip(clips, outputs, report.sources, strict=True):
        with VideoFile(path) as video:
            plain = list(video)
        assert kept.numbers == list(range(len(plain)))
        found = [detector.detect(frame.image) for frame in plain]
        assert sum(map(len, found)) > 0
        for seen, frame, faces in zip(kept.frames, plain, found, strict=True):
            assert seen.seconds == frame.seconds
            assert seen.detected
            assert np.array_equal(seen.image, frame.image)
            assert _same(seen.faces, faces)
        assert (source.decoded, source.frames, source.detected, source.dropped) == (*[len(plain)] * 3, 0)
        assert source.faces == sum(map(len, found))
        assert source.error is None
        assert source.complete
        assert kept.left == "in order"
    assert {"read", "letterbox", "network", "results"} <= report.timer.total_ms.keys()
    assert WAIT not in report.timer.total_ms


def test_stride_runs_the_network_on_one_frame_of_so_many(detector: Any, clips: list[Path]) -> None:
    kept = Kept()
    (source,) = _run(detector, [(partial(VideoFile, clips[0]), kept)], stride=5).sources
    assert kept.numbers == list(range(17))
    assert [seen.number for seen in kept.frames if seen.detected] == [0, 5, 10, 15]
    assert (source.frames, source.detected) == (17, 4)
    assert source.faces == sum(len(seen.faces) for seen in kept.frames if seen.detected) > 0
    with VideoFile(clips[0]) as video:
        images = [frame.image for frame in video]
    for seen in kept.frames:
        assert _same(seen.faces, detector.detect(images[seen.number // 5 * 5]))


def test_a_live_source_loses_its_oldest_frames_and_never_its_order(detector: Any) -> None:
    source = Made(200, live=True)

    def wait_for_the_end(_: SeenFrame) -> None:
        while source.made < 200:
            time.sleep(0.01)

    kept = Kept(wait_for_the_end)
    (report,) = _run(detector, [(lambda: source, kept)], batch=1, depth=2, queue=4).sources
    assert report.decoded == 200
    assert report.dropped == 200 - report.frames > 150
    assert kept.numbers == sorted(set(kept.numbers))
    assert kept.numbers[-4:] == [196, 197, 198, 199]
    assert all(seen.image[0, 0, 0] == seen.number == seen.seconds for seen in kept.frames)


@pytest.mark.parametrize("live", [False, True])
def test_memory_is_bounded_however_slow_the_output_is(live: bool) -> None:
    source = Made(120, live=live)
    alive = []

    def slow(_: SeenFrame) -> None:
        time.sleep(0.005)
        alive.append(source.made - source.freed)

    class Forgetful(Kept):
        @contextmanager
        def __call__(self, source: Source) -> Iterator[Use]:
            yield lambda seen, timer: slow(seen)

    (report,) = _run(Network(), [(lambda: source, Forgetful())], batch=2, depth=2, queue=3).sources
    assert report.frames + report.dropped == 120
    assert bool(report.dropped) == live
    # 3 ready, 2 calls of 2 and 3 more on their way, one read, one used, one that the network is letting go of
    assert 3 <= max(alive) <= 3 + 2 * 2 + 3 + 3


def test_frames_of_several_sources_share_a_call_that_nobody_waits_for(detector: Any) -> None:
    class Counting:
        max_batch, marks = 3, []  # type: ignore[var-annotated]
        pinned_frame = detector.pinned_frame

        @contextmanager
        def stream(self, depth: int) -> Iterator[Any]:
            with detector.stream(depth) as self.inner:
                yield self

        def hand_over(self, frame: Frame) -> Frame:
            return frame

        def submit(self, frames: list[Frame], timer: StageTimer) -> Any:
            self.marks.append([int(frame[0, 0, 1]) for frame in frames])
            return self.inner.submit(frames, timer)

    outputs = [Kept() for _ in range(3)]
    counting = Counting()
    report = _run(counting, [(partial(Made, 20, mark=mark), kept) for mark, kept in enumerate(outputs)])
    assert [source.detected for source in report.sources] == [20, 20, 20]
    sizes = [len(batch) for batch in counting.marks]
    assert max(sizes) == 3
    assert sum(sizes) == 60
    assert sum(set(batch) == {0, 1, 2} for batch in counting.marks) > 5


def test_a_source_that_fails_leaves_the_others_and_what_it_gave(detector: Any) -> None:
    def missing() -> Source:
        raise VideoError("there is nothing here")

    lost, good, none = Kept(), Kept(), Kept()
    error = VideoError("lost")
    report = _run(detector, [(lambda: Made(3, error=error), lost), (lambda: Made(30), good), (missing, none)])
    assert [source.error for source in report.sources[:2]] == [error, None]
    assert str(report.sources[2].error) == "there is nothing here"
    assert (lost.numbers, lost.left) == ([0, 1, 2], "in order")
    assert (good.numbers, good.left) == (list(range(30)), "in order")
    assert none.left == "never entered"
    assert [source.complete for source in report.sources] == [True, True, True]


def test_a_frame_the_detector_refuses_fails_its_own_source_alone(detector: Any) -> None:
    class Odd(Made):
        def __iter__(self) -> Iterator[TimedFrame]:
            for frame in super().__iter__():
                yield frame if frame.seconds != 5 else TimedFrame(frame.image.astype(np.float32), 5.0)  # type: ignore[arg-type]

    odd, good = Kept(), Kept()
    report = _run(detector, [(lambda: Odd(1000), odd), (lambda: Made(40), good)], batch=4)
    assert isinstance(report.sources[0].error, RetinaFaceError)
    assert "float32" in str(report.sources[0].error)
    assert not report.sources[0].complete
    assert report.sources[0].decoded < 1000
    assert odd.numbers == list(range(5))
    assert odd.left is report.sources[0].error
    assert report.sources[1].error is None
    assert good.numbers == list(range(40))


def test_an_output_that_fails_gives_up_its_source_alone() -> None:
    def full(seen: SeenFrame) -> None:
        if seen.number == 2:
            raise VideoError("the disk is full")

    failing, good = Kept(full), Kept()
    endless = Made(10**9)
    report = _run(Network(), [(lambda: endless, failing), (lambda: Made(40), good)])
    assert str(report.sources[0].error) == "the disk is full"
    assert failing.left is report.sources[0].error
    assert (report.sources[0].frames, report.sources[1].error) == (2, None)
    assert endless.stopped.is_set()
    assert not report.sources[0].complete
    assert good.numbers == list(range(40))


@pytest.mark.parametrize("where", ["open", "read", "network", "output", "use", "tick"])
def test_any_other_error_ends_the_run_and_is_raised(where: str) -> None:
    """The other source has come far enough by then to have an output, which is left with an error."""
    fault = ZeroDivisionError(where)

    def fail(_: object = None) -> Any:
        _wait_until(lambda: bool(other.frames))
        raise fault

    class Failing(Made):
        def __iter__(self) -> Iterator[TimedFrame]:
            yield from super().__iter__()
            fail()

    def hold(frames: list[tuple[int, int]]) -> None:
        if where == "network" and (7, 0) in frames:
            fail()

    endless, other = Made(10**9), Kept()
    opened = {"open": fail, "read": lambda: Failing(3)}.get(where, lambda: Made(10**9, mark=7))
    output = fail if where == "output" else Kept(fail if where == "use" else lambda seen: None)
    jobs = [Job("failing", opened, output), Job("endless", lambda: endless, other)]
    with pytest.raises(ZeroDivisionError, match=where) as caught:
        run_pipeline(
            Network(max_batch=1, hold=hold),  # type: ignore[arg-type]
            jobs,
            tick=fail if where == "tick" else lambda reports: True,
            tick_s=0.02,
        )
    assert caught.value is fault
    assert isinstance(other.left, BaseException)  # so that a half-written file is not taken for a whole one
    assert endless.stopped.is_set()


def test_what_can_wait_runs_some_at_a_time_and_the_rest_at_once(detector: Any) -> None:
    """Of files the next begins where one has ended, whatever became of it; the camera is read all the while."""
    camera, seen, files = Made(10**9, live=True), Kept(), [Kept() for _ in range(30)]
    running: set[int] = set()
    peaks: list[int] = []
    lock = threading.Lock()

    def open_(number: int) -> Any:
        with lock:
            running.add(number)
            peaks.append(len(running))
        _wait_until(lambda: bool(seen.frames))
        if number % 7 == 3:
            raise VideoError("damaged")
        return Made(3)

    @contextmanager
    def output(number: int, source: Source) -> Iterator[Use]:
        with files[number](source) as use:
            yield use
        with lock:
            running.discard(number)

    def tick(reports: list[Any]) -> bool:
        with lock:
            running.difference_update(number for number in range(30) if reports[number].error)
        return not all(report.complete or report.error for report in reports[:30])

    jobs = [Job(str(number), partial(open_, number), partial(output, number), waits=True) for number in range(30)]
    report = run_pipeline(detector, [*jobs, Job("camera", lambda: camera, seen)], tick=tick, tick_s=0.01)  # type: ignore[arg-type, return-value]
    assert [source.frames for source in report.sources[:30]] == [0 if n % 7 == 3 else 3 for n in range(30)]
    assert [str(source.error) for source in report.sources if source.error] == ["damaged"] * 4
    assert max(peaks) <= pipeline.FILES_AT_ONCE + 4  # those that failed are seen a little later
    assert sorted(peaks)[-5] >= pipeline.FILES_AT_ONCE - 1


def test_the_next_of_what_waits_begins_however_long_the_last_is_used(
    detector: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile nothing is read that the network could run on."""
    monkeypatch.setattr(pipeline, "FILES_AT_ONCE", 1)
    kept = [Kept(lambda seen: time.sleep(0.1)) for _ in range(3)]
    jobs = [Job(str(number), lambda: Made(1), one, waits=True) for number, one in enumerate(kept)]  # type: ignore[arg-type, return-value]
    in_time(lambda: run_pipeline(detector, jobs))
    assert [one.numbers for one in kept] == [[0]] * 3


def test_what_waits_is_not_begun_after_the_end(detector: Any) -> None:
    opened: list[int] = []

    def open_(number: int) -> Any:
        opened.append(number)
        return Made(10**9)

    kept = [Kept() for _ in range(20)]
    jobs = [Job(str(number), partial(open_, number), kept[number], waits=True) for number in range(20)]
    report = run_pipeline(detector, jobs, tick=lambda _: not all(k.frames for k in kept[:8]), tick_s=0.01)
    assert sorted(opened) == list(range(pipeline.FILES_AT_ONCE))
    assert [bool(source.frames) for source in report.sources] == [True] * 8 + [False] * 12


@pytest.mark.parametrize("which", ["read", "use"])
def test_a_thread_that_cannot_be_had_ends_the_run(which: str, detector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == f"{which} 9":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    jobs = [Job(str(number), lambda: Made(2), Kept(), waits=True) for number in range(20)]  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_pipeline(detector, jobs)


@pytest.mark.parametrize("how", ["Ctrl-C", "closed window"])
def test_an_interrupt_ends_the_sources_and_uses_what_is_in_the_network(how: str, detector: Any) -> None:
    outputs = [Kept(), Kept()]
    sources = [Made(10**9), Made(10**9, live=True)]

    def tick(reports: list[Any]) -> bool:
        if all(len(kept.frames) > 5 for kept in outputs) and not sources[0].stopped.is_set():
            if how == "Ctrl-C":
                raise KeyboardInterrupt
            return False
        return True

    jobs = [Job("", lambda s=s: s, kept) for s, kept in zip(sources, outputs, strict=True)]  # type: ignore[misc]
    report = run_pipeline(detector, jobs, tick=tick, tick_s=0.01)
    assert report.interrupted == (how == "Ctrl-C")
    assert [kept.left for kept in outputs] == ["in order", "in order"]
    assert outputs[0].numbers == list(range(len(outputs[0].frames)))
    assert [source.frames for source in report.sources] == [len(kept.frames) for kept in outputs]


def test_a_second_interrupt_aborts(detector: Any) -> None:
    kept = Kept(lambda seen: time.sleep(0.05))

    def tick(_: object) -> bool:
        if kept.frames:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(detector, [Job("", lambda: Made(10**9), kept)], tick=tick, tick_s=0.01)
    assert not isinstance(kept.left, str)


@pytest.mark.parametrize(
    "options", [{"batch": 0}, {"depth": 0}, {"stride": 0}, {"queue": 0}, {"stride": 1.5}, {"batch": 5000}]
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        PipelineOptions(**options)


@pytest.mark.parametrize("name", ["batch", "depth", "stride", "queue"])
def test_options_go_from_1_to_4096(name: str) -> None:
    for value in (1, 4096):
        assert getattr(PipelineOptions(**{name: value}), name) == value
    for value in (0, -1, 4097, "2", 2.0, *([None] if name != "batch" else [])):
        with pytest.raises(ConfigError) as caught:
            PipelineOptions(**{name: value})  # type: ignore[arg-type]
        assert str(caught.value) == f"{name} must be a number from 1 to 4096, got {value!r}"


def test_what_is_not_said_is_two_calls_at_once_of_every_frame_in_the_batch_that_is_best() -> None:
    network, kept = Network(max_batch=3), Kept()
    (source,) = run_pipeline(network, [Job("a", lambda: Made(20), kept)]).sources  # type: ignore[arg-type]
    assert network.depth == 2
    assert source.detected == 20
    assert PipelineOptions() == PipelineOptions(batch=None, depth=2, stride=1, queue=4)


def test_the_last_frames_arrive_however_slow_the_network_is() -> None:
    """The source has ended long before."""
    source, kept = Made(3), Kept()

    def hold(frames: list[tuple[int, int]]) -> None:
        if frames[-1][1] == 2:
            assert source.closed.wait(20)
            assert not kept.done.wait(0.2)  # the output is not left before the last frame is there

    (report,) = _run(Network(max_batch=1, hold=hold), [(lambda: source, kept)]).sources
    assert kept.numbers == [0, 1, 2]
    assert (report.frames, report.decoded, report.complete, report.error) == (3, 3, True, None)


@pytest.mark.parametrize(
    ("batch", "depth", "queue", "sources"), [(1, 2, 3, 1), (4, 1, 2, 1), (4, 2, 2, 2), (2, 2, 1, 3)]
)
def test_exactly_so_many_frames_are_read_ahead(batch: int, depth: int, queue: int, sources: int) -> None:
    """The first source's output is held; the others have ended, and their room in a call is not given to it."""
    share = -(-batch // sources)
    ready, on_their_way = max(queue, share), depth * share + queue
    source = Made(60)
    ahead = []

    def wait(seen: SeenFrame) -> None:
        most = seen.number + on_their_way + ready + 1  # one is read already, for which there is no room
        _wait_until(lambda: source.made >= min(60, most))
        time.sleep(0.002)
        ahead.append(source.made - most)

    work: list[tuple[Callable[[], Source], Kept]] = [(lambda: source, Kept(wait))]
    report = _run(
        Network(batch), [*work, *[(partial(Made, 0), Kept())] * (sources - 1)], depth=depth, queue=queue, batch=batch
    )
    assert report.sources[0].error is None
    assert report.sources[0].frames == 60
    assert max(ahead) == 0


def test_depth_is_how_many_calls_are_under_way() -> None:
    """As many at once as that, and none is begun while they are: what gets ready meanwhile goes in one call."""
    together = threading.Barrier(3)

    class OneByOne(Made):
        """Its next frame comes when the network runs on the last, as long as it is not busy."""

        def __iter__(self) -> Iterator[TimedFrame]:
            for frame in super().__iter__():
                yield frame
                _wait_until(lambda: len(network.calls) >= min(self.made, 3))

    def hold(frames: list[tuple[int, int]]) -> None:
        if frames[0][1] < 3:
            together.wait(20)  # broken if there are fewer
            assert source.closed.wait(20)  # all others are ready, and nobody has taken them

    source, network = OneByOne(9), Network(max_batch=6, hold=hold)
    (report,) = _run(network, [(lambda: source, Kept())], depth=3, queue=6).sources
    assert (report.error, report.frames) == (None, 9)
    assert network.most == network.depth == 3
    assert [len(call) for call in network.calls] == [1, 1, 1, 6]


@pytest.mark.parametrize("count", [2, 3])
def test_sources_take_turns_even_if_one_frame_fits_into_a_call(count: int) -> None:
    sources = [Made(12, mark=mark) for mark in range(count)]

    def hold(_: list[tuple[int, int]]) -> None:
        assert all(source.closed.wait(20) for source in sources)  # all of their frames are ready

    network = Network(hold=hold)
    report = _run(network, [(lambda s=s: s, Kept()) for s in sources], batch=1, depth=1, queue=20)  # type: ignore[misc]
    assert [source.frames for source in report.sources] == [12] * count
    order = [mark for ((mark, _),) in network.calls]
    for start in range(1, 10 * count):  # the first was there before the others
        assert set(order[start : start + count]) == set(range(count)), order


def test_a_call_takes_a_frame_of_each_source_then_the_next_of_each() -> None:
    sources = [Made(9, mark=mark) for mark in range(2)]
    network = Network(hold=lambda _: _check(all(source.closed.wait(20) for source in sources)))
    _run(network, [(lambda s=s: s, Kept()) for s in sources], batch=4, depth=1, queue=20)  # type: ignore[misc]
    for call in network.calls[1:3]:
        assert [mark for mark, _ in call] in ([0, 1, 0, 1], [1, 0, 1, 0])
    for mark in range(2):
        assert [number for call in network.calls for m, number in call if m == mark] == list(range(9))


def test_frames_the_network_does_not_run_on_pass_it_while_it_is_busy() -> None:
    source, kept = Made(30), Kept()

    def hold(frames: list[tuple[int, int]]) -> None:
        if frames[0][1] == 0:
            # 1 to 4 are past it, 5 to 8 ready, and 9 is read
            _wait_until(lambda: source.made == 10)

    network = Network(max_batch=1, hold=hold)
    (report,) = _run(network, [(lambda: source, kept)], depth=1, queue=4, stride=5).sources
    assert report.error is None
    assert [number for ((_, number),) in network.calls] == [0, 5, 10, 15, 20, 25]
    assert kept.numbers == list(range(30))
    assert [seen.faces.scores[0] for seen in kept.frames] == [number // 5 * 5 for number in range(30)]


@pytest.mark.parametrize("stride", [1, 3])
def test_the_report_counts(stride: int) -> None:
    class Damaged(Made):
        damaged, reconnects = 3, 2

    outputs = [Kept(), Kept()]
    report = _run(
        Network(max_batch=2),
        [(lambda: Damaged(24), outputs[0]), (lambda: Damaged(7, error=VideoError("lost")), outputs[1])],
        stride=stride,
    )
    for source, count, kept, name in zip(report.sources, (24, 7), outputs, "01", strict=True):
        numbers = range(0, count, stride)
        assert source.name == name
        assert (source.frame_count, source.decoded, source.frames, source.dropped) == (count, count, count, 0)
        assert source.detected == len(numbers)
        assert source.faces == sum(1 + number % 3 for number in numbers)
        assert source.truncated == sum(number % 4 == 0 for number in numbers)
        assert (source.damaged, source.reconnects) == (3, 2)
        assert [seen.detected for seen in kept.frames] == [number % stride == 0 for number in range(count)]
        assert [len(seen.faces) for seen in kept.frames] == [1 + n // stride * stride % 3 for n in range(count)]
    assert not report.interrupted


def test_times_are_added_over_all_threads() -> None:
    @contextmanager
    def output(source: Source) -> Iterator[Use]:
        yield lambda seen, timer: timer.add("draw", 5.0)

    network = Network(max_batch=2)
    jobs = [Job("file", lambda: Made(9), output), Job("camera", lambda: Made(6, live=True), output)]
    report = run_pipeline(network, jobs, PipelineOptions(queue=10))  # type: ignore[arg-type]
    times = report.timer.total_ms
    assert times["network"] == 10 * len(network.calls)
    assert times["draw"] == 5 * 15
    assert times.keys() == {"read", WAIT, "network", "draw"}  # who waits for a camera does not read


def test_seconds_are_those_from_the_opening_to_the_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("trt_runtime.media.pipeline.time", SimpleNamespace(perf_counter=lambda: now[0]))
    source = Made(3)

    def open_() -> Source:
        now[0] += 7
        return source

    def use(seen: SeenFrame) -> None:
        if seen.number == 2:
            assert source.closed.wait(20)
            now[0] += 20

    (report,) = _run(Network(), [(open_, Kept(use))]).sources
    assert report.seconds == 27


def test_threads_belong_to_their_source() -> None:
    """It is opened where it is read, and its output made where its frames are used."""
    threads: dict[str, set[threading.Thread]] = {"open": set(), "read": set(), "output": set(), "use": set()}

    def note(what: str) -> None:
        threads[what].add(threading.current_thread())

    class Noting(Made):
        def __iter__(self) -> Iterator[TimedFrame]:
            for frame in super().__iter__():
                note("read")
                yield frame

    def open_() -> Source:
        note("open")
        return Noting(20)

    @contextmanager
    def output(source: Source) -> Iterator[Use]:
        assert isinstance(source, Noting)
        note("output")
        yield lambda seen, timer: note("use")
        note("output")

    ticks = []
    run_pipeline(
        Network(),  # type: ignore[arg-type]
        [Job("a", open_, output)],
        tick=lambda reports: ticks.append(threading.current_thread()) or True,  # type: ignore[func-returns-value]
    )
    assert threads["open"] == threads["read"] != threads["use"] == threads["output"]
    assert len(threads["open"]) == len(threads["use"]) == 1
    assert set(ticks) <= {threading.current_thread()}


def test_tick_sees_the_reports_as_they_grow() -> None:
    seen: list[tuple[int, int]] = []
    given = []
    go_on = threading.Event()

    def tick(reports: list[Any]) -> bool:
        given.append(reports)
        assert threading.current_thread() is threading.main_thread()
        seen.append((reports[0].decoded, reports[0].frames))
        if len(seen) == 5:
            go_on.set()
        return True

    kept = Kept(lambda frame: None if frame.number < 2 else _check(go_on.wait(20)))
    report = run_pipeline(
        Network(),  # type: ignore[arg-type]
        [Job("a", lambda: Made(50), kept)],
        tick=tick,
        tick_s=0.01,
    )
    assert report.sources[0].error is None
    assert len(seen) >= 5
    assert seen == sorted(seen)
    assert seen[4][1] <= 2 < 50 == report.sources[0].frames
    assert all(given_[0] is report.sources[0] for given_ in given)


def test_tick_is_called_no_more_often_than_asked_for() -> None:
    kept = Kept(lambda frame: time.sleep(0.3))
    report = run_pipeline(
        Network(),  # type: ignore[arg-type]
        [Job("a", lambda: Made(1), kept)],
        tick=lambda reports: pytest.fail("this is not the time"),
        tick_s=1000,
    )
    assert report.sources[0].frames == 1
    assert inspect.signature(run_pipeline).parameters["tick_s"].default == 0.1


@pytest.mark.parametrize("live", [False, True])
def test_what_waits_for_the_network_at_the_end_is_not_used(live: bool) -> None:
    """What it runs on is."""
    source, kept, full = Made(10**9, live=live), Kept(), threading.Event()

    def hold(_: list[tuple[int, int]]) -> None:
        if len(network.calls) == 1:
            _wait_until(lambda: source.made >= 1 + 8 + 1)
            full.set()
            assert source.stopped.wait(20)

    network = Network(max_batch=1, hold=hold)
    report = run_pipeline(
        network,  # type: ignore[arg-type]
        [Job("a", lambda: source, kept)],
        PipelineOptions(depth=1, queue=8),
        tick=lambda reports: not full.is_set(),
        tick_s=0.01,
    )
    assert [[number % 256] for number in kept.numbers] == [[number for _, number in call] for call in network.calls]
    assert len(kept.frames) == report.sources[0].frames == 1
    assert (kept.left, report.sources[0].error, report.interrupted) == ("in order", None, False)


def test_no_sources_are_done_at_once() -> None:
    report = run_pipeline(Network(), [], tick=lambda reports: pytest.fail("there is nothing to wait for"))  # type: ignore[arg-type]
    assert (report.sources, report.timer.total_ms, report.interrupted) == ([], {}, False)


def test_a_source_that_opens_after_the_end_is_not_read() -> None:
    endless, late, first, kept = Made(10**9), Made(10**9), Kept(), Kept()

    def open_late() -> Source:
        assert endless.stopped.wait(20)
        return late

    jobs = [Job("late", open_late, kept), Job("first", lambda: endless, first)]
    report = run_pipeline(Network(), jobs, tick=lambda reports: not first.numbers, tick_s=0.01)  # type: ignore[arg-type]
    assert (late.made, report.sources[0].decoded) == (0, 0)
    assert kept.left == "never entered"
    assert late.closed.is_set()


def test_what_a_source_says_when_it_is_stopped_is_no_error() -> None:
    class Waiting(Made):
        """It is stopped while it waits for its second frame."""

        def __iter__(self) -> Iterator[TimedFrame]:
            yield from super().__iter__()
            assert self.stopped.wait(20)
            raise VideoError("interrupted")

    source, kept = Waiting(1), Kept()
    jobs = [Job("a", lambda: source, kept)]
    report = run_pipeline(Network(), jobs, tick=lambda reports: not kept.numbers, tick_s=0.01)  # type: ignore[arg-type]
    assert report.sources[0].error is None
    assert (report.sources[0].complete, report.interrupted, kept.left) == (True, False, "in order")


@pytest.mark.parametrize("busy_with", ["opening", "reading"])
@pytest.mark.parametrize("how", ["stopped", "patience"])
def test_a_source_that_does_not_come_back_is_left_behind(
    busy_with: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C code cannot be interrupted. The other source is used to its end, and its output is complete."""
    go_on, waits = threading.Event(), threading.Event()
    if how == "patience":
        monkeypatch.setattr(pipeline, "PATIENCE_S", 0.3)
    monkeypatch.setattr(pipeline, "_GRACE_S", 0.3)

    class Stuck(Made):
        def __iter__(self) -> Iterator[TimedFrame]:
            waits.set()
            go_on.wait(60)
            yield from super().__iter__()

    def open_() -> Any:
        if busy_with == "opening":
            waits.set()
            go_on.wait(60)
        return Stuck(3)

    def tick(reports: list[pipeline.SourceReport]) -> bool:
        _wait_until(waits.is_set)
        return how == "patience" or not reports[1].complete

    before = set(threading.enumerate())
    stuck, used = Kept(), Kept()
    jobs = [Job("stuck", open_, stuck), Job("used", lambda: Made(20), used)]  # type: ignore[arg-type,return-value]
    try:
        report = run_pipeline(Network(), jobs, tick=tick, tick_s=0.02)  # type: ignore[arg-type]
        assert [thread.name for thread in set(threading.enumerate()) - before] == ["read stuck"]
    finally:
        go_on.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(20)
    assert used.numbers == list(range(20))
    assert report.sources[1].complete
    assert not stuck.frames
    error = report.sources[0].error
    expected = "stuck: nothing could be read within 0.3 s" if how == "patience" else "None"
    assert str(error) == expected


def test_an_abort_stops_every_source_and_raises_the_first_error() -> None:
    first, second = ZeroDivisionError("first"), ZeroDivisionError("second")

    class Stubborn(Made):
        """It fails when it is stopped."""

        def __iter__(self) -> Iterator[TimedFrame]:
            yield from super().__iter__()
            assert self.stopped.wait(20)
            raise second

    sources = [Stubborn(2), Stubborn(2, live=True)]

    def fail(seen: SeenFrame) -> None:
        _wait_until(lambda: all(kept.frames for kept in outputs[1:]))
        raise first

    outputs = [Kept(fail), Kept(), Kept()]
    jobs = [
        Job(str(number), open_, kept)
        for number, (open_, kept) in enumerate(
            zip([lambda: Made(10**9), lambda: sources[0], lambda: sources[1]], outputs, strict=True)
        )
    ]
    with pytest.raises(ZeroDivisionError) as caught:
        run_pipeline(Network(), jobs)  # type: ignore[arg-type]
    assert caught.value is first
    assert all(source.stopped.is_set() and source.closed.is_set() for source in sources)


def test_a_batch_that_fails_is_run_again_frame_by_frame() -> None:
    """One frame's fault is its own: the others of its call have their faces, and the time is taken once."""

    def hold(frames: list[tuple[int, int]]) -> None:
        assert all(source.closed.wait(20) for source in sources)
        if (1, 3) in frames:
            raise VideoError("this one is broken")

    sources = [Made(8, mark=mark) for mark in range(2)]
    network, outputs = Network(hold=hold), [Kept(), Kept()]
    report = _run(network, [(lambda s=s: s, kept) for s, kept in zip(sources, outputs, strict=True)], queue=10)  # type: ignore[misc]
    assert outputs[0].numbers == list(range(8))
    assert [seen.faces.scores[0] for seen in outputs[0].frames] == list(range(8))
    assert (outputs[1].numbers, str(report.sources[1].error)) == ([0, 1, 2], "this one is broken")
    assert report.sources[0].error is None


def test_a_frame_is_let_go_as_soon_as_it_was_used() -> None:
    """Another source, which gives nothing for a while, must not keep the frames of the last call."""
    source, kept = Made(6), Kept()

    class Silent(Made):
        def __iter__(self) -> Iterator[TimedFrame]:
            yield from super().__iter__()
            _wait_until(lambda: source.freed == 6)

    class Forgetful(Kept):
        @contextmanager
        def __call__(self, source: Source) -> Iterator[Use]:
            yield lambda seen, timer: None

    report = _run(Network(), [(lambda: source, Forgetful()), (lambda: Silent(1), kept)])
    assert [source.error for source in report.sources] == [None, None]
    assert kept.left == "in order"


@pytest.mark.parametrize("in_the_network", [False, True])
def test_the_frames_of_a_source_that_is_given_up_are_let_go(in_the_network: bool) -> None:
    """Those that wait for their use, and those whose calls end only afterwards."""
    source, kept = Made(10**9), Kept()

    def full(seen: SeenFrame) -> None:
        # ready, in two calls or past them, and one that is read
        _wait_until(lambda: source.made == 8 + (3 if in_the_network else 2 + 8) + 1)
        raise VideoError("the disk is full")

    def hold(frames: list[tuple[int, int]]) -> None:
        if in_the_network and frames[0] in [(0, 1), (0, 2)]:
            assert source.closed.wait(20)

    class Silent(Made):
        def __iter__(self) -> Iterator[TimedFrame]:
            yield from super().__iter__()
            assert source.closed.wait(20)
            _wait_until(lambda: source.freed >= source.made - 1)  # the traceback keeps the one that was used

    work = [(lambda: source, Kept(full)), (lambda: Silent(1, mark=1), kept)]
    report = _run(Network(max_batch=1, hold=hold), work, queue=8)
    assert str(report.sources[0].error) == "the disk is full"
    assert report.sources[1].error is None
    assert kept.left == "in order"


def test_frames_that_pass_the_network_take_no_room_in_its_calls() -> None:
    source = Made(17)
    network = Network(max_batch=2, hold=lambda _: _check(source.closed.wait(20)))
    _run(network, [(lambda: source, Kept())], depth=1, queue=20, stride=2)
    assert [number for call in network.calls for _, number in call] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert {len(call) for call in network.calls[1:-1]} == {2}
