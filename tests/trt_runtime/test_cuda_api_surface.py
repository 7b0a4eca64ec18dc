"""The GPU's device module on machines without a GPU.

Every name of CUDA's API that it uses is looked up in the real cuda.bindings, with its number of arguments. Then the
real cuda.bindings run it on a fake libcuda over the host's memory (fake_cuda.c), also in contexts and on streams of
PyCUDA's stand-in (fake_pycuda) and, where it is installed, of the real PyCUDA, which `make test-pycuda` builds.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import write_engine

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "trt_runtime" / "gpu" / "cuda.py"

driver = pytest.importorskip("cuda.bindings.driver")


def _used() -> tuple[dict[str, int], set[str]]:
    """Return the functions of CUDA's driver with the arguments given, and its other names."""
    functions: dict[str, int] = {}
    names = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Call):
            words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            for word in words:
                if isinstance(word, str) and re.fullmatch("cu[A-Z]\\w+", word):
                    # self.free(name, handle), weakref.finalize(object, function, ..., name, handle)
                    given = node.args[[ast.unparse(item) for item in node.args].index(repr(word)) + 1 :]
                    functions[word] = len(given)
        if isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
            if "driver" in parts[:-1]:
                names.add(".".join(parts[parts.index("driver") + 1 :]))
            if parts[0] == "attributes":
                names.add(".".join(["CUdevice_attribute", *parts[1:]]))
    return functions, names


def test_the_names_are_really_found() -> None:
    functions, names = _used()
    assert functions["cuMemcpyHtoDAsync"] == 4
    assert functions["cuMemFree"] == 1
    assert functions["cuCtxPopCurrent"] == 0
    assert "CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL" in names
    assert len(functions) > 30


def test_cuda_bindings_have_every_name() -> None:
    functions, names = _used()
    for name, given in functions.items():
        signature = (getattr(driver, name).__doc__ or "").strip().splitlines()[0]
        parameters = re.fullmatch(rf"{name}\((.*)\)", signature)
        assert parameters, signature
        wanted = len(parameters[1].split(",")) if parameters[1] else 0
        assert given == wanted, f"{signature} is given {given} arguments"
    for name in names:
        thing = driver
        for part in name.split("."):
            thing = getattr(thing, part)
    assert not hasattr(driver, "cuMemFrobnicate")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    folder = tmp_path_factory.mktemp("fake")
    source = Path(__file__).with_name("fake_cuda.c")
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *options, source, "-o", folder / "libcuda.so.1", "-ldl", "-lpthread"], check=True)
    return folder


