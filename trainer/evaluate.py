"""Average precision of a detector on labelled images: WIDER FACE's, also of predictions on disk, or COCO's.

python -m trainer.evaluate --weights run/best.pth --data my_faces/val.json
python -m trainer.evaluate --predictions widerface_txt --ground-truth widerface/gt
python -m trainer.evaluate --weights mobilenet0.25 --data widerface --json ap.json --plot ap.png
python -m trainer.evaluate --weights mobilenet0.25 --data widerface --size 320,640,960
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from facespec.cli import (
    ArgumentParser,
    argument,
    counted,
    json_output,
    make_callable,
    quiet_libraries,
    require,
    run,
    text_table,
)
from facespec.detections import Detections, Detector
from facespec.errors import DataError, NoLabelsError, SpecError
from facespec.figures import PLOT_SUFFIXES, check_plot, figure_file
from facespec.files import check_outputs, widerface_root, write_text
from facespec.images import read_image
from facespec.kinds import model_kind
from facespec.spec import parse_size
from trainer.average_precision import (
    LEVELS,
    Array,
    Curve,
    ImageKey,
    ImageTruth,
    average_precision,
    load_ground_truth,
    present_images,
)

PROTOCOLS = ("original", "letterbox", "tile")
LETTERBOX_HW = (640, 640)
_COCO_ROWS = (("0.5", "ap50"), ("0.5:0.95", "ap50_95"))


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate.

    Attributes:
        ground_truth: Folder of the four .mat files.
        predictions: Folder of event/name.txt files, or None to run `detector`.
        detector: Checkpoint, name of published weights, or exported model.
        data: WIDER FACE folder: val/images and gt. A label file, or a folder with one, is measured as COCO does.
        images: Folder of the images of a label file; see `trainer.data.open_dataset`.
        category: Of the faces in a COCO file.
        protocol: "original" runs images at their own size, "letterbox" at `size_hw`, "tile" in tiles of `size_hw`, too.
        size_hw: Network size of the other protocols; None takes the model's own, or 640x640.
        more_sizes: Others to evaluate at after it.
        backend: What runs an exported model.
        subset: Score only the images that have predictions, instead of refusing.
        save_predictions: Folder to write event/name.txt files to.
        json: File that the command writes the result to; `evaluate` checks that it can be written.
        plot: Image of the precision-recall curves.
    """

    ground_truth: Path
    predictions: Path | None = None
    detector: str | None = None
    data: Path | None = None
    images: Path | None = None
    category: str | None = None
    protocol: str = "original"
    size_hw: tuple[int, int] | None = None
    more_sizes: tuple[tuple[int, int], ...] = ()
    backend: str = "auto"
    subset: bool = False
    save_predictions: Path | None = None
    json: Path | None = None
    plot: Path | None = None


@dataclass
class Predictions:
    """Detections by image, (n, 5) float64 x, y, width, height, score, and what was noticed while collecting them."""

    by_image: dict[ImageKey, Array] = field(default_factory=dict)
    missing: int = 0
    unknown: int = 0
    unsorted: int = 0
    truncated: int = 0


