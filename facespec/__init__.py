"""The definitions every part of the toolkit agrees on: geometry, coding, results. Needs numpy and OpenCV only."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from facespec.boxes import make_priors
from facespec.spec import AnchorSpec, DecodeSpec, ModelSpec, PreprocessSpec

if TYPE_CHECKING:
    from facespec.detections import LANDMARK_NAMES, Detections, Detector
    from facespec.letterbox import Letterbox

# Nothing leaves the machine unasked. Both packages look up their makers' servers from their import on, so this comes
# before it, here, where every program of ours begins; children inherit the first and begin here, too. OpenVINO has no
# variable: without openvino_telemetry it takes a stub of its own. ORT_DISABLE_TELEMETRY=0 is a user's own choice.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

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
