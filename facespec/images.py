"""Reading image files that may be damaged or hostile.

The size is read from the header before anything is decoded, so that a small file cannot demand gigabytes; a file that
ends early is refused, where cv2 would fill the rest with grey and say nothing.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from facespec.av1 import MAX_PARTS, boxes, frame_sizes, pictures
from facespec.cli import require
from facespec.errors import ImageError, MissingPackageError, reason
from facespec.files import atomic_path
from facespec.kinds import HEAD, brands, image_kind, list_files, names_of
from facespec.kinds import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from facespec.letterbox import Frame
from facespec.log import get_logger
from facespec.opencv import cv2

_log = get_logger("images")

MAX_PIXELS = 64_000_000
"""Images with more pixels are refused."""

MAX_FILE_BYTES = 256 << 20
"""Larger files are refused before they are read."""

MAX_PACKED_ROWS = 1 << 19
"""Bytes of the packed rows of a PNG that libpng may unpack to the end, at most a thousand times as much."""

MAX_SCANNED_PIXELS = 1_280_000_000
"""Scans of a JPEG times its pixels, which count as a megapixel at least: each scan is a pass over the whole picture."""

MAX_AVIF_PIXELS = 4 * MAX_PIXELS
"""Pixels of all pictures that an AVIF is put together of, its tiles and their transparency for instance."""

TIFF_SCANS = "5"
"""At this scan of a JPEG in a TIFF libtiff gives up; the JPEGs that TIFF allows have one, or one for each channel."""


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
    position, parts, rows = 8, [data[:8]], list[bytes]()
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise EOFError
        if kind == b"IDAT":
            rows.append(data[position:end])
        elif kind in (b"IHDR", b"PLTE", b"tRNS", b"eXIf"):
            parts.append(data[position:end])
        elif kind == b"IEND":
            if sum(map(len, rows)) > MAX_PACKED_ROWS:
                rows = _png_rows(data, rows)
            return b"".join([*parts, *rows, data[position:end]])
        position = end
    raise ValueError(f"has more than {MAX_PARTS} chunks: save it again")


def _gif_pixels(data: bytes) -> tuple[bytes, bool]:
    """Return a GIF with its first picture alone, and whether there are more."""
    position = 13 + _gif_colours(data[10])
    end = 0
    for _ in range(MAX_PARTS):
        kind = data[position : position + 1]
        if end and kind != b"!":  # an extension
            return data[:end] + b";", kind == b","
        if kind == b",":
            position += 11 + _gif_colours(data[position + 9])
        elif kind == b"!":
            position += 2
        else:
            raise EOFError
        while length := data[position]:
            position += 1 + length
        position += 1
        end = end or position * (kind == b",")
    raise ValueError(f"has more than {MAX_PARTS} parts: save it again")


def _gif_colours(flags: int) -> int:
    return 3 << 1 + (flags & 7) if flags & 0x80 else 0


def _gif_size(data: bytes) -> tuple[int, int]:
    return struct.unpack_from("<HH", data, 6)


def _png_rows(data: bytes, chunks: list[bytes]) -> list[bytes]:
    """Return the rows of a PNG in chunks that are not packed, without what is packed after them: libpng reads it all.

    Raises:
        EOFError: They are damaged, or there are not all of them.
    """
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * {2: 3, 4: 2, 6: 4}.get(color, 1)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    left = 0
    for x, y, step_x, step_y in passes if interlaced else ((0, 0, 1, 1),):
        columns, lines = -((x - width) // step_x), -((y - height) // step_y)
        left += lines * (1 + (columns * bits + 7) // 8) if columns > 0 and lines > 0 else 0
    unpack, pack, made = zlib.decompressobj(), zlib.compressobj(0), list[bytes]()

    def keep(body: bytes) -> None:
        if body:
            made.append(struct.pack(">I4s", len(body), b"IDAT") + body + struct.pack(">I", zlib.crc32(b"IDAT" + body)))

    try:
        for chunk in chunks:
            packed = chunk[8:-4]
            while packed and left:
                piece = unpack.decompress(packed, min(left, 1 << 20))
                packed = unpack.unconsumed_tail
                left -= len(piece)
                keep(pack.compress(piece))
            if not left and not unpack.eof:
                unpack.decompress(packed, 1)  # to the checksum, where there is no more
    except zlib.error:
        raise EOFError from None
    if left:
        raise EOFError
    keep(pack.flush())
    return made


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


def _tiff_directory(data: bytes) -> tuple[dict[int, int], int]:
    """Return the tags of a TIFF's first picture that hold one number, and where its second one is, 0 for nowhere."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    width, number = (8, "Q") if big else (4, "I")
    (offset,) = struct.unpack_from(order + number, data, 8 if big else 4)
    if offset > len(data):  # it may have 64 bits, which Python refuses as a place
        raise EOFError
    (entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, offset)
    if entries > 65_535:
        raise EOFError
    start, size = offset + (8 if big else 2), 4 + 2 * width
    kinds = {1: "B", 3: "H", 4: "I", 16: "Q"}
    tags: dict[int, int] = {}
    for place in range(start, start + size * entries, size):
        tag, kind, count = struct.unpack_from(order + "HH" + number, data, place)
        single = count == 1 and kind in kinds and (kind != 16 or big)
        if tag in (256, 257, 322, 323) and (
            tag in tags or not single or kind == 1
        ):  # readers differ in what they make of these
            raise EOFError
        if single or tag == _DNG_VERSION:
            (tags[tag],) = struct.unpack_from(order + (kinds[kind] if single else "I"), data, place + 4 + width)
    try:
        (following,) = struct.unpack_from(order + number, data, start + size * entries)
    except struct.error:
        following = 0
    return tags, following


