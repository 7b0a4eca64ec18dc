"""The sidecar of an engine, `<engine>.json`: it describes the engine, and is checked before the engine is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facespec.codec import build, parse_json
from facespec.errors import ModelFileError, SpecError
from facespec.kinds import RTX_MAGIC, TENSORRT_MAGIC
from facespec.kinds import sidecar_path as sidecar_path
from facespec.spec import MAX_NETWORK_PIXELS, ModelSpec, check_size
from trt_runtime.kernels import PLUGIN, decode_attributes

FORMAT_VERSION = 1
MAX_SIDECAR_BYTES = 1 << 20
RTX_HEADER_BYTES = 64
RTX_CAPABILITY_BITS = {75: 1, 80: 2, 86: 4, 89: 8, 120: 16, 121: 32}

MAX_BATCH = 65535
"""Frames in a batch: a limit of the plugin's grid of thread blocks."""

_SELF_HASH = "sidecar_sha256"

_TEXTS = {
    "engine_sha256": "[0-9a-f]{64}",
    "onnx_sha256": "[0-9a-f]{64}",
    "flavor": "[a-z]{1,20}",
    "version": "[0-9][0-9A-Za-z.+-]{0,39}",
    "precision": "[a-z0-9]{1,20}",
    "built": "[0-9T:.+-]{10,40}",
    "toolkit": "[0-9A-Za-z.+-]{1,60}",
}
"""Fields that are printed, and written to the README of a server: no words, let alone commands, fit into them."""

_COMMAND = ["python", "-m", "export.to_trt"]

Convolutions = dict[str, tuple[int, str]]
"""Each convolution's multiply-accumulates for one image, and precision, by the name of its node in the ONNX graph."""


def precision_shares(convolutions: Convolutions) -> dict[str, float]:
    """Return the share of the multiply-accumulates in each precision, the greatest first."""
    macs: Counter[str] = Counter()
    for count, kind in convolutions.values():
        macs[kind] += count
    return {kind: count / macs.total() for kind, count in macs.most_common()}


