"""Does an exported graph give what PyTorch gives? Compared stage by stage: a difference shows where it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from export.graph import HEAD_NAMES, showing
from facespec.agreement import match_faces
from facespec.boxes import Decoded
from facespec.errors import ParityError
from facespec.letterbox import Frame, Letterbox
from facespec.spec import ModelSpec
from trainer.model import RetinaFace, TorchRetinaFace
from trt_runtime.kernels import PLUGIN, decode_nms
from trt_runtime.onnx_model import cut_heads, open_session


@dataclass(frozen=True)
class Tolerance:
    """What counts as equal or, where it is `gross`, as no gross error.

    Attributes:
        heads: Largest difference of a raw head output.
        pixels: Largest difference of a box or landmark coordinate in pixels of the network input.
        scores: Largest difference of a score.
        margin: Up to this much over the model's score floor, faces that only one side has, and the coordinates of those
            that both have, are overlooked.
    """

    heads: float
    pixels: float
    scores: float
    margin: float
    gross: bool = False


TOLERANCES = {
    "fp32": Tolerance(heads=1e-3, pixels=0.05, scores=1e-3, margin=4e-5),
    # a first look; what fp16 and int8 cost is measured on a data set, not on a few photographs
    "fp16": Tolerance(heads=1.0, pixels=10.0, scores=0.02, margin=0.05, gross=True),
    "int8": Tolerance(heads=10.0, pixels=30.0, scores=0.3, margin=0.6, gross=True),
}
"""By the precision of the graph."""


@dataclass(frozen=True)
class ParityRow:
    """Largest differences on one image, by the kinds of `Tolerance`; `unmatched` faces are those of one side alone."""

    image: str
    size_hw: tuple[int, int]
    heads: float
    boxes_px: float
    landmarks_px: float
    scores: float
    faces: int
    unmatched: int
    tolerance: Tolerance

    @property
    def equal(self) -> bool:
        """Whether all differences, none of them NaN, are within the tolerance."""
        return (
            self.heads <= self.tolerance.heads
            and self.boxes_px <= self.tolerance.pixels
            and self.landmarks_px <= self.tolerance.pixels
            and self.scores <= self.tolerance.scores
            and self.unmatched == 0
        )


@dataclass(frozen=True)
class ParityReport:
    """The comparison on every image; `str()` gives a table."""

    spec: ModelSpec
    rows: tuple[ParityRow, ...]
    title: str = "ONNX"

    def __str__(self) -> str:
        title = f"{self.title} against PyTorch"
        lines = [f"{title:26} {'size':>9} {'heads':>8} {'boxes px':>9} {'lmk px':>8} {'faces':>6} unmatched"]
        for row in self.rows:
            size = f"{row.size_hw[0]}x{row.size_hw[1]}"
            lines.append(
                f"{row.image[-26:]:26} {size:>9} {row.heads:8.1e} {row.boxes_px:9.1e} {row.landmarks_px:8.1e} "
                f"{row.faces:6d} {row.unmatched:9d}{'' if row.equal else '  DIFFERS'}"
            )
        limit = self.rows[0].tolerance
        allowed = f"heads {limit.heads:g}, boxes and landmarks {limit.pixels:g} px, scores {limit.scores:g}"
        held = all(row.equal for row in self.rows)
        if limit.gross:
            verdict = "no gross error" if held else "it differs grossly"
            lines.append(f"{verdict}; this first look allows {allowed}; export.verify measures the cost")
        else:
            lines.append(f"{'equal' if held else 'it differs'}; allowed: {allowed}")
        return "\n".join(lines)

    def summary(self) -> dict[str, float]:
        """Return the largest difference of each kind, and the numbers of images and faces."""
        names = ("heads", "boxes_px", "landmarks_px", "scores")
        worst = {name: max(float(getattr(row, name)) for row in self.rows) for name in names}
        return {"images": len(self.rows), "faces": sum(row.faces for row in self.rows), **worst}

    def require_equal(self) -> None:
        """Raise ParityError if any image differs, or if no face was compared."""
        for bad in self.rows:
            if not bad.equal:
                raise ParityError(
                    f"the exported graph differs from PyTorch on {bad.image}: heads {bad.heads:.2g} (at most "
                    f"{bad.tolerance.heads:g}), boxes {bad.boxes_px:.2g} px, landmarks {bad.landmarks_px:.2g} px (at "
                    f"most {bad.tolerance.pixels:g}), scores {bad.scores:.2g} (at most {bad.tolerance.scores:g}), "
                    f"unmatched faces {bad.unmatched}; nothing was written. Other images: --parity"
                )
        if not any(row.faces for row in self.rows):
            raise ParityError("nothing was compared: the model finds no face on any of the images; try --parity")


def check_parity(
    graph: onnx.ModelProto,
    model: RetinaFace,
    frames: Mapping[str, Frame],
    size_hw: tuple[int, int] | None,
    precision: str = "fp32",
) -> ParityReport:
    """Run a graph in ONNX Runtime and the model it was exported from in PyTorch on the same uint8 BGR frames.

    Without a network size each frame is compared at its own, padded to multiples of 32. The precision is a key of
    `TOLERANCES`.
    """
    plugin = any(node.domain == PLUGIN.domain for node in graph.graph.node)
    # of a plugin form the network runs in ONNX Runtime, the plugin on the host
    content = cut_heads(graph.SerializeToString(), model.spec).content if plugin else showing(graph, HEAD_NAMES)
    session = open_session(content, "the exported graph", why="the parity report")
    names = [output.name for output in session.get_outputs()]
    torch_side = TorchRetinaFace(model)
    rows = []
    for name, frame in frames.items():
        box = Letterbox.place((frame.shape[0], frame.shape[1]), size_hw)
        image = box.apply(frame, model.spec.preprocess.mean_bgr)
        found = dict(zip(names, session.run(None, {"images": image[None]}), strict=True))
        if plugin:
            found |= decode_nms([found[name] for name in HEAD_NAMES], box.size_hw, model.spec)
        heads = torch_side.heads(image)
        expected = torch_side.decode(heads, box.size_hw)
        raw = np.concatenate(heads, axis=1)
        rows.append(_compare(name, model.spec, box.size_hw, raw, expected, found, TOLERANCES[precision]))
    return ParityReport(model.spec, tuple(rows), "plugin form" if plugin else "ONNX")


def rows_from_maps(maps: list[NDArray[np.float32]], per_cell: int) -> NDArray[np.float32]:
    """Return (N, 4 + 2 + 10) box, class and landmark outputs in prior order from merged maps (1, C, h, w)."""
    levels = []
    for level in maps:
        cells = level[0].reshape(level.shape[1], -1).T
        edges = [2 * per_cell, 6 * per_cell]
        logits, boxes, landmarks = (part.reshape(len(cells) * per_cell, -1) for part in np.split(cells, edges, axis=1))
        levels.append(np.concatenate([boxes, logits, landmarks], axis=1))
    return np.concatenate(levels)


def _largest(difference: NDArray[np.float32]) -> float:
    return float(np.abs(difference).max(initial=0))


def _compare(
    image: str,
    spec: ModelSpec,
    size_hw: tuple[int, int],
    raw: NDArray[np.float32],
    expected: Decoded,
    found: dict[str, NDArray[Any]],
    tolerance: Tolerance,
) -> ParityRow:
    mine = rows_from_maps([np.asarray(found[name], np.float32) for name in HEAD_NAMES], spec.anchors.per_cell)
    count = int(found["num_detections"][0])
    boxes, scores, landmarks = (found[name][0, :count] for name in ("boxes", "scores", "landmarks"))
    matches = match_faces(expected.boxes, boxes)
    left, right = matches.reference, matches.candidate
    margin = spec.decode.score_threshold + tolerance.margin
    unmatched = sum(
        int((np.delete(side, taken) > margin).sum()) for side, taken in ((expected.scores, left), (scores, right))
    )
    # of those near the floor, NMS may keep another prior of the same face
    sure = expected.scores[left] > margin
    return ParityRow(
        image=image,
        size_hw=size_hw,
        heads=_largest(mine - raw),
        boxes_px=_largest((expected.boxes[left] - boxes[right])[sure]),
        landmarks_px=_largest((expected.landmarks[left] - landmarks[right])[sure]),
        scores=_largest(expected.scores[left] - scores[right]),
        faces=len(expected.scores),
        unmatched=unmatched,
        tolerance=tolerance,
    )
