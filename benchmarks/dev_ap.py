"""WIDER FACE AP of the published weights, through PyTorch and both exported ONNX forms, on the images at hand.

python -m benchmarks.dev_ap --data WIDERFACE [--out benchmarks/results/dev_ap.json]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import write_result
from export.to_onnx import ExportOptions, export_onnx
from export.to_trt import EngineOptions, Profile, build_engine
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
    any_size = Profile(sizes_hw=((320, 320), (640, 640), (1088, 1920)))
    with tempfile.TemporaryDirectory() as folder:
        for protocol, size_hw, profile in (("original", None, any_size), ("letterbox", (640, 640), Profile())):
            portable, plugin = (Path(folder) / f"{protocol}_{form}.onnx" for form in ("portable", "plugin"))
            export_onnx(ExportOptions("mobilenet0.25", portable, size_hw, DecodeSpec()))
            build_engine(EngineOptions("mobilenet0.25", plugin, profile, onnx_only=True))
            for backend, detector in (
                ("PyTorch", "mobilenet0.25"),
                ("ONNX", str(portable)),
                ("plugin form", str(plugin)),
            ):
                options = EvaluateOptions(
                    args.data / "gt", detector=detector, data=args.data, protocol=protocol, backend="onnxruntime"
                )
                result = evaluate(options)
                kept = {key: round(result[key], 3) for key in LEVELS}
                counts = {key: result[key] for key in ("images", "predictions")}
                results.append({"backend": backend, "protocol": protocol, **kept, **counts})
    what = (
        "WIDER FACE AP in percent of the published mobilenet0.25; score 0.02, NMS 0.4, top 5000, keep 750; "
        "letterbox is 640x640; plugin form: the network in ONNX Runtime, the plugin's kernels on the host"
    )
    write_result(args.out, what, results, "torch", "onnxruntime", "onnxsim", "numpy", "opencv-python")
    for row in results:
        print(f"{row['backend']:11} {row['protocol']:10}", *(f"{row[level]:6.2f}" for level in LEVELS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
