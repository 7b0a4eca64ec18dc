"""Where the compiled library comes from, in a project, in an application, and where only the runtime is deployed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from facespec.errors import MissingToolError
from facespec.images import write_image
from facespec.letterbox import Frame
from tests.conftest import ROOT
from trt_runtime import load_detector
from trt_runtime.kernels import ensure_library, find_library


def test_a_library_that_is_named_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.so").touch()
    monkeypatch.setenv("RETINAFACE_PLUGIN", "mine.so")
    assert ensure_library("plugin") == tmp_path / "mine.so"
    assert ensure_library() == find_library() == tmp_path / "mine.so"
    assert ensure_library("host").name == "libretinaface_host.so"
    monkeypatch.setenv("RETINAFACE_PLUGIN", "none.so")
    for call in (ensure_library, find_library):
        with pytest.raises(MissingToolError, match=r"RETINAFACE_PLUGIN=none\.so: no such file"):
            call("plugin")


DETECT = """
from trt_runtime import load_detector
from facespec.images import read_image
with load_detector({model!r}) as detector:
    faces = detector.detect(read_image({picture!r}))
    print(type(detector).__name__, faces.boxes.tolist(), faces.landmarks.tolist())
"""


def _run(code: str, folder: Path, *paths: Path, **variables: str) -> str:
    """Run it in a folder; what lies in `paths` comes before what is installed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "XDG_CACHE_HOME": str(folder / "cache")}
    env.update(variables)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def detect(static_onnx: Path, astronaut: Frame, tmp_path: Path) -> str:
    """A program that prints the class of a detector and the faces it finds."""
    write_image(tmp_path / "a.png", astronaut)
    return DETECT.format(model=str(static_onnx), picture=str(tmp_path / "a.png"))


@pytest.fixture
def expected(static_onnx: Path, astronaut: Frame) -> str:
    """What it prints here."""
    pytest.importorskip("openvino", reason="pip install -e '.[cpu]'")
    with load_detector(static_onnx) as detector:
        faces = detector.detect(astronaut)
    return f"OpenVinoRetinaFace {faces.boxes.tolist()} {faces.landmarks.tolist()}"


def test_what_is_deployed_is_facespec_and_the_runtime_alone(detect: str, expected: str, tmp_path: Path) -> None:
    app = tmp_path / "app"
    for name in ("facespec", "trt_runtime"):
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    alone = "import sys; sys.modules.update(plugins=None, export=None, trainer=None)\n"  # importing one of them fails
    where = "import trt_runtime.kernels as k; print(k.__file__, k.find_library('host'))"
    assert _run(alone + where, tmp_path, app) == f"{app}/trt_runtime/kernels.py None"
    assert _run(alone + detect, tmp_path, app).startswith("OrtRetinaFace [[")  # nothing to compile
    missing = "try: k.ensure_library('host')\nexcept Exception as error: print(type(error).__name__, error)"
    said = _run(f"{alone}import trt_runtime.kernels as k\n{missing}", tmp_path, app)
    assert said.startswith(
        "MissingToolError the host library is not compiled, and its sources (plugins/) are not beside"
    )
    for folder in (tmp_path / "cache" / "retinaface-trt" / "lib", app / "trt_runtime" / "lib"):
        folder.mkdir(parents=True)
        shutil.copy(ensure_library("host"), folder)
        assert _run(alone + where, tmp_path, app).endswith(f" {folder}/libretinaface_host.so")
        assert _run(alone + detect, tmp_path, app) == expected


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("no-such", [r"runs in ONNX Runtime, which takes 1\.2 .* no C\+\+ compiler \(no-such\): apt install g\+\+"]),
        (
            "false",
            ["compiling the host library, which takes about a quarter of a minute: it is kept as", "cannot"],
        ),
    ],
)
def test_a_library_that_is_compiled_is_announced_before(
    compiler: str, words: list[str], detect: str, tmp_path: Path
) -> None:
    """And without a compiler one warning says what is slower, and what to install."""
    pytest.importorskip("openvino", reason="pip install -e '.[cpu]'")
    app = tmp_path / "app"
    for name in ("facespec", "trt_runtime", "plugins"):
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    told = "import warnings; warnings.showwarning = lambda message, *_, **__: print('told:', message)\n"
    *warned, found = _run(told + detect, tmp_path, app, CXX=compiler).splitlines()
    assert found.startswith("OrtRetinaFace [[")
    assert len(warned) == len(words)
    for line, word in zip(warned, words, strict=True):
        assert re.search(word, line)


def test_an_application_may_have_folders_and_modules_of_our_names(detect: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    for name in ("export.py", "trainer.py"):
        (tmp_path / name).write_text("raise RuntimeError('this is the application')")
    assert _run(detect, tmp_path, tmp_path, ROOT) == expected
    (tmp_path / "plugins" / "__init__.py").touch()
    (tmp_path / "plugins" / "build.py").touch()
    assert _run(f"import plugins.build\n{detect}", tmp_path, tmp_path, ROOT) == expected
