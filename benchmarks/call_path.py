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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

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

DETECTORS: dict[str, Callable[[Path], Any]] = {
    "OrtRetinaFace": lambda path: OrtRetinaFace(path, size_hw=SIZE),
    "OpenVinoRetinaFace": lambda path: OpenVinoRetinaFace(path, size_hw=SIZE),
    "TRTRetinaFace": lambda path: TRTRetinaFace(path, size_hw=SIZE, device="cpu"),
}


@dataclass(frozen=True)
class CallPath:
    """What a call walked through.

    Attributes:
        functions: "file:name:line" of each function of ours, in the order of their first calls.
        files: Files they lie in.
        switches: Calls of ours into another file than the call of ours before.
    """

    functions: list[str]
    files: list[str]
    switches: int


def walk(call: Callable[[], object]) -> CallPath:
    """Return what a call walks through on this thread; comprehensions belong to the function they stand in."""
    entered: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_OURS) and code.co_name not in _INLINE:
            entered.append((code.co_filename, f"{code.co_name}:{code.co_firstlineno}"))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    places = [str(Path(file).relative_to(_ROOT)) for file, _ in entered]
    functions = dict.fromkeys(f"{place}:{name}" for place, (_, name) in zip(places, entered, strict=True))
    switches = sum(one != other for one, other in pairwise(places))
    return CallPath(list(functions), list(dict.fromkeys(places)), switches)


def walk_detect(name: str, model: Path, frame: Frame) -> CallPath:
    """Return what a warm `detect` of one of `DETECTORS` walks through."""
    with DETECTORS[name](model) as detector:
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
        write(json.dumps({name: vars(path) for name, path in found.items()}, indent=2))
    return 0


if __name__ == "__main__":
    run(main)