def run(fake: Path, code: str, **settings: str) -> str:
    """Run code on the fake driver; return what it prints. It must leave nothing on stderr, at its exit neither."""
    paths = [settings.pop("PYTHONPATH", None), str(ROOT), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, paths))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake), "PYTHONPATH": path, **settings}
    head = (
        "import ctypes, os, sys; sys.setdlopenflags(os.RTLD_LAZY); live = ctypes.CDLL('libcuda.so.1').fake_cuda_live\n"
        "from trt_runtime.trt import open_device\nfrom facespec.errors import RetinaFaceError\n"
        "from tests.trt_runtime.device_contract import check_device\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + code], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_cuda_does_what_a_device_does(fake: Path) -> None:
    code = """
device = open_device("cuda:1")
assert (device.name, device.compute_capability, device.index) == ("Fake, device 1", 91, 1)
check_device(device, asynchronous=True)
import gc; gc.collect()
print([live(kind) for kind in range(7)])
kept = device
device.close(); device.close()
print(live(0))
"""
    assert run(fake, code) == "[1, 0, 0, 0, 0, 0, 0]\n0\n"


def test_everything_is_freed_at_exit_in_order(fake: Path) -> None:
    code = """
import atexit
atexit.register(lambda: print([live(kind) for kind in range(7)]))
device = open_device()
with device.activate():
    stream, memory, pinned, event = device.stream(), device.allocate(4, "a test"), device.pinned(4), device.event()
    graph = stream.capture(lambda: device.copy_in(memory.address, pinned, stream))
    view = pinned[1:]
print([live(kind) for kind in range(7)])
"""
    assert run(fake, code).splitlines() == ["[6, 1, 1, 1, 1, 0, 1]", "[0, 0, 0, 0, 0, 0, 0]"]


def test_the_context_that_was_current_is_so_again(fake: Path) -> None:
    code = """
from cuda.bindings import driver
first, second = open_device("cuda:0"), open_device("cuda:1")
current = lambda: int(driver.cuCtxGetCurrent()[1])
seen = [current()]
try:
    with first.activate():
        seen.append(current())
        with second.activate():
            seen.append(current())
        seen.append(current())
        raise KeyError
except KeyError:
    seen.append(current())
print(seen[0] == seen[4] == 0, seen[1] == seen[3] != 0, seen[2] not in seen[:2])
"""
    assert run(fake, code) == "True True True\n"


def test_frames_belong_to_a_gpu(fake: Path) -> None:
    code = """
from types import SimpleNamespace
def frame(address):
    return SimpleNamespace(__cuda_array_interface__=dict(version=3, typestr="|u1", shape=(2, 3, 3), data=(address, 0)))
devices = [open_device(f"cuda:{index}") for index in (0, 1)]
kept = []
for device in devices:
    with device.activate():
        kept.append(device.allocate(18, "a frame"))
for device, memory in ((devices[0], kept[0]), (devices[1], kept[1]), (devices[1], kept[0])):
    with device.activate():
        stream = device.stream()
        for address in (memory.address + 17, memory.address + 18):
            try:
                found = device.frame(frame(address), stream)
                print(found.address == address, found.device_index)
            except RetinaFaceError as error:
                print(type(error).__name__, error)
        for number in ("@1", "@2"):  # the GPU is asked for, then the context
            os.environ["FAKE_CUDA_FAIL"] = f"cuPointerGetAttribute=700{number}"
            try:
                device.frame(frame(memory.address), stream)
            except RetinaFaceError as error:
                print(type(error).__name__)
            del os.environ["FAKE_CUDA_FAIL"]
"""
    lines = run(fake, code).splitlines()
    beyond = "FrameError the frame's address 0x"
    assert [lines[0], lines[4]] == ["True 0", "True 1"]
    assert lines[1].startswith(beyond)
    assert "is not in CUDA's memory (CUDA failed (cuPointerGetAttribute: CUDA_ERROR_INVALID_VALUE" in lines[1]
    assert lines[5].startswith(beyond)
    assert lines[8] == "FrameError the frame is on GPU 0, the detector on GPU 1: copy it there first"
    assert lines[2::4] == lines[3::4] == ["KernelFaultError"] * 3  # of a lost device nothing can be said about a frame


@pytest.mark.parametrize("kind", ["SideFrame", "TorchFrame"])
def test_frames_on_a_side_stream_are_read_after_it(fake: Path, tmp_path: Path, kind: str) -> None:
    """Whoever reads them: the log of the driver's calls tells what each copy from a frame comes after."""
    log = tmp_path / "calls.log"
    code = f"""
from tests.trt_runtime.side_streams import {kind}, go_through
device = open_device()
for name, complete in go_through(device, {kind}):
    with open({str(log)!r}, "a") as file:
        print("--", name, file=file)
    print(complete)
"""
    assert run(fake, code, FAKE_CUDA_LOG=str(log)).split() == ["False", "True"] * 4
    parts = re.split("-- (.*)\n", log.read_text())[1:]
    for name, calls in list(zip(parts[::2], parts[1::2], strict=True))[::2]:
        frames, after, marked = set(), set(), {}  # what streams and events come after, of the copies to the frames
        reads = 0
        for thread, call, *given in map(str.split, calls.splitlines()):
            if call == "cuMemcpyHtoDAsync" and not frames:
                side, maker = given[2], thread
            if call == "cuMemcpyHtoDAsync" and given[2] == side:
                frames.add(given[0])
                after |= {side}
            elif call == "cuEventRecord":
                marked[given[0]] = given[1] in after
                assert given[1] != side or thread == maker, name  # only there it is known
            elif call == "cuStreamWaitEvent" and marked[given[1]]:
                after |= {given[0]}
            elif call == "cuMemcpyDtoHAsync" and given[1] in frames:
                assert given[2] in after - {side}, (name, calls)
                reads += 1
        assert reads == (1 if name in ("detect", "pipeline") else 2), (name, calls)


def each(fake: Path, cases: list[tuple[dict[str, str], str]]) -> list[list[str]]:
    """Return what is printed with each of some settings of the driver and statements, all in one process."""
    code = f"""
def capture(stream):
    stream.capture(lambda: None)
for settings, statement in {cases!r}:
    os.environ.update(settings)
    try:
        exec(statement)
    except RetinaFaceError as error:
        print(type(error).__name__, error)
    for name in settings:
        del os.environ[name]
    for name in ("stream", "memory"):
        globals().pop(name, None)
    print(live(0) - ("device" in globals()), "left")
"""
    found, parts = [], list[str]()
    for line in run(fake, code).splitlines():
        if line.endswith(" left"):
            assert line == "0 left", (cases[len(found)], parts, line)
            found.append(parts)
            parts = []
        else:
            parts.append(line)
    return found


HERE_TOO = "; the .onnx file runs on the CPU"


def test_no_gpu(fake: Path) -> None:
    cases = [
        ({"FAKE_CUDA_DEVICES": "0"}, "GpuError no NVIDIA GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES;"),
        ({"FAKE_CUDA_DEVICES": "1"}, "GpuError there is no GPU 1: 1 visible, counted from 0; see CUDA_VISIBLE_DEVICES"),
        (
            {"FAKE_CUDA_VERSION": "11080"},
            "GpuError the NVIDIA driver knows CUDA 11.8, and 12.0 or newer is needed: upd",
        ),
        ({"FAKE_CUDA_VERSION": "11990"}, "GpuError the NVIDIA driver knows CUDA 11.99, and 12.0 or newer is needed"),
        (
            {"FAKE_CUDA_FAIL": "cuInit=34"},
            "GpuError libcuda is the toolkit's stub: take its folder off LD_LIBRARY_PATH",
        ),
        ({"FAKE_CUDA_FAIL": "cuInit=803"}, "GpuError the NVIDIA driver was updated under the running system: reboot"),
        ({"FAKE_CUDA_FAIL": "cuInit=804"}, "GpuError the NVIDIA driver is too old for this CUDA: update it"),
        ({"FAKE_CUDA_FAIL": "cuInit=802"}, "GpuError the GPU's services are not running: start nvidia-fabricmanager"),
        ({"FAKE_CUDA_FAIL": "cuInit=999"}, "GpuError CUDA failed (cuInit: CUDA_ERROR_UNKNOWN, a fake error)"),
    ]
    found = each(fake, [(settings, "open_device('cuda:1')") for settings, _ in cases])
    for index, ((_, expected), lines) in enumerate(zip(cases, found, strict=True)):
        assert len(lines) == 1, lines
        assert lines[0].startswith(expected)
        assert (HERE_TOO in lines[0]) == (index not in (1, 8))  # no such index, and an error nobody knows
    others = [
        ({"FAKE_CUDA_VERSION": "12000"}, "print(open_device('cuda:1').name, open_device('cuda').index)"),
        ({}, "from trt_runtime.gpu.cuda import CudaDevice; CudaDevice(-1)"),
        ({}, "open_device('cuda:2')"),
    ]
    lines = [line for lines in each(fake, others) for line in lines]
    assert lines[0] == "Fake, device 1 0"
    assert lines[1].startswith("GpuError there is no GPU -1: 2 visible, counted from 0")
    assert lines[2].startswith("GpuError there is no GPU 2: 2 visible, counted from 0")


def test_the_driver_must_know_the_cuda_that_compiled_the_plugin(fake: Path, tmp_path: Path) -> None:
    """Before it is loaded, and before nvcc compiles it; a library for other machines need not fit."""
    library, nvcc = tmp_path / "p.so", tmp_path / "nvcc"
    library.touch()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release $RELEASE, V0\n")
    nvcc.chmod(0o755)
    code = f"""
from pathlib import Path
import warnings
from facespec.errors import BuildError
from trt_runtime.kernels import _build_module, ensure_library
warnings.simplefilter("ignore")  # that it takes a minute
build = _build_module()
build.find_library, build.ensure = lambda target: None, lambda target: "compiled"
def show(driver, runs_here=True):
    os.environ["FAKE_CUDA_VERSION"] = driver
    try:
        print(ensure_library("plugin", runs_here=runs_here))
    except BuildError as error:
        print(error)
for os.environ["RELEASE"] in ("13.0", "12.9"):
    show("12080"), show("13000"), show("12080", runs_here=False)
os.environ["RETINAFACE_PLUGIN"] = {str(library)!r}
report = Path({str(library.with_suffix(".json"))!r})
for compiler in ("Cuda compilation tools, release 13.0, V0", "Cuda compilation tools, release 12.9, V0", "g++ 13.0"):
    report.write_text(f'{{{{"compiler_version": "{{compiler}}"}}}}')
    show("12080"), show("13020"), show("12080", runs_here=False)
for text in ("[]", "{{}}", "not JSON"):
    report.write_text(text)
    show("12080")
"""
    settings = {"CUDA_HOME": "", "CUDA_PATH": "", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    lines = run(fake, code, **settings).splitlines()
    mend = (
        "{} needs a driver of CUDA 13.0, and the NVIDIA driver here knows CUDA 12.8: update the driver, or put an nvcc "
        "12.x first on PATH, then python -m plugins.build"
    )
    assert lines[:6] == [mend.format(f"what {nvcc} compiles"), *["compiled"] * 5]
    assert lines[6:] == [mend.format(f"the plugin {library}"), *[str(library)] * 11]


def test_a_detector_takes_the_gpu_it_was_told(fake: Path, tmp_path: Path) -> None:
    code = f"""
from trt_runtime import TRTRetinaFace, load_detector
for call in (
    lambda: TRTRetinaFace({str(write_engine(tmp_path))!r}, device=1),
    lambda: TRTRetinaFace({str(tmp_path / "f.engine")!r}),
    lambda: load_detector({str(tmp_path / "f.engine")!r}, device=1),
    lambda: load_detector({str(tmp_path / "f.engine")!r}, device=2),
):
    try:
        call()
    except RetinaFaceError as error:
        print(type(error).__name__, str(error).split("f.engine: ")[-1])
import gc; gc.collect()
print(live(0))
"""
    lines = run(fake, code).splitlines()
    refused = "ModelFileError built for sm_86, and Fake, device {} is sm_91: build it again for this GPU"
    for line, start in zip(
        lines, [*(refused.format(index) for index in (1, 0, 1)), "GpuError there is no GPU 2"], strict=False
    ):
        assert line.startswith(start)
    assert lines[4] == "0"  # of what was refused nothing is left, its context neither


def test_the_capability_of_the_first_gpu(fake: Path) -> None:
    code = """
from trt_runtime.gpu.flavor import gpu_capability
print(gpu_capability())
for failure in ("cuInit=100", "cuDeviceGet=101", "cuDeviceGetAttribute=1"):
    os.environ["FAKE_CUDA_FAIL"] = failure
    print(gpu_capability())
"""
    assert run(fake, code).split() == ["91", "None", "None", "None"]


def test_what_is_freed_when_cuda_has_gone_is_no_error(fake: Path) -> None:
    """As at the end of a process, when CUDA goes first. `run` wants nothing on stderr."""
    code = """
device = open_device()
with device.activate():
    for make, failure in (
        (device.stream, "cuStreamDestroy=4"),
        (device.event, "cuEventDestroy=4"),
        (lambda: device.allocate(4, "a test"), "cuMemFree=4"),
        (lambda: device.pinned(4), "cuMemFreeHost=4"),
        (lambda: device.allocate(4, "a test"), "cuCtxPushCurrent=4"),
    ):
        thing = make()
        os.environ["FAKE_CUDA_FAIL"] = failure
        del thing
        del os.environ["FAKE_CUDA_FAIL"]
os.environ["FAKE_CUDA_FAIL"] = "cuDevicePrimaryCtxRelease=4"
device.close()
print(live(0))
"""
    assert run(fake, code) == "6\n"


def test_packages_that_are_missing_are_named(fake: Path) -> None:
    code = """
bindings = "cuda.bindings.driver"
for module, place in ((bindings, "cuda"), (bindings, "pycuda"), ("pycuda.driver", "pycuda")):
    sys.modules[module] = None
    try:
        open_device(place)
    except RetinaFaceError as error:
        print(type(error).__name__, error)
    del sys.modules[module]
"""
    lines = run(fake, code, PYTHONPATH=str(Path(__file__).with_name("fake_pycuda"))).splitlines()
    for line in lines[:2]:
        assert line.startswith("MissingPackageError running engines on a GPU needs cuda.bindings.driver, which is not")
        assert line.endswith("pip install -e '.[gpu]'")
    assert lines[2].startswith("MissingPackageError device pycuda needs pycuda.driver, which is not installed")
    assert lines[2].endswith("pip install -e '.[pycuda]'")


def test_a_driver_without_a_function(fake: Path) -> None:
    code = """
try:
    open_device()
except RetinaFaceError as error:
    print(type(error).__name__, error)
"""
    expected = "GpuError the NVIDIA driver is too old for the cuda-bindings here, it has no cuDevicePrimaryCtxRetain: "
    assert run(fake, code, FAKE_CUDA_LACKS="cuDevicePrimaryCtxRetain") == f"{expected}update it{HERE_TOO}\n"


def test_no_driver(tmp_path: Path) -> None:
    code = "from trt_runtime.trt import open_device; open_device()"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if "GpuError" not in done.stderr:
        pytest.skip("there is a driver here")
    last = done.stderr.splitlines()[-1]
    assert re.search(r"GpuError: (there is no NVIDIA driver here|no NVIDIA GPU is visible).*runs on the CPU", last)


LOST = {
    "KernelFaultError a kernel broke this process's CUDA context": (700, 702, 710, 714, 715, 716, 717, 718, 719, 721),
    "DeviceLostError the GPU is lost": (46, 214, 220, 226, 911),
    "DriverGoneError CUDA's driver has left this process": (3, 4, 806, 810),
}
"""Errors after which a context, or the driver, cannot be used any more."""


def test_failures(fake: Path) -> None:
    cases = [
        (
            "cuStreamSynchronize=700",
            "stream.synchronize()",
            "KernelFaultError a kernel broke this process's CUDA context",
        ),
        ("cuMemAlloc=700", "device.allocate(1, 'a test')", "KernelFaultError"),
        (
            "cuMemAlloc=2",
            "device.allocate(1 << 20, 'the heads')",
            "DeviceMemoryError no memory on the device for the h",
        ),
        ("cuMemHostAlloc=2", "device.pinned(100)", "DeviceMemoryError the host has no 100 bytes that can be page-lock"),
        ("cuGraphInstantiate=801", "capture(stream)", "GpuError CUDA failed (cuGraphInstantiate: CUDA_ERROR_NOT_SUPP"),
        ("cuEventCreate=400", "device.event()", "GpuError CUDA failed (cuEventCreate: CUDA_ERROR_INVALID_HANDLE, a f"),
        ("cuStreamWaitEvent=400", "stream.wait_for(1)", "GpuError CUDA failed (cuStreamWaitEvent"),
        (
            "cuStreamCreate=2",
            "device.stream()",
            "DeviceMemoryError no memory left on the GPU (cuStreamCreate: CUDA_ERR",
        ),
    ]
    cases += [
        (f"cuStreamSynchronize={code}", "stream.synchronize()", f"{start} (cuStreamSynchronize: CUDA_ERROR")
        for start, codes in LOST.items()
        for code in codes
    ]
    cases += [
        ("cuStreamSynchronize=709", "stream.synchronize()", "DeviceLostError this process's CUDA context was destroy"),
        ("cuStreamSynchronize=12345", "stream.synchronize()", "GpuError CUDA failed (cuStreamSynchronize: 12345 is n"),
    ]
    head = (
        "device = globals().get('device') or open_device()\nwith device.activate():\n    stream = device.stream()\n    "
    )
    # the failure comes after the stream is there
    head += "os.environ['FAKE_CUDA_FAIL'] = {!r}\n    {}"
    statements = [(dict.fromkeys(["FAKE_CUDA_FAIL"], ""), head.format(failure, call)) for failure, call, _ in cases]
    for (failure, _, expected), lines in zip(cases, each(fake, statements), strict=True):
        assert len(lines) == 1, (failure, lines)
        assert lines[0].startswith(expected), lines
        restart = any(expected.startswith(start[:15]) for start in LOST) and "=709" not in failure
        assert ("start the process again" in lines[0]) == restart


def test_every_error_that_ends_a_process_is_known() -> None:
    """What CUDA's documentation says of them: "the process must be terminated and relaunched"."""
    from trt_runtime.gpu.cuda import FATAL

    ending = {each.name for each in driver.CUresult if "must be terminated" in " ".join((each.__doc__ or "").split())}
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in ending or not driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS.__doc__
    assert ending <= set(FATAL)
    assert set(FATAL) <= {each.name for each in driver.CUresult}


def test_memory_of_a_gpu_is_counted_and_named(fake: Path) -> None:
    code = """
device = open_device()
with device.activate():
    first = device.allocate(300 << 20, "the first")
    print(device.free_and_total())
    try:
        device.allocate(800 << 20, "the second")
    except RetinaFaceError as error:
        print(type(error).__name__, error)
    first.close()
    print(device.free_and_total())
    pinned = device.pinned(4)
    print(ctypes.CDLL('libcuda.so.1').fake_cuda_flags())
    view = pinned[1:]
    del pinned
    print(live(2))
    view[:] = 1  # it is still there
    del view
    print(live(2))
print(ctypes.CDLL('libcuda.so.1').fake_cuda_depth())
"""
    lines = run(fake, code).splitlines()
    assert lines[0] == f"({724 << 20}, {1 << 30})"
    assert lines[1].startswith(
        "DeviceMemoryError no memory on the device for the second: 800.0 MiB asked for, 724.0 MiB of 1.0 GiB free: use"
    )
    assert lines[2] == f"({1 << 30}, {1 << 30})"
    assert lines[3] == "3"  # CU_MEMHOSTALLOC_PORTABLE | _DEVICEMAP: for every context, and within reach of kernels
    assert lines[4:] == ["1", "0", "0"]  # it lives as long as a view of it; and no context is left current


PYCUDA = """
import pycuda.driver as cuda
cuda.init()
context = cuda.Device(0).retain_primary_context()
context.push()
"""


@pytest.fixture(params=["stand-in", "real"])
def pycuda(request: pytest.FixtureRequest) -> dict[str, str]:
    """Settings with which PyCUDA is imported: the stand-in, or the real one."""
    if request.param == "stand-in":
        return {"PYTHONPATH": str(Path(__file__).with_name("fake_pycuda"))}
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("PyCUDA is not installed")
    return {}


def test_pycuda_does_what_a_device_does(fake: Path, pycuda: dict[str, str]) -> None:
    code = f"""
{PYCUDA}
before = live(0)
device = open_device("pycuda")
assert (device.name, device.compute_capability, device.can_capture) == ("Fake, device 0", 91, True)
check_device(device, asynchronous=True)
import gc; gc.collect()
print(live(0) - before, cuda.Context.get_current() == context)
cuda.Context.pop()
"""
    assert run(fake, code, **pycuda) == "0 True\n"


def test_pycudas_own_stream_arrays_and_errors(fake: Path, pycuda: dict[str, str]) -> None:
    code = f"""
try:
    open_device("pycuda")
except RetinaFaceError as error:
    print(error)
{PYCUDA}
import numpy as np
from trt_runtime.gpu.cuda import CudaDevice
own = cuda.Stream(1)
device = CudaDevice(None, own)
with device.activate():
    stream = device.stream()
    print(stream.handle == own.handle)
    stream.close()
    print(own.handle > 0)
    stream = device.stream()
    from pycuda.gpuarray import GPUArray
    array = GPUArray((4, 5, 3), np.uint8)
    found = device.frame(array, stream)
    print(found.address == int(array.gpudata), found.pitch, found.frame_hw, found.device_index, found.owner is array)
    ctypes.CDLL(None).setenv(b"FAKE_CUDA_FAIL", b"cuStreamSynchronize=700", 1)
    try:
        stream.synchronize()
    except RetinaFaceError as error:
        print(type(error).__name__, error)
cuda.Context.pop()
"""
    lines = run(fake, code, **pycuda).splitlines()
    assert lines[0].startswith("there is no current PyCUDA context on this thread")
    assert lines[1:4] == ["True", "True", "True 15 (4, 5) 0 True"]
    assert lines[4].startswith("KernelFaultError a kernel broke this process's CUDA context (cuStreamSynchronize: ")


def test_pycuda_and_frames_of_another_context(fake: Path, pycuda: dict[str, str]) -> None:
    """One GPU, two contexts: of PyCUDA's own, and the primary one, which PyTorch uses."""
    code = """
import pycuda.driver as cuda
from tests.trt_runtime.side_streams import SIDE, SideFrame, TorchFrame
primary = open_device()
cuda.init()
context = cuda.Device(0).make_context()
own = open_device("pycuda")
def frame(memory_of, kind):
    with memory_of.activate():
        memory = memory_of.allocate(SIDE * SIDE * 3, "a frame")
        kept.append(memory)
        return kind(memory_of, memory.address)
kept = []
for kind in (SideFrame, TorchFrame):
    for device in (own, primary):
        for memory_of in (own, primary):
            if kind is TorchFrame and memory_of is own:
                continue  # its memory is in the primary context always
            with device.activate():
                try:
                    print(device.frame(frame(memory_of, kind), device.stream()).device_index)
                except RetinaFaceError as error:
                    print(type(error).__name__, error)
os.environ["FAKE_CUDA_POOL"] = "1"  # as if it came from cuMemAllocAsync, which every context of the GPU reaches
for code in ("1", "0"):
    os.environ["FAKE_CUDA_POOL"] = code
    with own.activate():
        print(own.frame(frame(primary, TorchFrame), own.stream()).device_index)
context.pop()
"""
    refused = (
        "FrameError the frame lies in another CUDA context of GPU 0 than the detector's: let PyCUDA use the primary "
        "one (import pycuda.autoprimaryctx), which all other libraries use"
    )
    assert run(fake, code, **pycuda).splitlines() == ["0", refused, refused, "0", refused, "0", "0", "0"]


def test_pycuda_on_another_gpu(fake: Path, pycuda: dict[str, str]) -> None:
    code = """
import gc, threading
import pycuda.driver as cuda
cuda.init()
context = cuda.Device(1).retain_primary_context()
context.push()
from trt_runtime.gpu.cuda import CudaDevice
from types import SimpleNamespace
def refused(call):
    try:
        call()
    except RetinaFaceError as error:
        print(type(error).__name__, error)
def fail(failure, call):
    os.environ["FAKE_CUDA_FAIL"] = failure
    refused(call)
    del os.environ["FAKE_CUDA_FAIL"]
def other_thread():
    refused(lambda: open_device("pycuda"))
    cuda.Context.get_current() is None or print("a context came along")
    memory.close()  # which frees it, though its context is not current here
    with device.activate():
        device.allocate(4, "a test").close()
    print(ctypes.CDLL("libcuda.so.1").fake_cuda_depth(), live(1))
device = open_device("pycuda")
print(device.index, device.name, device.compute_capability, device.can_capture)
with device.activate():
    pinned = device.pinned(4)
    view = pinned[1:]
    del pinned
    print(live(2))
    del view
    print(live(2))
    first, second, spot, page = device.stream(), device.stream(), device.allocate(4, "a test"), device.pinned(4)
    page[:] = 1
    device.copy_out(page, spot.address, first)
    second.wait_for(first.handle)
    print((page == 1).all())
    del first, second, spot, page
shared = CudaDevice(None, cuda.Stream(1))
print(shared.can_capture)
memory = device.allocate(18, "a test")
thread = threading.Thread(target=other_thread); thread.start(); thread.join()
refused(lambda: device.allocate(2 << 30, "the heads"))
stream = device.stream()
# LOST, by the words of CUDA
for code in (700, 710, 715, 716, 719):
    fail(f"cuStreamSynchronize={code}", stream.synchronize)
fail("cuStreamSynchronize=999", stream.synchronize)
fail("cuStreamCreate=2", device.stream)
frame = SimpleNamespace(__cuda_array_interface__=dict(version=3, typestr="|u1", shape=(2, 3, 3), data=(4096, 0)))
refused(lambda: print(device.frame(frame, stream).device_index))
streams = live(3)
own = shared.stream()
own.close()
print(live(3) == streams)  # that of the caller is still there
stream.close()
print(live(3) == streams - 1)
refused(stream.synchronize)
device.close()
print(cuda.Context.get_current() == context)
cuda.Context.pop()
"""
    lines = run(fake, code, **pycuda).splitlines()
    assert lines.pop(0) == "1 Fake, device 1 91 True"
    assert [lines.pop(0), lines.pop(0)] == ["1", "0"]  # pinned memory lives as long as a view of it
    assert lines.pop(0) == "True"  # a stream waits, and not the thread
    assert lines[0] == "False"
    assert lines[1].startswith("GpuError there is no current PyCUDA context on this thread: make one first, by `impor")
    assert lines[2] == "0 0"
    assert lines[3].startswith("DeviceMemoryError no memory on the device for the heads: 2.0 GiB asked for, 1.0 GiB of")
    assert all(line.startswith("KernelFaultError a kernel broke this process's CUDA context (") for line in lines[4:9])
    assert all(line.endswith("): start the process again") for line in lines[4:9])
    assert lines[9] == "GpuError CUDA failed (cuStreamSynchronize: CUDA_ERROR_UNKNOWN, a fake error)"
    assert (
        lines[10]
        == "DeviceMemoryError no memory left on the GPU (cuStreamCreate: CUDA_ERROR_OUT_OF_MEMORY, out of memory)"
    )
    assert lines[11].startswith("FrameError the frame's address 0x1000 is not in CUDA's memory")
    assert lines[12:] == ["True", "True", "GpuError this stream has been closed", "True"]
