"""Deployment side: detectors that run an exported model. Never imports torch; backends are imported when used."""

from trt_runtime.cpu import OpenVinoRetinaFace, OrtRetinaFace
from trt_runtime.detector import RetinaFaceDetector, load_detector
from trt_runtime.device_frame import Nv12Frame
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
