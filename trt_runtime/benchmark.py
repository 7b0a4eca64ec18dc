"""How fast a detector is: latency by stage, and frames a second.

python -m trt_runtime.benchmark --model retinaface.onnx --batch 1,4 --plot latency.png
python -m trt_runtime.benchmark --compare fp32.onnx int8.onnx
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from facespec.cli import ArgumentParser, argument, json_output, quiet_libraries, run
from facespec.errors import DataError, SpecError
from facespec.figures import PLOT_SUFFIXES, check_plot
from facespec.files import check_outputs
from facespec.images import find_images
from facespec.letterbox import Frame, Letterbox
from facespec.opencv import cv2
from facespec.samples import sample_frames, spread_frames, tiled
from facespec.spec import NetworkSize, parse_network_size
from trt_runtime.benchmark_report import Measurement, Setting, heading, plot, setting_table, summary_table
from trt_runtime.cpu import PRECISIONS
from trt_runtime.detector import RetinaFaceDetector
from trt_runtime.load import BACKENDS, load_detector
from trt_runtime.measure import PAUSE_S, StageTimer, environment, load_average, speed_ratio, take_turns
from trt_runtime.trt import TRTRetinaFace

MAX_FRAMES = 32
"""Images of a folder that are used, spread over it."""

CPU_BACKENDS = ("onnxruntime", "openvino")
"""They take any batch, and choose themselves how many frames they compute at once."""

FRAME_HW = (720, 1280)
GRIDS = ((1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4))
"""Rows and columns of the photographs in each frame that is made of them."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure, as the command's options say.

    Several models, and several backends, are compared call by call. A size of None is the model's own, or each frame's
    where it takes any; `frames` None makes frames.
    """

    models: tuple[Path, ...]
    backends: tuple[str, ...] = ("auto",)
    batches: tuple[int, ...] = (1,)
    sizes: tuple[NetworkSize, ...] = (None,)
    frames: Path | None = None
    repeats: int = 200
    warm_up: int = 20
    threads: int | None = None
    streams: int = 1
    depth: int | None = None
    device: int | str = "auto"
    precision: str = "fp32"
    on_device: bool = False
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        limits = {"--repeats": (self.repeats, 1, 1_000_000), "--warm-up": (self.warm_up, 0, 1_000_000)}
        limits.update({f"--batch {batch}": (batch, 1, 1024) for batch in self.batches})
        limits["--streams"] = (self.streams, 1, 64)
        if self.depth is not None:
            limits["--depth"] = (self.depth, 1, 64)
        for option, (value, least, most) in limits.items():
            if not least <= value <= most:
                raise SpecError(f"{option}: expected a number from {least} to {most}, got {value}")
        for option, values in (("--batch", self.batches), ("--size", self.sizes), ("--backend", self.backends)):
            if len(set(values)) < len(values) or not values:
                raise SpecError(f"{option}: expected one value or several different ones, separated by commas")
        check_plot(self.plot, "bench")

    @property
    def stream_depth(self) -> int:
        """Calls that are handed over at once to measure throughput."""
        return self.depth or max(self.streams, 2)


@dataclass(frozen=True)
class Frames:
    """What the detectors are run on: uint8 (H, W, 3) BGR each, numpy arrays or on a device."""

    images: list[Any]
    what: str  # where they come from, in words

    def of(self, detector: RetinaFaceDetector, on_device: bool) -> Frames:
        """Return them where a detector is to find them."""
        if on_device and isinstance(detector, TRTRetinaFace):
            return Frames([detector.to_device(image) for image in self.images], self.what)
        return self

    def batches(self, size: int) -> list[list[Any]]:
        """Return as many batches as there are frames, each beginning with another frame."""
        count = len(self.images)
        return [[self.images[(start * size + i) % count] for i in range(size)] for start in range(count)]


def load_frames(folder: Path | None, most: int = MAX_FRAMES) -> Frames:
    """Return the images of a folder, `most` of them; without one, frames made of sample photographs, or of noise.

    Raises:
        DataError: There are no images in it.
        ImageError: One of them cannot be read.
    """
    if folder is not None:
        if not folder.is_dir():
            raise DataError(f"--frames {folder}: expected a folder of images, there is none of this name")
        found = len(find_images(folder))
        images = spread_frames(folder, min(found, most))
        return Frames(images, f"{len(images)} of {found} images in {folder}, each at its own size")
    height, width = FRAME_HW
    photographs = list(sample_frames().values())
    if not photographs:
        random = np.random.default_rng(0)
        coarse = random.integers(0, 256, (8, height // 16, width // 16, 3), np.uint8)
        images = [np.asarray(cv2.resize(image, (width, height)), np.uint8) for image in coarse]
        return Frames(images, f"{len(images)} frames of noise, {width}x{height}: there are no faces in them")
    grids = GRIDS[:most]
    images = [_mosaic(photographs, rows, columns) for rows, columns in grids]
    faces = max(rows * columns for rows, columns in grids)
    return Frames(images, f"{len(images)} frames of {width}x{height}, made of sample photographs: 1 to {faces} faces")


def _mosaic(photographs: Sequence[Frame], rows: int, columns: int) -> Frame:
    cell = FRAME_HW[0] // rows, FRAME_HW[1] // columns
    frame = np.zeros((*FRAME_HW, 3), np.uint8)  # what the cells do not cover stays black
    boxes = [Letterbox.fit((image.shape[0], image.shape[1]), cell).apply(image, (0, 0, 0)) for image in photographs]
    cells = tiled([boxes[index % len(boxes)] for index in range(rows * columns)], columns)
    frame[: len(cells), : cells.shape[1]] = cells
    return frame


def open_detectors(options: BenchmarkOptions, stack: ExitStack) -> list[dict[str, RetinaFaceDetector]]:
    """Return for each size the detectors by name; `stack` closes them.

    Raises:
        RetinaFaceError: A model cannot be opened, or does not take a size or a batch.
    """
    kinds = [(model, backend) for model in options.models for backend in options.backends]
    opened = []
    for size in options.sizes:
        detectors = {}
        for name, (model, backend) in zip(_names(kinds), kinds, strict=True):
            detector = load_detector(
                model,
                size_hw=size,
                threads=options.threads,
                streams=options.streams,
                backend=backend,
                device=options.device,
                precision=options.precision,
            )
            detectors[name] = stack.enter_context(detector)
            most = max(options.batches)
            # an engine would split the batch into several calls, and their time would not be that of a batch
            if detector.backend not in CPU_BACKENDS and most > detector.max_batch:
                raise SpecError(f"--batch {most}: {name} was built for {detector.max_batch} frames at once at most")
            if options.on_device and not isinstance(detector, TRTRetinaFace):
                raise SpecError(f"--on-device: {name} runs on the CPU, where there is no other place for frames")
        opened.append(detectors)
    return opened


def benchmark(
    opened: Sequence[dict[str, RetinaFaceDetector]], frames: Frames, options: BenchmarkOptions
) -> Iterator[Setting]:
    """Yield what was measured at each size and batch.

    Whole calls are timed without a `StageTimer`, so that it does not slow them. As many others, in turns with them,
    are timed by stage. All detectors of a setting take turns. `opened` is what `open_detectors` returned.

    Raises:
        RetinaFaceError: A model does not take a frame, or fails.
    """
    each = options.warm_up + 3 * options.repeats
    calls = sum(map(len, opened)) * len(options.batches) * each
    with tqdm(total=calls, unit="call", leave=False, disable=None) as progress:
        for detectors in opened:
            for batch in options.batches:
                yield _measure(detectors, frames, batch, options, progress.update)


def _names(kinds: Sequence[tuple[Path, str]]) -> list[str]:
    """Return a name for each model and backend, as short as distinct names can be."""
    short = [path.name for path, _ in kinds]
    if len(set(short)) < len({path for path, _ in kinds}):
        short = [str(path) for path, _ in kinds]
    several = len({backend for _, backend in kinds}) > 1
    names = [f"{name} / {backend}" if several else name for name, (_, backend) in zip(short, kinds, strict=True)]
    counts, seen = Counter(names), Counter[str]()
    told = []
    for name in names:
        seen[name] += 1
        told.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return told


def _measure(
    detectors: dict[str, RetinaFaceDetector],
    frames: Frames,
    batch: int,
    options: BenchmarkOptions,
    progress: Callable[[int], object],
) -> Setting:
    count = len(frames.images)
    batches = {name: frames.of(detector, options.on_device).batches(batch) for name, detector in detectors.items()}

    def whole(name: str) -> Callable[[int], object]:
        detector, mine = detectors[name], batches[name]
        if batch == 1:
            return lambda index: detector.detect(mine[index % count][0])
        return lambda index: detector.detect_batch(mine[index % count])

    def staged(name: str, timers: dict[int, StageTimer]) -> Callable[[int], object]:
        def call(index: int) -> None:
            timers[index] = StageTimer(fine=True)
            detectors[name].detect_batch(batches[name][index % count], timers[index])

        return call

    for name in detectors:
        for index in range(options.warm_up):
            whole(name)(index)
            progress(1)
    timers: list[dict[int, StageTimer]] = [{} for _ in detectors]
    pause_s = PAUSE_S if len(detectors) > 1 else 0
    calls_of_all = [*map(whole, detectors), *map(staged, detectors, timers)]
    samples = take_turns(calls_of_all, options.repeats, pause_s, progress)
    totals = samples[: len(detectors)]
    measurements = []
    for (name, detector), total, calls in zip(detectors.items(), totals, timers, strict=True):
        pipelined = _pipelined(detector, batches[name], options.repeats, options.stream_depth)
        progress(options.repeats)
        stages = dict.fromkeys(stage for timer in calls.values() for stage in timer.total_ms)
        measurements.append(
            Measurement(
                name=name,
                environment=detector.environment(),
                size_hw=detector.size_hw,
                batch=batch,
                total_ms=total,
                stages_ms={
                    stage: np.reshape([calls[i].total_ms.get(stage, 0.0) for i in range(total.size)], total.shape)
                    for stage in stages
                },
                pipelined_fps=batch * pipelined,
                depth=options.stream_depth,
                faces=[len(detector.detect(image)) for image in frames.images],
            )
        )
    return Setting(measurements, [speed_ratio(totals[0], other) for other in totals[1:]])


def _pipelined(detector: RetinaFaceDetector, batches: Sequence[list[Any]], repeats: int, depth: int) -> float:
    """Return calls a second with `depth` of them under way."""
    with detector.stream(depth) as stream:

        def complete(calls: int) -> None:
            for future in [stream.submit(batches[index % len(batches)]) for index in range(calls)]:
                future.result()

        complete(2 * depth)
        start = time.perf_counter()
        complete(repeats)
        return repeats / (time.perf_counter() - start)


def parse_arguments(argv: Sequence[str] | None) -> BenchmarkOptions:
    """Return the options of a command line."""
    parser = ArgumentParser(
        prog="python -m trt_runtime.benchmark",
        description="Measure how fast a detector is, from uint8 frames to faces in their pixels, letterboxing "
        "included: p50, p95 and p99 in all and by stage, and frames a second, one call after the other and pipelined. "
        "Whole calls are timed without a stage timer, stages in as many other calls. Several models, or one on several "
        "backends, take turns in one run, and the ratio comes with a 95 % interval: a difference within noise is "
        "called that.",
        epilog="Close other programs first: the load of the machine is recorded, and a busy one is warned of.",
    )
    add = parser.add_argument
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", type=Path, metavar="FILE", help="detector: .onnx (CPU) or .engine (GPU)")
    models.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help="several; ratios are to the first")
    add("--batch", dest="batches", type=argument(_numbers), default="1", metavar="N[,N]", help="frames in one call")
    add(
        "--size",
        dest="sizes",
        type=argument(_sizes),
        default=(None,),
        metavar="SIZE[,SIZE]",
        help="HEIGHTxWIDTH or longer side, for models of dynamic size (default: the model's own)",
    )
    add(
        "--frames",
        type=Path,
        metavar="DIR",
        help=f"folder of images, {MAX_FRAMES} are used (default: sample photographs)",
    )
    add("--repeats", type=int, default=200, metavar="N", help="recorded calls, at least")
    add("--warm-up", type=int, default=20, metavar="N", help="calls before them")
    add("--threads", type=int, metavar="N", help="threads of the network (default: every core)")
    add("--streams", type=int, default=1, metavar="N", help="calls the backend may run at once")
    add("--depth", type=int, metavar="N", help="calls handed over at once in the pipeline (default: 2)")
    add("--backend", dest="backends", type=_words, default="auto", metavar="NAME[,NAME]", help=", ".join(BACKENDS))
    parser.add_device()
    add("--precision", choices=PRECISIONS, default="fp32", help="what OpenVINO computes in")
    add("--on-device", action="store_true", help="frames lie on the GPU already; for engines")
    parser.add_json("every figure")
    add("--plot", type=Path, metavar="FILE", help=f"draw them ({', '.join(PLOT_SUFFIXES)})")
    given = vars(parser.parse_args(argv))
    model, compared = given.pop("model"), given.pop("compare")
    if compared and len(compared) < 2:
        parser.error("--compare takes two models or more; --model measures one")
    return BenchmarkOptions(tuple(compared or [model]), **given)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _sizes(text: str) -> tuple[NetworkSize, ...]:
    return tuple(map(parse_network_size, _words(text)))


def _numbers(text: str) -> tuple[int, ...]:
    parts = _words(text)
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise SpecError(f"{text!r}: expected numbers separated by commas, for instance 1,4,8")
    return tuple(int(part[:9]) for part in parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; an interrupted one reports what is complete."""
    options = parse_arguments(argv)
    outputs = [("--json", options.json), ("--plot", options.plot)]
    record = {
        **environment("retinaface-trt", "numpy"),
        "opencv": cv2.__version__,
        "load_average": load_average(),
        "repeats": options.repeats,
        "warm_up": options.warm_up,
    }
    with quiet_libraries():
        frames = load_frames(options.frames)
    record["frames"] = frames.what
    settings: list[Setting] = []
    interrupted = False
    with json_output(options.json) as write, ExitStack() as stack:
        opened = open_detectors(options, stack)
        check_outputs(outputs, [file for detectors in opened for each in detectors.values() for file in each.files])
        print(heading(record))
        try:
            for setting in benchmark(opened, frames, options):
                settings.append(setting)
                tqdm.write(f"\n{setting_table(setting)}", file=sys.stdout)
        except KeyboardInterrupt:
            interrupted = True
            print(f"interrupted: {len(settings)} settings were measured", file=sys.stderr)
        if len(settings) > 1:
            print(f"\n{summary_table(settings)}")
        results = [row for setting in settings for row in setting.to_dict()]
        what = "uint8 frame in, faces out, times in ms a call"
        if results:
            write(json.dumps({"what": what, **record, "interrupted": interrupted, "results": results}, indent=2))
        if options.plot and settings:
            plot(settings, record, options.plot)
            print(f"wrote {options.plot}")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(run(main))
