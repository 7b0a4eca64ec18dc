"""A single step: what is differentiated, how far the weights move, and their average."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from facespec.spec import AnchorSpec, ModelSpec, PreprocessSpec
from tests.trainer.conftest import published
from trainer import RetinaFace
from trainer.config import OptimizerConfig, ScheduleConfig, resolve
from trainer.data.batches import Targets, collate
from trainer.data.dataset import Faces
from trainer.losses import Losses, LossSettings, MultiBoxLoss
from trainer.model import Features
from trainer.step import Ema, Heads, Learner, PixelTerm, lr_factor, make_optimizer, seed_step, train_step

HW = (64, 96)


def _batch(count: int = 2) -> tuple[Tensor, Targets]:
    rng = np.random.default_rng(0)
    faces = Faces(
        np.array([[20, 10, 52, 44]], np.float32),
        rng.uniform(20, 40, (1, 5, 2)).astype(np.float32),
        np.ones(1, bool),
    )
    return collate([(rng.integers(0, 256, (*HW, 3), np.uint8), faces) for _ in range(count)])


def test_learning_rates() -> None:
    cosine = ScheduleConfig(epochs=4, warmup_epochs=0.5, final=0.1)
    rates = [lr_factor(step, 10, cosine) for step in range(40)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[22] == pytest.approx(0.55)
    assert rates[39] == pytest.approx(0.1)
    assert sorted(rates[5:], reverse=True) == rates[5:]
    original = resolve({"recipe": "original"}).schedule
    steps = [lr_factor(step, 7, original) for step in range(700)]
    assert steps == pytest.approx([1.0] * 490 + [0.1] * 140 + [0.01] * 70)
    # the rise comes first whatever follows it; a run that is all of it, or of one step, has a rate too
    rising = ScheduleConfig(epochs=2, kind="step", warmup_epochs=1, milestones=(0.25, 0.75), gamma=0.5)
    assert [lr_factor(step, 4, rising) for step in range(8)] == [0.25, 0.5, 0.75, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert [lr_factor(step, 2, ScheduleConfig(epochs=1)) for step in range(2)] == [0.5, 1.0]
    assert lr_factor(0, 1, ScheduleConfig(epochs=1, warmup_epochs=0)) == 1.0


class Slope(nn.Module):
    """A loss whose gradient is known: 3 and 4 in its two weights, of length 5."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, images: Tensor, targets: Targets) -> Losses:
        total = (self.weights * torch.tensor([3.0, 4.0])).sum()
        zero = torch.zeros(())
        return Losses(total, zero, zero, zero, zero, zero, zero, zero)


@pytest.mark.parametrize(("clip", "factor"), [(0.0, 1.0), (2.5, 0.5), (5.1, 1.0), (0.05, 0.01)])
def test_gradients_are_shortened_to_the_limit_and_reported_as_they_were(clip: float, factor: float) -> None:
    slope = Slope()
    optimizer = SGD(slope.parameters(), lr=0.1)
    for step in range(2):  # the second one starts from no gradient, too
        before = slope.weights.detach().clone()
        losses, norm = train_step(slope, optimizer, *_batch(1), clip)
        assert losses.total.item() == pytest.approx(float((before * torch.tensor([3.0, 4.0])).sum())), step
        assert norm.item() == pytest.approx(5)
        moved = before - slope.weights.detach()
        torch.testing.assert_close(moved, 0.1 * factor * torch.tensor([3.0, 4.0]), rtol=1e-4, atol=1e-6)


def test_a_step_goes_downhill_on_its_batch() -> None:
    model = published()
    learner = Learner(model, MultiBoxLoss(model.spec), freeze_batch_norm=True)
    optimizer = make_optimizer(learner, OptimizerConfig(lr=1e-3, momentum=0.0, nesterov=False))
    batch = _batch()
    before = {name: value.clone() for name, value in model.named_parameters()}
    first, norm = train_step(learner, optimizer, *batch, 1.0)
    assert learner(*batch).total < first.total
    assert norm > 0
    assert np.mean([not torch.equal(value, before[name]) for name, value in model.named_parameters()]) > 0.5


