from __future__ import annotations

import inspect
import itertools
import os
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from facespec.errors import MissingPackageError, VideoError, reason
from facespec.images import MAX_PIXELS
from facespec.letterbox import Frame, Letterbox
from tests.trt_runtime.spoilt import OddPictures
from trt_runtime.media import hdr
from trt_runtime.media.files import (
    VIDEO_SUFFIXES,
    Pictures,
    Source,
    VideoFile,
    VideoWriter,
    ends_early,
    frame_rate,
    load_av,
    require_display,
    stored_aspect,
    video_stream,
)
from trt_runtime.media.live import Camera, NetworkStream, open_source

NAN, INF = float("nan"), float("inf")


def _frame(index: int, height: int = 96, width: int = 128) -> Frame:
    """A smooth picture whose brightness tells its index."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x / width * 60, y / height * 60, np.full_like(x, 20 + 8 * index, float)], axis=2).astype(np.uint8)


def _write(path: Path, frames: Sequence[Frame], rate: float = 25) -> Path:
    with VideoWriter(path, rate) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = _write(tmp_path / "v.mp4", [_frame(i) for i in range(20)], 30000 / 1001)
    with VideoFile(path) as video:
        assert video.rate == pytest.approx(30000 / 1001, abs=1e-4)
        assert (video.name, video.path, video.live) == (str(path), path, False)
        assert (video.damaged, video.reconnects) == (0, 0)
        assert video.frame_count == 20
        frames = list(video)
    assert len(frames) == 20
    for index, (image, seconds) in enumerate(frames):
        assert image.shape == (96, 128, 3)
        assert np.abs(image.astype(int) - _frame(index)).mean() < 6
        assert seconds == pytest.approx(index * 1001 / 30000, abs=1e-3)
    # an independent reader agrees that it is H.264 in a form browsers play
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    capture = cv2.VideoCapture(str(path))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 20


def test_uneven_time_stamps_are_kept(tmp_path: Path) -> None:
    stamps = [0.0, 0.04, 0.2, 0.21, 1.0]
    with VideoWriter(tmp_path / "v.mp4", 25) as writer:
        for index, seconds in enumerate(stamps):
            writer.write(_frame(index), seconds)
    with VideoFile(tmp_path / "v.mp4") as video:
        assert [seconds for _, seconds in video] == pytest.approx(stamps, abs=1e-3)


@pytest.mark.parametrize("shape", [(97, 129), (2, 2), (3, 200)])
def test_odd_sizes_lose_at_most_one_row_and_column(shape: tuple[int, int], tmp_path: Path) -> None:
    path = _write(tmp_path / "v.mp4", [_frame(3, *shape)] * 3)
    with VideoFile(path) as video:
        assert [frame.image.shape[:2] for frame in video] == [(shape[0] // 2 * 2, shape[1] // 2 * 2)] * 3


def test_odd_sizes_are_cut_not_scaled(tmp_path: Path) -> None:
    """Stripes of two rows: scaled from 97 rows to 96 they would blur away in the middle."""
    stripes = np.repeat(np.where(np.arange(97) // 2 % 2, 200, 50)[:, None, None], 129, axis=1)
    frame = np.broadcast_to(stripes, (97, 129, 3)).astype(np.uint8)
    with VideoFile(_write(tmp_path / "v.mp4", [frame] * 3)) as video:
        for image, _ in video:
            assert np.abs(image.astype(int) - frame[:96, :128]).mean() < 10


def test_frames_of_another_size_are_letterboxed(tmp_path: Path) -> None:
    path = _write(tmp_path / "v.mp4", [_frame(9), _frame(9, 200, 100), _frame(9, 50, 300), _frame(9)])
    with VideoFile(path) as video:
        frames = [frame.image for frame in video]
    assert [frame.shape for frame in frames] == [(96, 128, 3)] * 4
    assert frames[1][:, 60:].mean() < 8  # the padding
    assert frames[1][:, :40, 2].mean() > 60
    for frame, hw in zip(frames[1:3], [(200, 100), (50, 300)], strict=True):
        expected = Letterbox.fit(hw, (96, 128)).apply(_frame(9, *hw), (0, 0, 0))
        assert np.abs(frame.astype(int) - expected).mean() < 4


def _transport_stream(path: Path, sizes: Sequence[tuple[int, int]], starts: Sequence[float]) -> Path:
    """MPEG-TS may switch resolution in the middle: H.264 streams of ten frames, one after the other."""
    parts = []
    for (height, width), start in zip(sizes, starts, strict=True):
        with av.open(str(path), "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for step in range(10):
                frame = av.VideoFrame.from_ndarray(_frame(step, height, width), format="bgr24")
                frame.pts, frame.time_base = step + round(25 * start), Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    return path


def test_a_video_that_changes_size_is_read_frame_by_frame(tmp_path: Path) -> None:
    with VideoFile(_transport_stream(tmp_path / "v.ts", [(96, 128), (64, 96)], [0, 0.4])) as video:
        shapes = [frame.image.shape[:2] for frame in video]
    assert shapes[0] == (96, 128)
    assert shapes[-1] == (64, 96)
    assert len(shapes) == 20


def test_a_video_that_grows_over_the_pixel_limit_is_damaged_from_there(tmp_path: Path) -> None:
    path = _transport_stream(tmp_path / "v.ts", [(96, 128), (192, 256)], [0, 0.4])
    with VideoFile(path, max_pixels=96 * 128) as video:
        frames = list(video)
    assert {frame.image.shape for frame in frames} == {(96, 128, 3)}
    assert video.damaged > 0
    with VideoFile(path) as video:
        assert len(list(video)) == 20
    assert video.damaged == 0


def test_time_stamps_that_go_back_count_on_from_the_last(tmp_path: Path) -> None:
    path = _transport_stream(tmp_path / "v.ts", [(96, 128)] * 3, [5, 2, 6])
    with VideoFile(path) as video:
        stamps = [seconds for _, seconds in video]
    expected = [*range(20), *range(25, 35)]  # 6 s are a second after the first of 5 s
    assert stamps == pytest.approx([index / 25 for index in expected], abs=1e-3)


def test_without_time_stamps_the_rate_counts(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mjpeg"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuvj420p"
        for index in range(5):
            picture = av.VideoFrame.from_ndarray(_frame(index), format="bgr24")
            container.mux(stream.encode(picture.reformat(format="yuvj420p")))

    class Timeless(VideoFile):
        def _decoded(self) -> Iterator[Any]:
            for frame in super()._decoded():
                frame.pts = None
                yield frame

    with Timeless(tmp_path / "v.mjpeg") as video:
        video.rate = 10.0
        assert [seconds for _, seconds in video] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_video_broken_in_the_middle_gives_the_rest(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (96, 128, 3), np.uint8) for _ in range(60)]
    path = tmp_path / f"v{suffix}"
    _write(path, frames)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = rng.integers(0, 256, 4000, np.uint8).tobytes()
    path.write_bytes(data)
    with VideoFile(path) as video:
        count = sum(1 for _ in video)
        assert 20 < count <= 60
        assert video.damaged > 0


def _noise(count: int) -> list[Frame]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (96, 128, 3), np.uint8) for _ in range(count)]


def test_a_video_that_ends_early_gives_what_is_there(tmp_path: Path) -> None:
    path = _write(tmp_path / "v.mkv", _noise(40), 5)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with VideoFile(path) as video:
        assert 5 < sum(1 for _ in video) < 40
    assert video.damaged > 0


@pytest.mark.parametrize(("left", "damaged"), [(20, 1), (34, 1), (35, 0), (39, 0)])
def test_more_than_a_second_that_is_missing_at_the_end_is_damage(left: int, damaged: int, tmp_path: Path) -> None:
    """Cut off between two frames, so that nothing else tells; eight seconds are announced."""
    path = _write(tmp_path / "v.mp4", _noise(40), 5)
    with av.open(str(path)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: starts[left]])
    with VideoFile(path) as video:
        assert video.frame_count == 40
        frames = list(video)
    assert len(frames) == left
    assert video.damaged == damaged


def test_a_lost_packet_is_one_damaged_frame(tmp_path: Path) -> None:
    """FFmpeg shows it all the same, and marks it."""
    path = tmp_path / "v.ts"
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "bframes=0:scenecut=0"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for image in _noise(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    middle = len(data) // 188 // 2 * 188
    path.write_bytes(data[:middle] + data[middle + 188 :])
    with VideoFile(path) as video:
        assert len(list(video)) == 30
    assert video.damaged == 1


def _mjpeg(path: Path, plan: Sequence[tuple[int, bool]]) -> Path:
    """So many pictures that are good, or garbage, in turn."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=1000)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuvj420p"
        picture = av.VideoFrame.from_ndarray(_frame(3, 32, 32), format="bgr24").reformat(format="yuvj420p")
        good = bytes(stream.encode(picture)[0])
        number = 0
        for count, is_good in plan:
            for _ in range(count):
                packet = av.Packet(good if is_good else b"garbage!" * 4)
                packet.stream, packet.time_base = stream, Fraction(1, 1000)
                packet.pts = packet.dts = number
                number += 1
                container.mux(packet)
    return path


