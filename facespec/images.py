"""Reading image files that may be damaged or hostile.

The size is read from the header before anything is decoded, so that a small file cannot demand gigabytes; a file that
ends early is refused, where cv2 would fill the rest with grey and say nothing.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from facespec.errors import ImageError
from facespec.files import atomic_path
from facespec.letterbox import Frame
from facespec.opencv import cv2

MAX_PIXELS = 64_000_000
"""Images with more pixels are refused."""

MAX_FILE_BYTES = 256 << 20
"""Larger files are refused before they are read."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")


MAX_PARTS = 100_000
"""Files with more segments (JPEG) or chunks (PNG) are refused."""

MAX_SCANNED_PIXELS = 1_280_000_000
"""Scans of a JPEG times its pixels, which count as a megapixel at least: each scan is a pass over the whole picture."""


# these return (width, height); they raise EOFError or struct.error where the data ends before the image does, and
# ValueError where it would take too long to decode
def _jpeg_size(data: bytes) -> tuple[int, int]:
    size = None
    for marker, start, end in _jpeg_segments(data, 2):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack_from(">HH", data, start + 3)
            size = width, height
        elif marker == 0xDA:  # start of scan: pixels follow, the end-of-image marker must come after them
            if size is None or data.rfind(b"\xff\xd9") < start:
                raise EOFError
            most = MAX_SCANNED_PIXELS // max(size[0] * size[1], 1_000_000)
            scans = 1 + sum(marker == 0xDA for marker, _, _ in _jpeg_segments(data, end))
            if scans > most:
                raise ValueError(f"has {scans} scans, of its size {most} are taken: save it again")
            return size
    raise EOFError


_JPEG_MARKER = re.compile(rb"\xff(?:([\x02-\xcf\xd8-\xfe])|(?<!\xff\xff)\xff{255})")


