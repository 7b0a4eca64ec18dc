"""Matching and loss of training, beside those of biubug6/Pytorch_Retinaface where a checkout of it is at hand.

python -m benchmarks.loss [--original CHECKOUT] [--out benchmarks/results/loss.json]

4 images of 640x640 with 1, 100 or 500 faces each, of sizes from 8 to 300 px as likely small as large by their
logarithm. The original is handed targets and priors as its own data loader makes them; `forward` is matching and loss,
`backward` also the gradients of the heads. Both take turns, so that both see the same state of the machine. The
checkout may be named by RETINAFACE_ORIGINAL instead; only two of its files are run, unchanged, on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import nan
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import benchmark_parser, parse, write_result
from facespec.cli import run
from facespec.priors import make_priors
from facespec.spec import ModelSpec
from facespec.tables import text_table
from trainer.data.targets import Faces, Targets, collate
from trainer.losses import MultiBoxLoss

SIZE = (640, 640)
BATCH = 4
FACES = (1, 100, 500)
Heads = tuple[Tensor, Tensor, Tensor]


class OriginalLoss:
    """The loss of a checkout of biubug6/Pytorch_Retinaface, on the CPU, which it was not made for.

    Args:
        checkout: Its folder.
        size_hw: Height and width of the network input.
    """

    def __init__(self, checkout: Path, size_hw: tuple[int, int]) -> None:
        with self._modules(checkout):
            multibox_loss = _load("multibox_loss", checkout / "layers/modules/multibox_loss.py")
        self._loss = multibox_loss.MultiBoxLoss(2, 0.35, True, 0, True, 7, 0.35, False)  # as its train.py does
        self._wh = torch.tensor([size_hw[1], size_hw[0]], dtype=torch.float32)
        self._priors = torch.from_numpy(make_priors(ModelSpec().anchors, size_hw)) / self._wh.repeat(2)

    def rows(self, targets: Targets) -> list[Tensor]:
        """Return the faces of each image as it takes them: box, landmarks in fractions of the image, 1 or -1."""
        result = []
        for boxes, landmarks, valid, known in zip(*targets, strict=True):
            parts = boxes / self._wh.repeat(2), (landmarks / self._wh).flatten(1), known[:, None] * 2.0 - 1
            result.append(torch.cat(parts, dim=1)[valid])
        return result

    def __call__(self, heads: Heads, rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return classification, box and landmark loss."""
        with patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            box, classification, landmark = self._loss(heads, self._priors, rows)
        return classification, box, landmark

    @staticmethod
    @contextmanager
    def _modules(checkout: Path) -> Iterator[None]:
        """Let the two modules it imports be found; of its configuration it asks only whether to use a GPU."""
        data = ModuleType("data")
        data.cfg_mnet = {"gpu_train": False}  # type: ignore[attr-defined]
        found = {"data": data, "utils": ModuleType("utils")}
        with patch.dict(sys.modules, found):
            sys.modules["utils.box_utils"] = _load("utils.box_utils", checkout / "utils/box_utils.py")
            yield


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_faces(rng: np.random.Generator, count: int, size_hw: tuple[int, int]) -> Faces:
    """Return faces of 8 to 300 px with their centres in the image; three in four have landmarks."""
    side = np.exp(rng.uniform(np.log(8), np.log(300), (count, 1)))
    half = side * np.exp(rng.normal(0, 0.15, (count, 2))) / 2
    centre = rng.uniform(0, 1, (count, 2)) * size_hw[::-1]
    points = centre[:, None] + half[:, None] * rng.uniform(-0.7, 0.7, (count, 5, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=1)
    return Faces(boxes.astype(np.float32), points.astype(np.float32), rng.random(count) < 0.75)


def random_heads(seed: int, batch: int, priors: int) -> Heads:
    """Return box deltas, logits and landmark deltas that ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    boxes, logits, landmarks = (
        torch.randn(batch, priors, width, generator=generator, requires_grad=True) for width in (4, 2, 10)
    )
    return boxes, logits, landmarks


def measure(faces: int, original: OriginalLoss | None, rounds: int) -> dict[str, Any]:
    """Return times in ms at a number of faces per image, and how many times as fast ours is."""
    rng = np.random.default_rng(faces)
    spec = ModelSpec()
    image = np.zeros((*SIZE, 3), np.uint8)
    _, targets = collate([(image, random_faces(rng, faces, SIZE)) for _ in range(BATCH)])
    heads = random_heads(0, BATCH, spec.anchors.count(SIZE))
    ours = MultiBoxLoss(spec)
    losses: dict[str, Callable[[], Tensor]] = {"ours": lambda: ours(heads, targets, SIZE).total}
    if original:
        rows = original.rows(targets)

        def total_of_original() -> Tensor:
            classification, box, landmark = original(heads, rows)
            return classification + 2 * box + landmark

        losses["original"] = total_of_original
    runs: dict[str, Callable[[], object]] = {}
    for name, loss in losses.items():
        runs[f"{name}_forward"] = loss
        runs[f"{name}_backward"] = lambda loss=loss: torch.autograd.grad(loss(), heads)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            if index >= 2:  # the first two warm up
                times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "faces_per_image": faces,
        "positives": int(ours(heads, targets, SIZE).positives),
        "ms": {name: {"p50": round(medians[name], 3), "min": round(min(values), 3)} for name, values in times.items()},
        **{
            f"speedup_{kind}": round(medians[f"original_{kind}"] / medians[f"ours_{kind}"], 2)
            for kind in ("forward", "backward")
            if original
        },
    }


def main() -> int:
    """Run the benchmark, print a table and write the result."""
    parser = benchmark_parser("loss", __doc__)
    checkout = os.environ.get("RETINAFACE_ORIGINAL")
    parser.add_argument("--original", type=Path, default=checkout, help="checkout of biubug6/Pytorch_Retinaface")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="times every measurement is taken")
    args = parse(parser, rounds=1)
    torch.set_num_threads(args.threads)
    original = OriginalLoss(args.original, SIZE) if args.original else None
    results = [measure(faces, original, args.rounds) for faces in FACES]
    what = f"ms of matching and loss of {BATCH} images of {SIZE[0]}x{SIZE[1]}; backward includes forward"
    write_result(args.out, what, results, "torch", "numpy", threads=args.threads, rounds=args.rounds)
    lines = []
    for row in results:
        line = [f"{row['faces_per_image']}", f"{row['positives']}"]
        for kind in ("forward", "backward"):
            line += [f"{row['ms'].get(f'{one}_{kind}', {}).get('p50', nan):.2f}" for one in ("ours", "original")]
            line.append(f"{row.get(f'speedup_{kind}', nan):.1f}")
        lines.append(line)
    header = ["faces", "positives", "forward: ours", "original", "speedup", "backward: ours", "original", "speedup"]
    print(text_table(header, lines))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
