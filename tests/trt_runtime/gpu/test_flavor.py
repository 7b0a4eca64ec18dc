"""Which TensorRT is taken, and what its child processes find."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from facespec.errors import MissingPackageError
from tests.engines import RTX_BITS
from trt_runtime.gpu.flavor import FLAVORS, RTX, TENSORRT, Flavor, child_environment, find_flavor, gpu_capability

ROOT = Path(__file__).parents[3]


def test_gpu_capability_agrees_with_torch() -> None:
    expected = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        expected = 10 * major + minor
    if torch.version.cuda or expected is None:
        assert gpu_capability() == expected


@pytest.mark.skipif(not RTX.installed(), reason="TensorRT-RTX is not installed (Linux on x86_64 only)")
def test_rtx_in_a_child_process() -> None:
    """The child finds the library by the bare name that the parser opens; afterwards the folder of links is gone."""
    code = (
        "import ctypes, tensorrt_rtx; ctypes.CDLL('libtensorrt_rtx.so'); ctypes.CDLL('libtensorrt_onnxparser_rtx.so'); "
        "print(tensorrt_rtx.__version__)"
    )
    with child_environment(RTX) as environment:
        folder = Path(environment["LD_LIBRARY_PATH"].split(os.pathsep)[0])
        assert folder.is_dir()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == RTX.version()
    assert not folder.exists()
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert plain.returncode != 0  # else the links could go


def test_auto_takes_what_can_build_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if RTX.installed() and gpu_capability() is None:
        assert find_flavor("auto") is RTX
    if not TENSORRT.installed():
        with pytest.raises(MissingPackageError, match=r"pip install -e '\.\[trt\]'"):
            find_flavor("tensorrt")
    monkeypatch.setattr(Flavor, "installed", lambda self: False)
    with pytest.raises(MissingPackageError, match=r"\[rtx\].*\[trt\]"):
        find_flavor("auto")
    monkeypatch.setattr(Flavor, "installed", lambda self: True)
    monkeypatch.setattr("trt_runtime.gpu.flavor.gpu_capability", lambda: 90)
    assert find_flavor("auto") is TENSORRT
    assert find_flavor("rtx") is RTX
    monkeypatch.setattr("trt_runtime.gpu.flavor.gpu_capability", lambda: None)
    assert find_flavor("auto") is RTX  # TensorRT builds for the GPU that is there
    assert find_flavor("tensorrt") is TENSORRT  # who asks for it knows
    monkeypatch.setattr(Flavor, "installed", lambda self: self is TENSORRT)
    with pytest.raises(MissingPackageError, match=r"pip install -e '\.\[rtx\]'"):
        find_flavor("rtx")
    with pytest.raises(MissingPackageError, match="neither TensorRT with a GPU nor TensorRT-RTX"):
        find_flavor("auto")
    monkeypatch.setattr(Flavor, "installed", lambda self: self is RTX)
    monkeypatch.setattr("trt_runtime.gpu.flavor.gpu_capability", lambda: 90)
    assert find_flavor() is RTX
    with pytest.raises(KeyError):
        find_flavor("nonsense")


def test_the_two_flavors() -> None:
    assert FLAVORS == {"tensorrt": TENSORRT, "rtx": RTX}
    assert [(flavor.name, flavor.title, flavor.module, flavor.extra) for flavor in FLAVORS.values()] == [
        ("tensorrt", "TensorRT", "tensorrt", "trt"),
        ("rtx", "TensorRT-RTX", "tensorrt_rtx", "rtx"),
    ]
    assert TENSORRT.capabilities == ()
    assert RTX.capabilities == tuple(number for number in RTX_BITS if number != 80)  # not in its support matrix
    extras = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{flavor.extra} = [" in extras for flavor in FLAVORS.values())


def test_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Flavor("x", "TensorRT-X", "no_such_module_here", "xyz")
    assert not missing.installed()
    assert missing.version() == "?"
    with pytest.raises(MissingPackageError, match=r"^TensorRT-X is not installed: .*pip install -e '\.\[xyz\]'$"):
        missing.require()
    here = Flavor("x", "X", "json", "xyz")
    assert here.installed()
    here.require()
    versions = {"tensorrt": "0", "tensorrt_cu12": "10.12.0", "tensorrt_cu13": "10.14.1"}

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    for expected in ("10.14.1", "10.12.0", "0", "?"):
        assert TENSORRT.version() == expected
        if versions:
            versions.popitem()


def test_the_environment_of_a_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder of links comes first on the path, PYTHONPATH is ours, and our own environment is unchanged."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/some/where")
    monkeypatch.setattr(sys, "path", ["", "/one", "/two"])
    before = dict(os.environ)
    for flavor in (TENSORRT, RTX):
        with child_environment(flavor) as environment:
            folder, rest = environment["LD_LIBRARY_PATH"].split(os.pathsep)
            assert rest == "/some/where"
            assert environment["PYTHONPATH"] == os.pathsep.join(["/one", "/two"])
            assert environment["HOME" if "HOME" in before else "PATH"] == before["HOME" if "HOME" in before else "PATH"]
            links = sorted(path.name for path in Path(folder).iterdir())
            assert links == ([] if flavor is TENSORRT or not _rtx_libraries() else _rtx_libraries())
        assert not Path(folder).exists()
        assert dict(os.environ) == before
    monkeypatch.delenv("LD_LIBRARY_PATH")
    odd = tmp_path / "a:b"
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    with child_environment(TENSORRT) as environment:
        assert environment["LD_LIBRARY_PATH"].startswith("/tmp/")  # a colon would end the path
        assert os.pathsep not in environment["LD_LIBRARY_PATH"]
    plain = tmp_path / "plain"
    plain.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(plain))
    with pytest.raises(KeyError), child_environment(TENSORRT) as environment:  # noqa: PT012
        assert Path(environment["LD_LIBRARY_PATH"]).parent == plain
        raise KeyError
    assert os.listdir(plain) == []


def _rtx_libraries() -> list[str]:
    """Return the bare names of TensorRT-RTX's libraries."""
    import importlib.util

    package = importlib.util.find_spec("tensorrt_rtx_libs")
    places = (package.submodule_search_locations or []) if package else []
    return sorted({f"{path.name.split('.so')[0]}.so" for place in places for path in Path(place).glob("lib*.so.*")})
