"""What a model costs against its reference, stage by stage; exit code 1 where that is more than the budget.

python -m export.verify --reference mobilenet0.25 --candidate retinaface.plugin.onnx --data widerface
python -m export.verify --reference a.onnx --candidate b.onnx --plot worst.png --json verify.json
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from export.inspect import inspect
from export.options import MIN_INT8_SHARE
from facespec.agreement import Agreement, Budget, Sample, draw_disagreements
from facespec.cli import ArgumentParser, argument, counted, json_output, make_callable, quiet_libraries, require, run
from facespec.detections import Detections
from facespec.errors import DataError, ModelFileError, OutputError, SpecError
from facespec.files import check_outputs, widerface_root, work_folder
from facespec.images import find_images, read_image, write_image
from facespec.kinds import model_kind
from facespec.letterbox import Frame, Letterbox
from facespec.opencv import cv2
from facespec.samples import sample_crops, sample_photographs, tiled
from facespec.spec import DEFAULT_SCORE_THRESHOLD, ModelSpec, parse_size
from trt_runtime.cpu import PRECISIONS
from trt_runtime.load import BACKENDS, load_detector
from trt_runtime.measure import environment
from trt_runtime.onnx_model import OnnxModel, load_graph, open_session

_DEPLOYED = ("engine", "onnx")
DEFAULT_HW = (640, 640)
EXTRA_SIZES = ((640, 640), (480, 640), (640, 384))
"""Network sizes tried besides the one asked for, where both models take any."""

PROTOCOLS = ("letterbox", "original", "both")
DEMO_FRAMES = 24
HEAD_IMAGES = 8
SIZE_IMAGES = 32
CROWD_IMAGES = 8
BATCH = 4
BATCH_IOU, BATCH_LANDMARK_ERROR, BATCH_SCORE = 0.98, 0.5, 0.01
"""Least IoU, largest distance of landmarks in percent of the face size, and largest difference of scores, of a face in
a batch and the same face alone: they may be computed in another order of additions."""

SIGNIFICANCE = 0.05
"""Probability under which a loss of faces is not taken for chance."""

FEW_FACES = 200
"""Under so many the resolution of a percentage is shown."""

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
HEAD_PARTS = {"boxes": slice(0, 4), "class logits": slice(4, 6), "landmarks": slice(6, 16)}

BUDGETS = {
    # what is stated of fp16 is the loss of AP; for the rest it may be no worse than int8
    "fp16": Budget(ap_loss=(0.1, 0.1, 0.1)),
    "int8": Budget(),
}
"""By the precision of the candidate; fp32 has the one of fp16."""


@dataclass(frozen=True)
class VerifyOptions:
    """What to compare.

    Attributes:
        reference: Checkpoint, name of published weights, or exported model.
        candidate: The same; what is judged.
        backend: What runs the candidate's file, as it is deployed (`trt_runtime.load_detector`); None runs an ONNX file
            as its graph says, with the rounding of fp16 emulated.
        data: WIDER FACE folder: val/images and gt; a label file, or a folder with one; or a folder of images, without
            AP. None compares on sample photographs, without AP.
        protocol: "letterbox" at `size_hw`, "original" size, or "both".
        size_hw: Network size; None takes that of a model of fixed size, or 640x640.
        images: Images at most, evenly chosen; None takes all of `data`, or `DEMO_FRAMES` sample crops.
        budget: Key of `BUDGETS`, "none", or None to go by the candidate's precision.
        json: Result file of the command, "-" for stdout; `verify` makes sure that it can be written, no more.
        plot: Image file of the worst disagreements.
        progress: Whether to draw progress bars on a terminal.
        image_folder: Of the images of a label file; see `trainer.data.open_dataset`.
        category: Of the faces in a COCO file.
        precision: What OpenVINO computes the candidate in where it is not INT8; "bf16" implies `backend="openvino"`.
    """

    reference: str
    candidate: str
    data: Path | None = None
    backend: str | None = None
    protocol: str = "letterbox"
    size_hw: tuple[int, int] | None = None
    images: int | None = None
    budget: str | None = None
    json: Path | None = None
    plot: Path | None = None
    progress: bool = True
    image_folder: Path | None = None
    category: str | None = None
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise SpecError(f"the protocol is one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        if self.budget not in (None, "none", *BUDGETS):
            raise SpecError(f"the budget is one of {', '.join(BUDGETS)}, none, got {self.budget!r}")
        if self.images is not None and self.images < 1:
            raise SpecError(f"--images {self.images}: give at least one")


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
        precision: What OpenVINO computes in where a model is not INT8; see `trt_runtime.load_detector`.

    Attributes:
        detector: Finds faces, down to the model's own floor.
        runner: Gives the raw heads, (N, 16) boxes, logits and landmarks, of a letterboxed image; None if they cannot
            be had.
        fixed_hw: The one network size it takes, or None.
        notes: What a reader of the comparison should know.

    Raises:
        ModelFileError: It cannot be opened, or not here.
    """

    def __init__(self, name: str, backend: str | None = None, precision: str = "fp32") -> None:
        kind = model_kind(name)
        self.name = name
        self.runner: Callable[[Frame], NDArray[np.float32]] | None = None
        self.detector: Any
        self.notes: list[str] = []
        if kind in _DEPLOYED:
            backend = backend or ("openvino" if precision == "bf16" else None)
            runs = backend or ("onnxruntime" if kind == "onnx" else "auto")
            self.detector = load_detector(name, backend=runs, precision=precision)
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
            elif kind == "onnx":
                self._open_graph(Path(name))
        else:
            require("torch", "train", "comparing a checkpoint")
            from trainer.checkpoint import load_model
            from trainer.model import TorchRetinaFace

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
        with work_folder() as folder:
            if model.weights:
                self.notes.append(f"{self.name}: its weights lie outside: fp16, if it has any, is not emulated")
            elif computes_in_fp16(graph := load_graph(model.content, "export.verify")):
                emulated = folder / "emulated.onnx"
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


