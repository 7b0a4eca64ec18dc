"""What a run leaves to read."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from facespec.errors import OutputError
from trainer.records import STEP_COLUMNS, CsvLog, Records


def test_logs_of_a_resumed_run_keep_their_columns_and_lose_what_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "epochs.csv"
    path.write_bytes(b"epoch,total,seconds\n1,5.5,7\n\n2,4.5,7\nx,1,1\n3,\0\0\0\0\n\xff\n4,1,1\n5,0.")
    log = CsvLog(path, ["epoch", "total", "ap", "seconds"], last=3)
    log.add({"epoch": 3, "total": 2.5, "ap": 0.25})
    log.close()
    assert path.read_text().splitlines() == ["epoch,total,ap,seconds", "1,5.5,,7", "2,4.5,,7", "3,2.5,0.25,"]


def test_rows_up_to_the_step_are_kept_and_later_ones_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_text("step,total\n8,1\n9,2\n10,3\n11,4\n")
    CsvLog(path, ["step", "total"], last=10).close()
    assert path.read_text() == "step,total\n8,1\n9,2\n10,3\n"
    CsvLog(path, ["step", "total"], last=0).close()
    assert path.read_text() == "step,total\n"
    path.write_text("")
    CsvLog(path, ["step"], last=5).close()
    assert path.read_text() == "step\n"


def test_a_killed_run_loses_no_row_and_no_digit(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "deep.csv", ["step", "value"], last=0)
    log.add({"step": 1, "value": 0.1234567890123, "unknown": 5})
    log.add({"step": 16777217, "value": 1e-30})
    # not closed: a kill would come here
    assert (tmp_path / "deep.csv").read_text() == "step,value\n1,0.123456789\n16777217,1e-30\n"
    log.close()


def test_a_log_that_cannot_be_written_is_named() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no full disk here")
    log = CsvLog.__new__(CsvLog)
    log.path, log.columns = Path("/dev/full"), ["step"]
    log._file = log.path.open("a", buffering=1)
    with pytest.raises(OutputError, match=r"^/dev/full: cannot be written \(.*\); the last checkpoint is kept$"):
        log.add({"step": 1})
    with pytest.raises(OutputError, match="/dev/full: cannot be written"):
        log.close()


def _events(folder: Path) -> list[Event]:
    """Read the event files of a folder: length and its checksum, content and its checksum."""
    events = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def test_records_hold_steps_and_epochs_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.time()
    records = Records(tmp_path, ["epoch", "total", "ap"], step=4, epoch=1, steps=9)
    assert (records._bar.n, records._bar.total) == (4, 9)
    records.add_step({**dict.fromkeys(STEP_COLUMNS, 0.0), "step": 5, "epoch": 2, "total": 2.5, "lr": 0.125})
    assert records._bar.n in (4, 5)  # a bar that is not shown does not count
    # what is noted can be read at once
    assert (tmp_path / "steps.csv").read_text().splitlines() == [",".join(STEP_COLUMNS), "5,2,0.125,2.5" + ",0" * 8]
    records.add_epoch({"epoch": 2, "total": 3.5, "ap": 50.0}, "a line")
    assert capsys.readouterr().out == "a line\n"
    records.close()
    assert (tmp_path / "epochs.csv").read_text().splitlines() == ["epoch,total,ap", "2,3.5,50"]
    events = _events(tmp_path / "tensorboard")
    scalars = {value.tag: (event.step, value.simple_value) for event in events for value in event.summary.value}
    assert scalars["step/total"] == (5, 2.5)
    assert scalars["step/lr"] == (5, 0.125)
    assert scalars["epoch/total"] == (2, 3.5)
    assert scalars["epoch/ap"] == (2, 50.0)
    assert set(scalars) == {
        *(f"step/{name}" for name in STEP_COLUMNS if name not in ("step", "epoch")),
        "epoch/total",
        "epoch/ap",
    }
    (session,) = [event for event in events if event.HasField("session_log")]
    assert (session.session_log.status, session.step) == (SessionLog.START, 5)  # what was shown from there on is void
    assert all(start - 1 <= event.wall_time <= time.time() + 1 for event in events)
    assert all(part._file.closed for part in (records._steps, records._epochs))


def test_without_tensorboardx_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX.event_file_writer", None)
    records = Records(tmp_path, ["epoch", "total"], 0, 0, 5)
    records.add_step({**dict.fromkeys(STEP_COLUMNS, 1.0)})
    records.add_epoch({"epoch": 1, "total": 2.0}, "line")
    records.close()
    said = capsys.readouterr().out
    assert "tensorboardX" in said
    assert "steps.csv and epochs.csv hold the same" in said
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "epochs.csv").read_text() == "epoch,total\n1,2\n"
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 2


def test_files_are_closed_even_if_another_cannot_be(tmp_path: Path) -> None:
    records = Records(tmp_path, ["epoch"], 0, 0, 5)

    def fail() -> None:
        raise OutputError("full")

    records._epochs.close = fail  # type: ignore[method-assign]
    with pytest.raises(OutputError, match="full"):
        records.close()
    assert records._steps._file.closed
    assert records._bar.disable or records._bar.n == 0
    assert _events(tmp_path / "tensorboard")
    records._epochs._file.close()


def test_the_columns_of_a_step_are_known() -> None:
    assert STEP_COLUMNS == (
        *("step", "epoch", "lr", "total", "classification", "box", "landmark", "pixel"),
        *("positives", "landmark_positives", "dropped", "grad_norm"),
    )
