"""TRTRetinaFace on a GPU, from uint8 frames that lie on the device to faces, with CUDA graphs; and from host memory.

python -m benchmarks.gpu_runtime [--frames DIR] [--out benchmarks/results/gpu_runtime.json]

It builds two engines for the GPU at hand, in FP16 at 640x640, and runs `trt_runtime.benchmark` on them: the published
mobilenet0.25, and a ResNet-50 of random weights, whose time is that of trained ones, and which finds nothing. The goals
on an H200, frame on the device, batch 1: a p50 of 150 us and of 400 us. The figures of frames in the host's memory go
to a file beside --out, whose name ends in "_host".
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.environment import benchmark_parser, parse
from export.to_trt import EngineOptions, Profile, build_engine
from facespec.cli import run
from facespec.errors import RetinaFaceError
from facespec.spec import ModelSpec
from trainer.checkpoint import save_checkpoint
from trainer.model import RetinaFace
from trt_runtime import benchmark
from trt_runtime.gpu.flavor import gpu_capability


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
    """Build the engines, measure, print tables and write the results."""
    parser = benchmark_parser("gpu_runtime", __doc__)
    parser.add_argument("--frames", type=Path, help="folder of images (default: sample photographs)")
    parser.add_argument("--repeats", type=int, default=2000, help="calls of each kind")
    args = parse(parser, repeats=20)
    if gpu_capability() is None:
        raise RetinaFaceError("this benchmark needs an NVIDIA GPU")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        profile = Profile(sizes_hw=((640, 640),) * 3, batch=(1, 1, 8))
        engines = [folder / "mobilenet0.25.engine", folder / "resnet50.engine"]
        for weights, engine in zip(("mobilenet0.25", random_resnet50(folder)), engines, strict=True):
            build_engine(EngineOptions(weights, engine, profile, precision="fp16"))
        words = ["--compare", *map(str, engines), "--batch", "1,8", "--repeats", str(args.repeats)]
        words += ["--frames", str(args.frames)] if args.frames else []
        on_host = args.out.with_stem(f"{args.out.stem}_host")
        for place in (["--on-device", "--json", str(args.out)], ["--json", str(on_host)]):
            code = benchmark.main([*words, *place])
            if code:
                return code
    return 0


if __name__ == "__main__":
    run(main)
