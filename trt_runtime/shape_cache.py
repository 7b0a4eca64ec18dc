"""A bounded number of things that are made for a shape: compiled models, CUDA graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ShapeCache(Generic[Key, Value]):
    """Makes a value for each key, and keeps those that were used last. Threads may share it.

    Args:
        capacity: Values kept.
        make: Makes the value of a key.
        drop: Frees a value that is given up.
    """

    def __init__(
        self, capacity: int, make: Callable[[Key], Value], drop: Callable[[Value], None] = lambda _: None
    ) -> None:
        self.capacity = capacity
        self.made = 0
        self._make = make
        self._drop = drop
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def get(self, key: Key) -> Value:
        """Return the value of a key; making one gives up the one that was not used for the longest time."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            while len(self._values) >= self.capacity:  # first, so that its memory is free for the new one
                self._drop(self._values.popitem(last=False)[1])
            value = self._values[key] = self._make(key)
            self.made += 1
            return value

    def clear(self) -> None:
        """Give up everything."""
        with self._lock:
            while self._values:
                self._drop(self._values.popitem()[1])