@dataclass(frozen=True)
class Profile:
    """The inputs that an engine takes.

    Attributes:
        batch: Smallest, best and largest number of frames.
        sizes_hw: Smallest, best and largest (height, width), multiples of 32.
    """

    batch: tuple[int, int, int] = (1, 1, 8)
    sizes_hw: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] = ((640, 640), (640, 640), (640, 640))

    def __post_init__(self) -> None:
        for size in self.sizes_hw:
            check_size(size)
        if not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2] <= MAX_BATCH:
            raise SpecError(
                f"--batch {':'.join(map(str, self.batch))}: give MIN:OPT:MAX, ascending, from 1 to {MAX_BATCH}"
            )
        for side in (0, 1):
            low, best, high = (size[side] for size in self.sizes_hw)
            if not low <= best <= high:
                raise SpecError(f"--size: the {('heights', 'widths')[side]} {low}, {best}, {high} do not ascend")
        pixels = self.batch[2] * self.sizes_hw[2][0] * self.sizes_hw[2][1]
        if pixels > MAX_NETWORK_PIXELS * 8:
            raise SpecError(f"--batch times --size is up to {pixels} pixels, an engine takes {MAX_NETWORK_PIXELS * 8}")

    @property
    def fixed_hw(self) -> tuple[int, int] | None:
        """The network size, if there is only one; else None."""
        return self.sizes_hw[0] if len(set(self.sizes_hw)) == 1 else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape (B, H, W, 3) of the input `images` for each of "min", "opt" and "max"."""
        names = ("min", "opt", "max")
        return {name: (b, *hw, 3) for name, b, hw in zip(names, self.batch, self.sizes_hw, strict=True)}

    def takes(self, size_hw: tuple[int, int]) -> bool:
        """Whether a network size lies between the smallest and the largest."""
        smallest, _, largest = self.sizes_hw
        return all(low <= side <= high for low, side, high in zip(smallest, size_hw, largest, strict=True))

    def __str__(self) -> str:
        sizes = [f"{height}x{width}" for height, width in (self.sizes_hw[0], self.sizes_hw[2])]
        return sizes[0] if self.fixed_hw else f"{sizes[0]} to {sizes[1]}"


@dataclass(frozen=True)
class Sidecar:
    """What the builder recorded about an engine.

    Attributes:
        flavor: "tensorrt" or "rtx".
        version: Version of that TensorRT.
        compute_capabilities: Compute capabilities that it was built for, 86 for 8.6.
        plugin: Name, version, namespace, and hash of the sources, of the decode + NMS plugin.
        precision: The precision that was asked for: "fp32", "fp16", "int8".
        convolutions: Multiply-accumulates and precision of each convolution in the strongly typed graph.
        profile: Smallest, best and largest (B, H, W, 3) of the input `images`.
        calibration: Source, number of images, seed and recipe of the INT8 calibration, or the lesson of an INT8 that
            was learned; {} for other precisions.
        parity: Difference between its graph and PyTorch on a few photographs: the largest differences of raw heads, of
            boxes and landmarks in pixels and of scores, and the numbers of images and of faces.
        onnx_sha256: Of the plugin form it was built from.
        built: Date, ISO 8601.
        toolkit: Version of this project.
        command: Command that builds it again, as a shell takes it: `python -m export.to_trt ...` and nothing else.
        kernels: How many a call runs beside the plugin, by the build log; None if it does not tell.
    """

    engine_sha256: str
    engine_bytes: int
    flavor: str
    version: str
    compute_capabilities: tuple[int, ...]
    plugin: dict[str, str]
    precision: str
    convolutions: Convolutions
    profile: dict[str, tuple[int, ...]]
    calibration: dict[str, Any]
    parity: dict[str, float]
    onnx_sha256: str
    spec: ModelSpec
    built: str
    toolkit: str
    command: str
    kernels: int | None = None

    def __post_init__(self) -> None:
        possible = {
            "engine_bytes": _are_counts([self.engine_bytes]),
            "compute_capabilities": _are_counts(self.compute_capabilities),
            "convolutions": bool(self.convolutions) and _are_counts(count for count, _ in self.convolutions.values()),
            "profile": _is_profile(self.profile),
            "kernels": self.kernels is None or _are_counts([self.kernels]),
            "plugin": all(re.fullmatch(r"[\w.+-]{0,128}", text, re.ASCII) for text in self.plugin.values()),
            "command": _is_command(self.command),
            **{name: re.fullmatch(pattern, getattr(self, name)) for name, pattern in _TEXTS.items()},
        }
        for name, right in possible.items():
            if not right:
                raise SpecError(f"{name} is not what it should be: {json.dumps(getattr(self, name))[:80]}")

    @property
    def mac_shares(self) -> dict[str, float]:
        """Share of the convolutions' multiply-accumulates in each precision, the greatest first."""
        return precision_shares(self.convolutions)

    def to_json(self) -> str:
        """Return the JSON form: one field a line, and a hash of all fields, which shows edits by hand."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        data = {"format": FORMAT_VERSION, **values, "spec": json.loads(self.spec.to_json())}
        data[_SELF_HASH] = _digest(data)
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in data.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Sidecar:
        """Read `to_json`'s form.

        Raises:
            SpecError: The text has another form, was edited or written by another version, or a value is impossible.
        """
        data = parse_json(text, "sidecar")
        if data.get("format") != FORMAT_VERSION:
            raise SpecError(f"not a sidecar of format {FORMAT_VERSION}")
        digest = data.pop(_SELF_HASH, None)
        try:
            changed = digest != _digest(data)
        except RecursionError:  # writing may recurse deeper than reading did
            changed = True
        if changed:
            raise SpecError("it is not as it was written: its own hash differs")
        del data["format"]
        data.setdefault("kernels", None)  # not counted before
        if "spec" in data:
            data["spec"] = ModelSpec.from_json(json.dumps(data["spec"]))
        return build(cls, data)


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _are_counts(numbers: Iterable[int]) -> bool:
    return all(0 < number < 1 << 48 for number in numbers)


def _is_command(text: str) -> bool:
    """Whether a text is a command line that calls our builder, and nothing else, whatever a shell makes of it."""
    try:
        words = shlex.split(text)
    except ValueError:
        return False
    return words[:3] == _COMMAND and shlex.join(words) == text and text.isprintable()


def _with_out(command: str, engine: str | Path) -> str:
    """Return a command that writes where the engine lies if it would write to a folder of its own choice."""
    words = shlex.split(command)
    for at, word in enumerate(words[:-1]):
        out = Path(words[at + 1])
        if word == "--out" and (out.is_absolute() or ".." in out.parts) and str(engine).isprintable():
            words[at + 1] = str(engine)
    return shlex.join(words)


def _is_profile(shapes: dict[str, tuple[int, ...]]) -> bool:
    if set(shapes) != {"min", "opt", "max"} or any(len(shape) != 4 for shape in shapes.values()):
        return False
    smallest, largest = shapes["min"], shapes["max"]
    ascending = all(low <= best <= high for low, best, high in zip(smallest, shapes["opt"], largest, strict=True))
    return ascending and _are_counts(smallest) and _are_counts(largest) and smallest[3] == largest[3] == 3


@dataclass(frozen=True)
class EngineHeader:
    """The header of an engine file, which can be read without a GPU: "rtx", which tells the rest, or another kind.

    Attributes:
        kind: "rtx", "tensorrt" or "unknown".
        size: Of the file in bytes according to the header.
    """

    kind: str
    version: str = ""
    compute_capabilities: tuple[int, ...] = ()
    size: int = 0


def read_header(data: bytes) -> EngineHeader:
    """Return the header of an engine.

    The header of TensorRT-RTX has 64 bytes: magic `vtrt`, the size at byte 16, the version in bytes 24 to 27, a bit for
    each compute capability at byte 32. TensorRT's begins with `ftrt`; the rest of it is not documented.

    Args:
        data: The first `RTX_HEADER_BYTES` of the file, or more.
    """
    if data[:4] == RTX_MAGIC and len(data) >= RTX_HEADER_BYTES:
        (size,) = struct.unpack_from("<Q", data, 16)
        (mask,) = struct.unpack_from("<Q", data, 32)
        found = tuple(capability for capability, bit in RTX_CAPABILITY_BITS.items() if mask & bit)
        return EngineHeader("rtx", ".".join(str(byte) for byte in data[24:28]), found, size)
    return EngineHeader("tensorrt" if data[:4] == TENSORRT_MAGIC else "unknown")


def read_sidecar(engine: str | Path) -> Sidecar:
    """Return the sidecar of an engine.

    Raises:
        ModelFileError: It is missing, too large, or not a sidecar.
    """
    path = sidecar_path(engine)
    try:
        if not path.is_file():
            raise ModelFileError(f"{path}: missing, an engine is used with the file that was written beside it")
        if path.stat().st_size > MAX_SIDECAR_BYTES:
            raise ModelFileError(f"{path}: too large for a sidecar")
        sidecar = Sidecar.from_json(path.read_bytes())
        return dataclasses.replace(sidecar, command=_with_out(sidecar.command, engine))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    except SpecError as error:
        raise ModelFileError(f"{path}: {error}; build the engine again with python -m export.to_trt") from None


def check_engine(engine: str | Path, sidecar: Sidecar) -> list[str]:
    """Return the reasons not to load an engine, each as one line; empty if there are none; see `read_engine`."""
    return read_engine(engine, sidecar)[1]


def read_engine(engine: str | Path, sidecar: Sidecar) -> tuple[bytes, list[str]]:
    """Return the content of an engine, and the reasons not to load it, each as one line; empty if there are none.

    What is loaded must be this content: the file may be another one when it is read again.

    Raises:
        ModelFileError: The file is missing or cannot be read.
    """
    problems = []
    plugin = {"name": PLUGIN.name, "version": PLUGIN.version, "namespace": PLUGIN.namespace}
    if not plugin.items() <= sidecar.plugin.items():
        problems.append(
            f"its plugin is {sidecar.plugin.get('name')} {sidecar.plugin.get('version')}, this version has "
            f"{PLUGIN.name} {PLUGIN.version}: build the engine again: {sidecar.command}"
        )
    try:
        size = Path(engine).stat().st_size
        if size != sidecar.engine_bytes:
            return b"", [f"the file has {size} bytes, its sidecar says {sidecar.engine_bytes}", *problems]
        with open(engine, "rb") as file:
            content = file.read(size)
    except FileNotFoundError:
        raise ModelFileError(f"{engine}: no such engine") from None
    except OSError as error:
        raise ModelFileError(f"{engine}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != sidecar.engine_sha256:
        problems.append("the engine is not the one its sidecar describes: its SHA-256 differs")
    header = read_header(content)
    if header.kind == "rtx":
        problems += _missing_from_rtx(content, sidecar)
    if header.kind != sidecar.flavor and (header.kind, sidecar.flavor) != ("unknown", "tensorrt"):
        problems.append(f"the file is of kind {header.kind}, its sidecar says {sidecar.flavor}")
    if header.kind == "rtx":
        if header.size != size:
            problems.append(f"the file has {size} bytes, its header says {header.size}")
        if header.version != sidecar.version:
            problems.append(f"its header says TensorRT-RTX {header.version}, its sidecar {sidecar.version}")
        if header.compute_capabilities != sidecar.compute_capabilities:
            problems.append(
                f"its header says compute capabilities {list(header.compute_capabilities)}, "
                f"its sidecar {list(sidecar.compute_capabilities)}"
            )
    return content, problems


def _missing_from_rtx(content: bytes, sidecar: Sidecar) -> list[str]:
    """Return a line about the plugin or attribute that an engine lacks; TensorRT-RTX stores both in plain bytes."""
    start = content.find(PLUGIN.name.encode())
    if start < 0:
        return [f"there is no {PLUGIN.name} in it"]
    for name, value in decode_attributes(sidecar.spec).items():
        numbers = np.ravel(value)
        stored = numbers.astype("<f4" if numbers.dtype.kind == "f" else "<i4").tobytes()
        at = content.find(name.encode(), start, start + 4096)
        if at < 0 or content.find(stored, at, at + 256) < 0:
            return [f"the plugin in it does not have the {name} its sidecar says"]
    return []
