"""`HostEngine` runs a plugin form on the CPU for `TRTRetinaFace(..., device="cpu")`, to develop without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facespec.cli import require
from facespec.errors import ModelFileError
from facespec.spec import ENGINE_SUFFIXES, MAX_NETWORK_PIXELS, SIZE_MULTIPLE
from trt_runtime.gpu.engine import Shape
from trt_runtime.gpu.sidecar import Profile
from trt_runtime.gpu.simulated import HostDevice, HostStream
from trt_runtime.kernels import decode_nms, library, load_letterbox
from trt_runtime.onnx_model import OnnxModel, open_session

MAX_BATCH = 8
BEST_HW = (640, 640)
LARGEST_SIDE = MAX_NETWORK_PIXELS // MAX_BATCH // BEST_HW[0] // SIZE_MULTIPLE * SIZE_MULTIPLE


class HostEngine:
    """A plugin form on streams of a `HostDevice`: ONNX Runtime runs its network, host kernels letterbox and decode.

    Args:
        path: Plugin form, written by `python -m export.to_trt` beside its engine, or with --onnx-only.
        device: The device that it runs on.

    Raises:
        ModelFileError: The file is missing, unsafe, or not a plugin form.
        MissingPackageError: onnxruntime or onnx is not installed.
        BuildError: The host kernels are not compiled yet, and there is no C++ compiler.
    """

    backend = "host"
    workspace_bytes = 1

    def __init__(self, path: str | Path, device: HostDevice) -> None:
        if Path(path).suffix.lower() in ENGINE_SUFFIXES:
            raise ModelFileError(f"{path}: engines run on a GPU; device cpu runs the .plugin.onnx that lies beside one")
        model = OnnxModel(path)
        self.spec = model.spec
        if not model.is_plugin_form or model.weights:
            raise ModelFileError(
                f"{path}: device cpu runs plugin forms, in one file: "
                f"python -m export.to_trt --onnx-only --out {Path(path).stem}.plugin.onnx"
            )
        graph = model.heads_graph
        self.files = [Path(path)]
        self._heads = graph.heads
        self._session = open_session(graph.content, path, 1)
        self._device = device
        self._launch_letterbox = load_letterbox(library())
        best = graph.fixed_hw or BEST_HW
        smallest = graph.fixed_hw or (SIZE_MULTIPLE, SIZE_MULTIPLE)
        largest = graph.fixed_hw or (LARGEST_SIDE, LARGEST_SIDE)
        self.profile = Profile((1, 1, MAX_BATCH), (smallest, best, largest))

    def context(self, shape: Shape, addresses: dict[str, int], workspace: int) -> HostContext:
        return HostContext(self, self._device, shape, addresses)

    def letterbox(self, frames: int, shape: Shape, images: int, stream: HostStream) -> None:
        pad = self.spec.preprocess.mean_bgr
        stream.submit(self._launch_letterbox, frames, shape[0], (shape[1], shape[2]), pad, images, 0)

    def run(self, images: NDArray[np.uint8]) -> tuple[dict[str, NDArray[Any]], float]:
        """Return the outputs for letterboxed frames, and the share of the time that decoding and NMS took."""
        start = time.perf_counter()
        maps = self._session.run(self._heads, {"images": images})
        middle = time.perf_counter()
        found = decode_nms(maps, (images.shape[1], images.shape[2]), self.spec)
        end = time.perf_counter()
        return found, (end - middle) / (end - start)

    def environment(self) -> dict[str, Any]:
        return {"backend": self.backend, "onnxruntime": require("onnxruntime", "cpu", "device cpu").__version__}

    def close(self) -> None:
        self._session = None


class HostContext:
    """A context of a `HostEngine`: it reads and writes the device's memory only at the addresses that it was given."""

    def __init__(self, engine: HostEngine, device: HostDevice, shape: Shape, addresses: dict[str, int]) -> None:
        self._shape = shape
        self._share = 0.0
        outputs = engine.spec.decode.outputs
        sizes = {name: shape[0] * int(np.prod(item, dtype=int)) * 4 for name, (_, item) in outputs.items()}

        def work() -> None:
            images = device.view(addresses["images"], 3 * shape[0] * shape[1] * shape[2]).reshape(*shape, 3)
            found, self._share = engine.run(images)
            for name, values in found.items():
                device.view(addresses[name], sizes[name])[:] = values.reshape(-1).view(np.uint8)

        self._work: Callable[[], None] = work

    def enqueue(self, stream: HostStream) -> None:
        stream.submit(self._work)

    def plugin_share(self, stream: HostStream) -> float:
        self.enqueue(stream)
        stream.synchronize()
        return self._share

    def close(self) -> None:
        del self._work
