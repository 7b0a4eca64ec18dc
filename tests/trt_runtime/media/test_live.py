from __future__ import annotations

import functools
import http.server
import inspect
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
import pytest

from facespec.errors import ImageError, VideoError
from facespec.images import read_image
from facespec.letterbox import Frame
from tests.heic import tiled_heic
from tests.trt_runtime.rtsp_server import RtspServer, Visit, encode_h264
from tests.trt_runtime.spoilt import OddPictures
from trt_runtime.media.files import Source, TimedFrame, VideoFile, VideoWriter
from trt_runtime.media.live import SCHEMES, NetworkStream, _Clock, _Connection, open_source

_RATE = 50
_FRAMES = 40


def _frame(index: int) -> Frame:
    """A picture too rough for one packet, whose brightness tells its index."""
    grain = np.random.default_rng(0).integers(0, 40, (96, 160, 3))
    return (grain + 5 * index).astype(np.uint8)


def _index(image: Frame) -> int:
    return round((float(image.mean()) - 19.5) / 5)


@pytest.fixture(scope="module")
def units() -> list[list[bytes]]:
    found = encode_h264([_frame(index) for index in range(_FRAMES)], _RATE, key_every=10)
    assert max(len(unit) for unit in found[0]) > 3000  # it is sent in fragments
    return found


def _check_increasing(frames: list[TimedFrame]) -> None:
    steps = np.diff([frame.seconds for frame in frames])
    assert (steps > 0).all()


def _wait_for_no_threads(before: set[threading.Thread]) -> None:
    end = time.monotonic() + 30
    while set(threading.enumerate()) - before and time.monotonic() < end:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - before


def test_every_frame_of_a_camera_comes_in_order_with_its_time(units: list[list[bytes]]) -> None:
    before = set(threading.enumerate())
    with RtspServer(units, _RATE) as server:
        source: Source = open_source(server.url())
        with source:
            frames = list(islice(source, 35))
        assert (source.live, source.reconnects, source.damaged, source.frame_count) == (True, 0, 0, 0)
        assert source.rate == pytest.approx(_RATE)
        assert source.name == server.url()
        # frame threads would hold back a frame each
        assert source._connection.stream.thread_type.name == "SLICE"
    assert [_index(frame.image) for frame in frames] == list(range(35))
    assert [frame.seconds for frame in frames] == pytest.approx([index / _RATE for index in range(35)], abs=2e-3)
    _wait_for_no_threads(before)


@pytest.mark.parametrize("stall", [False, True])
def test_a_lost_camera_is_connected_to_again(stall: bool, units: list[list[bytes]]) -> None:
    """It hangs up, or goes silent for longer than the time-out; its time stamps start at 0 again."""
    started = time.monotonic()
    visits = [Visit(30, stall), Visit(first=20)]
    with (
        RtspServer(units, _RATE, visits) as server,
        NetworkStream(server.url(), timeout_s=2, backoff_s=0.05) as source,
    ):
        frames = list(islice(source, 45))
        took = time.monotonic() - started
    assert [_index(frame.image) for frame in frames] == [*range(30), *range(20, 35)]
    assert (source.reconnects, source.damaged) == (1, 0)
    _check_increasing(frames)
    gap = frames[30].seconds - frames[29].seconds
    assert (1.0 if stall else 0.02) <= gap < took
    assert frames[44].seconds - frames[30].seconds == pytest.approx(14 / _RATE, abs=2e-3)
    assert server.played == 2


@pytest.mark.parametrize("jump", [-100, 100])
def test_time_stamps_that_jump_are_put_right(jump: int, units: list[list[bytes]]) -> None:
    with RtspServer(units, _RATE, [Visit(jump=jump)]) as server, NetworkStream(server.url(), timeout_s=2) as source:
        frames = list(islice(source, 30))
    _check_increasing(frames)
    assert frames[-1].seconds < 10
    assert source.reconnects == 0


def test_a_camera_that_is_joined_late_starts_with_a_key_frame_and_is_not_damaged(units: list[list[bytes]]) -> None:
    with RtspServer(units, _RATE, [Visit(first=5)]) as server, NetworkStream(server.url(), timeout_s=2) as source:
        frames = list(islice(source, 10))
    assert [_index(frame.image) for frame in frames] == list(range(10, 20))
    assert source.damaged == 0


def test_passwords_are_used_and_never_shown(units: list[list[bytes]]) -> None:
    with RtspServer(units, _RATE, login="me:geheim") as server:
        for login in ("", "me:falsch"):
            with pytest.raises(VideoError, match="USER:PASSWORD") as caught:
                NetworkStream(server.url(login), timeout_s=2)
            assert "falsch" not in str(caught.value)
            assert f"127.0.0.1:{server.port}/camera" in str(caught.value)
        with NetworkStream(server.url("me:geheim"), timeout_s=2) as source:
            assert len(list(islice(source, 3))) == 3
        assert source.name == f"rtsp://***@127.0.0.1:{server.port}/camera"
    with pytest.raises(VideoError) as caught:
        NetworkStream(server.url("me:geheim"), timeout_s=2)
    assert "geheim" not in str(caught.value)


