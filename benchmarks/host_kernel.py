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
from numpy.typing import NDArray

from benchmarks.environment import benchmark_parser, in_turns, parse, write_result
from benchmarks.latency import SIZE, load_frames
from export.graph import HEAD_NAMES
from export.parity import rows_from_maps
from export.to_onnx import ExportOptions, export_onnx
from facespec.boxes import decode_detections
from facespec.cli import run
from facespec.priors import make_priors
from facespec.spec import DecodeSpec, ModelSpec
from facespec.tables import text_table
from trt_runtime.kernels import decode_nms
from trt_runtime.measure import Latency
from trt_runtime.onnx_model import open_session

Maps = list[NDArray[np.float32]]


def parts(model: Path) -> tuple[Callable[[NDArray[np.uint8]], Maps], Callable[[Maps], list[Any]]]:
    """Return the exported graph up to the head maps, and from there on."""
    outputs = list(DecodeSpec().outputs)
    with tempfile.TemporaryDirectory() as folder:
        network, decoding = (str(Path(folder) / f"{name}.onnx") for name in ("network", "decoding"))
        onnx.utils.extract_model(str(model), network, ["images"], list(HEAD_NAMES), check_model=False)
        onnx.utils.extract_model(str(model), decoding, list(HEAD_NAMES), outputs, check_model=False)
        first, second = (open_session(path, path, 1) for path in (network, decoding))
    return (
        lambda images: first.run(list(HEAD_NAMES), {"images": images}),
        lambda maps: second.run(outputs, dict(zip(HEAD_NAMES, maps, strict=True))),
    )


def main() -> int:
    """Run the benchmark, print a table and write the result."""
    parser = benchmark_parser("host_kernel", __doc__)
    parser.add_argument("--frames", type=Path, help="folder of images (default: sample photographs)")
    parser.add_argument("--count", type=int, default=24, help="number of frames")
    parser.add_argument("--rounds", type=int, default=20, help="times every frame is decoded")
    args = parse(parser, count=2, rounds=1)
    spec = ModelSpec()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "retinaface.onnx"
        export_onnx(ExportOptions("mobilenet0.25", model, SIZE, decode=spec.decode))
        network, operators = parts(model)
        frames = load_frames(args.frames, args.count)
        maps = [network(frame[None]) for frame in frames.images]
    priors = make_priors(spec.anchors, SIZE)
    rows = [np.split(rows_from_maps(levels, spec.anchors.per_cell), [4, 6], axis=1) for levels in maps]
    work: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
        "host_kernel": (lambda levels: decode_nms(levels, SIZE, spec), maps),
        "onnx_operators": (operators, maps),
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
