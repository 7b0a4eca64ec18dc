"""Everything that needs a GPU, in one command: python -m tests.gpu.

It needs nvcc, g++, python3 with torch (CUDA) and numpy, and this checkout. It builds the kernels for the present GPU,
compares them with the host version bit for bit, runs and times TRTRetinaFace as a whole with a network of torch,
drives the TensorRT plugin where TensorRT's headers are, runs engines where TensorRT is, runs the kernels under
compute-sanitizer and times them. What cannot run is named with the reason. Without a GPU TRTRetinaFace runs on the
simulated device.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from facespec.cli import ArgumentParser, run
from facespec.errors import BuildError, MissingToolError
from facespec.files import check_outputs, write_text
from plugins.build import find_compiler, find_nvcc, find_tensorrt_headers, read_report, toolkit_paths
from tests.gpu.kernel import ROOT, build_kernels, capability, gpu_problem
from trt_runtime import kernels
from trt_runtime.gpu.flavor import FLAVORS, TENSORRT

RESULT = ROOT / "benchmarks" / "results" / "gpu_kernel.json"
RUNTIME_RESULT, DETECTOR_RESULT = "gpu_runtime.json", "gpu_detector.json"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TESTS_S, PLUGIN_S, TOOL_S, BENCHMARK_S, OTHERS_S = 180, 60, 60, 150, 600
"""Seconds a step, and for the plugin its compilation too, may take."""
LATENCY_S = 90
WHOLE_S = 470
"""Seconds that all steps together may take, unless --limit says something else."""

ERROR_EXITCODE = 9
NO_BINDINGS = "cuda-bindings is not installed"


@dataclass(frozen=True)
class Step:
    """What came of one step: passed, FAILED or not run."""

    name: str
    state: str
    seconds: float
    note: str = ""


class Clock:
    """The time that is left for all steps together."""

    end = float("inf")

    @classmethod
    def left(cls) -> float:
        """Return the seconds that are left."""
        return cls.end - time.monotonic()


def call(name: str, command: Sequence[object], limit_s: float, read_summaries: bool = False) -> Step:
    """Run a command in the project's folder, its output shown; it fails by its exit code or by running too long.

    Where the time for all steps is over it is not begun.

    Args:
        name: Of the step.
        command: Program and arguments.
        limit_s: Seconds it may take.
        read_summaries: It also fails unless it prints the summaries of compute-sanitizer, and these count no errors.
    """
    print(f"\n== {name}: {' '.join(map(str, command))}", flush=True)
    limit_s = min(limit_s, Clock.left())
    if limit_s < 1:
        return Step(name, "not run", 0, "the time for all steps is over: see --limit")
    start = time.perf_counter()
    required = {} if gpu_problem() else {"RETINAFACE_REQUIRE_GPU": "1"}
    environment = {**os.environ, **required, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE if read_summaries else None,
        stderr=subprocess.STDOUT if read_summaries else None,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it has started ends with it
    )
    note = ""
    try:
        output = process.communicate(timeout=limit_s)[0]
        if process.returncode:
            note = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
        note = f"stopped after {limit_s:.0f} s"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if read_summaries:
        print(output, end="", flush=True)
        counts = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", output)
        if not note and not counts:
            note = "it printed no summary"
        elif not note and any(map(int, counts)):
            note = f"{sum(map(int, counts))} errors or hazards"
    return Step(name, "FAILED" if note else "passed", time.perf_counter() - start, note)


def find_sanitizer() -> Path | None:
    """Return compute-sanitizer: on PATH, or where nvcc and CUDA are."""
    on_path = shutil.which("compute-sanitizer")
    if on_path:
        return Path(on_path)
    homes = [find_nvcc().resolve().parent.parent, Path("/usr/local/cuda")]
    for home in homes:
        for place in (home / "bin" / "compute-sanitizer", home / "compute-sanitizer" / "compute-sanitizer"):
            if os.access(place, os.X_OK):
                return place
    return None


def sanitize(library: Path) -> list[Step]:
    """Run the tools of compute-sanitizer."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("\ncompute-sanitizer: not found on PATH, beside nvcc or in /usr/local/cuda; not run", file=sys.stderr)
        return [Step(tool, "not run", 0, "no compute-sanitizer") for tool in TOOLS]
    steps = []
    for tool in TOOLS:
        options = ["--tool", tool, "--error-exitcode", str(ERROR_EXITCODE), "--target-processes", "all"]
        driver: list[object] = [sys.executable, "-m", "tests.gpu.sanitize", library]
        steps.append(call(tool, [sanitizer, *options, *driver], TOOL_S, read_summaries=True))
    return steps


