"""What a run leaves to read: CSV files, TensorBoard's, and a progress bar."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from facespec.cli import require
from facespec.errors import MissingPackageError
from facespec.files import write_text

Row = Mapping[str, float]

STEP_COLUMNS = (
    *("step", "epoch", "lr", "total", "classification", "box", "landmark", "pixel"),
    *("positives", "landmark_positives", "dropped", "grad_norm"),
)


class CsvLog:
    """A CSV file of numbers whose first column counts up. Rows past the point a run resumes from are taken back.

    Args:
        path: File; made if it is not there.
        columns: Names.
        last: Rows whose first column is greater are removed.
    """

    def __init__(self, path: Path, columns: Sequence[str], last: int) -> None:
        self.columns = columns
        kept = [row for row in _read_rows(path) if int(row[0]) <= last]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *kept])
        write_text(path, text.getvalue())
        self._file = path.open("a", encoding="utf-8", newline="", buffering=1)  # a killed run loses no row

    def add(self, row: Row) -> None:
        """Write a row; columns it lacks stay empty."""
        values = (f"{row[name]:.9g}" if name in row else "" for name in self.columns)  # 9 digits give float32 back
        self._file.write(",".join(values) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_rows(path: Path) -> Iterable[list[str]]:
    """Return the whole rows of a file without its head; a killed run may leave half a row."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return list(csv.reader(line for line in lines[1:] if line.endswith("\n")))


class Records:
    """The logs of a run in one folder: steps.csv, epochs.csv and, with tensorboardX, tensorboard/.

    Args:
        folder: Folder of the run.
        epoch_columns: Names of the columns of epochs.csv, "epoch" first.
        step: Steps done so far; what the files hold beyond is removed.
        epoch: Epochs done so far.
        steps: Steps of the whole run, for the progress bar.
    """

    def __init__(self, folder: Path, epoch_columns: Sequence[str], step: int, epoch: int, steps: int) -> None:
        self._steps = CsvLog(folder / "steps.csv", STEP_COLUMNS, step)
        self._epochs = CsvLog(folder / "epochs.csv", epoch_columns, epoch)
        self._board = None
        try:
            board = require("tensorboardX", "train", "a log for TensorBoard")
            self._board = board.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except MissingPackageError as error:
            print(f"{error}; steps.csv and epochs.csv hold the same")
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=None, file=sys.stderr, dynamic_ncols=True)

    def add_step(self, row: Row) -> None:
        """Note a step."""
        self._steps.add(row)
        self._bar.set_postfix_str(f"loss {row['total']:.3f}", refresh=False)
        self._bar.update()
        self._to_board("step", row, int(row["step"]))

    def add_epoch(self, row: Row, line: str) -> None:
        """Note an epoch, and say it in a line."""
        self._epochs.add(row)
        self._to_board("epoch", row, int(row["epoch"]))
        tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        """Close the files."""
        self._bar.close()
        self._steps.close()
        self._epochs.close()
        if self._board is not None:
            self._board.close()

    def _to_board(self, kind: str, row: Row, at: int) -> None:
        if self._board is not None:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self._board.add_scalar(f"{kind}/{name}", value, at)
