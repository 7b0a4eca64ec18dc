"""The kernels on a GPU give the bits of the host version, whatever lies in the memory they are given.

unittest alone, so that a machine with CUDA, torch and numpy can run it: python -m tests.gpu.
"""

# ruff: noqa: PT009 - without pytest, a plain assert does not say what differs
from __future__ import annotations

import ctypes
import os
import unittest
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facespec.boxes import make_priors
from facespec.spec import AnchorSpec, DecodeSpec, ModelSpec
from tests.gpu import heads as content
from tests.gpu.kernel import (
    INVALID_VALUE,
    MISALIGNED_ADDRESS,
    Call,
    Driver,
    Kernels,
    build_kernels,
    capability,
    gpu_problem,
)
from trt_runtime import kernels as host

SPEC = ModelSpec()
SIZES = ((32, 32), (320, 320), (640, 640), (96, 416), (1088, 1920))
LAYOUTS = ((np.float32, False), (np.float32, True), (np.float16, False), (np.float16, True))
POISON = (0xFF, None)
REQUIRED = bool(os.environ.get("RETINAFACE_REQUIRE_GPU"))
PROBLEM = gpu_problem()

Results = dict[str, NDArray[Any]]


def spec_with(**decode: Any) -> ModelSpec:
    return replace(SPEC, decode=replace(DecodeSpec(), **decode))


