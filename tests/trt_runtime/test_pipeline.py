from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from facespec.detections import Detections
from facespec.errors import ConfigError, RetinaFaceError, VideoError
from facespec.letterbox import Frame
from trt_runtime.detector import load_detector
from trt_runtime.pipeline import Job, PipelineOptions, PipelineReport, SeenFrame, Use, run_pipeline
from trt_runtime.timing import StageTimer
from trt_runtime.video import Source, TimedFrame, VideoFile, VideoWriter


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
        self.stopped = threading.Event()

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *_: object) -> None:
        pass

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

    @property
    def numbers(self) -> list[int]:
        return [seen.number for seen in self.frames]


def _run(detector: Any, work: list[tuple[Callable[[], Source], Kept]], **options: Any) -> PipelineReport:
    jobs = [Job(str(number), open_, output) for number, (open_, output) in enumerate(work)]
    return run_pipeline(detector, jobs, PipelineOptions(**options))


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


def test_stride_runs_the_network_on_one_frame_of_so_many(detector: Any, clips: list[Path]) -> None:
    kept = Kept()
    (source,) = _run(detector, [(partial(VideoFile, clips[0]), kept)], stride=5).sources
    assert kept.numbers == list(range(17))
    assert [seen.number for seen in kept.frames if seen.detected] == [0, 5, 10, 15]
    assert (source.frames, source.detected) == (17, 4)
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
def test_memory_is_bounded_however_slow_the_output_is(live: bool, detector: Any) -> None:
    source = Made(120, live=live)
    alive = []

    def slow(_: SeenFrame) -> None:
        time.sleep(0.005)
        alive.append(source.made - source.freed)

    class Forgetful(Kept):
        @contextmanager
        def __call__(self, source: Source) -> Iterator[Use]:
            yield lambda seen, timer: slow(seen)

    (report,) = _run(detector, [(lambda: source, Forgetful())], batch=2, depth=2, queue=3).sources
    assert report.frames + report.dropped == 120
    assert bool(report.dropped) == live
    # 3 ready, 2 calls of 2 and 3 more on their way, one read, one used, one that the network is letting go of
    assert 3 <= max(alive) <= 3 + 2 * 2 + 3 + 3


def test_frames_of_several_sources_share_a_call_that_nobody_waits_for(detector: Any) -> None:
    class Counting:
        max_batch, marks = 3, []  # type: ignore[var-annotated]

        @contextmanager
        def stream(self, depth: int) -> Iterator[Any]:
            with detector.stream(depth) as self.inner:
                yield self

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


def test_an_output_that_fails_gives_up_its_source_alone(detector: Any) -> None:
    def full(seen: SeenFrame) -> None:
        if seen.number == 2:
            raise VideoError("the disk is full")

    failing, good = Kept(full), Kept()
    endless = Made(10**9)
    report = _run(detector, [(lambda: endless, failing), (lambda: Made(40), good)])
    assert str(report.sources[0].error) == "the disk is full"
    assert endless.stopped.is_set()
    assert not report.sources[0].complete
    assert good.numbers == list(range(40))


@pytest.mark.parametrize("where", ["open", "read", "use", "tick"])
def test_any_other_error_ends_the_run_and_is_raised(where: str, detector: Any) -> None:
    fault = ZeroDivisionError(where)

    def fail(_: object = None) -> Any:
        raise fault

    endless, other = Made(10**9), Kept()
    opened = {"open": fail, "read": lambda: Made(3, error=fault)}.get(where, lambda: Made(10**9))
    jobs = [
        Job("failing", opened, Kept(fail if where == "use" else lambda seen: None)),
        Job("endless", lambda: endless, other),
    ]
    with pytest.raises(ZeroDivisionError, match=where) as caught:
        run_pipeline(detector, jobs, tick=fail if where == "tick" else lambda reports: True, tick_s=0.02)
    assert caught.value is fault
    assert other.left not in ("in order", None)  # so that a half-written file is not taken for a whole one


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


def test_a_job_is_what_mypy_takes_for_one() -> None:
    """`Made` is a `Source`, `Kept` an output."""
    source: Source = Made(1)
    output: AbstractContextManager[Use] = Kept()(source)
    with output as use:
        use(SeenFrame(np.zeros((1, 1, 3), np.uint8), 0, 0.0, Detections.empty((1, 1)), True), StageTimer())
