"""Engine files that look like TensorRT's, for what never loads one: only a GPU can build the real thing."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

from facespec.spec import DecodeSpec, ModelSpec
from trt_runtime.gpu.sidecar import Sidecar, sidecar_path
from trt_runtime.kernels import PLUGIN


def make_sidecar(content: bytes) -> Sidecar:
    """Return the sidecar of an engine with this content."""
    return Sidecar(
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


def write_engine(folder: Path, content: bytes = b"ftrt" + bytes(range(200)), **changes: object) -> Path:
    """Write `f.engine`, which begins as TensorRT's engines do, and a sidecar that describes it; return its path."""
    path = folder / "f.engine"
    path.write_bytes(content)
    sidecar_path(path).write_text(dataclasses.replace(make_sidecar(content), **changes).to_json())  # type: ignore[arg-type]
    return path


RTX_BITS = {75: 1, 80: 2, 86: 4, 89: 8, 120: 16, 121: 32}
"""A compute capability's bit in the header of TensorRT-RTX's engines, as found in those that 1.4 to 1.7 wrote."""


def rtx_content(
    spec: ModelSpec, version: Sequence[int] = (1, 7, 1, 116), capabilities: Sequence[int] = (86,), gap: bytes = b"\1\2"
) -> bytes:
    """Return what begins as an engine of TensorRT-RTX does, and holds the plugin's attributes as one does.

    Args:
        spec: The model.
        version: In the header.
        capabilities: In the header.
        gap: What stands between the name of an attribute and its value.
    """
    sizes = [size for level in spec.anchors.min_sizes for size in level]
    decode = spec.decode
    attributes = [
        ("strides", struct.pack(f"<{len(spec.anchors.strides)}i", *spec.anchors.strides)),
        ("min_sizes", struct.pack(f"<{len(sizes)}f", *sizes)),
        ("variances", struct.pack("<2f", *decode.variances)),
        ("logit_threshold", struct.pack("<f", decode.logit_threshold)),
        ("iou_threshold", struct.pack("<f", decode.iou_threshold)),
        ("top_k", struct.pack("<i", decode.top_k)),
        ("max_detections", struct.pack("<i", decode.max_detections)),
    ]
    body = bytes(50) + PLUGIN.name.encode() + b"\0" + b"".join(
        name.encode() + gap + value + b"\xee" * 7 for name, value in attributes
    )  # fmt: skip
    mask = sum(RTX_BITS[capability] for capability in capabilities)
    header = struct.pack("<4s12xQ4B4xQ24x", b"vtrt", 64 + len(body), *version, mask)
    return header + body


def write_rtx_engine(folder: Path, **changes: object) -> Path:
    """Write `f.engine`, which begins as TensorRT-RTX's engines do, and a sidecar that describes it; return its path."""
    spec = changes.setdefault("spec", ModelSpec(decode=DecodeSpec(score_threshold=0.3, max_detections=99)))
    version = str(changes.setdefault("version", "1.7.1.116"))
    capabilities: Sequence[int] = changes.setdefault("compute_capabilities", (86,))  # type: ignore[assignment]
    content = rtx_content(spec, [int(part) for part in version.split(".")], capabilities)  # type: ignore[arg-type]
    return write_engine(folder, content, flavor="rtx", **changes)
