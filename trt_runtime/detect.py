"""Find faces in images, a folder, a video or a webcam, and draw or write them.

python -m trt_runtime.detect photo.jpg --model retinaface.onnx --output faces.jpg --json faces.json
"""

from __future__ import annotations

import glob
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import cv2
from tqdm import tqdm

from facespec.cli import ArgumentParser, quiet_libraries, run
from facespec.detections import Detections
from facespec.draw import draw_detections
from facespec.errors import DataError, FrameError, ImageError, OutputError
from facespec.files import atomic_path, check_outputs
from facespec.images import IMAGE_SUFFIXES, find_images, read_image, write_image
from facespec.letterbox import Frame
from facespec.spec import parse_size
from trt_runtime.detector import RetinaFaceDetector, load_detector
from trt_runtime.timing import StageTimer
from trt_runtime.video import VIDEO_SUFFIXES, Camera, VideoFile, VideoWriter, require_display


@dataclass(frozen=True)
class DetectOptions:
    """What to detect on, with what, and where results go.

    Attributes:
        source: Image, folder, glob pattern, video file, or a webcam's index.
        model: Model file for `load_detector`.
        output: Annotated image, folder of annotated images, or video; None draws nothing.
        json: File of JSON lines, one a frame; "-" is standard output.
        score: Lowest score reported; None is 0.5.
        size_hw: Network size for models of dynamic size.
        threads: Threads of the network; None is every core.
        show: Show annotated frames in a window; q or Esc ends.
    """

    source: str
    model: Path
    output: Path | None = None
    json: str | None = None
    score: float | None = None
    size_hw: tuple[int, int] | None = None
    threads: int | None = None
    show: bool = False


@dataclass
class Summary:
    """What a run did; `str()` gives the closing lines."""

    timer: StageTimer = field(default_factory=StageTimer)
    frames: int = 0
    faces: int = 0
    truncated: int = 0
    damaged: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    def __str__(self) -> str:
        frames = max(self.frames, 1)
        stages = ", ".join(f"{name} {total / frames:.2f}" for name, total in self.timer.total_ms.items())
        lines = [
            f"{_count(self.frames, 'frame')}, {_count(self.faces, 'face')}, {self.seconds:.1f} s "
            f"({self.frames / max(self.seconds, 1e-9):.1f} frames/s)",
            f"ms per frame: {stages or 'nothing was run'}",
        ]
        if self.truncated:
            lines.append(
                f"{_count(self.truncated, 'frame')} had more faces than the model's limits: export it with higher "
                "--top-k and --max-detections"
            )
        if self.damaged:
            lines.append(f"{_count(self.damaged, 'damaged part')} of the video passed over")
        if self.failures:
            lines.append(f"{_count(len(self.failures), 'image')} could not be read or written")
        if self.interrupted:
            lines.append("interrupted: everything up to here was written")
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def detect(options: DetectOptions) -> Summary:
    """Run the detector over a source and write what was asked for.

    An image of several that cannot be read is reported and passed over; the summary counts it.

    Raises:
        RetinaFaceError: The source, the model or an output is not usable.
    """
    if options.show:
        require_display()
    images = _image_sources(options.source)
    single = images is not None and Path(options.source).is_file()
    detector = load_detector(
        options.model, score_threshold=options.score, size_hw=options.size_hw, threads=options.threads
    )
    targets = _check_outputs(options, detector.files, images, single)
    summary = Summary()
    start = time.perf_counter()
    with ExitStack() as stack:
        lines = _open_json(options.json, stack)
        sink = _Sink(detector, options, lines, summary)
        try:
            if images is not None:
                _run_images(images, single, targets, sink)
            else:
                _run_video(sink)
        except _QuitError:
            pass
        except KeyboardInterrupt:
            summary.interrupted = True
    summary.seconds = time.perf_counter() - start
    return summary


class _QuitError(Exception):
    """The user closed the window."""


