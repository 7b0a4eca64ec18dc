"""How long scoring a full set of WIDER FACE predictions takes, reading the files apart.

python -m benchmarks.ap_scoring --data WIDERFACE [--out benchmarks/results/ap_scoring.json]

Predictions are made from the ground truth: faces moved a little, and false ones, 155,000 in all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.environment import write_result
from trainer.average_precision import load_ground_truth
from trainer.evaluate import EvaluateOptions, Predictions, evaluate, write_predictions

COUNT = 155_000


def main() -> int:
    """Make predictions, score them, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="WIDER FACE folder with gt")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ap_scoring.json"))
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    truth = load_ground_truth(args.data / "gt")
    faces = sum(len(image.boxes_xywh) for image in truth.values())
    per_image, more = divmod(COUNT - faces, len(truth))
    made = Predictions()
    for index, (key, image) in enumerate(truth.items()):
        moved = image.boxes_xywh + rng.normal(0, 2, image.boxes_xywh.shape)
        false = rng.uniform(5, 400, (per_image + (index < more), 4))
        boxes = np.trunc(np.maximum(np.concatenate([moved, false]), 0))
        scores = np.sort(rng.random(len(boxes)))[::-1]
        made.by_image[key] = np.column_stack([boxes, scores])
    with tempfile.TemporaryDirectory() as folder:
        write_predictions(Path(folder), made)
        result = evaluate(EvaluateOptions(args.data / "gt", predictions=Path(folder)))
    kept = {key: result[key] for key in ("images", "predictions", "seconds_collecting", "seconds_scoring")}
    what = "WIDER FACE AP of predictions on all validation images: seconds to read the text files, and to score"
    write_result(args.out, what, [kept], "numpy", "scipy")
    print(kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
