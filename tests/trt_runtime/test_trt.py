"""TRTRetinaFace through the device interface on the CPU: the same classes as on a GPU, with another device and engine.

The device runs its streams on threads of their own, fills new memory with rubbish, and starts every piece of work late
where a test asks for that, so that what is read too early shows.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from export.to_trt import EngineOptions, Profile, build_engine
from facespec.detections import Detections
from facespec.errors import (
    ClosedError,
    DeviceLostError,
    DeviceMemoryError,
    FrameError,
    GpuError,
    ModelFileError,
    NonFiniteError,
    SpecError,
)
from facespec.letterbox import Frame, Letterbox
from tests.conftest import ROOT
from tests.engines import write_engine
from tests.faces import assert_identical
from tests.trt_runtime.fake_tensorrt import FakeGpu
from tests.trt_runtime.side_streams import go_through
from tests.trt_runtime.spoilt import with_nan
from trt_runtime import Nv12Frame, OrtRetinaFace, TRTRetinaFace, load_detector
from trt_runtime.gpu.engine import check_runs_here
from trt_runtime.gpu.sidecar import read_sidecar
from trt_runtime.gpu.simulated import HostArray, HostDevice, HostEngine, HostStream
from trt_runtime.kernels import FRAME
from trt_runtime.measure import StageTimer
from trt_runtime.trt import GRAPHS, PINNED_FRAMES

LATE_S = 0.002


def _assert_same(found: Detections, expected: Detections) -> None:
    """Assert equal faces, up to rounding: ONNX Runtime may sum in another order in a batch."""
    assert found.frame_hw == expected.frame_hw
    assert len(found) == len(expected)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=2e-3)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=2e-3)


def _plans(detector: TRTRetinaFace) -> list:  # type: ignore[type-arg]
    """Return what the idle lanes keep for each shape."""
    return [plan for lane in detector._idle for plan in lane._plans._values.values()]  # type: ignore[attr-defined]


@pytest.fixture
def device() -> Iterator[HostDevice]:
    device = HostDevice(delay_s=LATE_S)
    yield device
    assert device.allocated_bytes == 0
    device.close()


@pytest.fixture(scope="module")
def frames(crowd: Frame, photographs: dict[str, Frame]) -> list[Frame]:
    """Frames of many sizes: one without a face, one that is a crop of another, one larger than the network."""
    astronaut = photographs["astronaut"]
    return [
        astronaut,
        crowd,
        np.full((70, 130, 3), 90, np.uint8),
        cv2.resize(astronaut, (320, 320)),
        np.asarray(cv2.resize(astronaut, (700, 620)), np.uint8),
        astronaut[:400, 100:333],
    ]


def test_frames_of_every_size_in_every_slot(device: HostDevice, plugin_form: Path, frames: list[Frame]) -> None:
    """Against ONNX Runtime with cv2's letterbox; more frames than fit into one batch."""
    expected = [OrtRetinaFace(plugin_form, size_hw=(320, 320)).detect(frame) for frame in frames]
    assert [len(found) for found in expected] == [1, 3, 0, 1, 1, 1]
    with TRTRetinaFace(plugin_form, size_hw=(320, 320), device=device) as detector:
        assert detector.max_batch == 8
        for order in ([*range(6)], [5, 4, 3, 2, 1, 0, 0, 1, 2, 2, 1], [1], []):
            for index, found in zip(order, detector.detect_batch([frames[i] for i in order]), strict=True):
                _assert_same(found, expected[index])


@pytest.mark.parametrize("size", [(192, 480), 320, None])
def test_sizes_of_the_network(device: HostDevice, plugin_form: Path, frames: list[Frame], size: object) -> None:
    plain = OrtRetinaFace(plugin_form, size_hw=size)  # type: ignore[arg-type]
    with TRTRetinaFace(plugin_form, size_hw=size, device=device) as detector:  # type: ignore[arg-type]
        for frame, found in zip(frames, detector.detect_batch(frames), strict=True):
            _assert_same(found, plain.detect(frame))


def test_frames_on_the_device_are_read_where_they_are(
    device: HostDevice, plugin_form: Path, frames: list[Frame]
) -> None:
    with TRTRetinaFace(plugin_form, size_hw=(320, 320), device=device) as detector:
        expected = detector.detect_batch(frames)
        mixed = [HostArray(frame) if index % 2 else frame for index, frame in enumerate(frames)]
        for found, want in zip(detector.detect_batch(mixed), expected, strict=True):
            _assert_same(found, want)
    with TRTRetinaFace(plugin_form, size_hw=(320, 320), device=device) as detector:
        before = device.allocated_bytes
        for frame, want in zip(frames, expected, strict=True):
            _assert_same(detector.detect(HostArray(frame)), want)
        assert device.allocated_bytes == before  # no room was made for a copy
        image = frames[0].copy()
        first = detector.detect(HostArray(image))
        image[:] = 90  # the same array, the same graph, another content
        assert len(first) == 1
        assert len(detector.detect(HostArray(image))) == 0


