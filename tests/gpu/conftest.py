"""Under pytest: the tests in this folder need a GPU, but for `WITHOUT_GPU`; they are written with unittest alone."""

from __future__ import annotations

from pathlib import Path

import pytest

WITHOUT_GPU = ("test_detector.py", "test_main.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.path.name not in WITHOUT_GPU:
            item.add_marker(pytest.mark.gpu)
