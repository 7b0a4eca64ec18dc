"""What travels beside an engine: `<engine>.json`, checked before anything loads the engine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facespec.errors import ModelFileError, SpecError
from facespec.spec import ModelSpec
from plugins import PLUGIN

FORMAT_VERSION = 1
MAX_SIDECAR_BYTES = 1 << 20
RTX_MAGIC = b"vtrt"
RTX_HEADER_BYTES = 64
RTX_CAPABILITY_BITS = {75: 1, 80: 2, 86: 4, 89: 8, 120: 16, 121: 32}

_JSON_TYPES = {"str": str, "int": int, "tuple": list, "dict": dict, "ModelSpec": dict}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sidecar:
    """An engine, as its builder knew it.

    Attributes:
        engine_sha256: Of the engine file.
        engine_bytes: Its size.
        flavor: "tensorrt" or "rtx".
        version: Version of that TensorRT.
        compute_capabilities: GPUs it was built for, 86 for 8.6.
        plugin: Name, version, namespace, and hash of the sources, of the decode + NMS plugin.
        precision: What was asked for: "fp32", "fp16".
        mac_shares: Share of the convolutions' multiply-accumulates in each precision, from the strongly typed graph.
        profile: Smallest, best and largest (B, H, W, 3) of the input `images`.
        onnx_sha256: Of the plugin form it was built from.
        spec: The model.
        built: Date, ISO 8601.
        toolkit: Version of this project.
        command: What builds it again.
    """

    engine_sha256: str
    engine_bytes: int
    flavor: str
    version: str
    compute_capabilities: tuple[int, ...]
    plugin: dict[str, str]
    precision: str
    mac_shares: dict[str, float]
    profile: dict[str, Shape]
    onnx_sha256: str
    spec: ModelSpec
    built: str
    toolkit: str
    command: str

    def to_json(self) -> str:
        """Return the JSON form."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        text = json.dumps({"format": FORMAT_VERSION, **values, "spec": json.loads(self.spec.to_json())}, indent=2)
        return re.sub(r"\[[^\[\]{}]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Sidecar:
        """Read `to_json`'s form.

        Raises:
            SpecError: Not that form, or written by another version of it.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"not JSON: {error}") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT_VERSION:
            raise SpecError(f"not a sidecar of format {FORMAT_VERSION}")
        fields = {item.name: item.type for item in dataclasses.fields(cls)}
        if set(data) != set(fields):
            raise SpecError(f"fields missing or unknown: {sorted(set(data) ^ set(fields))}")
        for name, kind in fields.items():
            if not isinstance(data[name], _JSON_TYPES[str(kind).split("[")[0]]):
                raise SpecError(f"{name} is not of the type it should be")
        data["spec"] = ModelSpec.from_json(json.dumps(data["spec"]))
        data["compute_capabilities"] = tuple(data["compute_capabilities"])
        data["profile"] = {str(name): tuple(shape) for name, shape in data["profile"].items() if _is_shape(shape)}
        if set(data["profile"]) != {"min", "opt", "max"}:
            raise SpecError("profile does not have min, opt and max of four numbers each")
        if not all(isinstance(number, int) for number in data["compute_capabilities"]):
            raise SpecError("compute_capabilities are not numbers")
        return cls(**data)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 4 and all(isinstance(side, int) and side > 0 for side in shape)


@dataclass(frozen=True)
class EngineHeader:
    """What an engine file says about itself without a GPU.

    Attributes:
        kind: "rtx", "tensorrt" or "unknown".
        version: Of TensorRT-RTX; "" for the others.
        compute_capabilities: Of a TensorRT-RTX engine.
        size: Bytes it should have; 0 if it does not say.
    """

    kind: str
    version: str = ""
    compute_capabilities: tuple[int, ...] = ()
    size: int = 0


def sidecar_path(engine: str | Path) -> Path:
    """Return where the sidecar of an engine lies."""
    return Path(f"{engine}.json")


def read_header(data: bytes) -> EngineHeader:
    """Return what the first bytes of an engine say.

    The header of TensorRT-RTX has 64 bytes: magic `vtrt`, the size at byte 16, the version in bytes 24 to 27, a bit for
    each compute capability at byte 32. TensorRT's own begins with `ftrt` and is not documented further.
    """
    if data[:4] == RTX_MAGIC and len(data) >= RTX_HEADER_BYTES:
        (size,) = struct.unpack_from("<Q", data, 16)
        (mask,) = struct.unpack_from("<Q", data, 32)
        found = tuple(capability for capability, bit in RTX_CAPABILITY_BITS.items() if mask & bit)
        return EngineHeader("rtx", ".".join(str(byte) for byte in data[24:28]), found, size)
    return EngineHeader("tensorrt" if data[:4] in (b"ftrt", b"trtf") else "unknown")


def read_sidecar(engine: str | Path) -> Sidecar:
    """Return the sidecar of an engine.

    Raises:
        ModelFileError: Missing, too large, or not a sidecar.
    """
    path = sidecar_path(engine)
    try:
        if path.stat().st_size > MAX_SIDECAR_BYTES:
            raise ModelFileError(f"{path}: too large for a sidecar")
        return Sidecar.from_json(path.read_bytes())
    except FileNotFoundError:
        raise ModelFileError(f"{path}: missing, an engine is used with the file that was written beside it") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    except SpecError as error:
        raise ModelFileError(f"{path}: {error}; build again: python -m export.to_trt --out {engine}") from None


def check_engine(engine: str | Path, sidecar: Sidecar) -> list[str]:
    """Return what speaks against loading an engine, each as one line; empty if nothing does.

    Raises:
        ModelFileError: The file is missing or cannot be read.
    """
    try:
        content = Path(engine).read_bytes()
    except FileNotFoundError:
        raise ModelFileError(f"{engine}: no such engine") from None
    except OSError as error:
        raise ModelFileError(f"{engine}: cannot be read ({error.strerror})") from None
    header = read_header(content)
    problems = []
    if hashlib.sha256(content).hexdigest() != sidecar.engine_sha256:
        problems.append("the engine is not the one its sidecar describes: its SHA-256 differs")
    if sidecar.plugin.get("name") != PLUGIN.name or sidecar.plugin.get("version") != PLUGIN.version:
        problems.append(
            f"its plugin is {sidecar.plugin.get('name')} {sidecar.plugin.get('version')}, this version has "
            f"{PLUGIN.name} {PLUGIN.version}: build the engine again: {sidecar.command}"
        )
    if header.kind != sidecar.flavor:
        problems.append(f"the file is of kind {header.kind}, its sidecar says {sidecar.flavor}")
    if header.kind == "rtx":
        if header.size != len(content):
            problems.append(f"the file has {len(content)} bytes, its header says {header.size}")
        if PLUGIN.name.encode() not in content:  # TensorRT-RTX stores names and attributes of plugins as they are
            problems.append(f"there is no {PLUGIN.name} in it")
        if header.version != sidecar.version:
            problems.append(f"its header says TensorRT-RTX {header.version}, its sidecar {sidecar.version}")
        if header.compute_capabilities != sidecar.compute_capabilities:
            problems.append(
                f"its header says compute capabilities {list(header.compute_capabilities)}, "
                f"its sidecar {list(sidecar.compute_capabilities)}"
            )
    return problems
