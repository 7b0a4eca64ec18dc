"""From a checkpoint to what runs in production: ONNX graphs, engines, and proof that they give the same faces."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.options import CalibrationOptions
    from export.to_onnx import ExportOptions, export_onnx
    from export.to_trt import EngineOptions, build_engine
    from export.verify import VerifyOptions, verify

_PLACES = {
    "CalibrationOptions": "export.options",
    "EngineOptions": "export.to_trt",
    "ExportOptions": "export.to_onnx",
    "VerifyOptions": "export.verify",
    "build_engine": "export.to_trt",
    "export_onnx": "export.to_onnx",
}

__all__ = ["CalibrationOptions", "EngineOptions", "ExportOptions", "VerifyOptions"]
__all__ += ["build_engine", "export_onnx", "verify"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: a command line is read without the packages that exporting needs."""
    if name == "verify":  # a module that can be called
        return importlib.import_module("export.verify")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
