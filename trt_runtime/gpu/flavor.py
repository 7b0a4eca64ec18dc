"""The kinds of TensorRT, and which is installed: TensorRT 10 or 11, or TensorRT-RTX."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from facespec.errors import MissingPackageError

AUTO = "auto"


@dataclass(frozen=True)
class Flavor:
    """A kind of TensorRT."""

    name: str
    title: str  # for messages
    module: str
    extra: str  # of this project, which installs it
    capabilities: tuple[int, ...] = ()  # that it builds engines for on any machine, without such a GPU
    channels_last: bool = False  # it makes fewer kernels where the plugin takes head maps as [B, H, W, C]

    def installed(self) -> bool:
        """Whether its Python package is installed; the package is not imported."""
        return importlib.util.find_spec(self.module) is not None

    def require(self) -> None:
        """Raise MissingPackageError, with the command that installs it, if it is not installed."""
        if not self.installed():
            raise MissingPackageError(
                f"{self.title} is not installed: in the project's folder, pip install -e '.[{self.extra}]'"
            )

    def version(self) -> str:
        """Return the installed version, from the metadata of its packages, or "?"."""
        for package in (f"{self.module}_cu13", f"{self.module}_cu12", self.module):
            try:
                return importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return "?"


TENSORRT = Flavor("tensorrt", "TensorRT", "tensorrt", "trt")
RTX = Flavor("rtx", "TensorRT-RTX", "tensorrt_rtx", "rtx", (75, 86, 89, 120, 121), channels_last=True)
FLAVORS = {flavor.name: flavor for flavor in (TENSORRT, RTX)}


def find_flavor(name: str = AUTO) -> Flavor:
    """Return a flavour by its name; "auto" takes TensorRT if it is installed and there is a GPU, else TensorRT-RTX.

    Raises:
        MissingPackageError: It is not installed, or with "auto" neither can be used.
    """
    if name != AUTO:
        flavor = FLAVORS[name]
        flavor.require()
        return flavor
    if TENSORRT.installed() and gpu_capability() is not None:
        return TENSORRT
    if RTX.installed():
        return RTX
    raise MissingPackageError(
        "neither TensorRT with a GPU nor TensorRT-RTX is at hand: in the project's folder, "
        "pip install -e '.[rtx]' (builds without a GPU) or pip install -e '.[trt]'"
    )


def gpu_capability() -> int | None:
    """Return the compute capability of the first GPU, 86 for 8.6; None without a GPU or without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return 10 * major.value + minor.value


@contextmanager
def child_environment(flavor: Flavor) -> Iterator[dict[str, str]]:
    """Yield the environment in which a child process can use a flavour.

    TensorRT-RTX's ONNX parser opens its core library by a bare name, `libtensorrt_rtx.so`, when it meets a plugin, and
    aborts if that is not found. The pip package has `libtensorrt_rtx.so.1` only, so a folder with a link to it is added
    to LD_LIBRARY_PATH, which the dynamic loader reads when a process starts.
    """
    environment = dict(os.environ)
    package = importlib.util.find_spec("tensorrt_rtx_libs") if flavor is RTX else None
    # a list of paths cannot hold a name with a colon in it
    parent = "/tmp" if os.pathsep in tempfile.gettempdir() else None
    with tempfile.TemporaryDirectory(prefix="retinaface-", dir=parent) as folder:
        for place in (package.submodule_search_locations or []) if package else []:
            for library in Path(place).glob("lib*.so.*"):
                link = Path(folder) / f"{library.name.split('.so')[0]}.so"
                if not link.is_symlink():
                    link.symlink_to(library)
        paths = [folder, environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        yield environment
