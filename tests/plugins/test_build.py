"""What python -m plugins.build and CMake make, with the compilers at hand."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import plugins.build
from facespec.errors import MissingToolError
from plugins import PLUGIN
from plugins.build import (
    ARCHITECTURES,
    ensure,
    find_compiler,
    find_nvcc,
    find_tensorrt_headers,
    is_current,
    library_path,
    read_report,
)
from trt_runtime.flavor import gpu_capability

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plugin() -> Path:
    """The plugin library, built if it is not up to date."""
    try:
        find_nvcc(), find_tensorrt_headers()
    except MissingToolError as error:
        pytest.skip(str(error))
    return ensure("plugin")


def test_every_architecture_without_spills(plugin: Path) -> None:
    report = read_report(plugin)
    if report["left_out"]:
        pytest.skip(f"{report['compiler_version']} does not know {report['left_out']}")
    kernels = report["kernels"]
    assert isinstance(kernels, list)
    expected = {
        (kernel, heads, sm) for kernel in ("scan", "finish") for heads in ("fp32", "fp16") for sm in ARCHITECTURES
    }
    expected |= {("letterbox", "", sm) for sm in ARCHITECTURES}
    assert {(row["kernel"], row["heads"], row["sm"]) for row in kernels} == expected
    for row in kernels:
        assert row["spill_bytes"] == row["stack_bytes"] == 0, row
        # a multiprocessor has 65,536 registers: one finish block of 1024 threads, three scan blocks of 512
        assert row["registers"] <= (42 if row["kernel"] == "scan" else 64), row
    # what the repository says about them, from the same sources
    table = json.loads((ROOT / "benchmarks" / "results" / "plugin_kernels.json").read_text())
    assert {(row["kernel"], row["heads"], row["sm"]) for row in table["results"]} == expected
    assert table["sources_sha256"] == report["sources_sha256"], "python -m benchmarks.plugin_kernels"


def test_the_library_stands_alone(plugin: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", plugin], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", dynamic))
    assert needed <= {"libc", "libm", "libdl", "libpthread", "librt", "ld-linux-x86-64", "ld-linux-aarch64"}
    symbols = subprocess.run(["nm", "-D", "--defined-only", plugin], capture_output=True, text=True, check=True).stdout
    ours = {"getCreators", "setLoggerFinder", "retinaface_check", "retinaface_launch", "retinaface_workspace_bytes"} | {
        "retinaface_letterbox"
    }
    assert {line.split()[-1] for line in symbols.splitlines() if " T " in line} == ours


def _compile_driver(source: Path, program: Path) -> None:
    include = ["-isystem", find_tensorrt_headers()[0], f"-I{plugins.build.ROOT / 'include'}"]
    nvcc = find_nvcc()
    flags = ["-std=c++17", *include, *plugins.build.toolkit_paths(nvcc)]
    subprocess.run([nvcc, *flags, source, "-o", program, "-ldl"], check=True)


def test_the_plugin_through_its_interfaces(plugin: Path, tmp_path: Path) -> None:
    """Creation, serialisation, formats, shapes and workspace, driven by a C++ program as TensorRT would."""
    _compile_driver(Path(__file__).with_name("plugin_main.cpp"), tmp_path / "plugin_main")
    result = subprocess.run([tmp_path / "plugin_main", plugin], capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"{PLUGIN.name} {PLUGIN.version} {PLUGIN.namespace}", "passed"], result.stderr
    assert result.stderr.count(PLUGIN.name) >= 17  # each refusal says why


def test_what_drives_the_plugin_on_a_gpu_compiles(plugin: Path, tmp_path: Path) -> None:
    """`make test-gpu` runs it; here it finds no GPU, or passes."""
    _compile_driver(ROOT / "tests" / "gpu" / "plugin_main.cpp", tmp_path / "plugin_main")
    result = subprocess.run([tmp_path / "plugin_main", plugin], capture_output=True, text=True)
    assert result.returncode == (2 if gpu_capability() is None else 0), result.stdout


@pytest.mark.slow
def test_cmake_makes_the_same_library(plugin: Path, tmp_path: Path) -> None:
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    # it asks the same search as the tests, through the Python that comes first
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    build = ["cmake", "-S", str(ROOT / "plugins"), "-B", str(tmp_path), "-DCMAKE_CUDA_ARCHITECTURES=86"]
    for command in (build, ["cmake", "--build", str(tmp_path)]):
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
    library = ctypes.CDLL(str(tmp_path / plugin.name))
    for name in ("getCreators", "setLoggerFinder", "retinaface_launch"):
        assert hasattr(library, name)
    # one list of architectures
    text = (ROOT / "plugins" / "CMakeLists.txt").read_text()
    listed = re.search(r"CMAKE_CUDA_ARCHITECTURES ([^)]*)\)\n", text)
    assert listed is not None
    assert tuple(int(name.split("-")[0]) for name in listed[1].split()) == ARCHITECTURES


def test_a_library_is_built_once_and_again_when_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.build, "LIBRARY_FOLDER", tmp_path / "lib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = ensure("host")
    assert path == library_path("host", tmp_path / "lib")
    first = path.stat().st_mtime_ns
    assert ensure("host").stat().st_mtime_ns == first
    report = path.with_suffix(".json")
    for name in ("sources_sha256", "library_sha256", "machine"):
        report.write_text(report.read_text().replace(json.dumps(read_report(path)[name]), '"other"'))
        assert not is_current("host", path.parent)
        assert ensure("host") == path
        assert is_current("host", path.parent)
    report.write_text("not JSON")
    assert read_report(path) == {}
    assert ensure("host") == path
    os.truncate(path, 3000)
    ctypes.CDLL(str(ensure("host")))
    assert sorted(os.listdir(path.parent)) == ["libretinaface_host.json", "libretinaface_host.so"]
    assert not (tmp_path / "cache").exists()


def test_where_the_package_cannot_be_written_the_cache_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.build, "LIBRARY_FOLDER", Path("/proc/retinaface/lib"))  # nobody may write there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = ensure("host")
    assert path == library_path("host", tmp_path / "retinaface-trt" / "lib")
    first = path.stat().st_mtime_ns
    assert ensure("host").stat().st_mtime_ns == first


def test_fewer_architectures_are_as_good(plugin: Path, tmp_path: Path) -> None:
    """Who builds for one GPU does not have it built again for all."""
    plugins.build.build("kernels", (86,), tmp_path)
    assert is_current("kernels", tmp_path)
    assert read_report(library_path("kernels", tmp_path))["architectures"] == [86]


def test_what_is_missing_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "apt install g++" in refused("plugins.build", "host", env={"CXX": "no-such-compiler"})
    assert "kernel-lens" in refused("plugins.build", env={"TENSORRT_INCLUDE_DIR": str(tmp_path)})
    (tmp_path / "NvInferRuntime.h").touch()
    (tmp_path / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n")
    assert "IPluginV3 needs 10.0" in refused("plugins.build", env={"TENSORRT_INCLUDE_DIR": str(tmp_path)})
    assert "give numbers" in refused("plugins.build", "--arch", "sm_86")
    assert "does not know 13" in refused("plugins.build", "kernels", "--arch", "13,86")
    assert "is it a C++ compiler" in refused("plugins.build", "host", "--out", tmp_path / "o", env={"CXX": "true"})
    assert "invalid choice" in refused("plugins.build", "everything")
    assert "cannot be written" in refused("plugins.build", "host", "--out", tmp_path / "NvInferVersion.h" / "x")


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_HOME, PATH, the usual place, then NVIDIA's pip packages."""
    places = {
        "pip": tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc",
        "usual": tmp_path / "usual" / "bin" / "nvcc",
        "path": tmp_path / "path" / "nvcc",
        "home": tmp_path / "home" / "bin" / "nvcc",
    }
    monkeypatch.setattr(plugins.build, "SYSTEM_CUDA", tmp_path / "usual")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(MissingToolError, match=re.escape("pip install -e '.[nvcc]'")):
        find_nvcc()
    for place in places.values():
        place.parent.mkdir(parents=True)
        place.touch()
        place.chmod(0o755)
        assert find_nvcc() == place


