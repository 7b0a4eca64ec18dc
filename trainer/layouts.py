"""Finding the state dict inside what training scripts save: in wrappers, with prefixes, beside an averaged one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_WRAPPERS = 4
"""Dictionaries in dictionaries that are looked into."""

_ROOT = re.compile(
    r"((?:[^.]+\.)*?)(body|fx|fpn|ssh[123]|ClassHead|BboxHead|LandmarkHead|(?:class|bbox|landmark)_head)\."
)
_AVERAGED = re.compile(r"(?:^|[._])(ema|swa|averaged|average|avg|shadow)(?:[._]|$)", re.IGNORECASE)
_WRAPPED = re.compile(r"(?:(?:module|_orig_mod|model|net|backbone)\.)*")


class Found(NamedTuple):
    """A state dict inside a checkpoint: the keys that lead to it, what its names begin with, and its values."""

    path: str
    prefix: str
    state: dict[Any, Any]

    @property
    def where(self) -> str:
        """What to call it in messages."""
        place = f"under {self.path!r}" if self.path else "of the file"
        return f"{place}, names without {self.prefix!r}" if self.prefix else place


def names_detector(content: Mapping[Any, Any]) -> bool:
    """Return whether a checkpoint has a key of a RetinaFace anywhere."""
    keys = (key for _, values in _dictionaries(content) for key in values if isinstance(key, str))
    return any(_ROOT.match(key) for key in keys)


def find_detector(content: Mapping[Any, Any]) -> tuple[Found, list[Found]] | None:
    """Return the state dict of a RetinaFace in a checkpoint, an averaged one before others, and those passed over.

    Raises:
        ValueError: There are several, and which is meant cannot be told; the message names them.
    """
    found = [item for path, values in _dictionaries(content) for item in _detectors(path, values)]
    return _choose(found) if found else None


def find_classifier(content: Mapping[Any, Any]) -> tuple[Found, list[Found]] | None:
    """Return the state dict in a checkpoint that holds no detector; otherwise as `find_detector`.

    Raises:
        ValueError: As `find_detector`.
    """
    found = []
    for path, values in _dictionaries(content):
        named = {key: value for key, value in values.items() if key != "n_averaged"}
        if len(named) > 1 and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in named.items()):
            prefixes = [match[0] for key in named if (match := _WRAPPED.match(key))]
            prefix = min(prefixes, key=len)
            if all(key.startswith(prefix) for key in named):
                found.append(Found(path, prefix, {key[len(prefix) :]: value for key, value in named.items()}))
    return _choose(found) if found else None


def _dictionaries(
    content: Mapping[Any, Any], path: str = "", depth: int = 0
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    yield path, content
    if depth < MAX_WRAPPERS:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _dictionaries(value, f"{path}.{key}" if path else key, depth + 1)


def _detectors(path: str, values: Mapping[Any, Any]) -> Iterator[Found]:
    """Yield the detectors in one dictionary, each with another prefix."""
    roots: dict[str, set[str]] = {}
    for key, value in values.items():
        if isinstance(key, str) and isinstance(value, Tensor) and (match := _ROOT.match(key)):
            roots.setdefault(match[1], set()).add(match[2].lower())
    whole = [prefix for prefix, names in roots.items() if "fpn" in names and names & {"classhead", "class_head"}]
    for prefix in whole:
        others = tuple(other for other in whole if len(other) > len(prefix))
        state = {
            key[len(prefix) :] if isinstance(key, str) else key: value
            for key, value in values.items()
            if not isinstance(key, str) or (key.startswith(prefix) and not (others and key.startswith(others)))
        }
        yield Found(path, prefix, state)


def _choose(found: list[Found]) -> tuple[Found, list[Found]]:
    averaged = [item for item in found if _AVERAGED.search(f"{item.path}.{item.prefix}")]
    best = averaged or found
    if any(not _equal(best[0].state, item.state) for item in best[1:]):
        raise ValueError("; ".join(item.where for item in best))
    return best[0], [item for item in found if item is not best[0]]


def _equal(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(
        isinstance(value, Tensor) and isinstance(other[key], Tensor) and torch.equal(value, other[key])
        for key, value in one.items()
    )
