"""What python -m plugins.build and CMake make, with the compilers at hand."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

import plugins.build
from facespec.errors import BuildError, MissingToolError, OutputError
from plugins.build import (
    ARCHITECTURES,
    build,
    ensure,
    find_compiler,
    find_library,
    find_nvcc,
    find_tensorrt_headers,
    is_current,
    library_path,
    main,
    read_report,
    sources_sha256,
)
from trt_runtime.gpu.flavor import gpu_capability
from trt_runtime.kernels import PLUGIN

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plugin() -> Path:
    """The plugin library, built if it is not up to date."""
    try:
        find_nvcc(), find_tensorrt_headers()
    except MissingToolError as error:
        pytest.skip(str(error))
    return ensure("plugin")


@pytest.fixture
def small_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host's library be one small source: what is tested is when it is made, not what of."""
    monkeypatch.setitem(plugins.build.TARGETS, "host", ("check.cpp",))
    monkeypatch.delenv("CXX", raising=False)


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


def test_the_library_stands_alone(device_library: Path) -> None:
    dynamic = subprocess.run(["readelf", "-d", device_library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", dynamic))
    assert needed <= {"libc", "libm", "libdl", "libpthread", "librt", "ld-linux-x86-64", "ld-linux-aarch64"}
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", device_library], capture_output=True, text=True, check=True
    ).stdout
    ours = {"getCreators", "setLoggerFinder", "retinaface_check", "retinaface_launch", "retinaface_workspace_bytes"} | {
        "retinaface_letterbox"
    }
    assert {line.split()[-1] for line in symbols.splitlines() if " T " in line} == ours


def _compile_driver(source: Path, program: Path) -> None:
    include = ["-isystem", find_tensorrt_headers()[0], f"-I{plugins.build.ROOT / 'include'}"]
    nvcc = find_nvcc()
    flags = ["-std=c++17", *include, *plugins.build.toolkit_paths(nvcc)]
    subprocess.run([nvcc, *flags, "-Xlinker", "--export-dynamic", source, "-o", program, "-ldl"], check=True)


def test_the_plugin_through_its_interfaces(device_library: Path, tmp_path: Path) -> None:
    """Creation, serialisation, formats, shapes and workspace, driven by a C++ program as TensorRT would."""
    _compile_driver(Path(__file__).with_name("plugin_main.cpp"), tmp_path / "plugin_main")
    result = subprocess.run([tmp_path / "plugin_main", device_library], capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"{PLUGIN.name} {PLUGIN.version} {PLUGIN.namespace}", "passed"], result.stderr
    assert result.stderr.count(PLUGIN.name) >= 17  # each refusal says why


def test_what_drives_the_plugin_on_a_gpu_compiles(device_library: Path, tmp_path: Path) -> None:
    """`make test-gpu` runs it; here it finds no GPU, or passes."""
    _compile_driver(ROOT / "tests" / "gpu" / "plugin_main.cpp", tmp_path / "plugin_main")
    result = subprocess.run([tmp_path / "plugin_main", device_library], capture_output=True, text=True)
    assert result.returncode == (2 if gpu_capability() is None else 0), result.stdout


@pytest.mark.skipif("TENSORRT_HEADERS" not in os.environ, reason="TENSORRT_HEADERS names no folders of headers")
def test_the_plugin_compiles_with_the_headers_of_every_version() -> None:
    """In each folder of $TENSORRT_HEADERS, a pattern such as headers/*/include, of TensorRT 10.0 and later."""
    folders = sorted(glob.glob(os.environ["TENSORRT_HEADERS"]))
    assert folders
    include = [f"-I{plugins.build.ROOT / name}" for name in ("include", "src")]
    flags = ["-std=c++17", "-c", "-Xcompiler", "-fsyntax-only,-Wall,-Wextra,-Werror", "-o", os.devnull, *include]
    for folder in folders:
        plugins.build._call([find_nvcc(), *flags, "-isystem", folder, plugins.build.ROOT / "src" / "plugin.cpp"])


@pytest.mark.slow
def test_cmake_makes_the_same_library(tmp_path: Path) -> None:
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    try:
        find_nvcc(), find_tensorrt_headers()
    except MissingToolError as error:
        pytest.skip(str(error))
    # it asks the same search as the tests, through the Python that comes first
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    build = [
        "cmake",
        "-S",
        str(ROOT / "plugins"),
        "-B",
        str(tmp_path),
        "-DCMAKE_CUDA_ARCHITECTURES=86-virtual",  # without ptxas
    ]
    for command in (build, ["cmake", "--build", str(tmp_path)]):
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
    library = ctypes.CDLL(str(tmp_path / library_path().name))
    for name in ("getCreators", "setLoggerFinder", "retinaface_launch"):
        assert hasattr(library, name)
    text = (ROOT / "plugins" / "CMakeLists.txt").read_text()
    assert re.findall(r"src/(\w+\.c\w+)", text) == list(plugins.build.TARGETS["plugin"])
    assert text.count("-ffp-contract=off") == 2


@pytest.mark.usefixtures("small_host")
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
    for text in ("not JSON", "[1]", "null"):
        report.write_text(text)
        assert read_report(path) == {}
        assert not is_current("host", path.parent)
    assert ensure("host") == path
    assert is_current("host", path.parent)
    os.truncate(path, 3000)
    ctypes.CDLL(str(ensure("host")))
    assert sorted(os.listdir(path.parent)) == ["libretinaface_host.json", "libretinaface_host.so"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("small_host")
def test_where_the_package_cannot_be_written_the_cache_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.build, "LIBRARY_FOLDER", Path("/proc/retinaface/lib"))  # nobody may write there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = ensure("host")
    assert path == library_path("host", tmp_path / "retinaface-trt" / "lib")
    first = path.stat().st_mtime_ns
    assert ensure("host").stat().st_mtime_ns == first


def test_fewer_architectures_are_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who builds for one GPU does not have it built again for all. Of the sources one kernel will do."""
    try:
        find_nvcc()
    except MissingToolError as error:
        pytest.skip(str(error))
    monkeypatch.setitem(plugins.build.TARGETS, "kernels", ("letterbox.cu",))
    assert main(["kernels", "--compute-capability", "86,86", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    path = library_path("kernels", tmp_path)
    assert is_current("kernels", tmp_path)
    assert not is_current("kernels", tmp_path / "other")
    report = read_report(path)
    assert (report["architectures"], report["left_out"], report["headers"]) == ([86], [], "")
    assert report["library_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    (row,) = report["kernels"]  # type: ignore[misc]
    committed = json.loads((ROOT / "benchmarks" / "results" / "plugin_kernels.json").read_text())
    if committed["compiler"] == report["compiler_version"]:
        assert row == next(r for r in committed["results"] if (r["kernel"], r["sm"]) == ("letterbox", 86))
    assert said.splitlines()[0] == "compiling letterbox.cu"
    assert "machine code for sm_86; PTX of compute_90 for later GPUs" in said
    assert f"wrote {path}: " in said
    assert "note:" not in said  # nothing is spilled
    monkeypatch.setitem(plugins.build.TARGETS, "kernels", ("letterbox.cu", "check.cpp"))
    assert not is_current("kernels", tmp_path)


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN10retinaface13finish_kernelINS_4HalfEEEvNS_7ProblemIT_EE' for 'sm_75'
ptxas info    : Function properties for _ZN10retinaface13finish_kernelINS_4HalfEEEvNS_7ProblemIT_EE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 63 registers, used 1 barriers, 45816 bytes smem, 640 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN10retinaface11scan_kernelIfEEvNS_7ProblemIT_EE' for 'sm_86'
ptxas info    : Function properties for _ZN10retinaface11scan_kernelIfEEvNS_7ProblemIT_EE
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 40 registers, 640 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN10retinaface16letterbox_kernelENS_13LetterboxCallE' for 'sm_86'
ptxas info    : Function properties for _ZN10retinaface16letterbox_kernelENS_13LetterboxCallE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, 2048 bytes smem, 392 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5other' for 'sm_86'
ptxas info    : Function properties for _Z5other
    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 9 registers, 392 bytes cmem[0]
"""

NVCC = """#!/bin/sh
case "$1" in
  --list-gpu-arch) printf 'compute_75\\ncompute_86\\n%s\\n' "$MORE";;
  --version) printf 'nvcc: NVIDIA (R) Cuda compiler driver\\nCuda compilation tools, release 12.4, V12.4.1\\nx\\n';;
  *) cat "$HERE/ptxas" >&2
     printf '%s\\n' "$@" > "$HERE/arguments"
     while [ "$1" != -o ]; do shift; done
     printf '\\177ELF' > "$2";;
esac
"""


@pytest.mark.parametrize("newer", [True, False])
def test_what_an_older_nvcc_is_asked_for(
    newer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in that knows few architectures, and says what it was called with."""
    nvcc = tmp_path / "bin" / "nvcc"
    for place in (nvcc, tmp_path / "lib" / "libcudart_static.a", tmp_path / "include" / "NvInferRuntime.h"):
        place.parent.mkdir()
        place.touch()
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    (tmp_path / "ptxas").write_text(PTXAS)
    version = "#define NV_TENSORRT_MAJOR TRT_MAJOR\n#define TRT_MAJOR 10\n#define NV_TENSORRT_MINOR 3\n"
    (tmp_path / "include" / "NvInferVersion.h").write_text(version + "#define NV_TENSORRT_PATCH 1 // last\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path / "include"))
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("MORE", "compute_90" if newer else "")
    assert find_tensorrt_headers() == (tmp_path / "include", "10.3.1")
    assert main(["plugin", "--out", str(tmp_path / "out")]) == 0
    report = read_report(library_path("plugin", tmp_path / "out"))
    known = [75, 86, 90] if newer else [75, 86]
    assert report["architectures"] == known
    assert report["left_out"] == [a for a in ARCHITECTURES if a not in known]
    assert plugins.build.cmake_architectures(str(nvcc)) == ["75-real", "86-real", *["90"] * newer]
    assert is_current("plugin", tmp_path / "out")
    assert (report["compiler"], report["headers"]) == (str(nvcc), str(tmp_path / "include"))
    assert report["compiler_version"] == "Cuda compilation tools, release 12.4, V12.4.1"
    assert report["headers_version"] == "10.3.1"
    arguments = (tmp_path / "arguments").read_text().splitlines()
    codes = [arguments[index + 1] for index, word in enumerate(arguments) if word == "-gencode"]
    expected = [f"arch=compute_{a},code=sm_{a}" for a in known]
    assert codes == expected + ["arch=compute_90,code=compute_90"] * newer
    for flag, value in (("-ccbin", find_compiler()), ("-L", tmp_path / "lib"), ("-isystem", tmp_path / "include")):
        assert arguments[arguments.index(flag) + 1] == str(value)
    assert [Path(a).name for a in arguments if a.endswith((".cu", ".cpp"))] == list(plugins.build.TARGETS["plugin"])
    assert f"-I{plugins.build.ROOT / 'include'}" in arguments
    rows = [tuple(row.values()) for row in report["kernels"]]  # type: ignore[attr-defined]
    assert rows == [
        ("finish", "fp16", 75, 63, 0, 0, 45816),
        ("letterbox", "", 86, 56, 0, 0, 2048),
        ("scan", "fp32", 86, 40, 16, 32, 0),
    ]
    said = capsys.readouterr().out
    assert "left out, this nvcc does not know them: sm_80 sm_87 sm_89" in said
    assert "note: registers are spilled in 1 of 3 kernels: see libretinaface_plugin.json" in said
    assert f"TensorRT   headers 10.3.1 in {tmp_path / 'include'}" in said
    with pytest.raises(BuildError, match=r"knows none of the architectures \[100, 120\]"):
        build("kernels", (100, 120), tmp_path / "out")
    with pytest.raises(BuildError, match=r"--compute-capability 75,100,120: .* does not know 100,120"):
        main(["kernels", "--compute-capability", "75,100,120"])
    for text in ("", "sm_86", "86,", "7", "1000", "86 89", "८६"):
        with pytest.raises(SystemExit) as left:
            main(["kernels", "--compute-capability", text])
        assert left.value.code == 2
        assert re.search(r"--compute-capability: .*: give numbers like 75,86,89", capsys.readouterr().err)


def test_headers_that_are_too_old_or_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    for major, fits in ((9, False), (10, True), (11, True)):
        (tmp_path / "NvInferVersion.h").write_text(f"#define NV_TENSORRT_MAJOR {major}\n")
        if major == 9:
            with pytest.raises(MissingToolError, match=re.escape(f"TENSORRT_INCLUDE_DIR={tmp_path}")):
                find_tensorrt_headers()  # one file of two
            (tmp_path / "NvInferRuntime.h").touch()
        if fits:
            assert find_tensorrt_headers() == (tmp_path, f"{major}.0.0")
        else:
            with pytest.raises(MissingToolError, match=r"are 9\.0\.0, IPluginV3 needs 10\.0: pip install"):
                find_tensorrt_headers()


def test_headers_are_found_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    try:
        folder, version = find_tensorrt_headers()
    except MissingToolError as error:
        pytest.skip(str(error))
    assert (folder / "NvInferRuntime.h").is_file()
    assert 10 <= int(version.split(".")[0]) < 20
    assert len(version.split(".")) == 3
    assert "kernel_lens" not in sys.modules  # it would bring torch and triton


def test_how_the_plugin_is_named_in_graphs() -> None:
    """Files that were exported hold these names; those that TensorRT asks for are compared with the library's below."""
    assert (PLUGIN.name, PLUGIN.version, PLUGIN.namespace) == ("RetinaFaceDecodeNMS", "2", "retinaface_trt")
    assert (PLUGIN.domain, PLUGIN.node) == ("trt.plugins", "decode_nms")


def test_a_change_of_any_source_or_setting_changes_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("src", "include"):
        shutil.copytree(plugins.build.ROOT / folder, tmp_path / folder)
    before = sources_sha256("plugin", (75, 86))
    monkeypatch.setattr(plugins.build, "ROOT", tmp_path)
    assert sources_sha256("plugin", (75, 86)) == before
    found = {before, sources_sha256("plugin", (75,)), sources_sha256("kernels", (75, 86)), sources_sha256("host")}
    for name in ("src/arithmetic.h", "include/letterbox.h", "src/plugin.cpp"):
        with (tmp_path / name).open("a") as file:
            file.write(" ")
        found.add(sources_sha256("plugin", (75, 86)))
    (tmp_path / "src" / "check.cpp").rename(tmp_path / "src" / "chekc.cpp")
    found.add(sources_sha256("plugin", (75, 86)))
    for flags in ("HOST_FLAGS", "NVCC_FLAGS"):
        monkeypatch.setattr(plugins.build, flags, (*getattr(plugins.build, flags), "-g"))
        found.add(sources_sha256("plugin", (75, 86)))
    assert len(found) == 10


@pytest.mark.usefixtures("small_host")
def test_a_library_in_the_cache_serves_where_the_package_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins.build, "LIBRARY_FOLDER", tmp_path / "lib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = tmp_path / "retinaface-trt" / "lib"
    assert find_library("host") is None
    report = build("host", folder=cached)
    assert report.library == "libretinaface_host.so"
    assert (report.architectures, report.kernels, report.headers) == ((), (), "")
    assert str(report) == f"compiler   {find_compiler()} ({report.compiler_version})"
    assert "g++" in report.compiler_version
    assert find_library("host") == ensure("host") == library_path("host", cached)
    build("host", folder=tmp_path / "lib")
    assert find_library("host") == library_path("host", tmp_path / "lib")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo 'x.cpp:1: note: y'; echo 'x.cpp:2: error: first'; echo 'x.cpp:3: error: second'",
            "error: first",
        ),
        ("echo 'undefined reference'; echo 'collect2: error: ld returned 1 exit status'", "undefined reference"),
        ("echo 'y'; echo 'write: No space left on device'; echo 'z'", "write: No space left on device"),
        ("echo one; echo two", "two"),
        ("true", "it does not say why"),
    ],
)
def test_why_a_compiler_failed(script: str, message: str, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        f"#!/bin/sh\ntouch $TMPDIR/rest; echo $TMPDIR > {tmp_path}/where\n{{ {script}; }} >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    with pytest.raises(BuildError) as caught:
        plugins.build._call([compiler])
    assert str(caught.value).startswith("c++ failed: ")
    assert str(caught.value).endswith(message)
    assert not Path((tmp_path / "where").read_text().strip()).exists()  # what a stopped compiler leaves behind goes
    assert plugins.build._call(["sh", "-c", "echo a; echo b >&2"]) == "a\nb\n"


def test_what_is_missing_is_named(
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "apt install g++" in refused("plugins.build", "host", env={"CXX": "no-such-compiler"})

    def fails(*arguments: object, env: dict[str, str] | None = None) -> str:
        with monkeypatch.context() as patch, pytest.raises(BuildError) as caught:  # noqa: PT012
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            main([str(argument) for argument in arguments])
        return str(caught.value)

    assert "no C++ compiler (no-such): apt install g++" in fails("host", env={"CXX": "no-such"})
    monkeypatch.setenv("CXX", "")
    assert find_compiler() == Path(shutil.which("g++") or "")
    monkeypatch.delenv("CXX")
    if shutil.which("nvcc"):
        assert "kernel-lens" in fails(env={"TENSORRT_INCLUDE_DIR": str(tmp_path)})
        (tmp_path / "NvInferRuntime.h").touch()
        (tmp_path / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n")
        assert "are 8.6.0, IPluginV3 needs 10.0" in fails(env={"TENSORRT_INCLUDE_DIR": str(tmp_path)})
        assert "does not know 13" in fails("kernels", "--compute-capability", "13,86")
    assert "give numbers" in refused("plugins.build", "--compute-capability", "sm_86")
    assert "is it a C++ compiler" in fails("host", "--out", tmp_path / "o", env={"CXX": "true"})
    with pytest.raises(SystemExit) as caught:
        main(["everything"])
    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        main(["host", "--out", str(tmp_path / "file" / "x")])


def test_what_is_built_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Seen by the errors of the first step of each."""
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such")
    assert library_path() == ROOT / "trt_runtime" / "lib" / "libretinaface_plugin.so"
    for arguments in ([], ["plugin"], ["host", "--compute-capability", "99"]):  # the host has no architecture
        with pytest.raises(MissingToolError, match=r"no C\+\+ compiler"):
            main(arguments)
    assert ARCHITECTURES == (75, 80, 86, 87, 89, 90, 100, 110, 120)


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_HOME, CUDA_PATH, PATH, the usual place, then NVIDIA's pip packages, the newest first."""
    places = {
        "pip": tmp_path / "site-packages" / "nvidia" / "cu12" / "bin" / "nvcc",
        "newer pip": tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc",
        "usual": tmp_path / "usual" / "bin" / "nvcc",
        "path": tmp_path / "path" / "nvcc",
        "second home": tmp_path / "second" / "bin" / "nvcc",
        "home": tmp_path / "home" / "bin" / "nvcc",
    }
    monkeypatch.setattr(plugins.build, "SYSTEM_CUDA", tmp_path / "usual")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "second"))
    with pytest.raises(MissingToolError, match=re.escape("pip install -e '.[nvcc]'")):
        find_nvcc()
    for place in places.values():
        place.parent.mkdir(parents=True)
        place.touch()
        place.chmod(0o644)
        with pytest.raises(MissingToolError) if place == places["pip"] else nullcontext():
            assert find_nvcc() != place  # nobody can run it
        place.chmod(0o755)
        assert find_nvcc() == place


def test_a_compiler_error_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: it does not compile' >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert "it does not compile" in refused(
        "plugins.build", "host", "--out", tmp_path / "lib", env={"CXX": str(compiler)}
    )
    assert list((tmp_path / "lib").iterdir()) == []


