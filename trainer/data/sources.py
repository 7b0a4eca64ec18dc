"""Finding a data set by the name or path that a command is given."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from facespec.errors import DataError
from facespec.files import widerface_root
from trainer.data.coco import read_coco
from trainer.data.dataset import Dataset
from trainer.data.synthetic import synthetic
from trainer.data.widerface import read_labels

WIDERFACE, SYNTHETIC = "widerface", "synthetic"

HELP = (
    "unpack WIDER FACE there (images and wider_face_split from its project page, shuoyang1213.me/WIDERFACE; label.txt "
    "with landmarks from the RetinaFace annotations), name its folder with --data or WIDERFACE_ROOT, or try "
    f"--data {SYNTHETIC}, which needs no download"
)

Split = Literal["train", "val"]


def open_dataset(name_or_path: str, split: Split = "train", root: Path | None = None) -> Dataset:
    """Open a data set.

    Images are expected in the folder `images` beside the label file or, where there is none, beside it.

    Args:
        name_or_path: "widerface", "synthetic", the path of a label.txt, of a WIDER FACE *_bbx_gt.txt or of a COCO
            .json, or a folder: of WIDER FACE or with a label.txt.
        split: "train" or "val". A file is what it is, whatever the split.
        root: Folder of WIDER FACE: with train/images and train/label.txt, or as its archives unpack: WIDER_train/images
            and wider_face_split. By default $WIDERFACE_ROOT, or data/widerface.

    Raises:
        DataError: There is no such data set, or it cannot be used.
    """
    if name_or_path == SYNTHETIC:
        return synthetic(split)
    if name_or_path == WIDERFACE:
        place = root or widerface_root()
        found = _find_widerface(place, split)
        if found is None:
            raise DataError(f"--data {WIDERFACE}: no labelled {split} images in {place}: {HELP}")
        return read_labels(*found, name=WIDERFACE)
    path = Path(name_or_path)
    if path.is_dir():
        found = _find_widerface(path, split)
        if found is None:
            raise DataError(f"--data {path}: no label.txt and no labelled {split} images of WIDER FACE in this folder")
        return read_labels(*found, name=str(path))
    if not path.is_file():
        raise DataError(f"--data {name_or_path}: no such file or folder, and not one of {WIDERFACE}, {SYNTHETIC}")
    images = _first_folder([path.parent / "images", path.parent])
    if path.suffix.lower() == ".json":
        return read_coco(path, images or path.parent)
    unpacked = path.parent.parent / f"WIDER_{'val' if '_val_' in path.name else 'train'}" / "images"
    if path.parent.name == "wider_face_split" and unpacked.is_dir():
        images = unpacked
    return read_labels(path, images or path.parent)


def _find_widerface(root: Path, split: Split) -> tuple[Path, Path] | None:
    """Return the label file of a split, that with landmarks if there is one, and the folder of its images."""
    official = f"wider_face_{split}_bbx_gt.txt"
    files = [root / split / "label.txt", root / split / official, root / "wider_face_split" / official]
    file = next((file for file in files if file.is_file()), None)
    images = _first_folder([root / split / "images", root / f"WIDER_{split}" / "images"])
    if file and images:
        return file, images
    if (root / "label.txt").is_file():
        return root / "label.txt", _first_folder([root / "images"]) or root
    return None


def _first_folder(places: Iterable[Path]) -> Path | None:
    return next((place for place in places if place.is_dir()), None)
