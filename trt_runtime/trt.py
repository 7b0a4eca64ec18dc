"""`TRTRetinaFace`: finds faces with an engine on a GPU, in frames of the host and of the GPU."""

from __future__ import annotations

import dataclasses
import re
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
from trt_runtime.kernels import FRAME, PixelFormat, frame_fields
from trt_runtime.measure import StageTimer
from trt_runtime.regions import Region

GRAPHS = 32
"""Shapes (B, H, W) for which a lane keeps a context and a CUDA graph."""

PINNED_FRAMES = 32
"""Page-locked frames that are kept for the next ones of their size."""

_FRAME_BYTES, _pack_frame = FRAME.size, FRAME.pack_into


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
        self._pinned = _PinnedFrames(self.device)
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
                if isinstance(engine, (str, Path)) and isinstance(device, str):
                    self._opened_by(engine, device=device, graphs=graphs, warm_up=warm_up)
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
        return DeviceArray(self.device, memory, (height, width, 3))

    def pinned_frame(self, height: int, width: int) -> Frame:
        """Return a frame in page-locked memory, which is uploaded from where it lies; see `RetinaFaceDetector`.

        Raises:
            DeviceMemoryError: The host cannot page-lock so much memory.
        """
        self._check_open()
        return self._pinned.new(height, width)

    def _free(self) -> None:
        """Free contexts, buffers and the engine. The device stays: arrays of `to_device` may still lie on it."""
        super()._free()
        self._handing = threading.local()  # frees the streams of all threads
        self._pinned.clear()
        with _active_to_free(self.device):
            self.engine.close()

    def _warm_up(self) -> None:
        size_hw = self._usual_hw()
        frames = [np.zeros((*size_hw, 3), np.uint8)] * self.engine.profile.batch[1]
        box = Letterbox.pad(size_hw)
        with self._lane() as lane:
            for _ in range(2):  # the second run is captured
                lane.run(frames, [box] * len(frames), None)

    def _usual_hw(self) -> tuple[int, int]:
        """Return the network size that calls are expected to repeat."""
        return self.size_hw if isinstance(self.size_hw, tuple) else self.engine.profile.sizes_hw[1]

    def _frame_hw(self, frame: Any) -> tuple[int, int]:
        if isinstance(frame, (DeviceFrame, DeviceArray)):
            return frame.frame_hw
        shape = None
        if not isinstance(frame, np.ndarray):
            shape = _shape(frame.luma if isinstance(frame, Nv12Frame) else frame)
        if shape is None:
            return super()._frame_hw(frame)
        if len(shape) < 2 or min(shape) < 1:
            raise FrameError(f"frame must be uint8 HxWx3 BGR, got shape {tuple(shape)}")
        return int(shape[0]), int(shape[1])

    def _hand_over(self, frame: Any) -> Any:
        """Return where a frame lies on the device, with an event after the work that this thread has put on it."""
        if isinstance(frame, (np.ndarray, DeviceFrame)) or self._is_ours(frame):
            return frame
        self._check_open()
        with self.device.activate():
            stream = self._handing.__dict__.get("stream")
            if stream is None:
                stream = self._handing.stream = self.device.stream()
            place = self.device.frame(frame, stream)
            if place is None:
                return frame
            place.ready = self.device.event()
            place.ready.record(stream)
        return place

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
            return _GpuLane(self.device, self.engine, self._graphs, self._usual_hw(), self._pinned)

    def _cut(self, frame: Any, region: Region) -> Any:
        if isinstance(frame, DeviceArray):
            frame = frame.place
        x, y, width, height = region
        if isinstance(frame, DeviceFrame):
            if frame.pixel_format != PixelFormat.BGR:
                raise FrameError("regions and tiles are cut out of BGR frames, not of NV12")
            place = frame.address + y * frame.pitch + 3 * x
            return dataclasses.replace(frame, address=place, frame_hw=(height, width))
        if isinstance(frame, Nv12Frame):
            raise FrameError("regions and tiles are cut out of BGR frames, not of NV12")
        part = super()._cut(frame, region)
        return np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part

    def _is_ours(self, frame: Any) -> bool:
        """Whether a frame lies complete on the device."""
        return isinstance(frame, DeviceArray) and frame.device is self.device


