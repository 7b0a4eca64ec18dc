"""The training loss: softmax cross-entropy with hard negative mining, and what boxes and landmarks are off by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from facespec.boxes import make_priors
from facespec.codec import check_types
from facespec.errors import SpecError
from facespec.spec import AnchorSpec, ModelSpec
from trainer.data.batches import Targets
from trainer.matching import Matches, match_atss, match_faces, match_simota
from trainer.model import Heads

ASSIGN = ("match", "atss", "simota")
BOX = ("smooth_l1", "diou", "ciou")


@dataclass(frozen=True)
class LossSettings:
    """Weights and thresholds of the loss.

    Attributes:
        box_weight: Weight of the box term; that of the classification is 1.
        landmark_weight: Weight of the landmark term.
        pixel_weight: Weight of the pixel-wise term, which draws the faces; 0 goes without it.
        negatives_per_positive: Background priors that are trained for each positive one of their image.
        extra_negatives: More of them for every image, so that images without faces are trained too; 0 is the
            customary loss, which learns nothing from such images.
        positive_iou: Least IoU of a prior and its face, for "match".
        ignore_iou: Faces whose best IoU is less are left out by "match".
        assign: How priors are chosen for the faces: "match" by thresholds of their IoU, "atss" by one of each face's
            own, "simota" by what the network predicts.
        box: "smooth_l1" of the encoded box, or "diou" or "ciou" of the box in pixels.
    """

    box_weight: float = 2.0
    landmark_weight: float = 1.0
    pixel_weight: float = 0.0
    negatives_per_positive: int = 7
    extra_negatives: int = 200
    positive_iou: float = 0.35
    ignore_iou: float = 0.2
    assign: str = "match"
    box: str = "smooth_l1"

    def __post_init__(self) -> None:
        check_types(self)
        for name, choices in (("assign", ASSIGN), ("box", BOX)):
            if getattr(self, name) not in choices:
                raise SpecError(f"{name} is {getattr(self, name)!r}: choose from {', '.join(choices)}")
        for name in ("box_weight", "landmark_weight", "pixel_weight"):
            value = getattr(self, name)
            if not 0 <= value < 1e6:
                raise SpecError(f"{name} must be a number from 0 up to a million, got {value!r}")
        for name in ("negatives_per_positive", "extra_negatives"):
            value = getattr(self, name)
            if not 0 <= value <= 1_000_000:
                raise SpecError(f"{name} must be an integer in 0..1000000, got {value!r}")
        if self.negatives_per_positive == self.extra_negatives == 0:
            raise SpecError("negatives_per_positive and extra_negatives are both 0: nothing would teach background")
        if not 0.01 <= self.ignore_iou <= self.positive_iou < 1:
            raise SpecError(
                "ignore_iou and positive_iou must satisfy 0.01 <= ignore_iou <= positive_iou < 1, "
                f"got {self.ignore_iou!r} and {self.positive_iou!r}"
            )


class Losses(NamedTuple):
    """The loss of a batch, its terms before they are weighted, and what they were taken over.

    `total` is not finite if any output of the network is not, whether or not a face is trained there: it is enough to
    check `total`.

    All are without dimensions: terms float32, counts int64.

    Attributes:
        total: The one to differentiate.
        pixel: 0 if there is no such term.
        positives: Priors that were trained towards a face.
        landmark_positives: Those of them whose face has known landmarks.
        dropped: Faces left out because their boxes have no area or are not finite.
    """

    total: Tensor
    classification: Tensor
    box: Tensor
    landmark: Tensor
    pixel: Tensor
    positives: Tensor
    landmark_positives: Tensor
    dropped: Tensor


class MultiBoxLoss(nn.Module):
    """L = classification + box_weight * box + landmark_weight * landmark + pixel_weight * pixel.

    Classification and box are divided by the number of positive priors, landmark by the number of those with known
    landmarks. When torch.distributed is initialised these are the numbers of all ranks, and the loss is scaled so that
    the mean over ranks, which DistributedDataParallel takes of gradients, is that of one batch of all their images.

    Source: equation 1 of RetinaFace (Deng et al., CVPR 2020) and the hard negative mining of SSD (Liu et al., ECCV
    2016, section 2.2).
    """

    def __init__(self, spec: ModelSpec, settings: LossSettings | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.settings = settings or LossSettings()

    def forward(self, heads: Heads, targets: Targets, size_hw: tuple[int, int], pixel: Tensor | None = None) -> Losses:
        """Return the loss, computed in float32 whatever the type of the heads.

        Leave `targets` on the CPU: matching runs where they are, beside a GPU that is busy with the forward pass, and
        only the positives go to the GPU. With targets on the GPU the result is the same, but the host has to wait.
        `size_hw` is that of the network input; `pixel`, the optional pixel-wise term, has no dimensions.

        Raises:
            SpecError: The heads are not those of a batch of this size.
        """
        count = self.spec.anchors.count(size_hw)
        expected = [(len(targets.valid), count, width) for width in (4, 2, 10)]
        if [tuple(head.shape) for head in heads] != expected:
            raise SpecError(
                f"heads of {len(targets.valid)} images of {size_hw[0]}x{size_hw[1]} must have shapes {expected}, "
                f"got {[tuple(head.shape) for head in heads]}"
            )
        with torch.autocast(heads[0].device.type, enabled=False):
            return self._forward(heads, targets, size_hw, pixel)

    def _forward(self, heads: Heads, targets: Targets, size_hw: tuple[int, int], pixel: Tensor | None) -> Losses:
        settings = self.settings
        box_deltas, logits, landmark_deltas = heads
        if settings.assign == "simota":  # it asks for what is predicted, so it runs there
            targets = targets.to(logits.device)
        matches = self._match(heads, targets, size_hw)
        boxes, landmarks = self._regression_targets(matches.positive, matches.face, targets, size_hw)
        counts = _to(torch.tensor([len(boxes.rows), len(landmarks.rows)]), logits.device)
        over_positives, over_landmarks = divisors(counts)

        # softmax cross-entropy of two classes is logistic in their difference
        difference = _difference(logits)
        negative = hardest_negatives(
            difference.detach(), matches.positive, settings.negatives_per_positive, settings.extra_negatives
        )
        positive = _to(matches.positive, logits.device)
        trained = (positive | negative).float()
        wanted = torch.zeros_like(difference).flatten().index_copy(0, *boxes.certainty(logits.device))
        entropy = F.binary_cross_entropy_with_logits(
            difference, wanted.view_as(difference), weight=trained, reduction="sum"
        )
        classification = entropy / over_positives
        if settings.box == "smooth_l1":
            box = _smooth_l1(box_deltas, boxes) / over_positives
        else:
            box = self._iou_loss(box_deltas, boxes, size_hw) / over_positives
        landmark = _smooth_l1(landmark_deltas, landmarks) / over_landmarks
        pixel = torch.zeros_like(box) if pixel is None else pixel.float()
        total = (
            classification
            + settings.box_weight * box
            + settings.landmark_weight * landmark
            + settings.pixel_weight * pixel
        )
        # 0, or NaN if a delta is not finite; a logit that is not finite shows in the classification
        total = total + sum(deltas.detach().sum(dtype=torch.float32) * 0 for deltas in (box_deltas, landmark_deltas))
        return Losses(total, classification, box, landmark, pixel, counts[0], counts[1], matches.dropped)

    def _match(self, heads: Heads, targets: Targets, size_hw: tuple[int, int]) -> Matches:
        settings, anchors = self.settings, self.spec.anchors
        faces = targets.boxes, targets.valid, anchors, size_hw
        if settings.assign == "atss":
            return match_atss(*faces)
        if settings.assign == "simota":
            deltas = heads[0].detach().float()
            priors = priors_on(anchors, size_hw, deltas.device)
            return match_simota(
                *faces, decode_boxes(deltas, priors, self.spec.decode.variances), _difference(heads[1].detach())
            )
        return match_faces(*faces, settings.positive_iou, settings.ignore_iou)

    def _iou_loss(self, deltas: Tensor, targets: _Rows, size_hw: tuple[int, int]) -> Tensor:
        """Return the sum over some rows of what `iou_loss` says of the boxes that (B, N, 4) deltas stand for."""
        rows, values, weights = (_to(part, deltas.device) for part in targets)
        priors = priors_on(self.spec.anchors, size_hw, deltas.device)
        priors = priors[rows % len(priors)]
        found, wanted = (
            decode_boxes(part, priors, self.spec.decode.variances)
            for part in (deltas.flatten(0, 1).index_select(0, rows).float(), values)
        )
        return (iou_loss(found, wanted, complete=self.settings.box == "ciou") * weights).sum()

    def _regression_targets(
        self, positive: Tensor, face: Tensor, targets: Targets, size_hw: tuple[int, int]
    ) -> tuple[_Rows, _Rows]:
        """Return the box and the landmark targets, on the device of `targets`."""
        priors = priors_on(self.spec.anchors, size_hw, positive.device)
        variances = self.spec.decode.variances
        rows = positive.flatten().nonzero().squeeze(1)
        image, prior = rows // len(priors), priors[rows % len(priors)]
        face = face.flatten()[rows]
        scores = targets.scores[image, face]
        boxes = _Rows(rows, encode_boxes(targets.boxes[image, face], prior, variances), scores)
        known = targets.has_landmarks[image, face]
        points = targets.landmarks[image[known], face[known]]
        return boxes, _Rows(rows[known], encode_landmarks(points, prior[known], variances), scores[known])


class _Rows(NamedTuple):
    """Values of some rows of a head: rows (P,) int64 in 0..B*N-1, values (P, width) and scores (P,) float32."""

    rows: Tensor
    values: Tensor
    scores: Tensor

    def certainty(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return rows and scores on a device."""
        return _to(self.rows, device), _to(self.scores, device)


