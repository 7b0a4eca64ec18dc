from __future__ import annotations

import functools
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from facespec.errors import VideoError
from facespec.letterbox import Frame
from tests.trt_runtime.rtsp_server import RtspServer, Visit, encode_h264
from trt_runtime.decoding import TimedFrame
from trt_runtime.live import NetworkStream, without_secrets
from trt_runtime.video import Source, VideoFile, VideoWriter, open_source

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
    end = time.monotonic() + 5
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
        NetworkStream(server.url(), timeout_s=1, backoff_s=0.05) as source,
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


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://host:554/a?channel=1&subtype=0", "rtsp://host:554/a?channel=1&subtype=0"),
        ("rtsp://me:p@ss/w#or?d@host/a", "rtsp://***@host/a"),
        ("rtsp://me:a\nb@host/a", "rtsp://***@host/a"),
        ("http://host/a?user=me&pwd=geheim&x=1", "http://host/a?user=me&pwd=***&x=1"),
        ("srt://host:9?mode=caller&passphrase=geheim", "srt://host:9?mode=caller&passphrase=***"),
        ("https://host/a?access_token=geheim#t=1", "https://host/a?access_token=***#t=1"),
    ],
)
def test_what_is_shown_of_an_address(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


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
        list(NetworkStream(server.url(), timeout_s=0.5))
    assert "\n" not in str(caught.value)


def test_a_camera_that_does_not_return_is_given_up(units: list[list[bytes]]) -> None:
    """The server is gone, or there again but without a picture."""
    with RtspServer(units, _RATE, [Visit(30)]) as server:
        source = NetworkStream(server.url(), timeout_s=1, backoff_s=0.01, max_attempts=3)
    with source, pytest.raises(VideoError, match=r"3 attempts.*refused"):
        assert [_index(frame.image) for frame in source] == list(range(30))
    with RtspServer(units, _RATE, [Visit(30), Visit(0)]) as server:
        with NetworkStream(server.url(), timeout_s=0.5, backoff_s=0.01, max_attempts=2) as source:
            with pytest.raises(VideoError, match="2 attempts"):
                list(source)
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
        assert ended.wait(2)
        with source:
            pass
    _wait_for_no_threads(before)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """A web server on the files of `tmp_path`.

    /half-NAME breaks off in the middle of a file, /away leads to one by its path, /camera sends 20 pictures and ends.
    """

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/half-"):
                data = (tmp_path / self.path.removeprefix("/half-")).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                return
            if self.path == "/camera":
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
                self.end_headers()
                for index in range(20):
                    jpeg = cv2.imencode(".jpg", _frame(index))[1].tobytes()
                    self.wfile.write(b"--next\r\nContent-Type: image/jpeg\r\n")
                    self.wfile.write(b"Content-Length: %d\r\n\r\n%s\r\n" % (len(jpeg), jpeg))
                return
            if self.path != "/away":
                super().do_GET()
                return
            self.send_response(302)
            self.send_header("Location", f"file://{tmp_path}/v.mp4")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
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


def test_a_camera_that_sends_jpegs_over_http_is_live(site: Callable[[str], str]) -> None:
    with NetworkStream(site("camera"), timeout_s=2, backoff_s=0.01) as source:
        frames = list(islice(source, 50))
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


def test_a_video_over_udp(tmp_path: Path) -> None:
    _write(tmp_path)
    data = (tmp_path / "v.ts").read_bytes()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
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
