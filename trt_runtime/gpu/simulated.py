"""`HostDevice`: the CPU with the interface of a GPU, for developing and testing GPU code without a GPU.

It enforces those of CUDA's rules that are easily broken unnoticed: each stream runs on a thread of its own, new memory
is filled with rubbish, closed memory cannot be reached, failed work loses the device, and calls that a capture forbids
are refused.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facespec.errors import DeviceLostError, FrameError, GpuError
from trt_runtime.gpu.device import ALIGNMENT, Bytes, Capture, PinnedArray, check_bytes, check_nbytes, out_of_memory
from trt_runtime.gpu.frame import DeviceFrame, Nv12Frame, read_frame

POISON = 0xFF
"""Byte that new memory is filled with: NaN as float32 and float16, -1 as int32."""

GUARD = 0xA5
"""Byte that the ALIGNMENT bytes before and after an allocation are filled with; `HostMemory.close` checks them."""

Work = Callable[[], object]


class HostDevice:
    """The CPU as a `Device`; `HostStream.submit` puts host kernels on its streams.

    Args:
        memory_limit: Bytes that may be allocated at the same time; None is the memory of the machine.
        delay_s: Seconds that every piece of work waits before it starts, so that a result read too early is noticed.

    Attributes:
        name: "CPU".
        compute_capability: 0.
        can_capture: True.
        allocated_bytes: Bytes that are allocated now, without pinned memory.
    """

    name = "CPU"
    compute_capability = 0
    can_capture = True

    def __init__(self, memory_limit: int | None = None, delay_s: float = 0.0) -> None:
        self.allocated_bytes = 0
        self.delay_s = delay_s
        self._limit = memory_limit
        self._lock = threading.RLock()  # the garbage collector may release memory while this thread holds it
        self._live: dict[int, Bytes] = {}
        self._pinned: weakref.WeakValueDictionary[int, Bytes] = weakref.WeakValueDictionary()  # until the last view
        self._streams: weakref.WeakValueDictionary[int, HostStream] = weakref.WeakValueDictionary()
        self._workers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._handles = itertools.count(0x1000, 0x10)
        self._thread = threading.local()  # depth of `activate`, and the stream that the thread captures
        self._failure: BaseException | None = None

    @contextmanager
    def activate(self) -> Iterator[None]:
        self._thread.depth = getattr(self._thread, "depth", 0) + 1
        try:
            yield
        finally:
            self._thread.depth -= 1

    def stream(self) -> HostStream:
        self.check()
        stream = HostStream(self, next(self._handles))
        self._streams[stream.handle] = stream
        self._workers.add(stream.worker)
        return stream

    def allocate(self, nbytes: int, what: str) -> HostMemory:
        """As `Device.allocate`; filled with POISON."""
        self.check(may_capture=False)
        check_nbytes(nbytes)
        with self._lock:
            free, total = self.free_and_total()
            if nbytes > free:
                raise out_of_memory(what, nbytes, free, total)
            try:
                room = _aligned(nbytes + 2 * ALIGNMENT)
            except MemoryError:
                raise out_of_memory(what, nbytes, free, total) from None
            room[:] = GUARD
            content = room[ALIGNMENT:-ALIGNMENT]
            content[:] = POISON
            memory = HostMemory(self, room, content.ctypes.data, what)
            self._live[memory.address] = content
            self.allocated_bytes += nbytes
        return memory

    def pinned(self, nbytes: int) -> PinnedArray:
        self.check(may_capture=False)
        array = _aligned(check_nbytes(nbytes))
        array[:] = POISON
        self._pinned[array.ctypes.data] = array.base  # type: ignore[assignment]
        return PinnedArray(array)

    def view(self, address: int, nbytes: int) -> Bytes:
        """Return the memory of an address as uint8 (nbytes,), for host kernels and tests.

        Raises:
            GpuError: The bytes do not lie in one live allocation.
        """
        for start, content in tuple(self._live.items()):
            if start <= address and address + nbytes <= start + len(content):
                return content[address - start : address - start + nbytes]
        raise GpuError(f"{nbytes} bytes at {address:#x} are in no live allocation of this device")

    def copy_in(self, address: int, source: Bytes, stream: HostStream) -> None:
        self._copy(address, check_bytes(source), stream, inwards=True)

    def copy_out(self, target: Bytes, address: int, stream: HostStream) -> None:
        self._copy(address, check_bytes(target, writeable=True), stream, inwards=False)

    def _copy(self, address: int, array: Bytes, stream: HostStream, inwards: bool) -> None:
        self.check()
        self.view(address, array.nbytes)
        if stream.capturing and not self._is_pinned(array):
            stream.spoil("a copy from or to memory that is not pinned")
        flat = array.reshape(-1)

        def copy() -> None:
            memory = self.view(address, flat.nbytes)
            np.copyto(*((memory, flat) if inwards else (flat, memory)))

        stream.submit(copy)

    def _is_pinned(self, array: Bytes) -> bool:
        start = array.ctypes.data
        return any(
            first <= start and start + array.nbytes <= room.ctypes.data + room.nbytes
            for first, room in tuple(self._pinned.items())
        )

    def free_and_total(self) -> tuple[int, int]:
        """As `Device.free_and_total`; of the limit if there is one, else of the machine."""
        if self._limit is not None:
            return self._limit - self.allocated_bytes, self._limit
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def event(self) -> HostEvent:
        self.check()
        return HostEvent(self)

    def frame(self, frame: object, stream: HostStream) -> DeviceFrame | None:
        """As `Device.frame`; a `HostArray` and this device's memory are on the device, all other arrays on the host."""
        self.check()
        planes = (frame.luma, frame.chroma) if isinstance(frame, Nv12Frame) else (frame,)
        if not all(map(self._holds, planes)):
            if isinstance(frame, Nv12Frame):
                raise FrameError("an Nv12Frame takes two arrays on the device, and these are not")
            return None
        return read_frame(frame, stream, None, lambda address: None)

    def _holds(self, plane: object) -> bool:
        """Whether an array lies on this device; an array with CUDA's interface may lie on a GPU instead."""
        if isinstance(plane, HostArray):
            return True
        address = (getattr(plane, "__cuda_array_interface__", None) or {"data": (0,)})["data"][0]
        return any(start <= address < start + len(content) for start, content in tuple(self._live.items()))

    def close(self) -> None:
        """As `Device.close`; the threads of its streams end."""
        for stream in tuple(self._streams.values()):
            stream.close()

    def find_stream(self, handle: int) -> HostStream | None:
        """Return the stream of a handle; None for the default streams, which never have work.

        Raises:
            GpuError: There is no such stream.
        """
        if handle in (1, 2):
            return None
        try:
            return self._streams[handle]
        except KeyError:
            raise GpuError(f"stream {handle:#x} is none of this device") from None

    def check(self, may_capture: bool = True) -> None:
        """Raise an error if CUDA would refuse a call now.

        Args:
            may_capture: Whether a capture allows the call.

        Raises:
            GpuError: The device is not active on this thread, or the thread captures.
            DeviceLostError: Some work has failed.
        """
        if self._failure is not None:
            raise DeviceLostError(
                f"work on the device failed ({type(self._failure).__name__}: {self._failure}): it is lost, start again"
            ) from self._failure
        if not getattr(self._thread, "depth", 0):
            raise GpuError("the device is not active on this thread: call it in `with device.activate()`")
        stream: HostStream | None = getattr(self._thread, "capturing", None)
        if stream is not None and not may_capture:
            stream.spoil("an allocation or a wait")

    def release(self, address: int, room: Bytes, what: str) -> None:
        """Free an allocation after the work of all streams, as cuMemFree does."""
        if threading.current_thread() not in self._workers:  # a worker may drop the last reference: it cannot wait
            for stream in tuple(self._streams.values()):
                stream.drain()
        with self._lock:
            content = self._live.pop(address)
            self.allocated_bytes -= len(content)
            content[:] = POISON
        if (room[:ALIGNMENT] != GUARD).any() or (room[-ALIGNMENT:] != GUARD).any():
            raise GpuError(f"something was written beside the memory of {what}")

    def set_capturing(self, stream: HostStream | None) -> None:
        """Set the stream that the calling thread captures."""
        self._thread.capturing = stream

    def lose(self, error: BaseException) -> None:
        """Record a failure of some work; the first one counts."""
        self._failure = self._failure or error

    @property
    def lost(self) -> bool:
        """Whether some work has failed; later work is not run."""
        return self._failure is not None


