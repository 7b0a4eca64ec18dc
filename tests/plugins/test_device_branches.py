"""What is compiled for the device only, run on the host with stand-ins for CUDA's intrinsics: the same bits, and no
16-byte access to an address that is not aligned."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from plugins.build import ROOT, find_compiler
from tests.gpu.frames import PAD, Slot, batches, descriptions, on_host
from tests.plugins.brute_force import elementary
from tests.plugins.test_host import KINDS, ONE_SIZE, _same, make_case
from trt_runtime import kernels
from trt_runtime.kernels import PixelFormat, decode_nms, load_letterbox


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("device")
    names = []
    for name in ("launch.cu", "letterbox.cu"):
        text = (ROOT / "src" / name).read_text(encoding="utf-8")
        simulated, count = re.subn(r"([\w<>]+?)<<<(.+?), 0, stream>>>\((\w+)\)", r"simulate(\1, \2, \3)", text)
        assert count == text.count("<<<") > 0
        (folder / name).write_text(simulated)
        names.append(f'-D{name.replace(".", "_").upper()}="{folder / name}"')
    out = folder / "device_branches.so"
    flags = ("-std=c++17", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread")
    warnings = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas")
    source = Path(__file__).with_name("device_branches.cpp")
    include = (f"-I{ROOT / 'include'}", f"-I{ROOT / 'src'}")
    subprocess.run([find_compiler(), *flags, *warnings, *names, *include, source, "-o", out], check=True)
    library = ctypes.CDLL(str(out))
    library.retinaface_host_check.restype = ctypes.c_char_p
    library.retinaface_workspace_bytes.restype = ctypes.c_size_t
    return library


Counted = Callable[[], tuple[int, int]]


@pytest.fixture
def counted(device: Any) -> Counted:
    """Return, and forget, the numbers of aligned and other 16-byte accesses."""

    def call() -> tuple[int, int]:
        both = (ctypes.c_int64 * 2)()
        device.counted(both)
        return both[0], both[1]

    call()
    return call


@contextmanager
def _through(library: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda: library)
        yield


@pytest.mark.parametrize("name", [name for name in KINDS if name != "crowd"])
def test_detections_are_the_same_bits(name: str, device: Any, counted: Counted) -> None:
    kind = KINDS[name]
    for index in range(6):
        case = make_case(name, index, kind.contents, **kind.options)
        expected = decode_nms(case.heads, case.size_hw, case.spec, shared_capacity=case.capacity)
        with _through(device):
            actual = decode_nms(case.heads, case.size_hw, case.spec, shared_capacity=case.capacity)
        _same(actual, expected, (name, index))
    aligned, others = counted()
    assert aligned > 0
    assert others == 0


def test_elementary_functions_are_the_same_bits(device: Any) -> None:
    x = np.random.default_rng(0).normal(0, 30, 20_000).astype(np.float32)
    halves = np.arange(0, 65536, 7).astype(np.uint16)
    for name, values, kind in (
        ("exp", x, np.float32),
        ("sigmoid", x, np.float32),
        ("half_to_float", halves, np.uint16),
    ):
        expected = elementary(name, values, kind)
        with _through(device):
            actual = elementary(name, values, kind)
        np.testing.assert_array_equal(actual, expected)  # NaN equals NaN


def test_frames_are_the_same_bits_and_only_aligned_ones_are_copied_whole(device: Any, counted: Counted) -> None:
    size = (97, 128)
    without_launcher = SimpleNamespace(retinaface_host_letterbox=device.retinaface_host_letterbox)
    for slots in batches(size):
        expected = on_host(slots, size)
        with _through(without_launcher):
            actual = on_host(slots, size)
        np.testing.assert_array_equal(actual, expected)
        assert counted()[1] == 0, slots


def _aligned(size: int) -> tuple[NDArray[np.uint8], int]:
    """Return memory that holds rubbish, and the address of 16-byte aligned `size` bytes of it."""
    memory = np.full(size + 64, 0xA5, np.uint8)
    return memory, memory.ctypes.data + -memory.ctypes.data % 16


@pytest.mark.parametrize(
    ("name", "half", "last", "top_k"),
    [("cut", False, True, 90), ("mixed slots", True, False, 90), ("over 1024", False, False, 5000)],
)
def test_the_launcher_runs_every_block_of_the_kernels(
    name: str, half: bool, last: bool, top_k: int, device: Any, counted: Counted
) -> None:
    """All threads of all blocks, as many as it asks for, give what the host gives, in either type and layout."""
    kind = KINDS[name]
    options = {**kind.options, **ONE_SIZE, "batch": 2, "max_detections": 40, "top_k": top_k}
    case = make_case(name, 1, kind.contents, **options)
    heads = [np.ascontiguousarray(head, np.float16 if half else np.float32) for head in case.heads]
    expected = decode_nms(heads, case.size_hw, case.spec)
    params = kernels.make_params(2, case.size_hw, case.spec)
    params.channels_last = last
    if last:
        heads = [np.ascontiguousarray(head.transpose(0, 2, 3, 1)) for head in heads]
    kept, addresses = [], []
    for head in heads:
        memory, address = _aligned(head.nbytes)
        ctypes.memmove(address, head.ctypes.data, head.nbytes)
        kept.append(memory)
        addresses.append(address)
    outputs = {array: _aligned(values.nbytes) for array, values in expected.items()}
    workspace, start = _aligned(device.retinaface_workspace_bytes(ctypes.byref(params)))
    before = start - workspace.ctypes.data
    code = device.retinaface_launch(
        ctypes.byref(params),
        int(half),
        (ctypes.c_void_p * 3)(*addresses),
        ctypes.byref(kernels.Outputs(*(address for _, address in outputs.values()))),
        ctypes.c_void_p(start),
        None,
    )
    assert code == 0
    for key, values in expected.items():
        memory, address = outputs[key]
        first = address - memory.ctypes.data
        assert memory[first : first + values.nbytes].tobytes() == values.tobytes(), (key, half, last)
        assert (memory[first + values.nbytes :] == 0xA5).all()
    assert (workspace[:before] == 0xA5).all()
    assert (workspace[len(workspace) - 64 + before :] == 0xA5).all()
    assert counted()[1] == 0


def test_the_launcher_runs_every_tile_of_a_letterbox(device: Any, counted: Counted) -> None:
    """Frames of three paths, and a slot without one; the last rows are no whole tile, and no whole block."""
    size = (38, 64)
    slots = [
        Slot((76, 128), size, seed=1),
        Slot(size, size, gap=16, seed=2),
        Slot((30, 20), (38, 25), seed=3),
        Slot((2, 2), (0, 0)),
        Slot((20, 40), (32, 64), PixelFormat.NV12_BT709, seed=4),
    ]
    frames = descriptions(slots, [slot.buffer.ctypes.data for slot in slots])
    memory, address = _aligned(len(slots) * 38 * 64 * 3)
    load_letterbox(device)(frames.ctypes.data, len(slots), size, PAD, address, 0)
    first = address - memory.ctypes.data
    got = memory[first : len(memory) - 64 + first].reshape(len(slots), *size, 3)
    np.testing.assert_array_equal(got, on_host(slots, size))
    assert (memory[:first] == 0xA5).all()
    assert (memory[len(memory) - 64 + first :] == 0xA5).all()
    assert counted()[1] == 0


def test_an_access_that_is_not_aligned_would_be_counted(device: Any, counted: Counted) -> None:
    """The output of a call that the launcher of the device refuses."""
    memory = np.zeros(4 * 32 * 3 + 32, np.uint8)
    address = memory.ctypes.data + -memory.ctypes.data % 16
    frames = (ctypes.c_byte * 64)()
    for offset, expected in ((0, (24, 0)), (8, (0, 24))):
        pointers = ctypes.addressof(frames), 1, 4, 32, ctypes.c_uint32(0), address + offset, 0
        arguments = [ctypes.c_void_p(p) if isinstance(p, int) and p > 1000 else p for p in pointers]
        assert device.retinaface_host_letterbox(*arguments) == 0
        assert counted() == expected
