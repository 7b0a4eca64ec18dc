from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from facespec.errors import DataError, ImageError, OutputError
from facespec.images import decode_image, write_image
from tests.trt_runtime.handmade import frame_of
from tests.trt_runtime.web_site import Site, site_fixture
from trt_runtime.media import sources as module
from trt_runtime.media.files import VideoWriter
from trt_runtime.media.sources import Sources, check_targets, find_sources, is_camera, labels, read_source, targets
from trt_runtime.media.web import fetch

site = site_fixture
MODEL = Path("m.onnx")
PNG = cv2.imencode(".png", frame_of(3))[1].tobytes()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _videos(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        with VideoWriter("made.mp4", 25) as writer:
            writer.write(frame_of(1))
        Path("made.mp4").rename(name)


def test_what_a_source_is(here: Path) -> None:
    (here / "7").mkdir()
    for name in ("7/x.png", "p.JPG.png", "[b].png"):
        write_image(name, frame_of(1))
    _videos("v.mp4", "7/w", "photo.jpg")
    (here / "notes.txt").write_text("text")
    (here / "broken.png").touch()

    def found(text: str) -> tuple[list[str], list[str], list[str], bool]:
        sources = find_sources([text])
        return sources.images, sources.videos, list(map(str, sources.others)), sources.single

    assert [is_camera(name) for name in ("0", "12", "7", "v.mp4", "-1", "1.0", "")] == [
        True, True, False, False, False, False, False,
    ]  # fmt: skip
    assert found("7") == (["7/x.png"], ["7/w"], [], False)
    assert found("p.JPG.png") == (["p.JPG.png"], [], [], True)
    assert found("[b].png") == (["[b].png"], [], [], True)  # a file's name before a pattern
    assert found("./7//x.png") == (["7/x.png"], [], [], True)
    assert found("broken.png") == (["broken.png"], [], [], True)  # and is reported as one
    for video in ("v.mp4", "photo.jpg", "notes.txt", "0", "rtsp://h/*.png"):  # reading says what is wrong
        assert found(video) == ([], [video], [], True)
    assert found("*.png") == (["[b].png", "broken.png", "p.JPG.png"], [], [], False)
    assert found("*")[2] == ["7", "notes.txt"]  # what is in the folder is not taken
    everything = (["7/x.png", "[b].png", "broken.png", "p.JPG.png"], ["7/w", "photo.jpg", "v.mp4"], ["notes.txt"])
    assert found("**/*") == (*everything, False)
    assert sorted(found(".")[0]) == sorted(everything[0])
    for wrong, words in (
        ("", "the source is empty: give a file, a folder, a glob, a webcam's index or an address"),
        ("none.png", "none.png: no such file or folder"),
        ("*.txt", "*.txt: no image matches this pattern, and no video"),
    ):
        with pytest.raises(DataError, match=re.escape(words)):
            find_sources([wrong])
    (here / "empty").mkdir()
    assert found("**/*") == (*everything, False)
    with pytest.raises(DataError, match="empty: no images in this folder, and no videos"):
        find_sources(["empty"])


def test_several_sources(here: Path) -> None:
    for name in ("a.png", "f/b.png", "f/c.png"):
        write_image(here / name, frame_of(1))
    _videos("v.mp4", "f/w.mp4")
    found = find_sources(["f/c.png", "v.mp4", "a.png", "f", "0"])
    assert found.images == ["f/c.png", "a.png", "f/b.png"]  # each once, where it is first named
    assert found.videos == ["v.mp4", "f/w.mp4", "0"]
    assert not found.single
    assert find_sources(["f/w.mp4", "f"]).videos == ["f/w.mp4"]
    for twice, words in (
        (["v.mp4", "f", "v.mp4"], "v.mp4 is given more than once"),
        (["0", "v.mp4", "0"], "camera 0 is given more than once"),
        (["rtsp://a:b@h/x", "rtsp://c:d@h/x"], r"rtsp://\*\*\*@h/x is given more than once"),
    ):
        with pytest.raises(DataError, match=words):
            find_sources(twice)


def test_a_pipe_is_not_waited_for(here: Path) -> None:
    import os

    os.mkfifo("pipe")
    assert find_sources(["pipe"]).videos == ["pipe"]


def test_how_sources_are_shown() -> None:
    sources = ["0", "clip.mp4", "rtsp://u:p@h/x", "a@b.mp4", "http://h/x?id=a", "http://h/x?id=b", "http://h/x?id=c"]
    assert list(labels(sources).values()) == [
        "camera 0", "clip.mp4", "rtsp://***@h/x", "a@b.mp4",
        "http://h/x?id=***", "http://h/x?id=*** (2)", "http://h/x?id=*** (3)",
    ]  # fmt: skip


def test_where_annotated_images_go(here: Path) -> None:
    out = Path("out")
    (here / "f").mkdir()

    def places(sources: list[str], *paths: str) -> dict[str, str]:
        return {source: str(target) for source, target in targets(sources, paths, out, video=False).items()}

    assert places(["f"], "f/a.png", "f/g/b.bmp") == {"f/a.png": "out/a.png", "f/g/b.bmp": "out/g/b.bmp.png"}
    assert places(["f"], "f/g/b.png") == {"f/g/b.png": "out/g/b.png"}  # as it lies under the source
    assert places(["*/*.png"], "f/a.png", "g/a.png") == {"f/a.png": "out/f/a.png", "g/a.png": "out/g/a.png"}
    assert places(["x"], "d/f/a.png", "d/f/h/b.png") == {"d/f/a.png": "out/a.png", "d/f/h/b.png": "out/h/b.png"}
    assert places(["x"], "d/f/a/1.png", "d/f/b/1.png", "d/g/c/1.png") == {
        "d/f/a/1.png": "out/f/a/1.png", "d/f/b/1.png": "out/f/b/1.png", "d/g/c/1.png": "out/g/c/1.png",
    }  # fmt: skip
    assert places(["x"], "d/f/h/b.png", "d/a.png") == {"d/f/h/b.png": "out/f/h/b.png", "d/a.png": "out/a.png"}
    assert places(["a.png", "f"], "a.png", "f/a.png") == {"a.png": "out/a.png", "f/a.png": "out/f/a.png"}
    assert places(["f", "x"], "f/a.png", str(here / "f/g/b.png"), "f/../f/c.png") == {
        "f/a.png": "out/a.png", str(here / "f/g/b.png"): "out/g/b.png", "f/../f/c.png": "out/c.png",
    }  # fmt: skip
    assert places(["x"], "a.JPG", "a.jpeg", "a.png", "a.webp", "b/a.tif", "photo", "http://u:p@h/p.jpg?k=1") == {
        "a.JPG": "out/a.JPG", "a.jpeg": "out/a.jpeg", "a.png": "out/a.png", "a.webp": "out/a.webp",
        "b/a.tif": "out/b/a.tif.png", "photo": "out/photo.png", "http://u:p@h/p.jpg?k=1": "out/h_p.jpg_k_1.png",
    }  # fmt: skip


def test_where_annotated_videos_go(here: Path) -> None:
    def places(sources: list[str], *videos: str) -> dict[str, str]:
        return {source: str(target) for source, target in targets(sources, videos, Path("out"), video=True).items()}

    live = ["0", "rtsp://u:p@h:554/x/y?k=1", "rtsp://?", "http://h.org/v.1"]
    assert places(["x"], "d/a.mkv", *live) == {
        "d/a.mkv": "out/a.mp4", "0": "out/camera0.mp4", live[1]: "out/h_554_x_y_k_1.mp4", "rtsp://?": "out/stream.mp4",
        live[3]: "out/h.org_v.1.mp4",
    }  # fmt: skip
    assert places(["x"], "d/a.mkv", "b.mp4", "e/a.mp4") == {
        "d/a.mkv": "out/d/a.mp4", "b.mp4": "out/b.mp4", "e/a.mp4": "out/e/a.mp4",
    }  # fmt: skip
    (here / "d").mkdir()
    assert places(["d"], "d/e/a.mkv") == {"d/e/a.mkv": "out/e/a.mp4"}


def test_what_would_get_the_same_name_is_numbered(here: Path) -> None:
    images = ["a.bmp", "a.bmp.png", "a.bmp_2.png"]
    videos = ["v.mkv", "v.mov", "v.mp4"]
    found = check_targets(["x"], Sources(images, videos), Path("out"), None, [])
    assert [str(target) for target in found.values()] == [
        "out/a.bmp.png", "out/a.bmp_2.png", "out/a.bmp_2_2.png", "out/v.mp4", "out/v_2.mp4", "out/v_3.mp4",
    ]  # fmt: skip


def test_outputs_that_are_refused_before_any_work(here: Path) -> None:
    for name in ("f/a.png", "f/b.png", "x.jpg"):
        write_image(here / name, frame_of(1))
    _videos("v.mp4", "w.mp4")
    (here / "m.onnx").write_text("model")
    (here / "file").write_text("")

    def check(*texts: str, out: str | None = None, json: str | None = None) -> dict[str, Path]:
        return check_targets(texts, find_sources(texts), Path(out) if out else None, json, [MODEL])

    assert check("x.jpg") == {}
    assert check("x.jpg", out="o.JPG") == {"x.jpg": Path("o.JPG")}
    assert check("v.mp4", out="o.MKV") == {"v.mp4": Path("o.MKV")}
    assert check("f", out="out") == {"f/a.png": Path("out/a.png"), "f/b.png": Path("out/b.png")}
    assert check("v.mp4", "w.mp4", out="out") == {"v.mp4": Path("out/v.mp4"), "w.mp4": Path("out/w.mp4")}
    assert check("v.mp4", "x.jpg", out="out") == {"x.jpg": Path("out/x.jpg"), "v.mp4": Path("out/v.mp4")}
    assert check("rtsp://h/x", out="o.mp4", json="-") == {"rtsp://h/x": Path("o.mp4")}
    refused: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        (("v.mp4",), {"out": "o.jpg"}, "--out o.jpg: video is written as .mp4, .mkv, .mov, .m4v"),
        (("x.jpg",), {"out": "o.mp4"}, "for one image give a name that ends in .jpg or .png"),
        (("x.jpg",), {"out": "o.heic"}, "for one image give a name that ends in .jpg or .png"),
        (("x.jpg",), {"out": "o"}, "for one image give a name that ends in .jpg or .png"),
        (("f",), {"out": "o.png"}, "--out o.png: for several images give a folder"),
        (("f",), {"out": "o.mp4"}, "--out o.mp4: for several images give a folder"),
        (("f",), {"out": "file"}, "--out file: for several images give a folder"),
        (("v.mp4", "w.mp4"), {"out": "o.mp4"}, "--out o.mp4: for several videos give a folder"),
        (("f",), {"out": "f"}, "--out f lies in the source folder: choose one outside"),
        (("f",), {"out": "f/new/out"}, "lies in the source folder: choose one outside"),
        (("x.jpg",), {"json": "x.jpg"}, "--json x.jpg is a file that is read"),
        (("x.jpg",), {"json": "m.onnx"}, "--json m.onnx is a file that is read"),
        (("x.jpg",), {"out": "x.jpg"}, "--out x.jpg is a file that is read"),
        (("v.mp4",), {"out": "v.mp4"}, "--out v.mp4 is a file that is read"),
        (("v.mp4",), {"json": "v.mp4"}, "--json v.mp4 is a file that is read"),
        (("x.jpg",), {"out": "o.png", "json": "o.png"}, "--json o.png is the file of --out, too"),
        (("f",), {"out": "g", "json": "g/b.png"}, "--json g/b.png is the file of --out, too"),
        (("v.mp4", "w.mp4"), {"out": "."}, "--out v.mp4 is a file that is read"),
    ]
    for texts, options, words in refused:
        with pytest.raises(OutputError, match=re.escape(words)):
            check(*texts, **options)


