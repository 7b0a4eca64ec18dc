"""HDR video as SDR pictures: PQ (SMPTE ST 2084) and HLG (ARIB STD-B67) become sRGB.

Without it a picture is grey and flat. What is up to white keeps its brightness; highlights are compressed.
"""

from __future__ import annotations

import functools
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from facespec.letterbox import Frame

PQ, HLG = 16, 18
"""Transfer characteristics, as in ITU-T H.273."""

_BT709_PRIMARIES = 1
_WHITE_NITS, _PEAK_NITS = 203.0, 1000.0  # ITU-R BT.2408
_KNEE = 0.8  # of white: darker light passes as it is
_STEPS = 4096  # of brightness
_ROWS = 32  # at once, so that they stay in the cache
# from BT.2020 to BT.709 (ITU-R BT.2087), both of BGR
_TO_BT709 = np.array([[1.1187, -0.1006, -0.0182], [-0.0083, 1.1329, -0.1246], [-0.0728, -0.5876, 1.6605]], np.float32)


def to_sdr(image: NDArray[np.uint16], transfer: int, primaries: int) -> Frame:
    """Return an HDR picture as sRGB.

    Args:
        image: uint16 (H, W, 3) BGR of full range.
        transfer: `PQ` or `HLG`.
        primaries: As in ITU-T H.273; BT.2020 is taken for all but BT.709.

    Returns:
        uint8 (H, W, 3) BGR.
    """
    light_of, curve, scale = _light(transfer), _curve(), np.float32(_scale())
    out = np.empty(image.shape, np.uint8)
    for start in range(0, len(image), _ROWS):
        light: Any = light_of.take(image[start : start + _ROWS])
        if primaries != _BT709_PRIMARIES:
            light = cv2.transform(light, _TO_BT709)
        np.clip(light, 0, _PEAK_NITS / _WHITE_NITS, out=light)
        np.sqrt(light, out=light)
        np.multiply(light, scale, out=light)
        out[start : start + _ROWS] = curve.take(light.astype(np.intp))
    return out


def _scale() -> float:
    return float((_STEPS - 1) / np.sqrt(_PEAK_NITS / _WHITE_NITS))


@functools.cache
def _light(transfer: int) -> NDArray[np.float32]:
    """Return the light of each value of 16 bits, in units of white; for HLG as a display of 1000 nits shows it."""
    value = np.arange(65_536) / 65_535
    if transfer == PQ:
        power = value ** (1 / 78.84375)
        nits = 10_000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    else:
        bright = (np.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12
        nits = _PEAK_NITS * np.where(value <= 0.5, value**2 / 3, bright) ** 1.2
    return (nits / _WHITE_NITS).astype(np.float32)


@functools.cache
def _curve() -> NDArray[np.uint8]:
    """Return the sRGB value of each step of brightness: the square root of light, up to the peak."""
    peak = _PEAK_NITS / _WHITE_NITS
    light = (np.arange(_STEPS) / _scale()) ** 2
    # the Moebius curve that leaves the knee at slope 1 and ends at 1, as FFmpeg's filter tonemap has it
    a = -(_KNEE**2) * (peak - 1) / (_KNEE**2 - 2 * _KNEE + peak)
    b = (_KNEE**2 - 2 * _KNEE * peak + peak) / (peak - 1)
    bent = (b * b + 2 * b * _KNEE + _KNEE**2) / (b - a) * (light + a) / (light + b)
    light = np.clip(np.where(light <= _KNEE, light, bent), 0, 1)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)
