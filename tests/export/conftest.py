"""What several files here need and takes a while to make: each once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from export.calibration_options import CalibrationOptions
from facespec.errors import RetinaFaceError

if TYPE_CHECKING:  # what takes seconds to import is imported where it is needed
    import onnx

    from export.calibration import Calibration

SIZE = (320, 320)
DEMO = CalibrationOptions("demo", images=16)


@pytest.fixture(scope="session")
def calibration_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache folder that all tests share which do not ask what is in it."""
    return tmp_path_factory.mktemp("calibration_cache")


@pytest.fixture
def shared_cache(calibration_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(calibration_cache))


@pytest.fixture(scope="session")
def heads() -> onnx.ModelProto:
    """The published weights up to the head maps, at 320x320; not to be changed."""
    from export.portable import build_heads
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
def exported(tmp_path_factory: pytest.TempPathFactory, calibration_cache: Path) -> Callable[[str, str], Path]:
    """Return what exports the published weights at 320x320: in a precision, as the portable or as the plugin form."""
    from export.to_onnx import ExportOptions, export_onnx
    from export.to_trt import EngineOptions, Profile, build_engine
    from facespec.spec import DecodeSpec

    folder = tmp_path_factory.mktemp("exported")

    def export(precision: str, form: str) -> Path:
        path = folder / f"{precision}_{form}.onnx"
        if path.exists():
            return path
        calibration = DEMO if precision == "int8" else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(calibration_cache))
            if form == "portable":
                options = ExportOptions("mobilenet0.25", path, SIZE, DecodeSpec(), None, precision, calibration)
                export_onnx(options)
            else:
                profile = Profile(sizes_hw=(SIZE,) * 3)
                build_engine(EngineOptions("mobilenet0.25", path, profile, precision, calibration, onnx_only=True))
        return path

    return export


@pytest.fixture(scope="session")
def int8_onnx(exported: Callable[[str, str], Path]) -> Path:
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
            assert caught.value.code == 1
            line = capsys.readouterr().err.strip().removeprefix("error: ")
        assert "\n" not in line
        return line

    return call
