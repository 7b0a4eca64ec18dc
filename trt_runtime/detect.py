"""Find faces in images, folders, videos, webcams and network streams, and draw or write them.

python -m trt_runtime.detect photo.jpg --model retinaface.onnx --out faces.jpg --json faces.json
python -m trt_runtime.detect 0 rtsp://camera/stream --model retinaface.onnx --out folder --json -
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from facespec.cli import ArgumentParser, argument, counted, quiet_libraries, run
from facespec.draw import draw_detections
from facespec.errors import FrameError, ImageError, OutputError
from facespec.files import atomic_path
from facespec.images import decode_image, holds_several, write_image
from facespec.kinds import names_of
from facespec.letterbox import Frame
from facespec.opencv import cv2
from facespec.spec import DEFAULT_WEIGHTS, NetworkSize, parse_network_size
from trt_runtime.cpu import PRECISIONS
from trt_runtime.detector import RetinaFaceDetector
from trt_runtime.load import BACKENDS, load_detector
from trt_runtime.measure import StageTimer
from trt_runtime.media.files import Source, VideoWriter, require_display
from trt_runtime.media.live import open_source
from trt_runtime.media.pipeline import WAIT, Job, PipelineOptions, SeenFrame, SourceReport, Use, run_pipeline
from trt_runtime.media.sources import Sources, check_targets, find_sources, is_live, labels, read_source
from trt_runtime.regions import Region, parse_region


@dataclass(frozen=True)
class DetectOptions:
    """What to detect on, with what, and where results go.

    Attributes:
        source: One or several: images, video files, folders and glob patterns of both, webcams' indices, addresses.
        model: Model file or name for `load_detector`.
        out: Annotated image or video, or a folder of them for several; None draws nothing.
        json: File of JSON lines, one for each frame the network ran on; "-" is standard output.
        score: Lowest score reported; None is 0.5.
        size_hw: Network size for models of dynamic size.
        threads: Threads of the network; None is every core.
        streams: Frames a CPU computes at once.
        backend: What runs the model, one of `trt_runtime.load.BACKENDS`.
        device: Where the model runs, as for `load_detector`.
        precision: What a CPU computes in, as for `load_detector`.
        min_face: Faces of fewer pixels are left out.
        roi: Region of each frame that alone is looked at.
        tile: Large frames run in tiles of the network size, too.
        show: Show annotated frames in a window; q or Esc ends.
        strict: Whatever was left out makes the command fail: see `Summary.complete`.
        flow: How the frames of videos flow.
    """

    source: str | tuple[str, ...]
    model: Path = Path(DEFAULT_WEIGHTS)
    out: Path | None = None
    json: str | None = None
    score: float | None = None
    size_hw: NetworkSize = None
    threads: int | None = None
    streams: int = 1
    backend: str = "auto"
    device: int | str = "auto"
    precision: str = "fp32"
    min_face: float = 0.0
    roi: Region | None = None
    tile: bool = False
    show: bool = False
    strict: bool = False
    flow: PipelineOptions = field(default_factory=PipelineOptions)

    @property
    def sources(self) -> tuple[str, ...]:
        """What `source` names, one or several."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass
