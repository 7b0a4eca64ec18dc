"""RetinaFace (Deng et al., CVPR 2020) and its backbones, and the detector that runs it in PyTorch.

Module names are those of the usual checkpoints, so that weights load without renaming: biubug6's, and for the ResNet
backbones torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from facespec.boxes import Decoded, decode_detections, make_priors
from facespec.detections import Detections, to_detections
from facespec.errors import SpecError
from facespec.letterbox import Frame, Letterbox, check_frame
from facespec.spec import ModelSpec

Features = tuple[Tensor, Tensor, Tensor]
"""Three maps, at strides 8, 16 and 32."""

Heads = tuple[Tensor, Tensor, Tensor]
"""Box deltas (B, N, 4), class logits (B, N, 2: background, face) and landmark deltas (B, N, 10)."""

HeadArrays = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""The same of one image: (N, 4), (N, 2) and (N, 10)."""


def activation(slope: float) -> nn.Module:
    """Return LeakyReLU, or ReLU for slope 0."""
    return nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the size (up to its stride) and its batch normalisation."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al., 2017) in three stages, with LeakyReLU 0.1; `width` is the channel multiplier."""

    def __init__(self, width: float) -> None:
        super().__init__()
        c32, c64, c128, c256, c512, c1024 = (int(width * channels) for channels in (32, 64, 128, 256, 512, 1024))
        self.stage1 = nn.Sequential(
            nn.Sequential(*conv_bn(3, c32, stride=2), activation(0.1)),
            self._separable(c32, c64),
            self._separable(c64, c128, stride=2),
            self._separable(c128, c128),
            self._separable(c128, c256, stride=2),
            self._separable(c256, c256),
        )
        self.stage2 = nn.Sequential(
            self._separable(c256, c512, stride=2), *(self._separable(c512, c512) for _ in range(5))
        )
        self.stage3 = nn.Sequential(self._separable(c512, c1024, stride=2), self._separable(c1024, c1024))
        self.channels = (c256, c512, c1024)

    @staticmethod
    def _separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        depthwise = conv_bn(inputs, inputs, stride=stride, groups=inputs)
        return nn.Sequential(*depthwise, activation(0.1), *conv_bn(inputs, outputs, kernel=1), activation(0.1))

    def forward(self, images: Tensor) -> Features:
        """Return maps of `channels` channels at strides 8, 16, 32 from (B, 3, H, W)."""
        level8 = self.stage1(images)
        level16 = self.stage2(level8)
        return level8, level16, self.stage3(level16)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al., CVPR 2016)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, width, stride=stride)
        self.conv2, self.bn2 = conv_bn(width, width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut, the stride in the 3×3 one as in torchvision."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, width, kernel=1)
        self.conv2, self.bn2 = conv_bn(width, width, stride=stride)
        self.conv3, self.bn3 = conv_bn(width, 4 * width, kernel=1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x)))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(*conv_bn(inputs, outputs, kernel=1, stride=stride))


