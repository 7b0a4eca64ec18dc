from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from trt_runtime.detector import ShapeCache


class Recorded:
    """A cache that writes down what it makes and drops."""

    def __init__(self, capacity: int) -> None:
        self.events: list[str] = []
        self.cache: ShapeCache[str, str] = ShapeCache(
            capacity, self._make, lambda value: self.events.append(f"-{value}")
        )

    def _make(self, key: str) -> str:
        self.events.append(f"+{key}")
        if key == "bad":
            raise MemoryError(key)
        return key

    def get(self, keys: str) -> str:
        """Look up several keys; return what happened meanwhile."""
        self.events.clear()
        for key in keys:
            assert self.cache.get(key) == key
        return " ".join(self.events)


def test_the_least_recently_used_goes_before_the_next_is_made() -> None:
    recorded = Recorded(3)
    assert recorded.get("abcabc") == "+a +b +c"
    assert recorded.get("ad") == "-b +d"  # a was asked for again, so b is the oldest
    assert recorded.get("cad") == ""
    assert recorded.get("b") == "-c +b"
    assert recorded.get("c") == "-a +c"
    assert (len(recorded.cache), recorded.cache.made) == (3, 6)


def test_what_cannot_be_made_leaves_the_rest() -> None:
    recorded = Recorded(2)
    recorded.get("ab")
    recorded.events.clear()
    for _ in range(2):  # nothing is kept for the key: the second time it is tried again
        with pytest.raises(MemoryError):
            recorded.cache.get("bad")
    assert recorded.events == ["-a", "+bad", "+bad"]
    assert (len(recorded.cache), recorded.cache.made) == (1, 2)
    assert recorded.get("bcb") == "+c"


def test_an_error_of_drop_does_not_bring_the_value_back() -> None:
    dropped = []

    def drop(value: str) -> None:
        dropped.append(value)
        if value == "a":
            raise OSError(value)

    cache: ShapeCache[str, str] = ShapeCache(1, str, drop)
    cache.get("a")
    with pytest.raises(OSError, match="a"):
        cache.get("b")
    assert cache.get("b") == "b"
    cache.clear()
    assert dropped == ["a", "b"]


def test_what_a_value_is_made_of_can_be_handed_over() -> None:
    cache: ShapeCache[str, str] = ShapeCache(2, lambda key, part: key + part)
    assert [cache.get("a", "1"), cache.get("a", "2"), cache.get("b", "2")] == ["a1", "a1", "b2"]


def test_clear_drops_each_value_once() -> None:
    recorded = Recorded(3)
    recorded.get("abc")
    recorded.events.clear()
    recorded.cache.clear()
    recorded.cache.clear()
    assert sorted(recorded.events) == ["-a", "-b", "-c"]
    assert len(recorded.cache) == 0
    assert recorded.get("a") == "+a"


def test_threads_make_a_value_once_and_never_too_many() -> None:
    alive: set[int] = set()
    problems: list[str] = []
    entered = threading.Semaphore(0)

    def make(key: int) -> int:
        if key in alive or len(alive) >= 4:
            problems.append(f"{key} made beside {sorted(alive)}")
        alive.add(key)
        entered.acquire(timeout=1e-4)  # lets other threads run here
        return key

    cache: ShapeCache[int, int] = ShapeCache(4, make, alive.remove)

    def work(seed: int) -> None:
        for step in range(200):
            key = (seed * step + step // 7) % 6
            if cache.get(key) != key:
                problems.append(f"another value for {key}")

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, seed) for seed in range(1, 9)]:
            done.result()
    assert problems == []
    assert len(alive) == len(cache) == 4
    assert cache.made > 6  # values were given up, and made again


def test_what_is_in_it_without_using_it() -> None:
    recorded = Recorded(2)
    assert (recorded.cache.capacity, recorded.cache.made, len(recorded.cache)) == (2, 0, 0)
    recorded.get("ab")
    assert "a" in recorded.cache
    assert "c" not in recorded.cache
    assert len(recorded.cache) == 2
    assert recorded.get("c") == "-a +c"  # to ask whether it is there is no use of it
    assert "a" not in recorded.cache


def test_values_need_not_be_freed() -> None:
    cache: ShapeCache[int, list[int]] = ShapeCache(1, lambda key: [key])
    first = cache.get(1)
    assert cache.get(1) is first
    assert cache.get(2) == [2]
    cache.clear()
    assert len(cache) == 0
    assert cache.get(1) is not first


def test_clearing_waits_for_the_value_that_is_being_made() -> None:
    """Otherwise it would be kept, and never freed."""
    begun, go_on, dropped = threading.Event(), threading.Event(), list[str]()

    def make(key: str) -> str:
        begun.set()
        assert go_on.wait(20)
        return key

    cache: ShapeCache[str, str] = ShapeCache(2, make, dropped.append)
    with ThreadPoolExecutor(2) as pool:
        making = pool.submit(cache.get, "a")
        assert begun.wait(20)
        clearing = pool.submit(cache.clear)
        with pytest.raises(TimeoutError):
            clearing.result(0.1)
        go_on.set()
        assert making.result(20) == "a"
        clearing.result(20)
    assert dropped == ["a"]
    assert len(cache) == 0
