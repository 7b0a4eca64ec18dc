"""What the library tells while it works: `logging`, under the name retinaface_trt. Silent unless a handler is added."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

NAME = "retinaface_trt"

logging.getLogger(NAME).addHandler(logging.NullHandler())


def get_logger(part: str) -> logging.Logger:
    """Return the logger of a part of the library, for instance retinaface_trt.video."""
    return logging.getLogger(f"{NAME}.{part}")


class _Stderr(logging.Handler):
    """Writes a line above the progress bar, if there is one, to what stderr is by then."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def tell_on_stderr() -> None:
    """Write what is logged from INFO on to stderr, and each warning of Python as one line: for commands."""
    logger = logging.getLogger(NAME)
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        logger.warning("warning: %s", message)

    warnings.showwarning = show
