"""What `trt_runtime.benchmark` found, as a table for a terminal and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facespec.cli import text_table
from facespec.figures import figure_file
from facespec.spec import NetworkSize
from trt_runtime.measure import Latency, Ratio, Samples, busy

WIDTH = 100
"""Columns of a terminal that everything fits in."""

_BAR = 14
_NAME = 18
_COLOURS = ("#2a6f9d", "#e09f1f", "#2a9d4b", "#c8373a", "#7d5ba6", "#8c8c8c", "#5fb7c9", "#b5651d")


@dataclass(frozen=True, eq=False)
class Measurement:
    """What was measured of one detector at one size and batch; each detector has another name."""

    name: str
    environment: dict[str, Any]
    size_hw: NetworkSize
    batch: int
    total_ms: Samples  # whole calls, without a timer
    stages_ms: dict[str, Samples]  # other calls, by stage
    pipelined_fps: float  # frames a second with `depth` calls under way
    depth: int
    faces: list[int]  # found in each frame

    @property
    def fps(self) -> float:
        """Frames a second, one call after the other."""
        return self.batch * 1e3 / float(self.total_ms.mean())

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, ready for JSON."""
        return {
            "name": self.name,
            "detector": self.environment,
            "size_hw": list(self.size_hw) if isinstance(self.size_hw, tuple) else self.size_hw,
            "batch": self.batch,
            "calls": self.total_ms.size,
            "total_ms": Latency.of(self.total_ms).to_dict(),
            "stages_ms": {name: Latency.of(samples).to_dict() for name, samples in self.stages_ms.items()},
            "frames_per_s": round(self.fps, 2),
            "frames_per_s_pipelined": round(self.pipelined_fps, 2),
            "pipeline_depth": self.depth,
            "faces_per_frame": {"mean": round(float(np.mean(self.faces)), 3), "max": max(self.faces)},
        }


