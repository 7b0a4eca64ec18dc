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

from benchmarks.environment import benchmark_parser, by_index, in_turns, parse, write_result
from benchmarks.peers import SIZE, frames_origin, load_frames
from export.graph import HEAD_NAMES
from export.parity import rows_from_maps
from export.to_onnx import ExportOptions, export_onnx
from facespec.boxes import decode_detections, make_priors
from facespec.cli import run, text_table
from facespec.spec import DecodeSpec, ModelSpec
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
        maps = [network(frame[None]) for frame in load_frames(args.frames, args.count)]
    priors = make_priors(spec.anchors, SIZE)
    rows = [np.split(rows_from_maps(levels, spec.anchors.per_cell), [4, 6], axis=1) for levels in maps]
    ways: dict[str, Callable[[int], Any]] = {
        "host_kernel": lambda i: decode_nms(maps[i], SIZE, spec),
        "onnx_operators": lambda i: operators(maps[i]),
        "numpy_reference": lambda i: decode_detections(rows[i][0], rows[i][1], rows[i][2], priors, spec.decode),
    }
    by_frame = {name: by_index(call, range(len(maps))) for name, call in ways.items()}
    samples = in_turns(by_frame, args.rounds * len(maps), warm_up=len(maps))
    same = 0
    for i in range(len(maps)):
        ours, graph, reference = (call(i) for call in ways.values())
        count = len(reference.scores)
        same += bool(
            ours["num_detections"][0] == graph[0][0] == count
            and np.abs(ours["boxes"][0] - graph[1][0]).max() < 1e-3
            and np.abs(ours["boxes"][0, :count] - reference.boxes).max(initial=0) < 1e-3
        )
    times = {name: Latency.of(values) for name, values in samples.items()}
    result = {
        "frames": len(maps),
        "candidates": [int(decode_nms(levels, SIZE, spec)["num_candidates"][0]) for levels in maps],
        "frames_with_the_same_faces": same,
        "ms": {name: latency.to_dict() for name, latency in times.items()},
    }
    what = "decode + NMS of the head maps of a 640x640 frame on one CPU thread, FP32, down to a score of 0.02"
    which = f"{len(maps)} {frames_origin(args.frames)}, letterboxed"
    write_result(args, what, [result], "onnxruntime", "numpy", "onnxsim", inputs=which)
    lines = [[name, *(f"{ms:.3f}" for ms in (one.p50, one.p95, one.p99))] for name, one in times.items()]
    print(text_table(["", "p50 ms", "p95", "p99"], lines))
    print(f"the same faces on {same} of {len(maps)} frames")
    return 0


if __name__ == "__main__":
    run(main)
