from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from tqdm import tqdm

from facespec.detections import Detections
from facespec.errors import (
    ClosedError,
    DataError,
    ImageError,
    MissingPackageError,
    OutputError,
    RetinaFaceError,
    SpecError,
)
from facespec.images import write_image
from facespec.letterbox import Frame
from tests.conftest import ROOT
from tests.trt_runtime.handmade import HandmadeDetector, HandmadeLane, frame_of
from trt_runtime import measure
from trt_runtime.benchmark import (
    CPU_BACKENDS,
    BenchmarkOptions,
    Frames,
    Measurement,
    Setting,
    _mosaic,
    _names,
    _pipelined,
    benchmark,
    load_frames,
    main,
    open_detectors,
    parse_arguments,
)
from trt_runtime.detector import RetinaFaceDetector
from trt_runtime.measure import Latency, Ratio, StageTimer

Run = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ("--repeats", 6, "--warm-up", 1, "--threads", 1, "--backend", "onnxruntime")


def test_frames_of_photographs_hold_the_faces_they_promise(static_onnx: Path, photographs: dict[str, Frame]) -> None:
    from trt_runtime import OrtRetinaFace

    frames = load_frames(None)
    assert {image.shape for image in frames.images} == {(720, 1280, 3)}
    detector = OrtRetinaFace(static_onnx, threads=1)
    assert [len(detector.detect(image)) for image in frames.images] == [1, 2, 3, 4, 6, 8]
    assert "1 to 8 faces" in frames.what
    batches = frames.batches(4)
    assert len(batches) == len(frames.images)
    assert all(len(batch) == 4 for batch in batches)
    assert len({id(batch[0]) for batch in batches}) > 1


def test_frames_of_a_folder_are_bounded_and_spread(tmp_path: Path) -> None:
    for value in range(5):
        write_image(tmp_path / f"{value}.png", np.full((4, 6 + value, 3), value, np.uint8))
    frames = load_frames(tmp_path, 3)
    assert [int(image[0, 0, 0]) for image in frames.images] == [0, 2, 4]
    assert [image.shape[1] for image in frames.images] == [6, 8, 10]
    assert "3 of 5 images" in frames.what


def test_without_photographs_there_are_no_faces(monkeypatch: pytest.MonkeyPatch, static_onnx: Path) -> None:
    from trt_runtime import OrtRetinaFace

    monkeypatch.setattr("trt_runtime.benchmark.sample_frames", dict)
    frames = load_frames(None)
    assert "no faces" in frames.what
    detector = OrtRetinaFace(static_onnx, threads=1)
    assert not any(len(detector.detect(image)) for image in frames.images)


