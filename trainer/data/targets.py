"""What an image is trained towards: the faces of one image, and those of a batch, padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Faces:
    """The labelled faces of one image, in its pixels.

    Attributes:
        boxes: (n, 4) float32 x1, y1, x2, y2.
        landmarks: (n, 5, 2) float32 left eye, right eye, nose, left and right mouth corner, as seen in the image;
            0 where there are none.
        has_landmarks: (n,) bool, whether the five landmarks are known.
    """

    boxes: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    has_landmarks: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: Any) -> Faces:
        """Return some of the faces; `rows` is a slice, a mask or an array of indices."""
        return Faces(self.boxes[rows], self.landmarks[rows], self.has_landmarks[rows])

    @staticmethod
    def none() -> Faces:
        """Return no faces."""
        return Faces(np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32), np.zeros(0, bool))


class Targets(NamedTuple):
    """The faces of a batch, padded to the image with the most, in pixels of the network input.

    Attributes:
        boxes: (B, G, 4) float32 x1, y1, x2, y2.
        landmarks: (B, G, 5, 2) float32.
        valid: (B, G) bool; False for padding.
        has_landmarks: (B, G) bool.
    """

    boxes: Tensor
    landmarks: Tensor
    valid: Tensor
    has_landmarks: Tensor

    def to(self, device: torch.device | str) -> Targets:
        """Return the targets on a device."""
        return Targets(*(part.to(device, non_blocking=True) for part in self))


def collate(samples: Sequence[tuple[NDArray[np.uint8], Faces]]) -> tuple[Tensor, Targets]:
    """Return a batch: images uint8 (B, H, W, 3) BGR, and their faces. G is 0 if there are none at all.

    Args:
        samples: Images of one size, uint8 (H, W, 3), and their faces.
    """
    images = torch.from_numpy(np.stack([image for image, _ in samples]))
    most = max(len(faces) for _, faces in samples)
    boxes = np.zeros((len(samples), most, 4), np.float32)
    landmarks = np.zeros((len(samples), most, 5, 2), np.float32)
    valid = np.zeros((len(samples), most), bool)
    has_landmarks = np.zeros((len(samples), most), bool)
    for row, (_, faces) in enumerate(samples):
        count = len(faces)
        boxes[row, :count], landmarks[row, :count] = faces.boxes, faces.landmarks
        valid[row, :count], has_landmarks[row, :count] = True, faces.has_landmarks
    return images, Targets(*(torch.from_numpy(part) for part in (boxes, landmarks, valid, has_landmarks)))
