"""TRTRetinaFace on a GPU: what the device interface on the CPU cannot show (make test-gpu)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from export.engine_layers import engine_shares, is_readable
from export.to_trt import EngineOptions, Profile, build_engine
from export.verify import VerifyOptions, verify
from facespec.errors import MissingPackageError, ModelFileError
from facespec.letterbox import Frame
from tests.faces import assert_identical
from trt_runtime import Nv12Frame, OrtRetinaFace, TRTRetinaFace
from trt_runtime.gpu.cuda import CudaDevice
from trt_runtime.gpu.flavor import RTX, find_flavor, gpu_capability
from trt_runtime.gpu.sidecar import Sidecar, read_sidecar, sidecar_path
from trt_runtime.measure import StageTimer

pytestmark = pytest.mark.gpu

SIZE = (320, 320)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    """An engine in FP32 for any size and batch, and its plugin form."""
    try:
        flavor = find_flavor()
    except MissingPackageError as error:
        pytest.skip(str(error))
    if flavor is RTX and gpu_capability() not in RTX.capabilities:
        pytest.skip(f"TensorRT-RTX builds no engines for sm_{gpu_capability()}, and TensorRT is not installed")
    path = tmp_path_factory.mktemp("engine") / "f.engine"
    profile = Profile((1, 1, 8), ((32, 32), SIZE, (640, 1536)))
    found = EngineOptions("mobilenet0.25", path, profile, flavor=flavor.name)
    build_engine(found)
    return found


@pytest.fixture(scope="module")
def detector(options: EngineOptions) -> Iterator[TRTRetinaFace]:
    with TRTRetinaFace(options.out, size_hw=SIZE) as detector:
        yield detector


@pytest.fixture(scope="module")
def frames(crowd: Frame, astronaut: Frame) -> list[Frame]:
    return [
        astronaut,
        crowd,
        np.full((70, 130, 3), 90, np.uint8),
        np.asarray(cv2.resize(astronaut, SIZE), np.uint8),
        astronaut[:400, 100:333],
    ]


def test_the_faces_of_onnx_runtime(options: EngineOptions, frames: list[Frame]) -> None:
    for size in (SIZE, (192, 480), 320, None):
        plain = OrtRetinaFace(options.plugin_form, size_hw=size)  # type: ignore[arg-type]
        with TRTRetinaFace(options.out, size_hw=size) as detector:  # type: ignore[arg-type]
            for frame, found in zip(frames * 2, detector.detect_batch(frames * 2), strict=True):
                expected = plain.detect(frame)
                assert len(found) == len(expected)
                scale = max(1, max(frame.shape) / 320)
                np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.1 * scale)
                np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=0.1 * scale)
                np.testing.assert_allclose(found.scores, expected.scores, atol=2e-3)


def test_graphs_give_the_bits_of_plain_launches(options: EngineOptions, frames: list[Frame]) -> None:
    with TRTRetinaFace(options.out, graphs=False) as plain, TRTRetinaFace(options.out) as detector:
        for _ in range(4):
            for frame in frames:
                assert_identical(detector.detect(frame), plain.detect(frame))
        plans = detector._idle[0]._plans._values.values()  # type: ignore[attr-defined]
        assert any(plan._graph is not None for plan in plans)


def test_frames_of_torch_where_they_lie(detector: TRTRetinaFace, frames: list[Frame]) -> None:
    torch = pytest.importorskip("torch")
    for frame in frames:
        expected = detector.detect(frame)
        tensor = torch.from_numpy(np.ascontiguousarray(frame)).cuda()
        assert_identical(detector.detect(tensor), expected)
        source = frame.copy()
        copied = detector.to_device(source)
        source[:] = 0  # the copy is made by then
        assert_identical(detector.detect(copied), expected)
        padded = torch.empty((frame.shape[0], frame.shape[1] + 13, 3), dtype=torch.uint8, device="cuda")
        padded[:, : frame.shape[1]] = tensor
        assert_identical(detector.detect(padded[:, : frame.shape[1]]), expected)
    with torch.cuda.stream(torch.cuda.Stream()):  # what is still being made on another stream is waited for
        target = torch.zeros((512, 512, 3), dtype=torch.uint8, device="cuda")
        source = torch.from_numpy(frames[0]).cuda()
        torch.cuda._sleep(200_000_000)
        target.copy_(source)
        assert_identical(detector.detect(target), detector.detect(frames[0]))


def test_nv12(detector: TRTRetinaFace, astronaut: Frame) -> None:
    height, width = astronaut.shape[:2]
    planar = cv2.cvtColor(astronaut, cv2.COLOR_BGR2YUV_I420).reshape(-1)
    luma = planar[: height * width].reshape(height, width)
    chroma = np.stack(np.split(planar[height * width :], 2), axis=-1).reshape(height // 2, width)
    decoded = np.asarray(cv2.cvtColor(np.vstack([luma, chroma]), cv2.COLOR_YUV2BGR_NV12), np.uint8)
    torch = pytest.importorskip("torch")
    planes = (torch.from_numpy(np.ascontiguousarray(plane)).cuda() for plane in (luma, chroma))
    found, expected = detector.detect(Nv12Frame(*planes, "bt601")), detector.detect(decoded)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.3)


def test_threads_and_runs_give_the_same_bits(detector: TRTRetinaFace, frames: list[Frame]) -> None:
    expected = [detector.detect(frame) for frame in frames]

    def work(seed: int) -> None:
        for index in np.random.default_rng(seed).integers(0, len(frames), 100):
            assert_identical(detector.detect(frames[index]), expected[index])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    with detector.stream(4) as stream:
        for index, (_, found) in enumerate(stream.map(frames * 20)):
            assert_identical(found, expected[index % len(frames)])


def test_an_engine_in_fp16_keeps_to_its_budget_and_its_precision(options: EngineOptions, tmp_path: Path) -> None:
    """Against PyTorch: TensorRT may add up in FP16, which no emulation on a CPU shows."""
    path = tmp_path / "half.engine"
    profile = Profile((1, 1, 8), ((640, 640),) * 3)
    build_engine(dataclasses.replace(options, out=path, profile=profile, precision="fp16"))
    found = verify(VerifyOptions("mobilenet0.25", str(path), images=8, progress=False))
    print(found)
    assert found.budget == "fp16"
    assert found.passed, str(found)
    sidecar = read_sidecar(path)
    assert is_readable(sidecar)
    shares, problems = engine_shares(path, sidecar)
    print(f"{sidecar.flavor} {sidecar.version}, by EngineInspector: {shares}")
    assert problems == []
    assert sum(shares.values()) == pytest.approx(1)
    assert shares.get("fp16", 0) > 0.5, shares


def test_another_gpus_engine_is_refused(options: EngineOptions, tmp_path: Path) -> None:
    sidecar = read_sidecar(options.out)
    path = tmp_path / "f.engine"
    path.write_bytes(options.out.read_bytes())
    other = dataclasses.replace(sidecar, compute_capabilities=(61,))
    assert Sidecar.from_json(other.to_json()) == other
    sidecar_path(path).write_text(other.to_json())
    with pytest.raises(ModelFileError, match=r"sm_61|compute capabilities"):
        TRTRetinaFace(path)


def test_stages_add_up(detector: TRTRetinaFace, astronaut: Frame) -> None:
    timer = StageTimer(fine=True)
    detector.detect(astronaut, timer)
    assert list(timer.total_ms) == ["upload", "letterbox", "network", "decode+NMS", "results"]
    assert min(timer.total_ms.values()) > 0, json.dumps(timer.total_ms)


def test_frames_and_contexts_of_pycuda(options: EngineOptions, frames: list[Frame], detector: TRTRetinaFace) -> None:
    pytest.importorskip("pycuda.driver")
    import pycuda.driver as cuda
    from pycuda.gpuarray import to_gpu

    expected = [detector.detect(frame) for frame in frames]
    cuda.init()
    context = cuda.Device(0).make_context()
    try:
        stream = cuda.Stream()
        device = CudaDevice(None, stream)
        with TRTRetinaFace(options.out, size_hw=SIZE, device=device) as inside:
            for frame, want in zip(frames, expected, strict=True):
                for given in (frame, to_gpu(np.ascontiguousarray(frame))):
                    assert_identical(inside.detect(given), want)
        assert cuda.Context.get_current() is not None
        device.close()
    finally:
        context.pop()
        context.detach()
