"""The compiled kernels as Python calls them: decode + NMS, and the letterbox.

They are written once, in plugins/src, and compiled for GPUs and for the CPU; both give the same bits. The letterbox
gives those of `facespec.letterbox.Letterbox.apply` with cv2 on x86. `PLUGIN` is what an ONNX node names.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import math
import os
import re
import struct
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from facespec.errors import BuildError, FrameError, MissingToolError, RetinaFaceError, SpecError
from facespec.files import cached_file
from facespec.spec import AnchorSpec, DecodeSpec, ModelSpec

_HERE = Path(__file__).resolve().parent
_BUILD = "retinaface_plugins_build"

MAX_LEVELS = 4
MAX_PER_CELL = 4
SHARED_KEYS = 4096
HEAD_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}
ORDERS = ("forward", "reverse", "shuffled", "threads")

MAX_FRAME_SIDE = 16384
"""Pixels: up to here a float, in which positions are held, is fine enough."""

_REFUSED = "; it takes widths that are multiples of 32 and addresses aligned to 16 bytes"
_REBUILD = ": update the NVIDIA driver, or compile the plugin with an older nvcc: python -m plugins.build"
MENDS = {
    1: _REFUSED,
    716: _REFUSED,
    35: f", the plugin was compiled by a CUDA that is newer than the driver{_REBUILD}",
    209: f", the plugin has no code for this GPU{_REBUILD}",
    222: f", the plugin's PTX is newer than the driver{_REBUILD}",
}
"""What to do about an error of CUDA: cudaErrorInvalidValue and cudaErrorMisalignedAddress, given before anything is
launched, cudaErrorInsufficientDriver, cudaErrorNoKernelImageForDevice and cudaErrorUnsupportedPtxVersion."""


@dataclass(frozen=True)
class PluginName:
    """How TensorRT finds the plugin: as in plugins/src/plugin.cpp."""

    name: str = "RetinaFaceDecodeNMS"
    version: str = "2"
    namespace: str = "retinaface_trt"
    domain: str = "trt.plugins"
    node: str = "decode_nms"
    """Name of its node in our graphs, and so of its layer in engines."""


PLUGIN = PluginName()


def find_library(target: str = "plugin") -> Path | None:
    """Return a library that is compiled already, or None.

    It is looked for in the environment (RETINAFACE_PLUGIN names the file of the plugin), beside this package and in the
    user's cache folder. Where the sources lie beside this package, it must have been made of them as they are. `target`
    is "plugin", for GPUs, or "host".

    Raises:
        MissingToolError: RETINAFACE_PLUGIN names no file.
    """
    chosen = os.environ.get("RETINAFACE_PLUGIN")
    if target == "plugin" and chosen:
        if not Path(chosen).is_file():
            raise MissingToolError(f"RETINAFACE_PLUGIN={chosen}: no such file")
        return Path(chosen).resolve()
    if build := _build_module():
        found: Path | None = build.find_library(target)
        return found
    name = f"lib/libretinaface_{target}.so"
    return _HERE / name if (_HERE / name).is_file() else cached_file(name)


def ensure_library(target: str = "plugin", *, runs_here: bool = False) -> Path:
    """Return a library; it is compiled where there is none: see `find_library`.

    Args:
        target: "plugin", for GPUs, or "host".
        runs_here: The GPU here is to run it, so it must fit the driver: see `check_driver`.

    Raises:
        MissingToolError: It must be compiled, and a compiler, a header or the sources are missing.
        BuildError: It does not compile, or does not fit the driver.
        OutputError: There is no folder it could be written to.
    """
    if found := find_library(target):
        if runs_here:
            with suppress(OSError, ValueError, TypeError, KeyError):  # a library without a report is taken as it is
                report = json.loads(found.with_suffix(".json").read_text(encoding="utf-8"))
                check_driver(f"the plugin {found}", report["compiler_version"])
        return found
    build = _build_module()
    if build is None:
        raise MissingToolError(
            f"the {target} library is not compiled, and its sources (plugins/) are not beside trt_runtime: copy "
            f"libretinaface_{target}.so to {_HERE / 'lib'}"
        )
    compiler = build.find_compiler() if target == "host" else build.find_nvcc()
    if runs_here:
        check_driver(f"what {compiler} compiles", build.compiler_version(compiler))
    minutes = "about a quarter of a minute" if target == "host" else "a minute or more"
    # a warning, and not the log, which nobody need see: the caller waits for this
    warnings.warn(f"compiling the {target} library, which takes {minutes}: {build.destination(target)}", stacklevel=2)
    made: Path = build.ensure(target)
    return made


def check_driver(what: str, compiler: str) -> None:
    """Check that the driver here, if there is one, runs what nvcc compiled.

    That carries CUDA's runtime library, which needs a driver of its own major version or a later one.

    Args:
        what: Names it in the error.
        compiler: What `nvcc --version` says.

    Raises:
        BuildError: The driver is too old.
    """
    release, driver = re.search(r"release (\d+)\.\d+", compiler), ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
    except OSError:
        return
    major, minor = divmod(driver.value // 10, 100)
    if release and not failed and int(release[1]) > major:
        raise BuildError(
            f"{what} needs a driver of CUDA {release[1]}.0, and the NVIDIA driver here knows CUDA {major}.{minor}: "
            f"update the driver, or put an nvcc {major}.x first on PATH, then python -m plugins.build"
        )


def _build_module() -> Any:
    """Return our `plugins.build`, or None without it; an application may have a package named plugins of its own."""
    path = _HERE.parent / "plugins" / "build.py"
    if not (path.parent / "src" / "decode_nms.cuh").is_file():
        return None
    for name in ("plugins.build", _BUILD):
        module = sys.modules.get(name)
        if module is not None and Path(module.__file__ or "").resolve() == path:
            return module
    spec = importlib.util.spec_from_file_location(_BUILD, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[_BUILD] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class DecodeParams(ctypes.Structure):
    """`retinaface::DecodeParams` of plugins/include/decode_nms.h."""

    _fields_ = (
        ("batch", ctypes.c_int32),
        ("levels", ctypes.c_int32),
        ("per_cell", ctypes.c_int32),
        ("channels_last", ctypes.c_int32),
        ("strides", ctypes.c_int32 * MAX_LEVELS),
        ("grid_h", ctypes.c_int32 * MAX_LEVELS),
        ("grid_w", ctypes.c_int32 * MAX_LEVELS),
        ("min_sizes", ctypes.c_float * MAX_PER_CELL * MAX_LEVELS),
        ("variances", ctypes.c_float * 2),
        ("logit_threshold", ctypes.c_float),
        ("iou_threshold", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("max_detections", ctypes.c_int32),
    )


class Outputs(ctypes.Structure):
    """`retinaface::Outputs`: addresses, in the order of `DecodeSpec.outputs`."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("num_detections", "boxes", "scores", "landmarks", "num_candidates")
    )