# what is at an address


def test_an_address_is_what_is_there(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    content: dict[str, Any] = {"/photo": PNG, "/v.png": b"#EXTM3U\n", "/none": b"", "/bm": b"BM, plainly text" * 40}
    site.answer = lambda path: (200, {}, content[path]) if path in content else (404, {}, b"")
    base = f"http://{site.address}"
    monkeypatch.setattr(module, "_LOOK_S", 0.5)
    site.answer = lambda path: (
        None if path == "/late" else (200, {}, content[path]) if path in content else (404, {}, b"")
    )
    found = find_sources([f"{base}{path}" for path in ("/photo", "/v.png", "/none", "/gone.jpg", "/late", "/bm")])
    assert found.images == [f"{base}/photo"]
    assert len(found.videos) == 5
    assert find_sources([f"{base}/photo"]).single


def test_what_never_ends_is_only_looked_at(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A camera's stream of pictures: the start of it is read, and no more."""
    read: list[int] = []

    def seen(*args: Any, **options: Any) -> tuple[bytes, str]:
        content, place = fetch(*args, **options)
        read.append(len(content))
        return content, place

    monkeypatch.setattr("trt_runtime.media.web.fetch", seen)
    parts = b"--next\r\nContent-Type: image/jpeg\r\n\r\n" + bytes(1 << 20)
    site.answer = lambda path: (200, {"Content-Length": str(1 << 40)}, parts)
    assert find_sources([f"http://{site.address}/stream"]).images == []
    assert len(read) == 1
    assert 0 < read[0] <= 1 << 17


@pytest.mark.parametrize("challenge", ['Basic realm="x"', 'Digest realm="x", nonce="n"'])
def test_a_snapshot_is_read_with_its_password(challenge: str, site: Site) -> None:
    site.login, site.challenge = "me:geh:eim", challenge
    site.answer = lambda path: (200, {}, PNG)
    address = f"http://me:geh%3Aeim@{site.address}/snap"
    assert find_sources([address]).images == [address]
    np.testing.assert_array_equal(decode_image(read_source(address)), frame_of(3))
    with pytest.raises(ImageError, match=rf"^http://\*\*\*@{site.address}/snap: cannot be read \(HTTP Error 401"):
        read_source(f"http://me:wrong@{site.address}/snap")


def test_an_image_at_an_address_has_limits(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://{site.address}/photo"
    site.answer = lambda path: (200, {}, PNG)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", len(PNG))
    assert read_source(address) == PNG
    monkeypatch.setattr(module, "MAX_FILE_BYTES", len(PNG) - 1)
    with pytest.raises(ImageError, match=r"/photo: more than the limit of 0 MiB$"):
        read_source(address)
    site.answer = lambda path: None
    monkeypatch.setattr(module, "_FETCH_S", 0.3)
    with pytest.raises(ImageError, match=r"/photo: cannot be read \(timed out\)$"):
        read_source(address)


def test_redirections_lead_to_no_file(site: Site, here: Path) -> None:
    (here / "secret.png").write_bytes(PNG)
    site.answer = lambda path: (302, {"Location": f"file://{here}/secret.png"}, b"")
    address = f"http://{site.address}/photo"
    assert find_sources([address]).images == []
    with pytest.raises(ImageError, match="cannot be read"):
        read_source(address)
