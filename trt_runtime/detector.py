"""Detectors: uint8 BGR frames in, `Detections` out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facespec.cli import require
from facespec.detections import Detections
from facespec.errors import FrameError, ModelFileError, NonFiniteError, SpecError
from facespec.letterbox import Frame, Letterbox, check_frame
from facespec.spec import SIZE_MULTIPLE, SPEC_KEY, ModelSpec
from trt_runtime.onnx_file import read_onnx
from trt_runtime.timing import StageTimer

OUTPUT_NAMES = ("num_detections", "boxes", "scores", "landmarks", "num_candidates")

MAX_NETWORK_PIXELS = 4096 * 4096
"""Most pixels that go through the network at once, over the whole batch: it bounds memory (about 1 GB)."""


class OrtRetinaFace:
    """An exported ONNX detector on the CPU, through ONNX Runtime.

    One object may be used by several threads.

    Args:
        path: File written by `python -m export.to_onnx`.
        score_threshold: Lowest score reported: 0.5 unless given, not below the floor the model was exported with.
        size_hw: Height and width frames are letterboxed to, for models of dynamic size; None runs each frame at its
            own size, padded to multiples of 32.
        threads: Threads a call may use; None leaves it to ONNX Runtime, which takes every core.

    Attributes:
        spec: The `ModelSpec` of the model.
        size_hw: Network size, or None if every frame is run at its own.
        score_threshold: The threshold in use.

    Raises:
        ModelFileError: Missing, damaged, unsafe, or not a detector of this toolkit.
        SpecError: `score_threshold` or `size_hw` does not fit the model.
        MissingPackageError: onnxruntime is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        score_threshold: float | None = None,
        size_hw: tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> None:
        content, header = read_onnx(path)
        if SPEC_KEY not in header.metadata:
            raise ModelFileError(
                f"{path}: an ONNX file, but not a detector written by this toolkit: python -m export.to_onnx writes one"
            )
        self.spec = ModelSpec.from_json(header.metadata[SPEC_KEY])
        self.score_threshold = self.spec.decode.run_threshold(score_threshold)
        self._session = _open_session(str(path) if header.external_files else content, path, threads)
        self.size_hw = _network_size(self._session, path, size_hw)

    def detect(self, frame: Frame, timer: StageTimer | None = None) -> Detections:
        """Return the faces of one frame, in its own pixels.

        Args:
            frame: uint8 (H, W, 3) BGR.
            timer: Adds up the time of each stage.

        Raises:
            FrameError: Not such a frame, or too large.
            NonFiniteError: The network gave NaN or infinity.
        """
        return self.detect_batch([frame], timer)[0]

    def detect_batch(self, frames: Sequence[Frame], timer: StageTimer | None = None) -> list[Detections]:
        """Return the faces of several frames, which may differ in size, in their order; see `detect`."""
        boxes = [self._place(frame) for frame in frames]
        results: list[Detections] = []
        while len(results) < len(frames):  # consecutive frames of one network size, up to the memory limit, together
            start = len(results)
            height, width = boxes[start].size_hw
            stop = start + 1
            while (
                stop < len(frames)
                and boxes[stop].size_hw == (height, width)
                and (stop + 1 - start) * height * width <= MAX_NETWORK_PIXELS
            ):
                stop += 1
            results += self._run(frames[start:stop], boxes[start:stop], timer)
        return results

    def _place(self, frame: Frame) -> Letterbox:
        frame_hw = check_frame(frame).shape[:2]
        box = Letterbox.fit(frame_hw, self.size_hw) if self.size_hw else Letterbox.pad(frame_hw)
        if box.size_hw[0] * box.size_hw[1] > MAX_NETWORK_PIXELS:
            raise FrameError(
                f"a frame of {frame_hw[1]}x{frame_hw[0]} is too large to run at its own size: "
                "give size_hw (--size HEIGHTxWIDTH) to scale it down"
            )
        return box

    def _run(self, frames: Sequence[Frame], boxes: list[Letterbox], timer: StageTimer | None) -> list[Detections]:
        stage: Any = timer or nullcontext
        with stage("letterbox"):
            if len(frames) == 1:
                batch = boxes[0].apply(frames[0], self.spec.preprocess.mean_bgr)[None]
            else:
                batch = np.empty((len(frames), *boxes[0].size_hw, 3), np.uint8)
                for row, frame, box in zip(batch, frames, boxes, strict=True):
                    box.apply(frame, self.spec.preprocess.mean_bgr, out=row)
        with stage("network"):
            outputs = self._session.run(OUTPUT_NAMES, {"images": batch})
        with stage("results"):
            return [
                _to_detections(self.spec, self.score_threshold, box, *values)
                for box, *values in zip(boxes, *outputs, strict=True)
            ]


