"""Every name of TensorRT's API that the code uses, checked against the real bindings of each flavour.

No name that the sources use can be missing from what is looked up. TensorRT 10.3 to 11.4 are their real Python
bindings over stub libraries (`make test` installs them side by side), TensorRT-RTX is the real thing.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import deque
from io import TextIOWrapper
from pathlib import Path

import pytest

from tests.export.trt_stubs import VERSIONS, bindings_environment

ROOT = Path(__file__).parents[2]
SOURCES = (
    ROOT / "export" / "engine_builder.py",
    ROOT / "trt_runtime" / "gpu" / "tensorrt_api.py",
)

# what the code uses of TensorRT's functions and objects; classes and enums are found by their capitals
MEMBERS = {
    "": "get_plugin_registry __version__",
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "INetworkDefinition": "num_outputs",
    "OnnxParser": "parse num_errors get_error",
    "ParserError": "desc",
    "IBuilderConfig": "clear_flag set_flag profiling_verbosity progress_monitor num_compute_capabilities "
    "set_compute_capability add_optimization_profile create_timing_cache set_timing_cache get_timing_cache "
    "builder_optimization_level avg_timing_iterations max_aux_streams",
    "IOptimizationProfile": "set_shape",
    "ITimingCache": "serialize",
    "IPluginRegistry": "load_library get_creator",
    "Runtime": "get_plugin_registry deserialize_cuda_engine",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_dtype get_tensor_mode get_tensor_shape "
    "device_memory_size_v2 create_runtime_config create_execution_context create_engine_inspector",
    "IExecutionContext": "engine update_device_memory_size_for_shapes set_device_memory set_input_shape "
    "set_tensor_address execute_async_v3 nvtx_verbosity profiler enqueue_emits_profile report_to_profiler "
    "is_stream_capturable",
    "EngineInspector": "execution_context get_engine_information",
    "IRuntimeConfig": "create_runtime_cache set_runtime_cache set_execution_context_allocation_strategy "
    "cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeCache": "serialize deserialize",
}
# attributes that these have are not looked up
PLAIN = (str, list, dict, deque, Path, TextIOWrapper)
RTX_ONLY = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "CudaGraphStrategy",
    "CudaGraphStrategy.DISABLED",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "DynamicShapesKernelSpecializationStrategy.NONE",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IExecutionContext.is_stream_capturable",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.set_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
}
LACKS = {
    "10.3": {"ICudaEngine.create_runtime_config", "IRuntimeConfig.set_execution_context_allocation_strategy"},
}
"""What a version has not; the code asks before it uses it."""


def _used() -> tuple[dict[str, int | None], list[tuple[str, str]]]:
    """Return the dotted names with the most arguments of a call, and (base, method) pairs that are overridden."""
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    given: dict[str, int] = {}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given[node.func.attr] = max(len(node.args), given.get(node.func.attr, 0))
    members = {name for listed in MEMBERS.values() for name in listed.split()}
    modules = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    names: dict[str, int | None] = {}
    for node in attributes:
        start, *path = ast.unparse(node).split(".")
        if re.fullmatch("[A-Z]\\w*", path[0]):
            names[".".join(path)] = None
        elif start not in modules and node.attr not in own and not any(hasattr(kind, node.attr) for kind in PLAIN):
            assert node.attr in members, f"{ast.unparse(node)}: whose is it?"
    unused = members - {node.attr for node in attributes}
    assert not unused, unused
    for kind, listed in MEMBERS.items():
        names |= {f"{kind}.{name}".strip("."): given.get(name) for name in listed.split()}
    overridden = []
    for node in nodes:
        for base in [item.attr for item in getattr(node, "bases", []) if isinstance(item, ast.Attribute)]:
            assert isinstance(node, ast.ClassDef)
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            overridden += [(base, name) for name in methods if not name.startswith("__") and name != "share"]
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
    _check(found, RTX_ONLY | LACKS.get(version, set()))


def test_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx")
    _, found = _look_up("tensorrt_rtx", {})
    _check(found, set())
