"""Deployment side: detectors that run an exported model. Never imports torch; backends are imported when used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from facespec.detections import Detections as Detections
    from facespec.draw import draw_detections as draw_detections
    from facespec.errors import RetinaFaceError as RetinaFaceError
    from trt_runtime.cpu import OpenVinoRetinaFace as OpenVinoRetinaFace
    from trt_runtime.cpu import OrtRetinaFace as OrtRetinaFace
    from trt_runtime.detector import DetectionStream as DetectionStream
    from trt_runtime.detector import RetinaFaceDetector as RetinaFaceDetector
    from trt_runtime.gpu.frame import Nv12Frame as Nv12Frame
    from trt_runtime.load import load_detector as load_detector
    from trt_runtime.media.files import VideoWriter as VideoWriter
    from trt_runtime.media.live import open_source as open_source
    from trt_runtime.media.pipeline import Job as Job
    from trt_runtime.media.pipeline import PipelineOptions as PipelineOptions
    from trt_runtime.media.pipeline import run_pipeline as run_pipeline
    from trt_runtime.trt import TRTRetinaFace as TRTRetinaFace

    __version__: str

_PLACES = {
    "DetectionStream": "trt_runtime.detector",
    "Detections": "facespec.detections",
    "Job": "trt_runtime.media.pipeline",
    "Nv12Frame": "trt_runtime.gpu.frame",
    "OpenVinoRetinaFace": "trt_runtime.cpu",
    "OrtRetinaFace": "trt_runtime.cpu",
    "PipelineOptions": "trt_runtime.media.pipeline",
    "RetinaFaceDetector": "trt_runtime.detector",
    "RetinaFaceError": "facespec.errors",
    "TRTRetinaFace": "trt_runtime.trt",
    "VideoWriter": "trt_runtime.media.files",
    "__version__": "",
    "draw_detections": "facespec.draw",
    "load_detector": "trt_runtime.load",
    "open_source": "trt_runtime.media.live",
    "run_pipeline": "trt_runtime.media.pipeline",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    """Import what is asked for: the device layer must not need what detectors need."""
    if name == "__version__":
        return importlib.import_module("facespec.cli").version()
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
