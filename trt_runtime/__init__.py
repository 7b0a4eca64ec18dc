"""Deployment side: detectors that run an exported model. Never imports torch; backends are imported when used."""

from trt_runtime.detector import OrtRetinaFace, load_detector

__all__ = ["OrtRetinaFace", "load_detector"]
