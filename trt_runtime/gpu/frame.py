"""Frames that lie on a device already: DLPack and the CUDA array interface tell their address, without a copy."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from facespec.errors import FrameError, reason
from trt_runtime.kernels import PixelFormat

Nv12Matrix = Literal["bt601", "bt601_full", "bt709", "bt709_full"]
MATRICES = get_args(Nv12Matrix)

_DLPACK_CPU, _DLPACK_CUDA, _DLPACK_CUDA_HOST, _DLPACK_CUDA_MANAGED = 1, 2, 3, 13
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_MEND = ".contiguous() (torch) or cupy.ascontiguousarray mends it"


@dataclass(slots=True)
class DeviceFrame:
    """Where a frame lies on a device; nothing changes it once it is made.

    Attributes:
        address: Address of the first row: BGR pixels, or luma.
        pitch: Bytes from row to row, at least those of a row.
        frame_hw: Height and width in pixels.
        device_index: Number of the GPU as CUDA counts the visible ones; None if unknown, or on the CPU.
        owner: Keeps the memory alive; hold the frame until the stream that reads it is synchronised.
        pixel_format: BGR is uint8 (H, W, 3); NV12_... is luma (H, W) and interleaved chroma (H/2, W/2, 2), and names
            the matrix that turns it into BGR.
        chroma_address: Address of the first row of chroma, 0 for BGR.
        chroma_pitch: Bytes from row to row of chroma, 0 for BGR.
        ready: `Event` after the work that produces the frame; None if the stream that it was read for waits already.
    """

    address: int
    pitch: int
    frame_hw: tuple[int, int]
    device_index: int | None
    owner: object = field(repr=False, compare=False)
    pixel_format: PixelFormat = PixelFormat.BGR
    chroma_address: int = 0
    chroma_pitch: int = 0
    ready: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Nv12Frame:
    """A frame from a hardware decoder: two arrays on the device.

    Attributes:
        luma: uint8 (H, W), H and W even; rows may be padded.
        chroma: uint8 (H/2, W) or (H/2, W/2, 2), U and V interleaved.
        matrix: Conversion to BGR: "bt709" for HD video, "bt601" for SD, "..._full" if luma goes from 0 to 255.
    """

    luma: object
    chroma: object
    matrix: Nv12Matrix = "bt709"

    def __post_init__(self) -> None:
        if self.matrix not in MATRICES:
            raise FrameError(f"the matrix of an NV12 frame is one of {', '.join(MATRICES)}, not {self.matrix!r}")


@dataclass(slots=True)
class _Array:
    """An array on a device; `owner` keeps its memory alive."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # bytes from element to element; None if it is C-contiguous
    kind: str  # such as "uint8"
    device_index: int | None  # None if the array does not say
    stream: int | None  # handle of the stream that the reader must wait for
    owner: object

    def __str__(self) -> str:
        return f"{self.kind} of shape {self.shape}"


def read_frame(
    frame: object,
    stream: Any,
    device_index: int | None,
    locate: Callable[[int, int | None], int | None],
    holds: Callable[[object], bool] = lambda array: True,
) -> DeviceFrame | None:
    """Return where a frame lies on a device, or None if it lies on none; see `Device.frame`.

    Args:
        frame: uint8 (H, W, 3) BGR of anything with `__dlpack__` or `__cuda_array_interface__` (PyTorch, CuPy, Numba,
            PyCUDA), an `Nv12Frame` of two such arrays, a `DeviceFrame` that was read on another thread, or any other
            object.
        stream: The `Stream` that will read it; its device is active on this thread.
        device_index: Number of the GPU that the frame must lie on; None does not check.
        locate: Returns the number of the GPU that an address belongs to, or None, given what the array says it is; it
            raises FrameError for memory that the device cannot reach.
        holds: Returns whether an array may lie on the device; others are not read.

    Raises:
        FrameError: It lies on another device, or has another type, shape or layout.
    """
    if isinstance(frame, DeviceFrame):
        _check_index(frame.device_index, device_index)
        if frame.ready is not None:
            frame.ready.hold(stream)
        return frame
    nv12 = isinstance(frame, Nv12Frame)
    arrays = (frame.luma, frame.chroma) if isinstance(frame, Nv12Frame) else (frame,)
    read = [_read_array(array, stream.handle, device_index) for array in arrays if holds(array)]
    planes = [plane for plane in read if plane]
    if len(planes) < len(arrays):
        if nv12:
            raise FrameError("an Nv12Frame takes two arrays on the device, and these are not")
        return None
    found = _nv12_frame(planes[0], planes[1], frame.matrix) if isinstance(frame, Nv12Frame) else _bgr_frame(planes[0])
    for plane in planes:
        found.device_index = locate(plane.address, plane.device_index)
        _check_index(found.device_index, device_index)
        if plane.stream is not None:
            stream.wait_for(plane.stream)
    return found


