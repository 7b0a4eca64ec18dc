"""HEIC photos as telephones write them, of the HEVC that libheif makes."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from facespec.letterbox import Frame


def box(kind: bytes, *parts: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)


def full(kind: bytes, version: int, *parts: bytes) -> bytes:
    return box(kind, bytes([version, 0, 0, 0]), *parts)


def _parts_of_heic(picture: Frame) -> tuple[bytes, bytes]:
    """Return configuration and data of the one picture in a HEIC that libheif writes."""
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(picture[..., ::-1])).save(buffer, quality=95)
    data = buffer.getvalue()
    start = data.index(b"hvcC") - 4
    (size,) = struct.unpack_from(">I", data, start)
    return data[start : start + size], data[data.index(b"mdat") + 4 :]


def tiled_heic(picture: Frame, tile: int, turns: int) -> bytes:
    """Return a HEIC as telephones write it: tiles, an item that puts them together, and how it is turned."""
    height, width = picture.shape[:2]
    rows, columns = height // tile, width // tile
    corners = [(row * tile, column * tile) for row in range(rows) for column in range(columns)]
    parts = [_parts_of_heic(np.ascontiguousarray(picture[y : y + tile, x : x + tile])) for y, x in corners]
    count, last = len(parts), len(parts) + 1
    grid = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)
    items = [box(b"infe", bytes([2, 0, 0, 1]), struct.pack(">HH4s", i + 1, 0, b"hvc1"), b"\0") for i in range(count)]
    items.append(full(b"infe", 2, struct.pack(">HH4s", last, 0, b"grid"), b"\0"))
    sizes = [full(b"ispe", 0, struct.pack(">II", *size)) for size in ((tile, tile), (width, height))]
    owners = b"".join(struct.pack(">HBBB", i + 1, 2, 0x81, 2) for i in range(count))
    owners += struct.pack(">HBBB", last, 2, 3, 0x84)
    properties = box(b"ipco", parts[0][0], *sizes, box(b"irot", bytes([turns])))
    kind = box(b"ftyp", b"heic\0\0\0\0mif1heic")

    def meta(base: int) -> bytes:
        places = b""
        for index, (_, data) in enumerate(parts):
            places += struct.pack(">HHHHII", index + 1, 0, 0, 1, base, len(data))
            base += len(data)
        places += struct.pack(">HHHHII", last, 1, 0, 1, 0, len(grid))
        return full(
            b"meta", 0, full(b"hdlr", 0, struct.pack(">I4s12x", 0, b"pict"), b"\0"),
            full(b"pitm", 0, struct.pack(">H", last)),
            full(b"iloc", 1, struct.pack(">BBH", 0x44, 0, last), places),
            full(b"iinf", 0, struct.pack(">H", last), *items),
            full(b"iref", 0, box(b"dimg", struct.pack(f">HH{count}H", last, count, *range(1, last)))),
            box(b"iprp", properties, full(b"ipma", 0, struct.pack(">I", last), owners)), box(b"idat", grid),
        )  # fmt: skip

    return kind + meta(len(kind) + len(meta(0)) + 8) + box(b"mdat", *(data for _, data in parts))
