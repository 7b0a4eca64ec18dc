from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from facespec.errors import ImageError
from facespec.images import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    decode_image,
    find_images,
    holds_several,
    read_image,
    write_image,
)
from facespec.kinds import kind_of
from tests.heic import tiled_heic
from tests.hostile import animation, jpeg_with_scans, png_chunk


def _picture(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth BGR picture with a different colour in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 * (1 - x / width)], axis=2).astype(np.uint8)


def _pil(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(_picture()[..., ::-1].copy()).convert(mode)


def _save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


TO_LAB = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
LOSSLESS = {
    "png": _save(_pil(), "PNG"),
    "bmp": _save(_pil(), "BMP"),
    "tiff": _save(_pil(), "TIFF"),
    "ppm": _save(_pil(), "PPM"),
    "webp": _save(_pil(), "WEBP", lossless=True),
    "palette png": _save(_pil("P"), "PNG"),
}


@pytest.mark.parametrize("kind", [name for name in LOSSLESS if name != "palette png"])
def test_lossless_formats_come_back_exactly(kind: str) -> None:
    np.testing.assert_array_equal(decode_image(LOSSLESS[kind]), _picture())


@pytest.mark.parametrize(
    "data",
    [
        _save(_pil(), "JPEG", quality=95),
        _save(_pil(), "JPEG", quality=95, progressive=True),
        _save(_pil(), "WEBP", quality=95),
        _save(_pil("CMYK"), "JPEG", quality=95),
    ],
    ids=["jpeg", "progressive", "webp", "cmyk"],
)
def test_lossy_formats_come_back_nearly(data: bytes) -> None:
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[..., ::-1].astype(int)
    found = decode_image(data)
    assert found.shape == (48, 64, 3)
    assert np.abs(found.astype(int) - expected).mean() < 6


def test_grey_alpha_and_16_bit_become_bgr() -> None:
    grey = decode_image(_save(_pil("L"), "PNG"))
    assert grey.shape == (48, 64, 3)
    assert (grey[..., :1] == grey).all()
    np.testing.assert_array_equal(decode_image(_save(_pil("RGBA"), "PNG")), _picture())
    deep = cv2.imencode(".png", _picture().astype(np.uint16) * 257)[1].tobytes()
    found = decode_image(deep)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - _picture()).max() <= 1
    grey16 = decode_image(cv2.imencode(".png", np.full((5, 6), 40_000, np.uint16))[1].tobytes())
    assert grey16.shape == (5, 6, 3)
    assert abs(int(grey16[0, 0, 0]) - 156) <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _save(_pil(), kind, quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = np.asarray(upright.convert("RGB"))[..., ::-1].astype(int)
    found = decode_image(data)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("mode", ["P", "LAB"])
def test_palettes_and_lab_become_bgr(mode: str) -> None:
    image = _pil().quantize(256) if mode == "P" else ImageCms.applyTransform(_pil(), TO_LAB)
    expected = image.convert("RGB") if mode == "P" else _pil()
    found = decode_image(_save(image, "PNG" if mode == "P" else "TIFF"))
    # libtiff leaves white what it is by D50, which is warmer
    assert np.abs(found.astype(int) - np.asarray(expected)[..., ::-1]).mean() < (4 if mode == "P" else 16)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes(shape: tuple[int, int]) -> None:
    data = cv2.imencode(".png", np.full((*shape, 3), 9, np.uint8))[1].tobytes()
    assert decode_image(data).shape == (*shape, 3)


def _png_claiming(width: int, height: int, packed: bytes = zlib.compress(bytes(1000))) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", packed)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(_save(_pil(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _bmp_claiming(width: int, height: int) -> bytes:
    data = bytearray(_save(_pil(), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    data[30:34] = struct.pack("<I", 1)  # run-length coded: a short file may claim any size
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        _png_claiming(20_000, 20_000),
        _jpeg_claiming(20_000, 20_000),
        _bmp_claiming(20_000, 20_000),
        b"P6\n20000 20000\n255\n" + bytes(100),
        _save(_pil(), "TIFF").replace(struct.pack("<HHIHH", 256, 4, 1, 64, 0), struct.pack("<HHII", 256, 4, 1, 2**30)),
    ],
    ids=["png", "jpeg", "bmp", "ppm", "tiff"],
)
def test_400_megapixels_are_refused_from_the_header(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"megapixels|truncated"):
        decode_image(data)


def test_refusing_takes_no_memory(tmp_path: Path) -> None:
    """The pixels such a file claims would take 1.2 GB; the process that refuses it grows by a small part of that."""
    (tmp_path / "huge.png").write_bytes(_png_claiming(20_000, 20_000, zlib.compress(bytes(300_000_000), 1)))
    (tmp_path / "huge.jpg").write_bytes(_jpeg_claiming(20_000, 20_000))
    code = (
        "import resource, sys\nfrom facespec.images import *\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        read_image(name)\n    except ImageError:\n        print('refused')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "huge.png"), str(tmp_path / "huge.jpg")]
    root = Path(__file__).parents[2]
    result = subprocess.run(line, capture_output=True, text=True, check=True, cwd=root).stdout.split()
    assert result[:2] == ["refused", "refused"]
    assert int(result[2]) < 50_000  # KiB


def test_the_pixel_limit_is_a_setting() -> None:
    with pytest.raises(ImageError, match="64x48 is more than"):
        decode_image(LOSSLESS["png"], max_pixels=64 * 48 - 1)
    assert decode_image(LOSSLESS["png"], max_pixels=64 * 48).shape == (48, 64, 3)
    assert MAX_PIXELS == 64_000_000


def _tiff(entries: list[tuple[int, int, int, int]]) -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries, key=lambda entry: entry[0]))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(5000)


