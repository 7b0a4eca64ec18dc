from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from facespec.errors import MissingToolError
from facespec.images import read_image
from facespec.letterbox import Frame
from facespec.samples import sample_photographs
from plugins.build import ensure
from trt_runtime.gpu.flavor import gpu_capability

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("RETINAFACE_DATA", ROOT.parent / "shared" / "data"))


WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER and hasattr(os, "sched_setaffinity"):  # before a library counts the cores
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):  # on a machine with a GPU and little else, pyproject.toml may name them
        for name in ("timeout", "timeout_method"):
            parser.addini(name, "of pytest-timeout, which is not installed")


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):  # in the process that starts the workers: they would all compile
        for target in ("host", "plugin"):
            with suppress(MissingToolError):
                ensure(target)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("RETINAFACE_REQUIRE_GPU") or gpu_capability() is not None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine (make test-gpu)"))


@pytest.fixture
def usual_priority() -> Iterator[None]:
    """Let the process share the processor again: SVT-AV1, started by root, gives its caller a real-time priority."""
    yield
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(scope="session")
def widerface() -> Path:
    """WIDER FACE as docs/training.md has it: val/images and gt."""
    root = DATA / "widerface"
    if not (root / "val" / "images").is_dir():
        pytest.skip("WIDER FACE is not on this machine (RETINAFACE_DATA)")
    return root


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """Folder of extra checkpoints of the published weights."""
    if not (DATA / "weights").is_dir():
        pytest.skip("the extra checkpoints are not on this machine (RETINAFACE_DATA)")
    return DATA / "weights"


@pytest.fixture(scope="session")
def photographs() -> dict[str, Frame]:
    """Sample photographs, one face each."""
    return {path.stem: read_image(path) for path in sample_photographs()}


@pytest.fixture(scope="session")
def astronaut(photographs: dict[str, Frame]) -> Frame:
    return photographs["astronaut"]


@pytest.fixture(scope="session")
def crowd(photographs: dict[str, Frame]) -> Frame:
    """A 512x1536 frame with three faces."""
    import cv2

    parts = [cv2.resize(image, (512, 512)) for image in photographs.values()]
    return np.hstack([*parts, parts[0][:, ::-1]])


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Return the folder of a name, filled by the first that asks for it; all workers of pytest-xdist share it."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    root = base.parent if WORKER else base

    def call(name: str, make: Callable[[Path], object]) -> Path:
        folder, part = root / f"once-{name}", root / f"once-{name}.part"
        with FileLock(root / f"once-{name}.lock"):
            if not folder.exists():
                shutil.rmtree(part, ignore_errors=True)  # of a worker that was ended
                part.mkdir()
                make(part)
                part.rename(folder)
        return folder

    return call


@pytest.fixture(scope="session")
def calibration_cache(make_once: MakeOnce) -> Path:
    """A user's cache folder that all tests share which do not ask what is in it."""
    return make_once("cache", lambda folder: None)


Exported = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def exported(make_once: MakeOnce, calibration_cache: Path) -> Exported:
    """Return what exports the published weights at 320x320: in a precision, as the portable or as the plugin form."""

    def call(precision: str, form: str) -> Path:
        def make(folder: Path) -> None:
            from export.options import CalibrationOptions
            from export.to_onnx import ExportOptions, export_onnx
            from export.to_trt import EngineOptions, Profile, build_engine

            path, size = folder / "model.onnx", (320, 320)
            calibration = CalibrationOptions("demo", images=16) if precision == "int8" else None
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(calibration_cache))
                if form == "portable":
                    export_onnx(
                        ExportOptions("mobilenet0.25", path, size, precision=precision, calibration=calibration)
                    )
                else:
                    profile = Profile(sizes_hw=(size,) * 3)
                    build_engine(
                        EngineOptions(
                            "mobilenet0.25", path, profile, precision=precision, calibration=calibration, onnx_only=True
                        )
                    )

        return make_once(f"{precision}-{form}", make) / "model.onnx"

    return call


@pytest.fixture(scope="session")
def static_onnx(exported: Exported) -> Path:
    """The published weights at 320x320."""
    return exported("fp32", "portable")


@pytest.fixture(scope="session")
def dynamic_onnx(make_once: MakeOnce) -> Path:
    """The published weights at any size."""

    def make(folder: Path) -> None:
        from export.to_onnx import ExportOptions, export_onnx

        export_onnx(ExportOptions("mobilenet0.25", folder / "model.onnx", None))

    return make_once("dynamic", make) / "model.onnx"


@pytest.fixture(scope="session")
def plugin_form(make_once: MakeOnce) -> Path:
    """The published weights at any size, as TensorRT gets them."""

    def make(folder: Path) -> None:
        from export.to_trt import EngineOptions, Profile, build_engine

        sizes = ((320, 320), (320, 320), (640, 640))
        profile = Profile(sizes_hw=sizes)
        build_engine(EngineOptions("mobilenet0.25", folder / "f.onnx", profile, onnx_only=True))

    return make_once("plugin", make) / "f.onnx"


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m MODULE ARGS` in an empty folder, as a user would."""

    def call(module: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        line = [sys.executable, "-m", module, *map(str, args)]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)

    return call


@pytest.fixture
def refused(command: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., str]:
    """Run a command that must end in one line on stderr, and exit code 2 of a wrong command line, 1 else; return it."""

    def call(module: str, *args: object, env: dict[str, str] | None = None) -> str:
        result = command(module, *args, env=env)
        lines = result.stderr.strip().splitlines()
        assert result.returncode == (2 if result.stderr.endswith(" --help)\n") else 1), result.stderr
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    return call
