"""Which detector runs a model file."""

from __future__ import annotations

from pathlib import Path

from facespec.errors import ModelFileError, SpecError
from facespec.spec import CHECKPOINT_SUFFIXES, ENGINE_SUFFIXES, NetworkSize
from trt_runtime import cpu
from trt_runtime.detector import RetinaFaceDetector
from trt_runtime.onnx_model import OnnxModel
from trt_runtime.trt import TRTRetinaFace

BACKENDS = ("auto", "onnxruntime", "openvino", "tensorrt")
"""What `load_detector` can be asked for; "tensorrt" is TensorRT-RTX, too, by the engine."""


def load_detector(
    path: str | Path,
    *,
    score_threshold: float | None = None,
    size_hw: NetworkSize = None,
    threads: int | None = None,
    streams: int = 1,
    backend: str = "auto",
    device: int | str = "auto",
) -> RetinaFaceDetector:
    """Return the detector that runs a model file: `TRTRetinaFace` for an engine, for ONNX one on the CPU.

    An ONNX model of fixed size runs in OpenVINO where that is installed, any other in ONNX Runtime; measured in
    benchmarks/results/cpu_latency.json.

    Args:
        path: Model file.
        score_threshold: Lowest score reported: 0.5 unless given, not below the floor the model was exported with.
        size_hw: What frames are letterboxed to, for models of dynamic size: (height, width), or the length of the
            longer side; None runs each frame at its own size.
        threads: Threads of the CPU; None takes every core.
        streams: Frames the CPU computes at once, which share the threads: 1 is for latency, more for throughput.
        backend: One of `BACKENDS`.
        device: "auto", the GPU for an engine and the CPU for ONNX; "cpu", for ONNX only; for engines only: "cuda",
            "cuda:N" or N, the GPU of that index, or what else `TRTRetinaFace` takes.

    Raises:
        ModelFileError: No such file, or a kind that no detector runs; the message names the command that helps.
        SpecError: An option does not fit the model.
        MissingPackageError: The backend is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if backend not in BACKENDS:
        raise SpecError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if path.is_dir():
        raise ModelFileError(f"{path}: a folder; give the model file in it")
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file; python -m export.to_onnx --out {path} writes one")
    if suffix in CHECKPOINT_SUFFIXES:
        raise ModelFileError(f"{path}: a checkpoint; export it first: python -m export.to_onnx --weights {path}")
    if suffix in ENGINE_SUFFIXES:
        if backend not in ("auto", "tensorrt"):
            raise SpecError(f"{path}: an engine runs in TensorRT only, not in {backend}")
        device = 0 if device == "auto" else device
        return TRTRetinaFace(path, score_threshold=score_threshold, size_hw=size_hw, device=device)
    if suffix != ".onnx":
        raise ModelFileError(
            f"{path}: expected a .onnx file of python -m export.to_onnx, or a .engine of python -m export.to_trt"
        )
    if device not in ("auto", "cpu"):
        raise SpecError(f"{path}: an ONNX file runs on the CPU, --device is for engines")
    if backend == "tensorrt":
        raise SpecError(f"{path}: TensorRT runs engines: python -m export.to_trt builds one")
    model = OnnxModel(path)
    if backend == "auto":
        backend = cpu.best_backend(model, size_hw)
    kind = cpu.OpenVinoRetinaFace if backend == "openvino" else cpu.OrtRetinaFace
    return kind(model, score_threshold=score_threshold, size_hw=size_hw, threads=threads, streams=streams)
