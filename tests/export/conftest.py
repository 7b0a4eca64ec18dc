"""What several files here need and takes a while to make: each once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export.options import CalibrationOptions
from facespec.errors import RetinaFaceError
from tests.conftest import Exported

if TYPE_CHECKING:  # what takes seconds to import is imported where it is needed
    import onnx

    from export.calibration import Calibration

SIZE = (320, 320)
DEMO = CalibrationOptions("demo", images=16)


@pytest.fixture
def shared_cache(calibration_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(calibration_cache))


@pytest.fixture(scope="session")
def heads() -> onnx.ModelProto:
    """The published weights up to the head maps, at 320x320; not to be changed."""
    from export.graph import build_heads
    from trainer import load_model

    return build_heads(load_model(), SIZE)


@pytest.fixture(scope="session")
def calibrated(heads: onnx.ModelProto, calibration_cache: Path) -> Calibration:
    """What `DEMO` measures on `heads`; not to be changed."""
    from export.calibration import calibrate
    from facespec.spec import ModelSpec

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(calibration_cache))
        return calibrate(heads, DEMO, SIZE, ModelSpec())


@pytest.fixture(scope="session")
def int8_onnx(exported: Exported) -> Path:
    """The published weights in INT8 at 320x320; what is not INT8 is FP16."""
    return exported("int8", "portable")


@pytest.fixture
def error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Call a command's main function in an empty folder; it must end in an error of one line, which is returned.

    What `facespec.cli.run` makes of such an error is tested with the commands as a user starts them.
    """
    monkeypatch.chdir(tmp_path)

    def call(main: Callable[[list[str]], int], *arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises((RetinaFaceError, SystemExit)) as caught:
            main([str(argument) for argument in arguments])
        line = str(caught.value)
        if isinstance(caught.value, SystemExit):
            assert caught.value.code == 2
            line = capsys.readouterr().err.strip().removeprefix("error: ")
        assert "\n" not in line
        return line

    return call