class Summary:
    """What a run did; `str()` gives the closing lines."""

    timer: StageTimer = field(default_factory=StageTimer)  # time by stage, over all threads
    frames: int = 0
    detected: int = 0  # frames the network ran on
    faces: int = 0
    truncated: int = 0  # frames with more faces than the model's limits
    failures: list[str] = field(default_factory=list)  # what failed, where there are several images or videos
    others: list[Path] = field(default_factory=list)  # files that were not taken: neither images nor videos
    first_of_several: list[Path] = field(default_factory=list)  # animations and images of several pages
    sources: list[SourceReport] = field(default_factory=list)  # what became of each video
    seconds: float = 0.0  # wall time
    interrupted: bool = False  # Ctrl-C ended it

    @property
    def damaged(self) -> int:
        """Parts of videos that were passed over."""
        return sum(source.damaged for source in self.sources)

    @property
    def complete(self) -> bool:
        """Whether nothing was left out, but frames of live sources that came too fast."""
        return not (self.failures or self.others or self.first_of_several or self.damaged or self.truncated)

    def add(self, other: Summary) -> None:
        """Add what was done to images meanwhile."""
        self.timer.add_all(other.timer)
        for name in ("frames", "detected", "faces", "truncated", "failures", "first_of_several"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        passed = f" ({self.detected} through the network)" if self.detected != self.frames else ""
        lines = [
            f"{counted(self.frames, 'frame')}{passed}, {counted(self.faces, 'face')}, {self.seconds:.1f} s "
            f"({self.frames / max(self.seconds, 1e-9):.1f} frames/s)",
            self._stages(),
        ]
        if len(self.sources) > 1 or any(source.dropped or source.reconnects for source in self.sources):
            lines += map(_source_line, self.sources)
        if self.truncated:
            lines.append(
                f"{counted(self.truncated, 'frame')} had more faces than the model's limits: export it with higher "
                "--top-k and --max-detections"
            )
        if self.damaged:
            lines.append(f"{counted(self.damaged, 'damaged part')} of the video passed over")
        if self.first_of_several:
            lines.append(
                f"{counted(len(self.first_of_several), 'image')} of several pictures, of which the first was taken: "
                f"{names_of(self.first_of_several)}"
            )
        if self.others:
            lines.append(
                f"{counted(len(self.others), 'file')} not taken, neither image nor video: {names_of(self.others)}"
            )
        if self.failures:
            what = "source" if self.sources else "image"
            lines.append(f"{counted(len(self.failures), what)} could not be read or written")
        if self.interrupted:
            lines.append("interrupted: everything up to here was written")
        return "\n".join(lines)

    def _stages(self) -> str:
        """Say where the time of a frame went and, where stages overlap, how much longer they take than the frame."""
        ms = {stage: total / max(self.frames, 1) for stage, total in self.timer.total_ms.items()}
        line = "ms per frame: " + (", ".join(f"{stage} {mean:.2f}" for stage, mean in ms.items()) or "nothing was run")
        if not self.sources or not self.frames or WAIT in ms:  # a camera sets the pace
            return line
        total, wall = sum(ms.values()), 1e3 * self.seconds / self.frames
        if total < wall:  # a few frames: it is the start that took the time
            return line
        return f"{line}; sum of stages {total:.2f}, wall {wall:.2f}: overlap {total / wall:.2f}x"


def _source_line(source: SourceReport) -> str:
    return (
        f"{source.name}: {source.decoded} decoded, {source.detected} detected, {source.dropped} dropped, "
        f"{source.reconnects} reconnects, {source.damaged} damaged, "
        f"{source.frames / max(source.seconds, 1e-9):.1f} frames/s{', failed' * bool(source.error)}"
    )


def detect(options: DetectOptions) -> Summary:
    """Run the detector over sources and write what was asked for.

    One of several images or videos that fails is reported and passed over; the summary counts it.

    Raises:
        RetinaFaceError: The only source, the model or an output is not usable.
    """
    if options.show:
        require_display()
    sources = find_sources(options.sources)
    detector = load_detector(
        options.model,
        score_threshold=options.score,
        size_hw=options.size_hw,
        threads=options.threads,
        streams=options.streams,
        backend=options.backend,
        device=options.device,
        precision=options.precision,
    )
    try:
        detector.min_face, detector.roi, detector.tile = options.min_face, options.roi, options.tile
        targets = check_targets(options.sources, sources, options.out, options.json, detector.files)
    except BaseException:
        detector.close()
        raise
    summary = Summary(others=sources.others)
    start = time.perf_counter()
    with detector, ExitStack() as stack:
        sink = _Sink(options, _open_json(options.json, stack), sources.single)
        try:
            images = partial(_run_images, sources.images, targets, detector, sink)
            videos = partial(_run_videos, sources, targets, detector, sink, summary)
            if sources.images and any(map(is_live, sources.videos)):
                _run_beside(images, videos, sink, summary)
            else:
                if sources.images:
                    images(summary)
                videos()
        except _QuitError:
            pass
        except _LinesError as failure:
            raise (failure.__cause__ or failure) from None
    summary.seconds = time.perf_counter() - start
    if sources.single and summary.sources and (error := summary.sources[0].error):
        raise error  # it was lost after a while: what was found until then has been written
    return summary


def _run_beside(images: Callable[[Summary], None], videos: Callable[[], None], sink: _Sink, summary: Summary) -> None:
    """Run images in a thread of their own beside the videos, because what is live does not wait for them."""
    sink.beside, apart = True, Summary()
    with ThreadPoolExecutor(1, "images") as thread:
        done = thread.submit(images, apart)
        try:
            videos()
            if not summary.interrupted:
                done.result()
        except KeyboardInterrupt:
            summary.interrupted = True
        finally:
            apart.interrupted = True  # it begins no other image
    done.result()
    summary.add(apart)


class _QuitError(Exception):
    """The user closed the window."""


class _LinesError(Exception):
    """The JSON lines cannot be written. An OSError would be taken for one of the video that is written meanwhile."""


class _Sink:
    """Where results go. Several threads may write lines, and leave frames for the window."""

    def __init__(self, options: DetectOptions, lines: TextIO | None, single: bool) -> None:
        self.options, self.lines, self.single = options, lines, single
        self.draws = options.out is not None or options.show
        self.lock = threading.Lock()
        self.shown: dict[str, Frame] = {}  # the newest of each window
        self.beside = False  # images run beside videos, which tend the windows

    def write(self, record: dict[str, Any]) -> None:
        if self.lines:
            line = json.dumps(record, ensure_ascii=False) + "\n"
            try:
                with self.lock:
                    self.lines.write(line)
                    self.lines.flush()  # the lines of a camera are read as they come
            except OSError as error:
                raise _LinesError from error

    def fail(self, name: str, error: Exception) -> None:
        self.write({"source": name, "error": str(error)})
        tqdm.write(f"error: {error}", file=sys.stderr)

    def show(self, wait_ms: int = 1) -> None:
        """Show what was left for the windows.

        Raises:
            _QuitError: The user wants no more.
        """
        for name in list(self.shown):
            cv2.imshow(f"{name} (q ends)", self.shown.pop(name))
        if cv2.waitKey(wait_ms) & 0xFF in (ord("q"), 27):
            raise _QuitError


def _run_images(
    sources: list[str], targets: dict[str, Path], detector: RetinaFaceDetector, sink: _Sink, summary: Summary
) -> None:
    try:
        for source, label in tqdm(labels(sources).items(), unit="image", disable=True if sink.single else None):
            if summary.interrupted:
                break
            try:
                _run_image(source, label, targets.get(source), detector, sink, summary)
            except (ImageError, FrameError, OutputError) as error:
                if sink.single:
                    raise
                summary.failures.append(str(error))
                sink.fail(label, error)
    except KeyboardInterrupt:
        summary.interrupted = True


def _run_image(
    source: str, label: str, target: Path | None, detector: RetinaFaceDetector, sink: _Sink, summary: Summary
) -> None:
    timer = summary.timer
    with timer("read"), quiet_libraries():
        data = read_source(source)
        frame = decode_image(data, label)
    if holds_several(data):
        summary.first_of_several.append(Path(label))
    found = detector.detect(frame, timer)
    summary.frames += 1
    summary.detected += 1
    summary.faces += len(found)
    summary.truncated += found.truncated
    sink.write({"source": label, **found.to_dict()})
    if not sink.draws:
        return
    with timer("draw"):
        canvas = draw_detections(frame, found, copy=False)
    if target:
        with timer("write"), quiet_libraries():
            write_image(target, canvas)
    if sink.options.show:
        sink.shown["faces"] = canvas
        if not sink.beside:
            sink.show(0 if sink.single else 1)


def _run_videos(
    sources: Sources, targets: dict[str, Path], detector: RetinaFaceDetector, sink: _Sink, summary: Summary
) -> None:
    jobs = [
        Job(label, partial(_open, source), partial(_output, label, targets.get(source), sink), not is_live(source))
        for source, label in labels(sources.videos).items()
    ]
    if summary.interrupted or not jobs:
        return
    told: set[str] = set()
    show = sink.options.show
    quit_ = False
    with tqdm(unit="frame", disable=None) as progress:

        def tick(reports: list[SourceReport]) -> bool:
            nonlocal quit_
            for report in reports:
                if report.error and not sink.single and report.name not in told:
                    told.add(report.name)
                    summary.failures.append(str(report.error))
                    sink.fail(report.name, report.error)
            known = all(report.frame_count for report in reports)
            progress.total = sum(report.frame_count for report in reports) if known else None
            progress.update(sum(report.frames for report in reports) - progress.n)
            try:
                if show:
                    sink.show()
            except _QuitError:
                quit_ = True
                return False
            return True

        report = run_pipeline(detector, jobs, sink.options.flow, tick=tick, tick_s=0.02 if show else 0.1)
        tick(report.sources)
    summary.timer.add_all(report.timer)
    summary.sources += report.sources
    summary.interrupted = report.interrupted
    for source in report.sources:
        summary.frames += source.frames
        summary.detected += source.detected
        summary.faces += source.faces
        summary.truncated += source.truncated
        if sink.single and source.error and not (source.complete and source.frames):
            raise source.error  # there is nothing worth keeping
    if quit_:
        raise _QuitError


def _open(source: str) -> Source:
    with quiet_libraries():  # OpenCV prints a message of its own for a missing camera
        return open_source(source)


@contextmanager
def _output(label: str, path: Path | None, sink: _Sink, source: Source) -> Iterator[Use]:
    """Write and show the frames of a source."""
    with VideoWriter(path, source.rate) if path else nullcontext() as writer:

        def use(seen: SeenFrame, timer: StageTimer) -> None:
            if seen.detected:
                when: dict[str, Any] = {"frame": seen.number, "time_s": round(seen.seconds, 4)}
                if source.live:
                    when["utc"] = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
                sink.write({"source": label, **when, **seen.faces.to_dict()})
            if not sink.draws:
                return
            with timer("draw"):
                canvas = draw_detections(seen.image, seen.faces, copy=False)
            if writer:
                writer.pixel_aspect = source.pixel_aspect
                with timer("write"):
                    writer.write(canvas, seen.seconds)
                timer.add("encode", writer.take_encode_ms())
            if sink.options.show:
                sink.shown[label] = canvas

        yield use


def _open_json(target: str | None, stack: ExitStack) -> TextIO | None:
    if target is None:
        return None
    if target == "-":
        if getattr(sys.stdout, "name", "") == os.devnull:
            raise OutputError("--json -: standard output is closed; give a file")
        return sys.stdout
    temporary = stack.enter_context(atomic_path(target))
    return stack.enter_context(temporary.open("w", encoding="utf-8", errors="backslashreplace"))


def parse_arguments(argv: Sequence[str] | None) -> DetectOptions:
    """Return the options of a command line."""
    parser = ArgumentParser(
        prog="python -m trt_runtime.detect",
        description="Find faces and their landmarks in images or, several at once, in videos, webcams and streams.",
        epilog="A model of your own comes from: python -m export.to_onnx --out retinaface.onnx",
    )
    add = parser.add_argument
    add(
        "source",
        nargs="+",
        help="image or video file, folder or glob pattern (in quotes) of them, webcam's index, or address, as "
        "rtsp://host/path or http://host/photo.jpg",
    )
    add(
        "--model",
        type=Path,
        default=Path(DEFAULT_WEIGHTS),
        help="model of export.to_onnx or export.to_trt, or this name",
    )
    add("--out", type=Path, help="annotated image or H.264 video (.mp4); a folder for several")
    add("--json", help="write one JSON line a frame, in pixels of the original frame; '-' prints them")
    add("--score", type=float, help="lowest score reported (default: 0.5, or the model's floor)")
    add(
        "--size",
        dest="size_hw",
        type=argument(parse_network_size),
        help="HEIGHTxWIDTH, or longer side, frames are letterboxed to, for models of dynamic size",
    )
    add("--threads", type=int, help="threads of the network (default: every core)")
    add("--streams", type=int, default=1, help="frames a CPU computes at once")
    add("--backend", choices=BACKENDS, default="auto", help="what runs the model")
    parser.add_device()
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="what OpenVINO computes in")
    add("--min-face", type=float, default=0.0, metavar="PX", help="leave out faces of fewer pixels of the frame")
    region = "look at this part of each frame alone, X,Y,WIDTH,HEIGHT in pixels"
    add("--roi", type=argument(parse_region), metavar="REGION", help=region)
    tile = "run frames larger than --size in overlapping tiles of it, too: finds small faces in large frames"
    add("--tile", action="store_true", help=tile)
    add("--show", action="store_true", help="show the newest frames in a window; q ends")
    add("--strict", action="store_true", help="exit code 1 if anything was left out, as files not taken")
    add("--batch", type=int, help="frames of videos in one run of the network (default: what is ready and worth it)")
    add(
        "--stride",
        type=int,
        default=1,
        help="run the network on one frame of so many; the others are drawn with its faces and get no JSON line",
    )
    given = vars(parser.parse_args(argv))
    batch, stride = given.pop("batch"), given.pop("stride")
    flow = PipelineOptions(batch=batch, depth=max(2, given["streams"]), stride=stride)
    return DetectOptions(tuple(given.pop("source")), flow=flow, **given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(argv)
    summary = detect(options)
    say = partial(print, file=sys.stderr if options.json == "-" else sys.stdout)
    say(summary)
    written = [str(path) for path in (options.out, options.json) if path not in (None, "-")]
    if written and summary.frames:
        say(f"wrote {', '.join(written)}")
    if summary.interrupted:
        return 130
    return 1 if summary.failures or (options.strict and not summary.complete) else 0


if __name__ == "__main__":
    sys.exit(run(main))
