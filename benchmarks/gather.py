"""Gather files that commands wrote with --json into a result file, one row for each figure.

    python -m benchmarks.gather dev_ap ap/*.json

docs/benchmarks.md names the commands that write the files of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from facespec.cli import ArgumentParser, run
from facespec.errors import DataError
from facespec.files import check_outputs, write_text
from trt_runtime.measure import environment

WHAT = {
    "dev_ap": "WIDER FACE AP in percent of the published mobilenet0.25; score 0.02, NMS 0.4, top 5000, keep 750; "
    "letterbox is 640x640; tile is that and overlapping tiles of 640x640, too; "
    "plugin form: the network in ONNX Runtime, the plugin's kernels on the host",
    "ap_scoring": "WIDER FACE AP of predictions on all validation images: seconds to read the text files, and to score",
    "precision": "the published mobilenet0.25 in FP32 (PyTorch) against its plugin form in FP16 and INT8 (network in "
    "ONNX Runtime with the rounding of fp16 emulated, the plugin's kernels on the host): WIDER FACE AP in percent, and "
    "agreement on faces of a score over 0.5",
}
SHOWN = {
    "recall_percent": ("boxes", "recall %"),
    "precision_percent": ("boxes", "precision %"),
    "mean_iou": ("boxes", "mean IoU"),
    "landmark_error_percent_of_face": ("landmarks", "mean error, % of face"),
    "score_drift": ("scores", "mean drift"),
}
KEPT = {
    "dev_ap": ("protocol", "easy", "medium", "hard", "images", "predictions"),
    "ap_scoring": ("images", "predictions", "seconds_collecting", "seconds_scoring"),
}
"""What a row holds of what `trainer.evaluate` wrote."""


def summary(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each protocol, AP and agreement with FP32, of what `export.verify` wrote."""
    rows = []
    for protocol, levels in found["average_precision"].items():
        case = "original size" if protocol == "original" else "letterbox 640x640"
        values = {(row["stage"], row["quantity"]): row["value"] for row in found["rows"] if row["case"] == case}
        rows.append(
            {
                "precision": found["candidate"]["precision"],
                "protocol": protocol,
                "mac_shares": {kind: round(share, 4) for kind, share in found["candidate"]["mac_shares"].items()},
                "budget_held": found["passed"],
                "ap": {level: _rounded(ap["candidate"], 3) for level, ap in levels.items()},
                "ap_fp32": {level: _rounded(ap["reference"], 3) for level, ap in levels.items()},
                **{name: _rounded(values[key], 4) for name, key in SHOWN.items()},
                "images": found["images"],
            }
        )
    return rows


def _rounded(value: Any, digits: int) -> Any:
    return round(value, digits) if isinstance(value, float) else value


def _rows(name: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a result file that come from one file of a command."""
    if name == "precision":
        return summary(found)
    row = {key: _rounded(found[key], 3) for key in KEPT[name]}
    if name == "dev_ap":
        forms = {".plugin.onnx": "plugin form", ".onnx": "ONNX"}
        row["backend"] = next((form for end, form in forms.items() if found["detector"].endswith(end)), "PyTorch")
    return [row]


def gather(name: str, files: list[Path]) -> dict[str, Any]:
    """Return the content of the result file of a name, from what commands wrote.

    Raises:
        DataError: A file does not hold what it should, or they come from different machines.
    """
    rows: list[dict[str, Any]] = []
    origins, commands = [], []
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            rows += _rows(name, found)
            origins.append({key: found[key] for key in ("machine", "versions")})
            commands.append(found["command"])
        except (KeyError, ValueError) as error:
            raise DataError(f"{file}: not a file for {name} ({type(error).__name__}: {error})") from None
        if origins[-1] != origins[0]:
            raise DataError(f"{file}: not from the same machine and versions as {files[0]}")
    return {"what": WHAT[name], "commands": commands, "results": rows, **environment(), **origins[0]}


def main() -> int:
    """Gather the files and write the result."""
    parser = ArgumentParser(prog="python -m benchmarks.gather", description="Gather what commands wrote with --json.")
    parser.add_argument("name", choices=WHAT, help="result file")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON files of the commands")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: benchmarks/results/NAME.json)")
    args = parser.parse_args()
    out = args.out or Path(f"benchmarks/results/{args.name}.json")
    check_outputs([("--out", out)], args.files)
    write_text(out, json.dumps(gather(args.name, args.files), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
