"""Batch normalisation that was folded for deployment, given back."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from facespec.spec import ModelSpec
from tests.trainer.conftest import published
from trainer import RetinaFace
from trainer.folding import is_folded, unfold


def _photographs(count: int = 6) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 50, (count, 3, 96, 128)).astype(np.float32))


def test_folded_batch_normalisation_is_given_back() -> None:
    """The published weights come folded: by a batch's statistics they would be another network."""
    photographs = _photographs()
    model, folded = published(), published()
    assert is_folded(folded)
    unfold(model, photographs.split([1, 2, 3]))
    assert not is_folded(model)
    with torch.no_grad():
        for after, before in zip(model(photographs), folded(photographs), strict=True):
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        by_statistics = [head.clone() for head in model(photographs)]
        for module in (model, folded):
            module.train()
        for head, wanted, wrong in zip(model(photographs), by_statistics, folded(photographs), strict=True):
            assert (head - wanted).abs().mean() < 0.01
            assert (wrong - wanted).abs().mean() > 0.1


def test_statistics_are_those_of_all_images_and_filters_have_their_length() -> None:
    photographs = _photographs()
    model = published()
    unfold(model, photographs.split([1, 2, 3]))
    inputs: dict[nn.BatchNorm2d, Tensor] = {}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        assert not norm._forward_hooks  # nothing measures on
        norm.register_forward_hook(lambda module, given, _: inputs.update({module: given[0]}))
    with torch.no_grad():
        model(photographs)
    for norm in norms:
        values = inputs[norm].double().transpose(0, 1).flatten(1)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        torch.testing.assert_close(norm.running_mean.double(), values.mean(dim=1), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(norm.running_var.double(), values.var(dim=1, unbiased=False), rtol=2e-2, atol=1e-3)
    body = [module for module in model.body.modules() if isinstance(module, nn.Conv2d)]
    lengths = torch.cat([layer.weight.flatten(1).norm(dim=1) for layer in body])
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1 / np.sqrt(3)), rtol=1e-4, atol=0)


def test_a_filter_of_zeros_stays_one() -> None:
    model = published()
    convolution, norm = model.body.stage1[0][0], model.body.stage1[0][1]  # type: ignore[index, union-attr]
    with torch.no_grad():
        convolution.weight[3] = 0
    before = copy.deepcopy(model)
    unfold(model, _photographs(2).split(1))
    assert not convolution.weight[3].any()
    assert torch.isfinite(torch.stack([norm.weight, norm.bias, norm.running_mean, norm.running_var])).all()
    with torch.no_grad():
        for one, other in zip(model(_photographs(2)), before(_photographs(2)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_mode_of_the_model_stays_what_it_was() -> None:
    for training in (True, False):
        model = published().train(training)
        unfold(model, [_photographs(1)])
        assert model.training == training
        assert all(module.training == training for module in model.modules())


def test_one_layer_with_a_mean_tells_a_model_that_is_not_folded() -> None:
    model = published()
    last = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    assert last.running_mean is not None
    last.running_mean[0] = 0.5
    assert not is_folded(model)
    assert is_folded(RetinaFace(ModelSpec()))  # no statistics yet
