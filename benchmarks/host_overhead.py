"""What one call of `detect` costs on the host around the network, beside the same work written straight.

python -m benchmarks.host_overhead [--faces 0,6,50] [--json -] [--out benchmarks/results/host_overhead.json]

TRTRetinaFace runs a stub of an engine over a driver without a GPU (tests/trt_runtime/fake_cuda.c, through the real
cuda-bindings), so what is timed is Python, the calls of the driver and the copies. "bare" makes the same calls with
nothing around them: it activates the context, writes the description of the frame, launches the graph, waits, and
scales what was found; of a frame of the host it copies that to page-locked memory and uploads it, too. The detectors on
the CPU get their network's answer from memory, so what is timed is all that surrounds `session.run` and `infer`; "bare"
is the host kernel for decoding, and scaling. All take turns in one run.
"""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import benchmark_parser, parse, write_result
from export.to_trt import EngineOptions, build_engine
from facespec.cli import json_output, run, text_table
from facespec.letterbox import Letterbox
from facespec.samples import sample_frames
from facespec.spec import ModelSpec
from trt_runtime.cpu import OpenVinoRetinaFace, OrtRetinaFace
from trt_runtime.gpu.cuda import CudaDevice
from trt_runtime.gpu.sidecar import Profile
from trt_runtime.kernels import decode_nms
from trt_runtime.measure import take_turns
from trt_runtime.trt import Nv12Frame, TRTRetinaFace

ROOT = Path(__file__).resolve().parent.parent
SIZE = (640, 640)
LARGE = (1080, 1920)
WARM_UP = 3
THREADS, THREAD_CALLS = 4, 50
THREADED = f"device_frame_{THREADS}_threads"
DESCRIPTION = struct.Struct("<4Q4i4i")


def load_fake_driver(folder: Path) -> None:
    """Compile the driver without a GPU, and load it before cuda-bindings look for theirs."""
    library = folder / "libcuda.so"
    source = ROOT / "tests" / "trt_runtime" / "fake_cuda.c"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", library, "-ldl", "-lpthread"]
    subprocess.run(list(map(str, command)), check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


class StubEngine:
    """An `Engine` that finds the same faces in every frame, and is its own only `Context`."""

    backend = "stub"
    files: tuple[Path, ...] = ()
    profile = Profile((1, 1, 1), (SIZE, SIZE, SIZE))

    def __init__(self, device: CudaDevice, faces: int) -> None:
        self.spec = ModelSpec()
        self.found = make_outputs(self.spec, faces)
        self._device = device

    def context(self, repeats: bool = True) -> StubEngine:
        return self

    def set_shape(self, shape: Any) -> int:
        return 1

    def bind(self, addresses: dict[str, int], workspace: Any) -> None:
        for name, values in self.found.items():  # the memory of this driver is the host's
            ctypes.memmove(addresses[name], values.ctypes.data, values.nbytes)
        self._first = addresses["num_detections"]

    def letterbox(self, *_: Any) -> None:
        return

    def enqueue(self, stream: Any) -> None:
        self._device.copy_in(self._first, self.found["num_detections"].view(np.uint8), stream)

    def can_capture(self, stream: Any) -> bool:
        return True

    def environment(self) -> dict[str, Any]:
        return {"backend": self.backend}

    def save(self) -> None:
        return

    def close(self) -> None:
        return


def make_outputs(spec: ModelSpec, faces: int) -> dict[str, NDArray[Any]]:
    """Return the outputs of a detector graph for one image with so many faces."""
    random = np.random.default_rng(faces)
    found = {name: np.zeros((1, *shape), kind) for name, (kind, shape) in spec.decode.outputs.items()}
    for name in ("num_detections", "num_candidates"):
        found[name][:] = faces
    for name in ("boxes", "landmarks"):
        found[name][:, :faces] = random.uniform(0, 640, found[name][:, :faces].shape)
    found["scores"][:, :faces] = np.linspace(0.99, 0.6, faces)
    return found


class Straight:
    """The calls for one shape of frame with nothing around them, on the plan of a detector that has seen the shape."""

    def __init__(self, detector: TRTRetinaFace, lane: Any, frame_hw: tuple[int, int]) -> None:
        device: Any = detector.device
        plan = lane._plans.get((1, *SIZE))
        self._lane, self._driver = lane, device.cuda.driver
        self._stream = self._driver.CUstream(lane._stream.handle)
        self._graph, self._context = plan._graph._executable, device._context
        self._descriptions = plan._table
        self._count, (self._boxes,), (self._scores,), (self._landmarks,), _ = plan.outputs
        box = Letterbox.fit(frame_hw, SIZE)
        self._sides = *frame_hw, *box.scaled_hw
        self._scale = np.asarray((1 / box.scale_xy[0], 1 / box.scale_xy[1]) * 2, np.float32)

    def __call__(self, address: int, pitch: int, chroma: int = 0, pixel_format: int = 0) -> Any:
        self._driver.cuCtxPushCurrent(self._context)
        return self._run(address, pitch, chroma, pixel_format)

    def upload(self, frame: NDArray[np.uint8], copy: bool = True) -> Any:
        self._driver.cuCtxPushCurrent(self._context)
        pinned, memory = self._lane._uploads
        source = pinned[: frame.size].reshape(frame.shape) if copy else frame
        if copy:
            np.copyto(source, frame)
        self._driver.cuMemcpyHtoDAsync(memory.address, source.ctypes.data, source.size, self._stream)
        return self._run(memory.address, 3 * self._sides[1], 0, 0)

    def _run(self, address: int, pitch: int, chroma: int, pixel_format: int) -> Any:
        driver = self._driver
        row = address, chroma, pitch, pitch if chroma else 0, *self._sides, pixel_format, 0, 0, 0
        DESCRIPTION.pack_into(self._descriptions, 0, *row)
        driver.cuGraphLaunch(self._graph, self._stream)
        driver.cuStreamSynchronize(self._stream)
        driver.cuCtxPopCurrent()
        count, scale = int(self._count[0]), self._scale
        return self._boxes[:count] * scale, self._scores[:count].copy(), self._landmarks[:count] * scale[:2]


class Interface:
    """An array on the GPU as PyTorch and CuPy show it: the dict is made anew at every look."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self._address, self.shape = address, shape

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": "|u1", "data": (self._address, False), "strides": None, "version": 2}


class Capsule:
    """An array on the GPU as DLPack shows it; a capsule is made at every look, as by every library."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._sides = (ctypes.c_int64 * len(shape))(*shape)
        tensor = struct.pack("<Qiii2BHQQQ", address, 2, 0, len(shape), 1, 8, 1, ctypes.addressof(self._sides), 0, 0)
        self._managed = ctypes.create_string_buffer(tensor + bytes(16))
        self._make = ctypes.pythonapi.PyCapsule_New
        self._make.restype, self._make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, stream: int | None = None, max_version: tuple[int, int] | None = None) -> object:
        return self._make(ctypes.addressof(self._managed), b"dltensor", None)


