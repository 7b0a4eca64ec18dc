"""The tables and pictures of measurements whose every figure is known."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from facespec.errors import MissingPackageError, OutputError
from facespec.spec import NetworkSize
from trt_runtime import benchmark_report
from trt_runtime.benchmark_report import WIDTH, Measurement, Setting, heading, plot, setting_table, summary_table
from trt_runtime.measure import Ratio, environment, speed_ratio


def _samples(median: float, drift: np.ndarray, seed: int) -> np.ndarray:
    """(25, 8) times around a median, with 5 % of noise of their own, in rounds that share a drift."""
    return median * drift[:, None] * np.random.default_rng(seed).lognormal(0, 0.05, (25, 8))


@pytest.fixture
def drift() -> np.ndarray:
    return np.random.default_rng(0).lognormal(0, 0.2, 25)


def _measurement(name: str, times: np.ndarray, batch: int = 1, size: NetworkSize = (640, 640)) -> Measurement:
    stages = {"letterbox": times * 0.25, "network": times * 0.75}
    return Measurement(name, {"backend": "onnxruntime"}, size, batch, times, stages, 99.0, 2, [1, 2, 3])


RECORD: dict[str, Any] = {
    "machine": {"cpu": "a processor", "cores": 4},
    "load_average": 0.5,
    "frames": "six frames",
    "warm_up": 20,
    "repeats": 200,
    "date": "2026-02-03",
}


# the heading


def test_the_heading_says_where_and_on_what() -> None:
    assert heading(RECORD).splitlines() == [
        "machine   a processor, 4 cores, load average 0.50",
        "frames    six frames",
        "calls     20 to warm up; at least 200 as a whole, without a timer, and as many others by stage",
    ]
    alone = heading({**RECORD, "machine": {"cpu": "c", "cores": 1}, "load_average": None})
    assert alone.splitlines()[0] == "machine   c, 1 core"


def test_a_busy_machine_is_warned_of() -> None:
    for load, busy in ((1.5, True), (1.01, True), (1.0, False), (0.5, False), (None, False)):
        text = heading({**RECORD, "load_average": load})
        assert ("warning   the machine is busy" in text) == busy
    assert f"{1.5:.1f} of 4 cores were in use" in heading({**RECORD, "load_average": 1.5})


def test_long_lines_are_wrapped_under_their_words() -> None:
    long = {**RECORD, "frames": " ".join(["photographs-of-people"] * 9), "load_average": 3.0}
    lines = heading(long).splitlines()
    assert max(map(len, lines)) <= WIDTH == 100
    assert sum(line.startswith(" " * 10) for line in lines) >= 2
    assert "photographs-of-people" in lines[2]
    assert " ".join(heading(long).split()).count("photographs-of-people") == 9
    path = "/" + "x" * 150
    assert path in heading({**RECORD, "frames": path})


# tables


def test_tables_fit_and_shares_add_up(drift: np.ndarray) -> None:
    times = _samples(12, drift, 1)
    text = setting_table(Setting([_measurement("model.onnx", times)], []))
    assert max(map(len, text.splitlines())) <= 100
    assert " 25%" in text
    assert " 75%" in text
    assert f"{np.percentile(times, 99):10.3f}" in text
    summary = summary_table([Setting([_measurement("model.onnx", times, batch=4)], [])] * 2)
    assert f"{np.median(times) / 4:.3f}" in summary
    assert f"{4e3 / times.mean():.1f}" in summary


def test_every_figure_of_a_table() -> None:
    """Times of 1 to 9 ms: mean and median are 5, and each percentile lies at 1 + 8 p."""
    times = np.arange(1.0, 10.0).reshape(3, 3)
    environment = {
        "backend": "onnxruntime-gpu", "onnxruntime": "1.2", "threads": 3, "compute": (8, 6), "gpu": "H100",
    }  # fmt: skip
    found = Measurement(
        "m.onnx", environment, (320, 640), 2, times, {"a": times / 4, "b": times * 3 / 4}, 123.46, 4, [0, 1, 7]
    )
    text = setting_table(Setting([found], []))
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "m.onnx 320x640, batch 2 2.7 faces a frame, at most 7",
        "onnxruntime 1.2, threads 3, gpu H100",
        "ms a call mean min p50 p95 p99",
        "a 1.250 0.250 1.250 2.150 2.230 ███▌ 25%",
        "b 3.750 0.750 3.750 6.450 6.690 ██████████▌ 75%",
        "whole call 5.000 1.000 5.000 8.600 8.920",
        "frames a second: 400.0 one call after the other, 123.5 with 4 under way",
    ]
    columns = [[match.end() for match in re.finditer(r"\S+", line)] for line in text.splitlines()[3:6]]
    assert columns[0][1:6] == columns[1][1:6] == columns[2][2:7]  # figures stand under each other


def test_a_detector_that_says_nothing_of_itself_and_took_no_time() -> None:
    times = np.zeros((1, 2))
    found = dataclasses.replace(
        _measurement("m", times + 1), environment={"backend": "b"}, stages_ms={"letterbox": times}
    )
    assert "  0%" in setting_table(Setting([found], []))
    long = dataclasses.replace(found, environment={"backend": "b", "gpu": "x" * 200})
    assert max(map(len, setting_table(Setting([long], [])).splitlines())) == WIDTH


@pytest.mark.parametrize(
    ("share", "bar"),
    [(0.0, ""), (1 / 112, "▏"), (0.25, "███▌"), (0.5, "███████"), (7 / 112, "▉"), (8 / 112, "█"), (1.0, "█" * 14)],
)
def test_a_bar_is_as_long_as_its_share(share: float, bar: str) -> None:
    """Of 14 places, to an eighth."""
    assert benchmark_report._bar(share) == bar.ljust(14)


def test_ratios_stand_beside_those_they_are_of() -> None:
    times = np.ones((5, 2))
    ratios = [Ratio(2, 1.5, 2.5), Ratio(0.5, 0.4, 0.6)]
    names = ["first", "the second", "third"]
    text = setting_table(Setting([_measurement(name, times) for name in names], ratios))
    lines = text.splitlines()
    start = lines.index("times as fast as first, by p50, with the 95 % interval")
    assert lines[start + 1 :] == [
        "  the second  2.000 [1.500, 2.500]  2.00 times as fast",
        "  third       0.500 [0.400, 0.600]  2.00 times as slow",
    ]
    assert [line.split("   ")[0] for line in lines if "batch 1" in line] == names
    assert "times as fast" not in setting_table(Setting([_measurement("alone", times)], []))


def test_different_sizes_are_pointed_out() -> None:
    times = np.ones((5, 2))
    large, small = _measurement("a", times), _measurement("b", times, size=(320, 320))
    ratios = [speed_ratio(times, times)]
    assert "different network sizes" in setting_table(Setting([large, small], ratios))
    assert "different network sizes" not in setting_table(Setting([large, large], ratios))


def test_sizes_in_words() -> None:
    times = np.ones((5, 2))
    for size, words in (
        ((320, 640), "320x640, batch 1"),
        (None, "each frame's own size, batch 1"),
        (640, "longer side 640, batch 1"),
    ):
        assert words in setting_table(Setting([_measurement("m", times, size=size)], []))


def test_the_summary_has_a_line_for_each_detector_in_each_setting() -> None:
    quick, slow = np.array([[1.0, 2.0, 6.0]]), np.array([[8.0, 8.0, 8.0]])
    first = Setting([_measurement("a", quick), _measurement("longer", slow, size=(320, 640))], [])
    second = Setting([_measurement("a", slow, batch=4, size=None)], [])
    header, *rows = summary_table([first, second]).splitlines()
    assert [row.split() for row in rows] == [
        ["a", "640x640", "1", "2.000", "2.000", "333.3", "99.0"],
        ["longer", "320x640", "1", "8.000", "8.000", "125.0", "99.0"],
        ["a", "each", "frame's", "own", "size", "4", "8.000", "2.000", "500.0", "99.0"],
    ]
    assert header.split() == ["size", "batch", "p50,", "ms", "ms", "a", "frame", "frames/s", "pipelined"]
    assert {len(row) for row in rows} == {len(header)}


# pictures


def test_plots_differ_with_what_they_show(tmp_path: Path, drift: np.ndarray) -> None:
    slow, fast = _samples(20, drift, 1), _samples(10, drift, 2)
    record = {**environment(), "load_average": None}
    pictures = []
    for index, settings in enumerate(
        (
            [Setting([_measurement("a", slow)], [])],
            [Setting([_measurement("a", slow)], [])] * 5,
            [Setting([_measurement("a", slow), _measurement("b", fast)], [speed_ratio(slow, fast)])] * 4,
        )
    ):
        path = tmp_path / f"{index}.png"
        plot(settings, record, path)
        picture = cv2.imread(str(path))
        assert picture is not None
        white = (picture == 255).all(axis=2).mean()
        assert 0.3 < white < 0.99
        pictures.append(picture)
    assert len({picture.shape for picture in pictures}) == 3


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_picture_of_every_kind(suffix: str, begins: bytes, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"p{suffix}"
    plot([Setting([_measurement("a", np.ones((2, 2)))], [])], RECORD, path)
    assert path.read_bytes().startswith(begins)
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    with pytest.raises(OutputError, match="cannot be written"):
        plot([Setting([_measurement("a", np.ones((2, 2)))], [])], RECORD, Path(f"/proc/p{suffix}"))


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return what draws settings and gives the figure that was saved."""

    def draw(settings: list[Setting]) -> Figure:
        kept: list[Figure] = []
        save = Figure.savefig

        def keep(self: Figure, *args: Any, **options: Any) -> None:
            kept.append(self)
            save(self, *args, **options)

        monkeypatch.setattr(Figure, "savefig", keep)
        plot(settings, RECORD, tmp_path / "p.svg")
        return kept[0]

    return draw


