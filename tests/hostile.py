"""Images that a stranger may send to end a process, or to keep it busy."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def animation(filter_type: int) -> bytes:
    """An APNG of 56x40: a grey picture, then two frames of which the first names a filter of its rows."""
    first, spoilt = (zlib.compress((bytes([kind]) + bytes([9]) * 168) * 40) for kind in (0, filter_type))
    control = [png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", n, 56, 40, 0, 0, 0, 1, 0, 0)) for n in (1, 3)]
    frames = [png_chunk(b"fdAT", struct.pack(">I", number) + body) for number, body in ((2, spoilt), (4, first))]
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 56, 40, 8, 2, 0, 0, 0)) + png_chunk(
        b"acTL", struct.pack(">II", 3, 0)
    )
    body = png_chunk(b"IDAT", first) + control[0] + frames[0] + control[1] + frames[1] + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def jpeg_with_scans(side: int, scans: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), 77).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]
