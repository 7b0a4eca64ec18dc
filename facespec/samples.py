"""Sample photographs that installed packages ship, and frames made of them: real faces, without a download.

What reads images is imported where it is used: naming the photographs needs no OpenCV.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from facespec.errors import DataError

if TYPE_CHECKING:
    from facespec.letterbox import Frame

_PHOTOGRAPHS = (  # package, path inside it, number of faces; both are in the public domain
    ("skimage", "data/astronaut.png", 1),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", 1),
)


def sample_photographs() -> dict[Path, int]:
    """Return the sample photographs found, each with the number of faces a person sees in it.

    Packages are located, not imported.
    """
    found = {}
    for package, inside, faces in _PHOTOGRAPHS:
        spec = find_spec(package)
        if spec and spec.origin and (path := Path(spec.origin).parent / inside).is_file():
            found[path] = faces
    return found


def sample_frames() -> dict[str, Frame]:
    """Return the sample photographs found by file name, each uint8 (H, W, 3) BGR."""
    from facespec.images import read_image

    return {path.name: read_image(path) for path in sample_photographs()}


def sample_crops(count: int, seed: int) -> Iterator[tuple[str, Frame]]:
    """Yield square crops of the sample photographs in turn, with their names, at several scales and brightnesses.

    Every other one is mirrored.

    Raises:
        DataError: No installed package ships photographs.
    """
    from facespec.opencv import cv2

    photographs = list(sample_frames().items())
    if not photographs:
        raise DataError("--calib demo: no sample photographs: pip install -e '.[demo]'")
    rng = np.random.default_rng(seed)
    for index in range(count):
        name, image = photographs[index % len(photographs)]
        side = rng.uniform(0.35, 1.0) * min(image.shape[:2])
        top, left = (rng.uniform(0, length - side) for length in image.shape[:2])
        rows, columns = (slice(int(start), int(start + side)) for start in (top, left))
        crop = cv2.convertScaleAbs(image[rows, columns], alpha=rng.uniform(0.6, 1.3), beta=rng.uniform(-30, 30))
        yield f"{name} #{index}", np.ascontiguousarray(crop[:, ::-1] if index % 2 else crop)


def spread_frames(folder: Path, count: int) -> list[Frame]:
    """Return `count` images of a folder, evenly spread over it; if it has fewer, some come several times.

    Raises:
        DataError: There are no images in it.
        ImageError: One of them cannot be read.
    """
    from facespec.images import find_images, read_image

    paths = find_images(folder, tell=True)
    if not paths:
        raise DataError(f"--frames {folder}: no images in this folder")
    return [read_image(paths[index]) for index in np.linspace(0, len(paths) - 1, count).astype(int)]


def tiled(tiles: Sequence[Frame], columns: int) -> Frame:
    """Return one frame of tiles of the same size, row by row; the last row must be full."""
    rows = [np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    return np.asarray(np.vstack(rows), np.uint8)