class DeviceArray:
    """A frame in the memory of a device, from `TRTRetinaFace.to_device`.

    Other libraries can read it, too, through the CUDA array interface.

    Attributes:
        shape: (H, W, 3).
        frame_hw: (H, W).
        device: Its `Device`.
        device_index: Index of its GPU; None on the CPU.
    """

    def __init__(self, device: Device, memory: Memory, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.device_index: int | None = getattr(device, "index", None)
        self.frame_hw = shape[:2]
        self._place = DeviceFrame(memory.address, 3 * shape[1], self.frame_hw, self.device_index, memory)
        self.device = device
        self._memory = memory

    @property
    def place(self) -> DeviceFrame:
        """Where it lies, for detectors on the same device; GpuError if its memory has been closed."""
        if self._memory.closed:
            _ = self._memory.address
        return self._place

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


class _Lease:
    """Memory that arrays refer to: it ends with the last of them."""

    def __init__(self, memory: Bytes) -> None:
        self.__array_interface__ = memory.__array_interface__


class _PinnedFrames:
    """Page-locked frames of the host; the memory of one that nobody refers to any more serves the next."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._keeps = PINNED_FRAMES
        self._lent: dict[int, int] = {}  # bytes by address
        self._idle: list[Bytes] = []
        self._lock = threading.RLock()  # the garbage collector may take a frame back while this thread holds it

    def new(self, height: int, width: int) -> Frame:
        """Return a frame, uint8 (height, width, 3), undefined."""
        nbytes = 3 * height * width
        with self._lock:
            found = next((index for index, memory in enumerate(self._idle) if len(memory) == nbytes), None)
            memory = None if found is None else self._idle.pop(found)
        if memory is None:
            with self._device.activate():
                memory = self._device.pinned(nbytes)
        lease = _Lease(memory)
        weakref.finalize(lease, self._take_back, memory).atexit = False
        self._lent[memory.ctypes.data] = nbytes
        frame: Frame = np.asarray(lease).reshape(height, width, 3)
        return frame

    def _take_back(self, memory: Bytes) -> None:
        with self._lock:
            del self._lent[memory.ctypes.data]
            if len(self._idle) < self._keeps:
                self._idle.append(memory)

    def holds(self, frame: Frame) -> bool:
        """Whether a frame is one of these, or the first rows of one."""
        if not self._lent or not frame.flags.c_contiguous:
            return False
        return self._lent.get(frame.__array_interface__["data"][0], 0) >= frame.nbytes

    def clear(self) -> None:
        """Free what is idle, now and from now on."""
        with self._lock:
            self._idle, self._keeps = [], 0


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

    keeps_shapes = True

    def __init__(
        self, device: Device, engine: Engine, graphs: _Graphs, usual_hw: tuple[int, int], pinned: _PinnedFrames
    ) -> None:
        self._device, self._engine, self._graphs, self._usual_hw = device, engine, graphs, usual_hw
        self._pinned, self._active = pinned, device.activate()
        self._least = engine.profile.batch[0]
        self._stream = device.stream()
        self._seen: deque[Shape] = deque(maxlen=GRAPHS)
        self._shared: Context | None = None
        self._room: _Room | None = None
        self._uploads: tuple[Bytes, Memory] | None = None
        self._plans: ShapeCache[Shape, _Plan] = ShapeCache(GRAPHS, self._make_plan, _Plan.close)

    def run(self, frames: Sequence[Any], boxes: Sequence[Letterbox], timer: StageTimer | None) -> list[Any]:
        count, fine = len(frames), timer is not None and timer.fine
        height, width = boxes[0].size_hw
        shape = (count if count > self._least else self._least), height, width
        with self._active:
            try:
                if timer is not None:
                    timer.begin("upload")
                plan = self._plans.find(shape) or self._new_plan(shape, fine)
                self._describe(plan, frames, boxes)
                if timer is not None and fine:
                    self._stream.synchronize()
                    timer.begin("")
                    plan.run_timed(self._stream, timer.add)
                else:
                    if timer is not None:
                        timer.begin("graph" if self._graphs.used else "network")
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
        return plan.outputs if count == shape[0] else [values[:count] for values in plan.outputs]

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
            self._room.images.close()
            self._room.workspace.close()
            self._room = None

    def _free_uploads(self) -> None:
        if self._uploads:
            self._uploads[1].close()
            self._uploads = None

    def _describe(self, plan: _Plan, frames: Sequence[Any], boxes: Sequence[Letterbox]) -> None:
        """Write where the frames of a run lie on the device, after copying those of the host to it."""
        device, hosts = self._device, []
        for slot, item in enumerate(frames):
            if isinstance(item, DeviceArray) and item.device is device:
                plan.describe(slot, item.place, boxes[slot])
                continue
            place = None if isinstance(item, np.ndarray) else device.frame(item, self._stream)
            if place is None:
                hosts.append((slot, check_frame(item)))
            else:
                plan.describe(slot, place, boxes[slot])
        if hosts:
            for (slot, _), place in zip(hosts, self._copy([frame for _, frame in hosts]), strict=True):
                plan.describe(slot, place, boxes[slot])
        plan.clear(len(frames))

    def _copy(self, frames: Sequence[Frame]) -> list[DeviceFrame]:
        """Return where frames of the host lie on the device once the stream has copied them."""
        starts = _starts([frame.size for frame in frames])
        if self._uploads is None or self._uploads[1].nbytes < starts[-1]:
            self._free_uploads()
            megapixels = sum(frame.size for frame in frames) / 3e6
            memory = self._device.allocate(starts[-1], f"{len(frames)} frames of {megapixels:.1f} megapixels")
            self._uploads = self._device.pinned(starts[-1]), memory
        pinned, memory = self._uploads
        places = []
        for frame, start in zip(frames, starts, strict=False):
            if self._pinned.holds(frame):
                source = frame.reshape(-1)
            else:
                source = pinned[start : start + frame.size]
                np.copyto(source.reshape(frame.shape), frame)
            self._device.copy_in(memory.address + start, source, self._stream)
            height, width = frame.shape[:2]
            places.append(DeviceFrame(memory.address + start, 3 * width, (height, width), None, memory))
        return places

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
        needed = layout.images_bytes, layout.nbytes, context.set_shape(shape)
        held = self._room.sizes if self._room else (0, 0, 0)
        if all(have >= need for have, need in zip(held, needed, strict=True)):
            return
        self._plans.clear()
        self._free_room()
        images, nbytes, workspace = map(max, zip(held, needed, strict=True))
        what = f"a batch of {shape[0]} at {shape[1]}x{shape[2]}"
        block = self._device.allocate(images, what)
        pinned = self._device.pinned(nbytes)
        self._room = _Room(block, pinned, self._device.allocate(workspace, f"the network's workspace for {what}"))

    def _make_plan(self, shape: Shape, context: Context) -> _Plan:
        assert self._room is not None
        return _Plan(self._device, self._engine, shape, context, self._room)


class _Room(NamedTuple):
    """A lane's memory: images on the device; what it reads and writes in the host's memory; what the network works in.

    Descriptions of frames are a few bytes, which the letterbox reads where the host wrote them, and outputs are written
    where the host reads them: so there is nothing to copy between, and to wait for.
    """

    images: Memory
    pinned: Bytes
    workspace: Memory

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.images.nbytes, len(self.pinned), self.workspace.nbytes


class _Layout:
    """Sizes of a lane's memory for one shape; offsets in the pinned part: descriptions of frames, then each output."""

    def __init__(self, engine: Engine, shape: Shape) -> None:
        batch, height, width = shape
        self.outputs = {
            name: (np.dtype(kind), (batch, *rest)) for name, (kind, rest) in engine.spec.decode.outputs.items()
        }
        sizes = [batch * _FRAME_BYTES, *(4 * int(np.prod(rest, dtype=int)) for _, rest in self.outputs.values())]
        self.starts = _starts(sizes)
        self.images_bytes, self.nbytes = batch * height * width * 3, self.starts[-1]


class _Plan:
    """One shape on one lane: its context, which knows the shape, its addresses, its graph."""

    def __init__(self, device: Device, engine: Engine, shape: Shape, context: Context, room: _Room) -> None:
        self._device, self._engine, self._shape = device, engine, shape
        layout, pinned = _Layout(engine, shape), room.pinned
        self._images = room.images.address
        self._table = memoryview(pinned)[: shape[0] * _FRAME_BYTES]  # type: ignore[arg-type]
        self._descriptions = pinned.ctypes.data
        self.outputs: list[Any] = []
        addresses = {"images": self._images}
        for (name, (kind, rest)), start in zip(layout.outputs.items(), layout.starts[1:], strict=False):
            nbytes = 4 * int(np.prod(rest, dtype=int))
            values = pinned[start : start + nbytes].view(kind).reshape(rest)
            self.outputs.append(list(values) if values.ndim > 1 else values)  # images apart, once and for all
            addresses[name] = self._descriptions + start
        self._places = addresses, room.workspace
        self._context = context
        context.bind(*self._places)
        self._graph: Graph | None = None
        self._has_run = False
        self._share: float | None = None

    def describe(self, slot: int, place: DeviceFrame, box: Letterbox) -> None:
        """Write the description of a frame of the next run."""
        if place.frame_hw != box.frame_hw:
            raise FrameError(f"the frame says it is {box.frame_hw}, and it is {place.frame_hw}")
        fields = frame_fields(
            place.address,
            place.pitch,
            place.frame_hw,
            box.scaled_hw,
            place.pixel_format,
            place.chroma_address,
            place.chroma_pitch,
        )
        _pack_frame(self._table, _FRAME_BYTES * slot, *fields)

    def clear(self, count: int) -> None:
        """Empty the slots behind those of `count` frames."""
        if count < self._shape[0]:
            start = count * _FRAME_BYTES
            self._table[start:] = bytes(len(self._table) - start)

    def run(self, stream: Stream, graphs: _Graphs) -> None:
        """Run the network on the described frames, and wait for the results."""
        graph = self._graph
        if graph is None and self._has_run and graphs.used:
            graph = self._capture(stream, graphs)
        if graph is not None:
            graph.launch(stream)
        else:
            self._enqueue(stream)
        stream.synchronize()
        self._has_run = True

    def _capture(self, stream: Stream, graphs: _Graphs) -> Graph | None:
        if not self._context.can_capture(stream):
            graphs.fail("TensorRT-RTX cannot capture this engine; python -m export.to_trt builds one that it can")
            return None
        try:
            self._graph = stream.capture(lambda: self._enqueue(stream))
        except DeviceLostError:
            raise
        except GpuError as error:
            stream.synchronize()  # a device that is lost is no failed capture
            graphs.fail(str(error))
        return self._graph

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
        events = [self._device.event() for _ in range(3)]
        events[0].record(stream)
        self._letterbox(stream)
        events[1].record(stream)
        self._context.enqueue(stream)
        events[2].record(stream)
        stream.synchronize()
        letterbox, network = (later.elapsed_ms(before) for before, later in pairwise(events))
        add("letterbox", letterbox)
        add("network", network * (1 - self._share))
        add("decode+NMS", network * self._share)

    def close(self) -> None:
        """Free context and graph."""
        if self._graph is not None:
            self._graph.close()
        self._context.close()

    def _letterbox(self, stream: Stream) -> None:
        self._engine.letterbox(self._descriptions, self._shape, self._images, stream)

    def _enqueue(self, stream: Stream) -> None:
        self._letterbox(stream)
        self._context.enqueue(stream)


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
