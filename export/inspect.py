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

import numpy as np

from facespec.cli import ArgumentParser, require, run
from facespec.errors import ModelFileError, SpecError
from facespec.spec import CHECKPOINT_SUFFIXES, SPEC_KEY, DecodeSpec, ModelSpec
from plugins import PLUGIN
from trt_runtime.flavor import FLAVORS, gpu_capability
from trt_runtime.onnx_file import read_onnx
from trt_runtime.sidecar import RTX_HEADER_BYTES, Sidecar, check_engine, read_header, read_sidecar

COUNTED_HW = (640, 640)
"""Size at which the convolutions of a graph of dynamic size are counted."""


@dataclass
class Inspection:
    """What was found; `str()` gives a table.

    Attributes:
        file: Path.
        kind: "engine", "portable ONNX" or "plugin form".
        summary: What there is to say, by name, in the order of the table.
        inputs: Type and shape by name.
        outputs: Type and shape by name.
        precision: Share of the convolutions' multiply-accumulates by precision.
        plugin: What the plugin is called, and its attributes.
        spec: The model.
        problems: What speaks against using the file; empty if it is valid.
    """

    file: str
    kind: str
    summary: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    precision: dict[str, float] = field(default_factory=dict)
    plugin: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Whether nothing speaks against the file."""
        return not self.problems

    def to_json(self) -> str:
        """Return everything as one JSON object."""
        return json.dumps({**asdict(self), "valid": self.valid}, indent=2)

    def __str__(self) -> str:
        rows: list[tuple[str, str]] = [("file", self.file), ("kind", self.kind)]
        rows += [(name, str(value)) for name, value in self.summary.items()]
        rows += [("input", f"{name} {kind}") for name, kind in self.inputs.items()]
        rows += [("output", f"{name} {kind}") for name, kind in self.outputs.items()]
        if self.precision:
            shares = ", ".join(f"{100 * share:.1f} % {kind}" for kind, share in self.precision.items())
            rows.append(("convolutions", f"{shares} (by multiply-accumulates)"))
        if self.plugin:
            rows.append(("plugin", ", ".join(f"{name} {_short(value)}" for name, value in self.plugin.items())))
        for part, values in self.spec.items():
            if isinstance(values, dict):
                rows.append((part, ", ".join(f"{name} {_short(value)}" for name, value in values.items())))
            elif part != "format":
                rows.append((part, _short(values)))
        rows += [("PROBLEM", problem) for problem in self.problems] or [("valid", "yes")]
        return "\n".join(f"{name:18} {value}".rstrip() for name, value in rows)


def _short(value: Any) -> str:
    return json.dumps(value).replace('"', "") if value != "" else "unknown"


def _contract(decode: DecodeSpec, batch: str) -> dict[str, str]:
    shapes = decode.outputs.items()
    return {name: f"{kind} [{', '.join([batch, *map(str, shape)])}]" for name, (kind, shape) in shapes}


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
        found.summary["built by"] = f"TensorRT-RTX {header.version}"
        found.summary["runs on"] = " ".join(f"sm_{number}" for number in header.compute_capabilities)
    try:
        sidecar = read_sidecar(path)
    except ModelFileError as error:
        if header.kind == "unknown":
            raise ModelFileError(f"{path}: not a TensorRT engine, and {error}") from None
        found.problems.append(str(error))
        return found
    found.problems += check_engine(path, sidecar)
    _describe(found, sidecar)
    return found


def _describe(found: Inspection, sidecar: Sidecar) -> None:
    title = FLAVORS[sidecar.flavor].title if sidecar.flavor in FLAVORS else sidecar.flavor
    present = gpu_capability()
    runs_on = " ".join(f"sm_{number}" for number in sidecar.compute_capabilities)
    if present is None:
        runs_on += " (there is no GPU here)"
    elif present not in sidecar.compute_capabilities:
        found.problems.append(f"the GPU here is an sm_{present}: build the engine again: {sidecar.command}")
    found.summary |= {
        "built by": f"{title} {sidecar.version}",
        "runs on": runs_on,
        "built": sidecar.built,
        "toolkit": sidecar.toolkit,
        "size": f"{sidecar.engine_bytes / 1e6:.1f} MB",
        "sha256": sidecar.engine_sha256,
        "precision": sidecar.precision,
        "command": sidecar.command,
    }
    low, best, high = (list(sidecar.profile[name]) for name in ("min", "opt", "max"))
    found.inputs["images"] = f"uint8 min {low}, opt {best}, max {high}"
    found.outputs = _contract(sidecar.spec.decode, "B")
    found.precision = sidecar.mac_shares
    found.plugin = dict(sidecar.plugin)
    found.spec = json.loads(sidecar.spec.to_json())


def inspect_onnx(path: Path) -> Inspection:
    """Return what an ONNX file of this toolkit holds.

    Raises:
        ModelFileError: Missing, damaged, unsafe, or not a detector of this toolkit.
        MissingPackageError: The package onnx is not installed.
    """
    content, header = read_onnx(path)
    onnx = require("onnx", "train", "export.inspect")
    from export.quantize import mac_shares

    model = onnx.load_model_from_string(content)
    plugins = [node for node in model.graph.node if node.domain == PLUGIN.domain]
    found = Inspection(str(path), "plugin form" if plugins else "portable ONNX")
    kinds = Counter(node.op_type for node in model.graph.node)
    found.summary = {
        "operators": ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        "operator sets": ", ".join(f"{item.domain or 'ai.onnx'} {item.version}" for item in model.opset_import),
        "size": f"{path.stat().st_size / 1e6:.1f} MB",
    }
    found.inputs = {value.name: _type(onnx, value) for value in model.graph.input}
    found.outputs = {value.name: _type(onnx, value) for value in model.graph.output}
    found.plugin = {
        attribute.name: _plain(onnx.helper.get_attribute_value(attribute))
        for node in plugins
        for attribute in node.attribute
    }
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        found.problems.append(f"the ONNX checker finds a fault: {' '.join(str(error).split())[:200]}")
    if SPEC_KEY not in header.metadata:
        found.problems.append("not written by this toolkit: there is no model spec in its metadata")
        return found
    try:
        spec = ModelSpec.from_json(header.metadata[SPEC_KEY])
    except SpecError as error:
        found.problems.append(str(error))
        return found
    found.spec = json.loads(spec.to_json())
    expected = _contract(spec.decode, "batch")
    if found.outputs != expected:
        found.problems.append("its outputs are not those of a detector with its spec")
    dims = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] if model.graph.input else []
    size_hw = (dims[1], dims[2]) if len(dims) == 4 and dims[1] and dims[2] else COUNTED_HW
    try:
        found.precision = mac_shares(model, size_hw)
    except Exception as error:  # a foreign or damaged graph: whatever shape inference makes of it
        found.problems.append(f"its convolutions cannot be counted: {' '.join(str(error).split())[:200]}")
    if plugins:
        problem = _plugin_problem(found.plugin, spec)
        if problem:
            found.problems.append(problem)
    return found


def _type(onnx: Any, value: Any) -> str:
    tensor = value.type.tensor_type
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else "?"
    return f"{kind} [{', '.join(str(dim.dim_param or dim.dim_value) for dim in tensor.shape.dim)}]"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float):
        return float(str(np.float32(value)))  # 0.4, and not what float32 makes of it
    return [_plain(item) for item in value] if not isinstance(value, (str, int)) else value


def _plugin_problem(attributes: dict[str, Any], spec: ModelSpec) -> str | None:
    """Return where the plugin's attributes are not those of the spec."""
    sizes = [_plain(float(size)) for level in spec.anchors.min_sizes for size in level]
    expected = {
        "plugin_version": PLUGIN.version,
        "plugin_namespace": PLUGIN.namespace,
        "strides": list(spec.anchors.strides),
        "min_sizes": sizes,
        "variances": _plain(spec.decode.variances),
        "logit_threshold": _plain(spec.decode.logit_threshold),
        "iou_threshold": _plain(spec.decode.iou_threshold),
        "top_k": spec.decode.top_k,
        "max_detections": spec.decode.max_detections,
    }
    for name, value in expected.items():
        if attributes.get(name) != value:
            return f"the plugin's {name} is {attributes.get(name)}, the spec says {value}"
    return None


def inspect(path: str | Path) -> Inspection:
    """Return what is inside an engine or an ONNX file.

    Raises:
        ModelFileError: Neither of them, or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file")
    if path.suffix.lower() in CHECKPOINT_SUFFIXES:
        raise ModelFileError(f"{path}: a checkpoint: this command looks into engines and ONNX files")
    return inspect_onnx(path) if path.suffix.lower() == ".onnx" else inspect_engine(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 1 if something speaks against the file."""
    parser = ArgumentParser(
        prog="python -m export.inspect",
        description="Show what is inside an engine or an ONNX file: inputs, outputs, precision, plugin, model, and "
        "whether the engine is the one its sidecar describes. It needs no GPU and loads nothing that could run.",
    )
    parser.add_argument("file", type=Path, help="engine, or ONNX file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    found = inspect(args.file)
    print(found.to_json() if args.json else found)
    return 0 if found.valid else 1


if __name__ == "__main__":
    sys.exit(run(main))