def _jpeg_segments(data: bytes, position: int) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of the segments up to the end of the image; pixels and fill bytes are passed over."""
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(data, position)
        if not found or found[1] == b"\xd9":
            return
        if not found[1]:
            raise ValueError("has a run of fill bytes: save it again")
        start = found.end()
        position = start + int.from_bytes(data[start : start + 2], "big")
        yield found[1][0], start, position
    raise ValueError(f"has more than {MAX_PARTS} segments: save it again")


def _png_size(data: bytes) -> tuple[int, int]:
    kind, width, height = struct.unpack_from(">4sII", data, 12)
    if kind != b"IHDR":
        raise EOFError
    return width, height


def _png_pixels(data: bytes) -> bytes:
    """Return a PNG with only the chunks that the first picture needs.

    OpenCV 5.0 crashes on damaged frames of an animation, and texts may unpack to a thousand times their size.
    """
    position, parts = 8, [data[:8]]
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise EOFError
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"):
            parts.append(data[position:end])
        if kind == b"IEND":
            return b"".join(parts)
        position = end
    raise ValueError(f"has more than {MAX_PARTS} chunks: save it again")


def _bmp_size(data: bytes) -> tuple[int, int]:
    start, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    if compression in (0, 3) and len(data) < start + (width * bits + 31) // 32 * 4 * abs(height):
        raise EOFError
    return width, abs(height)


def _webp_size(data: bytes) -> tuple[int, int]:
    if len(data) < 8 + struct.unpack_from("<I", data, 4)[0]:
        raise EOFError
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _tiff_size(data: bytes) -> tuple[int, int]:
    order = "<" if data[:2] == b"II" else ">"
    (offset,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, offset)
    tags: dict[int, int] = {}
    for index in range(entries):
        tag, kind, count = struct.unpack_from(order + "HHI", data, offset + 2 + 12 * index)
        if tag in (256, 257):
            if tag in tags or kind not in (3, 4) or count != 1:  # readers differ in what they make of these
                raise EOFError
            (tags[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, offset + 10 + 12 * index)
    return tags.get(256, 0), tags.get(257, 0)


_PNM_HEADER = re.compile(rb"P([1-6])(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})\s")
_PNM_MAXIMUM = re.compile(rb"(?:\s|#[^\n]*\n)*(\d{1,5})\s")


def _pnm_size(data: bytes) -> tuple[int, int]:
    match = _PNM_HEADER.match(data[:4096])
    if not match:
        raise EOFError
    kind, width, height = int(match[1]), int(match[2]), int(match[3])
    start, row = match.end(), width
    if kind == 4:
        row = (width + 7) // 8
    elif kind in (5, 6):
        maximum = _PNM_MAXIMUM.match(data, start, start + 4096)
        if not maximum:
            raise EOFError
        start = maximum.end()
        row = width * (3 if kind == 6 else 1) * (2 if int(maximum[1]) > 255 else 1)
    if len(data) < start + row * height:
        raise EOFError
    return width, height


_FORMATS = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG", _jpeg_size),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG", _png_size),
    (re.compile(rb"BM"), "BMP", _bmp_size),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP", _webp_size),
    (re.compile(rb"II\*\0|MM\0\*"), "TIFF", _tiff_size),
    (re.compile(rb"P[1-6]\s"), "PNM", _pnm_size),
)


def decode_image(data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS) -> Frame:
    """Decode an encoded image: JPEG, PNG, BMP, WebP, TIFF or PNM.

    Grey, CMYK and 16-bit images are converted, transparency is dropped and the EXIF orientation is applied. `name` is
    what the image is called in errors; one of more than `max_pixels` is refused before it is decoded.

    Returns:
        uint8 (H, W, 3) BGR.

    Raises:
        ImageError: Empty, of another format, truncated, damaged or too large.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    known = next(((kind, read_size) for magic, kind, read_size in _FORMATS if magic.match(data)), None)
    if known is None:
        raise ImageError(f"{name}: not a JPEG, PNG, BMP, WebP, TIFF or PNM image")
    kind, read_size = known
    try:
        width, height = read_size(data)
        if kind == "PNG":
            data = _png_pixels(data)
    except (EOFError, struct.error):
        raise ImageError(f"{name}: the {kind} file is truncated or damaged") from None
    except ValueError as error:
        raise ImageError(f"{name}: the {kind} file {error}") from None
    if width <= 0 or height <= 0:
        raise ImageError(f"{name}: the {kind} header gives no size ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}x{height} is more than {max_pixels / 1e6:g} megapixels; scale it down first")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise ImageError(f"{name}: cannot decode the {kind} file ({error.err})") from None
    if image is None or image.shape[0] * image.shape[1] > max_pixels:
        raise ImageError(f"{name}: the {kind} file is damaged")
    return np.asarray(image, np.uint8)


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Frame:
    """Read an image file; see `decode_image`.

    Raises:
        ImageError: Missing, not a regular file, unreadable, or refused by `decode_image`.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path}: not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(f"{path}: {status.st_size >> 20} MiB is more than the limit of {MAX_FILE_BYTES >> 20} MiB")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read ({error})") from None
    return decode_image(data, str(path), max_pixels)


def write_image(path: str | Path, image: Frame) -> None:
    """Write a BGR image atomically; the suffix gives the format.

    Raises:
        ImageError: A suffix cv2 cannot encode.
    """
    path = Path(path)
    try:
        written, data = cv2.imencode(path.suffix or "?", image)
    except cv2.error:
        written = False
    if not written:
        height, width = image.shape[:2]
        raise ImageError(f"{path}: {width}x{height} cannot be written as '{path.suffix}'; use .png or .jpg")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())


def find_images(folder: str | Path) -> list[Path]:
    """Return the image files in a folder and below it, sorted by path; hidden ones are left out.

    Raises:
        ImageError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ImageError(f"{error.filename}: cannot be read ({error.strerror})") from None

    found = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                found.append(path)
    return sorted(found)
