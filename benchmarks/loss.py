"""Matching and loss of training, beside those of biubug6/Pytorch_Retinaface where a checkout of it is at hand.

python -m benchmarks.loss [--original CHECKOUT] [--out benchmarks/results/loss.json]

4 images of 640x640 with 1, 100 or 500 faces each, of sizes from 8 to 300 px as likely small as large by their
logarithm. `ours` matches by the thresholds of the original, `atss` and `simota` as `loss.assign` says. The original is
handed targets and priors as its own data loader makes them; `forward` is matching and loss,
`backward` also the gradients of the heads. Both take turns, so that both see the same state of the machine. The
checkout may be named by RETINAFACE_ORIGINAL instead; only two of its files are run, unchanged, on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import benchmark_parser, in_turns, parse, write_result
from facespec.boxes import make_priors
from facespec.cli import ArgumentParser, run, text_table
from facespec.spec import ModelSpec
from trainer.data.batches import Targets, collate
from trainer.data.dataset import Faces
from trainer.losses import LossSettings, MultiBoxLoss
from trt_runtime.measure import Latency

SIZE = (640, 640)
BATCH = 4
FACES = (1, 100, 500)
OTHERS = ("atss", "simota")
Heads = tuple[Tensor, Tensor, Tensor]


def add_original(parser: ArgumentParser) -> None:
    """Add `--original CHECKOUT`, by default $RETINAFACE_ORIGINAL."""
    checkout = os.environ.get("RETINAFACE_ORIGINAL")
    parser.add_argument("--original", type=Path, default=checkout, help="checkout of biubug6/Pytorch_Retinaface")


def load_original(checkout: Path, file: str, **modules: ModuleType) -> Any:
    """Return a module of a checkout, given by its path there; of the others only utils/box_utils.py is run.

    `modules` take the place of others that it imports.
    """
    with patch.dict(sys.modules, {"utils": ModuleType("utils"), **modules}):
        for name, path in (("utils.box_utils", "utils/box_utils.py"), ("original", file)):
            spec = importlib.util.spec_from_file_location(name, checkout / path)
            assert spec
            assert spec.loader
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules["original"]


class OriginalLoss:
    """The loss of a checkout, on the CPU, which it was not made for, at a size of the network input."""

    def __init__(self, checkout: Path, size_hw: tuple[int, int]) -> None:
        data = ModuleType("data")
        vars(data)["cfg_mnet"] = {"gpu_train": False}  # all that it asks of its configuration
        module = load_original(checkout, "layers/modules/multibox_loss.py", data=data)
        self._loss = module.MultiBoxLoss(2, 0.35, True, 0, True, 7, 0.35, False)  # as its train.py does
        self._wh = torch.tensor([size_hw[1], size_hw[0]], dtype=torch.float32)
        self._priors = torch.from_numpy(make_priors(ModelSpec().anchors, size_hw)) / self._wh.repeat(2)

    def rows(self, targets: Targets) -> list[Tensor]:
        """Return the faces of each image as it takes them: box, landmarks in fractions of the image, 1 or -1."""
        result = []
        for boxes, landmarks, valid, known in zip(*targets[:4], strict=True):
            parts = boxes / self._wh.repeat(2), (landmarks / self._wh).flatten(1), known[:, None] * 2.0 - 1
            result.append(torch.cat(parts, dim=1)[valid])
        return result

    def __call__(self, heads: Heads, rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return classification, box and landmark loss."""
        with patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            box, classification, landmark = self._loss(heads, self._priors, rows)
        return classification, box, landmark


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
    losses: dict[str, Callable[[Heads], Tensor]] = {"ours": lambda heads: ours(heads, targets, SIZE).total}
    for name in OTHERS:
        other = MultiBoxLoss(spec, LossSettings(assign=name))
        losses[name] = lambda heads, other=other: other(heads, targets, SIZE).total  # type: ignore[misc]
    if original:
        rows = original.rows(targets)

        def total_of_original(heads: Heads) -> Tensor:
            classification, box, landmark = original(heads, rows)
            return classification + 2 * box + landmark

        losses["original"] = total_of_original
    calls: dict[str, Callable[[Heads], object]] = {}
    for name, loss in losses.items():
        calls[f"{name}_forward"] = loss
        calls[f"{name}_backward"] = lambda heads, loss=loss: torch.autograd.grad(loss(heads), heads)  # type: ignore[misc]
    samples = in_turns([(call, [heads]) for call in calls.values()], rounds)
    times = dict(zip(calls, map(Latency.of, samples), strict=True))
    row = {
        "faces_per_image": faces,
        "positives": int(ours(heads, targets, SIZE).positives),
        "ms": {name: latency.to_dict() for name, latency in times.items()},
    }
    for name in OTHERS:
        row[f"{name}_to_ours"] = {
            kind: round(times[f"{name}_{kind}"].p50 / times[f"ours_{kind}"].p50, 2) for kind in ("forward", "backward")
        }
    for kind in ("forward", "backward") if original else ():
        row[f"speedup_{kind}"] = round(times[f"original_{kind}"].p50 / times[f"ours_{kind}"].p50, 2)
    return row


def main() -> int:
    """Run the benchmark, print a table and write the result."""
    parser = benchmark_parser("loss", __doc__)
    add_original(parser)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="times every measurement is taken")
    args = parse(parser, rounds=1)
    torch.set_num_threads(args.threads)
    original = OriginalLoss(args.original, SIZE) if args.original else None
    results = [measure(faces, original, args.rounds) for faces in FACES]
    what = f"ms of matching and loss of {BATCH} images of {SIZE[0]}x{SIZE[1]}; backward includes forward"
    write_result(args, what, results, "torch", "numpy", threads=args.threads, rounds=args.rounds)
    speedups = [name for name in results[0] if name.startswith("speedup")]
    lines = []
    for row in results:
        line = [f"{row['faces_per_image']}", f"{row['positives']}", *(f"{ms['p50']:.2f}" for ms in row["ms"].values())]
        lines.append([*line, *(f"{row[name]:.1f}" for name in speedups)])
    header = ["faces", "positives", *results[0]["ms"], *speedups]
    print(text_table(header, lines))
    return 0


if __name__ == "__main__":
    run(main)
