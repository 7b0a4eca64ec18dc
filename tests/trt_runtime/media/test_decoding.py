from __future__ import annotations

import os
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from facespec.errors import MissingPackageError, VideoError
from facespec.letterbox import Frame
from trt_runtime.media.decoding import Pictures, ends_early, frame_rate, load_av, reason, video_stream
from trt_runtime.media.files import VideoFile, VideoWriter

NAN, INF = float("nan"), float("inf")


def _frame(index: int, height: int = 96, width: int = 128) -> Frame:
    """A smooth picture whose brightness tells its index."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x / width * 60, y / height * 60, np.full_like(x, 20 + 8 * index, float)], axis=2).astype(np.uint8)


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


def test_the_first_of_several_videos_is_read(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(2)]
        for stream, height in zip(streams, (96, 64), strict=True):
            stream.height, stream.width, stream.pix_fmt = height, 128, "yuv420p"
        for index in range(6):
            for stream in streams:
                picture = av.VideoFrame.from_ndarray(_frame(index, stream.height), format="bgr24")
                picture.pts, picture.time_base = index, Fraction(1, 25)
                container.mux(stream.encode(picture))
        for stream in streams:
            container.mux(stream.encode(None))
    with VideoFile(tmp_path / "v.mkv") as video:
        assert [frame.image.shape for frame in video] == [(96, 128, 3)] * 6


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