def hardest_negatives(difference: Tensor, positive: Tensor, per_positive: int, extra: int) -> Tensor:
    """Return (B, N) bool: the background priors of each image that look most like a face.

    There are per_positive * positives + extra of them in an image, or as many as it has. Their loss grows with the
    difference, (B, N) float32 logit of face minus that of background, so that is what they are chosen by; of equals the
    lowest index comes first. `positive` is (B, N) bool, on the device of the targets.
    """
    positives = positive.sum(dim=1, keepdim=True)
    wanted = torch.minimum(per_positive * positives + extra, positive.shape[1] - positives)
    most = int(wanted.max())
    if most == 0:
        return torch.zeros_like(difference, dtype=torch.bool)
    wanted, positive = _to(wanted, difference.device), _to(positive, difference.device)
    # Integers in the order of the differences, the inverted index below: no two are equal. Adding 0 turns -0 into 0.
    bits = (difference + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    key = ordered | torch.arange(positive.shape[1] - 1, -1, -1, device=difference.device)
    key = key.masked_fill(positive, torch.iinfo(torch.int64).min)
    least = key.topk(most).values.gather(1, (wanted - 1).clamp(min=0))
    return (key >= least) & (wanted > 0)


def encode_boxes(boxes_xyxy: Tensor, priors_cxcywh: Tensor, variances: tuple[float, float]) -> Tensor:
    """Return (P, 4) regression targets of boxes (P, 4) in pixels against priors (P, 4), as `facespec.boxes` does."""
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    centre, size = priors_cxcywh[:, :2], priors_cxcywh[:, 2:]
    offset = ((low + high) / 2 - centre) / (variances[0] * size)
    return torch.cat([offset, ((high - low) / size).log() / variances[1]], dim=1)


def encode_landmarks(landmarks: Tensor, priors_cxcywh: Tensor, variances: tuple[float, float]) -> Tensor:
    """Return (P, 10) regression targets of points (P, 5, 2) in pixels against priors, as `facespec.boxes` does."""
    centre, size = priors_cxcywh[:, None, :2], priors_cxcywh[:, None, 2:]
    return ((landmarks - centre) / (variances[0] * size)).flatten(1)


def decode_boxes(deltas: Tensor, priors_cxcywh: Tensor, variances: tuple[float, float]) -> Tensor:
    """Return (..., 4) x1, y1, x2, y2 in pixels from deltas (..., 4) and priors (N, 4), as `facespec.boxes` does.

    Sizes end at e^8 sides of the prior, beyond all images: the square of a larger one might not be finite.
    """
    centre = priors_cxcywh[:, :2] + deltas[..., :2] * variances[0] * priors_cxcywh[:, 2:]
    half = priors_cxcywh[:, 2:] * (deltas[..., 2:] * variances[1]).clamp(max=8).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def iou_loss(found_xyxy: Tensor, wanted_xyxy: Tensor, complete: bool = False) -> Tensor:
    """Return (P,) 1 - DIoU of boxes (P, 4) with a positive area, or with `complete` 1 - CIoU.

    Source: Zheng et al., Distance-IoU Loss, AAAI 2020, equations 7 and 10 to 12.
    """
    low, high = found_xyxy[:, :2], found_xyxy[:, 2:]
    low_wanted, high_wanted = wanted_xyxy[:, :2], wanted_xyxy[:, 2:]
    size, size_wanted = high - low, high_wanted - low_wanted
    overlap = (torch.minimum(high, high_wanted) - torch.maximum(low, low_wanted)).clamp(min=0).prod(dim=1)
    iou = overlap / (size.prod(dim=1) + size_wanted.prod(dim=1) - overlap)
    apart = ((low + high - low_wanted - high_wanted) / 2).square().sum(dim=1)
    diagonal = (torch.maximum(high, high_wanted) - torch.minimum(low, low_wanted)).square().sum(dim=1)
    loss = 1 - iou + apart / diagonal
    if complete:
        angles = (torch.atan2(each[:, 0], each[:, 1]) for each in (size_wanted, size))
        shape = 4 / math.pi**2 * torch.sub(*angles).square()
        with torch.no_grad():  # a factor, as in the paper's equation 11
            share = shape / (1 - iou + shape).clamp(min=1e-7)
        loss = loss + share * shape
    return loss


def _difference(logits: Tensor) -> Tensor:
    """Return (B, N) float32 logit of face minus that of background, from (B, N, 2)."""
    logits = logits.float()
    return logits[..., 1] - logits[..., 0]


def _smooth_l1(deltas: Tensor, targets: _Rows) -> Tensor:
    """Return the sum over some rows of (B, N, width) deltas, by their scores; the other rows cost nothing."""
    rows, values, scores = (_to(part, deltas.device) for part in targets)
    loss = F.smooth_l1_loss(deltas.flatten(0, 1).index_select(0, rows).float(), values, reduction="none")
    return (loss * scores[:, None]).sum()


def divisors(counts: Tensor) -> Tensor:
    """Return counts (2,), at least 1; over several ranks, what makes the mean over ranks that of one large batch."""
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        counts = counts.clone()
        dist.all_reduce(counts)
        ranks = dist.get_world_size()
    return counts.clamp(min=1) / ranks


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; to a GPU it goes from pinned memory, so that the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@lru_cache(maxsize=32)  # a training has a handful of sizes
def priors_on(anchors: AnchorSpec, size_hw: tuple[int, int], device: torch.device) -> Tensor:
    """Return the priors (N, 4) of `facespec.make_priors` on a device; made once for each size."""
    return torch.from_numpy(make_priors(anchors, size_hw)).to(device)