def _core_bmp() -> bytes:
    """BMP with the header of OS/2, 12 bytes, whose sizes have 16 bits."""
    rows = _picture()[::-1].tobytes()  # 64 * 3 bytes a row need no filling
    return b"BM" + struct.pack("<IHHI", 26 + len(rows), 0, 0, 26) + struct.pack("<IHHHH", 12, 64, 48, 1, 24) + rows


def _top_down_bmp() -> bytes:
    data = bytearray(LOSSLESS["bmp"])
    data[22:26] = struct.pack("<i", -48)
    data[54:] = _picture().tobytes()
    return bytes(data)


def _tables_first(data: bytes) -> bytes:
    """Move a JPEG's Huffman tables, arithmetic conditioning and fill bytes before its frame header."""
    start, position, tables = data.index(b"\xff\xc0"), data.index(b"\xff\xc4"), b""
    frame = data[start:position]
    while data[position : position + 2] == b"\xff\xc4":
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        tables += b"\xff" + data[position:end]
        position = end
    return data[:start] + tables + frame + data[position:]


def _pnm(kind: int, header: bytes = b"64 48", maximum: bytes = b" 255") -> bytes:
    picture = _picture()
    grey = picture[..., 0]
    samples = {2: grey, 3: picture[..., ::-1], 5: grey, 6: picture[..., ::-1]}.get(kind)
    if samples is None:  # of one bit
        bits = grey < 128
        body = b" ".join(b"%d" % bit for bit in bits.ravel()) if kind == 1 else np.packbits(bits, axis=1).tobytes()
        return b"P%d %s\n" % (kind, header) + body + b"\n" * (kind == 1)
    if kind in (2, 3):
        body = b" ".join(b"%d" % value for value in samples.ravel()) + b"\n"
    else:
        body = samples.astype(">u2" if maximum.endswith(b"65535") else np.uint8).tobytes()
    return b"P%d %s%s\n" % (kind, header, maximum) + body


