"""What TensorRT is asked in a child process, how many kernels an engine has, and what its layers compute in.

The build log tells the second, TensorRT's EngineInspector the third, where the engine's GPU is present.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from facespec.errors import BuildError
from facespec.files import work_folder
from trt_runtime.gpu.flavor import FLAVORS, Flavor, child_environment, gpu_capability
from trt_runtime.gpu.sidecar import Convolutions, Sidecar, precision_shares
from trt_runtime.kernels import PLUGIN, ensure_library

UNKNOWN = "unknown"
_BAR = "{desc}: {percentage:3.0f}%|{bar:24}| {elapsed} {postfix}"

_ALIASES = {"bfloat16": "bf16", "half": "fp16", "float": "fp32"}
"""Other words for precisions."""

_NO_KERNELS = ("signal", "wait", "shape_call")
"""Types of the layers of TensorRT-RTX that put no kernel on a stream."""

_CONVOLUTIONS = ("conv", "correlation", "runtime_fusion")
"""Parts of the types of layers that compute convolutions; the last two are those of Myelin, TensorRT's compiler. Its
"kgen" layers name convolutions too whose input they pad or whose result they scale."""

_WIDEST_LAST = ("int8", "bf16", "fp16", "fp32")


def run_builder(request: dict[str, Any], environment: dict[str, str], flavor: Flavor, progress: bool = False) -> str:
    """Run `export.engine_builder` and follow it; return the version of TensorRT.

    Raises:
        BuildError: It failed, or died.
    """
    last: dict[str, Any] = {}
    command = [sys.executable, "-m", "export.engine_builder"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as said:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
            cwd=Path(request["out"]).parent,  # not the user's folder, whose modules may have the names of ours
        )
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            with suppress(BrokenPipeError):
                child.stdin.write(json.dumps(request))
                child.stdin.close()
            with tqdm(total=100, desc=f"{flavor.title} builds", disable=not progress, bar_format=_BAR) as bar:
                for line in child.stdout:
                    try:
                        event = json.loads(line)
                    except ValueError:  # printed before the builder had stdout to itself
                        continue
                    last = event if isinstance(event, dict) and "event" in event else last
                    if last.get("event") == "progress":
                        bar.set_postfix_str(last["phase"][:40], refresh=False)
                        bar.update(max(100 * last["share"] - bar.n, 0))
                    elif last.get("event") == "done":
                        bar.set_postfix_str("", refresh=False)
                        bar.update(100 - bar.n)
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        said.seek(0)
        words = said.read().strip().splitlines()
    if last.get("event") == "done" and code == 0:
        return str(last["version"])
    if last.get("event") == "failed":
        # the plugin prints its errors where it cannot use TensorRT's logger; else what was printed may be anything
        printed = [line for line in words if line.startswith(PLUGIN.name)] or ([] if last["detail"] else words)
        raise BuildError(": ".join([f"{flavor.title}: {last['message']}", *last["detail"], *printed[-1:]]))
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise BuildError(": ".join([f"{flavor.title}: the build process {how}", *words[-1:]]))


def count_kernels(log: str) -> int | None:
    """Return how many kernels a call runs beside the plugin, from a build log that lists the layers; None without."""
    layers = re.findall(r"^Name: (.*?), LayerType: (\w+)", log, re.MULTILINE)
    return sum(kind not in _NO_KERNELS and PLUGIN.node not in name for name, kind in layers) or None


def is_readable(sidecar: Sidecar) -> bool:
    """Whether EngineInspector can be asked about an engine here: its TensorRT is installed, its GPU present."""
    flavor = FLAVORS.get(sidecar.flavor)
    return flavor is not None and flavor.installed() and gpu_capability() in sidecar.compute_capabilities


def read_information(engine: Path, sidecar: Sidecar) -> dict[str, Any]:
    """Return EngineInspector's JSON for an engine at the best shape of its profile.

    The engine is loaded: check it first.

    Raises:
        BuildError: TensorRT does not load it, or has died.
    """
    flavor = FLAVORS[sidecar.flavor]
    with child_environment(flavor) as environment, work_folder() as folder:
        out = folder / "layers.json"
        request = {
            "module": flavor.module,
            "engine": str(engine.resolve()),
            "plugin": str(ensure_library("plugin")),
            "shape": sidecar.profile["opt"],
            "log": str(folder / "log"),
            "out": str(out),
        }
        try:
            run_builder(request, environment, flavor)
        except BuildError as error:
            raise BuildError(f"{engine}: EngineInspector fails: {error}") from None
        try:
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BuildError(f"{engine}: EngineInspector's answer is not JSON: {error}") from None
        return found


def layer_precisions(information: dict[str, Any], names: set[str]) -> dict[str, str]:
    """Return the precision of convolutions by name; those that no layer names, or names without a type, are left out.

    A layer tells which nodes of the graph went into it by its metadata, and what it computes in by the types of its
    weights and inputs. Where several name a convolution, those that are convolutions count; where these differ, the
    widest type does. TensorRT 10 writes one "Format/Datatype"; 11 and RTX write "Datatype" apart from "Format", and
    list weights as "Constants".

    Args:
        information: EngineInspector's JSON of an engine built with detailed profiling verbosity.
        names: Nodes of the ONNX graph to look for.
    """
    found: dict[str, list[tuple[bool, str]]] = {}
    for layer in information.get("Layers", []):
        if not isinstance(layer, dict):  # a name alone: built without the details
            continue
        named = set(re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", ""))))
        named |= set(str(layer.get("Name", "")).split(" + "))
        precision = _precision(layer)
        if precision:
            kind = " ".join(str(layer.get(key, "")) for key in ("ParameterType", "LayerType", "TacticName")).lower()
            is_conv = any(part in kind for part in _CONVOLUTIONS)
            for name in named & names:
                found.setdefault(name, []).append((is_conv, precision))
    result = {}
    for name, options in found.items():
        best = [precision for is_conv, precision in options if is_conv] or [precision for _, precision in options]
        result[name] = max(best, key=_WIDEST_LAST.index)
    return result


def _precision(layer: dict[str, Any]) -> str | None:
    weights = layer.get("Weights")
    texts = [str(weights.get("Type", ""))] if isinstance(weights, dict) else []
    tensors = [*(layer.get("Inputs") or []), *(layer.get("Constants") or [])]
    operands = [tensor for tensor in tensors if isinstance(tensor, dict)][: 1 if texts else 2]
    texts += [str(tensor.get("Datatype", tensor.get("Format/Datatype", ""))) for tensor in operands]
    words = [_ALIASES.get(word, word) for text in texts for word in re.findall(r"\w+", text.lower())]
    known = [word for word in words if word in _WIDEST_LAST]
    return max(known, key=_WIDEST_LAST.index) if known else None


def engine_shares(engine: Path, sidecar: Sidecar) -> tuple[dict[str, float], list[str]]:
    """Return what `compare` finds in an engine, whose GPU must be present.

    Raises:
        BuildError: TensorRT does not load it.
    """
    found = layer_precisions(read_information(engine, sidecar), set(sidecar.convolutions))
    return compare(sidecar.convolutions, found)


def compare(convolutions: Convolutions, found: dict[str, str]) -> tuple[dict[str, float], list[str]]:
    """Return the share of multiply-accumulates in each precision, as found, and where it is not what the graph said.

    What `layer_precisions` did not find counts as `UNKNOWN`: TensorRT may fuse it into layers that tell no types.
    """
    read = {name: (macs, found.get(name, UNKNOWN)) for name, (macs, _) in convolutions.items()}
    problems = [
        f"{name} computes in {kind} in the engine, the graph has it in {convolutions[name][1]}"
        for name, (_, kind) in read.items()
        if kind not in (convolutions[name][1], UNKNOWN)
    ]
    return precision_shares(read), problems
