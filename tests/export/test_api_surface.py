"""Every name of TensorRT's API that the code uses, checked against the real bindings of each flavour.

The names are read off the sources, so a new one cannot be forgotten. TensorRT 10.16 and 11.4 are their real Python
bindings over stub libraries (`make test` installs them side by side), TensorRT-RTX is the real thing.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.trt_stubs import VERSIONS, bindings_environment

ROOT = Path(__file__).parents[2]
SOURCES = (
    ROOT / "export" / "engine_builder.py",
    ROOT / "export" / "engine_inspector.py",
    ROOT / "trt_runtime" / "gpu" / "tensorrt_api.py",
)

# what a variable of this name is, in these files
CLASSES = {
    "trt": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "registry": "IPluginRegistry",
    "cache": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "runtime_config": "IRuntimeConfig",
}
# variables, and attributes they may have, that are none of TensorRT's
PLAIN = {
    *("json", "os", "sys", "time", "importlib"),
    *("log", "errors", "self", "message", "path", "start", "times", "addresses"),
}
RTX_ONLY = {
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "CudaGraphStrategy",
    "CudaGraphStrategy.DISABLED",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.set_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
}


def _used() -> tuple[dict[str, int | None], list[tuple[str, str]]]:
    """Return the dotted names with the number of arguments of a call, and (base, method) pairs that are overridden."""
    names: dict[str, int | None] = {}
    overridden = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        calls = {id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                variable = node.value.id
                assert variable in CLASSES or variable in PLAIN, f"{path.name}:{node.lineno}: what is {variable}?"
                if variable in CLASSES:
                    names[f"{CLASSES[variable]}.{node.attr}".strip(".")] = calls.get(id(node))
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("trt."):
                names[ast.unparse(node).removeprefix("trt.")] = None
            elif isinstance(node, ast.ClassDef):
                for base in (ast.unparse(base) for base in node.bases if ast.unparse(base).startswith("trt.")):
                    methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
                    known = [method for method in methods if not method.startswith("__") and method != "share"]
                    overridden += [(base.removeprefix("trt."), method) for method in known]
    return names, overridden


LOOK_UP = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {}
for name in json.load(sys.stdin):
    thing = module
    for part in name.split("."):
        thing = getattr(thing, part, None) if thing is not None else None
    found[name] = None if thing is None else (getattr(thing, "__doc__", None) or "")
print(json.dumps({"version": module.__version__, "found": found}))
"""


def _look_up(module: str, environment: dict[str, str]) -> tuple[str, dict[str, str | None]]:
    names, overridden = _used()
    wanted = sorted({*names, *(f"{base}.{method}" for base, method in overridden)})
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOOK_UP, module],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )
    answer = json.loads(result.stdout)
    return answer["version"], answer["found"]


def _parameters(doc: str, method: str) -> list[int]:
    """Return how many arguments each overload of a method takes, without self, from what pybind11 writes of it."""
    counts = []
    for line in doc.splitlines():
        start = line.find(f"{method}(self: ")
        if start < 0:
            continue
        depth, commas = 0, 0
        for character in line[start + len(method) :]:
            depth += (character in "([{") - (character in ")]}")
            commas += character == "," and depth == 1
            if depth == 0:
                break
        counts.append(commas)
    return counts


def _check(found: dict[str, str | None], allowed_to_miss: set[str]) -> None:
    missing = {name for name, doc in found.items() if doc is None}
    assert missing <= allowed_to_miss
    checked = 0
    for name, arguments in _used()[0].items():
        doc = found[name]
        if arguments is None or not doc:
            continue
        counts = _parameters(doc, name.split(".")[-1])
        if counts:
            checked += 1
            assert arguments <= max(counts), f"{name} takes {counts} arguments, {arguments} are given"
    assert checked >= 8


def test_the_names_are_really_found() -> None:
    names, overridden = _used()
    some = {"Builder.build_serialized_network", "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "ILogger"}
    assert some <= names.keys()
    assert names["IOptimizationProfile.set_shape"] == 2  # the name, and three shapes unpacked
    assert ("IProgressMonitor", "step_complete") in overridden
    assert len(names) > 25


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt(version: str, tmp_path: Path) -> None:
    found_version, found = _look_up("tensorrt_bindings", bindings_environment(version, tmp_path))
    assert found_version.startswith(version + ".")
    assert found["ComputeCapability"] is None  # a name that is missing is noticed
    _check(found, RTX_ONLY)


def test_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx")
    _, found = _look_up("tensorrt_rtx", {})
    _check(found, set())