@pytest.mark.parametrize(
    ("plan", "frames", "damaged"),
    [
        ([(2, True), (600, False), (1, True), (600, False), (1, True)], 4, 1200),
        ([(2, True), (1000, False), (1, True)], 3, 1000),
        ([(2, True), (1001, False), (1, True)], 2, 1001 + 1),  # it ends a second too early, as well
    ],
)
def test_a_thousand_broken_packets_in_a_row_are_passed_over_and_no_more(
    plan: list[tuple[int, bool]], frames: int, damaged: int, tmp_path: Path
) -> None:
    with VideoFile(_mjpeg(tmp_path / "v.mkv", plan)) as video:
        assert len(list(video)) == frames
    assert video.damaged == damaged


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_last_frame_that_is_shown_for_long_is_not_missing(suffix: str, tmp_path: Path) -> None:
    """Far longer than the mean of all frames, but no longer than the one before."""
    starts = [*range(0, 1000, 40), 5000, 10_000, 15_000]
    with av.open(str(tmp_path / f"v{suffix}"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuvj420p"
        picture = av.VideoFrame.from_ndarray(_frame(3, 32, 32), format="bgr24").reformat(format="yuvj420p")
        data = bytes(stream.encode(picture)[0])
        for start, end in itertools.pairwise(starts):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = start
            packet.duration = end - start
            container.mux(packet)
    with VideoFile(tmp_path / f"v{suffix}") as video:
        assert [seconds for _, seconds in video] == pytest.approx([start / 1000 for start in starts[:-1]], abs=1e-3)
    assert video.damaged == 0


def test_a_rate_that_is_not_announced_is_guessed(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.ts"), "w") as container:
        stream = container.add_stream("mpeg4", rate=7)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(_frame(3), format="bgr24")))
        container.mux(stream.encode(None))
    with VideoFile(tmp_path / "v.ts") as video:
        assert (video.rate, video.frame_count) == (7, 0)


def test_a_frame_that_cannot_be_converted_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trt_runtime.media.files.Pictures", OddPictures)
    with VideoFile(_write(tmp_path / "v.mp4", [_frame(i) for i in range(6)])) as video:
        frames = list(video)
    assert [round((frame.image[:, :, 2].mean() - 20) / 8) for frame in frames] == [1, 2, 4, 5]
    assert [frame.seconds for frame in frames] == pytest.approx([0.04, 0.08, 0.16, 0.2], abs=1e-3)
    assert video.damaged == 2


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_the_rotation_phones_record_is_applied(degrees: int, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a rotation")
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_frame(5), format="bgr24")))
        container.mux(stream.encode(None))
    capture = cv2.VideoCapture(str(tmp_path / "v.mp4"))  # OpenCV applies it as well
    expected = capture.read()[1].astype(int)
    with VideoFile(tmp_path / "v.mp4") as video:
        image = next(iter(video)).image
    assert image.shape == expected.shape
    assert np.abs(image - expected).mean() < 3


