"""`TRTRetinaFace`: finds faces with an engine on a GPU, in frames of the host and of the GPU."""

from __future__ import annotations

import ctypes
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from facespec.cli import require
from facespec.errors import DeviceLostError, FrameError, GpuError, RetinaFaceError, SpecError
from facespec.letterbox import Frame, Letterbox, check_frame
from facespec.spec import NetworkSize
from trt_runtime.detector import Lane, RetinaFaceDetector, ShapeCache, network_size
from trt_runtime.gpu.cuda import CudaDevice
from trt_runtime.gpu.device import ALIGNMENT, Bytes, Device, Graph, Memory, Stream
from trt_runtime.gpu.engine import Context, Engine, Shape, TrtEngine
from trt_runtime.gpu.frame import DeviceFrame, Nv12Frame
from trt_runtime.gpu.simulated import HostDevice, HostEngine
from trt_runtime.kernels import LetterboxFrame, describe_frame

GRAPHS = 32
"""Shapes (B, H, W) for which a lane keeps a context and a CUDA graph."""

_FRAME_BYTES = ctypes.sizeof(LetterboxFrame)


class TRTRetinaFace(RetinaFaceDetector):
    """An engine of TensorRT 10, 11 or TensorRT-RTX: letterbox, network, decoding and NMS on the GPU.

    Frames are numpy arrays, which are uploaded as they are, or lie on the GPU already: an array with DLPack or the CUDA
    array interface (PyTorch, CuPy, Numba, PyCUDA), uint8 (H, W, 3) BGR, is read in place, and so is an `Nv12Frame`, the
    output of a hardware decoder. Any number of threads may call one object: they share the engine, and each call has a
    context, a stream and buffers of its own. The work of a shape that comes again is captured in a CUDA graph, which
    later calls launch.

    Args:
        engine: File written by `python -m export.to_trt`, with its sidecar beside it; with device "cpu" a plugin
            form (.plugin.onnx), which then goes through the same code on the CPU, slowly: for developing without a GPU;
            or an `Engine`, which the detector closes.
        score_threshold: Lowest score reported: 0.5 unless given, not below the floor the model was exported with.
        size_hw: Network size that frames are letterboxed to, for engines of several; see `facespec.spec.NetworkSize`.
        device: Index of the GPU; "pycuda", the caller's current PyCUDA context; "cpu"; or a `Device`, which the caller
            closes.
        graphs: Whether to use CUDA graphs.
        warm_up: Run the engine's best shape now, so that the first frame finds everything in place.

    Attributes:
        engine: The engine, loaded.
        device: The device that it runs on.

    Raises:
        ModelFileError: The engine is missing, differs from its sidecar, or was built for another GPU, plugin or
            TensorRT.
        SpecError: `score_threshold` or `size_hw` does not fit the engine.
        GpuError: There is no such GPU, or the engine cannot be loaded.
        DeviceLostError: The GPU was lost before, in this process.
        MissingPackageError: TensorRT or cuda-bindings is not installed.
    """

    def __init__(
        self,
        engine: str | Path | Engine,
        *,
        score_threshold: float | None = None,
        size_hw: NetworkSize = None,
        device: int | str | Device = 0,
        graphs: bool = True,
        warm_up: bool = True,
    ) -> None:
        if isinstance(device, (int, float)) or device is None:
            if type(device) is not int or device < 0:
                raise SpecError(f"device is the index of a GPU, pycuda, cpu or a Device, got {device!r}")
            device = f"cuda:{device}"
        self.device: Device = open_device(device) if isinstance(device, str) else device
        self._graphs = _Graphs(graphs and self.device.can_capture)
        self._handing = threading.local()
        self.engine: Engine
        with self.device.activate():
            self.device.free_and_total()  # of a lost device TensorRT would say only that it cannot load the engine
            if not isinstance(engine, (str, Path)):
                self.engine = engine
            elif isinstance(self.device, HostDevice):
                self.engine = HostEngine(engine, self.device)
            else:
                self.engine = TrtEngine(engine, self.device)
            try:
                self.backend = self.engine.backend
                profile = self.engine.profile
                self.max_batch = profile.batch[2]
                name = engine if isinstance(engine, (str, Path)) else self.backend
                size = network_size(profile.fixed_hw, size_hw, name)
                super().__init__(self.engine.spec, self.engine.files, score_threshold, size)
                if isinstance(size, tuple) and not profile.takes(size):
                    raise SpecError(f"{name} takes network sizes of {profile}, not {size[0]}x{size[1]}")
                if warm_up:
                    self._warm_up()
                    self.engine.save()
            except BaseException:
                self.engine.close()
                raise

    def environment(self) -> dict[str, Any]:
        """Return backend, versions, GPU, and whether CUDA graphs are used."""
        return {**self.engine.environment(), "device": self.device.name, "cuda_graphs": self._graphs.used}

    def to_device(self, frame: Frame) -> DeviceArray:
        """Return a copy of a frame on the device, to be detected in several times without another upload.

        Args:
            frame: uint8 (H, W, 3) BGR.

        Raises:
            FrameError: `frame` is something else.
            DeviceMemoryError: The device has no memory for it.
        """
        pixels = np.ascontiguousarray(check_frame(frame))
        height, width = pixels.shape[:2]
        self._check_open()
        with self.device.activate():
            stream = self.device.stream()
            memory = self.device.allocate(pixels.size, f"a frame of {width}x{height}")
            self.device.copy_in(memory.address, pixels, stream)
            stream.synchronize()
            stream.close()
        return DeviceArray(memory, (height, width, 3), getattr(self.device, "index", None))

    def _free(self) -> None:
        """Free contexts, buffers and the engine. The device stays: arrays of `to_device` may still lie on it."""
        super()._free()
        self._handing = threading.local()  # frees the streams of all threads
        with _active_to_free(self.device):
            self.engine.close()

    def _warm_up(self) -> None:
        size_hw = self._usual_hw()
        frames = [np.zeros((*size_hw, 3), np.uint8)] * self.engine.profile.batch[1]
        box = Letterbox.pad(size_hw)
        with self._lane() as lane:
            for _ in range(2):  # the second run is captured
                lane.run(frames, [box] * len(frames), nullcontext)

    def _usual_hw(self) -> tuple[int, int]:
        """Return the network size that calls are expected to repeat."""
        return self.size_hw if isinstance(self.size_hw, tuple) else self.engine.profile.sizes_hw[1]

    def _frame_hw(self, frame: Any) -> tuple[int, int]:
        shape = None
        if isinstance(frame, DeviceFrame):
            return frame.frame_hw
        if not isinstance(frame, np.ndarray):
            shape = _shape(frame.luma if isinstance(frame, Nv12Frame) else frame)
        if shape is None:
            return super()._frame_hw(frame)
        if len(shape) < 2 or min(shape) < 1:
            raise FrameError(f"frame must be uint8 HxWx3 BGR, got shape {tuple(shape)}")
        return int(shape[0]), int(shape[1])

    def _hand_over(self, frame: Any) -> Any:
        """Return where a frame lies on the device, with an event after the work that this thread has put on it."""
        if isinstance(frame, (np.ndarray, DeviceFrame)):
            return frame
        self._check_open()
        with self.device.activate():
            stream = self._handing.__dict__.get("stream")
            if stream is None:
                stream = self._handing.stream = self.device.stream()
            place = self.device.frame(frame, stream)
            if place is None:
                return frame
            ready = self.device.event()
            ready.record(stream)
        return replace(place, ready=ready)

    def _batch_limit(self, size_hw: tuple[int, int]) -> int:
        profile = self.engine.profile
        if not profile.takes(size_hw):
            raise FrameError(
                f"a network input of {size_hw[0]}x{size_hw[1]} is not among the sizes of the engine, {profile}: "
                "give size_hw (--size), or build an engine for it (python -m export.to_trt --size)"
            )
        return profile.batch[2]

    def _new_lane(self) -> Lane:
        with self.device.activate():
            return _GpuLane(self.device, self.engine, self._graphs, self._usual_hw())


