from __future__ import annotations

import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from facespec.errors import ImageError
from facespec.images import find_images
from facespec.kinds import IMAGE_SUFFIXES, brands, image_kind, kind_of, list_files, model_kind, names_of, sidecar_path
from trt_runtime.media.files import VideoWriter

PICTURE = np.full((16, 16, 3), 90, np.uint8)


def _saved(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, kind)
    return buffer.getvalue()


def test_what_a_file_is_its_content_says(tmp_path: Path) -> None:
    kinds = {"JPEG": "JPEG", "PNG": "PNG", "BMP": "BMP", "WEBP": "WebP", "TIFF": "TIFF", "PPM": "PNM", "GIF": "GIF",
             "JPEG2000": "JPEG 2000", "AVIF": "AVIF"}  # fmt: skip
    for pillow, kind in kinds.items():
        data = _saved(pillow)
        assert image_kind(data[:512]) == kind
        for name in ("photo", "photo.mp4", "photo.dat"):
            (tmp_path / name).write_bytes(data)
            assert kind_of(tmp_path / name) == "image", (kind, name)
    for suffix, kind in ((".hdr", "Radiance"), (".ras", "Sun raster"), (".pam", "PNM")):
        picture = PICTURE / np.float32(255) if suffix == ".hdr" else PICTURE
        assert image_kind(cv2.imencode(suffix, picture)[1].tobytes()[:512]) == kind


def test_heic_and_avif_are_told_from_videos_by_their_brands() -> None:
    def start(*named: bytes) -> bytes:
        body = named[0] + bytes(4) + b"".join(named[1:])
        return (8 + len(body)).to_bytes(4, "big") + b"ftyp" + body + b"avifheic"  # what follows is no brand

    assert brands(start(b"isom", b"mp41")) == [b"isom", b"mp41"]
    for named, kind in (
        ((b"heic", b"mif1"), "HEIC"), ((b"mif1", b"heic"), "HEIC"), ((b"mif1", b"avif", b"miaf"), "AVIF"),
        ((b"avis", b"msf1"), "AVIF"), ((b"msf1", b"hevc"), "HEIC"), ((b"isom", b"avc1"), None), ((b"qt  ",), None),
        ((b"mp42", b"heic"), None), ((b"crx ",), "camera raw"),
    ):  # fmt: skip
        assert image_kind(start(*named)) == kind, named


def test_what_a_model_is_its_content_says_then_its_sidecar_then_its_name(tmp_path: Path) -> None:
    contents = {
        "engine": (b"ftrt\0\0", b"vtrt\0\0"),
        "checkpoint": (b"PK\3\4", b"\x80\x02}q"),
        "onnx": (b"\x08\x09\x12",),
    }
    for kind, starts in contents.items():
        for start in starts:
            for name in ("model", "model.bin", "model.trt" if kind == "engine" else "model.onnx"):
                (tmp_path / name).write_bytes(start)
                if (kind, name) != ("onnx", "model.onnx"):
                    assert model_kind(tmp_path / name) == kind, (start, name)
    for name, kind in (
        ("m.engine", "engine"), ("m.PLAN", "engine"), ("m.trt", "engine"), ("m.onnx", "onnx"), ("m.ONNX", "onnx"),
        ("m.pth", "checkpoint"), ("m.safetensors", "checkpoint"), ("m.bin", ""), ("m", ""),
    ):  # fmt: skip
        assert model_kind(tmp_path / name) == kind  # it is not there
        (tmp_path / name).write_bytes(b"of a later version")
        assert model_kind(str(tmp_path / name)) == kind
    for name in ("m", "m.bin", "m.pth", "m.onnx"):
        sidecar_path(tmp_path / name).write_text("{}")
        assert model_kind(tmp_path / name) == "engine"
    (tmp_path / "m.onnx").write_bytes(b"\x08\x09\x12")  # beside JSON of its name
    assert model_kind(tmp_path / "m.onnx") == "onnx"
    assert model_kind(tmp_path) == ""


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_videos_are_known_by_their_content(suffix: str, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / f"a{suffix}", 25) as writer:
        writer.write(PICTURE)
    for name in ("a", "a.jpg", "a.txt"):
        (tmp_path / f"a{suffix}").rename(tmp_path / name)
        assert kind_of(tmp_path / name) == "video"
        (tmp_path / name).rename(tmp_path / f"a{suffix}")


