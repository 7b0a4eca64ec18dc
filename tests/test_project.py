from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = [
    *("export.demo", "export.inspect", "export.sensitivity", "export.to_onnx", "export.to_triton", "export.to_trt"),
    *(
        "export.verify",
        "plugins.build",
        "trainer.evaluate",
        "trainer.fit",
        "trt_runtime.benchmark",
        "trt_runtime.detect",
    ),
]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def _document(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def _results(name: str) -> list[dict[str, Any]]:
    return _document(name)["results"]


def test_the_readme_quotes_the_result_files() -> None:
    subprocess.run([sys.executable, "-m", "benchmarks.readme", "--check"], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", RESULTS, ids=[path.name for path in RESULTS])
def test_results_say_where_they_come_from(path: Path) -> None:
    record = json.loads(path.read_text())
    assert {"what", "results", "date", "command", "machine", "versions"} <= record.keys()
    assert record["command"].startswith("python -m benchmarks.")


def test_committed_results_hold_what_they_promise() -> None:
    """The measured figures this version was accepted with; a new run that falls short must not be committed unseen."""
    published = {"easy": 92.36, "medium": 89.47, "hard": 80.44}
    rows = {(row["protocol"], row["backend"]): row for row in _results("dev_ap")}
    original = rows["original", "PyTorch"]
    assert {level: original[level] for level in published} == pytest.approx(published, abs=0.10)
    for protocol in ("original", "letterbox"):
        portable, plugin = (rows[protocol, backend] for backend in ("ONNX", "plugin form"))
        assert all(abs(portable[level] - plugin[level]) <= 0.02 for level in published)
    for row in _results("precision"):
        budget = (0.1, 0.1, 0.1) if row["precision"] == "fp16" else (0.5, 0.5, 1.0)
        assert row["budget_held"]
        lost = [row["ap_fp32"][level] - row["ap"][level] for level in published]
        assert all(loss <= most for loss, most in zip(lost, budget, strict=True))
        assert row["recall_percent"] >= 98.5
        assert row["landmark_error_percent_of_face"] <= 1.0
        assert row["precision"] == "fp16" or row["mac_shares"]["int8"] >= 0.85
    runs = {row["run"]: row["ap"] for row in _results("training")}
    implementation = _document("training")["original_implementation"]
    assert all(runs["original"][level] >= implementation[level] for level in published)
    assert runs["default"]["hard"] >= implementation["hard"] + 5
    start = _document("training")["start_of_finetune"]
    assert all(runs["finetune"][level] >= start[level] - 0.3 for level in published)
    assert runs["overfit"]["ap"] >= 99
    for row, least in zip(_results("loss"), (1, 5, 6), strict=True):
        assert row["speedup_forward"] >= least
    assert next(row["ms"]["mean"] for row in _results("augment") if row["run"] == "ours, file") <= 10
    for row in _results("cpu_latency"):
        times = row["times_as_fast_as_tiny"]["times"]
        if (row["name"], row.get("precision")) == ("openvino int8", "int8"):
            assert times >= 2
            assert row["budget_held"]
        elif row["name"] == "openvino fp16":
            assert times >= 1.5
        elif row["name"] == "openvino fp32":
            assert times >= 1.3
            assert row["frames_with_the_same_faces"] == 24
            assert row["budget_held"]
    videos = {row["contestant"]: row for row in _results("video")}
    for name in ("ours, fp32", "ours, int8"):
        assert videos[name]["sum_of_stages_ms"] > 1.3 * videos[name]["wall_ms"]
        assert videos[name]["overlap"] > 0.95  # its own plain loop has threads, too, and there are two cores
    assert videos["ours, int8"]["times_as_fast"]["tiny at 1080p"] >= 2
    assert videos["ours, int8"]["times_as_fast"]["tiny at 640"] >= 1.8
    assert all(row["growth_mb"] < 20 and row["identical"] == row["calls"] for row in _results("soak"))
    least = {"frames": 10_000, "reopens": 1_000}
    assert all(row["calls"] >= least[row["part"]] for row in _results("soak"))
    (host,) = _results("host_kernel")
    assert host["frames_with_the_same_faces"] == host["frames"] == 24
    assert host["ms"]["host_kernel"]["p50"] < host["ms"]["onnx_operators"]["p50"]
    (scoring,) = _results("ap_scoring")
    assert (scoring["images"], scoring["predictions"]) == (3226, 155_000)
    assert scoring["seconds_scoring"] < 3


def test_links_and_commands_of_the_documents_exist() -> None:
    for document in ROOT.glob("*.md"):
        text = document.read_text()
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / link).exists(), f"{document.name}: {link}"
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "mutants", "lint", "test-gpu", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_explains_itself(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0
    assert f"python -m {module}" in result.stdout
