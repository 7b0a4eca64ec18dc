"""PyCUDA's driver module, as much of it as `trt_runtime/gpu/pycuda.py` uses, on fake_cuda.c.

PyCUDA has no wheels: it is built against a CUDA toolkit. Where that was not done this takes its place, by its
documentation (https://documen.tician.de/pycuda) and its sources (src/cpp). Each thread has a stack of contexts;
objects are freed where their context is current, or can be made so on the thread that made it, and lost elsewhere;
errors come by their kind, with CUDA's own words.
"""

from __future__ import annotations

import builtins
import ctypes
import threading
from typing import Any

import numpy as np

_cuda = ctypes.CDLL("libcuda.so.1")
_stacks = threading.local()


class Error(builtins.Exception):
    pass


class MemoryError(Error):
    pass


class LogicError(Error):
    pass


class LaunchError(Error):
    pass


class RuntimeError(Error):
    pass


def _call(name: str, *arguments: Any, shown: str = "") -> None:
    code = getattr(_cuda, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _cuda.cuGetErrorString(code, ctypes.byref(text))
        kind = {2: MemoryError, 700: LogicError, 719: LaunchError}.get(code, LogicError if code < 700 else RuntimeError)
        raise kind(f"{shown or name.split('_')[0]} failed: {(text.value or b'').decode()}")


def _stack() -> list[Context]:
    if not hasattr(_stacks, "contexts"):
        _stacks.contexts = []
    return _stacks.contexts


def init(flags: int = 0) -> None:
    _call("cuInit", flags)


class Device:
    def __init__(self, number: int) -> None:
        self._number = number

    @staticmethod
    def count() -> int:
        count = ctypes.c_int()
        _call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def name(self) -> str:
        name = ctypes.create_string_buffer(256)
        _call("cuDeviceGetName", name, 256, self._number)
        return name.value.decode()

    def compute_capability(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        _call("cuDeviceComputeCapability", ctypes.byref(major), ctypes.byref(minor), self._number)
        return major.value, minor.value

    def retain_primary_context(self) -> Context:
        return Context(self._number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other._number == self._number

    def __hash__(self) -> int:
        return self._number


class Context:
    def __init__(self, number: int) -> None:
        self._number = number
        self._thread = threading.get_ident()
        self._handle = ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._handle), number)

    def __del__(self) -> None:
        _cuda.cuDevicePrimaryCtxRelease_v2(self._number)

    @staticmethod
    def get_current() -> Context | None:
        return _stack()[-1] if _stack() else None

    @staticmethod
    def get_device() -> Device:
        number = ctypes.c_int()
        _call("cuCtxGetDevice", ctypes.byref(number))
        return Device(number.value)

    @staticmethod
    def synchronize() -> None:
        _call("cuCtxSynchronize")

    def push(self) -> None:
        _call("cuCtxPushCurrent_v2", self._handle)
        _stack().append(self)

    @staticmethod
    def pop() -> None:
        if not _stack():
            raise LogicError("context::pop failed: invalid device context - cannot pop non-current context")
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        _stack().pop()


class _Object:
    """What belongs to a context, and is freed in it."""

    def __init__(self, free: str, handle: Any) -> None:
        self._context = Context.get_current()
        self._free, self._handle = free, handle

    def __del__(self) -> None:
        context = getattr(self, "_context", None)
        if context is None or self._handle is None:
            return
        switch = Context.get_current() is not context
        if switch and threading.get_ident() != context._thread:
            return  # PyCUDA warns of a leak
        if switch:
            context.push()
        getattr(_cuda, self._free)(self._handle)
        self._handle = None
        if switch:
            Context.pop()


class Stream(_Object):
    def __init__(self, flags: int = 0) -> None:
        handle = ctypes.c_void_p()
        _call("cuStreamCreate", ctypes.byref(handle), flags)
        super().__init__("cuStreamDestroy_v2", handle)
        self.handle = int(handle.value or 0)

    def synchronize(self) -> None:
        _call("cuStreamSynchronize", self._handle)


class Event(_Object):
    def __init__(self, flags: int = 0) -> None:
        handle = ctypes.c_void_p()
        _call("cuEventCreate", ctypes.byref(handle), flags)
        super().__init__("cuEventDestroy_v2", handle)

    def record(self, stream: Stream | None = None) -> None:
        _call("cuEventRecord", self._handle, stream and stream._handle)

    def synchronize(self) -> None:
        _call("cuEventSynchronize", self._handle)

    def time_since(self, event: Event) -> float:
        """Return the milliseconds that have passed since the other event."""
        found = ctypes.c_float()
        _call("cuEventElapsedTime", ctypes.byref(found), event._handle, self._handle)
        return found.value


class DeviceAllocation(_Object):
    def __init__(self, nbytes: int) -> None:
        address = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        super().__init__("cuMemFree_v2", address)

    def __int__(self) -> int:
        return self._handle.value


def mem_alloc(nbytes: int) -> DeviceAllocation:
    return DeviceAllocation(nbytes)


class PagelockedHostAllocation(_Object):
    def __init__(self, nbytes: int) -> None:
        address = ctypes.c_void_p()
        _call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), 0)
        super().__init__("cuMemFreeHost", address)
        self.__array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address.value, False),
            "version": 3,
        }


def pagelocked_empty(shape: int, dtype: object, order: str = "C", mem_flags: int = 0) -> Any:
    return np.asarray(PagelockedHostAllocation(shape)).view(dtype)


def mem_get_info() -> tuple[int, int]:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def memcpy_htod_async(dest: int, src: Any, stream: Stream | None = None) -> None:
    assert src.flags.c_contiguous
    address, handle = ctypes.c_void_p(src.ctypes.data), stream and stream._handle
    _call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(dest), address, ctypes.c_size_t(src.nbytes), handle)


def memcpy_dtoh_async(dest: Any, src: int, stream: Stream | None = None) -> None:
    assert dest.flags.c_contiguous
    assert dest.flags.writeable
    address, handle = ctypes.c_void_p(dest.ctypes.data), stream and stream._handle
    _call("cuMemcpyDtoHAsync_v2", address, ctypes.c_uint64(src), ctypes.c_size_t(dest.nbytes), handle)
