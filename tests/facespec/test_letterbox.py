from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from facespec.errors import FrameError
from facespec.letterbox import Letterbox, check_frame

MEAN = (104, 117, 123)
sides = st.integers(1, 3000)
network = st.integers(1, 40).map(lambda n: 32 * n)


@given(sides, sides, network, network)
def test_mapping_is_exact_and_inverts(height: int, width: int, rows: int, columns: int) -> None:
    box = Letterbox.fit((height, width), (rows, columns))
    scaled_height, scaled_width = box.scaled_hw
    assert scaled_height <= rows
    assert scaled_width <= columns
    assert scaled_height == rows or scaled_width == columns
    # corners go to corners exactly: rounding the size does not shift anything
    corners = np.array([[0, 0], [width, height]], np.float32)
    np.testing.assert_allclose(box.to_network(corners), [[0, 0], [scaled_width, scaled_height]], rtol=1e-6)
    points = np.random.default_rng(0).uniform(-1, 2, (50, 2)) * (width, height)
    points = points.astype(np.float32)
    np.testing.assert_allclose(box.to_frame(box.to_network(points)), points, rtol=1e-5, atol=1e-3)
    # the aspect ratio is kept but for the rounding to whole pixels
    scale = min(rows / height, columns / width)
    assert abs(scaled_height - height * scale) <= 1
    assert abs(scaled_width - width * scale) <= 1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(40, 500), st.integers(40, 500), st.sampled_from([(160, 160), (160, 320), (320, 160), (640, 640)]),
    st.floats(0.2, 0.8), st.floats(0.2, 0.8),
)  # fmt: skip
def test_pixels_land_where_coordinates_say(
    height: int, width: int, size_hw: tuple[int, int], at_x: float, at_y: float
) -> None:
    """A soft blob drawn in the frame is found, by its centre of mass in the network input, within half a pixel of its
    mapped centre, and, mapped back, within half a pixel of where it was drawn."""
    box = Letterbox.fit((height, width), size_hw)
    centre = np.array([at_x * width, at_y * height])
    sigma = max(2.0, 1.5 / min(box.scale_xy), min(height, width) / 20)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    weight_x, weight_y = np.exp(-(((x - centre[0]) / sigma) ** 2) / 2), np.exp(-(((y - centre[1]) / sigma) ** 2) / 2)
    blob = weight_y[:, None] * weight_x
    frame = np.rint(np.repeat(blob[..., None] * 255, 3, axis=2)).astype(np.uint8)
    image = box.apply(frame, (0, 0, 0)).astype(float)[..., 0]

    def centre_of_mass(values: np.ndarray) -> np.ndarray:
        rows, columns = np.indices(values.shape) + 0.5
        return np.array([(values * columns).sum(), (values * rows).sum()]) / values.sum()

    drawn = centre_of_mass(frame[..., 0].astype(float)).astype(np.float32)
    seen = centre_of_mass(image).astype(np.float32)
    assert np.abs(box.to_network(drawn) - seen).max() < 0.5
    assert np.abs(box.to_frame(seen) - drawn).max() < 0.5 * max(1, 1 / min(box.scale_xy))


@pytest.mark.parametrize("frame_hw", [(1, 1), (1, 5000), (5000, 1), (640, 640), (64, 640), (33, 47), (1080, 1920)])
def test_padding_is_the_mean_and_the_rest_is_the_resized_frame(frame_hw: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*frame_hw, 3), np.uint8)
    box = Letterbox.fit(frame_hw, (640, 640))
    image = box.apply(frame, MEAN)
    height, width = box.scaled_hw
    assert image.shape == (640, 640, 3)
    np.testing.assert_array_equal(image[:height, :width], cv2.resize(frame, (width, height)))
    assert (image[height:] == MEAN).all()
    assert (image[:, width:] == MEAN).all()
    out = np.zeros((640, 640, 3), np.uint8)
    assert box.apply(frame, MEAN, out) is out
    np.testing.assert_array_equal(out, image)


