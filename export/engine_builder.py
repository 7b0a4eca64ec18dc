"""The child process in which TensorRT works, so that neither its aborts nor its prints reach the caller.

It reads one JSON request on stdin, writes what is asked for to a file, and tells on stdout, one JSON object a line, how
far it is and how it ended. `export.to_trt` starts it to build an engine; `export.engine_layers` starts it to read what
the layers of an engine compute in, which needs the GPU of the engine. It imports nothing but TensorRT.

The same code serves TensorRT 10, TensorRT 11 and TensorRT-RTX. `tests/export/test_api_surface.py` checks every name of
their API that is used here.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class BuildFailedError(Exception):
    """A step of the build failed."""


# stdout as it was when the process started; what libraries print goes to stderr instead
events = os.fdopen(os.dup(1), "w") if __name__ == "__main__" else sys.stdout


def tell(**event: Any) -> None:
    """Send an event to the parent."""
    print(json.dumps(event), file=events, flush=True)


def make_logger(trt: Any, log: Any, errors: list[str]) -> Any:
    """Return a logger that writes everything to a file and collects the errors."""
    start = time.perf_counter()

    class FileLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            name = str(severity).split(".")[-1]
            log.write(f"{time.perf_counter() - start:9.3f} {name} {message}\n")
            # on a machine without a GPU every other error is followed by one about the driver
            if name in ("ERROR", "INTERNAL_ERROR") and "checkMacros" not in message:
                errors.append(message)

    return FileLogger()


def make_monitor(trt: Any) -> Any:
    """Return a monitor that tells the share of the work that is done, from 0 to 1."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.open: list[list[Any]] = []  # name, steps, steps done; the outermost first

        def share(self) -> float:
            total, weight = 0.0, 1.0
            for _, steps, done in self.open:
                total += weight * min(done / steps, 1)
                weight /= steps
            return min(total, 1.0)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.open.append([phase_name, max(num_steps, 1), 0])
            tell(event="progress", phase=phase_name, share=self.share())

        def step_complete(self, phase_name: str, step: int) -> bool:
            for phase in self.open:
                if phase[0] == phase_name:
                    phase[2] = step + 1
            tell(event="progress", phase=phase_name, share=self.share())
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.open = [phase for phase in self.open if phase[0] != phase_name]

    return Monitor()


def parse(trt: Any, network: Any, logger: Any, content: bytes) -> None:
    """Parse an ONNX model into a network.

    Raises:
        BuildFailedError: The parser refuses it.
    """
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        problem = parser.get_error(0) if parser.num_errors else None
        raise BuildFailedError(f"the ONNX parser refuses the graph: {problem.desc() if problem else 'no reason given'}")
    if network.num_outputs == 0:  # of what is no ONNX at all the parser makes an empty network
        raise BuildFailedError("the ONNX parser found no outputs in the graph")


def build(request: dict[str, Any], trt: Any, logger: Any) -> Any:
    """Return the serialised engine, or None if the builder failed and has told the logger why.

    Raises:
        BuildFailedError: A step before the build itself failed.
    """
    builder = trt.Builder(logger)  # first: the registry logs to the logger of a builder
    registry = trt.get_plugin_registry()
    if registry is None or registry.load_library(request["plugin"]) is None:
        raise BuildFailedError(f"the plugin library {request['plugin']} cannot be loaded")
    name, version, namespace = request["plugin_name"]
    if registry.get_creator(name, version, namespace) is None:
        raise BuildFailedError(f"{request['plugin']} does not bring the plugin {name} version {version}")

    # ignored since TensorRT 11, where every network is strongly typed
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parse(trt, network, logger, Path(request["onnx"]).read_bytes())

    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; fp32 is to mean fp32
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: without it a CUDA graph is not promised
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names and types of layers, for EngineInspector
    config.progress_monitor = make_monitor(trt)
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]
    if request["timing_iterations"] is not None:
        config.avg_timing_iterations = request["timing_iterations"]
    if request["aux_streams"] is not None:
        config.max_aux_streams = request["aux_streams"]
    if request["capabilities"]:
        config.num_compute_capabilities = len(request["capabilities"])
        for index, number in enumerate(request["capabilities"]):
            capability = getattr(trt.ComputeCapability, f"SM{number}", None)
            if capability is None or not config.set_compute_capability(capability, index):
                raise BuildFailedError(f"this TensorRT-RTX does not build for compute capability {number}")
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *(tuple(request["profile"][name]) for name in ("min", "opt", "max")))
    if config.add_optimization_profile(profile) < 0:
        raise BuildFailedError("the sizes of the profile are refused")
    if request["timing_cache"]:
        path = Path(request["timing_cache"])
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        # one that another GPU or version has written is refused: then the build starts with an empty one
        if cache is None or not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)

    engine = builder.build_serialized_network(network, config)
    if engine is not None and request["timing_cache"]:
        cache = config.get_timing_cache()
        Path(request["timing_cache_out"]).write_bytes(bytes(cache.serialize()))
    return engine


def read_layers(request: dict[str, Any], trt: Any, logger: Any) -> str:
    """Return what EngineInspector says of the engine at one shape: types are not known before there is one.

    Raises:
        BuildFailedError: The plugin or the engine cannot be loaded.
    """
    runtime = trt.Runtime(logger)
    registry = runtime.get_plugin_registry()
    if registry.load_library(request["plugin"]) is None:
        raise BuildFailedError(f"the plugin library {request['plugin']} cannot be loaded")
    engine = runtime.deserialize_cuda_engine(Path(request["engine"]).read_bytes())
    if engine is None:
        raise BuildFailedError("the engine cannot be loaded")
    context = engine.create_execution_context()
    if context is None or not context.set_input_shape("images", tuple(request["shape"])):
        raise BuildFailedError("no execution context can be made")
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def main() -> int:
    """Do what the request on stdin asks for; return 0, or 1 after an event that says why not."""
    request = json.load(sys.stdin)
    os.dup2(2, 1)
    errors: list[str] = []
    with open(request["log"], "w", encoding="utf-8", errors="backslashreplace", buffering=1) as log:
        try:
            trt = importlib.import_module(request["module"])
            logger = make_logger(trt, log, errors)
            made = read_layers(request, trt, logger).encode() if "engine" in request else build(request, trt, logger)
        except (BuildFailedError, ImportError, TypeError) as error:  # TypeError: a Builder or Runtime cannot be made
            log.write(f"{error}\n")
            tell(event="failed", message=str(error), detail=errors[:1])
            return 1
        if made is None:
            tell(event="failed", message="the builder failed", detail=errors[:1])
            return 1
        Path(request["out"]).write_bytes(memoryview(made))
        tell(event="done", version=trt.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