@dataclass(frozen=True)
class Setting:
    """Everything measured at one size and batch."""

    measurements: list[Measurement]  # one for each detector
    ratios: list[Ratio]  # of each of the others to the first

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the figures of each detector, ready for JSON."""
        rows = [measurement.to_dict() for measurement in self.measurements]
        for row, ratio in zip(rows[1:], self.ratios, strict=True):
            row["times_as_fast_as_first"] = {
                **{name: round(value, 4) for name, value in ratio._asdict().items()},
                "difference": not ratio.is_noise,
            }
        return rows


def heading(record: dict[str, Any]) -> str:
    """Return the lines that say where and on what it was measured, as recorded of the run."""
    machine, load = record["machine"], record["load_average"]
    cores = machine["cores"]
    lines = [
        f"machine   {machine['cpu']}, {cores} core{'s'[: cores != 1]}"
        + (f", load average {load:.2f}" if load is not None else ""),
        f"frames    {record['frames']}",
        f"calls     {record['warm_up']} to warm up; at least {record['repeats']} as a whole, without a timer, and as "
        "many others by stage",
    ]
    if busy(load, cores):
        lines.append(
            f"warning   the machine is busy: {load:.1f} of {cores} cores were in use before this began, and "
            "the figures suffer from it"
        )
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False, break_long_words=False)
        for line in lines
    )


def setting_table(setting: Setting) -> str:
    """Return the table of one size and batch: milliseconds a call, and frames a second.

    The bar of a stage is its share of the sum of their p50.
    """
    lines = []
    for measurement in setting.measurements:
        lines += [*_measurement_lines(measurement), ""]
    if setting.ratios:
        first, *others = setting.measurements
        lines.append(f"times as fast as {first.name}, by p50, with the 95 % interval")
        width = max(len(other.name) for other in others)
        lines += [f"  {other.name:{width}}  {ratio}" for other, ratio in zip(others, setting.ratios, strict=True)]
        if len({found.size_hw for found in setting.measurements}) > 1:
            lines.append("  they ran at different network sizes: --size makes them comparable where they allow it")
        lines.append("")
    return "\n".join(lines[:-1])


def summary_table(settings: Sequence[Setting]) -> str:
    """Return one line for each detector at each size and batch."""
    rows = []
    for setting in settings:
        for found in setting.measurements:
            p50 = float(np.median(found.total_ms))
            row = [found.name, _size(found.size_hw), f"{found.batch}", f"{p50:.3f}", f"{p50 / found.batch:.3f}"]
            rows.append([*row, f"{found.fps:.1f}", f"{found.pipelined_fps:.1f}"])
    return text_table(["", "size", "batch", "p50, ms", "ms a frame", "frames/s", "pipelined"], rows)


def _measurement_lines(found: Measurement) -> list[str]:
    backend, *others = [
        f"{key} {value}"
        for key, value in found.environment.items()
        if isinstance(value, (str, int)) and key != "backend"
    ] or [""]
    rows = [
        f"{found.name}   {_size(found.size_hw)}, batch {found.batch}   "
        f"{np.mean(found.faces):.1f} faces a frame, at most {max(found.faces)}",
        f"  {', '.join([backend.split('-')[0], *others])}"[:WIDTH],
        f"{'ms a call':{_NAME}}{'mean':>10}{'min':>10}{'p50':>10}{'p95':>10}{'p99':>10}",
    ]
    usual = {stage: float(np.median(samples)) for stage, samples in found.stages_ms.items()}
    for stage, samples in found.stages_ms.items():
        share = usual[stage] / (sum(usual.values()) or 1)
        rows.append(f"  {stage:{_NAME - 2}}{_figures(Latency.of(samples))}  {_bar(share)} {share:4.0%}")
    rows.append(f"{'whole call':{_NAME}}{_figures(Latency.of(found.total_ms))}")
    rows.append(
        f"frames a second: {found.fps:.1f} one call after the other, "
        f"{found.pipelined_fps:.1f} with {found.depth} under way"
    )
    return rows


def _figures(latency: Latency) -> str:
    return "".join(f"{value:10.3f}" for value in (latency.mean, latency.min, latency.p50, latency.p95, latency.p99))


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).strip().ljust(_BAR)[:_BAR]


def _size(size_hw: NetworkSize) -> str:
    if size_hw is None:
        return "each frame's own size"
    return f"{size_hw[0]}x{size_hw[1]}" if isinstance(size_hw, tuple) else f"longer side {size_hw}"


def plot(settings: Sequence[Setting], record: dict[str, Any], path: Path) -> None:
    """Draw where the time goes: of one detector its stages in each setting, of several how their calls spread.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    several = len(settings[0].measurements) > 1
    columns = min(len(settings), 3) if several else 1
    rows = -(-len(settings) // columns) if several else 1
    height = 4.6 * rows if several else 2.0 + 0.75 * len(settings)
    with figure_file(path, "bench", (max(9.0, 5.0 * columns), height + 0.6)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        if several:
            for axis, setting in zip(axes, settings, strict=False):
                _spread(axis, setting)
            for axis in axes[len(settings) :]:
                axis.set_visible(False)
        else:
            _stages(axes[0], [setting.measurements[0] for setting in settings])
        machine = record["machine"]
        figure.supxlabel(f"{machine['cpu']}, {machine['cores']} cores; {record['date']}", fontsize=8, color="#666666")


def _stages(axis: Any, found: Sequence[Measurement]) -> None:
    """Draw a bar for each setting: the p50 of its stages end to end, in milliseconds a frame, and whole calls."""
    places = np.arange(len(found))
    axis.set_yticks(places, [f"{_size(each.size_hw)}, batch {each.batch}" for each in found])
    stages = list(dict.fromkeys(stage for each in found for stage in each.stages_ms))
    ends = np.zeros(len(found))
    for index, stage in enumerate(stages):
        usual = np.array([float(np.median(each.stages_ms.get(stage, 0.0))) / each.batch for each in found])
        axis.barh(places, usual, left=ends, height=0.6, color=_COLOURS[index % len(_COLOURS)], label=stage)
        ends += usual
    p50, p99 = np.transpose([np.percentile(each.total_ms, (50, 99)) / each.batch for each in found])
    style: dict[str, Any] = {"fmt": "D", "ms": 5, "color": "black", "capsize": 4, "lw": 1.2}
    axis.errorbar(p50, places, xerr=[p50 * 0, p99 - p50], label="whole call, p50 to p99", **style)
    for row, each in zip(places, found, strict=True):
        speed = f"  {each.fps:.0f} frames/s, {each.pipelined_fps:.0f} pipelined"
        axis.text(max(p99[row], ends[row]), row, speed, va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="ms a frame", title=found[0].name, xlim=(0, 1.45 * max(p99.max(), ends.max())))
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.figure.legend(fontsize=8, loc="outside upper center", ncols=4)


def _spread(axis: Any, setting: Setting) -> None:
    """Draw what share of the calls took no longer than a time."""
    for index, found in enumerate(setting.measurements):
        times = np.sort(found.total_ms.ravel())
        shares = np.arange(1, len(times) + 1) / len(times) * 100
        colour = _COLOURS[index % len(_COLOURS)]
        median = float(np.median(times))
        label = f"{found.name}: p50 {median:.2f} ms"
        if index:
            ratio = setting.ratios[index - 1]
            faster = f"{ratio.times:.2f} times as fast as the first"
            label += f", {'no difference beyond noise' if ratio.is_noise else faster}"
        axis.step(times, shares, where="post", color=colour, label=label)
        axis.plot(median, 50, "o", color=colour, ms=5)
    # a few outliers must not squeeze everything else
    most = max(float(np.percentile(found.total_ms, 99)) for found in setting.measurements)
    sizes = dict.fromkeys(_size(found.size_hw) for found in setting.measurements)
    axis.set(
        xlabel="ms a call",
        ylabel="calls that took no longer, %",
        title=f"{' and '.join(sizes)}, batch {setting.measurements[0].batch}",
        xlim=(0, most * 1.1),
        ylim=(0, 101),
    )
    axis.grid(alpha=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8)