@unittest.skipUnless(PROBLEM is None or REQUIRED, PROBLEM or "")
class KernelTest(unittest.TestCase):
    kernels: Kernels

    @classmethod
    def setUpClass(cls) -> None:
        if PROBLEM:
            raise AssertionError(f"RETINAFACE_REQUIRE_GPU is set: {PROBLEM}")
        cls.kernels = Kernels(build_kernels(capability()))

    def setUp(self) -> None:
        self.rng = np.random.default_rng(2024)

    def assert_same(self, got: Results, want: Results) -> None:
        self.assertEqual(list(got), list(want))
        for name, values in want.items():
            self.assertEqual((got[name].shape, got[name].dtype), (values.shape, values.dtype), name)
            if got[name].tobytes() == values.tobytes():
                continue
            wrong = np.argwhere(got[name].view(np.uint32) != values.view(np.uint32))
            at = tuple(wrong[0])
            self.fail(f"{name}: {len(wrong)} of {values.size} differ, first {at}: {got[name][at]} != {values[at]}")

    def check(
        self,
        contents: Sequence[content.Content],
        size_hw: tuple[int, int],
        spec: ModelSpec = SPEC,
        dtype: Any = np.float32,
        channels_last: bool = False,
    ) -> Results:
        """Compare device and host for a batch; return the host's results."""
        maps = content.head_maps(contents, size_hw, spec.anchors, dtype, channels_last)
        want = host.decode_nms(maps, size_hw, spec)
        call = Call(self.kernels, spec, size_hw, len(contents), dtype, channels_last)
        call.load(maps)
        for byte in POISON:
            call.poison(byte)
            call.launch()
            self.assert_same(call.results(), want)
        return want

    def priors(self, size_hw: tuple[int, int]) -> int:
        return SPEC.anchors.count(size_hw)

    def test_sizes_batches_types_and_layouts(self) -> None:
        for size in SIZES:
            images = content.mixed_batch(self.rng, size, SPEC)
            for batch in range(1, 9) if size != (1088, 1920) else (1, 3, 8):
                batch_images = [images[(i + batch) % len(images)] for i in range(batch)]
                for dtype, channels_last in LAYOUTS:
                    with self.subTest(size=size, batch=batch, dtype=dtype.__name__, channels_last=channels_last):
                        self.check(batch_images, size, dtype=dtype, channels_last=channels_last)

    def test_content_is_what_it_should_be(self) -> None:
        """The comparison above would be worth little if nothing were found."""
        images = content.mixed_batch(self.rng, (640, 640), SPEC)
        want = self.check(images, (640, 640))
        candidates, found = want["num_candidates"], want["num_detections"]
        self.assertEqual([candidates[i] for i in (0, 1, 2, 4, 6)], [0, 15, 300, 16800, 1])
        self.assertEqual([found[i] for i in (0, 1, 5, 6)], [0, 3, 1, 1])
        self.assertTrue(40 <= found[2] <= 70, found[2])
        self.assertEqual(found[4], 750)

    def test_counts_around_every_limit(self) -> None:
        """Words of 32, chunks of 64, powers of two, top_k."""
        size = (320, 320)
        spec = spec_with(top_k=1000)
        counts = (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 999, 1000, 1001, 1024, 1025, 4199, 4200)
        for spread in (0.1, 1.0):
            images = [content.scattered(self.rng, self.priors(size), count, spread) for count in counts]
            want = self.check(images, size, spec)
            self.assertEqual(tuple(want["num_candidates"]), counts)

    def test_top_k_and_max_detections(self) -> None:
        size = (320, 320)
        images = [content.scattered(self.rng, 4200, 700), content.ties(self.rng, 4200)]
        for top_k in (1, 2, 31, 64, 65, 699, 700, 701, 1_000_000):
            for max_detections in (1, 2, 32, 33, 1500):
                with self.subTest(top_k=top_k, max_detections=max_detections):
                    self.check(images, size, spec_with(top_k=top_k, max_detections=max_detections))

    def test_far_more_candidates_than_top_k(self) -> None:
        size = (1088, 1920)
        priors = self.priors(size)
        crowd = content.scattered(self.rng, priors, 20_000)
        tied = content.ties(self.rng, priors)
        for dtype, channels_last in LAYOUTS:
            with self.subTest(dtype=dtype.__name__, channels_last=channels_last):
                self.check([crowd, tied], size, dtype=dtype, channels_last=channels_last)

    def test_more_candidates_than_shared_memory_holds(self) -> None:
        """More than 4096 are sorted in the workspace."""
        size = (1088, 1920)
        count = self.priors(size)
        priors = make_priors(SPEC.anchors, size)
        images = [
            content.scattered(self.rng, count, 20_000, 0.1),
            content.scattered(self.rng, count, 60_000),
            content.same_place(self.rng, priors, 25_000, SPEC),
            content.faces(self.rng, size, SPEC, 300),  # this one fits, in the same launch
        ]
        for max_detections in (100, 5000):
            for dtype in (np.float32, np.float16):
                with self.subTest(max_detections=max_detections, dtype=dtype.__name__):
                    want = self.check(images, size, spec_with(top_k=32_768, max_detections=max_detections), dtype)
                    self.assertEqual(list(want["num_candidates"]), [20_000, 60_000, 25_000, 300])

    def test_other_anchors(self) -> None:
        anchors = (
            AnchorSpec((8,), ((16,),)),
            AnchorSpec((16, 32), ((8, 16, 40), (64, 128, 300))),
            AnchorSpec(
                (8, 16, 32, 64), ((10, 16, 24, 32), (40, 48, 64, 96), (128, 160, 200, 256), (300, 400, 500, 600))
            ),
        )
        for anchor in anchors:
            spec = replace(SPEC, anchors=anchor)
            for size in ((160, 224), (544, 96)):
                count = anchor.count(size)
                images = [
                    content.scattered(self.rng, count, count // 3),
                    content.ties(self.rng, count),
                    content.no_faces(self.rng, count),
                ]
                for dtype, channels_last in LAYOUTS:
                    with self.subTest(anchor=anchor, size=size, dtype=dtype.__name__, channels_last=channels_last):
                        self.check(images, size, spec, dtype, channels_last)

    def test_a_value_that_is_not_finite_spoils_its_image_alone(self) -> None:
        size = (320, 320)
        images = content.mixed_batch(self.rng, size, SPEC)[1:5]
        last = self.priors(size) - 1
        places = [(0, 0), (0, 15), (last, 1), (last, 15), (3200, 5), (17, 9)]
        for value in (np.nan, np.inf, -np.inf):
            for slot, (prior, channel) in enumerate(places):
                broken = [image.copy() for image in images]
                broken[slot % 4][prior, channel] = value
                for dtype, channels_last in LAYOUTS:
                    with self.subTest(value=value, prior=prior, channel=channel, dtype=dtype.__name__):
                        want = self.check(broken, size, dtype=dtype, channels_last=channels_last)
                        spoiled = want["num_candidates"] == -1
                        self.assertEqual(list(np.flatnonzero(spoiled)), [slot % 4])

    def test_extreme_but_finite_values(self) -> None:
        size = (96, 416)
        count = self.priors(size)
        for dtype, largest in ((np.float32, 3e38), (np.float16, 65504.0)):
            wild = self.rng.standard_normal((count, 16), np.float32) * 30
            huge = np.where(self.rng.random((count, 16)) < 0.5, largest, -largest).astype(np.float32)
            tiny = self.rng.standard_normal((count, 16), np.float32) * np.float32(1e-7)
            with self.subTest(dtype=dtype.__name__):
                self.check([wild, huge, tiny, -tiny], size, dtype=dtype)

    def test_fifty_runs_give_the_same_bits(self) -> None:
        size = (640, 640)
        images = content.mixed_batch(self.rng, size, SPEC)
        maps = content.head_maps(images, size, SPEC.anchors, np.float16, False)
        want = host.decode_nms(maps, size, SPEC)
        call = Call(self.kernels, SPEC, size, len(images), np.float16)
        call.load(maps)
        for _ in range(50):
            call.poison()
            call.launch()
            self.assert_same(call.results(), want)

    def test_two_streams_at_once(self) -> None:
        import torch

        size = (640, 640)
        images = content.mixed_batch(self.rng, size, SPEC)
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        calls, wanted = [], []
        for i, image in enumerate(images):
            maps = content.head_maps([image, images[i - 1]], size, SPEC.anchors, np.float32, bool(i % 2))
            call = Call(self.kernels, SPEC, size, 2, np.float32, bool(i % 2))
            call.load(maps)
            call.poison()
            calls.append(call)
            wanted.append(host.decode_nms(maps, size, SPEC))
        torch.cuda.synchronize()
        for _ in range(50):
            for i, call in enumerate(calls):
                with torch.cuda.stream(streams[i % 2]):
                    call.launch()
        for call, want in zip(calls, wanted, strict=True):
            self.assert_same(call.results(), want)

    def test_a_captured_launch_replays_on_other_input(self) -> None:
        import torch

        size = (640, 640)
        images = content.mixed_batch(self.rng, size, SPEC)
        for dtype, channels_last in LAYOUTS:
            with self.subTest(dtype=dtype.__name__, channels_last=channels_last):
                call = Call(self.kernels, SPEC, size, 2, dtype, channels_last)
                call.load(content.head_maps(images[:2], size, SPEC.anchors, dtype, channels_last))
                torch.cuda.synchronize()
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    call.launch()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    call.launch()
                for first in (2, 4, 6, 0):
                    maps = content.head_maps(images[first : first + 2], size, SPEC.anchors, dtype, channels_last)
                    call.load(maps)
                    call.poison()
                    torch.cuda.synchronize()
                    graph.replay()
                    self.assert_same(call.results(), host.decode_nms(maps, size, SPEC))

    def test_misplaced_addresses_are_refused(self) -> None:
        size = (96, 416)
        call = Call(self.kernels, SPEC, size, 1)
        image = content.scattered(self.rng, self.priors(size), 50)
        maps = content.head_maps([image], size, SPEC.anchors, np.float32, False)
        call.load(maps)
        call.poison(0xFF)
        heads = [head.data_ptr() for head in call.heads]
        for i in range(len(heads)):
            shifted = [address + 4 * (i == j) for j, address in enumerate(heads)]
            self.assertEqual(call.code(heads=shifted), MISALIGNED_ADDRESS)
        self.assertEqual(call.code(workspace=call.workspace.data_ptr() + 8), MISALIGNED_ADDRESS)
        self.assertEqual(call.code(boxes=call.outputs["boxes"].data_ptr() + 4), MISALIGNED_ADDRESS)
        for name in (*call.outputs, "workspace"):
            self.assertEqual(call.code(**{name: 0}), INVALID_VALUE)
        self.assertEqual(call.code(heads=[0, *heads[1:]]), INVALID_VALUE)
        untouched = call.results()
        self.assertTrue(all(set(values.tobytes()) == {0xFF} for values in untouched.values()))
        call.launch()
        self.assert_same(call.results(), host.decode_nms(maps, size, SPEC))

    def test_impossible_parameters_are_refused(self) -> None:
        call = Call(self.kernels, SPEC, (96, 416), 1)
        for name, value in (("batch", 0), ("batch", 65536), ("levels", 5), ("top_k", 0), ("iou_threshold", 1.0)):
            with self.subTest(name=name, value=value):
                before = getattr(call.params, name)
                setattr(call.params, name, value)
                self.assertIsNotNone(self.kernels.check(call.params))
                self.assertEqual(call.code(), INVALID_VALUE)
                setattr(call.params, name, before)
        self.assertEqual(call.code(), 0)
        call.results()

    def test_launch_errors_are_reported(self) -> None:
        """While a blocking stream is captured, a launch on the default stream fails; the next one is right again."""
        size = (96, 416)
        call = Call(self.kernels, SPEC, size, 1)
        image = content.scattered(self.rng, self.priors(size), 50)
        maps = content.head_maps([image], size, SPEC.anchors, np.float32, False)
        call.load(maps)
        call.launch()
        want = call.results()
        driver = Driver()
        stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
        driver("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(0))
        driver("cuStreamBeginCapture_v2", stream, ctypes.c_int(0))
        try:
            code = call.code(stream=0)
        finally:
            driver.library.cuStreamEndCapture(stream, ctypes.byref(graph))  # the capture is invalid: an error is right
            driver("cuStreamDestroy_v2", stream)
        self.assertNotEqual(code, 0)
        call.poison()
        call.launch()
        self.assert_same(call.results(), want)


if __name__ == "__main__":
    unittest.main(verbosity=2)