class DeviceArray:
    """A frame in the memory of a device, from `TRTRetinaFace.to_device`.

    Other libraries can read it, too, through the CUDA array interface.

    Attributes:
        shape: (H, W, 3).
        device_index: Index of its GPU; None on the CPU.
    """

    def __init__(self, memory: Memory, shape: tuple[int, int, int], device_index: int | None) -> None:
        self.shape = shape
        self.device_index = device_index
        self._memory = memory

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3; without a stream, because the copy is complete."""
        return {
            "shape": self.shape,
            "typestr": "|u1",
            "data": (self._memory.address, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }


class _Graphs:
    """Whether a detector uses CUDA graphs: until a capture fails, which is said once."""

    def __init__(self, used: bool) -> None:
        self.used = used
        self._lock = threading.Lock()

    def fail(self, why: str) -> None:
        with self._lock:
            if self.used:
                self.used = False
                warnings.warn(f"CUDA graphs are not used, calls take longer: {why}", RuntimeWarning, stacklevel=2)


class _GpuLane:
    """A stream with its memory and contexts; it runs one batch after the other.

    All shapes share one block of memory and one workspace, as large as the largest shape so far needs. When they grow,
    the contexts and graphs are made anew, because they hold their addresses. A shape runs in a context that all new
    shapes share, and gets one of its own when it comes again, or when it has the size that is expected to.
    """

    def __init__(self, device: Device, engine: Engine, graphs: _Graphs, usual_hw: tuple[int, int]) -> None:
        self._device, self._engine, self._graphs, self._usual_hw = device, engine, graphs, usual_hw
        self._stream = device.stream()
        self._seen: deque[Shape] = deque(maxlen=GRAPHS)
        self._shared: Context | None = None
        self._room: _Room | None = None
        self._uploads: tuple[Bytes, Memory] | None = None
        self._plans: ShapeCache[Shape, _Plan] = ShapeCache(GRAPHS, self._make_plan, _Plan.close)

    def run(self, frames: Sequence[Any], boxes: Sequence[Letterbox], stage: Callable[[str], Any]) -> list[NDArray[Any]]:
        batch = max(len(frames), self._engine.profile.batch[0])
        shape = (batch, *boxes[0].size_hw)
        fine = getattr(stage, "fine", False)
        with self._device.activate():
            try:
                with stage("upload"):
                    places = self._upload(frames)
                    if fine:
                        self._stream.synchronize()
                plan = self._plans.get(shape) if shape in self._plans else self._new_plan(shape, fine)
                plan.describe(places, boxes)
                if fine:
                    plan.run_timed(self._stream, stage.add)  # type: ignore[attr-defined]
                else:
                    with stage("graph" if self._graphs.used else "network"):
                        plan.run(self._stream, self._graphs)
            except DeviceLostError:
                raise
            except BaseException as error:
                try:  # the caller may free its frames now: no work may still read them
                    self._stream.synchronize()
                except DeviceLostError:
                    if isinstance(error, RetinaFaceError):  # TensorRT says only that it cannot run
                        raise
                except GpuError:
                    pass
                raise
        return [values[: len(frames)] for values in plan.outputs]

    def close(self) -> None:
        with _active_to_free(self._device):  # TensorRT frees in whatever context is current
            self._plans.clear()
            if self._shared:
                self._shared.close()
            self._free_room()
            self._free_uploads()
            self._stream.close()

    def _free_room(self) -> None:
        if self._room:
            self._room.block.close()
            self._room.workspace.close()
            self._room = None

    def _free_uploads(self) -> None:
        if self._uploads:
            self._uploads[1].close()
            self._uploads = None

    def _upload(self, frames: Sequence[Any]) -> list[DeviceFrame]:
        """Return where the frames lie on the device, after copying those of the host to it."""
        places = [None if isinstance(item, np.ndarray) else self._device.frame(item, self._stream) for item in frames]
        hosts = [check_frame(item) for item, place in zip(frames, places, strict=True) if place is None]
        if not hosts:
            return [place for place in places if place]
        starts = _starts([frame.size for frame in hosts])
        if self._uploads is None or self._uploads[1].nbytes < starts[-1]:
            self._free_uploads()
            megapixels = sum(frame.size for frame in hosts) / 3e6
            memory = self._device.allocate(starts[-1], f"{len(hosts)} frames of {megapixels:.1f} megapixels")
            self._uploads = self._device.pinned(starts[-1]), memory
        pinned, memory = self._uploads
        uploaded = []
        for frame, start in zip(hosts, starts, strict=False):
            height, width = frame.shape[:2]
            room = pinned[start : start + frame.size]
            np.copyto(room.reshape(frame.shape), frame)
            self._device.copy_in(memory.address + start, room, self._stream)
            uploaded.append(DeviceFrame(memory.address + start, 3 * width, (height, width), None, memory))
        rest = iter(uploaded)
        return [place or next(rest) for place in places]

    def _new_plan(self, shape: Shape, repeats: bool) -> _Plan:
        """Return a plan; `repeats`: whether the shape is worth a context, although nobody knows it yet."""
        if not repeats and shape[1:] != self._usual_hw and shape not in self._seen:
            self._seen.append(shape)
            self._shared = self._shared or self._engine.context(repeats=False)
            self._make_room(shape, self._shared)
            return self._make_plan(shape, self._shared)
        context = self._engine.context()
        try:
            self._make_room(shape, context)
            return self._plans.get(shape, context)
        except BaseException:
            context.close()  # now, while the device is active
            raise

    def _make_room(self, shape: Shape, context: Context) -> None:
        layout = _Layout(self._engine, shape)
        needed = layout.nbytes, layout.nbytes - layout.outputs_at, layout.images_at, context.set_shape(shape)
        held = self._room.sizes if self._room else (0, 0, 0, 0)
        if all(have >= need for have, need in zip(held, needed, strict=True)):
            return
        self._plans.clear()
        self._free_room()
        nbytes, results, descriptions, workspace = map(max, zip(held, needed, strict=True))
        what = f"a batch of {shape[0]} at {shape[1]}x{shape[2]}"
        block = self._device.allocate(nbytes, what)
        pinned = self._device.pinned(results), self._device.pinned(descriptions)
        self._room = _Room(block, *pinned, self._device.allocate(workspace, f"the network's workspace for {what}"))

    def _make_plan(self, shape: Shape, context: Context) -> _Plan:
        assert self._room is not None
        return _Plan(self._device, self._engine, shape, context, self._room)


class _Room(NamedTuple):
    """A lane's memory: a block on the device, what is copied from it and to it, and what the network works in."""

    block: Memory
    results: Bytes
    descriptions: Bytes
    workspace: Memory

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.block.nbytes, len(self.results), len(self.descriptions), self.workspace.nbytes


