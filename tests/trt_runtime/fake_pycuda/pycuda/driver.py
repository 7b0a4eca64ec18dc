"""PyCUDA's driver module, contexts, streams and arrays alone, on fake_cuda.c.

PyCUDA has no wheels: it is built against a CUDA toolkit. Where that was not done this takes its place, by its
documentation (https://documen.tician.de/pycuda) and its sources (src/cpp). Each thread has a stack of contexts;
objects are freed where their context is current, or can be made so on the thread that made it, and lost elsewhere.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

_cuda = ctypes.CDLL("libcuda.so.1")
_stacks = threading.local()


class Error(Exception):
    pass


class LogicError(Error):
    pass


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_cuda, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _cuda.cuGetErrorString(code, ctypes.byref(text))
        raise Error(f"{name.split('_')[0]} failed: {(text.value or b'').decode()}")


def _stack() -> list[Context]:
    if not hasattr(_stacks, "contexts"):
        _stacks.contexts = []
    return _stacks.contexts


def init(flags: int = 0) -> None:
    _call("cuInit", flags)


class Device:
    def __init__(self, number: int) -> None:
        self._number = number

    def retain_primary_context(self) -> Context:
        return Context(self._number)

    def make_context(self) -> Context:
        return Context(self._number, own=True)


class Context:
    def __init__(self, number: int, own: bool = False) -> None:
        self._number = number
        self._thread = threading.get_ident()
        self._handle = ctypes.c_void_p()
        if own:
            _call("cuCtxCreate_v4", ctypes.byref(self._handle), None, 0, number)
            _stack().append(self)
        else:
            _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._handle), number)

    def __del__(self) -> None:
        _cuda.cuDevicePrimaryCtxRelease_v2(self._number)  # one of its own is counted as these are

    @staticmethod
    def get_current() -> Context | None:
        return _stack()[-1] if _stack() else None

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


class DeviceAllocation(_Object):
    def __init__(self, nbytes: int) -> None:
        address = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        super().__init__("cuMemFree_v2", address)

    def __int__(self) -> int:
        return self._handle.value


def mem_alloc(nbytes: int) -> DeviceAllocation:
    return DeviceAllocation(nbytes)