_SUBFILE_TYPE, _DNG_VERSION = 254, 50_706


def _tiff_size(data: bytes) -> tuple[int, int]:
    tags, _ = _tiff_directory(data)
    if _DNG_VERSION in tags or tags.get(_SUBFILE_TYPE, 0) == 1:  # what readers show first is a small preview
        raise ValueError(_RAW)
    width, height, tile_width, tile_height = (tags.get(tag, 0) for tag in (256, 257, 322, 323))
    if tile_width * tile_height > 2 * width * height + (1 << 22):  # libtiff makes room for one
        raise ValueError(f"has tiles of {tile_width}x{tile_height}, larger than the image: save it again")
    return width, height


_RAW = "is a camera's raw file or begins with a preview: save it as JPEG"


def _jpeg2000_size(data: bytes) -> tuple[int, int]:
    start = 0
    if data[:1] == b"\0":
        start = next((start for kind, start, _ in boxes(data, 0, len(data)) if kind == b"jp2c"), len(data))
    marks, right, bottom, left, top = struct.unpack_from(">I4xIIII", data, start)
    (components,) = struct.unpack_from(">H", data, start + 40)
    if marks != 0xFF4FFF51 or components > 4:
        raise EOFError
    return right - left, bottom - top


_RADIANCE_SIZE = re.compile(rb"\n\n-Y (\d{1,9}) \+X (\d{1,9})\n")


def _radiance_size(data: bytes) -> tuple[int, int]:
    found = _RADIANCE_SIZE.search(data, 0, 65_536)
    if not found:
        raise EOFError
    return int(found[2]), int(found[1])


def _sun_size(data: bytes) -> tuple[int, int]:
    return struct.unpack_from(">II", data, 4)


def _avif_properties(data: bytes) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """Return the properties of all pictures of an AVIF file, and in order those of the one that is shown."""
    place = next((box[1:] for box in boxes(data, 0, len(data)) if box[0] == b"meta"), None)
    if place is None:
        raise EOFError
    meta = {kind: (start, stop) for kind, start, stop in boxes(data, place[0] + 4, place[1])}
    if not {b"pitm", b"iprp"} <= meta.keys():
        raise EOFError
    start = meta[b"pitm"][0]
    (primary,) = struct.unpack_from(">I" if data[start] else ">H", data, start + 4)
    parts = {kind: (start, stop) for kind, start, stop in boxes(data, *meta[b"iprp"])}
    if not {b"ipco", b"ipma"} <= parts.keys():
        raise EOFError
    properties = [(kind, data[start:stop]) for kind, start, stop in boxes(data, *parts[b"ipco"])]
    start, stop = parts[b"ipma"]
    version, wide = data[start], data[start + 3] & 1
    (items,) = struct.unpack_from(">I", data, start + 4)
    place_of = start + 8
    own = []
    for _ in range(min(items, stop - start)):
        (item,) = struct.unpack_from(">I" if version else ">H", data, place_of)
        place_of += 4 if version else 2
        count = data[place_of]
        place_of += 1
        for _ in range(count):
            index = int.from_bytes(data[place_of : place_of + 1 + wide], "big") & (0x7FFF if wide else 0x7F)
            place_of += 1 + wide
            if item == primary and 0 < index <= len(properties):
                own.append(properties[index - 1])
    return properties, own