@pytest.fixture(scope="module")
def triton_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the driver and a library that has the registry."""
    folder = tmp_path_factory.mktemp("triton")
    headers, _ = find_tensorrt_headers()
    flags = ["-std=c++17", "-isystem", headers, "-w", *plugins.build.toolkit_paths(find_nvcc())]
    source = Path(__file__).with_name("triton_main.cpp")
    shared = ["-shared", "-Xcompiler", "-fPIC"]
    subprocess.run([find_nvcc(), *flags, *shared, source, "-o", folder / "registry.so"], check=True)
    subprocess.run([find_nvcc(), *flags, "-DMAIN", source, "-o", folder / "driver", "-ldl"], check=True)
    return folder


@pytest.mark.parametrize("host", ["Triton", "Triton with another TensorRT", "another host"])
def test_in_triton_the_library_registers_itself(
    device_library: Path, triton_parts: Path, tmp_path: Path, host: str
) -> None:
    """Triton opens plugin libraries and calls nothing in them. Elsewhere loadLibrary registers, and once is enough.

    libnvinfer and Triton's backend are stand-ins with their names; the registry has the layout of the real headers.
    """
    major = int(find_tensorrt_headers()[1].split(".")[0]) + (host == "Triton with another TensorRT")
    nvinfer, driver = tmp_path / f"libnvinfer.so.{major}", triton_parts / "driver"
    backend = tmp_path / ("libother.so" if host == "another host" else "libtriton_tensorrt.so")
    shutil.copy(triton_parts / "registry.so", nvinfer)
    subprocess.run([find_compiler(), "-shared", "-Wl,--no-as-needed", nvinfer, "-o", backend], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    line = [driver, backend, device_library, nvinfer]
    result = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout
    registered = f"{PLUGIN.name} {PLUGIN.version} {PLUGIN.namespace}\n"
    assert result.stdout == (registered if host == "Triton" else "")
    assert ("headers of another TensorRT" in result.stderr) == (host == "Triton with another TensorRT")
