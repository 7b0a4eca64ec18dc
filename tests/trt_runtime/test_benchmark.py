from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from facespec.errors import DataError, OutputError, SpecError
from facespec.images import write_image
from facespec.letterbox import Frame
from tests.conftest import ROOT
from trt_runtime import benchmark_report, machine, measure
from trt_runtime.benchmark import BenchmarkOptions, Measurement, Setting, load_frames, main
from trt_runtime.measure import Latency, speed_ratio, take_turns

Run = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ("--repeats", 6, "--warm-up", 1, "--threads", 1, "--backend", "onnxruntime")


def _samples(median: float, drift: np.ndarray, seed: int) -> np.ndarray:
    """(25, 8) times around a median, with 5 % of noise of their own, in rounds that share a drift."""
    return median * drift[:, None] * np.random.default_rng(seed).lognormal(0, 0.05, (25, 8))


@pytest.fixture
def drift() -> np.ndarray:
    return np.random.default_rng(0).lognormal(0, 0.2, 25)


def _measurement(name: str, times: np.ndarray, batch: int = 1) -> Measurement:
    stages = {"letterbox": times * 0.25, "network": times * 0.75}
    return Measurement(name, {"backend": "onnxruntime"}, (640, 640), batch, times, stages, 99.0, 2, [1, 2, 3])


def test_percentiles_are_those_of_the_samples() -> None:
    times = np.random.default_rng(0).permutation(np.arange(1.0, 102.0)).reshape(1, 101)  # 1 to 101 ms
    assert Latency.of(times) == Latency(mean=51, min=1, p50=51, p95=96, p99=100)
    assert Latency.of(np.array([[1.0, 2.0]])).p50 == 1.5


def test_a_difference_is_told_from_noise(drift: np.ndarray) -> None:
    """Rounds drift by 20 % and calls by 5 %: equal detectors are not told apart, 1.5 times as fast is found."""
    base = _samples(10, drift, 1)
    same, faster = speed_ratio(base, _samples(10, drift, 2)), speed_ratio(base, _samples(10 / 1.5, drift, 3))
    assert same.is_noise
    assert "no difference" in str(same)
    assert faster.low < 1.5 < faster.high
    assert faster.low > 1.2
    assert faster.times == pytest.approx(1.5, rel=0.1)
    assert "1.5" in str(faster)
    slower = speed_ratio(_samples(10 / 1.5, drift, 3), base)
    assert slower.times == pytest.approx(1 / faster.times)
    assert "times as slow" in str(slower)
    assert speed_ratio(base, base) == (1, 1, 1)


