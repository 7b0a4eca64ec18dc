"""All calls of TensorRT's Python API that run an engine; they work with TensorRT 10, 11 and TensorRT-RTX.

`tests/export/test_api_surface.py` checks every name that is used here against the real bindings.
"""

from __future__ import annotations

from collections import deque
from typing import Any


def make_logger(trt: Any) -> Any:
    """Return a logger that keeps the last errors in `.errors`."""

    class LastErrors(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and "checkMacros" not in message:
                self.errors.append(message)

    return LastErrors()


def make_runtime(trt: Any, logger: Any) -> Any:
    """Return a Runtime; None if TensorRT does not start, and the logger has the reason."""
    try:
        return trt.Runtime(logger)
    except TypeError:  # the bindings raise it for a null pointer
        return None


def load_plugin(runtime: Any, library: str) -> bool:
    """Load a plugin library into a Runtime; return whether that worked."""
    return runtime.get_plugin_registry().load_library(library) is not None


def deserialize(runtime: Any, content: bytes) -> Any:
    """Return the engine of a file's content; None if TensorRT refuses it, and the logger has the reason."""
    return runtime.deserialize_cuda_engine(content)


def tensors(trt: Any, engine: Any) -> dict[str, tuple[bool, str, tuple[int, ...]]]:
    """Return every input and output by its name: whether it is an input, its type as numpy names it, its shape."""
    kinds = {trt.DataType.UINT8: "uint8", trt.DataType.INT32: "int32", trt.DataType.FLOAT: "float32"}
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        found[name] = (is_input, kinds[kind] if kind in kinds else str(kind), tuple(engine.get_tensor_shape(name)))
    return found


def make_runtime_cache(trt: Any, engine: Any) -> Any:
    """Return the cache through which contexts share kernels that TensorRT-RTX compiled; None for TensorRT."""
    if not hasattr(trt, "CudaGraphStrategy"):
        return None
    return engine.create_runtime_config().create_runtime_cache()


def read_cache(cache: Any, content: bytes) -> bool:
    """Add kernels compiled before to a cache; return whether TensorRT-RTX takes them: same version, GPU and driver."""
    return bool(cache.deserialize(content))


def cache_content(cache: Any) -> bytes:
    """Return what `read_cache` takes; empty if it cannot be made."""
    content = cache.serialize()
    return b"" if content is None else bytes(content)


def make_context(trt: Any, engine: Any, cache: Any, repeats: bool) -> Any:
    """Return an execution context without memory of its own, or None.

    Args:
        trt: TensorRT's module.
        engine: From `deserialize`.
        cache: From `make_runtime_cache`; it must outlive the context.
        repeats: Whether it runs one shape many times, and can be captured in a CUDA graph; otherwise it runs many
            shapes, and TensorRT-RTX compiles nothing for each of them.
    """
    settings = strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if hasattr(engine, "create_runtime_config"):  # since TensorRT 10.13 at the latest; 10.3 has none
        settings = runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(strategy)
    if cache is not None:  # TensorRT-RTX compiles kernels at run time: compile all now, a capture forbids it later
        runtime_config.set_runtime_cache(cache)
        runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        runtime_config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if repeats
            else trt.DynamicShapesKernelSpecializationStrategy.NONE
        )
    context = engine.create_execution_context(settings)
    if context is not None:
        # engines contain all names of layers; to annotate them would cost time at each launch
        context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
    return context


def set_shape(context: Any, shape: tuple[int, ...]) -> int | None:
    """Set the shape of `images`, (B, H, W, 3); return the bytes of device memory for a run, None if it is refused."""
    if not context.set_input_shape("images", shape):
        return None
    # 0 is an error, too: then as much as the largest shape needs
    return int(context.update_device_memory_size_for_shapes() or context.engine.device_memory_size_v2)


def bind(context: Any, addresses: dict[str, int], workspace: int, nbytes: int) -> bool:
    """Set the addresses of all tensors of a context, and its memory; return whether it accepts them.

    Args:
        context: From `make_context`, with a shape.
        addresses: Address of each tensor, by its name.
        workspace: Address of its memory, 256-byte aligned.
        nbytes: Size of that memory, as `set_shape` returns it or more.
    """
    context.set_device_memory(workspace, nbytes)
    return all(context.set_tensor_address(name, address) for name, address in addresses.items())


def enqueue(context: Any, stream: int) -> bool:
    """Put the network on a stream; return whether that worked."""
    return bool(context.execute_async_v3(stream))


def can_capture(context: Any, stream: int) -> bool:
    """Whether a run on a stream can be captured in a CUDA graph; TensorRT-RTX alone can be asked."""
    return not hasattr(context, "is_stream_capturable") or bool(context.is_stream_capturable(stream))


def start_profile(trt: Any, context: Any) -> Any:
    """Let a context time its layers; return an object whose `.ms` has the times by layer after `end_profile`."""

    class LayerTimes(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.ms: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.ms[layer_name] = self.ms.get(layer_name, 0.0) + ms

    times = LayerTimes()
    context.profiler = times
    context.enqueue_emits_profile = False
    return times


def end_profile(context: Any) -> bool:
    """Collect the times of the run that has ended; return whether that worked."""
    return bool(context.report_to_profiler())