def test_nv12_of_a_hardware_decoder(device: HostDevice, plugin_form: Path, astronaut: Frame) -> None:
    height, width = astronaut.shape[:2]
    planar = cv2.cvtColor(astronaut, cv2.COLOR_BGR2YUV_I420).reshape(-1)
    luma = planar[: height * width].reshape(height, width)
    chroma = np.stack(np.split(planar[height * width :], 2), axis=-1).reshape(height // 2, width)
    decoded = cv2.cvtColor(np.vstack([luma, chroma]), cv2.COLOR_YUV2BGR_NV12)
    with TRTRetinaFace(plugin_form, size_hw=(320, 320), device=device) as detector:
        found = detector.detect(Nv12Frame(HostArray(luma), HostArray(chroma), "bt601"))
        expected = detector.detect(np.asarray(decoded, np.uint8))
    assert len(found) == len(expected) == 1
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.3)


def _images(device: HostDevice, detector: TRTRetinaFace) -> Frame:
    """Return what the network was last given, by the one idle lane with one shape: (B, H, W, 3)."""
    (plan,) = _plans(detector)
    shape = (*plan._shape, 3)
    return device.view(plan._images, int(np.prod(shape))).reshape(shape).copy()


NV12 = {
    "bt601": (0.299, 0.114, False),
    "bt601_full": (0.299, 0.114, True),
    "bt709": (0.2126, 0.0722, False),
    "bt709_full": (0.2126, 0.0722, True),
}
"""Red's and blue's part of luma, and whether values go from 0 to 255: ITU-R BT.601 and BT.709."""


