"""The letterbox kernel on a GPU gives the bits of the host version, wherever frames lie: python -m tests.gpu."""

# ruff: noqa: PT009, PT027 - without pytest, a plain assert does not say what differs
from __future__ import annotations

import os
import unittest
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tests.gpu import frames
from tests.gpu.frames import PAD, Slot
from tests.gpu.kernel import DEVICE, Guarded, Kernels, build_kernels, capability, gpu_problem
from trt_runtime.kernels import LaunchError, PixelFormat

REQUIRED = bool(os.environ.get("RETINAFACE_REQUIRE_GPU"))
PROBLEM = gpu_problem()


class Batch:
    """Memory on the device for batches of one size and number of frames; its addresses never change."""

    def __init__(self, kernels: Kernels, count: int, size_hw: tuple[int, int]) -> None:
        import torch

        self.kernels, self.count, self.size_hw = kernels, count, size_hw
        self.descriptions = torch.zeros(64 * count, dtype=torch.uint8, device=DEVICE)
        self.out = Guarded(count * size_hw[0] * size_hw[1] * 3)
        self._frames: list[torch.Tensor] = []

    def load(self, slots: Sequence[Slot]) -> None:
        """Copy frames and their descriptions to the device; spoil the output."""
        import torch

        self._frames = [torch.from_numpy(slot.buffer).to(DEVICE) for slot in slots]
        described = frames.descriptions(slots, [frame.data_ptr() for frame in self._frames])
        self.descriptions.copy_(torch.from_numpy(described))
        self.out.inside.random_(0, 256)
        torch.cuda.synchronize()

    def launch(self, descriptions: int | None = None, out: int | None = None, **changed: Any) -> None:
        """Launch on torch's current stream; arguments replace what belongs there."""
        import torch

        self.kernels.letterbox(
            self.descriptions.data_ptr() if descriptions is None else descriptions,
            changed.get("count", self.count),
            changed.get("size_hw", self.size_hw),
            PAD,
            self.out.inside.data_ptr() if out is None else out,
            torch.cuda.current_stream().cuda_stream,
        )

    def result(self) -> frames.Bytes:
        """Return the network's input, after everything on the device.

        Raises:
            RuntimeError: Something beside the output was written to.
        """
        import torch

        torch.cuda.synchronize()
        if not self.out.intact():
            raise RuntimeError("the kernel wrote beside its output")
        return self.out.inside.cpu().numpy().reshape(self.count, *self.size_hw, 3)


@unittest.skipUnless(PROBLEM is None or REQUIRED, PROBLEM or "")
class LetterboxTest(unittest.TestCase):
    kernels: Kernels

    @classmethod
    def setUpClass(cls) -> None:
        if PROBLEM:
            raise AssertionError(f"RETINAFACE_REQUIRE_GPU is set: {PROBLEM}")
        cls.kernels = Kernels(build_kernels(capability()))

    def assert_same(self, got: frames.Bytes, slots: Sequence[Slot], size_hw: tuple[int, int]) -> None:
        want = frames.on_host(slots, size_hw)
        wrong = np.argwhere(got != want)
        if len(wrong):
            at = tuple(wrong[0])
            self.fail(f"{len(wrong)} of {want.size} differ, first {at}: {got[at]} != {want[at]}, {slots[at[0]]}")

    def check(self, slots: Sequence[Slot], size_hw: tuple[int, int]) -> None:
        batch = Batch(self.kernels, len(slots), size_hw)
        batch.load(slots)
        batch.launch()
        self.assert_same(batch.result(), slots, size_hw)

    def test_every_path(self) -> None:
        for size in ((97, 128), (96, 160), (640, 640), (1088, 1920)):
            for slots in frames.batches(size):
                with self.subTest(size=size, slots=slots if len(slots) == 1 else len(slots)):
                    self.check(slots, size)

    def test_every_alignment(self) -> None:
        """A crop of a larger frame may begin at any byte; the copy of 16 bytes at a time must see it."""
        size = (64, 96)
        for pixel_format in (PixelFormat.BGR, PixelFormat.NV12_BT709):
            for scaled in (size, (41, 62)):
                slots = [
                    Slot(size, scaled, pixel_format, offset, gap, seed=offset)
                    for offset in (*range(17), 32)
                    for gap in (0, 1, 2, 4, 8, 16)
                ]
                self.check(slots, size)

    def test_many_sizes(self) -> None:
        rng = np.random.default_rng(5)
        size = (320, 352)
        for _ in range(8):
            slots = []
            for seed in range(16):
                height, width = (int(side) for side in rng.integers(1, 700, 2))
                scaled = int(rng.integers(1, size[0] + 1)), int(rng.integers(1, size[1] + 1))
                pixel_format = PixelFormat(int(rng.integers(0, 5)))
                sides = (2 * height, 2 * width) if pixel_format else (height, width)
                slots.append(
                    Slot(sides, scaled, pixel_format, int(rng.integers(0, 32)), int(rng.integers(0, 32)), seed)
                )
            self.check(slots, size)

    def test_large_frames(self) -> None:
        for frame_hw, scaled_hw in (((2160, 3840), (720, 1280)), ((5001, 9001), (711, 1280)), ((16383, 5), (1280, 1))):
            self.check([Slot(frame_hw, scaled_hw)], (1280, 1280))

    def test_a_captured_launch_replays_on_other_frames(self) -> None:
        """Sizes, formats and addresses stand in the descriptions, which a replay reads anew."""
        import torch

        size = (97, 128)
        singles = [slots[0] for slots in frames.batches(size) if len(slots) == 1]
        batch = Batch(self.kernels, 3, size)
        batch.load(singles[:3])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            batch.launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            batch.launch()
        for first in range(len(singles) - 2):
            slots = singles[first : first + 3]
            batch.load(slots)
            graph.replay()
            self.assert_same(batch.result(), slots, size)

    def test_two_streams_at_once(self) -> None:
        import torch

        size = (640, 640)
        slots = [[Slot((1080, 1920), (360, 640), seed=i), Slot((500, 333), (640, 426), seed=i + 9)] for i in range(2)]
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        batches = [Batch(self.kernels, 2, size) for _ in streams]
        for batch, loaded in zip(batches, slots, strict=True):
            batch.load(loaded)
        for _ in range(50):
            for batch, stream in zip(batches, streams, strict=True):
                with torch.cuda.stream(stream):
                    batch.launch()
        for batch, loaded in zip(batches, slots, strict=True):
            self.assert_same(batch.result(), loaded, size)

    def test_impossible_calls_are_refused(self) -> None:
        size = (64, 96)
        slot = Slot((50, 40), (64, 51))
        batch = Batch(self.kernels, 1, size)
        batch.load([replace(slot, seed=1)])
        batch.out.inside.fill_(0xFF)
        described, out = batch.descriptions.data_ptr(), batch.out.inside.data_ptr()
        calls: list[tuple[dict[str, Any], int]] = [
            ({"descriptions": 0}, 1),
            ({"out": 0}, 1),
            ({"count": 0}, 1),
            ({"count": 65536}, 1),
            ({"size_hw": (64, 80)}, 1),
            ({"size_hw": (0, 96)}, 1),
            ({"descriptions": described + 4}, 716),
            ({"out": out + 4}, 716),
        ]
        for arguments, code in calls:
            with self.assertRaisesRegex(LaunchError, f"CUDA error {code};"):
                batch.launch(**arguments)
        self.assertTrue((batch.result() == 0xFF).all())
        batch.load([slot])
        batch.launch()
        self.assert_same(batch.result(), [slot], size)


if __name__ == "__main__":
    unittest.main(verbosity=2)