def test_the_first_connection_fails_in_one_line(units: list[list[bytes]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for scheme in ("rtsp", "http", "tcp", "rtmp"):
            with pytest.raises(VideoError, match=rf"{scheme}://.*no answer within 0\.3 s"):
                NetworkStream(f"{scheme}://127.0.0.1:{port}/a", timeout_s=0.3)
    with pytest.raises(VideoError, match="refused"):
        NetworkStream(f"rtsp://127.0.0.1:{port}/a")
    with RtspServer(units, _RATE) as server, pytest.raises(VideoError, match="cannot be opened"):
        NetworkStream(server.url(), timeout_s=2, transport="udp")
    with RtspServer(units, _RATE, [Visit(0)]) as server, pytest.raises(VideoError, match="no frame") as caught:
        list(NetworkStream(server.url(), timeout_s=2))
    assert "\n" not in str(caught.value)
    with RtspServer(units, _RATE, [Visit(0, stall=True)]) as server:
        with pytest.raises(VideoError, match=r"no frame of it can be decoded \(.+\)$"):
            list(NetworkStream(server.url(), timeout_s=0.5))


def test_a_camera_that_does_not_return_is_given_up(units: list[list[bytes]]) -> None:
    """The server is gone, or there again but without a picture."""
    with RtspServer(units, _RATE, [Visit(30)]) as server:
        source = NetworkStream(server.url(), timeout_s=5, backoff_s=0.01, max_attempts=3)
    seen = []
    with source, pytest.raises(VideoError) as caught:
        seen.extend(_index(frame.image) for frame in source)
    assert seen == list(range(len(seen)))
    assert 1 <= len(seen) <= 30  # the server has stopped in the middle
    assert str(caught.value) == (
        f"{server.url()}: lost, after 3 attempts to connect again: cannot be opened (Connection refused)"
    )
    with RtspServer(units, _RATE, [Visit(30), Visit(0)]) as server:
        with NetworkStream(server.url(), timeout_s=5, backoff_s=0.01, max_attempts=2) as source:
            with pytest.raises(VideoError, match=r"lost, after 2 attempts to connect again: it gives no frames$"):
                list(islice(source, 200))
        assert server.played == 3


@pytest.mark.parametrize("while_", ["waiting for a frame", "waiting to connect", "pausing", "reading"])
def test_stop_ends_the_iteration_soon(while_: str, units: list[list[bytes]]) -> None:
    before = set(threading.enumerate())
    visit = {"waiting for a frame": Visit(30, stall=True), "reading": Visit()}.get(while_, Visit(30))
    pause = 1000.0 if while_ == "pausing" else 0.01
    with RtspServer(units, _RATE, [visit]) as server:
        source = NetworkStream(server.url(), timeout_s=100, backoff_s=pause, max_backoff_s=pause)
        frames = iter(source)
        assert len(list(islice(frames, 29))) == 29  # FFmpeg gives a frame when the next begins
        server.deaf = while_ == "waiting to connect"
        ended = threading.Event()
        threading.Thread(target=lambda: (list(frames), ended.set())).start()
        assert not ended.wait(0.5)
        source.stop()
        assert ended.wait(20)  # far less than the time-out
        with source:
            pass
    _wait_for_no_threads(before)


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """A web server on the files of `tmp_path`.

    /half-NAME breaks off in the middle of a file, /dropped-NAME too, but gives the rest to who asks for it,
    /away leads to one by its path, /secure to a port that is closed, by TLS; /camera sends 20 pictures and ends,
    /spoilt does, too, but the first and the eighth are none; /401 and /403 want another password.
    """

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/dropped-"):
                data = (tmp_path / self.path.removeprefix("/dropped-")).read_bytes()
                start = int(re.sub(r"\D", "", self.headers.get("Range", "0")) or 0)
                self.send_response(206 if start else 200)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start:] if start else data[: len(data) // 2])
                return
            if self.path in ("/401", "/403"):
                self.send_error(int(self.path[1:]))
                return
            if self.path.startswith("/half-"):
                data = (tmp_path / self.path.removeprefix("/half-")).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                return
            if self.path in ("/camera", "/spoilt"):
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
                self.end_headers()
                for index in range(20):
                    jpeg = cv2.imencode(".jpg", _frame(index))[1].tobytes()
                    if self.path == "/spoilt" and index in (0, 7):
                        jpeg = b"garbage!" * 20
                    self.wfile.write(b"--next\r\nContent-Type: image/jpeg\r\n")
                    self.wfile.write(b"Content-Length: %d\r\n\r\n%s\r\n" % (len(jpeg), jpeg))
                return
            if self.path not in ("/away", "/secure"):
                super().do_GET()
                return
            self.send_response(302)
            place = f"file://{tmp_path}/v.mp4" if self.path == "/away" else f"https://127.0.0.1:{_closed_port()}/v.mp4"
            self.send_header("Location", place)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # the client has gone

    with Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield lambda name: f"http://127.0.0.1:{server.server_port}/{name}"
        server.shutdown()
        thread.join()


def _write(folder: Path) -> None:
    with VideoWriter(folder / "v.mp4", 25) as writer:
        for index in range(20):
            writer.write(_frame(index), index / 20 + 0.2 * (index > 10))
    _write_ts(folder / "v.ts", range(20), key_every=10)


def _write_ts(path: Path, indices: Sequence[int], key_every: int) -> None:
    with av.open(str(path), "w", format="mpegts") as container:
        options = {"crf": "8", "x264-params": f"keyint={key_every}:scenecut=0:bframes=0"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        for position, index in enumerate(indices):
            frame = av.VideoFrame.from_ndarray(_frame(index), format="bgr24")
            frame.pts, frame.time_base = position, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _playlist(segment: str) -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.8,\n{segment}\n#EXT-X-ENDLIST\n"


def test_a_file_behind_http_is_a_file(site: Callable[[str], str], tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "v.m3u8").write_text(_playlist("v.ts"))
    for name, local in (("v.mp4", "v.mp4"), ("v.ts", "v.ts"), ("v.m3u8", "v.ts")):
        with open_source(site(name)) as remote, VideoFile(tmp_path / local) as file:
            assert not remote.live
            frames = list(remote)
            expected = list(file)
            assert remote.rate == pytest.approx(file.rate)
            assert remote.frame_count == (20 if name == "v.mp4" else 0)
        assert (remote.reconnects, remote.damaged) == (0, 0)
        assert len(frames) == len(expected) == 20
        assert [frame.seconds for frame in frames] == pytest.approx([frame.seconds for frame in expected])
        assert all(np.array_equal(a.image, b.image) for a, b in zip(frames, expected, strict=True))


@pytest.mark.parametrize("name", ["half-v.mp4", "cut.mp4"])
def test_a_file_behind_http_that_breaks_off_is_damaged(name: str, site: Callable[[str], str], tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", 5) as writer:
        for index in range(40):
            writer.write(np.random.default_rng(index).integers(0, 256, (96, 160, 3), np.uint8))
    data = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with NetworkStream(site(name), timeout_s=0.5) as source:
        assert 5 < sum(1 for _ in source) < 40
    assert (source.live, source.reconnects) == (False, 0)
    assert source.damaged > 0


def test_a_camera_that_sends_jpegs_over_http_is_live(
    site: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    with NetworkStream(site("camera"), timeout_s=2, backoff_s=0.01) as source:
        frames = list(islice(source, 50))
    told = [record.getMessage() for record in caplog.records if record.name == "retinaface_trt.video"]
    said = [re.sub(r" \(.*\)| after .*", "", text.removeprefix(source.name)) for text in told]
    assert said == [": lost; connecting again", ": connected again"] * 2
    assert source.live
    assert source.reconnects == 2
    assert [_index(frame.image) for frame in frames] == [*range(20), *range(20), *range(10)]
    _check_increasing(frames)


def test_nothing_from_the_network_leads_to_local_files(site: Callable[[str], str], tmp_path: Path) -> None:
    _write(tmp_path)
    pages = {
        "a.m3u8": _playlist(f"file://{tmp_path}/v.ts"),
        "b.m3u8": _playlist(f"{tmp_path}/v.ts"),
        "c.m3u8": _playlist(f"concat:{tmp_path}/v.ts"),
        "d.mp4": f"ffconcat version 1.0\nfile file:{tmp_path}/v.ts\n",
        "page.html": "<html>" * 100,
    }
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    for name in (*pages, "away", "nothing.mp4"):
        with pytest.raises(VideoError, match="cannot be opened") as caught:
            NetworkStream(site(name), timeout_s=2)
        assert "\n" not in str(caught.value)
        if name == "page.html":
            assert str(caught.value).endswith("cannot be opened (what is there is not a video that can be read)")


@pytest.mark.parametrize(
    "text",
    [
        "file:v.mp4",
        "file://v.mp4",
        "concat:v.mp4|v.mp4",
        "data:video/mp4;base64,AAAA",
        "subfile,,start,0,end,0,,:v.mp4",
        "pipe:0",
        "lavfi:testsrc",
        "async:file://v.mp4",
        "cache:http://127.0.0.1/v.mp4",
        "ftp://127.0.0.1/v.mp4",
        " file:v.mp4",
        "none.mp4",
    ],
)
def test_what_else_ffmpeg_would_open_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match=r"no such file|addresses that can be read"):
        open_source(text)
    with open_source("v.mp4") as source:
        assert sum(1 for _ in source) == 20


def test_a_video_over_plain_tcp(tmp_path: Path) -> None:
    """MPEG-TS, as encoders and drones send it; where it ends it is connected to again."""
    _write(tmp_path)
    data = (tmp_path / "v.ts").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(2):
                client, _address = server.accept()
                with client:
                    client.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        with NetworkStream(f"tcp://127.0.0.1:{server.getsockname()[1]}", timeout_s=3, backoff_s=0.01) as source:
            frames = list(islice(source, 40))
        thread.join()
    assert [_index(frame.image) for frame in frames] == [*range(20), *range(20)]
    assert (source.live, source.reconnects) == (True, 1)
    _check_increasing(frames)


def test_a_broadcast_that_is_joined_in_the_middle_is_not_damaged(tmp_path: Path) -> None:
    """The next key frame comes after FFmpeg has given up probing: until then not even the size is known."""
    _write_ts(tmp_path / "v.ts", [*[0] * 75, *range(20)], key_every=75)
    data = (tmp_path / "v.ts").read_bytes()
    middle = 188 * (len(data) // 188 // 10)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _address = server.accept()
            with client:
                client.sendall(data[: 3 * 188] + data[middle:])

        thread = threading.Thread(target=serve)
        thread.start()
        with NetworkStream(f"tcp://127.0.0.1:{server.getsockname()[1]}", timeout_s=1) as source:
            frames = list(islice(source, 20))
        thread.join()
    assert [_index(frame.image) for frame in frames] == list(range(20))
    assert source.damaged == 0


def _free_udp_address() -> tuple[str, int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        host, port = probe.getsockname()
    return host, port


def test_a_video_over_udp(tmp_path: Path) -> None:
    _write(tmp_path)
    data = (tmp_path / "v.ts").read_bytes()
    address = _free_udp_address()
    done = threading.Event()

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not done.is_set():
                for start in range(0, len(data), 7 * 188):
                    sender.sendto(data[start : start + 7 * 188], address)
                    time.sleep(0.002)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        with open_source(f"udp://127.0.0.1:{address[1]}") as source:
            frames = list(islice(source, 30))
    finally:
        done.set()
        thread.join()
    assert source.live
    assert {frame.image.shape for frame in frames} == {(96, 160, 3)}
    _check_increasing(frames)


class Pauses(threading.Event):
    """Notes how long somebody would wait for it, and has waited already."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.taken: list[float | None] = []
        self.then = then

    def wait(self, timeout: float | None = None) -> bool:
        self.taken.append(timeout)
        assert len(self.taken) < 2000  # it does not end
        self.then()
        return self.is_set()


@pytest.mark.parametrize("part", [0.5, 1.0])
@pytest.mark.parametrize(
    ("options", "pauses"),
    [
        ({}, [0.5, 1, 2, 4, 8, 16, 30, 30, 30]),
        ({"backoff_s": 0.1, "max_backoff_s": 0.5}, [0.1, 0.2, 0.4, 0.5, 0.5]),
        ({"backoff_s": 9, "max_backoff_s": 2}, [2, 2]),
    ],
)
def test_each_pause_is_twice_the_last_up_to_the_longest_and_up_to_half_is_left_out(
    options: dict[str, float],
    pauses: list[float],
    part: float,
    units: list[list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return part

    monkeypatch.setattr("trt_runtime.media.live.random", SimpleNamespace(uniform=uniform))
    with RtspServer(units, 500, [Visit(15)]) as server:
        source = NetworkStream(server.url(), max_attempts=len(pauses), **options)  # type: ignore[arg-type]
    source._stopped = waited = Pauses()
    with source, pytest.raises(VideoError, match=f"lost, after {len(pauses)} attempts"):
        list(source)
    assert waited.taken == pytest.approx([pause * part for pause in pauses])
    assert set(drawn) == {(0.5, 1)}


def test_a_frame_makes_the_next_pause_the_shortest_again(units: list[list[bytes]]) -> None:
    """However often the camera is lost, one attempt each time is allowed."""
    with RtspServer(units, 500, [Visit(15)]) as server:
        with NetworkStream(server.url(), backoff_s=0.01, max_attempts=1) as source:
            source._stopped = waited = Pauses()
            frames = list(islice(source, 60))
    assert [_index(frame.image) for frame in frames] == [*range(15)] * 4
    assert source.reconnects == len(waited.taken) == 3
    assert all(0.005 <= pause <= 0.01 for pause in waited.taken)
    _check_increasing(frames)


def test_more_attempts_than_a_float_has_room_for(units: list[list[bytes]]) -> None:
    with RtspServer(units, 500, [Visit(15)]) as server:
        source = NetworkStream(server.url(), max_backoff_s=3, max_attempts=1100)
    source._stopped = waited = Pauses()
    source._timeout_s = 60
    with source, pytest.raises(VideoError, match="1100 attempts"):
        list(source)
    assert len(waited.taken) == 1100
    assert all(1.5 <= pause <= 3 for pause in waited.taken[3:])


def test_who_allows_no_attempts_gets_none(units: list[list[bytes]]) -> None:
    with RtspServer(units, 500, [Visit(15)]) as server:
        with NetworkStream(server.url(), max_attempts=0) as source:
            source._stopped = waited = Pauses()
            with pytest.raises(VideoError, match="lost, after 0 attempts to connect again: it gives no frames"):
                list(islice(source, 200))
        assert (server.played, waited.taken) == (1, [])


def test_a_lost_connection_is_closed_before_the_pause(units: list[list[bytes]]) -> None:
    """Some cameras serve one client at a time."""
    closed = []
    with RtspServer(units, _RATE, [Visit(15, stall=True), Visit()]) as server:
        with NetworkStream(server.url(), timeout_s=1) as source:
            source._stopped = Pauses(lambda: closed.append(server.left.acquire(timeout=20)))
            assert len(list(islice(source, 20))) == 20
    assert closed == [True]


def test_a_silent_connection_is_left_behind_and_closed_when_it_times_out(units: list[list[bytes]]) -> None:
    with RtspServer(units, 500, [Visit(15, stall=True)]) as server:
        with NetworkStream(server.url(), timeout_s=1) as source:
            assert len(list(islice(source, 14))) == 14
        assert server.left.acquire(timeout=20)


def test_ctrl_c_while_it_connects_leaves_no_connection(
    units: list[list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())

    def interrupt(self: _Connection, stopped: threading.Event) -> None:
        assert self.next(stopped) is not None  # it stands, and packets come
        raise KeyboardInterrupt

    monkeypatch.setattr(_Connection, "opened", interrupt)
    with RtspServer(units, 500) as server:
        with pytest.raises(KeyboardInterrupt):
            NetworkStream(server.url(), timeout_s=2)
        end = time.monotonic() + 20
        while any(thread.name == "network stream" for thread in set(threading.enumerate()) - before):
            assert time.monotonic() < end
            time.sleep(0.01)
    _wait_for_no_threads(before)


def test_a_connection_reads_a_second_ahead_and_no_more(tmp_path: Path) -> None:
    _write_ts(tmp_path / "v.ts", [0] * 200, key_every=10)
    container = av.open(str(tmp_path / "v.ts"))
    connection = _Connection(lambda: (container, container.streams.video[0]))
    try:
        assert connection.opened(threading.Event()) is None
        end = time.monotonic() + 20
        while not connection._items.full():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert 10 <= connection._items.qsize() <= 50
    finally:
        connection.close()
    assert not connection._thread.is_alive()


@pytest.mark.parametrize("scheme", ["rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "tcp"])
def test_every_scheme_gets_as_far_as_the_network(scheme: str) -> None:
    """FFmpeg may use what it needs for it: TLS, say."""
    assert scheme in SCHEMES
    address = f"{scheme}://127.0.0.1:{_closed_port()}/a"
    with pytest.raises(VideoError) as caught:
        NetworkStream(address)
    assert str(caught.value) == f"{address}: cannot be opened (Connection refused)"


def test_a_protocol_that_pyav_lacks_is_named() -> None:
    with pytest.raises(VideoError) as caught:
        NetworkStream("srt://127.0.0.1:1", timeout_s=0.1)
    if "no answer" in str(caught.value):
        pytest.skip("this PyAV knows SRT")
    assert str(caught.value) == "srt://127.0.0.1:1: cannot be opened (this build of PyAV does not know the protocol)"


def test_a_length_that_a_server_announces_is_not_allocated() -> None:
    """It would be 2 GB, and filled as the server sends them."""
    sent = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client = server.accept()[0]
            with client:
                client.recv(4096)
                client.sendall(b"RTSP/1.0 200 OK\r\nCSeq: 1\r\nContent-Length: 2000000000\r\n\r\n")
                with suppress(OSError):
                    while sum(sent) < 1 << 26:
                        sent.append(client.send(bytes(1 << 16)))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(VideoError, match="cannot be opened"):
            NetworkStream(f"rtsp://127.0.0.1:{server.getsockname()[1]}/a", timeout_s=2)
        thread.join()
    assert sum(sent) < 1 << 26  # what the kernel holds, no more


def test_a_reader_that_is_busy_with_something_else_has_a_time() -> None:
    """FFmpeg parses, say, and looks neither at the clock nor at the network."""
    go_on = threading.Event()

    def open_() -> tuple[Any, Any]:
        go_on.wait(60)
        raise OSError

    connection = _Connection(open_, 0.3)
    error = connection.opened(threading.Event())
    assert isinstance(error, TimeoutError)
    assert str(error) == "nothing within 0.3 s"
    assert not connection.lingers
    connection.close()
    assert connection.lingers
    go_on.set()
    connection._thread.join()
    assert not connection.lingers


def test_readers_that_do_not_end_do_not_add_up(units: list[list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Connection, "lingers", True)
    with RtspServer(units, _RATE, [Visit(20), Visit()]) as server:
        with NetworkStream(server.url(), timeout_s=2, max_attempts=2, backoff_s=0.01) as source:
            with pytest.raises(VideoError, match="after 2 attempts to connect again: the last connection does not end"):
                list(source)
        assert server.played == 1


@pytest.mark.parametrize("code", ["401", "403"])
def test_a_password_that_is_not_accepted_over_http(code: str, site: Callable[[str], str]) -> None:
    with pytest.raises(VideoError) as caught:
        NetworkStream(site(code).replace("http://", "http://me:geheim@"), timeout_s=5)
    assert str(caught.value).endswith(
        f"{code}: cannot be opened (user or password is not accepted: write them as in rtsp://USER:PASSWORD@HOST/)"
    )
    assert "geheim" not in str(caught.value)


def test_http_may_lead_to_https_and_https_through_a_proxy(
    site: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VideoError, match="Connection refused"):
        NetworkStream(site("secure"), timeout_s=5)
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def serve() -> None:
            client, _address = proxy.accept()
            with client:
                asked.append(client.recv(1000).split(b"\r\n")[0])

        thread = threading.Thread(target=serve)
        thread.start()
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with pytest.raises(VideoError):
            NetworkStream("https://camera.invalid/a", timeout_s=5)
        if thread.is_alive() and not asked:
            socket.create_connection(proxy.getsockname()).close()  # it has not been called
        thread.join()
    assert asked == [b"CONNECT camera.invalid:443 HTTP/1.1"]


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        (
            "gopher://me:geheim@host/a",
            {},
            "gopher://***@host/a: addresses that can be read start with rtsp, rtsps, rtmp",
        ),
        ("rtsp:host/a", {}, "addresses that can be read start with"),
        ("rtsp://host/a", {"transport": "TCP"}, "transport must be tcp or udp, got 'TCP'"),
        ("rtsp://host/a", {"timeout_s": 0}, "timeout_s must be above 0, got 0"),
        ("rtsp://host/a", {"timeout_s": -1}, "timeout_s must be above 0, got -1"),
        ("rtsp://host/a", {"timeout_s": float("nan")}, "timeout_s must be above 0, got nan"),
        ("rtsp://host/a", {"timeout_s": float("inf")}, "timeout_s must be above 0, got inf"),
    ],
)
def test_what_cannot_be_an_address_or_an_option(url: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(VideoError, match=re.escape(said)):
        NetworkStream(url, **options)


def test_what_is_not_said() -> None:
    defaults = {name: value.default for name, value in inspect.signature(NetworkStream).parameters.items()}
    assert (defaults["timeout_s"], defaults["transport"], defaults["max_attempts"]) == (5.0, "tcp", None)


def test_a_scheme_may_be_written_large_and_the_pixel_limit_holds(units: list[list[bytes]]) -> None:
    with RtspServer(units, 500) as server:
        with NetworkStream(server.url().replace("rtsp:", "RTSP:"), max_pixels=96 * 192) as source:  # FFmpeg rounds up
            assert _index(next(iter(source)).image) == 0
        with pytest.raises(VideoError, match=r": 160x96 is more than 0\.015359 megapixels$"):
            NetworkStream(server.url(), max_pixels=96 * 160 - 1)


@pytest.mark.parametrize(("announced", "rate"), [(240, 240), (241, 25), (90_000, 25), (12.5, 12.5), (0.5, 1)])
def test_a_rate_no_camera_has_is_a_clock(announced: float, rate: float, units: list[list[bytes]]) -> None:
    with RtspServer(units, 500, announced=announced) as server, NetworkStream(server.url()) as source:
        assert source.rate == rate


def test_a_file_behind_http_may_have_any_rate(site: Callable[[str], str], tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", 500) as writer:
        for index in range(10):
            writer.write(_frame(index))
    with NetworkStream(site("v.mp4")) as source:
        assert (source.rate, source.frame_count, source.live) == (pytest.approx(500), 10, False)
        assert len(list(source)) == 10
    assert source.damaged == 0


def test_sound_is_not_asked_for(units: list[list[bytes]]) -> None:
    with RtspServer(units, 500, sound=True) as server, NetworkStream(server.url()) as source:
        assert len(list(islice(source, 10))) == 10
    assert server.setups == ["video"]


def test_a_camera_sends_over_udp_if_it_is_asked_to(units: list[list[bytes]]) -> None:
    with RtspServer(units, _RATE, udp=True) as server, NetworkStream(server.url(), transport="udp") as source:
        frames = list(islice(source, 15))
    assert [_index(frame.image) for frame in frames] == list(range(15))


def test_a_file_that_breaks_off_is_asked_for_the_rest(site: Callable[[str], str], tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", 25) as writer:
        for index in range(40):
            writer.write(np.random.default_rng(index).integers(0, 256, (96, 160, 3), np.uint8))
    with NetworkStream(site("dropped-v.mp4")) as source:
        assert sum(1 for _ in source) == 40
    assert (source.live, source.damaged, source.reconnects) == (False, 0, 0)


@pytest.mark.parametrize(("left", "damaged"), [(20, 1), (34, 1), (35, 0), (40, 0)])
def test_more_than_a_second_that_is_missing_of_a_file_behind_http_is_damage(
    left: int, damaged: int, site: Callable[[str], str], tmp_path: Path
) -> None:
    """Cut off between two frames, so that nothing else tells; eight seconds are announced."""
    with VideoWriter(tmp_path / "v.mp4", 5) as writer:
        for index in range(40):
            writer.write(np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8))
    with av.open(str(tmp_path / "v.mp4")) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(data[: [*starts, len(data)][left]])
    with NetworkStream(site("v.mp4")) as source:
        assert len(list(source)) == left
    assert source.damaged == damaged


def test_a_stream_behind_http_that_has_an_end_but_no_length_is_a_file(
    site: Callable[[str], str], tmp_path: Path
) -> None:
    with av.open(str(tmp_path / "v.h264"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        for index in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_frame(index), format="bgr24")))
        container.mux(stream.encode(None))
    with NetworkStream(site("v.h264")) as source:
        assert not source.live
        assert len(list(source)) == 20
        assert source._connection.container.duration is None
    assert source.reconnects == 0


def test_a_playlist_without_an_end_is_live(site: Callable[[str], str], tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "v.m3u8").write_text(_playlist("v.ts").replace("#EXT-X-ENDLIST\n", ""))
    with NetworkStream(site("v.m3u8"), timeout_s=2) as source:
        assert (source.live, source.frame_count) == (True, 0)
        assert [_index(frame.image) for frame in islice(source, 15)] == list(range(15))


def test_a_playlist_may_be_encrypted(site: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(range(16)))
    (tmp_path / "info").write_text(f"key\n{tmp_path}/key\n")
    options = {"hls_key_info_file": f"{tmp_path}/info", "hls_playlist_type": "vod"}
    with av.open(str(tmp_path / "v.m3u8"), "w", format="hls", options=options) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        for index in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_frame(index), format="bgr24")))
        container.mux(stream.encode(None))
    assert "METHOD=AES-128" in (tmp_path / "v.m3u8").read_text()
    with NetworkStream(site("v.m3u8")) as source:
        assert len(list(source)) == 20


def test_broken_pictures_are_counted_from_the_first_good_one_on(site: Callable[[str], str]) -> None:
    """The first and the eighth are garbage. Before there was a good one, nothing says that something is missing."""
    with NetworkStream(site("spoilt")) as source:
        frames = list(islice(source, 18))
    assert [_index(frame.image) for frame in frames] == [*range(1, 7), *range(8, 20)]
    assert (source.damaged, source.reconnects) == (1, 0)


def _serve_once(*parts: bytes, go_on: threading.Event | None = None) -> tuple[threading.Thread, str]:
    """Send to one client; each part but the first when `go_on` is set."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with server:
            client, _address = server.accept()
            with client:
                for part in parts:
                    client.sendall(part)
                    assert go_on is None or go_on.wait(30)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread, f"tcp://127.0.0.1:{server.getsockname()[1]}"


def test_a_lost_packet_is_one_damaged_frame(tmp_path: Path) -> None:
    """FFmpeg shows it all the same, and marks it."""
    _write_ts(tmp_path / "v.ts", range(20), key_every=10)
    data = (tmp_path / "v.ts").read_bytes()
    middle = len(data) // 188 // 2 * 188
    thread, url = _serve_once(data[:middle] + data[middle + 188 :])
    with NetworkStream(url, max_attempts=0) as source, pytest.raises(VideoError, match="lost"):
        assert sum(1 for _ in source) == 20
    thread.join()
    assert source.damaged == 1


def test_a_frame_that_cannot_be_converted_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trt_runtime.media.live.Pictures", OddPictures)
    _write_ts(tmp_path / "v.ts", range(10), key_every=10)
    thread, url = _serve_once((tmp_path / "v.ts").read_bytes())
    with NetworkStream(url) as source:
        frames = list(islice(source, 8))
    thread.join()
    assert [_index(frame.image) for frame in frames] == [1, 2, 4, 5, 6, 7, 8, 9]
    assert source.damaged == 2


def test_a_stream_that_grows_over_the_pixel_limit_is_damaged_from_there(tmp_path: Path) -> None:
    _write_ts(tmp_path / "v.ts", [0] * 75, key_every=10)
    small = (tmp_path / "v.ts").read_bytes()
    with av.open(str(tmp_path / "v.ts"), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 192, 320, "yuv420p"
        for index in range(10):
            large = np.repeat(np.repeat(_frame(index), 2, axis=0), 2, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(large, format="bgr24")))
        container.mux(stream.encode(None))
    for limit, shapes in ((96 * 192, {(96, 160, 3)}), (10**6, {(96, 160, 3), (192, 320, 3)})):
        go_on = threading.Event()
        thread, url = _serve_once(small, (tmp_path / "v.ts").read_bytes(), go_on=go_on)
        seen = set()
        with NetworkStream(url, max_pixels=limit, max_attempts=0) as source:
            with pytest.raises(VideoError, match="lost"):  # noqa: PT012
                for frame in source:
                    go_on.set()
                    seen.add(frame.image.shape)
        thread.join()
        assert seen == shapes
        assert (source.damaged > 0) == (len(shapes) == 1)


def test_who_is_late_for_udp_need_not_connect_again(tmp_path: Path) -> None:
    """More comes than FFmpeg keeps, while nobody reads."""
    _write(tmp_path)
    data = (tmp_path / "v.ts").read_bytes()
    address = _free_udp_address()
    done, sent = threading.Event(), threading.Semaphore(0)

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not done.is_set():
                for start in range(0, len(data), 7 * 188):
                    sender.sendto(data[start : start + 7 * 188], address)
                    time.sleep(0.001)
                sent.release()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        with NetworkStream(f"udp://127.0.0.1:{address[1]}?fifo_size=100", backoff_s=0.01) as source:
            for _ in range(5):
                sent.acquire()
            frames = list(islice(source, 60))
    finally:
        done.set()
        thread.join()
    assert len(frames) == 60
    assert source.reconnects == 0


class Now:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.mark.parametrize(
    ("live", "events", "seconds"),
    [
        # (what the clock shows, the stamp); None for both: connected again
        pytest.param(True, [(0, 50), (9, 50.1), (9, 50.2)], [0, 0.1, 0.2], id="its stamps count, not when it came"),
        pytest.param(True, [(0, 50), (1, 60.9), (1, 61)], [0, 10.9, 11], id="ten seconds ahead are still its own"),
        pytest.param(True, [(0, 50), (1, 61.1), (1.2, 61.3)], [0, 1, 1.2], id="more are not: the clock goes on"),
        pytest.param(True, [(0, 50), (10.5, 50.4), (11, 50.9)], [0, 10.5, 11], id="nor are more behind"),
        pytest.param(True, [(0, 50), (0, 500), (0, 500.04)], [0, 0.1, 0.14], id="at least a frame after the last"),
        pytest.param(True, [(0, 50), (1, 50), (1, 49.5)], [0, 0.001, 0.002], id="never back, by a thousandth"),
        pytest.param(True, [(0, None), (1, None), (1, None)], [0, 1, 1.1], id="without stamps the clock counts"),
        pytest.param(True, [(0, None), (1, 70), (2, 70.5)], [0, 1, 1.5], id="the first stamp is when it came"),
        pytest.param(True, [(0, 50), (3, 53), None, (7, 1), (9, 2)], [0, 3, 7, 8], id="connected again after a while"),
        pytest.param(True, [(0, 50), (0, 58), None, (1, 1), (1, 2)], [0, 8, 8.1, 9.1], id="connected again at once"),
        pytest.param(False, [(0, 5), (1, 5.1), (1, 900)], [0, 0.1, 895], id="a file's own time, however it jumps"),
        pytest.param(False, [(0, 5), (1, 4), (1, 4.5)], [0, 0.1, 0.2], id="and never back, by a frame"),
        pytest.param(False, [(0, None), (9, None), (9, None)], [0, 0.1, 0.2], id="a file without stamps"),
    ],
)
def test_the_clock(
    live: bool, events: list[tuple[float, float | None] | None], seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = Now()
    monkeypatch.setattr("trt_runtime.media.live.time", now)
    clock = _Clock(live, 10.0)
    given = []
    for event in events:
        if event is None:
            clock.restart()
        else:
            now.seconds = 1000 + event[0]
            given.append(clock(event[1]))
    assert given == pytest.approx(seconds)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp", ".avif", ".jp2", ".heic"])
def test_an_image_is_a_source_of_one_frame(suffix: str, site: Callable[[str], str], tmp_path: Path) -> None:
    if suffix == ".heic":
        (tmp_path / "photo.heic").write_bytes(tiled_heic(np.tile(_frame(3), (2, 2, 1))[:128, :256], 128, 1))
    else:
        cv2.imwrite(str(tmp_path / f"photo{suffix}"), _frame(3))
    expected = read_image(tmp_path / f"photo{suffix}")
    for place in (str(tmp_path / f"photo{suffix}"), site(f"photo{suffix}")):
        with open_source(place) as source:
            (frame,) = source
            assert (source.live, source.frame_count, source.name, frame.seconds) == (False, 1, place, 0.0)
        np.testing.assert_array_equal(frame.image, expected)
    (tmp_path / "damaged").write_bytes((tmp_path / f"photo{suffix}").read_bytes()[:99])
    with pytest.raises(ImageError, match=r"damaged: .*(truncated|damaged)"):
        open_source(str(tmp_path / "damaged"))


def test_what_is_neither_video_nor_image_is_said_so(site: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<html>")
    with pytest.raises(VideoError, match="what is there is not a video that can be read"):
        open_source(site("page.html"))
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n")
    with pytest.raises(VideoError, match=r"list\.m3u8: a playlist, which is read at its http address only"):
        open_source(str(tmp_path / "list.m3u8"))
    with pytest.raises(VideoError, match=r"page\.html: not a video that can be read"):
        open_source(str(tmp_path / "page.html"))
