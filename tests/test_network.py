"""Nothing leaves the machine unless a source or an output says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from facespec.letterbox import Frame

ROOT = Path(__file__).parent.parent

OWN = {(".cache", "retinaface-trt"), (".cache", "matplotlib"), (".config", "matplotlib")}
"""Folders in HOME that may be written; both packages leave an id of the device there that they report."""

Watch = Callable[..., list[str]]


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    """Run Python with arguments as a new user; return what it looked up and connected to, and what it left in HOME."""
    if not sys.platform.startswith("linux") or not shutil.which("gcc"):
        pytest.skip("watching look-ups needs Linux and gcc")
    library, log, home = tmp_path / "watch.so", tmp_path / "log", tmp_path / "home"
    home.mkdir()
    line = ["gcc", "-shared", "-fPIC", "-o", str(library), str(ROOT / "tests" / "network_watch.c"), "-ldl"]
    subprocess.run(line, check=True)

    def call(*arguments: object) -> list[str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
        kept = {name: value for name, value in kept.items() if not name.startswith("XDG_")}
        watched = {"PYTHONPATH": str(ROOT), "HOME": str(home), "LD_PRELOAD": str(library), "NETWORK_WATCH": str(log)}
        line = [sys.executable, *map(str, arguments)]
        subprocess.run(line, check=True, cwd=tmp_path, env={**kept, **watched}, timeout=250, stdout=subprocess.DEVNULL)
        files = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
        left = [f"file {path}" for path in files if path.parts[:2] not in OWN]
        return (log.read_text().splitlines() if log.exists() else []) + left

    return call


def test_the_watch_sees_a_look_up_and_a_connection(watch: Watch) -> None:
    code = "import socket\ntry:\n    socket.create_connection(({!r}, 80))\nexcept OSError:\n    pass"
    assert watch("-c", code.format("an.example")) == ["look-up an.example"]
    code = "import os, socket; socket.socket().connect_ex(('127.0.0.1', 9)); open(os.path.expanduser('~/id'), 'w')"
    assert watch("-c", code) == ["look-up an.example", "connection ", "file id"]


@pytest.mark.parametrize(
    ("package", "seen"), [("openvino", "look-up www.google-analytics.com"), ("onnxruntime", "Microsoft")]
)
def test_what_is_turned_off_reports_otherwise(watch: Watch, package: str, seen: str) -> None:
    """The packages by themselves, so that the tests below can fail."""
    pytest.importorskip(package)
    found = watch("-c", f"import time, {package}; time.sleep(0.5)")
    if not any(seen in line for line in found):
        pytest.skip(f"this version of {package} does not report from its import on: {found}")


@pytest.mark.parametrize(
    "imports", ["export.graph, openvino", "trt_runtime.load, onnxruntime, openvino", "trainer.fit, onnxruntime"]
)
def test_imports_look_nothing_up(watch: Watch, imports: str) -> None:
    pytest.importorskip("openvino")
    assert watch("-c", f"import {imports}, time; time.sleep(0.5)") == []


def test_a_user_may_turn_onnxruntime_on() -> None:
    code = "import os, facespec; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "0"}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment) == b"0\n"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_detecting_looks_nothing_up(
    watch: Watch, static_onnx: Path, astronaut: Frame, tmp_path: Path, backend: str
) -> None:
    pytest.importorskip(backend)
    cv2.imwrite(str(tmp_path / "a.png"), astronaut)
    options = ("--backend", backend, "--out", "faces.png", "--json", "-")
    assert watch("-m", "trt_runtime.detect", tmp_path / "a.png", "--model", static_onnx, *options) == []
    assert (tmp_path / "faces.png").exists()


@pytest.mark.slow
def test_exporting_looks_nothing_up(watch: Watch, tmp_path: Path) -> None:
    assert watch("-m", "export.to_onnx", "--size", "64", "--int8", "--calib", "demo", "--out", "m.onnx") == []
    assert (tmp_path / "m.onnx").exists()


@pytest.mark.slow
def test_training_looks_nothing_up(watch: Watch, tmp_path: Path) -> None:
    options = ("--size", "64", "--epochs", "1", "--batch", "4", "--overfit", "4", "--out", "run", "--workers", "2")
    assert watch("-m", "trainer.fit", "--data", "synthetic", *options) == []
    assert (tmp_path / "run" / "last.pth").exists()


@pytest.mark.slow
def test_a_session_that_stays_looks_nothing_up(watch: Watch, static_onnx: Path) -> None:
    """ONNX Runtime looks its maker up about nine seconds after its import."""
    code = f"import time\nfrom trt_runtime import load_detector\nload_detector({str(static_onnx)!r}, backend='%s')"
    for backend in ("openvino", "onnxruntime"):
        assert watch("-c", code % backend + "\ntime.sleep(15)") == []