def read_predictions(folder: Path, truth: dict[ImageKey, ImageTruth], subset: bool = False) -> Predictions:
    """Read the usual text files: event/name.txt with the image's name, the number of boxes, and `x y w h score` lines.

    Images of `truth` without a file are left out if `subset` says so.

    Raises:
        DataError: A file is missing, malformed, or holds values that are not finite or boxes of negative size.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of predictions")
    found = Predictions()
    files = {(path.parent.name, path.stem): path for path in folder.glob("*/*.txt")}
    if not files:
        raise DataError(f"{folder}: no predictions in it, expected files named event/image.txt")
    missing = [key for key in truth if key not in files]
    if len(missing) == len(truth):
        raise DataError(f"{folder}: none of its {len(files)} files belongs to an image of the ground truth")
    if missing and not subset:
        raise DataError(
            f"{folder}: {len(missing)} of {len(truth)} images have no prediction file, for instance "
            f"{'/'.join(missing[0])}.txt; --subset scores the others alone"
        )
    found.missing, found.unknown = len(missing), len(files.keys() - truth.keys())
    for key, path in files.items():
        if key in truth:
            rows = _read_rows(path)
            found.unsorted += bool((np.diff(rows[:, 4]) > 0).any())
            found.by_image[key] = rows
    return found


def _read_rows(path: Path) -> Array:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if len(lines) < 2 or not lines[1].strip().isdecimal():
        raise DataError(f"{path}: line 2 should hold the number of boxes")
    body: list[str] = []
    boxes: list[tuple[float, ...]] = []
    for number, line in enumerate(lines[2:], start=3):
        if not line.strip():
            continue
        try:
            x, y, width, height, score = map(float, line.split())
        except ValueError:
            raise DataError(f"{path}:{number}: expected 'x y w h score', found {line.strip()[:60]!r}") from None
        body.append(line)
        boxes.append((x, y, width, height, score))
    count, rows = int(lines[1]), np.array(boxes, np.float64).reshape(-1, 5)
    if count != len(rows):
        raise DataError(f"{path}: line 2 announces {count} boxes, the file holds {len(rows)}")
    for bad, problem in (
        (~np.isfinite(rows).all(axis=1), "a value that is not finite"),
        ((rows[:, 2:4] < 0).any(axis=1), "a negative size"),
    ):
        if bad.any():
            row = int(bad.argmax())
            raise DataError(f"{path}: box {row + 1} has {problem}: {body[row].strip()}")
    return rows


def predict(
    detector: Detector, images: Path, truth: dict[ImageKey, ImageTruth], progress: bool = True
) -> tuple[Predictions, dict[ImageKey, ImageTruth]]:
    """Run a detector over the images that exist, and return its predictions and their ground truth.

    It must report down to a score low enough for the curve: 0.02 is customary. Images of `truth` that are not in the
    folder of event folders of .jpg files are left out and counted.

    Raises:
        DataError: None of the images is there.
    """
    present = present_images(images, truth)
    found = Predictions(missing=len(truth) - len(present))
    for key, path in tqdm(present.items(), unit="image", disable=None if progress else True):
        with quiet_libraries():
            frame = read_image(path)
        faces = detector.detect(frame)
        found.truncated += faces.truncated
        found.by_image[key] = to_rows(faces)
    return found, {key: truth[key] for key in present}


def to_rows(faces: Detections) -> Array:
    """(n, 5) x, y, width, height, score; corners are cut to whole pixels, as the usual text files hold them."""
    corners = np.trunc(faces.boxes.astype(np.float64))
    return np.column_stack([corners[:, :2], corners[:, 2:] - corners[:, :2], faces.scores])


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """Write event/name.txt files that `read_predictions` and the usual tools read."""
    for (event, name), rows in predictions.by_image.items():
        body = "".join(f"{x:.0f} {y:.0f} {w:.0f} {h:.0f} {score:.9g}\n" for x, y, w, h, score in rows.tolist())
        write_text(folder / event / f"{name}.txt", f"{name}\n{len(rows)}\n{body}")


def open_detector(
    name: str, protocol: str, size_hw: tuple[int, int] | None, backend: str = "auto"
) -> tuple[Detector, tuple[int, int] | None]:
    """Return a detector that reports down to the model's own floor, and its network size; see `EvaluateOptions`.

    Raises:
        DataError: A model of fixed size, and the original protocol.
    """
    if model_kind(name) in ("engine", "onnx"):
        # the one thing that the training side asks the runtime for: what is deployed is what must be measured
        from trt_runtime.load import load_detector

        deployed = load_detector(name, size_hw=size_hw, backend=backend)
        if protocol != "original" and deployed.size_hw is None:
            deployed.close()
            deployed = load_detector(name, size_hw=LETTERBOX_HW, backend=backend)
        deployed.score_threshold = deployed.spec.decode.score_threshold
        deployed.tile = protocol == "tile"
        if protocol == "original" and isinstance(deployed.size_hw, tuple):
            deployed.close()
            raise DataError(
                f"{name} takes {deployed.size_hw[0]}x{deployed.size_hw[1]} only: evaluate it with "
                "--protocol letterbox, or export it with --size dynamic"
            )
        return deployed, deployed.size_hw if isinstance(deployed.size_hw, tuple) else None
    if protocol == "tile":
        raise DataError(f"--protocol tile is for exported models, {name} is none")
    if backend != "auto":
        raise DataError(f"--backend is for exported models, {name} is none")
    require("torch", "train", "evaluating a checkpoint")
    from trainer.checkpoint import load_model
    from trainer.model import TorchRetinaFace

    model = load_model(name)
    size_hw = (size_hw or LETTERBOX_HW) if protocol == "letterbox" else None
    return TorchRetinaFace(model, score_threshold=model.spec.decode.score_threshold, size_hw=size_hw), size_hw


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Return {"easy", "medium", "hard"} in percent, counts, and what was noticed; write predictions and plot.

    Of other labelled images than WIDER FACE's it is {"ap50", "ap50_95"}: see `trainer.coco_ap`.

    With `more_sizes` it is {"sizes": one such result for each}.

    The result also holds date, command, machine and versions. `benchmarks.gather` makes result files of such.

    Raises:
        RetinaFaceError: Predictions, ground truth, images or the detector are not usable.
    """
    if options.more_sizes:
        if options.plot or options.save_predictions:
            raise DataError("--plot and --save-predictions take one --size: leave the others out")
        sizes = options.size_hw, *options.more_sizes
        return {"sizes": [evaluate(dataclasses.replace(options, size_hw=size, more_sizes=())) for size in sizes]}
    check_plot(options.plot, "evaluate")
    saved = options.save_predictions and options.save_predictions / "event" / "image.txt"
    outputs = [("--json", options.json), ("--plot", options.plot), ("--save-predictions", saved)]
    read = [options.ground_truth / f"wider_{name}_val.mat" for name in ("face", *LEVELS)]
    read += [Path(options.detector)] if options.detector else list((options.predictions or Path()).glob("*/*.txt"))
    check_outputs(outputs, read)
    if _has_own_labels(options):
        return _evaluate_labelled(options)
    truth = load_ground_truth(options.ground_truth)
    start = time.perf_counter()
    size_hw = None
    if options.predictions:
        predictions = read_predictions(options.predictions, truth, options.subset)
        truth = {key: value for key, value in truth.items() if key in predictions.by_image}
    else:
        if options.detector is None or options.data is None:
            raise DataError("nothing to evaluate: give predictions, or a detector and a WIDER FACE folder")
        detector, size_hw = open_detector(options.detector, options.protocol, options.size_hw, options.backend)
        try:
            predictions, truth = predict(detector, options.data / "val" / "images", truth)
        finally:
            getattr(detector, "close", lambda: None)()  # PyTorch's has nothing to close
    collected = time.perf_counter()
    if options.save_predictions:
        write_predictions(options.save_predictions, predictions)
    scoring = time.perf_counter()
    curves = average_precision(predictions.by_image, truth)
    result: dict[str, Any] = {
        **{level: None if math.isnan(curves[level].ap) else 100 * curves[level].ap for level in LEVELS},
        "images": len(truth),
        "images_missing": predictions.missing,
        "faces": {level: curves[level].faces for level in LEVELS},
        "predictions": sum(len(rows) for rows in predictions.by_image.values()),
        "files_without_image": predictions.unknown,
        "files_unsorted": predictions.unsorted,
        "images_truncated": predictions.truncated,
        "seconds_collecting": round(collected - start, 3),
        "seconds_scoring": round(time.perf_counter() - scoring, 3),
    }
    return _finish(result, curves, options, size_hw, "WIDER FACE")


