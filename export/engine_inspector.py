"""The child process in which TensorRT loads an engine and its EngineInspector tells what the layers compute in.

It needs the GPU the engine was built for. It reads one JSON request on stdin and writes the inspector's JSON to a file;
what goes wrong is told on stderr. `export.engine_layers` starts it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from export.engine_builder import BuildFailedError, make_logger


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
    """Do what the request on stdin asks for; return 0, or 1 after a line on stderr."""
    request = json.load(sys.stdin)
    errors: list[str] = []
    with open(request["log"], "w", encoding="utf-8", errors="backslashreplace", buffering=1) as log:
        try:
            trt = importlib.import_module(request["module"])
            information = read_layers(request, trt, make_logger(trt, log, errors))
        except (BuildFailedError, ImportError, TypeError) as error:  # TypeError: a Runtime cannot be made
            print(f"{error}{f': {errors[0]}' if errors else ''}", file=sys.stderr)
            return 1
    Path(request["out"]).write_text(information, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
