"""Cameras and network addresses, and `open_source`, which opens whatever a user names."""

from __future__ import annotations

import math
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from facespec.addresses import hide_secrets, without_secrets
from facespec.errors import VideoError, reason
from facespec.images import MAX_PIXELS, decode_image
from facespec.log import get_logger
from facespec.opencv import cv2
from trt_runtime.media.files import (
    FORMATS,
    NotVideoError,
    Pictures,
    Source,
    TimedFrame,
    VideoFile,
    ends_early,
    frame_rate,
    load_av,
    stored_aspect,
    video_stream,
)
from trt_runtime.media.sources import is_image, read_source, shown

# What FFmpeg may open on behalf of an address, by its scheme. No "file" and no "data" among it: a playlist from the
# network leads to other addresses at most.
_PROTOCOLS = {
    "rtsp": "rtp,udp,tcp",
    "rtsps": "rtp,udp,tcp,tls",
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmps,tcp,tls",
    "http": "http,https,httpproxy,tcp,tls,crypto",
    "https": "http,https,httpproxy,tcp,tls,crypto",
    "udp": "udp",
    "srt": "srt",
    "tcp": "tcp",
}
_NETWORK_FORMATS = f"{FORMATS},rtsp,mpjpeg,live_flv"
SCHEMES = tuple(_PROTOCOLS)
"""Addresses that `NetworkStream` reads."""

_log = get_logger("video")

_QUEUED_PACKETS = 32  # about a second that is read ahead of the decoder
_POLL_S = 0.1  # how soon a stop is noticed
_GRACE_S = 0.3  # how long a closed connection is waited for
_JUMP_S = 10.0  # time stamps this far from the clock are no use
_PROBE_S = 2.0
_PATIENCE = 1.5  # of the time-out, and half a second: finding out about the stream begins when the connection stands


def open_source(text: str) -> Source:
    """Open what a user names: a webcam's index, a video file or an address; an image is a source of one frame.

    FFmpeg would open much more by such a text (other protocols, devices, lists of files): only `live.SCHEMES` reach it,
    anything else has to be a file that is there.

    Raises:
        VideoError: It is none of these, or cannot be opened.
        ImageError: It is an image that cannot be read.
    """
    try:
        return _open_video(text)
    except NotVideoError:
        if is_image(text):
            return Picture(text)
        raise


def _open_video(text: str) -> Source:
    if "://" in text:
        return NetworkStream(text)
    if Path(text).exists():
        return VideoFile(text)
    if text.isdecimal():
        return Camera(int(text[:9]))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text):
        raise VideoError(
            f"{without_secrets(text)}: no such file, and addresses that can be read start with {', '.join(SCHEMES)}://"
        )
    return VideoFile(text)


class Picture(Source):
    """An image file, or an image at an address of http or https: a source of one frame.

    Raises:
        ImageError: It cannot be read.
    """

    rate = 25.0
    frame_count = 1

    def __init__(self, place: str) -> None:
        super().__init__(shown(place))
        self._image = decode_image(read_source(place), self.name)

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[TimedFrame]:
        yield TimedFrame(self._image, 0.0)


class Camera(Source):
    """A webcam, by its index. It is live, announces no number of frames, and damages none.

    Args:
        index: As OpenCV counts them: 0 is the first.

    Attributes:
        rate: Frames per second the camera says it gives, 30 where it does not.

    Raises:
        VideoError: There is no such camera.
    """

    live = True

    def __init__(self, index: int) -> None:
        super().__init__(f"camera {index}")
        if not 0 <= index < 1000:
            raise VideoError(f"camera {index}: there is none of this number; 0 is the first")
        self._capture = cv2.VideoCapture(index)
        if not self._capture.isOpened():
            raise VideoError(f"camera {index}: cannot be opened; is it connected, and free?")
        self.rate = frame_rate(self._capture.get(cv2.CAP_PROP_FPS), 30.0)

    def __exit__(self, *_: object) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[TimedFrame]:
        start = cv2.getTickCount()
        while not self._stopped.is_set():
            got, image = self._capture.read()
            if not got:
                return
            yield TimedFrame(np.asarray(image, np.uint8), (cv2.getTickCount() - start) / cv2.getTickFrequency())