def _by_hand(model: RetinaFace, images: Tensor, targets: Targets, settings: LossSettings | None = None) -> Losses:
    """The loss of images that are laid out and centred with numpy."""
    mean = np.array(model.spec.preprocess.mean_bgr, np.float32)
    pixels = np.ascontiguousarray((images.numpy().astype(np.float32) - mean).transpose(0, 3, 1, 2))
    heads = model(torch.from_numpy(pixels))
    return MultiBoxLoss(model.spec, settings)(heads, targets, (images.shape[1], images.shape[2]))


def test_the_loss_of_a_batch_is_that_of_its_centred_pixels() -> None:
    model = published()
    images, targets = _batch()
    with torch.no_grad():
        found = Learner(model, MultiBoxLoss(model.spec), freeze_batch_norm=True)(images, targets)
        for one, other in zip(found, _by_hand(model, images, targets), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        # another mean, and other settings of the loss, are those of the spec and of the caller
        model.spec = ModelSpec(preprocess=PreprocessSpec((10, 200, 90)))
        settings = LossSettings(box_weight=0.5, extra_negatives=3)
        found = Learner(model, MultiBoxLoss(model.spec, settings), freeze_batch_norm=True)(images, targets)
        torch.testing.assert_close(found.total, _by_hand(model, images, targets, settings).total, rtol=1e-5, atol=1e-5)


class Seen(PixelTerm):
    """A term that keeps what it is shown."""

    def forward(self, features: Features, heads: Heads, images: Tensor, targets: Targets) -> Tensor:
        self.features, self.heads, self.images, self.targets = features, heads, images, targets
        return heads[0].float().mean()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_pixel_term_sees_what_is_promised_and_counts_by_its_weight(bf16: bool) -> None:
    model, term = published(), Seen()
    images, targets = _batch()
    learner = Learner(
        model, MultiBoxLoss(model.spec, LossSettings(pixel_weight=3.0)), term, bf16=bf16, freeze_batch_norm=True
    )
    losses = learner(images, targets)
    assert [tuple(x.shape) for x in term.features] == [(2, 64, -(-HW[0] // s), -(-HW[1] // s)) for s in (8, 16, 32)]
    count = AnchorSpec().count(HW)
    assert [tuple(x.shape) for x in term.heads] == [(2, count, 4), (2, count, 2), (2, count, 10)]
    assert {x.dtype for x in (*term.features, *term.heads)} == {torch.bfloat16 if bf16 else torch.float32}
    assert (tuple(term.images.shape), term.images.dtype) == ((2, 3, *HW), torch.float32)
    assert term.images[1, 2, 3, 5] == float(images[1, 3, 5, 2]) - 123
    assert term.targets is targets
    assert losses.pixel.item() == pytest.approx(term.heads[0].float().mean().item(), rel=1e-5)
    parts = losses.classification + 2 * losses.box + losses.landmark + 3 * losses.pixel
    assert losses.total.item() == pytest.approx(parts.item(), rel=1e-5)
    assert losses.total.dtype == torch.float32
    with pytest.raises(NotImplementedError):
        PixelTerm()(term.features, term.heads, term.images, targets)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name or "tracked" in name}


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_normalisation_keeps_its_statistics_uses_them_and_learns_its_scale(frozen: bool) -> None:
    model = published()
    learner = Learner(model, MultiBoxLoss(model.spec), freeze_batch_norm=frozen)
    assert model.training  # from the start, though it was loaded to detect
    assert learner.train(False).training is False
    assert not any(module.training for module in model.modules())
    learner.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 20
    assert {norm.training for norm in norms} == {not frozen}
    assert all(module.training for module in model.modules() if not isinstance(module, nn.BatchNorm2d))
    before, scales = _statistics(model), [(norm.weight.detach().clone(), norm.bias.detach().clone()) for norm in norms]
    images, targets = _batch()
    optimizer = make_optimizer(learner, OptimizerConfig())
    with torch.no_grad():
        by_running = _by_hand(copy.deepcopy(model).eval(), images, targets).total
    losses, _ = train_step(learner, optimizer, images, targets, 10.0)
    after = _statistics(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == (set() if frozen else set(before))
    assert math.isclose(losses.total.item(), by_running.item(), rel_tol=1e-4) == frozen
    moved = [
        (norm.weight != weight).any() or (norm.bias != bias).any()
        for norm, (weight, bias) in zip(norms, scales, strict=True)
    ]
    assert np.mean(moved) > 0.5  # only the statistics are frozen; of a deep layer a step may round away
    assert all(norm.weight.grad is not None and norm.weight.grad.any() for norm in norms)


def test_the_network_is_compiled_on_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Callable[..., object]] = []

    def spy(function: Callable[..., object]) -> Callable[..., object]:
        compiled.append(function)
        return lambda *given: (calls.append(given), function(*given))[1]

    calls: list[object] = []
    monkeypatch.setattr(torch, "compile", spy)
    model, batch = published(), _batch(1)
    plain = Learner(model, MultiBoxLoss(model.spec), freeze_batch_norm=True)(*batch)
    assert not compiled
    found = Learner(model, MultiBoxLoss(model.spec), freeze_batch_norm=True, compile=True)(*batch)
    assert (len(compiled), len(calls)) == (1, 1)
    assert torch.equal(plain.total, found.total)


def test_weight_decay_spares_vectors() -> None:
    settings = resolve({}).optimizer
    model = RetinaFace(ModelSpec())
    decayed, spared = make_optimizer(model, settings).param_groups
    assert {p.ndim for p in decayed["params"]} == {4}
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0)
    for group in (decayed, spared):
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.01, 0.9, True)
    (everything,) = make_optimizer(model, resolve({"recipe": "original"}).optimizer).param_groups
    assert len(everything["params"]) == len(list(model.parameters()))
    assert (everything["weight_decay"], everything["nesterov"]) == (5e-4, False)
    other = OptimizerConfig(lr=0.3, momentum=0.25, nesterov=False, weight_decay=0.125)
    group = make_optimizer(model, other).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0.25, False, 0.125)


