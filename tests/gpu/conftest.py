"""Under pytest: all tests in this folder but test_detector.py need a GPU. They are written with unittest alone."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.path.name != "test_detector.py":
            item.add_marker(pytest.mark.gpu)