def _finish(
    result: dict[str, Any], curves: dict[str, Curve], options: EvaluateOptions, size_hw: Any, data: str
) -> dict[str, Any]:
    """Return a result with where it is from, and draw its curves if asked to."""
    if options.detector:
        result |= {"detector": options.detector, "protocol": options.protocol, "size_hw": size_hw and list(size_hw)}
    from trt_runtime.measure import environment

    result |= environment("numpy", "scipy", "opencv-python", "torch", "onnxruntime", "openvino", "pycocotools")
    if options.plot:
        _plot(curves, options.plot, data)
    return result


def _has_own_labels(options: EvaluateOptions) -> bool:
    """Whether the data are labelled images that are not in the form of WIDER FACE's evaluation."""
    data = options.data
    if options.detector is None or data is None or not data.exists():
        return False
    return data.is_file() or (options.ground_truth == data / "gt" and not options.ground_truth.exists())


def _evaluate_labelled(options: EvaluateOptions) -> dict[str, Any]:
    """Return the average precision on labelled images, as COCO measures it."""
    from trainer.coco_ap import Truth, coco_average_precision
    from trainer.data import open_dataset

    if options.save_predictions:
        raise DataError("--save-predictions writes the files of WIDER FACE's evaluation: --data is not its folder")
    try:
        dataset = open_dataset(str(options.data), "val", images=options.images, category=options.category)
    except NoLabelsError as error:
        raise DataError(
            f"{error}. Without labels there is no average precision; how far two models agree is what "
            f"export.verify tells: --reference A --candidate B --data {options.data}"
        ) from None
    start = time.perf_counter()
    detector, size_hw = open_detector(str(options.detector), options.protocol, options.size_hw, options.backend)
    try:
        found = []
        for sample in tqdm(dataset.samples, unit="image", disable=None):
            with quiet_libraries():
                frame, _ = sample.load()
            found.append(detector.detect(frame))
    finally:
        getattr(detector, "close", lambda: None)()
    collected = time.perf_counter()
    truth = [Truth.of(sample) for sample in dataset.samples]
    curves = coco_average_precision(found, truth)
    result: dict[str, Any] = {
        **{level: None if math.isnan(curve.ap) else 100 * curve.ap for level, curve in curves.items()},
        "data": dataset.name,
        "images": len(dataset),
        "faces": sum(len(one.boxes) for one in truth),
        "faces_ignored": sum(len(one.ignored) for one in truth),
        "label_problems": len(dataset.report.problems),
        "notes": dataset.report.notes,
        "predictions": sum(map(len, found)),
        "images_truncated": sum(faces.truncated for faces in found),
        "seconds_collecting": round(collected - start, 3),
        "seconds_scoring": round(time.perf_counter() - collected, 3),
    }
    return _finish(result, curves, options, size_hw, dataset.name)


