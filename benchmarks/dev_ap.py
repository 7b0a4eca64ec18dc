"""WIDER FACE AP of the published weights, through PyTorch and through the exported ONNX, on the images at hand.

python -m benchmarks.dev_ap --data WIDERFACE [--out benchmarks/results/dev_ap.json]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import write_result
from export.to_onnx import ExportOptions, export_onnx
from facespec.spec import DecodeSpec
from trainer.average_precision import LEVELS
from trainer.evaluate import EvaluateOptions, evaluate


def main() -> int:
    """Evaluate, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder with val/images and gt")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dev_ap.json"))
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        dynamic, fixed = Path(folder) / "dynamic.onnx", Path(folder) / "640.onnx"
        export_onnx(ExportOptions("mobilenet0.25", dynamic, None, DecodeSpec()))
        export_onnx(ExportOptions("mobilenet0.25", fixed, (640, 640), DecodeSpec()))
        for backend, detector, protocol in (
            ("PyTorch", "mobilenet0.25", "original"),
            ("ONNX", str(dynamic), "original"),
            ("PyTorch", "mobilenet0.25", "letterbox"),
            ("ONNX", str(fixed), "letterbox"),
        ):
            options = EvaluateOptions(args.data / "gt", detector=detector, data=args.data, protocol=protocol)
            result = evaluate(options)
            kept = {key: round(result[key], 3) for key in LEVELS} | {
                key: result[key] for key in ("images", "predictions")
            }
            results.append({"backend": backend, "protocol": protocol, **kept})
    what = (
        "WIDER FACE AP in percent of the published mobilenet0.25; score 0.02, NMS 0.4, top 5000, keep 750; "
        "letterbox is 640x640"
    )
    write_result(args.out, what, results, "torch", "onnxruntime", "onnxsim", "numpy", "opencv-python")
    for row in results:
        print(f"{row['backend']:8} {row['protocol']:10}", *(f"{row[level]:6.2f}" for level in LEVELS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
