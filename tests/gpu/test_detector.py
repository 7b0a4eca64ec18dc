"""TRTRetinaFace as a whole, with a network of torch: on a GPU where there is one, else on the simulated device.

unittest alone, so that a machine with CUDA, torch and numpy can run it: python -m unittest tests.gpu.test_detector.
"""

# ruff: noqa: PT009, PT027 - without pytest, a plain assert does not say what differs
from __future__ import annotations

import os
import subprocess
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from facespec.boxes import decode_detections, make_priors
from facespec.detections import Detections, to_detections
from facespec.errors import DeviceMemoryError, FrameError
from facespec.letterbox import Frame, Letterbox
from tests.gpu.kernel import ROOT, gpu_problem
from tests.plugins.host_letterbox import host_letterbox
from trt_runtime.gpu.frame import Nv12Frame
from trt_runtime.gpu.simulated import HostArray, HostDevice
from trt_runtime.trt import TRTRetinaFace, open_device

try:
    import torch

    from tests.gpu.torch_engine import KIT, TorchEngine, open_model
except ImportError:
    torch = None  # type: ignore[assignment]

REQUIRED = bool(os.environ.get("RETINAFACE_REQUIRE_GPU"))
ON_GPU = gpu_problem() is None
SIZE = (320, 320)
PIXELS, SCORE = (0.6, 0.02) if ON_GPU else (2e-3, 1e-4)
"""What FP16 on a GPU, and FP32 in another order on a CPU, may differ by from FP32: network pixels, and scores."""


def load_photograph() -> Frame:
    """Return a photograph with one face, of the kit or of scikit-image."""
    kit = KIT / "astronaut.npy"
    if kit.is_file():
        return np.asarray(np.load(kit))
    from facespec.samples import sample_frames

    return next(frame for name, frame in sample_frames().items() if "astronaut" in name)


