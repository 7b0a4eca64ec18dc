"""Which images a step sees, and what becomes of them on their way into a batch."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import torch

from facespec.errors import DataError
from facespec.letterbox import Frame
from trainer.data import Dataset, Report
from trainer.data.batches import (
    AsTheyAre,
    Order,
    collate,
    explain_dead_workers,
    place_faces,
    read_batches,
    start_worker,
)
from trainer.data.dataset import Faces
from trainer.distributed import World

CPU = World(torch.device("cpu"))


def _at(rank: int, size: int) -> World:
    return World(CPU.device, rank, size)


def test_every_image_once_an_epoch_and_from_any_step_on() -> None:
    order = Order(count=10, batch=4, seed=3)
    assert order.steps_per_epoch == 2
    steps = list(order.steps(0, 6))
    for epoch in range(3):
        seen = steps[2 * epoch] + steps[2 * epoch + 1]
        assert len(set(seen)) == 8
        assert all(index // 10 == epoch for index in seen)
    assert steps[0] != [index - 10 for index in steps[2]]
    for first in range(6):
        assert list(order.steps(first, 6)) == steps[first:]
        assert list(order.steps(first, first + 1)) == steps[first : first + 1]
    assert list(order.steps(4, 4)) == []
    for step in range(6):
        for rank in (0, 1):
            assert order.images(step, _at(rank, 2)) == [index % 10 for index in steps[step]][rank::2]
        assert order.images(step, CPU) == [index % 10 for index in steps[step]]
    assert list(dataclasses.replace(order, seed=4).steps(0, 6)) != steps
    assert Order(count=8, batch=4, seed=0).steps_per_epoch == 2
    assert Order(count=7, batch=4, seed=0).steps_per_epoch == 1


class Numbered:
    """Images that show their number, with as many faces as its last digit says."""

    def __getitem__(self, index: int) -> tuple[Frame, Faces]:
        count = index % 3
        boxes = np.tile(np.array([[index, 0, index + 1, 1]], np.float32), (count, 1))
        return np.full((2, 3, 3), index, np.uint8), Faces(
            boxes, np.full((count, 5, 2), index, np.float32), np.arange(count) > 0
        )


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_batches_hold_the_share_of_a_process_from_its_step_on(rank: int, size: int) -> None:
    order = Order(count=9, batch=4, seed=1)
    found = list(read_batches(Numbered(), order, _at(rank, size), 0, first=1, last=5))
    wanted = [indices[rank::size] for indices in list(order.steps(0, 5))[1:]]
    assert len(found) == 4
    for (images, targets), indices in zip(found, wanted, strict=True):
        assert images.dtype == torch.uint8
        assert tuple(images.shape) == (4 // size, 2, 3, 3)
        assert images[:, 0, 0, 0].tolist() == indices
        assert targets.valid.sum(dim=1).tolist() == [index % 3 for index in indices]


def test_reading_draws_nothing_from_the_generators_of_the_network() -> None:
    before = torch.get_rng_state()
    next(read_batches(Numbered(), Order(9, 4, 1), CPU, 0, 0, 2))
    assert torch.equal(torch.get_rng_state(), before)


class Broken(Numbered):
    """One image that cannot be read, or a mistake in the code that reads it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, index: int) -> tuple[Frame, Faces]:
        if index == 5:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_an_image_arrives_as_it_was_and_after_the_batches_before(workers: int) -> None:
    order = Order(count=8, batch=2, seed=0)
    step = next(number for number, indices in enumerate(order.steps(0, 4)) if 5 in indices)
    batches = read_batches(Broken(DataError("5.png: gone")), order, CPU, workers, 0, 4)
    for _ in range(step):
        next(batches)
    with pytest.raises(DataError, match=r"^5\.png: gone$"):
        next(batches)


def test_mistakes_are_not_taken_for_damaged_images() -> None:
    with pytest.raises(KeyError, match="mistake"):
        list(read_batches(Broken(KeyError("mistake")), Order(8, 2, 0), CPU, 0, 0, 4))


class _Murder:
    """Samples that kill the process which reads them."""

    def __getitem__(self, index: int) -> tuple[Frame, Faces]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_reader_is_named() -> None:
    batches = read_batches(_Murder(), Order(4, 2, 0), CPU, 1, 0, 2)
    with (
        pytest.raises(DataError, match=r"DataLoader worker.*has died.*fewer --workers \(0 reads in") as caught,
        explain_dead_workers(),
    ):
        next(iter(batches))
    assert "smaller --batch" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^out of cake$"), explain_dead_workers():
        raise RuntimeError("out of cake")


