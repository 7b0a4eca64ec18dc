"""What FP16 and INT8 cost: export.verify of the published weights on WIDER FACE images, INT8 calibrated on others.

python -m benchmarks.precision --data WIDERFACE [--out benchmarks/results/precision.json]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from export.options import CalibrationOptions
from export.to_trt import EngineOptions, Profile, build_engine
from export.verify import Verification, VerifyOptions, verify

SIZES = Profile(sizes_hw=((320, 320), (640, 640), (1088, 1920)))
SHOWN = {
    "recall_percent": ("boxes", "recall %"),
    "precision_percent": ("boxes", "precision %"),
    "mean_iou": ("boxes", "mean IoU"),
    "landmark_error_percent_of_face": ("landmarks", "mean error, % of face"),
    "score_drift": ("scores", "mean drift"),
}
SIDES = (("ap", "candidate"), ("ap_fp32", "reference"))


def summary(found: Verification) -> list[dict[str, Any]]:
    """Return a result for each protocol: AP and agreement with FP32."""
    results = []
    for protocol, levels in found.average_precision.items():
        case = "original size" if protocol == "original" else "letterbox 640x640"
        values = {(row.stage, row.quantity): row.value for row in found.rows if row.case == case}
        results.append(
            {
                "precision": found.candidate.precision,
                "protocol": protocol,
                "mac_shares": {kind: round(share, 4) for kind, share in found.candidate.mac_shares.items()},
                "budget_held": found.passed,
                **{name: {level: _rounded(ap[side], 3) for level, ap in levels.items()} for name, side in SIDES},
                **{name: _rounded(values[key], 4) for name, key in SHOWN.items()},
                "images": found.images,
            }
        )
    return results


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def main() -> int:
    """Export, compare, print the tables of export.verify and write the result; exit code 1 beyond a budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder with val/images, gt and train")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/precision.json"))
    args = parser.parse_args()
    calibration = CalibrationOptions("widerface_train", args.data)
    results, rows, passed = [], {}, True
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp16", "int8"):
            path = Path(folder) / f"{precision}.onnx"
            chosen = calibration if precision == "int8" else None
            build_engine(EngineOptions("mobilenet0.25", path, SIZES, precision, chosen, onnx_only=True))
            found = verify(VerifyOptions("mobilenet0.25", str(path), args.data, "both"))
            print(found, flush=True)
            results += summary(found)
            rows[precision] = [str(row) for row in found.rows]
            passed &= found.passed
    what = (
        "the published mobilenet0.25 in FP32 (PyTorch) against its plugin form in FP16 and INT8 (network in ONNX "
        "Runtime with the rounding of fp16 emulated, the plugin's kernels on the host): WIDER FACE AP in percent, and "
        f"agreement on faces of a score over 0.5; INT8 calibrated on {calibration.images} images of widerface_train, "
        "none of which is measured on"
    )
    write_result(args.out, what, results, "torch", "onnx", "onnxruntime", "numpy", "opencv-python", verify=rows)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
