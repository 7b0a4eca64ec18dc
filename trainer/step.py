"""One step of training: what is differentiated, how the weights move, and their average."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from trainer.config import OptimizerConfig, ScheduleConfig
from trainer.data.batches import Targets
from trainer.losses import Losses, MultiBoxLoss
from trainer.model import Features, Heads, RetinaFace


class PixelTerm(nn.Module):
    """A fourth, pixel-wise term of the loss, as the dense regression branch of the paper: a base to derive from.

    Its parameters are trained with the detector's, and kept apart from them: they are in no exported model.
    """

    def forward(self, features: Features, heads: Heads, images: Tensor, targets: Targets) -> Tensor:
        """Return the term as a tensor without dimensions; `loss.pixel_weight` is its factor.

        Args:
            features: The maps the heads read: three of (B, fpn_channels, H/s, W/s) for strides s = 8, 16, 32.
            heads: Box deltas (B, N, 4), class logits (B, N, 2) and landmark deltas (B, N, 10).
            images: (B, 3, H, W) float32, BGR minus the mean.
            targets: The faces, in pixels of `images`, on the CPU.
        """
        raise NotImplementedError


class Learner(nn.Module):
    """Network and loss as one module, so that DistributedDataParallel sees all that is trained.

    Args:
        model: The detector.
        loss: Of its heads.
        pixel_term: Fourth term of the loss.
        bf16: Let the network compute in bfloat16; the loss is always float32.
        freeze_batch_norm: Let batch normalisation use its running statistics instead of the batch's, and keep them.
        compile: Run the network through torch.compile.
    """

    _mean: Tensor

    def __init__(
        self,
        model: RetinaFace,
        loss: MultiBoxLoss,
        pixel_term: PixelTerm | None = None,
        *,
        bf16: bool = False,
        freeze_batch_norm: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.pixel_term = model, loss, pixel_term
        self.bf16, self.freeze_batch_norm = bf16, freeze_batch_norm
        self._run_network = torch.compile(self._network) if compile else self._network
        mean = torch.tensor(model.spec.preprocess.mean_bgr, dtype=torch.float32)
        self.register_buffer("_mean", mean[:, None, None], persistent=False)
        self.train()

    def train(self, mode: bool = True) -> Learner:
        """Set the mode of training, but for batch normalisation that is frozen."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _network(self, pixels: Tensor) -> tuple[Features, Heads]:
        features = self.model.features(pixels)
        return features, self.model.heads(features)

    def forward(self, images: Tensor, targets: Targets) -> Losses:
        """Return the loss of a batch.

        Args:
            images: uint8 (B, H, W, 3) BGR, on the device of the network.
            targets: Their faces, on the CPU: they are matched there, beside a GPU that is busy.
        """
        pixels = images.permute(0, 3, 1, 2).float() - self._mean  # seen as (B, 3, H, W), this is channels_last already
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features, heads = self._run_network(pixels)
            pixel = self.pixel_term(features, heads, pixels, targets) if self.pixel_term is not None else None
        return self.loss(heads, targets, (images.shape[1], images.shape[2]), pixel)


def make_optimizer(learner: nn.Module, config: OptimizerConfig) -> SGD:
    """Return gradient descent on all parameters of a module.

    Vectors are biases and the scales of batch normalisation: weight decay moves them without regularising anything.
    """
    groups: list[dict[str, Any]] = [{"params": [p for p in learner.parameters() if p.ndim > 1 or config.decay_all]}]
    if not config.decay_all:
        groups.append({"params": [p for p in learner.parameters() if p.ndim <= 1], "weight_decay": 0.0})
    return SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov)


def lr_factor(step: int, steps_per_epoch: int, config: ScheduleConfig) -> float:
    """Return the learning rate of a step, as a fraction of the highest; it depends on the step alone."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = config.epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "step":
        return config.gamma ** sum(step >= round(milestone * total) for milestone in config.milestones)
    course = (step - warmup) / max(total - 1 - warmup, 1)
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * course)) / 2


def train_step(
    learner: nn.Module, optimizer: SGD, images: Tensor, targets: Targets, clip: float
) -> tuple[Losses, Tensor]:
    """Move the weights once; return the loss before, and the norm of the gradient before clipping.

    `learner` is a `Learner`, or DistributedDataParallel around one; longer gradients than `clip` are shortened to it,
    0 leaves all as they are.
    """
    losses: Losses = learner(images, targets)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    norm = nn.utils.clip_grad_norm_(learner.parameters(), clip or math.inf)
    optimizer.step()
    return losses, norm


class Ema:
    """Exponential moving average of a model's weights and batch statistics.

    The decay rises with the updates n as (1 + n) / (10 + n), so that the first weights, which are worth nothing, are
    soon forgotten (as in tf.train.ExponentialMovingAverage). The average is `model`, in eval mode; an update keeps at
    most the share `decay` of it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are now."""
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                average.lerp_(state[name], share)
            else:  # the counters of batch normalisation
                average.copy_(state[name])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every global generator for a step, so that a resumed run draws what an undisturbed one would."""
    value = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