def _check_index(index: int | None, device_index: int | None) -> None:
    if None not in (index, device_index) and index != device_index:
        raise FrameError(f"the frame is on GPU {index}, the detector on GPU {device_index}: copy it there first")


def _bgr_frame(array: _Array) -> DeviceFrame:
    shape = array.shape
    if len(shape) == 3 and shape[2] != 3 and shape[0] == 3:
        raise FrameError(f"frame must be HxWx3, got {array}: .permute(1, 2, 0).contiguous() mends it")
    if len(shape) == 4:
        raise FrameError(f"frame must be HxWx3, got {array}: several frames go to detect_batch as a list")
    if len(shape) != 3 or shape[2] != 3:
        raise FrameError(f"frame must be uint8 HxWx3 BGR, got {array}")
    pitch = _pitch(array, "frame", 3 * shape[1])
    return DeviceFrame(array.address, pitch, (shape[0], shape[1]), None, array.owner)


def _nv12_frame(luma: _Array, chroma: _Array, matrix: Nv12Matrix) -> DeviceFrame:
    if len(luma.shape) != 2 or luma.shape[0] % 2 or luma.shape[1] % 2:
        raise FrameError(f"luma of an NV12 frame must be HxW with even sides, got {luma}")
    height, width = luma.shape
    if chroma.shape not in ((height // 2, width), (height // 2, width // 2, 2)):
        raise FrameError(f"chroma must be ({height // 2}, {width}) or ({height // 2}, {width // 2}, 2), got {chroma}")
    pitch, chroma_pitch = _pitch(luma, "luma", width), _pitch(chroma, "chroma", width)
    owners, pixel_format = (luma.owner, chroma.owner), PixelFormat[f"NV12_{matrix.upper()}"]
    return DeviceFrame(luma.address, pitch, (height, width), None, owners, pixel_format, chroma.address, chroma_pitch)


def _pitch(array: _Array, what: str, row_bytes: int) -> int:
    """Return the bytes from row to row of an array; raise FrameError unless each row is contiguous."""
    if array.kind != "uint8":
        raise FrameError(f"{what} must be uint8 with values 0..255, got {array}")
    if 0 in array.shape:
        raise FrameError(f"{what} is empty: {array}")
    if array.strides is None or array.strides == (row_bytes, 3, 1):
        return row_bytes
    inner = 1
    for side, stride in zip(reversed(array.shape[1:]), reversed(array.strides[1:]), strict=True):
        if side > 1 and stride != inner:  # the stride of a single element has no meaning
            raise FrameError(f"rows of {what} must be in one piece, got strides of {array.strides} bytes: {_MEND}")
        inner *= side
    if array.shape[0] == 1:
        return row_bytes
    if array.strides[0] < row_bytes:
        raise FrameError(f"rows of {what} overlap or run upwards, with strides of {array.strides} bytes: {_MEND}")
    return array.strides[0]


def _read_array(array: Any, stream_handle: int, device_index: int | None) -> _Array | None:
    """Return where an array lies on a device; None if it lies in the host's memory or is no array."""
    if isinstance(array, type):
        return None
    if hasattr(array, "__dlpack_device__") and hasattr(array, "__dlpack__"):
        kind, index = array.__dlpack_device__()
        if int(kind) in (_DLPACK_CPU, _DLPACK_CUDA_HOST):
            return None
        if int(kind) not in (_DLPACK_CUDA, _DLPACK_CUDA_MANAGED):
            raise FrameError(
                f"the frame is on a device that is not CUDA's (DLPack calls it {int(kind)}): copy it first"
            )
        _check_index(int(index), device_index)  # else torch raises an error of its own below
        return _read_capsule(_capsule(array, stream_handle), int(index))
    try:
        interface = getattr(array, "__cuda_array_interface__", None)
    except Exception as error:
        raise FrameError(f"a {type(array).__name__} cannot be read as a frame: {reason(error)}") from None
    return None if interface is None else _read_interface(interface, array)


def _capsule(array: Any, stream_handle: int) -> object:
    """Return a DLPack capsule; the producer lets our stream wait for its content."""
    try:
        try:
            return array.__dlpack__(stream=stream_handle, max_version=(1, 0))
        except TypeError:  # the producer is older than DLPack 1.0
            return array.__dlpack__(stream=stream_handle)
    except Exception as error:  # tensors that need gradients, for instance
        raise FrameError(f"a {type(array).__name__} cannot be read as a frame: {reason(error)}") from None


_TENSOR = struct.Struct("=QiiiBBHQQQ")
"""DLTensor: data, device type and number, dimensions, type code, bits and lanes, shape, strides, byte offset. Pointers
have 8 bytes: there is no CUDA for machines where they have fewer."""

_VERSIONED = struct.Struct("=II24x")
"""What precedes it in a DLManagedTensorVersioned: major, minor; before DLPack 1.0 the structure begins with it."""

_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _read_capsule(capsule: object, device_index: int | None) -> _Array:
    """Return the array of a DLPack capsule. The capsule is its owner: it is not consumed, so it frees the tensor."""
    if _is_valid(capsule, b"dltensor_versioned"):
        start = _get_pointer(capsule, b"dltensor_versioned")
        major, minor = _VERSIONED.unpack(ctypes.string_at(start, _VERSIONED.size))
        if major != 1:
            raise FrameError(f"the frame comes as DLPack {major}.{minor}, and 1.x is known")
        start += _VERSIONED.size
    elif _is_valid(capsule, b"dltensor"):
        start = _get_pointer(capsule, b"dltensor")
    else:
        raise FrameError("the frame's __dlpack__ gave no DLPack capsule")
    data, _, _, ndim, code, bits, lanes, shape, strides, offset = _TENSOR.unpack(ctypes.string_at(start, _TENSOR.size))
    kind = f"{_DLPACK_KINDS.get(code, 'DLPack type ')}{bits}"
    if lanes != 1:
        kind += f"x{lanes}"
    # DLPack counts elements; only uint8 is accepted later, so they are bytes
    steps = _sides(strides, ndim) if strides else None
    return _Array(data + offset, _sides(shape, ndim), steps, kind, device_index, None, capsule)


def _sides(address: int, count: int) -> tuple[int, ...]:
    """Return so many int64 at an address."""
    return struct.unpack(f"={count}q", ctypes.string_at(address, 8 * count))


def _read_interface(interface: dict[str, Any], owner: object) -> _Array:
    """Return the array of a CUDA array interface, version 2 or 3."""
    try:
        version, shape, kind = interface["version"], tuple(map(int, interface["shape"])), interface["typestr"]
        name = "uint8" if kind == "|u1" else str(np.dtype(kind))
        address = int(interface["data"][0])
        strides = interface.get("strides")
        strides = None if strides is None else tuple(map(int, strides))
        stream = interface.get("stream") if version >= 3 else None
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FrameError(f"the frame's __cuda_array_interface__ cannot be read: {reason(error)}") from None
    if version < 2 or (strides is not None and len(strides) != len(shape)):
        raise FrameError(f"the frame's __cuda_array_interface__ is of version {version}, and 2 and 3 are known")
    if interface.get("mask") is not None:
        raise FrameError("a masked array is no frame")
    if stream is not None and (not isinstance(stream, int) or stream == 0):
        raise FrameError(f"stream {stream!r} in the frame's __cuda_array_interface__ is none: 1 is the default stream")
    return _Array(address, shape, strides, name, getattr(owner, "device_index", None), stream, owner)