class _Layout:
    """Offsets in a lane's block for one shape: descriptions of the frames, then images, then each output."""

    def __init__(self, engine: Engine, shape: Shape) -> None:
        batch, height, width = shape
        self.outputs = {
            name: (np.dtype(kind), (batch, *rest)) for name, (kind, rest) in engine.spec.decode.outputs.items()
        }
        sizes = [batch * _FRAME_BYTES, batch * height * width * 3]
        sizes += [4 * int(np.prod(rest, dtype=int)) for _, rest in self.outputs.values()]
        self.starts = _starts(sizes)
        self.images_at, self.outputs_at, self.nbytes = self.starts[1], self.starts[2], self.starts[-1]


class _Plan:
    """One shape on one lane: its context, which knows the shape, its addresses, its graph."""

    def __init__(self, device: Device, engine: Engine, shape: Shape, context: Context, room: _Room) -> None:
        self._device, self._engine, self._shape = device, engine, shape
        layout, block = _Layout(engine, shape), room.block.address
        self._block, self._images, self._found = block, block + layout.images_at, block + layout.outputs_at
        self._results = room.results[: layout.nbytes - layout.outputs_at]
        self._descriptions = room.descriptions[: shape[0] * _FRAME_BYTES]
        self.outputs: list[NDArray[Any]] = []
        addresses = {"images": self._images}
        for (name, (kind, rest)), start in zip(layout.outputs.items(), layout.starts[2:], strict=False):
            at = start - layout.outputs_at
            self.outputs.append(self._results[at : at + 4 * int(np.prod(rest, dtype=int))].view(kind).reshape(rest))
            addresses[name] = block + start
        self._places = addresses, room.workspace
        self._context = context
        context.bind(*self._places)
        self._graph: Graph | None = None
        self._has_run = False
        self._share: float | None = None

    def describe(self, places: Sequence[DeviceFrame], boxes: Sequence[Letterbox]) -> None:
        """Write the descriptions of the frames of the next run; slots beyond them stay empty."""
        table = (LetterboxFrame * self._shape[0]).from_buffer(self._descriptions)  # type: ignore[arg-type]
        ctypes.memset(table, 0, ctypes.sizeof(table))
        for slot, (place, box) in enumerate(zip(places, boxes, strict=True)):
            if place.frame_hw != box.frame_hw:
                raise FrameError(f"the frame says it is {box.frame_hw}, and it is {place.frame_hw}")
            chroma = place.chroma_address, place.chroma_pitch
            table[slot] = describe_frame(
                place.address, place.pitch, place.frame_hw, box.scaled_hw, place.pixel_format, *chroma
            )

    def run(self, stream: Stream, graphs: _Graphs) -> None:
        """Run the network on the described frames, and wait for the results."""
        if graphs.used and self._graph is None and self._has_run:
            self._capture(stream, graphs)
        if self._graph is not None:
            self._graph.launch(stream)
        else:
            self._enqueue(stream)
        stream.synchronize()
        self._has_run = True

    def _capture(self, stream: Stream, graphs: _Graphs) -> None:
        if not self._context.can_capture(stream):
            return graphs.fail(
                "TensorRT-RTX cannot capture this engine; python -m export.to_trt builds one that it can"
            )
        try:
            self._graph = stream.capture(lambda: self._enqueue(stream))
        except DeviceLostError:
            raise
        except GpuError as error:
            stream.synchronize()  # a device that is lost is no failed capture
            graphs.fail(str(error))

    def run_timed(self, stream: Stream, add: Callable[[str, float], None]) -> None:
        """Run the network on the described frames, and report the milliseconds of each stage to `add`."""
        if self._share is None:
            self._letterbox(stream)  # what the plugin takes depends on the faces of the frame
            probe = self._engine.context()
            try:
                probe.set_shape(self._shape)
                probe.bind(*self._places)
                self._share = probe.plugin_share(stream)
            finally:
                probe.close()
        events = [self._device.event() for _ in range(4)]
        events[0].record(stream)
        self._letterbox(stream)
        events[1].record(stream)
        self._context.enqueue(stream)
        events[2].record(stream)
        self._device.copy_out(self._results, self._found, stream)
        events[3].record(stream)
        stream.synchronize()
        letterbox, network, download = (later.elapsed_ms(before) for before, later in pairwise(events))
        add("letterbox", letterbox)
        add("network", network * (1 - self._share))
        add("decode+NMS", network * self._share)
        add("download", download)

    def close(self) -> None:
        """Free context and graph."""
        if self._graph is not None:
            self._graph.close()
        self._context.close()

    def _letterbox(self, stream: Stream) -> None:
        self._device.copy_in(self._block, self._descriptions, stream)
        self._engine.letterbox(self._block, self._shape, self._images, stream)

    def _enqueue(self, stream: Stream) -> None:
        self._letterbox(stream)
        self._context.enqueue(stream)
        self._device.copy_out(self._results, self._found, stream)


