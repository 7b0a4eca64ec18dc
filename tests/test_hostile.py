"""Hostile images among good ones: the good ones are done, each bad one is named in a line, nothing ends early."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from facespec.images import write_image
from facespec.samples import sample_crops
from tests.hostile import animation, jpeg_with_scans

Command = Callable[..., subprocess.CompletedProcess[str]]

REFUSED = {
    "b.jpg": "the JPEG file has 400 scans, of its size 320 are taken",
    "c.jpg": "the JPEG file has a run of fill bytes",
    "d.png": "the PNG file is truncated or damaged",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 good photographs, an animation whose frames are damaged, and three files that are refused."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (_, frame) in enumerate(sample_crops(40, 0)):
        write_image(folder / f"{number:02}.jpg", frame)
    (folder / "a.png").write_bytes(animation(9))
    (folder / "b.jpg").write_bytes(jpeg_with_scans(2000, 400))
    (folder / "c.jpg").write_bytes(b"\xff\xd8" + b"\xff" * (8 << 20))
    (folder / "d.png").write_bytes(animation(0)[:100])
    return folder


def test_a_folder_is_done_and_what_is_bad_in_it_is_named(
    folder: Path, static_onnx: Path, command: Command, tmp_path: Path
) -> None:
    result = command("trt_runtime.detect", folder, "--model", static_onnx, "--json", "f.json", "--out", "faces")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1
    assert len(lines) == len(REFUSED)
    for line, (name, message) in zip(lines, REFUSED.items(), strict=True):
        assert line.startswith(f"error: {folder / name}: {message}")
    records = [json.loads(line) for line in (tmp_path / "f.json").read_text().splitlines()]
    assert [Path(record["source"]).name for record in records if "error" in record] == list(REFUSED)
    assert sum("error" not in record for record in records) == 41
    assert "41 frames" in result.stdout
    assert "3 images could not be read or written" in result.stdout


@pytest.mark.slow
def test_calibration_passes_them_over_and_counts_them(folder: Path, tmp_path: Path, command: Command) -> None:
    options = ("--size", "64", "--int8", "--calib", folder, "--images", "44", "--out", "m.onnx")
    result = command("export.to_onnx", *options, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert result.returncode == 0, result.stderr
    assert "calibrated on 41 images, 3 could not be read" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_training_names_the_image_and_stops(
    folder: Path, refused: Callable[..., str], tmp_path: Path, name: str
) -> None:
    for image in ("00.jpg", name):
        shutil.copy(folder / image, tmp_path)
    (tmp_path / "label.txt").write_text(f"# 00.jpg\n9 9 30 40\n# {name}\n9 9 30 40\n")
    options = ("--size", "64", "--epochs", "1", "--batch", "2", "--workers", "0", "--out", "run")
    line = refused("trainer.fit", "--data", tmp_path / "label.txt", *options)
    assert f"{name}: {REFUSED[name]}" in line
