"""A model on one side of a comparison: what is known about it, and the ways to run it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.options import MIN_INT8_SHARE
from facespec.cli import require
from facespec.errors import ModelFileError
from facespec.letterbox import Frame
from facespec.spec import ModelSpec
from trt_runtime.onnx_model import OnnxModel, load_graph, open_session

DEPLOYED_SUFFIXES = (".onnx", ".engine", ".plan")


@dataclass(frozen=True)
class ModelInfo:
    """One side of the comparison: its kind, its precision, and the share of its multiply-accumulates in each."""

    name: str
    kind: str
    precision: str
    mac_shares: dict[str, float]
    size_hw: tuple[int, int] | None

    def __str__(self) -> str:
        shares = ", ".join(f"{100 * share:.1f} % {kind}" for kind, share in self.mac_shares.items())
        size = f"{self.size_hw[0]}x{self.size_hw[1]}" if self.size_hw else "any size"
        return f"{self.name}: {self.kind}, {shares or self.precision}, {size}"


class Side:
    """A model, what is known about it, and the ways to run it.

    Args:
        name: Checkpoint, name of published weights, or a file that `trt_runtime.load_detector` opens.
        backend: What runs a model file, as it is deployed; None runs ONNX in ONNX Runtime with the rounding of fp16
            emulated, which is what its graph says.

    Attributes:
        info: What it is.
        spec: Its geometry and decoding.
        detector: Finds faces, down to the model's own floor.
        runner: Gives the raw heads, (N, 16) boxes, logits and landmarks, of a letterboxed image; None if they cannot
            be had.
        fixed_hw: The one network size it takes, or None.
        notes: What a reader of the comparison should know.

    Raises:
        ModelFileError: It cannot be opened, or not here.
    """

    def __init__(self, name: str, backend: str | None = None) -> None:
        suffix = Path(name).suffix.lower()
        self.name = name
        self.runner: Callable[[Frame], NDArray[np.float32]] | None = None
        self.detector: Any
        self.notes: list[str] = []
        if suffix in DEPLOYED_SUFFIXES:
            from export.inspect import inspect
            from trt_runtime.load import load_detector

            self.detector = load_detector(name, backend=backend or ("onnxruntime" if suffix == ".onnx" else "auto"))
            self.fixed_hw: tuple[int, int] | None = self.detector.size_hw
            inspection = inspect(name)
            shares = inspection.precision
            held = {"int8": MIN_INT8_SHARE, "fp16": 0.5}
            precision = next((kind for kind, least in held.items() if shares.get(kind, 0) >= least), "fp32")
            self.info = ModelInfo(name, inspection.kind, precision, shares, self.fixed_hw)
            self.notes += [f"{name}: {problem}" for problem in inspection.problems]
            if backend:
                deployed = ", ".join(f"{key} {value}" for key, value in self.detector.environment().items())
                self.notes.append(f"{name}: run as it is deployed, {deployed}")
            elif suffix == ".onnx":
                self._open_graph(Path(name))
        else:
            require("torch", "train", "comparing a checkpoint")
            from trainer.checkpoint import load_model
            from trainer.detector import TorchRetinaFace

            torch_side = TorchRetinaFace(load_model(name))
            self.detector, self.fixed_hw = torch_side, None
            self.info = ModelInfo(name, "checkpoint", "fp32", {"fp32": 1.0}, None)
            self.runner = lambda image: np.concatenate(torch_side.heads(image), axis=1)
        self.spec: ModelSpec = self.detector.spec
        self.detector.score_threshold = self.spec.decode.score_threshold
        if self.runner is None:
            self.notes.append(f"{name} does not show its raw heads")

    def _open_graph(self, path: Path) -> None:
        from export.quantize import computes_in_fp16, emulate_fp16
        from trt_runtime.cpu import OrtRetinaFace

        model = OnnxModel(path)
        with tempfile.TemporaryDirectory() as folder:
            if model.weights:
                self.notes.append(f"{self.name}: its weights lie outside: fp16, if it has any, is not emulated")
            elif computes_in_fp16(graph := load_graph(model.content, "export.verify")):
                emulated = Path(folder) / "emulated.onnx"
                emulated.write_bytes(emulate_fp16(graph).SerializeToString())
                model = OnnxModel(emulated)
                self.detector = OrtRetinaFace(model)
                self.notes.append(f"{self.name}: its fp16 is emulated, the CPU rounds what is stored between operators")
            self.runner = _head_runner(model)

    def at(self, size_hw: tuple[int, int] | None) -> Any:
        """Return the detector at a network size; None runs frames at their own."""
        self.detector.size_hw = size_hw
        return self.detector


def _head_runner(model: OnnxModel) -> Callable[[Frame], NDArray[np.float32]] | None:
    """Return what gives (N, 16) boxes, logits and landmarks of a letterboxed image, or None if a graph hides them."""
    from export.parity import rows_from_maps

    if model.weights:
        return None
    try:
        graph = model.heads_graph
        session = open_session(graph.content, model.path, why="export.verify")
    except ModelFileError:  # the detector itself loads: only its heads cannot be had
        return None

    def call(image: Frame) -> NDArray[np.float32]:
        maps = [np.asarray(level, np.float32) for level in session.run(graph.heads, {"images": image[None]})]
        return rows_from_maps(maps, model.spec.anchors.per_cell)

    return call
