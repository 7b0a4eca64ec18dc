"""TRTRetinaFace on a GPU: uint8 frames that lie on the device, to faces, with CUDA graphs; and from the host's memory.

python -m benchmarks.gpu_runtime [--frames DIR] [--out benchmarks/results/gpu_runtime.json]

It builds the engines it measures, in FP16 at 640x640, for the GPU at hand. The ResNet-50 has random weights, whose time
is that of trained ones, and finds nothing; mobilenet0.25 is the published one.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import benchmark_parser, parse, write_result
from export.to_trt import EngineOptions, Profile, build_engine
from facespec.cli import run
from facespec.errors import RetinaFaceError
from facespec.spec import ModelSpec
from trainer.checkpoint import save_checkpoint
from trainer.model import RetinaFace
from trt_runtime.benchmark import BenchmarkOptions, benchmark, load_frames, open_detectors
from trt_runtime.benchmark_report import setting_table
from trt_runtime.gpu.flavor import gpu_capability

SIZE = (640, 640)
GOALS_US = {"mobilenet0.25": 150, "resnet50": 400}
"""On an H200: p50 of a call, frame on the device, batch 1."""


def random_resnet50(folder: Path) -> str:
    """Write a checkpoint of ResNet-50 whose class heads say "background", and return its path."""
    torch.manual_seed(0)
    model = RetinaFace(ModelSpec(backbone="resnet50", fpn_channels=256))
    with torch.no_grad():
        for head in model.ClassHead:
            (bias,) = (value for name, value in head.named_parameters() if name.endswith("bias"))
            bias.copy_(torch.tensor([4.0, -4.0]).repeat(len(bias) // 2))
    path = folder / "resnet50.pth"
    save_checkpoint(path, model)
    return str(path)


def main() -> int:
    """Build, measure, print tables and write the result."""
    parser = benchmark_parser("gpu_runtime", __doc__)
    parser.add_argument("--frames", type=Path, help="folder of images (default: sample photographs)")
    parser.add_argument("--repeats", type=int, default=2000, help="calls of each kind")
    args = parse(parser, repeats=20)
    if gpu_capability() is None:
        raise RetinaFaceError("this benchmark needs an NVIDIA GPU")
    frames = load_frames(args.frames)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model, goal in GOALS_US.items():
            weights = model if model == "mobilenet0.25" else random_resnet50(Path(folder))
            engine = Path(folder) / f"{model}.engine"
            profile = Profile(sizes_hw=(SIZE,) * 3, batch=(1, 1, 8))
            build_engine(EngineOptions(weights, engine, profile, precision="fp16"))
            for on_device in (True, False):
                options = BenchmarkOptions((engine,), batches=(1, 8), repeats=args.repeats, on_device=on_device)
                with ExitStack() as stack:
                    for setting in benchmark(open_detectors(options, stack), frames, options):
                        print(f"\nframes {'on the device' if on_device else 'of the host'}\n{setting_table(setting)}")
                        (row,) = setting.to_dict()
                        row |= {"name": model, "frames_on_device": on_device}
                        if on_device and row["batch"] == 1:
                            row |= {"goal_us": goal, "goal_met": row["total_ms"]["p50"] * 1e3 <= goal}
                        results.append(row)
    what = "uint8 frame in, faces out, TRTRetinaFace in FP16 at 640x640, times in ms a call"
    write_result(args, what, results, "numpy", "torch", frames=frames.what, gpu=torch.cuda.get_device_name())
    return 0


if __name__ == "__main__":
    run(main)
