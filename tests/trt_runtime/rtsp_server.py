"""A small RTSP server: one H.264 video over RTP, inside the RTSP connection or over UDP (RFC 2326, 3550 and 6184).

It can lose its connections, go silent, offer sound and ask for a password, as cameras do.
"""

from __future__ import annotations

import base64
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import av
import numpy as np
from numpy.typing import NDArray

_CLOCK = 90_000
_PAYLOAD_TYPE = 96
_LARGEST = 1200  # bytes of a NAL unit in one packet; longer ones are cut (FU-A)


def encode_h264(frames: Sequence[NDArray[np.uint8]], rate: int, key_every: int) -> list[list[bytes]]:
    """Return the NAL units of each frame; a key frame brings its parameter sets along."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.height, encoder.width = frames[0].shape[:2]
    encoder.pix_fmt, encoder.framerate, encoder.gop_size = "yuv420p", rate, key_every
    encoder.options = {"preset": "ultrafast", "tune": "zerolatency", "crf": "8"}
    pictures = [av.VideoFrame.from_ndarray(frame, format="bgr24") for frame in frames]
    packets = [packet for picture in (*pictures, None) for packet in encoder.encode(picture)]
    return [[unit for unit in re.split(b"\0\0\0?\x01", bytes(packet)) if unit] for packet in packets]


@dataclass(frozen=True)
class Visit:
    """How one client is served.

    Attributes:
        frames: Frames that are sent before the connection ends; None: as many as there are.
        stall: Go silent after `frames` rather than hang up.
        first: The frame it starts with.
        jump: Seconds by which the time stamps jump from the tenth frame on.
    """

    frames: int | None = None
    stall: bool = False
    first: int = 0
    jump: int = 0


@dataclass
class RtspServer:
    """Serves on a free port of this machine between `with` and its end.

    Attributes:
        units: NAL units, frame by frame; they are repeated for ever.
        rate: Frames sent a second.
        visits: How the clients that start to play are served, in turn; later ones as the last.
        login: user:password that is asked for (Basic).
        announced: Frames a second that it says it sends; None: `rate`.
        udp: Whether it sends over UDP to who asks for that.
        sound: Whether it offers sound as well; it never sends any.
        setups: The streams that have been asked for.
        left: Clients of a silent connection that have hung up.
        played: Clients that have started to play so far.
        port: Where it listens.
        deaf: Whether new clients get no answer.
    """

    units: list[list[bytes]]
    rate: int
    visits: Sequence[Visit] = (Visit(),)
    login: str | None = None
    announced: float | None = None
    udp: bool = False
    sound: bool = False
    setups: list[str] = field(default_factory=list)
    left: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    played: int = 0
    deaf: bool = False
    port: int = 0
    _socket: socket.socket = field(default_factory=socket.socket)
    _clients: list[socket.socket] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)
    _datagrams_to: int | None = None

    def __enter__(self) -> RtspServer:
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        self.port = self._socket.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for connection in (self._socket, *self._clients):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            connection.close()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def url(self, login: str = "") -> str:
        return f"rtsp://{login}{'@' if login else ''}127.0.0.1:{self.port}/camera"

    def _start(self, target, *args) -> None:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._done.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self._clients.append(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, client.makefile("rb") as stream:
                while request := self._request(stream):
                    if self.deaf:
                        self._done.wait()
                    method, url, headers = request
                    self._answer(client, method, url, headers)
                    if method == "PLAY":
                        visit = self.visits[min(self.played, len(self.visits) - 1)]
                        self.played += 1
                        self._play(client, visit)
                        return
        except OSError:
            pass  # the client has gone

    @staticmethod
    def _request(stream) -> tuple[str, str, dict[str, str]] | None:
        lines = []
        while (line := stream.readline()) not in (b"", b"\r\n"):
            lines.append(line.decode().strip())
        if not lines:
            return None
        return *lines[0].split()[:2], dict(line.split(": ", 1) for line in lines[1:])

    def _answer(self, client: socket.socket, method: str, url: str, headers: dict[str, str]) -> None:
        status, extra, body = "200 OK", [], ""
        login = self.login and "Basic " + base64.b64encode(self.login.encode()).decode()
        if method == "OPTIONS":
            extra = ["Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN"]
        elif login and headers.get("Authorization") != login:
            status, extra = "401 Unauthorized", ['WWW-Authenticate: Basic realm="camera"']
        elif method == "DESCRIBE":
            sets = [unit for unit in self.units[0] if unit[0] & 31 in (7, 8)]
            body = "\r\n".join(
                [
                    "v=0",
                    "o=- 0 0 IN IP4 127.0.0.1",
                    "s=camera",
                    "c=IN IP4 0.0.0.0",
                    "t=0 0",
                    f"m=video 0 RTP/AVP {_PAYLOAD_TYPE}",
                    f"a=rtpmap:{_PAYLOAD_TYPE} H264/{_CLOCK}",
                    f"a=fmtp:{_PAYLOAD_TYPE} packetization-mode=1; "
                    f"sprop-parameter-sets={','.join(base64.b64encode(unit).decode() for unit in sets)}",
                    f"a=framerate:{self.announced or self.rate}",
                    "a=control:video",
                    *["m=audio 0 RTP/AVP 0", "a=control:sound"] * self.sound,
                    "",
                ]
            )
            extra = ["Content-Type: application/sdp"]
        elif method == "SETUP":
            self.setups.append(url.rpartition("/")[2])
            if "RTP/AVP/TCP" in headers["Transport"]:
                extra = ["Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 1"]
            elif self.udp and (port := re.search(r"client_port=(\d+)", headers["Transport"])):
                self._datagrams_to = int(port[1])
                extra = [f"Transport: RTP/AVP;unicast;client_port={port[1]}-{int(port[1]) + 1}", "Session: 1"]
            else:
                status = "461 Unsupported Transport"
        elif method == "PLAY":
            extra = ["Session: 1", "Range: npt=now-"]
        lines = [f"RTSP/1.0 {status}", f"CSeq: {headers['CSeq']}", *extra, f"Content-Length: {len(body)}", "", body]
        client.sendall("\r\n".join(lines).encode())

    def _play(self, client: socket.socket, visit: Visit) -> None:
        sequence, start = 0, time.monotonic()
        send = client.sendall if self._datagrams_to is None else self._send_datagram
        for index in range(visit.frames if visit.frames is not None else 10**9):
            if self._done.wait(max(start + index / self.rate - time.monotonic(), 0)):
                return
            units = self.units[(visit.first + index) % len(self.units)]
            payloads = [payload for unit in units for payload in _payloads(unit)]
            for position, payload in enumerate(payloads):
                marker = 128 * (position == len(payloads) - 1)
                stamp = (index * _CLOCK // self.rate + (index >= 10) * visit.jump * _CLOCK + 2**31) % 2**32
                header = struct.pack(">BBHII", 128, marker | _PAYLOAD_TYPE, sequence % 65536, stamp, 1)
                framing = struct.pack(">cBH", b"$", 0, 12 + len(payload)) if self._datagrams_to is None else b""
                send(framing + header + payload)
                sequence += 1
        if visit.stall:
            while client.recv(1 << 16):  # until it hangs up, or this server ends
                pass
            self.left.release()

    def _send_datagram(self, data: bytes) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(data, ("127.0.0.1", self._datagrams_to))


def _payloads(unit: bytes) -> Iterator[bytes]:
    """Yield a NAL unit as RTP payloads: as it is, or in fragments (FU-A)."""
    if len(unit) <= _LARGEST:
        yield unit
        return
    indicator, kind, body = unit[0] & 0xE0 | 28, unit[0] & 31, unit[1:]
    for start in range(0, len(body), _LARGEST):
        edges = 128 * (start == 0) | 64 * (start + _LARGEST >= len(body))
        yield bytes([indicator, edges | kind]) + body[start : start + _LARGEST]
