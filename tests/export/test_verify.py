from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from export.agreement import Agreement, landmark_errors, match_faces
from export.calibration_options import CalibrationOptions
from export.disagreements import draw_disagreements
from export.emulation import emulate_fp16
from export.to_onnx import ExportOptions, export_onnx
from export.verify import BUDGETS, Row, VerifyOptions, _batch_rows, _demo_samples, _face_rows, parse_arguments, verify
from facespec.detections import Detections
from facespec.errors import DataError, ModelFileError, OutputError, RetinaFaceError, SpecError
from facespec.images import read_image
from facespec.letterbox import Frame
from facespec.spec import DecodeSpec
from trainer import load_model
from trainer.detector import TorchRetinaFace
from trt_runtime import load_detector
from trt_runtime.flavor import gpu_capability


def _faces(boxes: list[list[float]], scores: list[float] | None = None, shift: float = 0.0) -> Detections:
    """Faces whose landmarks lie at the centre, moved by `shift` along x."""
    array = np.array(boxes, np.float32).reshape(-1, 4)
    centres = (array[:, :2] + array[:, 2:]) / 2 + np.array([shift, 0], np.float32)
    landmarks = np.repeat(centres[:, None], 5, axis=1).astype(np.float32)
    return Detections(array, np.array(scores or [0.9] * len(array), np.float32), landmarks, (480, 640))


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published weights with landmarks that are off: by a twentieth of the prior's size along x and y."""
    import torch

    from trainer import load_model
    from trainer.checkpoint import save_checkpoint

    model = load_model()
    with torch.no_grad():
        for head in model.LandmarkHead:
            head.get_submodule("conv1x1").get_parameter("bias").add_(0.5)
    path = tmp_path_factory.mktemp("perturbed") / "perturbed.pth"
    save_checkpoint(path, model)
    return path


def test_matching_takes_each_face_once_the_greatest_overlap_first() -> None:
    reference = np.array([[0, 0, 10, 10], [100, 100, 120, 120], [200, 0, 210, 10]], np.float32)
    # two for the first face, of IoU 0.8 and 0.9; one of IoU 1/3 for the last
    candidate = np.array([[0, 0, 10, 8], [0, 0, 10, 9], [100, 100, 120, 120], [205, 0, 215, 10]], np.float32)
    found = match_faces(reference, candidate)
    assert found.reference.tolist() == [0, 1]
    assert found.candidate.tolist() == [1, 2]
    assert found.iou.tolist() == pytest.approx([0.9, 1.0])


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 2), (2, 0)])
def test_matching_without_faces(left: int, right: int) -> None:
    found = match_faces(np.zeros((left, 4), np.float32), np.ones((right, 4), np.float32))
    assert len(found.reference) == len(found.candidate) == len(found.iou) == 0


def test_landmark_error_is_a_share_of_the_face_size() -> None:
    reference = _faces([[0, 0, 16, 25], [0, 0, 100, 100]])  # of sizes 20 and 100
    candidate = _faces([[0, 0, 16, 25], [0, 0, 100, 100]], shift=1.0)
    found = landmark_errors(reference.boxes, reference.landmarks, candidate.landmarks)
    assert found.tolist() == pytest.approx([5.0, 1.0])


def test_agreement_by_hand() -> None:
    reference = _faces([[0, 0, 10, 10], [50, 50, 60, 60], [80, 0, 90, 10], [0, 80, 10, 90]], [0.9, 0.8, 0.7, 0.3])
    candidate = _faces([[0, 0, 10, 10], [50, 50, 60, 58], [300, 0, 310, 10]], [0.8, 0.75, 0.6])
    agreement = Agreement()
    agreement.add(reference, candidate)
    assert agreement.faces == 3  # that of score 0.3 does not count
    assert agreement.recall == pytest.approx(200 / 3)
    assert agreement.precision == pytest.approx(200 / 3)
    assert agreement.iou == pytest.approx([1.0, 0.8])
    assert agreement.landmarks == pytest.approx([0.0, 10.0])  # the centre moves by one pixel of ten
    assert agreement.scores == pytest.approx([0.1, 0.05])
    texts = [item.text for item in sorted(agreement.disagreements, key=lambda item: -item.badness)]
    assert texts[0] == "missed: score 0.70, not there on the other side"
    assert texts[1] == "extra: score 0.60, not there on the other side"