def test_a_run_reports_every_figure(command: Run, static_onnx: Path, tmp_path: Path) -> None:
    out = ("--json", "out/b.json", "--plot", "out/b.png")
    result = command("trt_runtime.benchmark", "--model", static_onnx, "--batch", "1,3", *QUICK, *out)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert any("1 to 8 faces" in line for line in lines)
    record = json.loads((tmp_path / "out" / "b.json").read_text())
    assert record["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert record["command"].startswith("python -m trt_runtime.benchmark --model")
    assert {"date", "versions", "load_average", "frames", "repeats", "warm_up"} <= record.keys()
    assert not record["interrupted"]
    one, three = record["results"]
    assert (one["batch"], three["batch"]) == (1, 3)
    for row in (one, three):
        total = row["total_ms"]
        assert row["size_hw"] == [320, 320]
        assert row["calls"] == 6
        assert row["detector"]["backend"] == "onnxruntime"
        assert list(row["stages_ms"]) == ["letterbox", "network", "results"]
        assert 0 < total["min"] <= total["p50"] <= total["p95"] <= total["p99"]
        assert row["frames_per_s"] == pytest.approx(row["batch"] * 1e3 / total["mean"], rel=1e-3)
        assert row["frames_per_s_pipelined"] > 0
        assert row["faces_per_frame"] == {"mean": 4, "max": 8}
    printed = [[float(text) for text in line.split()[2:]] for line in lines if line.startswith("whole call")]
    recorded = [list(row["total_ms"].values()) for row in (one, three)]
    assert np.allclose(printed, recorded, rtol=0, atol=1e-3)
    picture = cv2.imread(str(tmp_path / "out" / "b.png"))
    assert picture.shape[1] > 600
    assert np.ptp(picture) == 255


def test_a_comparison_gives_ratios(command: Run, static_onnx: Path, tmp_path: Path) -> None:
    result = command("trt_runtime.benchmark", "--compare", static_onnx, static_onnx, *QUICK, "--json", "c.json")
    assert result.returncode == 0, result.stderr
    first, second = json.loads((tmp_path / "c.json").read_text())["results"]
    assert (first["name"], second["name"]) == ("model.onnx (1)", "model.onnx (2)")
    assert "times_as_fast_as_first" not in first
    ratio = second["times_as_fast_as_first"]
    assert ratio["low"] <= ratio["times"] <= ratio["high"]
    assert ratio["times"] == pytest.approx(first["total_ms"]["p50"] / second["total_ms"]["p50"], rel=1e-3)
    assert "times as fast as model.onnx (1)" in result.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repeats": 0}, "--repeats"),
        ({"warm_up": -1}, "--warm-up"),
        ({"batches": (1, 0)}, "--batch 0"),
        ({"batches": (4, 4)}, "different"),
        ({"depth": 65}, "--depth"),
        ({"plot": Path("x.jpg")}, ".png"),
    ],
)
def test_impossible_options_are_refused(options: dict, expected: str) -> None:
    with pytest.raises((SpecError, OutputError), match=expected):
        BenchmarkOptions(models=(Path("m.onnx"),), **options)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        load_frames(tmp_path)
    with pytest.raises(DataError, match="folder"):
        load_frames(tmp_path / "none")


def test_errors_take_one_line(refused: Callable[..., str], static_onnx: Path) -> None:
    module, model = "trt_runtime.benchmark", ("--model", static_onnx)
    assert "320x320 only, not 640x640" in refused(module, *model, "--size", "640x640")
    assert "two models" in refused(module, "--compare", static_onnx)


