from __future__ import annotations

from pathlib import Path

import pytest

from facespec.errors import MissingToolError
from plugins.build import build, ensure, find_library, find_nvcc, find_tensorrt_headers, library_path
from trt_runtime.gpu.flavor import gpu_capability


@pytest.fixture(scope="session")
def device_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin library; where there is none yet, and no GPU to run it, one for a single architecture."""
    try:
        find_nvcc(), find_tensorrt_headers()
    except MissingToolError as error:
        pytest.skip(str(error))
    found = find_library("plugin")
    if found is None and gpu_capability() is None:
        folder = tmp_path_factory.mktemp("plugin")
        build("plugin", (86,), folder)
        found = library_path("plugin", folder)
    return found or ensure("plugin")