@dataclass
class _Sink:
    """Runs one frame through the detector and hands the result to every output."""

    detector: RetinaFaceDetector
    options: DetectOptions
    lines: TextIO | None
    summary: Summary

    def process(self, frame: Frame, record: dict[str, Any]) -> Frame | None:
        """Return the annotated frame if somebody wants it."""
        summary = self.summary
        found = self.detector.detect(frame, summary.timer)
        summary.frames += 1
        summary.faces += len(found)
        summary.truncated += found.truncated
        if self.lines:
            self.write({**record, **found.to_dict()})
        return self._annotate(frame, found) if self.options.output or self.options.show else None

    def write(self, record: dict[str, Any]) -> None:
        if self.lines:
            self.lines.write(json.dumps(record) + "\n")

    def _annotate(self, frame: Frame, found: Detections) -> Frame:
        with self.summary.timer("draw"):
            canvas = draw_detections(frame, found)
        if self.options.show:
            cv2.imshow("faces (q ends)", canvas)
            if cv2.waitKey(1) & 0xFF in (ord("q"), 27):
                raise _QuitError
        return canvas


def _run_images(paths: list[Path], single: bool, targets: dict[Path, Path], sink: _Sink) -> None:
    summary = sink.summary
    for path in tqdm(paths, unit="image", disable=True if single else None):
        try:
            with summary.timer("read"), quiet_libraries():
                frame = read_image(path)
            canvas = sink.process(frame, {"source": str(path)})
            if canvas is not None and path in targets:
                with summary.timer("write"), quiet_libraries():
                    write_image(targets[path], canvas)
        except (ImageError, FrameError, OutputError) as error:
            if single:
                raise
            summary.failures.append(str(error))
            sink.write({"source": str(path), "error": str(error)})
            tqdm.write(f"error: {error}", file=sys.stderr)
    if sink.options.show and summary.frames:
        cv2.waitKey(0 if single else 1)


def _targets(source: str, paths: list[Path], folder: Path) -> dict[Path, Path]:
    """Return where the annotated copy of each image goes: under `folder` as it is under the source."""
    common = Path(source) if Path(source).is_dir() else Path(*_common_parts(paths))
    targets = {path: folder / _as_written(path.relative_to(common)) for path in paths}
    names = Counter(targets.values())
    twice = [path for path, target in targets.items() if names[target] > 1]
    if twice:
        raise OutputError(f"--output {folder}: {twice[0]} and {twice[1]} would get the same name; run them apart")
    return targets


def _as_written(path: Path) -> Path:
    """Formats that hold colour keep their name, the others become PNG."""
    return path if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") else path.with_name(f"{path.name}.png")


def _common_parts(paths: list[Path]) -> list[str]:
    first = paths[0].parent.parts
    keep = len(first)
    for path in paths[1:]:
        parts = path.parent.parts
        keep = next((i for i in range(min(keep, len(parts))) if parts[i] != first[i]), min(keep, len(parts)))
    return list(first[:keep])


def _run_video(sink: _Sink) -> None:
    options, summary = sink.options, sink.summary
    with ExitStack() as stack:
        with quiet_libraries():  # OpenCV has its own words for a missing camera
            source: Camera | VideoFile = (
                VideoFile(options.source) if Path(options.source).exists() else Camera(int(options.source[:9]))
            )
        stack.enter_context(source)
        writer = stack.enter_context(VideoWriter(options.output, source.rate)) if options.output else None
        progress = stack.enter_context(tqdm(total=source.frame_count or None, unit="frame", disable=None))
        frames: Iterator[Any] = iter(source)
        try:
            while True:
                with summary.timer("read"):
                    timed = next(frames, None)
                if timed is None:
                    break
                record = {"source": options.source, "frame": summary.frames, "time_s": round(timed.seconds, 4)}
                canvas = sink.process(timed.image, record)
                if writer and canvas is not None:
                    with summary.timer("write"):
                        writer.write(canvas, timed.seconds)
                progress.update()
        except _QuitError:
            pass
        finally:
            summary.damaged = source.damaged


