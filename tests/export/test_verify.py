from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from export.quantize import emulate_fp16
from export.verify import (
    BUDGETS,
    ModelInfo,
    Row,
    Side,
    Verification,
    VerifyOptions,
    _ap_rows,
    _batch_rows,
    _demo_samples,
    _empty_rows,
    _evenly,
    _face_rows,
    _network_size,
    _number,
    _open_images,
    _preprocessing,
    _raw_heads,
    _widerface,
    at_least_so_many,
    main,
    parse_arguments,
    verify,
)
from facespec.agreement import Agreement, Sample, draw_disagreements, landmark_errors, match_faces
from facespec.detections import Detections
from facespec.errors import DataError, ModelFileError, OutputError, RetinaFaceError, SpecError
from facespec.images import read_image, write_image
from facespec.kinds import sidecar_path
from facespec.letterbox import Frame
from facespec.spec import AnchorSpec, DecodeSpec, ModelSpec, PreprocessSpec
from tests.engines import write_engine
from trainer import load_model
from trainer.model import TorchRetinaFace
from trt_runtime import load_detector
from trt_runtime.gpu.flavor import gpu_capability


def _faces(boxes: list[list[float]], scores: list[float] | None = None, shift: float = 0.0) -> Detections:
    """Faces whose landmarks lie at the centre, moved by `shift` along x."""
    array = np.array(boxes, np.float32).reshape(-1, 4)
    centres = (array[:, :2] + array[:, 2:]) / 2 + np.array([shift, 0], np.float32)
    landmarks = np.repeat(centres[:, None], 5, axis=1).astype(np.float32)
    return Detections(array, np.array(scores or [0.9] * len(array), np.float32), landmarks, (480, 640))


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes tried besides the one asked for, each about a third as high and wide."""
    monkeypatch.setattr("export.verify.EXTRA_SIZES", ((224, 224), (160, 224), (224, 128)))


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

        def at(self, size_hw: tuple[int, int]) -> Wrong:
            return self

        def detect(self, frame: Frame) -> Detections:
            return _faces([[0, 0, 100, 100]], shift=float(frame[0, 0, 0]))

        def detect_batch(self, frames: list[Frame]) -> list[Detections]:
            return [self.detect(frames[0]) for _ in frames]

    frames = [np.full((64, 64, 3), value, np.uint8) for value in (0, 0, 9)]
    rows = _batch_rows(Wrong(), frames, (64, 64), limited=True)  # type: ignore[arg-type]
    assert [(row.case, row.quantity) for row in rows if not row.passed] == [("slot 2 of 3", "landmarks, % of face")]


@pytest.mark.parametrize("name", [*BUDGETS, None])
@pytest.mark.parametrize("special", [False, True])
def test_the_figures_of_an_agreement_and_their_limits(name: str | None, special: bool) -> None:
    """Uneven, so that a mean is no median, and a percentile no largest; every limit is the one of the budget."""
    agreement = Agreement(images=4, faces=200, candidate_faces=125, iou=[0.9] * 99 + [0.5])
    agreement.landmarks = [0.0] * 90 + [1.0] * 9 + [21.0]
    agreement.scores = [0.01] * 99 + [0.51]
    rows = {row.quantity: row for row in _face_rows(agreement, "case", BUDGETS.get(name or ""), special)}
    values = {"recall %": 50.0, "precision %": 80.0, "mean IoU": 0.896, "mean error, % of face": 0.3}
    if not special:
        values |= {"95 % below, % of face": 1.0, "mean drift": 0.015, "largest drift": 0.51}
    assert {quantity: row.value for quantity, row in rows.items()} == pytest.approx(values)
    limits: dict[str, float] = {}
    if name and special:
        limits = {"recall %": 95.0, "precision %": 93.0, "mean error, % of face": 2.0}
    elif name:
        limits = {"recall %": 98.5, "precision %": 97.5, "mean error, % of face": 1.0, "mean drift": 0.02}
    assert {quantity: row.limit for quantity, row in rows.items() if row.limit is not None} == limits
    assert {quantity for quantity, row in rows.items() if row.at_least} == {"recall %", "precision %"}
    assert {row.case for row in rows.values()} == {"case"}
    assert rows["recall %"].note == "200 faces in 4 images"
    assert rows["precision %"].note == "125 faces"
    failed = {quantity for quantity, row in rows.items() if not row.passed}
    assert failed == ({"recall %", "precision %"} if name else set())


def test_the_budgets_are_those_that_are_published() -> None:
    assert BUDGETS["fp16"].ap_loss == (0.1, 0.1, 0.1)
    assert BUDGETS["int8"].ap_loss == (0.5, 0.5, 1.0)
    assert dataclasses.replace(BUDGETS["fp16"], ap_loss=(0.5, 0.5, 1.0)) == BUDGETS["int8"]
    assert list(BUDGETS) == ["fp16", "int8"]


def test_lost_precision_by_level() -> None:
    """The limit is that of the level; what cannot be measured is no failure, unless nothing can."""
    levels = {
        "easy": {"reference": 90.0, "candidate": 89.45},
        "medium": {"reference": 80.0, "candidate": 80.5},
        "hard": {"reference": 60.0, "candidate": 59.2},
    }
    rows = _ap_rows("case", levels, BUDGETS["int8"])
    assert [row.quantity for row in rows] == ["easy, loss", "medium, loss", "hard, loss"]
    assert [row.value for row in rows] == pytest.approx([0.55, -0.5, 0.8])
    assert [row.limit for row in rows] == [0.5, 0.5, 1.0]
    assert [row.passed for row in rows] == [False, True, True]
    assert [row.passed for row in _ap_rows("case", levels, BUDGETS["fp16"])] == [False, True, False]
    assert [row.limit for row in _ap_rows("case", levels, None)] == [None] * 3
    assert rows[0].note == "90.00 -> 89.45"
    nothing = {"reference": None, "candidate": None}
    rows = _ap_rows("case", {**levels, "easy": nothing}, BUDGETS["int8"])
    assert (rows[0].value, rows[0].passed, rows[0].note) == (None, True, "no face counts")
    with pytest.raises(DataError, match="no face of these images counts"):
        _ap_rows("case", dict.fromkeys(levels, nothing), BUDGETS["int8"])


class _Fixed:
    """A side that gives what it is told to; `runner` and `detector` are both itself."""

    def __init__(self, shift: float = 0.0, faces: int = 1, fixed_hw: tuple[int, int] | None = None, **spec: object):
        self.name = "fixed"
        self.spec = dataclasses.replace(ModelSpec(), **spec)  # type: ignore[arg-type]
        self.fixed_hw, self.size_hw = fixed_hw, None
        self.seen: list[Frame] = []
        self._shift, self._faces = shift, faces

    def runner(self, image: Frame) -> np.ndarray:
        self.seen.append(image)
        rows = np.zeros((10, 16), np.float32)
        rows[3, 2] = self._shift  # a box
        rows[4, 5] = -2 * self._shift * len(self.seen)  # a logit
        rows[5:7, 15] = 3 * self._shift  # landmarks
        return rows

    def at(self, size_hw: tuple[int, int]) -> _Fixed:
        self.size_hw = size_hw
        return self

    def detect(self, frame: Frame) -> Detections:
        self.seen.append(frame)
        scores = [0.9] * self._faces + [0.49]
        return _faces([[40.0 * i, 0, 40.0 * i + 20, 20] for i in range(len(scores))], scores)


def test_raw_heads_by_hand() -> None:
    """Largest over the images, means over priors and images; letterboxed with each side's own mean colour."""
    mean = PreprocessSpec(mean_bgr=(1, 2, 3))
    left, right = _Fixed(preprocess=mean), _Fixed(1.0)
    frames = [np.full((30, 60, 3), 200, np.uint8)] * 2
    rows = _raw_heads(left, right, frames, (64, 96))  # type: ignore[arg-type]
    values = {row.quantity: row.value for row in rows}
    assert values == pytest.approx(
        {
            "boxes, largest": 1.0,
            "boxes, mean": 1 / 40,
            "class logits, largest": 4.0,
            "class logits, mean": 3 / 20,
            "landmarks, largest": 3.0,
            "landmarks, mean": 6 / 100,
        }
    )
    assert {row.case for row in rows} == {"64x96, 2 images"}
    assert not any(row.limit for row in rows)
    for side, colour in ((left, (1, 2, 3)), (right, (104, 117, 123))):
        assert [image.shape for image in side.seen] == [(64, 96, 3)] * 2
        assert (side.seen[0][-1] == colour).all()
        assert (side.seen[0][0, 0] == 200).all()
    anchors = AnchorSpec(min_sizes=((16, 32), (64, 128), (256, 500)))
    assert _raw_heads(_Fixed(), _Fixed(anchors=anchors), frames, (64, 96)) == []  # type: ignore[arg-type]
    hidden = _Fixed()
    hidden.runner = None  # type: ignore[assignment, method-assign]
    assert _raw_heads(hidden, _Fixed(), frames, (64, 96)) == []  # type: ignore[arg-type]
    assert _raw_heads(_Fixed(), hidden, frames, (64, 96)) == []  # type: ignore[arg-type]