def test_stages_lie_end_to_end_in_milliseconds_a_frame(figure: Any) -> None:
    first = _measurement("m.onnx", np.full((2, 2), 8.0))
    times = np.array([[4.0, 4.0, 12.0]])
    second = dataclasses.replace(
        first, batch=2, total_ms=times, stages_ms={"network": times, "results": times / 4}, size_hw=(320, 640)
    )
    drawn = figure([Setting([first], []), Setting([second], [])])
    (axis,) = drawn.axes
    bars = {
        container.get_label(): [(patch.get_x(), patch.get_width()) for patch in container.patches]
        for container in axis.containers
        if hasattr(container, "patches")
    }
    assert bars == {
        "letterbox": [(0, 2), (0, 0)],
        "network": [(2, 6), (0, 2)],
        "results": [(8, 0), (2, 0.5)],
    }
    assert [label.get_text() for label in axis.get_yticklabels()] == ["640x640, batch 1", "320x640, batch 2"]
    assert axis.yaxis_inverted()
    assert (axis.get_title(), axis.get_xlabel()) == ("m.onnx", "ms a frame")
    (errors,) = (container for container in axis.containers if hasattr(container, "has_xerr"))
    np.testing.assert_allclose(errors[0].get_xdata(), [8, 2])  # p50 of whole calls, a frame
    (bars_of_errors,) = errors[2]
    ends = np.array([segment[:, 0] for segment in bars_of_errors.get_segments()])
    np.testing.assert_allclose(ends, [[8, 8], [2, np.percentile(times, 99) / 2]])
    texts = [(text.get_text().strip(), text.get_position()) for text in axis.texts]
    assert texts[0] == ("125 frames/s, 99 pipelined", (8, 0))
    assert texts[1] == ("300 frames/s, 99 pipelined", (pytest.approx(np.percentile(times, 99) / 2), 1))
    assert axis.get_xlim() == (0, pytest.approx(1.45 * 8))
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert labels == ["letterbox", "network", "results", "whole call, p50 to p99"]
    assert "a processor, 4 cores; 2026-02-03" in drawn.get_supxlabel()
    assert len({patch.get_facecolor() for container in axis.containers[:3] for patch in container.patches}) >= 2