def _plot(curves: dict[str, Curve], path: Path, data: str) -> None:
    with figure_file(path, "evaluate", (6, 5)) as figure:
        axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        axes.set_title(f"{data}, precision against recall")
        for (level, curve), colour in zip(curves.items(), ("#2a9d4b", "#e09f1f", "#c8373a"), strict=False):
            axes.plot(curve.recall, curve.precision, color=colour, label=f"{level}: AP {100 * curve.ap:.2f} %")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")


def parse_arguments(argv: Sequence[str] | None) -> EvaluateOptions:
    """Return the options of a command line."""
    parser = ArgumentParser(
        prog="python -m trainer.evaluate",
        description="Average precision of a detector, or of prediction files: WIDER FACE's easy, medium and hard, or, "
        "on other labelled images, COCO's at IoU 0.5 and 0.5:0.95.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--predictions", type=Path, help="folder of event/name.txt files")
    source.add_argument("--weights", dest="detector", metavar="FILE", help="checkpoint, or name of published weights")
    source.add_argument("--model", dest="detector", metavar="FILE", help="exported model: .onnx, .engine")
    parser.add_argument("--ground-truth", type=Path, help="folder of the wider_*_val.mat files (default: DATA/gt)")
    data = "WIDER FACE folder, COCO file, or label file (default: $WIDERFACE_ROOT, or data/widerface)"
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--images", type=Path, metavar="DIR", help="images of a label file (default: beside it)")
    category = "of the faces in a COCO file (default: face, or the only one)"
    parser.add_argument("--category", metavar="NAME", help=category)
    protocol = "images at their own size, letterboxed to --size, or in tiles of --size besides"
    default = " (default: original, or letterbox with --size)"
    parser.add_argument("--protocol", choices=PROTOCOLS, help=protocol + default)
    size = "HEIGHTxWIDTH of letterbox and tile, or several with commas between them (default: the model's, or 640x640)"
    parser.add_argument("--size", metavar="SIZE[,SIZE]", type=argument(_parse_sizes), help=size)
    backend = "what runs an exported model: auto, onnxruntime, openvino or tensorrt"
    parser.add_argument("--backend", default="auto", metavar="NAME", help=backend)
    parser.add_argument("--subset", action="store_true", help="score only the images that have a prediction file")
    parser.add_argument("--save-predictions", type=Path, metavar="DIR", help="write event/name.txt files")
    parser.add_json()
    plot = f"draw the precision-recall curves ({', '.join(PLOT_SUFFIXES)})"
    parser.add_argument("--plot", type=Path, metavar="FILE", help=plot)
    args = parser.parse_args(argv)
    args.data = args.data or widerface_root()
    args.ground_truth = args.ground_truth or args.data / "gt"
    sizes = args.size or ()
    del args.size
    if args.predictions and (args.save_predictions or sizes or args.protocol not in (None, PROTOCOLS[0])):
        parser.error("--save-predictions, --protocol and --size go with --weights and --model")
    if sizes and args.protocol == "original":
        parser.error("--size goes with --protocol letterbox and tile")
    args.protocol = args.protocol or PROTOCOLS[bool(sizes)]
    return EvaluateOptions(**vars(args), size_hw=sizes[0] if sizes else None, more_sizes=sizes[1:])