@unittest.skipUnless(torch is not None, "torch is not installed")
class DetectorTest(unittest.TestCase):
    device: Any
    model: Any
    frames: list[Frame]
    expected: list[Detections]

    @classmethod
    def setUpClass(cls) -> None:
        if REQUIRED and not ON_GPU:
            raise AssertionError(f"RETINAFACE_REQUIRE_GPU is set: {gpu_problem()}")
        cls.device = open_device("cuda:0") if ON_GPU else HostDevice(delay_s=5e-4)
        cls.model = open_model()
        astronaut = load_photograph()
        crowd = np.hstack([astronaut, astronaut[:, ::-1], astronaut[::-1]])
        plain = np.full((70, 130, 3), 90, np.uint8)
        cls.frames = [
            astronaut,
            crowd,
            plain,
            np.ascontiguousarray(astronaut[:400, 100:333]),
            astronaut[::2, ::2].copy(),
        ]
        cls.expected = [cls.reference(frame) for frame in cls.frames]
        assert [len(found) for found in cls.expected[:3]] == [1, 2, 0], cls.expected

    @classmethod
    def tearDownClass(cls) -> None:
        cls.device.close()

    @classmethod
    def reference(cls, frame: Frame) -> Detections:
        """Return the faces by torch in FP32 on the CPU, and by facespec."""
        spec = cls.model.spec
        frame_hw = frame.shape[:2]
        box = Letterbox.fit(frame_hw, SIZE)  # type: ignore[arg-type]
        pixels = (
            torch.from_numpy(host_letterbox([frame], [box], spec.preprocess.mean_bgr)[0]).permute(2, 0, 1)[None].float()
        )
        with torch.inference_mode():
            heads = cls.model(pixels - torch.tensor(spec.preprocess.mean_bgr, dtype=torch.float32)[:, None, None])
        maps = [each[0].numpy() for each in heads]
        found = decode_detections(*maps, make_priors(spec.anchors, SIZE), spec.decode)
        faces = found.boxes, found.scores, found.landmarks
        return to_detections(box, spec.decode, 0.5, len(found.scores), *faces, found.num_candidates)

    def open(self, **options: Any) -> TRTRetinaFace:
        options = {"size_hw": SIZE, "device": self.device, **options}
        return TRTRetinaFace(TorchEngine(options["device"], self.model), **options)

    def check(self, found: Detections, expected: Detections) -> None:
        """Compare with the reference."""
        self.assertEqual(found.frame_hw, expected.frame_hw)
        self.assertEqual(len(found), len(expected))
        scale = max(1.0, max(expected.frame_hw) / SIZE[0])
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=PIXELS * scale)
        np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=PIXELS * scale)
        np.testing.assert_allclose(found.scores, expected.scores, atol=SCORE)

    def same(self, found: Detections, expected: Detections) -> None:
        """Compare bit by bit."""
        for name in ("boxes", "scores", "landmarks"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))

    def to_device(self, frame: Frame) -> Any:
        return (
            torch.from_numpy(np.ascontiguousarray(frame)).cuda() if ON_GPU else HostArray(np.ascontiguousarray(frame))
        )

    def test_faces_in_every_slot_of_a_batch(self) -> None:
        with self.open() as detector:
            for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0, 0, 1, 2, 2, 1], [1], []):
                found = detector.detect_batch([self.frames[index] for index in order])
                for index, faces in zip(order, found, strict=True):
                    self.check(faces, self.expected[index])

    def test_graphs_give_the_bits_of_plain_launches(self) -> None:
        with self.open(graphs=False) as plain, self.open() as detector:
            for _ in range(4):
                for frame in self.frames:
                    self.same(detector.detect(frame), plain.detect(frame))
            self.assertTrue(detector.environment()["cuda_graphs"])

    def test_threads_and_streams_give_the_same_bits(self) -> None:
        with self.open() as detector:
            expected = [detector.detect(frame) for frame in self.frames]

            def work(seed: int) -> None:
                for index in np.random.default_rng(seed).integers(0, len(self.frames), 60 if ON_GPU else 4):
                    self.same(detector.detect(self.frames[index]), expected[index])

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(work, range(8)))
            with detector.stream(4) as stream:
                for index, (_, faces) in enumerate(stream.map(self.frames * 3)):
                    self.same(faces, expected[index % len(self.frames)])

    def test_frames_on_the_device_are_read_where_they_lie(self) -> None:
        with self.open() as detector:
            for frame, expected in zip(self.frames, self.expected, strict=True):
                there, copied = self.to_device(frame), detector.to_device(frame)
                self.check(detector.detect(there), expected)
                self.same(detector.detect(copied), detector.detect(there))
            with self.assertRaises(FrameError):
                detector.detect(self.to_device(self.frames[0].astype(np.float32)))

    @unittest.skipUnless(ON_GPU, "needs streams of torch on a GPU")
    def test_a_frame_that_another_stream_still_writes_is_waited_for(self) -> None:
        with self.open() as detector:
            expected = detector.detect(self.frames[0])
            with torch.cuda.stream(torch.cuda.Stream()):
                target = torch.zeros(self.frames[0].shape, dtype=torch.uint8, device="cuda")
                source = torch.from_numpy(self.frames[0]).cuda()
                torch.cuda._sleep(200_000_000)
                target.copy_(source)
                self.same(detector.detect(target), expected)
                with detector.stream() as stream:  # on whose threads another stream is current
                    for _ in range(4):
                        late = torch.zeros_like(target)
                        torch.cuda._sleep(200_000_000)
                        late.copy_(source)
                        self.same(stream.submit([late]).result()[0], expected)

    def test_nv12(self) -> None:
        luma = np.full((240, 320), 16, np.uint8)
        luma[60:180, 100:220] = 235
        chroma = np.full((120, 160, 2), 128, np.uint8)
        gray = np.repeat(((luma.astype(np.float32) - 16) * 255 / 219).round().astype(np.uint8)[..., None], 3, axis=2)
        with self.open(score_threshold=0.02) as detector:
            found = detector.detect(Nv12Frame(self.to_device(luma), self.to_device(chroma), "bt601"))
            expected = detector.detect(gray)
            self.assertEqual(len(found), len(expected))
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=1.0)

    def test_results_are_never_written_again(self) -> None:
        with self.open() as detector:
            first = detector.detect(self.frames[0])
            kept = first.boxes.copy(), first.landmarks.copy()
            for frame in self.frames * 2:
                detector.detect(frame)
            np.testing.assert_array_equal(first.boxes, kept[0])
            np.testing.assert_array_equal(first.landmarks, kept[1])

    def test_where_memory_runs_out_the_detector_goes_on(self) -> None:
        device = self.device if ON_GPU else HostDevice(memory_limit=24_000_000)
        held = []
        with self.open(device=device, size_hw=None, warm_up=False) as detector:
            self.check_count(detector, 1)
            if ON_GPU:
                torch.cuda.empty_cache()
                with device.activate():
                    while device.free_and_total()[0] > 8 << 20:
                        held.append(
                            device.allocate(max(device.free_and_total()[0] - (4 << 20) >> 1, 1 << 20), "the test")
                        )
            with self.assertRaisesRegex(DeviceMemoryError, "no memory on the device for"):
                detector.detect_batch([np.zeros((1088, 1920, 3), np.uint8)] * 8)
            with device.activate():
                for memory in held:
                    memory.close()
            self.check_count(detector, 1)
        if not ON_GPU:
            device.close()

    @unittest.skipUnless(ON_GPU, "needs a context of CUDA to break")
    def test_a_kernel_with_an_illegal_address_ends_every_call_and_close_works(self) -> None:
        """In a process of its own, for its context is gone afterwards."""
        code = """
import faulthandler, os, threading, time
faulthandler.dump_traceback_later(100, exit=True)
import numpy as np, torch
from facespec.errors import KernelFaultError
from tests.gpu.torch_engine import TorchEngine
from trt_runtime.trt import TRTRetinaFace, open_device
device = open_device("cuda:0")
detector = TRTRetinaFace(TorchEngine(device), device=device, size_hw=(320, 320))
ended = []
def work():
    try:
        while True:
            detector.detect(np.zeros((320, 320, 3), np.uint8))
    except KernelFaultError:
        ended.append("thread")
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
time.sleep(1)
torch.zeros(4, device="cuda").index_put_((torch.tensor([10**12], device="cuda"),), torch.ones(1, device="cuda"))
for thread in threads:
    thread.join()
detector.close()
try:
    TRTRetinaFace(TorchEngine.__new__(TorchEngine), device=device)
except KernelFaultError:
    ended.append("new")
print(*ended, flush=True)
os._exit(0)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        self.assertEqual(done.stdout.split(), ["thread"] * 4 + ["new"], done.stderr[-800:])

    def check_count(self, detector: TRTRetinaFace, faces: int) -> None:
        self.assertEqual(len(detector.detect(self.frames[0])), faces)


if __name__ == "__main__":
    unittest.main()
