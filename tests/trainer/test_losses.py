from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import facespec.boxes as reference
from benchmarks.loss import OriginalLoss, random_faces, random_heads
from facespec.boxes import make_priors
from facespec.errors import SpecError
from facespec.spec import ModelSpec
from trainer.data.batches import Targets, collate
from trainer.data.dataset import Faces
from trainer.losses import LossSettings, MultiBoxLoss, encode_boxes, encode_landmarks, hardest_negatives

SPEC = ModelSpec()
SIZE = (128, 160)
CUSTOMARY = LossSettings(extra_negatives=0)
Heads = tuple[Tensor, Tensor, Tensor]


def targets_of(*images: Faces) -> Targets:
    return collate([(np.zeros((1, 1, 3), np.uint8), faces) for faces in images])[1]


def plain_faces(seed: int, count: int, size_hw: tuple[int, int]) -> Faces:
    """Faces on which implementations agree: each has a good best prior of its own, and no two IoUs are equal."""
    faces = random_faces(np.random.default_rng(seed), count, size_hw)
    iou = reference.iou_matrix(faces.boxes, reference.cxcywh_to_xyxy(make_priors(SPEC.anchors, size_hw)))
    best = iou.max(axis=1)
    once = np.array([(np.abs(iou[row] - best[row]) < 1e-4).sum() == 1 for row in range(count)])
    faces, iou = faces[(best >= 0.21) & once], iou[(best >= 0.21) & once]
    kept: dict[int, int] = {}
    for row, prior in enumerate(iou.argmax(axis=1)):
        kept.setdefault(prior, row)
    return faces[sorted(kept.values())]


def published_loss(heads: Heads, images: list[Faces], size_hw: tuple[int, int], extra: int) -> tuple[Tensor, ...]:
    """Classification, box and landmark loss as the papers have them: in float64, one prior after the other."""
    priors = make_priors(SPEC.anchors, size_hw)
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
    positives = with_landmarks = 0
    for image, faces in enumerate(images):
        boxes, logits, landmarks = (head[image].double() for head in heads)
        iou = reference.iou_matrix(faces.boxes, reference.cxcywh_to_xyxy(priors))
        face_of = {p: int(iou[:, p].argmax()) for p in range(len(priors)) if len(faces) and iou[:, p].max() >= 0.35}
        face_of |= {int(iou[face].argmax()): face for face in range(len(faces))}
        for prior, face in face_of.items():
            cx, cy, side, _ = (float(value) for value in priors[prior])
            x1, y1, x2, y2 = (float(value) for value in faces.boxes[face])
            wanted = [((x1 + x2) / 2 - cx) / side / 0.1, ((y1 + y2) / 2 - cy) / side / 0.1]
            wanted += [np.log((x2 - x1) / side) / 0.2, np.log((y2 - y1) / side) / 0.2]
            sums[1] = sums[1] + smooth_l1(boxes[prior], wanted)
            if faces.has_landmarks[face]:
                points = [((x - cx) / side / 0.1, (y - cy) / side / 0.1) for x, y in faces.landmarks[face].tolist()]
                sums[2] = sums[2] + smooth_l1(landmarks[prior], [value for point in points for value in point])
                with_landmarks += 1
        losses = logits.logsumexp(dim=1)[:, None] - logits  # of calling a prior background, or a face
        background = sorted(
            (losses[p, 0] for p in range(len(priors)) if p not in face_of), key=lambda loss: loss.item(), reverse=True
        )
        chosen = [losses[p, 1] for p in face_of] + background[: 7 * len(face_of) + extra]
        sums[0] = sums[0] + sum(chosen, torch.zeros((), dtype=torch.float64))
        positives += len(face_of)
    return sums[0] / max(positives, 1), sums[1] / max(positives, 1), sums[2] / max(with_landmarks, 1)


def smooth_l1(found: Tensor, wanted: list[float]) -> Tensor:
    error = (found - torch.tensor(wanted, dtype=torch.float64)).abs()
    return torch.where(error < 1, error**2 / 2, error - 0.5).sum()


def heads_for(batch: int, size_hw: tuple[int, int] = SIZE, seed: int = 0) -> Heads:
    return random_heads(seed, batch, SPEC.anchors.count(size_hw))


