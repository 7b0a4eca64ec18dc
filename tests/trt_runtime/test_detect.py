"""The parts of the detect command, in this process, with a detector that finds what a frame's first pixel says."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from facespec.draw import draw_detections
from facespec.errors import FrameError, ImageError, NonFiniteError, OutputError, SpecError, VideoError
from facespec.images import read_image, write_image
from facespec.letterbox import Frame
from tests.trt_runtime.handmade import HandmadeDetector, HandmadeLane, frame_of, in_time
from tests.trt_runtime.web_site import Site, site_fixture
from trt_runtime import detect as module
from trt_runtime.detect import DetectOptions, Summary, detect, main, parse_arguments
from trt_runtime.measure import StageTimer
from trt_runtime.media.files import Source, TimedFrame, VideoFile, VideoWriter
from trt_runtime.media.pipeline import WAIT, PipelineOptions, SourceReport

MODEL = Path("m.onnx")
site = site_fixture


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch, here: Path) -> HandmadeDetector:
    """What the command loads; `asked` holds how."""
    made = HandmadeDetector()
    made.files = [here / "m.onnx"]
    made.files[0].write_text("a model")
    made.asked = []  # type: ignore[attr-defined]

    def load(path: Path, **options: Any) -> HandmadeDetector:
        made.asked.append((path, options))  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(module, "load_detector", load)
    return made


@pytest.fixture
def photos(here: Path) -> Path:
    """Three images, with one, two and eight faces."""
    for name, faces in (("a.png", 1), ("b/c.bmp", 2), ("d.PNG", 8)):
        write_image(here / "photos" / name, frame_of(faces, (40, 60)))
    return here / "photos"


@pytest.fixture
def clip(here: Path) -> Path:
    with VideoWriter(here / "clip.mp4", 10) as writer:
        for _ in range(6):
            writer.write(frame_of(128, (32, 64)))
    return here / "clip.mp4"


def _lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# options


def test_what_happens_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_arguments(["a.jpg", "--model", "m.onnx"])
    assert options == DetectOptions(("a.jpg",), MODEL)
    assert (options.out, options.json, options.score, options.size_hw, options.threads) == (None,) * 5
    assert (options.streams, options.backend, options.device, options.show) == (1, "auto", "auto", False)
    assert options.flow == PipelineOptions(batch=None, depth=2, stride=1)
    assert (options.sources, DetectOptions("a", MODEL).sources) == (("a.jpg",), ("a",))
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "--backend {auto,onnxruntime,openvino,tensorrt} what runs" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as left:
        parse_arguments(["a.jpg", "--backend", "opnvino"])
    assert left.value.code == 2
    assert "did you mean openvino?" in capsys.readouterr().err
    assert parse_arguments(["a.jpg"]).model == Path("mobilenet0.25")


@pytest.mark.parametrize(("streams", "depth"), [(1, 2), (2, 2), (3, 3)])
def test_every_option_reaches_its_place(streams: int, depth: int) -> None:
    line = (
        f"a b --model m.onnx --out o --json j --score 0.7 --size 320x640 --threads 3 --streams {streams} "
        "--backend openvino --device cuda:2 --show --batch 5 --stride 4"
    )
    assert parse_arguments(line.split()) == DetectOptions(
        source=("a", "b"), model=MODEL, out=Path("o"), json="j", score=0.7, size_hw=(320, 640), threads=3,
        streams=streams, backend="openvino", device="cuda:2", show=True, flow=PipelineOptions(5, depth, 4),
    )  # fmt: skip
    assert parse_arguments(["a", "--model", "m", "--size", "640"]).size_hw == 640


def test_the_detector_is_made_as_asked_and_closed(detector: HandmadeDetector, photos: Path) -> None:
    detect(DetectOptions(str(photos), MODEL, None, None, 0.7, (320, 640), 3, 2, "openvino", 1))
    assert detector.asked == [  # type: ignore[attr-defined]
        (MODEL, {"score_threshold": 0.7, "size_hw": (320, 640), "threads": 3, "streams": 2, "backend": "openvino",
                 "device": 1, "precision": "fp32"}),
    ]  # fmt: skip
    assert [lane.closed for lane in detector.lanes] == [True]


def test_the_pipeline_is_run_as_asked(detector: HandmadeDetector, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flows: list[tuple[PipelineOptions, float]] = []
    real = module.run_pipeline

    def watched(found: Any, jobs: Any, options: PipelineOptions, **more: Any) -> Any:
        flows.append((options, more["tick_s"]))
        return real(found, jobs, options, **more)

    monkeypatch.setattr(module, "run_pipeline", watched)
    summary = detect(DetectOptions(str(clip), MODEL, flow=PipelineOptions(batch=3, depth=1, stride=2)))
    assert flows == [(PipelineOptions(batch=3, depth=1, stride=2), 0.1)]
    assert (summary.frames, summary.detected) == (6, 3)


# what is said at the end


def _timer(**stages: float) -> StageTimer:
    timer = StageTimer()
    timer.total_ms = dict(stages)
    return timer


def test_the_closing_lines_of_images() -> None:
    lines = str(Summary(_timer(read=10, network=30), frames=4, detected=4, faces=1, seconds=2)).splitlines()
    assert lines == ["4 frames, 1 face, 2.0 s (2.0 frames/s)", "ms per frame: read 2.50, network 7.50"]
    assert str(Summary()).splitlines() == ["0 frames, 0 faces, 0.0 s (0.0 frames/s)", "ms per frame: nothing was run"]
    lines = str(Summary(_timer(read=1), 1, 1, 0, 2, ["a", "b"], seconds=1, interrupted=True)).splitlines()
    assert lines == [
        "1 frame, 0 faces, 1.0 s (1.0 frames/s)",
        "ms per frame: read 1.00",
        "2 frames had more faces than the model's limits: export it with higher --top-k and --max-detections",
        "2 images could not be read or written",
        "interrupted: everything up to here was written",
    ]
    assert "1 image could" in str(Summary(failures=["a"]))
    assert "1 frame had more" in str(Summary(truncated=1))


def test_the_closing_lines_of_videos() -> None:
    one = SourceReport("a.mp4", decoded=8, frames=8, detected=4, seconds=2, damaged=1)
    two = SourceReport("b.mp4", decoded=5, frames=2, detected=2, dropped=3, reconnects=1, damaged=2, seconds=4,
                       error=VideoError("gone"))  # fmt: skip
    timer = _timer(read=1000, network=3000)
    summary = Summary(timer, 10, 6, 7, failures=["gone"], sources=[one, two], seconds=2)
    assert str(summary).splitlines() == [
        "10 frames (6 through the network), 7 faces, 2.0 s (5.0 frames/s)",
        "ms per frame: read 100.00, network 300.00; sum of stages 400.00, wall 200.00: overlap 2.00x",
        "a.mp4: 8 decoded, 4 detected, 0 dropped, 0 reconnects, 1 damaged, 4.0 frames/s",
        "b.mp4: 5 decoded, 2 detected, 3 dropped, 1 reconnects, 2 damaged, 0.5 frames/s, failed",
        "3 damaged parts of the video passed over",
        "1 source could not be read or written",
    ]
    alone = replace(one, damaged=0)
    assert len(str(Summary(timer, 8, 8, 0, sources=[alone], seconds=2)).splitlines()) == 2
    for changes in ({"dropped": 1}, {"reconnects": 1}):  # a camera's losses are told though it is alone
        assert "a.mp4: " in str(Summary(timer, 8, 8, 0, sources=[replace(alone, **changes)], seconds=2))
    assert "1 damaged part of the video passed over" in str(Summary(sources=[one]))
    # stages overlap only where they take longer than the frame, and a camera sets the pace
    assert "overlap 1.00x" in str(Summary(_timer(read=2000), 10, 10, sources=[alone], seconds=2))
    assert "overlap" not in str(Summary(_timer(read=1999), 10, 10, sources=[alone], seconds=2))
    assert "overlap" not in str(Summary(_timer(read=9000, **{WAIT: 1}), 10, 10, sources=[alone], seconds=2))
    assert "overlap" not in str(Summary(timer, 0, 0, sources=[alone], seconds=2))


@pytest.mark.parametrize("to_stdout", [True, False])
def test_the_closing_lines_make_way_for_json(
    to_stdout: bool, detector: HandmadeDetector, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(photos), "--model", "m.onnx", "--json", "-" if to_stdout else "j.json"]) == 0
    out, err = capsys.readouterr()
    assert ("3 frames, 11 faces" in err, "3 frames, 11 faces" in out) == (to_stdout, not to_stdout)
    lines = [json.loads(line) for line in out.splitlines()] if to_stdout else _lines("j.json")
    assert [len(line["faces"]) for line in lines] == [1, 2, 8]


# images


def test_what_is_written_of_images(detector: HandmadeDetector, photos: Path) -> None:
    summary = detect(DetectOptions("photos", MODEL, out=Path("out"), json="new/j.json"))
    assert (summary.frames, summary.detected, summary.faces, summary.truncated) == (3, 3, 11, 1)
    assert (summary.failures, summary.sources, summary.interrupted) == ([], [], False)
    assert summary.seconds > 0
    assert list(summary.timer.total_ms) == ["read", "network", "results", "draw", "write"]
    records = _lines("new/j.json")
    assert [record["source"] for record in records] == ["photos/a.png", "photos/b/c.bmp", "photos/d.PNG"]
    assert [record["truncated"] for record in records] == [False, False, True]
    assert sorted(str(path) for path in Path("out").rglob("*.*")) == ["out/a.png", "out/b/c.bmp.png", "out/d.PNG"]
    frame = read_image(photos / "b" / "c.bmp")
    expected = draw_detections(frame, HandmadeDetector().detect(frame))
    np.testing.assert_array_equal(read_image("out/b/c.bmp.png"), expected)
    assert (expected != frame).any()


def test_nothing_is_drawn_unless_asked_for(
    detector: HandmadeDetector, photos: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "draw_detections", lambda *args, **options: pytest.fail("drawn"))
    before = sorted(Path().rglob("*"))
    assert "draw" not in detect(DetectOptions(str(photos), MODEL)).timer.total_ms
    detector._closed = detector._freed = False
    assert "draw" not in detect(DetectOptions(str(clip), MODEL)).timer.total_ms
    assert sorted(Path().rglob("*")) == before


def test_lines_come_one_by_one(detector: HandmadeDetector, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads them wants each when it is there, and names as they are."""
    (photos / "a.png").rename(photos / "日本.png")
    seen: list[str] = []

    class Pipe(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Pipe())
    detect(DetectOptions(str(photos), MODEL, json="-"))
    assert [text.count("\n") for text in seen[:3]] == [1, 2, 3]
    assert "日本.png" in seen[2]