EVERY_FORMAT = {
    **LOSSLESS,
    "jpeg": _save(_pil(), "JPEG"),
    "progressive jpeg": _save(_pil(), "JPEG", progressive=True),
    "grey jpeg": _save(_pil("L"), "JPEG"),
    "jpeg, tables first": _tables_first(_save(_pil(), "JPEG")),
    "jpeg with restarts": cv2.imencode(".jpg", _picture(), [cv2.IMWRITE_JPEG_RST_INTERVAL, 1])[1].tobytes(),
    "lossy webp": _save(_pil(), "WEBP"),
    "extended webp": _save(_pil(), "WEBP", icc_profile=bytes(128)),
    "bmp, short header": _core_bmp(),
    "bmp, top row first": _top_down_bmp(),
    "grey bmp": _save(_pil("L"), "BMP"),
    "compressed tiff": _save(_pil(), "TIFF", compression="tiff_lzw"),
    "big-endian tiff": _save(_pil(), "TIFF", big_endian=True),
    "p1": _pnm(1),
    "p2": _pnm(2),
    "p3": _pnm(3),
    "p4": _pnm(4),
    "p5": _pnm(5),
    "p6 with comments": _pnm(6, b"#a 1 2\n64 # b\n48", b"\n#c\n255"),
    "p6 of 16 bits": _pnm(6, maximum=b" 65535"),
    "p7": cv2.imencode(".pam", _picture())[1].tobytes(),
    "gif": _save(_pil(), "GIF"),
    "big tiff": _save(_pil(), "TIFF", big_tiff=True),
    "jpeg 2000": _save(_pil(), "JPEG2000"),
    "jpeg 2000 without boxes": _save(_pil(), "JPEG2000", no_jp2=True),
    "radiance": cv2.imencode(".hdr", (_picture() / 255).astype(np.float32))[1].tobytes(),
    "sun raster": cv2.imencode(".ras", _picture())[1].tobytes(),
    "avif": _save(_pil(), "AVIF", quality=95),
    "multi-picture jpeg": _save(_pil(), "MPO", save_all=True, append_images=[_pil("L").convert("RGB")]),
}


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_every_format_says_its_size_before_it_is_decoded(name: str) -> None:
    data = EVERY_FORMAT[name]
    assert decode_image(data, max_pixels=64 * 48).shape == (48, 64, 3)
    with pytest.raises(ImageError, match=r"^it: 64x48 is more than 0\.003071 megapixels; scale it down first$"):
        decode_image(data, "it", max_pixels=64 * 48 - 1)


def test_other_rows_and_headers_are_read_right() -> None:
    for name in ("bmp, short header", "bmp, top row first", "p3", "p6 with comments", "big-endian tiff", "big tiff",
                 "p7", "jpeg 2000", "jpeg 2000 without boxes", "sun raster"):  # fmt: skip
        np.testing.assert_array_equal(decode_image(EVERY_FORMAT[name]), _picture(), name)


def test_rows_of_a_bmp_end_on_four_bytes() -> None:
    """Also where its colours are described by masks."""
    data = bytearray(_save(Image.new("RGB", (5, 3), (1, 2, 3)), "BMP"))
    assert len(data) == 54 + 3 * 16
    for compression in (0, 3):
        data[30:34] = struct.pack("<I", compression)
        with pytest.raises(ImageError, match=r"^image: the BMP file is truncated or damaged$"):
            decode_image(bytes(data[:-1]))
    data[30:34] = bytes(4)
    assert decode_image(bytes(data)).shape == (3, 5, 3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
def test_the_size_of_a_tiff_in_either_order_and_width(order: str, kind: int) -> None:
    def entry(tag: int, value: int) -> bytes:
        return struct.pack(
            f"{order}HHI{'HH' if kind == 3 else 'I'}", tag, kind, 1, *([value, 0] if kind == 3 else [value])
        )

    head = b"II*\0" if order == "<" else b"MM\0*"
    data = head + struct.pack(f"{order}I4xH", 12, 3) + entry(254, 9) + entry(256, 300) + entry(257, 70_000 % 65_536)
    with pytest.raises(ImageError, match="300x4464 is more than"):
        decode_image(data, max_pixels=100)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (_png_claiming(0, 7), "PNG header gives no size (0x7)"),
        (_png_claiming(7, 0), "PNG header gives no size (7x0)"),
        (_jpeg_claiming(0, 7), "JPEG header gives no size (0x7)"),
        (_bmp_claiming(-64, 48), "BMP header gives no size (-64x48)"),
        (b"P5 0 8 255\n", "PNM header gives no size (0x8)"),
        (b"II*\0" + struct.pack("<IH", 8, 0) + bytes(99), "TIFF header gives no size (0x0)"),
    ],
)
def test_no_size_is_an_error(data: bytes, size: str) -> None:
    with pytest.raises(ImageError, match=re.escape(size)):
        decode_image(data)