def test_where_specs_part() -> None:
    same, notes = _preprocessing(_Fixed(), _Fixed(), (64, 96))  # type: ignore[arg-type]
    assert (same.value, notes) == (0, [])
    assert (same.case, same.quantity) == ("letterbox 64x96", "largest difference")
    other = _Fixed(
        preprocess=PreprocessSpec(mean_bgr=(100, 117, 130)),
        anchors=AnchorSpec(min_sizes=((16, 32), (64, 128), (256, 500))),
        decode=DecodeSpec(top_k=7),
        weights_sha256="b" * 64,
    )
    row, notes = _preprocessing(_Fixed(weights_sha256="a" * 64), other, (64, 96))  # type: ignore[arg-type]
    assert row.value == 7
    assert len(notes) == 4
    assert notes[0] == "preprocess mean_bgr differs: reference (104, 117, 123), candidate (100, 117, 130)"
    assert notes[1].startswith("anchors min_sizes differs: reference ((16, 32)")
    assert notes[2].startswith("decode top_k differs: reference 5000, candidate 7")
    assert notes[3] == "they were made from different weights"
    assert _preprocessing(_Fixed(), other, (64, 96))[1][-1] != notes[3]  # type: ignore[arg-type]


def test_faces_where_there_are_none() -> None:
    """Three frames of the network's size; the candidate may have as many faces as the reference, over 0.5."""
    sides = _Fixed(faces=2), _Fixed(faces=3)
    rows = _empty_rows(*sides, (64, 96), limited=True)  # type: ignore[arg-type]
    assert [row.case for row in rows] == ["plain frame", "noise", "gradient"]
    assert [(row.value, row.limit, row.passed, row.note) for row in rows] == [(3, 2, False, "reference 2")] * 3
    assert all(row.passed for row in _empty_rows(*sides, (64, 96), limited=False))  # type: ignore[arg-type]
    assert all(row.passed for row in _empty_rows(sides[1], sides[0], (64, 96), limited=True))  # type: ignore[arg-type]
    plain, noise, gradient = sides[0].seen[:3]
    assert sides[0].size_hw == sides[1].size_hw == (64, 96)
    assert all(frame.shape == (64, 96, 3) and frame.dtype == np.uint8 for frame in sides[0].seen)
    assert (plain == (104, 117, 123)).all()
    assert noise.std() > 60
    assert (gradient[5, :, 1] == np.linspace(0, 255, 96).astype(np.uint8)).all()
    assert (gradient == gradient[:1, :, :1]).all()