def test_pictures_in_a_row_are_a_video_unless_they_are_named_as_an_image(tmp_path: Path) -> None:
    jpeg = _saved("JPEG")
    for name, data, kind in (
        ("a.mjpeg", jpeg + jpeg, "video"), ("b", jpeg + jpeg, "video"), ("c.mjpeg", jpeg, "image"),
        ("d.jpg", jpeg + jpeg, "image"), ("e", _saved("MPO"), "image"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        assert kind_of(tmp_path / name) == kind, name


def test_the_name_counts_where_the_content_says_nothing(tmp_path: Path) -> None:
    for name, data, kind in (
        ("a.JPG", b"", "image"), ("b.heic", b"not one", "image"), ("c.MP4", b"", "video"), ("d.ts", b"let x = 1", ""),
        ("e.m4a", b"\0\0\0\x18ftypM4A " + bytes(90), ""), ("f", b"BMW", ""), ("g.txt", b"text", ""), ("h", b"", ""),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        assert kind_of(tmp_path / name) == kind, name
    assert kind_of(tmp_path / "none.png") == "image"


def test_every_file_of_a_folder_is_listed_once(tmp_path: Path) -> None:
    image, video = _saved("PNG"), b"\x1aE\xdf\xa3" + bytes(90)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.png").mkdir()
    for name, data in (
        ("z", image), ("b.png/Y.GIF", _saved("GIF")), ("m", video), ("b.png/k.mkv", video), ("notes.txt", b"x"),
        (".hidden/a.png", image), (".a.png", image), ("empty.png", b""),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
    (tmp_path / "gone.png").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe.png")
    listing = list_files(str(tmp_path))
    assert listing.images == [tmp_path / name for name in ("b.png/Y.GIF", "empty.png", "z")]
    assert listing.videos == [tmp_path / name for name in ("b.png/k.mkv", "m")]
    assert listing.others == [tmp_path / name for name in ("gone.png", "notes.txt", "pipe.png")]
    assert find_images(tmp_path) == listing.images
    with pytest.raises(ImageError, match="none: cannot be read"):
        list_files(tmp_path / "none")


def test_every_suffix_of_an_image_counts_when_the_file_is_damaged(tmp_path: Path) -> None:
    for suffix in IMAGE_SUFFIXES:
        (tmp_path / f"a{suffix}").touch()
    assert len(find_images(tmp_path)) == len(IMAGE_SUFFIXES) == len(set(IMAGE_SUFFIXES))


def test_what_is_no_image_is_told_where_that_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").write_bytes(_saved("PNG"))
    (tmp_path / "b.txt").write_text("text")
    assert find_images(tmp_path) == [tmp_path / "a"]
    assert caplog.messages == []
    assert find_images(tmp_path, tell=True) == [tmp_path / "a"]
    assert caplog.messages == [f"1 file was not taken, no images: {tmp_path / 'b.txt'}"]
    (tmp_path / "c.mkv").write_bytes(b"\x1aE\xdf\xa3")
    find_images(tmp_path, tell=True)
    assert caplog.messages[1] == f"2 files were not taken, no images: {tmp_path / 'b.txt'}, {tmp_path / 'c.mkv'}"


def test_a_long_list_is_cut_for_a_message() -> None:
    paths = [Path(f"{number}.txt") for number in range(7)]
    assert names_of(paths[:5]) == "0.txt, 1.txt, 2.txt, 3.txt, 4.txt"
    assert names_of(paths) == "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more"
    assert names_of(paths, 1) == "0.txt and 6 more"