@contextmanager
def _active_to_free(device: Device) -> Iterator[None]:
    """Activate a device in a block that frees; of a device that is gone everything is let go without that."""
    with ExitStack() as stack:
        with suppress(GpuError):
            stack.enter_context(device.activate())
        yield


def _starts(sizes: Sequence[int]) -> list[int]:
    """Return the offsets of parts of these sizes, multiples of ALIGNMENT, and the end of the last part."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // ALIGNMENT) * ALIGNMENT)
    return starts


def _shape(array: Any) -> tuple[int, ...] | None:
    """Return the shape of an array that may be on a device, or None if the object is no array."""
    shape = getattr(array, "shape", None)
    if shape is None:
        shape = (getattr(array, "__cuda_array_interface__", None) or {}).get("shape")
    elif not hasattr(array, "__dlpack__") and not hasattr(array, "__cuda_array_interface__"):
        return None
    return None if shape is None else tuple(shape)


def open_device(place: str = "cuda") -> Device:
    """Return a device by its name.

    Args:
        place: "cuda" or "cuda:1", as CUDA counts the visible GPUs; "pycuda", the caller's current context; "cpu".

    Raises:
        GpuError: The device does not exist or cannot be used.
        MissingPackageError: cuda-bindings or PyCUDA is not installed.
    """
    if place == "cuda" or re.fullmatch("cuda:[0-9]{1,4}", place):
        return CudaDevice(int(place.removeprefix("cuda").removeprefix(":") or 0))
    if place == "pycuda":
        require("pycuda.driver", "pycuda", "device pycuda")
        return CudaDevice(None)
    if place == "cpu":
        return HostDevice()
    raise GpuError(f"device must be cuda, cuda:1 (or another number), pycuda or cpu, not {place!r}")
