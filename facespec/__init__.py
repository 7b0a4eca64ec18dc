"""The definitions every part of the toolkit agrees on: geometry, coding, results. Needs numpy and OpenCV only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from facespec.boxes import make_priors
from facespec.spec import AnchorSpec, DecodeSpec, ModelSpec, PreprocessSpec

if TYPE_CHECKING:
    from facespec.detections import LANDMARK_NAMES, Detections, Detector
    from facespec.letterbox import Letterbox

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


def __getattr__(name: str) -> Any:
    """Import OpenCV only when a name that needs it is used: the plugin's kernels are tested on machines without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module("facespec.letterbox" if name == "Letterbox" else "facespec.detections")
    return getattr(module, name)
