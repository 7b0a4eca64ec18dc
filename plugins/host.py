"""The plugin's kernels on a CPU: the same source, compiled by g++; made to give the bits a GPU gives."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from facespec.errors import BuildError, SpecError
from facespec.spec import AnchorSpec, DecodeSpec
from plugins.build import ensure

MAX_LEVELS = 4
MAX_PER_CELL = 4
SHARED_KEYS = 4096
HEAD_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}
ORDERS = ("forward", "reverse", "shuffled", "threads")


class HeadSpec(Protocol):
    """What decode_nms needs to know: a `facespec.ModelSpec` has it."""

    @property
    def anchors(self) -> AnchorSpec:
        """Prior boxes."""

    @property
    def decode(self) -> DecodeSpec:
        """Thresholds and limits."""


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


def make_params(batch: int, size_hw: tuple[int, int], spec: HeadSpec) -> DecodeParams:
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


@functools.cache
def library() -> Any:
    """Return the host library, compiled at the first use.

    Raises:
        BuildError: It must be compiled, and there is no C++ compiler.
    """
    path = ensure("host")
    try:
        host = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error}): python -m plugins.build host") from None
    host.retinaface_host_check.restype = ctypes.c_char_p
    return host


def decode_nms(
    heads: Sequence[NDArray[Any]],
    size_hw: tuple[int, int],
    spec: HeadSpec,
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
        spec: A `facespec.ModelSpec`: its `anchors` and `decode`.
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
    batch = len(heads[0]) if heads else 0
    grids = spec.anchors.grids_hw(size_hw)
    shapes = [(batch, 16 * spec.anchors.per_cell, rows, columns) for rows, columns in grids]
    if [head.shape for head in heads] != shapes:
        raise ValueError(f"heads of shapes {[head.shape for head in heads]}, expected {shapes}")
    kinds = {np.dtype(head.dtype) for head in heads}
    if len(kinds) != 1 or not kinds <= HEAD_TYPES.keys():
        raise ValueError(f"heads must all be float32 or all float16, not {sorted(map(str, kinds))}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, not {order!r}")
    if not 64 <= shared_capacity <= SHARED_KEYS or shared_capacity & (shared_capacity - 1):
        raise ValueError(f"shared_capacity must be a power of two from 64 to {SHARED_KEYS}, not {shared_capacity}")
    outputs = {
        name: np.empty((batch, *shape), np.int32 if kind == "int32" else np.float32)
        for name, (kind, shape) in spec.decode.outputs.items()
    }
    if batch == 0:
        return outputs
    params = make_params(batch, size_hw, spec)
    problem = library().retinaface_host_check(ctypes.byref(params))
    if problem:
        raise ValueError(problem.decode())
    last = [head.transpose(0, 2, 3, 1) for head in heads]
    params.channels_last = all(view.flags.c_contiguous for view in last)
    maps = last if params.channels_last else [np.ascontiguousarray(head) for head in heads]
    addresses = (ctypes.c_void_p * len(maps))(*(head.ctypes.data for head in maps))
    schedule = Schedule(order=ORDERS.index(order), threads=8, warp_size=4, skipped_line=0, seed=seed)
    failed = library().retinaface_host_decode_nms(
        ctypes.byref(params),
        HEAD_TYPES[kinds.pop()],
        addresses,
        ctypes.byref(Outputs(*(array.ctypes.data for array in outputs.values()))),
        shared_capacity,
        ctypes.byref(schedule),
    )
    if failed:
        raise MemoryError(f"no memory to decode {batch} images of {size_hw[1]}x{size_hw[0]}")
    return outputs