@pytest.mark.parametrize("extra", [0, 200])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradients_equal_the_published_ones(seed: int, extra: int) -> None:
    images = [plain_faces(seed, count, SIZE) for count in (5, 20)] + [Faces.none()]
    heads = heads_for(3, seed=seed)
    found = MultiBoxLoss(SPEC, replace(CUSTOMARY, extra_negatives=extra))(heads, targets_of(*images), SIZE)
    expected = published_loss(heads, images, SIZE, extra)
    for one, other in zip((found.classification, found.box, found.landmark), expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)
    total = expected[0] + 2 * expected[1] + expected[2]
    for one, other in zip(torch.autograd.grad(found.total, heads), torch.autograd.grad(total, heads), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size_hw", [(512, 512), (640, 640), (320, 448)])
@pytest.mark.parametrize("count", [1, 10, 40])
def test_loss_equals_the_original_implementation(count: int, size_hw: tuple[int, int]) -> None:
    checkout = os.environ.get("RETINAFACE_ORIGINAL")
    if not checkout:
        pytest.skip("no checkout of biubug6/Pytorch_Retinaface is named (RETINAFACE_ORIGINAL)")
    targets = targets_of(*(plain_faces(seed, count, size_hw) for seed in range(3)))
    heads = heads_for(3, size_hw, seed=count)
    found = MultiBoxLoss(SPEC, CUSTOMARY)(heads, targets, size_hw)
    original = OriginalLoss(Path(checkout), size_hw)
    expected = original(heads, original.rows(targets))
    for one, other in zip((found.classification, found.box, found.landmark), expected, strict=True):
        assert abs(one.item() / other.item() - 1) < 1e-5
    total = expected[0] + 2 * expected[1] + expected[2]
    for one, other in zip(torch.autograd.grad(found.total, heads), torch.autograd.grad(total, heads), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_targets_are_encoded_as_by_the_reference() -> None:
    faces = random_faces(np.random.default_rng(0), 500, (640, 640))
    priors = np.random.default_rng(1).permutation(make_priors(SPEC.anchors, (640, 640)))[:500]
    variances = SPEC.decode.variances
    boxes = encode_boxes(torch.from_numpy(faces.boxes), torch.from_numpy(priors), variances)
    np.testing.assert_allclose(boxes, reference.encode_boxes(faces.boxes, priors, variances), rtol=1e-5, atol=1e-4)
    points = encode_landmarks(torch.from_numpy(faces.landmarks), torch.from_numpy(priors), variances)
    np.testing.assert_allclose(
        points, reference.encode_landmarks(faces.landmarks, priors, variances), rtol=1e-5, atol=1e-4
    )


def test_perfect_heads_have_no_loss() -> None:
    """Unlike the tests against other implementations, this one knows nothing of how the loss is built."""
    faces = plain_faces(0, 10, SIZE)
    priors = make_priors(SPEC.anchors, SIZE)
    iou = reference.iou_matrix(faces.boxes, reference.cxcywh_to_xyxy(priors))
    face = iou.argmax(axis=0)
    face[iou.argmax(axis=1)] = np.arange(len(faces))
    variances = SPEC.decode.variances
    positive = iou.max(axis=0) >= 0.35
    positive[iou.argmax(axis=1)] = True
    logits = np.where(positive[:, None], [-50, 50], [50, -50])
    boxes = reference.encode_boxes(faces.boxes[face], priors, variances)
    landmarks = reference.encode_landmarks(faces.landmarks[face], priors, variances)
    heads = tuple(torch.from_numpy(head).float()[None] for head in (boxes, logits, landmarks))
    losses = MultiBoxLoss(SPEC)(heads, targets_of(faces), SIZE)  # type: ignore[arg-type]
    assert losses.total.item() < 1e-4
    assert losses.positives == positive.sum()
    assert losses.landmark_positives == (positive & faces.has_landmarks[face]).sum()


def test_images_without_faces_leave_no_stale_targets() -> None:
    """Trap 2: the usual early return leaves the landmark targets as they were allocated."""
    faces = plain_faces(1, 10, SIZE)
    tiny = Faces(np.array([[9, 9, 11, 11]], np.float32), np.full((1, 5, 2), 1e30, np.float32), np.ones(1, bool))
    heads = heads_for(3)
    alone = MultiBoxLoss(SPEC, CUSTOMARY)(tuple(h[1:2] for h in heads), targets_of(faces), SIZE)  # type: ignore[arg-type]
    among = MultiBoxLoss(SPEC, CUSTOMARY)(heads, targets_of(tiny, faces, Faces.none()), SIZE)
    for one, other in zip(alone, among, strict=True):
        assert torch.equal(one, other)


def test_boxes_without_area_are_dropped_and_counted() -> None:
    """Trap 3: the usual loss takes the logarithm of 0."""
    faces = plain_faces(1, 10, SIZE)
    spoilt = Faces(
        np.concatenate([faces.boxes, [[40, 40, 40, 60], [np.nan, 0, 9, 9]]]).astype(np.float32),
        np.concatenate([faces.landmarks, np.zeros((2, 5, 2), np.float32)]),
        np.concatenate([faces.has_landmarks, [True, True]]),
    )
    heads = heads_for(1)
    expected = MultiBoxLoss(SPEC)(heads, targets_of(faces), SIZE)
    found = MultiBoxLoss(SPEC)(heads, targets_of(spoilt), SIZE)
    assert torch.equal(found.total, expected.total)
    assert (int(expected.dropped), int(found.dropped)) == (0, 2)


@pytest.mark.parametrize("size_hw", [SIZE, (32, 32)])
def test_images_without_faces_train_background(size_hw: tuple[int, int]) -> None:
    """Trap 4: in the usual loss they contribute nothing. 32x32 has 42 priors, fewer than the 200 asked for."""
    heads = heads_for(2, size_hw)
    losses = MultiBoxLoss(SPEC)(heads, targets_of(Faces.none(), Faces.none()), size_hw)
    boxes, logits, landmarks = torch.autograd.grad(losses.total, heads)
    assert losses.positives == 0
    assert ((logits != 0).any(dim=2).sum(dim=1) == min(200, SPEC.anchors.count(size_hw))).all()
    assert (logits[..., 1] >= 0).all()  # descent lowers the logit of a face
    assert not boxes.any()
    assert not landmarks.any()
    assert losses.total == losses.classification > 0
    customary = MultiBoxLoss(SPEC, CUSTOMARY)(heads, targets_of(Faces.none(), Faces.none()), size_hw)
    assert customary.total == 0
    assert not torch.autograd.grad(customary.total, heads)[1].any()


def test_logits_far_apart_keep_their_loss() -> None:
    """Trap 5: with the maximum of the whole batch, log-sum-exp underflows where a logit elsewhere is large."""
    boxes, logits, landmarks = (head.detach() for head in heads_for(1))
    logits = logits - 300
    logits[0, 0] = torch.tensor([500.0, -500.0])
    images = [plain_faces(2, 8, SIZE)]
    found = MultiBoxLoss(SPEC)((boxes, logits, landmarks), targets_of(*images), SIZE)
    expected = published_loss((boxes, logits, landmarks), images, SIZE, 200)
    assert float(found.classification) == pytest.approx(float(expected[0]), rel=1e-5)
    logits[0, 0] = torch.tensor([-3e4, 3e4])
    found = MultiBoxLoss(SPEC)((boxes, logits, landmarks), targets_of(*images), SIZE)
    assert (found.classification * found.positives).item() > 5.9e4


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("head", [0, 1, 2])
@pytest.mark.parametrize("row", [0, -1])
def test_a_head_value_that_is_not_finite_shows_in_the_total(head: int, row: int, value: float) -> None:
    """Trap 6: in the usual loss it makes mining random while the loss stays finite. No face is near either prior."""
    heads = heads_for(2)
    faces = plain_faces(3, 1, SIZE)
    finite = MultiBoxLoss(SPEC)(heads, targets_of(faces, Faces.none()), SIZE)
    assert finite.total.isfinite()
    with torch.no_grad():
        heads[head][1, row, -1] = value
    assert not MultiBoxLoss(SPEC)(heads, targets_of(faces, Faces.none()), SIZE).total.isfinite()


@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_mining_takes_the_hardest_and_of_equals_the_first(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    batch, priors, per_positive, extra = rng.integers(1, 4), rng.integers(1, 30), rng.integers(0, 3), rng.integers(0, 9)
    difference = rng.integers(-levels, levels, (batch, priors)).astype(np.float32)
    difference *= rng.choice(np.array([-1, 1], np.float32), difference.shape)  # -0 equals 0
    positive = rng.random((batch, priors)) < rng.choice([0.0, 0.2, 1.0])
    found = hardest_negatives(
        torch.from_numpy(difference), torch.from_numpy(positive), int(per_positive), int(extra)
    ).numpy()
    for row in range(batch):
        negatives = sorted(np.flatnonzero(~positive[row]), key=lambda p: (-difference[row, p], p))
        expected = negatives[: per_positive * positive[row].sum() + extra]
        assert np.flatnonzero(found[row]).tolist() == sorted(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_heads_are_computed_in_float32(dtype: torch.dtype) -> None:
    """Sums of thousands of terms overflow fp16 and lose their digits in bf16."""
    rounded = [(head * 100).to(dtype) for head in heads_for(2)]
    targets = targets_of(plain_faces(0, 40, SIZE), plain_faces(1, 40, SIZE))
    expected = MultiBoxLoss(SPEC)(tuple(head.float() for head in rounded), targets, SIZE)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype):
        found = MultiBoxLoss(SPEC)(tuple(rounded), targets, SIZE)  # type: ignore[arg-type]
    assert found.total.dtype == torch.float32
    assert torch.equal(found.total, expected.total)


def test_weights_and_the_pixel_term() -> None:
    heads, targets = heads_for(1), targets_of(plain_faces(0, 10, SIZE))
    weights = LossSettings(box_weight=3, landmark_weight=0.5, pixel_weight=0.25)
    losses = MultiBoxLoss(SPEC, weights)(heads, targets, SIZE, pixel=torch.tensor(8.0))
    expected = losses.classification + 3 * losses.box + 0.5 * losses.landmark + 0.25 * 8
    assert losses.total.item() == pytest.approx(expected.item())
    assert losses.pixel == 8
    assert MultiBoxLoss(SPEC, weights)(heads, targets, SIZE).pixel == 0


def test_faces_without_landmarks_train_boxes_only() -> None:
    faces = plain_faces(0, 10, SIZE)
    unknown = replace(faces, has_landmarks=np.zeros(len(faces), bool), landmarks=np.full_like(faces.landmarks, np.nan))
    heads = heads_for(1)
    losses = MultiBoxLoss(SPEC)(heads, targets_of(unknown), SIZE)
    assert (losses.landmark.item(), int(losses.landmark_positives)) == (0, 0)
    assert not torch.autograd.grad(losses.total, heads, retain_graph=True)[2].any()
    assert losses.box == MultiBoxLoss(SPEC)(heads, targets_of(faces), SIZE).box


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"box_weight": -1}, "box_weight"),
        ({"pixel_weight": float("nan")}, "pixel_weight"),
        ({"landmark_weight": "1"}, "landmark_weight"),
        ({"negatives_per_positive": 1.5}, "negatives_per_positive"),
        ({"extra_negatives": True}, "extra_negatives"),
        ({"extra_negatives": 0, "negatives_per_positive": 0}, "nothing would teach background"),
        ({"ignore_iou": 0.5}, "ignore_iou <= positive_iou"),
        ({"ignore_iou": 0}, "got 0 and 0.35"),
        ({"positive_iou": 1.0}, "positive_iou < 1"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        LossSettings(**change)
    assert "\n" not in str(caught.value)


def test_heads_of_another_size_are_refused() -> None:
    with pytest.raises(SpecError, match="heads of 1 images of 64x64"):
        MultiBoxLoss(SPEC)(heads_for(1), targets_of(Faces.none()), (64, 64))
    with pytest.raises(SpecError, match="heads of 2 images"):
        MultiBoxLoss(SPEC)(heads_for(1), targets_of(Faces.none(), Faces.none()), SIZE)


def linear_and_batch() -> tuple[nn.Module, Tensor, list[Faces]]:
    """A model, and features of three images whose numbers of faces differ."""
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    features = torch.randn(3, SPEC.anchors.count(SIZE), 16)
    return model, features, [plain_faces(0, 30, SIZE), Faces.none(), plain_faces(1, 2, SIZE)]


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.7])
def test_the_thresholds_of_the_settings_are_those_of_the_matching(iou: float) -> None:
    faces = plain_faces(0, 20, SIZE)
    overlap = reference.iou_matrix(faces.boxes, reference.cxcywh_to_xyxy(make_priors(SPEC.anchors, SIZE)))
    for ignore in (0.25, iou):
        forced = {int(row.argmax()) for row in overlap if row.max() >= np.float32(ignore)}
        near = set(np.flatnonzero(overlap.max(axis=0) >= np.float32(iou)).tolist())
        found = MultiBoxLoss(SPEC, LossSettings(positive_iou=iou, ignore_iou=ignore))(
            heads_for(1), targets_of(faces), SIZE
        )
        assert int(found.positives) == len(forced | near)


def test_settings_at_their_bounds_are_possible() -> None:
    LossSettings(0, 0, 0, 0, 1, 0.01, 0.01)
    LossSettings(999_999.0, 999_999, 999_999, 1_000_000, 1_000_000, 0.999, 0.999)
    for name in ("box_weight", "landmark_weight", "pixel_weight"):
        with pytest.raises(SpecError, match=f"{name} must be a number from 0 up to a million, got 1000000.0"):
            LossSettings(**{name: 1e6})
    for name in ("negatives_per_positive", "extra_negatives"):
        with pytest.raises(SpecError, match=f"{name} must be an integer in 0..1000000, got 1000001"):
            LossSettings(**{name: 1_000_001})  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_gpu_gives_the_same_loss(where: str) -> None:
    targets = targets_of(*(plain_faces(seed, 40, (640, 640)) for seed in range(2)))
    heads = heads_for(2, (640, 640))
    expected = MultiBoxLoss(SPEC)(heads, targets, (640, 640))
    found = MultiBoxLoss(SPEC)(tuple(h.cuda() for h in heads), targets.to(where), (640, 640))  # type: ignore[arg-type]
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-5, atol=1e-5)
