"""What is inside an engine or an ONNX file of this toolkit, and whether it can be trusted.

python -m export.inspect retinaface.engine
python -m export.inspect retinaface.plugin.onnx --json
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from export.engine_layers import engine_shares, is_readable
from facespec.cli import ArgumentParser, json_output, require, run
from facespec.errors import ModelFileError, RetinaFaceError, SpecError, reason
from facespec.files import check_outputs
from facespec.kinds import model_kind
from facespec.spec import SPEC_KEY, DecodeSpec, ModelSpec
from trt_runtime.gpu.flavor import FLAVORS, gpu_capability
from trt_runtime.gpu.sidecar import RTX_HEADER_BYTES, check_engine, read_header, read_sidecar
from trt_runtime.kernels import PLUGIN
from trt_runtime.onnx_file import read_onnx
from trt_runtime.onnx_model import find_plugin, load_graph, plugin_attributes, plugin_problem, text

COUNTED_HW = (640, 640)
"""Size at which the convolutions of a graph of dynamic size are counted."""


@dataclass
class Inspection:
    """What was found; `str()` gives a table.

    Attributes:
        kind: "engine", "portable ONNX", "plugin form", or "ONNX" of another origin.
        facts: What there is to say, by name, in the order of the table.
        inputs: Type and shape, or shapes by name, of each input.
        outputs: Type and shape of each output; dimensions that are free have names.
        precision: Share of the convolutions' multiply-accumulates by precision.
        kernels: How many an engine runs in a call beside the plugin; None if that was not counted.
        plugin: What the plugin is called, or its attributes.
        problems: What speaks against using the file; empty if it is valid.
        unverified: Why nothing but what lies beside the file says what it is; empty if it says so itself.
    """

    file: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    precision: dict[str, float] = field(default_factory=dict)
    kernels: int | None = None
    plugin: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unverified: str = ""

    @property
    def valid(self) -> bool:
        """Whether nothing speaks against the file."""
        return not self.problems

    def to_json(self) -> str:
        """Return everything as one JSON object."""
        return json.dumps({**asdict(self), "valid": self.valid}, indent=2)

    def __str__(self) -> str:
        rows: list[tuple[str, str]] = [("file", self.file), ("kind", self.kind)]
        rows += [(name, _short(value)) for name, value in self.facts.items()]
        for title, tensors in (("input", self.inputs), ("output", self.outputs)):
            rows += [(title, f"{name}: {_short(tensor)}") for name, tensor in tensors.items()]
        if self.precision:
            shares = ", ".join(f"{100 * share:.1f} % {kind}" for kind, share in self.precision.items())
            rows.append(("convolutions", f"{shares} (by multiply-accumulates)"))
        if self.kernels:
            rows.append(("kernels", f"{self.kernels} in a call, beside the plugin"))
        if self.plugin:
            rows.append(("plugin", _short(self.plugin)))
        rows += [(part, _short(values)) for part, values in self.spec.items() if part != "format"]
        rows += [("PROBLEM", problem) for problem in self.problems] or [
            ("valid", f"unverified: {self.unverified}" if self.unverified else "yes")
        ]
        return "\n".join(_printable(f"{name.replace('_', ' '):20} {value}") for name, value in rows)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    text = json.dumps(value, ensure_ascii=False).replace('"', "") if value is not None and value != "" else "unknown"
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text  # hashes: whole ones are in the JSON


def _printable(line: str) -> str:
    """Return a line without what could steer a terminal: a file must not draw its own table."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line).rstrip()


def _contract(decode: DecodeSpec, batch: str) -> dict[str, dict[str, Any]]:
    return {name: {"type": kind, "shape": [batch, *shape]} for name, (kind, shape) in decode.outputs.items()}


def inspect_engine(path: Path) -> Inspection:
    """Return what an engine's header and sidecar say, and whether they agree; no GPU is needed.

    Raises:
        ModelFileError: The file cannot be read, or neither it nor its sidecar tells what it is.
    """
    try:
        with open(path, "rb") as file:
            header = read_header(file.read(RTX_HEADER_BYTES))
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    found = Inspection(str(path), "engine")
    if header.kind == "rtx":
        found.facts = {"flavor": "rtx", "version": header.version, "compute_capabilities": header.compute_capabilities}
    try:
        sidecar = read_sidecar(path)
    except ModelFileError as error:
        if header.kind == "unknown":
            raise ModelFileError(f"{path}: neither a TensorRT engine nor an ONNX file; {error}") from None
        found.problems.append(str(error))
        return found
    found.problems += check_engine(path, sidecar)
    if header.kind == "unknown":
        found.unverified = "it does not begin as an engine does; all that speaks for it is its sidecar"
    found.facts |= {
        "flavor": FLAVORS[sidecar.flavor].title if sidecar.flavor in FLAVORS else sidecar.flavor,
        "version": sidecar.version,
        "compute_capabilities": list(sidecar.compute_capabilities),
        "gpu_here": gpu_capability() or "none",
        "precision": sidecar.precision,
        **({"calibration": sidecar.calibration} if sidecar.calibration else {}),
        "parity": {name: float(f"{value:.2g}") for name, value in sidecar.parity.items()},
        "bytes": sidecar.engine_bytes,
        "sha256": sidecar.engine_sha256,
        "onnx_sha256": sidecar.onnx_sha256,
        "built": sidecar.built,
        "toolkit": sidecar.toolkit,
        "command": sidecar.command,
    }
    found.inputs = {"images": {"type": "uint8", **{name: list(shape) for name, shape in sidecar.profile.items()}}}
    found.outputs = _contract(sidecar.spec.decode, "B")
    found.precision = sidecar.mac_shares
    found.kernels = sidecar.kernels
    if is_readable(sidecar) and not found.problems:
        try:
            shares, doubts = engine_shares(path, sidecar)
        except RetinaFaceError as error:
            found.problems.append(str(error))
        else:
            found.facts["engine_inspector"] = {kind: f"{100 * share:.1f} %" for kind, share in shares.items()}
            found.facts |= {"doubts": doubts} if doubts else {}
    found.plugin = dict(sidecar.plugin)
    found.spec = json.loads(sidecar.spec.to_json())
    return found