JPEG = _save(Image.effect_noise((64, 48), 80).convert("RGB"), "JPEG")


@pytest.mark.parametrize("kind", ["png", "bmp", "ppm", "webp"])
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_truncated_files_are_refused(kind: str, keep: float) -> None:
    data = LOSSLESS[kind]
    with pytest.raises(ImageError):
        decode_image(data[: int(len(data) * keep)])


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.6, 0.95, 0.999])
def test_truncated_jpegs_are_refused(keep: float) -> None:
    with pytest.raises(ImageError, match="truncated"):
        decode_image(JPEG[: int(len(JPEG) * keep)])


def test_a_jpeg_thumbnail_does_not_hide_truncation() -> None:
    exif = b"Exif\0\0" + JPEG  # the thumbnail's end marker lies before the scan
    data = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + JPEG[2:]
    assert decode_image(data).shape == (48, 64, 3)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(data[:-20])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted({**EVERY_FORMAT, "jpeg": JPEG}.items())), st.data())
def test_any_damage_gives_an_image_or_an_image_error(item: tuple[str, bytes], data: st.DataObject) -> None:
    damaged = bytearray(item[1])
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, min(len(damaged) - 1, 400)))] = data.draw(st.integers(0, 255))
    try:
        found = decode_image(bytes(damaged), max_pixels=1_000_000)
    except ImageError:
        return
    assert found.dtype == np.uint8
    assert found.ndim == 3
    assert found.size <= 3_000_000


@given(st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"P5 "]))
def test_garbage_gives_an_image_or_an_image_error(garbage: bytes, magic: bytes) -> None:
    try:
        decode_image(magic + garbage)
    except ImageError:
        return


@pytest.mark.parametrize("data", [b"", b"BMW", b"<svg/>", bytes(1000)])
def test_other_formats_are_named(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"empty|not a JPEG"):
        decode_image(data)
    with pytest.raises(
        ImageError, match="^photo.jpg: the file is empty$" if not data else "^photo.jpg: not a JPEG, PNG"
    ):
        decode_image(data, "photo.jpg")


def _several(kind: str, count: int = 3, **options: object) -> bytes:
    pictures = [_pil(), *(Image.new("RGB", (64, 48), (40 * index, 9, 9)) for index in range(count - 1))]
    return _save(pictures[0], kind, save_all=True, append_images=pictures[1:], **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"big_tiff": True}), ("AVIF", {})],
)
def test_of_an_animation_the_first_picture_is_read_and_that_is_known(kind: str, options: dict[str, object]) -> None:
    data = _several(kind, **options)
    assert holds_several(data)
    first = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[..., ::-1].astype(int)
    assert np.abs(decode_image(data).astype(int) - first).mean() < 6
    assert not holds_several(_several(kind, 1, **options))


