"""benchmarks.call_path, and the bounds it holds: a warm call is short, and computes nothing that no frame changes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.call_path import CallPath, main, walk, walk_detect
from facespec.letterbox import Frame, Letterbox
from facespec.spec import ModelSpec
from trt_runtime import kernels
from trt_runtime.kernels import decode_nms


def _names(path: CallPath) -> list[str]:
    return [function.rpartition(":")[0] for function in path.functions]


def test_functions_files_and_switches() -> None:
    spec = ModelSpec()

    def call() -> None:
        box = Letterbox.place((20, 10), (32, 32))  # place, fit
        _ = spec.anchors.per_cell
        _ = box.scale_xy

    before = sys.getprofile()
    found = walk(call)
    assert sys.getprofile() is before
    assert _names(found)[:2] == ["facespec/letterbox.py:place", "facespec/letterbox.py:fit"]
    assert _names(found)[-2:] == ["facespec/spec.py:per_cell", "facespec/letterbox.py:scale_xy"]
    assert found.files == ["facespec/letterbox.py", "facespec/spec.py"]
    assert found.switches == 2
    with pytest.raises(ZeroDivisionError):
        walk(lambda: 1 / 0)
    assert sys.getprofile() is before


@pytest.mark.parametrize(
    ("form", "name", "functions", "files"),
    [
        ("dynamic_onnx", "OrtRetinaFace", 20, 4),
        ("plugin_form", "OrtRetinaFace", 20, 5),
        ("dynamic_onnx", "OpenVinoRetinaFace", 26, 5),
        ("plugin_form", "TRTRetinaFace", 36, 7),
    ],
)
def test_a_warm_call_computes_nothing_of_the_spec(
    form: str, name: str, functions: int, files: int, astronaut: Frame, request: pytest.FixtureRequest
) -> None:
    found = walk_detect(name, request.getfixturevalue(form), astronaut)
    assert 10 < len(found.functions) <= functions, found.functions
    assert len(found.files) <= files, found.files
    assert "facespec/detections.py:to_detections" in _names(found)
    assert "facespec/spec.py" not in found.files
    computed = {"place", "_place", "fit", "pad", "scale_xy", "scales", "_batch_limit", "_decode_plan", "make_params"}
    assert not computed & {function.rpartition(":")[2] for function in _names(found)}


def test_what_is_kept_for_a_size_is_never_changed() -> None:
    """Batches of two, then of one, channels first, then last: each has parameters and arrays of its own."""
    random = np.random.default_rng(0)
    first = [random.standard_normal((2, 32, side, side)).astype(np.float32) for side in (8, 4, 2)]
    last = [np.ascontiguousarray(level.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for level in first]
    expected = decode_nms(first, (64, 64), ModelSpec())
    kept = {name: values.copy() for name, values in expected.items()}
    kept_plan = kernels._decode_plan(1, (64, 64), ModelSpec().anchors, ModelSpec().decode).params
    count = kept["num_detections"][0]
    assert count > 3
    for maps in (last, first):
        found = decode_nms([level[:1] for level in maps], (64, 64), ModelSpec())
        assert found["num_detections"].tolist() == [count]
        np.testing.assert_array_equal(found["boxes"][0, :count], kept["boxes"][0, :count])
    for name, values in kept.items():
        np.testing.assert_array_equal(expected[name], values)
    assert kernels._decode_plan(1, (64, 64), ModelSpec().anchors, ModelSpec().decode).params == kept_plan


def test_the_command_knows_what_a_model_runs_in(
    dynamic_onnx: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["call_path", "--model", str(dynamic_onnx)])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["OrtRetinaFace", "OpenVinoRetinaFace"]
    assert all("functions" in line and "files" in line and "switches" in line for line in lines)