def _bgr(luma: Frame, chroma: Frame, matrix: str) -> Frame:
    """Return an NV12 frame, chroma (H/2, W/2, 2), as the two recommendations have it."""
    red, blue, full = NV12[matrix]
    light = luma.astype(float) / 255 if full else (luma.astype(float) - 16) / 219
    pairs = (chroma.astype(float) - 128) / (255 if full else 224)
    u, v = (np.kron(pairs[..., index], np.ones((2, 2))) for index in (0, 1))
    b, r = light + 2 * (1 - blue) * u, light + 2 * (1 - red) * v
    g = (light - red * r - blue * b) / (1 - red - blue)
    return np.clip(np.rint(255 * np.stack([b, g, r], axis=-1)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("matrix", [*NV12, ""])
def test_the_colours_of_nv12(device: HostDevice, plugin_form: Path, matrix: str) -> None:
    """For every matrix, with planes inside wider arrays, the network's input has the colours of the formulas."""
    random = np.random.default_rng(3)
    luma = random.integers(60, 180, (64, 107), np.uint8)[:, 3:99]
    chroma = random.integers(110, 146, (32, 120), np.uint8)[:, 10:106]
    frame = Nv12Frame(HostArray(luma), HostArray(chroma), *([matrix] if matrix else []))  # type: ignore[arg-type]
    with TRTRetinaFace(plugin_form, size_hw=(64, 96), device=device, graphs=False, warm_up=False) as detector:
        assert len(detector.detect(frame)) == 0
        found = _images(device, detector)[0].astype(int)
    pairs = chroma.reshape(32, 48, 2)
    errors = {name: np.abs(found - _bgr(luma, pairs, name)).max() for name in NV12}
    assert min(errors, key=errors.__getitem__) == (matrix or "bt709")
    assert errors[matrix or "bt709"] <= 2
    assert sorted(errors.values())[1] > 4


def test_frames_keep_their_slots_and_their_pitch(device: HostDevice, plugin_form: Path) -> None:
    """Frames of the host, of the device, in wider arrays, and NV12 in one batch: each letterboxed into its own slot."""
    wide = np.random.default_rng(4).integers(0, 256, (70, 400, 3), np.uint8)
    grey = np.full((64, 96), 126, np.uint8)
    nv12 = Nv12Frame(HostArray(grey), HostArray(np.full((32, 96), 128, np.uint8)), "bt601_full")
    frames = [wide[:64, :96], HostArray(wide[3:67, 100:196]), nv12, wide[6:, 300:397], HostArray(wide[:33, 7:40])]
    with TRTRetinaFace(plugin_form, size_hw=(64, 96), device=device, graphs=False, warm_up=False) as detector:
        for order in ([0, 1, 2, 3, 4], [4, 2, 3, 0, 1]):
            detector.detect_batch([frames[index] for index in order])
            found = _images(device, detector)
            for slot, index in enumerate(order):
                pixels = [wide[:64, :96], wide[3:67, 100:196], grey[..., None].repeat(3, 2), wide[6:, 300:397]]
                frame = [*pixels, wide[:33, 7:40]][index]
                box = Letterbox.place(frame.shape[:2], (64, 96))
                wanted = box.apply(np.ascontiguousarray(frame), detector.spec.preprocess.mean_bgr)
                assert np.abs(found[slot].astype(int) - wanted).max() <= 1, (slot, index)


def test_a_copy_on_the_device(device: HostDevice, plugin_form: Path, astronaut: Frame) -> None:
    with TRTRetinaFace(plugin_form, size_hw=(160, 160), device=device) as detector:
        expected = detector.detect(astronaut)
        streams = len(device._streams)
        source = astronaut.copy()
        copied = detector.to_device(source)
        source[:] = 90  # the copy is made already
        assert_identical(detector.detect(copied), expected)
        assert (copied.shape, copied.device_index) == ((512, 512, 3), None)
        assert copied.__cuda_array_interface__ == {
            "shape": (512, 512, 3),
            "typestr": "|u1",
            "data": (copied._memory.address, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }
        assert copied._memory.nbytes == astronaut.size
        slanted = astronaut[::2, ::-1]
        held = detector.to_device(slanted)
        assert held.shape == slanted.shape
        content = device.view(held._memory.address, slanted.size).reshape(slanted.shape)
        np.testing.assert_array_equal(content, slanted)
        assert len(device._streams) == streams
        with pytest.raises(FrameError, match="GRAY2BGR"):
            detector.to_device(astronaut[..., 0])
        held = copied = None  # type: ignore[assignment]
    small = HostDevice(memory_limit=1 << 20)
    with TRTRetinaFace(plugin_form, size_hw=(64, 64), device=small) as detector:
        with pytest.raises(DeviceMemoryError, match=r"for a frame of 1000x500: 1\.4 MiB asked for"):
            detector.to_device(np.zeros((500, 1000, 3), np.uint8))
        numbered: Any = FakeGpu(small)
        numbered.index = 5
        detector.device = numbered
        assert detector.to_device(np.zeros((8, 8, 3), np.uint8)).device_index == 5
        detector.device = small


def test_what_makes_a_frame_is_waited_for(device: HostDevice, plugin_form: Path, astronaut: Frame) -> None:
    with TRTRetinaFace(plugin_form, size_hw=(160, 160), device=device) as detector:
        expected = detector.detect(astronaut)
        with device.activate():
            producer = device.stream()
        image = np.zeros_like(astronaut)
        with device.activate():
            for _ in range(5):
                producer.submit(len, "")
            producer.submit(np.copyto, image, astronaut)
        assert_identical(detector.detect(HostArray(image, stream=producer.handle)), expected)
        luma, chroma = np.zeros((64, 96), np.uint8), np.zeros((32, 96), np.uint8)
        detector.size_hw = (64, 96)
        detector.detect(astronaut)
        for late in (luma, chroma):
            luma[:], chroma[:] = 30, 128
            with device.activate():
                for _ in range(5):
                    producer.submit(len, "")
                producer.submit(late.fill, 200)
            handle = producer.handle
            parts = (HostArray(plane, stream=handle if plane is late else None) for plane in (luma, chroma))
            detector.detect(Nv12Frame(*parts, "bt601_full"))
            plan = next(plan for plan in _plans(detector) if plan._shape == (1, 64, 96))
            pixel = device.view(plan._images, 3)
            assert pixel[1] > 150 if late is luma else pixel[1] < 10  # green: bright, or gone


def test_frames_on_a_side_stream_are_read_after_it(device: HostDevice) -> None:
    """The stream is current on the caller's thread alone: whichever thread runs the network must wait for it."""

    def delay(stream: HostStream) -> None:
        for _ in range(8):
            stream.submit(len, "")

    assert list(go_through(device, delay=delay))[1::2] == [
        (name, True) for name in ("detect", "detect_batch", "stream", "pipeline")
    ]


def test_frames_live_until_they_are_read_and_no_longer(device: HostDevice, plugin_form: Path) -> None:
    """Both planes of an NV12 frame are kept while they are read, and not longer."""
    planes = [np.zeros((64, 96), np.uint8), np.zeros((32, 96), np.uint8)]
    owners = [HostArray(plane) for plane in planes]
    alive = [weakref.ref(owner) for owner in owners]
    with device.activate():
        found = device.frame(Nv12Frame(*owners), device.stream())
    del owners
    assert found is not None
    assert [ref() is not None for ref in alive] == [True, True]
    del found
    assert [ref() for ref in alive] == [None, None]
    with TRTRetinaFace(plugin_form, size_hw=(64, 96), device=device, warm_up=False) as detector:
        frame = HostArray(np.zeros((64, 96, 3), np.uint8))
        forgotten = weakref.ref(frame)
        detector.detect(frame)
        del frame
        assert forgotten() is None


class Liar:
    """A frame on the device whose shape is not that of its memory."""

    shape = (64, 96, 3)

    def __init__(self) -> None:
        self.__cuda_array_interface__ = HostArray(np.zeros((32, 96, 3), np.uint8)).__cuda_array_interface__


def test_after_an_error_nothing_runs_on(plugin_form: Path, astronaut: Frame) -> None:
    """The next call uses the same lane, and the caller may free its frames: no work may be left on the stream."""
    device = HostDevice(delay_s=LATE_S)
    done: list[int] = []
    copy_in = device.copy_in

    def counted(*arguments: Any) -> None:
        copy_in(*arguments)
        arguments[-1].submit(done.append, 1)

    device.copy_in = counted  # type: ignore[method-assign]
    device._holds = lambda plane: isinstance(plane, (HostArray, Liar))  # type: ignore[method-assign]
    with TRTRetinaFace(plugin_form, size_hw=(64, 96), device=device) as detector:
        (lane,) = detector._idle
        for _ in range(2):
            done.clear()
            with pytest.raises(FrameError, match=r"the frame says it is \(64, 96\), and it is \(32, 96\)"):
                detector.detect_batch([astronaut, astronaut[:300], Liar()])
            assert done == []  # before anything is begun
            with pytest.raises(FrameError, match="sides must be 1 to 16384"):
                detector.detect_batch([astronaut, astronaut[:300], np.zeros((2, 16385, 3), np.uint8)])
            assert len(done) == 3
        assert detector._idle == [lane]
    device.close()


def test_an_error_of_a_lost_device_is_the_first_one(plugin_form: Path, astronaut: Frame) -> None:
    device = HostDevice()
    detector = TRTRetinaFace(plugin_form, size_hw=(64, 64), device=device)
    with device.activate():
        stream = device.stream()
        stream.submit(lambda: 1 // 0)
        stream.drain()
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="ZeroDivisionError"):
            detector.detect(astronaut)
    detector.close()
    assert device.allocated_bytes == 0  # of a lost device too


@pytest.mark.parametrize(("size", "shape"), [((64, 96), (1, 64, 96)), (None, (1, 640, 640)), (320, (1, 640, 640))])
def test_it_is_warm_when_it_is_made(device: HostDevice, plugin_form: Path, size: object, shape: object) -> None:
    with TRTRetinaFace(plugin_form, size_hw=size, device=device) as detector:  # type: ignore[arg-type]
        (plan,) = _plans(detector)
        assert plan._shape == shape
        assert plan._graph is not None
        if size == (64, 96):
            assert (_images(device, detector) == 0).all()  # the size it will run at, and nothing to pad
    with TRTRetinaFace(plugin_form, size_hw=(64, 64), device=device, warm_up=False) as detector:
        assert detector._idle == []
    with TRTRetinaFace(plugin_form, size_hw=(64, 64), device=device, graphs=False) as detector:
        (plan,) = _plans(detector)
        assert (plan._has_run, plan._graph) == (True, None)
        assert detector.environment()["cuda_graphs"] is False
    with TRTRetinaFace(plugin_form, size_hw=(64, 64), device=device) as detector:
        assert detector.environment() == {**detector.engine.environment(), "device": "CPU", "cuda_graphs": True}


def test_what_is_closed_holds_nothing(device: HostDevice, plugin_form: Path, astronaut: Frame) -> None:
    """`close` frees graphs, contexts, memory and streams, although references to them are left."""
    with TRTRetinaFace(plugin_form, device=device, size_hw=(64, 64)) as detector:
        for _ in range(2):
            detector.detect_batch([astronaut, astronaut[:99]])
        (lane,) = detector._idle
        kept: Any = lane
        first = _plans(detector)
        detector.size_hw = (320, 640)
        for _ in range(3):
            detector.detect_batch([astronaut[:300]] * 2)
        last = _plans(detector)
        assert not {*map(id, first)} & {*map(id, last)}  # they went when the memory moved
        graphs = [plan._graph for plan in (*first, *last) if plan._graph is not None]
        assert len(graphs) == 2
        with device.activate():
            other = device.stream()
        memories = kept._room.images, kept._uploads[1], kept._room.workspace
    assert [each._work for each in (kept._shared, *(plan._context for plan in (*first, *last)))] == [None] * 3
    assert device.allocated_bytes == 0
    with device.activate():
        for graph in graphs:
            with pytest.raises(GpuError, match="this graph has been closed"):
                graph.launch(other)
        with pytest.raises(GpuError, match="has been closed"):
            kept._stream.submit(print)
    assert kept._room is kept._uploads is None
    for memory in memories:
        with pytest.raises(GpuError, match="has been closed"):
            assert memory.address == 0


def test_old_memory_goes_before_new_comes(plugin_form: Path) -> None:
    """The device has no room for both at the same time."""
    device = HostDevice(memory_limit=4_000_000)
    with TRTRetinaFace(plugin_form, device=device, warm_up=False) as detector:
        for side in (1000, 1080):  # the network's input has 3.1 and 3.6 MB
            assert len(detector.detect(HostArray(np.zeros((side, side, 3), np.uint8)))) == 0
    with TRTRetinaFace(plugin_form, device=device, size_hw=(32, 32), warm_up=False) as detector:
        for side in (1000, 1080):  # the frames have 3.0 and 3.5
            assert len(detector.detect(np.zeros((side, side, 3), np.uint8))) == 0
    assert device.allocated_bytes == 0


def test_rooms_grow_and_never_shrink(device: HostDevice, plugin_form: Path) -> None:
    """Many small frames, then a large one, then many again: the memory of the first call serves the third."""
    with TRTRetinaFace(plugin_form, device=device, warm_up=False) as detector:
        held = []
        for batch, side in ((8, 32), (1, 416), (8, 32), (1, 416), (3, 64)):
            detector.detect_batch([np.zeros((side, side, 3), np.uint8)] * batch)
            (lane,) = detector._idle
            rooms: Any = lane
            held.append(rooms._room.sizes)
        assert held[1] == tuple(map(max, held[0], held[1]))
        assert held[1][0] > held[0][0]
        assert held[2:] == [held[1]] * 3
        assert rooms._plans.made == 2  # for the two shapes that came again
        # one frame room for uploads, as large as the largest batch, and none of before
        uploads = device.allocated_bytes - rooms._room.images.nbytes - 1
        pinned, memory = rooms._uploads
        assert uploads == len(pinned) == memory.nbytes == 416 * 416 * 3
        assert len(_plans(detector)) == 2
        detector.detect(np.zeros((417, 417, 3), np.uint8))
        assert device.allocated_bytes - rooms._room.images.nbytes - 1 == -(-417 * 417 * 3 // 256) * 256


@pytest.mark.parametrize("device", [True, -1, 0.0, 1.5, None])
def test_devices_that_are_none(device: Any) -> None:
    with pytest.raises(SpecError, match=r"device is the index of a GPU, pycuda, cpu or a Device, got"):
        TRTRetinaFace("f.engine", device=device)


def test_a_device_that_cannot_capture_is_not_asked_to(plugin_form: Path, astronaut: Frame) -> None:
    device = HostDevice()
    device.can_capture = False  # type: ignore[misc]
    with TRTRetinaFace(plugin_form, size_hw=(64, 64), device=device) as detector:
        detector.detect(astronaut)
        assert detector.environment()["cuda_graphs"] is False
        assert all(plan._graph is None for plan in _plans(detector))


def test_an_engine_that_does_not_serve_is_closed(plugin_form: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[HostEngine] = []
    monkeypatch.setattr(HostEngine, "close", lambda self: closed.append(self))
    device = HostDevice()
    for wrong in ({"score_threshold": 0.001}, {"size_hw": (33, 64)}, {"size_hw": (4096, 4096)}):
        with pytest.raises(SpecError):
            TRTRetinaFace(plugin_form, device=device, **wrong)  # type: ignore[arg-type]
    assert len(closed) == 3
    small = HostDevice(memory_limit=1000)
    with pytest.raises(
        DeviceMemoryError, match=r"for a batch of 1 at 64x64: 12\.0 KiB asked for, 1000 bytes of 1000 bytes free"
    ):
        TRTRetinaFace(plugin_form, size_hw=(64, 64), device=small)
    assert len(closed) == 4
    detector = TRTRetinaFace(plugin_form, size_hw=(64, 64), device=device)
    assert device.allocated_bytes > 0
    monkeypatch.setattr(HostEngine, "close", lambda self: (closed.append(self), device.allocated_bytes == 0 or 1 / 0))
    detector.close()  # the lanes before the engine, whose contexts they hold
    detector.close()
    assert len(closed) == 5


def test_frames_without_pixels_or_sides(device: HostDevice, plugin_form: Path) -> None:
    flat, empty = HostArray(np.zeros(9, np.uint8)), HostArray(np.zeros((9, 0, 3), np.uint8))
    wrong = {
        r"uint8 HxWx3 BGR, got shape \(9,\)": flat,
        r"uint8 HxWx3 BGR, got shape \(9, 0, 3\)": empty,
        "got SimpleNamespace": SimpleNamespace(shape=(9, 9, 3)),
        r"got shape \(7,\)": Nv12Frame(HostArray(np.zeros(7, np.uint8)), HostArray(np.zeros(7, np.uint8))),
        "even sides": Nv12Frame(HostArray(np.zeros((9, 8), np.uint8)), HostArray(np.zeros((4, 8), np.uint8))),
        "sides must be 1 to 16384": HostArray(np.zeros((1, 16385, 3), np.uint8)),
        "got object": object(),
    }
    with TRTRetinaFace(plugin_form, size_hw=(64, 64), device=device) as detector:
        for message, frame in wrong.items():
            with pytest.raises(FrameError, match=message):
                detector.detect(frame)
        assert len(detector.detect(HostArray(np.zeros((1, 1, 3), np.uint8)))) == 0
        assert len(detector._idle) == 1


def test_graphs_are_captured_once_a_shape_and_replayed(
    device: HostDevice, plugin_form: Path, frames: list[Frame]
) -> None:
    with TRTRetinaFace(plugin_form, device=device, warm_up=False) as detector:
        plain = TRTRetinaFace(plugin_form, device=device, graphs=False, warm_up=False)
        for turn in range(4):
            for frame in (frames[4], frames[2], frames[3]):  # the largest first: memory grows for it
                assert_identical(detector.detect(frame), plain.detect(frame))
            plans = _plans(detector)
            shapes = [(1, 640, 704), (1, 96, 160), (1, 320, 320)]
            assert [plan._shape for plan in plans] == (shapes if turn > 0 else [])
            assert [plan._graph is not None for plan in plans] == ([turn > 1] * 3 if turn > 0 else [])
        assert all(plan._graph is None for plan in _plans(plain))
        (lane,) = detector._idle
        made = lane._plans.made  # type: ignore[attr-defined]
        # a larger shape moves the memory: graphs, which hold addresses, are made anew, and stay right
        assert_identical(detector.detect(frames[1]), plain.detect(frames[1]))
        assert _plans(detector) == []
        for _ in range(3):
            assert_identical(detector.detect(frames[3]), plain.detect(frames[3]))
        assert [plan._graph is not None for plan in _plans(detector)] == [True]
        assert lane._plans.made == made + 1  # type: ignore[attr-defined]
        plain.close()


def test_larger_batches_of_smaller_frames_find_room(device: HostDevice, plugin_form: Path, astronaut: Frame) -> None:
    plain = OrtRetinaFace(plugin_form)
    with TRTRetinaFace(plugin_form, device=device) as detector:  # memory is made for 1x640x640
        for batch, side in ((8, 64), (3, 96), (8, 160), (1, 704), (8, 32)):
            frame = np.asarray(cv2.resize(astronaut, (side, side)), np.uint8)
            for found in detector.detect_batch([frame] * batch):
                _assert_same(found, plain.detect(frame))


def test_the_number_of_graphs_is_bounded(plugin_form: Path, astronaut: Frame) -> None:
    device = HostDevice()
    with TRTRetinaFace(plugin_form, device=device, size_hw=None, warm_up=False) as detector:
        detector.detect(np.zeros((640, 1472, 3), np.uint8))
        held = device.allocated_bytes
        for side in range(32, 32 * 46, 32):
            detector.detect(np.zeros((32, side, 3), np.uint8))
        assert _plans(detector) == []
        for side in range(32, 32 * 46, 32):
            for _ in range(2):
                detector.detect(np.zeros((32, side, 3), np.uint8))
        (lane,) = detector._idle
        assert len(_plans(detector)) == len(lane._seen) == GRAPHS == 32  # type: ignore[attr-defined]
        assert device.allocated_bytes == held
    device.close()


def test_results_are_the_callers_own(device: HostDevice, plugin_form: Path, frames: list[Frame]) -> None:
    with TRTRetinaFace(plugin_form, size_hw=(320, 320), device=device) as detector:
        first = detector.detect(frames[1])
        kept = [values.copy() for values in (first.boxes, first.scores, first.landmarks)]
        second = detector.detect(frames[0])
        assert len(second) == 1
        for found, want in zip((first.boxes, first.scores, first.landmarks), kept, strict=True):
            np.testing.assert_array_equal(found, want)
        first.boxes[:] = 0
        np.testing.assert_array_equal(detector.detect(frames[1]).boxes, kept[0])
    np.testing.assert_array_equal(first.scores, kept[1])  # and outlive the detector


def test_threads_share_an_engine_and_never_a_lane(plugin_form: Path, frames: list[Frame]) -> None:
    device = HostDevice()
    with TRTRetinaFace(plugin_form, size_hw=(160, 160), device=device) as detector:
        expected = [detector.detect(frame) for frame in frames]
        start = threading.Barrier(8)

        def work(seed: int) -> None:
            start.wait()
            for index in np.random.default_rng(seed).integers(0, len(frames), 12):
                assert_identical(detector.detect(frames[index]), expected[index])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert 2 <= len(detector._idle) <= 8
    assert device.allocated_bytes == 0


def test_streams_keep_the_order(device: HostDevice, plugin_form: Path, frames: list[Frame]) -> None:
    with TRTRetinaFace(plugin_form, size_hw=(160, 160), device=device) as detector:
        expected = [detector.detect(frame) for frame in frames]
        with detector.stream(depth=3) as stream:
            pairs = list(stream.map(frames[i % 6] for i in range(20)))
        for index, (frame, found) in enumerate(pairs):
            assert frame is frames[index % 6]
            assert_identical(found, expected[index % 6])


def test_memory_that_runs_out_is_named_and_the_detector_goes_on(plugin_form: Path, astronaut: Frame) -> None:
    device = HostDevice(memory_limit=9 << 20)
    with TRTRetinaFace(plugin_form, size_hw=(320, 320), device=device) as detector:
        expected = detector.detect(astronaut)
        with pytest.raises(DeviceMemoryError, match=r"8 frames of 11\.5 megapixels: 33\.0 MiB asked for, .* of 9\.0"):
            detector.detect_batch([np.zeros((1200, 1200, 3), np.uint8)] * 8)
        assert_identical(detector.detect(astronaut), expected)
        detector.size_hw = (2048, 1280)
        with pytest.raises(DeviceMemoryError, match="a batch of 2 at 2048x1280"):
            detector.detect_batch([astronaut] * 2)
        detector.size_hw = (320, 320)
        assert_identical(detector.detect(astronaut), expected)
    assert device.allocated_bytes == 0


def test_an_engine_for_larger_batches_gets_empty_slots(
    device: HostDevice, plugin_form: Path, frames: list[Frame]
) -> None:
    with TRTRetinaFace(plugin_form, size_hw=(320, 320), device=device, warm_up=False) as detector:
        expected = [detector.detect(frame) for frame in frames]
    with TRTRetinaFace(plugin_form, size_hw=(320, 320), device=device, warm_up=False) as detector:
        detector.engine.profile = dataclasses.replace(detector.engine.profile, batch=(4, 4, 8))
        for frame, want in zip(frames, expected, strict=True):
            _assert_same(detector.detect(frame), want)
        assert {plan._shape[0] for plan in _plans(detector)} == {4}
        # what a batch of three left behind is gone when one comes: those slots are all padding, and no kernel reads
        # frames that may be gone
        detector.detect_batch(frames[:3])
        detector.detect(frames[0])
        images = _images(device, detector)
        assert (images[1:] == np.uint8(detector.spec.preprocess.mean_bgr)).all()
        assert (images[0] != images[1]).any()
        (lane,) = detector._idle
        descriptions = lane._room.pinned[: 4 * FRAME.size]  # type: ignore[attr-defined]
        assert descriptions[: FRAME.size].any()
        assert not descriptions[FRAME.size :].any()


def test_sizes_an_engine_does_not_take(device: HostDevice, tmp_path: Path, astronaut: Frame, plugin_form: Path) -> None:
    path = tmp_path / "fixed.onnx"
    build_engine(EngineOptions("mobilenet0.25", path, Profile(sizes_hw=((64, 96),) * 3), onnx_only=True))
    with TRTRetinaFace(path, device=device) as detector:
        assert detector.size_hw == (64, 96)
        assert detector.engine.profile == Profile((1, 1, 8), ((64, 96),) * 3)
        detector.size_hw = (64, 64)
        with pytest.raises(FrameError, match="64x64 is not among the sizes of the engine, 64x96"):
            detector.detect(astronaut)
    with pytest.raises(SpecError, match="takes 64x96 only"):
        TRTRetinaFace(path, device=device, size_hw=(64, 64))
    with pytest.raises(SpecError, match="takes network sizes of 32x32 to"):
        TRTRetinaFace(plugin_form, device=device, size_hw=(4096, 4096))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.zeros((9, 9), np.uint8), "GRAY2BGR"),
        (HostArray(np.zeros((3, 9, 9), np.uint8)), "permute"),
        (HostArray(np.zeros((9, 9, 3), np.float32)), "uint8"),
        (HostArray(np.zeros((0, 9, 3), np.uint8)), "shape"),
        ("photo.jpg", "got str"),
        (None, "got NoneType"),
    ],
)
def test_wrong_frames(device: HostDevice, plugin_form: Path, frame: object, words: str, astronaut: Frame) -> None:
    with TRTRetinaFace(plugin_form, size_hw=(64, 64), device=device) as detector:
        with pytest.raises(FrameError, match=words):
            detector.detect_batch([astronaut, frame])
        assert len(detector._idle) == 1  # it is still good
    with pytest.raises(ClosedError, match="closed"):
        detector.detect(astronaut)
    detector.close()


def test_nan_raises_and_the_next_frame_is_right(device: HostDevice, plugin_form: Path, tmp_path: Path) -> None:
    path = with_nan(plugin_form, tmp_path / "nan.onnx")
    with TRTRetinaFace(path, size_hw=(64, 64), device=device) as detector:
        (lane,) = detector._idle
        with pytest.raises(NonFiniteError):
            detector.detect(np.zeros((64, 64, 3), np.uint8))
        assert detector._idle == [lane]  # nothing is wrong with it


def test_it_is_closed_once_by_whom_ever(plugin_form: Path, astronaut: Frame) -> None:
    device = HostDevice(delay_s=LATE_S)
    detector = TRTRetinaFace(plugin_form, size_hw=(64, 64), device=device)
    kept = detector.to_device(astronaut)
    with ThreadPoolExecutor(4) as pool:
        for closed in [pool.submit(detector.close) for _ in range(4)]:
            closed.result()
    assert device.allocated_bytes == astronaut.size
    with pytest.raises(ClosedError):
        detector.to_device(astronaut)
    del kept
    assert device.allocated_bytes == 0


def test_stages(device: HostDevice, plugin_form: Path, astronaut: Frame) -> None:
    with TRTRetinaFace(plugin_form, size_hw=(160, 160), device=device) as detector:
        plain, fine = StageTimer(), StageTimer(fine=True)
        expected = detector.detect(astronaut, plain)
        assert_identical(detector.detect(astronaut, fine), expected)
        other = StageTimer()
        detector._graphs.used = False
        detector.detect(astronaut, other)
    assert list(other.total_ms) == ["upload", "network", "results"]
    assert list(plain.total_ms) == ["upload", "graph", "results"]
    assert list(fine.total_ms) == ["upload", "letterbox", "network", "decode+NMS", "results"]
    assert fine.total_ms["network"] > fine.total_ms["decode+NMS"] > 0
    assert fine.total_ms["upload"] >= LATE_S * 1e3  # it was waited for


def test_the_share_of_the_plugin_is_that_of_the_frame(
    device: HostDevice, plugin_form: Path, astronaut: Frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not of what the memory held before."""
    seen, run = [], HostEngine.run

    def noted(engine: HostEngine, images: Any) -> Any:
        seen.append(images.copy())
        return run(engine, images)

    monkeypatch.setattr(HostEngine, "run", noted)
    with TRTRetinaFace(plugin_form, size_hw=(160, 160), device=device, warm_up=False) as detector:
        detector.detect(astronaut, StageTimer(fine=True))
        frame = Letterbox.place(astronaut.shape[:2], (160, 160)).apply(astronaut, detector.spec.preprocess.mean_bgr)
    assert len(seen) == 2
    for images in seen:
        np.testing.assert_array_equal(images, frame[None])


def test_a_kernel_that_fails_is_an_error_and_not_a_result(plugin_form: Path, astronaut: Frame) -> None:
    device = HostDevice()
    detector = TRTRetinaFace(plugin_form, size_hw=(64, 64), device=device)
    detector.engine.close()  # as if its memory had gone
    with pytest.raises(GpuError, match="lost"):
        detector.detect(astronaut)
    detector.close()


def test_engines_for_another_gpu_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    engine = write_engine(tmp_path)
    sidecar = read_sidecar(engine)
    check_runs_here(engine, sidecar, 86, "NVIDIA A10, device 0")
    with pytest.raises(ModelFileError, match=r"built for sm_86, and NVIDIA H200, device 0 is sm_90.*export\.to_trt"):
        check_runs_here(engine, sidecar, 90, "NVIDIA H200, device 0")
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelFileError, match="SHA-256 differs"):
        check_runs_here(engine, sidecar, 86, "NVIDIA A10, device 0")


def test_without_a_gpu_an_engine_says_so(tmp_path: Path) -> None:
    from trt_runtime.gpu.flavor import gpu_capability

    if gpu_capability() is not None:
        pytest.skip("there is a GPU")
    pytest.importorskip("cuda.bindings.driver")
    with pytest.raises(GpuError, match=r"no NVIDIA driver here .*the \.onnx file runs on the CPU"):
        load_detector(write_engine(tmp_path))


def test_what_is_no_plugin_form_is_refused(device: HostDevice, static_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"device cpu runs plugin forms.*--onnx-only"):
        TRTRetinaFace(static_onnx, device=device)
    with pytest.raises(ModelFileError, match="no such model file"):
        TRTRetinaFace(tmp_path / "f.onnx", device="cpu")
    with pytest.raises(GpuError, match="device must be"):
        TRTRetinaFace(static_onnx, device="tpu")


class _Copies(HostDevice):
    """Notes where what is copied to it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[int] = []

    def copy_in(self, address: int, source: Any, stream: HostStream) -> None:
        self.sources.append(source.ctypes.data)
        assert self._pinned_room(source.ctypes.data, source.nbytes) is not None  # else it is read when it may be gone
        super().copy_in(address, source, stream)


def test_pinned_frames_are_uploaded_from_where_they_lie(plugin_form: Path, astronaut: Frame) -> None:
    device = _Copies()
    height, width = astronaut.shape[:2]
    with TRTRetinaFace(plugin_form, size_hw=(320, 320), device=device) as detector:
        expected = detector.detect(astronaut)
        pinned = detector.pinned_frame(height, width)
        assert (pinned.shape, pinned.dtype) == (astronaut.shape, np.uint8)
        pinned[:] = astronaut
        start = pinned.ctypes.data
        device.sources.clear()
        assert_identical(detector.detect(pinned), expected)
        assert device.sources == [start]
        device.sources.clear()  # a part of one whose rows are in one piece, and one whose rows are not
        for part in (pinned[:200], pinned[:, :300]):
            assert_identical(detector.detect(part), detector.detect(part.copy()))
        assert [source == start for source in device.sources] == [True, False, False, False]
        batch = detector.detect_batch([astronaut, pinned, HostArray(astronaut), pinned])
        for found in batch:
            _assert_same(found, expected)


def test_the_memory_of_pinned_frames_serves_the_next(plugin_form: Path) -> None:
    device = HostDevice()
    with TRTRetinaFace(plugin_form, size_hw=(320, 320), device=device, warm_up=False) as detector:
        first, second = detector.pinned_frame(40, 60), detector.pinned_frame(40, 60)
        assert first.ctypes.data != second.ctypes.data
        address, row = first.ctypes.data, first[3]  # a view of it holds it, too
        del first
        third = detector.pinned_frame(40, 60)
        assert third.ctypes.data not in (address, second.ctypes.data)
        del row
        assert detector.pinned_frame(60, 41).ctypes.data != address
        assert detector.pinned_frame(60, 40).ctypes.data == address  # as many bytes
        many = [detector.pinned_frame(40, 60) for _ in range(PINNED_FRAMES + 3)]
        del many
        assert len(detector._pinned._idle) == PINNED_FRAMES
        assert len(detector._pinned._lent) == 2
    assert detector._pinned._idle == []
    del second, third
    assert detector._pinned._idle == []
    with pytest.raises(ClosedError):
        detector.pinned_frame(40, 60)


def test_other_detectors_give_plain_frames(dynamic_onnx: Path) -> None:
    with OrtRetinaFace(dynamic_onnx, size_hw=(64, 64)) as detector:
        frame = detector.pinned_frame(40, 60)
        assert (frame.shape, frame.dtype) == ((40, 60, 3), np.uint8)
        frame[:] = 0
        assert len(detector.detect(frame)) == 0


def test_arrays_of_another_device_are_no_frames_of_this(plugin_form: Path, astronaut: Frame) -> None:
    """Not even of the same kind, with an address that the other one may have, too."""
    with (
        TRTRetinaFace(plugin_form, size_hw=(160, 160), device=HostDevice()) as one,
        TRTRetinaFace(plugin_form, size_hw=(160, 160), device=HostDevice()) as other,
    ):
        frame = one.to_device(astronaut)
        assert_identical(one.detect(frame), one.detect(astronaut))
        with pytest.raises(FrameError, match="DeviceArray"):
            other.detect(frame)
        frame._memory.close()
        with pytest.raises(GpuError, match="closed"):
            one.detect(frame)


def test_results_are_written_where_the_host_reads_them(device: HostDevice, plugin_form: Path, astronaut: Frame) -> None:
    """Nothing is copied back, and the kernels find the descriptions of frames in the host's memory."""
    copied: list[int] = []
    with TRTRetinaFace(plugin_form, size_hw=(320, 320), device=device) as detector:
        device.copy_out = lambda *_: copied.append(1)  # type: ignore[method-assign, assignment]
        frame = HostArray(astronaut)
        device.copy_in = lambda *_: copied.append(1)  # type: ignore[method-assign, assignment]
        for found in (detector.detect(frame), detector.detect(frame), *detector.detect_batch([frame] * 3)):
            assert len(found) == 1
    assert copied == []


def test_a_fork_cannot_use_its_parent_s_detector(plugin_form: Path) -> None:
    """The threads that work for it are the parent's: it would find nothing, or wait for ever."""
    code = f"""
import os, warnings
from facespec.errors import DriverGoneError
from facespec.samples import sample_frames
from trt_runtime import TRTRetinaFace

warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which is what this is about
frame = next(iter(sample_frames().values()))
with TRTRetinaFace({str(plugin_form)!r}, device="cpu") as detector:
    found = len(detector.detect(frame))
    child = os.fork()
    if not child:
        code = 3
        try:
            detector.detect(frame)
        except DriverGoneError as error:
            code = 4 if "make a detector here" in str(error) else 5
        detector.close()
        with TRTRetinaFace({str(plugin_form)!r}, device="cpu") as own:
            os._exit(code if len(own.detect(frame)) == found else 6)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(detector.detect(frame)) == found)
"""
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=ROOT, timeout=100)
    assert result.stdout == "4 True\n", result.stderr
