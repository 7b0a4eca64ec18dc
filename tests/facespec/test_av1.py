"""Sizes in AV1 data against what encoders were given, and files that say less than they hold."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, features

from facespec import images
from facespec.av1 import frame_sizes, pictures
from facespec.errors import ImageError
from facespec.images import decode_image
from facespec.letterbox import Frame
from tests.heic import box, full

pytestmark = pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")


def _noise(height: int, width: int, channels: int = 3) -> Frame:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def _avif(picture: Frame, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "AVIF", **options)
    return buffer.getvalue()


def _sizes(data: bytes) -> list[list[tuple[int, int]]]:
    return [list(frame_sizes(picture)) for picture in pictures(data)]


@pytest.mark.parametrize("size_hw", [(1, 1), (17, 33), (480, 640), (600, 64)])
def test_the_sizes_are_those_that_were_encoded(size_hw: tuple[int, int]) -> None:
    picture, size = _noise(*size_hw), size_hw[::-1]
    for options in ({}, {"subsampling": "4:4:4", "quality": 95}, {"speed": 10, "tile_rows": 1, "tile_cols": 1}):
        assert _sizes(_avif(picture, **options)) == [[size]]
    assert _sizes(_avif(_noise(*size_hw, 4))) == [[size], [size]]  # transparency is a picture of its own
    moving = _avif(picture, save_all=True, append_images=[Image.fromarray(picture[::-1])] * 2)
    assert _sizes(moving) == [[size], [size]]  # an item and the first frame of the track
    if cv2.haveImageWriter(".avif"):
        assert _sizes(cv2.imencode(".avif", picture)[1].tobytes()) == [[size]]


@pytest.mark.usefixtures("usual_priority")
@pytest.mark.parametrize("encoder", ["libaom-av1", "libsvtav1", "librav1e"])
def test_the_frames_of_a_video_are_counted_whatever_its_headers_say(encoder: str) -> None:
    av = pytest.importorskip("av")
    if encoder not in av.codecs_available:
        pytest.skip(f"this PyAV has no {encoder}")
    options = {"cpu-used": "8"} if encoder == "libaom-av1" else {"preset": "12"} if encoder == "libsvtav1" else {}
    codec = av.CodecContext.create(encoder, "w")
    codec.width, codec.height, codec.pix_fmt, codec.options = 320, 192, "yuv420p", options
    codec.time_base = Fraction(1, 25)
    packets = []
    for number in range(12):
        frame = av.VideoFrame.from_ndarray(np.roll(_noise(192, 320), number, 1), format="rgb24")
        frame.pts = number
        packets += codec.encode(frame.reformat(format="yuv420p"))
    packets += codec.encode(None)
    found = list(frame_sizes(b"".join(map(bytes, packets))))
    decoder = av.CodecContext.create("libdav1d", "r")
    shown = sum(len(decoder.decode(packet)) for packet in [*packets, None])
    coded = [size for size in found if size != (0, 0)]
    assert shown == 12 <= len(found)
    assert set(coded) == {(320, 192)}


class _Written:
    """Writes the bits of headers, as section 5 of the specification has them."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, *fields: tuple[int, int]) -> _Written:
        self.text += "".join(f"{value:0{count}b}" for value, count in fields)
        return self

    def unit(self, kind: int) -> bytes:
        padded = self.text + "1" + "0" * (-(len(self.text) + 1) % 8)
        body = int(padded, 2).to_bytes(len(padded) // 8, "big")
        return bytes([kind << 3 | 2, len(body)]) + body


def test_a_frame_of_a_size_of_its_own_counts_as_the_largest_there_is() -> None:
    sequence = _Written()
    sequence((0, 3), (1, 1), (0, 1))  # profile, still picture, not reduced
    sequence((1, 1), (1, 32), (25, 32), (1, 1), (0b00101, 5))  # timing, of equal intervals, ticks as uvlc
    sequence((1, 1), (7, 5), (1, 32), (9, 5), (9, 5))  # a model of the decoder
    sequence((1, 1), (1, 5))  # display delays, two operating points
    sequence((3, 12), (8, 5), (1, 1), (1, 1), (99, 8), (98, 8), (1, 1), (1, 1), (5, 4))
    sequence((1, 12), (7, 5), (0, 1), (0, 1))
    sequence((9, 4), (8, 4), (63, 10), (47, 9))  # 64x48, of 10 and 9 bits
    sequence((1, 1), (4, 4), (2, 3))  # numbers of frames have 9 bits
    sequence((0, 3), (0, 4), (1, 1), (0, 2))  # tools, order hints
    sequence((1, 1), (1, 1))  # screen content and whole motion, as each frame says

    def frame(own: int, kind: int = 0, shown: int = 1) -> bytes:
        header = _Written()((0, 1), (kind, 2), (shown, 1))  # the intervals are equal: no time follows
        if not shown:
            header((1, 1))
        if kind or not shown:
            header((1, 1))
        header((0, 1), (1, 1), (1, 1), (300, 9))
        if kind != 3:
            header((own, 1))
        return header.unit(3)

    start = sequence.unit(1)
    assert list(frame_sizes(start + frame(0))) == [(64, 48)]
    assert list(frame_sizes(start + frame(1))) == [(1024, 512)]
    assert list(frame_sizes(start + frame(0, 2) + frame(1, 2) + frame(0, 0, 0) + frame(1, 1, 0))) == [
        (64, 48), (1024, 512), (64, 48), (1024, 512),
    ]  # fmt: skip
    assert list(frame_sizes(start + frame(0, 3))) == [(1024, 512)]  # of another resolution
    assert list(frame_sizes(start + _Written()((1, 1), (3, 3)).unit(3))) == [(0, 0)]  # shows what is there
    assert list(frame_sizes(frame(0))) == []  # before any sequence, nothing is decoded
    for data in (start[:-1], start + frame(0)[:-1], b"\x0a", b"\x0a" + b"\xff" * 9):
        with pytest.raises(EOFError):
            list(frame_sizes(data))
    with pytest.raises(ValueError, match="has more than 100000 units"):
        list(frame_sizes(b"\x12\0" * 100_001))


def _said_smaller(data: bytes, size: tuple[int, int]) -> bytes:
    said = b"ispe" + bytes(4) + struct.pack(">II", *size)
    assert said in data
    return data.replace(said, b"ispe" + bytes(4) + struct.pack(">II", 64, 64))


def test_an_avif_that_is_larger_than_it_says_is_refused_before_it_is_decoded() -> None:
    data = _said_smaller(_avif(_noise(480, 640)), (640, 480))
    with pytest.raises(ImageError, match=r"^it: 640x480 is more than 0\.3 megapixels"):
        decode_image(data, "it", max_pixels=300_000)
    moving = _avif(_noise(480, 640), save_all=True, append_images=[Image.fromarray(_noise(480, 640))])
    moving = _said_smaller(moving, (640, 480))
    with pytest.raises(ImageError, match=r"^it: 640x480 is more than 0\.3 megapixels"):
        decode_image(moving, "it", max_pixels=300_000)


def test_all_pictures_of_an_avif_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _avif(_noise(480, 640, 4))
    assert decode_image(data).shape == (480, 640, 3)
    monkeypatch.setattr(images, "MAX_AVIF_PIXELS", 2 * 640 * 480)
    decode_image(data)
    monkeypatch.setattr(images, "MAX_AVIF_PIXELS", 2 * 640 * 480 - 1)
    with pytest.raises(ImageError, match=r"the AVIF file has 1 megapixels in 2 pictures: save it again"):
        decode_image(data)


def test_data_that_is_named_again_and_again_is_refused() -> None:
    """As a grid of tiles may do that are all the same: a small file would be read for hours."""

    def file(items: int, method: int = 0) -> bytes:
        entries = [full(b"infe", 2, struct.pack(">HH4s", item, 0, b"av01"), b"\0") for item in range(items)]
        entries.append(full(b"infe", 2, struct.pack(">HH4s", items, 0, b"Exif"), b"\0"))
        # from the start up to the end, whatever that is
        places = b"".join(struct.pack(">HHHHII", item, method, 0, 1, 0, 0) for item in range(items + 1))
        iloc = full(b"iloc", 1, struct.pack(">BBH", 0x44, 0, items + 1), places)
        return full(b"meta", 0, full(b"iinf", 0, struct.pack(">H", items + 1), *entries), iloc, box(b"idat", b"\x12\0"))

    for items in (0, 1, 2):
        assert list(pictures(file(items))) == [file(items)] * items
    assert list(pictures(file(3, method=1))) == [b"\x12\0"] * 3
    with pytest.raises(ValueError, match="names its data more than once: save it again"):
        list(pictures(file(3)))
