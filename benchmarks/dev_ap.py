"""WIDER FACE AP of the published weights, through PyTorch and both exported ONNX forms, on the images at hand.

python -m benchmarks.dev_ap --data WIDERFACE [--out benchmarks/results/dev_ap.json]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import write_result
from export.calibration_options import CalibrationOptions
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
    calibration = CalibrationOptions("widerface_train", args.data)
    any_size = Profile(sizes_hw=((320, 320), (640, 640), (1088, 1920)))
    with tempfile.TemporaryDirectory() as folder:
        for protocol, size_hw, profile in (("original", None, any_size), ("letterbox", (640, 640), Profile())):
            portable, plugin, half, integer = (Path(folder) / f"{protocol}_{i}.onnx" for i in range(4))
            export_onnx(ExportOptions("mobilenet0.25", portable, size_hw, DecodeSpec()))
            for path, precision in ((plugin, "fp32"), (half, "fp16"), (integer, "int8")):
                chosen = calibration if precision == "int8" else None
                build_engine(EngineOptions("mobilenet0.25", path, profile, precision, chosen, onnx_only=True))
            for backend, precision, detector in (
                ("PyTorch", "fp32", "mobilenet0.25"),
                ("ONNX", "fp32", str(portable)),
                ("plugin form", "fp32", str(plugin)),
                ("plugin form", "fp16", str(half)),
                ("plugin form", "int8", str(integer)),
            ):
                options = EvaluateOptions(args.data / "gt", detector=detector, data=args.data, protocol=protocol)
                result = evaluate(options)
                kept = {key: round(result[key], 3) for key in LEVELS}
                counts = {key: result[key] for key in ("images", "predictions")}
                results.append({"backend": backend, "precision": precision, "protocol": protocol, **kept, **counts})
    what = (
        "WIDER FACE AP in percent of the published mobilenet0.25; score 0.02, NMS 0.4, top 5000, keep 750; "
        "letterbox is 640x640; plugin form: the network in ONNX Runtime, the plugin's kernels on the host (fp16 there "
        "rounds what layers hand on, not what they add up); int8: 88 % of the multiply-accumulates, the rest fp16, "
        "calibrated on 128 images of widerface_train, none of which is measured on"
    )
    write_result(args.out, what, results, "torch", "onnxruntime", "onnxsim", "numpy", "opencv-python")
    for row in results:
        print(
            f"{row['backend']:11} {row['precision']} {row['protocol']:10}", *(f"{row[level]:6.2f}" for level in LEVELS)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
