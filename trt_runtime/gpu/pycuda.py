"""A GPU through PyCUDA, for applications that live in a PyCUDA context of their own.

PyCUDA has neither stream capture nor streams of others; where cuda-bindings is installed too, it does these.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from facespec.cli import require
from facespec.errors import DeviceLostError, DeviceMemoryError, GpuError, MissingPackageError
from trt_runtime.gpu.cuda import Cuda, CudaGraph, CudaMemory, CudaPinned, locate, order, record, relaxed
from trt_runtime.gpu.device import Bytes, Capture, check_bytes, check_nbytes, out_of_memory
from trt_runtime.gpu.frame import DeviceFrame, read_frame

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which PyCUDA has no name for
STICKY = ("illegal memory access", "launch failure", "misaligned address", "illegal instruction", "assert triggered")
"""What CUDA calls errors that a context never recovers from."""


class PyCudaDevice:
    """The GPU of the caller's current PyCUDA context as a `Device`. It makes and ends no context.

    Args:
        stream: A `pycuda.driver.Stream` of that context to put everything on; None makes new ones.

    Attributes:
        name: "NVIDIA H200, device 0".
        compute_capability: 90 for 9.0.
        can_capture: Whether cuda-bindings is installed, which captures for PyCUDA, and no stream was given.
        index: Number of the GPU.

    Raises:
        GpuError: No context is current.
        MissingPackageError: PyCUDA is not installed.
    """

    def __init__(self, stream: Any = None) -> None:
        self.pycuda = require("pycuda.driver", "pycuda", "PyCudaDevice")
        with suppress(self.pycuda.Error):  # CUDA is not initialised: there is no context either
            self._context = self.pycuda.Context.get_current()
        if getattr(self, "_context", None) is None:
            raise GpuError(
                "there is no current PyCUDA context on this thread: make one first, by `import pycuda.autoprimaryctx` "
                "for instance"
            )
        self._given = stream
        self._cuda: Cuda | None = None
        with suppress(MissingPackageError):
            self._cuda = Cuda()
        # of one stream that all callers share, a capture would record what the others put on it
        self.can_capture = self._cuda is not None and stream is None
        with self.calls():
            device = self.pycuda.Context.get_device()
            count = self.pycuda.Device.count()
            self.index = next(index for index in range(count) if self.pycuda.Device(index) == device)
            self.name = f"{device.name()}, device {self.index}"
            major, minor = device.compute_capability()
        self.compute_capability = 10 * major + minor

    @property
    def can_order(self) -> bool:
        """Whether streams can wait for others of the same context."""
        return self._cuda is not None

    @property
    def cuda(self) -> Cuda:
        """What calls CUDA where PyCUDA cannot.

        Raises:
            GpuError: cuda-bindings is not installed.
        """
        if self._cuda is None:
            raise GpuError("CUDA graphs with PyCUDA need cuda-bindings: pip install cuda-bindings")
        return self._cuda

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Turn PyCUDA's errors into ours.

        Raises:
            DeviceMemoryError: There is not enough memory.
            DeviceLostError: The context is beyond repair.
            GpuError: Anything else.
        """
        try:
            yield
        except self.pycuda.Error as error:
            text = " ".join(str(error).split())
            if isinstance(error, self.pycuda.MemoryError):
                raise DeviceMemoryError(f"no memory left on the GPU ({text})") from None
            if any(words in text for words in STICKY):
                raise DeviceLostError(f"a kernel broke the CUDA context ({text}): start the process again") from None
            raise GpuError(f"CUDA failed ({text})") from None

    @contextmanager
    def activate(self) -> Iterator[None]:
        """As `Device.activate`, for PyCUDA's own book of contexts too."""
        with self.calls():
            self._context.push()
        try:
            yield
        finally:
            with self.calls():
                self._context.pop()

    def stream(self) -> PyCudaStream:
        """As `Device.stream`: the caller's own if one was given."""
        with self.calls():
            stream = self.pycuda.Stream(NON_BLOCKING) if self._given is None else self._given
        return PyCudaStream(self, stream)

    def allocate(self, nbytes: int, what: str) -> CudaMemory:
        """As `Device.allocate`."""
        try:
            with self.calls():
                held = [self.pycuda.mem_alloc(check_nbytes(nbytes))]
            return CudaMemory(int(held[0]), nbytes, self.drop, held)
        except DeviceMemoryError:
            raise out_of_memory(what, nbytes, *self.free_and_total()) from None

    def pinned(self, nbytes: int) -> CudaPinned:
        """As `Device.pinned`."""
        with self.calls():
            held = [self.pycuda.pagelocked_empty(check_nbytes(nbytes), "uint8")]
        return CudaPinned(held[0].ctypes.data, nbytes, self.drop, held)

    def copy_in(self, address: int, source: Bytes, stream: Any) -> None:
        """As `Device.copy_in`."""
        with self.calls():
            self.pycuda.memcpy_htod_async(address, check_bytes(source), stream.pycuda)

    def copy_out(self, target: Bytes, address: int, stream: Any) -> None:
        """As `Device.copy_out`."""
        with self.calls():
            self.pycuda.memcpy_dtoh_async(check_bytes(target, writeable=True), address, stream.pycuda)

    def free_and_total(self) -> tuple[int, int]:
        """As `Device.free_and_total`."""
        with self.calls():
            free, total = self.pycuda.mem_get_info()
        return int(free), int(total)

    def event(self) -> PyCudaEvent:
        """As `Device.event`."""
        with self.calls():
            return PyCudaEvent(self, self.pycuda.Event())

    def frame(self, frame: object, stream: Any) -> DeviceFrame | None:
        """As `Device.frame`."""
        return read_frame(frame, stream, self.index, self._locate)

    def close(self) -> None:
        """As `Device.close`: the context is its caller's."""

    def free(self, name: str, handle: Any) -> None:
        """Call a function of CUDA that frees something; on any thread, and at exit."""
        with suppress(GpuError), self.activate(), relaxed(self.cuda):
            self.cuda(name, handle)

    def drop(self, held: list[Any]) -> None:
        """Let go of what a list holds. PyCUDA frees it where the context is current, and would leak it elsewhere."""
        with suppress(GpuError), self.activate(), relaxed(self._cuda) if self._cuda else nullcontext():
            held.clear()

    def wait(self) -> None:
        """Wait for everything in the context."""
        with self.calls():
            self.pycuda.Context.synchronize()

    def _locate(self, address: int) -> int | None:
        return None if self._cuda is None else locate(self._cuda, address)