def test_original_scale_pads_to_multiples_of_32() -> None:
    box = Letterbox.pad((100, 33))
    assert (box.scaled_hw, box.size_hw, box.scale_xy) == ((100, 33), (128, 64), (1, 1))
    frame = np.full((100, 33, 3), 7, np.uint8)
    image = box.apply(frame, MEAN)
    assert (image[:100, :33] == 7).all()
    assert (image[100:] == MEAN).all()
    assert (image[:, 33:] == MEAN).all()


@given(sides, sides, network)
@example(1, 10_000, 640)
@example(10_000, 1, 640)
@example(31, 47, 4096)
def test_the_longer_side_decides(height: int, width: int, longest: int) -> None:
    """The pixels of a fit into the square, with less padding: under 32 rows and columns."""
    box = Letterbox.longest((height, width), longest)
    square = Letterbox.fit((height, width), (longest, longest))
    assert (box.frame_hw, box.scaled_hw, box.scale_xy) == (square.frame_hw, square.scaled_hw, square.scale_xy)
    assert max(box.scaled_hw) == max(box.size_hw) == longest
    for scaled, size in zip(box.scaled_hw, box.size_hw, strict=True):
        assert size % 32 == 0
        assert 0 <= size - scaled < 32
    points = np.array([[0, 0], [width, height], [width / 3, height / 7], [-5, 2 * height]], np.float32)
    np.testing.assert_allclose(box.to_network(points), square.to_network(points), rtol=0)
    np.testing.assert_allclose(box.to_frame(box.to_network(points)), points, rtol=1e-5, atol=1e-3)
    boxes = np.concatenate([points, points + 9], axis=1)
    np.testing.assert_allclose(box.to_frame(box.to_network(boxes)), boxes, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("frame_hw", "longest", "scaled_hw", "size_hw"),
    [
        ((1080, 1920), 640, (360, 640), (384, 640)),
        ((1920, 1080), 640, (640, 360), (640, 384)),
        ((480, 640), 640, (480, 640), (480, 640)),
        ((512, 512), 640, (640, 640), (640, 640)),
        ((45, 80), 1280, (720, 1280), (736, 1280)),  # upscaled
        ((1, 10_000), 640, (1, 640), (32, 640)),
        ((10_000, 1), 640, (640, 1), (640, 32)),
        ((1, 1), 32, (32, 32), (32, 32)),
    ],
)
def test_the_longer_side_by_hand(
    frame_hw: tuple[int, int], longest: int, scaled_hw: tuple[int, int], size_hw: tuple[int, int]
) -> None:
    box = Letterbox.longest(frame_hw, longest)
    assert (box.scaled_hw, box.size_hw) == (scaled_hw, size_hw)
    frame = np.random.default_rng(2).integers(0, 256, (*frame_hw, 3), np.uint8)
    image, (height, width) = box.apply(frame, MEAN), scaled_hw
    assert image.shape == (*size_hw, 3)
    np.testing.assert_array_equal(
        image[:height, :width], Letterbox.fit(frame_hw, (longest, longest)).apply(frame, MEAN)[:height, :width]
    )
    assert (image[height:] == MEAN).all()
    assert (image[:, width:] == MEAN).all()


def test_boxes_are_mapped_corner_by_corner() -> None:
    """At 3/4 along x and 1/2 along y."""
    box = Letterbox((200, 400), (100, 300), (128, 320))
    assert box.scale_xy == (0.75, 0.5)
    frame, net = np.float32([[4, 8, 40, 80], [-4, -2, 0, 2]]), np.float32([[3, 4, 30, 40], [-3, -1, 0, 1]])
    np.testing.assert_array_equal(box.to_network(frame), net)
    np.testing.assert_allclose(box.to_frame(net), frame, rtol=1e-6)
    np.testing.assert_array_equal(box.to_network(frame.reshape(4, 2)), net.reshape(4, 2))
    assert box.to_frame(net).dtype == np.float32


