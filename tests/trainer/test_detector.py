from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from facespec.boxes import decode_detections, make_priors
from facespec.errors import FrameError, SpecError
from facespec.letterbox import Frame, Letterbox
from facespec.spec import DecodeSpec, PreprocessSpec
from tests.trainer.conftest import published
from trainer import RetinaFace
from trainer.detector import TorchRetinaFace


@pytest.fixture
def model() -> RetinaFace:
    return published()


@pytest.fixture(scope="module")
def small(crowd: Frame) -> Frame:
    """Three faces in 160x480 pixels."""
    import cv2

    return np.asarray(cv2.resize(crowd, (480, 160), interpolation=cv2.INTER_AREA), np.uint8)


def test_heads_are_those_of_the_image_less_the_mean(model: RetinaFace, small: Frame) -> None:
    for mean in ((104, 117, 123), (3, 99, 200)):
        model.spec = dataclasses.replace(model.spec, preprocess=PreprocessSpec(mean))
        pixels = (small.astype(np.float32) - np.array(mean, np.float32)).transpose(2, 0, 1)[None]
        with torch.no_grad():
            expected = model(torch.from_numpy(np.ascontiguousarray(pixels)))
        heads = TorchRetinaFace(model).heads(small)
        for one, other in zip(heads, expected, strict=True):
            assert one.dtype == np.float32
            np.testing.assert_allclose(one, other[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("size_hw", [None, (96, 320), (192, 192)])
def test_faces_are_those_of_the_reference_in_pixels_of_the_frame(
    size_hw: tuple[int, int] | None, model: RetinaFace, small: Frame
) -> None:
    model.spec = dataclasses.replace(
        model.spec,
        decode=DecodeSpec(score_threshold=0.1, iou_threshold=0.3),
        preprocess=PreprocessSpec((0, 117, 255)),
    )
    detector = TorchRetinaFace(model, score_threshold=0.3, size_hw=size_hw)
    found = detector.detect(small)
    box = Letterbox.fit((160, 480), size_hw) if size_hw else Letterbox((160, 480), (160, 480), (160, 480))
    view = box.apply(small, (0, 117, 255))
    decoded = decode_detections(
        *detector.heads(view), make_priors(model.spec.anchors, view.shape[:2]), model.spec.decode
    )
    kept = decoded.scores >= 0.3
    assert kept.sum() >= 1
    np.testing.assert_allclose(found.scores, decoded.scores[kept], rtol=1e-6)
    scale = np.array([480 / box.scaled_hw[1], 160 / box.scaled_hw[0]])
    np.testing.assert_allclose(found.boxes, decoded.boxes[kept] * np.tile(scale, 2), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.landmarks, decoded.landmarks[kept] * scale, rtol=1e-4, atol=1e-3)
    assert found.frame_hw == (160, 480)


def test_thresholds_are_the_models_to_bound(model: RetinaFace) -> None:
    assert TorchRetinaFace(model).score_threshold == 0.5
    assert TorchRetinaFace(model, score_threshold=0.02).score_threshold == 0.02
    with pytest.raises(SpecError, match="below the model's floor"):
        TorchRetinaFace(model, score_threshold=0.01)


def test_limits_that_cut_faces_off_are_told(model: RetinaFace, small: Frame) -> None:
    assert not TorchRetinaFace(model).detect(small).truncated
    for limits in (DecodeSpec(max_detections=1), DecodeSpec(top_k=1)):
        model.spec = dataclasses.replace(model.spec, decode=limits)
        found = TorchRetinaFace(model).detect(small)
        assert len(found) == 1
        assert found.truncated


def test_a_batch_is_its_frames_one_after_the_other(model: RetinaFace, small: Frame) -> None:
    detector = TorchRetinaFace(model)
    frames = [small, small[:, :160], np.zeros((40, 60, 3), np.uint8)]
    found = detector.detect_batch(iter(frames))
    assert [one.frame_hw for one in found] == [(160, 480), (160, 160), (40, 60)]
    assert len(found[0]) > len(found[1]) > len(found[2]) == 0
    np.testing.assert_array_equal(found[0].boxes, detector.detect(small).boxes)


def test_wrong_frames_are_refused(model: RetinaFace) -> None:
    with pytest.raises(FrameError, match="COLOR_GRAY2BGR"):
        TorchRetinaFace(model).detect(np.zeros((32, 32), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(FrameError, match="uint8"):
        TorchRetinaFace(model, size_hw=(32, 32)).detect(np.zeros((32, 32, 3), np.float32))  # type: ignore[arg-type]
