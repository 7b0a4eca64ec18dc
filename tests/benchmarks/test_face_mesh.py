"""How the mean face is made: meshes that were turned come back, and components where values are missing."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from benchmarks.face_mesh import align, components

RNG = np.random.default_rng(0)


def test_meshes_that_were_turned_scaled_and_moved_come_back() -> None:
    mean = RNG.normal(0, 1, (40, 3))
    moved = [
        scale * mean @ Rotation.from_rotvec(vector).as_matrix().T + shift
        for scale, vector, shift in zip(
            (0.5, 2, 7), RNG.normal(0, 1.5, (3, 3)), RNG.normal(0, 9, (3, 1, 3)), strict=True
        )
    ]
    np.testing.assert_allclose(align(np.array(moved), mean), [mean] * 3, atol=1e-9)
    # a mirror image is not turned into what it mirrors
    assert np.abs(align(mean[None] * [-1, 1, 1], mean) - mean).max() > 0.3


def test_components_are_found_where_values_are_missing() -> None:
    weights, directions, mean = RNG.normal(0, 1, (200, 3)), RNG.normal(0, 1, (3, 30)), RNG.normal(0, 5, 30)
    rows = weights @ directions + mean
    everything = np.ones(rows.shape, bool)
    found, parts, share = components(rows, everything, 3)
    np.testing.assert_allclose(found, rows.mean(axis=0))
    assert share > 0.999999
    # as long as standard deviations: they make up the covariance
    np.testing.assert_allclose(parts.T @ parts, np.cov(rows.T, bias=True), atol=1e-9)
    assert components(rows, everything, 2)[2] < 0.95
    # where what is missing depends on the values, the mean of the others is another one
    seen = (RNG.random(rows.shape) > 0.4) | (weights[:, :1] < 0)
    again, _, _ = components(np.where(seen, rows, 1e9), seen, 3)
    plain = np.where(seen, rows, 0).sum(axis=0) / seen.sum(axis=0)
    assert np.abs(again - found).mean() < 0.2 * np.abs(plain - found).mean()