@dataclass(frozen=True)
class Row:
    """One figure: the stage of a detector it is taken at, on what, and what it is, with its unit.

    The value is None if there was nothing to measure, the limit if the budget says nothing; it is the most that is
    allowed, or the least. A percentage of few faces tells little: with `of` it is over the budget only if so many
    faces would miss it with a probability under `SIGNIFICANCE` where the budget is just held; one face never decides.
    """

    stage: str
    case: str
    quantity: str
    value: float | None
    limit: float | None = None
    at_least: bool = False
    note: str = ""
    of: int | None = None  # faces that the percentage is of

    @property
    def passed(self) -> bool:
        """Whether it is within the budget."""
        if self.limit is None:
            return True
        if self.value is None:
            return False
        return (self.value >= self.limit if self.at_least else self.value <= self.limit + 1e-9) or self.undecided

    @property
    def undecided(self) -> bool:
        """Whether it misses the budget by no more than chance may do with so few faces."""
        if self.of is None or self.limit is None or self.value is None or self.value >= self.limit:
            return False
        missed = round(self.of * (1 - self.value / 100))
        return missed <= 1 or at_least_so_many(missed, self.of, 1 - self.limit / 100) >= SIGNIFICANCE

    def __str__(self) -> str:
        value = "none" if self.value is None else _number(self.value)
        limit = "" if self.limit is None else f"{'>=' if self.at_least else '<='} {self.limit:g}"
        text = f"{self.stage:13} {self.case:26} {self.quantity:24} {value:>9} {limit:>8}"
        verdict = "  UNDECIDED" if self.undecided else "" if self.passed else "  OVER BUDGET"
        return f"{text}{verdict}{f'  {self.note}' if self.note else ''}".rstrip()


