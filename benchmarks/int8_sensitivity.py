"""Which layers cost accuracy in INT8, and the share of INT8 that each budget allows, on WIDER FACE training images.

python -m benchmarks.int8_sensitivity --data WIDERFACE [--out benchmarks/results/int8_sensitivity.json]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.environment import write_result
from export.options import CalibrationOptions
from export.sensitivity import Budget, SensitivityOptions, plot, sensitivity
from facespec.errors import ModelFileError

BUDGETS = (Budget(99.5, 0.5), Budget(99.0, 0.8), Budget(98.5, 1.0), Budget(98.0, 1.5))
PLOT = Path("docs/int8_sensitivity.png")


def main() -> int:
    """Measure, print the table, draw it and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder with train/images")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/int8_sensitivity.json"))
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    calibration = CalibrationOptions("widerface_train", args.data)
    found = sensitivity(SensitivityOptions("mobilenet0.25", calibration, held_out=512), progress=True)
    print(found)
    results = []
    for budget in BUDGETS:
        try:
            step = asdict(found.step(budget))
        except ModelFileError:
            step = {}
        results.append({"budget": asdict(budget), **step})
    plot(found, Budget(), args.plot)
    what = (
        f"the published mobilenet0.25 at 640x640, calibrated on {len(found.calibration_images)} images of "
        f"widerface_train, measured on {len(found.held_out_images)} others with {found.faces} faces of FP32 over a "
        "score of 0.5; what is not INT8 computes in FP32; layers: RMS error of the head outputs at faces with one "
        "convolution alone in INT8"
    )
    more = {
        "layers": [asdict(layer) for layer in found.layers],
        "steps": [asdict(step) for step in found.steps],
        "default": asdict(found.default),
    }
    write_result(args.out, what, results, "torch", "onnx", "onnxruntime", "numpy", **more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