def test_a_detector_that_sees_too_much_is_over_budget() -> None:
    boxes = [[60.0 * i, 0, 60.0 * i + 40, 50] for i in range(10)]
    one, many = _faces(boxes[:1], [0.9]), _faces(boxes, [0.9] * 10)
    for special in (False, True):
        agreement = Agreement()
        agreement.add(one, many)
        failed = [row.quantity for row in _face_rows(agreement, "x", BUDGETS["int8"], special) if not row.passed]
        assert failed == ["precision %"]
        agreement = Agreement()
        agreement.add(_faces([]), many)  # none of them is there
        failed = [row.quantity for row in _face_rows(agreement, "x", BUDGETS["int8"], special) if not row.passed]
        assert failed == ["precision %"]
        agreement = Agreement()
        agreement.add(one, _faces(boxes[:1], [0.9], shift=10.0))
        failed = [row.quantity for row in _face_rows(agreement, "x", BUDGETS["int8"], special) if not row.passed]
        assert failed == ["mean error, % of face"]


def test_every_slot_of_a_batch_is_compared_by_everything() -> None:
    class Wrong:
        """A detector that gives every slot the landmarks of the first."""

        size_hw = None

        def at(self, size_hw: tuple[int, int]) -> SimpleNamespace:
            return SimpleNamespace(detector=self)

        def detect(self, frame: Frame) -> Detections:
            return _faces([[0, 0, 100, 100]], shift=float(frame[0, 0, 0]))

        def detect_batch(self, frames: list[Frame]) -> list[Detections]:
            return [self.detect(frames[0]) for _ in frames]

    frames = [np.full((64, 64, 3), value, np.uint8) for value in (0, 0, 9)]
    rows = _batch_rows(Wrong(), frames, (64, 64), limited=True)  # type: ignore[arg-type]
    assert [(row.case, row.quantity) for row in rows if not row.passed] == [("slot 2 of 3", "landmarks, % of face")]


def test_agreement_of_nothing() -> None:
    agreement = Agreement()
    agreement.add(_faces([]), _faces([]))
    assert agreement.recall is agreement.precision is None
    assert all(row.passed for row in _face_rows(agreement, "nothing", BUDGETS["int8"]))


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "passed"),
    [
        (98.5, 98.5, True, True),
        (98.4, 98.5, True, False),
        (1.0, 1.0, False, True),
        (1.1, 1.0, False, False),
        (-3.0, 0.5, False, True),  # a gain of AP
        (7.0, None, False, True),
        (None, 1.0, False, False),
        (None, None, False, True),
    ],
)
def test_limits(value: float | None, limit: float | None, at_least: bool, passed: bool) -> None:
    row = Row("stage", "case", "quantity", value, limit, at_least)
    assert row.passed == passed
    assert ("OVER BUDGET" in str(row)) != passed


def test_identical_models_have_no_differences(dynamic_onnx: Path, tmp_path: Path) -> None:
    json_file, picture = tmp_path / "verify.json", tmp_path / "worst.png"
    result = verify(
        VerifyOptions(
            str(dynamic_onnx), str(dynamic_onnx), size_hw=(320, 320), images=4, json_file=json_file, picture=picture
        )
    )
    assert result.passed
    assert "passed, within the fp16 budget" in str(result)
    stages = {row.stage for row in result.rows}
    assert stages >= {"preprocessing", "raw heads", "boxes", "landmarks", "scores", "batch", "zero faces"}
    for row in result.rows:
        if row.stage in ("preprocessing", "raw heads", "landmarks", "scores"):
            assert row.value == 0, row
        if row.quantity in ("recall %", "precision %"):
            assert row.value == 100, row
    assert {"letterbox 480x640", "letterbox 320x320"} <= {row.case for row in result.rows}
    assert any(row.case.startswith("crowds") for row in result.rows)

    data = json.loads(json_file.read_text())
    assert data["passed"] is True
    assert data["candidate"]["kind"] == "portable ONNX"
    assert data["candidate"]["precision"] == "fp32"
    assert data["size_hw"] == [320, 320]
    assert data["average_precision"] == {}
    assert set(data) == {field.name for field in dataclasses.fields(result)} | {"passed"}
    for row in data["rows"]:
        assert set(row) == {field.name for field in dataclasses.fields(Row)} | {"passed"}
        assert isinstance(row["value"], (int, float, type(None)))
        assert isinstance(row["passed"], bool)

    image = read_image(picture)
    assert image.shape[1] > 1000
    assert (image == (80, 220, 60)).all(axis=2).any()
    assert (image == (60, 60, 255)).all(axis=2).any()