def inspect_onnx(path: Path) -> Inspection:
    """Return what an ONNX file holds.

    Raises:
        ModelFileError: Missing, damaged or unsafe.
        MissingPackageError: The package onnx is not installed.
    """
    content, header = read_onnx(path)
    try:
        model = load_graph(content, "export.inspect")
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    plugins = [node for node in model.graph.node if node.domain == PLUGIN.domain]
    found = Inspection(str(path), "plugin form" if plugins else "ONNX")
    kinds = Counter(text(node.op_type) for node in model.graph.node)
    found.facts = {
        "operators": ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        "operator_sets": {text(item.domain) or "ai.onnx": item.version for item in model.opset_import},
        "bytes": len(content),
    }
    found.inputs = {text(value.name): _tensor(value) for value in model.graph.input}
    found.outputs = {text(value.name): _tensor(value) for value in model.graph.output}
    if plugins:
        try:
            found.plugin = plugin_attributes(find_plugin(model))
        except ModelFileError as error:
            found.problems.append(str(error))
    # weights beside the file are found from its path alone
    onnx = require("onnx", "cpu", "export.inspect")
    try:
        onnx.checker.check_model(str(path) if header.external_files else model)
    except Exception as error:  # it has more than one class of its own
        found.problems.append(f"the ONNX checker finds a fault: {reason(error)}")
    if SPEC_KEY not in header.metadata:
        found.problems.append("not written by this toolkit: there is no model spec in its metadata")
        return found
    found.kind = found.kind if plugins else "portable ONNX"
    try:
        spec = ModelSpec.from_json(header.metadata[SPEC_KEY])
    except SpecError as error:
        found.problems.append(str(error))
        return found
    found.spec = json.loads(spec.to_json())
    if found.outputs != _contract(spec.decode, "batch"):
        found.problems.append("its outputs are not those of a detector with its spec")
    sides = found.inputs.get("images", {}).get("shape", [])[1:3]
    size_hw = (sides[0], sides[1]) if len(sides) == 2 and all(isinstance(side, int) for side in sides) else COUNTED_HW
    try:
        from export.quantize import lint_qdq, mac_shares

        found.problems += lint_qdq(model)
        found.precision = mac_shares(model, size_hw)
    except Exception as error:  # whatever shape inference makes of a foreign or damaged graph
        found.problems.append(f"its convolutions cannot be counted: {reason(error)}")
    if found.plugin and (problem := plugin_problem(found.plugin, spec)):
        found.problems.append(problem)
    return found


def _tensor(value: Any) -> dict[str, Any]:
    onnx = require("onnx", "cpu", "export.inspect")
    tensor = value.type.tensor_type
    try:
        kind = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError:
        kind = f"type {tensor.elem_type}"
    return {"type": kind, "shape": [text(dim.dim_param) or dim.dim_value for dim in tensor.shape.dim]}


def inspect(path: str | Path) -> Inspection:
    """Return what is inside an engine or an ONNX file.

    Raises:
        ModelFileError: Neither of them, or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(
            f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give an engine or an ONNX file"
        )
    kind = model_kind(path)
    if kind == "checkpoint":
        raise ModelFileError(f"{path}: a checkpoint: this command looks into engines and ONNX files")
    if path.suffix.lower() == ".json" and path.with_suffix("").is_file():
        raise ModelFileError(f"{path}: a sidecar; give the engine: python -m export.inspect {path.with_suffix('')}")
    return inspect_onnx(path) if kind == "onnx" else inspect_engine(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 1 if something speaks against the file."""
    parser = ArgumentParser(
        prog="python -m export.inspect",
        description="Show what is inside an engine or an ONNX file: inputs, outputs, precision, plugin, model, and "
        "whether the engine is the one its sidecar describes. It needs no GPU and loads nothing that could run; only "
        "where an engine is as its sidecar says and its GPU is here does TensorRT load it, to tell what its layers "
        "compute in. Of an engine, all but version, GPUs, size, hash and the plugin's attributes is what the sidecar "
        "says.",
    )
    parser.add_argument("file", type=Path, help="engine, or ONNX file")
    parser.add_json("what was found")
    args = parser.parse_args(argv)
    check_outputs([("--json", args.json)], [args.file])
    with json_output(args.json) as write:
        found = inspect(args.file)
        print(found)
        write(found.to_json())
    return 0 if found.valid else 1


if __name__ == "__main__":
    sys.exit(run(main))
