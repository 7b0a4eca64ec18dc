"""What a run leaves to read: CSV files, TensorBoard's, and a progress bar."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from facespec.cli import require
from facespec.errors import MissingPackageError, OutputError
from facespec.figures import figure_file
from facespec.files import write_text

Row = Mapping[str, float]

STEP_COLUMNS = (
    *("step", "epoch", "lr", "total", "classification", "box", "landmark", "pixel"),
    *("positives", "landmark_positives", "dropped", "grad_norm"),
)


class CsvLog:
    """A CSV file of numbers whose first column counts up. Rows past the point a run resumes from are taken back.

    These are the rows whose first column is greater than `last`. Damaged rows go, too, and columns of other names.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], last: int) -> None:
        self.path, self.columns = path, columns
        kept = [row for row in _read_rows(path) if row.get(columns[0], "").isdecimal() and int(row[columns[0]]) <= last]
        text = io.StringIO()
        lines = [[row.get(name, "") for name in columns] for row in kept]
        csv.writer(text, lineterminator="\n").writerows([columns, *lines])
        write_text(path, text.getvalue())
        self._file = path.open("a", encoding="utf-8", newline="", buffering=1)  # a killed run loses no row

    def add(self, row: Row) -> None:
        """Write a row; columns it lacks stay empty."""
        values = (f"{row[name]:.9g}" if name in row else "" for name in self.columns)  # 9 digits give float32 back
        with _named(self.path):
            self._file.write(",".join(values) + "\n")

    def close(self) -> None:
        """Close the file."""
        with _named(self.path):
            self._file.close()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); the last checkpoint is kept") from None


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Return the whole rows of a file, by column; a run that was killed may leave half a row, or zeros."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\0", "").splitlines(keepends=True)
    header, *rows = csv.reader(line for line in lines if line.endswith("\n")) if lines else [[]]
    return [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]


def read_epochs(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's epochs.csv; row 0, if there is one, is from before the training."""
    return _numbers(folder / "epochs.csv")


def _numbers(path: Path) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items() if value} for row in _read_rows(path)]


def draw_curves(folder: Path) -> None:
    """Draw curves.png in the folder of a run: the loss and its parts by step, the average precision by epoch.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    steps, epochs = _numbers(folder / "steps.csv"), read_epochs(folder)
    if not steps:
        return
    with figure_file(folder / "curves.png", "train", (10, 4), dpi=100) as figure:
        loss, precision = figure.subplots(1, 2)
        every = max(1, len(steps) // 2000)
        for name in ("total", "classification", "box", "landmark", "pixel"):
            values = [row.get(name, 0.0) for row in steps][::every]
            if any(values):
                loss.plot([row["step"] for row in steps][::every], values, label=name, linewidth=0.8)
        loss.set(xlabel="step", ylabel="loss", yscale="log")
        for name in ("easy", "medium", "hard", "ap"):
            points = [(row["epoch"], row[name]) for row in epochs if name in row]
            if points:
                precision.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        precision.set(xlabel="epoch; 0 is before the training", ylabel="AP %")
        for axes in (loss, precision):
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()


class _Board:
    """Scalars for TensorBoard, written at once.

    tensorboardX's SummaryWriter is not used: it writes in a thread, which a full disk ends, and its queue of ten events
    then blocks the training for ever. Later steps than `step`, of a run that was killed, are not shown.

    Raises:
        MissingPackageError: tensorboardX is not installed.
        OutputError: The disk is full, or the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        writer = require("tensorboardX.event_file_writer", "train", "a log for TensorBoard")
        self._event = require("tensorboardX.proto.event_pb2", "train", "a log for TensorBoard")
        self._scalar = require("tensorboardX.summary", "train", "a log for TensorBoard").scalar
        self._folder = folder
        with _named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = writer.EventsWriter(str(folder / "events"))
        self._write(session_log=self._event.SessionLog(status=self._event.SessionLog.START), step=step + 1)

    def add(self, kind: str, row: Row) -> None:
        """Write the numbers of a row; `kind` is the column that counts up, and the group they are shown in."""
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self._write(summary=self._scalar(f"{kind}/{name}", value), step=int(row[kind]))

    def _write(self, **content: Any) -> None:
        with _named(self._folder):
            self._file.write_event(self._event.Event(wall_time=time.time(), **content))

    def close(self) -> None:
        """Write what is left and close the file."""
        with _named(self._folder):
            self._file.close()


class Records:
    """The logs of a run in one folder: steps.csv, epochs.csv and, with tensorboardX, tensorboard/.

    Args:
        folder: Folder of the run.
        epoch_columns: Names of the columns of epochs.csv, "epoch" first.
        step: Steps done so far; what the files hold beyond is removed.
        epoch: Epochs done so far.
        steps: Of the whole run, for the progress bar.
    """

    def __init__(self, folder: Path, epoch_columns: Sequence[str], step: int, epoch: int, steps: int) -> None:
        self._steps = CsvLog(folder / "steps.csv", STEP_COLUMNS, step)
        self._epochs = CsvLog(folder / "epochs.csv", epoch_columns, epoch)
        self._board = None
        try:
            self._board = _Board(folder / "tensorboard", step)
        except MissingPackageError as error:
            print(f"{error}; steps.csv and epochs.csv hold the same")
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=None, file=sys.stderr, dynamic_ncols=True)

    def add_step(self, row: Row) -> None:
        """Note a step."""
        self._steps.add(row)
        self._bar.set_postfix_str(f"loss {row['total']:.3f}", refresh=False)
        self._bar.update()
        if self._board is not None:
            self._board.add("step", row)

    def add_epoch(self, row: Row, line: str) -> None:
        """Note an epoch, and say it in a line."""
        self._epochs.add(row)
        if self._board is not None:
            self._board.add("epoch", row)
        tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        """Close the files, each even if another cannot be."""
        with ExitStack() as stack:
            for part in (self._board, self._epochs, self._steps, self._bar):
                if part is not None:
                    stack.callback(part.close)
