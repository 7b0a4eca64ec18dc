"""Overlapping calls: of functions that wait until they are told, and of real detectors."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facespec.detections import Detections
from facespec.errors import ClosedError, FrameError, SpecError
from facespec.letterbox import Frame
from tests.trt_runtime.handmade import in_time
from trt_runtime import DetectionStream, OrtRetinaFace, load_detector
from trt_runtime.measure import StageTimer

SOON_S = 30.0
"""What must happen has this long."""

NEVER_S = 0.1
"""What must not happen is waited for this long."""


def _found(frames: Any) -> list[Detections]:
    """Return, for frames that are numbers, detections that tell which they are of."""
    return [Detections.empty((number, number)) for number in frames]


class Gate:
    """A `detect_batch` whose calls wait until they are let through; frames are numbers."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self._open = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)

    def __call__(self, frames: list[int]) -> list[Detections]:
        self.begun += frames
        self._entered.release()
        assert self._open.acquire(timeout=SOON_S)
        return _found(frames)

    def let_through(self, calls: int) -> None:
        self._open.release(calls)

    def wait_begun(self, calls: int) -> None:
        for _ in range(calls):
            assert self._entered.acquire(timeout=SOON_S)


def _counting(count: int, pulled: list[int]) -> Iterator[int]:
    for number in range(1, count + 1):
        pulled.append(number)
        yield number


@pytest.fixture(autouse=True)
def _leaves_no_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("detect")]
    assert left == []


@pytest.mark.parametrize("depth", [0, -1, 257, 1.5, "2", None])
def test_other_depths_are_refused(depth: object) -> None:
    with pytest.raises(SpecError, match="depth of a stream must be a number from 1 to 256, got"):
        DetectionStream(_found, depth)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [1, 2, 5, 64])
def test_results_come_in_order_whatever_finishes_first(depth: int) -> None:
    """Of every two calls the earlier one ends last, if there is room for both."""
    ended = [threading.Event() for _ in range(41)]

    def detect_batch(frames: list[int]) -> list[Detections]:
        if depth > 1 and frames[0] % 2:
            assert ended[frames[0] + 1].wait(SOON_S)
        ended[frames[0]].set()
        return _found(frames)

    with DetectionStream(detect_batch, depth) as stream:
        results = [(number, faces.frame_hw[0]) for number, faces in stream.map(_counting(40, []))]
    assert results == [(number, number) for number in range(1, 41)]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_map_takes_no_more_than_depth_frames_ahead(depth: int) -> None:
    pulled: list[int] = []
    with DetectionStream(_found, depth) as stream:
        results = stream.map(_counting(20, pulled))
        assert pulled == []  # nothing before the first result is asked for
        for taken, (number, _) in enumerate(results, start=1):
            assert number == taken
            assert len(pulled) == min(taken + depth, 20)
    assert pulled == list(range(1, 21))


@pytest.mark.parametrize("depth", [1, 3])
def test_calls_run_while_the_caller_works(depth: int) -> None:
    """When a frame is handed out, the next `depth` of them are being computed."""
    gate = Gate()
    gate.let_through(1)
    with DetectionStream(gate, depth) as stream:
        results = stream.map(_counting(20, []))
        assert next(results)[0] == 1
        gate.wait_begun(1 + depth)
        assert sorted(gate.begun) == list(range(1, 2 + depth))
        gate.let_through(19)
        assert [number for number, _ in results] == list(range(2, 21))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_submit_waits_while_depth_calls_are_under_way(depth: int) -> None:
    gate = Gate()
    handed_over = threading.Event()
    with DetectionStream(gate, depth) as stream:
        futures = [stream.submit([number]) for number in range(depth)]
        gate.wait_begun(depth)

        def one_more() -> None:
            futures.append(stream.submit([depth]))
            handed_over.set()

        thread = threading.Thread(target=one_more)
        thread.start()
        assert not handed_over.wait(NEVER_S)
        assert len(gate.begun) == depth
        gate.let_through(1)
        assert handed_over.wait(SOON_S)
        thread.join()
        gate.let_through(depth)
        assert [future.result(SOON_S)[0].frame_hw[0] for future in futures] == list(range(depth + 1))


