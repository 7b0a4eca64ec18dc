"""The CPU as a device, and where frames lie."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from facespec.errors import DeviceLostError, DeviceMemoryError, FrameError, GpuError
from tests.trt_runtime.device_contract import check_device
from trt_runtime.gpu.device import (
    ALIGNMENT,
    check_bytes,
    check_nbytes,
    out_of_memory,
)
from trt_runtime.gpu.frame import DeviceFrame, Nv12Frame, PixelFormat, read_frame
from trt_runtime.gpu.simulated import HostArray, HostDevice, HostStream
from trt_runtime.trt import open_device


@pytest.fixture
def device() -> Iterator[HostDevice]:
    device = HostDevice(memory_limit=1 << 20)
    with device.activate():
        yield device
    device.close()


def test_it_does_what_a_device_does() -> None:
    device = HostDevice(delay_s=2e-3)
    check_device(device, asynchronous=True)
    gc.collect()
    assert device.allocated_bytes == 0
    device.close()


def test_devices_by_name() -> None:
    assert isinstance(open_device("cpu"), HostDevice)
    for name in ("gpu", "", "cuda:", "cuda:-1", "cuda:x", "1", "cpu:1", "cuda:\u0662", "cuda:12345", "CPU", "cuda "):
        with pytest.raises(GpuError, match="device must be cuda"):
            open_device(name)


def test_how_memory_that_is_not_there_is_named() -> None:
    sizes = {
        0: "0 bytes",
        1023: "1023 bytes",
        1024: "1.0 KiB",
        (1 << 20) - 1: "1024.0 KiB",
        1 << 20: "1.0 MiB",
        5 << 19: "2.5 MiB",
        1 << 30: "1.0 GiB",
        3 << 40: "3072.0 GiB",
    }
    for nbytes, text in sizes.items():
        error = out_of_memory("the heads", nbytes, 1, 2)
        assert str(error) == (
            f"no memory on the device for the heads: {text} asked for, 1 bytes of 2 bytes free: "
            "use smaller batches or fewer streams, or stop what else uses the device"
        )
        assert type(error) is DeviceMemoryError
    assert "7 bytes asked for, 2.0 KiB of 3.0 MiB free" in str(out_of_memory("x", 7, 2048, 3 << 20))


def test_what_can_be_copied() -> None:
    assert check_nbytes(1) == 1
    for nbytes in (0, -1):
        with pytest.raises(ValueError, match=f"^{nbytes} bytes cannot be allocated$"):
            check_nbytes(nbytes)
    array = np.zeros((4, 6), np.uint8)
    fixed = array.view()
    fixed.flags.writeable = False
    assert check_bytes(array) is array
    assert check_bytes(array[1:], writeable=True).base is array
    assert check_bytes(fixed) is fixed
    with pytest.raises(ValueError, match="read-only"):
        check_bytes(fixed, writeable=True)
    for wrong in (array[:, 1:], array.T, array.astype(np.int8), array.view(np.float16)):
        with pytest.raises(ValueError, match="only C-contiguous uint8 arrays are copied, not"):
            check_bytes(wrong)  # type: ignore[arg-type]


def test_what_a_cpu_is(device: HostDevice) -> None:
    assert (device.name, device.compute_capability, device.can_capture) == ("CPU", 0, True)
    with device.activate():
        pinned = device.pinned(100)
        assert (pinned == 0xFF).all()
        assert pinned.ctypes.data % ALIGNMENT == 0
        assert len(pinned) == 100
    host, small = HostDevice(), HostDevice(memory_limit=5)
    with host.activate(), small.activate():
        free, total = host.free_and_total()
        assert small.free_and_total() == (5, 5)
    assert 1 << 28 < total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free <= total
    with device.activate():  # it nests
        pass
    assert device.stream()


def test_freed_memory_is_rubbish_again(device: HostDevice) -> None:
    memory = device.allocate(8, "a test")
    content = device.view(memory.address, 8)
    content[:] = 5
    memory.close()
    assert (content == 0xFF).all()
    with pytest.raises(GpuError, match="no live allocation"):
        device.view(content.ctypes.data, 8)


def test_a_view_is_of_the_memory(device: HostDevice) -> None:
    first, second = device.allocate(8, "a test"), device.allocate(8, "a test")
    device.view(second.address, 8)[:] = range(8)
    assert device.view(second.address + 3, 2).tolist() == [3, 4]
    assert device.view(first.address, 8).tolist() == [255] * 8
    for address, nbytes in ((second.address - 1, 2), (second.address, 9), (second.address + 8, 1)):
        with pytest.raises(GpuError, match=rf"{nbytes} bytes at {address:#x} are in no live allocation"):
            device.view(address, nbytes)


def test_closing_a_device_ends_its_streams() -> None:
    device = HostDevice()
    with device.activate():
        streams = [device.stream(), device.stream()]
        seen: list[int] = []
        streams[0].submit(seen.append, 1)
        device.close()
        device.close()
        for stream in streams:
            stream.worker.join(5)
            assert not stream.worker.is_alive()
            with pytest.raises(GpuError, match="has been closed"):
                stream.submit(print)
        assert seen == [1]  # what it had been given is done


def test_the_default_streams_and_its_own_are_not_waited_for(device: HostDevice) -> None:
    stream, gate = device.stream(), threading.Event()
    stream.submit(gate.wait)
    for handle in (1, 2, stream.handle):  # itself: that would never end
        stream.wait_for(handle)
    assert device.find_stream(stream.handle) is stream
    assert device.find_stream(1) is device.find_stream(2) is None
    for handle in (0, 3):
        with pytest.raises(GpuError, match=f"stream {handle:#x} is none of this device"):
            device.find_stream(handle)
    gate.set()
    stream.synchronize()


def test_pinned_memory_may_be_captured_in_part(device: HostDevice) -> None:
    stream, memory, pinned = device.stream(), device.allocate(4, "a test"), device.pinned(10)
    view = pinned[6:]
    del pinned  # a view keeps it
    graph = stream.capture(lambda: device.copy_in(memory.address, view, stream))
    view[:] = 3
    graph.launch(stream)
    stream.synchronize()
    assert (device.view(memory.address, 4) == 3).all()
    wide = np.zeros(10 + 4, np.uint8)
    with pytest.raises(GpuError, match="a copy from or to memory that is not pinned"):
        stream.capture(lambda: device.copy_in(memory.address, wide[10:], stream))


def test_a_spoilt_capture_leaves_a_stream_that_works(device: HostDevice) -> None:
    stream, seen = device.stream(), list[int]()

    def work() -> None:
        stream.submit(seen.append, 1)
        with suppress(GpuError):  # to hide it spoils the capture all the same
            device.allocate(4, "a test")

    with pytest.raises(GpuError, match="an allocation or a wait"):
        stream.capture(work)
    assert not stream.capturing
    device.allocate(4, "a test").close()
    graph = stream.capture(lambda: stream.submit(seen.append, 2))  # the next one is not spoilt
    stream.submit(seen.append, 3)
    graph.launch(stream)
    stream.synchronize()
    assert seen == [3, 2]


def test_a_lost_device(device: HostDevice) -> None:
    stream, event = device.stream(), device.event()
    memory = device.allocate(4, "a test")
    stream.submit(lambda: 1 // 0)
    stream.submit(lambda: [].pop())
    stream.drain()
    for call in (
        device.event,
        device.stream,
        event.synchronize,
        lambda: event.record(stream),
        lambda: device.pinned(4),
    ):
        with pytest.raises(DeviceLostError, match="ZeroDivisionError"):  # the first failure, not what came of it
            call()
    device.lose(OSError("of another stream, a moment later"))
    with pytest.raises(DeviceLostError, match="ZeroDivisionError"):
        stream.synchronize()
    memory.close()
    assert device.allocated_bytes == 0
    assert device.lost


def test_the_first_of_two_failures_counts_though_another_thread_is_as_fast() -> None:
    kept: list[BaseException] = []
    threads: list[threading.Thread] = []

    class Device(HostDevice):
        """One on which another stream fails while the first failure is being recorded."""

        @property
        def _failure(self) -> BaseException | None:
            seen = kept[-1] if kept else None
            if threading.current_thread() is threading.main_thread():
                threads.append(threading.Thread(target=self.lose, args=(OSError("the second"),)))
                threads[0].start()
                threads[0].join(0.05)  # time enough to record it, if that were possible
            return seen

        @_failure.setter
        def _failure(self, error: BaseException | None) -> None:
            kept.extend([error] if error else [])

    Device().lose(OSError("the first"))
    threads[0].join()
    assert [str(error) for error in kept] == ["the first"]


def test_work_starts_late_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("trt_runtime.gpu.simulated.time.sleep", pauses.append)
    device = HostDevice(delay_s=0.01)
    with device.activate():
        stream, before, after = device.stream(), device.event(), device.event()
        gate = threading.Event()
        before.record(stream)
        for _ in range(3):
            stream.submit(gate.wait)
        after.record(stream)
        with pytest.raises(GpuError, match="synchronise it first"):
            after.elapsed_ms(before)
        gate.set()
        after.synchronize()
        assert after.elapsed_ms(before) >= 0
    assert pauses == [0.01] * 3
    device.close()


def test_a_graph_does_not_run_beside_itself(device: HostDevice) -> None:
    first, second, gate, seen = device.stream(), device.stream(), threading.Event(), list[str]()

    def work() -> None:
        first.submit(seen.append, "begin")
        first.submit(gate.wait)
        first.submit(seen.append, "end")

    graph = first.capture(work)
    graph.launch(first)
    graph.launch(second)
    threading.Timer(0.02, gate.set).start()
    first.synchronize()
    second.synchronize()
    assert seen == ["begin", "end"] * 2
    graph.close()
    with pytest.raises(GpuError, match="closed"):
        graph.launch(first)


def test_what_is_not_written_is_rubbish(device: HostDevice) -> None:
    memory = device.allocate(8, "a test")
    content = device.view(memory.address, 8)
    assert np.isnan(content.view(np.float32)).all()
    assert np.isnan(content.view(np.float16)).all()
    assert (content.view(np.int32) == -1).all()


def test_work_is_done_in_order_and_later(device: HostDevice) -> None:
    stream, gate, seen = device.stream(), threading.Event(), list[int]()
    stream.submit(gate.wait)
    for number in range(100):
        stream.submit(seen.append, number)
    assert seen == []
    gate.set()
    stream.synchronize()
    assert seen == list(range(100))


def test_streams_run_beside_each_other_and_wait_when_told(device: HostDevice) -> None:
    first, second, gate = device.stream(), device.stream(), threading.Event()
    seen: list[str] = []
    first.submit(gate.wait)
    first.submit(seen.append, "first")
    second.submit(seen.append, "beside")
    second.synchronize()
    assert seen == ["beside"]
    second.wait_for(first.handle)
    second.submit(seen.append, "after")
    first.submit(seen.append, "first again")
    threading.Timer(0.02, gate.set).start()
    second.synchronize()
    assert seen.index("first") < seen.index("after")
    with pytest.raises(GpuError, match="none of this device"):
        second.wait_for(12345)


def test_a_graph_is_what_was_captured_with_what_memory_holds_now(device: HostDevice) -> None:
    stream, seen, box = device.stream(), list[int](), [0]

    def work() -> None:
        stream.submit(lambda: seen.append(box[0]))
        stream.submit(lambda: seen.append(-box[0]))

    graph = stream.capture(work)
    stream.synchronize()
    assert seen == []
    for box[0] in (1, 2):
        graph.launch(stream)
        stream.synchronize()
    assert seen == [1, -1, 2, -2]
    outer = stream.capture(lambda: graph.launch(stream))
    seen.clear()
    outer.launch(stream)
    stream.synchronize()
    assert seen == [2, -2]


@pytest.mark.parametrize("what", ["pageable copy", "wait_for", "event", "pinned", "second capture"])
def test_what_cannot_be_captured(device: HostDevice, what: str) -> None:
    stream, memory, event = device.stream(), device.allocate(4, "a test"), device.event()
    calls = {
        "pageable copy": lambda: device.copy_in(memory.address, np.zeros(4, np.uint8), stream),
        "wait_for": lambda: stream.wait_for(1),
        "event": lambda: event.record(stream),
        "pinned": lambda: device.pinned(4),
        "second capture": lambda: stream.capture(lambda: None),
    }

    def work() -> None:
        with pytest.raises(GpuError):
            calls[what]()

    with pytest.raises(GpuError, match="the capture failed"):
        stream.capture(work)
    stream.synchronize()


def test_another_thread_may_allocate_while_one_captures(device: HostDevice) -> None:
    made: list[Any] = []

    def work() -> None:
        with device.activate():
            made.append(device.allocate(4, "a test"))

    def capture() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    device.stream().capture(capture)
    assert len(made) == 1


def test_memory_is_limited_and_counted(device: HostDevice) -> None:
    first = device.allocate(1 << 19, "the first")
    assert device.free_and_total() == (1 << 19, 1 << 20)
    with pytest.raises(DeviceMemoryError, match=r"for the second: 512.0 KiB asked for, 512.0 KiB of 1.0 MiB free"):
        device.allocate((1 << 19) + 1, "the second")
    second = device.allocate(1 << 19, "the second")
    assert device.allocated_bytes == 1 << 20
    first.close()
    assert device.allocated_bytes == 1 << 19
    del second
    gc.collect()
    assert device.allocated_bytes == 0
    unlimited = HostDevice()
    with unlimited.activate(), pytest.raises(DeviceMemoryError, match=r"for too much: 1073741824\.0 GiB asked for"):
        unlimited.allocate(1 << 60, "too much")


def test_closing_memory_waits_for_the_work_on_it(device: HostDevice) -> None:
    stream, memory, gate = device.stream(), device.allocate(4, "a test"), threading.Event()
    target = np.zeros(4, np.uint8)
    device.copy_in(memory.address, np.full(4, 9, np.uint8), stream)
    stream.submit(gate.wait)
    device.copy_out(target, memory.address, stream)
    threading.Timer(0.02, gate.set).start()
    memory.close()
    assert (target == 9).all()


def test_closed_memory_cannot_be_reached(device: HostDevice) -> None:
    stream, memory, pinned = device.stream(), device.allocate(4, "a test"), device.pinned(4)
    address = memory.address
    graph = stream.capture(lambda: device.copy_out(pinned, address, stream))
    memory.close()
    with pytest.raises(GpuError, match="no live allocation"):
        device.copy_out(pinned, address, stream)
    stream.synchronize()
    graph.launch(stream)
    with pytest.raises(DeviceLostError, match="no live allocation"):
        stream.synchronize()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 2), (0, 5), (3, 2), (4, 1)])
def test_copies_stay_in_an_allocation(device: HostDevice, offset: int, nbytes: int) -> None:
    stream, memory = device.stream(), device.allocate(4, "a test")
    with pytest.raises(GpuError, match="no live allocation"):
        device.copy_in(memory.address + offset, np.zeros(nbytes, np.uint8), stream)


def test_writing_beside_memory_is_noticed(device: HostDevice) -> None:
    for offset in (-1, 4):
        memory = device.allocate(4, "the boxes")
        ctypes.memset(memory.address + offset, 0, 1)
        with pytest.raises(GpuError, match="beside the memory of the boxes"):
            memory.close()


def test_failed_work_loses_the_device(device: HostDevice) -> None:
    stream, other, seen = device.stream(), device.stream(), list[int]()
    stream.submit(lambda: 1 // 0)
    stream.submit(seen.append, 1)
    for call in (stream.synchronize, other.synchronize, lambda: device.allocate(4, "a test")):
        with pytest.raises(DeviceLostError, match=r"ZeroDivisionError.*start again"):
            call()
    assert seen == []


def test_it_must_be_active(device: HostDevice) -> None:
    stream = device.stream()
    caught: list[str] = []

    def work() -> None:
        for call in (device.stream, stream.synchronize, lambda: device.allocate(4, "a test"), device.event):
            try:
                call()
            except GpuError as error:
                caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(caught) == 4
    assert all("not active on this thread" in message for message in caught)


def test_a_closed_stream_takes_no_work(device: HostDevice) -> None:
    stream = device.stream()
    worker = stream.worker
    stream.close()
    with pytest.raises(GpuError, match="closed"):
        stream.submit(print)
    worker.join(5)
    assert not worker.is_alive()
    forgotten = device.stream().worker
    gc.collect()
    forgotten.join(5)
    assert not forgotten.is_alive()


def test_memory_that_only_a_kernel_holds(device: HostDevice) -> None:
    stream = device.stream()
    memory = device.allocate(4, "a test")
    stream.submit(lambda kept: None, memory)
    del memory
    stream.synchronize()
    stream.synchronize()
    gc.collect()
    assert device.allocated_bytes == 0


def test_events_time_the_stream(device: HostDevice) -> None:
    stream, before, after = device.stream(), device.event(), device.event()
    gate = threading.Event()
    before.record(stream)
    stream.submit(gate.wait)
    after.record(stream)
    with pytest.raises(GpuError, match="not passed"):
        after.elapsed_ms(before)
    threading.Timer(0.03, gate.set).start()
    after.synchronize()
    assert 20 < after.elapsed_ms(before) < 5000
    assert after.elapsed_ms(before) == -before.elapsed_ms(after)


# frames


class Interface:
    """An object with a CUDA array interface, as given."""

    def __init__(self, **interface: Any) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (4, 5, 3),
            "data": (4096, True),
            "strides": None,
            **interface,
        }


class Tensor:
    """A host array that says it is on a GPU; its capsule is numpy's or torch's own."""

    def __init__(self, array: Any, device: tuple[int, int] = (2, 0), modern: bool = True) -> None:
        self.array = array
        self.device = device
        self.modern = modern
        self.streams: list[object] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, stream: object = None, **options: Any) -> object:
        if options and not self.modern:
            raise TypeError("unexpected max_version")
        self.streams.append(stream)
        return self.array.__dlpack__(**options)


@pytest.fixture
def stream(device: HostDevice) -> HostStream:
    return device.stream()


def read(frame: object, stream: HostStream, located: int | None = 0) -> DeviceFrame | None:
    return read_frame(frame, stream, 0, lambda address, index: located if index is None else index)


@pytest.mark.parametrize("version", [2, 3])
def test_an_interface_is_read(stream: HostStream, version: int) -> None:
    frame = Interface(version=version)
    found = read(frame, stream)
    assert found == DeviceFrame(4096, 15, (4, 5), 0, frame)
    assert found is not None
    assert found.owner is frame
    assert found.pixel_format == PixelFormat.BGR


@pytest.mark.parametrize(
    ("shape", "strides", "pitch"),
    [
        ((4, 5, 3), (32, 3, 1), 32),  # padded rows
        ((4, 5, 3), (15, 3, 1), 15),
        ((1, 5, 3), (-7, 3, 1), 15),  # one row: no stride from row to row
        ((4, 1, 3), (64, 99, 1), 64),  # one column: none from pixel to pixel
        ((1, 1, 3), (0, 0, 1), 3),
        ((3, 5, 3), (16, 3, 1), 16),  # three rows are no three planes
        ((4, 3, 3), None, 9),
    ],
)
def test_pitch(stream: HostStream, shape: tuple[int, ...], strides: tuple[int, ...] | None, pitch: int) -> None:
    found = read(Interface(shape=shape, strides=strides), stream)
    assert found is not None
    assert (found.pitch, found.frame_hw) == (pitch, shape[:2])


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        ({"shape": (3, 4, 5)}, r"\.permute\(1, 2, 0\)\.contiguous\(\)"),
        ({"shape": (1, 4, 5, 3)}, "detect_batch"),
        ({"shape": (4, 5)}, "uint8 HxWx3 BGR"),
        ({"shape": (4, 5, 4)}, "uint8 HxWx3 BGR"),
        ({"shape": ()}, "uint8 HxWx3 BGR"),
        ({"shape": (0, 5, 3)}, "empty"),
        ({"typestr": "<f4"}, "must be uint8.*float32"),
        ({"typestr": "|i1"}, "must be uint8.*int8"),
        ({"typestr": "|b1"}, "must be uint8.*bool"),
        ({"strides": (15, 3, -1)}, "contiguous"),
        ({"strides": (-15, 3, 1)}, "contiguous"),
        ({"strides": (3, 12, 1)}, "contiguous"),  # transposed
        ({"strides": (5, 1, 20)}, "contiguous"),  # permuted from CHW
        ({"strides": (14, 3, 1)}, "overlap"),
        ({"strides": (0, 3, 1)}, "overlap"),
        ({"strides": (15, 3)}, "cannot be read|version"),
        ({"version": 1}, "version 1"),
        ({"version": "x"}, "cannot be read"),
        ({"data": None}, "cannot be read"),
        ({"typestr": "nonsense"}, "cannot be read"),
        ({"mask": object()}, "masked"),
        ({"stream": 0}, "stream 0"),
        ({"stream": "x"}, "stream 'x'"),
    ],
)
def test_what_is_no_frame(stream: HostStream, interface: dict[str, Any], message: str) -> None:
    with pytest.raises(FrameError, match=message) as caught:
        read(Interface(**interface), stream)
    assert "\n" not in str(caught.value)


def test_another_gpu(stream: HostStream) -> None:
    with pytest.raises(FrameError, match="on GPU 1, the detector on GPU 0"):
        read(Interface(), stream, located=1)
    tensor = Tensor(np.zeros((4, 5, 3), np.uint8), (2, 3))
    with pytest.raises(FrameError, match="on GPU 3, the detector on GPU 0"):
        read(tensor, stream)
    assert tensor.streams == []  # nothing was asked of it: its GPU's stream is none of ours
    found = read(Interface(), stream, located=None)
    assert found is not None
    assert found.device_index is None


def test_each_plane_is_on_the_detectors_gpu(stream: HostStream) -> None:
    luma, chroma = Interface(shape=(4, 6), data=(4096, 0)), Interface(shape=(2, 6), data=(8192, 0))
    asked: list[tuple[int, int | None]] = []
    elsewhere = [0]

    def locate(address: int, index: int | None) -> int:
        asked.append((address, index))
        return int(address in elsewhere) if index is None else index

    for elsewhere[0] in (4096, 8192):
        with pytest.raises(FrameError, match="on GPU 1, the detector on GPU 0: copy it there first"):
            read_frame(Nv12Frame(luma, chroma), stream, 0, locate)
    elsewhere[0] = 0
    found = read_frame(Nv12Frame(luma, chroma), stream, 0, locate)
    assert found is not None
    assert found.device_index == 0
    assert asked[-2:] == [(4096, None), (8192, None)]
    asked.clear()
    luma.device_index = chroma.device_index = 0  # type: ignore[attr-defined]
    assert read_frame(Nv12Frame(luma, chroma), stream, 0, locate) == found
    assert asked == [(4096, 0), (8192, 0)]  # they know it themselves
    chroma.device_index = 2  # type: ignore[attr-defined]
    with pytest.raises(FrameError, match="on GPU 2"):
        read_frame(Nv12Frame(luma, chroma), stream, 0, locate)
    assert read_frame(Interface(), stream, None, lambda address, index: 7) is not None  # on none of them


def test_managed_memory_and_memory_of_the_host(stream: HostStream) -> None:
    """Kinds of DLPack's devices: 2 is CUDA, 13 its managed memory, which is read too; 1 and 3 are the host's."""
    pixels = np.zeros((4, 5, 3), np.uint8)
    for kind, expected in ((2, True), (13, True), (1, False), (3, False)):
        tensor = Tensor(pixels, (kind, 0))
        assert (read(tensor, stream) is not None) == expected
        assert len(tensor.streams) == expected
    with pytest.raises(FrameError, match=r"DLPack calls it 14\): copy it first"):
        read(Tensor(pixels, (14, 0)), stream)


class Capsule(Tensor):
    """A tensor whose capsule is changed before it is handed out, or something else."""

    def __init__(self, array: Any, change: Any, version: bool = False) -> None:
        super().__init__(array)
        self.change = change
        self.version = version

    def __dlpack__(self, stream: object = None, **options: Any) -> object:
        capsule = self.array.__dlpack__(max_version=(1, 0)) if self.version else self.array.__dlpack__()
        return self.change(capsule)


def _pointer(capsule: object, name: bytes) -> int:
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    return int(get(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, name))


def test_capsules_of_other_kinds(stream: HostStream) -> None:
    pixels = np.zeros((4, 5, 3), np.uint8)

    def poke(offset: int, kind: Any, value: int) -> Any:
        def change(capsule: object) -> object:
            kind.from_address(_pointer(capsule, b"dltensor") + offset).value = value
            return capsule

        return change

    for code, bits, lanes, name in ((1, 16, 1, "uint16"), (4, 16, 1, "bfloat16"), (1, 8, 4, "uint8x4"), (9, 8, 1, "9")):
        tensor = Capsule(pixels, lambda capsule: capsule)

        def change(capsule: object, code: int = code, bits: int = bits, lanes: int = lanes) -> object:
            poke(20, ctypes.c_uint8, code)(capsule)
            poke(21, ctypes.c_uint8, bits)(capsule)
            return poke(22, ctypes.c_uint16, lanes)(capsule)

        tensor.change = change
        with pytest.raises(
            FrameError, match=f"must be uint8 with values 0..255, got .*{name if code < 9 else 'DLPack'}"
        ):
            read(tensor, stream)
    for strange in (None, object(), "capsule"):
        with pytest.raises(FrameError, match="gave no DLPack capsule"):
            read(Capsule(pixels, lambda capsule, strange=strange: strange), stream)

    def newer(capsule: object) -> object:
        ctypes.c_uint32.from_address(_pointer(capsule, b"dltensor_versioned")).value = 2
        return capsule

    with pytest.raises(FrameError, match=r"comes as DLPack 2\.\d+, and 1\.x is known"):
        read(Capsule(pixels, newer, version=True), stream)


def test_what_a_frame_raises_is_one_line_that_names_it(stream: HostStream) -> None:
    class Broken:
        def __init__(self, error: Exception) -> None:
            self.error = error

        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            raise self.error

    class Refusing(Tensor):
        def __dlpack__(self, stream: object = None, **options: Any) -> object:
            raise self.array

    for kind in (Broken, Refusing):
        for error, text in (
            (KeyError("a\nb"), r"'a\\nb'"),
            (ValueError("x\n y " * 200), "x y x"),
            (OSError(), "OSError"),
        ):
            with pytest.raises(FrameError, match=rf"a {kind.__name__} cannot be read as a frame: {text}") as caught:
                read(kind(error), stream)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 260


def test_a_producer_that_takes_no_version_is_asked_again(stream: HostStream) -> None:
    asked: list[dict[str, Any]] = []

    class Old(Tensor):
        def __dlpack__(self, **options: Any) -> object:
            asked.append(options)
            return super().__dlpack__(**options)

    assert read(Old(np.zeros((4, 5, 3), np.uint8), modern=False), stream) is not None
    assert asked == [{"stream": stream.handle, "max_version": (1, 0)}, {"stream": stream.handle}]
    asked.clear()
    assert read(Old(np.zeros((4, 5, 3), np.uint8)), stream) is not None
    assert asked == [{"stream": stream.handle, "max_version": (1, 0)}]


def test_interfaces_without_what_may_be_left_out(stream: HostStream) -> None:
    frame = Interface()
    del frame.__cuda_array_interface__["strides"]
    found = read(frame, stream)
    assert found == DeviceFrame(4096, 15, (4, 5), 0, frame)
    for key in ("shape", "typestr", "data", "version"):
        other = Interface()
        del other.__cuda_array_interface__[key]
        with pytest.raises(FrameError, match=rf"__cuda_array_interface__ cannot be read: '{key}'"):
            read(other, stream)
    frame.__cuda_array_interface__ = None  # type: ignore[assignment]
    assert read(frame, stream) is None
    assert read(Interface(mask=None), stream) is not None
    assert read(Interface(version=4), stream) is not None


def test_the_producers_stream_comes_first(device: HostDevice) -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    for version, waits in ((3, True), (2, False)):
        producer, consumer, gate = device.stream(), device.stream(), threading.Event()
        seen: list[str] = []
        producer.submit(gate.wait)
        producer.submit(seen.append, "made")
        frame = Interface(stream=producer.handle, version=version)
        assert read(frame, consumer) is not None
        consumer.submit(seen.append, "read")
        if not waits:
            consumer.synchronize()
        threading.Timer(0.01, gate.set).start()
        producer.synchronize()
        consumer.synchronize()
        assert seen == (["made", "read"] if waits else ["read", "made"])
    found = device.frame(HostArray(pixels, stream=1), device.stream())
    assert found is not None
    assert found.address == pixels.ctypes.data


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_dlpack_tensor_is_read(stream: HostStream, library: str, modern: bool) -> None:
    pixels = np.zeros((6, 9, 3), np.uint8)[1:5, 2:7]
    array: Any = pixels
    if library == "torch":
        array = pytest.importorskip("torch").from_numpy(pixels)
    tensor = Tensor(array, modern=modern)
    found = read(tensor, stream)
    assert found is not None
    assert (found.address, found.pitch, found.frame_hw, found.device_index) == (pixels.ctypes.data, 27, (4, 5), 0)
    assert tensor.streams == [stream.handle]


def test_an_offset_and_no_strides(stream: HostStream) -> None:
    """DLPack allows both; numpy and torch write neither."""

    class Odd(Tensor):
        def __dlpack__(self, stream: object = None, **options: Any) -> object:
            capsule = self.array.__dlpack__()
            pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
                ("PyCapsule_GetPointer", ctypes.pythonapi)
            )(capsule, b"dltensor")
            ctypes.c_void_p.from_address(pointer + 32).value = None  # strides
            ctypes.c_uint64.from_address(pointer + 40).value = 30  # byte_offset
            return capsule

    pixels = np.zeros((4, 5, 3), np.uint8)
    found = read(Odd(pixels), stream)
    assert found is not None
    assert (found.address, found.pitch, found.frame_hw) == (pixels.ctypes.data + 30, 15, (4, 5))


@pytest.mark.parametrize("modern", [True, False])
def test_the_owner_keeps_a_tensor_alive_and_no_longer(stream: HostStream, modern: bool) -> None:
    memory = np.full((4, 5, 3), 9, np.uint8)
    freed: list[int] = []
    weakref.finalize(memory, freed.append, 1)
    found = read(Tensor(memory, modern=modern), stream)
    del memory
    gc.collect()
    assert found is not None
    assert freed == []
    del found
    gc.collect()
    assert freed == [1]


def test_a_refused_tensor_is_let_go(stream: HostStream) -> None:
    memory = np.zeros((3, 4, 5), np.uint8)
    freed: list[int] = []
    weakref.finalize(memory, freed.append, 1)
    tensor = Tensor(memory)
    del memory
    with pytest.raises(FrameError, match="permute"):
        read(tensor, stream)
    del tensor
    gc.collect()
    assert freed == [1]


def test_tensors_of_other_kinds(stream: HostStream) -> None:
    torch = pytest.importorskip("torch")
    for kind in ("float32", "float16", "bfloat16", "int8", "int64", "bool", "complex64"):
        with pytest.raises(FrameError, match=rf"must be uint8 with values 0\.\.255, got {kind}8? of shape \(4, 5, 3\)"):
            read(Tensor(torch.zeros(4, 5, 3, dtype=getattr(torch, kind))), stream)
    with pytest.raises(FrameError, match=r"\.permute"):
        read(Tensor(torch.zeros(3, 4, 5, dtype=torch.uint8)), stream)
    with pytest.raises(FrameError, match="contiguous"):
        read(Tensor(torch.zeros(3, 4, 5, dtype=torch.uint8).permute(1, 2, 0)), stream)
    with pytest.raises(FrameError, match="grad"):
        read(Tensor(torch.zeros(4, 5, 3, requires_grad=True)), stream)
    with pytest.raises(FrameError, match="not CUDA's"):
        read(Tensor(torch.zeros(4, 5, 3, dtype=torch.uint8), (10, 0)), stream)


def test_what_is_on_the_host_is_no_device_frame(device: HostDevice, stream: HostStream) -> None:
    torch = pytest.importorskip("torch")
    pixels = np.zeros((4, 5, 3), np.uint8)
    for frame in (pixels, torch.from_numpy(pixels), Tensor(pixels, (3, 0)), pixels.tolist(), None, np.ndarray, Tensor):
        assert read(frame, stream) is None
        assert device.frame(frame, stream) is None


def test_the_cpu_takes_host_arrays_alone(device: HostDevice, stream: HostStream) -> None:
    pixels = np.zeros((6, 9, 3), np.uint8)[1:5, 2:7]
    found = device.frame(HostArray(pixels), stream)
    assert found is not None
    assert (found.address, found.pitch, found.frame_hw) == (pixels.ctypes.data, 27, (4, 5))
    assert device.frame(Interface(), stream) is None
    with pytest.raises(FrameError, match="contiguous"):
        device.frame(HostArray(pixels[::-1]), stream)


@pytest.mark.parametrize("pairs", [False, True])
def test_nv12(device: HostDevice, stream: HostStream, pairs: bool) -> None:
    luma, chroma = np.zeros((4, 8), np.uint8)[:, :6], np.zeros((2, 10), np.uint8)[:, :6]
    frame = Nv12Frame(HostArray(luma), HostArray(chroma.reshape(2, 3, 2) if pairs else chroma), "bt601")
    found = device.frame(frame, stream)
    assert found is not None
    assert (found.address, found.pitch, found.frame_hw) == (luma.ctypes.data, 8, (4, 6))
    assert found.pixel_format == PixelFormat.NV12_BT601
    if not pairs:
        assert (found.chroma_address, found.chroma_pitch) == (chroma.ctypes.data, 10)


@pytest.mark.parametrize(
    ("luma", "chroma", "message"),
    [
        ({"shape": (5, 6)}, {"shape": (2, 6)}, "even sides"),
        ({"shape": (4, 5)}, {"shape": (2, 5)}, "even sides"),
        ({"shape": (4, 6, 1)}, {"shape": (2, 6)}, "even sides"),
        ({"shape": (4, 6)}, {"shape": (2, 3)}, r"chroma must be \(2, 6\) or \(2, 3, 2\), got uint8 of shape \(2, 3\)"),
        ({"shape": (4, 6)}, {"shape": (4, 6)}, "chroma must be"),
        ({"shape": (4, 6)}, {"shape": (2, 6), "typestr": "<f2"}, "chroma must be uint8"),
        ({"shape": (4, 6), "strides": (6, 2)}, {"shape": (2, 6)}, "rows of luma"),
        ({"shape": (4, 6)}, {"shape": (2, 3, 2), "strides": (6, 1, 3)}, "rows of chroma"),
    ],
)
def test_what_is_no_nv12(stream: HostStream, luma: dict[str, Any], chroma: dict[str, Any], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        read(Nv12Frame(Interface(**luma), Interface(**chroma)), stream)


def test_nv12_of_every_matrix(stream: HostStream) -> None:
    planes = Interface(shape=(4, 6)), Interface(shape=(2, 3, 2), data=(8192, 0))
    for matrix in ("bt601", "bt601_full", "bt709", "bt709_full"):
        found = read(Nv12Frame(*planes, matrix), stream)  # type: ignore[arg-type]
        assert found is not None
        assert (found.pixel_format, found.pitch, found.chroma_pitch) == (PixelFormat[f"NV12_{matrix.upper()}"], 6, 6)
        assert found.owner == planes
        assert (found.address, found.chroma_address) == (4096, 8192)
    assert Nv12Frame(*planes).matrix == "bt709"
    for matrix in ("", "BT709", "nv12_bt709"):
        with pytest.raises(FrameError, match="is one of bt601, bt601_full, bt709, bt709_full, not"):
            Nv12Frame(*planes, matrix)  # type: ignore[arg-type]


def test_nv12_on_the_host_and_of_unknown_colours(device: HostDevice, stream: HostStream) -> None:
    pixels = HostArray(np.zeros((4, 6), np.uint8))
    for luma, chroma in ((pixels, np.zeros((2, 6), np.uint8)), (np.zeros((4, 6), np.uint8), pixels)):
        with pytest.raises(FrameError, match="two arrays on the device, and these are not"):
            device.frame(Nv12Frame(luma, chroma), stream)
        with pytest.raises(FrameError, match="two arrays on the device, and these are not"):
            read(Nv12Frame(luma, chroma), stream)
    with pytest.raises(FrameError, match="two arrays on the device"):
        read(Nv12Frame(np.zeros((4, 6), np.uint8), Interface(shape=(2, 6))), stream)
    with pytest.raises(FrameError, match="bt709"):
        Nv12Frame(None, None, "bt2020")  # type: ignore[arg-type]
