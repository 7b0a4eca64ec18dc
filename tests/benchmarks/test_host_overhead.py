"""benchmarks.host_overhead; and that a warm call makes the calls of the driver that it needs, and no more."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("cuda.bindings.driver")

COUNTED = """
import json, os, sys
from pathlib import Path
from benchmarks import host_overhead
folder = Path(sys.argv[1])
host_overhead.load_fake_driver(folder)
log = folder / "log"
counted = {}
for name, (ours, bare) in host_overhead.gpu_cases([6, 0]).items():
    if name == host_overhead.THREADED:
        continue
    for call in (ours, bare):
        log.write_text("")
        os.environ["FAKE_CUDA_LOG"] = str(log)
        call(0)
        os.environ["FAKE_CUDA_LOG"] = ""
        counted.setdefault(name, []).append([line.split()[1] for line in log.read_text().splitlines()])
print(json.dumps(counted))
"""


def _run(*command: str) -> str:
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_calls_of_the_driver(tmp_path: Path) -> None:
    counted = json.loads(_run("-c", COUNTED, str(tmp_path)))
    bare = ["cuCtxPushCurrent", "cuGraphLaunch", "cuStreamSynchronize"]  # and cuCtxPopCurrent, which is not noted
    upload = [bare[0], "cuMemcpyHtoDAsync", *bare[1:]]
    asked = [bare[0], *["cuPointerGetAttribute"] * 2, *bare[1:]]  # which GPU and context an address is of
    assert counted == {
        "device_frame": [bare, bare],
        "device_frame_0_faces": [bare, bare],
        "cuda_array_interface": [asked, bare],
        "dlpack": [bare, bare],
        "nv12": [[bare[0], *["cuPointerGetAttribute"] * 4, *bare[1:]], bare],
        **{name: [upload, upload] for name in ("numpy_640", "numpy_1080p", "pinned_640", "pinned_1080p")},
    }


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    figures = json.loads(
        _run("-m", "benchmarks.host_overhead", "--quick", "--repeats", "25", "--json", "-", "--out", str(out))
    )
    assert {"device_frame", "device_frame_50_faces", "numpy_640", "openvino", "onnxruntime"} < figures.keys()
    for case in figures.values():
        assert case["ours_us"] > 0
        assert case["ratio"] == pytest.approx(case["ours_us"] / case["bare_us"], abs=0.01)
    assert json.loads(out.read_text())["results"] == [figures]
