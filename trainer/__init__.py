"""Training side: the RetinaFace model, its weights, and evaluation on WIDER FACE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoint import load_model, save_checkpoint
    from trainer.model import RetinaFace

__all__ = ["RetinaFace", "load_model", "save_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import torch only when a name that needs it is used: scoring prediction files does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer import checkpoint, model

    return getattr(model if name == "RetinaFace" else checkpoint, name)
