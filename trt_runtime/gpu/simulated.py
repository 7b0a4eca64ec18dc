"""The CPU in the place of a GPU, for `TRTRetinaFace(..., device="cpu")`: to develop and test GPU code without a GPU.

`HostEngine` runs a plugin form on a `HostDevice`, which has the interface of a GPU. The device enforces those of CUDA's
rules that are easily broken unnoticed: each stream runs on a thread of its own, new memory is filled with rubbish,
closed memory cannot be reached, failed work loses the device, and calls that a capture forbids are refused.
"""

from __future__ import annotations

import itertools
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facespec.cli import require
from facespec.errors import DeviceLostError, DriverGoneError, GpuError, KernelFaultError, ModelFileError
from facespec.kinds import model_kind
from facespec.spec import MAX_NETWORK_PIXELS, SIZE_MULTIPLE
from trt_runtime.gpu.device import ALIGNMENT, Bytes, Memory, check_bytes, check_nbytes, out_of_memory
from trt_runtime.gpu.engine import Shape
from trt_runtime.gpu.frame import DeviceFrame, read_frame
from trt_runtime.gpu.sidecar import Profile
from trt_runtime.kernels import decode_nms, library, load_letterbox
from trt_runtime.onnx_model import OnnxModel, open_session

POISON = 0xFF
"""Byte that new memory is filled with: NaN as float32 and float16, -1 as int32."""

GUARD = 0xA5
"""Byte that the ALIGNMENT bytes before and after an allocation are filled with; `release` checks them."""

MAX_BATCH = 8
BEST_SIDE = 640
LARGEST_SIDE = MAX_NETWORK_PIXELS // MAX_BATCH // BEST_SIDE // SIZE_MULTIPLE * SIZE_MULTIPLE

Work = Callable[[], object]


class HostDevice:
    """The CPU as a `Device`; `HostStream.submit` puts host kernels on its streams.

    Args:
        memory_limit: Bytes that may be allocated at the same time; None is the memory of the machine. New memory is
            filled with POISON.
        delay_s: Seconds that every piece of work waits before it starts, so that a result read too early is noticed.

    Attributes:
        allocated_bytes: Bytes that are allocated now, without pinned memory.
        thread: What a thread has of its own: the `depth` of `activate`, and the stream that it captures.
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
        self.thread = threading.local()
        self._failure: BaseException | None = None
        self._process = os.getpid()

    def activate(self) -> _Activation:
        return _Activation(self.thread)

    def stream(self) -> HostStream:
        self.check()
        stream = HostStream(self, next(self._handles))
        self._streams[stream.handle] = stream
        self._workers.add(stream.worker)
        return stream

    def allocate(self, nbytes: int, what: str) -> Memory:
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
            address = content.ctypes.data
            self._live[address] = content
            self.allocated_bytes += nbytes
            return Memory(address, nbytes, self.release, address, room, what)

    def pinned(self, nbytes: int) -> Bytes:
        self.check(may_capture=False)
        array = _aligned(check_nbytes(nbytes))
        array[:] = POISON
        self._pinned[array.ctypes.data] = array.base  # type: ignore[assignment]
        return array

    def view(self, address: int, nbytes: int) -> Bytes:
        """Return memory as uint8 (nbytes,), for host kernels and tests; GpuError if it is in no live allocation.

        Pinned memory is within reach of the device, too.
        """
        for start, content in tuple(self._live.items()):
            if start <= address and address + nbytes <= start + len(content):
                return content[address - start : address - start + nbytes]
        room = self._pinned_room(address, nbytes)
        if room is not None:
            start = room.ctypes.data
            return room[address - start : address - start + nbytes]
        raise GpuError(f"{nbytes} bytes at {address:#x} are in no live allocation of this device")

    def copy_in(self, address: int, source: Bytes, stream: HostStream) -> None:
        self._copy(address, check_bytes(source), stream, inwards=True)

    def copy_out(self, target: Bytes, address: int, stream: HostStream) -> None:
        self._copy(address, check_bytes(target, writeable=True), stream, inwards=False)

    def _copy(self, address: int, array: Bytes, stream: HostStream, inwards: bool) -> None:
        self.check()
        self.view(address, array.nbytes)
        if stream.capturing and self._pinned_room(array.ctypes.data, array.nbytes) is None:
            stream.spoil("a copy from or to memory that is not pinned")
        flat = array.reshape(-1)

        def copy() -> None:
            memory = self.view(address, flat.nbytes)
            np.copyto(*((memory, flat) if inwards else (flat, memory)))

        stream.submit(copy)

    def _pinned_room(self, address: int, nbytes: int) -> Bytes | None:
        """Return what an address in pinned memory lies in; None if it lies in none."""
        for first, room in tuple(self._pinned.items()):
            if first <= address and address + nbytes <= room.ctypes.data + room.nbytes:
                return room
        return None

    def free_and_total(self) -> tuple[int, int]:
        self.check()
        if self._limit is not None:
            return self._limit - self.allocated_bytes, self._limit
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def event(self) -> HostEvent:
        self.check()
        return HostEvent(self)

    def frame(self, frame: object, stream: HostStream) -> DeviceFrame | None:
        self.check()
        return read_frame(frame, stream, None, lambda address, index: index, self._holds)

    def _holds(self, plane: object) -> bool:
        """Whether an array lies on this device; an array with CUDA's interface may lie on a GPU instead."""
        if isinstance(plane, HostArray):
            return True
        address = (getattr(plane, "__cuda_array_interface__", None) or {"data": (0,)})["data"][0]
        return any(start <= address < start + len(content) for start, content in tuple(self._live.items()))

    def close(self) -> None:
        for stream in tuple(self._streams.values()):
            stream.close()

    def find_stream(self, handle: int) -> HostStream | None:
        """Return the stream of a handle; None for the default streams, which never have work."""
        if handle in (1, 2):
            return None
        try:
            return self._streams[handle]
        except KeyError:
            raise GpuError(f"stream {handle:#x} is none of this device") from None

    def check(self, may_capture: bool = True) -> None:
        """Raise GpuError if CUDA would refuse a call now; `may_capture`: whether a capture allows the call."""
        if os.getpid() != self._process:  # its threads are the parent's: no work would be done
            raise DriverGoneError("the device is that of the process this one is a fork of: make a detector here")
        if self._failure is not None:
            kind = type(self._failure) if isinstance(self._failure, DeviceLostError) else KernelFaultError
            raise kind(
                f"work on the device failed ({type(self._failure).__name__}: {self._failure}): it is lost, start again"
            ) from self._failure
        if not getattr(self.thread, "depth", 0):
            raise GpuError("the device is not active on this thread: call it in `with device.activate()`")
        stream: HostStream | None = getattr(self.thread, "capturing", None)
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

    def lose(self, error: BaseException) -> None:
        """Record a failure of some work; the first one counts."""
        with self._lock:
            if self._failure is None:
                self._failure = error

    @property
    def lost(self) -> bool:
        """Whether some work has failed; later work is not run."""
        return self._failure is not None


