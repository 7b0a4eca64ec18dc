"""Compile the CUDA kernels, the TensorRT plugin and the host version of the kernels.

python -m plugins.build             the plugin library, for every architecture
python -m plugins.build kernels     the kernels and their C interface alone: needs no TensorRT headers
python -m plugins.build host        the kernels for the CPU: needs g++ alone
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from facespec.cli import ArgumentParser, argument, run
from facespec.errors import BuildError, MissingToolError, SpecError
from facespec.files import atomic_path, cache_folder, cached_file, is_own_folder, work_folder, write_text

ROOT = Path(__file__).resolve().parent
LIBRARY_FOLDER = ROOT.parent / "trt_runtime" / "lib"
"""Where libraries go, and the runtime looks for them; where it cannot be written, as in a system's site-packages, the
user's cache folder serves."""

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120)
"""Compute capabilities that get machine code: Turing to Blackwell. Later ones run the PTX."""

PTX_ARCHITECTURE = 90

TARGETS = {
    "plugin": ("launch.cu", "letterbox.cu", "check.cpp", "device_api.cpp", "plugin.cpp"),
    "kernels": ("launch.cu", "letterbox.cu", "check.cpp", "device_api.cpp"),
    "host": ("check.cpp", "host_api.cpp", "letterbox_host.cpp"),
}
"""What can be built, and its sources."""

SYSTEM_CUDA = Path("/usr/local/cuda")
HOST_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread")
NVCC_FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-cudart", "static", "--threads", "0", "-Xptxas", "-v"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall"),
    # what the library needs lies within it, so that it loads beside any TensorRT and any C++ runtime
    *("-Xlinker", "--exclude-libs,ALL", "-Xcompiler", "-static-libstdc++,-static-libgcc"),
)
HEADERS_COMMAND = "pip install --no-deps kernel-lens (or apt install libnvinfer-headers-dev)"
NVCC_COMMAND = "in the project's folder, pip install -e '.[nvcc]'"
COMPILER_COMMAND = "apt install g++"


