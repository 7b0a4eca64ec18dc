"""TRTRetinaFace while a device fails: every fault is one error of its own type, nothing hangs, and `close` works.

On the simulated device, and on the fake driver (fake_cuda.c) under the real cuda.bindings, in processes of their own.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from facespec.errors import DeviceLostError, DriverGoneError
from tests.trt_runtime import faults
from tests.trt_runtime.test_cuda_api_surface import fake, run
from trt_runtime.gpu.simulated import HostDevice

__all__ = ["fake"]

WAYS = list(vars(faults.WAYS))
CALLED = ("cuStreamSynchronize", "cuGraphLaunch", "cuMemcpyHtoDAsync", "cuCtxPopCurrent")
"""What calls need; the second one fails, whatever overlaps."""
MADE = ("cuStreamCreate", "cuMemAlloc", "cuMemHostAlloc", "cuStreamBeginCapture", "cuGraphInstantiate")
"""What new lanes need; the first one fails."""


def through(fake: Path, way: str, settings: list[str], last: bool = False) -> list[tuple[Counter[str], str, str]]:
    """Return for each fault what came of the calls, of a new detector beside the old one, and of one after it.

    Args:
        fake: Folder of the driver.
        way: One of `WAYS`.
        settings: Values of FAKE_CUDA_FAIL.
        last: The driver does not come back: nothing can be freed.
    """
    code = f"""
import faulthandler, gc, json
faulthandler.dump_traceback_later(120, exit=True)
from tests.trt_runtime import faults
def fail(setting):
    os.environ["FAKE_CUDA_FAIL"] = setting
for setting in {settings!r}:
    device = open_device()
    detector = faults.open_detector(device)
    assert faults.detect(detector) == "ok"
    with detector._lane():  # the one that there is: the calls make others, whatever overlaps
        found = faults.WAYS.{way}(detector, lambda: fail(setting))
    faults.close(detector)
    beside = faults.in_time(lambda: faults.outcome(lambda: faults.open_detector(device).close()))
    fail("")
    del detector.engine, detector
    device.close()
    del device
    gc.collect()
    print(json.dumps([found, beside, faults.outcome(lambda: faults.open_detector(open_device()).close())]))
    gc.collect()
    assert {last} or live(0) == 0, (setting, live(0))
"""
    return [(Counter(found), beside, after) for found, beside, after in map(json.loads, run(fake, code).splitlines())]


@pytest.mark.parametrize("way", WAYS)
def test_a_kernel_with_an_illegal_address(fake: Path, way: str) -> None:
    """All calls fail from then on, also in a new detector; one in a new context, where there can be one, works."""
    settings = [f"{name}=700@2!" for name in CALLED] + [f"{name}=700@1!" for name in MADE]
    for setting, (found, beside, after) in zip(settings, through(fake, way, settings), strict=True):
        assert found.pop("KernelFaultError", 0), (setting, found, beside, after)
        assert set(found) <= {"ok"}, (setting, found)
        assert (beside, after) == ("KernelFaultError", "ok"), setting


@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_that_is_lost(fake: Path, way: str) -> None:
    for found, beside, after in through(fake, way, ["cuStreamSynchronize=214@3!", "cuGraphLaunch=46@2!"]):
        assert found.pop("DeviceLostError")
        assert set(found) <= {"ok"}
        assert (beside, after) == ("DeviceLostError", "ok")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", ["cuStreamSynchronize=4@3!!", "cuCtxPushCurrent=4@5!!", "cuMemAlloc=3@1!!"])
def test_a_driver_that_goes_away(fake: Path, way: str, fault: str) -> None:
    ((found, beside, after),) = through(fake, way, [fault], last=True)
    assert found.pop("DriverGoneError")
    assert set(found) <= {"ok"}
    assert beside == after == "DriverGoneError"


def test_a_call_that_fails_once_costs_a_lane_and_no_more(fake: Path) -> None:
    names = [name for name in (*CALLED, "cuStreamCreate", "cuCtxPushCurrent") if name != "cuCtxPopCurrent"]
    settings = [f"{name}=1@1" for name in names]
    for setting, (found, beside, after) in zip(settings, through(fake, "threads", settings), strict=True):
        assert found == Counter(ok=4 * faults.CALLS - 1, GpuError=1), setting
        assert beside == after == "ok"


def test_what_failed_first_is_what_is_raised(fake: Path) -> None:
    code = """
device = open_device()
try:
    with device.activate():
        os.environ["FAKE_CUDA_FAIL"] = "cuCtxPopCurrent=4"
        raise KeyError("first")
except KeyError as error:
    print(error, ctypes.CDLL("libcuda.so.1").fake_cuda_depth())
"""
    assert run(fake, code) == "'first' 0\n"


def test_a_batch_that_does_not_fit(fake: Path) -> None:
    """Others go on meanwhile, and so does the thread of the batch."""
    code = """
import faulthandler, numpy as np
faulthandler.dump_traceback_later(120, exit=True)
from tests.trt_runtime import faults
os.environ["FAKE_CUDA_MEMORY"] = str(12 << 20)
detector = faults.open_detector(open_device(), size_hw=None)
large = [np.zeros((640, 640, 3), np.uint8)] * 8
found = []
threads = [faults.threading.Thread(target=lambda: found.append(faults.by_threads(detector, lambda: None)))]
threads[0].start()
for _ in range(5):
    print(faults.outcome(lambda: detector.detect_batch(large)), faults.detect(detector))
threads[0].join(faults.LIMIT_S)
print(*found)
faults.close(detector)
"""
    lines = run(fake, code).splitlines()
    assert lines == ["DeviceMemoryError ok"] * 5 + [str(Counter(ok=4 * faults.CALLS))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", [None, DeviceLostError("the bus"), DriverGoneError("shut down")])
def test_the_simulated_device(way: str, fault: DeviceLostError | None) -> None:
    device = HostDevice(delay_s=1e-4)
    detector = faults.open_detector(device)
    assert faults.detect(detector) == "ok"
    name = type(fault).__name__ if fault else "KernelFaultError"

    def fail() -> None:
        if fault:
            return device.lose(fault)
        with device.activate():
            stream = device.stream()
            stream.submit(device.view, 16, 4)  # an illegal address
            stream.drain()
        return None

    found = getattr(faults.WAYS, way)(detector, fail)
    assert found.pop(name)
    assert set(found) <= {"ok"}
    faults.close(detector)
    assert faults.outcome(lambda: faults.open_detector(device)) == name
    assert device.allocated_bytes == 0
    assert faults.outcome(lambda: faults.open_detector(HostDevice()).close()) == "ok"
    device.close()


def test_a_stream_that_is_closed_while_another_thread_waits_for_it() -> None:
    device = HostDevice()
    with device.activate():
        stream: Any = device.stream()
    queue = stream._queue

    def put(item: object) -> None:
        stream.close()  # the other thread is a moment faster
        queue.put(item)

    stream._queue = SimpleNamespace(put=put)
    assert faults.in_time(lambda: stream.drain() or "done") == "done"


def test_memory_may_go_while_streams_are_closed() -> None:
    """Each release waits for the work of all streams, of which another thread closes some meanwhile."""
    device = HostDevice()

    def work() -> str:
        with device.activate():
            for _ in range(200):
                memory, stream = device.allocate(4, "a test"), device.stream()
                stream.submit(np.zeros, 4)
                stream.close()
                memory.close()
        return "ok"

    threads = [threading.Thread(target=work) for _ in range(4)]

    def all_threads() -> int:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return device.allocated_bytes

    assert faults.in_time(all_threads) == 0
    device.close()
