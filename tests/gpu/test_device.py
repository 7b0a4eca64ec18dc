"""The device modules on a GPU: what `Device` says, and frames of torch and PyCUDA where they lie.

unittest alone, so that a machine with CUDA, torch and numpy can run it: python -m unittest tests.gpu.test_device.
"""

# ruff: noqa: PT009, PT027 - without pytest, a plain assert does not say what differs
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import unittest
from types import SimpleNamespace
from typing import Any

import numpy as np

from facespec.errors import FrameError, RetinaFaceError
from tests.gpu.kernel import ROOT, gpu_problem
from tests.trt_runtime.device_contract import check_device
from trt_runtime.gpu.cuda import CudaDevice
from trt_runtime.gpu.frame import Nv12Frame, PixelFormat

REQUIRED = bool(os.environ.get("RETINAFACE_REQUIRE_GPU"))
MANY_CYCLES = 200_000_000  # a good tenth of a second


def problem() -> str | None:
    """Return None, or why there is nothing to test on."""
    found = gpu_problem()
    if found is None:
        try:
            CudaDevice().close()
        except RetinaFaceError as error:
            found = str(error)
    return found


PROBLEM = problem()


@unittest.skipUnless(PROBLEM is None or REQUIRED, PROBLEM or "")
class CudaDeviceTest(unittest.TestCase):
    device: CudaDevice

    @classmethod
    def setUpClass(cls) -> None:
        if PROBLEM:
            raise AssertionError(f"RETINAFACE_REQUIRE_GPU is set: {PROBLEM}")
        cls.device = CudaDevice(0)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.device.close()

    def download(self, address: int, nbytes: int, stream: Any) -> Any:
        pinned = self.device.pinned(nbytes)
        self.device.copy_out(pinned, address, stream)
        stream.synchronize()
        return pinned

    def test_it_does_what_a_device_does(self) -> None:
        check_device(self.device)

    def test_it_knows_its_gpu(self) -> None:
        import torch

        major, minor = torch.cuda.get_device_capability(0)
        self.assertEqual(self.device.compute_capability, 10 * major + minor)
        self.assertEqual(self.device.name, f"{torch.cuda.get_device_name(0)}, device 0")

    def test_a_stream_does_not_wait_for_the_default_stream(self) -> None:
        import torch

        with self.device.activate():
            stream = self.device.stream()
            memory, pinned = self.device.allocate(16, "a test"), self.device.pinned(16)
            torch.cuda._sleep(MANY_CYCLES)
            self.device.copy_in(memory.address, pinned, stream)
            stream.synchronize()
            self.assertFalse(torch.cuda.current_stream().query(), "the default stream is busy still")
        torch.cuda.synchronize()

    def test_pinned_copies_are_asynchronous(self) -> None:
        import torch

        with self.device.activate():
            stream, back = self.device.stream(), self.device.pinned(1 << 20)
            memory = self.device.allocate(1 << 20, "a test")
            back[:] = 1
            torch.cuda._sleep(MANY_CYCLES)
            stream.wait_for(1)  # torch's default stream is the legacy one
            self.device.copy_out(back, memory.address, stream)
            self.assertTrue((back == 1).all(), "a copy that had to wait was done at once")
            stream.synchronize()

    def test_a_tensor_is_read_where_it_is(self) -> None:
        import torch

        tensor = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, device="cuda")
        crop = tensor[10:50, 20:70]
        with self.device.activate():
            stream = self.device.stream()
            found = self.device.frame(crop, stream)
            assert found is not None
            self.assertEqual(found.address, crop.data_ptr())
            self.assertEqual((found.pitch, found.frame_hw, found.device_index), (240, (40, 50), 0))
            whole = self.download(tensor.data_ptr(), tensor.numel(), stream)
            self.assertTrue((whole == tensor.cpu().numpy().reshape(-1)).all())
            self.assertIsNone(self.device.frame(tensor.cpu(), stream))
            self.assertIsNone(self.device.frame(tensor.cpu().pin_memory(), stream))
            for refused in (tensor.permute(2, 0, 1), tensor.permute(1, 0, 2), tensor.float(), tensor[None]):
                with self.assertRaises(FrameError):
                    self.device.frame(refused, stream)

    def test_the_owner_keeps_a_tensor(self) -> None:
        import torch

        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        with self.device.activate():
            found = self.device.frame(
                torch.zeros((600, 800, 3), dtype=torch.uint8, device="cuda"), self.device.stream()
            )
            self.assertGreaterEqual(torch.cuda.memory_allocated() - before, 600 * 800 * 3)
            del found
            self.assertEqual(torch.cuda.memory_allocated(), before)

    def test_dlpack_orders_the_streams(self) -> None:
        import torch

        producer = torch.cuda.Stream()
        tensor = torch.zeros((600, 800, 3), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        with self.device.activate():
            stream = self.device.stream()
            with torch.cuda.stream(producer):
                torch.cuda._sleep(MANY_CYCLES)
                tensor.fill_(7)
                found = self.device.frame(tensor, stream)
            assert found is not None
            self.assertTrue((self.download(found.address, tensor.numel(), stream) == 7).all())

    def test_the_array_interface_orders_the_streams(self) -> None:
        import torch

        producer = torch.cuda.Stream()
        for number, (context, handle) in enumerate(
            ((producer, producer.cuda_stream), (torch.cuda.default_stream(), 1)), start=1
        ):
            tensor = torch.zeros((600, 800, 3), dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()
            with self.device.activate():
                stream = self.device.stream()
                with torch.cuda.stream(context):
                    torch.cuda._sleep(MANY_CYCLES)
                    tensor.fill_(number)
                interface = {**tensor.__cuda_array_interface__, "version": 3, "stream": handle}
                found = self.device.frame(SimpleNamespace(__cuda_array_interface__=interface), stream)
                assert found is not None
                self.assertEqual((found.address, found.device_index), (tensor.data_ptr(), 0))
                self.assertTrue((self.download(found.address, tensor.numel(), stream) == number).all())

    def test_what_is_not_cudas(self) -> None:
        interface = {"version": 3, "shape": (2, 3, 3), "typestr": "|u1", "data": (4096, False)}
        frame = SimpleNamespace(__cuda_array_interface__=interface)
        with self.device.activate(), self.assertRaisesRegex(FrameError, "not in CUDA's memory"):
            self.device.frame(frame, self.device.stream())

    def test_nv12(self) -> None:
        import torch

        luma = torch.zeros((48, 64), dtype=torch.uint8, device="cuda")
        chroma = torch.zeros((24, 32, 2), dtype=torch.uint8, device="cuda")
        with self.device.activate():
            found = self.device.frame(Nv12Frame(luma, chroma), self.device.stream())
            assert found is not None
            self.assertEqual((found.address, found.chroma_address), (luma.data_ptr(), chroma.data_ptr()))
            self.assertEqual((found.pitch, found.chroma_pitch, found.pixel_format), (64, 64, PixelFormat.NV12_BT709))

    def test_a_broken_context_is_said_to_be_so(self) -> None:
        """In a process of its own, for its context is gone afterwards."""
        code = (
            "from trt_runtime.gpu.cuda import CudaDevice\n"
            "from facespec.errors import DeviceLostError\n"
            "import torch\n"
            "device = CudaDevice()\n"
            "kept = torch.zeros(4, device='cuda')\n"
            "try:\n"
            "    with device.activate():\n"
            "        stream = device.stream()\n"
            "        index = torch.tensor([10**12], device='cuda')\n"
            "        kept.index_put_((index,), torch.ones(1, device='cuda'))\n"
            "        stream.wait_for(1)\n"
            "        stream.synchronize()\n"
            "except DeviceLostError as error:\n"
            "    print('lost:', error, flush=True)\n"
            "import os; os._exit(0)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        self.assertIn("lost: a kernel broke this process's CUDA context", done.stdout, done.stderr[-500:])


@unittest.skipUnless(PROBLEM is None and importlib.util.find_spec("pycuda"), PROBLEM or "PyCUDA is not installed")
class PyCudaDeviceTest(unittest.TestCase):
    def setUp(self) -> None:
        import pycuda.driver as cuda

        cuda.init()
        self.cuda = cuda
        self.context = cuda.Device(0).retain_primary_context()
        self.context.push()
        self.addCleanup(cuda.Context.pop)

    def test_it_does_what_a_device_does(self) -> None:
        check_device(CudaDevice(None))
        self.assertEqual(self.cuda.Context.get_current(), self.context)

    def test_the_callers_stream_and_arrays(self) -> None:
        from pycuda import gpuarray

        own = self.cuda.Stream()
        device = CudaDevice(None, own)
        pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3)).astype(np.uint8)
        with device.activate():
            stream = device.stream()
            self.assertEqual(stream.handle, own.handle)
            array = gpuarray.to_gpu(pixels)
            found = device.frame(array, stream)
            assert found is not None
            self.assertEqual((found.address, found.pitch), (int(array.gpudata), 150))
            back = device.pinned(pixels.nbytes)
            device.copy_out(back, found.address, stream)
            stream.synchronize()
            self.assertTrue((back == pixels.reshape(-1)).all())
            stream.close()
        own.synchronize()  # it is its caller's still

    def test_a_context_of_its_own(self) -> None:
        context = self.cuda.Device(0).make_context()
        try:
            check_device(CudaDevice(None))
        finally:
            context.pop()


if __name__ == "__main__":
    unittest.main(verbosity=2)
