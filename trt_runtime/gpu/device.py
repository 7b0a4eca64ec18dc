"""What the runtime asks of a GPU: memory, copies, streams, graphs, events and frames that are there already.

Two classes have this interface: `CudaDevice` (cuda.bindings), and `HostDevice`, which does the same on the CPU. Work is
put on streams and done later, in order: what a stream reads and writes must be left alone, and alive, until the stream
or an event after the work is synchronised.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from facespec.errors import DeviceMemoryError, GpuError
from trt_runtime.gpu.frame import DeviceFrame

Bytes = NDArray[np.uint8]

ALIGNMENT = 256
"""Every allocation on a device starts at a multiple of so many bytes."""


class Memory(Protocol):
    """Memory on a device. It goes with its last reference, at the latest; `close` is for letting go sooner."""

    @property
    def address(self) -> int:
        """Where it starts, a multiple of ALIGNMENT.

        Raises:
            GpuError: It has been closed.
        """

    @property
    def nbytes(self) -> int:
        """Size as asked for."""

    def close(self) -> None:
        """Free it, after everything that is on the device's streams. May be called again, and on any thread."""


class PinnedArray:
    """Page-locked memory of the host, which copies from and to a device need to run beside other work.

    Args:
        array: The memory, uint8 (N,); it is freed when no view of it is left.
    """

    def __init__(self, array: Bytes) -> None:
        self._array: Bytes | None = array

    @property
    def array(self) -> Bytes:
        """The memory, uint8 (N,), its content undefined at first.

        Raises:
            GpuError: It has been closed.
        """
        if self._array is None:
            raise GpuError("this memory has been closed")
        return self._array

    def close(self) -> None:
        """Let go of it; it is freed when no view of `array` is left. May be called again."""
        self._array = None


class Graph(Protocol):
    """Captured work, to be put on a stream again and again: the same addresses, with what they hold by then."""

    def launch(self, stream: Any) -> None:
        """Put the work on a stream of the device that captured it."""

    def close(self) -> None:
        """Free it. May be called again."""


class Capture:
    """What `Stream.capture` yields."""

    def __init__(self) -> None:
        self._graph: Graph | None = None

    @property
    def graph(self) -> Graph:
        """The work that was captured; there is none before the end of the block.

        Raises:
            GpuError: The block has not ended.
        """
        if self._graph is None:
            raise GpuError("there is no graph before the end of the capture")
        return self._graph

    def end(self, graph: Graph) -> None:
        """Note what was captured."""
        self._graph = graph


class Stream(Protocol):
    """A queue of work on a device; streams run beside each other."""

    @property
    def handle(self) -> int:
        """The CUstream, for TensorRT and launchers."""

    def synchronize(self) -> None:
        """Wait until everything on it is done.

        Raises:
            GpuError: Some of it failed.
        """

    def capture(self) -> AbstractContextManager[Capture]:
        """Record what is put on it in a block instead of running it, in thread-local mode.

        In the block the calling thread must not allocate, synchronise or copy from or to memory that is not pinned.

        Raises:
            GpuError: The device cannot capture (`Device.can_capture`), or not what was done in the block.
        """

    def wait_for(self, handle: int) -> None:
        """Let what comes next wait for everything that another stream has been given so far.

        Args:
            handle: A CUstream of the same context; 1 and 2 are the legacy and the per-thread default stream.
        """

    def close(self) -> None:
        """Destroy it once it has run dry, unless it is its caller's own. May be called again."""


class Event(Protocol):
    """A mark in a stream, for timing."""

    def record(self, stream: Any) -> None:
        """Put the mark on a stream of the same device."""

    def synchronize(self) -> None:
        """Wait until the stream has passed the mark."""

    def elapsed_ms(self, since: Any) -> float:
        """Return the milliseconds between another event of the device and this one.

        Raises:
            GpuError: One of them was not recorded, or its stream has not passed it.
        """


class Device(Protocol):
    """A device, in one context.

    All but `activate`, `close` and the attributes want to be called with the device active on the calling thread, and
    so do the methods of streams, graphs and events; `close` of anything does not. Threads may share a device.
    """

    @property
    def name(self) -> str:
        """For messages and records: "NVIDIA H200, device 0"."""

    @property
    def compute_capability(self) -> int:
        """90 for 9.0; 0 is a CPU."""

    @property
    def can_capture(self) -> bool:
        """Whether `Stream.capture` works."""

    def activate(self) -> AbstractContextManager[None]:
        """Make its context current on the calling thread in a block; what was current before is so again afterwards."""

    def stream(self) -> Stream:
        """Return a new stream that does not wait for the default one; or the caller's if the device was given one."""

    def allocate(self, nbytes: int, what: str) -> Memory:
        """Return new memory on the device, its content undefined.

        Args:
            nbytes: At least 1.
            what: What it is for, as the error names it: "the network's workspace".

        Raises:
            DeviceMemoryError: There is not enough.
        """

    def pinned(self, nbytes: int) -> PinnedArray:
        """Return new page-locked memory of the host, of at least 1 byte."""

    def copy_in(self, address: int, source: Bytes, stream: Any) -> None:
        """Put on a stream: copy an array to the device.

        Args:
            address: Where to.
            source: uint8, C-contiguous.
            stream: A stream of this device.

        Raises:
            ValueError: `source` is not so.
        """

    def copy_out(self, target: Bytes, address: int, stream: Any) -> None:
        """Put on a stream: fill an array, uint8 and C-contiguous, from an address on the device; as `copy_in`."""

    def free_and_total(self) -> tuple[int, int]:
        """Return the bytes of its memory that are free, and all there are."""

    def event(self) -> Event:
        """Return a new event."""

    def frame(self, frame: object, stream: Any) -> DeviceFrame | None:
        """Return where a frame lies on this device, or None if it is in the host's memory, or no frame at all.

        Nothing is copied. What is put on `stream` from now on comes after what makes the frame.

        Args:
            frame: uint8 (H, W, 3) BGR of anything with `__dlpack__` or `__cuda_array_interface__` (PyTorch, CuPy,
                Numba, PyCUDA), or an `Nv12Frame` of two such arrays.
            stream: The stream that is to read it.

        Raises:
            FrameError: On a device, but another one, or not such a frame.
        """

    def close(self) -> None:
        """Let go of the device; memory, streams and graphs should be closed before. May be called again."""


def out_of_memory(what: str, nbytes: int, free: int, total: int) -> DeviceMemoryError:
    """Return the error of an allocation that failed."""
    return DeviceMemoryError(
        f"no memory on the device for {what}: {_size(nbytes)} asked for, {_size(free)} of {_size(total)} free: "
        "use smaller batches or fewer streams, or stop what else uses the device"
    )


def check_nbytes(nbytes: int) -> int:
    """Return a size of memory, or raise ValueError if it is not at least one byte."""
    if nbytes < 1:
        raise ValueError(f"{nbytes} bytes cannot be allocated")
    return nbytes


def check_bytes(array: Bytes, writeable: bool = False) -> Bytes:
    """Return an array that can be copied from, or also to, as it lies in memory, or raise ValueError."""
    if writeable and not array.flags.writeable:
        raise ValueError("a read-only array cannot be copied to")
    if array.dtype != np.uint8 or not array.flags.c_contiguous:
        raise ValueError(f"only C-contiguous uint8 arrays are copied, not {array.dtype} with strides {array.strides}")
    return array


def _size(nbytes: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} bytes"
