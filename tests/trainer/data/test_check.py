from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from facespec.errors import DataError
from facespec.images import read_image, write_image
from facespec.letterbox import Frame
from trainer.data import AugmentSettings, Dataset, FileSample, Report, TrainingSet, check_data, open_dataset, synthetic
from trainer.data.check import TILE_PX, TILES, contact_sheet, find_damaged, replace_damaged
from trainer.data.dataset import Faces, Kind

KNOWN = "40 40 0 60 40 0 50 50 0 42 60 0 58 60 0 1"


def _is_there(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(axis=-1).any())


def test_problems_that_only_the_images_show(tmp_path: Path) -> None:
    lines = ["# a.png", f"30 30 40 40 {KNOWN}", "90 10 40 20", "5 5 0 5", "# b.png", "1 1 20 20", "# c.png"]
    (tmp_path / "label.txt").write_text("\n".join(lines))
    for name in "abc":
        write_image(tmp_path / f"{name}.png", np.full((100, 100, 3), 77, np.uint8))
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-30])
    dataset = open_dataset(str(tmp_path))
    report = check_data(dataset, tmp_path / "out" / "data.png", size=64)
    assert report.counts() == {Kind.NO_AREA: 1, Kind.DAMAGED_IMAGE: 1, Kind.CLIPPED: 1}
    assert (report.images, report.background, report.faces, report.with_landmarks) == (2, 1, 2, 1)
    where = {problem.kind: problem.place for problem in report.problems}
    assert where[Kind.NO_AREA].endswith("label.txt:4")
    assert where[Kind.CLIPPED].endswith("label.txt:3")
    assert where[Kind.DAMAGED_IMAGE].endswith("b.png")
    assert all("\n" not in str(problem) for problem in report.problems)
    assert len(report.problems) == 3
    assert report.summary().splitlines()[0] == "2 images (1 without faces), 2 faces (1 with landmarks)"
    assert dataset.report.counts() == {Kind.NO_AREA: 1}  # as it was
    picture = read_image(tmp_path / "out" / "data.png")
    assert picture.shape[:2] == (TILES[0] * TILE_PX + 32, TILES[1] * TILE_PX)


def test_where_no_image_can_be_read_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "label.txt").write_text("# a.png\n1 1 5 5\n")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of its 1 images can be read.*a\.png"):
        check_data(open_dataset(str(tmp_path)), tmp_path / "data.png")
    assert not (tmp_path / "data.png").exists()


def test_the_picture_shows_sides_and_unknown_landmarks() -> None:
    box = np.array([[80, 80, 240, 240]], np.float32)
    points = np.array([[(110, 120), (210, 120), (160, 160), (120, 200), (200, 200)]], np.float32)
    image = np.zeros((TILE_PX, TILE_PX, 3), np.uint8)
    known = contact_sheet([(image, Faces(box, points, np.ones(1, bool)))])[:TILE_PX, :TILE_PX]
    red, blue, yellow, green, orange = (60, 60, 255), (255, 120, 40), (0, 230, 255), (80, 220, 60), (0, 140, 255)
    for (x, y), colour in zip(points[0].astype(int), (red, blue, yellow, red, blue), strict=True):
        assert tuple(known[y, x]) == colour
    assert tuple(known[80, 100]) == green
    assert not _is_there(known, orange)
    unknown = contact_sheet([(image, Faces(box, points * 0, np.zeros(1, bool)))])[:TILE_PX, :TILE_PX]
    assert tuple(unknown[80, 100]) == orange
    assert not any(_is_there(unknown, colour) for colour in (red, blue, yellow, green))


def test_synthetic_data_passes_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "IMAGES", {"train": 9, "val": 30})
    dataset = open_dataset("synthetic", "val")
    report = check_data(dataset, tmp_path / "data.png", 160, AugmentSettings.original(), seed=1)
    assert report.problems == []
    assert report.faces == dataset.report.faces


