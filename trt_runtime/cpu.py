"""Detectors on the CPU: an exported ONNX model in ONNX Runtime or in OpenVINO."""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from facespec.cli import require
from facespec.errors import BuildError, ModelFileError, OutputError, SpecError, reason
from facespec.letterbox import Frame, Letterbox
from facespec.spec import ModelSpec, NetworkSize, check_size
from trt_runtime.detector import Lane, RetinaFaceDetector, ShapeCache, letterboxed, network_size
from trt_runtime.kernels import decode_nms, library
from trt_runtime.measure import StageTimer, cores
from trt_runtime.onnx_model import OnnxModel, open_session

COMPILED_SIZES = 4
"""Network sizes for which OpenVINO keeps a compiled model."""

PRECISIONS = ("fp32", "bf16")
"""What a CPU can be asked to compute in where a model is not INT8."""

FIRST_FRAMES_HW = ((3, 4), (4, 3), (2, 3), (3, 2), (9, 16), (16, 9))
"""Shapes of photographs and videos that a model for frames of a longer side runs before the first frame."""

_MOST_RUN_FIRST = 1280  # a longer side beyond which that would take seconds

_KERNELS = 1024
"""Kernels that OpenVINO keeps for frames of a longer side: about 20 shapes, 25 MB."""

_KERNELS_OF_ANY_SIZE = 64
"""The same for frames at their own sizes, which may come in thousands of shapes, each of several MB."""


def best_backend(model: OnnxModel, size: NetworkSize) -> str:
    """Return the faster backend for an ONNX detector, of those that are installed.

    OpenVINO runs one size fastest, INT8 and bf16 above all; but every new size costs it more than a frame takes, so in
    FP32 frames at their own sizes are for ONNX Runtime.
    """
    if not (_installed("openvino") and _installed("onnx")):
        return "onnxruntime"
    try:
        graph = model.heads_graph
        if model.weights or (graph.fixed_hw is None and size is None and not graph.half):
            return "onnxruntime"
    except ModelFileError:  # no head maps: a portable graph decodes by itself
        return "onnxruntime"
    try:
        library()
    except (BuildError, OutputError) as error:
        # figures: benchmarks/results/cpu_latency.json, ONNX Runtime against OpenVINO on one and two threads
        warnings.warn(
            "decoding and NMS cannot be compiled, so the model runs in ONNX Runtime, which takes 1.2 to 1.4 times as "
            f"long as OpenVINO, with INT8 about 6 times: {error}",
            stacklevel=3,
        )
        return "onnxruntime"
    return "openvino"


class _CpuRetinaFace(RetinaFaceDetector):
    """What both detectors share: how a model is opened, and which threads its calls have."""

    def __init__(
        self,
        path: str | Path | OnnxModel,
        *,
        score_threshold: float | None = None,
        size_hw: NetworkSize = None,
        threads: int | None = None,
        streams: int = 1,
        precision: str = "fp32",
    ) -> None:
        if precision not in PRECISIONS:
            raise SpecError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
        for name, value in (("threads", threads), ("streams", streams)):
            if value is not None and (type(value) is not int or not 1 <= value <= 256):
                raise SpecError(f"{name} must be a number from 1 to 256, got {value!r}")
        model = path if isinstance(path, OnnxModel) else OnnxModel(path)
        size = self._open(model, size_hw, threads, streams, precision)
        super().__init__(model.spec, [model.path, *model.weights], score_threshold, size)
        self._opened_by(model.path, threads=threads, streams=streams, precision=precision)

    def _open(
        self, model: OnnxModel, size: NetworkSize, threads: int | None, streams: int, precision: str
    ) -> NetworkSize:
        """Prepare a model to run; return what frames are letterboxed to."""
        raise NotImplementedError


