"""Engine files that look like TensorRT's, for what never loads one: only a GPU can build the real thing."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from facespec.spec import DecodeSpec, ModelSpec
from plugins import PLUGIN
from trt_runtime.sidecar import Sidecar, sidecar_path


def write_engine(folder: Path, **changes: object) -> Path:
    """Write `f.engine`, which begins as TensorRT's engines do, and a sidecar that describes it; return its path."""
    path = folder / "f.engine"
    content = b"ftrt" + bytes(range(200))
    path.write_bytes(content)
    sidecar = Sidecar(
        engine_sha256=hashlib.sha256(content).hexdigest(),
        engine_bytes=len(content),
        flavor="tensorrt",
        version="10.14.1",
        compute_capabilities=(86,),
        plugin={"name": PLUGIN.name, "version": PLUGIN.version, "namespace": PLUGIN.namespace},
        precision="fp16",
        convolutions={"c": (100, "fp16")},
        profile={"min": (1, 320, 640, 3), "opt": (4, 320, 640, 3), "max": (16, 320, 640, 3)},
        calibration={},
        parity={},
        onnx_sha256="0" * 64,
        spec=ModelSpec(decode=DecodeSpec(score_threshold=0.3, max_detections=99)),
        built="2026-01-01T00:00:00+00:00",
        toolkit="0.1.0",
        command="python -m export.to_trt --weights w --fp16 --flavor rtx --compute-capability 86,89 --out f.engine",
    )
    sidecar_path(path).write_text(dataclasses.replace(sidecar, **changes).to_json())  # type: ignore[arg-type]
    return path