def plugin_step() -> Step:
    """Build the TensorRT plugin and drive it as TensorRT does; only TensorRT's headers are needed."""
    name = "plugin"
    try:
        headers, _ = find_tensorrt_headers()
    except MissingToolError as error:
        print(f"\n{name}: {error}; not run", file=sys.stderr)
        return Step(name, "not run", 0, str(error))
    start = time.perf_counter()
    try:
        library = build_kernels(capability(), "plugin")
    except BuildError as error:
        return Step(name, "FAILED", time.perf_counter() - start, str(error))
    source, program = Path(__file__).with_name("plugin_main.cpp"), library.with_name("plugin_main")
    nvcc = find_nvcc()
    compiler: list[object] = [nvcc, "-std=c++17", "-cudart", "static", "-ccbin", find_compiler(), *toolkit_paths(nvcc)]
    include: list[object] = ["-isystem", headers, "-I", ROOT / "plugins" / "include"]
    step = call(name, [*compiler, *include, source, "-o", program, "-ldl"], PLUGIN_S)
    if step.state == "passed":
        step = call(name, [program, library], PLUGIN_S)
    return replace(step, seconds=time.perf_counter() - start)


def prepare() -> int:
    """Write what a machine with torch and numpy alone lacks: the published weights and a photograph."""
    import numpy as np

    from tests.gpu.test_detector import load_photograph
    from tests.gpu.torch_engine import KIT, open_model
    from trainer.checkpoint import save_checkpoint

    save_checkpoint(KIT / "mobilenet0.25.pth", open_model())
    np.save(KIT / "astronaut.npy", load_photograph())
    print(
        f"wrote {KIT / 'mobilenet0.25.pth'} and astronaut.npy beside it: python -m tests.gpu reads them where it runs"
    )
    return 0


def kernel_steps(library: Path) -> list[Step]:
    """Test the kernels, the device layer and the plugin on the GPU."""
    report = read_report(library)
    print(f"{library}: {report['compiler']} ({report['compiler_version']})")
    print(f"machine code for sm_{capability()}")
    for kernel in report["kernels"]:  # type: ignore[attr-defined]
        print("  " + ", ".join(f"{key} {value}" for key, value in kernel.items()))
    modules = ["tests.gpu.test_kernel", "tests.gpu.test_letterbox"]
    steps = [call("tests", [sys.executable, "-m", "unittest", "-v", *modules], TESTS_S)]
    if has_cuda_bindings():
        steps.append(call("device", [sys.executable, "-m", "unittest", "-v", "tests.gpu.test_device"], TESTS_S))
    else:
        steps.append(Step("device", "not run", 0, NO_BINDINGS))
    return [*steps, plugin_step()]


