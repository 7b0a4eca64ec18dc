"""What a training step costs by backbone and precision: steps a second, images a second, and memory.

python -m benchmarks.backbones [--device auto] [--out benchmarks/results/backbones.json]

A step is what `trainer.fit` does with a batch that is at hand: forward, matching and loss, backward, clipping, the
optimizer and the moving average. Each row is a process of its own, so that its highest memory is its own; on a GPU it
is what PyTorch allocated there. Images and faces are random, 20 an image.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.environment import benchmark_parser, parse, write_result
from benchmarks.loss import random_faces
from facespec.cli import DEVICE, run, text_table
from facespec.errors import DataError, SpecError
from facespec.spec import ModelSpec
from trainer.config import OptimizerConfig
from trainer.data.batches import collate
from trainer.distributed import has_bf16
from trainer.losses import MultiBoxLoss
from trainer.model import BACKBONES, RetinaFace
from trainer.step import Ema, Learner, make_optimizer, train_step

FACES = 20
ROW = ("backbone", "precision", "batch", "parameters", "ms_per_step", "images_per_second", "memory_mb")


def measure(backbone: str, precision: str, batch: int, size: int, steps: int, device: str) -> dict[str, Any]:
    """Return the row of a backbone, measured in this process."""
    rng, place = np.random.default_rng(0), torch.device(device)
    torch.manual_seed(0)
    spec = ModelSpec(backbone=backbone, fpn_channels=BACKBONES[backbone][1])
    model = RetinaFace(spec)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = Learner(model, MultiBoxLoss(spec), bf16=precision == "bf16").to(place)
    config = OptimizerConfig()
    optimizer, ema = make_optimizer(learner, config), Ema(model, 0.999)
    pictures = [rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(batch)]
    images, targets = collate([(picture, random_faces(rng, FACES, (size, size))) for picture in pictures])
    images = images.to(place)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        train_step(learner, optimizer, images, targets, config.clip_norm)
        ema.update(model)
        if place.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step = median(seconds[1:])  # the first one allocates
    return {
        "backbone": backbone,
        "precision": precision,
        "batch": batch,
        "parameters": sum(value.numel() for value in model.parameters()),
        "ms_per_step": round(1000 * step, 1),
        "images_per_second": round(batch / step, 2),
        "memory_mb": round(_highest_memory(place) / 1e6),
    }


def _highest_memory(device: torch.device) -> int:
    """Return the most bytes that this process has used, on a GPU those that PyTorch allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def main() -> int:
    """Measure each backbone in each precision that the device has, print the table and write the result."""
    parser = benchmark_parser("backbones", __doc__)
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto for a GPU where there is one")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES), metavar="NAME")
    parser.add_argument("--size", type=int, default=640, help="side of the network input")
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    args = parse(parser, size=64, batch=2, steps=1, backbones=["mobilenet0.25"])
    if not DEVICE.fullmatch(args.device):
        raise SpecError(f"--device {args.device}: choose from auto, cpu, cuda, cuda:N")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.row:
        backbone, precision = args.row
        print(json.dumps(measure(backbone, precision, args.batch, args.size, args.steps, args.device)))
        return 0
    rows = []
    for backbone in args.backbones:
        for precision in ("fp32", "bf16") if has_bf16(torch.device(args.device)) else ("fp32",):
            shared = [item for name in ("device", "size", "batch", "steps") for item in (f"--{name}", vars(args)[name])]
            command = [sys.executable, "-m", "benchmarks.backbones", "--row", backbone, precision]
            done = subprocess.run([*command, *map(str, shared)], capture_output=True, text=True)
            if done.returncode:
                raise DataError(f"{backbone} in {precision}: {' '.join(done.stderr.split())[-300:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(*(f"{rows[-1][name]}" for name in ROW), flush=True)
    what = (
        f"a training step of {args.batch} images of {args.size}x{args.size} with {FACES} faces each: forward, loss, "
        f"backward, optimizer and moving average, median of {args.steps}; memory is the highest of the process, on a "
        "GPU what PyTorch allocated"
    )
    write_result(args, what, rows, "torch", "numpy", threads=torch.get_num_threads(), device=args.device)
    print(text_table(list(ROW), [[f"{row[name]}" for name in ROW] for row in rows]))
    return 0


if __name__ == "__main__":
    run(main)