class HostMemory:
    """Memory of a `HostDevice`."""

    def __init__(self, device: HostDevice, room: Bytes, address: int, what: str) -> None:
        self.nbytes = len(room) - 2 * ALIGNMENT
        self._address = address
        self._release = weakref.finalize(self, device.release, address, room, what)

    @property
    def address(self) -> int:
        if not self._release.alive:
            raise GpuError("this memory has been closed")
        return self._address

    def close(self) -> None:
        """As `Memory.close`.

        Raises:
            GpuError: Something was written right before or after it.
        """
        self._release()


class HostStream:
    """A stream of a `HostDevice`: a thread that does its work in order.

    Attributes:
        handle: A number in the place of a CUstream.
        worker: The thread.
    """

    def __init__(self, device: HostDevice, handle: int) -> None:
        self.handle = handle
        self._device = device
        self._captured: HostGraph | None = None
        self._spoilt = ""
        work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._queue = work
        self.worker = threading.Thread(target=_run, args=(work,), name=f"stream {handle:#x}", daemon=True)
        self.worker.start()
        self._stop = weakref.finalize(self, work.put, None)

    @property
    def capturing(self) -> bool:
        """Whether its work is being captured now."""
        return self._captured is not None

    def submit(self, function: Callable[..., object], *arguments: Any) -> None:
        """Put a call of a function on the stream. If the function raises an exception, the device is lost.

        Raises:
            GpuError: The stream has been closed.
        """
        self._device.check()
        device = self._device

        def work() -> None:
            if device.lost:
                return
            if device.delay_s:
                time.sleep(device.delay_s)
            try:
                function(*arguments)
            except BaseException as error:
                device.lose(error)

        if self._captured is not None:
            self._captured.add(work)
        else:
            self._put(work)

    def synchronize(self) -> None:
        """As `Stream.synchronize`.

        Raises:
            DeviceLostError: Some work has failed.
        """
        self._device.check(may_capture=False)
        self.drain()
        self._device.check()

    def drain(self) -> None:
        """Wait until all of its work is done."""
        done = threading.Event()
        if self._stop.alive:
            self._put(done.set)
            done.wait()

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        self._device.check(may_capture=False)
        if self.capturing:
            raise GpuError(f"stream {self.handle:#x} is being captured already")
        capture, graph = Capture(), HostGraph(self._device)
        self._captured, self._spoilt = graph, ""
        self._device.set_capturing(self)
        try:
            yield capture
        finally:
            self._captured = None
            self._device.set_capturing(None)
        if self._spoilt:
            raise GpuError(f"the capture failed: {self._spoilt} in it")
        capture.end(graph)

    def spoil(self, what: str) -> None:
        """Refuse a call that cannot be captured; the capture fails even if the caller catches this error.

        Raises:
            GpuError: Always.
        """
        self._spoilt = what
        raise GpuError(f"{what} while stream {self.handle:#x} is being captured")

    def wait_for(self, handle: int) -> None:
        self._device.check()
        if self.capturing:
            self.spoil("waiting for another stream")
        other = self._device.find_stream(handle)
        if other is None or other is self:
            return
        reached = threading.Event()
        other._put(reached.set)
        self._put(reached.wait)

    def close(self) -> None:
        self._stop()

    def mark(self, function: Work) -> None:
        """Put a function on the stream that is called even if the device is lost."""
        self._device.check()
        if self.capturing:
            self.spoil("an event for timing")
        self._put(function)

    def _put(self, work: Work) -> None:
        if not self._stop.alive:
            raise GpuError(f"stream {self.handle:#x} has been closed")
        self._queue.put(work)