def test_the_network_size() -> None:
    """That of the options, else of the model that has only one, else 640x640."""
    free, small, large = _Fixed(), _Fixed(fixed_hw=(64, 96)), _Fixed(fixed_hw=(96, 64))
    options = VerifyOptions("a", "b")

    def size(reference: _Fixed, candidate: _Fixed, **changes: object) -> tuple[int, int]:
        return _network_size(dataclasses.replace(options, **changes), reference, candidate)  # type: ignore[arg-type]

    assert size(free, free) == (640, 640)
    assert size(free, free, size_hw=(32, 64), protocol="both") == (32, 64)
    assert size(free, small) == size(small, free) == size(small, small) == (64, 96)
    assert size(small, free, size_hw=(64, 96)) == (64, 96)
    for sides in ((small, free), (free, small)):
        with pytest.raises(SpecError, match="fixed takes 64x96 only, not 96x64: give --size"):
            size(*sides, size_hw=(96, 64))
        for protocol in ("original", "both"):
            with pytest.raises(SpecError, match=f"--protocol {protocol} needs models of any size"):
                size(*sides, protocol=protocol)
    with pytest.raises(SpecError, match="96x64 only"):
        size(small, large)


def test_images_are_chosen_evenly() -> None:
    assert _evenly(10, 4) == [0, 3, 6, 9]
    assert _evenly(3, 8) == [0, 1, 2]
    assert _evenly(100, 1) == [0]
    assert _evenly(0, 4) == []