def test_what_the_command_refuses(
    static_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(static_onnx)]
    monkeypatch.chdir(tmp_path)
    cases = [
        ([*model, "--batch", "99999999999999999999"], "--batch 999999999: expected a number from 1 to 1024"),
        ([*model, "--json", str(static_onnx)], "is a file that is read"),
        ([*model, "--plot", "p.png", "--json", "p.png"], "--plot p.png is the file of --json, too"),
        ([*model, "--backend", "nonsense"], "backend 'nonsense' is not one of"),
        ([*model, "--backend", "onnxruntime,"], "backend '' is not one of"),
        ([*model, "--backend", "onnxruntime,onnxruntime"], "--backend: expected one value or several different ones"),
        ([*model, "--size", "320,320"], "--size: expected one value or several different ones"),
        ([*model, "--on-device", "--backend", "onnxruntime"],
         "--on-device: model.onnx runs on the CPU, where there is no other place for frames"),
        ([*model, "--device", "cuda:1"], "--device is for engines"),
        (["--model", "none.onnx"], "no such model file"),
        ([*model, "--frames", "none"], "--frames none: expected a folder of images, there is none of this name"),
    ]  # fmt: skip
    for arguments, words in cases:
        with pytest.raises(RetinaFaceError) as caught:
            main(arguments)
        assert words in str(caught.value)
    for arguments, words in (
        ([], "one of the arguments --model --compare is required"),
        ([*model, "--compare", "a", "b"], "not allowed with argument"),
        (["--compare", "a.onnx"], "--compare takes two models or more; --model measures one"),
        ([*model, "--batch", "1;4"], "--batch: '1;4': expected numbers separated by commas, for instance 1,4,8"),
        ([*model, "--batch", "1,"], "expected numbers separated by commas"),
        ([*model, "--batch", "\u0661"], "expected numbers separated by commas"),
        ([*model, "--batch=-1"], "expected numbers separated by commas"),
        ([*model, "--size", "320x320,"], "--size: size '' is not HEIGHTxWIDTH"),
        ([*model, "--device", "1"], "--device: device '1' is not one of auto, cpu, cuda and cuda:N"),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_figures_are_printed_alone(command: Run, static_onnx: Path, tmp_path: Path) -> None:
    result = command("trt_runtime.benchmark", "--model", static_onnx, *QUICK, "--json", "-")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert [row["batch"] for row in record["results"]] == [1]
    assert record["command"].endswith("--json -")
    assert "whole call" in result.stderr
    assert not (tmp_path / "-").exists()


def test_an_interrupt_keeps_what_is_complete(static_onnx: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "trt_runtime.benchmark", "--model", static_onnx, "--json", "i.json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    arguments = [*map(str, (*line, *QUICK)), "--batch", "1,300"]  # the second setting takes long
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
    ) as process:  # fmt: skip
        assert process.stdout
        for text in process.stdout:
            if text.startswith("frames a second"):
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted: 1 setting" in errors
    record = json.loads((tmp_path / "i.json").read_text())
    assert record["interrupted"]
    assert [row["batch"] for row in record["results"]] == [1]


def test_an_engine_that_would_split_a_batch_is_refused(static_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine runs here, so a detector of the CPU says it is one."""
    from trt_runtime import OrtRetinaFace

    monkeypatch.setattr(OrtRetinaFace, "backend", "tensorrt")
    monkeypatch.setattr(OrtRetinaFace, "max_batch", 4, raising=False)
    with pytest.raises(SpecError, match=r"--batch 8: model\.onnx was built for 4 frames"):
        main(["--model", str(static_onnx), "--batch", "1,8", "--backend", "onnxruntime"])


# what is measured, of detectors that do as they are told


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses are written down, and not made."""
    pauses: list[float] = []
    monkeypatch.setattr(measure.time, "sleep", pauses.append)
    return pauses


def _options(**changes: Any) -> BenchmarkOptions:
    return BenchmarkOptions(models=(Path("m.onnx"),), **changes)


FRAMES = Frames([frame_of(value) for value in (1, 2, 6)], "three frames")


def test_every_call_takes_the_next_frames_and_all_take_turns(unhurried: list[float]) -> None:
    detector = HandmadeDetector(size=(32, 64))
    detector.max_batch = 9
    options = _options(repeats=2, warm_up=1, batches=(2,), depth=1)
    (setting,) = benchmark([{"m": detector}], FRAMES, options)
    first, second, third = [1, 2], [6, 1], [2, 6]  # as many batches as frames, each beginning with another frame
    assert [[int(frame.flat[0]) for frame in two] for two in FRAMES.batches(2)] == [first, second, third]
    warm_up, turns, pipeline = [first], [first, first, second, second], [first, second] * 2
    assert detector.calls == [*warm_up, *turns, *pipeline, [1], [2], [6]]  # at last the faces of each frame
    assert unhurried == []  # no one to wait for
    (found,) = setting.measurements
    assert setting.ratios == []
    assert found.faces == [1, 2, 6]
    assert (found.name, found.batch, found.depth, found.size_hw) == ("m", 2, 1, (32, 64))
    assert found.environment == {"backend": "handmade"}
    assert found.total_ms.shape == (2, 1)
    assert {stage: samples.shape for stage, samples in found.stages_ms.items()} == {
        "network": (2, 1), "results": (2, 1),
    }  # fmt: skip


def test_whole_calls_have_no_timer_and_the_others_a_fine_one(unhurried: list[float]) -> None:
    timers: list[StageTimer | None] = []

    class Watched(HandmadeDetector):
        def _run(self, frames: Any, boxes: Any, timer: StageTimer | None) -> list[Detections]:
            timers.append(timer)
            return super()._run(frames, boxes, timer)

    list(benchmark([{"m": Watched()}], FRAMES, _options(repeats=25, warm_up=3)))
    assert timers[:3] == [None] * 3
    measured = timers[3 : 3 + 50]
    assert [timer is None for timer in measured[:2]] == [True, False]
    given = [timer for timer in timers if timer is not None]
    assert len(given) == len({id(timer) for timer in given}) == 25
    assert all(timer.fine for timer in given)


def test_stages_are_those_of_their_own_calls(unhurried: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock moves by the number of the call, so that each sample tells which call it is of."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    detector = HandmadeDetector()

    def run(lane: HandmadeLane) -> None:
        now[0] += lane.runs / 1024

    detector.on_run = run
    settings = benchmark([{"m": detector}], FRAMES, _options(repeats=2, warm_up=1, depth=1, batches=(1, 3)))
    (found,) = next(settings).measurements
    first, second = np.array([[2], [5]]), np.array([[3], [4]])  # by turns: whole, staged, staged, whole
    np.testing.assert_allclose(found.total_ms, first * 1e3 / 1024)
    np.testing.assert_allclose(found.stages_ms["network"], second * 1e3 / 1024)
    np.testing.assert_array_equal(found.stages_ms["results"], [[0], [0]])
    # runs 6 and 7 warm the pipeline up; 8 and 9 are its 2 calls
    assert found.pipelined_fps == pytest.approx(2 / (17 / 1024))
    (found,) = next(settings).measurements  # of three frames a call; 20 and 21 are the calls
    assert (found.batch, len(found.total_ms)) == (3, 2)
    assert found.pipelined_fps == pytest.approx(3 * 2 / (41 / 1024))


@pytest.mark.parametrize("depth", [1, 3])
def test_frames_a_second_of_a_batch_with_calls_under_way(
    depth: int, unhurried: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    detector = HandmadeDetector()
    meet = threading.Barrier(depth, action=lambda: now.__setitem__(0, now[0] + 0.25))
    detector.on_run = lambda lane: meet.wait(20) if detector.calls[-1:] and streaming[0] else None
    streaming = [False]
    stream = detector.stream

    def streamed(count: int = 0) -> Any:
        assert count == depth
        streaming[0] = True
        return stream(count)

    detector.stream = streamed  # type: ignore[method-assign]
    found = _pipelined(detector, [[FRAMES.images[0]] * 2] * 3, 3 * depth, depth)
    assert len(detector.calls) == 5 * depth  # two rounds to warm up, three that count
    assert found == pytest.approx(3 * depth / 0.75)


def test_several_detectors_take_turns_with_pauses_and_get_ratios(unhurried: list[float]) -> None:
    detectors: dict[str, RetinaFaceDetector] = {name: HandmadeDetector() for name in "abc"}
    (setting,) = benchmark([detectors], FRAMES, _options(repeats=3, warm_up=1))
    assert unhurried == [0.1] * 3 * 6  # three rounds of a turn for each, whole and staged
    totals = [found.total_ms for found in setting.measurements]
    assert [found.name for found in setting.measurements] == ["a", "b", "c"]
    assert setting.ratios == [measure.speed_ratio(totals[0], totals[1]), measure.speed_ratio(totals[0], totals[2])]


def test_settings_come_size_by_size_and_batch_by_batch(unhurried: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr("trt_runtime.benchmark.tqdm", Bar)
    opened: list[dict[str, RetinaFaceDetector]] = [
        {"a": HandmadeDetector((32, 64)), "b": HandmadeDetector((32, 64))},
        {"a": HandmadeDetector((64, 64))},
    ]
    settings = list(benchmark(opened, FRAMES, _options(repeats=2, warm_up=3, batches=(1, 2))))
    assert [(s.measurements[0].size_hw, s.measurements[0].batch, len(s.measurements)) for s in settings] == [
        ((32, 64), 1, 2), ((32, 64), 2, 2), ((64, 64), 1, 1), ((64, 64), 2, 1),
    ]  # fmt: skip
    (bar,) = bars
    assert bar.n == bar.total == 3 * 2 * (3 + 3 * 2)


def test_figures_for_json() -> None:
    times = np.array([[1.0, 2.0], [3.0, 6.0]])
    found = Measurement(
        "m", {"backend": "b"}, (320, 640), 2, times, {"network": times / 2}, 123.456, 3, [0, 1, 1]
    )  # fmt: skip
    assert found.fps == pytest.approx(2e3 / 3)
    assert found.to_dict() == {
        "name": "m",
        "detector": {"backend": "b"},
        "size_hw": [320, 640],
        "batch": 2,
        "calls": 4,
        "total_ms": Latency.of(times).to_dict(),
        "stages_ms": {"network": Latency.of(times / 2).to_dict()},
        "frames_per_s": 666.67,
        "frames_per_s_pipelined": 123.46,
        "pipeline_depth": 3,
        "faces_per_frame": {"mean": 0.667, "max": 1},
    }
    assert dataclasses.replace(found, size_hw=640).to_dict()["size_hw"] == 640
    assert dataclasses.replace(found, size_hw=None).to_dict()["size_hw"] is None
    rows = Setting([found] * 3, [Ratio(1.23456, 1.1, 1.3), Ratio(1, 0.9, 1.1)]).to_dict()
    assert "times_as_fast_as_first" not in rows[0]
    assert [row["times_as_fast_as_first"] for row in rows[1:]] == [
        {"times": 1.2346, "low": 1.1, "high": 1.3, "difference": True},
        {"times": 1, "low": 0.9, "high": 1.1, "difference": False},
    ]


# options


def test_what_is_measured_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_arguments(["--model", "m.onnx"])
    assert options == _options()
    assert (options.backends, options.batches, options.sizes) == (("auto",), (1,), (None,))
    assert (options.repeats, options.warm_up, options.streams, options.stream_depth) == (200, 20, 1, 2)
    assert (options.threads, options.depth, options.device, options.on_device) == (None, None, "auto", False)
    assert (options.frames, options.json, options.plot) == (None, None, None)
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "32 are used" in text
    assert "(default: 200)" in text
    assert "auto, onnxruntime, openvino, tensorrt" in text


def test_every_option_reaches_its_place() -> None:
    line = (
        "--compare a.onnx b.onnx --batch 1,4,8 --size 320x640,480 --frames f --repeats 7 --warm-up 0 --threads 3 "
        "--streams 4 --depth 5 --backend onnxruntime,openvino --device cuda:2 --on-device --json j.json --plot p.SVG"
    )
    assert parse_arguments(line.split()) == BenchmarkOptions(
        models=(Path("a.onnx"), Path("b.onnx")),
        backends=("onnxruntime", "openvino"),
        batches=(1, 4, 8),
        sizes=((320, 640), 480),
        frames=Path("f"),
        repeats=7,
        warm_up=0,
        threads=3,
        streams=4,
        depth=5,
        device="cuda:2",
        on_device=True,
        json=Path("j.json"),
        plot=Path("p.SVG"),
    )


@pytest.mark.parametrize(
    ("name", "option", "least", "most"),
    [
        ("repeats", "--repeats", 1, 1_000_000),
        ("warm_up", "--warm-up", 0, 1_000_000),
        ("streams", "--streams", 1, 64),
        ("depth", "--depth", 1, 64),
        ("batches", "--batch", 1, 1024),
    ],
)
def test_numbers_have_bounds(name: str, option: str, least: int, most: int) -> None:
    def options(value: int) -> BenchmarkOptions:
        return _options(**{name: (value,) if name == "batches" else value})

    for value in (least, most):
        options(value)
    for value in (least - 1, most + 1):
        with pytest.raises(SpecError, match=rf"{option}.*: expected a number from {least} to {most}, got {value}"):
            options(value)


def test_the_depth_is_that_of_the_streams_unless_given() -> None:
    for streams, depth, expected in ((1, None, 2), (2, None, 2), (5, None, 5), (5, 1, 1), (1, 7, 7)):
        assert _options(streams=streams, depth=depth).stream_depth == expected
    for name in ("batches", "sizes", "backends"):
        with pytest.raises(SpecError, match="expected one value or several different ones"):
            _options(**{name: ()})


def test_names_are_as_long_as_it_takes() -> None:
    def names(*kinds: tuple[str, str]) -> list[str]:
        return _names([(Path(path), backend) for path, backend in kinds])

    assert names(("x/m.onnx", "auto")) == ["m.onnx"]
    assert names(("x/a.onnx", "auto"), ("x/b.onnx", "auto")) == ["a.onnx", "b.onnx"]
    assert names(("x/m.onnx", "auto"), ("y/m.onnx", "auto")) == ["x/m.onnx", "y/m.onnx"]
    assert names(("m.onnx", "a"), ("m.onnx", "b")) == ["m.onnx / a", "m.onnx / b"]
    assert names(("m.onnx", "a"), ("m.onnx", "a"), ("n.onnx", "a")) == ["m.onnx (1)", "m.onnx (2)", "n.onnx"]
    assert names(("m.onnx", "a"), ("m.onnx", "a"), ("m.onnx", "b")) == [
        "m.onnx / a (1)",
        "m.onnx / a (2)",
        "m.onnx / b",
    ]


def test_detectors_are_opened_with_what_was_asked_for_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, dict[str, Any]]] = []

    def load(path: Path, **options: Any) -> HandmadeDetector:
        asked.append((path, options))
        made.append(HandmadeDetector(options["size_hw"]))
        made[-1].max_batch = 8
        return made[-1]

    made: list[HandmadeDetector] = []
    monkeypatch.setattr("trt_runtime.benchmark.load_detector", load)
    options = BenchmarkOptions(
        models=(Path("a"), Path("b")), backends=("x", "y"), sizes=(320, None), batches=(1, 8), threads=3, streams=2,
        device=1,
    )  # fmt: skip
    with ExitStack() as stack:
        opened = open_detectors(options, stack)
        assert [list(detectors) for detectors in opened] == [["a / x", "a / y", "b / x", "b / y"]] * 2
        assert asked == [
            (Path(model), {"size_hw": size, "threads": 3, "streams": 2, "backend": backend, "device": 1,
                           "precision": "fp32"})
            for size in (320, None) for model in "ab" for backend in "xy"
        ]  # fmt: skip
        assert [detector for detectors in opened for detector in detectors.values()] == made
    for detector in made:
        with pytest.raises(ClosedError):
            detector.detect(frame_of(1))
    for batches in ((9,), (1, 9, 2)):
        with ExitStack() as stack, pytest.raises(SpecError, match="--batch 9: a / x was built for 8 frames at once"):
            open_detectors(dataclasses.replace(options, batches=batches), stack)
        with pytest.raises(ClosedError):
            made[-1].detect(frame_of(1))


def test_a_cpu_takes_batches_of_any_size(static_onnx: Path) -> None:
    for backend in CPU_BACKENDS:
        with ExitStack() as stack:
            options = BenchmarkOptions((static_onnx,), (backend,), batches=(64,), threads=1)
            ((detector,),) = (found.values() for found in open_detectors(options, stack))
            assert (detector.backend, detector.max_batch) == (backend, 1)


def test_frames_of_a_cpu_stay_where_they_are() -> None:
    assert FRAMES.of(HandmadeDetector(), True) is FRAMES


def test_frames_for_a_gpu_are_put_there_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu(HandmadeDetector):
        def to_device(self, image: Frame) -> tuple[str, int]:
            return "on the device", int(image.flat[0])

    monkeypatch.setattr("trt_runtime.benchmark.TRTRetinaFace", Gpu)
    assert FRAMES.of(Gpu(), False) is FRAMES
    moved = FRAMES.of(Gpu(), True)
    assert moved == Frames([("on the device", value) for value in (1, 2, 6)], "three frames")


def test_a_mosaic_has_a_photograph_in_each_cell() -> None:
    """Their middle pixels tell which is which; photographs come again when there are too few."""
    values = (40, 80, 120)
    frame = _mosaic([np.full((10, 10, 3), value, np.uint8) for value in values], 2, 4)
    assert frame.shape == (720, 1280, 3)
    assert [[int(frame[180 + 360 * row, 160 + 320 * column, 0]) for column in range(4)] for row in range(2)] == [
        [40, 80, 120, 40], [80, 120, 40, 80],
    ]  # fmt: skip
    assert (frame[330:360] == 0).all()  # a square in a cell of 360x320: black below
    uneven = _mosaic([np.full((10, 10, 3), 200, np.uint8)], 1, 3)
    assert (uneven[:, 426 * 3 :] == 0).all()


def test_frames_of_a_small_folder_are_all_used(tmp_path: Path) -> None:
    for value in range(2):
        write_image(tmp_path / f"{value}.png", np.full((4, 6, 3), value, np.uint8))
    frames = load_frames(tmp_path, 3)
    assert [int(image[0, 0, 0]) for image in frames.images] == [0, 1]
    assert frames.what == f"2 of 2 images in {tmp_path}, each at its own size"
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"2\.png"):
        load_frames(tmp_path)


def test_frames_of_noise_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trt_runtime.benchmark.sample_frames", dict)
    first, second = load_frames(None), load_frames(None)
    assert [image.shape for image in first.images] == [(720, 1280, 3)] * 8
    for one, two in zip(first.images, second.images, strict=True):
        np.testing.assert_array_equal(one, two)
    assert len({image.tobytes() for image in first.images}) == 8
    assert first.what == "8 frames of noise, 1280x720: there are no faces in them"


# the command


@pytest.fixture
def handmade(monkeypatch: pytest.MonkeyPatch, unhurried: list[float]) -> list[HandmadeDetector]:
    """What the command opens instead of models; its frames are ours."""
    made: list[HandmadeDetector] = []

    def load(path: Path, **options: Any) -> HandmadeDetector:
        made.append(HandmadeDetector(options["size_hw"]))
        made[-1].files, made[-1].max_batch = [Path(path)], 8
        return made[-1]

    monkeypatch.setattr("trt_runtime.benchmark.load_detector", load)
    monkeypatch.setattr("trt_runtime.benchmark.load_frames", lambda folder: FRAMES)
    return made


def test_the_command_prints_and_writes_what_was_measured(
    handmade: list[HandmadeDetector], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "b.json"
    line = ["--model", "m.onnx", "--repeats", "3", "--warm-up", "2", "--json", str(out)]
    assert main([*line, "--batch", "1,2", "--size", "64,32"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("whole call") == 4
    assert "three frames" in printed
    *rows, last = printed.splitlines()[-5:]
    assert [row.split()[:4] for row in rows] == [
        ["m.onnx", "longer", "side", size] for size in ("64", "64", "32", "32")
    ]
    assert last == f"wrote {out}"
    record = json.loads(out.read_text())
    assert [(row["size_hw"], row["batch"]) for row in record["results"]] == [(64, 1), (64, 2), (32, 1), (32, 2)]
    assert (record["repeats"], record["warm_up"], record["frames"]) == (3, 2, "three frames")
    assert record["opencv"] == cv2.__version__
    assert {"retinaface-trt", "numpy", "python"} == set(record["versions"])
    assert record["what"] == "uint8 frame in, faces out, times in ms a call"
    assert out.read_text().endswith("}\n")
    assert main(line) == 0
    assert capsys.readouterr().out.count("pipelined") == 0  # one setting needs no summary
    for detector in handmade:
        with pytest.raises(ClosedError):
            detector.detect(frame_of(1))


@pytest.mark.parametrize("complete", [0, 1])
def test_an_interrupted_command_writes_the_settings_that_are_complete(
    complete: int, handmade: list[HandmadeDetector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = benchmark

    def interrupted(*args: Any) -> Any:
        for number, setting in enumerate(real(*args)):
            if number == complete:
                raise KeyboardInterrupt
            yield setting

    monkeypatch.setattr("trt_runtime.benchmark.benchmark", interrupted)
    out, picture = tmp_path / "b.json", tmp_path / "b.svg"
    line = ["--model", "m.onnx", "--repeats", "2", "--batch", "1,2,3", "--json", str(out), "--plot", str(picture)]
    assert main(line) == 130
    assert f"interrupted: {complete} settings were measured" in capsys.readouterr().err
    assert out.exists() == picture.exists() == bool(complete)
    if complete:
        record = json.loads(out.read_text())
        assert record["interrupted"]
        assert [row["batch"] for row in record["results"]] == [1]


def test_a_plot_needs_its_package_before_anything_is_measured(
    handmade: list[HandmadeDetector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="--plot needs matplotlib"):
        main(["--model", "m.onnx", "--plot", "p.png"])
    assert handmade == []


def test_the_load_is_that_before_the_run(
    handmade: list[HandmadeDetector], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("trt_runtime.benchmark.load_average", lambda: 0.75 if not handmade else 9.0)
    assert main(["--model", "m.onnx", "--repeats", "1", "--json", str(tmp_path / "b.json")]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["load_average"] == 0.75
