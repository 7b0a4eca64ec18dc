"""What several tests say about faces."""

from __future__ import annotations

import numpy as np

from facespec.detections import Detections


def assert_identical(found: Detections, expected: Detections) -> None:
    """To the bit."""
    assert found.frame_hw == expected.frame_hw
    assert found.truncated == expected.truncated
    for name in ("boxes", "scores", "landmarks"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