def test_sample_crops_and_a_crowd_of_them() -> None:
    samples = _demo_samples(3)
    assert [sample.name.split(" #")[-1] for sample in samples] == ["0", "1", "2", "crowd of sixteen"]
    crowd = samples[-1].load()
    assert crowd.shape == (960, 960, 3)
    tiles = [crowd[240 * (i // 4) :, 240 * (i % 4) :][:240, :240] for i in range(16)]
    for i, tile in enumerate(tiles):
        assert (tile == tiles[i % 3]).all()
        assert not (tile == tiles[(i + 1) % 3]).all()


def test_each_quantity_of_a_slot() -> None:
    """Least overlap, largest error, largest drift, and faces that one side has alone, unless they are on the edge."""
    alone = _faces([[0, 0, 100, 100], [200, 0, 300, 100], [400, 0, 500, 100]], [0.9, 0.8, 0.505])
    together = _faces([[0, 0, 100, 97], [200, 0, 300, 100]], [0.9, 0.77])
    more = _faces([[0, 0, 100, 100], [200, 0, 300, 100], [400, 0, 500, 100], [0, 200, 9, 209]], [0.9, 0.8, 0.505, 0.6])
    answers = {1: [together, more]}

    class Batch:
        def at(self, size_hw: tuple[int, int]) -> Batch:
            assert size_hw == (64, 96)
            return self

        def detect(self, frame: Frame) -> Detections:
            return alone

        def detect_batch(self, frames: list[Frame]) -> list[Detections]:
            return answers[1]

    frames = [np.zeros((8, 8, 3), np.uint8)] * 2
    rows = _batch_rows(Batch(), frames, (64, 96), limited=True)  # type: ignore[arg-type]
    values = [row.value for row in rows]
    assert values == pytest.approx([0.97, 1.5, 0.03, 0, 1.0, 0, 0, 1], abs=1e-5)
    assert [row.limit for row in rows] == [0.98, 0.5, 0.01, 0] * 2
    assert [row.passed for row in rows] == [False, False, False, True, True, True, True, False]
    assert [row.case for row in rows] == ["slot 0 of 2"] * 4 + ["slot 1 of 2"] * 4
    assert rows[0].note == "3 faces"
    assert all(row.limit is None for row in _batch_rows(Batch(), frames, (64, 96), limited=False))  # type: ignore[arg-type]


def test_what_a_row_and_a_table_say() -> None:
    good = Row("boxes", "a case", "recall %", 98.5, 98.5, True, "a note")
    assert str(good).split() == "boxes a case recall % 98.5 >= 98.5 a note".split()
    bad = Row("scores", "a case", "mean drift", 0.5, 0.02)
    assert str(bad).split() == "scores a case mean drift 0.5 <= 0.02 OVER BUDGET".split()
    assert str(Row("AP", "x", "y", None)).split() == ["AP", "x", "y", "none"]
    assert [_number(value) for value in (0.0, 1e-4, -2e-5, 1e-3, 0.5, 12.0, 98.7654)] == [
        *("0", "1.0e-04", "-2.0e-05", "0.001", "0.5", "12", "98.765"),
    ]
    info = ModelInfo("a.onnx", "portable ONNX", "int8", {"int8": 0.88, "fp16": 0.12}, (320, 640))
    assert str(info) == "a.onnx: portable ONNX, 88.0 % int8, 12.0 % fp16, 320x640"
    assert str(ModelInfo("b", "engine", "fp16", {}, None)) == "b: engine, fp16, any size"
    result = Verification(info, info, "int8", (320, 640), 5, (good,), {}, ("one", "two"), 12.34)
    assert result.passed
    lines = str(result).splitlines()
    assert lines[-3:-1] == ["note: one", "note: two"]
    assert lines[-1] == "passed, within the int8 budget (5 images, 12 s)"
    failed = dataclasses.replace(result, rows=(good, bad, dataclasses.replace(bad, case="other")))
    assert not failed.passed
    wrong = "scores, mean drift (a case); scores, mean drift (other)"
    assert str(failed).splitlines()[-1] == f"FAILED, over the int8 budget: {wrong} (5 images, 12 s)"
    assert [row["passed"] for row in json.loads(failed.to_json())["rows"]] == [True, False, False]
    assert json.loads(failed.to_json())["passed"] is False


@pytest.mark.parametrize(
    ("missed", "of", "limit", "passed"),
    [
        (1, 36, 98.5, True),  # 97.2 %: a face of 36 is no proof
        (1, 1, 98.5, True),
        (2, 36, 98.5, True),
        (3, 36, 98.5, False),
        (12, 854, 98.5, True),
        (13, 854, 98.5, True),  # 98.48 %
        (19, 854, 98.5, True),
        (20, 854, 98.5, False),
        (5000, 10_000, 98.5, False),
        (36, 36, 98.5, False),
    ],
)
def test_a_percentage_of_few_faces_fails_only_beyond_chance(missed: int, of: int, limit: float, passed: bool) -> None:
    from scipy.stats import binom

    value = 100 * (1 - missed / of)
    row = Row("boxes", "case", "recall %", value, limit, True, of=of)
    assert row.passed == passed
    assert row.undecided == (passed and value < limit)
    chance = float(binom.sf(missed - 1, of, 1 - limit / 100))
    assert at_least_so_many(missed, of, 1 - limit / 100) == pytest.approx(chance, abs=1e-9)
    assert passed == (value >= limit or missed <= 1 or chance >= 0.05)
    assert not dataclasses.replace(row, value=limit).undecided
    assert ("UNDECIDED" in str(row), "OVER BUDGET" in str(row)) == (row.undecided, not passed)


def test_the_resolution_of_few_faces_is_said() -> None:
    agreement = Agreement(faces=36, candidate_faces=36, iou=[0.9] * 35, landmarks=[0.1] * 35, scores=[0.0] * 35)
    rows = _face_rows(agreement, "a case", BUDGETS["int8"])
    assert rows[0].note == "36 faces in 0 images, one is 2.8 %"
    info = ModelInfo("a.onnx", "portable ONNX", "int8", {"int8": 1.0}, None)
    said = str(Verification(info, info, "int8", (320, 640), 5, tuple(rows), {}, (), 1.0)).splitlines()
    assert said[-1] == "passed, within the int8 budget (5 images, 1 s)"
    assert said[-3].startswith(
        "note: recall % (a case) is 97.2, under 98.5, and that may be chance: of 36 faces one is 2.8"
    )


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
    picture = tmp_path / "worst.png"
    result = verify(VerifyOptions(str(dynamic_onnx), str(dynamic_onnx), size_hw=(320, 320), images=4, plot=picture))
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
    sizes = {f"letterbox {size}" for size in ("320x320", "640x640", "480x640", "640x384")}
    assert {row.case for row in result.rows if row.stage == "boxes"} == {*sizes, "crowds, letterbox 320x320"}
    assert {row.case for row in result.rows if row.stage == "raw heads"} == {"320x320, 5 images"}
    assert result.images == 5
    # the fullest images are the crowds, and a batch of them
    slots = [row for row in result.rows if row.quantity == "least IoU, to it alone"]
    assert [row.case for row in slots] == [f"slot {slot} of 4" for slot in range(4)]
    counts = [int(row.note.split()[0]) for row in slots]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] >= 8
    assert result.budget == "fp16"
    assert any("sample photographs only" in note for note in result.notes)

    data = json.loads(result.to_json())
    assert data["passed"] is True
    assert data["candidate"]["kind"] == "portable ONNX"
    assert data["candidate"]["precision"] == "fp32"
    assert data["size_hw"] == [320, 320]
    assert data["average_precision"] == {}
    origin = {"date", "command", "machine", "versions"}
    assert set(data) == {field.name for field in dataclasses.fields(result)} | {"passed"} | origin
    for row in data["rows"]:
        assert set(row) == {field.name for field in dataclasses.fields(Row)} | {"passed", "undecided"}
        assert isinstance(row["value"], (int, float, type(None)))
        assert isinstance(row["passed"], bool)

    image = read_image(picture)
    assert image.shape[1] > 1000
    assert (image == (80, 220, 60)).all(axis=2).any()
    assert (image == (60, 60, 255)).all(axis=2).any()


def test_the_backend_that_is_chosen(int8_onnx: Path) -> None:
    (note, hidden) = Side(str(int8_onnx), backend="auto").notes
    assert "run as it is deployed" in note
    assert "backend openvino, openvino " in note
    assert "does not show its raw heads" in hidden


def test_a_candidate_in_bf16(int8_onnx: Path) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(SpecError, match="this CPU does not compute in bf16"):
            Side(str(int8_onnx), precision="bf16")
        return
    note = Side(str(int8_onnx), precision="bf16").notes[0]
    assert "backend openvino, openvino " in note
    assert "bf16" in note


def test_a_checkpoint_has_no_deployed_precision() -> None:
    with pytest.raises(SpecError, match=r"--precision is for exported models, the candidate mobilenet0\.25 is none"):
        verify(VerifyOptions("mobilenet0.25", "mobilenet0.25", precision="bf16"))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_candidate_as_it_is_deployed(backend: str, int8_onnx: Path) -> None:
    """The faces are those of the backend, not of the emulation; raw heads are for graphs only."""
    result = verify(VerifyOptions("mobilenet0.25", str(int8_onnx), images=2, backend=backend, budget="none"))
    ran = backend
    (note,) = (note for note in result.notes if "run as it is deployed" in note)
    assert f"backend {ran}, {ran} " in note
    assert not any("emulated" in note for note in result.notes)
    assert any("does not show its raw heads" in note for note in result.notes)
    assert "no budget was set" in str(result)
    assert "raw heads" not in {row.stage for row in result.rows}
    detector = load_detector(int8_onnx, backend=ran, score_threshold=0.02)
    reference = TorchRetinaFace(load_model(), score_threshold=0.02, size_hw=(320, 320))
    agreement = Agreement()
    for sample in _demo_samples(2):
        agreement.add(reference.detect(sample.load()), detector.detect(sample.load()))
    values = {(row.stage, row.quantity): row.value for row in result.rows if row.case == "letterbox 320x320"}
    assert values["boxes", "recall %"] == pytest.approx(agreement.recall)
    assert values["landmarks", "mean error, % of face"] == pytest.approx(np.mean(agreement.landmarks))
    assert values["scores", "largest drift"] == pytest.approx(np.max(agreement.scores))


def test_without_a_backend_the_graph_is_emulated(int8_onnx: Path) -> None:
    result = verify(VerifyOptions("mobilenet0.25", str(int8_onnx), images=2))
    assert result.budget == "int8"
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
    perturbed: Path, tmp_path: Path, small_sizes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--reference", "mobilenet0.25", "--candidate", str(perturbed), "--images", "2", "--size", "320x320"]
    assert main([*line, "--json", str(tmp_path / "out.json")]) == 1
    text = capsys.readouterr().out
    assert "OVER BUDGET" in text
    assert "FAILED, over the fp16 budget: landmarks, mean error" in text
    assert "they were made from different weights" in text
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["passed"] is False
    assert any(not row["passed"] for row in data["rows"])


def test_without_a_budget_nothing_fails(
    perturbed: Path, small_sizes: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And '-' prints JSON alone."""
    line = ["--reference", "mobilenet0.25", "--candidate", str(perturbed), "--images", "2", "--size", "320x320"]
    assert main([*line, "--budget", "none", "--json", "-", "--plot", str(tmp_path / "p.jpg")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["passed"], data["budget"], data["images"]) == (True, "none", 3)
    assert all(row["limit"] is None for row in data["rows"])
    assert max(row["value"] or 0 for row in data["rows"] if row["quantity"] == "mean error, % of face") > 1
    assert not Path("-").exists()
    assert (tmp_path / "p.jpg").is_file()


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
    session = ort.InferenceSession(emulate_fp16(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, (x.astype(np.float16) * factor * factor).astype(np.float32))


@pytest.mark.parametrize("side", ["--reference", "--candidate"])
@pytest.mark.parametrize("name", ["nothing.onnx", "nothing.pth"])
def test_missing_models_take_one_line(error_line: Callable[..., str], side: str, name: str) -> None:
    other = "--candidate" if side == "--reference" else "--reference"
    assert name in error_line(main, side, name, other, "mobilenet0.25")


def test_the_command_takes_one_line(refused: Callable[..., str]) -> None:
    line = refused("export.verify", "--reference", "a.onnx", "--candidate", "b.pth", "--backend", "openvino")
    assert line == "error: --backend is for exported models, the candidate b.pth is none"


@pytest.mark.parametrize("words", ["import export", "import export.verify", "from export.verify import verify"])
def test_the_package_has_it_as_a_function(words: str) -> None:
    """Whatever was imported before, and as the module that it also is."""
    code = f"""{words}
import export
from export import VerifyOptions, verify
from facespec.errors import SpecError
for function in (export.verify, verify, verify.verify):
    try:
        function(VerifyOptions("a", "b.pth", backend="openvino"))
    except SpecError:
        print("called")
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["called"] * 3


def test_an_engine_takes_one_line(error_line: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    engine = tmp_path / "a.engine"
    engine.write_bytes(b"ftrt")
    line = error_line(main, "--reference", "mobilenet0.25", "--candidate", engine)
    if gpu_capability() is None:
        assert "the .onnx file runs on the CPU" in line
    else:  # it gets further, and finds that this is none
        assert "a.engine" in line


@pytest.mark.parametrize("name", ["model", "model.bin", "model.trt", "model.pth"])
def test_exported_models_of_any_name(name: str, static_onnx: Path, tmp_path: Path) -> None:
    engine, place = write_engine(tmp_path), tmp_path / name
    engine.rename(place)
    sidecar_path(engine).rename(sidecar_path(place))
    with pytest.raises(SpecError, match="an engine runs in TensorRT only"):
        verify(VerifyOptions(str(static_onnx), str(place), backend="openvino"))
    sidecar_path(place).unlink()
    if place.suffix in ("", ".bin"):
        place.write_bytes(static_onnx.read_bytes())
        side = Side(str(place))
        assert (side.info.kind, side.fixed_hw, side.runner is not None) == ("portable ONNX", (320, 320), True)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"size_hw": (640, 640)}, SpecError, "320x320 only"),
        ({"protocol": "original"}, SpecError, "fixed size"),
        ({"plot": Path("worst.txt")}, OutputError, "--plot worst.txt"),
        ({"data": Path("nowhere")}, DataError, "wider_face_val.mat"),
        ({"candidate": "a.plan"}, ModelFileError, "no such model file"),
    ],
)
def test_refused(static_onnx: Path, changes: dict[str, object], error: type[RetinaFaceError], text: str) -> None:
    options = VerifyOptions(str(static_onnx), str(static_onnx))
    with pytest.raises(error, match=text):
        verify(dataclasses.replace(options, **changes))  # type: ignore[arg-type]


