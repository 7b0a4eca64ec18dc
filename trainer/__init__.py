"""Training side: the RetinaFace model, its weights, training, and evaluation on WIDER FACE."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoint import load_model, save_checkpoint
    from trainer.evaluate import evaluate
    from trainer.loop import fit
    from trainer.model import RetinaFace

__all__ = ["RetinaFace", "evaluate", "fit", "load_model", "save_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import torch only when a name that needs it is used: scoring prediction files does not."""
    if name in ("evaluate", "fit"):  # modules that can be called
        return importlib.import_module(f"trainer.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("trainer.model" if name == "RetinaFace" else "trainer.checkpoint"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
