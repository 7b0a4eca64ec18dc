"""What all sources of frames have in common, and what files and addresses share in FFmpeg (PyAV)."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from facespec.cli import require
from facespec.errors import VideoError
from facespec.letterbox import Frame

FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,h264,hevc,m4v,mjpeg,gif,mxf,rm,dv"
"""Containers that are opened. No playlists are among them: they would make FFmpeg open other files and addresses."""

Self = TypeVar("Self", bound="Source")


class TimedFrame(NamedTuple):
    """A frame and when it is shown.

    Attributes:
        image: uint8 (H, W, 3) BGR; the size may change from frame to frame.
        seconds: Time since the start.
    """

    image: Frame
    seconds: float


class Source:
    """Where frames come from: a context manager that is iterated once, over `TimedFrame`.

    Attributes:
        name: For messages and records; it holds no password.
        live: Frames come at their own pace, so whatever is too slow for them has to drop some.
        rate: Frames per second, from 1 to 1000.
        frame_count: Number of frames announced; 0 if unknown.
        damaged: Packets and frames so far that were broken and passed over.
        reconnects: Connections so far after the first.
    """

    live = False
    rate: float
    frame_count = damaged = reconnects = 0

    def __init__(self, name: str) -> None:
        self.name = name
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
        try:
            return pictures(frame)
        except pictures.errors:
            self.damaged += 1
            return None


def load_av(why: str) -> Any:
    """Import PyAV, and keep FFmpeg from writing to stderr.

    Args:
        why: What needs it, for the message.

    Raises:
        MissingPackageError: It is not installed.
    """
    av = require("av", "cpu", why)
    # Any level but None has decoder threads wait for the GIL, whatever they log; the thread that frees the decoder may
    # hold it.
    # What matters of the messages is counted in `damaged`.
    av.logging.set_level(None)
    return av


def video_stream(container: Any, name: str, max_pixels: int) -> Any:
    """Return the first video stream of a container, ready to be decoded; the container is closed if that fails.

    Raises:
        VideoError: It has none, or one that cannot be decoded or is too large.
    """
    try:
        if not container.streams.video:
            raise VideoError(f"{name}: there is no video stream in it")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise VideoError(f"{name}: FFmpeg has no decoder for its video")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > max_pixels:
            raise VideoError(f"{name}: {width}x{height} is more than {max_pixels / 1e6:g} megapixels")
    except VideoError:
        container.close()
        raise
    stream.codec_context.options = {"max_pixels": str(max_pixels)}  # a stream may grow later
    return stream


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

    def __call__(self, frame: Any) -> Frame:
        """Return uint8 (H, W, 3) BGR, upright. The frame's own matrix and range hold; without them BT.601, limited.

        Raises:
            FFmpegError: It cannot be converted.
            ValueError: Likewise.
        """
        image = self._reformatter.reformat(frame, format="bgr24").to_ndarray()
        if rotation := round(getattr(frame, "rotation", 0) / 90) % 4:  # as phones record upright video
            image = np.ascontiguousarray(np.rot90(image, rotation))
        return image


def frame_rate(value: float, otherwise: float) -> float:
    """Frames per second as files and cameras give them (anything up to NaN), from 1 to 1000."""
    return min(max(value, 1.0), 1000.0) if value > 0 else otherwise


def reason(error: BaseException) -> str:
    """Return what FFmpeg or the system says about an error, without the name of the file."""
    return (getattr(error, "strerror", None) or str(error)).strip() or type(error).__name__
