"""Deployment side: detectors that run an exported model. Never imports torch; backends are imported when used."""

from trt_runtime.cpu import OpenVinoRetinaFace, OrtRetinaFace
from trt_runtime.detector import RetinaFaceDetector, load_detector
from trt_runtime.stream import DetectionStream

__all__ = ["DetectionStream", "OpenVinoRetinaFace", "OrtRetinaFace", "RetinaFaceDetector", "load_detector"]
