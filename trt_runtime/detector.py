"""Detectors: uint8 BGR frames in, `Detections` out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from facespec.cli import require
from facespec.detections import Detections, to_detections
from facespec.errors import FrameError, ModelFileError, SpecError
from facespec.letterbox import Frame, Letterbox, check_frame
from facespec.spec import CHECKPOINT_SUFFIXES, MAX_NETWORK_PIXELS, SPEC_KEY, ModelSpec, check_size
from plugins import PLUGIN
from plugins.host import decode_nms, library
from trt_runtime.onnx_file import read_onnx
from trt_runtime.plugin_form import cut_plugin
from trt_runtime.timing import StageTimer


class OrtRetinaFace:
    """An exported ONNX detector on the CPU, through ONNX Runtime.

    Of a plugin form, which TensorRT builds, the network runs in ONNX Runtime and the plugin on the host
    (`plugins.host`). One object may be used by several threads.

    Args:
        path: File written by `python -m export.to_onnx`, or a plugin form written by `python -m export.to_trt`.
        score_threshold: Lowest score reported: 0.5 unless given, not below the floor the model was exported with.
        size_hw: Height and width frames are letterboxed to, for models of dynamic size; None runs each frame at its
            own size, padded to multiples of 32.
        threads: Threads a call may use; None leaves it to ONNX Runtime, which takes every core.

    Attributes:
        spec: The `ModelSpec` of the model.
        size_hw: Network size, or None if every frame is run at its own.
        files: The files of the model.

    Raises:
        ModelFileError: Missing, damaged, unsafe, or not a detector of this toolkit.
        SpecError: `score_threshold` or `size_hw` does not fit the model.
        MissingPackageError: onnxruntime is not installed.
        BuildError: The host kernels of a plugin form must be compiled, and there is no C++ compiler.
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
        try:
            self.spec = ModelSpec.from_json(header.metadata[SPEC_KEY])
        except SpecError as error:
            raise ModelFileError(f"{path}: {error}") from None
        self._score_threshold = self.spec.decode.run_threshold(score_threshold)
        self._outputs = self.spec.decode.outputs
        self.files = [Path(path), *(Path(path).resolve().parent / name for name in header.external_files)]
        # a model whose weights lie beside it is opened by the path that was checked, links resolved
        model = str(Path(path).resolve()) if header.external_files else content
        self._heads: list[str] = []
        if PLUGIN.domain in header.domains:
            if header.external_files:
                raise ModelFileError(f"{path}: a plugin form with weights in other files cannot be run on the CPU")
            try:
                model, self._heads = cut_plugin(content, self.spec)
            except ModelFileError as error:
                raise ModelFileError(f"{path}: {error}") from None
            library()  # compiled now, if need be, and not with the first frame
        self._session = _open_session(model, path, threads)
        self.size_hw = _network_size(_check_contract(self._session, path, self.spec, self._heads), size_hw, path)

    @property
    def score_threshold(self) -> float:
        """Lowest score reported; may be set, but not below the floor the model was exported with."""
        return self._score_threshold

    @score_threshold.setter
    def score_threshold(self, value: float) -> None:
        self._score_threshold = self.spec.decode.run_threshold(value)

    def detect(self, frame: Frame, timer: StageTimer | None = None) -> Detections:
        """Return the faces of one frame, in its own pixels.

        Args:
            frame: uint8 (H, W, 3) BGR.
            timer: Adds up the time of each stage.

        Raises:
            FrameError: Not such a frame, or too large.
            NonFiniteError: The network gave NaN or infinity.
            ModelFileError: ONNX Runtime failed, for want of memory or because the model is at odds with itself.
        """
        return self.detect_batch([frame], timer)[0]

    def detect_batch(self, frames: Iterable[Frame], timer: StageTimer | None = None) -> list[Detections]:
        """Return the faces of several frames, which may differ in size, in their order; see `detect`."""
        if isinstance(frames, np.ndarray) and frames.ndim < 4:
            raise FrameError("detect_batch takes a list of frames; one frame goes to detect")
        frames = list(frames)
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
        box = Letterbox.place(frame_hw, self.size_hw)
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
            try:
                outputs = self._session.run(self._heads or list(self._outputs), {"images": batch})
            except Exception as error:
                raise ModelFileError(f"ONNX Runtime failed on a batch of {batch.shape}: {_reason(error)}") from None
        if self._heads:
            with stage("decode+NMS"):
                try:
                    outputs = list(decode_nms(outputs, boxes[0].size_hw, self.spec).values())
                except ValueError as error:
                    raise ModelFileError(f"the plugin form is at odds with its spec: {error}") from None
        with stage("results"):
            shapes = [(len(batch), *shape) for _, shape in self._outputs.values()]
            counts = outputs[0]
            if [output.shape for output in outputs] != shapes or not (
                (counts >= 0) & (counts <= self.spec.decode.max_detections)
            ).all():
                raise ModelFileError("the model's outputs are not what it announces: export it again")
            return [
                to_detections(box, self.spec.decode, self.score_threshold, *values)
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
    if suffix in CHECKPOINT_SUFFIXES:
        raise ModelFileError(f"{path}: a checkpoint; export it first: python -m export.to_onnx --weights {path}")
    if suffix == ".engine":
        raise ModelFileError(
            f"{path}: this version builds TensorRT engines and does not run them yet: use the ONNX file"
        )
    if suffix != ".onnx":
        raise ModelFileError(f"{path}: expected a .onnx file written by python -m export.to_onnx")
    return OrtRetinaFace(path, **options)


def _open_session(model: str | bytes, path: str | Path, threads: int | None) -> Any:
    ort = require("onnxruntime", "cpu", "OrtRetinaFace")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors come as exceptions
    if threads is not None:
        if not isinstance(threads, int) or not 1 <= threads <= 256:
            raise SpecError(f"threads must be a number from 1 to 256, got {threads!r}")
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # ONNX Runtime has a class for every kind of failure
        raise ModelFileError(f"{path}: ONNX Runtime cannot load it ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check_contract(session: Any, path: str | Path, spec: ModelSpec, heads: list[str]) -> tuple[int, int] | None:
    """Return the fixed network size of a graph, or None if it is dynamic.

    Args:
        session: What runs it.
        path: For messages.
        spec: Its own.
        heads: Outputs of a graph that was cut before the plugin; their shapes are checked at every run.

    Raises:
        ModelFileError: Its inputs or outputs are not those of a detector.
    """
    found = {item.name: (item.type, item.shape) for item in (*session.get_inputs(), *session.get_outputs())}
    kinds = {"int32": "tensor(int32)", "float32": "tensor(float)"}
    expected = {name: (kinds[kind], list(shape)) for name, (kind, shape) in spec.decode.outputs.items()}
    images = found.pop("images", ("", []))
    size = images[1][1:3]
    fixed = (size[0], size[1]) if all(isinstance(side, int) for side in size) and len(size) == 2 else None
    if heads:
        found = {name: value for name, value in found.items() if name not in heads}
        expected = {}
    if (
        images[0] != "tensor(uint8)"
        or images[1][3:] != [3]
        or any(shape and isinstance(shape[0], int) for _, shape in (images, *found.values()))
        or {name: (kind, shape[1:]) for name, (kind, shape) in found.items()} != expected
    ):
        raise ModelFileError(f"{path}: inputs or outputs are not those of a detector: export it again")
    if fixed is not None:
        check_size(fixed)
    return fixed


def _network_size(
    fixed: tuple[int, int] | None, size_hw: tuple[int, int] | None, path: str | Path
) -> tuple[int, int] | None:
    """Return the size frames are letterboxed to."""
    if size_hw is None:
        return fixed
    if fixed is not None and size_hw != fixed:
        raise SpecError(
            f"{path} takes {fixed[0]}x{fixed[1]} only, not {size_hw[0]}x{size_hw[1]}: export it again with --size"
        )
    check_size(size_hw)
    return size_hw
