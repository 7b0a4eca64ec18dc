"""Engines: TensorRT's through a stand-in of its API (fake_tensorrt.py), and the plugin form on the CPU."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import trt_runtime.kernels
from export.verify import VerifyOptions, verify
from facespec.errors import (
    BuildError,
    DeviceMemoryError,
    GpuError,
    KernelFaultError,
    MissingPackageError,
    ModelFileError,
    SpecError,
)
from facespec.letterbox import Frame, Letterbox
from facespec.spec import MAX_NETWORK_PIXELS, DecodeSpec, ModelSpec, PreprocessSpec
from tests.engines import write_engine, write_rtx_engine
from tests.faces import assert_identical
from tests.trt_runtime.fake_tensorrt import FakeGpu, FakeTensorRT, workspace_bytes
from trt_runtime import TRTRetinaFace
from trt_runtime.gpu import engine as engine_module
from trt_runtime.gpu import tensorrt_api
from trt_runtime.gpu.engine import TrtEngine, check_runs_here
from trt_runtime.gpu.sidecar import Profile, read_sidecar
from trt_runtime.gpu.simulated import MAX_BATCH, HostArray, HostDevice, HostEngine
from trt_runtime.kernels import library
from trt_runtime.load import load_detector
from trt_runtime.measure import StageTimer

SIZE = (96, 160)
PROFILE = {"min": (1, 32, 32, 3), "opt": (2, 64, 96, 3), "max": (4, 320, 640, 3)}


@pytest.fixture(scope="module")
def network(plugin_form: Path) -> HostEngine:
    return HostEngine(plugin_form, HostDevice())


def is_gone(left: Callable[[], Any]) -> bool:
    """Whether `left` returns nothing, if need be after garbage collection, which is slow."""
    if left():
        gc.collect()
    return not left()


class Rig:
    """A simulated GPU, a stand-in for TensorRT, and an engine file."""

    def __init__(self, folder: Path, network: HostEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = HostDevice(delay_s=5e-4)
        self.gpu: Any = FakeGpu(self.device)
        self.folder, self.network, self._monkeypatch = folder, network, monkeypatch
        self.path = write_engine(folder, spec=network.spec, profile=PROFILE)
        self.trt = self.install(version="10.14.1.48")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("RETINAFACE_PLUGIN", str(library()._name))
        monkeypatch.setattr("trt_runtime.gpu.engine.load_letterbox", self._load)

    def install(self, **options: Any) -> FakeTensorRT:
        """Make a TensorRT that can be imported."""
        profile = [PROFILE[name] for name in ("min", "max")]
        trt = FakeTensorRT(self.device, self.network, profile, **options)
        self._monkeypatch.setitem(__import__("sys").modules, trt.__name__, trt)
        return trt

    def _load(self, plugin: ctypes.CDLL) -> Any:
        """Return the host's letterbox, put on the stream: by itself it would run at once."""
        launch = trt_runtime.kernels.load_letterbox(plugin)

        def submit(*arguments: Any) -> None:
            stream = self.device.find_stream(arguments[-1])
            assert stream is not None
            stream.submit(launch, *arguments)

        return submit

    def engine(self) -> TrtEngine:
        with self.device.activate():
            return TrtEngine(self.path, self.gpu)

    def detector(self, **options: Any) -> TRTRetinaFace:
        return TRTRetinaFace(self.path, device=self.gpu, **{"size_hw": SIZE, **options})