class OrtRetinaFace(_CpuRetinaFace):
    """An exported ONNX detector on the CPU, through ONNX Runtime.

    Of a plugin form, which TensorRT builds, the network runs in ONNX Runtime and the plugin on the host
    (`trt_runtime.kernels`).

    Args:
        path: File written by `python -m export.to_onnx`, or a plugin form written by `python -m export.to_trt`; or
            what has been opened.
        score_threshold: Lowest score reported: 0.5 unless given, not below the floor the model was exported with.
        size_hw: What frames are letterboxed to, for models of dynamic size; see `facespec.spec.NetworkSize`.
        threads: Threads of the CPU; None leaves it to ONNX Runtime, which takes every core.
        streams: Calls from several threads that share the threads.
        precision: "fp32"; `OpenVinoRetinaFace` takes "bf16", too.

    Raises:
        ModelFileError: Missing, damaged, unsafe, or not a detector of this toolkit.
        SpecError: `score_threshold`, `size_hw`, `threads`, `streams` or `precision` does not fit.
        MissingPackageError: onnxruntime is not installed.
        BuildError: The host kernels of a plugin form must be compiled, and there is no C++ compiler.
    """

    backend = "onnxruntime"

    def _open(
        self, model: OnnxModel, size: NetworkSize, threads: int | None, streams: int, precision: str
    ) -> NetworkSize:
        path = model.path
        if precision != "fp32":
            raise SpecError(f"{path}: ONNX Runtime computes in fp32 on a CPU: {precision} needs backend openvino")
        # a model whose weights lie beside it is opened by the path that was checked, links resolved
        content: str | bytes = str(path.resolve()) if model.weights else model.content
        self._heads: list[str] = []
        if model.is_plugin_form:
            if model.weights:
                raise ModelFileError(f"{path}: a plugin form with weights in other files cannot be run on the CPU")
            content, self._heads = model.heads_graph.content, model.heads_graph.heads
            library()  # compiled now, if need be, and not with the first frame
        self._threads = threads if streams == 1 else max((threads or cores()) // streams, 1)
        self._session = open_session(content, path, self._threads)
        return network_size(_check_contract(self._session, path, model.spec, self._heads), size, path)

    def environment(self) -> dict[str, Any]:
        """Return backend, its version, and the threads of a call."""
        version = require("onnxruntime", "cpu", "OrtRetinaFace").__version__
        return {"backend": self.backend, "onnxruntime": version, "threads": self._threads or "every core"}

    def _new_lane(self) -> Lane:
        return _OrtLane(self._session, self._heads, self.spec)


class _OrtLane(Lane):
    """A session serves any number of threads, so there is nothing to keep."""

    def __init__(self, session: Any, heads: list[str], spec: ModelSpec) -> None:
        self._session, self._heads, self._spec = session, heads, spec
        self._outputs = heads or list(spec.decode.outputs)

    def run(self, frames: Sequence[Frame], boxes: Sequence[Letterbox], timer: StageTimer | None) -> list[NDArray[Any]]:
        if timer is not None:
            timer.begin("letterbox")
        batch = letterboxed(frames, boxes, self._spec)
        if timer is not None:
            timer.begin("network")
        try:
            outputs = self._session.run(self._outputs, {"images": batch})
        except Exception as error:
            raise ModelFileError(f"ONNX Runtime failed on a batch of {batch.shape}: {reason(error)}") from None
        if not self._heads:
            return list(outputs)
        if timer is not None:
            timer.begin("decode+NMS")
        return _decode(outputs, boxes[0].size_hw, self._spec)


class OpenVinoRetinaFace(_CpuRetinaFace):
    """An exported ONNX detector on the CPU: its network in OpenVINO, decoding and NMS by the plugin's host kernels.

    What is not INT8 computes in FP32, however it was exported, unless bf16 is asked for: that is faster on CPUs with
    AMX, slower on some others, and less exact (docs/precision.md). Frames of a batch run one after the other, so that
    every slot gives what a frame alone gives. Up to `COMPILED_SIZES` network sizes, each a height and a width, are kept
    compiled. Frames at their own sizes, or of a longer side, share one model of any size, so that no shape that comes
    up has to be compiled.

    Its arguments and errors are those of `OrtRetinaFace`, except that None as `threads` takes every core, that any
    model needs the host kernels and the packages openvino and onnx, that `streams` frames are computed at once, and
    that `precision="bf16"` is refused by a CPU without it.
    """

    backend = "openvino"

    def _open(
        self, model: OnnxModel, size: NetworkSize, threads: int | None, streams: int, precision: str
    ) -> NetworkSize:
        path = model.path
        if model.weights:
            raise ModelFileError(f"{path}: a model with weights in other files runs in ONNX Runtime only")
        self._openvino, self._core = _load_openvino()
        self._graph = model.heads_graph
        if self._graph.fixed_hw:
            check_size(self._graph.fixed_hw)
        size = network_size(self._graph.fixed_hw, size, path)
        if precision == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise SpecError("this CPU does not compute in bf16: leave precision at fp32")
        self._precision = precision
        library()
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or cores(),
            "NUM_STREAMS": streams,
            "CPU_RUNTIME_CACHE_CAPACITY": _KERNELS if isinstance(size, int) else _KERNELS_OF_ANY_SIZE,
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        }
        # not a method: that would make a reference cycle, and its memory would wait for the garbage collector
        make = functools.partial(_compile, self._core, self._graph.content, self._options, path)
        self._compiled: ShapeCache[tuple[int, int] | None, Any] = ShapeCache(COMPILED_SIZES, make)
        # compiled and run now, not with the first frames: what OpenVINO makes for a size of frame is kept
        request = self._compiled.get(_compiled_size(size)).create_infer_request()
        for height, width in _first_sizes(size):
            _infer(request, np.zeros((height, width, 3), np.uint8))
        return size

    def environment(self) -> dict[str, Any]:
        """Return backend, its version, threads, streams, and what the CPU computes in where the model is not INT8."""
        return {
            "backend": self.backend,
            "openvino": self._openvino.__version__,
            "threads": self._options["INFERENCE_NUM_THREADS"],
            "streams": self._options["NUM_STREAMS"],
            "precision": self._precision,
        }

    def _batch_limit(self, size_hw: tuple[int, int]) -> int:
        super()._batch_limit(size_hw)
        return 1

    def _new_lane(self) -> Lane:
        return _OpenVinoLane(self, self._compiled)

    def _free(self) -> None:
        super()._free()
        self._compiled.clear()


