"""The table of `python -m tests.gpu`, and the timing of the detector on the simulated device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from facespec.errors import MissingToolError
from tests.gpu import __main__ as gpu
from tests.gpu.__main__ import Clock, Step

NO_GPU = "no NVIDIA GPU that torch 0 can use"
STEPS = ["build", "tests", "device", "plugin", "detector", "latency", "other tests", "engines"]
STEPS += [*gpu.TOOLS, "runtime", "benchmark"]


def table(printed: str) -> dict[str, tuple[str, str]]:
    """Return the state and the note of each step."""
    lines = printed.partition("step        state     seconds\n")[2].splitlines()
    return {line[:12].strip(): (line[12:22].strip(), line[30:].strip()) for line in lines}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], float]]:
    """What the steps would run: name, command and limit; all pass."""
    calls = []

    def call(name: str, command: Sequence[object], limit_s: float, read_summaries: bool = False) -> Step:
        calls.append((name, [*map(str, command)], limit_s))
        return Step(name, "passed", 1.0)

    monkeypatch.setattr(gpu, "call", call)
    monkeypatch.setattr(Clock, "end", Clock.end)  # main sets it
    return calls


def test_without_a_gpu_each_step_says_why_it_does_not_run(
    called: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "gpu_problem", lambda: NO_GPU)
    assert gpu.main([]) == 0
    found = table(capsys.readouterr().out)
    assert sorted(found) == sorted(STEPS)
    simulated = ("passed", "on the simulated device")
    assert found.pop("detector") == found.pop("latency") == simulated
    assert set(found.values()) == {("not run", NO_GPU)}
    assert [name for name, *_ in called] == ["detector", "latency"]
    assert "--quick" in called[1][1]


def test_a_step_that_fails_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "gpu_problem", lambda: NO_GPU)
    monkeypatch.setattr(gpu, "call", lambda name, *_: Step(name, "FAILED", 1.0, "exit code 3"))
    monkeypatch.setattr(Clock, "end", Clock.end)
    assert gpu.main([]) == 1
    assert table(capsys.readouterr().out)["detector"] == ("FAILED", "exit code 3, on the simulated device")


@pytest.mark.parametrize("bare", [True, False])
def test_with_a_gpu_the_same_steps_run(
    called: list[Any],
    bare: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a bare machine, with torch alone, and where all that is used is installed."""

    def find_headers() -> Any:
        if bare:
            raise MissingToolError("TensorRT's headers are not here")
        return tmp_path, ""

    report = {"compiler": "nvcc", "compiler_version": "13", "kernels": [{"name": "scan"}]}
    replaced: dict[str, Any] = {
        "gpu_problem": lambda: None,
        "capability": lambda: 90,
        "build_kernels": lambda *_: tmp_path / "lib.so",
        "read_report": lambda _: report,
        "find_tensorrt_headers": find_headers,
        "find_nvcc": lambda: tmp_path,
        "find_compiler": lambda: tmp_path,
        "toolkit_paths": lambda _: [],
        "find_sanitizer": lambda: None if bare else tmp_path,
        "has_cuda_bindings": lambda: not bare,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu.kernels, "library", lambda: None)
    for flavor in gpu.FLAVORS.values():
        monkeypatch.setattr(type(flavor), "installed", lambda self: not bare)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name == "torch" or not bare)
    out = tmp_path / "gpu_kernel.json"
    assert gpu.main(["--out", str(out)]) == 0
    found = table(capsys.readouterr().out)
    assert sorted(found) == sorted(STEPS)
    ran = {name for name, (state, _) in found.items() if state == "passed"}
    assert ran == ({"build", "tests", "benchmark"} if bare else set(STEPS))
    assert all(note for name, (_, note) in found.items() if name not in ran)
    limits = {name: limit_s for name, _, limit_s in called}
    assert all(limit_s > 0 for limit_s in limits.values())
    if not bare:
        words = next(words for name, words, _ in called if name == "latency")
        assert words[-2:] == ["--out", str(out.with_name("gpu_detector.json"))]


def test_all_steps_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.WHOLE_S < 8 * 60
    monkeypatch.setattr(gpu, "gpu_problem", lambda: NO_GPU)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(Clock, "end", time.monotonic() + 1.5)
    step = gpu.call("long", sleep, 600)
    assert (step.state, step.seconds < 10) == ("FAILED", True)
    assert step.note.startswith("stopped after")
    assert gpu.call("late", sleep, 600) == Step("late", "not run", 0, "the time for all steps is over: see --limit")


def test_the_detector_is_timed_without_packages_that_a_bare_machine_lacks(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.gpu.torch_engine import open_model
    from trainer.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "weights.pth", open_model())
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cv2", "onnx", "onnxruntime", "tqdm", "pytest", "skimage", "av", "onnxsim"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
import numpy as np
from tests.gpu import latency
latency.load_photograph = lambda: np.zeros((32, 32, 3), np.uint8)
latency.run(latency.main)
"""
    out = tmp_path / "gpu_detector.json"
    environment = {**os.environ, "RETINAFACE_WEIGHTS": str(tmp_path / "weights.pth")}
    command = [sys.executable, "-c", code, "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["device"] == "CPU"
    assert {"date", "machine", "versions", "commit"} <= set(record)
    cases = [(row["graphs"], row["frames"], row["batch"]) for row in record["results"]]
    assert cases == [
        (graphs, kind, batch) for graphs in (True, False) for kind in ("device", "host") for batch in (1, 8)
    ]
    for row in record["results"]:
        latency = row["latency_ms"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
        stages = ["upload", "letterbox", "network", "decode+NMS", "results"]
        assert list(row.get("stages_ms", stages)) == stages
        assert ("stages_ms" in row) != row["graphs"]
