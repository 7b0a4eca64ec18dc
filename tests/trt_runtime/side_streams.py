"""Frames that are still being written on a stream of their maker, and the four ways in which a detector gets them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from facespec.spec import ModelSpec
from trt_runtime import TRTRetinaFace
from trt_runtime.gpu.device import Device
from trt_runtime.gpu.sidecar import Profile
from trt_runtime.media.files import TimedFrame
from trt_runtime.media.pipeline import Job, run_pipeline

SIDE = 32
"""Pixels of a side of the frames."""

_current = threading.local()


@contextmanager
def current(stream: Any) -> Iterator[None]:
    """Make a stream current on this thread, as `torch.cuda.stream` does; else it is the legacy default stream."""
    _current.handle = stream.handle
    try:
        yield
    finally:
        del _current.handle


class SideFrame:
    """A frame at an address that tells, as those of PyTorch and CuPy do, the stream that is current on the thread.

    Args:
        device: Where it lies.
        address: Of its SIDE x SIDE x 3 bytes.
    """

    shape = (SIDE, SIDE, 3)

    def __init__(self, device: Device, address: int) -> None:
        self._device, self._address = device, address

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        stream = getattr(_current, "handle", 1)
        return {"version": 3, "shape": self.shape, "typestr": "|u1", "data": (self._address, False), "stream": stream}


class TorchFrame(SideFrame):
    """One that lets the reader's stream wait in `__dlpack__`, as PyTorch's do; for `CudaDevice`."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, stream: int, **options: Any) -> object:
        cuda = self._device.cuda  # type: ignore[attr-defined]
        event = cuda("cuEventCreate", 2)
        cuda("cuEventRecord", event, getattr(_current, "handle", 1))
        cuda("cuStreamWaitEvent", stream, event, 0)
        cuda("cuEventDestroy", event)
        pixels = (ctypes.c_uint8 * (SIDE * SIDE * 3)).from_address(self._address)
        return np.ctypeslib.as_array(pixels).reshape(self.shape).__dlpack__()


class CopyingEngine:
    """An `Engine` that finds nothing, and copies what its frames begin with at the time the letterbox runs.

    Attributes:
        addresses: Of the frames of the next call.
        seen: Their first bytes, in page-locked memory.
    """

    backend = "copying"
    spec = ModelSpec()
    files: tuple[Path, ...] = ()
    profile = Profile((1, 2, 4), ((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE)))

    def __init__(self, device: Device) -> None:
        self._device = device
        self.addresses: list[int] = []
        self.seen, self._zeros = device.pinned(4), device.pinned(1 << 20)
        self._zeros[:] = 0

    def context(self, repeats: bool = True) -> Any:
        context = SimpleNamespace(can_capture=lambda stream: True, close=lambda: None)

        def set_shape(shape: Any) -> int:
            context.batch = shape[0]
            return 1

        def bind(addresses: dict[str, int], workspace: Any) -> None:
            context.addresses = addresses

        def enqueue(stream: Any) -> None:
            for name, (_, rest) in self.spec.decode.outputs.items():
                nbytes = 4 * context.batch * int(np.prod(rest, dtype=int))
                self._device.copy_in(context.addresses[name], self._zeros[:nbytes], stream)

        context.set_shape, context.bind, context.enqueue = set_shape, bind, enqueue
        return context

    def save(self) -> None:
        pass

    def letterbox(self, frames: int, shape: Any, images: int, stream: Any) -> None:
        for slot, address in enumerate(self.addresses):
            self._device.copy_out(self.seen[slot : slot + 1], address, stream)

    def environment(self) -> dict[str, Any]:
        return {"backend": self.backend}

    def close(self) -> None:
        pass


class _Made:
    """A source that makes one frame, on the thread that reads it."""

    name, live, rate, frame_count, damaged, reconnects = "made", False, 25.0, 1, 0, 0

    def __init__(self, make: Callable[[], Any], stream: Any) -> None:
        self._make, self._stream = make, stream

    def __enter__(self) -> _Made:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[TimedFrame]:
        with current(self._stream):
            yield TimedFrame(self._make(), 0.0)

    def stop(self) -> None:
        pass


def go_through(
    device: Any, kind: type[SideFrame] = SideFrame, delay: Callable[[Any], None] = lambda stream: None
) -> Iterator[tuple[str, bool]]:
    """Yield each way to a detector, first before it is gone and then with whether the frames were read complete.

    Args:
        device: What runs it.
        kind: Of the frames.
        delay: Makes what is put on a stream next late.
    """
    with device.activate():
        engine, side = CopyingEngine(device), device.stream()
        memory = [device.allocate(SIDE * SIDE * 3, "a frame") for _ in range(2)]
        pixels = device.pinned(SIDE * SIDE * 3)
    wanted = 0

    def make(index: int = 0) -> SideFrame:
        with device.activate():
            delay(side)
            device.copy_in(memory[index].address, pixels, side)
        return kind(device, memory[index].address)

    with TRTRetinaFace(engine, device=device, graphs=False) as detector:

        def pipeline() -> None:
            job = Job("made", lambda: _Made(make, side), lambda source: nullcontext(lambda seen, timer: None))  # type: ignore[arg-type, return-value]
            (report,) = run_pipeline(detector, [job]).sources
            assert report.detected == 1, report.error

        def stream() -> None:
            with detector.stream(1) as stream, current(side):
                stream.submit([make(), make(1)]).result()

        ways: dict[str, tuple[int, Callable[[], object]]] = {
            "detect": (1, lambda: detector.detect(make())),
            "detect_batch": (2, lambda: detector.detect_batch([make(), make(1)])),
            "stream": (2, stream),
            "pipeline": (1, pipeline),
        }
        for name, (count, way) in ways.items():
            wanted += 1
            pixels[:], engine.seen[:] = wanted, 0
            engine.addresses = [item.address for item in memory[:count]]
            yield name, False
            if name.startswith("detect"):
                with current(side):
                    way()
            else:
                way()
            yield name, bool((engine.seen[:count] == wanted).all())
