"""How much AV1 data makes a decoder do, read off its headers: an AVIF file need not say the truth about that.

After the AV1 specification, sections 5.5 and 5.9; ISO/IEC 14496-12 says where the data lie in a file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAX_PARTS = 100_000
"""Files with more boxes, and data with more units, are refused."""

_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6
_SWITCH = 3  # a type of frame
_SELECT = 2  # each frame says it


class _Bits:
    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def __call__(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise EOFError
        return self._value >> self._left & ((1 << count) - 1)


@dataclass
class _Sequence:
    """What a sequence header says that the size of a frame depends on."""

    size: tuple[int, int]
    largest: tuple[int, int]
    reduced: bool
    point_bits: int
    screen: int
    integer: int
    id_bits: int


def _read_sequence(bits: _Bits) -> _Sequence:
    bits(4)
    reduced, model, equal = bool(bits(1)), 0, 0
    delay_bits = point_bits = 0
    if reduced:
        bits(5)
    else:
        if bits(1):
            bits(64)
            equal = bits(1)
            if equal:
                zeros = 0
                while not bits(1):
                    zeros += 1
                bits(zeros)
            model = bits(1)
            if model:
                delay_bits = bits(5) + 1
                bits(37)
                point_bits = bits(5) + 1
        display = bits(1)
        for _ in range(bits(5) + 1):
            bits(12)
            if bits(5) > 7:
                bits(1)
            if model and bits(1):
                bits(2 * delay_bits + 1)
            if display and bits(1):
                bits(4)
    width_bits, height_bits = bits(4) + 1, bits(4) + 1
    size = bits(width_bits) + 1, bits(height_bits) + 1
    largest = 1 << width_bits, 1 << height_bits
    if reduced:
        return _Sequence(size, largest, True, 0, _SELECT, _SELECT, 0)
    id_bits = bits(4) + 2 + bits(3) + 1 if bits(1) else 0
    bits(7)
    if bits(1):
        bits(2)
    screen = _SELECT if bits(1) else bits(1)
    integer = _SELECT if not screen or bits(1) else bits(1)
    return _Sequence(size, largest, False, 0 if equal else point_bits, screen, integer, id_bits)


def _frame_size(bits: _Bits, sequence: _Sequence) -> tuple[int, int]:
    """Return width and height of a frame: at most so many where it has a size of its own."""
    if sequence.reduced:
        return sequence.size
    if bits(1):  # one that is there already is shown
        return 0, 0
    kind, shown = bits(2), bits(1)
    bits(sequence.point_bits if shown else 1)
    if kind != _SWITCH and not (kind == 0 and shown):
        bits(1)
    bits(1)
    screen = bits(1) if sequence.screen == _SELECT else sequence.screen
    if screen and sequence.integer == _SELECT:
        bits(1)
    bits(sequence.id_bits)
    return sequence.largest if kind == _SWITCH or bits(1) else sequence.size


def frame_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield width and height of each frame that is decoded of AV1 data; of some it is an upper limit.

    Raises:
        EOFError: The data end early.
        ValueError: There is too much of it.
    """
    place, sequence = 0, None
    for _ in range(MAX_PARTS):
        if place >= len(data):
            return
        head = data[place]
        kind = head >> 3 & 15
        place += 2 if head & 4 else 1
        size, shift = 0, 0
        if head & 2:
            while True:
                if place >= len(data) or shift > 49:
                    raise EOFError
                part = data[place]
                size |= (part & 127) << shift
                place, shift = place + 1, shift + 7
                if part < 128:
                    break
        else:
            size = max(len(data) - place, 0)
        if place + size > len(data):
            raise EOFError
        body = data[place : place + min(size, 512)]
        place += size
        if kind == _SEQUENCE_HEADER:
            sequence = _read_sequence(_Bits(body))
        elif kind in (_FRAME_HEADER, _FRAME) and sequence:
            yield _frame_size(_Bits(body), sequence)
    raise ValueError(f"has more than {MAX_PARTS} units: save it again")


def boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of what the boxes of a JPEG 2000, HEIC or AVIF file hold."""
    for _ in range(MAX_PARTS):
        if start + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, start)
        inside = start + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, inside)
            inside += 8
        stop = start + size if size else end
        if not inside <= stop <= end:
            raise EOFError
        yield kind, inside, stop
        start = stop
    raise ValueError(f"has more than {MAX_PARTS} boxes: save it again")


def _inside(data: bytes, start: int, end: int, *path: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of the boxes of a path."""
    for kind, inside, stop in boxes(data, start, end):
        if kind == path[0]:
            if len(path) == 1:
                yield inside, stop
            else:
                yield from _inside(data, inside, stop, *path[1:])


def _items(data: bytes, start: int, end: int) -> Iterator[bytes]:
    """Yield the AV1 data of each picture that a `meta` box names."""
    parts = {kind: (inside, stop) for kind, inside, stop in boxes(data, start + 4, end)}
    if not {b"iinf", b"iloc"} <= parts.keys():
        raise EOFError
    kinds = {}
    inside, stop = parts[b"iinf"]
    for kind, entry, _ in boxes(data, inside + (8 if data[inside] else 6), stop):
        if kind == b"infe" and data[entry] >= 2:
            wide = data[entry] > 2
            number, what = struct.unpack_from(">I2x4s" if wide else ">H2x4s", data, entry + 4)
            kinds[number] = what
    place, stop = parts[b"iloc"]
    version, sizes = data[place], struct.unpack_from(">BB", data, place + 4)
    place += 6

    def number_of(size: int) -> int:
        nonlocal place
        if place + size > stop:
            raise EOFError
        place += size
        return int.from_bytes(data[place - size : place], "big")

    left = 2 * len(data)  # parts may lie over each other
    for _ in range(number_of(4 if version == 2 else 2)):
        item = number_of(4 if version == 2 else 2)
        method = number_of(2) & 15 if version else 0
        number_of(2)
        base, found = number_of(sizes[1] >> 4), list[bytes]()
        low, high = parts.get(b"idat", (0, 0)) if method == 1 else (0, len(data))
        for _ in range(number_of(2)):
            number_of(sizes[1] & 15 if version else 0)
            first, length = low + base + number_of(sizes[0] >> 4), number_of(sizes[0] & 15)
            if kinds.get(item) == b"av01":
                part = data[first : min(first + length, high) if length else high]
                left -= len(part)
                if left < 0:
                    raise ValueError("names its data more than once: save it again")
                found.append(part)
        if found:
            yield b"".join(found)


def _first_samples(data: bytes) -> Iterator[bytes]:
    """Yield the AV1 data of the first picture of each track."""
    for start, end in _inside(data, 0, len(data), b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        parts = {kind: (inside, stop) for kind, inside, stop in boxes(data, start, end)}
        places = [(">I", kind) for kind in (b"stco",) if kind in parts] + [(">Q", b"co64")] * (b"co64" in parts)
        if not places or b"stsz" not in parts:
            continue
        (size, count) = struct.unpack_from(">II", data, parts[b"stsz"][0] + 4)
        if not size and count:
            (size,) = struct.unpack_from(">I", data, parts[b"stsz"][0] + 12)
        for layout, kind in places:
            if struct.unpack_from(">I", data, parts[kind][0] + 4)[0]:
                (first,) = struct.unpack_from(layout, data, parts[kind][0] + 8)
                yield data[first : first + size]


def pictures(data: bytes) -> Iterator[bytes]:
    """Yield the AV1 data of each picture of an AVIF file: of its items, and of its tracks the first.

    Raises:
        EOFError: The file ends early.
        ValueError: There is too much of it.
    """
    for start, end in _inside(data, 0, len(data), b"meta"):
        yield from _items(data, start, end)
    yield from _first_samples(data)