@dataclass(frozen=True)
class BuildReport:
    """What was built, and with what; written beside the library as .json.

    Attributes:
        library: File name.
        machine: What it runs on, for instance x86_64.
        sources_sha256: Of the sources and the settings: a library of other sources is rebuilt.
        compiler: Path of nvcc, or of g++ for the host.
        architectures: Compute capabilities with machine code; empty for the host.
        left_out: Wanted ones that this nvcc does not know.
        headers: Folder of the TensorRT headers.
        kernels: Registers, spills and static shared memory of each kernel, one row for each architecture;
            `heads` is their type, empty for the letterbox.
    """

    target: str
    library: str
    library_sha256: str
    machine: str
    sources_sha256: str
    compiler: str
    compiler_version: str
    architectures: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    headers: str = ""
    headers_version: str = ""
    kernels: tuple[dict[str, int | str], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        lines = [f"compiler   {self.compiler} ({self.compiler_version})"]
        if self.headers:
            lines.append(f"TensorRT   headers {self.headers_version} in {self.headers}")
        if self.architectures:
            names = " ".join(f"sm_{a}" for a in self.architectures)
            lines.append(f"machine code for {names}; PTX of compute_{PTX_ARCHITECTURE} for later GPUs")
        if self.left_out:
            names = " ".join(f"sm_{a}" for a in self.left_out)
            lines.append(f"left out, this nvcc does not know them: {names}")
        return "\n".join(lines)


def library_path(target: str = "plugin", folder: Path | None = None) -> Path:
    """Return where the library of a target belongs."""
    return (folder or LIBRARY_FOLDER) / f"libretinaface_{target}.so"


def find_cuda_tool(name: str, command: str) -> Path:
    """Return a program: on PATH, under CUDA_HOME or CUDA_PATH, in /usr/local/cuda, or of NVIDIA's pip packages.

    Raises:
        MissingToolError: There is none; the message names the command that brings one.
    """
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    pip_roots = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    wheels = [found for root in pip_roots for found in sorted(Path(root).glob("nvidia/cu*/bin"), reverse=True)]
    folders = [*homes, os.environ.get("PATH", os.defpath), SYSTEM_CUDA / "bin", *wheels]
    found = shutil.which(name, path=os.pathsep.join(map(str, folders)))
    if not found:
        raise MissingToolError(
            f"no {name} on PATH, under CUDA_HOME, in {SYSTEM_CUDA} or among the pip packages: {command}"
        )
    return Path(found)


def find_nvcc() -> Path:
    """Return the CUDA compiler; see `find_cuda_tool`."""
    return find_cuda_tool("nvcc", NVCC_COMMAND)


def find_compiler() -> Path:
    """Return the C++ compiler: $CXX, a program without arguments, or g++.

    Raises:
        MissingToolError: There is none.
    """
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if not found:
        raise MissingToolError(f"no C++ compiler ({name}): {COMPILER_COMMAND}")
    return Path(found)


def find_tensorrt_headers() -> tuple[Path, str]:
    """Return the folder of NvInferRuntime.h and its version.

    It looks at $TENSORRT_INCLUDE_DIR, at system installations, then at the package kernel-lens, which carries them.

    Raises:
        MissingToolError: There are none, or they are older than IPluginV3 (10.0).
    """
    chosen = os.environ.get("TENSORRT_INCLUDE_DIR")
    if chosen:
        places = [Path(chosen)]
    else:
        triplet = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
        system = (f"/usr/include/{triplet}", "/usr/include", "/usr/local/tensorrt/include", "/opt/tensorrt/include")
        package = importlib.util.find_spec("kernel_lens")  # not imported: it would bring torch and triton
        carried = (package.submodule_search_locations or []) if package else []
        places = [*map(Path, system), *(Path(folder) / "include" / "tensorrt" for folder in carried)]
    for place in places:
        version_file = place / "NvInferVersion.h"
        if version_file.is_file() and (place / "NvInferRuntime.h").is_file():
            version = _header_version(version_file)
            if int(version.split(".")[0]) < 10:
                raise MissingToolError(
                    f"the TensorRT headers in {place} are {version}, IPluginV3 needs 10.0: {HEADERS_COMMAND}"
                )
            return place, version
    where = f"in TENSORRT_INCLUDE_DIR={chosen}" if chosen else "(NvInferRuntime.h)"
    raise MissingToolError(f"no TensorRT headers {where}: {HEADERS_COMMAND}, or set TENSORRT_INCLUDE_DIR")


def _header_version(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    values: dict[str, str] = dict(re.findall(r"#define\s+(\w+)\s+(\w+)", text))
    numbers = [values.get(f"NV_TENSORRT_{part}", "0") for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(values.get(number, number) for number in numbers)  # some are names of other macros


def sources_sha256(target: str, settings: Sequence[object] = ()) -> str:
    """Return a hash of everything a library is made from but the compiler."""
    digest = hashlib.sha256(repr((target, TARGETS[target], HOST_FLAGS, NVCC_FLAGS, tuple(settings))).encode())
    for path in sorted([*(ROOT / "src").iterdir(), *(ROOT / "include").iterdir()]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _call(command: Sequence[str | Path]) -> str:
    """Run a compiler; return what it printed.

    Raises:
        BuildError: It failed; the message holds its first error.
    """
    with work_folder() as folder:  # nvcc leaves files behind when it is stopped
        environment = {**os.environ, "TMPDIR": str(folder)}
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    output = result.stdout + result.stderr
    if result.returncode:
        lines = [line.strip() for line in output.splitlines() if "ld returned" not in line] or ["it does not say why"]
        errors = [line for line in lines if "error" in line.lower() or "No space" in line]
        raise BuildError(f"{Path(command[0]).name} failed: {(errors or lines[-1:])[0]}")
    return output


def compiler_version(compiler: Path) -> str:
    """Return the line in which a compiler names its version, for instance "Cuda compilation tools, release 13.0"."""
    said = _call([compiler, "--version"]).strip().splitlines() or ["?"]
    return next((line for line in said if "release" in line), said[0]).strip()  # nvcc names itself first


def cmake_architectures(nvcc: str) -> list[str]:
    """Return what CMAKE_CUDA_ARCHITECTURES is by default: all of ours that an nvcc knows, and PTX."""
    known = _supported(Path(nvcc), ARCHITECTURES)
    return [str(number) if number == PTX_ARCHITECTURE else f"{number}-real" for number in known]


def _supported(nvcc: Path, wanted: Sequence[int]) -> tuple[int, ...]:
    known = {int(number) for number in re.findall(r"compute_(\d+)", _call([nvcc, "--list-gpu-arch"]))}
    return tuple(architecture for architecture in wanted if architecture in known)


def _resources(log: str) -> tuple[dict[str, int | str], ...]:
    """Return registers, spills and shared memory of each kernel from the report of ptxas."""
    rows = []
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<sm>\d+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for found in pattern.finditer(log):
        kernel = re.search(r"(scan|finish|letterbox)_kernel(I[fN])?", found["name"])
        if kernel is None:
            continue
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        rows.append(
            {
                "kernel": kernel[1],
                "heads": {"If": "fp32", "IN": "fp16", None: ""}[kernel[2]],
                "sm": int(found["sm"]),
                "registers": int(found["registers"]),
                "stack_bytes": int(found["stack"]),
                "spill_bytes": int(found["stores"]) + int(found["loads"]),
                "static_shared_bytes": int(shared[1]) if shared else 0,
            }
        )
    return tuple(sorted(rows, key=lambda row: (row["kernel"], row["heads"], row["sm"])))


def build(
    target: str = "plugin", architectures: Sequence[int] = ARCHITECTURES, folder: Path | None = None
) -> BuildReport:
    """Compile a library with code for these compute capabilities, to `LIBRARY_FOLDER` unless given; return its report.

    Raises:
        MissingToolError: A compiler or header is missing.
        BuildError: A compiler failed.
        OutputError: The folder cannot be written.
    """
    out = library_path(target, folder)
    compiler = tool = find_compiler()
    digest = sources_sha256(target, sorted(architectures) if target != "host" else ())
    flags: list[str | Path] = [*HOST_FLAGS, "-shared"]
    supported: tuple[int, ...] = ()
    headers: Path | None = None
    headers_version = ""
    if target != "host":
        tool = find_nvcc()
        if target == "plugin":
            headers, headers_version = find_tensorrt_headers()
        supported = _supported(tool, architectures)
        if not supported:
            raise BuildError(f"{tool} knows none of the architectures {list(architectures)}")
        flags = [*NVCC_FLAGS, "-ccbin", compiler, *toolkit_paths(tool)]
        flags += ["-isystem", headers] if headers else []
        for architecture in supported:
            flags += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
        if _supported(tool, (PTX_ARCHITECTURE,)):
            flags += ["-gencode", f"arch=compute_{PTX_ARCHITECTURE},code=compute_{PTX_ARCHITECTURE}"]
    include = [f"-I{ROOT / 'include'}", f"-I{ROOT / 'src'}"]
    with atomic_path(out) as temporary:
        log = _call([tool, *flags, *include, *(ROOT / "src" / name for name in TARGETS[target]), "-o", temporary])
    report = BuildReport(
        target,
        library=out.name,
        library_sha256=_sha256(out),
        machine=platform.machine(),
        sources_sha256=digest,
        compiler=str(tool),
        compiler_version=compiler_version(tool),
        architectures=supported,
        left_out=() if target == "host" else tuple(a for a in architectures if a not in supported),
        headers=str(headers or ""),
        headers_version=headers_version,
        kernels=_resources(log),
    )
    if not out.read_bytes().startswith(b"\x7fELF"):
        raise BuildError(f"{compiler} made no library of the sources: is it a C++ compiler?")
    write_text(out.with_suffix(".json"), json.dumps(asdict(report), indent=2) + "\n")
    return report


def toolkit_paths(nvcc: Path) -> list[str | Path]:
    """Return what nvcc from pip packages must be told: its libraries lie in lib, not in lib64."""
    home = nvcc.resolve().parent.parent
    lib = home / "lib"
    return ["-L", lib] if (lib / "libcudart_static.a").is_file() else []


def read_report(library: Path) -> dict[str, object]:
    """Return the report beside a library, or {} if there is none that can be read."""
    try:
        report = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def is_current(target: str = "plugin", folder: Path | None = None) -> bool:
    """Whether the library of a target is there, whole, for this machine, and made of the sources as they are."""
    path = library_path(target, folder)
    report = read_report(path)
    architectures = [*_numbers(report.get("architectures")), *_numbers(report.get("left_out"))]
    try:
        digest = _sha256(path)
    except OSError:  # missing, or not ours to read
        return False
    return (
        report.get("machine") == platform.machine()
        and report.get("sources_sha256") == sources_sha256(target, sorted(architectures))
        and report.get("library_sha256") == digest
    )


def _numbers(value: object) -> list[int]:
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []


def find_library(target: str = "plugin") -> Path | None:
    """Return the library of a target if it is current, in `LIBRARY_FOLDER` or in the user's cache folder."""
    if is_current(target, LIBRARY_FOLDER):
        return library_path(target, LIBRARY_FOLDER)
    cached = cached_file(f"lib/{library_path(target).name}")
    return cached if cached and is_current(target, cached.parent) else None


def ensure(target: str = "plugin") -> Path:
    """Return the library of a target, built anew (see `build`) if it is missing, damaged or of other sources."""
    found = find_library(target)
    if found is None:
        folder = _writable_folder()
        build(target, folder=folder)
        found = library_path(target, folder)
    return found


def _writable_folder() -> Path:
    present = LIBRARY_FOLDER if LIBRARY_FOLDER.is_dir() else LIBRARY_FOLDER.parent
    return LIBRARY_FOLDER if os.access(present, os.W_OK) else cache_folder() / "lib"


def destination(target: str = "plugin") -> str:
    """Say where `ensure` would write a library, and for how long it is kept."""
    folder = _writable_folder()
    if folder != LIBRARY_FOLDER and is_own_folder(folder.parent):
        return (
            f"neither {LIBRARY_FOLDER} nor the cache folder can be written, so that it is gone when this process ends; "
            "set XDG_CACHE_HOME to a folder of yours to keep it"
        )
    return f"it is kept as {library_path(target, folder)}"


def parse_capabilities(text: str) -> tuple[int, ...]:
    """Return compute capabilities, ascending and each once, from a list such as "75,86,89".

    Raises:
        SpecError: Not of this form.
    """
    if not re.fullmatch(r"\d{2,3}(,\d{2,3})*", text, re.ASCII):
        raise SpecError(f"{text!r}: give numbers like 75,86,89")
    return tuple(sorted({int(number) for number in text.split(",")}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = ArgumentParser(
        prog="python -m plugins.build",
        description="Compile the CUDA kernels. It needs a C++ compiler; for the GPU also nvcc (PATH, "
        f"CUDA_HOME, /usr/local/cuda, or pip: {NVCC_COMMAND}); for the TensorRT plugin also TensorRT's headers "
        f"(TENSORRT_INCLUDE_DIR, a system installation, or {HEADERS_COMMAND}).",
    )
    parser.add_argument("target", nargs="?", default="plugin", choices=list(TARGETS), help="what to build")
    parser.add_argument(
        "--compute-capability",
        type=argument(parse_capabilities),
        metavar="LIST",
        help=f"compute capabilities that get machine code (default: {','.join(map(str, ARCHITECTURES))}, those of them "
        "that nvcc knows)",
    )
    parser.add_argument("--out", type=Path, default=LIBRARY_FOLDER, help="folder to write to")
    args = parser.parse_args(argv)
    architectures = args.compute_capability or ARCHITECTURES
    if args.compute_capability and args.target != "host":
        nvcc = find_nvcc()
        unknown = sorted(set(architectures) - set(_supported(nvcc, architectures)))
        if unknown:
            asked, lacking = (",".join(map(str, numbers)) for numbers in (architectures, unknown))
            raise BuildError(f"--compute-capability {asked}: {nvcc} does not know {lacking}")
    start = time.perf_counter()
    print(f"compiling {', '.join(TARGETS[args.target])}", flush=True)
    report = build(args.target, architectures, args.out)
    path = library_path(args.target, args.out)
    print(report)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s")
    spilled = [row for row in report.kernels if row["spill_bytes"] or row["stack_bytes"]]
    if spilled:
        print(f"note: registers are spilled in {len(spilled)} of {len(report.kernels)} kernels: see {path.stem}.json")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
