"""A model as one side of a comparison: what it is said to be, and whose numbers it gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.graph import HEAD_NAMES
from export.parity import rows_from_maps
from export.verify import ModelInfo, Side
from facespec.letterbox import Frame
from tests.conftest import Exported
from tests.faces import assert_identical
from trainer import load_model
from trainer.model import TorchRetinaFace
from trt_runtime import load_detector


@pytest.fixture(scope="module")
def image() -> Frame:
    return np.random.default_rng(0).integers(0, 256, (320, 320, 3), np.uint8)


def _torch_rows(image: Frame) -> np.ndarray:
    return np.concatenate(TorchRetinaFace(load_model()).heads(image), axis=1)


def test_a_checkpoint(image: Frame) -> None:
    side = Side("mobilenet0.25")
    assert side.info == ModelInfo("mobilenet0.25", "checkpoint", "fp32", {"fp32": 1.0}, None)
    assert (side.fixed_hw, side.notes, side.name) == (None, [], "mobilenet0.25")
    assert side.spec == load_model().spec
    assert side.detector.score_threshold == 0.02  # down to the model's own floor
    assert side.runner is not None
    np.testing.assert_array_equal(side.runner(image), _torch_rows(image))


def test_a_portable_graph(static_onnx: Path, image: Frame, tmp_path: Path) -> None:
    side = Side(str(static_onnx))
    assert side.info == ModelInfo(str(static_onnx), "portable ONNX", "fp32", {"fp32": 1.0}, (320, 320))
    assert (side.fixed_hw, side.notes) == ((320, 320), [])
    assert side.detector.score_threshold == 0.02
    assert side.detector.environment()["backend"] == "onnxruntime"
    assert side.runner is not None
    np.testing.assert_allclose(side.runner(image), _torch_rows(image), atol=1e-3)
    # weights that lie beside it: the faces are there, the heads are not
    onnx.save(onnx.load(static_onnx), tmp_path / "m.ONNX", save_as_external_data=True, location="m.data")
    beside = Side(str(tmp_path / "m.ONNX"))
    assert beside.runner is None
    outside, hidden = beside.notes
    assert "its weights lie outside" in outside
    assert hidden == f"{tmp_path / 'm.ONNX'} does not show its raw heads"
    assert_identical(beside.detector.detect(image), side.detector.detect(image))


@pytest.mark.parametrize("form", ["portable", "plugin"])
def test_fp16_is_rounded_as_on_a_gpu(form: str, exported: Exported, astronaut: Frame) -> None:
    """Not as ONNX Runtime computes it: in the heads, and in the faces."""
    path = exported("fp16", form)
    side = Side(str(path))
    assert (side.info.precision, side.info.mac_shares) == ("fp16", {"fp16": 1.0})
    assert side.info.kind == ("plugin form" if form == "plugin" else "portable ONNX")
    image = np.ascontiguousarray(astronaut[:320, :320])
    assert side.runner is not None
    found = side.runner(image)
    exact = _torch_rows(image)
    assert 1e-3 < np.abs(found - exact).max() < 1
    assert sum("its fp16 is emulated" in note for note in side.notes) == 1
    if form == "portable":
        import onnxruntime

        graph = onnx.load(path)
        graph.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in HEAD_NAMES)
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        maps = [level.astype(np.float32) for level in session.run(list(HEAD_NAMES), {"images": image[None]})]
        plain = rows_from_maps(maps, 2)
        assert np.abs(found - exact).mean() > 1.05 * np.abs(plain - exact).mean()  # what it leaves out is error
        plain_faces = load_detector(path, backend="onnxruntime").detect(image)
        assert (side.detector.detect(image).boxes[:1] != plain_faces.boxes[:1]).any()


def test_int8_is_called_int8(int8_onnx: Path) -> None:
    side = Side(str(int8_onnx))
    assert side.info.precision == "int8"
    assert side.info.mac_shares == pytest.approx({"int8": 0.88, "fp16": 0.12}, abs=1e-3)


def test_the_size_of_a_side_is_that_of_its_detector() -> None:
    side = Side("mobilenet0.25")
    for size_hw in ((64, 96), None):
        assert side.at(size_hw) is side.detector
        assert side.detector.size_hw == size_hw
