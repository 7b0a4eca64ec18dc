"""Write the tables of README.md and docs/*.md from the result files; `--check` fails if they differ.

python -m benchmarks.readme [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHOWN_STEPS = (0, 6, 11, 14, 26, 40, 50)
"""Numbers of convolutions in float that the table of sensitivity shows."""

AP_COLUMNS = "{easy:.2f} | {medium:.2f} | {hard:.2f}"
AP_CELL = "{easy:.2f} / {medium:.2f} / {hard:.2f}"


def _document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def _load(name: str) -> Any:
    return _document(name)["results"]


def _table(header: str, line: str, rows: Iterable[dict[str, Any]]) -> str:
    """Return a table with a line for each row; `line` is a template of `str.format`."""
    ruler = "|".join(["", *["---"] * (header.count("|") - 1), ""])
    return "\n".join([header, ruler, *(line.format(**row) for row in rows)]) + "\n"


def _kernels(rows: list[dict[str, Any]]) -> str:
    """Return a line for each kernel and a column for each architecture."""
    columns = sorted({row["sm"] for row in rows})
    kernels: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        kernels.setdefault((row["kernel"], row["heads"]), {}).update({**row, f"sm_{row['sm']}": row["registers"]})
    return _table(
        f"| kernel | heads | shared memory, bytes | {' | '.join(f'sm_{sm}' for sm in columns)} |",
        f"| {{kernel}} | {{heads}} | {{static_shared_bytes}} | {' | '.join(f'{{sm_{sm}}}' for sm in columns)} |",
        [kernels[key] for key in sorted(kernels, reverse=True)],
    )


def _cycles(rows: list[dict[str, Any]]) -> str:
    """Return a line for each case: the cycles of the model before and now."""
    cases: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        case = cases.setdefault((row["candidates"], row["faces"]), dict(row))
        case["now" if row["sources"] == "now" else "before"] = row["cycles"]
    return _table(
        "| candidates | faces | before, cycles | now | ratio |",
        "| {candidates} | {faces} | {before} | {now} | {ratio:.2f} |",
        [{**case, "ratio": case["now"] / case["before"]} for case in cases.values()],
    )


def _precisions(rows: list[dict[str, Any]]) -> str:
    """Return a line for each precision: AP by both protocols, and agreement with FP32 where images are letterboxed."""
    lines = [{"precision": "fp32", "int8": "0 %", "recall": "", "landmarks": ""}]
    lines[0] |= {row["protocol"]: AP_CELL.format(**row["ap_fp32"]) for row in rows}
    for kind in ("fp16", "int8"):
        of_kind = {row["protocol"]: row for row in rows if row["precision"] == kind}
        letterbox = of_kind["letterbox"]
        line = {protocol: AP_CELL.format(**row["ap"]) for protocol, row in of_kind.items()}
        line |= {"precision": kind, "int8": f"{100 * letterbox['mac_shares'].get('int8', 0):.0f} %"}
        line["recall"] = f"{letterbox['recall_percent']:.2f} %"
        line["landmarks"] = f"{letterbox['landmark_error_percent_of_face']:.2f} %"
        lines.append(line)
    return _table(
        "| precision | in INT8 | AP at original size, easy / medium / hard | AP letterboxed to 640x640 "
        "| faces found again | landmark error |",
        "| {precision} | {int8} | {original} | {letterbox} | {recall} | {landmarks} |",
        lines,
    )


def _quantize(rows: list[dict[str, Any]]) -> str:
    """Return a line for each share of INT8: what is found again and the landmark error, calibrated and learned."""
    lines: dict[float, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["int8_share"], {"share": 100 * row["int8_share"]})
        line[row["method"]] = f"{row['recall']:.2f} % | {row['landmark_error']:.2f} %"
    return _table(
        "| in INT8 | calibrated: faces found again | landmark error | trained: faces found again | landmark error |",
        "| {share:.1f} % | {calibrated} | {learned} |",
        [lines[share] for share in sorted(lines)],
    )


def _training(record: dict[str, Any]) -> str:
    """Return a line for each run, and one for what each is to be compared with."""
    by_name = {row["run"]: row["ap"] for row in record["results"]}
    rows = {
        "the original implementation, its schedule": record["original_implementation"],
        "`--recipe original`, the same schedule": by_name["original"],
        "the default recipe": by_name["default"],
        "published weights, before": record["start_of_finetune"],
        "`--recipe finetune`, 3 epochs on the 645 images": by_name["finetune"],
    }
    named = [{"name": name, **ap} for name, ap in rows.items()]
    return _table("| run | easy | medium | hard |", f"| {{name}} | {AP_COLUMNS} |", named)


def _cpu_latency(rows: list[dict[str, Any]]) -> str:
    """Return a line for each precision and backend: both numbers of threads, and AP."""
    by_name: dict[str, dict[str, Any]] = {}
    for row in rows:
        title = row["name"].replace("onnxruntime", "ONNX Runtime").replace("openvino", "OpenVINO")
        if row.get("precision") == "fp16":
            title += f", computed in {row['detector']['precision']}"
        ap = AP_CELL.format(**row["ap"]) if "ap" in row else ""
        by_name.setdefault(title, {"title": title, "ap": ap})[f"on{row['threads']}"] = row
    times = " | ".join(f"{{on{n}[ms][p50]:.1f}} | {{on{n}[times_as_fast_as_tiny][times]:.2f}}" for n in (1, 2))
    header = "| | 1 thread: ms | ratio | 2 threads: ms | ratio | AP, easy / medium / hard |"
    return _table(header, f"| {{title}} | {times} | {{ap}} |", by_name.values())


def tables() -> dict[str, str]:
    """Return each table, and each figure that stands in a sentence, by the name of its marker."""
    augment = next(row["ms"]["mean"] for row in _load("augment") if row["run"] == "ours, file")
    full_val = [
        {**row, "size": row["size"] or "at their own size", "model": row["model"].split(",")[0]}
        for row in _load("ap_full_val")
    ]
    steps = [
        {"floats": len(row["float_layers"]), "int8": 100 * row["int8_share"], "lost": 100 - row["agreement"]["recall"]}
        | row["agreement"]
        for row in _document("int8_sensitivity")["steps"]
    ]
    videos = _load("video")
    peer = next(row["frames_per_second"] for row in videos if row["contestant"] == "tiny at 640")
    host_kernel = _load("host_kernel")[0]["ms"].items()
    losses = " | ".join(
        f"{{ms[ours_{part}][p50]:.1f}} | {{ms[original_{part}][p50]:.1f}} | {{speedup_{part}:.1f}}"
        for part in ("forward", "backward")
    )
    return {
        "augment": f"{augment:.1f}",
        "ap_scoring": f"{_load('ap_scoring')[0]['seconds_scoring']:.1f}",
        "ap_full_val": _table(
            "| images | precision | easy | medium | hard |", f"| {{size}} | {{model}} | {AP_COLUMNS} |", full_val
        ),
        "dev_ap": _table(
            "| weights | protocol | through | easy | medium | hard |",
            f"| mobilenet0.25 | {{protocol}} | {{backend}} | {AP_COLUMNS} |",
            _load("dev_ap"),
        ),
        "int8_sensitivity": _table(
            "| convolutions in float | multiply-accumulates in INT8 | faces lost | landmark error, of face size |",
            "| {floats} | {int8:.1f} % | {lost:.2f} % | {landmark_error:.2f} % |",
            [step for step in steps if step["floats"] in SHOWN_STEPS],
        ),
        "quantize": _quantize(_load("quantize")),
        "training": _training(_document("training")),
        "loss": _table(
            "| faces an image | ours, ms | original, ms | ratio | with backward: ours, ms | original, ms | ratio |",
            f"| {{faces_per_image}} | {losses} |",
            _load("loss"),
        ),
        "precision": _precisions(_load("precision")),
        "host_kernel": _table(
            "| decode + NMS on one CPU thread | p50, ms | p95 | p99 |",
            "| {name} | {p50:.2f} | {p95:.2f} | {p99:.2f} |",
            [{**ms, "name": name.replace("_", " ").replace("onnx", "ONNX")} for name, ms in host_kernel],
        ),
        "host_overhead": _table(
            "| what is detected in | one call, us | bare, us | ratio |",
            "| {name} | {ours_us:.1f} | {bare_us:.1f} | {ratio:.2f} |",
            [{"name": name, **each} for name, each in _load("host_overhead")[0].items()],
        ),
        "plugin_kernels": _kernels(_load("plugin_kernels")),
        "kernel_model": _cycles(_load("kernel_model")),
        "cpu_latency": _cpu_latency(_load("cpu_latency")),
        "latency": _table(
            "| | p50, ms | faces | of them our FP32 finds, too |",
            "| {name} | {ms[p50]:.1f} | {faces} | {agree} |",
            _load("latency"),
        ),
        "video": _table(
            "| | frames/s | ratio to tiny at 640 | faces |",
            "| {contestant} | {frames_per_second:.1f} | {ratio:.2f} | {faces} |",
            [{**row, "ratio": row["frames_per_second"] / peer} for row in videos],
        ),
        "soak": _table(
            "| detector | part | identical results | memory grew by, MB |",
            "| {detector} | {part} | {identical} of {calls} | {growth_mb:.1f} |",
            _load("soak"),
        ),
    }


def render(text: str, made: dict[str, str]) -> str:
    """Return a page with its tables and figures filled in: each stands between `<!-- name -->` and `<!-- end -->`."""
    marked = re.compile(r"(<!-- (\w+) -->\n?).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda place: place[1] + made[place[2]] + place[3], text)


def pages() -> list[Path]:
    """Return the files that hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    """Rewrite or check the pages."""
    made = tables()
    changed = {path: new for path in pages() if (new := render(old := path.read_text(), made)) != old}
    if "--check" in sys.argv:
        return int(bool(changed))
    for path, text in changed.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
