"""Which images a step sees, and reading them: a function of the seed and the step, so that a run resumes anywhere."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from facespec.errors import DataError, RetinaFaceError
from facespec.letterbox import Frame, Letterbox
from facespec.spec import PreprocessSpec
from trainer.data import Dataset
from trainer.data.targets import Faces, Targets, collate
from trainer.distributed import World


@dataclass(frozen=True)
class Order:
    """The order of the images: every epoch has a new permutation, cut into batches; the rest is left out of it.

    Attributes:
        count: Images of the data set.
        batch: Images of a step, over all processes.
        seed: Of the permutations.
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


class _Batches(torch.utils.data.Dataset):
    """Gives a batch for a list of items.

    Errors come back as values: raised in another process, they would arrive with its traceback as their text.
    """

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __getitem__(self, items: list[int]) -> tuple[torch.Tensor, Targets] | RetinaFaceError:
        try:
            return collate([self.samples[item] for item in items])
        except RetinaFaceError as error:
            return error


class AsTheyAre(torch.utils.data.Dataset):
    """Images letterboxed to the network's size without randomness, in the place of `TrainingSet`.

    Args:
        dataset: Images and faces.
        size: Side of the square network input.
        shown: Images of an epoch; every one is shown equally often, give or take one.
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
    return Faces(box.to_network(faces.boxes), box.to_network(faces.landmarks), faces.has_landmarks)


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
) -> Iterator[tuple[torch.Tensor, Targets]]:
    """Yield the batches of steps `first` to `last` - 1: images uint8 (B, H, W, 3) BGR, and their faces.

    Args:
        samples: Gives an image and its faces for epoch * count + index.
        order: Of the images.
        world: This process gets its share.
        workers: Processes that read.
        first: Step to start at.
        last: Step to end before.

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