class _Counting(_Fixed):
    """A side that finds as many faces as the first pixel says; on a frame of another size it is one pixel off."""

    def __init__(self, precision: str = "fp32", **options: Any):
        super().__init__(**options)
        self.info = ModelInfo("x", "stub", precision, {}, self.fixed_hw)
        self.detector = None
        self.notes = [f"a note of {precision}"]
        self.sizes: list[tuple[int, int] | None] = []

    def at(self, size_hw: tuple[int, int] | None) -> Any:
        self.size_hw = size_hw
        return self

    def detect(self, frame: Frame) -> Detections:
        self.sizes.append(self.size_hw)
        count = int(frame[0, 0, 0]) if frame[0, 0, 1] == 250 else 0
        return _faces([[60.0 * i, 0, 60.0 * i + 40, 40] for i in range(count)], [0.9] * count)

    def detect_batch(self, frames: list[Frame]) -> list[Detections]:
        return [self.detect(frame) for frame in frames]


def _flow(monkeypatch: pytest.MonkeyPatch, reference: _Counting, candidate: _Counting, **options: Any) -> Verification:
    """Run verify over two such sides, on forty images with up to twelve faces."""

    def side(name: str, backend: str | None = None, precision: str = "fp32") -> _Counting:
        assert backend == (options.get("backend") if name == "b.onnx" else None)
        assert precision == (options.get("precision", "fp32") if name == "b.onnx" else "fp32")
        return {"a": reference, "b.onnx": candidate}[name]

    def samples(count: int) -> list[Sample]:
        def frame(index: int) -> Frame:
            return np.full((20, 30, 3), (index * 5 % 13, 250, 0), np.uint8)

        return [Sample(f"{index}", functools.partial(frame, index)) for index in range(count)]

    monkeypatch.setattr("export.verify.Side", side)
    monkeypatch.setattr("export.verify._demo_samples", samples)
    return verify(VerifyOptions("a", "b.onnx", **{"images": 40, "progress": False, **options}))