@pytest.mark.parametrize(
    "data", [b"", b"garbage" * 1000, b"\0\0\0\x18ftypmp42" + bytes(500), b"#EXTM3U\n/etc/passwd\n"]
)
def test_files_that_are_no_video(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(data)
    with pytest.raises(VideoError) as caught, VideoFile(tmp_path / "v.mp4") as video:
        list(video)
    assert "\n" not in str(caught.value)


def test_no_frames_no_video_stream_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no such file"):
        VideoFile(tmp_path / "none.mp4")
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[b"no video"])  # or it would be waited for
    writer.start()
    try:
        for path in (pipe, tmp_path):
            with pytest.raises(VideoError, match=f"^{path}: not a regular file$"):
                VideoFile(path)
    finally:
        end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        writer.join(10)
        os.close(end)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for _ in range(5):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="no video stream"):
        VideoFile(tmp_path / "sound.mp4")
    # a stream that is announced but holds nothing; whether it counts as a stream depends on the container
    for suffix, words in (("avi", "no frame of it can be decoded"), ("mp4", "no video stream"), ("mkv", "not a video")):
        path = tmp_path / f"v.{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
            container.start_encoding()
        with pytest.raises(VideoError, match=words), VideoFile(path) as video:
            list(video)


def test_the_pixel_limit_is_applied_before_decoding(tmp_path: Path) -> None:
    path = _write(tmp_path / "v.mp4", [_frame(0)] * 2)
    with pytest.raises(VideoError, match="megapixels"):
        VideoFile(path, max_pixels=96 * 128 - 1)
    with VideoFile(path, max_pixels=96 * 128) as video:
        assert len(list(video)) == 2
    for reader in (VideoFile, NetworkStream):
        assert inspect.signature(reader).parameters["max_pixels"].default == MAX_PIXELS


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing_and_an_interrupt_a_playable_file(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    before = set(threading.enumerate())
    with pytest.raises(error), VideoWriter(path, 25) as writer:  # noqa: PT012
        for index in range(10):
            writer.write(_frame(index))
        raise error
    assert set(threading.enumerate()) == before
    if error is KeyboardInterrupt:
        with VideoFile(path) as video:
            assert sum(1 for _ in video) == 10
    assert [item.name for item in tmp_path.iterdir()] == (["v.mp4"] if error is KeyboardInterrupt else [])


def test_an_error_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), VideoWriter(path, 25) as writer:  # noqa: PT012
        writer.write(_frame(0))
        raise ZeroDivisionError
    with VideoWriter(path, 25):
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"before"
    with VideoWriter(path, 25) as writer:
        writer.write(_frame(0))
        assert path.read_bytes() == b"before"
    with VideoFile(path) as video:
        assert len(list(video)) == 1