class _Activation:
    """Counts, for a thread, the blocks in which a `HostDevice` is active."""

    def __init__(self, thread: threading.local) -> None:
        self._thread = thread

    def __enter__(self) -> None:
        self._thread.depth = getattr(self._thread, "depth", 0) + 1

    def __exit__(self, *_: object) -> None:
        self._thread.depth -= 1


class HostStream:
    """A stream of a `HostDevice`: a thread that does its work in order.

    Attributes:
        handle: A number in the place of a CUstream.
        worker: The thread.
    """

    def __init__(self, device: HostDevice, handle: int) -> None:
        self.handle = handle
        self._device = device
        self._captured: list[Work] | None = None
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
        """Put a call of a function on the stream. If the function raises an exception, the device is lost."""
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
            self._captured.append(work)
        else:
            self.put(work)

    def synchronize(self) -> None:
        self._device.check(may_capture=False)
        self.drain()
        self._device.check()

    def drain(self) -> None:
        """Wait until all of its work is done."""
        if not self._stop.alive:
            return self.worker.join()
        done = threading.Event()
        self._queue.put(done.set)
        while self.worker.is_alive() and not done.wait(0.05):  # another thread may close it meanwhile
            pass
        return None

    def capture(self, work: Callable[[], object]) -> HostGraph:
        self._device.check(may_capture=False)
        if self.capturing:
            raise GpuError(f"stream {self.handle:#x} is being captured already")
        self._captured = captured = list[Work]()
        self._spoilt = ""
        self._device.thread.capturing = self
        try:
            work()
        finally:
            self._captured = self._device.thread.capturing = None
        if self._spoilt:
            raise GpuError(f"the capture failed: {self._spoilt} in it")
        return HostGraph(captured)

    def spoil(self, what: str) -> None:
        """Raise GpuError for a call that cannot be captured; the capture fails even if the caller catches it."""
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
        other.put(reached.set)
        self.put(reached.wait)

    def close(self) -> None:
        self._stop()

    def put(self, work: Work) -> None:
        """Put a function on the stream that is called even if the device is lost, and is never captured."""
        if not self._stop.alive:
            raise GpuError(f"stream {self.handle:#x} has been closed")
        self._queue.put(work)