def _parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = tuple(parse_size(part) for part in text.split(","))
    if len(set(sizes)) < len(sizes):
        raise SpecError(f"size {text!r} names one twice")
    return sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(argv)
    with json_output(options.json) as write:
        result = evaluate(options)
        _print(result)
        write(json.dumps(result, indent=2))
        for path in filter(None, (options.plot, options.save_predictions)):
            print(f"wrote {path}")
    return 0


def _print(result: dict[str, Any]) -> None:
    if "sizes" in result:
        for part in result["sizes"]:
            print("{}x{}".format(*part["size_hw"]))
            _print(part)
        return
    if "ap50" in result:
        rows = [[name, "none" if result[key] is None else f"{result[key]:.2f}"] for name, key in _COCO_ROWS]
        print(text_table(["IoU", "AP %"], rows))
        print(", ".join(counted(result[f"{noun}s"], noun) for noun in ("image", "face", "prediction")), end="")
        for key, text in (
            ("faces_ignored", "crowds and invalid faces, which do not count"),
            ("label_problems", "problems of labels; trainer.fit --check-data names them"),
            ("images_truncated", "images had more faces than the model's limits"),
        ):
            print(f"; {result[key]} {text}" if result[key] else "", end="")
        print("".join(f"\nnote: {note}" for note in result["notes"]))
        return
    figures = {level: "none" if result[level] is None else f"{result[level]:.2f}" for level in LEVELS}
    print(text_table(["", "AP %", "faces"], [[level, figures[level], str(result["faces"][level])] for level in LEVELS]))
    print(", ".join(counted(result[f"{noun}s"], noun) for noun in ("image", "prediction")), end="")
    for key, text in (
        ("images_missing", "images left out"),
        ("files_without_image", "prediction files without an image in the ground truth, left out"),
        ("files_unsorted", "files were not sorted by score and have been sorted"),
        ("images_truncated", "images had more faces than the model's limits"),
    ):
        if result[key]:
            print(f"; {result[key]} {text}", end="")
    print()


make_callable(__name__, evaluate)

if __name__ == "__main__":
    sys.exit(run(main))
