"""TensorRT without a GPU: what `trt_runtime/gpu/tensorrt_api.py` uses of its Python API, over a `HostDevice`.

`TrtEngine` runs on it as on the real one: an engine is any bytes, its network a plugin form that `HostEngine` has
loaded, and its work goes on the device's streams. TensorRT's rules are kept, and what breaks one is refused as TensorRT
refuses it: a null pointer or False, and an error in the logger. `tests/export/test_api_surface.py` checks the names
against the real bindings, and `test_engine.py` those of this file.
"""

from __future__ import annotations

import enum
import json
import math
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from trt_runtime.gpu.simulated import HostDevice, HostEngine
from trt_runtime.kernels import PLUGIN


def workspace_bytes(shape: Sequence[int], eager: bool = False) -> int:
    """Return what a run with an input of a shape needs; kernels that TensorRT-RTX makes for a shape need more."""
    return 300 + math.prod(shape) * (3 if eager else 2)


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING = Severity

    def __init__(self) -> None:
        self.is_made = True


class IProfiler:
    def __init__(self) -> None:
        self.is_made = True


class FakeGpu:
    """A `HostDevice` that is called a GPU, so that engines run on it."""

    def __init__(self, device: HostDevice, capability: int = 86, can_capture: bool = True) -> None:
        self.host = device
        self.name, self.index = "NVIDIA A10, device 0", 0
        self.compute_capability, self.can_capture = capability, can_capture

    def activate(self) -> AbstractContextManager[None]:
        return self.host.activate()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.host, name)


