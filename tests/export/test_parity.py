"""The report that an export must pass: what it compares, by numbers of our own, and what it lets through."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from export.graph import HEAD_NAMES, build_plugin_form, build_portable
from export.parity import (
    TOLERANCES,
    ParityReport,
    ParityRow,
    Tolerance,
    _compare,
    check_parity,
    rows_from_maps,
)
from export.quantize import to_fp16
from facespec.boxes import Decoded
from facespec.errors import ParityError
from facespec.letterbox import Frame
from facespec.spec import DecodeSpec, ModelSpec
from trainer import load_model

TOLERANCE = Tolerance(heads=0.5, pixels=2.0, scores=0.1, margin=0.05)
SPEC = ModelSpec(decode=DecodeSpec(score_threshold=0.2))
EQUAL = ParityRow("a.png", (64, 96), 0.5, 2.0, 2.0, 0.1, 3, 0, TOLERANCE)
NAN = float("nan")


def test_the_tolerances_of_fp32_are_those_of_float32() -> None:
    assert TOLERANCES["fp32"] == Tolerance(heads=1e-3, pixels=0.05, scores=1e-3, margin=4e-5)
    assert list(TOLERANCES) == ["fp32", "fp16", "int8"]
    for field in ("heads", "pixels", "scores", "margin"):
        values = [getattr(tolerance, field) for tolerance in TOLERANCES.values()]
        assert values == sorted(values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("heads", value) for value in (0.501, NAN, np.inf)),
        *(("boxes_px", value) for value in (2.01, NAN)),
        *(("landmarks_px", value) for value in (2.01, NAN)),
        *(("scores", value) for value in (0.101, NAN)),
        *(("unmatched", value) for value in (1, 5)),
    ],
)
def test_one_difference_is_enough(field: str, value: float) -> None:
    """At the tolerance all is well; beyond it, or where it is no number, it is not, and everything says so."""
    assert EQUAL.equal
    row = dataclasses.replace(EQUAL, image="b.png", **{field: value})
    assert not row.equal
    report = ParityReport(SPEC, (EQUAL, row))
    lines = str(report).splitlines()
    assert [line.endswith("DIFFERS") for line in lines] == [False, False, True, False]
    assert lines[-1] == "it differs; allowed: heads 0.5, boxes and landmarks 2 px, scores 0.1"
    with pytest.raises(ParityError, match=r"on b\.png: .*nothing was written") as caught:
        report.require_equal()
    assert "\n" not in str(caught.value)


def test_what_a_report_says() -> None:
    other = ParityRow("long/" * 9 + "b.png", (32, 640), 0.1, 0.3, 0.2, 0.05, 4, 0, TOLERANCE)
    report = ParityReport(SPEC, (EQUAL, other), "plugin form")
    report.require_equal()
    title, first, second, verdict = str(report).splitlines()
    assert title.split() == "plugin form against PyTorch size heads boxes px lmk px faces unmatched".split()
    assert first.split() == ["a.png", "64x96", "5.0e-01", "2.0e+00", "2.0e+00", "3", "0"]
    assert second.split()[1:] == ["32x640", "1.0e-01", "3.0e-01", "2.0e-01", "4", "0"]
    assert verdict.startswith("equal; ")
    assert report.summary() == {
        "images": 2, "faces": 7, "heads": 0.5, "boxes_px": 2.0, "landmarks_px": 2.0, "scores": 0.1,
    }  # fmt: skip
    nobody = dataclasses.replace(EQUAL, faces=0)
    ParityReport(SPEC, (nobody, EQUAL)).require_equal()
    with pytest.raises(ParityError, match="finds no face on any of the images; try --parity"):
        ParityReport(SPEC, (nobody, nobody)).require_equal()


def test_numbers_in_the_message() -> None:
    row = ParityRow("x.png", (64, 96), 9.0, 8.0, 7.0, 0.6, 3, 2, TOLERANCE)
    with pytest.raises(ParityError) as caught:
        ParityReport(SPEC, (row,)).require_equal()
    for words in (
        "heads 9 (at most 0.5)",
        "boxes 8 px, landmarks 7 px (at most 2)",
        "scores 0.6 (at most 0.1)",
        "unmatched faces 2",
    ):
        assert words in str(caught.value)


def test_rows_are_in_the_order_of_the_priors() -> None:
    """Cell by cell along a row, then down, then the next level; taken apart by plain indexing."""
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(1, 32, rows, columns)).astype(np.float32) for rows, columns in ((4, 6), (2, 3), (1, 2))]
    expected = [
        [
            *level[0, 4 + 4 * prior : 8 + 4 * prior, row, column],
            *level[0, 2 * prior : 2 + 2 * prior, row, column],
            *level[0, 12 + 10 * prior : 22 + 10 * prior, row, column],
        ]
        for level in maps
        for row in range(level.shape[2])
        for column in range(level.shape[3])
        for prior in range(2)
    ]
    np.testing.assert_array_equal(rows_from_maps(maps, 2), expected)


def _side(faces: list[tuple[float, float]], shift: float = 0.0) -> tuple[NDArray[np.float32], ...]:
    """Boxes 10 pixels wide at some x with some score; landmarks, moved by `shift`, and scores."""
    boxes = np.array([[x, 0, x + 10, 10] for x, _ in faces], np.float32).reshape(-1, 4)
    points = np.array([[[x + i + shift, i] for i in range(5)] for x, _ in faces], np.float32).reshape(-1, 5, 2)
    return boxes, np.array([score for _, score in faces], np.float32), points


def _row(
    expected: list[tuple[float, float]], found: list[tuple[float, float]], shift: float = 0.0, head: float = 0.0
) -> ParityRow:
    boxes, scores, points = _side(expected)
    theirs = _side(found, shift)
    maps = {name: np.zeros((1, 32, side, side), np.float32) for name, side in zip(HEAD_NAMES, (8, 4, 2), strict=True)}
    maps[HEAD_NAMES[2]][0, 31, -1, -1] = head
    padded = {
        name: np.concatenate([values, np.full((3, *values.shape[1:]), 777, np.float32)])[None]
        for name, values in zip(("boxes", "scores", "landmarks"), theirs, strict=True)
    }
    outputs = {**maps, **padded, "num_detections": np.array([len(found)], np.int32)}
    raw = np.zeros((2 * (64 + 16 + 4), 16), np.float32)
    decoded = Decoded(boxes, scores, points, np.arange(len(scores)), len(scores))
    return _compare("x", SPEC, (64, 64), raw, decoded, outputs, TOLERANCE)


def test_differences_by_hand() -> None:
    row = _row([(0, 0.9), (50, 0.6)], [(1.5, 0.85), (50, 0.6)], shift=0.25, head=-0.4)
    assert (row.image, row.size_hw, row.faces, row.unmatched) == ("x", (64, 64), 2, 0)
    assert row.tolerance is TOLERANCE
    assert row.boxes_px == pytest.approx(1.5)
    assert row.landmarks_px == pytest.approx(1.75)
    assert row.scores == pytest.approx(0.05)
    assert row.heads == pytest.approx(0.4)
    assert row.equal
    # in another order
    row = _row([(0, 0.9), (50, 0.6)], [(50, 0.6), (0, 0.9)])
    assert (row.boxes_px, row.landmarks_px, row.scores, row.unmatched) == (0, 0, 0, 0)


def test_faces_of_one_side_alone() -> None:
    assert _row([(0, 0.9), (50, 0.6)], [(0, 0.9)]).unmatched == 1
    assert _row([(0, 0.9)], [(0, 0.9), (50, 0.6), (90, 0.3)]).unmatched == 2
    assert _row([(0, 0.9)], [(30, 0.9)]).unmatched == 2  # too far apart to be one
    assert _row([(0, 0.9)], []).unmatched == 1
    assert _row([], [(0, 0.9)]).unmatched == 1
    assert _row([], []).equal
    # of two that are near to the same face, the nearer is it
    assert _row([(0, 0.9)], [(1, 0.9), (0.5, 0.8)]).unmatched == 1
    assert _row([(0, 0.9)], [(1, 0.9), (0.5, 0.8)]).boxes_px == pytest.approx(0.5)
    # a little over the floor it may fall to either side
    assert _row([(0, 0.9), (50, 0.24)], [(0, 0.9), (90, 0.24)]).unmatched == 0
    assert _row([(0, 0.9), (50, 0.26)], [(0, 0.9), (90, 0.26)]).unmatched == 2


def test_coordinates_near_the_floor_are_overlooked_and_scores_are_not() -> None:
    row = _row([(0, 0.24), (50, 0.9)], [(1.5, 0.2), (50, 0.9)])
    assert (row.boxes_px, row.landmarks_px, row.unmatched) == (0, 0, 0)
    assert row.scores == pytest.approx(0.04)
    row = _row([(0, 0.26), (50, 0.9)], [(1.5, 0.22), (50, 0.9)])
    assert (row.boxes_px, row.landmarks_px) == (1.5, 1.5)


def test_a_tolerance_below_a_pixel_still_pairs_what_is_a_pixel_apart() -> None:
    """Else it would be called unmatched, and not how far it is off."""
    boxes, scores, points = _side([(0, 0.9)])
    moved, _, _ = _side([(0.9, 0.9)])
    maps = {name: np.zeros((1, 32, side, side), np.float32) for name, side in zip(HEAD_NAMES, (8, 4, 2), strict=True)}
    outputs = {**maps, "boxes": moved[None], "scores": scores[None], "landmarks": points[None]}
    outputs["num_detections"] = np.array([1], np.int32)
    raw = np.zeros((168, 16), np.float32)
    row = _compare(
        "x", SPEC, (64, 64), raw, Decoded(boxes, scores, points, np.arange(1), 1), outputs, TOLERANCES["fp32"]
    )
    assert (row.unmatched, row.boxes_px) == (0, pytest.approx(0.9))
    assert not row.equal


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("form", ["portable", "plugin", "channels last"])
def test_both_forms_in_both_precisions(
    form: str, precision: str, heads: onnx.ModelProto, photographs: dict[str, Frame]
) -> None:
    """By the tolerances of the precision, at the size of the network."""
    model = load_model()
    network = to_fp16(heads) if precision == "fp16" else heads
    if form == "portable":
        graph = build_portable(network, model.spec, (320, 320))
    else:
        graph = build_plugin_form(network, model.spec, (320, 320), channels_last=form == "channels last")
    report = check_parity(graph, model, photographs, (320, 320), precision)
    assert report.title == ("ONNX" if form == "portable" else "plugin form")
    assert [row.image for row in report.rows] == list(photographs)
    for row in report.rows:
        assert row.tolerance is TOLERANCES[precision]
        assert row.size_hw == (320, 320)
        assert row.faces > 0
        assert 0 < row.heads < (1e-3 if precision == "fp32" else 0.5)
        assert (row.heads > 1e-3) == (precision == "fp16")
    report.require_equal()
    if form == "portable":  # a threshold that is higher than the model's shows
        strict = dataclasses.replace(model.spec, decode=DecodeSpec(score_threshold=0.9))
        rows = check_parity(build_portable(network, strict, (320, 320)), model, photographs, (320, 320)).rows
        assert sum(row.unmatched for row in rows) > 0


def test_without_a_size_each_frame_has_its_own(dynamic_onnx: object, photographs: dict[str, Frame]) -> None:
    graph = onnx.load(dynamic_onnx)  # type: ignore[arg-type]
    frames = {"a": photographs["astronaut"][:100, :170], "b": photographs["astronaut"][:64, :64]}
    report = check_parity(graph, load_model(), frames, None)
    assert [row.size_hw for row in report.rows] == [(128, 192), (64, 64)]
    assert all(row.heads < 1e-3 for row in report.rows)