class HostGraph:
    """Captured work of a `HostDevice`."""

    def __init__(self, work: list[Work]) -> None:
        self._work: list[Work] | None = work
        self._lock = threading.Lock()  # one launch at a time

    def launch(self, stream: HostStream) -> None:
        if self._work is None:
            raise GpuError("this graph has been closed")
        stream.submit(self._replay, self._work)

    def close(self) -> None:
        self._work = None

    def _replay(self, works: list[Work]) -> None:
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
        self._device.check()
        if stream.capturing:
            stream.spoil("an event for timing")
        passed = threading.Event()

        def note() -> None:
            self._seconds = time.perf_counter()
            passed.set()

        stream.put(note)
        self._passed = passed

    def synchronize(self) -> None:
        self._device.check(may_capture=False)
        if self._passed is not None:
            self._passed.wait()
        self._device.check()

    def hold(self, stream: HostStream) -> None:
        self._device.check()
        if stream.capturing:
            stream.spoil("waiting for an event")
        if self._passed is not None:
            stream.put(self._passed.wait)

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


class HostEngine:
    """A plugin form on streams of a `HostDevice`: ONNX Runtime runs its network, host kernels letterbox and decode.

    Args:
        path: Plugin form, written by `python -m export.to_trt` beside its engine, or with --onnx-only.
        device: The device that it runs on.

    Raises:
        ModelFileError: The file is missing, unsafe, or not a plugin form.
        MissingPackageError: onnxruntime or onnx is not installed.
        BuildError: The host kernels are not compiled yet, and there is no C++ compiler.
    """

    backend = "host"

    def __init__(self, path: str | Path, device: HostDevice) -> None:
        if model_kind(path) == "engine":
            raise ModelFileError(f"{path}: engines run on a GPU; device cpu runs the .plugin.onnx that lies beside one")
        model = OnnxModel(path)
        self.spec = model.spec
        if not model.is_plugin_form or model.weights:
            raise ModelFileError(
                f"{path}: device cpu runs plugin forms, in one file: "
                f"python -m export.to_trt --onnx-only --out {Path(path).stem}.plugin.onnx"
            )
        graph = model.heads_graph
        self.files = [Path(path)]
        self._heads = graph.heads
        self._session = open_session(graph.content, path, 1)
        self._device = device
        self._launch_letterbox = load_letterbox(library())
        sizes_hw = [(side, side) for side in (SIZE_MULTIPLE, BEST_SIDE, LARGEST_SIDE)]
        smallest, best, largest = [graph.fixed_hw] * 3 if graph.fixed_hw else sizes_hw
        self.profile = Profile((1, 1, MAX_BATCH), (smallest, best, largest))

    def context(self, repeats: bool = True) -> HostContext:
        return HostContext(self, self._device)

    def letterbox(self, frames: int, shape: Shape, images: int, stream: HostStream) -> None:
        pad = self.spec.preprocess.mean_bgr
        stream.submit(self._launch_letterbox, frames, shape[0], (shape[1], shape[2]), pad, images, 0)

    def run(self, images: NDArray[np.uint8]) -> tuple[dict[str, NDArray[Any]], float]:
        """Return the outputs for letterboxed frames, and the share of the time that decoding and NMS took."""
        start = time.perf_counter()
        maps = self._session.run(self._heads, {"images": images})
        middle = time.perf_counter()
        found = decode_nms(maps, (images.shape[1], images.shape[2]), self.spec)
        end = time.perf_counter()
        return found, (end - middle) / (end - start)

    def environment(self) -> dict[str, Any]:
        return {"backend": self.backend, "onnxruntime": require("onnxruntime", "cpu", "device cpu").__version__}

    def save(self) -> None:
        return

    def close(self) -> None:
        self._session = None


class HostContext:
    """A context of a `HostEngine`: it reads and writes the device's memory only at the addresses that it was given."""

    def __init__(self, engine: HostEngine, device: HostDevice) -> None:
        self._engine, self._device = engine, device
        self._share = 0.0
        self._work: Any = None

    def set_shape(self, shape: Shape) -> int:
        self._shape = shape
        return 1

    def bind(self, addresses: dict[str, int], workspace: Memory) -> None:
        engine, device, shape = self._engine, self._device, self._shape

        def work() -> None:
            images = device.view(addresses["images"], 3 * math.prod(shape)).reshape(*shape, 3)
            found, self._share = engine.run(images)
            for name, values in found.items():
                device.view(addresses[name], values.nbytes)[:] = values.reshape(-1).view(np.uint8)

        self._work = work

    def enqueue(self, stream: HostStream) -> None:
        stream.submit(self._work)

    def can_capture(self, stream: HostStream) -> bool:
        return True

    def plugin_share(self, stream: HostStream) -> float:
        self.enqueue(stream)
        stream.synchronize()
        return self._share

    def close(self) -> None:
        self._work = None


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
