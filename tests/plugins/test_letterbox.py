"""The letterbox kernel on the CPU, against cv2, as facespec.letterbox calls it, and against the formulas of video."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from facespec.errors import FrameError
from facespec.letterbox import Frame, Letterbox
from tests.gpu.frames import PAD, batches, in_other_orders, on_host
from tests.plugins.host_letterbox import host_letterbox, host_letterbox_nv12
from trt_runtime import kernels
from trt_runtime.gpu.flavor import gpu_capability
from trt_runtime.kernels import (
    FRAME,
    MAX_FRAME_SIDE,
    MENDS,
    LaunchError,
    LetterboxFrame,
    PixelFormat,
    describe_frame,
    frame_fields,
    load_letterbox,
    pack_bgr,
)

ROOT = Path(__file__).parents[2]
LUMA_WEIGHTS = {  # of red and blue; and whether luma is 0..255
    PixelFormat.NV12_BT601: (0.299, 0.114, False),
    PixelFormat.NV12_BT601_FULL: (0.299, 0.114, True),
    PixelFormat.NV12_BT709: (0.2126, 0.0722, False),
    PixelFormat.NV12_BT709_FULL: (0.2126, 0.0722, True),
}

sides = st.integers(1, 700)
network = st.integers(1, 20).map(lambda n: 32 * n)
contents = st.sampled_from(["noise", "black and white", "ramp"])


def make_frame(frame_hw: tuple[int, int], seed: int = 0, content: str = "noise") -> Frame:
    rng = np.random.default_rng(seed)
    if content == "ramp":
        y, x = np.indices(frame_hw)
        return np.stack([x, y, x + 3 * y], -1).astype(np.uint8)
    noise = rng.integers(0, 256, (*frame_hw, 3), np.uint8)
    return noise if content == "noise" else np.where(noise < 128, 0, 255).astype(np.uint8)


def make_nv12(frame_hw: tuple[int, int], seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    height, width = frame_hw
    chroma = rng.integers(0, 256, (height // 2, width // 2, 2), np.uint8)
    return rng.integers(0, 256, frame_hw, np.uint8), chroma


X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def assert_as_cv2(got: Frame, want: Frame, most: int = 0 if X86 else 1) -> None:
    """One grey level is allowed to other builds of cv2; on x86, where the wheels agree, there must be none."""
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want).max(initial=0) <= most


def test_a_grey_level_is_a_difference_on_x86() -> None:
    assert ("SSE" in cv2.getCPUFeaturesLine()) == X86  # it is cv2's build that decides
    frame = make_frame((3, 4))
    other = frame.copy()
    other[1, 2, 0] += 1 if other[1, 2, 0] < 255 else -1
    with pytest.raises(AssertionError) if X86 else nullcontext():
        assert_as_cv2(other, frame)
    assert_as_cv2(other, frame, most=1)
    assert_as_cv2(frame, frame)
    with pytest.raises(AssertionError):
        assert_as_cv2(frame // 2, frame)


@settings(max_examples=100, deadline=None)
@given(sides, sides, network, network, contents, st.integers(0, 99))
def test_any_frame(height: int, width: int, rows: int, columns: int, content: str, seed: int) -> None:
    frame = make_frame((height, width), seed, content)
    for box in (Letterbox.fit((height, width), (rows, columns)), Letterbox.pad((height, width))):
        assert_as_cv2(host_letterbox([frame], [box], PAD)[0], box.apply(frame, PAD))


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 640), st.integers(1, 640))
def test_any_scale(height: int, width: int, rows: int, columns: int) -> None:
    """Up along one axis and down along the other, or not at all."""
    frame = make_frame((height, width))
    for scaled in ((rows, columns), (height, min(columns, 640)), (rows, min(width, 640))):
        box = Letterbox((height, width), scaled, (700, 640))
        if scaled[0] <= 700:
            assert_as_cv2(host_letterbox([frame], [box], PAD)[0], box.apply(frame, PAD))


@pytest.mark.parametrize("size_hw", [(64, 96), (640, 640), (1, 32), (33, 32)])
def test_sizes_with_a_path_of_their_own(size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    others = [(1, 1), (1, 2), (2, 1), (1, 999), (999, 1), (2, 2), (3, 3), (height - 1 or 1, width - 1), (height, 31)]
    for frame_hw in [*((n * height, n * width) for n in (1, 2, 3, 4)), (2 * height, 3 * width), *others]:
        frame = make_frame(frame_hw)
        box = Letterbox.fit(frame_hw, size_hw)
        assert_as_cv2(host_letterbox([frame], [box], PAD)[0], box.apply(frame, PAD, np.empty((*size_hw, 3), np.uint8)))


@pytest.mark.parametrize("frame_hw", [(2160, 3840), (5001, 9001), (3, 16384), (16383, 5), (31, 16001)])
def test_large_frames(frame_hw: tuple[int, int]) -> None:
    """Positions whose numerators no longer fit in a float."""
    frame = make_frame(frame_hw)
    box = Letterbox.fit(frame_hw, (1280, 1280))
    assert_as_cv2(host_letterbox([frame], [box], PAD)[0], box.apply(frame, PAD))


def test_frames_of_a_batch_and_their_memory() -> None:
    """Views of larger arrays are read where they lie; whatever has no rows is copied."""
    large = make_frame((300, 401))
    frames: list[Frame] = [
        large[7:207, 3:222],
        large[:96, :64],
        large[::3],
        large[::-1],
        large[:, ::-1],
        np.asfortranarray(large),
        np.broadcast_to(large[:1], (50, 401, 3)),
        large[:1, :1],
    ]
    boxes = [Letterbox.fit((frame.shape[0], frame.shape[1]), (96, 64)) for frame in frames]
    memory = np.full((len(frames) + 2, 96, 64, 3), 0xA5, np.uint8)
    out = memory[1:-1]
    assert host_letterbox(frames, boxes, PAD, out) is out
    for image, frame, box in zip(out, frames, boxes, strict=True):
        assert_as_cv2(image, box.apply(frame, PAD))
    assert (memory[[0, -1]] == 0xA5).all()


def test_a_slot_without_a_frame_is_padding() -> None:
    out = np.zeros((2, 5, 32, 3), np.uint8)
    array = (LetterboxFrame * 2)()
    load_letterbox(kernels.library())(ctypes.addressof(array), 2, (5, 32), PAD, out.ctypes.data, 0)
    assert (out == PAD).all()


@pytest.mark.parametrize("gap", [0, 16, 64, 1, 8, 21])
@pytest.mark.parametrize("offset", [0, 16, 3])
def test_a_frame_that_fits_is_copied_from_where_it_lies(gap: int, offset: int) -> None:
    """A view of a wider array, on an address of 16 bytes and off it: rows are as far apart as its pitch says."""
    height, width = 40, 96
    memory = np.random.default_rng(gap).integers(0, 256, height * (3 * width + gap) + 64, np.uint8)
    start = -memory.ctypes.data % 16 + offset
    rows = memory[start:][: height * (3 * width + gap)].reshape(height, 3 * width + gap)
    frame = rows[:, : 3 * width].reshape(height, width, 3) if not gap else None
    if frame is None:
        frame = np.lib.stride_tricks.as_strided(rows, (height, width, 3), (3 * width + gap, 3, 1))
    assert frame.ctypes.data % 16 == offset % 16
    for size_hw in ((40, 96), (64, 128), (37, 64)):
        box = Letterbox((height, width), (height, width), size_hw)
        want = np.full((*size_hw, 3), PAD, np.uint8)
        part = frame[: size_hw[0], : size_hw[1]]
        want[: part.shape[0], : part.shape[1]] = part
        np.testing.assert_array_equal(host_letterbox([frame], [box], PAD)[0], want)


def test_every_path_of_the_kernel_gives_what_cv2_gives() -> None:
    """Of the batches that the tests on a GPU take, whose frames lie anywhere, with any pitch."""
    size = (97, 128)
    seen = 0
    for slots in batches(size):
        for image, slot in zip(on_host(slots, size), slots, strict=True):
            if not all(slot.scaled_hw):
                assert (image == PAD).all()
                continue
            (height, width), (rows, columns) = slot.frame_hw, slot.scaled_hw
            at = slot.buffer[slot.offset :]
            if slot.pixel_format:
                luma = np.lib.stride_tricks.as_strided(at, (height, width), (slot.pitch, 1))
                below = at[height * slot.pitch :]
                chroma = np.lib.stride_tricks.as_strided(below, (height // 2, width // 2, 2), (slot.pitch, 2, 1))
                whole = Letterbox(slot.frame_hw, slot.frame_hw, (height, -(-width // 32) * 32))
                planes = (luma.copy(), chroma.copy())
                frame = host_letterbox_nv12([planes], [whole], PAD, slot.pixel_format)[0, :, :width]
            else:
                frame = np.lib.stride_tricks.as_strided(at, (height, width, 3), (slot.pitch, 3, 1))
            scaled = cv2.resize(np.ascontiguousarray(frame), (columns, rows))
            want = np.full((*size, 3), PAD, np.uint8)
            want[:rows, :columns] = scaled[: size[0], : size[1]]
            assert_as_cv2(image, want)
            seen += 1
    assert seen == 2 * (11 + 5) + 16


@pytest.mark.parametrize("frame_hw", [(2, 2), (64, 96), (480, 640), (130, 94)])
def test_nv12_of_standard_definition_is_what_cv2_makes_of_it(frame_hw: tuple[int, int]) -> None:
    luma, chroma = make_nv12(frame_hw)
    frame = cv2.cvtColorTwoPlane(luma, chroma, cv2.COLOR_YUV2BGR_NV12)
    for box in (Letterbox.pad(frame_hw), Letterbox.fit(frame_hw, (96, 96)), Letterbox.fit(frame_hw, (320, 256))):
        got = host_letterbox_nv12([(luma, chroma)], [box], PAD, PixelFormat.NV12_BT601)[0]
        assert_as_cv2(got, box.apply(frame, PAD))


def to_bgr(luma: NDArray[Any], chroma: NDArray[Any], pixel_format: PixelFormat) -> NDArray[np.float64]:
    """ITU-R BT.601-7 and BT.709-6, section 3, solved for B, G and R in 0..255; luma below black is black, as in cv2."""
    red, blue, full = LUMA_WEIGHTS[pixel_format]
    y = luma / 255.0 if full else np.maximum(luma - 16.0, 0) / 219
    cb, cr = ((chroma[..., i].repeat(2, 0).repeat(2, 1) - 128.0) / (255 if full else 224) for i in (0, 1))
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    g = (y - red * r - blue * b) / (1 - red - blue)
    return np.clip(np.stack([b, g, r], -1), 0, 1) * 255


@pytest.mark.parametrize("pixel_format", LUMA_WEIGHTS)
def test_nv12_follows_the_formulas(pixel_format: PixelFormat) -> None:
    """Every luma with many chromas. The coefficients of cv2 for limited BT.601 have three decimals: 0.2 levels more."""
    luma = np.arange(256, dtype=np.uint8).reshape(1, 256).repeat(256, 0)
    chroma = np.random.default_rng(0).integers(0, 256, (128, 128, 2), np.uint8)
    chroma[:4] = np.array([[0, 0], [255, 255], [0, 255], [128, 128]], np.uint8)[:, None]
    box = Letterbox.pad((256, 256))
    got = host_letterbox_nv12([(luma, chroma)], [box], PAD, pixel_format)[0]
    tolerance = 0.75 if pixel_format == PixelFormat.NV12_BT601 else 0.501
    assert np.abs(got - to_bgr(luma, chroma, pixel_format)).max() < tolerance
    others = [to_bgr(luma, chroma, other) for other in LUMA_WEIGHTS if other != pixel_format]
    assert all(np.abs(got - other).max() > 5 for other in others)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), network, network, st.sampled_from(list(LUMA_WEIGHTS)))
def test_nv12_is_scaled_after_it_is_converted(
    rows: int, columns: int, height: int, width: int, pixel_format: PixelFormat
) -> None:
    frame_hw = (2 * rows, 2 * columns)
    planes = make_nv12(frame_hw)
    whole = Letterbox.pad(frame_hw)
    frame = host_letterbox_nv12([planes], [whole], PAD, pixel_format)[0, : frame_hw[0], : frame_hw[1]]
    box = Letterbox.fit(frame_hw, (height, width))
    got = host_letterbox_nv12([planes], [box], PAD, pixel_format)[0]
    assert_as_cv2(got, box.apply(frame, PAD))


def test_nv12_planes_of_a_decoder() -> None:
    """Both planes in one surface, with a pitch of their own."""
    surface = np.random.default_rng(3).integers(0, 256, (90 + 45, 256), np.uint8)
    luma, chroma = surface[:90, :150], surface[90:, :150].reshape(45, 75, 2)
    wide = np.lib.stride_tricks.as_strided(surface[90:], (45, 75, 2), (256, 2, 1))
    box = Letterbox.fit((90, 150), (64, 64))
    got = host_letterbox_nv12([(luma, wide)], [box], PAD, PixelFormat.NV12_BT709)
    want = host_letterbox_nv12([(luma.copy(), chroma.copy())], [box], PAD, PixelFormat.NV12_BT709)
    np.testing.assert_array_equal(got, want)


def test_the_order_of_a_loop_does_not_matter() -> None:
    size = (97, 128)
    for slots in batches(size):
        want = on_host(slots, size)
        assert all((got == want).all() for got in in_other_orders(slots, size, (0, 1, 2)))


GUARDED = """
import ctypes, mmap
import numpy as np
from facespec.letterbox import Letterbox
from trt_runtime import kernels
from trt_runtime.kernels import PixelFormat, describe_frame, load_letterbox

