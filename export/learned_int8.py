"""Checkpoints of INT8 models: weights, and the steps of int8 that were learned with them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import Tensor, tensor

from export.quantize import ConvSteps, Steps
from facespec.codec import build
from facespec.errors import SpecError, WeightsError
from trainer.checkpoint import model_of_onnx, read_int8, save_checkpoint


@dataclass(frozen=True)
class Lesson:
    """What was learned on: images by their source and number, their seed, updates, and the hash of the teacher."""

    source: str
    images: int
    seed: int
    updates: int
    teacher_sha256: str


@dataclass(frozen=True)
class LearnedInt8:
    """Steps of int8 of the convolutions that compute in INT8, for the weights that they were learned with."""

    steps: Steps
    lesson: Lesson


def save_learned(path: Path, graph: onnx.ModelProto, learned: LearnedInt8) -> None:
    """Write a float32 heads graph, and the steps of int8 that it was trained with, as a checkpoint.

    Raises:
        OutputError: It cannot be written.
    """
    steps = learned.steps
    int8 = {
        "data": {name: step.data for name, step in steps.items()},
        "weights": {name: tensor(step.weight) for name, step in steps.items()},
        "lesson": dataclasses.asdict(learned.lesson),
    }
    save_checkpoint(path, model_of_onnx(graph.SerializeToString(), path), int8=int8)


def load_learned(weights: str) -> LearnedInt8 | None:
    """Return the steps of int8 that a checkpoint brings; None for all other weights.

    Raises:
        WeightsError: They are damaged.
    """
    found = read_int8(weights)
    if found is None:
        return None
    try:
        lesson = build(Lesson, found["lesson"], "lesson")
        data, per_channel = found["data"], found["weights"]
        if not data or data.keys() != per_channel.keys():
            raise SpecError("not as many steps of weights as of their inputs")
        steps = {name: ConvSteps(_step(data[name]), _steps(per_channel[name])) for name in data}
    except (KeyError, AttributeError, TypeError, ValueError, SpecError) as error:
        raise WeightsError(f"{weights}: its steps of int8 are damaged ({error}): learn them again") from None
    return LearnedInt8(steps, lesson)


def _step(value: Any) -> float:
    return float(_checked(np.array(value, np.float64).reshape(())))


def _steps(values: Any) -> Any:
    if not isinstance(values, Tensor) or values.ndim != 1:
        raise SpecError("steps of weights are no vector")
    return _checked(values.numpy())


def _checked(values: Any) -> Any:
    """Return steps as float32 if they are positive and float16 holds them."""
    steps = values.astype(np.float32)
    with np.errstate(over="ignore"):
        if not ((steps > 0) & np.isfinite(steps) & (steps.astype(np.float16) == steps)).all():
            raise SpecError("a step is not a positive number that float16 holds")
    return steps
