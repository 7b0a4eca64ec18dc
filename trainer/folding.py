"""Batch normalisation that was folded into the convolutions for deployment, as in the published weights, given back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.model import RetinaFace

FILTER_LENGTH = 3**-0.5
"""Root of the sum of squares of a filter as PyTorch initialises convolutions, whatever their size."""


def is_folded(model: RetinaFace) -> bool:
    """Whether the model's batch normalisation only adds: its statistics are in the weights of the convolutions.

    In eval mode it computes what it should; by the statistics of a batch it would be another network, and its own hold
    weights of so different sizes that gradient descent wrecks it.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return all(norm.running_mean is not None and not norm.running_mean.any() for norm in norms)


@torch.no_grad()
def unfold(model: RetinaFace, batches: Iterable[Tensor]) -> None:
    """Give a folded model statistics of batch normalisation again; in eval mode it computes the same as before.

    Mean and variance of every channel that goes into a batch normalisation are measured, and become its statistics;
    scale and shift make up for them. The filters get the length they would have at the start of a training: of folded
    ones some are so short that the first steps would turn them round.

    Args:
        model: In place; each batch normalisation follows the convolution that is defined before it.
        batches: (B, 3, H, W) float32 images as they are trained, BGR minus the mean.
    """
    pairs = _pairs(model)
    count = dict.fromkeys(pairs, 0)
    total = {norm: torch.zeros_like(norm.weight, dtype=torch.float64) for norm in pairs}
    squares = {norm: torch.zeros_like(norm.weight, dtype=torch.float64) for norm in pairs}

    def measure(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        values = inputs[0].double()
        count[norm] += values.numel() // values.shape[1]
        total[norm] += values.sum(dim=(0, 2, 3))
        squares[norm] += values.square().sum(dim=(0, 2, 3))

    hooks = [norm.register_forward_hook(measure) for norm in pairs]
    was_training = model.training
    model.eval()
    for images in batches:
        model.features(images)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    for norm, convolution in pairs.items():
        mean = total[norm] / count[norm]
        variance = (squares[norm] / count[norm] - mean.square()).clamp(min=0)
        length = convolution.weight.double().flatten(1).norm(dim=1)
        # any length computes the same, but a step of training turns a short filter further
        stretch = torch.where(length > 1e-6, FILTER_LENGTH / length, torch.ones_like(length))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        convolution.weight.mul_(stretch.float().view(-1, 1, 1, 1))
        norm.running_mean.copy_((mean * stretch).float())
        norm.running_var.copy_((variance * stretch.square()).float())
        norm.weight.mul_(((norm.running_var.double() + norm.eps).sqrt() / stretch).float())
        norm.bias.add_(mean.float())


def _pairs(model: RetinaFace) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    """Return each batch normalisation with its convolution, which is the one defined before it."""
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}
    last = None
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            last = module
        elif isinstance(module, nn.BatchNorm2d) and last is not None:
            pairs[module] = last
    return pairs
