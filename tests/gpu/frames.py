"""Frames with random content for the letterbox kernel, in buffers of exactly their size. Numpy only."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trt_runtime import kernels
from trt_runtime.kernels import LetterboxFrame, PixelFormat, describe_frame, load_letterbox

Bytes = NDArray[np.uint8]
PAD = (104, 117, 123)


@dataclass(frozen=True)
class Slot:
    """A frame of a batch.

    Attributes:
        frame_hw: Its size.
        scaled_hw: What it is scaled to; (0, 0) for a slot without a frame.
        pixel_format: Of the frame.
        offset: Bytes before its first pixel, so that it does not lie on an aligned address.
        gap: Bytes after each row.
        seed: Of its content.
    """

    frame_hw: tuple[int, int]
    scaled_hw: tuple[int, int]
    pixel_format: PixelFormat = PixelFormat.BGR
    offset: int = 0
    gap: int = 0
    seed: int = 0
    buffer: Bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        height, chroma_rows = self.frame_hw[0], self.frame_hw[0] // 2 if self.pixel_format else 0
        size = self.offset + (height + chroma_rows) * self.pitch - self.gap
        object.__setattr__(self, "buffer", np.random.default_rng(self.seed).integers(0, 256, size, np.uint8))

    @property
    def pitch(self) -> int:
        return self.frame_hw[1] * (1 if self.pixel_format else 3) + self.gap

    def at(self, address: int) -> LetterboxFrame:
        """Return the description of the frame in a copy of its buffer."""
        if not all(self.scaled_hw):
            return LetterboxFrame()
        data = address + self.offset
        chroma = (data + self.frame_hw[0] * self.pitch, self.pitch) if self.pixel_format else (0, 0)
        return describe_frame(data, self.pitch, self.frame_hw, self.scaled_hw, self.pixel_format, *chroma)


def descriptions(slots: Sequence[Slot], addresses: Sequence[int]) -> Bytes:
    """Return the array of descriptions that a kernel reads, as bytes."""
    array = (LetterboxFrame * len(slots))(*(slot.at(a) for slot, a in zip(slots, addresses, strict=True)))
    return np.frombuffer(array, np.uint8).copy()


def on_host(slots: Sequence[Slot], size_hw: tuple[int, int]) -> Bytes:
    """Return the network's input by the host's kernel: uint8 (B, H, W, 3)."""
    frames = descriptions(slots, [slot.buffer.ctypes.data for slot in slots])
    out = np.zeros((len(slots), *size_hw, 3), np.uint8)
    load_letterbox(kernels.library())(frames.ctypes.data, len(slots), size_hw, PAD, out.ctypes.data, 0)
    return out


def in_other_orders(slots: Sequence[Slot], size_hw: tuple[int, int], seeds: Sequence[int]) -> list[Bytes]:
    """Return the same with the loops of a warp from behind (seed 0) or shuffled."""
    frames = descriptions(slots, [slot.buffer.ctypes.data for slot in slots])
    function = kernels.library().retinaface_host_letterbox_unordered
    pad = PAD[0] | PAD[1] << 8 | PAD[2] << 16
    results = []
    for seed in seeds:
        out = np.zeros((len(slots), *size_hw, 3), np.uint8)
        pointers = ctypes.c_void_p(frames.ctypes.data), ctypes.c_void_p(out.ctypes.data)
        code = function(pointers[0], len(slots), *size_hw, ctypes.c_uint32(pad), pointers[1], ctypes.c_uint64(seed))
        assert code == 0
        results.append(out)
    return results


def batches(size_hw: tuple[int, int]) -> list[list[Slot]]:
    """Return batches that take every path of the kernel, for a network's input of at least 96x128 pixels."""
    height, width = size_hw
    fits, half, third = (height, width), (2 * height, 2 * width), (3 * height, 3 * width)
    bgr = [
        Slot(fits, fits, seed=1),  # 16 bytes at a time
        Slot(fits, fits, offset=3, gap=6, seed=2),  # the same, but nowhere aligned: a crop of a larger frame
        Slot((height - 5, width - 33), (height - 5, width - 33), offset=16, gap=64, seed=3),
        Slot(half, fits, offset=1, seed=4),
        Slot(third, fits, seed=5),
        Slot((37, 53), (height, height), offset=2, gap=1, seed=6),
        Slot((311, 479), (height - 1, width - 7), offset=5, gap=13, seed=7),
        Slot((1, 1), fits, seed=8),
        Slot((1, 700), (1, width), seed=9),
        Slot((700, 1), (height, 1), gap=2, seed=10),
        Slot((50, 60), (height + 40, width + 64), seed=11),  # more than fits
        Slot((2, 2), (0, 0)),
    ]
    nv12 = [
        Slot((2 * rows, 2 * columns), scaled, pixel_format, offset, gap, seed=20 + i)
        for i, (pixel_format, rows, columns, scaled, offset, gap) in enumerate(
            [
                (PixelFormat.NV12_BT601, height // 2, width // 2, fits, 0, 0),
                (PixelFormat.NV12_BT601_FULL, 97, 131, (height - 9, width), 1, 3),
                (PixelFormat.NV12_BT709, height, width, fits, 0, 256),
                (PixelFormat.NV12_BT709_FULL, 20, 33, (height, width - 30), 7, 1),
                (PixelFormat.NV12_BT709, 1, 1, (height, height), 0, 0),
            ]
        )
    ]
    return [*([slot] for slot in (*bgr, *nv12)), bgr, nv12, [*nv12, *bgr]]
