"""HLS within limits: FFmpeg follows playlists of playlists without end, and cannot be stopped while it does."""

from __future__ import annotations

import io
import re
import threading
import time
from typing import Any
from urllib.parse import urljoin

from facespec.errors import VideoError
from trt_runtime.media.web import fetch

MAX_PLAYLISTS = 100
"""Variants and renditions that a master playlist may name."""

MAX_PLAYLIST_BYTES = 4 << 20
"""A day of segments of two seconds is 1 to 3 MB."""

_MAGIC = b"#EXTM3U"
_NAMES_PLAYLIST = re.compile("#EXT-X-(STREAM-INF|MEDIA|I-FRAME-STREAM-INF):")
_URI = re.compile(r'(?<=URI=")[^"]*(?=")')


class Playlists:
    """Opens for FFmpeg what an HLS address leads to.

    The address may give one master playlist, with up to `MAX_PLAYLISTS` others, which must not be masters themselves.
    Segments are read by FFmpeg's own protocols. What cannot be opened is empty for FFmpeg, which passes over it.

    Args:
        av: The package.
        name: Of the stream, for messages.
        url: Address of the first playlist.
        options: For FFmpeg: the protocols that it may use.
        timeout_s: How long a request may take.
        patience_s: How long FFmpeg may take, all in all, to find out about the stream.
        stopped: Set when the stream is not wanted any more.
    """

    def __init__(
        self,
        av: Any,
        name: str,
        url: str,
        options: dict[str, str],
        timeout_s: float,
        patience_s: float,
        stopped: threading.Event,
    ) -> None:
        self._av, self._name, self._options, self._timeout_s = av, name, options, timeout_s
        self._stopped = stopped
        self._agent = "Lavf/{}.{}.{}".format(*av.library_versions["libavformat"])  # some servers refuse Python's
        self._known = {url}  # playlists
        self._master_seen = False
        self._deadline: float | None = time.monotonic() + patience_s
        self._refused = False

    def opened(self) -> None:
        """Note that FFmpeg has found out about the stream: from now on each request has its own time."""
        self._deadline = None
        self._master_seen = True

    def __call__(self, url: str, flags: int, options: dict[str, str]) -> Any:
        """Return a file of what is at an address; called by FFmpeg.

        Raises:
            VideoError: The playlist is refused, it is too late, or the stream is not wanted any more.
        """
        del flags
        if self._refused:  # FFmpeg tries the rest of its list
            return io.BytesIO()
        try:
            self._check_time()
            if url in self._known:  # here redirections count, which FFmpeg does not tell
                limits: dict[str, Any] = {
                    "timeout_s": self._timeout_s,
                    "most": MAX_PLAYLIST_BYTES,
                    "agent": self._agent,
                }
                return self._playlist(*fetch(url, **limits, going_on=self._check_time))
            file = _File(self._av, url, {**options, **self._options}, self._timeout_s)
            if file.start != _MAGIC:
                return file
            with file:  # FFmpeg may write an address in another way than we do
                return self._playlist(file.read(MAX_PLAYLIST_BYTES + 1), url)
        except VideoError:
            self._refused = True
            raise
        except (self._av.error.FFmpegError, OSError, ValueError):
            return io.BytesIO()

    def _check_time(self) -> None:
        if self._stopped.is_set():
            raise VideoError(f"{self._name}: stopped")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise VideoError(f"{self._name}: cannot be opened (no answer within {self._timeout_s:g} s)")

    def _playlist(self, content: bytes, place: str) -> io.BytesIO:
        """Return a playlist with whole addresses, if it keeps to the limits."""
        if len(content) > MAX_PLAYLIST_BYTES:
            raise VideoError(f"{self._name}: a playlist is longer than {MAX_PLAYLIST_BYTES >> 20} MiB")
        lines = content.decode("utf-8", "surrogateescape").splitlines()
        names = sum(_NAMES_PLAYLIST.match(line) is not None for line in lines)
        if names and self._master_seen:
            raise VideoError(f"{self._name}: a playlist that a playlist leads to leads to more of them")
        if names > MAX_PLAYLISTS:
            raise VideoError(f"{self._name}: a playlist leads to {names} others, at most {MAX_PLAYLISTS} are read")
        self._master_seen = True  # only the first may be one
        for index, line in enumerate(lines):
            if line.startswith("#"):
                lines[index] = _URI.sub(lambda uri: urljoin(place, uri[0]), line)
                if names and _NAMES_PLAYLIST.match(line):
                    self._known.update(_URI.findall(lines[index]))
            elif line.strip():
                lines[index] = urljoin(place, line.strip())
                if names:
                    self._known.add(lines[index])
        return io.BytesIO("\n".join([*lines, ""]).encode("utf-8", "surrogateescape"))


class _File:
    """What is at an address, read through FFmpeg's protocols; `start` is how it begins."""

    def __init__(self, av: Any, url: str, options: dict[str, str], timeout_s: float) -> None:
        options = {**options, "format_whitelist": "data"}
        self._container = av.open(url, format="data", options=options, timeout=(timeout_s, timeout_s))
        self._packets = self._container.demux()
        self._rest = bytearray()
        self._fill(len(_MAGIC))
        self.start = bytes(self._rest[: len(_MAGIC)])

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, size: int) -> None:
        while len(self._rest) < size and (packet := next(self._packets, None)) is not None:
            self._rest += bytes(packet)

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer at the end."""
        self._fill(size)
        found = bytes(self._rest[:size])
        del self._rest[:size]
        return found

    def close(self) -> None:
        self._container.close()
