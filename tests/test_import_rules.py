"""Who may import whom (CONTRIBUTING.md), read off the sources, and what an import costs, seen in a fresh process."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"facespec", "trainer", "export", "trt_runtime", "plugins", "benchmarks", "examples", "tests"}
ALLOWED = {
    "facespec": set(),
    "plugins": {"facespec"},
    "trainer": {"facespec"},
    "trt_runtime": {"facespec"},
    "export": {"facespec", "trainer", "trt_runtime", "plugins"},
}
# evaluating what is deployed: a lazy import in one function
EXCEPTIONS = {("trainer/evaluate.py", "trt_runtime")}


def _imports(path: Path, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        name = str(path.relative_to(ROOT))
        foreign = (_imports(path, top_level=False) & OURS) - {package} - ALLOWED[package]
        assert {(name, other) for other in foreign} <= EXCEPTIONS, name
        assert not _imports(path, top_level=True) & {other for file, other in EXCEPTIONS if file == name}


def _modules() -> dict[str, Path]:
    files = [path for package in [*ALLOWED, "benchmarks"] for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def test_no_file_imports_in_a_circle() -> None:
    """Lazy imports and those for the type checker count, too: who reads one file must not need the other to read it."""
    modules = _modules()
    graph: dict[str, list[str]] = {}
    for name, path in modules.items():
        imported = {
            module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module in modules
            for module in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        }
        # a package's __init__ hands out names of its modules, and says nothing of its own
        graph[name] = sorted(imported & modules.keys()) if path.name != "__init__.py" else []
    assert sum(map(len, graph.values())) > 300
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", ["facespec", "plugins", "trt_runtime"])
def test_light_packages_need_no_more_than_the_core(package: str) -> None:
    core = {"numpy", "cv2", "tqdm", *OURS, *sys.stdlib_module_names}
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert _imports(path, top_level=True) <= core, path


def test_importing_the_runtime_brings_no_torch_and_is_quick() -> None:
    """What an import costs is what it imports: three packages that load in tenths of a second, and no slow module."""
    code = (
        "import sys; before = set(sys.modules); import trt_runtime, trt_runtime.detect, trt_runtime.media.files; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before if sys.modules[m]}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    found = set(result.stdout.split())
    assert {"trt_runtime", "facespec", "numpy", "cv2"} <= found
    foreign = {name for name in found - sys.stdlib_module_names - OURS if not name.startswith("_")}
    assert foreign <= {"numpy", "cv2", "tqdm"}
    assert not found & {"asyncio", "multiprocessing", "unittest", "sqlite3", "tkinter", "xml", "http", "ssl", "pydoc"}
