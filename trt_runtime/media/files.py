"""Video: what all sources of frames share, files that are read by FFmpeg (PyAV), and H.264 that is written."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from facespec.cli import finishing, require
from facespec.errors import MissingPackageError, VideoError, reason
from facespec.files import atomic_path
from facespec.images import MAX_PIXELS
from facespec.kinds import heif_kind
from facespec.letterbox import Frame, Letterbox
from facespec.opencv import cv2
from trt_runtime.media import hdr

FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,h264,hevc,m4v,mjpeg,gif,mxf,rm,dv"
"""Containers that are opened. No playlists are among them: they would make FFmpeg open other files and addresses."""

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".m4v")
"""What `VideoWriter` can write."""

_CLOCK = 90_000  # time stamps a second in written files
_BT601, _LIMITED = 6, 1  # as in H.273 and AVColorRange: what COLOR_BGR2YUV_I420 gives
_MAX_SECONDS = 1e7  # later time stamps are damage
_READ, _DISCARD = 0, 48  # AVDISCARD_DEFAULT, AVDISCARD_ALL
_NO_VIDEO = 0x400 | 0x800  # AV_DISPOSITION_ATTACHED_PIC, as cover art, and AV_DISPOSITION_TIMED_THUMBNAILS

Self = TypeVar("Self", bound="Source")


class NotVideoError(VideoError):
    """What is there can be read, and is no video."""


class TimedFrame(NamedTuple):
    """A frame and when it is shown.

    Attributes:
        image: uint8 (H, W, 3) BGR; the size may change from frame to frame.
        seconds: Time since the start.
    """

    image: Frame
    seconds: float


def new_frame(height: int, width: int) -> Frame:
    """Return an array for a picture, uint8 (height, width, 3), undefined."""
    return np.empty((height, width, 3), np.uint8)


class Source:
    """Where frames come from: a context manager that is iterated once, over `TimedFrame`.

    Attributes:
        name: For messages and records; it holds no password.
        live: Frames come at their own pace, so whatever is too slow for them has to drop some.
        rate: Frames per second, from 1 to 1000.
        frame_count: Number of frames announced; 0 if unknown.
        damaged: Packets and frames so far that were broken and passed over.
        reconnects: Connections so far after the first.
        pixel_aspect: Width of a pixel divided by its height, as the last frame is shown; 1 for nearly all videos.
        new_frame: Makes the array, uint8 (height, width, 3), that a picture goes to. With `pinned_frame` of a detector
            it is not copied again.
    """

    live = False
    rate: float
    frame_count = damaged = reconnects = 0
    pixel_aspect = _stored_aspect = Fraction(1)

    def __init__(self, name: str) -> None:
        self.name = name
        self.new_frame: Callable[[int, int], Frame] = new_frame
        self._stopped = threading.Event()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[TimedFrame]:
        raise NotImplementedError

    def stop(self) -> None:
        """End the iteration soon, whatever it waits for. Any thread may call it."""
        self._stopped.set()

    def _picture(self, pictures: Pictures, frame: Any) -> Frame | None:
        """Return the picture of a decoded frame, or None if it cannot be converted; count what is damaged."""
        self.damaged += bool(frame.is_corrupt)
        self.pixel_aspect = 1 / self._stored_aspect if quarter_turns(frame) % 2 else self._stored_aspect
        try:
            return pictures(frame, self.new_frame)
        except pictures.errors:
            self.damaged += 1
            return None


_BYTES_PER_PIXEL = 8  # of the largest pictures that FFmpeg makes of what it decodes
_LEAST_ALLOCATION = 64 << 20  # decoders have buffers of their own, however small the picture is
_max_allocation = 0


def load_av(why: str, max_pixels: int = MAX_PIXELS) -> Any:
    """Import PyAV, keep FFmpeg from writing to stderr, and bound what it allocates at once.

    Some headers say how much memory what follows them needs, up to 2 GB. What the largest picture needs is allowed.

    Args:
        why: What needs it, for the message.
        max_pixels: Of a picture; the largest number that was asked for counts, for all of FFmpeg.
    """
    global _max_allocation
    av = require("av", "cpu", why)
    wanted = max(_BYTES_PER_PIXEL * max_pixels, _LEAST_ALLOCATION)
    if wanted > _max_allocation:
        _max_allocation = wanted
        with suppress(OSError, AttributeError):  # another build of PyAV: its FFmpeg is not to be found
            ctypes.CDLL(av.buffer.__file__).av_max_alloc(ctypes.c_size_t(_max_allocation))
    # With any level but None decoder threads wait for the GIL, whatever they log, and the thread that frees the decoder
    # may hold it. What matters of the messages is counted in `damaged`.
    av.logging.set_level(None)
    return av


def video_stream(container: Any, name: str, max_pixels: int) -> Any:
    """Return the video stream of a container that has the largest picture, ready to be decoded.

    Cover art and thumbnails are no videos. The other streams are not read. The container is closed if there is none.

    Raises:
        VideoError: It has none, or one that cannot be decoded or is too large; or it is a HEIC or AVIF image.
    """
    try:
        tags = container.metadata
        named = [tags.get("major_brand", ""), *re.findall("....", tags.get("compatible_brands", ""))]
        if kind := heif_kind([brand.encode() for brand in named]):
            raise NotVideoError(f"{name}: {kind} is an image, not a video")
        streams = [stream for stream in container.streams.video if not int(stream.disposition) & _NO_VIDEO]
        if not streams:
            raise VideoError(f"{name}: there is no video stream in it")
        streams = [stream for stream in streams if stream.codec_context is not None]
        if not streams:
            raise VideoError(f"{name}: FFmpeg has no decoder for its video")
        small = [stream for stream in streams if _pixels(stream) <= max_pixels]
        if not small:
            context = min(streams, key=_pixels).codec_context
            raise VideoError(f"{name}: {context.width}x{context.height} is more than {max_pixels / 1e6:g} megapixels")
    except VideoError:
        container.close()
        raise
    chosen = max(small, key=_pixels)
    for stream in container.streams:
        stream.discard = _READ if stream is chosen else _DISCARD  # of an HLS master nothing else is fetched
    chosen.codec_context.options = {"max_pixels": str(max_pixels)}  # a stream may grow later
    return chosen


def _pixels(stream: Any) -> int:
    return int(stream.codec_context.width * stream.codec_context.height)


def stored_aspect(stream: Any) -> Fraction:
    """Return the width of a pixel divided by its height, before the picture is turned; 1 where a video says nothing."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    return aspect if Fraction(1, 100) <= aspect <= 100 else Fraction(1)