def test_the_average_of_weights_is_what_a_hand_computes() -> None:
    model = nn.BatchNorm1d(1)
    ema = Ema(model, 0.2)
    values = [(1.0, 0.0)]
    for step in range(3):
        nn.init.constant_(model.weight, 10.0 * step)
        model.running_mean.fill_(step)  # type: ignore[union-attr, operator]
        model.num_batches_tracked.fill_(step)  # type: ignore[union-attr, operator]
        ema.update(model)
        decay = min(0.2, (1 + step) / (10 + step))
        values.append((decay * values[-1][0] + (1 - decay) * 10.0 * step, decay * values[-1][1] + (1 - decay) * step))
    assert ema.model.weight.item() == pytest.approx(values[-1][0])  # type: ignore[union-attr, operator]
    assert ema.model.running_mean.item() == pytest.approx(values[-1][1])  # type: ignore[union-attr, operator]
    assert ema.model.num_batches_tracked == 2
    assert ema.updates == 3
    assert not ema.model.training
    assert not any(value.requires_grad for value in ema.model.parameters())
    assert model.training
    assert model.weight.requires_grad
    assert model.weight.item() == 20  # what is averaged stays as it is


def test_the_decay_rises_to_the_one_that_is_asked_for() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, 0.5)
    nn.init.ones_(model.weight)
    left = 1.0
    for step in range(20):
        ema.update(model)
        left *= min(0.5, (1 + step) / (10 + step))
        assert 1 - ema.model.weight.item() == pytest.approx(left, abs=1e-6)  # type: ignore[union-attr, operator]
    assert (1 + 8) / (10 + 8) == 0.5  # so both parts of the rule were seen


def _draws(seed: int, step: int, rank: int) -> tuple[float, float, float]:
    seed_step(seed, step, rank)
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_every_generator_is_seeded_by_seed_step_and_process() -> None:
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        first = _draws(1, 2, 3)
        assert _draws(1, 2, 3) == first
        for other in ((0, 2, 3), (1, 3, 3), (1, 2, 0), (2, 1, 3), (1, 3, 2)):
            assert all(one != two for one, two in zip(_draws(*other), first, strict=True)), other
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
