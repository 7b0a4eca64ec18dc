"""What the runtime needs of a GPU: memory, copies, streams, graphs, events, and frames that lie on it already.

Two classes have this interface: `CudaDevice` (cuda.bindings), and `HostDevice`, which does the same on the CPU. A
stream does its work later, in order: memory that the work reads or writes must be kept and left unchanged until the
stream, or an event after the work, is synchronised.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from facespec.errors import DeviceMemoryError, GpuError
from trt_runtime.gpu.frame import DeviceFrame

Bytes = NDArray[np.uint8]

ALIGNMENT = 256
"""Bytes: every allocation on a device starts at a multiple of this."""


class Memory:
    """Memory on a device. It is freed with its last reference, or before that by `close`.

    Args:
        address: A multiple of ALIGNMENT.
        nbytes: The size that was asked for.
        free: Frees it once all streams of the device have done their work; it may be called on any thread.
        arguments: For `free`; none of them may refer to this object.

    Attributes:
        closed: Whether it has been closed.
    """

    def __init__(self, address: int, nbytes: int, free: Callable[..., object], *arguments: Any) -> None:
        self.nbytes = nbytes
        self._address = address
        self.closed = False
        self._free = weakref.finalize(self, free, *arguments)

    @property
    def address(self) -> int:
        """Address of its first byte; GpuError if it has been closed."""
        if self.closed:
            raise GpuError("this memory has been closed")
        return self._address

    def close(self) -> None:
        """Free it. May be called again, and on any thread.

        Raises:
            GpuError: Something was written right before or after it, where the device can tell.
        """
        self.closed = True
        self._free()


class Graph(Protocol):
    """Captured work that can be repeated: it uses the same addresses each time, with their content at that time."""

    def launch(self, stream: Any) -> None:
        """Put the work on a stream of the device that captured it."""

    def close(self) -> None:
        """Free it. May be called again."""


class Stream(Protocol):
    """A queue of work on a device; several streams run at the same time."""

    @property
    def handle(self) -> int:
        """The CUstream, for TensorRT and for functions that launch kernels."""

    def synchronize(self) -> None:
        """Wait until all of its work is done; GpuError if some of it failed."""

    def capture(self, work: Callable[[], object]) -> Graph:
        """Return what a function puts on the stream, which is recorded, in thread-local mode, instead of run.

        The function must not allocate, synchronise or copy from or to memory that is not pinned.

        Raises:
            GpuError: The device cannot capture (`Device.can_capture`), or the function did what cannot be captured.
        """

    def wait_for(self, handle: int) -> None:
        """Let all further work of this stream wait for the work that another stream has now.

        Args:
            handle: A CUstream of the same context; 1 and 2 are the legacy and the per-thread default stream.
        """

    def close(self) -> None:
        """Destroy it once its work is done; a stream of the caller stays. May be called again."""


class Event(Protocol):
    """A mark in the work of a stream: for timing, and for other streams to wait for."""

    def record(self, stream: Any) -> None:
        """Put the mark on a stream of the same device."""

    def synchronize(self) -> None:
        """Wait until the stream has reached the mark."""

    def hold(self, stream: Any) -> None:
        """Let all further work of a stream of the same device wait until the mark is reached."""

    def elapsed_ms(self, since: Any) -> float:
        """Return the milliseconds from another event to this one; GpuError if a stream has not reached both."""


class Device(Protocol):
    """A device, in one context.

    Attributes:
        name: For messages and records: "NVIDIA H200, device 0".
        compute_capability: 90 for 9.0; 0 for a CPU.
        can_capture: Whether `Stream.capture` works.

    The device must be active on the calling thread for every method of it and of its streams, graphs and events, except
    `activate` and every `close`. Threads may share a device.
    """

    name: str
    compute_capability: int
    can_capture: bool

    def activate(self) -> AbstractContextManager[None]:
        """Make its context current on the calling thread in a block; at its end the one before is current again.

        The result may be entered again, and by other threads.
        """

    def stream(self) -> Stream:
        """Return a new stream that does not wait for the default one; or the caller's if the device was given one."""

    def allocate(self, nbytes: int, what: str) -> Memory:
        """Return new memory of at least 1 byte on the device, with undefined content.

        Raises:
            DeviceMemoryError: Not enough memory is free for `what`, as in "the network's workspace".
        """

    def pinned(self, nbytes: int) -> Bytes:
        """Return new page-locked memory of the host, uint8 (nbytes,), undefined; it is freed with its last view.

        It starts at a multiple of ALIGNMENT. Only copies from and to such memory run beside other work, and kernels
        reach it, at the same address as the host does.

        Raises:
            DeviceMemoryError: The host cannot page-lock so much memory.
        """

    def copy_in(self, address: int, source: Bytes, stream: Any) -> None:
        """Put a copy from an array, uint8 and C-contiguous, to the device on a stream; ValueError for other arrays."""

    def copy_out(self, target: Bytes, address: int, stream: Any) -> None:
        """Put a copy from the device to an array on a stream: as `copy_in`, and the array must be writeable."""

    def free_and_total(self) -> tuple[int, int]:
        """Return the free bytes of its memory, and all bytes."""

    def event(self) -> Event:
        """Return a new event."""

    def frame(self, frame: object, stream: Any) -> DeviceFrame | None:
        """Return where a frame lies on this device; None if it lies in the host's memory or is no frame.

        Nothing is copied. Further work of `stream`, which will read it, waits for the work that produces the frame.
        `trt_runtime.gpu.frame.read_frame` says what is a frame, and which are refused.
        """

    def close(self) -> None:
        """Release the device; close memory, streams and graphs before. May be called again."""


def out_of_memory(what: str, nbytes: int | None, free: int, total: int) -> DeviceMemoryError:
    """Return the error for an allocation that failed; None where nobody knows how much was asked for."""
    asked = "" if nbytes is None else f"{_size(nbytes)} asked for, "
    return DeviceMemoryError(
        f"no memory on the device for {what}: {asked}{_size(free)} of {_size(total)} free: "
        "use smaller batches or fewer streams, or stop what else uses the device"
    )


def check_nbytes(nbytes: int) -> int:
    """Return a size of memory, or raise ValueError if it is less than one byte."""
    if nbytes < 1:
        raise ValueError(f"{nbytes} bytes cannot be allocated")
    return nbytes


def check_bytes(array: Bytes, writeable: bool = False) -> Bytes:
    """Return an array if it is uint8, C-contiguous and, where asked for, writeable; else raise ValueError."""
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
