"""Which parts of a network INT8 spares: a file that `export.sensitivity` writes and every export reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from facespec.errors import SpecError

if TYPE_CHECKING:
    import onnx

MIN_INT8_SHARE = 0.5
"""Share of the convolutions' multiply-accumulates below which a graph is not called INT8."""

MAX_RECIPE_BYTES = 1 << 20


@dataclass(frozen=True)
class Int8Recipe:
    """How a graph becomes INT8: symmetric, weights per channel, Q/DQ on the inputs of convolutions, biases in float.

    The defaults hold the accuracy budgets of `export.verify` for the published mobilenet0.25, with 88 % of the
    multiply-accumulates in INT8; `export.sensitivity` finds others.

    Attributes:
        equalize: Even out the ranges of channels between convolutions beforehand; exact in float.
        float_depthwise: Leave depthwise convolutions in float: they are sensitive, and have few multiply-accumulates.
        float_layers: Parts of the names of others that stay in float: the earliest pointwise ones, whose few channels
            have the widest ranges, and the heads.
    """

    equalize: bool = True
    float_depthwise: bool = True
    float_layers: tuple[str, ...] = ("/stage1.1.3/", "/stage1.2.3/", "/stage1.3.3/", "/stage1.4.3/", "/heads.")

    def __post_init__(self) -> None:
        if not isinstance(self.equalize, bool) or not isinstance(self.float_depthwise, bool):
            raise SpecError("equalize and float_depthwise are true or false")
        names = self.float_layers
        if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
            raise SpecError("float_layers is a list of parts of names")

    def keeps_float(self, node: onnx.NodeProto) -> bool:
        """Whether a convolution stays in float."""
        return (self.float_depthwise and is_depthwise(node)) or any(part in node.name for part in self.float_layers)

    def to_json(self) -> str:
        """Return the form of a recipe file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def is_depthwise(node: onnx.NodeProto) -> bool:
    """Whether a convolution has groups."""
    return any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)


def load_recipe(path: Path) -> Int8Recipe:
    """Return the recipe of a file: JSON with any of the fields of `Int8Recipe`.

    Raises:
        SpecError: Missing, not JSON, or with other fields or values.
    """
    names = [item.name for item in fields(Int8Recipe)]
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(MAX_RECIPE_BYTES))
    except OSError as error:
        raise SpecError(f"{path}: the recipe cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path}: not a recipe in JSON ({error})") from None
    if not isinstance(data, dict) or not set(data) <= set(names):
        raise SpecError(f"{path}: not a recipe: expected an object with {', '.join(names)}")
    layers = data.get("float_layers")
    try:
        return Int8Recipe(**{**data, "float_layers": tuple(layers)} if isinstance(layers, list) else data)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