class _OpenVinoLane(Lane):
    """Keeps a request of each compiled model, and room for the letterboxed frame that it reads."""

    def __init__(self, detector: OpenVinoRetinaFace, compiled: ShapeCache[tuple[int, int] | None, Any]) -> None:
        self._detector, self._compiled = detector, compiled
        # requests go with their model, when the detector gives that up
        self._requests: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._room = np.empty(0, np.uint8)

    def run(self, frames: Sequence[Frame], boxes: Sequence[Letterbox], timer: StageTimer | None) -> list[NDArray[Any]]:
        (frame,), (box,) = frames, boxes
        spec = self._detector.spec
        size_hw = _compiled_size(self._detector.size_hw)
        compiled = self._compiled.get(size_hw)
        if compiled not in self._requests:
            self._requests[compiled] = compiled.create_infer_request()
        if timer is not None:
            timer.begin("letterbox")
        out = None
        if box.frame_hw != box.size_hw:
            height, width = box.size_hw
            if self._room.size < (size := height * width * 3):
                self._room = np.empty(size, np.uint8)
            out = self._room[:size].reshape(height, width, 3)
        pixels = box.apply(frame, spec.preprocess.mean_bgr, out=out)
        if timer is not None:
            timer.begin("network")
        found = _infer(self._requests[compiled], pixels)
        if timer is not None:
            timer.begin("decode+NMS")
        return _decode(found, box.size_hw, spec)  # copies: the request's memory serves the next call


def _infer(request: Any, pixels: Frame) -> list[NDArray[Any]]:
    """Return what a request makes of a letterboxed frame: views of its memory."""
    try:
        return list(request.infer({0: pixels[None]}, share_inputs=True, share_outputs=True).values())
    except Exception as error:
        raise ModelFileError(f"OpenVINO failed on a frame of {pixels.shape[:2]}: {reason(error)}") from None