def test_a_compiler_error_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: it does not compile' >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert "it does not compile" in refused(
        "plugins.build", "host", "--out", tmp_path / "lib", env={"CXX": str(compiler)}
    )
    assert not list((tmp_path / "lib").glob("*")) if (tmp_path / "lib").exists() else True


@pytest.mark.parametrize("host", ["Triton", "Triton with another TensorRT", "another host"])
def test_in_triton_the_library_registers_itself(plugin: Path, tmp_path: Path, host: str) -> None:
    """Triton opens plugin libraries and calls nothing in them. Elsewhere loadLibrary registers, and once is enough.

    libnvinfer and Triton's backend are stand-ins with their names; the registry has the layout of the real headers.
    """
    headers, version = find_tensorrt_headers()
    major = int(version.split(".")[0]) + (host == "Triton with another TensorRT")
    nvinfer, driver = tmp_path / f"libnvinfer.so.{major}", tmp_path / "triton_main"
    backend = tmp_path / ("libother.so" if host == "another host" else "libtriton_tensorrt.so")
    flags = ["-std=c++17", "-isystem", headers, "-w", *plugins.build.toolkit_paths(find_nvcc())]
    source = Path(__file__).with_name("triton_main.cpp")
    shared = ["-shared", "-Xcompiler", "-fPIC", "-Xlinker", f"-soname={nvinfer.name}"]
    subprocess.run([find_nvcc(), *flags, *shared, source, "-o", nvinfer], check=True)
    subprocess.run([find_compiler(), "-shared", "-Wl,--no-as-needed", nvinfer, "-o", backend], check=True)
    subprocess.run([find_nvcc(), *flags, "-DMAIN", source, "-o", driver, "-ldl"], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    line = [driver, backend, plugin, nvinfer]
    result = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout
    registered = f"{PLUGIN.name} {PLUGIN.version} {PLUGIN.namespace}\n"
    assert result.stdout == (registered if host == "Triton" else "")
    assert ("headers of another TensorRT" in result.stderr) == (host == "Triton with another TensorRT")