class HostGraph:
    """Captured work of a `HostDevice`."""

    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self._work: list[Work] | None = []
        self._lock = threading.Lock()  # one launch at a time

    def add(self, work: Work) -> None:
        """Append a piece of work."""
        if self._work is not None:
            self._work.append(work)

    def launch(self, stream: HostStream) -> None:
        if self._work is None:
            raise GpuError("this graph has been closed")
        stream.submit(self._replay, tuple(self._work))

    def close(self) -> None:
        self._work = None

    def _replay(self, works: tuple[Work, ...]) -> None:
        with self._lock:
            for work in works:
                work()


class HostEvent:
    """A mark in a `HostStream`."""

    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self._passed: threading.Event | None = None
        self._seconds = 0.0

    def record(self, stream: HostStream) -> None:
        passed = threading.Event()

        def note() -> None:
            self._seconds = time.perf_counter()
            passed.set()

        stream.mark(note)
        self._passed = passed

    def synchronize(self) -> None:
        self._device.check(may_capture=False)
        if self._passed is not None:
            self._passed.wait()
        self._device.check()

    def elapsed_ms(self, since: HostEvent) -> float:
        if not all(event._passed is not None and event._passed.is_set() for event in (since, self)):
            raise GpuError("an event was not recorded, or its stream has not passed it: synchronise it first")
        return (self._seconds - since._seconds) * 1e3


class HostArray:
    """A numpy array that a `HostDevice` takes for a frame on the device.

    Args:
        array: The frame or plane; it is not copied.
        stream: Handle of the stream that produces its content, and that readers must wait for; None if it is complete.
    """

    def __init__(self, array: NDArray[Any], stream: int | None = None) -> None:
        self._array = array
        self._stream = stream

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3; the address is the host's."""
        interface = self._array.__array_interface__
        keys = ("shape", "strides", "typestr", "data")
        return {**{key: interface[key] for key in keys}, "version": 3, "stream": self._stream}


def _run(work: queue.SimpleQueue[Work | None]) -> None:
    """Do work until None comes. The thread holds no reference to its stream, so a stream without references ends."""
    while True:
        item = work.get()
        if item is None:
            return
        item()
        del item  # it holds arrays and memory


def _aligned(nbytes: int) -> Bytes:
    """Return new uint8 memory that starts at a multiple of ALIGNMENT."""
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes]
