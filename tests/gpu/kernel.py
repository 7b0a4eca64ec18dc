"""The compiled kernels on a GPU, called through their C interface. torch only brings memory, streams and graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facespec.spec import ModelSpec
from plugins.build import build, compiler_version, find_nvcc, is_current, library_path
from trt_runtime.kernels import HEAD_TYPES, DecodeParams, Outputs, check_driver, load_letterbox, make_params

Array = NDArray[Any]

ROOT = Path(__file__).parents[2]
DEVICE = "cuda"
GUARD_BYTES = 256
GUARD = 0xA5

MISALIGNED_ADDRESS = 716  # cudaErrorMisalignedAddress
INVALID_VALUE = 1  # cudaErrorInvalidValue


def gpu_problem() -> str | None:
    """Return None, or why nothing can be run on a GPU here."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return f"no NVIDIA GPU that torch {torch.__version__} can use"
    return None


def capability() -> int:
    """Return the compute capability of the present GPU, for instance 90."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def build_kernels(architecture: int, target: str = "kernels") -> Path:
    """Return the library with machine code for one architecture, built anew if its sources have changed.

    Raises:
        BuildError: It must be built, and cannot be, or the driver is too old for this nvcc.
    """
    folder = ROOT / "build" / "gpu" / f"sm_{architecture}"
    path = library_path(target, folder)
    if not is_current(target, folder):
        check_driver(f"what {find_nvcc()} compiles", compiler_version(find_nvcc()))
        build(target, (architecture,), folder)
    return path


class Kernels:
    """The functions of plugins/src/device_api.cpp."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.retinaface_check.restype = ctypes.c_char_p
        self._library.retinaface_workspace_bytes.restype = ctypes.c_size_t
        self._library.retinaface_launch.restype = ctypes.c_int32
        self.letterbox = load_letterbox(self._library)

    def check(self, params: DecodeParams) -> str | None:
        """Return None, or what is wrong with the parameters."""
        problem: bytes | None = self._library.retinaface_check(ctypes.byref(params))
        return problem.decode() if problem else None

    def workspace_bytes(self, params: DecodeParams) -> int:
        """Return the bytes of device memory a launch needs."""
        return int(self._library.retinaface_workspace_bytes(ctypes.byref(params)))

    def launch(
        self,
        params: DecodeParams,
        head_type: int,
        heads: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> int:
        """Put the kernels on a stream; all are addresses. Return a cudaError_t."""
        return int(
            self._library.retinaface_launch(
                ctypes.byref(params),
                ctypes.c_int32(head_type),
                (ctypes.c_void_p * len(heads))(*heads),
                ctypes.byref(Outputs(*outputs)),
                ctypes.c_void_p(workspace),
                ctypes.c_void_p(stream),
            )
        )


class Driver:
    """A few calls of libcuda, in the first device's primary context, which the runtime and torch share."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self("cuInit", ctypes.c_uint(0))
        self("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}")

    def allocate(self, size: int) -> int:
        """Return the address of new device memory of exactly `size` bytes, not initialised."""
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def upload(self, array: Array) -> int:
        """Return the address of a copy on the device of a contiguous array."""
        address = self.allocate(array.nbytes)
        self("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), _size(array))
        return address

    def download(self, address: int, array: Array) -> None:
        """Fill a contiguous array from the device, after everything on the default stream."""
        self("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), _size(array))

    def free(self, address: int) -> None:
        """Free device memory."""
        self("cuMemFree_v2", ctypes.c_uint64(address))


def _size(array: Array) -> ctypes.c_size_t:
    return ctypes.c_size_t(array.nbytes)


def in_memory_order(head: Array, channels_last: bool) -> Array:
    """Return a head map (B, C, H, W) as the kernels read it: contiguous, (B, H, W, C) if channels-last."""
    return np.ascontiguousarray(head.transpose(0, 2, 3, 1) if channels_last else head)


class Guarded:
    """Device memory between two guards that nobody may write to."""

    def __init__(self, size: int) -> None:
        import torch

        self._all = torch.full((size + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8, device=DEVICE)
        self.inside = self._all[GUARD_BYTES : GUARD_BYTES + size]

    def intact(self) -> bool:
        end = GUARD_BYTES + len(self.inside)
        return bool((self._all[:GUARD_BYTES] == GUARD).all() and (self._all[end:] == GUARD).all())


class Call:
    """The kernels with memory of their own, for one batch size, image size, head type and layout.

    Addresses never change, so a captured launch can be replayed on other head maps.
    """

    def __init__(
        self,
        kernels: Kernels,
        spec: ModelSpec,
        size_hw: tuple[int, int],
        batch: int,
        dtype: Any = np.float32,
        channels_last: bool = False,
    ) -> None:
        import torch

        self.kernels = kernels
        self.channels_last = channels_last
        self.params = make_params(batch, size_hw, spec)
        self.params.channels_last = channels_last
        problem = kernels.check(self.params)
        if problem:
            raise ValueError(problem)
        self.head_type = HEAD_TYPES[np.dtype(dtype)]
        channels = 16 * spec.anchors.per_cell
        float_type = torch.float32 if self.head_type == 0 else torch.float16
        self.heads = [
            torch.empty(
                (batch, rows, columns, channels) if channels_last else (batch, channels, rows, columns),
                dtype=float_type,
                device=DEVICE,
            )
            for rows, columns in spec.anchors.grids_hw(size_hw)
        ]
        self._memory: dict[str, Guarded] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        for name, (kind, shape) in spec.decode.outputs.items():
            whole = (batch, *shape)
            self._memory[name] = Guarded(4 * int(np.prod(whole)))
            kept = self._memory[name].inside
            self.outputs[name] = kept.view(torch.int32 if kind == "int32" else torch.float32).view(whole)
        self._memory["workspace"] = Guarded(kernels.workspace_bytes(self.params))
        self.workspace = self._memory["workspace"].inside

    @property
    def planar_heads(self) -> list[Any]:
        """The head maps as tensors of shape (B, C, H, W), whatever their layout."""
        return [head.permute(0, 3, 1, 2) if self.channels_last else head for head in self.heads]

    @property
    def bytes_moved(self) -> int:
        """Bytes that must at least be read and written: the head maps and the outputs, once."""
        return sum(t.numel() * t.element_size() for t in [*self.heads, *self.outputs.values()])

    def load(self, heads: Sequence[Array]) -> None:
        """Copy head maps of shape (B, C, H, W) to the device."""
        import torch

        for place, head in zip(self.heads, heads, strict=True):
            place.copy_(torch.from_numpy(in_memory_order(head, self.channels_last)))

    def poison(self, byte: int | None = None) -> None:
        """Fill outputs and workspace with one byte, or with random ones."""
        for memory in self._memory.values():
            if byte is None:
                memory.inside.random_(0, 256)
            else:
                memory.inside.fill_(byte)

    def code(self, heads: Sequence[int] | None = None, stream: int | None = None, **changed: int) -> int:
        """Launch on torch's current stream, or another; return the error code.

        Args:
            heads: Addresses instead of those of the head maps.
            stream: Handle of the stream.
            changed: Addresses instead of those of the outputs of these names, and of `workspace`.
        """
        import torch

        addresses = {name: output.data_ptr() for name, output in self.outputs.items()}
        addresses["workspace"] = self.workspace.data_ptr()
        addresses.update(changed)
        workspace = addresses.pop("workspace")
        return self.kernels.launch(
            self.params,
            self.head_type,
            [head.data_ptr() for head in self.heads] if heads is None else heads,
            list(addresses.values()),
            workspace,
            torch.cuda.current_stream().cuda_stream if stream is None else stream,
        )

    def launch(self) -> None:
        """Launch on torch's current stream.

        Raises:
            RuntimeError: The launch failed.
        """
        code = self.code()
        if code:
            raise RuntimeError(f"retinaface_launch: CUDA error {code}")

    def results(self) -> dict[str, Array]:
        """Return the outputs, after everything on the device.

        Raises:
            RuntimeError: Something beside the outputs and the workspace was written to.
        """
        import torch

        torch.cuda.synchronize()
        broken = [name for name, memory in self._memory.items() if not memory.intact()]
        if broken:
            raise RuntimeError(f"the kernels wrote beside {', '.join(broken)}")
        return {name: output.cpu().numpy() for name, output in self.outputs.items()}