def quarter_turns(frame: Any) -> int:
    """Return how often a frame is turned by 90 degrees against the clock to be upright, 0 to 3."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def ends_early(container: Any, stream: Any, seconds: float) -> bool:
    """Whether a video file was cut off, going by the length it announces for its video.

    Args:
        container: The file, still open.
        stream: Its video.
        seconds: When the last frame that could be decoded ends, by its time stamp.
    """
    length = 0.0
    if tag := re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", "")):  # Matroska
        length = int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    elif stream.duration and (len(container.streams) == 1 or "mp4" in container.format.name):
        length = float(stream.duration * stream.time_base)  # elsewhere it is that of all streams together
    return length - seconds > max(1.0, 0.02 * length)


class Pictures:
    """Turns decoded frames into BGR pictures, as fast as one swscale context that is kept for all of them allows.

    Attributes:
        errors: What is raised for damage, here and by decoders.
    """

    def __init__(self, av: Any) -> None:
        self.errors = av.error.FFmpegError, ValueError
        self._reformatter = av.video.reformatter.VideoReformatter()

    def __call__(self, frame: Any, new_frame: Callable[[int, int], Frame] = new_frame) -> Frame:
        """Return uint8 (H, W, 3) BGR, upright; raise one of `errors` if the frame cannot be converted.

        The frame's own matrix and range hold; without them BT.601, limited. HDR becomes SDR.
        """
        transfer = getattr(frame, "color_trc", 0)
        high = transfer in (hdr.PQ, hdr.HLG)
        (plane,) = self._reformatter.reformat(frame, format="bgr48le" if high else "bgr24").planes
        kind: Any = np.uint16 if high else np.uint8
        rows = np.frombuffer(plane, kind).reshape(plane.height, -1)[:, : 3 * plane.width]
        image = rows.reshape(plane.height, plane.width, 3)
        if high:
            image = hdr.to_sdr(image, transfer, frame.color_primaries)
        if turns := quarter_turns(frame):  # as phones record upright video
            image = np.rot90(image, turns)
        out = new_frame(*image.shape[:2])
        np.copyto(out, image)
        return out


def frame_rate(value: float, otherwise: float) -> float:
    """Frames per second as files and cameras give them (anything up to NaN), from 1 to 1000."""
    return min(max(value, 1.0), 1000.0) if value > 0 else otherwise


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
        self._av = load_av("reading video", max_pixels)
        self.path = Path(path)
        if not self.path.is_file():
            raise VideoError(f"{path}: {'not a regular file' if self.path.exists() else 'no such file'}")
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "max_pixels": str(max_pixels)}
        try:
            self._container = self._av.open(f"file:{self.path}", options=options)
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            with suppress(OSError), self.path.open("rb") as file:
                if file.read(7) == b"#EXTM3U":
                    raise VideoError(f"{path}: a playlist, which is read at its http address only") from None
            raise NotVideoError(f"{path}: not a video that can be read ({reason(error)})") from None
        self._stream = video_stream(self._container, self.name, max_pixels)
        self._stream.thread_type = "AUTO"
        self._stored_aspect = stored_aspect(self._stream)
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
        pixel_aspect: Width of a pixel divided by its height, as players show it. It may be set until the first frame
            is written.

    Raises:
        VideoError: Another suffix, or the file cannot be encoded.
    """

    def __init__(self, path: str | Path, rate: float, pixel_aspect: Fraction = Fraction(1)) -> None:
        self._av = load_av("writing video")
        self.path = Path(path)
        if self.path.suffix.lower() not in VIDEO_SUFFIXES:
            raise VideoError(f"{path}: video is written as {', '.join(VIDEO_SUFFIXES)}")
        self.pixel_aspect = pixel_aspect
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
        self._stream.codec_context.sample_aspect_ratio = self.pixel_aspect.limit_denominator(255)
        self._stream.codec_context.colorspace = _BT601  # players take BT.709 for granted in large videos
        self._stream.codec_context.color_range = _LIMITED

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # an interrupted video is kept: it ends where the user stopped it
        keep = self._stream is not None and (kind is None or issubclass(kind, KeyboardInterrupt))
        failure = None if keep else (error or VideoError("nothing was written"))
        try:
            with finishing(), closing(self._container):  # in a large file the index moves to the front
                self._encoder.shutdown()
                if keep:
                    self._wait()
                    self._encode(None)
        except self._av.error.FFmpegError as cause:
            failure = VideoError(f"{self.path}: cannot be written ({reason(cause)})")
        self._file.__exit__(type(failure) if failure else None, failure, None)
        if keep and failure:
            raise failure


def require_display() -> None:
    """Raise VideoError where no window can be shown: OpenCV would end the process.

    Raises:
        MissingPackageError: This OpenCV has no windows.
    """
    if re.search(r"GUI:\s+NONE", cv2.getBuildInformation()):
        raise MissingPackageError(
            "--show needs windows, which opencv-python-headless has not: put opencv-python in its place, "
            "or use --out instead"
        )
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise VideoError("--show needs a display, and there is none: use --out instead")
