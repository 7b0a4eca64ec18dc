from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from facespec.errors import MissingPackageError
from trt_runtime.flavor import RTX, TENSORRT, Flavor, child_environment, find_flavor, gpu_capability


def test_gpu_capability_agrees_with_torch() -> None:
    expected = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        expected = 10 * major + minor
    if torch.version.cuda or expected is None:
        assert gpu_capability() == expected


@pytest.mark.skipif(not RTX.installed(), reason="TensorRT-RTX is not installed (Linux on x86_64 only)")
def test_rtx_in_a_child_process() -> None:
    """With the bare name its parser looks for; nothing of that is left behind."""
    code = (
        "import ctypes, tensorrt_rtx; ctypes.CDLL('libtensorrt_rtx.so'); ctypes.CDLL('libtensorrt_onnxparser_rtx.so'); "
        "print(tensorrt_rtx.__version__)"
    )
    with child_environment(RTX) as environment:
        folder = Path(environment["LD_LIBRARY_PATH"].split(os.pathsep)[0])
        assert folder.is_dir()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == RTX.version()
    assert not folder.exists()
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert plain.returncode != 0  # else the links could go


def test_auto_takes_what_can_build_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if RTX.installed() and gpu_capability() is None:
        assert find_flavor("auto") is RTX
    if not TENSORRT.installed():
        with pytest.raises(MissingPackageError, match=r"pip install -e '\.\[trt\]'"):
            find_flavor("tensorrt")
    monkeypatch.setattr(Flavor, "installed", lambda self: False)
    with pytest.raises(MissingPackageError, match=r"\[rtx\].*\[trt\]"):
        find_flavor("auto")
    monkeypatch.setattr(Flavor, "installed", lambda self: True)
    monkeypatch.setattr("trt_runtime.flavor.gpu_capability", lambda: 90)
    assert find_flavor("auto") is TENSORRT