def test_what_follows_the_first_picture_of_a_gif_is_not_decoded() -> None:
    """Its damage neither hurts nor hides that there is more."""
    data = bytearray(_several("GIF"))
    first = decode_image(bytes(data))
    second = data.index(b",", data.index(b"!\xf9", 900))
    data[second + 10 :] = bytes(90)
    assert holds_several(bytes(data))
    np.testing.assert_array_equal(decode_image(bytes(data)), first)
    with pytest.raises(ImageError, match="the GIF file is truncated"):
        decode_image(bytes(data[:900]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_turned_as_it_says(orientation: int) -> None:
    """By its own properties, which hold rather than EXIF's; so Pillow reads it, too."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _save(_pil(), "AVIF", quality=95, exif=exif)
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    found = decode_image(data)
    assert found.shape == (*upright.size[::-1], 3)
    assert np.abs(found.astype(int) - np.asarray(upright)[..., ::-1]).mean() < 4
    assert upright.size == ((64, 48) if orientation < 5 else (48, 64))


def test_a_heic_without_its_package_is_named_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.jpg").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(100))
    with pytest.raises(
        ImageError, match=r"photo\.jpg: reading HEIC needs pillow_heif, .*'\.\[heif\]'; or save it as JPEG"
    ):
        read_image(tmp_path / "photo.jpg")


@pytest.fixture(scope="module")
def heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(_pil().resize((640, 480))).save(buffer, quality=95)
    return buffer.getvalue()


def test_a_heic_is_read(heic: bytes) -> None:
    expected = cv2.resize(_picture(), (640, 480), interpolation=cv2.INTER_CUBIC).astype(int)
    assert np.abs(decode_image(heic).astype(int) - expected).mean() < 4
    with pytest.raises(ImageError, match=r"^it: 640x480 is more than 0\.3 megapixels"):
        decode_image(heic, "it", max_pixels=300_000)
    for damaged in (heic[:300], heic[: len(heic) // 2], heic[:40] + bytes(len(heic) - 40)):
        with pytest.raises(ImageError, match="HEIC file is truncated or damaged"):
            decode_image(damaged)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_heic_of_tiles_is_put_together_and_turned(turns: int, tmp_path: Path) -> None:
    picture = np.asarray(cv2.resize(_picture(), (384, 256), interpolation=cv2.INTER_CUBIC), np.uint8)
    place = tmp_path / "photo.mov"
    place.write_bytes(tiled_heic(picture, 128, turns))
    assert kind_of(place) == "image"
    expected = np.rot90(picture, turns)
    found = read_image(place)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 4
    with pytest.raises(ImageError, match="HEIC file is truncated or damaged"):  # a tile of an unknown kind
        decode_image(place.read_bytes().replace(b"hvc1", b"hvc0", 1))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"), (b"v/1\x01" + bytes(90), "OpenEXR"),
        (b"8BPS" + bytes(90), "Photoshop"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(90), "camera raw"), (b"FUJIFILMCCD-RAW " + bytes(90), "camera raw"),
        (b"\0\0\0\x18ftypcrx " + bytes(90), "camera raw"),
    ],
)  # fmt: skip
def test_images_that_are_not_read_are_named(data: bytes, kind: str) -> None:
    with pytest.raises(ImageError, match=f"^x: {kind} images are not read: save it as JPEG or PNG$"):
        decode_image(data, "x")


@pytest.mark.parametrize("entry", [(254, 4, 1, 1), (50_706, 1, 4, 0x0401)])
def test_the_preview_in_a_raw_file_is_not_taken_for_the_photo(entry: tuple[int, int, int, int]) -> None:
    data = _tiff([entry, (256, 4, 1, 64), (257, 4, 1, 48)])
    with pytest.raises(ImageError, match="the TIFF file is a camera's raw file or begins with a preview"):
        decode_image(data)


def test_a_file_is_named_in_every_error_and_the_limits_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(LOSSLESS["png"])
    with pytest.raises(ImageError, match=re.escape(f"{path}: 64x48 is more")):
        read_image(path, max_pixels=100)
    with pytest.raises(ImageError, match="cannot be read"):
        read_image("a\0b.png")
    assert MAX_FILE_BYTES == 256 << 20
    monkeypatch.setattr("facespec.images.MAX_FILE_BYTES", len(LOSSLESS["png"]))
    assert read_image(str(path)).shape == (48, 64, 3)
    monkeypatch.setattr("facespec.images.MAX_FILE_BYTES", len(LOSSLESS["png"]) - 1)
    with pytest.raises(ImageError, match=re.escape(f"{path}: 0 MiB is more than the limit of 0 MiB")):
        read_image(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="not a file"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="not a file"):
        read_image(tmp_path / "pipe.jpg")
    (tmp_path / "huge.jpg").touch()
    os.truncate(tmp_path / "huge.jpg", 1 << 40)
    with pytest.raises(ImageError, match="1048576 MiB is more than the limit of 256 MiB"):
        read_image(tmp_path / "huge.jpg")


def test_write_and_find(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.JPG", ".hidden/d.png", "a/e.bmp"):
        write_image(tmp_path / name, _picture())
    (tmp_path / "notes.txt").write_text("x")
    assert [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)] == ["a/c.JPG", "a/e.bmp", "b.png"]
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), _picture())
    for name in ("f.txt", "f", "f.xyz"):
        with pytest.raises(ImageError, match="cannot be written"):
            write_image(tmp_path / name, _picture())
        assert not (tmp_path / name).exists()
    with pytest.raises(ImageError, match=r"g\.jpg: 70000x1 cannot be written as '\.jpg'; use \.png or \.jpg"):
        write_image(tmp_path / "g.jpg", np.zeros((1, 70_000, 3), np.uint8))


@pytest.mark.parametrize(
    "entries",
    [
        [(256, 4, 1, 12_000), (256, 4, 1, 12), (257, 4, 1, 12_000), (257, 4, 1, 12)],  # twice
        [(256, 16, 1, 500), (257, 16, 1, 500)],  # 64-bit values, elsewhere in the file
        [(256, 4, 2, 12), (257, 4, 1, 12)],  # two widths
    ],
)
def test_a_tiff_that_readers_understand_differently_is_refused(entries: list[tuple[int, int, int, int]]) -> None:
    with pytest.raises(ImageError, match="damaged"):
        decode_image(_tiff(entries))


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.99])
def test_truncated_tiffs_are_refused(keep: float) -> None:
    data = LOSSLESS["tiff"]
    with pytest.raises(ImageError):
        decode_image(data[: int(len(data) * keep)])


def test_short_pixel_data_is_noticed() -> None:
    """The header and the pixels of these formats are all there is: one byte less is a truncated file."""
    pnm = (b"P5 8 8 255\n" + bytes(64), b"P6 8 8 255\n" + bytes(192), b"P5 8 8 256\n" + bytes(128), _pnm(4))
    others = ("bmp", "bmp, short header", "grey bmp", "png", "webp", "lossy webp", "extended webp", "p6 of 16 bits")
    for data in (*pnm, b"P4 9 8\n" + bytes(16), *(EVERY_FORMAT[name] for name in others), JPEG.rstrip(b"\0")):
        assert decode_image(data).shape[2] == 3
        with pytest.raises(ImageError, match="truncated"):
            decode_image(data[:-1])


def _decode_apart(path: Path, seconds: float = 60) -> list[str]:
    """Read an image in a process of its own; return its shape or the error, and the processor seconds that took."""
    code = (
        "import sys, time\nfrom facespec.images import ImageError, read_image\nstart = time.process_time()\n"
        "try:\n    print(read_image(sys.argv[1]).shape)\nexcept ImageError as error:\n    print(error)\n"
        "print(time.process_time() - start)"
    )
    line = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=seconds, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr  # -11 is SIGSEGV
    return result.stdout.splitlines()


def test_an_animation_with_a_damaged_frame_gives_its_first_picture(tmp_path: Path) -> None:
    """OpenCV 5.0.0.93 ends the process on filter 9 of a later frame: 312 bytes."""
    (tmp_path / "a.png").write_bytes(animation(9))
    assert _decode_apart(tmp_path / "a.png")[0] == "(40, 56, 3)"
    for filter_type in (0, 9):
        np.testing.assert_array_equal(decode_image(animation(filter_type)), np.full((40, 56, 3), 9))


def test_texts_of_a_png_are_not_unpacked(tmp_path: Path) -> None:
    """Texts and profiles that unpack to 4 GB: libpng takes more than ten seconds for them."""
    packed = zlib.compress(bytes(7_900_000), 9)
    texts = b"".join(png_chunk(b"zTXt", b"k%d\0\0" % number + packed) for number in range(500))
    png = LOSSLESS["png"]
    (tmp_path / "texts.png").write_bytes(png[:33] + texts + png_chunk(b"iCCP", b"k\0\0" + packed) + png[33:])
    shape, seconds = _decode_apart(tmp_path / "texts.png")
    assert shape == "(48, 64, 3)"
    assert float(seconds) < 2


def test_what_a_picture_needs_of_a_png_is_kept() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(_save(_pil(), "PNG", exif=exif)).shape == (64, 48, 3)
    for mode in ("P", "RGBA", "LA", "L", "1", "I;16"):
        data = _save(_pil("L" if mode == "I;16" else mode).convert(mode), "PNG", icc_profile=bytes(999), dpi=(9, 9))
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(decode_image(data), expected, mode)
    transparent = _save(_pil("P"), "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(decode_image(transparent), decode_image(LOSSLESS["palette png"]))


@pytest.mark.parametrize(("side", "most"), [(64, 1280), (2000, 320)])
def test_scans_of_a_jpeg_are_counted_before_it_is_decoded(side: int, most: int) -> None:
    """A scan is a few bytes and a pass over all pixels: 800 of 64 megapixels took more than a minute."""
    assert decode_image(jpeg_with_scans(side, most)).shape == (side, side, 3)
    refusal = f"^it: the JPEG file has {most + 1} scans, of its size {most} are taken: save it again$"
    with pytest.raises(ImageError, match=refusal):
        decode_image(jpeg_with_scans(side, most + 1), "it")
    with pytest.raises(ImageError, match="has 1281 scans" if side == 64 else "has 321 scans"):
        decode_image(jpeg_with_scans(side, most + 1).replace(b"\xff\xda", b"\xff\xff\xff\xda"))  # after fill bytes


def test_bytes_like_those_of_a_scan_do_not_count() -> None:
    """They stand in segments, as in a thumbnail, and after the image, as in the film of a phone's photo."""
    like = b"\0\0" + b"\xff\xda\0\2" * 15_000
    comment = b"\xff\xfe" + struct.pack(">H", len(like) + 2) + like
    assert decode_image(JPEG[:2] + comment + JPEG[2:] + like).shape == (48, 64, 3)
    scans = jpeg_with_scans(64, 20)
    at = scans.rfind(b"\xff\xda")
    assert decode_image(scans[:at] + comment + scans[at:]).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"\xff" * (32 << 20), "has a run of fill bytes"),
        ((b"\xff" * 254 + b"\0") * (32 << 12), "truncated"),
        (b"\xff\xe0\0\2" * (8 << 20), "more than 100000 segments"),
        (b"\xff\xda\0\2" * (8 << 20), "truncated"),
        (b"\0" * (32 << 20), "truncated"),
    ],
    ids=["fill bytes", "runs", "empty segments", "scans alone", "zeros"],
)
def test_the_header_of_a_jpeg_is_read_in_time(head: bytes, message: str) -> None:
    """32 MB of fill bytes took 17 s. Five seconds are ten times what the slowest of these takes."""
    start = time.process_time()
    with pytest.raises(ImageError, match=message):
        decode_image(b"\xff\xd8\xff" + head)
    assert time.process_time() - start < 5