def test_what_is_compared_on_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Raw heads on eight images, the fullest eight as crowds, thirty-two at each other size, four in a batch."""
    sides = _Counting(), _Counting()
    found = _flow(monkeypatch, *sides, plot=tmp_path / "p.PNG")
    assert found.passed
    assert (found.size_hw, found.images, found.average_precision) == ((640, 640), 40, {})
    notes = {row.case: row.note for row in found.rows if row.quantity == "recall %"}
    counts = [index * 5 % 13 for index in range(40)]
    assert notes["letterbox 640x640"] == f"{sum(counts)} faces in 40 images"
    assert notes["crowds, letterbox 640x640"] == (
        f"{(faces := sum(sorted(counts)[-8:]))} faces in 8 images, one is {100 / faces:.1f} %"
    )
    thinned = np.unique(np.linspace(0, 39, 32).astype(int))
    faces = sum(counts[i] for i in thinned)
    for size in ("480x640", "640x384"):
        assert notes[f"letterbox {size}"] == f"{faces} faces in 32 images, one is {100 / faces:.1f} %"
    assert len(notes) == 4
    assert {row.case for row in found.rows if row.stage == "raw heads"} == {"640x640, 8 images"}
    slots = [row.note for row in found.rows if row.quantity == "least IoU, to it alone"]
    assert slots == [f"{count} faces" for count in sorted(counts)[-1:-5:-1]]
    assert [row.case for row in found.rows if row.stage == "zero faces"] == ["plain frame", "noise", "gradient"]
    stages = list(dict.fromkeys(row.stage for row in found.rows))
    assert stages == ["preprocessing", "raw heads", "boxes", "landmarks", "scores", "batch", "zero faces"]
    assert found.notes[:2] == ("a note of fp32", "a note of fp32")
    assert "sample photographs only" in found.notes[2]
    assert len(found.notes) == 3
    assert read_image(tmp_path / "p.PNG").size > 0
    # special cases hold the wider limits
    limits = {row.case: row.limit for row in found.rows if row.quantity == "recall %"}
    assert limits == {case: 98.5 if case == "letterbox 640x640" else 95.0 for case in notes}
    assert set(sides[1].sizes) == {(640, 640), (480, 640), (640, 384)}


def test_sizes_and_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(reference: _Counting, candidate: _Counting, **options: Any) -> list[str]:
        found = _flow(monkeypatch, reference, candidate, images=9, **options)
        assert ("no other size was tried: a model takes 64x96 only" in found.notes) == bool(candidate.fixed_hw)
        return [row.case for row in found.rows if row.quantity == "recall %"]

    usual = ["letterbox 640x640", "letterbox 480x640", "letterbox 640x384"]
    own = ["letterbox 64x96", "crowds, letterbox 64x96"]
    assert cases(_Counting(), _Counting(), size_hw=(64, 96)) == [*own, *usual]
    assert cases(_Counting(), _Counting(fixed_hw=(64, 96))) == own
    assert cases(_Counting(), _Counting(), size_hw=(480, 640))[2:] == [usual[0], usual[2]]
    candidate = _Counting()
    assert cases(_Counting(), candidate, protocol="original") == ["original size", "crowds, original size", *usual[1:]]
    assert None in candidate.sizes
    both = cases(_Counting(), _Counting(), protocol="both", size_hw=(64, 96))
    assert both == [*own, "original size", *usual]


@pytest.mark.parametrize(
    ("precision", "asked", "budget"),
    [
        ("fp32", None, "fp16"),
        ("fp16", None, "fp16"),
        ("int8", None, "int8"),
        ("int8", "fp16", "fp16"),
        ("fp32", "int8", "int8"),
        ("int8", "none", "none"),
    ],
)
def test_the_budget_is_of_the_candidate(
    precision: str, asked: str | None, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _flow(monkeypatch, _Counting("int8"), _Counting(precision), images=9, budget=asked, backend="openvino")
    assert found.budget == budget
    assert found.candidate.precision == precision
    assert found.reference.precision == "int8"
    assert any(row.limit is not None for row in found.rows) == (budget != "none")


def test_the_images_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are there, evenly thinned out, with their ground truth and no other, in the same order."""
    truth = {("b", f"{index}"): index for index in (3, 1, 2, 5, 4, 0)} | {("a", "x"): 9}
    monkeypatch.setattr("trainer.average_precision.load_ground_truth", lambda path: truth)
    options = VerifyOptions("a", "b")
    with pytest.raises(DataError, match=r"none of the 7 WIDER FACE images is there"):
        _widerface(options, tmp_path)
    for index in (1, 2, 3, 4, 5):
        write_image(tmp_path / "val" / "images" / "b" / f"{index}.png", np.full((4, 4, 3), 50 * index, np.uint8))
        (tmp_path / "val" / "images" / "b" / f"{index}.png").rename(tmp_path / f"val/images/b/{index}.jpg")
    scored: dict[Any, Any] = {}

    def score(rows: dict[Any, Any], of: dict[Any, Any]) -> dict[str, Any]:
        scored.update({key: (len(rows[key]), value) for key, value in of.items()})
        return {}

    monkeypatch.setattr("trainer.average_precision.average_precision", score)
    samples, ap, notes = _widerface(options, tmp_path)
    assert [sample.name for sample in samples] == ["b/3", "b/1", "b/2", "b/5", "b/4"]
    assert ap is not None
    assert ap([_faces([[0, 0, 1, 1]] * count) for count in range(5)]) == {}
    assert list(scored.items()) == [(("b", name), (count, int(name))) for count, name in enumerate("31254")]
    assert notes == []
    assert [int(sample.load()[0, 0, 0]) for sample in samples] == [150, 50, 100, 250, 200]
    samples, ap, _ = _widerface(dataclasses.replace(options, images=3), tmp_path)
    assert [sample.name for sample in samples] == ["b/3", "b/2", "b/4"]
    scored.clear()
    assert ap is not None
    ap([_faces([])] * 3)
    assert list(scored) == [("b", "3"), ("b", "2"), ("b", "4")]