libc = ctypes.CDLL(None, use_errno=True)
PAGE, PAGES = mmap.PAGESIZE, 200
memory = mmap.mmap(-1, (PAGES + 2) * PAGE)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for guard in (base, base + (PAGES + 1) * PAGE):
    assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
first, last = base + PAGE, base + (PAGES + 1) * PAGE
out = np.empty((1, 160, 160, 3), np.uint8)
launch = load_letterbox(kernels.library())
count = 0
for height, width, gap in ((160, 160, 0), (160, 160, 16), (1, 1, 5), (1, 2, 0), (2, 2, 0), (320, 320, 0), (31, 77, 3)):
    for pixel_format in PixelFormat:
        if pixel_format and (height % 2 or width % 2):
            continue
        pitch = width * (1 if pixel_format else 3) + gap
        rows = height + (height // 2 if pixel_format else 0)
        for data in (first, last - rows * pitch + gap):
            chroma = (data + height * pitch, pitch) if pixel_format else (0, 0)
            for scaled in (Letterbox.fit((height, width), (160, 160)).scaled_hw, (min(height, 160), min(width, 160))):
                frame = describe_frame(data, pitch, (height, width), scaled, pixel_format, *chroma)
                launch(ctypes.addressof(frame), 1, (160, 160), (1, 2, 3), out.ctypes.data, 0)
                count += 1
print(count)
"""


def test_nothing_beside_a_frame_is_read() -> None:
    """Frames that touch memory which cannot be read, before their first byte or after their last."""
    result = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout.strip()) == (0, "92"), result.stderr


def test_colours_are_packed_as_the_kernel_takes_them() -> None:
    assert pack_bgr((1, 2, 3)) == 0x030201
    assert pack_bgr((255, 0, 255)) == 0xFF00FF
    for colour in ((-1, 0, 0), (0, 256, 0), (0, 0, 300)):
        with pytest.raises(ValueError, match="three values from 0 to 255"):
            pack_bgr(colour)


def test_slots_are_independent() -> None:
    first, second = make_frame((30, 40), 1), make_frame((50, 20), 2)
    boxes = [Letterbox.fit((30, 40), (32, 64)), Letterbox.fit((50, 20), (32, 64))]
    both = host_letterbox([first, second], boxes, (9, 8, 7))
    for image, frame, box in zip(both, (first, second), boxes, strict=True):
        assert_as_cv2(image, box.apply(frame, (9, 8, 7)))
    assert not np.shares_memory(host_letterbox([first, second], boxes, PAD), both)
    with pytest.raises(LaunchError, match=r"letterbox of 1 frames into 33x32 at 0x[0-9a-f]+: refused; it takes widths"):
        host_letterbox([first], [Letterbox.fit((30, 40), (32, 33))], PAD)


@pytest.mark.parametrize(
    ("size_hw", "possible"),
    [((16384, 32), True), ((1, 16384), True), ((16385, 32), False), ((1, 16416), False), ((0, 32), False),
     ((32, 0), False), ((32, 16), False), ((-1, 32), False)],
)  # fmt: skip
def test_the_sizes_of_an_input_that_are_possible(size_hw: tuple[int, int], possible: bool) -> None:
    memory = np.full(max(size_hw[0] * size_hw[1] * 3, 0) + 32, 0xA5, np.uint8)
    array = (LetterboxFrame * 1)()
    launch = load_letterbox(kernels.library())
    with nullcontext() if possible else pytest.raises(LaunchError, match="refused"):
        launch(ctypes.addressof(array), 1, size_hw, PAD, memory.ctypes.data, 0)
    if possible:
        assert (memory[:-32].reshape(-1, 3) == PAD).all()
    assert (memory[-32:] == 0xA5).all()
    slots, start = ctypes.addressof(array), memory.ctypes.data
    for frames, batch, out in ((0, 1, start), (slots, 0, start), (slots, 65536, start), (slots, 1, 0)):
        with pytest.raises(LaunchError, match="refused"):
            launch(frames, batch, (32, 32), PAD, out, 0)


def test_what_is_said_about_errors_of_cuda() -> None:
    for code, words in (
        (1, "multiples of 32"),
        (716, "aligned to 16 bytes"),
        (35, "newer than the driver: update the NVIDIA driver"),
        (209, "no code for this GPU: update the NVIDIA driver, or compile the plugin"),
        (222, "driver"),
    ):
        assert words in MENDS[code]
    assert len(MENDS) == 5


def test_the_description_is_that_of_the_header() -> None:
    header = (ROOT / "plugins" / "include" / "letterbox.h").read_text()
    assert f"kMaxFrameSide = {MAX_FRAME_SIDE};" in header
    formats = re.search(r"enum PixelFormat : int32_t \{(.*?)\}", header)
    assert formats
    named = dict(re.findall(r"k(\w+) = (\d)", formats[1]))
    assert {name.replace("_", "").lower(): value for name, value in PixelFormat.__members__.items()} == {
        name.lower(): int(value) for name, value in named.items()
    }
    frame = describe_frame(4096, 128, (50, 100), (25, 60), PixelFormat.NV12_BT601, 8192, 120)
    values = {name: getattr(frame, name) for name, _ in LetterboxFrame._fields_ if name != "reserved"}
    assert values == {
        "data": 4096, "chroma": 8192, "pitch": 128, "chroma_pitch": 120, "height": 50, "width": 100,
        "scaled_height": 25, "scaled_width": 60, "format": 1,
    }  # fmt: skip
    assert bytes(frame) == FRAME.pack(*frame_fields(4096, 128, (50, 100), (25, 60), PixelFormat.NV12_BT601, 8192, 120))
    assert [name for name, _ in LetterboxFrame._fields_] == [
        name for line in re.findall(r"^  (?:const void\*|int64_t|int32_t) ([^;]+);", header, re.MULTILINE)[:8]
        for name in re.findall(r"\w+(?=,|\[|$)", line)
    ]  # fmt: skip
    assert "sizeof(LetterboxFrame) == 64" in header
    assert ctypes.sizeof(LetterboxFrame) == 64
    for name, offset in (("pitch", 16), ("height", 32), ("format", 48)):
        assert f"offsetof(LetterboxFrame, {name}) == {offset}" in header
        assert getattr(LetterboxFrame, name).offset == offset


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4096, 300, (0, 100), (64, 64)), "sides must be 1 to 16384"),
        ((4096, 300, (100, 100), (0, 64)), "sides must be 1 to 16384"),
        ((4096, 60000, (100, 16385), (64, 64)), "cv2.resize"),
        ((4096, 299, (100, 100), (64, 64)), "a pitch of 300 bytes at least, got 4096 and 299"),
        ((4096, -300, (100, 100), (64, 64)), "a pitch of 300"),
        ((0, 300, (100, 100), (64, 64)), "expected an address"),
        ((4096, 300, (100, 100), (64, 64), PixelFormat.BGR, 4096, 300), "no chroma"),
        ((4096, 100, (100, 99), (64, 64), PixelFormat.NV12_BT709, 8192, 100), "must be even"),
        ((4096, 100, (99, 100), (64, 64), PixelFormat.NV12_BT709, 8192, 100), "must be even"),
        ((4096, 99, (100, 100), (64, 64), PixelFormat.NV12_BT709, 8192, 100), "a pitch of 100"),
        ((4096, 100, (100, 100), (64, 64), PixelFormat.NV12_BT709, 8192, 99), "its chroma"),
        ((4096, 100, (100, 100), (64, 64), PixelFormat.NV12_BT709), "its chroma"),
    ],
)
def test_impossible_frames_are_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(FrameError, match=words) as caught:
        describe_frame(*arguments)
    height, width = arguments[2]
    kind = "NV12_BT709" if len(arguments) > 4 and arguments[4] else "BGR"
    assert str(caught.value).startswith(f"frame of {width}x{height} pixels, {kind}: ")


def test_frames_at_the_limits_are_taken() -> None:
    for arguments in (
        (1, 3, (1, 1), (1, 1)),
        (1, 3 * 16384, (16384, 16384), (16384, 16384)),
        (1, 2, (2, 2), (1, 16384), PixelFormat.NV12_BT709_FULL, 1, 2),
    ):
        assert describe_frame(*arguments).width == arguments[2][1]  # type: ignore[arg-type]
    for scaled in ((16385, 64), (64, 16385), (64, 0), (-1, 64)):
        with pytest.raises(FrameError, match=rf"scaled to {scaled[1]}x{scaled[0]}: sides must be 1 to 16384"):
            describe_frame(4096, 300, (100, 100), scaled)


def test_what_does_not_fit_together_is_refused() -> None:
    frame, box = make_frame((10, 10)), Letterbox.fit((10, 10), (64, 64))
    with pytest.raises(ValueError, match="0 to 255"):
        host_letterbox([frame], [box], (0, 0, 256))
    with pytest.raises(LaunchError, match="multiples of 32"):
        host_letterbox([frame], [Letterbox.fit((10, 10), (64, 48))], PAD)


def test_the_device_libraries_have_it_too(device_library: Path) -> None:
    """What is refused before the GPU is asked, and, without a GPU, CUDA's error."""
    launch = load_letterbox(ctypes.CDLL(str(device_library)))
    for arguments, code in (
        ((4096, 0, (64, 64), PAD, 4096, 0), 1),
        ((4096, 1, (64, 63), PAD, 4096, 0), 1),
        ((4096, 1, (64, 32768), PAD, 4096, 0), 1),
        ((4096, 1, (16385, 64), PAD, 4096, 0), 1),
        ((4096, 1, (0, 64), PAD, 4096, 0), 1),
        ((4096, 65536, (64, 64), PAD, 4096, 0), 1),
        ((4096, 1, (64, 64), PAD, 0, 0), 1),
        ((4096, 1, (64, 64), PAD, 4096 + 1, 0), 716),
        ((0, 1, (64, 64), PAD, 4096, 0), 1),
        ((4096, 1, (64, 64), PAD, 4096 + 8, 0), 716),
        ((4096 + 4, 1, (64, 64), PAD, 4096, 0), 716),
    ):
        with pytest.raises(LaunchError, match=f"CUDA error {code};"):
            launch(*arguments)
    if gpu_capability() is None:
        for frames, out in ((4096, 4096), (4096 + 8, 4096 + 16)):
            with pytest.raises(
                LaunchError, match=r"letterbox of 1 frames into 64x64 at 0x10\d0: CUDA error (?!1;|716;)"
            ):
                launch(frames, 1, (64, 64), PAD, out, 0)