class NetworkStream(Source):
    """Video from an address. What is live is connected to again, after growing pauses, whenever it is lost.

    A thread of its own reads, so that the connection is emptied while a frame is decoded, and so that `stop` ends the
    iteration within half a second, whatever the network does. Packets read while FFmpeg finds out about the stream are
    kept: without them (`nobuffer`) the picture would start with the next key frame; they are decoded faster
    than in real time.

    Args:
        url: Address that starts with one of `SCHEMES`. User and password may stand in it; they are never shown.
        timeout_s: How long connecting may take, and how long a connection may give nothing before it counts as lost.
        transport: How RTSP sends its packets: "tcp" loses none and passes firewalls, "udp" may be quicker.
        backoff_s: Pause before the first attempt to connect again; each failure doubles it. Up to half of it is left
            out at random, so that many readers do not return at once.
        max_backoff_s: Longest pause.
        max_attempts: Attempts in a row, none of which brings a frame, after which the stream is given up; None: no
            limit.
        max_pixels: Larger frames are refused before they are decoded.

    Attributes:
        name: The address without passwords.
        live: False for a file, of known length, behind http or https: its end is the end.
        rate: Frames per second as announced; 25 where they are not.

    Raises:
        VideoError: Another kind of address, or the first connection fails. Iterating raises it when the first
            connection gives no frame, or `max_attempts` more do not.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 5.0,
        transport: str = "tcp",
        backoff_s: float = 0.5,
        max_backoff_s: float = 30.0,
        max_attempts: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(without_secrets(url))
        scheme, found, rest = url.partition("://")
        scheme = scheme.lower()
        if not found or scheme not in _PROTOCOLS:
            raise VideoError(f"{self.name}: addresses that can be read start with {', '.join(SCHEMES)}://")
        if transport not in ("tcp", "udp"):
            raise VideoError(f"{self.name}: transport must be tcp or udp, got {transport!r}")
        if not 0 < timeout_s < 1e6:
            raise VideoError(f"{self.name}: timeout_s must be above 0, got {timeout_s}")
        self._av = load_av("reading video", max_pixels)
        errors = self._av.error
        self._not_video = (errors.InvalidDataError, errors.ArgumentError, errors.PatchWelcomeError)  # the last: HEIC
        self._url = f"{scheme}://{rest}"
        self._timeout_s, self._max_pixels = timeout_s, max_pixels
        self._patience_s = _PATIENCE * timeout_s + 0.5
        self._backoff_s, self._max_backoff_s, self._max_attempts = backoff_s, max_backoff_s, max_attempts
        self._options = {
            "protocol_whitelist": _PROTOCOLS[scheme],
            "format_whitelist": _NETWORK_FORMATS,
            "max_pixels": str(max_pixels),
            # must end before the time-out does
            "analyzeduration": str(int(min(_PROBE_S, timeout_s / 2) * 1e6)),
        }
        if scheme in ("rtsp", "rtsps"):
            self._options |= {"rtsp_transport": transport, "allowed_media_types": "video"}
        elif scheme in ("http", "https"):
            self._options |= {"reconnect": "1"}  # in the middle of a file
        elif scheme == "udp":
            self._options |= {"overrun_nonfatal": "1"}  # a reader that misses packets need not start anew
        self._attempts = 0
        self._lost_by = ""
        self._connection: Any = None
        self._connection = self._connect()
        container, stream = self._connection.container, self._connection.stream
        finite = scheme in ("http", "https") and _is_file(container)
        self.live, self.frame_count = not finite, stream.frames if finite else 0
        announced = float(stream.average_rate or stream.guessed_rate or 0)
        self.rate = frame_rate(announced if announced <= 240 or finite else 0, 25.0)  # 90000 is a clock, not a rate
        self._clock = _Clock(self.live, self.rate)

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._connection.close()

    def __iter__(self) -> Iterator[TimedFrame]:
        seen = False
        while True:
            for frame in self._frames():
                seen = True
                yield frame
            if self._stopped.is_set():
                return
            if not seen:
                raise VideoError(f"{self.name}: no frame of it can be decoded{self._lost_by}")
            if not self.live or not self._reconnect():
                return

    def _frames(self) -> Iterator[TimedFrame]:
        """Yield the frames of one connection until it is lost or ends."""
        connection, pictures = self._connection, Pictures(self._av)
        self._stored_aspect = stored_aspect(connection.stream)
        # frame threads would hold back a frame each
        connection.stream.thread_type = "SLICE" if self.live else "AUTO"
        joined = not self.live  # until the first key frame there is nothing to decode from: no damage
        end = 0.0
        while (packet := connection.next(self._stopped)) is not None:
            if isinstance(packet, Exception):
                self._lost_by = f" ({self._why(packet)})"
                break
            try:
                decoded = packet.decode()
            except pictures.errors:
                self.damaged += joined
                continue
            for frame in decoded:
                joined = True
                if (image := self._picture(pictures, frame)) is None:
                    continue
                if self._stopped.is_set():
                    return
                self._attempts = 0
                stamp = None if frame.time is None else float(frame.time)
                end = end if stamp is None else stamp + 1 / self.rate
                yield TimedFrame(image, self._clock(stamp))
        if not self.live and not self._stopped.is_set():
            self.damaged += packet is not None or ends_early(connection.container, connection.stream, end)

    def _reconnect(self) -> bool:
        """Connect again, however long it takes; return False once stopped."""
        self._connection.close()
        problem = "it gives no frames"
        lost_at = time.monotonic()
        _log.warning("%s: lost%s; connecting again", self.name, self._lost_by)
        while self._max_attempts is None or self._attempts < self._max_attempts:
            pause = min(self._max_backoff_s, self._backoff_s * 2 ** min(self._attempts, 30)) * random.uniform(0.5, 1)
            if self._stopped.wait(pause):
                return False
            self._attempts += 1
            try:
                self._connection = self._connect()
            except VideoError as error:
                if self._stopped.is_set():
                    return False
                problem = str(error).removeprefix(f"{self.name}: ")
                continue
            self._clock.restart()
            self.reconnects += 1
            _log.warning("%s: connected again after %.1f s", self.name, time.monotonic() - lost_at)
            return True
        raise VideoError(f"{self.name}: lost, after {self._attempts} attempts to connect again: {problem}")

    def _connect(self) -> _Connection:
        if self._connection is not None and self._connection.lingers:  # or their number would grow without end
            raise VideoError(f"{self.name}: the last connection does not end")
        connection = _Connection(self._open, self._patience_s)
        try:
            error = connection.opened(self._stopped)
        except BaseException:  # Ctrl-C while it waits
            connection.close()
            raise
        if error is None:
            return connection
        connection.close()
        if isinstance(error, VideoError):
            raise error
        kind = NotVideoError if isinstance(error, self._not_video) else VideoError
        raise kind(f"{self.name}: cannot be opened ({self._why(error)})") from None

    def _open(self) -> tuple[Any, Any]:
        start = time.monotonic()
        timeout = (self._timeout_s, self._timeout_s)
        try:
            try:
                container = self._av.open(self._url, options=self._options, timeout=timeout)
            except self._av.error.ArgumentError:  # a format that is not among ours: HLS, say
                if not self._url.startswith("http"):
                    raise
                from trt_runtime.media.playlists import Playlists  # http and ssl are slow to import

                playlists = Playlists(
                    self._av, self.name, self._url, self._options, self._timeout_s, self._patience_s, self._stopped
                )
                options = {**self._options, "format_whitelist": f"{_NETWORK_FORMATS},hls", "http_persistent": "0"}
                container = self._av.open(self._url, format="hls", options=options, timeout=timeout, io_open=playlists)
                playlists.opened()
        except self._av.error.FFmpegError:
            if time.monotonic() - start < self._timeout_s:
                raise
            # some protocols have other names for an interrupted read
            raise VideoError(f"{self.name}: cannot be opened (no answer within {self._timeout_s:g} s)") from None
        return container, video_stream(container, self.name, self._max_pixels)

    def _why(self, error: Exception) -> str:
        if isinstance(error, (self._av.error.HTTPUnauthorizedError, self._av.error.HTTPForbiddenError)):
            return "user or password is not accepted: write them as in rtsp://USER:PASSWORD@HOST/"
        if isinstance(error, self._av.error.ProtocolNotFoundError):
            return "this build of PyAV does not know the protocol"
        if isinstance(error, self._not_video):
            return "what is there is not a video that can be read"
        return hide_secrets(reason(error, None).replace(self._url, self.name))  # whole, or it may end in a password


def _is_file(container: Any) -> bool:
    """Whether what is behind http has an end: a duration, or a length in bytes, which is a playlist's own for HLS."""
    return (container.duration or 0) > 0 or (container.format.name != "hls" and container.size > 0)


