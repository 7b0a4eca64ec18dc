"""What the sources of a command are: images and videos, in folders and patterns, too; and where their drawings go."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2

from facespec.addresses import hide_secrets, without_secrets
from facespec.cli import version
from facespec.errors import DataError, ImageError, OutputError, reason
from facespec.files import check_outputs
from facespec.images import IMAGE_SUFFIXES, MAX_FILE_BYTES, read_bytes
from facespec.kinds import HEAD, Listing, image_kind, kind_of, list_files
from trt_runtime.media.files import VIDEO_SUFFIXES

_LOOK_S = 5.0  # to find out what is at an address
_FETCH_S = 30.0


@dataclass
class Sources:
    """What the sources of a command come to.

    Attributes:
        images: Files and addresses of images, each once.
        videos: Video files, indices of cameras, and addresses, each once.
        others: Files of folders and patterns that are neither.
        single: One image or one video was named, rather than found.
    """

    images: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    single: bool = False


def find_sources(texts: Sequence[str]) -> Sources:
    """Return what a user names: images, videos, folders and patterns of both, cameras and addresses.

    An address of http or https is asked what is there.

    Raises:
        DataError: Nothing is there, or something live is named twice.
    """
    found = Sources(single=len(texts) == 1)
    web = list(dict.fromkeys(text for text in texts if is_web(text)))
    with ThreadPoolExecutor(16) as threads:
        images_there = dict(zip(web, threads.map(is_image, web), strict=True))
    named: list[str] = []
    for text in texts:
        listing = _list(text)
        if listing is not None:
            found.single = False
            found.images += map(str, listing.images)
            found.videos += map(str, listing.videos)
            found.others += listing.others
        elif images_there[text] if text in images_there else is_image(text):
            found.images.append(str(Path(text)) if "://" not in text else text)
        else:
            named.append(text)
            found.videos.append(text)
    places = Counter(re.sub("://.*@", "://***@", source, flags=re.DOTALL) for source in named)
    if places.total() > len(places):
        raise DataError(f"{shown(places.most_common(1)[0][0])} is given more than once")
    for name in ("images", "videos", "others"):
        setattr(found, name, list(dict.fromkeys(getattr(found, name))))
    return found


def _list(text: str) -> Listing | None:
    """Return the files of a folder or a pattern, None if the text is the source itself."""
    if not text:
        raise DataError("the source is empty: give a file, a folder, a glob, a webcam's index or an address")
    path = Path(text)
    if is_camera(text) or "://" in text or (path.exists() and not path.is_dir()):
        return None
    if path.is_dir():
        listing, where = list_files(path), f"{text}: no images in this folder, and no videos"
    elif glob.has_magic(text):
        listing, where = Listing(), f"{without_secrets(text)}: no image matches this pattern, and no video"
        found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
        entered = {parent for path in found for parent in path.parents}
        for path in found:
            if not path.is_dir():
                listing.add(path)
            elif path not in entered and (not os.access(path, os.R_OK) or any(path.iterdir())):
                listing.others.append(path)
    else:
        raise DataError(f"{without_secrets(text)}: no such file or folder")
    if not (listing.images or listing.videos):
        raise DataError(where)
    return listing


def is_camera(source: str) -> bool:
    """Whether a source is the index of a webcam."""
    return source.isdecimal() and not Path(source).exists()


def is_live(source: str) -> bool:
    """Whether a source is a camera or an address, rather than a file."""
    return "://" in source or is_camera(source)


def is_web(source: str) -> bool:
    """Whether a source is an address of http or https."""
    return source.lower().startswith(("http://", "https://"))


def is_image(source: str) -> bool:
    """Whether a source is an image; of an address what gives no answer counts as a video, whose errors say more."""
    if not is_web(source):
        return not is_live(source) and kind_of(source) == "image"
    from trt_runtime.media.web import fetch  # http and ssl are slow to import

    try:
        start, _ = fetch(source, timeout_s=_LOOK_S, most=HEAD, agent=_agent())
    except (OSError, ValueError):
        return False
    return image_kind(start[:HEAD]) is not None


def _agent() -> str:
    return f"retinaface-trt/{version()}"


def read_source(source: str) -> bytes:
    """Return the content of an image, a file or one at an address.

    Raises:
        ImageError: It cannot be read, or is too large.
    """
    if not is_web(source):
        return read_bytes(source)
    from trt_runtime.media.web import fetch

    name = without_secrets(source)
    try:
        content, _ = fetch(source, timeout_s=_FETCH_S, most=MAX_FILE_BYTES, agent=_agent())
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: cannot be read ({hide_secrets(reason(error))})") from None
    if len(content) > MAX_FILE_BYTES:
        raise ImageError(f"{name}: more than the limit of {MAX_FILE_BYTES >> 20} MiB")
    return content


def labels(sources: Iterable[str]) -> dict[str, str]:
    """Return each source as it may be shown: a camera as one, an address without passwords, numbered if need be."""
    found: dict[str, str] = {}
    for source in sources:
        name = shown(source)
        alike = (
            sum(label == name or label.startswith(f"{name} (") for label in found.values()) if is_live(source) else 0
        )
        found[source] = f"{name} ({alike + 1})" if alike else name
    return found


def shown(source: str) -> str:
    """Return a source as it may be shown."""
    if is_camera(source):
        return f"camera {source}"
    return source if "://" not in source and Path(source).exists() else without_secrets(source)


def targets(texts: Sequence[str], sources: Sequence[str], folder: Path, *, video: bool) -> dict[str, Path]:
    """Return where what is drawn on each source goes: files as they lie under their common folder, below `folder`."""
    files = {source: Path(os.path.abspath(source)) for source in sources if not is_live(source)}
    one_folder = len(texts) == 1 and Path(texts[0]).is_dir()
    parents = [path.parent for path in files.values()]
    common = os.path.abspath(texts[0]) if one_folder else os.path.commonpath(parents) if parents else ""
    found = {}
    for source, label in labels(sources).items():
        if source in files:
            name = files[source].relative_to(common)
        elif is_camera(source):
            name = Path(f"camera{source}")
        else:
            name = Path(re.sub(r"[^\w.-]+", "_", label.split("://")[1]).strip("_.")[:100] or "stream")
            name = name if not video else name.with_name(f"{name.name}.mp4")
        if video:
            found[source] = folder / name.with_suffix(".mp4")
        else:
            found[source] = folder / _as_written(name)
    return found


def _distinct(found: dict[str, Path]) -> dict[str, Path]:
    """Number what would get the name of another."""
    taken: set[Path] = set()
    for source, target in found.items():
        number, name = 1, target
        while name in taken:
            number += 1
            name = target.with_name(f"{target.stem}_{number}{target.suffix}")
        taken.add(name)
        found[source] = name
    return found


def _as_written(path: Path) -> Path:
    """Formats that hold colour keep their name, the others become PNG."""
    return path if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") else path.with_name(f"{path.name}.png")


def check_targets(
    texts: Sequence[str], sources: Sources, out: Path | None, json: str | None, model_files: Sequence[Path]
) -> dict[str, Path]:
    """Refuse before any work what could not be written or would destroy a file; return where what is drawn goes.

    Raises:
        OutputError: `out` does not fit the sources, or is one of the files that are read.
    """
    suffix = out.suffix.lower() if out else ""
    found: dict[str, Path] = {}
    if out is None:
        pass
    elif sources.single and sources.videos:
        if suffix not in VIDEO_SUFFIXES:
            raise OutputError(f"--out {out}: video is written as {', '.join(VIDEO_SUFFIXES)}")
        found = {sources.videos[0]: out}
    elif sources.single:
        if suffix not in IMAGE_SUFFIXES or not cv2.haveImageWriter(f"x{suffix}"):
            raise OutputError(f"--out {out}: for one image give a name that ends in .jpg or .png")
        found = {sources.images[0]: out}
    else:
        if out.is_file() or suffix in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
            raise OutputError(f"--out {out}: for several {'images' if sources.images else 'videos'} give a folder")
        for folder in filter(Path.is_dir, map(Path, texts)):
            if out.resolve().is_relative_to(folder.resolve()):
                raise OutputError(f"--out {out} lies in the source folder: choose one outside")
        found = targets(texts, sources.images, out, video=False)
        found = _distinct(found | targets(texts, sources.videos, out, video=True))
    files = [source for source in (*sources.images, *sources.videos) if "://" not in source]
    check_outputs([*(("--out", path) for path in found.values()), ("--json", json)], [*model_files, *files])
    return found
