"""Resize and pad a frame to the network's size, and map boxes and landmarks back.

The frame is scaled by one factor, up or down, until it touches the network's size, placed in the top-left corner and
padded on the right and at the bottom with the mean colour. Coordinates are continuous: pixel i covers [i, i + 1).
Rounding the scaled size to whole pixels changes the factor a little, so the mapping keeps one exact factor per axis.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facespec.errors import FrameError
from facespec.spec import SIZE_MULTIPLE, NetworkSize

Frame = NDArray[np.uint8]
_UINT8 = np.dtype(np.uint8)


def check_frame(frame: object) -> Frame:
    """Return `frame` if it is uint8 of shape (H, W, 3) with at least one pixel, as every detector expects (BGR order).

    Raises:
        FrameError: Anything else; the message names the conversion that mends it.
    """
    if not isinstance(frame, np.ndarray):
        raise FrameError(f"frame must be a numpy array (uint8, HxWx3, BGR), got {type(frame).__name__}")
    if frame.dtype == _UINT8 and frame.ndim == 3 and frame.shape[2] == 3 and frame.size:
        return frame
    found = f"{frame.dtype} of shape {frame.shape}"
    channels = frame.shape[2] if frame.ndim == 3 else 1 if frame.ndim == 2 else 0
    if channels in (1, 4):
        code = "COLOR_GRAY2BGR" if channels == 1 else "COLOR_BGRA2BGR"
        raise FrameError(f"frame must be uint8 HxWx3 BGR, got {found}: cv2.cvtColor(frame, cv2.{code}) mends it")
    if channels != 3:
        raise FrameError(f"frame must be uint8 HxWx3 BGR, got {found}; several frames go to detect_batch as a list")
    if frame.dtype != _UINT8:
        raise FrameError(f"frame must be uint8 with values 0..255, got {found}")
    raise FrameError(f"frame is empty: {found}")


@dataclass(frozen=True)
class Letterbox:
    """How a frame lies in the network input.

    Attributes:
        frame_hw: Size of the frame in pixels.
        scaled_hw: Size of the frame after scaling; it lies in the top-left corner.
        size_hw: Size of the network input; the rest of it is padding.
    """

    frame_hw: tuple[int, int]
    scaled_hw: tuple[int, int]
    size_hw: tuple[int, int]

    @classmethod
    def fit(cls, frame_hw: tuple[int, int], size_hw: tuple[int, int]) -> Letterbox:
        """Return the largest placement of a frame in an input of `size_hw`, its aspect ratio kept."""
        scale = min(size_hw[0] / frame_hw[0], size_hw[1] / frame_hw[1])
        scaled = [min(max(round(side * scale), 1), limit) for side, limit in zip(frame_hw, size_hw, strict=True)]
        return cls(frame_hw, (scaled[0], scaled[1]), size_hw)

    @classmethod
    def pad(cls, frame_hw: tuple[int, int], multiple: int = SIZE_MULTIPLE) -> Letterbox:
        """Return the placement at original scale, padded to the next multiple of `multiple`."""
        height, width = (-(-side // multiple) * multiple for side in frame_hw)
        return cls(frame_hw, frame_hw, (height, width))

    @classmethod
    def longest(cls, frame_hw: tuple[int, int], longest: int, multiple: int = SIZE_MULTIPLE) -> Letterbox:
        """Return the placement that makes the longer side `longest` pixels, with no more padding than `multiple` asks.

        The scale is that of `fit` into a square of `longest`; a frame of 1920x1080 takes 60 % of that square.
        """
        scaled = cls.fit(frame_hw, (longest, longest)).scaled_hw
        return cls(frame_hw, scaled, cls.pad(scaled, multiple).size_hw)

    @classmethod
    def place(cls, frame_hw: tuple[int, int], size: NetworkSize) -> Letterbox:
        """Return how a detector takes a frame: fitted into a size, to a longer side, or, with None, only padded."""
        if size is None:
            return cls.pad(frame_hw)
        return cls.longest(frame_hw, size) if isinstance(size, int) else cls.fit(frame_hw, size)

    @property
    def scale_xy(self) -> tuple[float, float]:
        """Network pixels per frame pixel along x and y."""
        return self.scaled_hw[1] / self.frame_hw[1], self.scaled_hw[0] / self.frame_hw[0]

    def apply(self, frame: Frame, pad_bgr: tuple[int, int, int], out: Frame | None = None) -> Frame:
        """Return the network input, uint8 (H, W, 3), by cv2's fixed-point bilinear interpolation.

        Args:
            frame: uint8 (h, w, 3) of size `frame_hw`.
            pad_bgr: Padding colour.
            out: Array to fill and return; a frame that already fits is otherwise returned itself, without a copy.
        """
        from facespec.opencv import cv2  # a GPU letterboxes by itself: detectors on it do not need OpenCV

        (height, width), (full_height, full_width) = self.scaled_hw, self.size_hw
        if out is None and self.frame_hw == self.size_hw:
            return np.ascontiguousarray(frame)
        if out is None:
            out = np.empty((full_height, full_width, 3), np.uint8)
        if self.scaled_hw == self.frame_hw:
            out[:height, :width] = frame
        elif width == full_width:  # whole rows: resize straight into the output
            cv2.resize(frame, (width, height), dst=out[:height], interpolation=cv2.INTER_LINEAR)
        else:
            out[:height, :width] = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
        if width < full_width:
            out[:height, width:] = pad_bgr
        if height < full_height:
            out[height:] = pad_bgr
        return out

    def to_network(self, points_xy: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map coordinates of the frame to the network input; the last axis is x, y or x, y, x, y."""
        return points_xy * np.asarray(self.scale_xy * 2, np.float32)[: points_xy.shape[-1]]

    def to_frame(self, points_xy: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map coordinates of the network input to the frame; the inverse of `to_network`."""
        return (points_xy.reshape(-1) * np.resize(self.scales, points_xy.size)).reshape(points_xy.shape)

    @functools.cached_property
    def scales(self) -> NDArray[np.float32]:
        """Frame pixels per network pixel along x, y, x, y and so on: (1024,) float32, enough for 102 faces.

        What is multiplied by them lies in a row: numpy takes three times as long to multiply twos by a pair.
        """
        scale_x, scale_y = self.scale_xy
        return np.tile(np.asarray((1 / scale_x, 1 / scale_y), np.float32), 512)
