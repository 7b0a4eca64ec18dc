"""Which images a step sees, and reading them: a function of the seed and the step, so that a run resumes anywhere."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from facespec.errors import DataError, RetinaFaceError
from facespec.letterbox import Frame, Letterbox
from facespec.opencv import cv2
from facespec.spec import PreprocessSpec
from trainer.data.dataset import Dataset, Faces
from trainer.distributed import World


@dataclass(frozen=True)
class Order:
    """The order of `count` images: every epoch has a new permutation, cut into batches; the rest is left out of it.

    A batch is that of all processes together.
    """

    count: int
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.count // self.batch

    def steps(self, first: int, last: int) -> Iterator[list[int]]:
        """Yield the images of steps `first` to `last` - 1, as epoch * count + index."""
        for step in range(first, last):
            epoch, position = divmod(step, self.steps_per_epoch)
            if step == first or position == 0:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.count) + epoch * self.count
            yield order[position * self.batch : (position + 1) * self.batch].tolist()

    def images(self, step: int, world: World) -> list[int]:
        """Return the indices of the images that this process sees in a step."""
        return [index % self.count for index in next(self.steps(step, step + 1))[world.rank :: world.size]]


class Targets(NamedTuple):
    """The faces of a batch, padded to the image with the most, in pixels of the network input.

    Attributes:
        boxes: (B, G, 4) float32 x1, y1, x2, y2.
        landmarks: (B, G, 5, 2) float32.
        valid: (B, G) bool; False for padding.
        has_landmarks: (B, G) bool.
        scores: (B, G) float32 in 0..1, what the network should say of the face; see `Faces`.
    """

    boxes: Tensor
    landmarks: Tensor
    valid: Tensor
    has_landmarks: Tensor
    scores: Tensor

    def to(self, device: torch.device | str) -> Targets:
        """Return the targets on a device."""
        return Targets(*(part.to(device, non_blocking=True) for part in self))


def collate(samples: Sequence[tuple[NDArray[np.uint8], Faces]]) -> tuple[Tensor, Targets]:
    """Return a batch of images of one size, uint8 (B, H, W, 3) BGR, and their faces; G is 0 if there are none."""
    images = torch.from_numpy(np.stack([image for image, _ in samples]))
    most = max(len(faces) for _, faces in samples)
    boxes = np.zeros((len(samples), most, 4), np.float32)
    landmarks = np.zeros((len(samples), most, 5, 2), np.float32)
    valid = np.zeros((len(samples), most), bool)
    has_landmarks = np.zeros((len(samples), most), bool)
    scores = np.zeros((len(samples), most), np.float32)
    for row, (_, faces) in enumerate(samples):
        count = len(faces)
        boxes[row, :count], landmarks[row, :count] = faces.boxes, faces.landmarks
        valid[row, :count], has_landmarks[row, :count] = True, faces.has_landmarks
        scores[row, :count] = 1 if faces.scores is None else faces.scores
    return images, Targets(*(torch.from_numpy(part) for part in (boxes, landmarks, valid, has_landmarks, scores)))


class _Batches(torch.utils.data.Dataset):
    """Gives a batch for a list of items.

    Errors come back as values: raised in another process, they would arrive with its traceback as their text.
    """

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __getitem__(self, items: list[int]) -> tuple[Tensor, Targets] | RetinaFaceError:
        try:
            return collate([self.samples[item] for item in items])
        except RetinaFaceError as error:
            return error


class AsTheyAre(torch.utils.data.Dataset):
    """Images letterboxed to a square of `size` pixels without randomness, in the place of `TrainingSet`.

    An epoch has `shown` of them: every one is shown equally often, give or take one.
    """

    def __init__(self, dataset: Dataset, size: int, shown: int) -> None:
        self.dataset, self.size, self.shown = dataset, size, shown

    def __len__(self) -> int:
        return self.shown

    def __getitem__(self, index: int) -> tuple[Frame, Faces]:
        image, faces = self.dataset.samples[index % self.shown % len(self.dataset)].load()
        box = Letterbox.fit((image.shape[0], image.shape[1]), (self.size, self.size))
        return box.apply(image, PreprocessSpec().mean_bgr), place_faces(faces, box)


def place_faces(faces: Faces, box: Letterbox) -> Faces:
    """Return the faces of a frame in pixels of its letterboxed form."""
    boxes, points = box.to_network(faces.boxes), box.to_network(faces.landmarks)
    return dataclasses.replace(faces, boxes=boxes, landmarks=points)


def start_worker(_: int) -> None:
    """Prepare a process that reads images (`worker_init_fn`): signals are not for it, and it keeps to one thread."""
    # a terminal, or a scheduler, stops every process at once: the training one finishes its step and ends the others
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
    # 0 means no threads; 1 would have cv2 wait for those of the parent, which the fork has not brought along
    cv2.setNumThreads(0)


def read_batches(
    samples: Any, order: Order, world: World, workers: int, first: int, last: int
) -> Iterator[tuple[Tensor, Targets]]:
    """Yield this process's share of the batches of steps `first` to `last` - 1, as `collate` returns them.

    `samples` gives an image and its faces for epoch * count + index; `workers` processes read.

    Raises:
        DataError: An image cannot be read.
    """
    loader = DataLoader(
        _Batches(samples),
        batch_size=None,  # an item is a batch already
        sampler=(items[world.rank :: world.size] for items in order.steps(first, last)),
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # it would draw from the global one, which is the network's
    )
    for batch in loader:
        if isinstance(batch, RetinaFaceError):
            raise batch
        yield batch


@contextmanager
def explain_dead_workers() -> Iterator[None]:
    """Turn PyTorch's error about a process that reads images, which may come at any moment, into one line."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"{str(error).splitlines()[0].rstrip('. ')}: a process that reads images has died, mostly for want of "
            "memory; use fewer --workers (0 reads in the training process) or a smaller --batch"
        ) from None