def at_least_so_many(count: int, of: int, probability: float) -> float:
    """Return how probable `count` or more of so many are, each of a probability: the binomial tail."""
    if count <= 0 or probability >= 1:
        return 1.0
    if probability <= 0:
        return 0.0
    log_p, log_q = math.log(probability), math.log1p(-probability)
    fewer = (
        math.exp(math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1) + k * log_p + (of - k) * log_q)
        for k in range(count)
    )
    return max(1 - math.fsum(fewer), 0.0)


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Verification:
    """What was found; `str()` gives a table.

    Attributes:
        budget: Key of `BUDGETS`, or "none".
        size_hw: Network size of the letterbox protocol.
        rows: The figures, in the order of the stages.
        average_precision: By protocol and level: reference and candidate in percent; None if no face counts.
        notes: What could not be compared, or differs by design.
    """

    reference: ModelInfo
    candidate: ModelInfo
    budget: str
    size_hw: tuple[int, int]
    images: int
    rows: tuple[Row, ...]
    average_precision: dict[str, dict[str, dict[str, float | None]]]
    notes: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every figure is within the budget."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> str:
        """Return everything as one JSON object, with date, command, machine and versions."""
        rows = [{**asdict(row), "passed": row.passed, "undecided": row.undecided} for row in self.rows]
        origin = environment("numpy", "opencv-python", "torch", "onnx", "onnxruntime", "openvino")
        return json.dumps({**asdict(self), "rows": rows, "passed": self.passed, **origin}, indent=2, allow_nan=False)

    def __str__(self) -> str:
        lines = [f"reference  {self.reference}", f"candidate  {self.candidate}"]
        lines.append(f"{'stage':13} {'on':26} {'':24} {'':>9} {'budget':>8}")
        lines += [str(row) for row in self.rows]
        lines += [f"note: {note}" for note in self.notes]
        bad = [f"{row.stage}, {row.quantity} ({row.case})" for row in self.rows if not row.passed]
        where = f"{counted(self.images, 'image')}, {self.seconds:.0f} s"
        lines += [
            f"note: {row.quantity} ({row.case}) is {row.value:.1f}, under {row.limit:g}, and that may be chance: of "
            f"{row.of} faces one is {100 / row.of:.1f} %; more images decide (--data)"
            for row in self.rows
            if row.undecided and row.of and row.value is not None
        ]
        if bad:
            lines.append(f"FAILED, over the {self.budget} budget: {'; '.join(bad)} ({where})")
        elif self.budget == "none":
            lines.append(f"no budget was set ({where})")
        else:
            lines.append(f"passed, within the {self.budget} budget ({where})")
        return "\n".join(lines)


def _face_rows(agreement: Agreement, case: str, budget: Budget | None, special: bool = False) -> list[Row]:
    """Return the figures of an agreement; those of a `special` case, of few images, hold the wider limits."""
    recall = precision = error = drift = None
    if budget is not None and agreement.faces:
        recall = budget.case_recall if special else budget.recall
        error = budget.landmark_error * (2 if special else 1)
        drift = budget.score_drift
    if budget is not None and agreement.candidate_faces:  # where the reference has no face, each is one too many
        precision = budget.case_precision if special else budget.precision
    number, other = agreement.faces, agreement.candidate_faces
    faces, theirs = f"{counted(number, 'face')} in {counted(agreement.images, 'image')}", counted(other, "face")
    if 0 < number < FEW_FACES:
        faces += f", one is {100 / number:.1f} %"
    rows = [
        Row("boxes", case, "recall %", agreement.recall, recall, True, faces, number),
        Row("boxes", case, "precision %", agreement.precision, precision, True, theirs, other),
        Row("boxes", case, "mean IoU", agreement.mean_iou),
        Row("landmarks", case, "mean error, % of face", agreement.landmark_error, error),
    ]
    if not special:
        errors, drifts = agreement.landmarks, agreement.scores
        rows += [
            Row("landmarks", case, "95 % below, % of face", float(np.percentile(errors, 95)) if errors else None),
            Row("scores", case, "mean drift", float(np.mean(drifts)) if drifts else None, drift),
            Row("scores", case, "largest drift", max(drifts, default=None)),
        ]
    return rows


def _demo_samples(count: int) -> list[Sample]:
    if not sample_photographs():
        raise DataError("nothing to compare on: give --data WIDERFACE, or pip install -e '.[demo]'")
    frames = list(sample_crops(count, seed=0))
    tiles = [cv2.resize(frame, (240, 240), interpolation=cv2.INTER_AREA) for _, frame in frames]
    crowd = tiled([np.asarray(tiles[index % count], np.uint8) for index in range(16)], 4)
    frames.append(("crowd of sixteen", crowd))
    return [Sample(name, functools.partial(np.asarray, frame)) for name, frame in frames]


