"""Backbones that give three feature maps, at strides 8, 16 and 32.

Module names are those of the usual checkpoints: biubug6's for MobileNetV1, torchvision's for ResNet, so that weights
load without renaming.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Features = tuple[Tensor, Tensor, Tensor]


def activation(slope: float) -> nn.Module:
    """Return LeakyReLU, or ReLU for slope 0."""
    return nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the size (up to its stride) and its batch normalisation."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al., 2017) in three stages, with LeakyReLU 0.1.

    Args:
        width: Channel multiplier; 0.25, 0.5 and 1.0 are in use.
    """

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
    return (
        nn.Sequential(*conv_bn(inputs, outputs, kernel=1, stride=stride)) if inputs != outputs or stride > 1 else None
    )


class ResNet(nn.Module):
    """ResNet without its classifier; keys as in torchvision.

    Args:
        block: BasicBlock or Bottleneck.
        depths: Blocks in each of the four stages.
    """

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
