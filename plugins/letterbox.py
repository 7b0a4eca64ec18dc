"""The letterbox kernel: frames on a GPU become the network's input; and the same kernel on the host.

It gives the bits of `facespec.letterbox.Letterbox.apply` with cv2 on x86, which the tests compare.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from facespec.errors import FrameError, RetinaFaceError
from plugins import host

MAX_FRAME_SIDE = 16384
"""Pixels: up to here a float, in which positions are held, is fine enough."""

_REFUSED = "; it takes widths that are multiples of 32 and addresses aligned to 16 bytes"
_REBUILD = ": update the NVIDIA driver, or compile the plugin with an older nvcc: python -m plugins.build"
MENDS = {
    1: _REFUSED,
    716: _REFUSED,
    35: f", the plugin was compiled by a CUDA that is newer than the driver{_REBUILD}",
    209: f", the plugin has no code for this GPU{_REBUILD}",
}
"""What to do about an error of CUDA: cudaErrorInvalidValue and cudaErrorMisalignedAddress, given before anything is
launched, cudaErrorInsufficientDriver and cudaErrorNoKernelImageForDevice."""

Launch = Callable[[int, int, tuple[int, int], tuple[int, int, int], int, int], None]
"""(frames_address, batch, size_hw, pad_bgr, out_address, stream_handle): see `load`."""


class Placement(Protocol):
    """How a frame lies in the network's input: a `facespec.letterbox.Letterbox` is one."""

    @property
    def frame_hw(self) -> tuple[int, int]:
        """Size of the frame in pixels."""

    @property
    def scaled_hw(self) -> tuple[int, int]:
        """Size of the frame after scaling."""

    @property
    def size_hw(self) -> tuple[int, int]:
        """Size of the network's input."""


class LaunchError(RetinaFaceError, RuntimeError):
    """The letterbox kernel could not be launched."""


class PixelFormat(IntEnum):
    """What the bytes of a frame mean: `retinaface::PixelFormat` of plugins/include/letterbox.h.

    NV12 is what hardware decoders give: a luma plane (h, w) and a plane (h / 2, w / 2, 2) of U and V. Which matrix it
    needs stands in the stream: BT.601 for standard definition, BT.709 for more; luma 16..235, or 0..255 where it is
    full.
    """

    BGR = 0
    NV12_BT601 = 1
    NV12_BT601_FULL = 2
    NV12_BT709 = 3
    NV12_BT709_FULL = 4


class LetterboxFrame(ctypes.Structure):
    """`retinaface::LetterboxFrame` of plugins/include/letterbox.h; one of zeros is a slot without a frame."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("chroma", ctypes.c_void_p),
        ("pitch", ctypes.c_int64),
        ("chroma_pitch", ctypes.c_int64),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("scaled_height", ctypes.c_int32),
        ("scaled_width", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("reserved", ctypes.c_int32 * 3),
    )


def describe(
    address: int,
    pitch: int,
    frame_hw: tuple[int, int],
    scaled_hw: tuple[int, int],
    pixel_format: PixelFormat = PixelFormat.BGR,
    chroma_address: int = 0,
    chroma_pitch: int = 0,
) -> LetterboxFrame:
    """Return the description of a frame that the kernel reads.

    Args:
        address: Of the first pixel, or of the luma plane.
        pitch: Bytes from row to row.
        frame_hw: Height and width of the frame in pixels.
        scaled_hw: What it is scaled to: `Letterbox.scaled_hw`.
        pixel_format: Of the frame.
        chroma_address: Of the U and V plane of NV12.
        chroma_pitch: Bytes from row to row of that plane.

    Raises:
        FrameError: There can be no such frame, or it is too large.
    """
    (height, width), nv12 = frame_hw, pixel_format != PixelFormat.BGR
    row = width if nv12 else 3 * width
    problem = ""
    if not all(1 <= side <= MAX_FRAME_SIDE for side in (height, width, *scaled_hw)):
        problem = (
            f"scaled to {scaled_hw[1]}x{scaled_hw[0]}: sides must be 1 to {MAX_FRAME_SIDE} pixels for the GPU; "
            "cv2.resize makes a smaller frame"
        )
    elif nv12 and (height % 2 or width % 2):
        problem = "height and width of NV12 must be even"
    elif not address or pitch < row:
        problem = f"expected an address and a pitch of {row} bytes at least, got {address} and {pitch}"
    elif nv12 and (not chroma_address or chroma_pitch < row):
        problem = (
            f"expected the address of its chroma and a pitch of {row} bytes at least, got {chroma_address} and "
            f"{chroma_pitch}"
        )
    elif not nv12 and (chroma_address or chroma_pitch):
        problem = "it has no chroma plane; NV12 does"
    if problem:
        raise FrameError(f"frame of {width}x{height} pixels, {PixelFormat(pixel_format).name}: {problem}")
    return LetterboxFrame(address, chroma_address, pitch, chroma_pitch, height, width, *scaled_hw, int(pixel_format))


def load(library: Any) -> Launch:
    """Return the letterbox function of a library that ctypes has loaded: the plugin, the kernels, or the host library.

    Its arguments are the address of an array of `LetterboxFrame`, one a batch slot, 8-byte aligned; how many; the size
    of the network's input, the width a multiple of 32; the colour of the padding; the address of the output, uint8
    (batch, height, width, 3), 16-byte aligned; and the handle of a CUDA stream. On a GPU both addresses are device
    addresses, and the first launch must not be captured in a graph, because it loads the kernel. The host library works
    in host memory, before it returns; it ignores the stream.

    The function raises `LaunchError` if the launch fails, and ValueError for a padding colour that is none.
    """
    on_device = hasattr(library, "retinaface_letterbox")
    function = library.retinaface_letterbox if on_device else library.retinaface_host_letterbox
    address, number = ctypes.c_void_p, ctypes.c_int32
    function.argtypes = (address, number, number, number, ctypes.c_uint32, address, address)
    function.restype = number

    def launch(
        frames_address: int,
        batch: int,
        size_hw: tuple[int, int],
        pad_bgr: tuple[int, int, int],
        out_address: int,
        stream_handle: int,
    ) -> None:
        code = function(frames_address, batch, *size_hw, pack_bgr(pad_bgr), out_address, stream_handle)
        if code:
            call = f"letterbox of {batch} frames into {size_hw[1]}x{size_hw[0]} at {out_address:#x}"
            error = f"CUDA error {code}" if on_device else "refused"
            raise LaunchError(f"{call}: {error}{MENDS.get(code, '')}")

    return launch


def pack_bgr(colour: tuple[int, int, int]) -> int:
    """Return b | g << 8 | r << 16.

    Raises:
        ValueError: A value is not in 0..255.
    """
    if not all(0 <= value <= 255 for value in colour):
        raise ValueError(f"a colour has three values from 0 to 255, not {colour}")
    blue, green, red = colour
    return blue | green << 8 | red << 16


def host_letterbox(
    frames: Sequence[NDArray[np.uint8]],
    boxes: Sequence[Placement],
    pad_bgr: tuple[int, int, int],
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Return the network's input (B, H, W, 3) for a batch of BGR frames, by the kernel on the host.

    Args:
        frames: uint8 (h, w, 3) each, of any sizes; what has contiguous rows is read where it lies.
        boxes: How each frame lies in the input; all of one `size_hw`, its width a multiple of 32.
        pad_bgr: Padding colour.
        out: Contiguous array to fill and return.

    Raises:
        FrameError: A frame is not what it should be.
        ValueError: Frames, boxes and `out` do not fit together.
        BuildError: The library must be compiled, and there is no C++ compiler.
    """
    for frame in frames:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise FrameError(f"frame must be uint8 HxWx3 BGR, got {frame.dtype} of shape {frame.shape}")
    rows = [_with_rows(frame) for frame in frames]
    described = [
        describe(frame.ctypes.data, frame.strides[0], (frame.shape[0], frame.shape[1]), box.scaled_hw)
        for frame, box in zip(rows, boxes, strict=True)
    ]
    return _run(described, boxes, pad_bgr, out)