class _Connection:
    """One connection, read by a thread of its own: FFmpeg cannot be interrupted, but a wait for the thread can.

    Args:
        open_: Returns a container and its video stream, both from PyAV; called by the thread.
        patience_s: How long the thread may give nothing. FFmpeg ends by itself before that, unless it is busy with
            something else than waiting.
    """

    def __init__(self, open_: Callable[[], tuple[Any, Any]], patience_s: float = math.inf) -> None:
        self.container: Any = None
        self.stream: Any = None
        self._items: queue.Queue[Any] = queue.Queue(_QUEUED_PACKETS)  # packets, then None for the end, or an exception
        self._closed = threading.Event()
        self._patience_s = patience_s
        self._thread = threading.Thread(target=self._read, args=(open_,), name="network stream", daemon=True)
        self._thread.start()

    def opened(self, stopped: threading.Event) -> Exception | None:
        """Wait until the connection stands; return why it does not."""
        first = self.next(stopped)
        return first if isinstance(first, Exception) else VideoError("stopped") if first is None else None

    def next(self, stopped: threading.Event) -> Any:
        """Return the next packet, the exception that ended the connection, or None at its end or when stopped."""
        end = time.monotonic() + self._patience_s
        while not stopped.is_set():
            with suppress(queue.Empty):
                return self._items.get(timeout=_POLL_S)
            if time.monotonic() > end:
                return TimeoutError(f"nothing within {self._patience_s:g} s")
        return None

    @property
    def lingers(self) -> bool:
        """Whether its thread goes on although it is closed."""
        return self._closed.is_set() and self._thread.is_alive()

    def close(self) -> None:
        """Close the connection: at once, or, where its thread waits for the network, when that has timed out."""
        self._closed.set()
        self._thread.join(_GRACE_S)
        if not self._thread.is_alive() and self.container is not None:
            self.container.close()

    def _read(self, open_: Callable[[], tuple[Any, Any]]) -> None:
        try:
            self.container, self.stream = open_()
            self._put(self.stream)
            for packet in self.container.demux(self.stream):
                if not self._put(packet):
                    break
            self._put(None)
        except Exception as error:  # whatever it is, the waiting thread gets it
            self._put(error)
        if self._closed.is_set() and self.container is not None:
            self.container.close()

    def _put(self, item: Any) -> bool:
        """Hand over an item; return False if the connection is closed."""
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._items.put(item, timeout=_POLL_S)
                return True
        return False


class _Clock:
    """Turns time stamps of several connections into the time since the first frame, which never goes back.

    Within a connection a live stream's own stamps count; connections are put together by the clock of this machine.
    """

    def __init__(self, live: bool, rate: float) -> None:
        self._live, self._step = live, 1 / rate
        self._start: float | None = None
        self._offset: float | None = None
        self._last = 0.0

    def restart(self) -> None:
        """Take the next stamp as that of a new connection."""
        self._offset = None

    def __call__(self, stamp: float | None) -> float:
        now = time.monotonic()
        if self._start is None:
            self._start = now
            self._offset = None if stamp is None else -stamp
            return 0.0
        now -= self._start
        following = self._last + self._step
        if stamp is None:
            seconds = max(now, following) if self._live else following
        else:
            if self._offset is None or (self._live and abs(stamp + self._offset - now) > _JUMP_S):
                self._offset = (max(now, following) if self._live else following) - stamp
            seconds = stamp + self._offset
        if seconds <= self._last:
            seconds = self._last + (1e-3 if self._live else self._step)
        self._last = seconds
        return seconds