@contextmanager
def _a_disk_to_fill() -> Iterator[Callable[[], None]]:
    """Gives what leaves room for 30 000 bytes in each file until the block ends, no longer: pytest may write a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("when", ["at once", "at the end"])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(when: str, suffix: str, tmp_path: Path) -> None:
    path, noise, calls = tmp_path / f"v{suffix}", _noise(20), 0
    with pytest.raises(VideoError) as caught, _a_disk_to_fill() as fill_disk, VideoWriter(path, 25) as writer:  # noqa: PT012
        if when == "at once":
            fill_disk()
        for calls in range(400 if when == "at once" else 20):
            writer.write(noise[calls % 20])
        fill_disk()
    assert str(caught.value) == f"{path}: cannot be written (File too large)"
    assert list(tmp_path.iterdir()) == []
    assert calls < 399  # a call tells it, if there is one


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"\.mp4"):
        VideoWriter(tmp_path / "v.avi", 25)
    with pytest.raises(VideoError, match="1x1"):
        _write(tmp_path / "v.mp4", [np.zeros((1, 1, 3), np.uint8)])
    with pytest.raises(VideoError, match="a video of 5x1 cannot"):
        _write(tmp_path / "v.mp4", [np.zeros((1, 5, 3), np.uint8)])
    for suffix in VIDEO_SUFFIXES:
        with pytest.raises(VideoError, match=suffix):
            VideoWriter(tmp_path / f"v{suffix}x", 25)
    with VideoWriter(tmp_path / "none.mp4", 25):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_camera_that_is_not_there() -> None:
    for index in (97, 10**12):
        with pytest.raises(VideoError, match=f"^camera {index}"):
            Camera(index)
    for index in (-1, 1000):
        with pytest.raises(VideoError, match=f"^camera {index}: there is none of this number; 0 is the first"):
            Camera(index)
    with pytest.raises(VideoError, match=r"^camera 999: cannot be opened; is it connected, and free"):
        Camera(999)


@pytest.fixture
def webcam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[cv2.VideoCapture]]:
    """Puts a video of six frames at 20 frames/s in the place of camera 3; yields what has been opened."""
    path = str(_write(tmp_path / "v.mp4", [_frame(i) for i in range(6)], 20))
    opened: list[cv2.VideoCapture] = []
    real = cv2.VideoCapture

    def open_(index: int) -> cv2.VideoCapture:
        assert index == 3
        opened.append(real(path))
        return opened[-1]

    monkeypatch.setattr(cv2, "VideoCapture", open_)
    return opened


def test_a_camera_gives_frames_until_it_is_gone(
    webcam: list[cv2.VideoCapture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = cv2.VideoCapture(3)
    expected = [capture.read()[1] for _ in range(6)]
    ticks = iter(range(1000, 10_000, 500))
    with open_source("3") as camera:
        assert (camera.name, camera.live, camera.frame_count) == ("camera 3", True, 0)
        assert (camera.damaged, camera.reconnects) == (0, 0)
        assert camera.rate == pytest.approx(20)
        monkeypatch.setattr(cv2, "getTickFrequency", lambda: 1e4)
        monkeypatch.setattr(cv2, "getTickCount", lambda: next(ticks))
        frames = list(camera)
        assert webcam[-1].isOpened()
    assert not webcam[-1].isOpened()  # another program may have it now
    assert len(frames) == 6
    assert all(np.array_equal(frame.image, image) for frame, image in zip(frames, expected, strict=True))
    assert [frame.seconds for frame in frames] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3])


def test_a_camera_that_is_stopped_ends_and_one_without_a_rate_has_30(
    webcam: list[cv2.VideoCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Camera(3) as camera:
        frames = iter(camera)
        next(frames)
        camera.stop()
        assert list(frames) == []

    class Unknown:
        def __init__(self, index: int) -> None:
            self.isOpened, self.release = (lambda: True), (lambda: None)

        def get(self, what: int) -> float:
            return 0.0 if what == cv2.CAP_PROP_FPS else 77.0

    monkeypatch.setattr(cv2, "VideoCapture", Unknown)
    assert Camera(3).rate == 30.0


def test_a_window_needs_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(VideoError, match="--out"):
        require_display()
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, ":0")
        require_display()
        monkeypatch.setenv(name, "")
    with pytest.raises(VideoError, match="--out"):
        require_display()
    for platform in ("darwin", "win32"):
        monkeypatch.setattr("sys.platform", platform)
        require_display()


def test_playlists_do_not_lead_to_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with av.open(str(other / "secret.ts"), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for index in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_frame(index), format="bgr24")))
        container.mux(stream.encode(None))
    lists = {
        "v.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}/secret.ts\n#EXT-X-ENDLIST\n",
        "v.mp4": "ffconcat version 1.0\nfile other/secret.ts\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(VideoError), VideoFile(tmp_path / name) as video:
            list(video)
    allowed = []
    real = av.open

    def open_(*args: Any, options: dict[str, str], **others: Any) -> Any:
        allowed.append(options)
        return real(*args, options=options, **others)

    monkeypatch.setattr(av, "open", open_)
    with VideoFile(other / "secret.ts"):
        assert allowed[0]["protocol_whitelist"] == "file"
        assert not {"hls", "applehttp", "dash", "concat", "image2", "lavfi"} & set(
            allowed[0]["format_whitelist"].split(",")
        )
    with VideoFile(other / "secret.ts") as video:  # by itself it is a video like any other
        assert sum(1 for _ in video) == 10


def test_a_codec_nobody_knows_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "v.mp4", [_frame(0)] * 3)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(VideoError, match="no decoder"):
        VideoFile(path)


@pytest.mark.parametrize("step", [3000.0, 1e9])
def test_time_stamps_far_apart(step: float, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"tune": "zerolatency"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1)
        for index in range(4):
            frame = av.VideoFrame.from_ndarray(_frame(index), format="bgr24")
            frame.pts, frame.time_base = int(index * step), Fraction(1, 1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with VideoFile(tmp_path / "v.mkv") as video, VideoWriter(tmp_path / "o.mp4", video.rate) as writer:
        assert 1 <= video.rate <= 1000
        stamps = []
        for image, seconds in video:
            stamps.append(seconds)
            writer.write(image, seconds)
    expected = [0, step, 2 * step, 3 * step] if step == 3000 else [index / video.rate for index in range(4)]
    assert stamps == pytest.approx(expected)
    with VideoFile(tmp_path / "o.mp4") as video:
        assert sum(1 for _ in video) == 4


def test_a_video_that_starts_late_is_not_damaged(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mkv", 25) as writer:
        for index in range(30):
            writer.write(_frame(index % 8), 5 + index / 25)
    with VideoFile(tmp_path / "v.mkv") as video:
        stamps = [seconds for _, seconds in video]
    assert stamps[0] == 0
    assert stamps[-1] == pytest.approx(29 / 25, abs=2e-3)
    assert video.damaged == 0


def test_a_huge_frame_takes_no_memory_before_it_is_refused(tmp_path: Path) -> None:
    """PNG frames in a MOV file: the size stands nowhere but in the frame, which probing would decode (108 MB)."""
    with av.open(str(tmp_path / "v.mov"), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 5000, 7200, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((5000, 7200, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    code = (
        "import resource\nfrom trt_runtime.media.files import *\nimport av\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    list(VideoFile('v.mov', 5000 * 7200 - 1))\nexcept VideoError:\n    print('refused')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    line = [sys.executable, "-c", code]
    result = subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert result.stdout.split()[0] == "refused"
    assert int(result.stdout.split()[1]) < 50_000  # KiB


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mov", ".webm", ".flv", ".gif"])
def test_slow_videos_and_long_sound_are_not_damage(suffix: str, tmp_path: Path) -> None:
    """The last of three frames is shown for two seconds; sound, where the container takes it, goes on for longer."""
    codec = {".webm": "libvpx", ".gif": "gif", ".flv": "flv"}.get(suffix, "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    for with_sound in (False, True):
        if with_sound and suffix not in (".mp4", ".mkv", ".mov"):
            continue
        path = tmp_path / f"{with_sound}{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=Fraction(1, 2) if suffix != ".flv" else 1)
            stream.height, stream.width = 96, 128
            stream.pix_fmt = "rgb8" if suffix == ".gif" else "yuv420p"
            sound = container.add_stream("aac", rate=8000) if with_sound else None
            for index in range(3):
                frame = av.VideoFrame.from_ndarray(_frame(index), format="bgr24").reformat(format=stream.pix_fmt)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            if sound is not None:
                for _ in range(10 * 8):
                    block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                    block.sample_rate = 8000
                    container.mux(sound.encode(block))
                container.mux(sound.encode(None))
        with VideoFile(path) as video:
            assert sum(1 for _ in video) == 3
        assert video.damaged == 0


_PATCHES = [(b, g, r) for b in (16, 128, 240) for g in (16, 128, 240) for r in (16, 128, 240)]  # BGR


def _chart(height: int, width: int) -> Frame:
    """27 colours side by side."""
    columns = np.arange(width) * len(_PATCHES) // width
    return np.broadcast_to(np.array(_PATCHES, np.uint8)[columns], (height, width, 3)).copy()


def _patches(image: Frame) -> Frame:
    """The colours of a chart, away from the edges of the patches."""
    step = image.shape[1] // len(_PATCHES)
    columns = [slice(i * step + step // 3, (i + 1) * step - step // 3) for i in range(len(_PATCHES))]
    return np.array([image[10:-10, column].reshape(-1, 3).mean(axis=0) for column in columns])


@pytest.mark.parametrize("height", [96, 97, 98])
def test_colours_that_are_written_are_those_an_independent_reader_sees(height: int, tmp_path: Path) -> None:
    path = _write(tmp_path / "v.mp4", [_chart(height, 27 * 16)] * 5)
    image = cv2.VideoCapture(str(path)).read()[1]
    assert np.abs(_patches(image) - _PATCHES).max() < 5
    chart = _chart(*image.shape[:2]).astype(int)
    assert np.abs((image - chart).mean(axis=1)).max() < 4  # down to the last row
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        # said in the file, or players take BT.709 for granted
        assert (frame.color_range, container.streams.video[0].codec_context.colorspace) == (1, 6)
    with VideoFile(path) as video:
        assert np.abs(next(iter(video)).image.astype(int) - image).mean() < 2


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", ["BT.601", "BT.709", None])
def test_colours_are_read_as_the_video_says(matrix: str | None, full_range: bool, tmp_path: Path) -> None:
    """The chart is converted by the definition (ITU-R BT.601 and BT.709), in floating point."""
    red, blue = (0.2126, 0.0722) if matrix == "BT.709" else (0.299, 0.114)
    b, g, r = np.moveaxis(_chart(96, 27 * 16) / 255.0, 2, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = [(b - luma) / (2 * (1 - blue)), (r - luma) / (2 * (1 - red))]
    span, base, chroma_span = (255, 0, 255) if full_range else (219, 16, 224)
    planes = [luma * span + base, *((plane * chroma_span + 128)[::2, ::2] for plane in chroma)]
    pixels = np.concatenate([np.clip(np.rint(plane), 0, 255).astype(np.uint8).ravel() for plane in planes])
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 96, 27 * 16, "yuv420p"
        stream.codec_context.colorspace = {"BT.601": 6, "BT.709": 1, None: 2}[matrix]
        stream.codec_context.color_range = 2 if full_range else 1
        frame = av.VideoFrame.from_ndarray(pixels.reshape(-1, 27 * 16), format="yuv420p")
        frame.color_range = 2 if full_range else 1
        for _ in range(3):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with VideoFile(tmp_path / "v.mp4") as video:
        image = next(iter(video)).image
    assert np.abs(_patches(image) - _PATCHES).max() < 6


_SDR = np.array([[120, 150, 200], [30, 30, 30], [128, 128, 128], [60, 180, 90], [200, 20, 10], [35, 40, 60]])  # BGR


def _hdr_video(path: Path, transfer: int, white: float = 203.0) -> Path:
    """Patches of sRGB colours, by the definitions of BT.709, BT.2020 and BT.2100 in floating point."""
    value = _SDR[:, ::-1] / 255
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4) * white
    to_bt2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    light = light @ np.transpose(to_bt2020)
    if transfer == 16:
        power = (light / 10_000) ** 0.1593017578125
        signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    else:
        scene = (light / 1000) ** (1 / 1.2)
        dim = np.sqrt(3 * scene)
        bright = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        signal = np.where(scene <= 1 / 12, dim, bright)
    luma = signal @ [0.2627, 0.6780, 0.0593]
    planes = [64 + 876 * luma, 512 + 896 * (signal[:, 2] - luma) / 1.8814, 512 + 896 * (signal[:, 0] - luma) / 1.4746]
    frame = av.VideoFrame(16 * len(_SDR), 32, "yuv420p10le")
    for plane, values, width in zip(frame.planes, planes, (16, 8, 8), strict=True):
        rows = np.frombuffer(plane, np.uint16).reshape(plane.height, -1)
        rows[:, : width * len(_SDR)] = np.repeat(np.rint(values), width)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, 1
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("transfer", [16, 18], ids=["PQ", "HLG"])
def test_hdr_is_read_as_sdr(transfer: int, tmp_path: Path) -> None:
    """Colours up to white look as they do in SDR; read as they are stored, they are grey."""
    with VideoFile(_hdr_video(tmp_path / "v.mkv", transfer)) as video:
        (frame,) = video
    found = frame.image[16, 8::16].astype(int)
    assert np.abs(found - _SDR).max() <= 5
    assert (frame.image.dtype, frame.image.shape) == (np.uint8, (32, 96, 3))


def test_highlights_of_hdr_are_compressed_not_cut(tmp_path: Path) -> None:
    """Grey of 203, 500 and 1000 nits: SDR has one white for all of them."""
    power = (np.array([100, 203, 500, 1000, 5000]) / 10_000) ** 0.1593017578125
    signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    picture = np.repeat(np.rint(65_535 * signal).astype(np.uint16)[None, :, None], 3, axis=2)
    grey = hdr.to_sdr(picture, hdr.PQ, 9)[0, :, 1].astype(int)
    assert 180 < grey[0] < grey[1] - 40
    assert 235 < grey[1] < grey[2] < grey[3] == grey[4] == 255


def test_hdr_of_small_primaries_keeps_its_colours() -> None:
    picture = np.array([[[0, 0, 30_000]]], np.uint16)
    assert hdr.to_sdr(picture, hdr.PQ, 1)[0, 0, :2].tolist() == [0, 0]
    red = hdr.to_sdr(picture, hdr.PQ, 9)[0, 0]
    assert red[2] > hdr.to_sdr(picture, hdr.PQ, 1)[0, 0, 2]  # BT.2020's red is outside of BT.709


def test_a_stopped_file_ends(tmp_path: Path) -> None:
    with VideoFile(_write(tmp_path / "v.mp4", [_frame(i) for i in range(20)])) as video:
        count = 0
        for _ in video:
            count += 1
            if count == 5:
                video.stop()
    assert count == 5
    assert video.damaged == 0
    with VideoFile(tmp_path / "v.mp4") as video:
        video.stop()
        assert list(video) == []


def test_a_file_named_like_a_camera_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "v.mp4", [_frame(0)] * 3).rename(tmp_path / "97")
    monkeypatch.chdir(tmp_path)
    with open_source("97") as source:
        assert (source.name, source.live, source.reconnects, source.frame_count) == ("97", False, 0, 3)
    with pytest.raises(VideoError, match="camera 98"):
        open_source("98")


def test_a_source_is_what_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data:v.mp4", "rtsp:v.mp4", "-1"):  # there, so that they are no addresses and no options
        _write(tmp_path / "v.mp4", [_frame(0)] * 3).rename(tmp_path / name)
        with open_source(name) as source:
            assert (source.name, len(list(source))) == (name, 3)
    schemes = "rtsp, rtsps, rtmp, rtmps, http, https, udp, srt, tcp://"
    for text, said in (
        ("data:w.mp4", f"data:w.mp4: no such file, and addresses that can be read start with {schemes}"),
        ("ftp://host/v.mp4", f"ftp://host/v.mp4: addresses that can be read start with {schemes}"),
        ("c:\\w.mp4", "c:\\w.mp4: no such file"),
        ("-2", "-2: no such file"),
        ("w.mp4", "w.mp4: no such file"),
        ("1234567890", "camera 123456789: there is none of this number; 0 is the first"),
    ):
        with pytest.raises(VideoError) as caught:
            open_source(text)
        assert str(caught.value) == said


@pytest.mark.parametrize("suffix", [*VIDEO_SUFFIXES, ".MP4", ".Mkv"])
def test_every_suffix_is_written_for_a_browser(suffix: str, tmp_path: Path) -> None:
    path = _write(tmp_path / f"v{suffix}", [_frame(i) for i in range(5)])
    with VideoFile(path) as video:
        assert len(list(video)) == 5
    data = path.read_bytes()
    if suffix.lower() != ".mkv":
        assert data.index(b"moov") < data.index(b"mdat")  # it plays before all of it has come
    # x264 leaves word of how it was called: superfast (subme=1, me=dia, mbtree off) and 21
    assert b" crf=21.0 " in data
    assert all(word in data for word in (b" subme=1 ", b" me=dia ", b" mbtree=0 "))


def test_time_stamps_only_ever_grow(tmp_path: Path) -> None:
    """Equal and earlier ones are moved by the least there is; without one the last goes on by a frame."""
    with VideoWriter(tmp_path / "v.mp4", 25) as writer:
        for seconds in (0, 0, 0.04, 0.04, 0.02, None, 1.0, None):
            writer.write(_frame(0), seconds)
    with av.open(str(tmp_path / "v.mp4")) as container:
        ticks = sorted(
            round(packet.pts * packet.time_base * 90_000) for packet in container.demux(video=0) if packet.size
        )
    assert [tick - ticks[0] for tick in ticks] == [0, 1, 3600, 3601, 3602, 7202, 90_000, 93_600]


@pytest.mark.parametrize(
    ("rate", "written"),
    [(0, 25), (float("nan"), 25), (-3, 25), (0.2, 1), (5000, 1000), (10, 10), (24000 / 1001, 90_000 / 3754)],
)
def test_a_rate_is_one_that_can_be_written(rate: float, written: float, tmp_path: Path) -> None:
    with VideoFile(_write(tmp_path / "v.mp4", [_frame(i) for i in range(4)], rate)) as video:
        assert video.rate == pytest.approx(written)
        assert [seconds for _, seconds in video] == pytest.approx([index / written for index in range(4)], abs=1e-6)


def test_a_frame_is_encoded_while_the_next_is_made_ready(tmp_path: Path) -> None:
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)
    threads = set()

    class Slow(VideoWriter):
        def _encode(self, frame: Any) -> None:
            if frame is not None:
                threads.add(threading.current_thread())
                begun.release()
                assert go_on.acquire(timeout=10)
            super()._encode(frame)

    path = tmp_path / "v.mp4"
    with Slow(path, 25) as writer:
        writer.write(_frame(0))  # returns while the frame is being encoded
        assert begun.acquire(timeout=10)
        second = threading.Thread(target=writer.write, args=[_frame(1)])
        second.start()
        assert not begun.acquire(timeout=0.1)  # one at a time: it waits
        assert second.is_alive()
        go_on.release()
        second.join(10)
        assert begun.acquire(timeout=10)
        go_on.release()
    assert threading.current_thread() not in threads
    with VideoFile(path) as video:
        assert len(list(video)) == 2


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_error_of_the_encoder_is_raised_whichever_frame_it_is_of(number: int, tmp_path: Path) -> None:
    class Failing(VideoWriter):
        count = 0

        def _encode(self, frame: Any) -> None:
            self.count += 1
            if self.count == number + 1:
                raise av.error.InvalidDataError(1094995529, "Invalid data found")
            super()._encode(frame)

    path = tmp_path / "v.mp4"
    with pytest.raises(VideoError) as caught, Failing(path, 25) as writer:  # noqa: PT012
        for index in range(3):
            writer.write(_frame(index))
    assert str(caught.value) == f"{path}: cannot be written (Invalid data found)"
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_encoding_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("trt_runtime.media.files.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with VideoWriter(tmp_path / "v.mp4", 25) as writer:
        assert writer.take_encode_ms() == 0
        for index in range(3):
            writer.write(_frame(index))
        taken = writer.take_encode_ms()
    assert taken + writer.take_encode_ms() == 4000  # a second each, and what was still in the encoder at the end
    assert writer.take_encode_ms() == 0


def test_a_pyav_without_h264_is_told_how_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    with pytest.raises(VideoError, match=r"no H\.264 encoder: pip install --force-reinstall av$"):
        _write(tmp_path / "v.mp4", [_frame(0)])
    assert list(tmp_path.iterdir()) == []


def _encode(path: Path, codec: str, container: str | None = None, sound: str | None = None, count: int = 6) -> Path:
    """A video at 25 frames/s; with ten seconds of silence, if it has sound."""
    height, width = (576, 720) if codec == "dvvideo" else (96, 128)
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width = height, width
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8", "prores": "yuv422p10le"}.get(codec, "yuv420p")
        if codec == "libx265":
            stream.options = {"x265-params": "log-level=none"}
        silence = file.add_stream(sound, rate=44100) if sound else None
        for index in range(count):
            picture = av.VideoFrame.from_ndarray(_frame(index, height, width), format="bgr24")
            file.mux(stream.encode(picture.reformat(format=stream.pix_fmt)))
        file.mux(stream.encode(None))
        if silence is not None:
            size = silence.codec_context.frame_size
            for _ in range(10 * 44100 // size):
                block = av.AudioFrame.from_ndarray(np.zeros((1, size), np.float32), format="fltp", layout="mono")
                block.sample_rate = 44100
                file.mux(silence.encode(block))
            file.mux(silence.encode(None))
    return path


CONTAINERS = [
    ("mov", "prores", None),
    ("mp4", "libx265", None),
    ("mkv", "ffv1", None),
    ("webm", "libvpx-vp9", None),
    ("avi", "mpeg4", None),
    ("ts", "libx264", None),
    ("mpg", "mpeg2video", None),
    ("m1v", "mpeg1video", None),
    ("flv", "flv", None),
    ("wmv", "wmv2", None),
    ("ogv", "libvpx", "ogg"),
    ("ivf", "libvpx", None),
    ("h264", "libx264", None),
    ("hevc", "libx265", None),
    ("m4v", "mpeg4", "m4v"),
    ("mjpeg", "mjpeg", None),
    ("gif", "gif", None),
    ("mxf", "mpeg2video", None),
    ("rm", "rv10", None),
    ("dv", "dvvideo", None),
]


@pytest.mark.parametrize(("suffix", "codec", "container"), CONTAINERS, ids=[suffix for suffix, *_ in CONTAINERS])
def test_every_container_that_is_promised_is_read(
    suffix: str, codec: str, container: str | None, tmp_path: Path
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    path = _encode(tmp_path / f"v.{suffix}", codec, container)
    with VideoFile(path) as video:
        frames = list(video)
    assert len(frames) == 6
    assert video.damaged == 0
    allowed = 30 if codec == "gif" else 6  # 256 colours
    for index, (image, seconds) in enumerate(frames):
        assert np.abs(image.astype(int) - _frame(index, *image.shape[:2])).mean() < allowed
        assert seconds == pytest.approx(index / 25, abs=1.1 / 25 if suffix == "m1v" and index == 5 else 2e-3)


@pytest.mark.usefixtures("usual_priority")
@pytest.mark.parametrize(
    ("suffix", "codec", "layout"),
    [
        ("mp4", "libx265", "yuv420p10le"), ("mkv", "libx265", "yuv420p12le"), ("mp4", "libsvtav1", "yuv420p"),
        ("webm", "libvpx-vp9", "yuva420p"), ("mov", "prores_ks", "yuva444p10le"),
    ],
)  # fmt: skip
def test_deep_and_transparent_pictures_are_read(suffix: str, codec: str, layout: str, tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    with av.open(str(tmp_path / f"v.{suffix}"), "w") as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, layout
        if codec == "libx265":
            stream.options = {"x265-params": "log-level=none"}
        for index in range(6):
            picture = av.VideoFrame.from_ndarray(_frame(index, 96, 128), format="bgr24")
            picture.pts = index
            file.mux(stream.encode(picture.reformat(format=layout)))
        file.mux(stream.encode(None))
    with VideoFile(tmp_path / f"v.{suffix}") as video:
        frames = list(video)
    assert (len(frames), video.damaged) == (6, 0)
    for index, (image, _) in enumerate(frames):
        assert np.abs(image.astype(int) - _frame(index, 96, 128)).mean() < 6


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("length", "least"),
    [(10, 9.0), (50, 49.0), (200, 196.0), (9000, 8820.0)],
    ids=["a second", "both", "2 %", "hours"],
)
def test_a_video_ends_early_if_more_than_a_second_and_two_percent_are_missing(
    length: int, least: float, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"v.{suffix}"
    with VideoWriter(path, 1) as writer:
        for second in (0, 1, length - 1):
            writer.write(_frame(0), float(second))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert not ends_early(container, stream, float(length))
        assert not ends_early(container, stream, least)
        assert ends_early(container, stream, least - 0.01)
        assert ends_early(container, stream, 0.0)


@pytest.mark.parametrize(
    ("name", "codec", "sound", "known"),
    [
        ("v.mp4", "libx264", "aac", True),
        ("v.mov", "libx264", "aac", True),
        ("v.mkv", "libx264", "aac", True),
        ("untagged.mkv", "libx264", "aac", False),
        ("v.ts", "libx264", "aac", False),
        ("alone.ts", "libx264", None, True),
        ("alone.avi", "mpeg4", None, True),
        ("alone.h264", "libx264", None, False),
    ],
)
def test_the_length_counts_only_where_it_is_that_of_the_video(
    name: str, codec: str, sound: str | None, known: bool, tmp_path: Path
) -> None:
    """Of a container that has one length for all its streams, nothing can be said if there are several."""
    path = _encode(tmp_path / name, codec, sound=sound, count=75)
    if name == "untagged.mkv":
        path.write_bytes(path.read_bytes().replace(b"DURATION", b"LABELLED"))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert ends_early(container, stream, 0.0) == known
        assert not ends_early(container, stream, 2.9)  # three seconds of video, ten of sound


def _several_videos(path: Path, heights: Sequence[int], **dispositions: int) -> Path:
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in heights]
        for number, (stream, height) in enumerate(zip(streams, heights, strict=True)):
            stream.height, stream.width, stream.pix_fmt = height, 128, "yuv420p"
            stream.disposition = dispositions.get(f"stream{number}", 0)
        for index in range(6):
            for stream in streams:
                picture = av.VideoFrame.from_ndarray(_frame(index, stream.height), format="bgr24")
                picture.pts, picture.time_base = index, Fraction(1, 25)
                container.mux(stream.encode(picture))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("heights", [(96, 64), (64, 96), (64, 96, 32), (96,)])
def test_the_largest_of_several_videos_is_read(heights: tuple[int, ...], tmp_path: Path) -> None:
    with VideoFile(_several_videos(tmp_path / "v.mkv", heights)) as video:
        assert [frame.image.shape for frame in video] == [(96, 128, 3)] * 6
    if len(heights) > 1:  # the largest that may be read
        with av.open(str(tmp_path / "v.mkv")) as container:
            assert video_stream(container, "v", 96 * 128 - 1).codec_context.height == 64


def test_of_videos_of_one_size_the_first_is_read(tmp_path: Path) -> None:
    with av.open(str(_several_videos(tmp_path / "v.mkv", (64, 64)))) as container:
        assert video_stream(container, "v", 10**6) is container.streams.video[0]


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def test_cover_art_is_not_the_video(tmp_path: Path) -> None:
    """As programs for tags write it, which FFmpeg takes for a video stream; it is even larger than the video."""
    path = _encode(tmp_path / "v.mp4", "libx264", count=3)
    cover = cv2.imencode(".png", np.zeros((400, 600, 3), np.uint8))[1].tobytes()
    item = _box(b"covr", _box(b"data", struct.pack(">II", 14, 0) + cover))
    handler = _box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = _box(b"udta", _box(b"meta", bytes(4) + handler + _box(b"ilst", item)))
    data = path.read_bytes()
    place = data.index(b"moov") - 4
    size = int.from_bytes(data[place : place + 4], "big")
    assert place + size == len(data), "the index is at the end"
    old = data.rindex(b"udta") - 4
    data = data[: old + 4] + b"free" + data[old + 8 :] + tags
    path.write_bytes(data[:place] + (size + len(tags)).to_bytes(4, "big") + data[place + 4 :])
    with av.open(str(path)) as container:
        assert sorted(stream.codec_context.width for stream in container.streams.video) == [128, 600]
    with VideoFile(path) as video:
        assert [frame.image.shape for frame in video] == [(96, 128, 3)] * 3


@pytest.mark.parametrize("disposition", [0x400, 0x800])
def test_a_file_of_pictures_alone_has_no_video(disposition: int, tmp_path: Path) -> None:
    class Container:
        metadata: ClassVar[dict[str, str]] = {}
        closed = False

        def __init__(self, streams: list[Any]) -> None:
            self.streams = SimpleNamespace(video=streams)

        def close(self) -> None:
            self.closed = True

    container = Container([SimpleNamespace(disposition=disposition)])
    with pytest.raises(VideoError, match=r"^v: there is no video stream in it$"):
        video_stream(container, "v", 10**6)
    assert container.closed


def test_an_image_of_the_family_of_mp4_is_not_taken_for_a_video(tmp_path: Path) -> None:
    """FFmpeg opens it, and gives the tiles of a HEIC photo one by one."""
    path = tmp_path / "photo.mp4"
    Image.fromarray(_frame(3)).save(path, "AVIF")
    with pytest.raises(VideoError, match=r"photo\.mp4: AVIF is an image, not a video$"):
        VideoFile(path)
    assert _open_files(path) == 0


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_pixels_that_are_not_square_stay_so(suffix: str, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / f"v{suffix}", 25, Fraction(16, 11)) as writer:
        writer.write(_frame(0))
    with av.open(str(tmp_path / f"v{suffix}")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 11)
    with VideoFile(tmp_path / f"v{suffix}") as video:
        list(video)
        assert video.pixel_aspect == Fraction(16, 11)
    with VideoFile(_write(tmp_path / f"w{suffix}", [_frame(0)])) as video:
        list(video)
        assert video.pixel_aspect == 1


def test_pixels_are_turned_with_the_picture() -> None:
    class Upright(Pictures):
        errors = ()

        def __init__(self) -> None:
            pass

        def __call__(self, frame: Any, *_: Any) -> Frame:
            return _frame(0)

    source = Source("v")
    source._stored_aspect = Fraction(16, 11)
    flat, tall = Fraction(16, 11), Fraction(11, 16)
    for rotation, aspect in ((0, flat), (90, tall), (180, flat), (-90, tall)):
        frame = SimpleNamespace(is_corrupt=False, rotation=rotation)
        assert source._picture(Upright(), frame) is not None
        assert source.pixel_aspect == aspect


@pytest.mark.parametrize(
    ("said", "aspect"), [(None, 1), (Fraction(0), 1), (Fraction(1, 1000), 1), (Fraction(4, 3), Fraction(4, 3))]
)
def test_an_aspect_that_is_none_counts_as_square(said: Fraction | None, aspect: Fraction) -> None:
    assert stored_aspect(SimpleNamespace(sample_aspect_ratio=said)) == aspect


def _open_files(path: Path) -> int:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("there is no list of open files on this system")
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(link.exists() and os.readlink(link) == str(path) for link in links)


def test_the_pixel_limit_is_the_largest_size_that_is_read_and_a_refused_file_is_closed(tmp_path: Path) -> None:
    path = _encode(tmp_path / "v.mp4", "libx264", count=1)
    with av.open(str(path)) as container:
        assert _open_files(path) == 1
        assert video_stream(container, "v", 96 * 128) is container.streams.video[0]
        with pytest.raises(VideoError, match=r"^v: 128x96 is more than 0\.012287 megapixels$"):
            video_stream(container, "v", 96 * 128 - 1)
        assert _open_files(path) == 0
    with VideoFile(path, max_pixels=96 * 128) as video:
        assert len(list(video)) == 1
        assert _open_files(path) == 1
    assert _open_files(path) == 0


def test_pyav_is_imported_quiet_and_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    av.logging.set_level(av.logging.ERROR)
    assert load_av("reading video") is av
    assert av.logging.get_level() is None
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match=r"^reading video needs av, .*\[cpu\]"):
        load_av("reading video")


@pytest.mark.parametrize("rotation", [0, 90, 180, 270, -90, 360, 89])
def test_pictures_are_upright_and_whole_arrays(rotation: int) -> None:
    class Turned:
        """A frame that has a rotation: PyAV can give it to no frame that it did not decode."""

        def __init__(self, frame: av.VideoFrame) -> None:
            self.frame, self.rotation = frame, rotation

    class Reformatter:
        def reformat(self, frame: Turned, **options: str) -> av.VideoFrame:
            return frame.frame.reformat(**options)

    pictures = Pictures(av)
    frame = av.VideoFrame.from_ndarray(_frame(3), format="bgr24")
    assert np.array_equal(pictures(frame), _frame(3))
    pictures._reformatter = Reformatter()
    image = pictures(Turned(frame))
    turns = {89: 1}.get(rotation, rotation // 90)  # counter-clockwise
    assert np.array_equal(image, np.rot90(_frame(3), turns))
    assert image.flags.c_contiguous
    assert image.dtype == np.uint8


def test_a_picture_that_cannot_be_converted_is_an_error_of_ffmpeg() -> None:
    with pytest.raises(av.error.FFmpegError):
        Pictures(av)(av.VideoFrame(64, 64, "rgb96le"))


@pytest.mark.parametrize(
    ("value", "rate"),
    [(NAN, 7.0), (0.0, 7.0), (-1.0, 7.0), (1e-9, 1.0), (1.0, 1.0), (29.97, 29.97), (1000.0, 1000.0), (INF, 1000.0)],
)
def test_frame_rates_are_from_1_to_1000(value: float, rate: float) -> None:
    assert frame_rate(value, 7.0) == rate


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "/secret"), "No such file or directory"),
        (av.error.InvalidDataError(1094995529, "Invalid data found", "rtsp://me:geheim@host"), "Invalid data found"),
        (ValueError(" odd\n"), "odd"),
        (ValueError(), "ValueError"),
        (OSError(), "OSError"),
    ],
)
def test_the_reason_of_an_error_is_never_empty_and_names_no_file(error: Exception, said: str) -> None:
    assert reason(error) == said
