"""The configuration of a detector for NVIDIA Triton Inference Server: `config.pbtxt`.

Fields are those of model_config.proto. An output of shape (B,) is `dims: [1]` with `reshape { shape: [] }`, as
Triton's guide asks. Backends pass over parameters whose names they do not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from facespec.spec import SPEC_KEY, ModelSpec

SIZE_KEY = "retinaface.size_hw"
"""Parameter: HEIGHTxWIDTH clients letterbox to; missing where each frame is sent at its own size, padded."""

_TYPES = {"int32": "TYPE_INT32", "float32": "TYPE_FP32"}


class Keyword(str):
    """A value of an enum: written without quotes."""


@dataclass(frozen=True)
class TritonModel:
    """A detector, as Triton must know it.

    Attributes:
        name: Name of the model on the server.
        is_engine: A TensorRT engine; otherwise an ONNX file.
        spec: The model.
        fixed_hw: The one network size it takes, or None if it takes several.
        size_hw: Network size it does best, which clients should letterbox to; None if no size is special.
        best_batch: Frames in a call that it is fastest with.
        max_batch: Most frames in a call.
        instances: Copies that run at once.
        on_gpu: Whether it runs on a GPU.
        max_queue_delay_us: How long a request may wait for others to share its batch, in microseconds.
    """

    name: str
    is_engine: bool
    spec: ModelSpec
    fixed_hw: tuple[int, int] | None
    size_hw: tuple[int, int] | None
    best_batch: int
    max_batch: int
    instances: int
    on_gpu: bool
    max_queue_delay_us: int

    def config(self) -> dict[str, Any]:
        """Return the fields of ModelConfig."""
        height, width = self.fixed_hw or (-1, -1)
        config: dict[str, Any] = {
            "name": self.name,
            **({"platform": "tensorrt_plan"} if self.is_engine else {"backend": "onnxruntime"}),
            "max_batch_size": self.max_batch,
            "input": [{"name": "images", "data_type": Keyword("TYPE_UINT8"), "dims": [height, width, 3]}],
            "output": [_output(name, *found) for name, found in self.spec.decode.outputs.items()],
            "instance_group": [
                {"count": self.instances, "kind": Keyword("KIND_GPU" if self.on_gpu else "KIND_CPU")},
            ],
            "version_policy": {"latest": {"num_versions": 1}},
        }
        if self.max_batch > 1:
            config["dynamic_batching"] = {
                "preferred_batch_size": sorted({self.best_batch, self.max_batch} - {1}),
                "max_queue_delay_microseconds": self.max_queue_delay_us,
            }
        if self.is_engine and self.fixed_hw:  # a graph serves one shape; Triton captures batch 1 and the preferred ones
            config["optimization"] = {"cuda": {"graphs": True}}
        config["model_warmup"] = [self._warmup(batch) for batch in sorted({1, self.best_batch, self.max_batch})]
        config["parameters"] = [
            {"key": key, "value": {"string_value": value}} for key, value in self.parameters().items()
        ]
        return config

    def parameters(self) -> dict[str, str]:
        """Return what clients must know."""
        size = {SIZE_KEY: "x".join(map(str, self.size_hw))} if self.size_hw else {}
        fitted = "scaled by one factor, bilinear, until it touches the size" if size else "not scaled"
        colour = ",".join(map(str, self.spec.preprocess.mean_bgr))
        return {
            SPEC_KEY: self.spec.to_json(),
            f"{SPEC_KEY}_sha256": self.spec.sha256(),
            "retinaface.score_floor": repr(self.spec.decode.score_threshold),
            **size,
            "retinaface.letterbox": f"a uint8 BGR frame, {fitted}, top left, padded right and below to "
            f"{'it' if size else 'multiples of 32'} with BGR {colour}; boxes and landmarks are in pixels of that input",
        }

    def _warmup(self, batch: int) -> dict[str, Any]:
        height, width = self.fixed_hw or self.size_hw or (640, 640)
        images = {"data_type": Keyword("TYPE_UINT8"), "dims": [height, width, 3], "zero_data": True}
        return {"name": f"batch {batch}", "batch_size": batch, "inputs": [{"key": "images", "value": images}]}


def _output(name: str, kind: str, shape: tuple[int, ...]) -> dict[str, Any]:
    output = {"name": name, "data_type": Keyword(_TYPES[kind])}
    return {**output, "dims": list(shape)} if shape else {**output, "dims": [1], "reshape": {"shape": []}}


def to_pbtxt(message: dict[str, Any], indent: str = "") -> str:
    """Return the protobuf text form of a message: dicts are messages, lists are repeated fields."""
    return "".join(f"{indent}{name}{_value(value, indent)}\n" for name, value in message.items())


def _value(value: Any, indent: str) -> str:
    if isinstance(value, dict):
        return f" {{\n{to_pbtxt(value, indent + '  ')}{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        inner = indent + "  "
        return " [\n" + ",\n".join(f"{inner}{_value(item, inner)[1:]}" for item in value) + f"\n{indent}]"
    if isinstance(value, list):
        return f": [{', '.join(map(str, value))}]"
    if isinstance(value, bool):
        return f": {str(value).lower()}"
    if isinstance(value, str) and not isinstance(value, Keyword):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f': "{escaped}"'
    return f": {value}"
