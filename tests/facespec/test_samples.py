from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from facespec.errors import DataError
from facespec.images import read_image
from facespec.samples import sample_photographs, spread_frames, tiled


def test_the_photographs_are_there_and_can_be_read() -> None:
    found = sample_photographs()
    assert {path.name: faces for path, faces in found.items()} == {"astronaut.png": 1, "grace_hopper.jpg": 1}
    assert [path.name for path in found] == ["astronaut.png", "grace_hopper.jpg"]
    for path in found:
        assert min(read_image(path).shape[:2]) >= 500


def test_a_package_that_is_missing_or_without_the_file_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert [path.name for path in sample_photographs()] == ["grace_hopper.jpg"]
    monkeypatch.setattr("facespec.samples._PHOTOGRAPHS", (("pytest", "no/such.png", 1), ("skimage", "x", 1)))
    assert sample_photographs() == {}


def test_packages_are_not_imported_and_opencv_only_by_the_names_that_need_it() -> None:
    code = (
        "import sys, facespec; from facespec.samples import sample_photographs; assert sample_photographs(); "
        "print(*(m for m in ('skimage', 'matplotlib', 'cv2') if m in sys.modules)); "
        "print(facespec.Letterbox.__name__, facespec.Detections.__name__, facespec.LANDMARK_NAMES[0]); "
        "print(all(hasattr(facespec, name) for name in facespec.__all__), hasattr(facespec, 'no_such_name'))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.splitlines() == ["", "Letterbox Detections left_eye", "True False"]


def test_tiles_lie_row_by_row() -> None:
    tiles = [np.full((2, 3, 3), value, np.uint8) for value in range(6)]
    frame = tiled(tiles, 3)
    assert (frame.shape, frame.dtype) == ((4, 9, 3), np.uint8)
    assert frame[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_frames_of_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^--frames .*: no images in this folder$"):
        spread_frames(tmp_path, 3)