def test_several_detectors_are_drawn_by_how_their_calls_spread(figure: Any) -> None:
    base, other = np.array([[4.0, 1.0], [2.0, 3.0]]), np.array([[40.0, 10.0], [20.0, 30.0]])
    measurements = [_measurement(name, times) for name, times in (("a", base), ("b", other), ("c", base))]
    ratios = [Ratio(0.1, 0.09, 0.11), Ratio(1.0, 0.9, 1.1)]
    settings = [Setting(measurements, ratios), *[Setting(measurements[:2], ratios[:1])] * 3]
    drawn = figure(settings)
    assert [axis.get_visible() for axis in drawn.axes] == [True] * 4 + [False] * 2  # two rows of three
    axis = drawn.axes[0]
    curves = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    assert list(curves) == [
        "a: p50 2.50 ms",
        "b: p50 25.00 ms, 0.10 times as fast as the first",
        "c: p50 2.50 ms, no difference beyond noise",
    ]
    first = curves["a: p50 2.50 ms"]
    np.testing.assert_array_equal(first.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(first.get_ydata(), [25, 50, 75, 100])
    assert len({line.get_color() for line in curves.values()}) == 3
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_label().startswith("_")]
    assert marks == [(2.5, 50), (25.0, 50), (2.5, 50)]
    assert axis.get_title() == "640x640, batch 1"
    assert axis.get_xlim() == (0, pytest.approx(np.percentile(other, 99) * 1.1))
    assert axis.get_ylim() == (0, 101)
    assert axis.get_xlabel() == "ms a call"


def test_nothing_reaches_past_the_edges_of_a_picture(figure: Any) -> None:
    """Words that are cut off are lost."""
    drawn = figure([Setting([_measurement("m.onnx", np.full((2, 2), 8.0), size=None)], [])] * 3)
    FigureCanvasAgg(drawn).draw()
    (axis,) = drawn.axes
    texts = [*axis.texts, *axis.get_yticklabels(), axis.title, axis.xaxis.label, *drawn.legends[0].get_texts()]
    for text in texts:
        box = text.get_window_extent()
        assert -1 <= box.x0 < box.x1 <= drawn.bbox.width + 1, text.get_text()
        assert -1 <= box.y0 < box.y1 <= drawn.bbox.height + 1, text.get_text()


def test_without_matplotlib_the_mend_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"--plot needs matplotlib\.figure.*\.\[bench\]"):
        plot([Setting([_measurement("a", np.ones((2, 2)))], [])], RECORD, tmp_path / "p.png")
    assert os.listdir(tmp_path) == []