def _evenly(count: int, wanted: int) -> list[int]:
    """Return `wanted` of the numbers below `count`, evenly spread, or all of them."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int)).tolist() if count else []


def _network_size(options: VerifyOptions, reference: Side, candidate: Side) -> tuple[int, int]:
    fixed = [side for side in (reference, candidate) if side.fixed_hw]
    size_hw = options.size_hw or (fixed[0].fixed_hw if fixed else None) or DEFAULT_HW
    for side in fixed:
        if side.fixed_hw != size_hw:
            height, width = side.fixed_hw or DEFAULT_HW
            raise SpecError(
                f"{side.name} takes {height}x{width} only, not {size_hw[0]}x{size_hw[1]}: "
                "give --size that both take, or export one of them again"
            )
    if fixed and options.protocol != "letterbox":
        raise SpecError(f"{fixed[0].name} is of fixed size: --protocol {options.protocol} needs models of any size")
    return size_hw


def _takes(side: Side, size_hw: tuple[int, int]) -> bool:
    """Whether a model of any size takes this one: an engine takes those of its profile."""
    engine = getattr(side.detector, "engine", None)
    return engine is None or engine.profile.takes(size_hw)


def _preprocessing(reference: Side, candidate: Side, size_hw: tuple[int, int]) -> tuple[Row, list[str]]:
    """Compare what the networks are given, and say where the specs part."""
    notes = []
    for part in ("preprocess", "anchors", "decode"):
        left, right = (asdict(getattr(side.spec, part)) for side in (reference, candidate))
        for key in left:
            if left[key] != right[key]:
                notes.append(f"{part} {key} differs: reference {left[key]}, candidate {right[key]}")
    hashes = [side.spec.weights_sha256 for side in (reference, candidate)]
    if all(hashes) and hashes[0] != hashes[1]:
        notes.append("they were made from different weights")
    # both are letterboxed alike: only what they subtract from the pixels may differ
    means = [side.spec.preprocess.mean_bgr for side in (reference, candidate)]
    worst = float(max(abs(left - right) for left, right in zip(*means, strict=True)))
    return Row("preprocessing", f"letterbox {size_hw[0]}x{size_hw[1]}", "largest difference", worst), notes


def _raw_heads(reference: Side, candidate: Side, frames: list[Frame], size_hw: tuple[int, int]) -> list[Row]:
    if reference.runner is None or candidate.runner is None or reference.spec.anchors != candidate.spec.anchors:
        return []
    differences = []
    for frame in frames:
        box = Letterbox.fit((frame.shape[0], frame.shape[1]), size_hw)
        left = reference.runner(box.apply(frame, reference.spec.preprocess.mean_bgr))
        right = candidate.runner(box.apply(frame, candidate.spec.preprocess.mean_bgr))
        differences.append(np.abs(left - right))
    apart, case = np.stack(differences), f"{size_hw[0]}x{size_hw[1]}, {len(frames)} images"
    rows = []
    for part, columns in HEAD_PARTS.items():
        rows.append(Row("raw heads", case, f"{part}, largest", float(apart[..., columns].max())))
        rows.append(Row("raw heads", case, f"{part}, mean", float(apart[..., columns].mean())))
    return rows


def _batch_rows(candidate: Side, frames: list[Frame], size_hw: tuple[int, int], limited: bool) -> list[Row]:
    """Every slot of a batch must give what the frame gives alone."""
    detector = candidate.at(size_hw)
    alone = [detector.detect(frame) for frame in frames]
    together = detector.detect_batch(frames)
    most = (BATCH_IOU, BATCH_LANDMARK_ERROR, BATCH_SCORE, 0) if limited else (None,) * 4
    rows = []
    for slot, (one, other) in enumerate(zip(alone, together, strict=True)):
        agreement = Agreement()
        agreement.add(one, other)
        least = min(agreement.iou, default=1.0)
        error, drift = max(agreement.landmarks, default=0.0), max(agreement.scores, default=0.0)
        # a score on the threshold may fall to either side of it
        lost = [item for item in agreement.unmatched if abs(item - agreement.score) >= BATCH_SCORE]
        case = f"slot {slot} of {len(frames)}"
        rows += [
            Row("batch", case, "least IoU, to it alone", least, most[0], True, counted(agreement.faces, "face")),
            Row("batch", case, "landmarks, % of face", error, most[1]),
            Row("batch", case, "scores, largest drift", drift, most[2]),
            Row("batch", case, "faces of one side alone", float(len(lost)), most[3]),
        ]
    return rows


def _empty_rows(reference: Side, candidate: Side, size_hw: tuple[int, int], limited: bool) -> list[Row]:
    """On frames without faces the candidate may find as many as the reference."""
    shape = (*size_hw, 3)
    ramp = np.linspace(0, 255, size_hw[1]).astype(np.uint8)
    frames = {
        "plain frame": np.full(shape, reference.spec.preprocess.mean_bgr, np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        "gradient": np.ascontiguousarray(np.broadcast_to(ramp[None, :, None], shape)),
    }
    rows = []
    for name, frame in frames.items():
        found = [side.at(size_hw).detect(frame) for side in (reference, candidate)]
        counts = [len(faces.with_min_score(DEFAULT_SCORE_THRESHOLD)) for faces in found]
        limit = float(counts[0]) if limited else None
        rows.append(Row("zero faces", name, "faces found", float(counts[1]), limit, note=f"reference {counts[0]}"))
    return rows


Score = Callable[[list[Detections]], dict[str, float | None]]
"""Average precision by level, in percent, of what was found on each image; None where no face counts."""


def _open_images(options: VerifyOptions, data: Path) -> tuple[list[Sample], Score | None, list[str]]:
    """Return images, evenly thinned out, what scores them if they are labelled, and what is to be known of them."""
    if data.is_dir() and not (data / "gt").exists():
        try:
            return _labelled(options, data)
        except DataError as error:
            paths = find_images(data)
            if not paths:
                raise
            note = f"no AP: {error}"
            paths = [paths[i] for i in _evenly(len(paths), options.images or len(paths))]
            return [Sample(str(path), functools.partial(_read, path)) for path in paths], None, [note]
    return _labelled(options, data) if data.is_file() else _widerface(options, data)


def _labelled(options: VerifyOptions, data: Path) -> tuple[list[Sample], Score | None, list[str]]:
    from trainer.coco_ap import Truth, coco_average_precision
    from trainer.data import open_dataset

    dataset = open_dataset(str(data), "val", images=options.image_folder, category=options.category)
    chosen = [dataset.samples[i] for i in _evenly(len(dataset), options.images or len(dataset))]
    samples = [Sample(sample.name, lambda sample=sample: sample.load()[0]) for sample in chosen]  # type: ignore[misc]
    truth = [Truth.of(sample) for sample in chosen]

    def score(found: list[Detections]) -> dict[str, float | None]:
        return {level: _percent(curve.ap) for level, curve in coco_average_precision(found, truth).items()}

    return samples, score, list(dataset.report.notes)


def _widerface(options: VerifyOptions, data: Path) -> tuple[list[Sample], Score | None, list[str]]:
    from trainer.average_precision import average_precision, load_ground_truth, present_images
    from trainer.evaluate import to_rows

    truth = load_ground_truth(data / "gt")
    paths = present_images(data / "val" / "images", truth)
    keys = list(paths)
    keys = [keys[i] for i in _evenly(len(keys), options.images or len(keys))]
    samples = [Sample("/".join(key), functools.partial(_read, paths[key])) for key in keys]

    def score(found: list[Detections]) -> dict[str, float | None]:
        rows = {key: to_rows(faces) for key, faces in zip(keys, found, strict=True)}
        curves = average_precision(rows, {key: truth[key] for key in keys})
        return {level: _percent(curve.ap) for level, curve in curves.items()}

    return samples, score, []


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else 100 * share


def _read(path: Path) -> Frame:
    with quiet_libraries():
        return read_image(path)


def _run_all(
    options: VerifyOptions,
    sides: tuple[Side, Side],
    size_hw: tuple[int, int] | None,
    samples: list[Sample],
    score: Score | None,
) -> tuple[list[list[Detections]], dict[str, dict[str, float | None]]]:
    """Return what each side finds on every image, and the AP of both by level where they are labelled."""
    faces: list[list[Detections]] = []
    precision: dict[str, dict[str, float | None]] = {}
    for role, side in zip(("reference", "candidate"), sides, strict=True):
        detector = side.at(size_hw)
        shown = tqdm(samples, desc=role, unit="image", disable=None if options.progress else True)
        faces.append([detector.detect(sample.load()) for sample in shown])
        if score:
            for level, ap in score(faces[-1]).items():
                precision.setdefault(level, {})[role] = ap
    return faces, precision


def verify(options: VerifyOptions) -> Verification:
    """Compare two models, and draw their worst disagreements if asked to.

    Raises:
        RetinaFaceError: A model, the images or an output file is not usable, or there was no face to compare.
    """
    start = time.perf_counter()
    deployed = "--backend" if options.backend else "--precision" if options.precision != "fp32" else None
    if deployed and model_kind(options.candidate) not in _DEPLOYED:
        raise SpecError(f"{deployed} is for exported models, the candidate {options.candidate} is none")
    if options.plot and options.plot.suffix.lower() not in PICTURE_SUFFIXES:
        raise OutputError(f"--plot {options.plot}: give a name that ends in {', '.join(PICTURE_SUFFIXES)}")
    outputs = [("--json", options.json), ("--plot", options.plot)]
    read = [name for name in (options.reference, options.candidate) if Path(name).exists()]
    if options.data:
        read += [str(path) for path in (options.data / "gt").glob("*.mat")]
        read += [str(path) for path in (options.data / "val" / "images").glob("*/*.jpg")]
        read += [str(options.data)] if options.data.is_file() else []
    check_outputs(outputs, read)
    reference, candidate = Side(options.reference), Side(options.candidate, options.backend, options.precision)
    size_hw = _network_size(options, reference, candidate)
    name = options.budget or ("int8" if candidate.info.precision == "int8" else "fp16")
    budget = BUDGETS.get(name)
    notes = [*reference.notes, *candidate.notes]
    score: Score | None = None
    if options.data:
        samples, score, told = _open_images(options, options.data)
        notes += told
    else:
        samples = _demo_samples(options.images or DEMO_FRAMES)
        notes.append("sample photographs only, and no AP: --data WIDERFACE tells what it really costs")
    few = [samples[i].load() for i in _evenly(len(samples), HEAD_IMAGES)]
    row, differences = _preprocessing(reference, candidate, size_hw)
    notes += differences
    rows = [row, *_raw_heads(reference, candidate, few, size_hw)]
    protocols: dict[str, tuple[int, int] | None] = {"letterbox": size_hw, "original": None}
    wanted = protocols if options.protocol == "both" else {options.protocol: protocols[options.protocol]}
    average_precision = {}
    picture = Agreement()
    shown: list[list[Detections]] = []
    for protocol, size in wanted.items():
        case = f"letterbox {size[0]}x{size[1]}" if size else "original size"
        faces, precision = _run_all(options, (reference, candidate), size, samples, score)
        agreement = Agreement.of(faces[0], faces[1])
        if not agreement.faces:
            raise DataError("nothing was compared: the reference finds no face on any of the images")
        rows += _face_rows(agreement, case, budget)
        if precision:
            average_precision[protocol] = precision
            rows += _ap_rows(case, precision, budget)
        if not shown:
            picture, shown = agreement, faces
            counts = [len(found.with_min_score(DEFAULT_SCORE_THRESHOLD)) for found in faces[0]]
            crowds = sorted(range(len(samples)), key=lambda i: -counts[i])[:CROWD_IMAGES]
            rows += _face_rows(Agreement.of(faces[0], faces[1], crowds), f"crowds, {case}", budget, special=True)
    if reference.fixed_hw or candidate.fixed_hw:
        notes.append(f"no other size was tried: a model takes {size_hw[0]}x{size_hw[1]} only")
    else:
        for extra in EXTRA_SIZES:
            if extra != size_hw and all(_takes(side, extra) for side in (reference, candidate)):
                chosen = [samples[i] for i in _evenly(len(samples), SIZE_IMAGES)]
                found, _ = _run_all(options, (reference, candidate), extra, chosen, None)
                case = f"letterbox {extra[0]}x{extra[1]}"
                rows += _face_rows(Agreement.of(found[0], found[1]), case, budget, special=True)
    batch = [samples[i].load() for i in crowds[:BATCH]]
    rows += _batch_rows(candidate, batch, size_hw, budget is not None)
    rows += _empty_rows(reference, candidate, size_hw, budget is not None)
    result = Verification(
        reference=reference.info,
        candidate=candidate.info,
        budget=name,
        size_hw=size_hw,
        images=len(samples),
        rows=tuple(rows),
        average_precision=average_precision,
        notes=tuple(notes),
        seconds=round(time.perf_counter() - start, 3),
    )
    if options.plot:
        write_image(options.plot, draw_disagreements(picture.disagreements, samples, shown))
    return result


def _ap_rows(case: str, precision: dict[str, dict[str, float | None]], budget: Budget | None) -> list[Row]:
    """Return what AP is lost; a gain is a negative loss."""
    rows = []
    if all(None in ap.values() for ap in precision.values()):
        raise DataError("no face of these images counts for average precision: give more --images")
    for index, (level, ap) in enumerate(precision.items()):
        before, after = ap["reference"], ap["candidate"]
        if before is None or after is None:
            rows.append(Row("AP", case, f"{level}, loss", None, note="no face counts"))
            continue
        limit = budget.ap_loss[index] if budget else None
        rows.append(Row("AP", case, f"{level}, loss", before - after, limit, note=f"{before:.2f} -> {after:.2f}"))
    return rows


def parse_arguments(argv: Sequence[str] | None) -> VerifyOptions:
    """Return the options of a command line."""
    parser = ArgumentParser(
        prog="python -m export.verify",
        description="Compare two models stage by stage: what goes in, raw heads, boxes, landmarks, scores and, with "
        "--data, average precision; on square and other sizes, in every slot of a batch, without faces and in crowds. "
        "Exit code 1 if the candidate is worse than its budget allows.",
    )
    add = parser.add_argument
    kinds = "checkpoint, name of published weights, portable ONNX, plugin form, or engine where its GPU is"
    add("--reference", required=True, help=kinds)
    add("--candidate", required=True, help="the same; what is judged")
    root = widerface_root() if "WIDERFACE_ROOT" in os.environ else None
    data = "WIDER FACE folder, COCO or label file, or folder of images (default: $WIDERFACE_ROOT, or photographs)"
    add("--data", type=Path, default=root, help=data)
    add("--category", metavar="NAME", help="of the faces in a COCO file (default: face, or the only one)")
    add(
        "--backend",
        choices=BACKENDS,
        help="run the candidate as it is deployed (default: as its graph says, the rounding of fp16 emulated)",
    )
    add("--precision", choices=PRECISIONS, default="fp32", help="what OpenVINO computes in")
    size = "HEIGHTxWIDTH of the network (default: the models', or 640x640)"
    add("--size", dest="size_hw", type=argument(parse_size), metavar="SIZE", help=size)
    where = "images letterboxed to --size, at their own, or both"
    add("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help=where)
    number = "images at most, evenly chosen (default: all); a folder: the images of a label file (default: beside it)"
    add("--images", type=_number_or_folder, action="append", default=[], metavar="N|DIR", help=number)
    add("--budget", choices=[*BUDGETS, "none"], help="what is allowed (default: by the candidate's precision)")
    parser.add_json()
    add("--plot", type=Path, metavar="FILE", help="draw the worst disagreements (.png, .jpg)")
    args = parser.parse_args(argv)
    args.image_folder = next((item for item in reversed(args.images) if isinstance(item, Path)), None)
    args.images = next((item for item in reversed(args.images) if isinstance(item, int)), None)
    return VerifyOptions(**vars(args))


def _number_or_folder(text: str) -> int | Path:
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else Path(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 1 beyond the budget."""
    options = parse_arguments(argv)
    with json_output(options.json) as write:
        result = verify(options)
        print(result)
        write(result.to_json())
        if options.plot:
            print(f"wrote {options.plot}")
    return 0 if result.passed else 1


make_callable(__name__, verify)

if __name__ == "__main__":
    sys.exit(run(main))