def _image_sources(source: str) -> list[Path] | None:
    """Return the images a source names, or None if it is a video file or a webcam.

    Raises:
        DataError: Nothing is there.
    """
    if not source:
        raise DataError("the source is empty: give a file, a folder, a glob or a webcam's index")
    if source.isdecimal() and not Path(source).exists():
        return None
    if "://" in source:
        raise DataError(f"{source}: addresses are not supported yet; give a file, a folder, a glob or a webcam's index")
    path = Path(source)
    if path.is_dir():
        found = find_images(path)
        if not found:
            raise DataError(f"{source}: no images in this folder; videos are run one at a time")
        return found
    if path.exists():
        return [path] if path.suffix.lower() in IMAGE_SUFFIXES else None
    if glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
        found = [item for item in found if item.suffix.lower() in IMAGE_SUFFIXES]
        if not found:
            raise DataError(f"{source}: no image matches this pattern; videos are run one at a time")
        return found
    raise DataError(f"{source}: no such file or folder")


def _check_outputs(
    options: DetectOptions, model_files: Sequence[Path], images: list[Path] | None, single: bool
) -> dict[Path, Path]:
    """Refuse before any work what could not be written or would destroy a file; return where annotated images go."""
    output = options.output
    suffix = output.suffix.lower() if output else ""
    targets: dict[Path, Path] = {}
    if output is None:
        pass
    elif images is None:
        if suffix not in VIDEO_SUFFIXES:
            raise OutputError(f"--output {output}: video is written as {', '.join(VIDEO_SUFFIXES)}")
    elif single:
        if suffix not in IMAGE_SUFFIXES:
            raise OutputError(f"--output {output}: for one image give a name that ends in .jpg or .png")
        targets = {images[0]: output}
    else:
        if output.is_file() or suffix in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
            raise OutputError(f"--output {output}: for several images give a folder")
        if Path(options.source).is_dir() and output.resolve().is_relative_to(Path(options.source).resolve()):
            raise OutputError(f"--output {output} lies in the source folder: choose one outside")
        targets = _targets(options.source, images, output)
    drawn = targets.values() if images is not None else [output]
    report = None if options.json == "-" else options.json
    check_outputs(
        [*(("--output", path) for path in drawn), ("--json", report)],
        [*model_files, *(images if images is not None else [Path(options.source)])],
    )
    return targets


def _open_json(target: str | None, stack: ExitStack) -> TextIO | None:
    if target is None:
        return None
    if target == "-":
        return sys.stdout
    temporary = stack.enter_context(atomic_path(target))
    return stack.enter_context(temporary.open("w", encoding="utf-8"))


def parse_arguments(argv: Sequence[str] | None) -> DetectOptions:
    """Return the options of a command line."""
    parser = ArgumentParser(
        prog="python -m trt_runtime.detect",
        description="Find faces and their landmarks in images, videos or a webcam.",
        epilog="A model comes from: python -m export.to_onnx --out retinaface.onnx",
    )
    parser.add_argument("source", help="image, folder, glob pattern (in quotes), video file, or a webcam's index")
    parser.add_argument("--model", type=Path, required=True, help="detector written by export.to_onnx")
    parser.add_argument("--output", type=Path, help="annotated image, folder of images, or H.264 video (.mp4)")
    parser.add_argument("--json", help="write one JSON line a frame, in pixels of the original frame; '-' prints them")
    parser.add_argument("--score", type=float, help="lowest score reported (default: 0.5, or the model's floor)")
    parser.add_argument("--size", help="HEIGHTxWIDTH frames are letterboxed to, for models of dynamic size")
    parser.add_argument("--threads", type=int, help="threads of the network (default: every core)")
    parser.add_argument("--show", action="store_true", help="show the frames in a window; q ends")
    args = parser.parse_args(argv)
    return DetectOptions(
        source=args.source,
        model=args.model,
        output=args.output,
        json=args.json,
        score=args.score,
        size_hw=parse_size(args.size) if args.size else None,
        threads=args.threads,
        show=args.show,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(argv)
    summary = detect(options)
    print(summary, file=sys.stderr if options.json == "-" else sys.stdout)
    if summary.interrupted:
        return 130
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(run(main))
