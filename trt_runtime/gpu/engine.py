"""An engine file, checked and loaded: what `TRTRetinaFace` runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from facespec.cli import require
from facespec.errors import GpuError, ModelFileError, OutputError
from facespec.files import atomic_path, cache_folder
from facespec.spec import ModelSpec
from trt_runtime.gpu import tensorrt_api as api
from trt_runtime.gpu.device import Device, Memory, Stream, out_of_memory
from trt_runtime.gpu.flavor import FLAVORS
from trt_runtime.gpu.sidecar import Profile, Sidecar, read_engine, read_sidecar, sidecar_path
from trt_runtime.kernels import PLUGIN, ensure_library, load_letterbox

Shape = tuple[int, int, int]
"""(B, H, W) of the input."""

CACHE_FILES = 16
CACHE_BYTES = 1 << 28
"""Of what TensorRT-RTX has compiled, all engines together; the files that were used last are kept."""


class Context(Protocol):
    """A network that is prepared for one shape and fixed addresses at a time."""

    def set_shape(self, shape: Shape) -> int:
        """Set the shape of the input; return the bytes of workspace that it needs; GpuError if the engine refuses it.

        `bind` must follow.
        """

    def bind(self, addresses: dict[str, int], workspace: Memory) -> None:
        """Set where everything lies.

        Args:
            addresses: Of `images` and of every output.
            workspace: As large as `set_shape` says, or larger; contexts that never run at the same time may share it.

        Raises:
            GpuError: The engine refuses an address.
        """

    def enqueue(self, stream: Any) -> None:
        """Put the network, decoding and NMS on a stream; GpuError if the engine refuses the run."""

    def can_capture(self, stream: Any) -> bool:
        """Whether a run on a stream can be captured in a CUDA graph, as far as that is known before."""

    def plugin_share(self, stream: Any) -> float:
        """Return the share of its time that decoding and NMS take, 0 to 1; 0 if it cannot be measured.

        It runs on `stream` to measure that, and must not be captured afterwards.
        """

    def close(self) -> None:
        """Free it."""


class Engine(Protocol):
    """A detector graph on a device."""

    backend: str  # what runs it: "tensorrt", "rtx", "host"
    spec: ModelSpec
    files: list[Path]
    profile: Profile

    def context(self, repeats: bool = True) -> Context:
        """Return a context.

        Args:
            repeats: Whether it is for one shape that is run many times, and for captures, which may take longer to
                prepare; otherwise for any number of shapes, one after the other.

        Raises:
            DeviceMemoryError: The device has no memory for it.
            GpuError: It cannot be made.
        """

    def letterbox(self, frames: int, shape: Shape, images: int, stream: Any) -> None:
        """Put the letterbox kernel on a stream; see `trt_runtime.kernels`.

        Args:
            frames: Address of the descriptions of the frames, one `LetterboxFrame` for each image.
            shape: Of `images`.
            images: Address of the letterboxed frames, uint8 (B, H, W, 3), which are written.
            stream: Of the device.
        """

    def environment(self) -> dict[str, Any]:
        """Return backend and versions."""

    def save(self) -> None:
        """Keep what was compiled for the next start, where something is compiled."""

    def close(self) -> None:
        """Free it; close its contexts before."""


class TrtEngine:
    """An engine file of TensorRT or TensorRT-RTX. Its sidecar is checked before the file is loaded.

    Args:
        path: Engine, written by `python -m export.to_trt`, with its sidecar beside it.
        device: The device to run on, active on this thread.

    Raises:
        ModelFileError: The engine is missing, differs from its sidecar, or was built for another GPU, plugin or
            TensorRT; the message names the command that builds it again.
        MissingPackageError: The TensorRT that built it is not installed.
        BuildError: The plugin library is not compiled yet and cannot be compiled, or does not fit the driver.
        GpuError: The engine cannot be loaded.
    """

    def __init__(self, path: str | Path, device: Device) -> None:
        self.sidecar = sidecar = read_sidecar(path)
        content = check_runs_here(path, sidecar, device.compute_capability, device.name)
        flavor = FLAVORS[sidecar.flavor]
        self.backend = flavor.name
        self.spec = sidecar.spec
        self.files = [Path(path), sidecar_path(path)]
        least, best, most = (sidecar.profile[name] for name in ("min", "opt", "max"))
        sizes_hw = (least[1], least[2]), (best[1], best[2]), (most[1], most[2])
        self.profile = Profile((least[0], best[0], most[0]), sizes_hw)
        self._device = device
        self._making = threading.Lock()
        self._trt = trt = require(flavor.module, flavor.extra, f"running {path}")
        _check_version(path, sidecar, trt.__version__)
        plugin = str(ensure_library("plugin", runs_here=True))
        self._launch_letterbox = load_letterbox(ctypes.CDLL(plugin))
        self._logger = api.make_logger(trt)
        self._runtime = api.make_runtime(trt, self._logger)
        if self._runtime is None:
            raise GpuError(f"{flavor.title} does not start{self._reason()}: does it fit the NVIDIA driver?")
        if not api.load_plugin(self._runtime, plugin):
            raise GpuError(f"{flavor.title} cannot load the plugin {plugin}{self._reason()}: python -m plugins.build")
        self._logger.errors.clear()
        self._engine = api.deserialize(self._runtime, content)
        if self._engine is None:
            if "memory" in self._reason().lower():
                raise out_of_memory(f"the engine {path}", sidecar.engine_bytes, *device.free_and_total())
            raise GpuError(f"{path}: {flavor.title} cannot load it{self._reason()}; it is built by: {sidecar.command}")
        self._check_contract(path)
        self._cache = api.make_runtime_cache(trt, self._engine)
        # other GPUs, and other versions, refuse what one of them has compiled
        name = f"{sidecar.engine_sha256} {trt.__version__} {device.name}"
        self._cache_path = cache_folder() / "rtx" / f"{hashlib.sha256(name.encode()).hexdigest()}.cache"
        self._saved = _read_cache(self._cache, self._cache_path) if self._cache is not None else 0

    def context(self, repeats: bool = True) -> TrtContext:
        with self._making:
            self._logger.errors.clear()
            context = api.make_context(self._trt, self._engine, self._cache, repeats)
            if context is None:
                if "memory" in self._reason().lower():
                    raise out_of_memory("an execution context", None, *self._device.free_and_total())
                raise GpuError(f"TensorRT cannot make an execution context{self._reason()}")
        return TrtContext(self, context)

    def letterbox(self, frames: int, shape: Shape, images: int, stream: Stream) -> None:
        pad = self.spec.preprocess.mean_bgr
        self._launch_letterbox(frames, shape[0], (shape[1], shape[2]), pad, images, stream.handle)

    def environment(self) -> dict[str, Any]:
        return {"backend": self.backend, FLAVORS[self.backend].title: self._trt.__version__}

    def save(self) -> None:
        content = api.cache_content(self._cache) if self._cache is not None else b""
        if len(content) > self._saved:
            self._saved = len(content)
            with suppress(OSError, OutputError):  # it is compiled again next time
                with atomic_path(self._cache_path) as temporary:
                    temporary.write_bytes(content)
                _drop_oldest(self._cache_path.parent)

    def close(self) -> None:
        self.save()
        self._cache = self._engine = self._runtime = None

    def _reason(self) -> str:
        """Return the last error of the logger in brackets, for an error message; "" if there is none."""
        try:
            last = self._logger.errors[-1]  # another thread may clear them at any time
        except IndexError:
            return ""
        return f" ({' '.join(last.split())[:300]})"

    def _check_contract(self, path: str | Path) -> None:
        found = {
            name: (is_input, kind, shape[-1:] if is_input else shape[1:])
            for name, (is_input, kind, shape) in api.tensors(self._trt, self._engine).items()
        }
        expected = {name: (False, *output) for name, output in self.spec.decode.outputs.items()}
        if found != {**expected, "images": (True, "uint8", (3,))}:
            raise ModelFileError(f"{path}: inputs or outputs are not those of a detector: {self.sidecar.command}")


class TrtContext:
    """A context of a `TrtEngine`."""

    def __init__(self, engine: TrtEngine, context: Any) -> None:
        self._owner = engine
        self._context = context

    def set_shape(self, shape: Shape) -> int:
        nbytes = api.set_shape(self._context, (*shape, 3))
        if nbytes is None:
            raise GpuError(f"TensorRT refuses an input of {shape}{self._owner._reason()}")
        return max(nbytes, 1)

    def bind(self, addresses: dict[str, int], workspace: Memory) -> None:
        if not api.bind(self._context, addresses, workspace.address, workspace.nbytes):
            raise GpuError(f"TensorRT refuses the address of a tensor{self._owner._reason()}")

    def enqueue(self, stream: Stream) -> None:
        if not api.enqueue(self._context, stream.handle):
            raise GpuError(f"TensorRT cannot run the network{self._owner._reason()}")

    def can_capture(self, stream: Stream) -> bool:
        return api.can_capture(self._context, stream.handle)

    def plugin_share(self, stream: Stream) -> float:
        times = api.start_profile(self._owner._trt, self._context)
        for _ in range(10):
            self.enqueue(stream)
            stream.synchronize()
            api.end_profile(self._context)
        total = sum(times.ms.values())
        # "{ForeignNode[a...b]}" is all from a to b, compiled as one: what the plugin takes of it is not known
        own = sum(ms for name, ms in times.ms.items() if PLUGIN.node in name and "..." not in name)
        return own / total if total else 0.0

    def close(self) -> None:
        self._context = None


def check_runs_here(path: str | Path, sidecar: Sidecar, capability: int, device: str) -> bytes:
    """Return the content of an engine; ModelFileError unless it is what its sidecar says, and for this GPU."""
    content, problems = read_engine(path, sidecar)
    if problems:
        raise ModelFileError(f"{path}: {problems[0]}")
    if capability not in sidecar.compute_capabilities:
        built = ", ".join(f"sm_{number}" for number in sidecar.compute_capabilities)
        raise ModelFileError(
            f"{path}: built for {built}, and {device} is sm_{capability}: build it again for this GPU: "
            f"{sidecar.command}"
        )
    return content


def _read_cache(cache: Any, path: Path) -> int:
    """Read what TensorRT-RTX compiled before; return how many bytes of it are of use."""
    try:
        content = path.read_bytes()
        os.utime(path)  # those that are not read any more go first
    except OSError:
        return 0
    return len(content) if api.read_cache(cache, content) else 0


def _drop_oldest(folder: Path) -> None:
    """Keep the caches that were used last."""
    left = CACHE_BYTES
    files = sorted(folder.glob("*.cache"), key=lambda path: path.stat().st_mtime, reverse=True)
    for number, path in enumerate(files):
        left -= path.stat().st_size
        if number >= CACHE_FILES or left < 0:
            path.unlink()


def _check_version(path: str | Path, sidecar: Sidecar, installed: str) -> None:
    """Raise ModelFileError if another version built it: TensorRT must match in three numbers, TensorRT-RTX in two."""
    digits = 2 if sidecar.flavor == "rtx" else 3
    if sidecar.version.split(".")[:digits] != installed.split(".")[:digits]:
        raise ModelFileError(
            f"{path}: built by {FLAVORS[sidecar.flavor].title} {sidecar.version}, and {installed} is installed: build "
            f"it again: {sidecar.command}"
        )