def test_the_interval_holds_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a common drift, the hardest case: 95 % of intervals, less what 25 rounds cost a bootstrap."""
    monkeypatch.setattr(measure, "RESAMPLES", 200)
    random = np.random.default_rng(5)
    held = [
        speed_ratio(
            _samples(10, random.lognormal(0, 0.15, 25), 2 * trial),
            _samples(10, random.lognormal(0, 0.15, 25), 2 * trial + 1),
        ).is_noise
        for trial in range(100)
    ]
    assert 87 <= sum(held) <= 99


def test_turns_rotate_and_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 2)
    seen: list[tuple[str, int]] = []
    done: list[int] = []
    calls = [lambda index, name=name: seen.append((name, index)) for name in "ab"]
    first, second = take_turns(calls, 3, pause_s=1e-6, progress=done.append)
    # 2 rounds of 2 calls; in each turn its first call is made twice more beforehand
    turns = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert [turn[0][0] for turn in turns] == ["a", "b", "b", "a"]
    assert [index for _, index in turns[0]] == [0, 0, 0, 1]
    assert [index for _, index in turns[3]] == [2, 2, 2, 3]
    assert first.shape == second.shape == (2, 2)
    assert sum(done) == 8
    seen.clear()
    take_turns(calls, 3, pause_s=0)
    assert len(seen) == 8


def test_times_are_those_of_the_calls() -> None:
    (slept,) = take_turns([lambda index: time.sleep(0.002 * (index + 1))], 3, pause_s=0)
    assert (slept.ravel() >= [2, 4, 6]).all()


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


def test_frames_of_a_folder_are_bounded_and_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trt_runtime.benchmark.MAX_FRAMES", 3)
    for value in range(5):
        write_image(tmp_path / f"{value}.png", np.full((4, 6 + value, 3), value, np.uint8))
    frames = load_frames(tmp_path)
    assert [int(image[0, 0, 0]) for image in frames.images] == [0, 2, 4]
    assert [image.shape[1] for image in frames.images] == [6, 8, 10]
    assert "3 of 5 images" in frames.what


def test_without_photographs_there_are_no_faces(monkeypatch: pytest.MonkeyPatch, static_onnx: Path) -> None:
    from trt_runtime import OrtRetinaFace

    monkeypatch.setattr("trt_runtime.benchmark.sample_photographs", dict)
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


def test_different_sizes_are_pointed_out() -> None:
    times = np.ones((5, 2))
    large, small = _measurement("a", times), dataclasses.replace(_measurement("b", times), size_hw=(320, 320))
    ratios = [speed_ratio(times, times)]
    assert "different network sizes" in benchmark_report.setting_table(Setting([large, small], ratios))
    assert "different network sizes" not in benchmark_report.setting_table(Setting([large, large], ratios))


def test_tables_fit_and_shares_add_up(drift: np.ndarray) -> None:
    times = _samples(12, drift, 1)
    text = benchmark_report.setting_table(Setting([_measurement("model.onnx", times)], []))
    assert max(map(len, text.splitlines())) <= 100
    assert " 25%" in text
    assert " 75%" in text
    assert f"{np.percentile(times, 99):10.3f}" in text
    summary = benchmark_report.summary_table([Setting([_measurement("model.onnx", times, batch=4)], [])] * 2)
    assert f"{np.median(times) / 4:.3f}" in summary
    assert f"{4e3 / times.mean():.1f}" in summary


def test_plots_differ_with_what_they_show(tmp_path: Path, drift: np.ndarray) -> None:
    slow, fast = _samples(20, drift, 1), _samples(10, drift, 2)
    record = {**machine.environment(), "load_average": None}
    pictures = []
    for index, settings in enumerate(
        (
            [Setting([_measurement("a", slow)], [])],
            [Setting([_measurement("a", slow)], [])] * 5,
            [Setting([_measurement("a", slow), _measurement("b", fast)], [speed_ratio(slow, fast)])] * 4,
        )
    ):
        path = tmp_path / f"{index}.png"
        benchmark_report.plot(settings, record, path)
        picture = cv2.imread(str(path))
        white = (picture == 255).all(axis=2).mean()
        assert 0.3 < white < 0.99
        pictures.append(picture)
    assert len({picture.shape for picture in pictures}) == 3


def test_a_busy_machine_is_warned_of() -> None:
    record = {**machine.environment(), "frames": "f", "warm_up": 1, "repeats": 2}
    record["machine"] = {"cpu": "c", "cores": 4}
    assert "busy" in benchmark_report.heading({**record, "load_average": 1.5})
    assert "busy" not in benchmark_report.heading({**record, "load_average": 0.5})
    assert "busy" not in benchmark_report.heading({**record, "load_average": None})


def test_the_environment_names_versions_and_what_is_missing() -> None:
    found = machine.environment("numpy", "no-such-package")
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["no-such-package"] is None
    assert found["machine"]["cpu"]


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
    assert "numbers separated by commas" in refused(module, *model, "--batch", "1;4")
    assert "is a file that is read" in refused(module, *model, "--json", static_onnx)
    assert "backend" in refused(module, *model, "--backend", "nonsense")


def test_an_interrupt_keeps_what_is_complete(static_onnx: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "trt_runtime.benchmark", "--model", static_onnx, "--json", "i.json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    arguments = [*map(str, (*line, *QUICK)), "--batch", "1,300"]  # the second setting takes long
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
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
