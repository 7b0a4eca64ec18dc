from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import islice

import av
import numpy as np
import pytest

from facespec.errors import VideoError
from tests.trt_runtime.web_site import Answer, Site, site_fixture
from trt_runtime.media.live import NetworkStream
from trt_runtime.media.playlists import MAX_PLAYLIST_BYTES, MAX_PLAYLISTS

site = site_fixture


@functools.cache
def _segment(height: int = 96) -> bytes:
    """Return a transport stream of 20 frames."""
    import io

    file = io.BytesIO()
    with av.open(file, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "keyint=10:bframes=0"})
        stream.height, stream.width, stream.pix_fmt = height, 160, "yuv420p"
        for index in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((height, 160, 3), 10 * index, np.uint8), format="bgr24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def _ok(content: bytes | str) -> Answer:
    kind = {"Content-Type": "application/vnd.apple.mpegurl"} if isinstance(content, str) else {}
    return 200, kind, content.encode() if isinstance(content, str) else content


def _media(segment: str, end: str = "#EXT-X-ENDLIST\n") -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.8,\n{segment}\n{end}"


def _master(*names: str) -> str:
    return "#EXTM3U\n" + "".join(f"#EXT-X-STREAM-INF:BANDWIDTH={1 + i}\n{name}\n" for i, name in enumerate(names))


def _files(files: dict[str, str | bytes]) -> Callable[[str], Answer | None]:
    return lambda path: _ok(files[path]) if path in files else (404, {}, b"")


def test_a_master_leads_to_its_variants(site: Site) -> None:
    """By addresses as they are written, also behind a redirection; one that is missing is passed over."""
    files = _files(
        {
            "/deep/m.m3u8": _master("gone.m3u8", "low/v.m3u8?a=1", f"http://{site.address}/high.m3u8"),
            "/deep/low/v.m3u8?a=1": _media("../v.ts"),
            "/high.m3u8": _media("/deep/v.ts"),
            "/deep/v.ts": _segment(),
        }
    )
    site.answer = lambda path: (302, {"Location": "/deep/m.m3u8"}, b"") if path == "/start" else files(path)
    with NetworkStream(f"http://{site.address}/start", timeout_s=10) as source:
        assert len(list(islice(source, 20))) == 20
    assert {"/deep/gone.m3u8", "/deep/low/v.m3u8?a=1", "/high.m3u8", "/deep/v.ts"} <= set(site.paths)


@pytest.mark.parametrize("names", [("low", "high"), ("high", "low")])
def test_of_a_master_the_largest_picture_is_read(names: tuple[str, str], site: Site) -> None:
    """The other is fetched only to find out about it."""
    segments = [f"#EXTINF:0.8,\n{{}}{number}.ts\n" for number in range(12)]
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n" + "".join(segments) + "#EXT-X-ENDLIST\n"
    content: dict[str, str | bytes] = {"/m.m3u8": _master(*(f"{name}.m3u8" for name in names))}
    for name, height in (("low", 48), ("high", 96)):
        content[f"/{name}.m3u8"] = playlist.replace("{}", name)
        content |= {f"/{name}{number}.ts": _segment(height) for number in range(12)}
    site.answer = _files(content)
    with NetworkStream(f"http://{site.address}/m.m3u8", timeout_s=10) as source:
        assert {frame.image.shape for frame in islice(source, 100)} == {(96, 160, 3)}
    assert "/high11.ts" not in site.paths or "/low11.ts" not in site.paths
    assert sum(path.startswith("/low") for path in site.paths) < sum(path.startswith("/high") for path in site.paths)


def test_a_playlist_may_want_a_password(site: Site) -> None:
    site.login = "me:geh:eim"
    site.answer = _files({"/m.m3u8": _master("v.m3u8"), "/v.m3u8": _media("v.ts"), "/v.ts": _segment()})
    with NetworkStream(f"http://me:geh%3Aeim@{site.address}/m.m3u8", timeout_s=10) as source:
        assert len(list(source)) == 20


def _every_name(count: int) -> Callable[[str], Answer | None]:
    return lambda path: _ok(_master(*(f"/{path[1:9]}{index}.m3u8" for index in range(count))))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (_every_name(3000), f"a playlist leads to 3000 others, at most {MAX_PLAYLISTS} are read"),
        (_every_name(2), "a playlist that a playlist leads to leads to more of them"),
        (_every_name(1), "a playlist that a playlist leads to leads to more of them"),
        # FFmpeg cuts an address that is so long, and asks for another one than the playlist names
        (lambda path: _ok(_master("x" * 5000 + ".m3u8")), "a playlist that a playlist leads to leads to more of them"),
        (
            lambda path: _ok(_media("v.ts") if "v.m3u8" in path else _master("/v.m3u8") + "#" * MAX_PLAYLIST_BYTES),
            "a playlist is longer than 4 MiB",
        ),
    ],
)
def test_playlists_without_end_are_refused(answer: Callable[[str], Answer | None], said: str, site: Site) -> None:
    site.answer = answer
    with pytest.raises(VideoError) as caught:
        NetworkStream(f"http://{site.address}/m.m3u8", timeout_s=20)
    assert str(caught.value) == f"http://{site.address}/m.m3u8: {said}"
    assert len(site.paths) < 10


def test_as_many_playlists_as_are_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trt_runtime.media.playlists.MAX_PLAYLISTS", 10)
    names = [f"{index}.m3u8" for index in range(10)]
    files: dict[str, str | bytes] = {f"/{name}": _media("v.ts") for name in names}
    site.answer = _files({"/m.m3u8": _master(*names), "/v.ts": _segment(), **files})
    with NetworkStream(f"http://{site.address}/m.m3u8", timeout_s=60) as source:
        assert len(list(islice(source, 5))) == 5


def test_a_playlist_that_turns_into_a_master_is_lost(site: Site) -> None:
    """FFmpeg would add its variants each time that it reads the playlist again."""
    turned = threading.Event()

    def answer(path: str) -> Answer:
        if path == "/v.ts":
            return _ok(_segment())
        return _ok(_master(*(f"{index}.m3u8" for index in range(50))) if turned.is_set() else _media("v.ts", ""))

    site.answer = answer
    with NetworkStream(f"http://{site.address}/v.m3u8", timeout_s=1, max_attempts=1, backoff_s=0.01) as source:
        frames = iter(source)
        assert len(list(islice(frames, 15))) == 15
        turned.set()
        with pytest.raises(VideoError, match="lost, after 1 attempts"):
            list(frames)
    assert not [path for path in site.paths if path == "/49.m3u8" and not turned.is_set()]


@pytest.mark.parametrize("what", ["playlist", "segment"])
def test_what_does_not_answer_has_a_time(what: str, site: Site) -> None:
    quiet = {"playlist": "/v.m3u8", "segment": "/v.ts"}[what]
    files = _files({"/m.m3u8": _master("v.m3u8"), "/v.m3u8": _media("v.ts"), "/v.ts": _segment()})
    site.answer = lambda path: None if path == quiet else files(path)
    start = time.monotonic()
    with pytest.raises(VideoError, match=r"m\.m3u8: (cannot be opened|there is no video stream in it)"):
        NetworkStream(f"http://{site.address}/m.m3u8", timeout_s=0.5)
    assert time.monotonic() - start < 30  # silence lasts 60