@pytest.mark.parametrize("error", [FrameError("too large"), ImageError("broken"), OutputError("no room")])
def test_one_bad_image_of_several_is_told_and_passed_over(
    error: Exception, detector: HandmadeDetector, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(lane: HandmadeLane) -> None:
        if detector.calls[-1] == [2]:
            raise error

    detector.on_run = fail
    assert main([str(photos), "--model", "m.onnx", "--json", "j.json", "--out", "out"]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"error: {error}"]
    assert "1 image could not be read or written" in out
    assert [record.get("error") for record in _lines("j.json")] == [None, str(error), None]
    assert _lines("j.json")[1] == {"source": str(photos / "b" / "c.bmp"), "error": str(error)}
    detector._closed = detector._freed = False
    with pytest.raises(type(error), match=str(error)):  # alone, it ends the command
        detect(DetectOptions(str(photos / "b" / "c.bmp"), MODEL, json="k.json"))
    assert not Path("k.json").exists()


def test_an_image_that_is_alone_in_its_folder_is_one_of_several(
    detector: HandmadeDetector, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "one").mkdir()
    (here / "one" / "x.png").write_bytes(b"no image")
    assert main(["one", "--model", "m.onnx", "--json", "j.json"]) == 1
    assert "error" in _lines("j.json")[0]
    assert "x.png" in capsys.readouterr().err


def test_what_a_damaged_model_says_is_never_passed_over(detector: HandmadeDetector, photos: Path) -> None:
    def fail(lane: HandmadeLane) -> None:
        raise NonFiniteError("NaN")

    detector.on_run = fail
    with pytest.raises(NonFiniteError):
        detect(DetectOptions(str(photos), MODEL, json="j.json"))
    assert not Path("j.json").exists()


def test_an_interrupt_keeps_the_images_before(
    detector: HandmadeDetector, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(lane: HandmadeLane) -> None:
        if detector.calls[-1] == [2]:
            raise KeyboardInterrupt

    detector.on_run = interrupt
    assert main([str(photos), "--model", "m.onnx", "--json", "j.json", "--out", "out"]) == 130
    assert "interrupted: everything up to here was written" in capsys.readouterr().out
    assert [len(record["faces"]) for record in _lines("j.json")] == [1]
    assert [path.name for path in Path("out").iterdir()] == ["a.png"]


def test_strict_is_content_where_everything_was_taken(detector: HandmadeDetector, photos: Path) -> None:
    (photos / "d.PNG").unlink()  # as many faces as the model's limit
    assert main(["photos", "--model", "m.onnx", "--strict"]) == 0


@pytest.mark.parametrize("left_out", ["pages", "faces", "damage", "a folder"])
def test_whatever_was_left_out_troubles_strict(left_out: str, detector: HandmadeDetector, photos: Path) -> None:
    """Each alone, and nothing else does."""
    source = "photos"
    (photos / "d.PNG").unlink()
    if left_out == "pages":
        pages = [Image.fromarray(frame_of(faces, (40, 60))) for faces in (3, 5)]
        pages[0].save(photos / "pages.tif", save_all=True, append_images=pages[1:])
    elif left_out == "faces":
        write_image(photos / "crowd.png", frame_of(9))
    elif left_out == "damage":
        with VideoWriter(photos / "clip.mkv", 10) as writer:
            for number in range(60):
                writer.write(frame_of(number, (64, 64)))
        content = (photos / "clip.mkv").read_bytes()
        (photos / "clip.mkv").write_bytes(content[: len(content) // 2])
    else:
        source = "photos/*"
    assert main([source, "--model", "m.onnx"]) == 0
    detector._closed = detector._freed = False
    assert main([source, "--model", "m.onnx", "--strict"]) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_what_was_not_taken_is_said_at_the_end(
    strict: bool, detector: HandmadeDetector, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("notes.txt", "b/more.dat"):
        (photos / name).write_text("neither")
    pages = [Image.fromarray(frame_of(faces, (40, 60))) for faces in (3, 5)]
    pages[0].save(photos / "animated.gif", save_all=True, append_images=pages[1:])
    assert main(["photos", "--model", "m.onnx", "--json", "j.json", *["--strict"] * strict]) == strict
    lines = capsys.readouterr().out.splitlines()
    assert "2 files not taken, neither image nor video: photos/b/more.dat, photos/notes.txt" in lines
    assert "1 image of several pictures, of which the first was taken: photos/animated.gif" in lines
    assert [len(record["faces"]) for record in _lines("j.json")] == [1, 3, 2, 8]


def test_names_may_hold_anything(detector: HandmadeDetector, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a\nb.png", "face \U0001f600.png", "ñ [1] *.png", "-x.png"]
    for name in names:
        write_image(here / "odd" / name, frame_of(2))
    assert main(["odd", "--model", "m.onnx", "--json", "j.json", "--out", "out"]) == 0
    assert sorted(record["source"] for record in _lines("j.json")) == sorted(f"odd/{name}" for name in names)
    assert sorted(os.listdir("out")) == sorted(names)


def test_a_folder_of_images_and_videos_gives_both(
    detector: HandmadeDetector, photos: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip.rename(photos / "b" / "clip.mkv")
    assert main(["photos", "--model", "m.onnx", "--json", "j.json", "--out", "out"]) == 0
    records = _lines("j.json")
    assert [record["source"] for record in records[:3]] == ["photos/a.png", "photos/b/c.bmp", "photos/d.PNG"]
    assert [record["frame"] for record in records[3:]] == list(range(6))
    assert {record["source"] for record in records[3:]} == {"photos/b/clip.mkv"}
    written = sorted(str(path) for path in Path("out").rglob("*.*"))
    assert written == ["out/a.png", "out/b/c.bmp.png", "out/b/clip.mp4", "out/d.PNG"]
    said = capsys.readouterr().out
    assert "9 frames" in said
    assert said.endswith("\nwrote out, j.json\n")


def test_images_that_are_interrupted_leave_the_videos(detector: HandmadeDetector, photos: Path, clip: Path) -> None:
    def interrupt(lane: HandmadeLane) -> None:
        raise KeyboardInterrupt

    detector.on_run = interrupt
    summary = detect(DetectOptions(("photos", "clip.mp4"), MODEL))
    assert (summary.interrupted, summary.sources) == (True, [])


# videos


def test_videos_of_a_folder_run_some_at_a_time_and_what_is_live_beside_them(
    detector: HandmadeDetector, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: dict[str, bool] = {}
    run = module.run_pipeline

    def seen(detector: Any, given: Any, *args: Any, **options: Any) -> Any:
        jobs.update((job.name, job.waits) for job in given)
        return run(detector, given, *args, **options)

    monkeypatch.setattr(module, "run_pipeline", seen)
    for name in ("a", "b", "c"):
        (clip.parent / "clips").mkdir(exist_ok=True)
        shutil.copy(clip, clip.parent / "clips" / name)
    summary = detect(DetectOptions(("clips", "97"), MODEL, json="j.json", out=Path("out")))
    assert jobs == {"clips/a": True, "clips/b": True, "clips/c": True, "camera 97": False}
    assert (summary.frames, len(summary.sources), len(summary.failures)) == (18, 4, 1)
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.mp4", "b.mp4", "c.mp4"]


class _Camera(Source):
    """It gives a frame, and others as soon as `more` is set."""

    live, rate = True, 25.0

    def __init__(self) -> None:
        super().__init__("camera 97")
        self.begun, self.more = threading.Event(), threading.Event()

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[TimedFrame]:
        self.begun.set()
        yield TimedFrame(frame_of(4), 0.0)
        assert self.more.wait(20)
        yield TimedFrame(frame_of(4), 0.1)


def test_what_is_live_does_not_wait_for_images(
    detector: HandmadeDetector, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    camera = _Camera()
    monkeypatch.setattr(module, "open_source", lambda source: camera)

    def wait(lane: HandmadeLane) -> None:
        if detector.calls[-1] != [4]:
            assert camera.begun.wait(20)
        camera.more.set()

    detector.on_run = wait
    summary = detect(DetectOptions(("photos", "97"), MODEL, json="j.json", out=Path("out")))
    assert (summary.frames, summary.faces, summary.interrupted) == (5, 1 + 2 + 8 + 4 + 4, False)
    assert set(summary.timer.total_ms) >= {"read", "network", "draw", "write"}
    for record in _lines("j.json"):  # what is live has the time of the clock
        assert ("utc" in record) == (record["source"] == "camera 97")
        if "utc" in record:
            age = datetime.now(timezone.utc) - datetime.fromisoformat(record["utc"])
            assert abs(age.total_seconds()) < 60
    assert sorted(record["source"] for record in _lines("j.json")) == [
        "camera 97", "camera 97", "photos/a.png", "photos/b/c.bmp", "photos/d.PNG",
    ]  # fmt: skip


def test_ctrl_c_ends_the_images_beside_what_is_live(
    detector: HandmadeDetector, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, made = threading.Event(), list[Summary]()

    class Seen(Summary):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            made.append(self)

    def interrupted(*_: Any, **__: Any) -> Any:
        assert begun.wait(20)
        raise KeyboardInterrupt

    def wait(lane: HandmadeLane) -> None:
        begun.set()
        in_time(lambda: [time.sleep(0.01) for _ in iter(lambda: made[1].interrupted, True)])

    detector.on_run = wait
    monkeypatch.setattr(module, "Summary", Seen)
    monkeypatch.setattr(module, "_run_videos", interrupted)
    summary = detect(DetectOptions(("photos", "97"), MODEL, json="j.json"))
    assert summary.interrupted
    assert [record["source"] for record in _lines("j.json")] == ["photos/a.png"]  # the one that was under way


def test_pixels_keep_their_shape(detector: HandmadeDetector, here: Path) -> None:
    with VideoWriter("pal.mkv", 25, Fraction(16, 11)) as writer:
        writer.write(frame_of(2, (32, 64)))
    detect(DetectOptions("pal.mkv", MODEL, out=Path("out.mp4")))
    with VideoFile("out.mp4") as video:
        list(video)
        assert video.pixel_aspect == Fraction(16, 11)


def test_a_photo_at_an_address(detector: HandmadeDetector, here: Path, site: Site) -> None:
    photo = cv2.imencode(".png", frame_of(3))[1].tobytes()
    site.answer = lambda path: (200, {}, photo)
    address = f"http://user:word@{site.address}/photo.jpg"
    summary = detect(DetectOptions(address, MODEL, out=Path("out.png"), json="j.json"))
    assert (summary.frames, summary.faces, summary.sources) == (1, 3, [])
    (record,) = _lines("j.json")
    assert record["source"] == f"http://***@{site.address}/photo.jpg"
    assert read_image("out.png").shape == (32, 64, 3)


def test_what_is_written_of_videos(detector: HandmadeDetector, clip: Path) -> None:
    detector.change = lambda outputs: [np.full_like(outputs[0], 8), *outputs[1:]]
    summary = detect(DetectOptions(str(clip), MODEL, out=Path("out.mkv"), json="j.json"))
    assert (summary.frames, summary.detected, summary.faces, summary.truncated) == (6, 6, 48, 6)
    (report,) = summary.sources
    assert (report.name, report.decoded, report.complete) == (str(clip), 6, True)
    assert {"read", "network", "results", "draw", "write", "encode"} <= summary.timer.total_ms.keys()
    records = _lines("j.json")
    assert [(record["source"], record["frame"], record["time_s"]) for record in records] == [
        (str(clip), index, index / 10) for index in range(6)
    ]
    assert all((record["width"], record["height"]) == (64, 32) for record in records)
    with VideoFile(Path("out.mkv")) as drawn:
        assert drawn.rate == 10
        assert len(list(drawn)) == 6


def test_an_interrupted_video_is_said_to_be(
    detector: HandmadeDetector, clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = module.run_pipeline
    monkeypatch.setattr(module, "run_pipeline", lambda *args, **more: replace(real(*args, **more), interrupted=True))
    assert main([str(clip), "--model", "m.onnx", "--json", "j.json"]) == 130
    assert "interrupted" in capsys.readouterr().out
    assert len(_lines("j.json")) == 6


def test_a_second_interrupt_gives_videos_up(
    detector: HandmadeDetector, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_pipeline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detect(DetectOptions(str(clip), MODEL, json="j.json"))
    assert not Path("j.json").exists()


class _Breaks:
    """A video whose reading fails after some frames."""

    def __init__(self, frames: int) -> None:
        self.name, self.live, self.rate, self.frame_count, self.damaged, self.reconnects = "v", False, 10, 9, 0, 0
        self.pixel_aspect = Fraction(1)
        self._frames = frames

    def __enter__(self) -> _Breaks:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __iter__(self) -> Any:
        for index in range(self._frames):
            yield TimedFrame(frame_of(2), index / 10)
        raise VideoError("the disk is gone")

    def stop(self) -> None:
        pass


@pytest.mark.parametrize("frames", [0, 3])
def test_a_video_that_breaks_keeps_what_came_before(
    frames: int, detector: HandmadeDetector, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_source", lambda source: _Breaks(frames))
    with pytest.raises(VideoError, match="the disk is gone"):
        detect(DetectOptions(str(clip), MODEL, out=Path("out.mp4"), json="j.json"))
    assert Path("j.json").exists() == Path("out.mp4").exists() == bool(frames)
    if frames:
        assert [record["frame"] for record in _lines("j.json")] == [0, 1, 2]


def test_each_failure_of_several_videos_is_told_once(
    detector: HandmadeDetector, clip: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.mp4", "y.mp4"):
        (here / name).write_text("this is text")
    assert main(["x.mp4", "clip.mp4", "y.mp4", "--model", "m.onnx", "--json", "j.json"]) == 1
    out, err = capsys.readouterr()
    told = sorted(line.partition(": not")[0] for line in err.splitlines() if line.startswith("error"))
    assert told == ["error: x.mp4", "error: y.mp4"]
    assert "2 sources could not be read or written" in out
    errors = [record for record in _lines("j.json") if "error" in record]
    assert sorted(record["source"] for record in errors) == ["x.mp4", "y.mp4"]
    assert "6 frames, " in out


def test_frames_that_show_no_progress_have_no_total(
    detector: HandmadeDetector, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    class Bar(module.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(module, "tqdm", Bar)
    detect(DetectOptions(str(clip), MODEL))
    assert [(bar.n, bar.total) for bar in bars] == [(6, 6)]


# lines that cannot be written


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("source", ["photos", "clip.mp4"])
def test_a_full_disk_is_named_for_what_it_is(
    source: str, detector: HandmadeDetector, photos: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a video is written meanwhile, which would take the error for its own."""
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", full)
    options = DetectOptions(source, MODEL, Path("out.mp4" if source == "clip.mp4" else "out"), json="-")
    with pytest.raises(OSError, match="No space left") as caught:
        detect(options)
    monkeypatch.undo()
    with suppress(OSError):
        full.close()
    assert type(caught.value) is OSError
    assert not list(Path().glob("*out.*"))


def test_lines_of_several_threads_do_not_mix() -> None:
    class Slow(io.StringIO):
        inside = 0

        def write(self, text: str) -> int:
            Slow.inside += 1
            assert Slow.inside == 1
            threading.Event().wait(0.001)
            written = super().write(text)
            Slow.inside -= 1
            return written

    lines = Slow()
    sink = module._Sink(DetectOptions("a", MODEL), lines, False)
    threads = [
        threading.Thread(target=lambda n=number: [sink.write({"n": n}) for _ in range(5)]) for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(json.loads(line)["n"] for line in lines.getvalue().splitlines()) == sorted([0, 1, 2, 3] * 5)
    module._Sink(DetectOptions("a", MODEL), None, False).write({"n": 1})


# windows


class Window:
    """What would be seen, where there is no display; the keys are pressed one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *keys: int) -> None:
        self.shown: list[tuple[str, Frame]] = []
        self.waits: list[int] = []
        self._keys = iter(keys)
        monkeypatch.setattr(module, "require_display", lambda: None)
        monkeypatch.setattr(module.cv2, "imshow", lambda name, image: self.shown.append((name, image.copy())))
        monkeypatch.setattr(module.cv2, "waitKey", self._wait)

    def _wait(self, wait_ms: int) -> int:
        self.waits.append(wait_ms)
        return next(self._keys, -1)


def test_one_image_is_shown_until_a_key_is_pressed(
    detector: HandmadeDetector, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = Window(monkeypatch)
    path = photos / "a.png"
    detect(DetectOptions(str(path), MODEL, show=True))
    assert window.waits == [0]
    ((name, image),) = window.shown
    assert name == "faces (q ends)"
    np.testing.assert_array_equal(image, draw_detections(read_image(path), HandmadeDetector().detect(read_image(path))))


@pytest.mark.parametrize("key", [ord("q"), 27, ord("q") | 0x100000])
def test_q_or_esc_ends_several_images_in_good_order(
    key: int, detector: HandmadeDetector, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = Window(monkeypatch, ord("x"), key)
    summary = detect(DetectOptions(str(photos), MODEL, json="j.json", show=True))
    assert (summary.frames, summary.interrupted, window.waits) == (2, False, [1, 1])
    assert [len(record["faces"]) for record in _lines("j.json")] == [1, 2]


def test_videos_are_shown_each_in_its_window_until_q(
    detector: HandmadeDetector, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = clip.with_name("second.mp4")
    second.write_bytes(clip.read_bytes())
    window = Window(monkeypatch)
    summary = detect(DetectOptions((str(clip), str(second)), MODEL, show=True))
    assert summary.frames == 12
    assert {name for name, _ in window.shown} <= {f"{clip} (q ends)", f"{second} (q ends)"}
    assert window.shown  # the last frame of each at least, unless a newer one took its place
    assert set(window.waits) == {1}
    window = Window(monkeypatch, *[ord("q")] * 99)
    detector._closed = detector._freed = False
    summary = detect(DetectOptions(str(clip), MODEL, json="j.json", show=True))
    assert not summary.interrupted
    assert len(_lines("j.json")) == summary.detected <= 6


def test_a_window_needs_a_display_before_anything_is_loaded(
    detector: HandmadeDetector, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(VideoError, match="--show needs a display"):
        detect(DetectOptions(str(photos), MODEL, show=True))
    assert detector.asked == []  # type: ignore[attr-defined]


def test_where_lines_go(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        assert module._open_json(None, stack) is None
        assert module._open_json("-", stack) is sys.stdout
        lines = module._open_json("new/ü.json", stack)
        assert lines
        lines.write("日本\n")
        assert not Path("new/ü.json").exists()  # whole or not at all
    assert Path("new/ü.json").read_text(encoding="utf-8") == "日本\n"
    assert os.listdir("new") == ["ü.json"]
    with open(os.devnull, "w") as closed, ExitStack() as stack:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(OutputError, match="--json -: standard output is closed; give a file"):
            module._open_json("-", stack)


def test_lines_are_not_kept_of_a_run_that_fails(detector: HandmadeDetector, photos: Path) -> None:
    def fail(lane: HandmadeLane) -> None:
        raise SpecError("mine")

    detector.on_run = fail
    with pytest.raises(SpecError, match="mine"):
        detect(DetectOptions(str(photos), MODEL, out=Path("out"), json="j.json"))
    assert not Path("j.json").exists()
    assert not list(Path().glob(".j.*"))
    assert detector.lanes[0].closed
