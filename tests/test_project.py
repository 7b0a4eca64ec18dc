from __future__ import annotations

import importlib.util
import json
import re
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import trt_runtime
from facespec import cli
from facespec.images import read_image, write_image
from facespec.letterbox import Frame
from trt_runtime import VideoWriter
from trt_runtime.media.files import VideoFile

ROOT = Path(__file__).parent.parent
COMMANDS = [
    *("export.demo", "export.inspect", "export.sensitivity", "export.to_onnx", "export.to_triton", "export.to_trt"),
    *(
        "export.train_int8",
        "export.verify",
        "plugins.build",
        "trainer.evaluate",
        "trainer.fit",
        "trt_runtime.benchmark",
        "trt_runtime.detect",
    ),
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    assert re.match(r"python -m (benchmarks|export|trainer)\.", record["command"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date"])
    assert record["results"]


def test_links_and_commands_of_the_documents_exist() -> None:
    for document in {*ROOT.glob("*.md"), *PAGES}:
        for link, _, part in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]+))?\)", document.read_text()):
            target = document.parent / link if link else document
            assert target.exists(), f"{document.name}: {link}"
            if part:
                titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                assert part in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], part
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "test-slow", "mutants", "lint", "test-gpu", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_explains_itself(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python -m` runs it, in this process: most of them import torch."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    numbers = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:  # noqa: PT012
            warnings.simplefilter("ignore")  # other tests have imported it
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    assert caught.value.code == 0
    assert f"python -m {module}" in capsys.readouterr().out


def test_a_command_runs_as_a_module() -> None:
    line = [sys.executable, "-m", "plugins.build", "--help"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0
    assert "python -m plugins.build" in result.stdout


def test_a_table_that_is_not_that_of_the_results_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy: of each table one figure is changed, then --check fails and the command writes it anew."""
    from benchmarks import readme

    made = readme.tables()
    assert readme.pages() == PAGES
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(ROOT / "benchmarks" / "results")
    texts = {tmp_path / page.relative_to(ROOT): page.read_text() for page in PAGES}
    for page, text in texts.items():
        page.write_text(text)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["readme", "--check"])
    assert readme.main() == 0
    found = []
    for page, text in texts.items():
        for marker in re.finditer(r"<!-- (?!end )(\w+) -->", text):
            found.append(marker[1])
            figure = re.search(r"\d(?=[^\d]*<!-- end -->)", text[marker.end() :])
            assert figure, found[-1]
            place = marker.end() + figure.start()
            page.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
            assert readme.main() == 1, found[-1]
            page.write_text(text)
    assert sorted(found) == sorted([*made, "ap_full_val"])  # the one table that stands on two pages
    damaged = tmp_path / "README.md"
    damaged.write_text(re.sub(r"(?<=<!-- ap_full_val -->\n).*?(?=<!-- end -->)", "", texts[damaged], flags=re.DOTALL))
    monkeypatch.setattr(sys, "argv", ["readme"])
    assert readme.main() == 0
    assert {page: page.read_text() for page in texts} == texts


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("ap_full_val", lambda rows: [f"{rows[0][level]:.2f}" for level in ("easy", "medium", "hard")]),
        ("cpu_latency", lambda rows: [
            f"{row['ms']['p50']:.1f}" for row in rows if row["name"] == rows[0]["name"]]),
        ("dev_ap", lambda rows: [f"{rows[0][level]:.2f}" for level in ("easy", "medium", "hard")]),
        ("latency", lambda rows: [f"{rows[0]['ms']['p50']:.1f}", str(rows[0]["faces"]), str(rows[0]["agree"])]),
        ("soak", lambda rows: [f"{rows[0]['identical']} of {rows[0]['calls']}", f"{rows[0]['growth_mb']:.1f}"]),
        ("host_kernel", lambda rows: [f"{rows[0]['ms']['host_kernel'][f'p{q}']:.2f}" for q in (50, 95, 99)]),
        ("video", lambda rows: [
            f"{rows[0]['frames_per_second']:.1f}", f"{rows[0]['times_as_fast']['tiny at 640']:.2f}"]),
        ("loss", lambda rows: [
            f"{rows[0]['ms']['ours_forward']['p50']:.1f}", f"{rows[0]['ms']['original_forward']['p50']:.1f}",
            f"{rows[0]['speedup_forward']:.1f}", f"{rows[0]['ms']['ours_backward']['p50']:.1f}"]),
    ],
)  # fmt: skip
def test_the_first_line_of_a_table_holds_the_figures_of_its_file(name: str, cells: Any) -> None:
    """In their order, under a header with as many columns."""
    pages = "".join(page.read_text() for page in PAGES)
    text = pages.split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0]
    header, ruler, first, *_ = text.splitlines()
    assert header.count("|") == ruler.count("|") == first.count("|")
    found = [cell.strip() for cell in first.strip("|").split("|")]
    places = []
    for cell in cells(_results(name)):
        start = places[-1] + 1 if places else 1
        places.append(found.index(cell, start))
    assert len(places) == len(cells(_results(name)))


def test_the_readme_can_be_read() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    linked = set(re.findall(r"\]\(docs/([\w.-]+\.md)\)", text))
    assert linked == {"commands.md", *(page.name for page in PAGES[1:])}


def _blocks(page: Path, language: str) -> list[str]:
    """Return the code of a page, but for what is marked as not run."""
    found = re.findall(rf"(<!-- not run.*?-->\n)?^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [code for mark, code in found if not mark]


def _command_lines() -> list[tuple[str, str]]:
    """Return the module and the arguments of each command of the documents."""
    found = []
    for page in PAGES:
        inline = re.findall(r"`((?:python -m|retinaface-trt) [^`]+)`", page.read_text())
        for line in [*"".join(_blocks(page, "sh")).splitlines(), *inline]:
            if (match := re.match(r"(?:python|torchrun .*?) -m ([\w.]+)(.*)", line.partition("#")[0])) is not None:
                found.append((match[1], match[2]))
            elif (match := re.match(r"retinaface-trt ([a-z-]+)(.*)", line.partition("#")[0])) is not None:
                found.append((cli.COMMANDS[match[1]][0], match[2]))
    return found


@pytest.mark.parametrize("module", sorted({module for module, _ in _command_lines()}))
def test_commands_of_the_documents_have_the_options_they_are_given(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.find_spec(module)
    assert spec
    given = [re.findall(r"(?<=\s)--[a-z][\w-]*", arguments) for name, arguments in _command_lines() if name == module]
    if not any(given):
        return
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with warnings.catch_warnings(), pytest.raises(SystemExit):  # noqa: PT012
        warnings.simplefilter("ignore")
        importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module).main()
    known = re.findall(r"^  (?:-\w, )?(--[a-z][\w-]*)", capsys.readouterr().out, re.MULTILINE)
    unknown = {option for options in given for option in options} - set(known)
    assert not unknown


@pytest.mark.parametrize("name", ["README.md", "docs/api.md", "docs/tensorrt.md", "docs/video.md"])
def test_examples_of_the_documents_run(
    name: str,
    static_onnx: Path,
    dynamic_onnx: Path,
    plugin_form: Path,
    crowd: Frame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a folder with the files that they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build" / "demo").mkdir(parents=True)
    models = {"retinaface.onnx": static_onnx, "build/demo/retinaface.onnx": static_onnx}
    for path, model in {**models, "any_size.onnx": dynamic_onnx, "face.plugin.onnx": plugin_form}.items():
        (tmp_path / path).symlink_to(model)
    write_image(tmp_path / "photo.jpg", crowd)
    for path in ("clip.mp4", "other.mp4"):
        with VideoWriter(tmp_path / path, 25) as writer:
            for _ in range(3):
                writer.write(crowd)
    _write_own_faces(tmp_path / "my_faces", crowd)
    examples = _blocks(ROOT / name, "python")
    assert examples
    for example in examples:
        exec(compile(example, name, "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    if name == "docs/video.md":
        assert VideoFile(tmp_path / "faces.mp4").frame_count == 3
        assert "other.mp4 3 " in printed
    elif name == "docs/api.md":
        assert read_image(tmp_path / "faces.jpg").shape == crowd.shape
        assert "retinaface-trt" in printed
        assert (tmp_path / "runs" / "mine" / "best.pth").is_file()
        assert (tmp_path / "small.plugin.onnx").is_file()


def _write_own_faces(folder: Path, image: Frame) -> None:
    """Lay out what docs/data.md says about own faces, with the labels that stand there."""
    (text,) = _blocks(ROOT / "docs" / "data.md", "json")
    (folder / "images").mkdir(parents=True)
    for name in ("train.json", "val.json"):
        (folder / name).write_text(text)
    for picture in json.loads(text)["images"]:
        write_image(folder / "images" / picture["file_name"], image[:512, :512])


def test_labels_of_the_document_are_read(tmp_path: Path, crowd: Frame) -> None:
    """Both forms give the same faces: two on one image, one of them with landmarks, and none on the other."""
    from trainer.data import open_dataset

    _write_own_faces(tmp_path, crowd)
    label = next(block for block in _blocks(ROOT / "docs" / "data.md", "text") if block.startswith("#"))
    (tmp_path / "label.txt").write_text(label)
    for name in ("train.json", "label.txt"):
        dataset = open_dataset(str(tmp_path / name))
        assert dataset.report.problems == []
        first, second = (sample.load()[1] for sample in dataset.samples)
        assert sorted(first.boxes.tolist()) == [[10, 10, 30, 35], [60, 40, 150, 160]]
        assert first.has_landmarks.sum() == 1
        assert first.landmarks[first.has_landmarks][0].tolist() == [
            [85, 85],
            [125, 85],
            [105, 110],
            [90, 130],
            [120, 130],
        ]
        assert len(second.boxes) == 0


def test_the_page_of_the_api_names_all_of_it() -> None:
    named = set(re.findall(r"`([A-Za-z_]\w*)[`(]", (ROOT / "docs" / "api.md").read_text().split("## Detecting")[0]))
    assert set(trt_runtime.__all__) <= named
