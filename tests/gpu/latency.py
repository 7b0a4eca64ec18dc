"""TRTRetinaFace with a network of torch, timed from a frame to its faces.

python -m tests.gpu.latency [--out benchmarks/results/gpu_detector.json]

At 640x640: p50, p95 and p99 of frames on the device and in the host's memory, in batches of 1 and 8, with CUDA graphs
and without, and how long each stage takes. It needs torch, numpy and, on a GPU, cuda-bindings; what it measures beside
the network is what an engine of TensorRT would have, too. --quick runs a few calls on the simulated device.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import parse, write_result
from facespec.cli import ArgumentParser, run
from facespec.errors import GpuError
from facespec.letterbox import Frame
from tests.gpu.kernel import ROOT, gpu_problem
from tests.gpu.test_detector import load_photograph
from tests.gpu.torch_engine import TorchEngine, open_model
from trt_runtime.gpu.simulated import HostDevice
from trt_runtime.measure import Latency, StageTimer, take_turns
from trt_runtime.trt import TRTRetinaFace, open_device

NAME = "gpu_detector.json"
SIZE, QUICK_SIZE = (640, 640), (96, 96)
BATCHES = (1, 8)
REPEATS = 500
FINE_CALLS = 50
"""Calls whose stages are timed one by one."""

WARM_UP = 3


def make_frame(size_hw: tuple[int, int]) -> Frame:
    """Return the photograph in the corner of a grey frame, without OpenCV."""
    frame = np.full((*size_hw, 3), 110, np.uint8)
    photograph = load_photograph()[: size_hw[0], : size_hw[1]]
    frame[: photograph.shape[0], : photograph.shape[1]] = photograph
    return frame


def stages_ms(detector: TRTRetinaFace, frames: list[Any], calls: int) -> dict[str, float]:
    """Return the median of each stage; apart from each other stages take longer than together."""
    timers = [StageTimer(fine=True) for _ in range(calls)]
    for timer in timers:
        detector.detect_batch(frames, timer)
    return {name: round(float(np.median([each.total_ms[name] for each in timers])), 4) for name in timers[0].total_ms}


def measure(device: Any, size_hw: tuple[int, int], repeats: int, pause_s: float) -> list[dict[str, Any]]:
    """Return a row of figures for each case.

    Args:
        device: Where it runs.
        size_hw: Size of the frames and of the network.
        repeats: Calls of each case.
        pause_s: Seconds before each turn of a case.
    """
    model, frame = open_model(), make_frame(size_hw)
    rows, calls = [], []
    detectors = {graphs: TRTRetinaFace(TorchEngine(device, model), size_hw=size_hw, device=device, graphs=graphs)
                 for graphs in (True, False)}  # fmt: skip
    there = detectors[True].to_device(frame)
    kinds = {"device": there, "host": frame}
    for graphs, (kind, item), batch in itertools.product(detectors, kinds.items(), BATCHES):
        call = partial(detectors[graphs].detect_batch, [item] * batch)
        found = [call() for _ in range(WARM_UP)][-1]
        rows.append({"frames": kind, "batch": batch, "graphs": graphs, "faces": len(found[0])})
        calls.append(lambda _, call=call: call())
    if not detectors[True].environment()["cuda_graphs"]:
        raise GpuError("the network was not captured in CUDA graphs")
    for row, samples in zip(rows, take_turns(calls, repeats, pause_s), strict=True):
        row["latency_ms"] = Latency.of(samples).to_dict()
        if not row["graphs"]:  # stages are never run as a graph
            row["stages_ms"] = stages_ms(detectors[False], [kinds[row["frames"]]] * row["batch"], FINE_CALLS)
    for detector in detectors.values():
        detector.close()
    return rows


def main() -> int:
    """Measure, print a table and write the results."""
    parser = ArgumentParser(prog="python -m tests.gpu.latency", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"result (default: benchmarks/results/{NAME})")
    parser.add_argument("--quick", action="store_true", help="a few calls on the simulated device; --out is in build")
    if "--out" not in sys.argv:
        parser.set_defaults(out=ROOT / ("build" if "--quick" in sys.argv else "benchmarks/results") / NAME)
    args = parse(parser)
    problem = gpu_problem()
    if problem and not args.quick:
        raise GpuError(f"{problem}: --quick runs on the simulated device")
    size_hw = QUICK_SIZE if args.quick else SIZE
    device = HostDevice() if args.quick else open_device("cuda:0")
    rows = measure(device, size_hw, *((2, 0.0) if args.quick else (REPEATS, 0.1)))
    for row in rows:
        figures = "  ".join(f"{name} {row['latency_ms'][name]:8.3f}" for name in ("p50", "p95", "p99"))
        how = "graphs" if row["graphs"] else "plain"
        print(f"{row['frames']:7} batch {row['batch']}  {how:7} ms: {figures}")
        if "stages_ms" in row:
            print("  " + ", ".join(f"{name} {ms:.3f}" for name, ms in row["stages_ms"].items()))
    what = f"TRTRetinaFace.detect_batch with a network of torch at {size_hw[0]}x{size_hw[1]}, milliseconds a call"
    write_result(args, what, rows, "torch", "numpy", "cuda-bindings", device=device.name)
    device.close()
    return 0


if __name__ == "__main__":
    run(main)
