"""What every `Device` does, in plain asserts: the CPU's and CUDA's, in any context, on a fake driver and on a GPU."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from facespec.errors import DeviceMemoryError, GpuError
from trt_runtime.gpu.device import ALIGNMENT, Device


def refused(kind: type[Exception], call: Callable[[], Any]) -> str:
    """Return the message of the error a call raises."""
    try:
        call()
    except kind as error:
        message = str(error)
        assert "\n" not in message
        return message
    raise AssertionError(f"no {kind.__name__}")


def check_device(device: Device, asynchronous: bool = False) -> None:
    """Raise AssertionError unless a device does what `Device` says.

    Args:
        device: Not active on this thread.
        asynchronous: Whether work takes so long that a result cannot be there at once.
    """
    with device.activate():
        _check_copies(device, asynchronous)
        _check_memory(device)
        if device.can_capture:
            _check_capture(device)
        _check_events(device, asynchronous)
    _check_threads(device)


def _check_copies(device: Device, asynchronous: bool) -> None:
    stream = device.stream()
    memory = device.allocate(5000, "a test")
    sent, back = device.pinned(5000), device.pinned(5000)
    assert memory.address % ALIGNMENT == 0
    assert memory.nbytes == 5000
    assert stream.handle > 2  # neither null nor a default stream
    sent[:] = np.random.default_rng(1).integers(0, 256, 5000)
    back[:] = 0
    device.copy_in(memory.address, sent, stream)
    device.copy_out(back[7:77], memory.address + 1001, stream)
    if asynchronous:
        assert not back.any()
    stream.synchronize()
    assert (back[7:77] == sent[1001:1071]).all()
    assert not back[77:].any()
    assert not back[:7].any()
    refused(ValueError, lambda: device.copy_in(memory.address, sent[::2], stream))
    refused(ValueError, lambda: device.copy_in(memory.address, sent.view(np.float32), stream))
    fixed = sent.view()
    fixed.flags.writeable = False
    refused(ValueError, lambda: device.copy_out(fixed, memory.address, stream))
    other = device.stream()
    assert other.handle != stream.handle
    sent[:] ^= 0xFF  # else it would not matter who comes first
    for _ in range(3):
        device.copy_in(memory.address, sent, other)
    stream.wait_for(other.handle)
    stream.wait_for(1)
    device.copy_out(back, memory.address, stream)
    stream.synchronize()
    assert (back == sent).all()
    sent[:] ^= 0xFF
    given, unused = device.event(), device.event()
    for _ in range(3):
        device.copy_in(memory.address, sent, other)
    given.record(other)
    given.hold(stream)
    unused.hold(stream)  # it was never recorded
    del given, unused  # the stream still waits
    device.copy_out(back, memory.address, stream)
    stream.synchronize()
    assert (back == sent).all()
    assert device.frame(back.reshape(10, -1)[:, :30].reshape(10, 10, 3), stream) is None
    assert device.frame("no frame", stream) is None
    back[:] = 0
    reached = device.event()
    device.copy_out(back, memory.address, stream)
    reached.record(stream)
    stream.close()
    stream.close()
    reached.synchronize()  # what was put on it is done nevertheless
    assert (back == sent).all()


def _check_memory(device: Device) -> None:
    free, total = device.free_and_total()
    assert 0 < free <= total
    message = refused(DeviceMemoryError, lambda: device.allocate(1 << 60, "the workspace"))
    for part in ("the workspace", f"{1 << 30:.1f} GiB asked for", "free"):
        assert part in message, message
    refused(ValueError, lambda: device.allocate(0, "nothing"))
    refused(ValueError, lambda: device.pinned(0))
    memory = device.allocate(16, "a test")
    memory.close()
    memory.close()
    assert "closed" in refused(GpuError, lambda: memory.address)
    pinned = device.pinned(16)
    assert (pinned.dtype, pinned.shape) == (np.uint8, (16,))
    view = pinned[3:]
    del pinned
    gc.collect()
    view[:] = 7  # its memory is still there
    assert (view == 7).all()


def _check_capture(device: Device) -> None:
    stream, other = device.stream(), device.stream()
    memory, sent, back = device.allocate(64, "a test"), device.pinned(64), device.pinned(64)
    spare, page = device.allocate(64, "a test"), device.pinned(64)
    back[:] = 1
    sent[:] = 2

    def copy_there_and_back() -> None:
        nonlocal page
        device.copy_in(memory.address, sent, stream)
        device.stream().close()  # freeing is always allowed
        spare.close()
        page = np.zeros(0, np.uint8)
        gc.collect()
        device.copy_out(back, memory.address, stream)

    graph = stream.capture(copy_there_and_back)
    refused(GpuError, lambda: spare.address)
    stream.synchronize()
    assert (back == 1).all()  # captured work is not run
    for value, where in ((3, stream), (4, stream), (5, other)):
        sent[:] = value
        graph.launch(where)
        where.synchronize()
        assert (back == value).all()

    def free_and_allocate() -> None:
        device.stream().close()
        device.allocate(16, "a test")  # what was freed has not made this allowed

    for forbidden in (lambda: device.allocate(16, "a test"), stream.synchronize, free_and_allocate):
        refused(GpuError, lambda work=forbidden: stream.capture(work))  # type: ignore[misc]

    def stop() -> None:
        raise KeyError("stopped")

    refused(KeyError, lambda: stream.capture(stop))
    device.copy_out(back, memory.address, stream)  # captures have ended, all three
    stream.synchronize()
    graph.close()
    graph.close()
    refused(GpuError, lambda: graph.launch(stream))


def _check_events(device: Device, asynchronous: bool) -> None:
    stream = device.stream()
    memory, sent = device.allocate(64, "a test"), device.pinned(64)
    before, after, never = device.event(), device.event(), device.event()
    before.record(stream)
    device.copy_in(memory.address, sent, stream)
    after.record(stream)
    if asynchronous:
        refused(GpuError, lambda: after.elapsed_ms(before))
    after.synchronize()
    assert 0 < after.elapsed_ms(before) < 1e4
    assert abs(after.elapsed_ms(before) + before.elapsed_ms(after)) < 1e-2
    refused(GpuError, lambda: never.elapsed_ms(before))
    refused(GpuError, lambda: after.elapsed_ms(never))


def _check_threads(device: Device) -> None:
    failures: list[BaseException] = []
    made: list[Any] = []

    def work(number: int) -> None:
        try:
            with device.activate():
                stream = device.stream()
                sent, back = device.pinned(1 << 12), device.pinned(1 << 12)
                for turn in range(20):
                    memory = device.allocate(1 << 12, "a test")
                    sent[:] = number * 20 + turn
                    device.copy_in(memory.address, sent, stream)
                    device.copy_out(back, memory.address, stream)
                    stream.synchronize()
                    assert (back == sent).all()
                    made.append(memory)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert len({memory.address for memory in made}) == 80
    for memory in made:  # on another thread, where the device is not active
        memory.close()