def load_detector(path: str | Path, **options: Any) -> OrtRetinaFace:
    """Return the detector that runs a model file: `OrtRetinaFace` for .onnx.

    Args:
        path: Model file.
        options: Passed on to the detector.

    Raises:
        ModelFileError: No such file, or a kind that no detector runs; the message names the command that helps.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file; python -m export.to_onnx --out {path} writes one")
    if suffix in (".pth", ".pt", ".tar", ".ckpt"):
        raise ModelFileError(f"{path}: a checkpoint; export it first: python -m export.to_onnx --weights {path}")
    if suffix != ".onnx":
        raise ModelFileError(f"{path}: expected a .onnx file written by python -m export.to_onnx")
    return OrtRetinaFace(path, **options)


def _open_session(model: str | bytes, path: str | Path, threads: int | None) -> Any:
    ort = require("onnxruntime", "cpu", "OrtRetinaFace")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors come as exceptions
    if threads is not None:
        if threads < 1:
            raise SpecError(f"threads must be at least 1, got {threads}")
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a class for every kind of failure
        reason = " ".join(str(error).split())[:200]
        raise ModelFileError(f"{path}: ONNX Runtime cannot load it ({reason})") from None


def _network_size(session: Any, path: str | Path, size_hw: tuple[int, int] | None) -> tuple[int, int] | None:
    """Check the contract of the graph and return the size frames are letterboxed to."""
    inputs = session.get_inputs()
    names = {output.name for output in session.get_outputs()}
    if [item.name for item in inputs] != ["images"] or not names.issuperset(OUTPUT_NAMES):
        raise ModelFileError(f"{path}: inputs or outputs are not those of a detector: export it again")
    shape = inputs[0].shape
    if inputs[0].type != "tensor(uint8)" or len(shape) != 4 or shape[3] != 3:
        raise ModelFileError(f"{path}: its input is {inputs[0].type} {shape}, expected uint8 [B, H, W, 3]")
    fixed = (shape[1], shape[2]) if isinstance(shape[1], int) and isinstance(shape[2], int) else None
    if size_hw is None:
        return fixed
    if fixed is not None and size_hw != fixed:
        raise SpecError(
            f"{path} takes {fixed[0]}x{fixed[1]} only, not {size_hw[0]}x{size_hw[1]}: export it again with --size"
        )
    if any(side <= 0 or side % SIZE_MULTIPLE for side in size_hw) or size_hw[0] * size_hw[1] > MAX_NETWORK_PIXELS:
        raise SpecError(
            f"size_hw must be multiples of {SIZE_MULTIPLE} with at most {MAX_NETWORK_PIXELS} pixels, got {size_hw}"
        )
    return size_hw


def _to_detections(
    spec: ModelSpec,
    score_threshold: float,
    box: Letterbox,
    num_detections: int,
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    landmarks: NDArray[np.float32],
    num_candidates: int,
) -> Detections:
    """Turn one image's rows of the output tensors into faces in pixels of its frame; copies, never views."""
    if num_candidates < 0:
        raise NonFiniteError("the network gave values that are not finite: the weights or the engine are damaged")
    # greedy NMS: what passes a higher threshold is a prefix of what passed the model's own
    count = int(np.count_nonzero(scores[:num_detections] >= score_threshold))
    in_frame = box.to_frame(boxes[:count]), box.to_frame(landmarks[:count])
    if not (np.isfinite(in_frame[0]).all() and np.isfinite(in_frame[1]).all()):
        raise NonFiniteError("the network gave boxes that are not finite: the weights or the engine are damaged")
    limits = spec.decode
    return Detections(
        in_frame[0],
        scores[:count].copy(),
        in_frame[1],
        box.frame_hw,
        truncated=bool(num_candidates > limits.top_k or num_detections >= limits.max_detections),
    )
