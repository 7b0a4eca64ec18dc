"""What `make wheel` makes, where there is no compiler, no writable home, and none of what models are made with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from facespec.images import read_image, write_image
from facespec.letterbox import Frame
from trt_runtime import VideoWriter
from trt_runtime.media.files import VideoFile

ROOT = Path(__file__).parent.parent
PARTS = ("facespec", "trainer", "export", "plugins", "trt_runtime")
FILES = ("pyproject.toml", "README.md", "LICENSE", "Makefile")
LACKS = "import sys\nsys.modules.update(dict.fromkeys(('torch', 'scipy', 'retinaface', 'matplotlib'), None))\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was unpacked into."""
    for package in ("retinaface", "openvino", "av"):
        pytest.importorskip(package, reason="pip install -e '.[demo]'")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for part in PARTS + FILES:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("lib", "models", "__pycache__"))
        else:
            shutil.copy(ROOT / part, source)
    line = ["make", "-o", f"{sys.prefix}/.demo", f"VENV={sys.prefix}", "wheel"]
    made = subprocess.run(line, cwd=source, capture_output=True, text=True)
    if "hatchling" in made.stderr and "No matching distribution" in made.stderr:
        pytest.skip("no package index that has hatchling")
    assert made.returncode == 0, made.stderr
    assert not (source / "trt_runtime" / "models").exists()
    (wheel,) = (source / "dist").glob("*.whl")
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "app"), str(wheel)]
    subprocess.run(line, check=True, capture_output=True)
    (folder / "app" / "sitecustomize.py").write_text(LACKS)
    return folder / "app"


@pytest.mark.slow
def test_it_detects_on_a_photo_a_folder_and_a_video(installed: Path, astronaut: Frame, tmp_path: Path) -> None:
    for name in ("photo.png", "folder/a.jpg", "folder/b.bmp"):
        write_image(tmp_path / name, astronaut)
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        for _ in range(3):
            writer.write(astronaut)
    before = sorted(installed.rglob("*"))

    def detect(*arguments: str) -> tuple[list[dict[str, Any]], list[str]]:
        program = "import sys; from facespec.cli import command; sys.exit(command())"
        environment = {"PATH": "", "HOME": "/proc/nonexistent", "PYTHONPATH": str(installed), "TMPDIR": str(tmp_path)}
        line = [sys.executable, "-B", "-c", program, "detect", *arguments, "--json", "-"]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        warned = [text for text in done.stderr.splitlines() if text.startswith("warning")]
        return [json.loads(text) for text in done.stdout.splitlines()], warned

    for source, out, count in (("photo.png", "photo.jpg", 1), ("folder", "drawn", 2), ("clip.mp4", "drawn.mp4", 3)):
        records, warned = detect(source, "--out", out)
        assert ([len(record["faces"]) for record in records], warned) == ([1] * count, [])
    assert read_image(tmp_path / "photo.jpg").shape == astronaut.shape
    assert sorted(os.listdir(tmp_path / "drawn")) == ["a.jpg", "b.bmp.png"]
    with VideoFile(tmp_path / "drawn.mp4") as video:
        assert len(list(video)) == 3
    records, warned = detect("photo.png", "--size", "320x320", "--model", "mobilenet0.25")
    assert len(records[0]["faces"]) == 1
    assert len(warned) == 1  # OpenVINO would be quicker
    assert "no C++ compiler (g++): apt install g++" in warned[0]
    assert sorted(installed.rglob("*")) == before
