from __future__ import annotations

import numpy as np
import torch

from trainer.data.targets import Faces, collate


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
    assert [part.dtype for part in targets] == [torch.float32, torch.float32, torch.bool, torch.bool]
    for row, one in enumerate(faces):
        count = len(one)
        assert targets.valid[row].tolist() == [True] * count + [False] * (3 - count)
        np.testing.assert_array_equal(targets.boxes[row, :count].numpy(), one.boxes)
        np.testing.assert_array_equal(targets.landmarks[row, :count].numpy(), one.landmarks)
        np.testing.assert_array_equal(targets.has_landmarks[row, :count].numpy(), one.has_landmarks)
        assert not any(part[row, count:].any() for part in targets)
    moved = targets.to("meta")
    assert [part.device.type for part in moved] == ["meta"] * 4
    assert [part.shape for part in moved] == [part.shape for part in targets]


def test_a_batch_without_faces_has_no_columns() -> None:
    _, targets = collate([(np.zeros((1, 1, 3), np.uint8), Faces.none())] * 2)
    assert [tuple(part.shape) for part in targets] == [(2, 0, 4), (2, 0, 5, 2), (2, 0), (2, 0)]


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