def test_many_threads_may_submit() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def detect_batch(frames: list[int]) -> list[Detections]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return _found(frames)
        finally:
            with lock:
                running -= 1

    results: dict[int, int] = {}
    with DetectionStream(detect_batch, 3) as stream:

        def work(start: int) -> None:
            for number in range(start, start + 50):
                results[number] = stream.submit([number]).result(SOON_S)[0].frame_hw[0]

        threads = [threading.Thread(target=work, args=(50 * index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: number for number in range(300)}
    assert most <= 3


def _failing(bad: int) -> Callable[[list[int]], list[Detections]]:
    def detect_batch(frames: list[int]) -> list[Detections]:
        if bad in frames:
            raise FrameError(f"frame {bad}")
        return _found(frames)

    return detect_batch


def test_an_error_reaches_its_own_future_only() -> None:
    with DetectionStream(_failing(3), 2) as stream:
        futures = [stream.submit([number]) for number in range(6)]
        for number, future in enumerate(futures):
            if number == 3:
                with pytest.raises(FrameError, match="frame 3"):
                    future.result(SOON_S)
            else:
                assert future.result(SOON_S)[0].frame_hw[0] == number


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_map_raises_an_error_where_its_frame_would_be(depth: int) -> None:
    seen: list[int] = []
    with DetectionStream(_failing(7), depth) as stream, pytest.raises(FrameError, match="frame 7"):
        seen.extend(number for number, _ in stream.map(_counting(20, [])))
    assert seen == [1, 2, 3, 4, 5, 6]


def test_an_error_of_the_frames_comes_through() -> None:
    def frames() -> Iterator[int]:
        yield 1
        raise OSError("the camera is gone")

    with pytest.raises(OSError, match="the camera is gone"), DetectionStream(_found, 2) as stream:
        list(stream.map(frames()))


def test_leaving_waits_for_what_was_handed_over() -> None:
    gate = Gate()
    with DetectionStream(gate, 2) as stream:
        futures = [stream.submit([number]) for number in (1, 2)]
        threading.Timer(NEVER_S, gate.let_through, (2,)).start()
    assert all(future.done() for future in futures)
    assert [future.result()[0].frame_hw[0] for future in futures] == [1, 2]


def test_leaving_with_an_error_begins_nothing_more() -> None:
    """What runs ends; whoever waits to hand over more is turned away, and so is whoever comes later."""
    gate = Gate()
    turned_away: list[BaseException] = []
    stream = DetectionStream(gate, 1)

    def one_more() -> None:
        try:
            stream.submit([2]).result(SOON_S)
        except BaseException as error:
            turned_away.append(error)

    thread = threading.Thread(target=one_more, daemon=True)
    futures = []

    def interrupted() -> None:
        with stream:
            futures.append(stream.submit([1]))
            gate.wait_begun(1)
            thread.start()
            threading.Timer(NEVER_S, gate.let_through, (1,)).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    thread.join(SOON_S)
    assert not thread.is_alive()
    assert futures[0].result(0)[0].frame_hw == (1, 1)
    assert [type(error) for error in turned_away] in ([ClosedError], [CancelledError])
    assert gate.begun == [1]

    def too_late() -> None:
        for _ in range(3):  # the place is given back each time
            with pytest.raises(ClosedError, match="the stream is closed: frames go to it inside its with block"):
                stream.submit([3])

    in_time(too_late)


def test_a_map_that_is_given_up() -> None:
    gate = Gate()
    gate.let_through(20)
    pulled: list[int] = []
    with DetectionStream(gate, 2) as stream:
        for number, _ in stream.map(_counting(20, pulled)):
            if number == 5:
                break
        assert pulled == list(range(1, 8))
        # the places of its frames are free again: another map runs through
        again = [number for number, _ in stream.map(iter([101, 102, 103, 104]))]
    assert again == [101, 102, 103, 104]
    assert sorted(gate.begun) == [*range(1, 8), *again]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_detector_streams_what_it_detects(
    backend: str, depth: int, static_onnx: Path, crowd: Frame, astronaut: Frame
) -> None:
    frames = [astronaut, crowd, np.full((70, 130, 3), 90, np.uint8), astronaut[:, ::-1]] * 4
    with load_detector(static_onnx, backend=backend, threads=1, streams=depth) as detector:
        expected = [detector.detect(frame) for frame in frames]
        assert [len(found) for found in expected[:4]] == [1, 3, 0, 1]
        with detector.stream(depth) as stream:
            for index, (frame, found) in enumerate(stream.map(iter(frames))):
                assert frame is frames[index]
                np.testing.assert_array_equal(found.boxes, expected[index].boxes)
                np.testing.assert_array_equal(found.scores, expected[index].scores)
            assert index == len(frames) - 1
            timer = StageTimer()
            several = stream.submit(frames[:3], timer).result(SOON_S)
            assert [len(found) for found in several] == [1, 3, 0]
            assert timer.total_ms["network"] > 0
            wrong = stream.submit([np.zeros((4, 4), np.uint8)])
            with pytest.raises(FrameError):
                wrong.result(SOON_S)


def test_a_stream_of_a_closed_detector(static_onnx: Path, astronaut: Frame) -> None:
    detector = OrtRetinaFace(static_onnx, threads=1)
    with detector.stream() as stream:
        assert len(stream.submit([astronaut]).result(SOON_S)[0]) == 1
        detector.close()
        with pytest.raises(ClosedError, match="the detector is closed"):
            stream.submit([astronaut]).result(SOON_S)


@pytest.mark.parametrize("depth", [1, 2, 256])
def test_places_are_given_back_when_a_call_cannot_begin(depth: int) -> None:
    """More often than there are places: whoever comes later is told, and does not wait for ever."""
    with DetectionStream(_found, depth) as stream:
        assert stream.submit([1]).result(SOON_S)[0].frame_hw == (1, 1)

    def too_late() -> None:
        for _ in range(depth + 2):
            with pytest.raises(ClosedError):
                stream.submit([1])

    in_time(too_late)


@pytest.mark.parametrize("depth", [1, 2])
def test_places_are_given_back_after_an_error(depth: int) -> None:
    with DetectionStream(_failing(3), depth) as stream:

        def more_often_than_there_are_places() -> None:
            for _ in range(depth + 2):
                with pytest.raises(FrameError):
                    stream.submit([3]).result(SOON_S)

        in_time(more_often_than_there_are_places)


def test_an_error_of_the_threads_goes_through_while_the_stream_is_open() -> None:
    """As where the system starts no more of them."""
    with DetectionStream(_found, 1) as stream:
        submit = stream._threads.submit

        def fail(*args: Any) -> Any:
            raise RuntimeError("can't start new thread")

        stream._threads.submit = fail  # type: ignore[method-assign]

        def refused() -> None:
            for _ in range(3):
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    stream.submit([1])

        in_time(refused)
        stream._threads.submit = submit  # type: ignore[method-assign]
        in_time(lambda: stream.submit([1]).result(SOON_S))


def test_one_frame_is_not_taken_for_a_video() -> None:
    """Rows of one frame would be frames of two axes."""
    with DetectionStream(_found, 1) as stream:
        for wrong in (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)):
            with pytest.raises(FrameError, match="map takes the frames of a video; one frame goes to detect"):
                next(stream.map(wrong))

    def sums(frames: list[Frame]) -> list[Detections]:
        return _found([int(frame.sum()) for frame in frames])

    with DetectionStream(sums, 1) as stream:
        video = np.arange(3)[:, None, None, None] * np.ones((1, 1, 1, 3), np.uint8)
        assert [found.frame_hw[0] for _, found in stream.map(video)] == [0, 3, 6]
        assert list(stream.map([])) == []


def test_options_reach_the_call_and_its_thread_has_a_name() -> None:
    seen: list[Any] = []

    def detect_batch(frames: list[int], *options: Any) -> list[Detections]:
        seen.append((frames, options, threading.current_thread().name.rstrip("0123456789")))
        return _found(frames)

    with DetectionStream(detect_batch, 1) as stream:
        assert stream.__enter__() is stream
        stream.submit([1, 2], "timer", 3).result(SOON_S)
        list(stream.map([5]))
    assert seen == [([1, 2], ("timer", 3), "detect_"), ([5], (), "detect_")]


def test_frames_are_handed_over_on_the_callers_thread_and_what_is_refused_there_is_an_error_of_the_call() -> None:
    threads: list[int] = []

    def hand_over(frame: int) -> int:
        threads.append(threading.get_ident())
        if frame == 3:
            raise FrameError("frame 3")
        return 10 * frame

    def more_often_than_there_are_places() -> None:
        for _ in range(3):
            with pytest.raises(FrameError, match="frame 3"):
                stream.submit([1, 3]).result(SOON_S)

    with DetectionStream(_found, 2, hand_over) as stream:
        assert [found.frame_hw[0] for found in stream.submit((1, 2)).result(SOON_S)] == [10, 20]
        assert stream.hand_over(5) == 50
        assert set(threads) == {threading.get_ident()}
        in_time(more_often_than_there_are_places)
        seen = []
        with pytest.raises(FrameError, match="frame 3"):
            seen.extend(number for number, _ in stream.map([1, 2, 3, 4]))
        assert seen == [1, 2]


def test_a_frame_that_is_refused_is_not_kept() -> None:
    def hand_over(frame: Frame) -> Frame:
        raise FrameError("no frame")

    frame = np.zeros((4, 4, 3), np.uint8)
    alive = weakref.ref(frame)
    with DetectionStream(_found, 1, hand_over) as stream:
        future = stream.submit([frame])
        del frame
        assert alive() is None
        assert isinstance(future.exception(), FrameError)
