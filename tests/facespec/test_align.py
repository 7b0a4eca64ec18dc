from __future__ import annotations

import numpy as np
import pytest
from skimage.transform import SimilarityTransform, warp

from facespec.align import ARCFACE_LANDMARKS_112, aligned_crops, similarity_transforms
from facespec.errors import FrameError

STANDARD = [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
"""As insightface publishes it (utils/face_align.py, arcface_dst)."""


def _ramp(height: int, width: int) -> np.ndarray:
    """A picture that is linear in x and y, so that bilinear interpolation of it is exact: B = x, G = y, R = x + y."""
    y, x = np.indices((height, width))
    return np.stack([x, y, (x + y) // 2], axis=2).astype(np.uint8)


def test_the_standard_positions_are_the_published_ones() -> None:
    np.testing.assert_array_equal(ARCFACE_LANDMARKS_112, np.array(STANDARD, np.float32))


@pytest.mark.parametrize("size", [112, 224, 56])
def test_a_crop_holds_the_landmarks_at_the_standard_positions_of_its_size(size: int) -> None:
    """Read off a ramp, whose colour tells where a pixel came from: a face of half of a crop's size, turned by 90°."""
    frame = _ramp(200, 240)
    standard = np.array(STANDARD)
    centred = (standard - 56) / 2
    turned = np.stack([-centred[:, 1], centred[:, 0]], axis=1)
    places = np.array([[120, 90], [70, 120]])  # x, y of two faces
    landmarks = (turned[None] + places[:, None]).astype(np.float32)
    crops = aligned_crops(frame, landmarks, size)
    assert crops.shape == (2, size, size, 3)
    assert crops.dtype == np.uint8
    for crop, (x, y) in zip(crops.astype(float), places, strict=True):
        at = np.rint(standard * size / 112).astype(int)
        back = (at * 112 / size - 56) / 2
        np.testing.assert_allclose(crop[at[:, 1], at[:, 0], 0], x - back[:, 1], atol=0.6)
        np.testing.assert_allclose(crop[at[:, 1], at[:, 0], 1], y + back[:, 0], atol=0.6)


def test_pixels_are_interpolated_and_what_lies_outside_is_black() -> None:
    """Against scikit-image, on a coarse picture that is enlarged eight times, and lies partly outside."""
    frame = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    landmarks = (np.array(STANDARD, np.float32) / 8 - 2)[None]
    crop = aligned_crops(frame, landmarks)[0]
    transform = SimilarityTransform(scale=8, translation=(16, 16))
    expected = warp(frame, transform.inverse, order=1, output_shape=(112, 112), preserve_range=True)
    assert np.abs(crop - expected).mean() < 2  # cv2's weights have five bits
    assert not crop[:7].any()
    assert not crop[:, :7].any()
    assert crop[20:100, 20:].any(axis=2).all()


def test_one_face_of_several_without_extent_is_refused() -> None:
    landmarks = np.stack([np.array(STANDARD, np.float32), np.full((5, 2), 7, np.float32)])
    for order in (slice(None), slice(None, None, -1)):
        with pytest.raises(FrameError, match="one point"):
            similarity_transforms(landmarks[order], ARCFACE_LANDMARKS_112)


def test_a_crop_of_what_is_no_frame_is_refused() -> None:
    landmarks = np.array(STANDARD, np.float32)[None]
    for frame in (np.zeros((99, 99), np.uint8), np.zeros((99, 99, 3), np.float32)):
        with pytest.raises(FrameError, match="uint8"):
            aligned_crops(frame, landmarks)
    assert aligned_crops(np.zeros((99, 99, 3), np.uint8), landmarks[:0]).shape == (0, 112, 112, 3)