class PyCudaStream:
    """A stream of a `PyCudaDevice`.

    Attributes:
        handle: The CUstream.
    """

    def __init__(self, device: PyCudaDevice, stream: Any) -> None:
        self.handle = int(stream.handle)
        self._device = device
        self._held = [stream]
        self._drop = weakref.finalize(self, device.drop, self._held)

    @property
    def pycuda(self) -> Any:
        """The `pycuda.driver.Stream`.

        Raises:
            GpuError: It has been closed.
        """
        if not self._held:
            raise GpuError("this stream has been closed")
        return self._held[0]

    def synchronize(self) -> None:
        """As `Stream.synchronize`."""
        with self._device.calls():
            self.pycuda.synchronize()

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        """As `Stream.capture`."""
        capture = Capture()
        with record(self._device.cuda, self.handle) as executables:
            yield capture
        capture.end(CudaGraph(self._device, executables[0]))

    def wait_for(self, handle: int) -> None:
        """As `Stream.wait_for`; without cuda-bindings the calling thread waits, for all there is in the context."""
        if self._device.can_order:
            order(self._device.cuda, self.handle, handle)
        else:
            self._device.wait()

    def close(self) -> None:
        """As `Stream.close`."""
        self._drop()


class PyCudaEvent:
    """A mark in a `PyCudaStream`."""

    def __init__(self, device: PyCudaDevice, event: Any) -> None:
        self._device = device
        self._held = [event]
        weakref.finalize(self, device.drop, self._held)

    def record(self, stream: Any) -> None:
        """As `Event.record`."""
        with self._device.calls():
            self._held[0].record(stream.pycuda)

    def synchronize(self) -> None:
        """As `Event.synchronize`."""
        with self._device.calls():
            self._held[0].synchronize()

    def elapsed_ms(self, since: PyCudaEvent) -> float:
        """As `Event.elapsed_ms`."""
        with self._device.calls():
            return float(self._held[0].time_since(since._held[0]))
