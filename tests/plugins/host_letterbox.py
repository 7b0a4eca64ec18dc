"""The letterbox kernel on the CPU, called with arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from facespec.letterbox import Letterbox
from trt_runtime.kernels import LetterboxFrame, PixelFormat, describe_frame, library, load_letterbox

Bytes = NDArray[np.uint8]
Colour = tuple[int, int, int]


def host_letterbox(
    frames: Sequence[Bytes], boxes: Sequence[Letterbox], pad_bgr: Colour, out: Bytes | None = None
) -> Bytes:
    """Return the network's input (B, H, W, 3) for BGR frames (h, w, 3); what has contiguous rows is read in place.

    Args:
        frames: uint8, of any sizes.
        boxes: How each frame lies in the input; all of one `size_hw`, its width a multiple of 32.
        pad_bgr: Padding colour.
        out: Contiguous array to fill and return.
    """
    return _letterbox([(frame,) for frame in frames], boxes, pad_bgr, PixelFormat.BGR, out)


def host_letterbox_nv12(
    frames: Sequence[tuple[Bytes, Bytes]], boxes: Sequence[Letterbox], pad_bgr: Colour, pixel_format: PixelFormat
) -> Bytes:
    """Return the same for NV12 frames: luma (h, w) and chroma (h / 2, w / 2, 2) of each."""
    return _letterbox(frames, boxes, pad_bgr, pixel_format, None)


def _with_rows(array: Bytes) -> Bytes:
    """Return an array whose rows are contiguous and lie one after the other: a copy only if they do not."""
    row = int(np.prod(array.shape[1:]))
    contiguous = array[:1].flags.c_contiguous and array.strides[0] >= row
    return array if contiguous else np.ascontiguousarray(array)


def _letterbox(
    frames: Sequence[tuple[Bytes, ...]],
    boxes: Sequence[Letterbox],
    pad_bgr: Colour,
    pixel_format: PixelFormat,
    out: Bytes | None,
) -> Bytes:
    planes = [[_with_rows(plane) for plane in frame] for frame in frames]  # kept until the kernel has read them
    described = []
    for (pixels, *chroma), box in zip(planes, boxes, strict=True):
        assert pixels.dtype == np.uint8
        assert pixels.shape[:2] == box.frame_hw
        place = [part for plane in chroma for part in (plane.ctypes.data, plane.strides[0])]
        address, pitch = pixels.ctypes.data, pixels.strides[0]
        described.append(describe_frame(address, pitch, box.frame_hw, box.scaled_hw, pixel_format, *place))
    (size_hw,) = {box.size_hw for box in boxes}
    shape = (len(frames), *size_hw, 3)
    out = np.empty(shape, np.uint8) if out is None else out
    assert out.shape == shape
    assert out.flags.c_contiguous
    array = (LetterboxFrame * len(frames))(*described)
    load_letterbox(library())(ctypes.addressof(array), len(frames), size_hw, pad_bgr, out.ctypes.data, 0)
    return out
