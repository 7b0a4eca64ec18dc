"""What is compiled for the device only, run on the host with stand-ins for CUDA's intrinsics: the same bits, and no
16-byte access to an address that is not aligned."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugins import host
from plugins.build import ROOT, find_compiler
from plugins.host import decode_nms
from tests.gpu.frames import batches, on_host
from tests.plugins.brute_force import elementary
from tests.plugins.test_host import KINDS, _same, make_case


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("device") / "device_branches.so"
    flags = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread")
    warnings = ("-Wall", "-Wextra", "-Werror")
    source = Path(__file__).with_name("device_branches.cpp")
    include = (f"-I{ROOT / 'include'}", f"-I{ROOT / 'src'}")
    subprocess.run([find_compiler(), *flags, *warnings, *include, source, "-o", out], check=True)
    library = ctypes.CDLL(str(out))
    library.retinaface_host_check.restype = ctypes.c_char_p
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
        patch.setattr(host, "library", lambda: library)
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
    for slots in batches(size):
        expected = on_host(slots, size)
        with _through(device):
            actual = on_host(slots, size)
        np.testing.assert_array_equal(actual, expected)
        assert counted()[1] == 0, slots


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
