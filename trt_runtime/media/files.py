"""Video files and cameras in, H.264 out."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2

from facespec.errors import VideoError
from facespec.files import atomic_path
from facespec.images import MAX_PIXELS
from facespec.letterbox import Frame, Letterbox
from trt_runtime.media.decoding import (
    FORMATS,
    Pictures,
    Source,
    TimedFrame,
    ends_early,
    frame_rate,
    load_av,
    reason,
    video_stream,
)
from trt_runtime.media.live import SCHEMES, Camera, NetworkStream

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".m4v")
"""What `VideoWriter` can write."""

_CLOCK = 90_000  # time stamps a second in written files
_BT601, _LIMITED = 6, 1  # as in H.273 and AVColorRange: what COLOR_BGR2YUV_I420 gives
_MAX_SECONDS = 1e7  # later time stamps are damage


def open_source(text: str) -> Source:
    """Open what a user names: a webcam's index, a video file or an address.

    FFmpeg would open much more by such a text (other protocols, devices, lists of files): only `live.SCHEMES` reach it,
    anything else has to be a file that is there.

    Raises:
        VideoError: It is none of these, or cannot be opened.
    """
    if "://" in text:
        return NetworkStream(text)
    if Path(text).exists():
        return VideoFile(text)
    if text.isdecimal():
        return Camera(int(text[:9]))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text):
        raise VideoError(f"{text}: no such file, and addresses that can be read start with {', '.join(SCHEMES)}://")
    return VideoFile(text)


class VideoFile(Source):
    """A video file, decoded frame by frame by FFmpeg (PyAV). What is damaged is passed over and counted.

    Args:
        path: File to read: MP4, MOV, Matroska, WebM, AVI, MPEG, FLV and other containers FFmpeg knows.
        max_pixels: Larger frames are refused before they are decoded.

    Attributes:
        rate: Frames per second; 25 where the file does not say.
        damaged: A video that ends well before the length it announces adds one.

    Raises:
        VideoError: Missing, not a video, or too large. Iterating raises it too, if not one frame can be decoded.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(str(path))
        self._av = load_av("reading video")
        self.path = Path(path)
        if not self.path.is_file():
            raise VideoError(f"{path}: {'not a regular file' if self.path.exists() else 'no such file'}")
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "max_pixels": str(max_pixels)}
        try:
            self._container = self._av.open(f"file:{self.path}", options=options)
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{path}: not a video that can be read ({reason(error)})") from None
        self._stream = video_stream(self._container, self.name, max_pixels)
        self._stream.thread_type = "AUTO"
        self.rate = frame_rate(float(self._stream.average_rate or self._stream.guessed_rate or 0), 25.0)
        self.frame_count = self._stream.frames

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[TimedFrame]:
        pictures = Pictures(self._av)
        count = 0
        seconds = before = 0.0
        start: float | None = None
        for frame in self._decoded():
            if self._stopped.is_set():
                return
            stamp = None if frame.time is None else float(frame.time)
            if start is None:
                start = stamp or 0.0
            before = seconds
            if stamp is not None and seconds <= stamp - start < _MAX_SECONDS:
                seconds = stamp - start
            elif count:
                seconds += 1 / self.rate
            if (image := self._picture(pictures, frame)) is not None:
                yield TimedFrame(image, seconds)
                count += 1
        if not count:
            raise VideoError(f"{self.path}: no frame of it can be decoded")
        rate = self._stream.average_rate
        end = (start or 0.0) + seconds + max(seconds - before, float(1 / rate) if rate else 0.0)
        self.damaged += ends_early(self._container, self._stream, end)

    def _decoded(self) -> Iterator[Any]:
        packets = self._container.demux(self._stream)
        failures = 0
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                frames = packet.decode()
                failures = 0
            except (self._av.error.FFmpegError, ValueError):
                self.damaged += 1
                failures += 1
                if failures > 1000:  # nothing but damage: the rest is not worth reading
                    return
                continue
            yield from frames


