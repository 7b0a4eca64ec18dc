"""RetinaFace: backbone, feature pyramid, context modules and heads (Deng et al., CVPR 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facespec.errors import SpecError
from facespec.spec import ModelSpec
from trainer.backbones import BACKBONES, Features, activation, conv_bn

Heads = tuple[Tensor, Tensor, Tensor]
"""Box deltas (B, N, 4), class logits (B, N, 2) and landmark deltas (B, N, 10)."""


def _leaky_slope(channels: int) -> float:
    """The published models use LeakyReLU 0.1 in narrow pyramids and ReLU in wide ones."""
    return 0.1 if channels <= 64 else 0.0


class FPN(nn.Module):
    """Top-down feature pyramid over three levels (Lin et al., CVPR 2017).

    Args:
        inputs: Channels of the three backbone maps.
        outputs: Channels of every output.
    """

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
        return F.relu(torch.cat(branches, dim=1))


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
        """Return box deltas (B, N, 4), class logits (B, N, 2: background, face) and landmark deltas (B, N, 10).

        Rows are in the order of `facespec.make_priors`.

        Args:
            images: float32 (B, 3, H, W), BGR minus the mean; any H and W.
        """
        return self.heads(self.features(images))

    def heads(self, features: Features) -> Heads:
        """Return box deltas, class logits and landmark deltas, as `forward` does, from what `features` returned."""
        boxes, logits, landmarks = (
            torch.cat([self._rows(head(x), width) for head, x in zip(heads, features, strict=True)], dim=1)
            for heads, width in ((self.BboxHead, 4), (self.ClassHead, 2), (self.LandmarkHead, 10))
        )
        return boxes, logits, landmarks

    @staticmethod
    def _rows(head_map: Tensor, width: int) -> Tensor:
        """(B, priors * width, h, w) -> (B, h * w * priors, width)."""
        return head_map.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, width))
