"""OpenCV is there, is not there, or cannot be loaded, as in a container without libGL; each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    line = [sys.executable, *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (
            "ImportError('libGL.so.1: cannot open shared object file')",
            "OpenCV cannot be imported (libGL.so.1: cannot",
        ),
        ("ModuleNotFoundError('No module named cv2', name='cv2')", "OpenCV is not installed: pip install opencv-pyt"),
    ],
)
def test_without_opencv_there_is_one_line(failure: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text(f"raise {failure}\n")
    command = _run(tmp_path, "-m", "trt_runtime.detect", "photo.jpg")
    assert (command.returncode, command.stdout, command.stderr.count("\n")) == (1, "", 1)
    assert command.stderr.startswith(f"error: {words}")
    assert "opencv-python-headless" in command.stderr
    library = "from facespec.errors import MissingPackageError\ntry:\n  from trt_runtime import draw_detections\n"
    library += "except MissingPackageError as error:\n  print(error)"
    assert words in _run(tmp_path, "-c", library).stdout
    program = "import sys; sys.argv[0] = 'x'; from facespec.cli import command; command(['detect', 'photo.jpg'])"
    assert _run(tmp_path, "-c", program).stderr.startswith(f"error: {words}")


def test_show_says_what_headless_opencv_lacks(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import cv2\ninformation = cv2.getBuildInformation()\n"
        "import re\ncv2.getBuildInformation = lambda: re.sub('GUI: .*', 'GUI: NONE', information)\n"
    )
    result = _run(tmp_path, "-m", "trt_runtime.detect", "photo.jpg", "--show")
    assert result.returncode == 1
    assert "--show needs windows, which opencv-python-headless has not" in result.stderr