def test_a_png_has_no_end_of_chunks() -> None:
    png = LOSSLESS["png"]
    assert decode_image(png[:33] + png_chunk(b"abCd", b"") * 99_000 + png[33:]).shape == (48, 64, 3)
    with pytest.raises(ImageError, match=r"^it: the PNG file has more than 100000 chunks: save it again$"):
        decode_image(png[:33] + png_chunk(b"abCd", b"") * 100_000 + png[33:], "it")


def test_a_tiff_may_not_hold_a_jpeg_of_many_scans() -> None:
    """It takes one strip; libtiff would take a hundred scans, seven seconds of 64 megapixels."""

    def tiff(strip: bytes) -> bytes:
        entries = [
            (256, 64),
            (257, 64),
            (258, 8),
            (259, 7),
            (262, 1),
            (273, 200),
            (277, 1),
            (278, 64),
            (279, len(strip)),
        ]
        body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
        head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + body
        return head + bytes(200 - len(head)) + strip

    assert decode_image(tiff(_save(Image.new("L", (64, 64), 77), "JPEG"))).shape == (64, 64, 3)
    for scans in (6, 50):
        with pytest.raises(ImageError, match="the TIFF file is damaged"):
            decode_image(tiff(jpeg_with_scans(64, scans)))


@pytest.mark.parametrize("offset", [64, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_tiff_whose_directory_lies_far_away(offset: int) -> None:
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", offset)
    with pytest.raises(ImageError, match="TIFF file is truncated or damaged"):
        decode_image(head + bytes(16))


def test_what_is_packed_after_the_rows_of_a_png_is_not_unpacked(tmp_path: Path) -> None:
    """4 MB unpack to 4 GB behind a picture of 64x48: OpenCV alone takes half a minute."""
    pack = zlib.compressobj(9)
    packed = b"".join(pack.compress(bytes(1 << 24)) for _ in range(256)) + pack.flush()
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")
    (tmp_path / "rows.png").write_bytes(data)
    shape, seconds = _decode_apart(tmp_path / "rows.png")
    assert shape == "(48, 64, 3)"
    assert float(seconds) < 2


def _interlaced(picture: np.ndarray) -> bytes:
    """Return a PNG whose rows come in seven passes, in chunks of 50 bytes."""
    rows = b""
    for x, y, step_x, step_y in zip((0, 4, 0, 2, 0, 1, 0), (0, 0, 4, 0, 2, 0, 1), (8, 8, 4, 4, 2, 2, 1),
                                    (8, 8, 8, 4, 4, 2, 2), strict=True):  # fmt: skip
        part = picture[y::step_y, x::step_x, ::-1]
        rows += b"".join(b"\0" + row.tobytes() for row in part if row.size)
    packed = zlib.compress(rows)
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", picture.shape[1], picture.shape[0], 8, 2, 0, 0, 1))
    chunks = b"".join(png_chunk(b"IDAT", packed[at : at + 50]) for at in range(0, len(packed), 50))
    return b"\x89PNG\r\n\x1a\n" + head + chunks + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(48, 64), (1, 1), (3, 5), (9, 2)])