@dataclasses.dataclass(frozen=True)
class Shade:
    """An image of one shade of grey, with a face; or one that cannot be read."""

    shade: int
    size_hw: tuple[int, int] = (48, 64)

    @property
    def name(self) -> str:
        return f"shade {self.shade}"

    def load(self) -> tuple[Frame, Faces]:
        if not self.shade:
            raise DataError("shade 0: damaged")
        box = np.array([[8, 8, 40, 40]], np.float32)
        image = np.full((*self.size_hw, 3), self.shade, np.uint8)
        return image, Faces(box, np.zeros((1, 5, 2), np.float32), np.zeros(1, bool))


def test_the_picture_shows_what_is_trained_of_images_spread_over_the_set(tmp_path: Path) -> None:
    dataset = Dataset("shades", [Shade(number) for number in range(0, 250, 5)], Report())
    settings = AugmentSettings(flip=1.0, hue=0)
    for given, seed, used in ((settings, 3, settings), (None, 0, AugmentSettings())):
        report = check_data(dataset, tmp_path / "data.png", 96, given, seed)
        assert (report.images, report.faces) == (49, 49)
        assert report.counts() == {Kind.DAMAGED_IMAGE: 1}
        views = TrainingSet(dataset, 96, used, seed)
        shown = [1 + int(index) for index in np.linspace(0, 48, 24)]  # the first cannot be read
        np.testing.assert_array_equal(read_image(tmp_path / "data.png"), contact_sheet([views[i] for i in shown]))


def test_tiles_lie_in_rows_scaled_with_their_faces_and_the_rest_is_empty() -> None:
    def tile(shade: int) -> tuple[Frame, Faces]:
        box = np.array([[20, 40, 80, 120]], np.float32)
        points = np.array([[(30, 60), (70, 60), (50, 80), (30, 100), (70, 100)]], np.float32)
        return np.full((160, 160, 3), shade, np.uint8), Faces(box, points, np.ones(1, bool))

    shades = list(range(10, 90, 10))
    sheet = contact_sheet([tile(shade) for shade in shades])
    assert sheet.shape == (4 * 320 + 32, 6 * 320, 3)
    for index, shade in enumerate(shades):
        row, column = divmod(index, 6)
        part = sheet[row * 320 : (row + 1) * 320, column * 320 : (column + 1) * 320]
        assert (part[200, 200] == shade).all()
        assert (part[[0, 0, 319, 319], [0, 319, 0, 319]] == 40).all()  # a border
        for x, y in ((40, 200), (160, 200), (100, 80), (100, 240)):  # twice as large as it was
            assert tuple(part[y, x]) == (80, 220, 60)
        assert tuple(part[120, 60]) == (60, 60, 255)
        assert tuple(part[120, 60 + 4]) == (60, 60, 255)  # the radius is a thirtieth of the width
        assert tuple(part[120, 60 + 6]) == (shade, shade, shade)
    assert (sheet[640:1280] == 40).all()
    legend = sheet[1280:]
    colours = ((80, 220, 60), (0, 140, 255), (60, 60, 255), (255, 120, 40), (0, 230, 255))
    for index, colour in enumerate(colours):
        assert tuple(legend[16, 12 + index * 384 + 7]) == colour


def test_the_next_sound_image_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    samples = [FileSample(tmp_path / f"{letter}.png") for letter in "abcde"]
    for letter in "bd":
        write_image(tmp_path / f"{letter}.png", np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "e.png").write_bytes(b"no image")
    damaged = find_damaged(samples, range(5))
    assert sorted(damaged) == [0, 2, 4]
    assert find_damaged(samples, [0, 1]).keys() == {0}
    assert "a.png: no such file" in damaged[0]
    assert [Path(sample.name).stem for sample in replace_damaged(samples, damaged)] == ["b", "b", "d", "d", "b"]
    assert replace_damaged(samples, []) == samples
    with pytest.raises(DataError, match="none of the 5 images can be read"):
        replace_damaged(samples, range(5))
