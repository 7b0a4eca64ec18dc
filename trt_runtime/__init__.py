"""Deployment side: detectors that run an exported model. Never imports torch; backends are imported when used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trt_runtime.cpu import OpenVinoRetinaFace, OrtRetinaFace
    from trt_runtime.detector import RetinaFaceDetector, load_detector
    from trt_runtime.gpu.frame import Nv12Frame
    from trt_runtime.stream import DetectionStream
    from trt_runtime.trt import TRTRetinaFace

__all__ = [
    "DetectionStream",
    "Nv12Frame",
    "OpenVinoRetinaFace",
    "OrtRetinaFace",
    "RetinaFaceDetector",
    "TRTRetinaFace",
    "load_detector",
]

_MODULES = {
    "DetectionStream": "stream",
    "Nv12Frame": "gpu.frame",
    "OpenVinoRetinaFace": "cpu",
    "OrtRetinaFace": "cpu",
    "RetinaFaceDetector": "detector",
    "TRTRetinaFace": "trt",
    "load_detector": "detector",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: the device layer must not need what detectors need."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
