"""Learning the weights and the steps of an INT8 model from its float model, the teacher, on images without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from export.fake_int8 import FakeInt8
from export.quantize import Steps
from facespec.errors import DataError
from facespec.letterbox import Frame

CROP = 320
"""Side of the square crops that are learned on, at most, in pixels of the network input."""

STEP_LR = 6.0
"""Learning rate of the logarithms of steps and of scales, as a multiple of that of weights in their units."""

LEAST_SCORE = 0.02
"""Priors that the teacher gives a lower score teach scores alone."""

BEND = 0.1
"""Difference of a logit or a delta from which on it counts linearly, below it by its square."""

WEIGHTS = {"score": 1.0, "logit": 0.5, "box": 1.0, "landmark": 3.0}
"""Of the parts of the loss."""


@dataclass(frozen=True)
class Pace:
    """How much is learned: updates, crops of each, and the highest learning rate, which falls to 0 as a cosine."""

    updates: int
    batch: int
    lr: float


def rows_of(maps: Sequence[Tensor], per_cell: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return face logits minus background logits (B, N), boxes (B, N, 4) and landmarks (B, N, 10) of head maps."""
    levels = []
    for level in maps:
        cells = level.permute(0, 2, 3, 1).flatten(1, 2)
        parts = cells.split([2 * per_cell, 4 * per_cell, 10 * per_cell], dim=2)
        levels.append([part.unflatten(2, (per_cell, -1)).flatten(1, 2) for part in parts])
    logits, boxes, landmarks = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    return logits[..., 1] - logits[..., 0], boxes, landmarks


def losses(student: Sequence[Tensor], teacher: Sequence[Tensor], per_cell: int) -> dict[str, Tensor]:
    """Return the parts of the loss, weighted, of head maps (B, 16 * per_cell, h, w).

    Every prior teaches its score: the Kullback-Leibler divergence. Priors where the teacher sees a face also teach the
    logit, box and landmark deltas, by that score. All are sums over the priors, for each face-like prior.
    """
    logits, boxes, landmarks = rows_of(student, per_cell)
    with torch.no_grad():
        their_logits, their_boxes, their_landmarks = rows_of(teacher, per_cell)
        scores = their_logits.sigmoid()
        weight = scores * (scores >= LEAST_SCORE)
        total = weight.sum().clamp(min=1)
        least = F.binary_cross_entropy_with_logits(their_logits, scores, reduction="sum")

    def apart(mine: Tensor, theirs: Tensor) -> Tensor:
        each = F.smooth_l1_loss(mine, theirs, beta=BEND, reduction="none")
        return (weight * (each.mean(dim=2) if each.ndim == 3 else each)).sum()

    parts = {
        "score": F.binary_cross_entropy_with_logits(logits, scores, reduction="sum") - least,
        "logit": apart(logits, their_logits),
        "box": apart(boxes, their_boxes),
        "landmark": apart(landmarks, their_landmarks),
    }
    return {name: WEIGHTS[name] * part / total for name, part in parts.items()}


def crop_around(image: Frame, centres: NDArray[np.float32], rng: np.random.Generator) -> Frame:
    """Return a crop of an image that holds one of some centres (n, 2) x, y, or any crop if there is none; or mirrored.

    The side is `CROP`, or that of a smaller image; the centre is not in the outer sixths of the crop but at the edges.
    """
    size = np.minimum(CROP, image.shape[1::-1])
    if len(centres):
        middle = centres[rng.integers(len(centres))] + rng.uniform(-1 / 3, 1 / 3, 2) * size
    else:
        middle = rng.uniform((0, 0), image.shape[1::-1])
    left, top = np.clip(middle - size / 2, 0, image.shape[1::-1] - size).astype(int)
    crop = image[top : top + size[1], left : left + size[0]]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def learn(
    graph: onnx.ModelProto,
    steps: Steps,
    teacher: onnx.ModelProto,
    images: Sequence[Frame],
    centres: Sequence[NDArray[np.float32]],
    pace: Pace,
    seed: int = 0,
    progress: bool = False,
) -> tuple[onnx.ModelProto, Steps]:
    """Return the graph and the steps after learning; the same every time on the same number of threads.

    Args:
        graph: Float32 heads graph to begin with, equalised.
        steps: Of int8, to begin with.
        teacher: Float32 heads graph.
        images: uint8 (H, W, 3), letterboxed, all of one size.
        centres: (n, 2) x, y of the faces of each, in its pixels.
        pace: How much is learned.
        seed: Of the order and the crops.
        progress: Whether to draw a progress bar.

    Raises:
        DataError: The numbers ran away.
    """
    per_cell = graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value // 16
    student, master = FakeInt8(graph, steps), FakeInt8(teacher).requires_grad_(False)
    groups = [
        {"params": [*student.weights, *student.biases], "lr": pace.lr},
        {"params": [*student.steps, *student.channels], "lr": STEP_LR * pace.lr},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    warm = max(1, pace.updates // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda now: min(1, (now + 1) / warm) * (1 + math.cos(math.pi * now / pace.updates)) / 2
    )
    rng = np.random.default_rng(seed)
    order: list[int] = []
    bar = tqdm(range(pace.updates), desc="learning", unit="update", disable=not progress)
    for _ in bar:
        while len(order) < pace.batch:
            order += rng.permutation(len(images)).tolist()
        chosen, order = order[: pace.batch], order[pace.batch :]
        batch = torch.from_numpy(np.stack([crop_around(images[i], centres[i], rng) for i in chosen]))
        with torch.no_grad():
            target = master(batch)
        parts = losses(student(batch), target, per_cell)
        loss = torch.stack([*parts.values()]).sum()
        if not loss.isfinite():
            raise DataError(f"the loss is {loss.item()} after {schedule.last_epoch} updates: give a smaller --lr")
        bar.set_postfix({name: f"{part.item():.4f}" for name, part in parts.items()}, refresh=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student.learned()
