from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from facespec.errors import VideoError
from facespec.letterbox import Frame
from trt_runtime.video import Camera, VideoFile, VideoWriter, open_source, require_display


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
        assert video.rate == pytest.approx(29.97, abs=0.01)
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


def test_frames_of_another_size_are_letterboxed(tmp_path: Path) -> None:
    path = _write(tmp_path / "v.mp4", [_frame(9), _frame(9, 200, 100), _frame(9, 50, 300), _frame(9)])
    with VideoFile(path) as video:
        frames = [frame.image for frame in video]
    assert [frame.shape for frame in frames] == [(96, 128, 3)] * 4
    assert frames[1][:, 60:].mean() < 8  # the padding
    assert frames[1][:, :40, 2].mean() > 60


def test_a_video_that_changes_size_is_read_frame_by_frame(tmp_path: Path) -> None:
    """MPEG-TS may switch resolution in the middle: two H.264 streams, one after the other."""
    parts = []
    for index, (height, width) in enumerate([(96, 128), (64, 96)]):
        part = tmp_path / f"{index}.ts"
        with av.open(str(part), "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for step in range(10):
                frame = av.VideoFrame.from_ndarray(_frame(step, height, width), format="bgr24")
                frame.pts, frame.time_base = step + 10 * index, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        parts.append(part.read_bytes())
    (tmp_path / "v.ts").write_bytes(b"".join(parts))
    with VideoFile(tmp_path / "v.ts") as video:
        shapes = [frame.image.shape[:2] for frame in video]
    assert shapes[0] == (96, 128)
    assert shapes[-1] == (64, 96)
    assert len(shapes) == 20


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


def test_a_video_that_ends_early_gives_what_is_there(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "v.mkv", [np.random.default_rng(i).integers(0, 256, (96, 128, 3), np.uint8) for i in range(40)]
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with VideoFile(path) as video:
        assert 5 < sum(1 for _ in video) < 40


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing_and_an_interrupt_a_playable_file(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with pytest.raises(error), VideoWriter(path, 25) as writer:  # noqa: PT012
        for index in range(10):
            writer.write(_frame(index))
        raise error
    if error is KeyboardInterrupt:
        with VideoFile(path) as video:
            assert sum(1 for _ in video) == 10
    assert [item.name for item in tmp_path.iterdir()] == (["v.mp4"] if error is KeyboardInterrupt else [])


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"\.mp4"):
        VideoWriter(tmp_path / "v.avi", 25)
    with pytest.raises(VideoError, match="1x1"):
        _write(tmp_path / "v.mp4", [np.zeros((1, 1, 3), np.uint8)])
    with VideoWriter(tmp_path / "none.mp4", 25):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_camera_that_is_not_there() -> None:
    for index in (97, 10**12):
        with pytest.raises(VideoError, match=f"camera {index}"):
            Camera(index)


def test_a_window_needs_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(VideoError, match="--output"):
        require_display()
    monkeypatch.setenv("DISPLAY", ":0")
    require_display()


def test_playlists_do_not_lead_to_other_files(tmp_path: Path) -> None:
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
    assert len(stamps) == 4
    assert stamps == sorted(stamps)
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
    """PNG frames in a MOV file: the size stands nowhere but in the frame, which probing would decode (324 MB)."""
    with av.open(str(tmp_path / "v.mov"), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 9000, 12000, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((9000, 12000, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    code = (
        "import resource\nfrom trt_runtime.video import *\nimport av\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    list(VideoFile('v.mov'))\nexcept VideoError:\n    print('refused')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-c", code]
    result = subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert result.stdout.split()[0] == "refused"
    assert int(result.stdout.split()[1]) < 100_000  # KiB


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


def test_a_stopped_file_ends(tmp_path: Path) -> None:
    with VideoFile(_write(tmp_path / "v.mp4", [_frame(i) for i in range(20)])) as video:
        count = 0
        for _ in video:
            count += 1
            if count == 5:
                video.stop()
    assert count == 5
    assert video.damaged == 0


def test_a_file_named_like_a_camera_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "v.mp4", [_frame(0)] * 3).rename(tmp_path / "97")
    monkeypatch.chdir(tmp_path)
    with open_source("97") as source:
        assert (source.name, source.live, source.reconnects, source.frame_count) == ("97", False, 0, 3)
    with pytest.raises(VideoError, match="camera 98"):
        open_source("98")
