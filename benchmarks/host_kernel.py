"""Decode + NMS on a CPU: the plugin's kernels on the host, the portable graph's operators, and the numpy reference.

python -m benchmarks.host_kernel [--frames DIR] [--out benchmarks/results/host_kernel.json]

All three get the head maps of the same frames, one thread each, in turns, and must find the same faces. The operators
are those of the exported graph behind the head maps, in ONNX Runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.environment import benchmark_parser, in_turns, parse, write_result
from benchmarks.latency import SIZE, load_frames
from export.graph import HEAD_NAMES
from export.parity import rows_from_maps
from export.to_onnx import ExportOptions, export_onnx
from facespec.boxes import decode_detections, make_priors
from facespec.cli import run, text_table
from facespec.spec import ModelSpec
from trt_runtime.kernels import decode_nms
from trt_runtime.measure import Latency
from trt_runtime.onnx_model import OnnxModel, open_session


def main() -> int:
    """Run the benchmark, print a table and write the result."""
    parser = benchmark_parser("host_kernel", __doc__)
    parser.add_argument("--frames", type=Path, help="folder of images (default: sample photographs)")
    parser.add_argument("--count", type=int, default=24, help="number of frames")
    parser.add_argument("--rounds", type=int, default=20, help="times every frame is decoded")
    args = parse(parser, count=2, rounds=1)
    spec = ModelSpec()
    outputs = list(spec.decode.outputs)
    with tempfile.TemporaryDirectory() as folder:
        model, decoding = (Path(folder) / f"{name}.onnx" for name in ("retinaface", "decoding"))
        export_onnx(ExportOptions("mobilenet0.25", model, SIZE, decode=spec.decode))
        onnx.utils.extract_model(str(model), str(decoding), list(HEAD_NAMES), outputs, check_model=False)
        network = open_session(OnnxModel(model).heads_graph.content, model, 1)
        operators = open_session(str(decoding), decoding, 1)
    frames = load_frames(args.frames, args.count)
    maps = [network.run(list(HEAD_NAMES), {"images": frame[None]}) for frame in frames.images]
    named = [dict(zip(HEAD_NAMES, levels, strict=True)) for levels in maps]
    priors = make_priors(spec.anchors, SIZE)
    rows = [np.split(rows_from_maps(levels, spec.anchors.per_cell), [4, 6], axis=1) for levels in maps]
    work: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
        "host_kernel": (lambda levels: decode_nms(levels, SIZE, spec), maps),
        "onnx_operators": (lambda levels: operators.run(outputs, levels), named),
        "numpy_reference": (lambda row: decode_detections(row[0], row[1], row[2], priors, spec.decode), rows),
    }
    samples = in_turns(list(work.values()), args.rounds * len(maps))
    found = [list(map(call, items)) for call, items in work.values()]
    same = 0
    for ours, graph, reference in zip(*found, strict=True):
        count = len(reference.scores)
        same += bool(
            ours["num_detections"][0] == graph[0][0] == count
            and np.abs(ours["boxes"][0] - graph[1][0]).max() < 1e-3
            and np.abs(ours["boxes"][0, :count] - reference.boxes).max(initial=0) < 1e-3
        )
    times = dict(zip(work, map(Latency.of, samples), strict=True))
    result = {
        "frames": len(maps),
        "candidates": [int(ours["num_candidates"][0]) for ours in found[0]],
        "frames_with_the_same_faces": same,
        "ms": {name: latency.to_dict() for name, latency in times.items()},
    }
    what = "decode + NMS of the head maps of a 640x640 frame on one CPU thread, FP32, down to a score of 0.02"
    write_result(args, what, [result], "onnxruntime", "numpy", "onnxsim", inputs=frames.what)
    lines = [[name, *(f"{ms:.3f}" for ms in (one.p50, one.p95, one.p99))] for name, one in times.items()]
    print(text_table(["", "p50 ms", "p95", "p99"], lines))
    print(f"the same faces on {same} of {len(maps)} frames")
    return 0


if __name__ == "__main__":
    run(main)