@pytest.fixture
def handlers() -> Iterator[dict[int, object]]:
    """The signals of this process, put back afterwards."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    threads = cv2.getNumThreads()
    yield kept
    cv2.setNumThreads(threads)
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_signals_are_not_for_processes_that_read(handlers: dict[int, object]) -> None:
    start_worker(0)
    assert {number: signal.getsignal(number) for number in handlers} == dict.fromkeys(handlers, signal.SIG_IGN)
    assert cv2.getNumThreads() <= 1


@dataclasses.dataclass(frozen=True)
class Plain:
    """An image of one colour with a face in it."""

    colour: int
    size_hw: tuple[int, int] = (100, 200)
    name: str = "plain"

    def load(self) -> tuple[Frame, Faces]:
        points = np.arange(10, dtype=np.float32).reshape(1, 5, 2)
        return np.full((*self.size_hw, 3), self.colour, np.uint8), Faces(
            np.array([[20, 40, 60, 90]], np.float32), points, np.ones(1, bool)
        )


def test_images_as_they_are_stand_in_the_corner_with_their_faces() -> None:
    samples = AsTheyAre(Dataset("d", [Plain(7)], Report()), 64, shown=5)
    assert len(samples) == 5
    view, faces = samples[3]
    assert view.shape == (64, 64, 3)
    assert (view[:32] == 7).all()
    assert (view[32:] == (104, 117, 123)).all()
    np.testing.assert_allclose(faces.boxes, [[6.4, 12.8, 19.2, 28.8]], rtol=1e-6)
    np.testing.assert_allclose(faces.landmarks[0], np.arange(10).reshape(5, 2) * 0.32, rtol=1e-6)
    assert faces.has_landmarks.tolist() == [True]


def test_every_image_is_shown_equally_often_in_each_epoch() -> None:
    dataset = Dataset("d", [Plain(colour) for colour in (10, 20, 30)], Report())
    samples = AsTheyAre(dataset, 32, shown=7)
    for epoch in range(3):
        colours = [int(samples[epoch * 7 + index][0][0, 0, 0]) for index in range(7)]
        assert colours == [10, 20, 30, 10, 20, 30, 10], epoch


def test_faces_follow_their_image_by_one_factor_an_axis() -> None:
    from facespec.letterbox import Letterbox

    box = Letterbox.fit((99, 200), (64, 64))
    faces = Plain(0).load()[1]
    moved = place_faces(dataclasses.replace(faces, has_landmarks=np.zeros(1, bool)), box)
    factors = np.array([box.scaled_hw[1] / 200, box.scaled_hw[0] / 99])
    np.testing.assert_allclose(moved.boxes, faces.boxes * np.tile(factors, 2), rtol=1e-6)
    np.testing.assert_allclose(moved.landmarks, faces.landmarks * factors, rtol=1e-6)
    assert moved.has_landmarks.tolist() == [False]


def _faces(count: int, start: int) -> Faces:
    rng = np.random.default_rng(start)
    return Faces(
        rng.uniform(0, 99, (count, 4)).astype(np.float32),
        rng.uniform(1, 99, (count, 5, 2)).astype(np.float32),
        np.arange(count) % 2 == 0,
    )


def test_a_batch_pads_each_image_to_the_most_faces() -> None:
    faces = [_faces(2, 0), Faces.none(), _faces(3, 1), _faces(1, 2)]
    pixels = [np.full((4, 6, 3), index, np.uint8) for index in range(4)]
    images, targets = collate(list(zip(pixels, faces, strict=True)))
    assert images.dtype == torch.uint8
    np.testing.assert_array_equal(images.numpy(), np.stack(pixels))
    assert tuple(targets.boxes.shape) == (4, 3, 4)
    assert tuple(targets.landmarks.shape) == (4, 3, 5, 2)
    assert [part.dtype for part in targets] == [torch.float32, torch.float32, torch.bool, torch.bool, torch.float32]
    for row, one in enumerate(faces):
        count = len(one)
        assert targets.valid[row].tolist() == [True] * count + [False] * (3 - count)
        np.testing.assert_array_equal(targets.boxes[row, :count].numpy(), one.boxes)
        np.testing.assert_array_equal(targets.landmarks[row, :count].numpy(), one.landmarks)
        np.testing.assert_array_equal(targets.has_landmarks[row, :count].numpy(), one.has_landmarks)
        assert targets.scores[row, :count].tolist() == [1] * count  # no teacher: a label is certain
        assert not any(part[row, count:].any() for part in targets)
    moved = targets.to("meta")
    assert [part.device.type for part in moved] == ["meta"] * 5
    assert [part.shape for part in moved] == [part.shape for part in targets]


def test_a_batch_without_faces_has_no_columns() -> None:
    _, targets = collate([(np.zeros((1, 1, 3), np.uint8), Faces.none())] * 2)
    assert [tuple(part.shape) for part in targets] == [(2, 0, 4), (2, 0, 5, 2), (2, 0), (2, 0), (2, 0)]


def test_faces_are_chosen_by_slice_mask_and_index() -> None:
    faces = _faces(4, 3)
    for rows in (slice(1, 3), np.array([False, True, True, False]), np.array([1, 2])):
        some = faces[rows]
        assert len(some) == 2
        np.testing.assert_array_equal(some.boxes, faces.boxes[1:3])
        np.testing.assert_array_equal(some.landmarks, faces.landmarks[1:3])
        assert some.has_landmarks.tolist() == [False, True]
    none = Faces.none()
    assert (len(none), none.boxes.shape, none.landmarks.shape) == (0, (0, 4), (0, 5, 2))
    assert (none.boxes.dtype, none.landmarks.dtype, none.has_landmarks.dtype) == (np.float32, np.float32, bool)