def host_letterbox_nv12(
    frames: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    boxes: Sequence[Placement],
    pad_bgr: tuple[int, int, int],
    pixel_format: PixelFormat = PixelFormat.NV12_BT709,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Return the network's input (B, H, W, 3), BGR, for a batch of NV12 frames, by the kernel on the host.

    Args:
        frames: Luma (h, w) and chroma (h / 2, w / 2, 2), uint8, of each frame.
        boxes: As in `host_letterbox`.
        pad_bgr: Padding colour.
        pixel_format: One of the NV12 formats, of all frames.
        out: Contiguous array to fill and return.

    Raises:
        FrameError: A frame is not what it should be.
        ValueError: Frames, boxes and `out` do not fit together.
        BuildError: The library must be compiled, and there is no C++ compiler.
    """
    planes, described = [], []
    for (luma, chroma), box in zip(frames, boxes, strict=True):
        expected = (luma.shape[0] // 2, luma.shape[1] // 2, 2) if luma.ndim == 2 else ()
        if chroma.shape != expected or {luma.dtype, chroma.dtype} != {np.dtype(np.uint8)}:
            raise FrameError(
                "NV12 is uint8 luma (h, w) and uint8 chroma (h / 2, w / 2, 2), got "
                f"{luma.dtype} {luma.shape} and {chroma.dtype} {chroma.shape}"
            )
        luma, chroma = _with_rows(luma), _with_rows(chroma)
        planes.append((luma, chroma))
        place = (chroma.ctypes.data, chroma.strides[0])
        size = (luma.shape[0], luma.shape[1])
        described.append(describe(luma.ctypes.data, luma.strides[0], size, box.scaled_hw, pixel_format, *place))
    return _run(described, boxes, pad_bgr, out)


def _with_rows(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an array whose rows are contiguous and lie one after the other: a copy only if they do not."""
    row = int(np.prod(array.shape[1:]))
    contiguous = array[:1].flags.c_contiguous and array.strides[0] >= row
    return array if contiguous else np.ascontiguousarray(array)


def _run(
    frames: Sequence[LetterboxFrame],
    boxes: Sequence[Placement],
    pad_bgr: tuple[int, int, int],
    out: NDArray[np.uint8] | None,
) -> NDArray[np.uint8]:
    sizes = {box.size_hw for box in boxes}
    if len(sizes) != 1:
        raise ValueError(f"the frames of a batch go into one size, not {sorted(sizes)}")
    (size_hw,) = sizes
    for frame, box in zip(frames, boxes, strict=True):
        if (frame.height, frame.width) != box.frame_hw:
            raise ValueError(f"frame of {frame.height, frame.width} pixels, its box is for {box.frame_hw}")
    shape = (len(frames), *size_hw, 3)
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out must be contiguous uint8 {shape}, got {out.dtype} {out.shape}")
    array = (LetterboxFrame * len(frames))(*frames)
    load(host.library())(ctypes.addressof(array), len(frames), size_hw, pad_bgr, out.ctypes.data, 0)
    return out
