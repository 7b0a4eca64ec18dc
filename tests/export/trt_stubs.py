"""Stub TensorRT libraries, so that the real Python bindings import on a machine without TensorRT.

The wheels of `tensorrt-cu12-bindings` and `tensorrt-cu13-bindings` hold every class, method and enum of the Python API
and are linked against three libraries that pip cannot install everywhere. The stubs export the C functions the bindings
look for and answer null: importing and looking works, creating a Builder raises TypeError.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ("10.3", "10.13", "10.16", "11.4")
"""Versions whose bindings `make test` installs, side by side: of JetPack 6, JetPack 7.1 and 7.2, and the newest."""

EXPORTS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvonnxparser": (
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
}


def make_stubs(folder: Path, major: int) -> None:
    """Compile lib{nvinfer,nvonnxparser,nvinfer_plugin}.so.{major} into `folder`.

    Put it on LD_LIBRARY_PATH of the process that imports `tensorrt_bindings`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for library, functions in EXPORTS.items():
        name = f"lib{library}.so.{major}"
        source = "".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions)
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(folder / name)]
        subprocess.run(command, input=source, text=True, check=True)


def bindings_environment(version: str, folder: Path) -> dict[str, str]:
    """Return the environment in which `tensorrt_bindings` of a version imports; the stubs go to `folder`."""
    bindings = ROOT / ".venv" / f"tensorrt-{version}"
    if not bindings.is_dir():
        pytest.skip(f"the bindings of TensorRT {version} are not there (make test installs them)")
    make_stubs(folder, int(version.split(".")[0]))
    return {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{ROOT}:{bindings}"}