def _avif_size(data: bytes) -> tuple[int, int]:
    sizes = [struct.unpack_from(">II", body, 4) for kind, body in _avif_properties(data)[0] if kind == b"ispe"]
    if not sizes:
        raise EOFError
    frames = [size for part in pictures(data) for size in frame_sizes(part)]  # which may be larger
    if (total := sum(width * height for width, height in frames)) > MAX_AVIF_PIXELS:
        raise ValueError(f"has {total / 1e6:.0f} megapixels in {len(frames)} pictures: save it again")
    width, height = max((*sizes, *frames), key=lambda size: size[0] * size[1])
    return int(width), int(height)


def _as_shown(image: Frame, data: bytes) -> Frame:
    """Turn and mirror the picture of an AVIF as the file says; OpenCV leaves that out."""
    for kind, body in _avif_properties(data)[1]:
        if kind == b"irot":
            image = np.rot90(image, body[0] & 3)  # against the clock
        elif kind == b"imir":
            image = image[:, ::-1] if body[0] & 1 else image[::-1]
    return np.ascontiguousarray(image)


_PNM_HEADER = re.compile(rb"P([1-6])(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})\s")
_PNM_MAXIMUM = re.compile(rb"(?:\s|#[^\n]*\n)*(\d{1,5})\s")