def test_a_frame_that_fits_is_not_copied_unless_asked() -> None:
    frame = np.random.default_rng(3).integers(0, 256, (64, 96, 3), np.uint8)
    for box in (Letterbox.pad((64, 96)), Letterbox.fit((64, 96), (64, 96))):
        assert box.apply(frame, MEAN) is frame
        assert box.apply(frame[:, ::-1], MEAN).flags.c_contiguous
        out = np.zeros_like(frame)
        assert box.apply(frame, MEAN, out) is out
        np.testing.assert_array_equal(out, frame)


def test_a_strip_keeps_a_pixel() -> None:
    assert Letterbox.fit((1, 5000), (64, 64)).scaled_hw == (1, 64)
    assert Letterbox.fit((5000, 1), (64, 64)).scaled_hw == (64, 1)
    assert Letterbox.fit((3, 5), (64, 64)).scaled_hw == (38, 64)  # 38.4
    assert Letterbox.fit((7, 11), (64, 64)).scaled_hw == (41, 64)  # 40.7


def test_other_multiples() -> None:
    assert Letterbox.pad((65, 130), multiple=16).size_hw == (80, 144)
    assert Letterbox.pad((64, 128)).size_hw == (64, 128)
    assert Letterbox.longest((1080, 1920), 640, multiple=64).size_hw == (384, 640)
    assert Letterbox.longest((1080, 1920), 640, multiple=128).size_hw == (384, 640)
    assert Letterbox.longest((1080, 1920), 640, multiple=16).size_hw == (368, 640)


def test_a_frame_is_placed_as_its_network_size_asks() -> None:
    frame_hw = (1080, 1920)
    for size, scaled_hw, size_hw in (
        (None, (1080, 1920), (1088, 1920)),
        (640, (360, 640), (384, 640)),
        ((640, 640), (360, 640), (640, 640)),
        ((320, 1280), (320, 569), (320, 1280)),
    ):
        assert Letterbox.place(frame_hw, size) == Letterbox(frame_hw, scaled_hw, size_hw)


def test_views_and_other_memory_orders_give_the_same_image() -> None:
    frame = np.random.default_rng(1).integers(0, 256, (90, 120, 3), np.uint8)
    for size in ((64, 64), (90, 120)):
        box = Letterbox.fit((90, 120), size)
        expected = box.apply(frame, MEAN)
        for other in (np.asfortranarray(frame), frame[:, :, ::-1].copy()[:, :, ::-1], frame[::-1].copy()[::-1]):
            np.testing.assert_array_equal(box.apply(other, MEAN), expected)
    read_only = frame.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(Letterbox.fit((90, 120), (64, 64)).apply(read_only, MEAN).shape, (64, 64, 3))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ("photo.jpg", "numpy array"),
        (None, "numpy array"),
        (np.full((4, 4, 3), np.nan, np.float32), "uint8"),
        (np.zeros((4, 4, 3), np.uint16), "uint8"),
        (np.zeros((4, 4, 3), bool), "uint8"),
        (np.zeros((4, 4), np.uint8), "GRAY2BGR"),
        (np.zeros((4, 4, 1), np.uint8), "GRAY2BGR"),
        (np.zeros((4, 4, 4), np.uint8), "BGRA2BGR"),
        (np.zeros((3, 4, 5), np.uint8), "HxWx3"),
        (np.zeros((), np.uint8), "HxWx3"),
        (np.zeros((2, 4, 4, 3), np.uint8), "detect_batch"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 0, 3), np.uint8), "empty"),
    ],
)
def test_other_frames_are_refused_with_the_mend(frame: object, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        check_frame(frame)


def test_a_frame_is_returned_as_it_is() -> None:
    for frame in (np.zeros((1, 1, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)[::2, ::-1]):
        assert check_frame(frame) is frame
    with pytest.raises(FrameError, match=r"float64 of shape \(4, 5, 3\)"):
        check_frame(np.zeros((4, 5, 3)))