@pytest.fixture
def rig(tmp_path: Path, network: HostEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(tmp_path, network, monkeypatch)
    yield rig
    assert is_gone(lambda: rig.device.allocated_bytes)
    rig.device.close()


@pytest.fixture(scope="module")
def frames(astronaut: Frame) -> list[Frame]:
    return [np.ascontiguousarray(astronaut[:280, 100:400]), np.full((70, 130, 3), 90, np.uint8), astronaut]


def test_a_plugin_that_the_driver_does_not_run_is_not_loaded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(what: str, compiler: str) -> None:
        raise BuildError(f"{what}, {compiler.split()[0]}")

    monkeypatch.setattr("trt_runtime.kernels.check_driver", refuse)
    with pytest.raises(BuildError, match=r"^the plugin .*libretinaface_host\.so, g\+\+"):
        rig.engine()


def test_the_stand_in_has_no_name_that_tensorrt_has_not(network: HostEngine) -> None:
    real = pytest.importorskip("tensorrt_rtx")
    fake = FakeTensorRT(HostDevice(), network, rtx=True)
    ours = {
        "device",
        "network",
        "profile",
        "is_rtx",
        "fails",
        "contexts",
        "engines",
        "enqueued",
        "logger",
        "tensors",
        "misplaced",
        "room_for",
        "compiled",
    }
    for name in {*vars(fake), *vars(FakeTensorRT)} - ours - {"refuses", "check_place"}:
        if not name.startswith("__"):
            assert hasattr(real, name), name
            if hasattr(getattr(fake, name), "__members__"):
                assert set(getattr(fake, name).__members__) <= set(getattr(real, name).__members__), name


# TensorRT's


@pytest.mark.parametrize("graphs", [True, False])
def test_a_detector_on_tensorrt_finds_the_faces(rig: Rig, plugin_form: Path, frames: list[Frame], graphs: bool) -> None:
    """The faces equal those of the same network on `HostEngine`, bit by bit."""
    with TRTRetinaFace(plugin_form, size_hw=SIZE, device=HostDevice(), warm_up=False) as plain:
        expected = [plain.detect(frame) for frame in frames]
    assert [len(found) for found in expected] == [1, 0, 1]
    with rig.detector(graphs=graphs) as detector:
        assert (detector.backend, detector.max_batch) == ("tensorrt", 4)
        assert detector.files == [rig.path, Path(f"{rig.path}.json")]
        assert detector.environment() == {
            "backend": "tensorrt",
            "TensorRT": "10.14.1.48",
            "device": "NVIDIA A10, device 0",
            "cuda_graphs": graphs,
        }
        for _ in range(3):
            for frame, want in zip(frames, expected, strict=True):
                assert_identical(detector.detect(frame), want)
        plain_runs = rig.trt.enqueued
        assert plain_runs == (2 if graphs else 11)  # two for each shape: the best one, warmed up, and one frame's
        for found, want in zip(
            detector.detect_batch([frames[0], HostArray(frames[1])] * 5), expected[:2] * 5, strict=True
        ):
            np.testing.assert_allclose(found.boxes, want.boxes, atol=2e-3)
        assert {context.shape[0] for context in rig.trt.contexts} == {2, 4}  # ten are 4, 4 and 2; the memory has moved
    assert is_gone(lambda: [*rig.trt.contexts, *rig.trt.engines])
    assert rig.trt.misplaced == []


def test_verify_takes_an_engine(rig: Rig, plugin_form: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the sizes of its profile, and only there."""

    def load(name: str, **options: Any) -> Any:
        return rig.detector(size_hw=None) if name.endswith(".engine") else load_detector(name, **options)

    monkeypatch.setattr("export.verify.load_detector", load)
    monkeypatch.setattr("export.inspect.is_readable", lambda sidecar: False)
    monkeypatch.setattr("export.verify.EXTRA_SIZES", ((96, 160), (640, 640)))
    options = VerifyOptions(str(plugin_form), str(rig.path), size_hw=(160, 160), images=3, progress=False)
    found = verify(options)
    assert found.candidate.kind == "engine"
    assert found.budget == "fp16"  # by its sidecar
    assert found.passed, str(found)
    cases = {row.case for row in found.rows if row.stage == "boxes"}
    assert "letterbox 96x160" in cases
    assert "letterbox 640x640" not in cases
    gc.collect()  # the detector is freed before the device is asked what is left


def test_a_context_is_made_as_tensorrt_wants_it(rig: Rig) -> None:
    with rig.detector() as detector:
        detector.detect(np.zeros((64, 64, 3), np.uint8))
        contexts = list(rig.trt.contexts)
        (lane,) = detector._idle
        workspace = lane._room.workspace  # type: ignore[attr-defined]
        assert workspace.nbytes == workspace_bytes((2, *SIZE, 3))
        assert [context.shape for context in contexts if context.shape[0] == 2] == [(2, *SIZE, 3)]
        for context in contexts:
            assert context.nvtx_verbosity == rig.trt.ProfilingVerbosity.NONE
            assert context.memory == (workspace.address, workspace.nbytes)
            assert len(set(context.addresses.values())) == 6


def test_rtx_compiles_before_a_capture_and_shares_what_it_compiled(rig: Rig, frames: list[Frame]) -> None:
    rig.path = write_rtx_engine(rig.folder, spec=rig.network.spec, profile=PROFILE)
    trt = rig.install(rtx=True, version="1.7.1.116")
    with rig.detector() as detector:
        assert detector.backend == "rtx"
        assert detector.environment()["TensorRT-RTX"] == "1.7.1.116"
        for _ in range(3):
            assert [len(found) for found in map(detector.detect, frames)] == [1, 0, 1]
        assert trt.enqueued == 2
        caches = {id(context.config.cache) for context in trt.contexts}
        assert len(trt.contexts) == 2
        assert len(caches) == 1
        assert caches != {id(None)}


@pytest.fixture
def rtx(rig: Rig) -> Rig:
    """A rig with an engine of TensorRT-RTX, of which each `install` is another start."""
    rig.path = write_rtx_engine(rig.folder, version="1.7.1.116", spec=rig.network.spec, profile=PROFILE)
    rig.trt = rig.install(rtx=True, version="1.7.1.116")
    return rig


def _caches(rig: Rig) -> list[Path]:
    return sorted((rig.folder / "cache" / "retinaface-trt" / "rtx").glob("*"))


def test_rtx_compiles_at_the_first_start_alone(rtx: Rig, frames: list[Frame]) -> None:
    best, one = str((2, *SIZE, 3)), str((1, *SIZE, 3))
    with rtx.detector() as detector:
        assert rtx.trt.compiled == [best]
        (path,) = _caches(rtx)  # written after the warm-up: a process may be killed
        warm = path.read_bytes()
        detector.detect(frames[0])
        assert path.read_bytes() == warm
    assert path.read_bytes() != warm
    os.utime(path, (1, 1))
    second = rtx.install(rtx=True, version="1.7.1.116")
    with rtx.detector() as detector:
        detector.detect(frames[0])
    assert second.compiled == []
    assert path.stat().st_mtime > 1  # it was used
    assert rtx.trt.compiled == [best, one]
    assert [*rtx.trt.misplaced, *second.misplaced] == []


@pytest.mark.parametrize("content", [b"", b"no cache", b'{"version": "1.7.1.999", "kernels": ["any shape"]}'])
def test_a_cache_that_is_refused_is_replaced(rtx: Rig, content: bytes) -> None:
    rtx.detector().close()
    (path,) = _caches(rtx)
    good = path.read_bytes()
    path.write_bytes(content)
    second = rtx.install(rtx=True, version="1.7.1.116")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rtx.detector().close()
    assert len(second.compiled) == 1
    assert _caches(rtx) == [path]
    assert path.read_bytes() == good


def test_gpus_and_versions_have_caches_of_their_own(rtx: Rig) -> None:
    rtx.detector().close()
    rtx.gpu.name = "NVIDIA L4, device 1"
    rtx.detector().close()
    rtx.install(rtx=True, version="1.7.2.1")
    rtx.detector().close()
    assert len(_caches(rtx)) == 3


@pytest.mark.parametrize("trouble", ["folder", "unreadable", "serialize"])
def test_without_a_cache_rtx_runs(rtx: Rig, frames: list[Frame], trouble: str) -> None:
    (rtx.folder / "cache").mkdir()
    if trouble == "folder":
        (rtx.folder / "cache" / "retinaface-trt").write_text("a file in its place")
    if trouble == "unreadable":
        rtx.detector().close()
        (path,) = _caches(rtx)
        path.unlink()
        path.mkdir()
    if trouble == "serialize":
        rtx.trt.fails["cache"] = "no"
    with rtx.detector() as detector:
        assert len(detector.detect(frames[0])) == 1
    assert not any(path.is_file() for path in _caches(rtx))


def test_tensorrt_keeps_no_cache(rig: Rig) -> None:
    rig.detector().close()
    assert _caches(rig) == []


def test_caches_are_bounded_and_the_oldest_go(rtx: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CACHE_FILES", 3)
    folder = rtx.folder / "cache" / "retinaface-trt" / "rtx"
    folder.mkdir(parents=True)
    for age in range(5):
        path = folder / f"{age}.cache"
        path.write_bytes(bytes(1000))
        os.utime(path, (1000 - age, 1000 - age))
    rtx.detector().close()
    own, *others = sorted(_caches(rtx), key=lambda path: path.stat().st_mtime, reverse=True)
    assert [path.name for path in others] == ["0.cache", "1.cache"]
    monkeypatch.setattr(engine_module, "CACHE_BYTES", own.stat().st_size + 1500)
    own.unlink()
    rtx.detector().close()
    assert [path.name for path in _caches(rtx)] == ["0.cache", own.name]


@pytest.mark.parametrize("is_rtx", [False, True])
def test_shapes_that_come_once_share_a_context(rig: Rig, request: pytest.FixtureRequest, is_rtx: bool) -> None:
    trt = request.getfixturevalue("rtx").trt if is_rtx else rig.trt
    with rig.detector(size_hw=None, warm_up=False) as detector:
        (largest, *others) = [np.zeros((32 * (6 - side), 32, 3), np.uint8) for side in range(5)]
        detector.detect(largest)
        shared = {*map(id, trt.contexts)}
        for frame in others:
            detector.detect(frame)
        assert {*map(id, trt.contexts)} == shared
        assert len(shared) == 1
        assert trt.compiled == (["any shape"] if is_rtx else [])
        assert trt.enqueued == 5
        detector.detect(others[0])  # it comes again: now it is worth a context
        assert {context.shape for context in trt.contexts} == {(1, 160, 32, 3), (1, 64, 32, 3)}
        for _ in range(2):
            detector.detect(others[0])  # captured, and launched
        assert trt.enqueued == 6
        assert trt.compiled == (["any shape", str((1, 160, 32, 3))] if is_rtx else [])
    assert is_gone(lambda: trt.contexts)
    assert trt.misplaced == []


@pytest.mark.parametrize("is_rtx", [False, True])
def test_a_workspace_is_as_large_as_the_shapes_need(
    rig: Rig, frames: list[Frame], request: pytest.FixtureRequest, is_rtx: bool
) -> None:
    """It grows, and faces found in graphs of before stay right."""
    if is_rtx:
        request.getfixturevalue("rtx")
    with rig.detector(size_hw=None, warm_up=False) as detector:
        sizes = []
        expected = [detector.detect(frame) for frame in (frames[1], frames[0])]
        for frame, faces in [(frames[1], expected[0]), (frames[0], expected[1])] * 3:
            assert_identical(detector.detect(frame), faces)
            (lane,) = detector._idle
            sizes.append(lane._room.workspace.nbytes)  # type: ignore[attr-defined]
    least, most = (1, 96, 160, 3), (1, 288, 320, 3)
    assert sizes[-1] == workspace_bytes(most, eager=is_rtx) < workspace_bytes(PROFILE["max"])
    assert sizes == sorted(sizes)
    assert workspace_bytes(least) < sizes[0]


def test_where_the_device_has_no_memory_for_a_context_the_detector_goes_on(rig: Rig) -> None:
    small, large = np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    with rig.detector(size_hw=None, warm_up=False) as detector:
        rig.trt.room_for = 2
        for frame in (large, small, small):
            detector.detect(frame)
        with pytest.raises(DeviceMemoryError, match=r"for an execution context: .* free: use"):
            detector.detect(large)
        assert is_gone(lambda: rig.trt.contexts)  # the lane has gone, and what it held
        assert rig.device.allocated_bytes == 0
        for frame in (large, small, small, small):
            assert len(detector.detect(frame)) == 0
        rig.trt.room_for = 0
        with ThreadPoolExecutor(1) as pool, detector._lane():  # the other thread needs a lane of its own
            with pytest.raises(DeviceMemoryError):
                pool.submit(detector.detect, small).result()
        assert len(detector.detect(small)) == 0  # the first lane is as good as before
    assert rig.trt.misplaced == []


def test_a_context_that_is_refused_is_freed_where_the_device_is_active(rig: Rig, frames: list[Frame]) -> None:
    for what in ("shape", "address"):
        rig.trt.fails = {what: "no"}
        with rig.detector(warm_up=False) as detector, pytest.raises(GpuError) as caught:
            detector.detect(frames[0])
        assert "refuses" in str(caught.value)
        assert is_gone(lambda: rig.trt.contexts)  # although the error holds what it went through
    assert rig.trt.misplaced == []


def test_the_share_of_the_plugin_is_measured_once(rig: Rig, frames: list[Frame]) -> None:
    """Ten runs: the network takes 3, 6, ... 30 ms, the plugin 1 each."""
    share = 10 / (10 + 3 * 55)
    timer = StageTimer(fine=True)
    with rig.detector(warm_up=False) as detector:
        for _ in range(3):
            detector.detect(frames[0], timer)
        assert rig.trt.enqueued == 10 + 3
        assert timer.total_ms["decode+NMS"] / timer.total_ms["network"] == pytest.approx(share / (1 - share))
        assert [context.profiler for context in rig.trt.contexts] == [None]  # the probe has gone


def test_a_network_compiled_as_one_layer_tells_no_share(rig: Rig, frames: list[Frame]) -> None:
    rig.path = write_rtx_engine(rig.folder, spec=rig.network.spec, profile=PROFILE)
    rig.install(rtx=True, version="1.7.1.116")
    timer = StageTimer(fine=True)
    with rig.detector(warm_up=False) as detector:
        detector.detect(frames[0], timer)
    assert timer.total_ms["decode+NMS"] == 0
    assert timer.total_ms["network"] > 0


def test_what_cannot_be_profiled_has_no_share(rig: Rig, frames: list[Frame], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "end_profile", lambda context: False)
    timer = StageTimer(fine=True)
    with rig.detector(warm_up=False) as detector:
        detector.detect(frames[0], timer)
    assert timer.total_ms["decode+NMS"] == 0
    assert timer.total_ms["network"] > 0


@pytest.mark.parametrize(
    ("fails", "kind", "message"),
    [
        (
            {"runtime": "CUDA 13 wants\na driver"},
            GpuError,
            r"TensorRT does not start \(CUDA 13 wants a driver\): does it",
        ),
        (
            {"plugin": "no such library"},
            GpuError,
            r"TensorRT cannot load the plugin .*\.so \(no such library\): python -m",
        ),
        (
            {"engine": "magic tag does not match"},
            GpuError,
            r"f\.engine: TensorRT cannot load it \(magic tag does not mat",
        ),
        ({"engine": "Out of Memory"}, DeviceMemoryError, r"for the engine .*f\.engine: 204 bytes asked for"),
        ({"context": "no kernel image"}, GpuError, r"TensorRT cannot make an execution context \(no kernel image\)$"),
        (
            {"context": "out of memory"},
            DeviceMemoryError,
            r"for an execution context: .* free: use smaller batches",
        ),
        ({"shape": "bad dims"}, GpuError, r"TensorRT refuses an input of \(1, 96, 160\) \(bad dims\)$"),
        ({"address": "null"}, GpuError, r"TensorRT refuses the address of a tensor \(null\)$"),
        ({"enqueue": "x" * 400}, GpuError, r"TensorRT cannot run the network \(x{300}\)$"),
    ],
)
def test_what_tensorrt_refuses_is_said(rig: Rig, fails: dict[str, str], kind: type[Exception], message: str) -> None:
    rig.trt.fails = fails
    with pytest.raises(kind, match=message) as caught:
        rig.detector(warm_up=False).detect(np.zeros((9, 9, 3), np.uint8))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_the_command_that_builds_an_engine_is_named(rig: Rig) -> None:
    rig.trt.fails = {"engine": "damaged"}
    with pytest.raises(GpuError, match=r"it is built by: python -m export\.to_trt --weights w --fp16"):
        rig.engine()


def test_errors_of_before_are_not_the_reason(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.engine()
    engine._logger.log(rig.trt.ILogger.ERROR, "something else")
    monkeypatch.setattr(tensorrt_api, "make_context", lambda *arguments: None)
    with rig.device.activate(), pytest.raises(GpuError) as caught:
        engine.context()
    assert str(caught.value) == "TensorRT cannot make an execution context"

    def load_plugin(runtime: Any, plugin: str) -> bool:
        rig.trt.logger.log(rig.trt.ILogger.ERROR, "out of memory, and it went on without")
        return True

    monkeypatch.setattr(tensorrt_api, "load_plugin", load_plugin)
    monkeypatch.setattr(tensorrt_api, "deserialize", lambda *arguments: None)
    with pytest.raises(GpuError, match="cannot load it; it is built by"):
        rig.engine()


def test_a_run_that_fails_costs_a_lane_and_no_more(rig: Rig, frames: list[Frame]) -> None:
    done: list[int] = []
    copy_in = rig.device.copy_in

    def counted(*arguments: Any) -> None:
        copy_in(*arguments)
        arguments[-1].submit(done.append, 1)

    rig.device.copy_in = counted  # type: ignore[method-assign]
    with rig.detector(warm_up=False, graphs=False) as detector:
        expected = detector.detect(frames[0])
        (lane,) = detector._idle
        done.clear()
        rig.trt.fails = {"enqueue": "no"}
        with pytest.raises(GpuError, match="cannot run the network"):
            detector.detect(frames[0])
        assert len(done) == 1  # the frame: what was under way is over, nobody reads it
        assert detector._idle == []
        assert is_gone(lambda: rig.device.allocated_bytes)  # nothing of the lane is left
        with rig.device.activate(), pytest.raises(GpuError, match="closed"):
            lane._stream.submit(print)  # type: ignore[attr-defined]
        rig.trt.fails = {}
        assert_identical(detector.detect(frames[0]), expected)
        assert detector._idle != [lane]


@pytest.mark.parametrize("graphs", [True, False])
def test_a_device_that_is_lost_is_the_reason(rig: Rig, frames: list[Frame], graphs: bool) -> None:
    """TensorRT returns False and logs an error; it is neither a failed capture nor an engine that does not fit."""
    with rig.detector(warm_up=False, graphs=graphs) as detector, warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.detect(frames[0])
        rig.trt.fails = {"fault": "[executionContext.cpp::enqueueInternal::825] Error Code 1: Cuda Runtime"}
        for _ in range(2):
            with pytest.raises(KernelFaultError, match="illegal memory access"):
                detector.detect(frames[0])
        rig.trt.fails = {"engine": "Error Code 1: Cuda Runtime (unspecified launch failure)"}
        with pytest.raises(KernelFaultError, match="illegal memory access"):
            rig.detector()


def test_an_engine_that_does_not_serve_is_let_go(rig: Rig) -> None:
    for options in ({"score_threshold": 0.001}, {"size_hw": (32, 1280)}):
        with pytest.raises(SpecError):
            rig.detector(**options)
    rig.trt.fails = {"context": "none"}
    with pytest.raises(GpuError, match="execution context"):
        rig.detector()
    assert is_gone(lambda: rig.trt.engines)


def test_contexts_are_made_one_at_a_time(rig: Rig) -> None:
    """TensorRT's calls that make them may not overlap."""
    engine = rig.engine()
    inside, most, lock = [0], [0], threading.Lock()
    make = tensorrt_api.make_context

    def counted(*arguments: Any) -> Any:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        threading.Event().wait(0.02)
        with lock:
            inside[0] -= 1
        return make(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_api, "make_context", counted)
        threads = [threading.Thread(target=engine.context) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1]


def test_the_reason_of_a_failure_may_be_cleared_by_another_thread(rig: Rig) -> None:
    class Errors(deque[str]):
        """Another thread clears them after a look."""

        def __len__(self) -> int:
            number = super().__len__()
            self.clear()
            return number

    engine = rig.engine()
    engine._logger.errors = Errors(["what is wrong"])
    assert engine._reason() in ("", " (what is wrong)")
    engine._logger.errors = deque(["a  reason\nof two lines"])
    assert engine._reason() == " (a reason of two lines)"
    engine._logger.errors.clear()
    assert engine._reason() == ""


@pytest.mark.parametrize("change", ["gone", "more", "kind", "shape", "input", "channels", "name"])
def test_inputs_and_outputs_must_be_a_detectors(rig: Rig, change: str) -> None:
    trt, tensors = rig.trt, rig.trt.tensors
    mode, kind, shape = tensors["scores"]
    if change == "gone":
        del tensors["scores"]
    if change == "more":
        tensors["heads"] = (mode, kind, shape)
    if change == "kind":
        tensors["scores"] = (mode, trt.DataType.HALF, shape)
    if change == "shape":
        tensors["scores"] = (mode, kind, (-1, shape[1] + 1))
    if change == "input":
        tensors["scores"] = (trt.TensorIOMode.INPUT, kind, shape)
    if change == "channels":
        tensors["images"] = (*tensors["images"][:2], (-1, -1, -1, 4))
    if change == "name":
        tensors["image"] = tensors.pop("images")
    with pytest.raises(ModelFileError, match=r"not those of a detector: python -m export\.to_trt"):
        rig.engine()


@pytest.mark.parametrize(
    ("flavor", "built", "installed", "runs"),
    [
        ("tensorrt", "10.14.1", "10.14.1", True),
        ("tensorrt", "10.14.1", "10.14.1.48", True),
        ("tensorrt", "10.14.1.33", "10.14.1.48", True),
        ("tensorrt", "10.14.1", "10.14.2", False),
        ("tensorrt", "10.14.1", "10.15.1", False),
        ("tensorrt", "10.14.1", "11.14.1", False),
        ("rtx", "1.7.1.116", "1.7.9.1", True),
        ("rtx", "1.7.1.116", "1.8.1.116", False),
        ("rtx", "1.7.1.116", "2.7.1.116", False),
    ],
)
def test_an_engine_runs_in_the_version_that_built_it(
    rig: Rig, flavor: str, built: str, installed: str, runs: bool
) -> None:
    write = write_rtx_engine if flavor == "rtx" else write_engine
    rig.path = write(rig.folder, version=built, spec=rig.network.spec, profile=PROFILE)
    rig.install(rtx=flavor == "rtx", version=installed)
    if runs:
        assert rig.engine().backend == flavor
        return
    with pytest.raises(ModelFileError) as caught:
        rig.engine()
    title = {"rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}[flavor]
    assert f"f.engine: built by {title} {built}, and {installed} is installed: build it again: python" in str(
        caught.value
    )


def test_an_engine_of_tensorrt_10_3_runs(rig: Rig, frames: list[Frame]) -> None:
    """Its contexts have no runtime config."""
    with rig.detector() as detector:
        expected = detector.detect(frames[0])
    rig.path = write_engine(rig.folder, version="10.3.0", spec=rig.network.spec, profile=PROFILE)
    rig.install(version="10.3.0")
    with rig.detector() as detector:
        assert_identical(detector.detect(frames[0]), expected)


@pytest.mark.parametrize("what", ["capturable", "capture"])
def test_where_a_capture_fails_the_detector_works_without_graphs(rig: Rig, frames: list[Frame], what: str) -> None:
    with rig.detector() as detector:
        expected = [detector.detect(frame) for frame in frames]
    rig.path = write_rtx_engine(rig.folder, version="1.7.1.116", spec=rig.network.spec, profile=PROFILE)
    trt = rig.install(rtx=True, version="1.7.1.116")
    trt.fails[what] = "a tensor's size is known at run time only"
    with pytest.warns(RuntimeWarning, match="CUDA graphs are not used, calls take longer") as warned:
        detector = rig.detector()
    assert len(warned) == 1
    with detector, warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert detector.environment()["cuda_graphs"] is False
        for _ in range(3):
            for frame, faces in zip(frames, expected, strict=True):
                assert_identical(detector.detect(frame), faces)
        runs = trt.enqueued
        with detector.stream(4) as stream:  # other lanes do not try again
            for index, (_, found) in enumerate(stream.map(frames * 4)):
                assert_identical(found, expected[index % len(frames)])
        assert trt.enqueued == runs + 4 * len(frames)
    if what == "capture":
        assert "a tensor's size is known" in str(warned[0].message)


def test_what_an_engine_knows(rig: Rig) -> None:
    engine = rig.engine()
    assert engine.profile == Profile((1, 2, 4), ((32, 32), (64, 96), (320, 640)))
    assert engine.spec == rig.network.spec
    engine.close()
    assert is_gone(lambda: rig.trt.engines)


def test_the_workspace_of_a_shape(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TensorRT cannot tell it is that of the largest shape, and never nothing."""
    context = rig.engine().context()
    assert context.set_shape((1, *SIZE)) == workspace_bytes((1, *SIZE, 3))
    rig.trt.fails = {"size": "no"}
    assert context.set_shape((1, *SIZE)) == workspace_bytes(PROFILE["max"])
    monkeypatch.setattr(tensorrt_api, "set_shape", lambda *arguments: 0)
    assert context.set_shape((1, *SIZE)) == 1


def test_padding_is_the_mean_of_the_model(rig: Rig, network: HostEngine) -> None:
    spec = dataclasses.replace(network.spec, preprocess=PreprocessSpec(mean_bgr=(1, 2, 3)))
    rig.path = write_engine(rig.folder, spec=spec, profile=PROFILE)
    engine = rig.engine()
    box, frame = Letterbox.place((32, 32), (32, 64)), np.full((32, 32, 3), 7, np.uint8)
    described = trt_runtime.kernels.describe_frame(frame.ctypes.data, 96, (32, 32), box.scaled_hw)
    with rig.device.activate():
        stream, images = rig.device.stream(), rig.device.allocate(2 * 32 * 64 * 3, "images")
        table = (trt_runtime.kernels.LetterboxFrame * 2)(described)
        engine.letterbox(ctypes.addressof(table), (2, 32, 64), images.address, stream)
        stream.synchronize()
        found = rig.device.view(images.address, images.nbytes).reshape(2, 32, 64, 3)
        np.testing.assert_array_equal(found[0], box.apply(frame, (1, 2, 3)))
        np.testing.assert_array_equal(found[1], np.broadcast_to(np.uint8([1, 2, 3]), (32, 64, 3)))


def test_tensorrt_must_be_installed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match=r"running .*f\.engine needs tensorrt, .* pip install -e '\.\[trt\]'"):
        rig.engine()


def test_an_engine_is_checked_before_it_is_loaded(rig: Rig) -> None:
    rig.trt.fails = {"engine": "loaded"}
    rig.path.write_bytes(rig.path.read_bytes()[:-1] + b"x")
    with pytest.raises(
        ModelFileError, match=r"f\.engine: the engine is not the one its sidecar describes: its SHA-256"
    ):
        rig.engine()
    rig.path = write_engine(rig.folder, spec=rig.network.spec, profile=PROFILE, compute_capabilities=(80, 90))
    with pytest.raises(ModelFileError) as caught:
        rig.engine()
    assert "built for sm_80, sm_90, and NVIDIA A10, device 0 is sm_86: build it again for this GPU: python -m" in str(
        caught.value
    )
    assert not rig.trt.engines


def test_capabilities_are_looked_up_and_not_compared(tmp_path: Path) -> None:
    path = write_engine(tmp_path, compute_capabilities=(75, 90))
    sidecar = read_sidecar(path)
    for capability in (75, 90):
        check_runs_here(path, sidecar, capability, "a GPU")
    for capability in (74, 80, 100):
        with pytest.raises(ModelFileError, match=f"a GPU is sm_{capability}"):
            check_runs_here(path, sidecar, capability, "a GPU")


def test_what_is_loaded_is_what_was_hashed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file may take the engine's place after the check; here it does so as the plugin is looked for."""
    checked = rig.path.read_bytes()

    def swap(*arguments: Any, **options: Any) -> Path:
        rig.path.write_bytes(b"another engine")
        return Path(str(library()._name))

    monkeypatch.setattr("trt_runtime.gpu.engine.ensure_library", swap)
    engine = rig.engine()
    assert rig.path.read_bytes() == b"another engine"
    assert engine._engine.content == checked
    engine.close()


# TensorRT's API for real, as far as it goes without a GPU


def test_the_real_logger_and_runtime() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = tensorrt_api.make_logger(trt)
    for severity in (trt.ILogger.VERBOSE, trt.ILogger.INFO, trt.ILogger.WARNING):
        logger.log(severity, "no error")
    logger.log(trt.ILogger.ERROR, "[checkMacros.cpp::catchCudaError::212] Error Code 1: Cuda Runtime")
    assert not logger.errors
    for number in range(5):
        logger.log(trt.ILogger.ERROR, f"error {number}")
        logger.log(trt.ILogger.INTERNAL_ERROR, f"internal {number}")
    assert len(logger.errors) == 8
    assert logger.errors[-1] == "internal 4"
    logger.errors.clear()
    runtime = tensorrt_api.make_runtime(trt, logger)
    if runtime is None:
        pytest.skip(f"TensorRT-RTX does not start here: {logger.errors}")
    assert not tensorrt_api.load_plugin(runtime, "/nonexistent/plugin.so")
    assert "/nonexistent/plugin.so" in logger.errors[-1]
    assert tensorrt_api.deserialize(runtime, b"vtrt" + bytes(60)) is None
    assert "deserializeCudaEngine" in logger.errors[-1]


def test_no_runtime_is_none() -> None:
    def runtime(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    assert tensorrt_api.make_runtime(SimpleNamespace(Runtime=runtime), None) is None


# sizes


def test_profiles() -> None:
    several = Profile((1, 1, 8), ((32, 64), (320, 320), (640, 1280)))
    assert several.fixed_hw is None
    assert str(several) == "32x64 to 640x1280"
    for size in ((32, 64), (640, 1280), (320, 320), (32, 1280)):
        assert several.takes(size)
    for size in ((31, 64), (32, 63), (641, 1280), (640, 1281), (640, 32), (1280, 640)):
        assert not several.takes(size)
    one = Profile((1, 4, 8), ((320, 640),) * 3)
    assert one.fixed_hw == (320, 640)
    assert str(one) == "320x640"
    assert Profile((1, 1, 1), ((320, 320), (320, 320), (320, 640))).fixed_hw is None


# the plugin form on the CPU


def test_what_the_cpu_takes(network: HostEngine, plugin_form: Path) -> None:
    assert network.profile == Profile((1, 1, 8), ((32, 32), (640, 640), (3264, 3264)))
    assert MAX_BATCH * 640 * 3264 <= MAX_NETWORK_PIXELS < MAX_BATCH * 640 * 3296
    assert network.files == [plugin_form]
    assert network.backend == "host"
    assert network.environment() == {
        "backend": "host",
        "onnxruntime": importlib.import_module("onnxruntime").__version__,
    }
    assert network._session.get_session_options().intra_op_num_threads == 1  # each lane has a thread of its own


def test_engines_and_files_in_parts_are_none_for_the_cpu(plugin_form: Path, tmp_path: Path) -> None:
    for name in ("f.engine", "F.PLAN"):
        with pytest.raises(ModelFileError, match=rf"{name}: engines run on a GPU; device cpu runs the \.plugin\.onnx"):
            HostEngine(tmp_path / name, HostDevice())
    path = tmp_path / "parts.onnx"
    onnx.save(onnx.load(plugin_form), path, save_as_external_data=True, size_threshold=0, location="parts.data")
    with pytest.raises(
        ModelFileError, match=r"parts\.onnx: device cpu runs plugin forms, in one file: .*--out parts\.plug"
    ):
        HostEngine(path, HostDevice())


def test_a_context_reads_and_writes_where_it_was_told(network: HostEngine, astronaut: Frame) -> None:
    """Two images in one call give what each gives alone, and nothing beside the outputs is touched."""
    device = HostDevice()
    box = Letterbox.place(astronaut.shape[:2], SIZE)
    batch = np.stack([box.apply(frame, (1, 2, 3)) for frame in (astronaut[::-1], astronaut)])
    expected = network.run(batch)[0]
    assert expected["num_detections"].shape == (2,)
    with device.activate():
        stream = device.stream()
        memory = {"images": device.allocate(batch.nbytes, "images")}
        for name, values in expected.items():
            memory[name] = device.allocate(values.nbytes, name)
        made = _on(network, device).context()
        workspace = device.allocate(made.set_shape((2, *SIZE)), "the workspace")
        made.bind({name: item.address for name, item in memory.items()}, workspace)
        device.view(memory["images"].address, batch.nbytes)[:] = batch.reshape(-1)
        gate = threading.Event()
        stream.submit(gate.wait)
        made.enqueue(stream)
        early = device.view(memory["num_detections"].address, 8).view(np.int32).copy()
        gate.set()
        assert (early == -1).all()  # it is put on the stream, and not done
        stream.synchronize()
        for name, values in expected.items():
            got = device.view(memory[name].address, values.nbytes).view(values.dtype).reshape(values.shape)
            np.testing.assert_array_equal(got, values)
        assert 0 < made.plugin_share(stream) < 1
        made.close()
        for item in (*memory.values(), workspace):
            item.close()  # which looks at what lies beside it


def test_the_share_of_decoding_on_the_cpu(network: HostEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([5.0, 8.0, 9.0])
    monkeypatch.setattr("trt_runtime.gpu.simulated.time.perf_counter", lambda: next(ticks))
    assert network.run(np.zeros((1, 32, 32, 3), np.uint8))[1] == 0.25  # the network took 3, decoding 1


def _on(network: HostEngine, device: HostDevice) -> HostEngine:
    """Return an engine with another device."""
    other = object.__new__(HostEngine)
    other.__dict__ = {**network.__dict__, "_device": device}
    return other


def test_the_cpu_letterbox_pads_and_takes_its_turn(network: HostEngine) -> None:
    device = HostDevice()
    engine = _on(network, device)
    engine.spec = ModelSpec(preprocess=PreprocessSpec(mean_bgr=(4, 5, 6)), decode=DecodeSpec())
    box, frame = Letterbox.place((32, 32), (64, 32)), np.full((32, 32, 3), 7, np.uint8)
    with device.activate():
        stream, images = device.stream(), device.allocate(64 * 32 * 3, "images")
        table = (trt_runtime.kernels.LetterboxFrame * 1)(
            trt_runtime.kernels.describe_frame(frame.ctypes.data, 96, (32, 32), box.scaled_hw)
        )
        gate = threading.Event()
        stream.submit(gate.wait)
        engine.letterbox(ctypes.addressof(table), (1, 64, 32), images.address, stream)
        assert (device.view(images.address, images.nbytes) == 0xFF).all()
        gate.set()
        stream.synchronize()
        found = device.view(images.address, images.nbytes).reshape(64, 32, 3)
        np.testing.assert_array_equal(found, box.apply(frame, (4, 5, 6)))
