"""What one warm call of `detect` walks through: functions of ours, the files they lie in, switches between files.

python -m benchmarks.call_path --model retinaface.plugin.onnx [--json -]

A plugin form (`python -m export.to_trt --onnx-only`) runs in every detector, TRTRetinaFace on the simulated device; a
file of `python -m export.to_onnx` in the two of the CPU. Calls on other threads, such as the work of the simulated
device's streams, are not counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import trt_runtime
from facespec.cli import ArgumentParser, json_output, run
from facespec.images import read_image
from facespec.letterbox import Frame
from facespec.samples import sample_photographs
from trt_runtime.cpu import OpenVinoRetinaFace, OrtRetinaFace
from trt_runtime.onnx_model import OnnxModel
from trt_runtime.trt import TRTRetinaFace

SIZE = (640, 640)
WARM_UP = 3
_ROOT = Path(trt_runtime.__file__).resolve().parent.parent
_OURS = tuple(f"{_ROOT / package}/" for package in ("facespec", "trt_runtime"))
_INLINE = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")

DETECTORS: dict[str, Callable[..., Any]] = {
    "OrtRetinaFace": OrtRetinaFace,
    "OpenVinoRetinaFace": OpenVinoRetinaFace,
    "TRTRetinaFace": partial(TRTRetinaFace, device="cpu"),
}


class CallPath(NamedTuple):
    """What a call walked through of ours: "file:name:line" of each function in the order of first calls, their files.

    `switches` counts the calls of ours into another file than the call of ours before.
    """

    functions: list[str]
    files: list[str]
    switches: int


def walk(call: Callable[[], object]) -> CallPath:
    """Return what a call walks through on this thread; comprehensions belong to the function they stand in."""
    places: list[str] = []
    functions: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_OURS) and code.co_name not in _INLINE:
            places.append(str(Path(code.co_filename).relative_to(_ROOT)))
            functions.append(f"{places[-1]}:{code.co_name}:{code.co_firstlineno}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    switches = sum(one != other for one, other in pairwise(places))
    return CallPath(list(dict.fromkeys(functions)), list(dict.fromkeys(places)), switches)


def walk_detect(name: str, model: Path, frame: Frame) -> CallPath:
    """Return what a warm `detect` of one of `DETECTORS` walks through."""
    with DETECTORS[name](model, size_hw=SIZE) as detector:
        for _ in range(WARM_UP):  # the second call may capture a graph
            detector.detect(frame)
        return walk(lambda: detector.detect(frame))


def main() -> int:
    """Count, print a table, and write it."""
    parser = ArgumentParser("python -m benchmarks.call_path", description="What a warm call of detect walks through.")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE.onnx", help="a detector")
    parser.add_json("every function, too")
    args = parser.parse_args()
    frame = read_image(next(iter(sample_photographs())))
    names = [name for name in DETECTORS if name != "TRTRetinaFace" or OnnxModel(args.model).is_plugin_form]
    with json_output(args.json) as write:
        found = {name: walk_detect(name, args.model, frame) for name in names}
        for name, path in found.items():
            print(f"{name:20} {len(path.functions)} functions, {len(path.files)} files, {path.switches} switches")
        write(json.dumps({name: path._asdict() for name, path in found.items()}, indent=2))
    return 0


if __name__ == "__main__":
    run(main)
