"""Regions of interest, tiles and the smallest face, on a real model; the geometry of tiles for any size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facespec.boxes import iou_matrix
from facespec.detections import Detections
from facespec.errors import ClosedError, FrameError, SpecError
from facespec.letterbox import Frame
from trt_runtime import Nv12Frame, TRTRetinaFace
from trt_runtime.regions import OVERLAP, check_region, in_frame, joined, parse_region, tiles

pytest.importorskip("onnxruntime", reason="pip install -e '.[cpu]'")

SIDE = 320


@pytest.fixture
def detector(static_onnx: Path) -> Iterator[Any]:
    from trt_runtime import OrtRetinaFace

    with OrtRetinaFace(static_onnx, threads=1) as made:
        yield made


def _same(found: Detections, expected: Detections) -> None:
    for name in ("boxes", "scores", "landmarks"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.frame_hw, found.truncated) == (expected.frame_hw, expected.truncated)


def test_a_region_gives_what_its_part_of_the_frame_gives(detector: Any, astronaut: Frame) -> None:
    frame = np.zeros((700, 900, 3), np.uint8)
    frame[150:662, 250:762] = astronaut
    x, y, width, height = region = (240, 140, 530, 540)
    expected = detector.detect(np.ascontiguousarray(frame[y : y + height, x : x + width])).moved(x, y, (700, 900))
    assert len(expected) == 1
    detector.roi = region
    _same(detector.detect(frame), expected)
    _same(detector.detect_batch([frame, frame])[1], expected)
    detector.roi = (600, 0, 9999, 9999)  # cut at the edges of the frame; the face is not in it
    assert len(detector.detect(frame)) == 0
    detector.roi = None
    _same(detector.detect(frame), detector.detect_batch([frame])[0])


def test_faces_smaller_than_asked_for_are_left_out(detector: Any, crowd: Frame) -> None:
    every = detector.detect(crowd)
    sides = (every.boxes[:, 2:] - every.boxes[:, :2]).max(axis=1)
    assert len(every) == 3
    middle = float(np.sort(sides)[len(sides) // 2])
    detector.min_face = middle
    found = detector.detect(crowd)
    _same(found, every[sides >= middle])
    assert 0 < len(found) < len(every)
    detector.min_face = 0
    _same(detector.detect(crowd), every)


def _large(astronaut: Frame) -> tuple[Frame, list[tuple[int, int, int]]]:
    """Return a frame of many network sizes with small pictures of a face, and a large one: where, and their sides."""
    frame = np.full((900, 1300, 3), 90, np.uint8)
    places = [(20, 30, 110), (250, 180, 110), (1180, 20, 110), (1180, 780, 110), (300, 700, 110), (550, 150, 600)]
    for x, y, side in places:
        frame[y : y + side, x : x + side] = cv2.resize(astronaut, (side, side), interpolation=cv2.INTER_AREA)
    return frame, places


def test_tiles_find_small_faces_once_and_the_large_one_too(detector: Any, astronaut: Frame) -> None:
    frame, places = _large(astronaut)
    (face,) = detector.detect(astronaut).boxes
    expected = np.array([face / 512 * side + [x, y, x, y] for x, y, side in places], np.float32)
    whole = detector.detect(frame)
    assert iou_matrix(whole.boxes, expected).max(axis=0, initial=0)[:5].max() < 0.5  # too small for the network
    detector.tile = True
    found = detector.detect(frame)
    overlap = iou_matrix(found.boxes, expected)
    assert (overlap > 0.5).sum(axis=0).tolist() == [1] * len(places)
    assert len(found) == len(places)
    assert (np.diff(found.scores) <= 0).all()
    assert found.frame_hw == (900, 1300)
    middle = found.landmarks.mean(axis=1)
    assert ((middle > found.boxes[:, :2]) & (middle < found.boxes[:, 2:])).all()
    detector.roi = (0, 0, 400, 400)
    assert len(detector.detect(frame)) == 2
    small = np.ascontiguousarray(astronaut[:SIDE, :SIDE])  # no larger than a tile: run once
    detector.roi = None
    tiled = detector.detect(small)
    detector.tile = False
    _same(tiled, detector.detect(small))


def test_tiles_need_a_network_size(dynamic_onnx: Path) -> None:
    from trt_runtime import OrtRetinaFace

    with OrtRetinaFace(dynamic_onnx, threads=1) as detector:
        with pytest.raises(SpecError, match="tiles have the network size: give size_hw"):
            detector.tile = True
        detector.size_hw = 64
        detector.tile = True
        assert len(detector.detect(np.zeros((70, 70, 3), np.uint8))) == 0


def test_frames_on_a_device_are_cut_where_they_lie(plugin_form: Path, astronaut: Frame) -> None:
    region = (96, 3, 320, 320)
    with TRTRetinaFace(plugin_form, device="cpu", size_hw=(320, 320), warm_up=False) as detector:
        detector.roi = region
        found = detector.detect(astronaut)
        assert len(found) == 1
        _same(detector.detect(detector.to_device(astronaut)), found)
        detector.roi = None
        _same(detector.detect(np.ascontiguousarray(astronaut[3:323, 96:416])).moved(96, 3, (512, 512)), found)
        detector.roi = region
        nv12 = Nv12Frame(np.zeros((512, 512), np.uint8), np.zeros((256, 512), np.uint8))
        with pytest.raises(FrameError, match="cut out of BGR frames, not of NV12"):
            detector.detect(nv12)


def test_a_closed_detector_says_so_with_and_without_a_region(static_onnx: Path) -> None:
    from trt_runtime import OrtRetinaFace

    for region in (None, (0, 0, 5, 5)):
        detector = OrtRetinaFace(static_onnx, threads=1)
        detector.roi = region
        detector.close()
        for change in (None, region):
            with pytest.raises(ClosedError):
                detector.detect(np.zeros((9, 9, 3), np.uint8))
            detector.roi = change


@pytest.mark.parametrize(
    "wrong", ["1,2,3", "1,2,0,4", "1,2,3,x", "-1,2,3,4", "", "1,2,3,4,5", "1,2,3,4.5", "9999999,0,1,1"]
)
def test_texts_that_name_no_region(wrong: str) -> None:
    with pytest.raises(SpecError, match=f"a region is X,Y,WIDTH,HEIGHT in pixels, got {re.escape(repr(wrong))}$"):
        parse_region(wrong)


def test_values_that_are_refused(detector: Any) -> None:
    assert parse_region("10,0,30,40") == (10, 0, 30, 40) == check_region([10, 0, 30, 40])
    for wrong in ((1, 2, 3), (1, 2, 3.0, 4), "abcd", (True, 0, 1, 1), 5):
        with pytest.raises(SpecError, match="a region is"):
            detector.roi = wrong
    for value in (-1, float("nan"), "9", True):
        with pytest.raises(SpecError, match="min_face is a number of pixels"):
            detector.min_face = value
    detector.roi = (100, 0, 5, 5)
    with pytest.raises(FrameError, match="the region 100,0,5,5 lies outside the frame of 100x50"):
        detector.detect(np.zeros((50, 100, 3), np.uint8))
    assert in_frame((99, 49, 5, 5), (50, 100)) == (99, 49, 1, 1)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(32, 32), (320, 640), (640, 640)]))
def test_tiles_cover_a_region_and_overlap(width: int, height: int, tile_hw: tuple[int, int]) -> None:
    region = (7, 11, width, height)
    first, *rest = tiles(region, tile_hw)
    assert first == region
    if width <= tile_hw[1] and height <= tile_hw[0]:
        assert rest == []
        return
    for axis, length, tile in ((0, width, tile_hw[1]), (1, height, tile_hw[0])):
        starts = sorted({part[axis] - region[axis] for part in rest})
        assert {part[2 + axis] for part in rest} == {min(tile, length)}
        assert (starts[0], starts[-1] + min(tile, length)) == (0, length)
        gaps = np.diff(starts)
        assert (gaps <= tile - tile // OVERLAP).all()
        assert (gaps > 0).all()
    assert len(rest) == len({part[:2] for part in rest})


def _faces(*boxes: tuple[float, float, float, float], frame_hw: tuple[int, int] = (100, 100)) -> Detections:
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    scores = np.linspace(0.9, 0.6, len(corners)).astype(np.float32)
    return Detections(corners, scores, np.zeros((len(corners), 5, 2), np.float32), frame_hw, truncated=bool(boxes))


def test_what_a_tile_cuts_is_left_out_but_not_what_the_frame_cuts() -> None:
    whole = ((10, 20, 200, 100), Detections.empty((100, 200)))
    left = ((10, 20, 100, 100), _faces((-3, 10, 20, 30), (80, 40, 101, 60), (40, 40, 60, 60), (79, 70, 97, 90)))
    right = ((110, 20, 100, 100), _faces((1, 40, 20, 60), (80, 0, 103, 20)))
    found = joined([whole, left, right], (300, 400), 0.4, 750)
    expected = {(7, 30, 30, 50), (50, 60, 70, 80), (89, 90, 107, 110), (190, 20, 213, 40)}
    assert {tuple(box) for box in found.boxes.tolist()} == expected
    assert found.truncated
    assert found.frame_hw == (300, 400)
    assert len(joined([whole, left, right], (300, 400), 0.4, 2)) == 2