def test_rows_that_are_unpacked_first_give_the_same_picture(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    photo = Image.fromarray(noise[..., ::-1])
    files = [_interlaced(noise), *(_save(photo.convert(mode), "PNG") for mode in ("RGB", "L", "P", "RGBA", "LA", "1"))]
    files += [cv2.imencode(".png", noise.astype(np.uint16) * 257)[1].tobytes()]
    expected = [decode_image(data) for data in files]
    np.testing.assert_array_equal(expected[0], noise)
    monkeypatch.setattr("facespec.images.MAX_PACKED_ROWS", 0)
    for data, picture in zip(files, expected, strict=True):
        np.testing.assert_array_equal(decode_image(data), picture)
        end = data.rindex(b"IEND") - 9  # of their checksum
        with pytest.raises(ImageError, match="damaged"):
            decode_image(data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :])
        at = data.rindex(b"IDAT") + 6  # within the packed rows
        with pytest.raises(ImageError, match="damaged"):
            decode_image(data[:at] + bytes([data[at] ^ 0x55, data[at + 1] ^ 0xFF]) + data[at + 2 :])


@pytest.mark.parametrize("side", [0, 48])
@pytest.mark.parametrize(("tile", "message"), [((16, 16), ""), ((2048, 2048), ""), ((32, 6_160_400), "tiles of 32x6")])
def test_tiles_of_a_tiff_are_not_much_larger_than_it(tile: tuple[int, int], message: str, side: int) -> None:
    """libtiff makes room for one: 18 KB took a gigabyte, and ten seconds."""
    size = (48, 48 + side)
    tiles = size[0] * size[1] // 256
    entries = [(256, size[1]), (257, size[0]), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile[0]), (323, tile[1])]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    after = 8 + 2 + 12 * 10 + 4
    body += (
        struct.pack("<HHII", 324, 4, tiles, after) + struct.pack("<HHII", 325, 4, tiles, after + 4 * tiles) + bytes(4)
    )
    places = struct.pack(f"<{tiles}I", *[after + 8 * tiles] * tiles)
    packed = zlib.compress(bytes([7]) * 256)  # one serves for all
    pixels = struct.pack(f"<{tiles}I", *[len(packed)] * tiles) + packed
    data = b"II*\0" + struct.pack("<IH", 8, 10) + body + places + pixels
    if not message:
        found = decode_image(data)
        assert found.shape == (*size, 3)
        assert tile != (16, 16) or (found == 7).all()
        return
    with pytest.raises(ImageError, match=message):
        decode_image(data)