class ResNet(nn.Module):
    """ResNet without its classifier; `depths` are the blocks in each of the four stages."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 64, kernel=7, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        grow = block.expansion
        self.layer1 = self._stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = self._stage(block, 64 * grow, 128, depths[1], stride=2)
        self.layer3 = self._stage(block, 128 * grow, 256, depths[2], stride=2)
        self.layer4 = self._stage(block, 256 * grow, 512, depths[3], stride=2)
        self.channels = (128 * grow, 256 * grow, 512 * grow)

    @staticmethod
    def _stage(
        block: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, depth: int, stride: int
    ) -> nn.Sequential:
        rest = (block(width * block.expansion, width, 1) for _ in range(depth - 1))
        return nn.Sequential(block(inputs, width, stride), *rest)

    def forward(self, images: Tensor) -> Features:
        """Return maps of `channels` channels at strides 8, 16, 32 from (B, 3, H, W)."""
        level4 = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        level8 = self.layer2(level4)
        level16 = self.layer3(level8)
        return level8, level16, self.layer4(level16)


BACKBONES: dict[str, tuple[Callable[[], MobileNetV1 | ResNet], int]] = {
    "mobilenet0.25": (lambda: MobileNetV1(0.25), 64),
    "mobilenet0.5": (lambda: MobileNetV1(0.5), 128),
    "mobilenet1.0": (lambda: MobileNetV1(1.0), 128),
    "resnet18": (lambda: ResNet(BasicBlock, (2, 2, 2, 2)), 128),
    "resnet34": (lambda: ResNet(BasicBlock, (3, 4, 6, 3)), 128),
    "resnet50": (lambda: ResNet(Bottleneck, (3, 4, 6, 3)), 256),
}
"""Name -> (constructor, pyramid channels of the published models)."""


def backbone_of(state: dict[str, Tensor]) -> str | None:
    """Return the name of the backbone whose weights, under `body.`, a state dict holds; None if none fits."""
    first = state.get("body.stage1.0.0.weight")
    if first is not None and first.ndim == 4:
        return {8: "mobilenet0.25", 16: "mobilenet0.5", 32: "mobilenet1.0"}.get(first.shape[0])
    if "body.layer1.0.conv3.weight" in state:
        return "resnet50"
    if "body.layer1.0.conv1.weight" in state:
        return "resnet34" if "body.layer1.2.conv1.weight" in state else "resnet18"
    return None


def _leaky_slope(channels: int) -> float:
    """The published models use LeakyReLU 0.1 in narrow pyramids and ReLU in wide ones."""
    return 0.1 if channels <= 64 else 0.0


class FPN(nn.Module):
    """Top-down feature pyramid over three levels (Lin et al., CVPR 2017); it takes and gives so many channels."""

    def __init__(self, inputs: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        slope = _leaky_slope(outputs)
        self.output1, self.output2, self.output3 = (
            nn.Sequential(*conv_bn(channels, outputs, kernel=1), activation(slope)) for channels in inputs
        )
        self.merge1, self.merge2 = (nn.Sequential(*conv_bn(outputs, outputs), activation(slope)) for _ in range(2))

    def forward(self, features: Features) -> Features:
        """Return three maps of the sizes of `features`."""
        level8, level16, level32 = (
            layer(x) for layer, x in zip((self.output1, self.output2, self.output3), features, strict=True)
        )
        level16 = self.merge2(level16 + self._upsample(level32, level16))
        level8 = self.merge1(level8 + self._upsample(level16, level8))
        return level8, level16, level32

    @staticmethod
    def _upsample(x: Tensor, like: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():  # sizes are multiples of 32 there: a constant factor, no shape arithmetic
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.interpolate(x, size=like.shape[2:], mode="nearest")


class SSH(nn.Module):
    """Context module: receptive fields of 3, 5 and 7 side by side (Najibi et al., ICCV 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        slope, quarter = _leaky_slope(channels), channels // 4
        self.conv3X3 = nn.Sequential(*conv_bn(channels, channels // 2))
        self.conv5X5_1 = nn.Sequential(*conv_bn(channels, quarter), activation(slope))
        self.conv5X5_2 = nn.Sequential(*conv_bn(quarter, quarter))
        self.conv7X7_2 = nn.Sequential(*conv_bn(quarter, quarter), activation(slope))
        self.conv7x7_3 = nn.Sequential(*conv_bn(quarter, quarter))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        shared = self.conv5X5_1(x)
        branches = self.conv3X3(x), self.conv5X5_2(shared), self.conv7x7_3(self.conv7X7_2(shared))
        # of each branch, not of all together: builders fuse it with the convolution before it
        return torch.cat([F.relu(branch) for branch in branches], dim=1)


class Head(nn.Module):
    """1×1 convolution of one level; the single child keeps the key name `conv1x1` of the usual checkpoints."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, h, w)."""
        return self.conv1x1(x)


class RetinaFace(nn.Module):
    """The detector up to its head outputs.

    Args:
        spec: Architecture, geometry and preprocessing; kept as `spec`.

    Raises:
        SpecError: Unknown backbone, or anchors other than three levels of strides 8, 16, 32.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        if spec.backbone not in BACKBONES:
            raise SpecError(f"unknown backbone {spec.backbone!r}: choose from {', '.join(BACKBONES)}")
        if spec.anchors.strides != (8, 16, 32):
            raise SpecError(f"RetinaFace has strides 8, 16, 32, the spec asks for {spec.anchors.strides}")
        self.spec = spec
        channels, priors = spec.fpn_channels, spec.anchors.per_cell
        self.body = BACKBONES[spec.backbone][0]()
        self.fpn = FPN(self.body.channels, channels)
        self.ssh1, self.ssh2, self.ssh3 = SSH(channels), SSH(channels), SSH(channels)
        self.ClassHead = nn.ModuleList(Head(channels, 2 * priors) for _ in range(3))
        self.BboxHead = nn.ModuleList(Head(channels, 4 * priors) for _ in range(3))
        self.LandmarkHead = nn.ModuleList(Head(channels, 10 * priors) for _ in range(3))

    def features(self, images: Tensor) -> Features:
        """Return the maps the heads read, (B, fpn_channels, ceil(H/s), ceil(W/s)) for strides s = 8, 16, 32."""
        level8, level16, level32 = self.fpn(self.body(images))
        return self.ssh1(level8), self.ssh2(level16), self.ssh3(level32)

    def forward(self, images: Tensor) -> Heads:
        """Return box deltas, class logits and landmark deltas, their rows in the order of `facespec.make_priors`.

        Args:
            images: float32 (B, 3, H, W), BGR minus the mean; any H and W.
        """
        return self.heads(self.features(images))

    def heads(self, features: Features) -> Heads:
        """Return what `forward` does, from what `features` returned."""
        boxes, logits, landmarks = (
            torch.cat([self._rows(head(x), width) for head, x in zip(heads, features, strict=True)], dim=1)
            for heads, width in ((self.BboxHead, 4), (self.ClassHead, 2), (self.LandmarkHead, 10))
        )
        return boxes, logits, landmarks

    @staticmethod
    def _rows(head_map: Tensor, width: int) -> Tensor:
        """(B, priors * width, h, w) -> (B, h * w * priors, width)."""
        return head_map.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, width))


class MergedHeads(nn.Module):
    """RetinaFace with the three heads of each level merged into one 1×1 convolution of 4 + 8 + 20 channels."""

    def __init__(self, model: RetinaFace) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleList()
        for level in zip(model.ClassHead, model.BboxHead, model.LandmarkHead, strict=True):
            parts = [head.get_submodule("conv1x1") for head in level]
            weight, bias = (torch.cat([part.get_parameter(name) for part in parts]) for name in ("weight", "bias"))
            merged = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
            merged.weight, merged.bias = nn.Parameter(weight), nn.Parameter(bias)
            self.heads.append(merged)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the head maps (B, 16 * priors per cell, H/s, W/s) for strides 8, 16, 32."""
        return tuple(head(x) for head, x in zip(self.heads, self.model.features(pixels), strict=True))


class TorchRetinaFace:
    """RetinaFace in PyTorch as a `facespec.Detector`.

    Args:
        model: From `trainer.load_model`; used on the device it is on.
        score_threshold: Lowest score reported, by default 0.5; not below the floor in the model's spec.
        size_hw: Letterbox frames to this size; None runs them at their own size, without padding.
    """

    def __init__(
        self, model: RetinaFace, *, score_threshold: float | None = None, size_hw: tuple[int, int] | None = None
    ) -> None:
        self.model, self.spec = model, model.spec
        self.score_threshold = self.spec.decode.run_threshold(score_threshold)
        self.size_hw = size_hw
        self._device = next(model.parameters()).device

    def heads(self, network_input: Frame) -> HeadArrays:
        """Return the raw outputs for one image that is already letterboxed, uint8 (H, W, 3)."""
        pixels = torch.from_numpy(network_input).to(self._device).permute(2, 0, 1)[None].float()
        mean = torch.tensor(self.spec.preprocess.mean_bgr, device=self._device, dtype=torch.float32)
        with torch.inference_mode():
            boxes, logits, landmarks = (output[0].cpu().numpy() for output in self.model(pixels - mean[:, None, None]))
        return boxes, logits, landmarks

    def decode(self, heads: HeadArrays, size_hw: tuple[int, int]) -> Decoded:
        """Return the faces down to the model's floor, in pixels of the network input of `size_hw`."""
        return decode_detections(*heads, make_priors(self.spec.anchors, size_hw), self.spec.decode)

    def detect(self, frame: Frame) -> Detections:
        """Return the faces of one frame, uint8 (H, W, 3) BGR, in its own pixels.

        Raises:
            FrameError: Not such a frame.
            NonFiniteError: The network gave NaN or infinity.
        """
        frame = check_frame(frame)
        frame_hw = (frame.shape[0], frame.shape[1])
        box = Letterbox.fit(frame_hw, self.size_hw) if self.size_hw else Letterbox(frame_hw, frame_hw, frame_hw)
        found = self.decode(self.heads(box.apply(frame, self.spec.preprocess.mean_bgr)), box.size_hw)
        faces = found.boxes, found.scores, found.landmarks
        count, candidates = len(found.scores), found.num_candidates
        return to_detections(box, self.spec.decode, self.score_threshold, count, *faces, candidates)

    def detect_batch(self, frames: Iterable[Frame]) -> list[Detections]:
        """Return the faces of several frames, one after the other."""
        return [self.detect(frame) for frame in frames]
