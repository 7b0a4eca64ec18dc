"""Where the time of a frame goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageTimer:
    """Adds up the time spent in named stages, in the order they first occur. One thread at a time may use it.

    Args:
        fine: On a GPU, time what otherwise runs as one graph, part by part; the parts together take longer.
    """

    def __init__(self, fine: bool = False) -> None:
        self.fine = fine
        self.total_ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block as part of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, (time.perf_counter() - start) * 1e3)

    def add(self, stage: str, ms: float) -> None:
        """Add a time that was measured elsewhere."""
        self.total_ms[stage] = self.total_ms.get(stage, 0.0) + ms
