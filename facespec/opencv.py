"""OpenCV, of whichever package is installed: opencv-python-headless is enough for everything but windows."""

from __future__ import annotations

import sys

from facespec.errors import MissingPackageError, reason

try:
    import cv2 as cv2
except ImportError as error:
    found = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({reason(error)})"
    message = (
        f"OpenCV {found}: pip install opencv-python-headless, which needs no display and no libGL; or opencv-python, "
        "which shows windows, too (not both)"
    )
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if getattr(spec, "name", "").startswith(("trt_runtime.", "export.", "trainer.")):  # python -m of a command of ours
        sys.exit(f"error: {message}")
    raise MissingPackageError(message) from error
