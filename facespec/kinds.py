"""What a file is, by how it begins: image, video, or a kind of model.

Its name counts only where the content says nothing, as of a damaged file.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from facespec.errors import ImageError
from facespec.spec import CHECKPOINT_SUFFIXES, ENGINE_SUFFIXES

HEAD = 512
"""Bytes of the start of a file that say what it is."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
    *(".pnm", ".pam", ".gif", ".jp2", ".j2k", ".mpo", ".hdr", ".pic", ".ras", ".sr", ".avif", ".heic", ".heif"),
)
"""Names of image files, in lower case."""

MOVIE_SUFFIXES = (".mp4", ".mkv", ".mov", ".m4v", ".avi", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".m2ts")

_IMAGES = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("BMP", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"),
    ("WebP", rb"RIFF....WEBP"),
    ("camera raw", rb"II\*\0....CR|FUJIFILMCCD-RAW|II[RU][OS\0]|....ftypcrx "),
    ("TIFF", rb"II[*+]\0|MM\0[*+]"),
    ("PNM", rb"P[1-6]\s|P7\n"),
    ("GIF", rb"GIF8[79]a"),
    ("JPEG 2000", rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    ("Radiance", rb"#\?R(ADIANCE|GBE)\n"),
    ("Sun raster", rb"\x59\xa6\x6a\x95"),
    ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    ("OpenEXR", rb"v/1\x01"),
    ("Photoshop", rb"8BPS"),
)
_IMAGE = re.compile(b"|".join(b"(%s)" % pattern.replace(b"(", b"(?:") for _, pattern in _IMAGES), re.DOTALL)
_VIDEO = re.compile(
    rb"....(?:ftyp|moov|mdat|wide|free|skip|pnot)"  # MP4, MOV, 3GP
    rb"|\x1aE\xdf\xa3"  # Matroska, WebM
    rb"|RIFF....AVI |FLV\x01|OggS|DKIF|\.RMF|\x06\x0e\x2b\x34|\x30\x26\xb2\x75\x8e\x66\xcf\x11|\x1f\x07\0"
    rb"|\0\0\x01[\xba\xb3]|\0\0\0?\x01[\x09\x27\x47\x67\x40\x42\x44\x46]"  # MPEG, H.264 and HEVC without a container
    rb"|\x47.{187}\x47|.{4}\x47.{191}\x47",  # MPEG-TS, as broadcast and as on a disc
    re.DOTALL,
)
RTX_MAGIC, TENSORRT_MAGIC = b"vtrt", b"ftrt"
"""How engines of TensorRT-RTX begin, and those of TensorRT."""

_MODELS = {
    "engine": (RTX_MAGIC, TENSORRT_MAGIC),
    "checkpoint": (b"PK\3\4", b"\x80\x02"),
    "onnx": (b"\x08",),  # the first field of a ModelProto
}
_MODEL_SUFFIXES = {"engine": ENGINE_SUFFIXES, "checkpoint": CHECKPOINT_SUFFIXES, "onnx": (".onnx",)}

_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AVIF = {b"avif", b"avis"}
_HEIF = {b"mif1", b"mif2", b"msf1", b"miaf"}  # of either: the other brands say which
_SOUND = {b"M4A ", b"M4B ", b"M4P "}


def brands(start: bytes) -> list[bytes]:
    """Return what a file of the MP4 family says it is, the most telling first; nothing for any other."""
    if start[4:8] != b"ftyp":
        return []
    end = min(int.from_bytes(start[:4], "big"), len(start))
    return [start[8:12], *(start[place : place + 4] for place in range(16, end - 3, 4))]


def heif_kind(named: list[bytes]) -> str | None:
    """Return "HEIC" or "AVIF" for files of such `brands`, None for others."""
    if named and (named[0] in _AVIF or (named[0] in _HEIF and _AVIF.intersection(named))):
        return "AVIF"
    return "HEIC" if named and named[0] in _HEIC | _HEIF else None


def image_kind(start: bytes) -> str | None:
    """Return the kind of image that begins like this, "JPEG" for instance, or None if it is no image.

    HEIC and AVIF are told from the videos that begin as they do.
    """
    if kind := heif_kind(brands(start)):
        return kind
    found = _IMAGE.match(start)
    return _IMAGES[found.lastindex - 1][0] if found and found.lastindex else None


def kind_of(path: str | Path) -> str:
    """Return "image", "video" or, of a file that is neither, ""."""
    path = Path(path)
    suffix = path.suffix.lower()
    start, kind = b"", None
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:  # a pipe may never end
            start = file.read(HEAD)
            kind = image_kind(start)
            if kind == "JPEG" and suffix not in IMAGE_SUFFIXES and _is_motion_jpeg(start + file.read(1 << 20)):
                return "video"
    except OSError:
        pass
    if kind:
        return "image"
    if _VIDEO.match(start) and not _SOUND.intersection(brands(start)[:1]):
        return "video"
    return "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in MOVIE_SUFFIXES else ""


def _is_motion_jpeg(start: bytes) -> bool:
    """Whether one JPEG follows another, without the index that files of several pictures have."""
    return b"\xff\xd9\xff\xd8\xff" in start and b"MPF\0" not in start


def model_kind(path: str | Path) -> str:
    """Return what a model file is: "engine", "checkpoint", "onnx" or, where nothing tells, "".

    How it begins counts most if that is telling, then the sidecar of an engine beside it, then its name. Of a file that
    is not there the name alone counts.
    """
    path = Path(path)
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            start = file.read(4)
    except OSError:
        start = b""
    begins = next((kind for kind, magic in _MODELS.items() if start.startswith(magic)), "")
    if begins in ("engine", "checkpoint"):
        return begins
    if not begins and sidecar_path(path).is_file():
        return "engine"
    suffix = path.suffix.lower()
    return next((kind for kind, suffixes in _MODEL_SUFFIXES.items() if suffix in suffixes), begins)


def sidecar_path(engine: str | Path) -> Path:
    """Return the path of an engine's sidecar."""
    return Path(f"{engine}.json")


@dataclass
class Listing:
    """The files of a folder or a pattern, each list sorted.

    Attributes:
        images: Those that are images.
        videos: Those that are videos.
        others: Those that are neither.
    """

    images: list[Path] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    def add(self, path: Path) -> None:
        """Put a file where it belongs."""
        kind = kind_of(path) if path.is_file() else ""
        {"image": self.images, "video": self.videos}.get(kind, self.others).append(path)


def list_files(folder: str | Path) -> Listing:
    """Return the files in a folder and below it; hidden ones are left out.

    Raises:
        ImageError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ImageError(f"{error.filename}: cannot be read ({error.strerror})") from None

    found = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    listing = Listing()
    for path in sorted(found):
        listing.add(path)
    return listing


def names_of(paths: list[Path], most: int = 5) -> str:
    """Return the names of some files for a message: so many of them, and how many more there are."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(str(path) for path in paths[:most]) + more