Pair = tuple[Callable[[int], object], Callable[[int], object]]


def gpu_cases(faces: list[int]) -> dict[str, Pair]:
    """Return a call of ours and the bare one for each kind of frame, with the first number of faces; one for others."""
    random = np.random.default_rng(0)
    small, large = (random.integers(0, 256, (*size, 3), np.uint8) for size in (SIZE, LARGE))
    cases: dict[str, Pair] = {}
    for count in faces:
        device = CudaDevice(0)
        detector = TRTRetinaFace(StubEngine(device, count), device=device)  # type: ignore[arg-type]
        frame = detector.to_device(large)
        address, rows = frame.__cuda_array_interface__["data"][0], large.strides[0]
        luma, chroma = Interface(address, LARGE), Interface(address, (LARGE[0] // 2, LARGE[1]))
        frames: dict[str, Any] = {"device_frame": frame}
        if count == faces[0]:
            frames["cuda_array_interface"] = Interface(address, large.shape)
            frames["dlpack"] = Capsule(address, large.shape)
            frames["nv12"] = Nv12Frame(luma, chroma)
            frames["numpy_640"], frames["numpy_1080p"] = small, large
            frames["pinned_640"], frames["pinned_1080p"] = (detector.pinned_frame(*size) for size in (SIZE, LARGE))
        for name, item in frames.items():
            found = [detector.detect(item) for _ in range(WARM_UP)]  # the second call captures the graph
            assert len(found[-1]) == count, name
            frame_hw = SIZE if name.endswith("640") else LARGE
            straight = Straight(detector, detector._idle[-1], frame_hw)
            if isinstance(item, np.ndarray):
                bare = partial(straight.upload, item, name.startswith("numpy"))
            elif name == "nv12":
                bare = partial(straight, address, LARGE[1], address, 3)
            else:
                bare = partial(straight, address, rows)
            if count != faces[0]:
                name = f"{name}_{count}_faces"
            cases[name] = (lambda _, item=item, detector=detector: detector.detect(item)), (lambda _, bare=bare: bare())  # type: ignore[misc]
        if count == faces[0]:
            lanes = _warm_lanes(detector, frame)
            straights = [partial(Straight(detector, lane, LARGE), address, rows) for lane in lanes]
            cases[THREADED] = _in_threads([partial(detector.detect, frame)] * THREADS), _in_threads(straights)
    return cases


def _warm_lanes(detector: TRTRetinaFace, frame: Any) -> list[Any]:
    """Return a lane for each of `THREADS`, all of which have seen the shape of a frame."""
    box = Letterbox.fit(frame.frame_hw, SIZE)
    with ExitStack() as stack:
        lanes = [stack.enter_context(detector._lane()) for _ in range(THREADS)]
        for lane in lanes * WARM_UP:
            lane.run([frame], [box], None)
    return lanes


def _in_threads(calls: Sequence[Callable[[], object]]) -> Callable[[int], object]:
    """Return what makes `THREAD_CALLS` calls of each on a thread of its own, at the same time."""
    pool = ThreadPoolExecutor(len(calls))

    def repeat(call: Callable[[], object]) -> None:
        for _ in range(THREAD_CALLS):
            call()

    return lambda _: list(pool.map(repeat, calls))


class Remembers:
    """A request of OpenVINO, or a session of ONNX Runtime, that gives the answer it gave first."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._answer: Any = None

    def infer(self, *arguments: Any, **options: Any) -> Any:
        if self._answer is None:
            self._answer = dict(self._real.infer(*arguments, **options))
        return self._answer

    def run(self, *arguments: Any) -> Any:
        if self._answer is None:
            self._answer = self._real.run(*arguments)
        return self._answer


def cpu_cases(folder: Path) -> dict[str, Pair]:
    """Return a call of ours and the bare one for the detectors on the CPU, on a photograph scaled to the network."""
    model = folder / "model.plugin.onnx"
    build_engine(EngineOptions("mobilenet0.25", model, Profile(sizes_hw=(SIZE, SIZE, SIZE)), onnx_only=True))
    frame = np.asarray(cv2.resize(next(iter(sample_frames().values())), SIZE), np.uint8)
    cases: dict[str, Pair] = {}
    for detector in (OpenVinoRetinaFace(model), OrtRetinaFace(model)):
        detector.detect(frame)
        lane: Any = detector._idle[-1]
        if isinstance(detector, OpenVinoRetinaFace):
            compiled, request = next(iter(lane._requests.items()))
            lane._requests[compiled] = remembers = Remembers(request)
        else:
            lane._session = remembers = Remembers(lane._session)
        detector.detect(frame)
        answer = remembers._answer
        maps = list(answer.values()) if isinstance(answer, dict) else answer
        spec = detector.spec

        def bare(_: int, maps: Any = maps, spec: Any = spec) -> object:
            found = decode_nms(maps, SIZE, spec)
            count = int(found["num_detections"][0])
            return found["boxes"][0, :count] * np.float32(1), found["landmarks"][0, :count] * np.float32(1)

        cases[detector.backend] = (lambda _, detector=detector: detector.detect(frame)), bare  # type: ignore[misc]
    return cases


def main() -> int:
    """Time all cases in turns, print a table, and write the result."""
    parser = benchmark_parser("host_overhead", __doc__)
    parser.add_argument("--faces", default="6,0,50", help="faces in a frame; the first for all kinds of frames")
    parser.add_argument("--repeats", type=int, default=2000, help="calls of each case")
    parser.add_json("ours_us, bare_us and ratio of each case")
    args = parse(parser, repeats=50)
    with tempfile.TemporaryDirectory() as folder, json_output(args.json) as write:
        load_fake_driver(Path(folder))
        cases = {**gpu_cases([int(count) for count in args.faces.split(",")]), **cpu_cases(Path(folder))}
        figures = {}
        for name, pair in cases.items():
            calls = THREADS * THREAD_CALLS if name == THREADED else 1
            samples = take_turns(pair, max(args.repeats // calls, 25), pause_s=0)
            ours, bare = (float(np.median(each)) * 1e3 / calls for each in samples)
            figures[name] = {"ours_us": round(ours, 2), "bare_us": round(bare, 2), "ratio": round(ours / bare, 3)}
        rows = [[name, *map(str, each.values())] for name, each in figures.items()]
        print(text_table(["", "ours us", "bare us", "ratio"], rows))
        what = "one warm call of detect without the network, p50 in us, beside the same calls written straight"
        write_result(args, what, [figures], "numpy", "cuda-bindings", "openvino", "onnxruntime")
        write(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    run(main)