class FakeTensorRT(ModuleType):
    """The module.

    Args:
        device: Where engines run.
        network: What they compute.
        profile: Smallest and largest (B, H, W, 3).
        rtx: Whether it is TensorRT-RTX.

    Attributes:
        fails: What fails, and the error that TensorRT logs of it: "runtime", "plugin", "engine", "context", "shape",
            "enqueue", "capturable" (what TensorRT-RTX says of it), "capture", "cache" (to write it), "size"; "fault": a
            kernel of it breaks the device, of which TensorRT says no more than that something failed.
        room_for: Contexts that the device has memory for at the same time; None is any number.
        compiled: What TensorRT-RTX has compiled: "any shape", or a shape.
        contexts: Those that are alive.
        enqueued: Runs that were put on a stream, outside of captures.
        misplaced: What was made or freed where the device was not active: TensorRT takes whatever context is current.
    """

    ILogger, IProfiler = ILogger, IProfiler
    DataType = enum.Enum("DataType", "FLOAT HALF INT32 UINT8 INT64")
    TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
    ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")
    ExecutionContextAllocationStrategy = enum.Enum(
        "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
    )

    def __init__(
        self,
        device: HostDevice,
        network: HostEngine,
        profile: Sequence[tuple[int, ...]] = ((1, 32, 32, 3), (8, 320, 640, 3)),
        rtx: bool = False,
        version: str = "10.14.1.48",
    ) -> None:
        super().__init__("tensorrt_rtx" if rtx else "tensorrt")
        self.__version__ = version
        self.device, self.network, self.profile, self.is_rtx = device, network, tuple(profile), rtx
        self.fails: dict[str, str] = {}
        self.room_for: int | None = None
        self.compiled: list[str] = []
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self.enqueued = 0
        self.misplaced: list[str] = []
        self.logger: Any = None
        outputs = network.spec.decode.outputs
        kinds = {"int32": self.DataType.INT32, "float32": self.DataType.FLOAT}
        self.tensors: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
            "images": (self.TensorIOMode.INPUT, self.DataType.UINT8, (-1, -1, -1, 3)),
            **{name: (self.TensorIOMode.OUTPUT, kinds[kind], (-1, *rest)) for name, (kind, rest) in outputs.items()},
        }
        if rtx:
            self.CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
            self.DynamicShapesKernelSpecializationStrategy = enum.Enum(
                "DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE"
            )

    def Runtime(self, logger: Any) -> Runtime:  # noqa: N802 - as TensorRT calls it
        assert logger.is_made
        self.logger = logger
        if self.refuses("runtime"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Runtime(self)

    def check_place(self, what: str) -> None:
        """Note what happens where the device is not active."""
        if not getattr(self.device.thread, "depth", 0):
            self.misplaced.append(what)

    def refuses(self, what: str, why: str = "") -> bool:
        """Whether something fails; then the logger is told, amid much else, as TensorRT does."""
        why = self.fails.get(what, why)
        if self.logger is not None:
            self.logger.log(Severity.WARNING, f"a warning about {what}")
        if why:
            self.logger.log(Severity.ERROR, why)
            self.logger.log(Severity.INTERNAL_ERROR, "[checkMacros.cpp::catchCudaError::212] Error Code 1")
        return bool(why)


class Runtime:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self._plugins: list[str] = []

    def get_plugin_registry(self) -> SimpleNamespace:
        def load_library(path: str) -> object | None:
            assert type(path) is str  # what pybind11 takes
            if self._trt.refuses("plugin"):
                return None
            self._plugins.append(path)
            return object()

        return SimpleNamespace(load_library=load_library)

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        no_plugin = "" if self._plugins else "IPluginRegistry::getCreator: plugin not found"
        if self._trt.refuses("engine", no_plugin):
            return None
        return Engine(self._trt, content)


class Engine:
    """An ICudaEngine."""

    def __init__(self, trt: FakeTensorRT, content: bytes) -> None:
        self._trt = trt
        self.content = content
        self.device_memory_size_v2 = workspace_bytes(trt.profile[-1], eager=trt.is_rtx)
        trt.engines.add(self)
        trt.check_place("engine made")

    def __del__(self) -> None:
        self._trt.check_place("engine freed")

    @property
    def num_io_tensors(self) -> int:
        return len(self._trt.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._trt.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.tensors[name][1]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._trt.tensors[name][2]

    def __getattr__(self, name: str) -> Any:
        if name == "create_runtime_config" and not self._trt.__version__.startswith("10.3."):
            return lambda: RuntimeConfig(self._trt)
        raise AttributeError(name)

    def create_execution_context(self, settings: Any) -> Context | None:
        if not isinstance(settings, RuntimeConfig):
            settings, strategy = RuntimeConfig(self._trt), settings
            settings.set_execution_context_allocation_strategy(strategy)
        room_for = self._trt.room_for
        full = "" if room_for is None or len(self._trt.contexts) < room_for else "CUDA: out of memory"
        return None if self._trt.refuses("context", full) else Context(self._trt, self, settings)


class RuntimeConfig:
    __slots__ = ("_trt", "cache", "cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy", "strategy")

    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self.strategy = trt.ExecutionContextAllocationStrategy.STATIC
        self.cache: RuntimeCache | None = None
        if trt.is_rtx:
            self.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            self.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        assert self._trt.is_rtx
        return RuntimeCache(self._trt)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        assert self._trt.is_rtx
        self.cache = cache
        return True


class RuntimeCache:
    """What TensorRT-RTX has compiled for one of its versions and one GPU."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self.kernels: list[str] = []

    def serialize(self) -> memoryview | None:
        self._trt.check_place("cache written")
        if self._trt.refuses("cache"):
            return None
        content = {"version": self._trt.__version__, "kernels": self.kernels}
        return memoryview(json.dumps(content).encode())

    def deserialize(self, blob: bytes) -> bool:
        self._trt.check_place("cache read")
        try:
            content = json.loads(memoryview(blob).tobytes())
        except ValueError:
            content = {}
        if content.get("version") != self._trt.__version__:
            return not self._trt.refuses("blob", "the blob does not fit")
        self.kernels += content["kernels"]
        return True


class Context:
    """An IExecutionContext; its layers are two, in TensorRT-RTX one, and take longer each time they are profiled."""

    def __init__(self, trt: FakeTensorRT, engine: Engine, config: RuntimeConfig) -> None:
        self._trt, self.engine, self.config = trt, engine, config
        self.nvtx_verbosity = trt.ProfilingVerbosity.DETAILED
        self.profiler: Any = None
        self.enqueue_emits_profile = True
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.needs = engine.device_memory_size_v2
        self._compiled: set[str] = set()
        self._runs: list[bool] = []  # whether each is done
        self._reported = 0
        trt.contexts.add(self)
        trt.check_place("context made")

    def __del__(self) -> None:
        self._trt.check_place("context freed")

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.memory = address, nbytes

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, largest = self._trt.profile[0], self._trt.profile[-1]
        inside = len(shape) == 4 and all(
            low <= side <= high for low, side, high in zip(smallest, shape, largest, strict=True)
        )
        known = name in self._trt.tensors and self._trt.tensors[name][0] == self._trt.TensorIOMode.INPUT
        if self._trt.refuses("shape", "" if inside and known else f"{shape} of {name} is outside of the profile"):
            return False
        self.shape = tuple(shape)
        self.needs = self.engine.device_memory_size_v2
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        if not self.shape or self._trt.refuses("size"):
            return 0
        self.needs = workspace_bytes(self.shape, self._specializes)
        return self.needs

    @property
    def _specializes(self) -> bool:
        return self._trt.is_rtx and self.config.dynamic_shapes_kernel_specialization_strategy.name != "NONE"

    def _compile(self) -> None:
        """What TensorRT-RTX does before a run, unless this context has done it, or the cache has the kernels."""
        kernels = str(self.shape) if self._specializes else "any shape"
        cache = self.config.cache
        if kernels not in self._compiled and (cache is None or kernels not in cache.kernels):
            self._trt.compiled.append(kernels)
            if cache is not None:
                cache.kernels.append(kernels)
        self._compiled.add(kernels)

    def set_tensor_address(self, name: str, address: int) -> bool:
        fits = name in self._trt.tensors and address % 256 == 0
        if self._trt.refuses("address" if name == "scores" else "", "" if fits else f"{name} is wrong"):
            return False  # one alone that fails is enough
        self.addresses[name] = address
        return True

    def __getattr__(self, name: str) -> Any:
        if name == "is_stream_capturable" and self._trt.is_rtx:
            return lambda handle: not self._trt.refuses("capturable")
        raise AttributeError(name)

    def execute_async_v3(self, handle: int) -> bool:
        trt, device = self._trt, self._trt.device
        stream = device.find_stream(handle)
        address, nbytes = self.memory
        why = ""
        if self.config.strategy != trt.ExecutionContextAllocationStrategy.USER_MANAGED:
            why = "the context has memory of its own"
        elif nbytes < self.needs or address % 256:
            why = f"{nbytes} bytes at {address} are no workspace"
        elif set(self.addresses) != set(trt.tensors) or not self.shape:
            why = "not everything is bound"
        elif stream is None:
            why = "the default stream waits for others"
        elif stream.capturing and self.profiler is not None:
            why = "what is profiled cannot be captured"
        elif stream.capturing and "capture" in trt.fails:
            why = trt.fails["capture"]
        elif trt.is_rtx and stream.capturing:
            if self.config.dynamic_shapes_kernel_specialization_strategy.name != "EAGER" or not self._compiled:
                why = "a kernel is compiled during a capture"
            elif self.config.cuda_graph_strategy != trt.CudaGraphStrategy.DISABLED:
                why = "a capture in a capture"
        if "fault" in trt.fails:
            device.lose(RuntimeError("an illegal memory access was encountered"))
            why = trt.fails["fault"]
        if trt.refuses("enqueue", why):
            return False
        assert stream is not None
        if trt.is_rtx:
            self._compile()
        if not stream.capturing:
            trt.enqueued += 1
        shape, addresses, number, nbytes = self.shape, dict(self.addresses), len(self._runs), self.needs
        self._runs.append(False)

        def work() -> None:
            device.view(address, nbytes)[:] = 0x11
            images = device.view(addresses["images"], int(np.prod(shape))).reshape(shape)
            for name, values in trt.network.run(images)[0].items():
                device.view(addresses[name], values.nbytes)[:] = values.reshape(-1).view(np.uint8)
            self._runs[number] = True

        stream.submit(work)
        return True

    def report_to_profiler(self) -> bool:
        if self.profiler is None or self.enqueue_emits_profile or not all(self._runs):
            return False
        assert self.profiler.is_made
        for _ in self._runs[self._reported :]:
            self._reported += 1
            if self._trt.is_rtx:  # compiles the whole graph as one layer, which is named after its ends
                self.profiler.report_layer_time(f"{{ForeignNode[const_3...{PLUGIN.node}]}}", 4.0)
                continue
            self.profiler.report_layer_time("conv_1 + relu", 3.0 * self._reported)
            self.profiler.report_layer_time(PLUGIN.node, 1.0)
        return True
