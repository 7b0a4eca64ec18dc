"""Write the tables of README.md and docs/*.md from the result files; `--check` fails if they differ.

python -m benchmarks.readme [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHOWN_STEPS = (0, 6, 11, 14, 26, 40, 50)
"""Numbers of convolutions in float that the table of sensitivity shows."""


def _document(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def _load(name: str) -> list[dict]:
    return _document(name)["results"]


def _table(header: str, rows: list[str]) -> str:
    ruler = "|".join(["", *["---"] * (header.count("|") - 1), ""])
    return "\n".join([header, ruler, *rows]) + "\n"


def _kernels(rows: list[dict]) -> str:
    """Return a row for each kernel and a column for each architecture."""
    columns = sorted({row["sm"] for row in rows})
    kernels = sorted({(row["kernel"], row["heads"]) for row in rows}, reverse=True)
    registers = {(row["kernel"], row["heads"], row["sm"]): row["registers"] for row in rows}
    shared = {(row["kernel"], row["heads"]): row["static_shared_bytes"] for row in rows}
    return _table(
        f"| kernel | heads | shared memory, bytes | {' | '.join(f'sm_{sm}' for sm in columns)} |",
        [
            f"| {kernel} | {heads} | {shared[kernel, heads]} "
            f"| {' | '.join(str(registers[kernel, heads, sm]) for sm in columns)} |"
            for kernel, heads in kernels
        ],
    )


def _precisions(rows: list[dict]) -> str:
    """Return a row for each precision: AP by both protocols, and agreement with FP32 where images are letterboxed."""

    def ap(found: dict) -> str:
        return " / ".join(f"{found[level]:.2f}" for level in ("easy", "medium", "hard"))

    by_kind = {(row["precision"], row["protocol"]): row for row in rows}
    original, letterbox = (by_kind["int8", protocol] for protocol in ("original", "letterbox"))
    lines = [f"| fp32 | 0 % | {ap(original['ap_fp32'])} | {ap(letterbox['ap_fp32'])} | | |"]
    for kind in ("fp16", "int8"):
        original, letterbox = (by_kind[kind, protocol] for protocol in ("original", "letterbox"))
        lines.append(
            f"| {kind} | {100 * original['mac_shares'].get('int8', 0):.0f} % | {ap(original['ap'])} "
            f"| {ap(letterbox['ap'])} | {letterbox['recall_percent']:.2f} % "
            f"| {letterbox['landmark_error_percent_of_face']:.2f} % |"
        )
    return _table(
        "| precision | in INT8 | AP at original size, easy / medium / hard | AP letterboxed to 640x640 "
        "| faces found again | landmark error |",
        lines,
    )


def _training(record: dict) -> str:
    """Return a row for each run, and one for what each is to be compared with."""

    def line(name: str, ap: dict) -> str:
        return f"| {name} | {ap['easy']:.2f} | {ap['medium']:.2f} | {ap['hard']:.2f} |"

    by_name = {row["run"]: row["ap"] for row in record["results"]}
    return _table(
        "| run | easy | medium | hard |",
        [
            line("the original implementation, its schedule", record["original_implementation"]),
            line("`--recipe original`, the same schedule", by_name["original"]),
            line("the default recipe", by_name["default"]),
            line("published weights, before", record["start_of_finetune"]),
            line("`--recipe finetune`, 3 epochs on the 645 images", by_name["finetune"]),
        ],
    )


def _cpu_latency(rows: list[dict]) -> str:
    """Return a row for each precision and backend: both numbers of threads, and AP."""
    by_name: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["threads"]] = row
    lines = []
    for name, found in by_name.items():
        one, two = found[1], found[2]
        times = " | ".join(
            f"{row['ms']['p50']:.1f} | {row['times_as_fast_as_tiny']['times']:.2f}" for row in (one, two)
        )
        ap = " / ".join(f"{one['ap'][level]:.2f}" for level in ("easy", "medium", "hard")) if "ap" in one else ""
        computes = one.get("detector", {}).get("precision", "")
        title = name.replace("onnxruntime", "ONNX Runtime").replace("openvino", "OpenVINO")
        title += f", computed in {computes}" if one.get("precision") == "fp16" else ""
        lines.append(f"| {title} | {times} | {ap} |")
    return _table("| | 1 thread: ms | ratio | 2 threads: ms | ratio | AP, easy / medium / hard |", lines)


def _video(rows: list[dict]) -> str:
    """Return a row for each way to get from one video to the other."""
    peer = next(row["frames_per_second"] for row in rows if row["contestant"] == "tiny at 640")
    return _table(
        "| | frames/s | ratio to tiny at 640 | faces |",
        [
            f"| {row['contestant']} | {row['frames_per_second']:.1f} | {row['frames_per_second'] / peer:.2f} "
            f"| {row['faces']} |"
            for row in rows
        ],
    )


def tables() -> dict[str, str]:
    """Return each table, and each figure that stands in a sentence, by the name of its marker."""
    augment = next(row["ms"]["mean"] for row in _load("augment") if row["run"] == "ours, file")
    return {
        "augment": f"{augment:.1f}",
        "ap_scoring": f"{_load('ap_scoring')[0]['seconds_scoring']:.1f}",
        "ap_full_val": _table(
            "| images | precision | easy | medium | hard |",
            [
                f"| {row['size'] or 'at their own size'} | {row['model'].split(',')[0]} "
                f"| {row['easy']:.2f} | {row['medium']:.2f} | {row['hard']:.2f} |"
                for row in _load("ap_full_val")
            ],
        ),
        "dev_ap": _table(
            "| weights | protocol | through | easy | medium | hard |",
            [
                f"| mobilenet0.25 | {row['protocol']} | {row['backend']} "
                f"| {row['easy']:.2f} | {row['medium']:.2f} | {row['hard']:.2f} |"
                for row in _load("dev_ap")
            ],
        ),
        "int8_sensitivity": _table(
            "| convolutions in float | multiply-accumulates in INT8 | faces lost | landmark error, of face size |",
            [
                f"| {len(row['float_layers'])} | {100 * row['int8_share']:.1f} % "
                f"| {100 - row['agreement']['recall']:.2f} % | {row['agreement']['landmark_error']:.2f} % |"
                for row in _document("int8_sensitivity")["steps"]
                if len(row["float_layers"]) in SHOWN_STEPS
            ],
        ),
        "training": _training(_document("training")),
        "loss": _table(
            "| faces an image | ours, ms | original, ms | ratio | with backward: ours, ms | original, ms | ratio |",
            [
                f"| {row['faces_per_image']} | "
                + " | ".join(
                    f"{row['ms'][f'ours_{part}']['p50']:.1f} | {row['ms'][f'original_{part}']['p50']:.1f} "
                    f"| {row[f'speedup_{part}']:.1f}"
                    for part in ("forward", "backward")
                )
                + " |"
                for row in _load("loss")
            ],
        ),
        "precision": _precisions(_load("precision")),
        "host_kernel": _table(
            "| decode + NMS on one CPU thread | p50, ms | p95 | p99 |",
            [
                f"| {name.replace('_', ' ').replace('onnx', 'ONNX')} | {row['p50']:.2f} | {row['p95']:.2f} "
                f"| {row['p99']:.2f} |"
                for name, row in _load("host_kernel")[0]["ms"].items()
            ],
        ),
        "plugin_kernels": _kernels(_load("plugin_kernels")),
        "cpu_latency": _cpu_latency(_load("cpu_latency")),
        "latency": _table(
            "| | p50, ms | faces | of them our FP32 finds, too |",
            [
                f"| {row['name']} | {row['ms']['p50']:.1f} | {row['faces']} | {row['agree']} |"
                for row in _load("latency")
            ],
        ),
        "video": _video(_load("video")),
        "soak": _table(
            "| detector | part | identical results | memory grew by, MB |",
            [
                f"| {row['detector']} | {row['part']} | {row['identical']} of {row['calls']} | {row['growth_mb']:.1f} |"
                for row in _load("soak")
            ],
        ),
    }


def render(text: str, made: dict[str, str]) -> str:
    """Return a page with its tables and figures filled in: each stands between `<!-- name -->` and `<!-- end -->`."""
    return re.sub(
        r"(<!-- (\w+) -->\n?).*?(<!-- end -->)",
        lambda place: place[1] + made[place[2]] + place[3],
        text,
        flags=re.DOTALL,
    )


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