def has_cuda_bindings() -> bool:
    """Whether the package that the device layer calls CUDA with is installed."""
    return bool(importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"))


def detector_steps(on_gpu: bool, out: Path) -> list[Step]:
    """Run TRTRetinaFace as a whole with a network of torch, and time it."""
    names, problem = ("detector", "latency"), ""
    if on_gpu and not has_cuda_bindings():
        problem = NO_BINDINGS
    elif not importlib.util.find_spec("torch"):
        problem = "torch is not installed"
    if problem:
        return [Step(name, "not run", 0, problem) for name in names]
    timing = ["--out", out.with_name(DETECTOR_RESULT)] if on_gpu else ["--quick"]
    steps = [
        call(names[0], [sys.executable, "-m", "unittest", "-v", "tests.gpu.test_detector"], TESTS_S),
        call(names[1], [sys.executable, "-m", "tests.gpu.latency", *timing], LATENCY_S),
    ]
    where = "" if on_gpu else "on the simulated device"
    return [replace(step, note=", ".join(filter(None, (step.note, where)))) for step in steps]


def engine_steps() -> list[Step]:
    """Run the other tests that need a GPU, and engines of TensorRT."""
    runtime = "tests/trt_runtime/test_trt_gpu.py"
    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu"]
    missing = [name for name in ("pytest", "cv2", "onnx", "onnxsim") if not importlib.util.find_spec(name)]
    if missing:
        return [Step(name, "not run", 0, f"not installed: {', '.join(missing)}") for name in ("other tests", "engines")]
    steps = [call("other tests", [*pytest, "--ignore", "tests/gpu", "--ignore", runtime], OTHERS_S)]
    if any(flavor.installed() for flavor in FLAVORS.values()):
        return [*steps, call("engines", [*pytest, runtime], OTHERS_S)]
    return [*steps, Step("engines", "not run", 0, "neither TensorRT nor TensorRT-RTX is installed")]


def benchmark_steps(out: Path) -> list[Step]:
    """Time the kernels, and engines where TensorRT is."""
    steps = []
    if TENSORRT.installed() and importlib.util.find_spec("onnxsim"):
        command = [sys.executable, "-m", "benchmarks.gpu_runtime", "--out", out.with_name(RUNTIME_RESULT)]
        steps.append(call("runtime", command, OTHERS_S))
    else:
        steps.append(Step("runtime", "not run", 0, "TensorRT, or what export.to_trt needs, is not installed"))
    return [*steps, call("benchmark", [sys.executable, "-m", "benchmarks.gpu_kernel", "--out", out], BENCHMARK_S)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = ArgumentParser(
        prog="python -m tests.gpu", description="Build, test, sanitize and time the kernels on a GPU."
    )
    parser.add_argument("--prepare", action="store_true", help="write what to carry to a machine with torch alone")
    parser.add_argument("--skip-benchmark", action="store_true", help="no timing")
    parser.add_argument("--skip-sanitizer", action="store_true", help="no compute-sanitizer")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file of the benchmark")
    parser.add_argument("--limit", type=float, default=WHOLE_S, help=f"seconds for all steps (default: {WHOLE_S})")
    args = parser.parse_args(argv)
    Clock.end = time.monotonic() + args.limit
    if args.prepare:
        return prepare()
    out = args.out.resolve()
    problem = gpu_problem()
    if problem:
        print(f"no GPU: {problem}", file=sys.stderr)
        names = ["build", "tests", "device", "plugin", "other tests", "engines", *TOOLS, "runtime", "benchmark"]
        steps = [*detector_steps(False, out), *(Step(name, "not run", 0, problem) for name in names)]
    else:
        if not args.skip_benchmark:
            check_outputs([("--out", out)], [])
        start = time.perf_counter()
        library = build_kernels(capability())
        kernels.library()
        steps = [Step("build", "passed", time.perf_counter() - start)]
        steps += [*kernel_steps(library), *detector_steps(True, out), *engine_steps()]
        skipped = [Step(tool, "not run", 0, "--skip-sanitizer") for tool in TOOLS]
        steps += skipped if args.skip_sanitizer else sanitize(library)
        before = out.stat().st_mtime_ns if out.is_file() else 0
        steps += [Step("benchmark", "not run", 0, "--skip-benchmark")] if args.skip_benchmark else benchmark_steps(out)
        if out.is_file() and out.stat().st_mtime_ns != before:
            record = json.loads(out.read_text(encoding="utf-8"))
            record["checks"] = {step.name: " ".join(filter(None, (step.state, step.note))) for step in steps}
            write_text(out, json.dumps(record, indent=2) + "\n")
    print("\nstep        state     seconds")
    for step in steps:
        print(f"{step.name:<11} {step.state:<9} {step.seconds:7.1f}  {step.note}".rstrip())
    return 1 if any(step.state == "FAILED" for step in steps) else 0


if __name__ == "__main__":
    sys.exit(run(main))