def _first_sizes(size: NetworkSize) -> Iterable[tuple[int, int]]:
    """Return the network sizes that are sure or likely to come."""
    if isinstance(size, tuple):
        return (size,)
    if size is None or size > _MOST_RUN_FIRST:
        return ()
    return dict.fromkeys(Letterbox.longest(frame_hw, size).size_hw for frame_hw in FIRST_FRAMES_HW)


def _compiled_size(size: NetworkSize) -> tuple[int, int] | None:
    """Return the size that OpenVINO compiles a network for; None is any, for frames of many sizes."""
    return size if isinstance(size, tuple) else None


_loading_openvino = threading.Lock()


def _load_openvino() -> tuple[Any, Any]:
    """Return OpenVINO and the one Core of this process, made by one thread at a time."""
    with _loading_openvino:
        return _make_core()


@functools.cache
def _make_core() -> tuple[Any, Any]:
    """Return OpenVINO and a Core, which stays for as long as the process.

    A Core gives the thread that makes it another stack for signals. If another thread lets go of the Core, that memory
    is unmapped and still in use: the next signal ends the process. And the bindings must meet numpy once before threads
    use them: two that are the first to do so, at the same time, deadlock.
    """
    openvino = require("openvino", "cpu", "OpenVinoRetinaFace")
    _ = openvino.Tensor(np.zeros(1, np.uint8), shared_memory=True).data
    core = openvino.Core()
    core.get_versions("CPU")  # loads the CPU plugin, which owns that memory
    return openvino, core


def _compile(
    core: Any, content: bytes, options: dict[str, Any], path: str | Path, size_hw: tuple[int, int] | None
) -> Any:
    """Return a network in OpenVINO, compiled for one frame of a size, or of any size."""
    try:
        model = core.read_model(content)
        model.reshape({"images": [1, *(size_hw or (-1, -1)), 3]})
        return core.compile_model(model, "CPU", options)
    except Exception as error:  # OpenVINO raises RuntimeError for everything
        raise ModelFileError(f"{path}: OpenVINO cannot run it ({reason(error)})") from None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _decode(heads: Sequence[NDArray[Any]], size_hw: tuple[int, int], spec: ModelSpec) -> list[NDArray[Any]]:
    try:
        return list(decode_nms(heads, size_hw, spec).values())
    except ValueError as error:
        raise ModelFileError(f"the head maps are at odds with the model's spec: {error}") from None


def _check_contract(session: Any, path: str | Path, spec: ModelSpec, heads: list[str]) -> tuple[int, int] | None:
    """Return the fixed network size of a graph, or None if it is dynamic.

    Args:
        session: What runs it.
        path: For messages.
        spec: Its own.
        heads: Outputs of a graph that was cut before the plugin; their shapes are checked at every run.

    Raises:
        ModelFileError: Its inputs or outputs are not those of a detector.
    """
    found = {item.name: (item.type, item.shape) for item in (*session.get_inputs(), *session.get_outputs())}
    kinds = {"int32": "tensor(int32)", "float32": "tensor(float)"}
    expected = {name: (kinds[kind], list(shape)) for name, (kind, shape) in spec.decode.outputs.items()}
    images = found.pop("images", ("", []))
    size = images[1][1:3]
    fixed = (size[0], size[1]) if all(isinstance(side, int) for side in size) and len(size) == 2 else None
    if heads:
        found = {name: value for name, value in found.items() if name not in heads}
        expected = {}
    if (
        images[0] != "tensor(uint8)"
        or images[1][3:] != [3]
        or any(shape and isinstance(shape[0], int) for _, shape in (images, *found.values()))
        or {name: (kind, shape[1:]) for name, (kind, shape) in found.items()} != expected
    ):
        raise ModelFileError(f"{path}: inputs or outputs are not those of a detector: export it again")
    if fixed is not None:
        check_size(fixed)
    return fixed
