"""A heads graph in the precision that was asked for; INT8 is calibrated on images."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from tqdm import tqdm

from export.graph import HEAD_NAMES, showing
from export.options import (
    DEMO,
    MIN_IMAGES,
    MIN_INT8_SHARE,
    CalibrationOptions,
    Int8Recipe,
    check_calibration,
    find_calibration_images,
    load_recipe,
)
from export.quantize import Ranges, Steps, conv_inputs, lint_qdq, mac_shares, to_fp16, to_int8, with_steps
from facespec.cli import counted
from facespec.errors import DataError, ImageError, ModelFileError, OutputError, SpecError
from facespec.files import atomic_path, cache_folder, write_text
from facespec.images import read_image
from facespec.letterbox import Frame, Letterbox
from facespec.samples import sample_crops
from facespec.spec import ModelSpec
from trt_runtime.onnx_model import open_session

UNREADABLE_SHARE = 0.1
"""Share of files that may be damaged; more is a mistake."""


@dataclass(frozen=True)
class Calibration:
    """What was measured on images, given by name, and on how many of them the model finds a face.

    `cached`: nothing was run, the result was found in the user's cache folder. `recipe`: what `with_precision` spared.
    """

    options: CalibrationOptions
    ranges: Ranges
    images: tuple[str, ...]
    skipped: tuple[str, ...]
    with_faces: int
    cached: bool
    recipe: Int8Recipe | None = None


def readable(paths: Iterable[Path], skipped: list[str]) -> Iterator[tuple[str, Frame]]:
    """Yield the names and the frames of images; the names of files that cannot be read are added to `skipped`."""
    for path in paths:
        try:
            yield str(path), read_image(path)
        except ImageError:
            skipped.append(str(path))


def _frames(options: CalibrationOptions, skipped: list[str]) -> Iterator[tuple[str, Frame]]:
    if options.source == DEMO:
        yield from sample_crops(options.images, options.seed)
        return
    paths = find_calibration_images(options, tell=True)
    chosen = random.Random(options.seed).sample(paths, min(options.images, len(paths)))
    yield from readable(sorted(chosen), skipped)


def letterboxed(
    frames: Iterable[tuple[str, Frame]], size_hw: tuple[int, int], spec: ModelSpec
) -> tuple[list[str], list[Frame]]:
    """Return the names and the letterboxed pixels of frames, as a detector would feed them."""
    names, pixels = [], []
    for name, frame in frames:
        names.append(name)
        pixels.append(Letterbox.fit((frame.shape[0], frame.shape[1]), size_hw).apply(frame, spec.preprocess.mean_bgr))
    return names, pixels


def load_inputs(
    options: CalibrationOptions, size_hw: tuple[int, int], spec: ModelSpec
) -> tuple[list[str], list[Frame], list[str]]:
    """Return the names and the letterboxed pixels of the images, as a detector would feed them, and what was skipped.

    Raises:
        DataError: Too few images, too many that cannot be read, or all of them alike.
    """
    skipped: list[str] = []
    names, pixels = letterboxed(_frames(options, skipped), size_hw, spec)
    total = len(names) + len(skipped)
    if len(skipped) > UNREADABLE_SHARE * total:
        raise DataError(f"--calib {options.source}: {len(skipped)} of {total} images cannot be read, as {skipped[0]}")
    if len(names) < MIN_IMAGES:
        raise DataError(f"--calib {options.source}: {len(names)} images are too few, give at least {MIN_IMAGES}")
    if len({hashlib.sha256(image.tobytes()).digest() for image in pixels}) < MIN_IMAGES:
        raise DataError(f"--calib {options.source}: the images are copies of fewer than {MIN_IMAGES}")
    return names, pixels, skipped


def calibrate(
    heads_graph: onnx.ModelProto,
    options: CalibrationOptions,
    size_hw: tuple[int, int],
    spec: ModelSpec,
    progress: bool = False,
) -> Calibration:
    """Run a float32 heads graph on images and return how large its numbers get.

    The images are letterboxed to `size_hw`. The result is kept in the user's cache folder under a hash of the graph and
    the pixels.

    Raises:
        DataError: The images are no calibration set.
    """
    names, pixels, skipped = load_inputs(options, size_hw, spec)
    digest = hashlib.sha256(heads_graph.SerializeToString())
    for image in pixels:
        digest.update(image.tobytes())
    place = cache_folder() / "calibration" / f"{digest.hexdigest()}.npz"
    wanted = conv_inputs(heads_graph)
    known = _cached(place, wanted)
    ranges, with_faces = known or _measure(heads_graph, wanted, pixels, spec, progress)
    if not with_faces:
        raise DataError(
            f"--calib {options.source}: the model finds no face on any of the {len(names)} images: give images like "
            "those to come"
        )
    if known is None:  # what is kept saves time, no more
        with suppress(OutputError), atomic_path(place) as temporary, open(temporary, "wb") as file:
            np.savez(file, *(ranges[name] for name in wanted), np.array([with_faces], np.float32))
    return Calibration(options, ranges, tuple(names), tuple(skipped), with_faces, known is not None)


def _cached(place: Path, wanted: Sequence[str]) -> tuple[Ranges, int] | None:
    try:
        with np.load(place, allow_pickle=False) as file:
            arrays = [np.asarray(file[f"arr_{index}"], np.float32) for index in range(len(wanted) + 1)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):  # damaged
        return None
    if not all(values.ndim == 1 and np.isfinite(values).all() for values in arrays) or arrays[-1].shape != (1,):
        return None
    return dict(zip(wanted, arrays, strict=False)), int(arrays[-1][0])


def _measure(
    heads_graph: onnx.ModelProto, wanted: list[str], pixels: list[Frame], spec: ModelSpec, progress: bool
) -> tuple[Ranges, int]:
    """Return the ranges of the tensors wanted, and on how many images a prior looks more like a face than not."""
    session = open_session(showing(heads_graph, wanted), "the graph with its probes", why="calibration")
    ranges: Ranges = {}
    with_faces = 0
    for image in tqdm(pixels, desc="calibrating", unit="image", disable=not progress):
        found = session.run([*wanted, *HEAD_NAMES], {"images": image[None]})
        heads = [level[0, : 2 * spec.anchors.per_cell] for level in found[len(wanted) :]]
        with_faces += any(bool((level[1::2] > level[::2]).any()) for level in heads)
        for name, values in zip(wanted, found, strict=False):
            largest = np.abs(values).max(axis=(0, 2, 3))
            if not np.isfinite(largest).all():
                raise DataError("the network gives numbers that are not finite on a calibration image")
            ranges[name] = np.maximum(ranges[name], largest) if name in ranges else largest
    return ranges, with_faces


def chosen_recipe(calibration: CalibrationOptions, names: Sequence[str]) -> Int8Recipe:
    """Return the recipe of `--int8-recipe`, or the default one, for a network whose convolutions have these names.

    Raises:
        SpecError: It cannot be read, or names a convolution that is not there.
    """
    if not calibration.recipe:
        return Int8Recipe()
    recipe = load_recipe(calibration.recipe)
    lost = [part for part in recipe.float_layers if not any(part in name for name in names)]
    if lost:
        raise SpecError(f"{calibration.recipe}: no convolution of this network is named like {lost[0]!r}")
    return recipe


def with_precision(
    heads_graph: onnx.ModelProto,
    precision: str,
    calibration: CalibrationOptions | None,
    size_hw: tuple[int, int],
    spec: ModelSpec,
    progress: bool = False,
    *,
    learned: Steps | None = None,
    float_first: bool = False,
) -> tuple[onnx.ModelProto, Calibration | None]:
    """Return a float32 heads graph in a precision, and what INT8 was calibrated on, at `size_hw`.

    What INT8 leaves in float computes in float16, with `float_first` the first convolution, too. Weights that have
    `learned` their steps of int8 are not calibrated.

    Raises:
        SpecError: INT8 without calibration images, no such precision, or a recipe that cannot be read.
        DataError: The images are no calibration set.
        ModelFileError: A weight does not fit, or the precision asked for is not what the graph would compute in.
    """
    check_calibration(precision, calibration, learned is not None)
    used, graph = None, heads_graph
    names = [node.name for node in heads_graph.graph.node if node.op_type == "Conv"]
    if precision == "fp16":
        graph = to_fp16(heads_graph)
    elif calibration is not None:
        recipe = chosen_recipe(calibration, names)
        if float_first:
            recipe = dataclasses.replace(recipe, float_layers=(*recipe.float_layers, names[0]))
        used = dataclasses.replace(calibrate(heads_graph, calibration, size_hw, spec, progress), recipe=recipe)
        graph = to_fp16(to_int8(heads_graph, used.ranges, recipe))
    elif learned is not None and precision == "int8":
        kept = {name: step for name, step in learned.items() if not (float_first and name == names[0])}
        graph = to_fp16(with_steps(heads_graph, kept))
    if problems := lint_qdq(graph):
        raise ModelFileError(problems[0])
    shares = mac_shares(graph, size_hw)
    if shares.get(precision, 0) < (MIN_INT8_SHARE if precision == "int8" else 1):
        raise ModelFileError(f"{precision} was asked for, the convolutions would compute in {shares}")
    return graph, used


def report_calibration(used: Calibration, path: Path) -> None:
    """Say what was calibrated on, and write the names of the images, one a line."""
    skipped = f", {len(used.skipped)} could not be read" if used.skipped else ""
    cached = " (as before, from the cache)" if used.cached else ""
    print(f"calibrated on {counted(len(used.images), 'image')}{skipped}{cached}; their names are in {path}")
    if used.options.source == DEMO:
        print("note: crops of a few photographs are a last resort: calibrate on images like those to come")
    elif used.with_faces < len(used.images) / 4:
        print(f"note: the model finds faces on {used.with_faces} of them only: calibrate on images like those to come")
    write_text(path, "\n".join(used.images) + "\n")
