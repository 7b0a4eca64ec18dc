"""Training side: the RetinaFace model, its weights, and evaluation on WIDER FACE."""

from trainer.checkpoint import DEFAULT_WEIGHTS, load_model, save_checkpoint
from trainer.model import RetinaFace

__all__ = ["DEFAULT_WEIGHTS", "RetinaFace", "load_model", "save_checkpoint"]
