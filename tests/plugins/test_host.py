"""The kernels on the CPU, in every order of execution, against a slow version and against facespec.boxes."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from facespec import boxes as fb
from facespec.boxes import make_priors
from facespec.errors import BuildError, SpecError
from facespec.spec import AnchorSpec, DecodeSpec, ModelSpec
from tests.plugins.brute_force import decode_image, elementary, join_heads, split_heads
from trt_runtime import kernels
from trt_runtime.gpu.flavor import gpu_capability
from trt_runtime.kernels import decode_nms

Array = NDArray[np.float32]
Outputs = dict[str, NDArray[Any]]

ANCHORS = (
    AnchorSpec(),
    AnchorSpec((16,), ((24,),)),
    AnchorSpec((8, 32), ((10, 20, 40), (80, 160, 320))),
    AnchorSpec((4, 8, 16, 32), ((6, 8, 10, 12), (16, 20, 24, 28), (32, 40, 48, 56), (64, 96, 128, 192))),
    AnchorSpec((5, 7, 12, 100), ((9,), (30,), (70,), (300,))),
)
SMALL = ((32, 32), (8, 200), (200, 8), (33, 47), (64, 96), (96, 64), (1, 1))
MEDIUM = ((160, 160), (96, 256), (256, 96), (128, 224))
NON_FINITE = (np.nan, np.inf, -np.inf)


@dataclass(frozen=True)
class Case:
    """Head maps of a batch and what to do with them."""

    heads: list[NDArray[Any]]
    size_hw: tuple[int, int]
    spec: ModelSpec
    capacity: int

    @property
    def priors(self) -> int:
        return self.spec.anchors.count(self.size_hw)


@dataclass
class Slot:
    """What one image is made from: arrays for all priors, filled with background; `d` is face minus background."""

    rng: np.random.Generator
    priors: Array
    threshold: float
    d: Array
    boxes: Array
    landmarks: Array
    spoiled: tuple[int, int, float] | None = None  # prior, one of its 16 values, what it becomes

    def raise_some(self, count: int) -> NDArray[np.intp]:
        """Lift the scores of `count` priors over the threshold; return which."""
        chosen = self.rng.choice(len(self.d), min(count, len(self.d)), replace=False)
        self.d[chosen] = self.threshold + 0.01 + self.rng.exponential(2, len(chosen))
        return chosen


def _none(slot: Slot) -> None:
    pass


def _one(slot: Slot) -> None:
    slot.raise_some(1)


def _few(slot: Slot) -> None:
    slot.raise_some(int(slot.rng.integers(2, 20)))


def _hundreds(slot: Slot) -> None:
    slot.raise_some(int(slot.rng.integers(65, 700)))


def _every(slot: Slot) -> None:
    slot.raise_some(len(slot.d))


def _tied(slot: Slot) -> None:
    slot.d[slot.raise_some(int(slot.rng.integers(2, len(slot.d) + 2)))] = slot.threshold + 1


def _quantised(slot: Slot) -> None:
    _every(slot)
    slot.d[:] = np.round(slot.d) + np.ceil(slot.threshold)


def _at_threshold(slot: Slot) -> None:
    """Differences next to 0 on both sides, and zeros of both signs."""
    slot.d[:] = slot.rng.choice(np.array([0, -0.0, 2**-24, -(2**-24), 1e-44, -1e-44, 1, -1], np.float32), len(slot.d))


def _huge_logits(slot: Slot) -> None:
    chosen = slot.raise_some(60)
    slot.d[chosen] = slot.rng.choice(np.array([3e38, 1e38, 80, 2], np.float32), len(chosen))


def _huge_boxes(slot: Slot) -> None:
    chosen = slot.raise_some(60)
    scales = np.array([1, 100, 1e30, 3e38], np.float32)
    for deltas, columns in ((slot.boxes, 2), (slot.landmarks, 10)):
        shape = (len(chosen), columns)
        deltas[chosen, :columns] = slot.rng.uniform(-1, 1, shape) * slot.rng.choice(scales, shape)
    slot.boxes[chosen, 2:] = slot.rng.choice(np.array([0, 30, 215, 400, 500, 3e38], np.float32), (len(chosen), 2))


def _tiny_boxes(slot: Slot) -> None:
    chosen = slot.raise_some(60)
    slot.boxes[chosen, :2] = slot.rng.choice(np.array([0, -0.0, 1e-30, 1e-44], np.float32), (len(chosen), 2))
    slot.boxes[chosen, 2:] = slot.rng.choice(np.array([0, -20, -430, -500, -520, -3e38], np.float32), (len(chosen), 2))
    slot.landmarks[chosen] = 1e-44


def _broken(slot: Slot) -> None:
    """One value of one prior, which may be a candidate or not, is not finite."""
    slot.raise_some(int(slot.rng.integers(0, 30)))
    kind = int(slot.rng.integers(3))  # class, box, landmark
    value = int(slot.rng.integers((0, 2, 6)[kind], (2, 6, 16)[kind]))
    slot.spoiled = int(slot.rng.integers(len(slot.d))), value, float(slot.rng.choice(NON_FINITE))


def _faces(slot: Slot, count: int = 0) -> None:
    """Several candidates a face, as a detector finds them."""
    extent = slot.priors[:, :2].max(axis=0)
    for _ in range(count or int(slot.rng.integers(1, 12))):
        centre = slot.rng.uniform(0, extent)
        side = 2 ** slot.rng.uniform(3.5, 7)
        far = np.abs(slot.priors[:, :2] - centre).max(axis=1) / side + np.abs(np.log2(slot.priors[:, 2] / side))
        near = np.argpartition(far, min(12, len(far) - 1))[: int(slot.rng.integers(1, 12))]
        target = np.concatenate([centre - side / 2, centre + side / 2])
        boxes = target + side * slot.rng.normal(0, 0.06, (len(near), 4))
        slot.boxes[near] = fb.encode_boxes(boxes.astype(np.float32), slot.priors[near], (0.1, 0.2))
        slot.d[near] = slot.threshold + 0.01 + slot.rng.exponential(4, len(near))


def _crowd(slot: Slot) -> None:
    _faces(slot, 350)


def _covered(slot: Slot) -> None:
    """One box over everything, the best one: all that follows is suppressed, tile after tile."""
    best = int(slot.raise_some(len(slot.d))[0])
    slot.d[best] = 30
    slot.boxes[:] = fb.encode_boxes(np.array([[-50, -50, 250, 250]], np.float32), slot.priors, (0.1, 0.2))


CONTENTS: tuple[Callable[[Slot], None], ...] = (
    *(_none, _one, _few, _hundreds, _every, _tied, _quantised, _at_threshold),
    *(_huge_logits, _huge_boxes, _tiny_boxes, _broken, _faces, _covered),
)


def _logits(rng: np.random.Generator, d: Array) -> Array:
    """Return (N, 2) background and face logits whose difference is `d`: exactly where tiny, twice where huge."""
    zeros = np.array([0, -0.0], np.float32)
    size = np.abs(d)
    face = d * rng.uniform(0, 1, len(d)).astype(np.float32)
    background = face - d
    tiny, huge = size < 0.001, size > 1e37
    face[tiny | huge] = d[tiny | huge]
    background[huge] = -d[huge]
    background[tiny] = rng.choice(zeros, tiny.sum())
    face[d == 0] = rng.choice(zeros, (d == 0).sum())  # -0 - +0 is -0, the other three are +0
    return np.stack([background, face], axis=1)


def make_case(
    kind: str,
    index: int,
    contents: tuple[Callable[[Slot], None], ...],
    *,
    sizes: tuple[tuple[int, int], ...] = SMALL,
    anchors: tuple[AnchorSpec, ...] = ANCHORS,
    batch: int = 0,
    **chosen: Any,
) -> Case:
    """Return case `index` of a kind, the same one on every call.

    Slots of the batch take the contents in turn; `chosen` are the fields of DecodeSpec that are not drawn.
    """
    rng = np.random.default_rng((2027, zlib.crc32(kind.encode()), index))
    anchor = anchors[0] if rng.random() < 0.5 else anchors[int(rng.integers(len(anchors)))]
    decode = DecodeSpec(
        variances=chosen.pop("variances", (0.1, 0.2)),
        score_threshold=chosen.pop("score_threshold", float(rng.choice([0.02, 0.1, 0.5, 0.9]))),
        iou_threshold=chosen.pop("iou_threshold", float(rng.choice([0.05, 0.3, 0.4, 0.4, 0.5, 0.7, 0.95]))),
        top_k=chosen.pop("top_k", int(rng.choice([1, 2, 31, 32, 33, 64, 65, 100, 500, 5000]))),
        max_detections=chosen.pop("max_detections", int(rng.choice([1, 2, 31, 32, 33, 100, 300]))),
    )
    capacity = chosen.pop("capacity", int(rng.choice([64, 128, 256, 4096])))
    assert not chosen
    spec = ModelSpec(anchors=anchor, decode=decode)
    size_hw = sizes[int(rng.integers(len(sizes)))]
    priors = make_priors(anchor, size_hw)
    half = rng.random() < 0.3
    parts: list[list[Array]] = [[], [], []]
    for number in range(batch or int(rng.choice([1, 1, 1, 1, 2, 3]))):
        slot = Slot(
            rng,
            priors,
            decode.logit_threshold,
            (decode.logit_threshold - rng.uniform(0.05, 8, len(priors))).astype(np.float32),
            rng.normal(0, 1, (len(priors), 4)).astype(np.float32),
            rng.normal(0, 2, (len(priors), 10)).astype(np.float32),
        )
        contents[(index + number) % len(contents)](slot)
        values = np.concatenate([_logits(rng, slot.d), slot.boxes, slot.landmarks], axis=1)
        if half:
            values = np.clip(values, -65504, 65504).astype(np.float16)
        if slot.spoiled:
            values[slot.spoiled[:2]] = slot.spoiled[2]
        for part, array in zip(parts, np.split(values, (2, 6), axis=1), strict=True):
            part.append(array)
    logits, boxes, landmarks = (np.stack(part) for part in parts)
    heads: list[NDArray[Any]] = join_heads(logits, boxes, landmarks, anchor, size_hw)
    if rng.random() < 0.4:
        heads = [np.ascontiguousarray(head.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for head in heads]
    return Case(heads, size_hw, spec, capacity)


@dataclass(frozen=True)
class Kind:
    """Cases of one sort: how many, how they are made, and what is so in at least `share` of them, or they are not."""

    count: int
    contents: tuple[Callable[[Slot], None], ...]
    options: dict[str, Any]
    is_so: Callable[[Case, Outputs], bool]
    share: float = 1.0
    unclear: float = 0.01  # share of the images in which the rounding of exp may decide what is kept


def _differences(case: Case) -> Array:
    logits = [split_heads(case.heads, image, case.spec.anchors.per_cell)[0] for image in range(len(case.heads[0]))]
    with np.errstate(over="ignore"):
        return np.stack([image[:, 1] - image[:, 0] for image in logits])


def _entered(case: Case, out: Outputs) -> NDArray[np.int32]:
    return np.minimum(out["num_candidates"], case.spec.decode.top_k)


def _none_found(case: Case, out: Outputs) -> bool:
    return not out["num_candidates"].any() and not out["num_detections"].any()


def _one_found(case: Case, out: Outputs) -> bool:
    return bool((out["num_candidates"] == 1).all() and (out["num_detections"] == 1).all())


def _all_found(case: Case, out: Outputs) -> bool:
    return bool((out["num_candidates"] == case.priors).all())


def _many_found(case: Case, out: Outputs) -> bool:
    return bool((out["num_candidates"] > 64).all())


def _suppressed(case: Case, out: Outputs) -> bool:
    kept = out["num_detections"]
    return bool(((kept < _entered(case, out)) & (kept < case.spec.decode.max_detections)).any())


def _equal_scores(case: Case, out: Outputs) -> bool:
    return bool((np.diff(out["scores"][:, :2]) == 0).any())


def _has_minus_zero(case: Case, out: Outputs) -> bool:
    d = _differences(case)
    return bool(((d == 0) & np.signbit(d)).any() and ((d == 0) & ~np.signbit(d)).any())


def _infinite_differences(case: Case, out: Outputs) -> bool:
    return bool(np.isposinf(_differences(case)).any() and (out["scores"] == 1).any())


def _boxes_overflow(case: Case, out: Outputs) -> bool:
    return not np.isfinite(out["boxes"]).all()


def _empty_boxes(case: Case, out: Outputs) -> bool:
    found = np.arange(case.spec.decode.max_detections) < out["num_detections"][:, None]
    boxes = out["boxes"][found]
    return bool((boxes[:, 2:] == boxes[:, :2]).any())


def _all_broken(case: Case, out: Outputs) -> bool:
    return bool((out["num_candidates"] == -1).all() and not out["num_detections"].any())


def _one_broken(case: Case, out: Outputs) -> bool:
    return int((out["num_candidates"] == -1).sum()) == 1 and int((out["num_detections"] > 0).sum()) == 3


def _slots_differ(case: Case, out: Outputs) -> bool:
    return len({image.tobytes() for image in out["scores"]}) > 3


def _cut(case: Case, out: Outputs) -> bool:
    return bool((out["num_candidates"] > case.spec.decode.top_k).all())


def _spilled(case: Case, out: Outputs) -> bool:
    return bool((_entered(case, out) > case.capacity).all())


def _more_than_threads(case: Case, out: Outputs) -> bool:
    """So its keys are in shared memory, and its boxes are not in registers."""
    return bool((_entered(case, out) > 1024).all() and case.capacity == 4096)


def _full(case: Case, out: Outputs) -> bool:
    return bool((out["num_detections"] == case.spec.decode.max_detections).all())


ONE_SIZE: dict[str, Any] = {"sizes": ((160, 160),), "anchors": ANCHORS[:1]}

KINDS = {
    "none": Kind(120, (_none,), {}, _none_found),
    "one": Kind(170, (_one,), {}, _one_found),
    "few": Kind(300, (_few,), {"max_detections": 100}, _suppressed, 0.3),
    "faces": Kind(100, (_faces,), {"sizes": MEDIUM, "top_k": 5000}, _suppressed, 0.5),
    "hundreds": Kind(100, (_hundreds,), {**ONE_SIZE}, _many_found),
    "every prior": Kind(120, (_every,), {}, _all_found),
    "tied": Kind(80, (_tied,), {}, _equal_scores, 0.2),
    "quantised": Kind(120, (_quantised,), {}, _equal_scores, 0.2),
    "at the threshold": Kind(60, (_at_threshold,), {"score_threshold": 0.5}, _has_minus_zero, 0.8),
    "huge logits": Kind(80, (_huge_logits,), {}, _infinite_differences, 0.5),
    "huge boxes": Kind(60, (_huge_boxes,), {"top_k": 5000, "max_detections": 100}, _boxes_overflow, 0.5, 0.7),
    "tiny boxes": Kind(120, (_tiny_boxes,), {}, _empty_boxes, 0.5, 0.7),
    "broken": Kind(180, (_broken,), {}, _all_broken),
    "one broken slot": Kind(120, (_broken, _few, _faces, _one), {"batch": 4}, _one_broken),
    "mixed slots": Kind(60, CONTENTS, {"batch": 8}, _slots_differ, unclear=0.1),
    "covered": Kind(25, (_covered,), {"sizes": MEDIUM, "top_k": 5000, "max_detections": 300}, _suppressed),
    "other variances": Kind(100, (_few, _faces), {"variances": (0.3, 0.05)}, _suppressed, 0.2),
    "cut": Kind(60, (_every, _tied, _quantised), {**ONE_SIZE, "top_k": 100}, _cut, 0.8),
    "spilled": Kind(32, (_every, _covered), {**ONE_SIZE, "top_k": 700, "capacity": 128}, _spilled),
    "over 1024": Kind(
        6, (_every, _covered), {**ONE_SIZE, "top_k": 5000, "capacity": 4096, "max_detections": 300}, _more_than_threads
    ),
    "few wanted": Kind(40, (_every,), {**ONE_SIZE, "max_detections": 33, "iou_threshold": 0.7}, _full, 0.4),
    "crowd": Kind(
        2,
        (_crowd,),
        {
            "sizes": ((640, 640),),
            "anchors": ANCHORS[:1],
            "batch": 1,
            "top_k": 5000,
            "max_detections": 750,
            "iou_threshold": 0.4,
        },
        _suppressed,
        unclear=0.5,
    ),
}
LARGE: dict[str, tuple[Callable[[Slot], None], dict[str, Any]]] = {
    "the best 5000": (_every, {"top_k": 5000, "max_detections": 750}),
    "all enter": (_every, {"top_k": 1_000_000, "max_detections": 100, "iou_threshold": 0.4}),
    "tied": (_tied, {"top_k": 4097, "max_detections": 100}),
}


def _same(actual: Outputs, expected: Outputs, what: object) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, (what, name)
        assert actual[name].shape == expected[name].shape, (what, name)
        assert actual[name].tobytes() == expected[name].tobytes(), (what, name)


def _like_facespec(case: Case, image: int, out: Outputs) -> None:
    """Compare one image of the outputs with facespec.boxes: the same faces in the same order."""
    logits, boxes, landmarks = split_heads(case.heads, image, case.spec.anchors.per_cell)
    priors = make_priors(case.spec.anchors, case.size_hw)
    expected = fb.decode_detections(boxes, logits, landmarks, priors, case.spec.decode)
    count = len(expected.scores)
    assert out["num_candidates"][image] == expected.num_candidates
    assert out["num_detections"][image] == count
    assert (np.abs(out["scores"][image, :count] - expected.scores) <= 1e-6).all()
    np.testing.assert_allclose(out["landmarks"][image, :count], expected.landmarks, atol=1e-3, rtol=1e-6)
    found = out["boxes"][image, :count]
    finite = np.isfinite(expected.boxes)
    np.testing.assert_array_equal(found[~finite], expected.boxes[~finite])
    # one corner is the other plus the size, so the greatest coordinate bounds the error of all four
    scale = np.where(finite, np.abs(expected.boxes), 0).max(axis=1, keepdims=True, initial=0)
    tolerance = np.broadcast_to(np.where(scale > 1000, 1e-5 * scale, 1e-3), found.shape)
    assert (np.abs(found[finite] - expected.boxes[finite]) <= tolerance[finite]).all()


def _check(case: Case, what: object, orders: Iterator[tuple[str, int]]) -> tuple[Outputs, int]:
    """Compare every order of a case with the slow version, and with facespec.boxes where rounding decides nothing.

    Return the outputs and in how many images of the batch it did not.
    """
    images = [
        decode_image(case.heads, image, case.size_hw, case.spec.anchors, case.spec.decode)
        for image in range(len(case.heads[0]))
    ]
    expected = {name: np.stack([image.outputs[name] for image in images]) for name in case.spec.decode.outputs}
    for order, seed in orders:
        actual = decode_nms(case.heads, case.size_hw, case.spec, order=order, seed=seed, shared_capacity=case.capacity)
        _same(actual, expected, (what, order, seed))
    for index, image in enumerate(images):
        if image.clear:
            _like_facespec(case, index, expected)
    return expected, sum(not image.clear for image in images)


def _orders(index: int) -> Iterator[tuple[str, int]]:
    yield from (("forward", 0), ("reverse", 0), ("shuffled", index), ("shuffled", index + 1000))
    if index % 8 == 0:
        yield ("threads", 0)


def test_the_cases_are_at_least_2000() -> None:
    assert sum(kind.count for kind in KINDS.values()) + len(LARGE) >= 2000


@pytest.mark.parametrize("name", KINDS)
def test_every_order_equals_the_slow_version(name: str) -> None:
    kind = KINDS[name]
    images = unclear = so = 0
    for index in range(kind.count):
        case = make_case(name, index, kind.contents, **kind.options)
        out, unclear_here = _check(case, (name, index), _orders(index))
        images += len(case.heads[0])
        unclear += unclear_here
        so += kind.is_so(case, out)
    assert so >= kind.share * kind.count
    assert unclear <= max(1, kind.unclear * images)  # the rest was compared with facespec.boxes


@pytest.mark.parametrize("name", LARGE)
def test_85200_priors(name: str) -> None:
    contents, options = LARGE[name]
    case = make_case(name, 0, (contents,), sizes=((1080, 1920),), anchors=ANCHORS[:1], batch=1, **options)
    assert case.priors == 85_200
    out, _ = _check(case, name, iter((("forward", 0), ("reverse", 0), ("shuffled", 0))))
    assert _spilled(dataclasses.replace(case, capacity=4096), out)
    if contents is _every:
        assert out["num_candidates"] == 85_200


def test_more_priors_than_slices_of_the_usual_size() -> None:
    """Over 1024 slices of 128 priors: each takes twice as many."""
    sizes = ((1536, 2560),)
    options: dict[str, Any] = {"sizes": sizes, "anchors": ANCHORS[:1], "batch": 2, "top_k": 500, "max_detections": 100}
    case = make_case("many slices", 0, (_hundreds, _few), **options)
    assert case.priors == 161_280 > 1024 * 128
    _check(case, "many slices", iter((("forward", 0), ("reverse", 0))))


@pytest.mark.parametrize("size_hw", [(64, 96), (160, 224), (320, 320), (640, 640), (640, 608)])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_the_first_and_the_last_value_of_every_map_is_looked_at(kind: type, size_hw: tuple[int, int]) -> None:
    """However the values divide among the slices; also on both sides of where a slice may end."""
    spec = ModelSpec(decode=DecodeSpec(max_detections=1))
    heads = [np.zeros((2, 32, *grid), kind) for grid in spec.anchors.grids_hw(size_hw)]
    for head in heads:
        head[:, :4:2] = 9  # background
    assert decode_nms(heads, size_hw, spec)["num_candidates"].tolist() == [0, 0]
    for head in heads:
        size = head[0].size
        for image in (0, 1):
            flat = head[image].reshape(-1)
            for place in {0, size - 1, size // 2, size // 3, size - 17, size - 2000 if size > 2000 else 0}:
                kept, flat[place] = flat[place], np.nan
                found = decode_nms(heads, size_hw, spec)["num_candidates"].tolist()
                flat[place] = kept
                assert found == [-1 if image == 0 else 0, -1 if image == 1 else 0], (head.shape, image, place)


def test_where_the_channels_lie() -> None:
    """One face in the second prior of one cell of the middle level; every number by hand."""
    heads = [np.zeros((1, 32, rows, columns), np.float32) for rows, columns in ((8, 12), (4, 6), (2, 3))]
    row, column = 2, 3
    cell = heads[1][0, :, row, column]  # a view
    cell[2] = -1  # background of the second prior
    cell[3] = math.log(9) - 1
    cell[4 + 4 : 4 + 8] = 1, -2, 5 * math.log(2), 0
    cell[12 + 10 : 12 + 20] = range(10)
    spec = ModelSpec(decode=DecodeSpec(score_threshold=0.8, max_detections=3))
    out = decode_nms(heads, (64, 96), spec)
    cx, cy, side = (column + 0.5) * 16, (row + 0.5) * 16, 128
    assert out["num_detections"] == out["num_candidates"] == 1
    np.testing.assert_allclose(out["scores"], [[0.9, 0, 0]], rtol=1e-6)
    box = [cx + 0.1 * side - side, cy - 0.2 * side - side / 2, cx + 0.1 * side + side, cy - 0.2 * side + side / 2]
    np.testing.assert_allclose(out["boxes"], [[box, [0] * 4, [0] * 4]], rtol=1e-5)
    points = np.array([cx, cy]) + 0.1 * side * np.arange(10).reshape(5, 2)
    np.testing.assert_allclose(out["landmarks"][0, 0], points, rtol=1e-6)
    assert not out["landmarks"][0, 1:].any()


@pytest.mark.parametrize("order", kernels.ORDERS)
def test_every_output_value_is_written(order: str) -> None:
    """The outputs hold rubbish before the call, and the zero rows are zero after it."""
    case = make_case("rubbish", 0, (_none, _one, _broken, _hundreds), **ONE_SIZE, batch=4, max_detections=1000)
    heads = [np.ascontiguousarray(head) for head in case.heads]
    images = [decode_image(heads, image, case.size_hw, case.spec.anchors, case.spec.decode) for image in range(4)]
    expected = {name: np.stack([image.outputs[name] for image in images]) for name in case.spec.decode.outputs}
    actual = {name: np.full_like(array.view(np.int32), -7).view(array.dtype) for name, array in expected.items()}
    kernels.library().retinaface_host_decode_nms(
        ctypes.byref(kernels.make_params(4, case.size_hw, case.spec)),
        kernels.HEAD_TYPES[heads[0].dtype],
        (ctypes.c_void_p * len(heads))(*(head.ctypes.data for head in heads)),
        ctypes.byref(kernels.Outputs(*(array.ctypes.data for array in actual.values()))),
        64,
        ctypes.byref(kernels.Schedule(kernels.ORDERS.index(order), 8, 4, 0, 0)),
    )
    _same(actual, expected, order)


@pytest.mark.parametrize("order", kernels.ORDERS)
def test_the_same_call_gives_the_same_bits(order: str) -> None:
    case = make_case("again", 3, (_quantised,), **ONE_SIZE, batch=2, top_k=500, max_detections=300)
    first, *others = (
        decode_nms(case.heads, case.size_hw, case.spec, order=order, seed=seed, shared_capacity=64) for seed in range(4)
    )
    for other in others:
        _same(other, first, order)


@pytest.mark.parametrize("threads", [(1, 1), (2, 2), (6, 2), (32, 32)])
def test_the_number_of_threads_does_not_matter(threads: tuple[int, int]) -> None:
    case = make_case("threads", 0, (_every,), **ONE_SIZE, batch=1, top_k=300, max_detections=100)
    heads = [np.ascontiguousarray(head) for head in case.heads]
    expected = decode_nms(heads, case.size_hw, case.spec)
    actual = {name: np.empty_like(array) for name, array in expected.items()}
    kernels.library().retinaface_host_decode_nms(
        ctypes.byref(kernels.make_params(1, case.size_hw, case.spec)),
        kernels.HEAD_TYPES[heads[0].dtype],
        (ctypes.c_void_p * len(heads))(*(head.ctypes.data for head in heads)),
        ctypes.byref(kernels.Outputs(*(array.ctypes.data for array in actual.values()))),
        64,
        ctypes.byref(kernels.Schedule(kernels.ORDERS.index("threads"), *threads, 0, 0)),
    )
    _same(actual, expected, threads)


def test_any_layout_in_memory_gives_the_same_bits() -> None:
    case = make_case("layout", 1, (_faces,), **ONE_SIZE, batch=2, top_k=100, max_detections=31)
    planar = [np.ascontiguousarray(head) for head in case.heads]
    last = [np.ascontiguousarray(head.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for head in planar]
    strided = [np.repeat(head, 2, axis=3)[..., ::2] for head in planar]
    before = [head.copy() for head in planar]
    expected = decode_nms(planar, case.size_hw, case.spec)
    assert expected["num_detections"].all()
    for heads in (last, strided, [planar[0], *last[1:]], [strided[0], last[1], planar[2]]):
        _same(decode_nms(heads, case.size_hw, case.spec), expected, "layout")
    for head, copy in zip(planar, before, strict=True):
        assert head.tobytes() == copy.tobytes()


@pytest.mark.parametrize("contents", [_faces, _hundreds, _quantised, _every])
@pytest.mark.parametrize("top_k", [50, 5000])
def test_a_higher_threshold_gives_a_prefix(contents: Callable[[Slot], None], top_k: int) -> None:
    shorter = 0
    for index in range(10):
        options = {**ONE_SIZE, "score_threshold": 0.1, "iou_threshold": 0.3, "top_k": top_k, "max_detections": 40}
        case = make_case("prefix", index, (contents,), **options)
        low = decode_nms(case.heads, case.size_hw, case.spec)
        for threshold in (0.3, 0.77, 0.99):
            decode = dataclasses.replace(case.spec.decode, score_threshold=threshold)
            high = decode_nms(case.heads, case.size_hw, dataclasses.replace(case.spec, decode=decode))
            for image, count in enumerate(high["num_detections"]):
                for name in ("boxes", "scores", "landmarks"):
                    assert high[name][image, :count].tobytes() == low[name][image, :count].tobytes()
                assert (low["scores"][image, :count] >= threshold - 1e-6).all()
                assert (low["scores"][image, count:] <= threshold + 1e-6).all()
                shorter += bool(0 < count < low["num_detections"][image])
    assert shorter >= 5


def test_candidates_are_counted_before_any_limit() -> None:
    for index in range(20):
        case = make_case("counted", index, (_hundreds,), **ONE_SIZE, top_k=7, max_detections=3)
        out = decode_nms(case.heads, case.size_hw, case.spec)
        logit = np.float32(math.log(case.spec.decode.score_threshold / (1 - case.spec.decode.score_threshold)))
        over = (_differences(case) >= logit).sum(axis=1)
        np.testing.assert_array_equal(out["num_candidates"], over)
        assert (over > 7).all()
        assert ((out["num_detections"] >= 1) & (out["num_detections"] <= 3)).all()


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_any_value_that_is_not_finite_is_seen(kind: type, value: float) -> None:
    """Every channel of every level, in planar and in channels-last order; the other image stays as it is."""
    anchors = AnchorSpec((8, 16), ((16,), (64,)))
    spec = ModelSpec(anchors=anchors, decode=DecodeSpec(max_detections=2))
    for last in (False, True):
        for level, (rows, columns) in enumerate(anchors.grids_hw((24, 40))):
            for channel in range(16):
                heads = [np.zeros((2, 16, *grid), kind) for grid in anchors.grids_hw((24, 40))]
                heads[level][1, channel, rows - 1, (channel * 7) % columns] = value
                if last:
                    heads = [np.ascontiguousarray(head.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for head in heads]
                out = decode_nms(heads, (24, 40), spec)
                assert out["num_candidates"].tolist() == [anchors.count((24, 40)), -1]
                assert out["num_detections"].tolist() == [2, 0]
                assert not out["boxes"][1].any()


def test_an_empty_batch_has_empty_outputs() -> None:
    spec = ModelSpec()
    heads = [np.zeros((0, 32, *grid), np.float32) for grid in spec.anchors.grids_hw((64, 96))]
    out = decode_nms(heads, (64, 96), spec)
    assert {name: array.shape for name, array in out.items()} == {
        "num_detections": (0,),
        "boxes": (0, 750, 4),
        "scores": (0, 750),
        "landmarks": (0, 750, 5, 2),
        "num_candidates": (0,),
    }


def _zeros(batch: int = 1, kind: Any = np.float32) -> list[NDArray[Any]]:
    return [np.zeros((batch, 32, *grid), kind) for grid in AnchorSpec().grids_hw((64, 96))]


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ([], {}, "heads of shapes"),
        (_zeros()[:2], {}, "heads of shapes"),
        (_zeros()[::-1], {}, "heads of shapes"),
        ([*_zeros()[:2], _zeros(2)[2]], {}, "heads of shapes"),
        ([head[:, :31] for head in _zeros()], {}, "heads of shapes"),
        ([head[0] for head in _zeros()], {}, "heads of shapes"),
        (_zeros(kind=np.float64), {}, "all be float32 or all float16"),
        (_zeros(kind=">f4"), {}, "all be float32 or all float16"),
        (_zeros(kind=np.int32), {}, "all be float32 or all float16"),
        ([*_zeros()[:2], _zeros(kind=np.float16)[2]], {}, "all be float32 or all float16"),
        (_zeros(), {"order": "backward"}, "order must be one of"),
        (_zeros(), {"shared_capacity": 32}, "power of two from 64 to 4096, not 32"),
        (_zeros(), {"shared_capacity": 96}, "power of two from 64 to 4096, not 96"),
        (_zeros(), {"shared_capacity": 8192}, "power of two from 64 to 4096, not 8192"),
        (_zeros(), {"shared_capacity": 0}, "power of two from 64 to 4096, not 0"),
        (_zeros(), {"shared_capacity": -64}, "power of two from 64 to 4096, not -64"),
    ],
)
def test_what_cannot_be_decoded_is_refused(heads: list[NDArray[Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_nms(heads, (64, 96), ModelSpec(), **options)


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        (AnchorSpec((4, 8, 16, 32, 64), ((8,), (16,), (32,), (64,), (128,))), "not 5 and 1"),
        (AnchorSpec((8,), ((8, 9, 10, 11, 12),)), "not 1 and 5"),
    ],
)
def test_more_than_the_kernels_are_made_for_is_refused(anchors: AnchorSpec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        kernels.make_params(1, (64, 64), ModelSpec(anchors=anchors))
    heads = [np.zeros((1, 16 * anchors.per_cell, *grid), np.float32) for grid in anchors.grids_hw((64, 64))]
    with pytest.raises(SpecError, match=message):
        decode_nms(heads, (64, 64), ModelSpec(anchors=anchors))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch", 0, "batch"),
        ("batch", 65536, "batch"),
        ("levels", 0, "1 to 4 levels"),
        ("levels", 5, "1 to 4 levels"),
        ("per_cell", 0, "1 to 4 priors"),
        ("per_cell", 5, "1 to 4 priors"),
        ("strides", (0, 16, 32), "strides"),
        ("strides", (8, 16, 1025), "strides"),
        ("grid_h", (8, 4, 0), "rows and columns"),
        ("grid_w", (12, 65537, 3), "rows and columns"),
        ("grid_w", (65536, 65536, 65536), None),
        ("grid_h", (2048, 4, 2), None),
        ("batch", 65535, None),
        ("batch", -1, "batch"),
        ("strides", (1, 16, 1024), None),
        ("grid_h", (0, 4, 2), "rows and columns"),
        ("grid_h", (65537, 4, 2), "rows and columns"),
        ("grid_w", (12, 0, 3), "rows and columns"),
        ("top_k", 1_000_000, None),
        ("top_k", 1, None),
        ("max_detections", 1_000_000, None),
        ("max_detections", 1, None),
        ("logit_threshold", -1e30, "logit_threshold"),
        ("logit_threshold", -9e29, None),
        ("logit_threshold", -math.inf, "logit_threshold"),
        ("variances", (0.1, 0.0), "variances"),
        ("variances", (0.0, 0.2), "variances"),
        ("variances", (0.1, math.inf), "variances"),
        ("variances", (0.1, math.nan), "variances"),
        ("variances", (math.nan, 0.2), "variances"),
        ("logit_threshold", math.inf, "logit_threshold"),
        ("logit_threshold", math.nan, "logit_threshold"),
        ("iou_threshold", 0.0, "iou_threshold"),
        ("iou_threshold", 1.0, "iou_threshold"),
        ("iou_threshold", math.nan, "iou_threshold"),
        ("top_k", 0, "top_k"),
        ("top_k", 1_000_001, "top_k"),
        ("max_detections", 0, "max_detections"),
        ("max_detections", 1_000_001, "max_detections"),
    ],
)
def test_impossible_parameters_are_named(field: str, value: Any, message: str | None) -> None:
    params = kernels.make_params(1, (64, 96), ModelSpec())
    assert kernels.library().retinaface_host_check(ctypes.byref(params)) is None
    setattr(params, field, value)
    problem = kernels.library().retinaface_host_check(ctypes.byref(params))
    assert problem is None if message is None else message in problem.decode()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_every_size_of_a_prior_must_be_positive(value: float) -> None:
    params = kernels.make_params(1, (64, 96), ModelSpec())
    for level in range(4):
        for member in range(4):
            kept, params.min_sizes[level][member] = params.min_sizes[level][member], value
            problem = kernels.library().retinaface_host_check(ctypes.byref(params))
            params.min_sizes[level][member] = kept
            used = level < 3 and member < 2
            assert problem == (b"min_sizes must be positive" if used else None)


def test_the_limits_are_those_of_the_header() -> None:
    """trt_runtime/kernels.py mirrors two headers; ctypes would not notice a difference."""
    root = Path(__file__).parents[2] / "plugins"
    text = "".join((root / name).read_text() for name in ("include/decode_nms.h", "src/geometry.h", "src/host_api.cpp"))
    for name, value in (("kMaxLevels", kernels.MAX_LEVELS), ("kMaxPerCell", kernels.MAX_PER_CELL)):
        assert f"{name} = {value};" in text
    assert f"kSharedKeys = {kernels.SHARED_KEYS};" in text
    assert "kFloat = 0, kHalf = 1" in text
    assert kernels.HEAD_TYPES == {np.dtype(np.float32): 0, np.dtype(np.float16): 1}
    assert "kForward, kReverse, kShuffled, kThreads" in text
    assert kernels.ORDERS == ("forward", "reverse", "shuffled", "threads")
    assert list(dict(kernels.Outputs._fields_)) == list(DecodeSpec().outputs)
    for struct in (kernels.DecodeParams, kernels.Outputs, kernels.Schedule):
        body = text.split(f"struct {struct.__name__} {{")[1].split("};")[0]
        names = re.findall(r"\b(?:\w+_t\*?|float\*?) (\w+)[\[;]", body)
        assert names == [name for name, _ in struct._fields_]


def test_parameters_are_those_of_the_spec() -> None:
    decode = DecodeSpec((0.25, 0.5), 0.9, 0.75, 123, 45)
    params = kernels.make_params(
        7, (100, 260), ModelSpec(anchors=AnchorSpec((8, 32), ((4, 5, 6), (7, 8, 9))), decode=decode)
    )
    assert (params.batch, params.levels, params.per_cell, params.channels_last) == (7, 2, 3, 0)
    assert [list(params.strides), list(params.grid_h), list(params.grid_w)] == [
        [8, 32, 0, 0],
        [13, 4, 0, 0],
        [33, 9, 0, 0],
    ]
    assert [list(sizes) for sizes in params.min_sizes] == [[4, 5, 6, 0], [7, 8, 9, 0], [0] * 4, [0] * 4]
    assert list(params.variances) == [0.25, 0.5]
    assert params.logit_threshold == pytest.approx(math.log(9), rel=1e-6)
    assert (params.iou_threshold, params.top_k, params.max_detections) == (0.75, 123, 45)


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.so").write_text("text")
    monkeypatch.setattr(kernels, "ensure_library", lambda target: tmp_path / {"host": "broken.so"}[target])
    with pytest.raises(BuildError, match=r"broken\.so cannot be loaded .*: python -m plugins\.build host"):
        kernels.library.__wrapped__()


def _packed(batch: int, size_hw: tuple[int, int], spec: ModelSpec) -> int:
    """Return the bytes of device memory: keys, counts, boxes, kept, sorted keys and bits, each on 16 bytes."""
    priors = spec.anchors.count(size_hw)
    slice_priors = 128
    while slice_priors * 1024 < priors:
        slice_priors *= 2
    slices = -(-priors // slice_priors)
    capacity = max(64, 1 << (min(priors, spec.decode.top_k) - 1).bit_length())
    parts = (8 * slices * slice_priors, 4 * slices, 16 * capacity, 4 * capacity, 8 * capacity, capacity // 8)
    return batch * sum(-(-part // 16) * 16 for part in parts)


def test_the_device_library_needs_the_memory_that_it_fills(device_library: Path) -> None:
    """And refuses, before a GPU is asked, what a kernel could not take."""
    library = ctypes.CDLL(str(device_library))
    library.retinaface_workspace_bytes.restype = ctypes.c_size_t
    library.retinaface_check.restype = ctypes.c_char_p
    for size_hw in ((1, 1), (64, 96), (320, 320), (640, 640), (1088, 1920), (1536, 2560)):
        for batch, top_k in ((1, 1), (3, 64), (1, 65), (8, 5000), (2, 1_000_000)):
            spec = ModelSpec(decode=DecodeSpec(top_k=top_k))
            params = kernels.make_params(batch, size_hw, spec)
            assert library.retinaface_workspace_bytes(ctypes.byref(params)) == _packed(batch, size_hw, spec)
            assert library.retinaface_check(ctypes.byref(params)) is None
    params = kernels.make_params(2, (64, 96), ModelSpec())
    base = 1 << 20

    def launch(kind: int = 0, **moved: int) -> int:
        heads = [base + moved.get(f"head{level}", 0) for level in range(3)]
        outputs = [base + moved.get(name, 0) for name in DecodeSpec().outputs]
        return library.retinaface_launch(
            ctypes.byref(params),
            kind,
            (ctypes.c_void_p * 3)(*heads),
            ctypes.byref(kernels.Outputs(*outputs)),
            ctypes.c_void_p(base + moved.get("workspace", 0)),
            None,
        )

    invalid, misaligned = 1, 716
    for name in ("workspace", "boxes", "head0", "head1", "head2"):
        assert launch(**{name: -base}) == invalid, name
        assert launch(**{name: 8}) == misaligned, name
    for name in ("scores", "landmarks", "num_detections", "num_candidates"):
        assert launch(**{name: -base}) == invalid, name
        assert launch(**{name: 2}) == misaligned, name
        if gpu_capability() is None:
            assert launch(**{name: 4}) not in (0, invalid, misaligned), name
    assert launch(2) == launch(-1) == invalid
    if gpu_capability() is None:
        assert {launch(0), launch(1)}.isdisjoint({0, invalid, misaligned})
    params.top_k = 0
    assert launch() == invalid
    assert library.retinaface_check(ctypes.byref(params)) == b"top_k must be in 1..1000000"


def test_too_many_priors_are_refused() -> None:
    params = kernels.make_params(1, (64, 96), ModelSpec())
    params.grid_h[0], params.grid_w[0] = 65536, 512
    assert b"67,108,864 priors" in kernels.library().retinaface_host_check(ctypes.byref(params))
    params.levels = 1  # 2 * 65536 * 512 are exactly as many as allowed
    assert kernels.library().retinaface_host_check(ctypes.byref(params)) is None


def _ulps(name: str, exact: Callable[[NDArray[np.float64]], NDArray[np.float64]], x: Array) -> float:
    """Return the greatest error of an elementary function in units of the last place of the exact result."""
    expected = exact(x.astype(np.float64))
    with np.errstate(under="ignore"):
        unit = np.spacing(expected.astype(np.float32)).astype(np.float64)
    return float((np.abs(elementary(name, x) - expected) / unit).max())


def _all_floats(low: float, high: float, step: int) -> Array:
    """Return every `step`-th of the floats from low to high, which have the same sign."""
    first, last = sorted(np.array([low, high], np.float32).view(np.uint32).tolist())
    return np.arange(first, last + 1, step, dtype=np.uint32).view(np.float32)


def test_exp_is_exact_to_the_last_place() -> None:
    for low, high in ((1e-45, 1e-3), (-0.0, -1e-3)):
        assert _ulps("exp", np.exp, _all_floats(low, high, 4099)) < 0.51
    for low, high in ((1e-3, 88.72), (-1e-3, -87)):
        assert _ulps("exp", np.exp, _all_floats(low, high, 97)) < 1.1
    assert _ulps("exp", np.exp, _all_floats(-87, -104.5, 1)) < 1.1  # down to 0 through the subnormal ones
    around = [(np.arange(-300, 256) * (math.log(2) / 2)).astype(np.float32)]  # where the power of two changes
    for _ in range(20):
        around.append(np.nextafter(around[-1], np.float32(np.inf)))
    assert _ulps("exp", np.exp, np.concatenate(around)) < 1.1


def test_exp_at_its_ends() -> None:
    limit = np.float32(math.log(np.finfo(np.float32).max))  # rounded up: its exp is not a float any more
    below = np.nextafter(limit, np.float32(0))
    x = np.array([0.0, -0.0, np.inf, -np.inf, 3e38, -3e38, limit, -104.1, -103.9], np.float32)
    assert elementary("exp", x).tolist() == [1, 1, np.inf, 0, np.inf, 0, np.inf, 0, 2**-149]
    assert np.isfinite(elementary("exp", below[None])[0])
    assert elementary("exp", np.array([below]))[0] > 3.4e38


@pytest.mark.parametrize("name", ["exp", "sigmoid"])
def test_never_falls(name: str) -> None:
    """Neighbouring floats, a quarter of a million at each of a hundred places, and steps over all of them."""
    rng = np.random.default_rng(5)
    for low, high in ((1e-6, 88.7), (-1e-6, -104.0)):
        first, last = sorted(np.array([low, high], np.float32).view(np.uint32).tolist())
        windows = [np.arange(at, at + 250_000) for at in rng.integers(first, last - 250_000, 50)]
        for bits in (*windows, np.arange(first, last, 211)):
            x = np.sort(bits.astype(np.uint32).view(np.float32))
            assert (np.diff(elementary(name, x)) >= 0).all(), x[0]


def test_sigmoid() -> None:
    def exact(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))

    for low, high in ((1e-30, 100.0), (-1e-30, -87.0)):
        assert _ulps("sigmoid", exact, _all_floats(low, high, 499)) < 2.5
    ends = np.array([0.0, -0.0, np.inf, -np.inf, 3e38, -3e38], np.float32)
    assert elementary("sigmoid", ends).tolist() == [0.5, 0.5, 1, 0, 1, 0]


def test_every_half_becomes_the_float_it_is() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    actual = elementary("half_to_float", bits, np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    assert (actual[~nan].view(np.uint32) == expected[~nan].view(np.uint32)).all()
    assert np.isnan(actual[nan]).all()


def test_too_little_memory_is_an_exception() -> None:
    """In a process of its own: nothing of C++ may reach the interpreter."""
    code = """
import resource
import numpy as np
from facespec.spec import ModelSpec
from trt_runtime import kernels

spec, size = ModelSpec(), (2048, 3072)
heads = [np.zeros((8, 32, *grid), np.float16) for grid in spec.anchors.grids_hw(size)]
kernels.library()
outputs = kernels.decode_nms([head[:1] for head in heads], size, spec)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20),) * 2)
try:
    kernels.decode_nms(heads, size, spec)
except MemoryError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "no memory to decode 8 images of 3072x2048" in result.stdout, result.stdout + result.stderr