def _own_faces(folder: Path, photographs: dict[str, Frame]) -> Path:
    """A COCO file over sample photographs, in the layout of CVAT; its boxes are what the published weights find."""
    detector = TorchRetinaFace(load_model(), size_hw=(320, 320))
    images, annotations = [], []
    for number, (name, frame) in enumerate(photographs.items()):
        write_image(folder / "images" / "default" / f"{name}.png", frame)
        images.append({"id": number, "file_name": f"{name}.png"})
        for x1, y1, x2, y2 in detector.detect(frame).boxes.tolist():
            annotations.append({"image_id": number, "category_id": 2, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    path = folder / "annotations" / "instances_default.json"
    path.parent.mkdir()
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "head"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.mark.usefixtures("small_sizes")
def test_own_labels_and_plain_folders_are_compared_on(
    static_onnx: Path, photographs: dict[str, Frame], tmp_path: Path
) -> None:
    file = _own_faces(tmp_path / "own", photographs)
    options = VerifyOptions(str(static_onnx), "mobilenet0.25", data=file, progress=False)
    found = verify(options)
    assert found.images == len(photographs)
    # both find what is labelled, to the rounding of their additions
    assert found.average_precision == {
        "letterbox": {
            level: {"reference": pytest.approx(100), "candidate": pytest.approx(100)} for level in ("ap50", "ap50_95")
        }
    }
    assert [row.quantity for row in found.rows if row.stage == "AP"] == ["ap50, loss", "ap50_95, loss"]
    assert any("faces are the annotations of 'head'" in note for note in found.notes)
    samples, score, _ = _open_images(dataclasses.replace(options, data=tmp_path / "own", images=1), tmp_path / "own")
    assert (len(samples), score is None) == (1, False)
    # a folder without labels has no AP, and a file of labels must be one
    plain = tmp_path / "own" / "images"
    samples, score, notes = _open_images(options, plain)
    assert [Path(sample.name).name for sample in samples] == sorted(f"{name}.png" for name in photographs)
    assert score is None
    assert re.fullmatch(r"no AP: --data \S+images: no label.txt, no COCO .json .*", notes[0])
    assert samples[0].load().shape == photographs[min(photographs)].shape
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    for data, words in ((tmp_path / "empty", "no COCO .json"), (tmp_path / "bad.json", "cannot be read as JSON")):
        with pytest.raises(DataError, match=words):
            _open_images(options, data)


def test_the_images_are_a_number_or_a_folder() -> None:
    line = ["--reference", "a", "--candidate", "b", "--data", "d.json", "--category", "head"]
    options = VerifyOptions("a", "b", data=Path("d.json"), category="head")
    for more, changes in (
        (["--images", "7"], {"images": 7}),
        (["--images", "f"], {"image_folder": Path("f")}),
        (["--images", "f", "--images", "7"], {"images": 7, "image_folder": Path("f")}),
    ):
        assert parse_arguments([*line, *more]) == dataclasses.replace(options, **changes)  # type: ignore[arg-type]


def test_images_without_faces_are_no_comparison(static_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(count: int) -> list[Sample]:
        return [Sample("flat", lambda: np.full((64, 64, 3), 90, np.uint8))] * count

    monkeypatch.setattr("export.verify._demo_samples", flat)
    with pytest.raises(DataError, match="nothing was compared: the reference finds no face"):
        verify(VerifyOptions(str(static_onnx), str(static_onnx), images=1))


def test_outputs_never_replace_a_model(static_onnx: Path) -> None:
    with pytest.raises(OutputError, match="is a file that is read"):
        verify(VerifyOptions(str(static_onnx), str(static_onnx), json=static_onnx))


@pytest.mark.parametrize("changes", [{"images": 0}, {"budget": "int4"}, {"protocol": "other"}])
def test_options_are_checked(changes: dict[str, object]) -> None:
    VerifyOptions("a", "b", images=1, budget="none", protocol="both")
    with pytest.raises(SpecError):
        VerifyOptions("a", "b", **changes)  # type: ignore[arg-type]


def test_arguments() -> None:
    options = parse_arguments(["--reference", "a", "--candidate", "b.onnx", "--size", "480x640", "--budget", "int8"])
    assert options == VerifyOptions("a", "b.onnx", size_hw=(480, 640), budget="int8")
    options = parse_arguments(["--reference", "a", "--candidate", "b.onnx", "--backend", "openvino"])
    assert options == VerifyOptions("a", "b.onnx", backend="openvino")
    with pytest.raises(SystemExit):
        parse_arguments(["--reference", "a", "--candidate", "b.onnx", "--backend", "abacus"])
    line = ["--reference", "a", "--candidate", "b.onnx"]
    assert parse_arguments(line) == VerifyOptions("a", "b.onnx", protocol="letterbox")
    more = ["--data", "d", "--protocol", "both", "--images", "7", "--json", "j.json", "--plot", "p.png"]
    expected = VerifyOptions("a", "b.onnx", Path("d"), None, "both", None, 7, None, Path("j.json"), Path("p.png"))
    assert parse_arguments([*line, *more]) == expected


def test_a_picture_of_nothing_is_still_a_picture() -> None:
    assert draw_disagreements([], [], [[], []]).size > 0


@pytest.mark.data
@pytest.mark.slow
def test_average_precision_of_both(widerface: Path, dynamic_onnx: Path, small_sizes: None) -> None:
    result = verify(
        VerifyOptions(
            str(dynamic_onnx), str(dynamic_onnx), data=widerface, images=2, protocol="both", size_hw=(320, 320)
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
