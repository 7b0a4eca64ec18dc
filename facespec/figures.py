"""Drawing figures into files, without a display; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from facespec.cli import require
from facespec.errors import OutputError
from facespec.files import atomic_path

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path | None, extra: str) -> None:
    """Refuse, before any work, a figure that could not be drawn; None is no figure.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The suffix is not one of `PLOT_SUFFIXES`.
    """
    if path is None:
        return
    require("matplotlib", extra, "--plot")
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise OutputError(f"--plot {path}: give a name that ends in {', '.join(PLOT_SUFFIXES)}")


@contextmanager
def figure_file(path: Path, extra: str, size_inches: tuple[float, float], dpi: int = 150) -> Iterator[Any]:
    """Yield an empty figure of matplotlib; what was drawn on it is then written to a file, whole or not at all.

    `extra` names the extra of this project that brings matplotlib; the size is width and height.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    figures = require("matplotlib.figure", extra, "--plot")
    backend = require("matplotlib.backends.backend_agg", extra, "--plot")
    figure = figures.Figure(figsize=size_inches, layout="constrained")
    backend.FigureCanvasAgg(figure)
    yield figure
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