class Schedule(ctypes.Structure):
    """`retinaface::Schedule` of plugins/src/host_api.cpp."""

    _fields_ = (
        ("order", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("warp_size", ctypes.c_int32),
        ("skipped_line", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
    )


def decode_attributes(spec: ModelSpec) -> dict[str, Any]:
    """Return the attributes by which the plugin knows how to decode: whole numbers, floats, or a list of either."""
    anchors, decode = spec.anchors, spec.decode
    return {
        "strides": list(anchors.strides),
        "min_sizes": [float(size) for level in anchors.min_sizes for size in level],
        "variances": [float(variance) for variance in decode.variances],
        "logit_threshold": float(decode.logit_threshold),
        "iou_threshold": float(decode.iou_threshold),
        "top_k": decode.top_k,
        "max_detections": decode.max_detections,
    }


def make_params(batch: int, size_hw: tuple[int, int], spec: ModelSpec) -> DecodeParams:
    """Return the parameters of a call for a batch of images of `size_hw` pixels.

    Raises:
        SpecError: More levels or priors per cell than the kernels are made for.
    """
    anchors, decode = spec.anchors, spec.decode
    if len(anchors.strides) > MAX_LEVELS or anchors.per_cell > MAX_PER_CELL:
        raise SpecError(
            f"the kernels take up to {MAX_LEVELS} levels and {MAX_PER_CELL} priors per cell, "
            f"not {len(anchors.strides)} and {anchors.per_cell}"
        )
    params = DecodeParams(
        batch=batch,
        levels=len(anchors.strides),
        per_cell=anchors.per_cell,
        variances=decode.variances,
        logit_threshold=decode.logit_threshold,
        iou_threshold=decode.iou_threshold,
        top_k=decode.top_k,
        max_detections=decode.max_detections,
    )
    for level, (rows, columns) in enumerate(anchors.grids_hw(size_hw)):
        params.strides[level] = anchors.strides[level]
        params.grid_h[level], params.grid_w[level] = rows, columns
        params.min_sizes[level][: anchors.per_cell] = anchors.min_sizes[level]
    return params


class _DecodePlan(NamedTuple):
    """What no frame of a size changes; of each output its name, type, shape and offset."""

    maps: list[tuple[int, ...]]
    outputs: list[tuple[str, np.dtype[Any], tuple[int, ...], int]]
    nbytes: int
    params: bytes


@functools.lru_cache(256)
def _decode_plan(batch: int, size_hw: tuple[int, int], anchors: AnchorSpec, decode: DecodeSpec) -> _DecodePlan:
    maps: list[tuple[int, ...]] = [(batch, 16 * anchors.per_cell, *grid) for grid in anchors.grids_hw(size_hw)]
    outputs, at = [], 0
    for name, (kind, shape) in decode.outputs.items():
        outputs.append((name, np.dtype(kind), (batch, *shape), at))
        at += -(-4 * math.prod((batch, *shape)) // 64) * 64
    params = make_params(batch, size_hw, ModelSpec(anchors=anchors, decode=decode))
    problem = library().retinaface_host_check(ctypes.byref(params)) if batch else None
    if problem:
        raise ValueError(problem.decode())
    return _DecodePlan(maps, outputs, at, bytes(params))


@functools.cache
def library() -> Any:
    """Return the host library, compiled at the first use.

    Raises:
        BuildError: It must be compiled, and there is no C++ compiler.
    """
    path = ensure_library("host")
    try:
        host = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error}): python -m plugins.build host") from None
    host.retinaface_host_check.restype = ctypes.c_char_p
    return host


def decode_nms(
    heads: Sequence[NDArray[Any]],
    size_hw: tuple[int, int],
    spec: ModelSpec,
    *,
    order: str = "forward",
    seed: int = 0,
    shared_capacity: int = SHARED_KEYS,
) -> dict[str, NDArray[Any]]:
    """Return the five outputs of a detector graph for the head maps of a batch.

    Args:
        heads: One array for each pyramid level, (B, 16 * priors per cell, H/s, W/s), all float32 or all float16:
            class, box and landmark channels in this order. Arrays that are all channels-last in memory are read as they
            are; others are copied unless they are contiguous.
        size_hw: Height and width of the network input in pixels.
        spec: The model; `anchors` and `decode` of it count.
        order: How the loops of a thread block are run; the result never depends on it. For tests.
        seed: Of the order "shuffled".
        shared_capacity: Candidates, a power of two from 64 to 4096, beyond which they are kept in other memory; the
            result never depends on it. For tests.

    Returns:
        `num_detections` (B,) int32, `boxes` (B, K, 4), `scores` (B, K), `landmarks` (B, K, 5, 2) float32 and
        `num_candidates` (B,) int32, as in `DecodeSpec.outputs`.

    Raises:
        ValueError: Types or shapes do not fit together.
        SpecError: More levels or priors per cell than the kernels are made for.
        BuildError: The library must be compiled, and there is no C++ compiler.
        MemoryError: There is not enough memory.
    """
    plan = _decode_plan(len(heads[0]) if heads else 0, size_hw, spec.anchors, spec.decode)
    if [head.shape for head in heads] != plan.maps:
        raise ValueError(f"heads of shapes {[head.shape for head in heads]}, expected {plan.maps}")
    kinds = {head.dtype for head in heads}
    if len(kinds) != 1 or not kinds <= HEAD_TYPES.keys():
        raise ValueError(f"heads must all be float32 or all float16, not {sorted(map(str, kinds))}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, not {order!r}")
    if not 64 <= shared_capacity <= SHARED_KEYS or shared_capacity & (shared_capacity - 1):
        raise ValueError(f"shared_capacity must be a power of two from 64 to {SHARED_KEYS}, not {shared_capacity}")
    room = np.empty(plan.nbytes, np.uint8)
    outputs = {name: np.ndarray(shape, kind, room, at) for name, kind, shape, at in plan.outputs}
    if not len(heads[0]):
        return outputs
    params = DecodeParams.from_buffer_copy(plan.params)
    maps = heads
    if not all(head.flags.c_contiguous for head in heads):
        maps = [head.transpose(0, 2, 3, 1) for head in heads]
        params.channels_last = all(view.flags.c_contiguous for view in maps)
        if not params.channels_last:
            maps = [np.ascontiguousarray(head) for head in heads]
    start = room.ctypes.data
    failed = library().retinaface_host_decode_nms(
        ctypes.byref(params),
        HEAD_TYPES[kinds.pop()],
        (ctypes.c_void_p * len(maps))(*[head.ctypes.data for head in maps]),
        ctypes.byref(Outputs(*[start + at for *_, at in plan.outputs])),
        shared_capacity,
        ctypes.byref(Schedule(order=ORDERS.index(order), threads=8, warp_size=4, skipped_line=0, seed=seed)),
    )
    if failed:
        raise MemoryError(f"no memory to decode {len(heads[0])} images of {size_hw[1]}x{size_hw[0]}")
    return outputs


Launch = Callable[[int, int, tuple[int, int], tuple[int, int, int], int, int], None]
"""(address of the frames, batch, size_hw, pad_bgr, address of the output, stream): see `load_letterbox`."""


class LaunchError(RetinaFaceError, RuntimeError):
    """The letterbox kernel could not be launched."""


class PixelFormat(IntEnum):
    """What the bytes of a frame mean: `retinaface::PixelFormat` of plugins/include/letterbox.h.

    NV12 is what hardware decoders give: a luma plane (h, w) and a plane (h / 2, w / 2, 2) of U and V. Which matrix it
    needs stands in the stream: BT.601 for standard definition, BT.709 for more; luma 16..235, or 0..255 where it is
    full.
    """

    BGR = 0
    NV12_BT601 = 1
    NV12_BT601_FULL = 2
    NV12_BT709 = 3
    NV12_BT709_FULL = 4


class LetterboxFrame(ctypes.Structure):
    """`retinaface::LetterboxFrame` of plugins/include/letterbox.h; one of zeros is a slot without a frame."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("chroma", ctypes.c_void_p),
        ("pitch", ctypes.c_int64),
        ("chroma_pitch", ctypes.c_int64),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("scaled_height", ctypes.c_int32),
        ("scaled_width", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("reserved", ctypes.c_int32 * 3),
    )


FRAME = struct.Struct("=QQqqiiiii12x")
"""The fields of a `LetterboxFrame`, packed."""


def frame_fields(
    address: int,
    pitch: int,
    frame_hw: tuple[int, int],
    scaled_hw: tuple[int, int],
    pixel_format: int = PixelFormat.BGR,
    chroma_address: int = 0,
    chroma_pitch: int = 0,
) -> tuple[int, ...]:
    """Return the fields of a `LetterboxFrame` for a frame, which is scaled to `Letterbox.scaled_hw`.

    The addresses are those of the first pixel or the luma plane, and of the U and V plane of NV12; a pitch is the bytes
    from row to row; `pixel_format` is a `PixelFormat`.

    Raises:
        FrameError: There can be no such frame, or it is too large.
    """
    (height, width), (scaled_height, scaled_width) = frame_hw, scaled_hw
    nv12 = pixel_format != 0
    row = width if nv12 else 3 * width
    problem = ""
    if not (
        0 < height <= MAX_FRAME_SIDE
        and 0 < width <= MAX_FRAME_SIDE
        and 0 < scaled_height <= MAX_FRAME_SIDE
        and 0 < scaled_width <= MAX_FRAME_SIDE
    ):
        problem = (
            f"scaled to {scaled_width}x{scaled_height}: sides must be 1 to {MAX_FRAME_SIDE} pixels for the GPU; "
            "cv2.resize makes a smaller frame"
        )
    elif nv12 and (height % 2 or width % 2):
        problem = "height and width of NV12 must be even"
    elif not address or pitch < row:
        problem = f"expected an address and a pitch of {row} bytes at least, got {address} and {pitch}"
    elif nv12 and (not chroma_address or chroma_pitch < row):
        problem = (
            f"expected the address of its chroma and a pitch of {row} bytes at least, got {chroma_address} and "
            f"{chroma_pitch}"
        )
    elif not nv12 and (chroma_address or chroma_pitch):
        problem = "it has no chroma plane; NV12 does"
    if problem:
        raise FrameError(f"frame of {width}x{height} pixels, {PixelFormat(pixel_format).name}: {problem}")
    return address, chroma_address, pitch, chroma_pitch, height, width, scaled_height, scaled_width, pixel_format


def describe_frame(*arguments: Any) -> LetterboxFrame:
    """Return `frame_fields` of the same arguments as the kernel reads them."""
    return LetterboxFrame(*frame_fields(*arguments))


def load_letterbox(library: Any) -> Launch:
    """Return the letterbox function of a library that ctypes has loaded: the plugin, the kernels, or the host library.

    Its arguments are the address of an array of `LetterboxFrame`, one a batch slot, 8-byte aligned; how many; the size
    of the network's input, the width a multiple of 32; the colour of the padding; the address of the output, uint8
    (batch, height, width, 3), 16-byte aligned; and the handle of a CUDA stream. On a GPU both addresses are device
    addresses, and the first launch must not be captured in a graph, because it loads the kernel. The host library works
    in host memory, before it returns; it ignores the stream.

    The function raises `LaunchError` if the launch fails, and ValueError for a padding colour that is none.
    """
    on_device = hasattr(library, "retinaface_letterbox")
    function = library.retinaface_letterbox if on_device else library.retinaface_host_letterbox
    address, number = ctypes.c_void_p, ctypes.c_int32
    function.argtypes = (address, number, number, number, ctypes.c_uint32, address, address)
    function.restype = number

    def launch(
        frames: int, batch: int, size_hw: tuple[int, int], pad_bgr: tuple[int, int, int], out: int, stream: int
    ) -> None:
        code = function(frames, batch, *size_hw, pack_bgr(pad_bgr), out, stream)
        if code:
            call = f"letterbox of {batch} frames into {size_hw[1]}x{size_hw[0]} at {out:#x}"
            error = f"CUDA error {code}" if on_device else "refused"
            raise LaunchError(f"{call}: {error}{MENDS.get(code, '')}")

    return launch


def pack_bgr(colour: tuple[int, int, int]) -> int:
    """Return b | g << 8 | r << 16.

    Raises:
        ValueError: A value is not in 0..255.
    """
    if not all(0 <= value <= 255 for value in colour):
        raise ValueError(f"a colour has three values from 0 to 255, not {colour}")
    blue, green, red = colour
    return blue | green << 8 | red << 16