class VideoWriter:
    """Writes H.264 that browsers play. The file appears, whole, when the writer is closed; on an error it does not.

    The first frame gives the size; H.264 wants even sides, so an odd one loses its last row or column. Later frames of
    another size are letterboxed into it. A thread encodes one frame while the next is made ready; what goes wrong there
    is raised by the next call.

    Args:
        path: File to write: .mp4, .mkv, .mov or .m4v.
        rate: Frames per second.

    Raises:
        VideoError: Another suffix, or the file cannot be encoded.
    """

    def __init__(self, path: str | Path, rate: float) -> None:
        self._av = load_av("writing video")
        self.path = Path(path)
        if self.path.suffix.lower() not in VIDEO_SUFFIXES:
            raise VideoError(f"{path}: video is written as {', '.join(VIDEO_SUFFIXES)}")
        self._rate = Fraction(frame_rate(rate, 25.0)).limit_denominator(1001)
        self._last = -1
        self._first_hw = (0, 0)
        self._stream: Any = None
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._under_way: Future[None] | None = None
        self._encode_ms = 0.0
        self._file = atomic_path(self.path)
        temporary = self._file.__enter__()
        faststart = {} if self.path.suffix.lower() == ".mkv" else {"movflags": "faststart"}
        self._container = self._av.open(str(temporary), "w", options=faststart)

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, image: Frame, seconds: float | None = None) -> None:
        """Append a frame.

        Args:
            image: uint8 (H, W, 3) BGR.
            seconds: When it is shown; None: one frame duration after the last.
        """
        try:
            if self._stream is None:
                self._open(image)
            height, width = self._stream.codec_context.height, self._stream.codec_context.width
            if image.shape[:2] != (height, width) and image.shape[:2] != self._first_hw:
                box = Letterbox.fit((image.shape[0], image.shape[1]), (height, width))
                image = box.apply(image, (0, 0, 0))
            # OpenCV's conversion takes a quarter of the time of swscale's, and rounds where that truncates
            planes = cv2.cvtColor(image[:height, :width], cv2.COLOR_BGR2YUV_I420)
            frame = self._av.VideoFrame.from_ndarray(planes, format="yuv420p")
            step = max(round(_CLOCK / self._rate), 1)
            stamp = self._last + step if seconds is None else round(seconds * _CLOCK)
            self._last = max(stamp, self._last + 1)
            frame.pts, frame.time_base = self._last, Fraction(1, _CLOCK)
            self._wait()
            self._under_way = self._encoder.submit(self._encode, frame)
        except self._av.error.FFmpegError as error:
            raise VideoError(f"{self.path}: cannot be written ({reason(error)})") from None

    def take_encode_ms(self) -> float:
        """Return the time that encoding has taken on its thread since this was last asked."""
        taken, self._encode_ms = self._encode_ms, 0.0
        return taken

    def _encode(self, frame: Any) -> None:
        start = time.perf_counter()
        self._container.mux(self._stream.encode(frame))
        self._encode_ms += (time.perf_counter() - start) * 1e3

    def _wait(self) -> None:
        """Wait until the last frame is encoded."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def _open(self, image: Frame) -> None:
        self._first_hw = (image.shape[0], image.shape[1])
        height, width = (max(side // 2 * 2, 2) for side in self._first_hw)
        if min(self._first_hw) < 2:
            raise VideoError(f"{self.path}: a video of {self._first_hw[1]}x{self._first_hw[0]} cannot be encoded")
        if "libx264" not in self._av.codecs_available:
            raise VideoError(f"{self.path}: this build of PyAV has no H.264 encoder: pip install --force-reinstall av")
        self._stream = self._container.add_stream(
            "libx264", rate=self._rate, options={"preset": "superfast", "crf": "21"}
        )
        self._stream.thread_type = "AUTO"
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _CLOCK)
        self._stream.codec_context.colorspace = _BT601  # players take BT.709 for granted in large videos
        self._stream.codec_context.color_range = _LIMITED

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # an interrupted video is kept: it ends where the user stopped it
        keep = self._stream is not None and (kind is None or issubclass(kind, KeyboardInterrupt))
        failure = None if keep else (error or VideoError("nothing was written"))
        try:
            try:
                self._encoder.shutdown()
                if keep:
                    self._wait()
                    self._encode(None)
            finally:
                self._container.close()
        except self._av.error.FFmpegError as cause:
            failure = VideoError(f"{self.path}: cannot be written ({reason(cause)})")
        self._file.__exit__(type(failure) if failure else None, failure, None)
        if keep and failure:
            raise failure


def require_display() -> None:
    """Raise VideoError where no window can be shown: OpenCV would end the process."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise VideoError("--show needs a display, and there is none: use --out instead")
