"""The definitions every part of the toolkit agrees on: geometry, coding, results. Needs numpy and OpenCV only."""

from facespec.detections import LANDMARK_NAMES, Detections, Detector
from facespec.letterbox import Letterbox
from facespec.priors import make_priors
from facespec.spec import AnchorSpec, DecodeSpec, ModelSpec, PreprocessSpec

__all__ = [
    "LANDMARK_NAMES",
    "AnchorSpec",
    "DecodeSpec",
    "Detections",
    "Detector",
    "Letterbox",
    "ModelSpec",
    "PreprocessSpec",
    "make_priors",
]
