from __future__ import annotations

import os
import sys
from pathlib import Path

import cv2
import pytest

from facespec.errors import MissingPackageError, OutputError
from facespec.figures import PLOT_SUFFIXES, check_plot, figure_file


@pytest.mark.parametrize(("suffix", "magic"), list(zip(PLOT_SUFFIXES, (b"\x89PNG", b"<?xml", b"%PDF"), strict=True)))
def test_a_figure_is_written_as_its_suffix_says(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"deep/p{suffix}"
    check_plot(path, "bench")
    with figure_file(path, "bench", (2, 1), dpi=50) as figure:
        figure.add_subplot().plot([1, 2])
        assert not path.exists()
    assert path.read_bytes().startswith(magic)
    if suffix == ".png":
        image = cv2.imread(str(path))
        assert image is not None
        assert image.shape == (50, 100, 3)


def test_a_drawing_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), figure_file(path, "bench", (2, 1)) as figure:
        figure.add_subplot().plot([1 / 0])
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["p.png"]


def test_what_could_not_be_drawn_is_refused_before(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plot(None, "bench")
    check_plot(Path("p.SVG"), "bench")
    with pytest.raises(OutputError, match=r"^--plot p\.jpg: give a name that ends in \.png, \.svg, \.pdf$"):
        check_plot(Path("p.jpg"), "bench")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    check_plot(None, "bench")
    with pytest.raises(MissingPackageError, match=r"--plot needs matplotlib.*\.\[bench\]"):
        check_plot(Path("p.png"), "bench")