def _pam_size(data: bytes) -> tuple[int, int]:
    head, mark, _ = data[:4096].partition(b"\nENDHDR\n")
    values = dict(re.findall(rb"^(WIDTH|HEIGHT|DEPTH|MAXVAL) +(\d{1,9})\s*$", head, re.MULTILINE))
    if not mark or len(values) < 4:
        raise EOFError
    width, height, depth, most = (int(values[name]) for name in (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL"))
    if depth > 4 or len(data) < len(head) + 8 + width * height * depth * (1 + (most > 255)):
        raise EOFError
    return width, height


def _pnm_size(data: bytes) -> tuple[int, int]:
    if data[1:2] == b"7":
        return _pam_size(data)
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


_SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "JPEG": _jpeg_size,
    "PNG": _png_size,
    "BMP": _bmp_size,
    "WebP": _webp_size,
    "TIFF": _tiff_size,
    "PNM": _pnm_size,
    "GIF": _gif_size,
    "JPEG 2000": _jpeg2000_size,
    "Radiance": _radiance_size,
    "Sun raster": _sun_size,
    "AVIF": _avif_size,
}
"""What OpenCV decodes."""


def decode_image(data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS) -> Frame:
    """Decode an encoded image: JPEG, PNG, BMP, WebP, TIFF, PNM, GIF, JPEG 2000, AVIF, HEIC and what else OpenCV reads.

    Grey, CMYK and 16-bit images are converted, transparency is dropped and the orientation that the file asks for is
    applied. Of several pictures, as an animation has them, it is the first. `name` is what the image is called in
    errors; one of more than `max_pixels` is refused before it is decoded. HEIC needs the package pillow-heif.

    Returns:
        uint8 (H, W, 3) BGR.

    Raises:
        ImageError: Empty, of another format, truncated, damaged or too large; or the package that reads it is missing.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    kind = image_kind(data[:HEAD])
    if kind is None:
        raise ImageError(f"{name}: not a JPEG, PNG, BMP, WebP, TIFF, PNM, GIF, HEIC or AVIF image, nor of a kind known")
    if kind == "HEIC":
        return _decode_heic(data, name, max_pixels)
    if kind not in _SIZES:
        raise ImageError(f"{name}: {kind} images are not read: save it as JPEG or PNG")
    try:
        width, height = _SIZES[kind](data)
        pixels = data
        if kind == "GIF":
            pixels = _gif_pixels(data)[0]
        elif kind == "PNG" and 0 < width * height <= max_pixels:
            pixels = _png_pixels(data)
    except (EOFError, IndexError, struct.error):
        raise ImageError(f"{name}: the {kind} file is truncated or damaged") from None
    except ValueError as error:
        raise ImageError(f"{name}: the {kind} file {error}") from None
    _check_pixels(width, height, kind, name, max_pixels)
    if kind == "TIFF":  # a strip may be a JPEG of any number of scans; libtiff asks this for each
        os.environ.setdefault("LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER", TIFF_SCANS)
    flags = cv2.IMREAD_COLOR | (cv2.IMREAD_IGNORE_ORIENTATION if kind == "AVIF" else 0)
    try:
        image = cv2.imdecode(np.frombuffer(pixels, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"{name}: cannot decode the {kind} file ({error.err})") from None
    if image is None and kind == "AVIF" and not cv2.haveImageWriter(".avif"):
        raise ImageError(f"{name}: this OpenCV reads no AVIF: pip install -U opencv-python, or save it as JPEG")
    if image is None or image.shape[0] * image.shape[1] > max_pixels:
        raise ImageError(f"{name}: the {kind} file is damaged")
    pixels_bgr = np.asarray(image, np.uint8)
    return _as_shown(pixels_bgr, data) if kind == "AVIF" else pixels_bgr


def _check_pixels(width: int, height: int, kind: str, name: str, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise ImageError(f"{name}: the {kind} header gives no size ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width}x{height} is more than {max_pixels / 1e6:g} megapixels; scale it down first")


def _decode_heic(data: bytes, name: str, max_pixels: int) -> Frame:
    """Return the picture of a HEIC file, put together from its tiles and upright."""
    try:
        pillow_heif = require("pillow_heif", "heif", f"{name}: reading HEIC")
    except MissingPackageError as error:
        raise ImageError(f"{error}; or save it as JPEG") from None
    try:
        file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
        width, height = file.size
        _check_pixels(width, height, "HEIC", name, max_pixels)
        pixels = np.asarray(file)
    except (ValueError, RuntimeError, OSError, EOFError, SyntaxError, LookupError) as error:
        raise ImageError(f"{name}: the HEIC file is truncated or damaged ({reason(error)})") from None
    if pixels.dtype != np.uint8 or pixels.size > 4 * max_pixels:
        raise ImageError(f"{name}: the HEIC file is damaged")
    if pixels.ndim == 2:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR), np.uint8)
    return np.ascontiguousarray(pixels[..., 2::-1])


def holds_several(data: bytes) -> bool:
    """Whether an image has several pictures, frames or pages, of which `decode_image` has read the first."""
    kind = image_kind(data[:HEAD])
    if kind == "PNG":
        control = data.find(b"acTL", 0, data.find(b"IDAT"))
        return control > 0 and int.from_bytes(data[control + 4 : control + 8], "big") > 1
    if kind == "WebP":
        return data[12:16] == b"VP8X" and bool(data[20] & 2)
    if kind == "GIF":
        return _gif_pixels(data)[1]
    if kind == "TIFF":
        return _tiff_directory(data)[1] > 0
    return kind in ("AVIF", "HEIC") and brands(data[:HEAD])[0] in (b"avis", b"hevc", b"hevx", b"msf1")


def read_bytes(path: str | Path) -> bytes:
    """Return the content of an image file, for `decode_image`.

    Raises:
        ImageError: Missing, not a regular file, unreadable, or larger than `MAX_FILE_BYTES`.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path}: not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(f"{path}: {status.st_size >> 20} MiB is more than the limit of {MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read ({error})") from None


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Frame:
    """Read an image file; see `decode_image`.

    Raises:
        ImageError: Missing, not a regular file, unreadable, or refused by `decode_image`.
    """
    return decode_image(read_bytes(path), str(path), max_pixels)


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


def find_images(folder: str | Path, *, tell: bool = False) -> list[Path]:
    """Return the files in a folder and below it that are images, sorted by path; see `facespec.kinds`.

    `tell` names the others in the log: what should have been an image must not be missed in silence.

    Raises:
        ImageError: A folder cannot be read.
    """
    listing = list_files(folder)
    others = sorted(listing.videos + listing.others)
    if tell and others:
        count = f"{len(others)} file{'s were' if len(others) > 1 else ' was'}"
        _log.warning("%s not taken, no images: %s", count, names_of(others))
    return listing.images