@pytest.fixture(scope="module")
def int8_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published weights in INT8 at 320x320; what is not INT8 is FP16."""
    folder = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        calibration = CalibrationOptions("demo", images=16)
        path = folder / "int8.onnx"
        export_onnx(
            ExportOptions("mobilenet0.25", path, (320, 320), DecodeSpec(), precision="int8", calibration=calibration)
        )
    return path


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "openvino"])
def test_a_candidate_as_it_is_deployed(backend: str, int8_onnx: Path) -> None:
    """The faces are those of the backend, not of the emulation; raw heads are for graphs only."""
    result = verify(VerifyOptions("mobilenet0.25", str(int8_onnx), images=8, backend=backend, budget="none"))
    ran = "onnxruntime" if backend == "onnxruntime" else "openvino"
    (note,) = (note for note in result.notes if "run as it is deployed" in note)
    assert f"backend {ran}, {ran} " in note
    assert not any("emulated" in note for note in result.notes)
    assert any("does not show its raw heads" in note for note in result.notes)
    assert "raw heads" not in {row.stage for row in result.rows}
    detector = load_detector(int8_onnx, backend=ran, score_threshold=0.02)
    reference = TorchRetinaFace(load_model(), score_threshold=0.02, size_hw=(320, 320))
    agreement = Agreement()
    for sample in _demo_samples(8):
        agreement.add(reference.detect(sample.load()), detector.detect(sample.load()))
    values = {(row.stage, row.quantity): row.value for row in result.rows if row.case == "letterbox 320x320"}
    assert values["boxes", "recall %"] == pytest.approx(agreement.recall)
    assert values["landmarks", "mean error, % of face"] == pytest.approx(np.mean(agreement.landmarks))
    assert values["scores", "largest drift"] == pytest.approx(np.max(agreement.scores))


def test_without_a_backend_the_graph_is_emulated(int8_onnx: Path) -> None:
    result = verify(VerifyOptions("mobilenet0.25", str(int8_onnx), images=2))
    assert any("fp16 is emulated" in note for note in result.notes)
    assert not any("deployed" in note for note in result.notes)
    assert "raw heads" in {row.stage for row in result.rows}


def test_the_backend_is_of_the_candidate(static_onnx: Path) -> None:
    """And what it cannot run is refused in one line."""
    result = verify(VerifyOptions(str(static_onnx), str(static_onnx), images=2, backend="openvino"))
    assert result.passed
    assert [note for note in result.notes if "deployed" in note and "openvino" in note] != []
    assert sum("deployed" in note for note in result.notes) == 1
    with pytest.raises(SpecError, match="TensorRT runs engines"):
        verify(VerifyOptions(str(static_onnx), str(static_onnx), images=2, backend="tensorrt"))


def test_checkpoint_against_a_model_of_fixed_size(static_onnx: Path) -> None:
    result = verify(VerifyOptions("mobilenet0.25", str(static_onnx), images=2))
    assert result.passed
    assert result.size_hw == (320, 320)
    assert max(row.value or 0 for row in result.rows if row.stage == "raw heads") < 1e-3
    assert any("no other size was tried" in note for note in result.notes)


def test_a_spoilt_model_fails_and_names_the_budget(
    command: Callable[..., object], perturbed: Path, tmp_path: Path
) -> None:
    line = ["--reference", "mobilenet0.25", "--candidate", perturbed, "--images", 4, "--size", "320x320"]
    result = command("export.verify", *line, "--json", tmp_path / "out.json")
    assert result.returncode == 1, result.stderr  # type: ignore[attr-defined]
    text = result.stdout  # type: ignore[attr-defined]
    assert "OVER BUDGET" in text
    assert "FAILED, over the fp16 budget: landmarks, mean error" in text
    assert "they were made from different weights" in text
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["passed"] is False
    assert any(not row["passed"] for row in data["rows"])


def test_without_a_budget_nothing_fails(perturbed: Path) -> None:
    result = verify(VerifyOptions("mobilenet0.25", str(perturbed), images=2, size_hw=(320, 320), budget="none"))
    assert result.passed
    assert all(row.limit is None for row in result.rows)
    assert "no budget was set" in str(result)


def test_fp16_is_emulated_to_the_last_bit() -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    half = onnx.TensorProto.FLOAT16
    factor = np.array([1.0009765625, 3.3], np.float16)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", ["x"], ["h"], to=half),
            onnx.helper.make_node("Mul", ["h", "factor"], ["m"]),
            onnx.helper.make_node("Mul", ["m", "factor"], ["y"]),
        ],
        "two products",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1000, 2])],
        [onnx.helper.make_tensor_value_info("y", half, [1000, 2])],
        [onnx.numpy_helper.from_array(factor, "factor")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    x = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
    session = ort.InferenceSession(emulate_fp16(model.SerializeToString()), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, (x.astype(np.float16) * factor * factor).astype(np.float32))


@pytest.mark.parametrize("side", ["--reference", "--candidate"])
@pytest.mark.parametrize("name", ["nothing.onnx", "nothing.pth"])
def test_missing_models_take_one_line(refused: Callable[..., str], side: str, name: str) -> None:
    other = "--candidate" if side == "--reference" else "--reference"
    assert name in refused("export.verify", side, name, other, "mobilenet0.25")


def test_an_engine_takes_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    engine = tmp_path / "a.engine"
    engine.write_bytes(b"ftrt")
    line = refused("export.verify", "--reference", "mobilenet0.25", "--candidate", str(engine))
    if gpu_capability() is None:
        assert "the .onnx file runs on the CPU" in line
    else:  # it gets further, and finds that this is none
        assert "a.engine" in line


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"size_hw": (640, 640)}, SpecError, "320x320 only"),
        ({"protocol": "original"}, SpecError, "fixed size"),
        ({"picture": Path("worst.txt")}, OutputError, "--picture worst.txt"),
        ({"data": Path("nowhere")}, DataError, "wider_face_val.mat"),
        ({"candidate": "a.plan"}, ModelFileError, "no such model file"),
    ],
)
def test_refused(static_onnx: Path, changes: dict[str, object], error: type[RetinaFaceError], text: str) -> None:
    options = VerifyOptions(str(static_onnx), str(static_onnx))
    with pytest.raises(error, match=text):
        verify(dataclasses.replace(options, **changes))  # type: ignore[arg-type]


def test_outputs_never_replace_a_model(static_onnx: Path) -> None:
    with pytest.raises(OutputError, match="is a file that is read"):
        verify(VerifyOptions(str(static_onnx), str(static_onnx), json_file=static_onnx))


@pytest.mark.parametrize("changes", [{"images": 0}, {"budget": "int4"}, {"protocol": "other"}])
def test_options_are_checked(changes: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        VerifyOptions("a", "b", **changes)  # type: ignore[arg-type]


def test_arguments() -> None:
    options = parse_arguments(["--reference", "a", "--candidate", "b.onnx", "--size", "480x640", "--budget", "int8"])
    assert options == VerifyOptions("a", "b.onnx", size_hw=(480, 640), budget="int8")
    options = parse_arguments(["--reference", "a", "--candidate", "b.onnx", "--backend", "openvino"])
    assert options == VerifyOptions("a", "b.onnx", backend="openvino")
    with pytest.raises(SystemExit):
        parse_arguments(["--reference", "a", "--candidate", "b.onnx", "--backend", "abacus"])


def test_a_picture_of_nothing_is_still_a_picture() -> None:
    assert draw_disagreements([], [], [[], []]).size > 0


@pytest.mark.data
@pytest.mark.slow
def test_average_precision_of_both(widerface: Path, dynamic_onnx: Path) -> None:
    result = verify(
        VerifyOptions(
            str(dynamic_onnx), str(dynamic_onnx), data=widerface, images=8, protocol="both", size_hw=(320, 320)
        )
    )
    assert result.passed
    assert set(result.average_precision) == {"letterbox", "original"}
    for levels in result.average_precision.values():
        assert set(levels) == {"easy", "medium", "hard"}
        assert all(ap["reference"] == ap["candidate"] for ap in levels.values())
    losses = [row for row in result.rows if row.stage == "AP"]
    assert len(losses) == 6
    assert all(row.value in (0, None) for row in losses)
