"""A GPU through CUDA's driver interface, as cuda-bindings gives it to Python.

It works in the device's primary context, which PyTorch, CuPy, TensorRT and everything built on CUDA's runtime library
share, or in the context that its caller has made current, as PyCUDA does. Only cuda.bindings.driver is used: its
functions are those of CUDA, which stay compatible.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from facespec.cli import require
from facespec.errors import (
    DeviceLostError,
    DeviceMemoryError,
    DriverGoneError,
    FrameError,
    GpuError,
    KernelFaultError,
)
from trt_runtime.gpu.device import Bytes, Memory, check_bytes, check_nbytes, out_of_memory
from trt_runtime.gpu.frame import DeviceFrame, read_frame

OLDEST_DRIVER = 12000
"""CUDA 12.0, in the form of cuDriverGetVersion: the oldest that the supported TensorRT versions run on."""

_FAULT = KernelFaultError, "a kernel broke this process's CUDA context ({}): start the process again"
_LOST = DeviceLostError, "the GPU is lost ({}): see nvidia-smi and dmesg, and start the process again"
_GONE = (
    DriverGoneError,
    "CUDA's driver has left this process ({}): start the process again; a fork cannot use CUDA",
)

FATAL: dict[str, tuple[type[DeviceLostError], str]] = {
    "CUDA_ERROR_ILLEGAL_ADDRESS": _FAULT,
    "CUDA_ERROR_LAUNCH_TIMEOUT": _FAULT,
    "CUDA_ERROR_ASSERT": _FAULT,
    "CUDA_ERROR_HARDWARE_STACK_ERROR": _FAULT,
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": _FAULT,
    "CUDA_ERROR_MISALIGNED_ADDRESS": _FAULT,
    "CUDA_ERROR_INVALID_ADDRESS_SPACE": _FAULT,
    "CUDA_ERROR_INVALID_PC": _FAULT,
    "CUDA_ERROR_LAUNCH_FAILED": _FAULT,
    "CUDA_ERROR_TENSOR_MEMORY_LEAK": _FAULT,
    "CUDA_ERROR_DEVICE_UNAVAILABLE": _LOST,
    "CUDA_ERROR_ECC_UNCORRECTABLE": _LOST,
    "CUDA_ERROR_NVLINK_UNCORRECTABLE": _LOST,
    "CUDA_ERROR_CONTAINED": _LOST,
    "CUDA_ERROR_EXTERNAL_DEVICE": _LOST,
    "CUDA_ERROR_CONTEXT_IS_DESTROYED": (
        DeviceLostError,
        "this process's CUDA context was destroyed, by cudaDeviceReset for instance ({}): make a new detector",
    ),
    "CUDA_ERROR_NOT_INITIALIZED": _GONE,
    "CUDA_ERROR_DEINITIALIZED": _GONE,
    "CUDA_ERROR_MPS_RPC_FAILURE": _GONE,
    "CUDA_ERROR_MPS_CLIENT_TERMINATED": _GONE,
}
"""Errors after which a context cannot be used any more: what is raised, and its message."""

NO_GPU = {
    "CUDA_ERROR_NO_DEVICE": "no NVIDIA GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_STUB_LIBRARY": "libcuda is the toolkit's stub: take its folder off LD_LIBRARY_PATH",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the NVIDIA driver was updated under the running system: reboot",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "the NVIDIA driver is too old for this CUDA: update it",
    "CUDA_ERROR_SYSTEM_NOT_READY": "the GPU's services are not running: start nvidia-fabricmanager",
}
CPU_INSTEAD = "; the .onnx file runs on the CPU"


class Cuda:
    """Calls functions of CUDA's driver and turns their errors into `GpuError` and its kinds."""

    def __init__(self) -> None:
        self.driver = require("cuda.bindings.driver", "gpu", "running engines on a GPU")

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a function; return its results: None, a value, or a tuple."""
        try:
            status, *values = getattr(self.driver, name)(*arguments)
        except (RuntimeError, ValueError) as error:
            raise self._unknown(name, error) from None
        if status:
            raise self._error(name, status)
        return values[0] if len(values) == 1 else tuple(values) or None

    def prepared(self, name: str, *arguments: Any) -> Callable[[], None]:
        """Return a call with fixed arguments of a function that gives nothing: for what every frame needs."""
        function = getattr(self.driver, name)

        def call() -> None:
            try:
                status = function(*arguments)[0]
            except (RuntimeError, ValueError) as error:
                raise self._unknown(name, error) from None
            if status:
                raise self._error(name, status)

        return call

    def _unknown(self, name: str, error: Exception) -> GpuError:
        """Return the error for what cuda.bindings raise by themselves."""
        if isinstance(error, ValueError):  # a driver newer than cuda.bindings has errors that these do not know
            return GpuError(f"CUDA failed ({name}: {error}): update cuda-bindings to see why")
        if "function" in str(error).lower():  # versions of cuda.bindings differ in the capital
            return GpuError(
                f"the NVIDIA driver is too old for the cuda-bindings here, it has no {name}: update it{CPU_INSTEAD}"
            )
        return GpuError(f"there is no NVIDIA driver here (libcuda.so.1 was not found){CPU_INSTEAD}")

    def _error(self, name: str, status: Any) -> GpuError:
        text = self.driver.cuGetErrorString(status)[1] or b""
        found = f"{name}: {status.name}, {text.decode(errors='replace')}"
        if status.name == "CUDA_ERROR_OUT_OF_MEMORY":
            return DeviceMemoryError(f"no memory left on the GPU ({found})")
        if status.name in FATAL:
            kind, message = FATAL[status.name]
            return kind(message.format(found))
        if status.name in NO_GPU:
            return GpuError(f"{NO_GPU[status.name]}{CPU_INSTEAD} ({found})")
        return GpuError(f"CUDA failed ({found})")


class CudaDevice:
    """A GPU as a `Device`, in its primary context or in one of the caller's.

    Args:
        index: As CUDA counts the visible ones; None takes the context that is current on this thread, and its GPU. The
            caller must keep that context until the device is closed.
        stream: The caller's stream of that context, which everything is put on: any object that has the CUstream as
            `handle`, such as a `pycuda.driver.Stream`. None makes new streams.

    Attributes:
        index: Number of the GPU.

    Raises:
        GpuError: The driver is missing or too old, there is no such GPU, or no context is current.
        MissingPackageError: cuda-bindings is not installed.
    """

    def __init__(self, index: int | None = 0, stream: Any = None) -> None:
        self.cuda = cuda = Cuda()
        attributes = cuda.driver.CUdevice_attribute
        cuda("cuInit", 0)
        version = cuda("cuDriverGetVersion")
        if version < OLDEST_DRIVER:
            raise GpuError(
                f"the NVIDIA driver knows CUDA {version // 1000}.{version % 1000 // 10}, and "
                f"{OLDEST_DRIVER // 1000}.0 or newer is needed: update it{CPU_INSTEAD}"
            )
        count = cuda("cuDeviceGetCount")
        if index is not None and not 0 <= index < count:
            raise GpuError(f"there is no GPU {index}: {count} visible, counted from 0; see CUDA_VISIBLE_DEVICES")
        self._release = lambda: None
        self._is_primary = index is not None
        if index is None:
            self._context = cuda("cuCtxGetCurrent")
            if not int(self._context):
                raise GpuError(
                    "there is no current PyCUDA context on this thread: make one first, by `import "
                    "pycuda.autoprimaryctx` for instance"
                )
            device = cuda("cuCtxGetDevice")
        else:
            device = cuda("cuDeviceGet", index)
            self._context = cuda("cuDevicePrimaryCtxRetain", device)
            self._release = weakref.finalize(self, _quietly, cuda, "cuDevicePrimaryCtxRelease", device)
        self.index = int(device)
        self.name = f"{cuda('cuDeviceGetName', 256, device).split(bytes(1))[0].decode()}, device {self.index}"
        major = cuda("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = cuda("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self.compute_capability = 10 * major + minor
        kinds = cuda.driver.CUpointer_attribute
        self._kinds = kinds.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, kinds.CU_POINTER_ATTRIBUTE_CONTEXT
        self._activation = _Activation(cuda, self._context)
        self._stream = stream
        self.can_capture = stream is None  # a capture of a shared stream would record what others put on it

    def activate(self) -> _Activation:
        return self._activation

    def stream(self) -> CudaStream:
        if self._stream is not None:
            return CudaStream(self, int(self._stream.handle), owned=False)
        stream = self.cuda("cuStreamCreate", self.cuda.driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return CudaStream(self, int(stream), owned=True)

    def allocate(self, nbytes: int, what: str) -> Memory:
        try:
            address = self.cuda("cuMemAlloc", check_nbytes(nbytes))
        except DeviceMemoryError:
            raise out_of_memory(what, nbytes, *self.free_and_total()) from None
        return Memory(int(address), nbytes, self.free, "cuMemFree", int(address))

    def pinned(self, nbytes: int) -> Bytes:
        try:
            flags = self.cuda.driver.CU_MEMHOSTALLOC_PORTABLE | self.cuda.driver.CU_MEMHOSTALLOC_DEVICEMAP
            address = self.cuda("cuMemHostAlloc", check_nbytes(nbytes), flags)
        except DeviceMemoryError:
            raise DeviceMemoryError(f"the host has no {nbytes} bytes that can be page-locked") from None
        buffer = (ctypes.c_uint8 * nbytes).from_address(int(address))
        weakref.finalize(buffer, self.free, "cuMemFreeHost", int(address))  # the buffer lives as long as any view
        return np.ctypeslib.as_array(buffer)

    def copy_in(self, address: int, source: Bytes, stream: Any) -> None:
        start = check_bytes(source).__array_interface__["data"][0]  # `ctypes.data` takes twice as long
        self.cuda("cuMemcpyHtoDAsync", address, start, source.nbytes, stream.handle)

    def copy_out(self, target: Bytes, address: int, stream: Any) -> None:
        target_address = check_bytes(target, writeable=True).ctypes.data
        self.cuda("cuMemcpyDtoHAsync", target_address, address, target.nbytes, stream.handle)

    def free_and_total(self) -> tuple[int, int]:
        free, total = self.cuda("cuMemGetInfo")
        return int(free), int(total)

    def event(self) -> CudaEvent:
        return CudaEvent(self)

    def frame(self, frame: object, stream: Any) -> DeviceFrame | None:
        return read_frame(frame, stream, self.index, self._locate)

    def close(self) -> None:
        self._release()

    def free(self, name: str, handle: Any) -> None:
        """Call a function that frees something; works on any thread, also during a capture and at exit."""
        mode = self.cuda.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED  # else it would spoil the capture
        with suppress(GpuError), self.activate():
            before = self.cuda("cuThreadExchangeStreamCaptureMode", mode)
            try:
                self.cuda(name, handle)
            finally:
                self.cuda("cuThreadExchangeStreamCaptureMode", before)

    def _locate(self, address: int, index: int | None) -> int:
        """Return the GPU that an address belongs to; FrameError if it is not in memory of our context."""
        if index is not None and self._is_primary:  # the libraries that tell the GPU work in its primary context
            return index
        try:
            if index is None:
                index = int(self.cuda("cuPointerGetAttribute", self._kinds[0], address))
        except DeviceLostError:
            raise
        except GpuError as error:
            raise FrameError(f"the frame's address {address:#x} is not in CUDA's memory ({error})") from None
        ours = context = int(self._context)
        try:
            context = int(self.cuda("cuPointerGetAttribute", self._kinds[1], address)) or context
        except DeviceLostError:
            raise
        except GpuError:  # memory of a pool and mapped memory belong to no context, and every one reaches them
            pass
        if index == self.index and context != ours:
            raise FrameError(
                f"the frame lies in another CUDA context of GPU {index} than the detector's: let PyCUDA use the "
                "primary one (import pycuda.autoprimaryctx), which all other libraries use"
            )
        return index


class _Activation:
    """Makes a context current in a block; any number of threads may be in it, each as often as it wants."""

    def __init__(self, cuda: Cuda, context: Any) -> None:
        self._push = cuda.prepared("cuCtxPushCurrent", context)
        self._pop = cuda.prepared("cuCtxPopCurrent")

    def __enter__(self) -> None:
        self._push()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._pop()
        except GpuError:  # of a lost device the error of the block counts
            pass


class CudaStream:
    """A stream of a `CudaDevice`; `close` destroys it only if the device owns it."""

    def __init__(self, device: CudaDevice, handle: int, owned: bool) -> None:
        self._device = device
        self._handle = handle
        destroy = [device.free, "cuStreamDestroy", handle] if owned else [lambda: None]
        self._destroy = weakref.finalize(self, *destroy)
        self._synchronize = device.cuda.prepared("cuStreamSynchronize", device.cuda.driver.CUstream(handle))
        self._closed = False

    @property
    def handle(self) -> int:
        if self._closed:
            raise GpuError("this stream has been closed")
        return self._handle

    def synchronize(self) -> None:
        if self._closed:
            raise GpuError("this stream has been closed")
        self._synchronize()

    def capture(self, work: Callable[[], object]) -> CudaGraph:
        cuda = self._device.cuda
        cuda("cuStreamBeginCapture", self.handle, cuda.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            work()
        except BaseException:
            with suppress(GpuError):  # the capture is usually invalid; the error of the work says why
                cuda("cuGraphDestroy", cuda("cuStreamEndCapture", self._handle))
            raise
        graph = cuda("cuStreamEndCapture", self._handle)
        try:
            return CudaGraph(self._device, cuda("cuGraphInstantiate", graph, 0))
        finally:
            cuda("cuGraphDestroy", graph)

    def wait_for(self, handle: int) -> None:
        cuda = self._device.cuda
        event = cuda("cuEventCreate", cuda.driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        try:
            cuda("cuEventRecord", event, handle)
            cuda("cuStreamWaitEvent", self.handle, event, 0)
        finally:
            cuda("cuEventDestroy", event)  # CUDA keeps it until the stream has reached it

    def close(self) -> None:
        self._closed = True
        self._destroy()


class CudaGraph:
    """Captured work of a `CudaDevice`."""

    def __init__(self, device: CudaDevice, executable: Any) -> None:
        self._device = device
        self._executable = executable
        self._destroy = weakref.finalize(self, device.free, "cuGraphExecDestroy", executable)
        self._closed = False
        self._launches: dict[int, Callable[[], None]] = {}  # by stream

    def launch(self, stream: Any) -> None:
        if self._closed:
            raise GpuError("this graph has been closed")
        handle = stream.handle
        if handle not in self._launches:
            cuda = self._device.cuda
            self._launches[handle] = cuda.prepared("cuGraphLaunch", self._executable, cuda.driver.CUstream(handle))
        self._launches[handle]()

    def close(self) -> None:
        self._closed = True
        self._destroy()


class CudaEvent:
    """A mark in a `CudaStream`."""

    def __init__(self, device: CudaDevice) -> None:
        self._cuda = device.cuda
        self._event = device.cuda("cuEventCreate", device.cuda.driver.CUevent_flags.CU_EVENT_DEFAULT)
        weakref.finalize(self, device.free, "cuEventDestroy", self._event)

    def record(self, stream: Any) -> None:
        self._cuda("cuEventRecord", self._event, stream.handle)

    def synchronize(self) -> None:
        self._cuda("cuEventSynchronize", self._event)

    def hold(self, stream: Any) -> None:
        self._cuda("cuStreamWaitEvent", stream.handle, self._event, 0)

    def elapsed_ms(self, since: CudaEvent) -> float:
        return float(self._cuda("cuEventElapsedTime", since._event, self._event))


def _quietly(cuda: Cuda, name: str, *arguments: Any) -> None:
    with suppress(GpuError):  # at exit CUDA may be gone already
        cuda(name, *arguments)
