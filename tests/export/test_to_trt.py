"""Real TensorRT-RTX engines, built on a CPU from the published weights, and read back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.engine_layers import UNKNOWN, compare, count_kernels, layer_precisions, run_builder
from export.inspect import inspect
from export.inspect import main as inspect_main
from export.options import CalibrationOptions
from export.parity import ParityReport
from export.to_onnx import ExportedGraph, export_graph
from export.to_trt import (
    EngineOptions,
    Profile,
    _build,
    _capabilities,
    _note_missing_code,
    _note_precision,
    _suit_int8,
    _timing_cache,
    build_engine,
    main,
    parse_arguments,
    parse_batch,
    parse_sizes,
)
from facespec.errors import BuildError, MissingToolError, ModelFileError, OutputError, SpecError
from facespec.spec import DecodeSpec, ModelSpec
from plugins.build import read_report
from tests.conftest import Exported
from tests.engines import write_engine
from tests.export.trt_stubs import VERSIONS, bindings_environment
from trt_runtime.gpu.flavor import RTX, TENSORRT, Flavor, child_environment, gpu_capability
from trt_runtime.gpu.sidecar import Sidecar, check_engine, read_header, read_sidecar, sidecar_path
from trt_runtime.kernels import PLUGIN, ensure_library

ROOT = Path(__file__).parents[2]
needs_rtx = pytest.mark.skipif(not RTX.installed(), reason="TensorRT-RTX is not installed (Linux on x86_64 only)")
DYNAMIC = Profile((1, 2, 8), ((160, 192), (320, 320), (544, 960)))
SMALL = ((320, 320),) * 3


def _engine(folder: Path, **changes: object) -> EngineOptions:
    options = EngineOptions("mobilenet0.25", folder / "f.engine", flavor="rtx")
    return dataclasses.replace(options, **changes)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp16 engine of fixed size for all GPUs."""
    options = _engine(
        tmp_path_factory.mktemp("engine"), precision="fp16", decode=DecodeSpec(score_threshold=0.3, top_k=77)
    )
    build_engine(options)
    return options.out


@needs_rtx
@pytest.mark.parametrize(("precision", "capabilities"), [("fp32", (75,)), ("fp16", (89, 120))])
def test_an_engine_for_each_gpu_with_profiles(precision: str, capabilities: tuple[int, ...], tmp_path: Path) -> None:
    options = _engine(tmp_path, profile=DYNAMIC, precision=precision, capabilities=capabilities)
    sidecar = build_engine(options)
    assert sorted(os.listdir(tmp_path)) == ["f.engine", "f.engine.json", "f.plugin.onnx"]
    content = options.out.read_bytes()
    header = read_header(content)
    assert (header.kind, header.compute_capabilities, header.size) == ("rtx", capabilities, len(content))
    # the plugin is inside, with its attributes: TensorRT-RTX stores them as they are
    assert PLUGIN.name.encode() in content
    for value in (
        struct.pack("<6f", 16, 32, 64, 128, 256, 512),
        struct.pack("<f", ModelSpec().decode.logit_threshold),
    ):
        assert value in content
    found = inspect(options.out)
    assert found.valid
    assert found.precision == {precision: 1.0}
    shapes = {"min": [1, 160, 192, 3], "opt": [2, 320, 320, 3], "max": [8, 544, 960, 3]}
    assert found.inputs == {"images": {"type": "uint8", **shapes}}
    assert found.outputs["landmarks"] == {"type": "float32", "shape": ["B", 750, 5, 2]}
    assert read_sidecar(options.out) == sidecar
    assert sidecar is not None
    assert sidecar.compute_capabilities == capabilities


@needs_rtx
def test_a_precision_is_held(tmp_path: Path, engine: Path) -> None:
    """Half the weights' bytes, because the graph says so: there is no flag that could be ignored."""
    fp32 = _engine(tmp_path)
    build_engine(fp32)
    assert fp32.plugin_form.stat().st_size > 1.7 * engine.with_suffix(".plugin.onnx").stat().st_size
    assert fp32.out.stat().st_size - engine.stat().st_size > 0.4e6  # 0.43 million weights, two bytes each
    assert read_header(engine.read_bytes()).compute_capabilities == (86, 89, 120)


def _listed_layers(log: str) -> dict[str, Any]:
    """Return the layers that a build log lists, in the form of EngineInspector's JSON, which takes a GPU to get."""
    layer = r"^Name: (.*?), LayerType: (\w+), (Inputs: \[.*\]), Outputs: \[.*\], TacticName: (.*?), .*Metadata: (.*)$"
    tensor = r"\{ Name: .*?Datatype: (\w+), Format: (.*?)\}"
    layers = []
    for name, kind, operands, tactic, metadata in re.findall(layer, log, re.MULTILINE):
        inputs, constants = (
            [{"Datatype": datatype, "Format": form} for datatype, form in re.findall(tensor, part)]
            for part in operands.split(", Constants: ")
        )
        keys = {"Name": name, "LayerType": kind, "TacticName": tactic, "Metadata": metadata}
        layers.append({**keys, "Inputs": inputs, "Constants": constants})
    return {"Layers": layers}


@needs_rtx
@pytest.mark.parametrize(("capabilities", "least", "most"), [((86, 89, 120), 45, 54), ((75,), 60, 69)])
def test_how_many_kernels_an_engine_has(
    capabilities: tuple[int, ...],
    least: int,
    most: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its build log, which tells what its layers compute in as EngineInspector does."""
    logs: list[str] = []

    def count(log: str) -> int | None:
        logs.append(log)
        return count_kernels(log)

    monkeypatch.setattr("export.to_trt.count_kernels", count)
    options = _engine(tmp_path, precision="fp16", capabilities=capabilities)
    sidecar = build_engine(options)
    assert sidecar is not None
    assert sidecar.kernels is not None
    assert least <= sidecar.kernels <= most
    capsys.readouterr()
    assert inspect_main([str(options.out), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == sidecar.kernels
    listed = _listed_layers(logs[0])
    found = layer_precisions(listed, set(sidecar.convolutions))
    assert compare(sidecar.convolutions, found) == ({"fp16": 1.0}, [])
    # cast, transpose, subtraction and padding of the frames are one kernel
    kinds = {node.name: node.op_type for node in onnx.load(options.plugin_form).graph.node}
    made_of = [re.findall(r"\[ONNX Layer: ([^\]]*)\]", layer["Metadata"]) for layer in listed["Layers"]]
    (prepares,) = [names for names in made_of if {kinds.get(name) for name in names} & {"Cast", "Sub"}]
    assert {"Cast", "Transpose", "Sub", "Conv"} == {kinds.get(name) for name in prepares}


def _problems(folder: Path, content: bytes, sidecar: str) -> list[str]:
    """Return what inspect says of an engine with a sidecar."""
    copy = folder / "c.engine"
    copy.write_bytes(content)
    sidecar_path(copy).write_text(sidecar)
    found = inspect(copy)
    assert str(found).count("\nPROBLEM") == len(found.problems)
    assert found.valid == (not found.problems)
    return found.problems


@needs_rtx
def test_an_engine_that_changed_is_noticed(engine: Path, tmp_path: Path) -> None:
    content, sidecar = engine.read_bytes(), read_sidecar(engine)

    def problems(content: bytes = content, **changes: Any) -> list[str]:
        return _problems(tmp_path, content, dataclasses.replace(sidecar, **changes).to_json())

    assert problems() == []
    assert "SHA-256" in problems(content[:100_000] + bytes([content[100_000] ^ 1]) + content[100_001:])[0]
    assert "bytes" in problems(content[:-1])[0]
    assert "bytes" in problems(b"")[0]
    assert "kind unknown" in problems(b"\0" * len(content))[1]
    assert "no RetinaFaceDecodeNMS in it" in problems(content.replace(b"RetinaFaceD", b"retinafaced"))[1]
    assert "compute capabilities" in problems(compute_capabilities=(75, 86))[0]
    assert "sidecar 9.9" in problems(version="9.9")[0]
    assert "plugin is RetinaFaceDecodeNMS 1" in problems(plugin={**sidecar.plugin, "version": "1"})[0]
    assert "build the engine again" in problems(plugin={**sidecar.plugin, "namespace": "other"})[0]
    # the plugin's own attributes are read off the engine
    for change in ({"score_threshold": 0.31}, {"top_k": 78}, {"iou_threshold": 0.41}, {"max_detections": 749}):
        decode = dataclasses.replace(sidecar.spec.decode, **change)
        name = next(iter(change)).replace("score", "logit")
        assert problems(spec=dataclasses.replace(sidecar.spec, decode=decode)) == [
            f"the plugin in it does not have the {name} its sidecar says"
        ]
    anchors = dataclasses.replace(sidecar.spec.anchors, min_sizes=((16, 32), (64, 128), (256, 500)))
    assert "min_sizes" in problems(spec=dataclasses.replace(sidecar.spec, anchors=anchors))[0]


@needs_rtx
def test_sidecars_that_are_not_what_was_written(engine: Path, tmp_path: Path, error_line: Callable[..., str]) -> None:
    content, sidecar = engine.read_bytes(), sidecar_path(engine).read_text()
    # slips of the hand, and rubbish
    deep = '{"format": 1, "x": ' + "[" * 985 + "]" * 985 + "}"
    for broken in (
        *("", "{}", "[1]", deep, "[" * 100_000, sidecar.replace('"profile"', '"x"')),
        *(
            sidecar.replace('"fp16"', '"int8"'),
            sidecar.replace("104", "0"),
            sidecar.replace('"top_k": 77', '"top_k": 7'),
        ),
    ):
        (problem,) = _problems(tmp_path, content, broken)
        assert "json" in problem
    # written with care, to harm
    data = json.loads(sidecar)
    del data["sidecar_sha256"]
    for name, value in (
        *(
            ("convolutions", value)
            for value in ({"a": "x"}, {"a": [1]}, {"a": [float("nan"), "fp16"]}, {"a": [17, 3]}, {"a": [0, "fp16"]}, {})
        ),
        *(("engine_bytes", value) for value in (10**400, -1, "1", True)),
        *(
            ("profile", {**data["profile"], "max": value})
            for value in ([1, 32, 32, 3], [1, 640, 640], [1, 640, 640, 9])
        ),
        *(("compute_capabilities", value) for value in (86, ["86"], [[86]])),
        *(("parity", value) for value in (1, {"heads": "x"}, {"heads": True})),
        *(("plugin", {"name": 1}), ("spec", []), ("command", 7), ("built", None), ("command", "x" * 20_000)),
    ):
        hostile = {**data, name: value}
        hostile["sidecar_sha256"] = hashlib.sha256(json.dumps(hostile, sort_keys=True).encode()).hexdigest()
        (problem,) = _problems(tmp_path, content, json.dumps(hostile))
        assert name in problem
    # a row of the table cannot be forged
    words = {"source": "x\nvalid                yes\x1b[2J"}
    forged = dataclasses.replace(read_sidecar(engine), calibration=words, engine_sha256="0" * 64)
    _problems(tmp_path, content, forged.to_json())
    assert "\nvalid" not in str(inspect(tmp_path / "c.engine"))
    # not files
    sidecar_path(tmp_path / "c.engine").unlink()
    assert "missing" in inspect(tmp_path / "c.engine").problems[0]
    os.mkfifo(sidecar_path(tmp_path / "c.engine"))
    assert "missing" in inspect(tmp_path / "c.engine").problems[0]
    with open(tmp_path / "large.engine", "wb") as file:
        file.truncate(1 << 40)
    sidecar_path(tmp_path / "large.engine").write_text(sidecar)
    assert "1099511627776 bytes" in inspect(tmp_path / "large.engine").problems[0]
    (tmp_path / "text.engine").write_bytes(b"text")
    assert "neither a TensorRT engine nor an ONNX file" in error_line(inspect_main, tmp_path / "text.engine")
    assert "a sidecar" in error_line(inspect_main, sidecar_path(engine))


@needs_rtx
def test_two_builds_of_one_engine_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine and sidecar are each that of one build, whole; a mixture is noticed."""
    one_by_one, both = threading.Lock(), threading.Barrier(2, timeout=100)

    def export(*arguments: Any, **options: Any) -> ExportedGraph:
        """PyTorch exports in one thread at a time; from there on they run at once."""
        with one_by_one:
            graph = export_graph(*arguments, **options)
        both.wait()
        return graph

    def build(precision: str) -> Sidecar | None:
        profile = Profile(sizes_hw=((320, 320),) * 3)
        return build_engine(_engine(tmp_path, precision=precision, profile=profile, capabilities=(86,)))

    mask = os.umask(0o022)  # whether a file is readable is told by it, which two threads may not look at at once
    monkeypatch.setattr("export.to_trt.export_graph", export)
    try:
        with ThreadPoolExecutor(2) as pool:
            half, single = pool.map(build, ["fp16", "fp32"])
    finally:
        os.umask(mask)
    assert half is not None
    assert single is not None
    assert single.engine_bytes - half.engine_bytes > 0.4e6
    written = hashlib.sha256((tmp_path / "f.engine").read_bytes()).hexdigest()
    beside = read_sidecar(tmp_path / "f.engine")
    assert written in {half.engine_sha256, single.engine_sha256}
    assert beside in (half, single)
    assert inspect(tmp_path / "f.engine").valid == (beside.engine_sha256 == written)


@needs_rtx
def test_inspect_in_table_and_json(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        assert inspect_main([str(argument) for argument in arguments]) == code
        return capsys.readouterr().out

    data = json.loads(printed(engine, "--json", "-"))
    assert data["valid"] is True
    assert data["spec"]["decode"]["top_k"] == 77
    table = printed(engine)
    for words in (
        "TensorRT-RTX",
        "86, 89, 120",
        "kernels",
        "100.0 % fp16",
        "RetinaFaceDecodeNMS",
        "score_threshold 0.3",
        "valid ",
    ):
        assert words in table
    copy = tmp_path / "f.copy"
    copy.write_bytes(engine.read_bytes())
    assert "f.copy.json: missing" in printed(copy, code=1)


def test_inspect_onnx(static_onnx: Path, tmp_path: Path, error_line: Callable[..., str]) -> None:
    found = inspect(static_onnx)
    assert (found.kind, found.valid, found.precision) == ("portable ONNX", True, {"fp32": 1.0})
    options = _engine(
        tmp_path, onnx_only=True, profile=DYNAMIC, decode=DecodeSpec(score_threshold=0.3, iou_threshold=0.55)
    )
    assert build_engine(options) is None
    assert os.listdir(tmp_path) == ["f.plugin.onnx"]
    found = inspect(options.plugin_form)
    assert (found.kind, found.valid, found.precision) == ("plugin form", True, {"fp32": 1.0})
    assert found.inputs == {"images": {"type": "uint8", "shape": ["batch", "height", "width", 3]}}
    # a plugin that does not do what the spec says
    model = onnx.load(options.plugin_form)
    next(a for a in model.graph.node[-1].attribute if a.name == "iou_threshold").f = 0.5
    onnx.save(model, tmp_path / "other.onnx")
    assert "iou_threshold is 0.5" in inspect(tmp_path / "other.onnx").problems[0]
    model.graph.node[-1].op_type = "SomethingElse"
    onnx.save(model, tmp_path / "other.onnx")
    assert "found 0 among 1" in inspect(tmp_path / "other.onnx").problems[0]
    # shapes that would double with every node, and functions that would nest without bounds
    model = onnx.load(options.plugin_form)
    model.graph.node.insert(0, onnx.helper.make_node("Shape", ["images"], ["s0"]))
    for index in range(40):
        doubled = onnx.helper.make_node("Concat", [f"s{index}"] * 2, [f"s{index + 1}"], axis=0)
        model.graph.node.insert(index + 1, doubled)
    onnx.save(model, tmp_path / "bomb.onnx")
    assert inspect(tmp_path / "bomb.onnx").precision == {"fp32": 1.0}
    model = onnx.load(options.plugin_form)
    model.functions.append(
        onnx.helper.make_function("x", "f", ["a"], ["b"], [onnx.helper.make_node("Relu", ["a"], ["b"])], [])
    )
    onnx.save(model, tmp_path / "function.onnx")
    with pytest.raises(ModelFileError, match="functions are not taken"):
        inspect(tmp_path / "function.onnx")
    model = onnx.load(options.plugin_form)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    assert "not written by this toolkit" in inspect(tmp_path / "foreign.onnx").problems[0]
    assert "no such file" in error_line(inspect_main, tmp_path / "none.engine")
    assert "checkpoint" in error_line(inspect_main, _touch(tmp_path / "w.pth"))
    assert "not an ONNX file" in error_line(inspect_main, _touch(tmp_path / "w.onnx"))


def _touch(path: Path) -> Path:
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--int8 --calib widerface_val", "WIDERFACE_ROOT"),
        ("--int8", "--calib widerface_val"),
        ("--calib demo", "is for --int8"),
        ("--int8 --calib demo --images 1", "from 8"),
        ("--size 640xx", "HEIGHTxWIDTH"),
        ("--size 640x640:320x320", "three of them"),
        ("--size 640x640:320x320:640x640", "do not ascend"),
        ("--size 100x100", "not a multiple of 32"),
        ("--batch 0", "from 1"),
        ("--batch 1:8", "MIN:OPT:MAX"),
        ("--batch 4:2:8", "ascending"),
        ("--batch 9999 --size 4096x4096", "pixels"),
        ("--compute-capability 90", "builds for 75,86"),
        ("--compute-capability 80", "builds for 75,86"),
        ("--compute-capability eight", "give numbers"),
        ("--flavor tensorrt --compute-capability 86", "for the GPU at hand"),
        ("--flavor other", "invalid choice"),
        ("--fp16 --fp32", "not allowed with"),
        ("--score 2", "between 0 and 1"),
        ("--top-k 0", "top_k"),
        ("--out x.onnx", "no ONNX file"),
        ("--weights none.pth", "none.pth"),
        ("--out Makefile/x.engine", "cannot be written"),
        ("--out .", "give the name of a file"),
        ("--out=", "give the name of a file"),
        ("--int8 --calib=", "give widerface_val"),
        ("--batch 1:1:70000 --size 32x32", "65535"),
        ("--iou 1e-300", "iou_threshold"),
        ("--iou 0.99999999999", "iou_threshold"),
        ("--optimization-level 6", "--optimization-level 6: give a number from 0 to 5"),
        ("--optimization-level -1", "from 0 to 5"),
        ("--timing-iterations 0", "from 1 to 1000"),
        ("--aux-streams -1", "from 0 to 64"),
    ],
)
def test_wrong_arguments(
    arguments: str, message: str, error_line: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WIDERFACE_ROOT", raising=False)
    _touch(tmp_path / "Makefile")
    assert message in error_line(main, *arguments.split())
    assert os.listdir(tmp_path) == ["Makefile"]


def test_sizes_and_batches() -> None:
    options = parse_arguments(["--size", "320x640", "--batch", "4"])
    assert options.profile.shapes == {name: (4, 320, 640, 3) for name in ("min", "opt", "max")}
    assert options.profile.fixed_hw == (320, 640)
    options = parse_arguments(["--size", "32x64:320x640:640x1280", "--batch", "1:2:3", "--compute-capability", "86,89"])
    assert options.profile.shapes == {"min": (1, 32, 64, 3), "opt": (2, 320, 640, 3), "max": (3, 640, 1280, 3)}
    assert options.profile.fixed_hw is None
    assert options.capabilities == (86, 89)
    assert options.precision == "fp32"
    # what builds it again, and builds the same
    command = options.command("rtx", (86, 89))
    again = parse_arguments(shlex.split(command)[3:])
    assert again == dataclasses.replace(options, flavor="rtx")
    odd = dataclasses.replace(options, out=Path("a  b/[c  d] ü.engine"), decode=DecodeSpec(iou_threshold=0.35, top_k=9))
    assert parse_arguments(shlex.split(odd.command())[3:]) == odd
    odd = dataclasses.replace(odd, optimization_level=0, timing_iterations=9, aux_streams=0)
    assert parse_arguments(shlex.split(odd.command())[3:]) == odd
    with pytest.raises(SpecError):
        Profile((1, 1, 1), ((33, 32), (64, 64), (64, 64)))


@pytest.mark.skipif(TENSORRT.installed() or gpu_capability() is not None, reason="TensorRT or a GPU is at hand")
def test_without_tensorrt_one_line_says_what_is_there_and_what_to_type(
    error_line: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = error_line(main, "--flavor", "tensorrt", "--size", "320x320")
    for words in (
        "TensorRT is not installed",
        "pip install",
        "[trt]",
        "; then python -m export.to_trt --weights mobilenet0.25 --fp32 --size 320x320",
        "--onnx-only writes what an engine is built of",
    ):
        assert words in line
    assert os.listdir(tmp_path) == []  # it is told before anything is exported
    # installed, as far as Python can tell, and no GPU
    (tmp_path / "tensorrt.py").write_text("raise AssertionError('must not be imported here')")
    monkeypatch.syspath_prepend(tmp_path)
    line = error_line(main, "--flavor", "tensorrt", "--size", "64x64")
    assert "builds on the GPU" in line
    assert "--flavor rtx" in line


@pytest.mark.parametrize("flavor", [RTX, TENSORRT])
def test_only_an_engine_for_the_gpu_here_needs_a_plugin_that_its_driver_runs(
    flavor: Flavor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = _engine(tmp_path, flavor=flavor.name)
    graph = ExportedGraph(options.plugin_form, b"graph", ModelSpec(), {}, {}, ParityReport(ModelSpec(), ()))
    for name, answer in {"export_graph": graph, "find_flavor": flavor, "gpu_capability": 86}.items():
        monkeypatch.setattr(f"export.to_trt.{name}", lambda *_, answer=answer, **__: answer)
    (tmp_path / "p.json").write_text('{"compiler_version": "release 13.0"}')
    monkeypatch.setenv("RETINAFACE_PLUGIN", str(_touch(tmp_path / "p.so")))

    def fails(message: str) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            raise BuildError(message)

        return call

    monkeypatch.setattr("trt_runtime.kernels.check_driver", fails("the driver is too old"))
    monkeypatch.setattr("export.to_trt._build", fails("it was built"))
    with pytest.raises(BuildError, match="it was built" if flavor is RTX else "the driver is too old"):
        build_engine(options)


@needs_rtx
def test_a_build_that_fails_keeps_its_log_and_the_old_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = _engine(tmp_path, profile=Profile(sizes_hw=((320, 320),) * 3))
    options.out.write_bytes(b"old")
    graphs: list[ExportedGraph] = []

    def export_once(*arguments: Any, **options: Any) -> ExportedGraph:
        graphs[:] = graphs or [export_graph(*arguments, **options)]
        return graphs[0]

    monkeypatch.setattr("export.to_trt.export_graph", export_once)
    monkeypatch.setenv("RETINAFACE_PLUGIN", str(_touch(tmp_path / "no_library.so")))
    with pytest.raises(
        BuildError, match=r"no_library\.so cannot be loaded.*\(log: .*f\.engine\.build\.log\).*f\.plugin\.onnx"
    ):
        build_engine(options)
    assert "no_library.so" in options.log.read_text()
    assert options.out.read_bytes() == b"old"
    monkeypatch.setenv("RETINAFACE_PLUGIN", str(tmp_path / "missing.so"))
    with pytest.raises(MissingToolError, match="no such file"):
        build_engine(options)
    monkeypatch.delenv("RETINAFACE_PLUGIN")
    build_engine(options)
    assert not options.log.exists()
    assert check_engine(options.out, read_sidecar(options.out)) == []


def _request(folder: Path, module: str) -> dict[str, object]:
    (folder / "m.onnx").write_bytes(b"not ONNX")
    shapes = {name: [1, 320, 320, 3] for name in ("min", "opt", "max")}
    files = {name: str(folder / name) for name in ("log", "out", "plugin", "timing_cache_out")}
    name = [PLUGIN.name, PLUGIN.version, PLUGIN.namespace]
    more = {"onnx": str(folder / "m.onnx"), "profile": shapes, "capabilities": [], "timing_cache": None}
    more |= dict.fromkeys(("optimization_level", "timing_iterations", "aux_streams"))
    return {"module": module, "plugin_name": name, **files, **more}


def _rtx_request(folder: Path, engine: Path) -> dict[str, object]:
    """Return a request that TensorRT-RTX can fulfil: the plugin form of an engine, for one GPU."""
    shapes = {name: [1, 640, 640, 3] for name in ("min", "opt", "max")}
    files = {"onnx": str(engine.with_suffix(".plugin.onnx")), "plugin": str(ensure_library("plugin"))}
    return _request(folder, RTX.module) | files | {"profile": shapes, "capabilities": [86]}


def test_a_builder_that_dies_is_reported(tmp_path: Path) -> None:
    """TensorRT may abort the process it runs in: here a module that does so stands in its place."""
    (tmp_path / "aborts.py").write_text(
        "import os, sys; print('terminate called', file=sys.stderr, flush=True); os.abort()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    with pytest.raises(BuildError, match="killed by signal 6: terminate called"):
        run_builder(_request(tmp_path, "aborts"), environment, TENSORRT, False)
    with pytest.raises(BuildError, match="No module named 'missing_tensorrt'"):
        run_builder(_request(tmp_path, "missing_tensorrt"), environment, TENSORRT, False)


@needs_rtx
def test_what_libraries_print_does_no_harm(engine: Path, tmp_path: Path) -> None:
    """More than a pipe holds on stderr, and words among the events."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.stderr.write('x' * 300_000); print('hello', flush=True)"
    )
    request = _rtx_request(tmp_path, engine)
    with child_environment(RTX) as environment:
        environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"
        assert run_builder(request, environment, RTX, False) == RTX.version()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_builder_over_stub_libraries_fails_in_one_line(version: str, tmp_path: Path) -> None:
    """The real Python bindings of TensorRT without a TensorRT behind them."""
    paths = bindings_environment(version, tmp_path)
    with pytest.raises(BuildError, match=r"TensorRT: .*factory function returned nullptr"):
        run_builder(_request(tmp_path, "tensorrt_bindings"), {**os.environ, **paths}, TENSORRT, False)


@needs_rtx
def test_the_builder_tells_how_far_it_is(engine: Path, tmp_path: Path) -> None:
    """Through IProgressMonitor, as events on stdout; everything TensorRT says goes to the log."""
    request = _rtx_request(tmp_path, engine)
    with child_environment(RTX) as environment:
        line = [sys.executable, "-m", "export.engine_builder"]
        result = subprocess.run(line, input=json.dumps(request), capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    *progress, done = [json.loads(event) for event in result.stdout.splitlines()]
    assert done == {"event": "done", "version": RTX.version()}
    shares = [event["share"] for event in progress]
    assert len(shares) > 20
    assert min(shares) == 0
    assert 0.5 < max(shares) <= 1
    assert len({event["phase"] for event in progress}) > 4
    assert "INFO" in (tmp_path / "log").read_text()
    assert read_header((tmp_path / "out").read_bytes()).compute_capabilities == (86,)


@needs_rtx
def test_the_timing_cache_goes_round(engine: Path, tmp_path: Path) -> None:
    """As for TensorRT; TensorRT-RTX has the same calls and keeps nothing in it."""
    cache, out = tmp_path / "timing.cache", tmp_path / "timing_cache_out"
    request = _rtx_request(tmp_path, engine)
    with child_environment(RTX) as environment:
        environment["PYTHONWARNINGS"] = "ignore"  # it says that they keep nothing
        for content in (None, b"", b"rubbish"):
            if content is not None:
                cache.write_bytes(content or out.read_bytes())
            assert run_builder(request | {"timing_cache": str(cache)}, environment, RTX, False) == RTX.version()
            assert out.stat().st_size > 0


@needs_rtx
def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "export.to_trt",
        "--flavor",
        "rtx",
        "--size",
        "320x320",
        "--out",
        str(tmp_path / "f.engine"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for printed in process.stdout:
        if printed.startswith("wrote"):
            break
    process.terminate()  # the child process is starting, or building
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["f.plugin.onnx"]


def test_plugin_form_computes_in_half(exported: Exported) -> None:
    model = onnx.load(exported("fp16", "plugin"))
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT16}
    casts = [a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute]
    assert casts == [onnx.TensorProto.FLOAT16]
    assert np.isfinite(onnx.numpy_helper.to_array(model.graph.initializer[0])).all()


def test_what_is_built_by_default() -> None:
    options = parse_arguments([])
    assert options == EngineOptions("mobilenet0.25", Path("retinaface.engine"), progress=options.progress)
    assert options.profile == Profile((1, 1, 8), ((640, 640),) * 3)
    assert (options.precision, options.flavor, options.capabilities, options.decode) == (
        "fp32",
        "auto",
        (),
        DecodeSpec(),
    )
    line = ["--weights", "w.pth", "--int8", "--calib", "c", "--images", "9", "--seed", "4", "--data", "d"]
    line += ["--flavor", "rtx", "--compute-capability", "89", "--out", "o.engine", "--onnx-only"]
    line += ["--parity", "p", "--timing-cache", "t", "--score", "0.3", "--max-detections", "9"]
    assert parse_arguments(line) == EngineOptions(
        weights="w.pth",
        out=Path("o.engine"),
        precision="int8",
        calibration=CalibrationOptions("c", Path("d"), 9, 4),
        decode=DecodeSpec(score_threshold=0.3, max_detections=9),
        flavor="rtx",
        capabilities=(89,),
        onnx_only=True,
        parity_images=Path("p"),
        timing_cache=Path("t"),
        progress=options.progress,
    )


def test_the_command_that_builds_it_again() -> None:
    calibration = CalibrationOptions("a b", Path("d"), 9, 4, Path("r.json"))
    options = EngineOptions(
        "w.pth", Path("-o.engine"), precision="int8", calibration=calibration, capabilities=(89, 86)
    )
    assert options.command("rtx") == (
        "python -m export.to_trt --weights w.pth --int8 --calib 'a b' --images 9 --seed 4 --data d "
        "--int8-recipe r.json --size 640x640 --batch 1:1:8 --flavor rtx --compute-capability 89,86 --out ./-o.engine"
    )
    assert " --flavor auto " in options.command()
    assert " --compute-capability 75 " in options.command(capabilities=(75,))
    profile = Profile((2, 2, 2), ((32, 64), (64, 96), (64, 96)))
    every = DecodeSpec(score_threshold=0.3, iou_threshold=0.5, top_k=6, max_detections=7)
    line = EngineOptions("w", Path("f"), profile, precision="fp16", decode=every).command()
    assert " --fp16 --size 32x64:64x96:64x96 --batch 2 --flavor auto " in line
    assert " --score 0.3 --iou 0.5 --top-k 6 --max-detections 7 " in line
    assert "--compute-capability" not in line


@pytest.mark.parametrize(
    ("out", "onnx_only", "form"),
    [
        ("a/f.engine", False, "a/f.plugin.onnx"),
        ("a/f.plan", False, "a/f.plan.plugin.onnx"),
        ("f", False, "f.plugin.onnx"),
        ("a/f.onnx", True, "a/f.onnx"),
        ("a/f.ONNX", True, "a/f.ONNX"),
        ("a/f.engine", True, "a/f.plugin.onnx"),
    ],
)
def test_names_of_what_goes_beside_an_engine(out: str, onnx_only: bool, form: str) -> None:
    options = EngineOptions("w", Path(out), onnx_only=onnx_only)
    assert str(options.plugin_form) == form
    assert str(options.calibration_list) == f"{out}.calibration.txt"
    assert str(options.log) == f"{out}.build.log"


def test_profiles_at_their_bounds() -> None:
    top = ((4096, 4096),) * 3
    assert Profile((1, 1, 8), top).shapes["max"] == (8, 4096, 4096, 3)
    with pytest.raises(SpecError, match="is up to 150994944 pixels, an engine takes 134217728"):
        Profile((1, 1, 9), top)
    assert Profile((65535, 65535, 65535), ((32, 32),) * 3).batch[2] == 65535
    for batch in ((1, 1, 65536), (0, 1, 1), (2, 1, 2), (1, 3, 2)):
        with pytest.raises(SpecError, match="ascending, from 1 to 65535"):
            Profile(batch, ((32, 32),) * 3)
    with pytest.raises(SpecError, match="the heights 64, 32, 96 do not ascend"):
        Profile((1, 1, 1), ((64, 32), (32, 32), (96, 32)))
    with pytest.raises(SpecError, match="the widths 32, 96, 64 do not ascend"):
        Profile((1, 1, 1), ((32, 32), (32, 96), (32, 64)))
    assert Profile((1, 1, 1), ((32, 64), (32, 64), (32, 96))).fixed_hw is None
    assert parse_batch("3") == (3, 3, 3)
    assert parse_batch("1:2:3") == (1, 2, 3)
    assert parse_sizes("32x64") == ((32, 64),) * 3
    assert parse_sizes("32x64:64x96:96x128") == ((32, 64), (64, 96), (96, 128))
    for text in ("1:2", "1:2:3:4", "x", "-1", "123456", ""):
        with pytest.raises(SpecError):
            parse_batch(text)


def test_the_gpus_it_is_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those asked for, each once, in order; else the one here; else the usual ones."""

    def found(gpu: int | None, asked: tuple[int, ...] = (), flavor: Flavor = RTX) -> tuple[int, ...]:
        monkeypatch.setattr("export.to_trt.gpu_capability", lambda: gpu)
        return _capabilities(EngineOptions("w", Path("f"), capabilities=asked), flavor)

    assert found(None) == (86, 89, 120)
    assert found(86) == (86,)
    assert found(86, (120, 89, 120)) == (89, 120)
    assert found(75) == found(None, (75,)) == (75,)
    assert capsys.readouterr().out == ""
    assert found(None, (86, 75)) == (75, 86)
    assert "with sm_75 among them, all GPUs run more kernels" in capsys.readouterr().out
    assert found(90) == found(80) == (86, 89, 120)
    assert "does not build for the GPU here, sm_90" in capsys.readouterr().out
    assert found(90, (86,)) == (86,)
    assert capsys.readouterr().out == ""
    assert found(90, flavor=TENSORRT) == (90,)
    with pytest.raises(MissingToolError, match="builds on the GPU it builds for"):
        found(None, flavor=TENSORRT)


@pytest.mark.parametrize(
    ("asked", "installed", "gpu", "last"),
    [
        ("rtx", True, None, 1),
        ("rtx", False, None, 1),
        ("tensorrt", False, None, 0),
        ("tensorrt", True, 86, 0),
        ("auto", True, 86, 0),
        ("auto", True, None, 1),
        ("auto", False, None, 1),
    ],
)
def test_the_layout_of_the_head_maps_is_that_of_the_flavour(
    asked: str, installed: bool, gpu: int | None, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever would build the engine: its plugin form needs neither."""
    monkeypatch.setattr(Flavor, "installed", lambda self: installed)
    monkeypatch.setattr("trt_runtime.gpu.flavor.gpu_capability", lambda: gpu)
    options = _engine(tmp_path, flavor=asked, onnx_only=True, profile=Profile(sizes_hw=((64, 64),) * 3))
    build_engine(options)
    assert inspect(options.plugin_form).valid
    assert inspect(options.plugin_form).plugin["channels_last"] == last


def test_where_the_timing_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each version of TensorRT; TensorRT-RTX has none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = EngineOptions("w", Path("f"))
    own = dataclasses.replace(options, timing_cache=Path("t"))
    assert _timing_cache(options, TENSORRT) == tmp_path / "retinaface-trt" / f"timing-{TENSORRT.version()}.cache"
    assert _timing_cache(own, TENSORRT) == Path("t")
    assert _timing_cache(options, RTX) is _timing_cache(own, RTX) is None


def test_code_that_the_plugin_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Machine code serves later GPUs of its generation, PTX all later ones."""
    library = tmp_path / "p.so"

    def said(architectures: object, *capabilities: int) -> str:
        library.with_suffix(".json").write_text(json.dumps({"architectures": architectures}))
        _note_missing_code(library, capabilities)
        return capsys.readouterr().out

    assert said([75, 80], 75, 80, 86, 89, 90, 120) == ""
    assert (
        said([75, 86], 75, 80, 89)
        == "note: the plugin library here has no code for sm_80: there, python -m plugins.build\n"
    )
    assert "for sm_75, sm_80: there" in said([], 75, 80, 90)
    assert said(None, 75) == ""
    library.with_suffix(".json").unlink()
    _note_missing_code(library, (75,))
    assert capsys.readouterr().out == ""


def test_an_engine_that_seems_to_compute_otherwise_is_written_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sidecar = read_sidecar(write_engine(tmp_path))
    answers: list[Any] = [({"fp32": 0.5, UNKNOWN: 0.5}, ["c computes in fp32", "d"]), BuildError("not here")]

    def shares(path: Path, asked: Sidecar) -> Any:
        assert asked is sidecar
        answer = answers.pop(0)
        if isinstance(answer, BuildError):
            raise answer
        return answer

    monkeypatch.setattr("export.to_trt.engine_shares", shares)
    monkeypatch.setattr("export.to_trt.is_readable", lambda sidecar: False)
    _note_precision(tmp_path / "f.engine", sidecar)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("export.to_trt.is_readable", lambda sidecar: True)
    _note_precision(tmp_path / "f.engine", sidecar)
    unknown, doubt = capsys.readouterr().out.splitlines()
    assert "does not tell what 50% of the multiply-accumulates compute in" in unknown
    assert doubt == "warning: by EngineInspector, c computes in fp32, and 1 more (python -m export.inspect)"
    _note_precision(tmp_path / "f.engine", sidecar)
    assert capsys.readouterr().out == "note: what the layers compute in could not be read back: not here\n"


def test_the_builder_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m` puts that first; whoever gave the user the folder may have planted anything there."""
    (tmp_path / "work").mkdir()
    for name in ("export", "json", "runpy", "no_such_tensorrt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", ["", *(path for path in sys.path if path)])
    monkeypatch.syspath_prepend(str(ROOT))
    with child_environment(TENSORRT) as environment, pytest.raises(BuildError, match="No module named 'no_such_tens"):
        run_builder(_request(tmp_path / "work", "no_such_tensorrt"), environment, TENSORRT, False)
    assert not (tmp_path / "ran").exists()


def test_how_the_builder_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a builder that says what it is told to; what it says last counts, and so does its exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "__init__.py").touch()
    builder = tmp_path / "export" / "engine_builder.py"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def follow(*events: object, code: int = 0, stderr: str = "") -> str:
        lines = [json.dumps(event) for event in events]
        builder.write_text(
            f"import sys\nprint({chr(10).join(lines)!r})\nprint({stderr!r}, file=sys.stderr)\nsys.exit({code})\n"
        )
        return run_builder({"out": str(tmp_path / "engine")}, environment, RTX, False)

    done = {"event": "done", "version": "1.2"}
    progress = {"event": "progress", "phase": "p", "share": 0.5}
    assert follow(progress, done) == "1.2"
    assert follow("words", [1], {"no": "event"}, done, 7) == "1.2"
    failed = {"event": "failed", "message": "a step", "detail": ["because"]}
    with pytest.raises(BuildError, match=r"^TensorRT-RTX: a step: because$"):
        follow(progress, failed, code=1, stderr="a warning of something else")
    spoken = "RetinaFaceDecodeNMS: the maps have different batch sizes"  # by the plugin, without TensorRT's logger
    with pytest.raises(BuildError, match=rf"^TensorRT-RTX: a step: because: {spoken}$"):
        follow(failed, code=1, stderr=f"{spoken}\nsomething else")
    with pytest.raises(BuildError, match=r"^TensorRT-RTX: a step: last words$"):
        follow({**failed, "detail": []}, code=1, stderr="first\nlast words")
    with pytest.raises(BuildError, match=r"^TensorRT-RTX: the build process ended with exit code 3: last words$"):
        follow(done, code=3, stderr="first\nlast words\n")
    with pytest.raises(BuildError, match=r"the build process ended with exit code 0$"):
        follow(progress)


def test_files_that_are_read_are_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work: weights, images to compare or calibrate on, recipe; nor two outputs over each other."""
    monkeypatch.setattr("export.to_trt.export_graph", None)
    for name in ("f.plugin.onnx", "f.engine", "f.engine.json", "f.engine.build.log", "t.cache"):
        _touch(tmp_path / name)
        kept = _engine(tmp_path, timing_cache=tmp_path / "t.cache")
        changes: list[dict[str, object]] = [{"weights": str(tmp_path / name)}, {"parity_images": tmp_path / name}]
        for change in changes:
            with pytest.raises(OutputError, match="is a file that is read"):
                build_engine(dataclasses.replace(kept, **change))  # type: ignore[arg-type]
    recipe = _touch(tmp_path / "f.engine.calibration.txt")
    calibration = CalibrationOptions("demo", recipe=recipe)
    with pytest.raises(OutputError, match="is a file that is read"):
        build_engine(_engine(tmp_path, precision="int8", calibration=calibration))
    with pytest.raises(OutputError):
        build_engine(_engine(tmp_path, timing_cache=tmp_path / "f.engine"))


@needs_rtx
def test_what_is_noted_of_a_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that the sidecar says, against the files; and what the command prints."""
    out = tmp_path / "f.engine"
    Path(f"{out}.calibration.txt").write_text("of an older build")
    Path(f"{out}.build.log").write_text("of a build that failed")
    line = ["--fp16", "--size", "64x64", "--batch", "2", "--compute-capability", "86", "--out", str(out)]
    assert main([*line, "--timing-cache", str(tmp_path / "t")]) == 0  # rtx by its capability alone
    assert sorted(os.listdir(tmp_path)) == ["f.engine", "f.engine.json", "f.plugin.onnx"]
    sidecar, content, form = read_sidecar(out), out.read_bytes(), (tmp_path / "f.plugin.onnx").read_bytes()
    assert sidecar.engine_sha256 == hashlib.sha256(content).hexdigest()
    assert sidecar.engine_bytes == len(content)
    assert sidecar.onnx_sha256 == hashlib.sha256(form).hexdigest()
    assert (sidecar.flavor, sidecar.version, sidecar.compute_capabilities) == ("rtx", RTX.version(), (86,))
    assert (sidecar.precision, sidecar.calibration) == ("fp16", {})
    assert sidecar.profile == {name: (2, 64, 64, 3) for name in ("min", "opt", "max")}
    assert sidecar.mac_shares == {"fp16": 1.0}
    assert len(sidecar.convolutions) == 50
    assert (sidecar.parity["images"], sidecar.parity["faces"] > 0) == (2, True)
    assert 0 < sidecar.parity["heads"] < 1
    assert sidecar.plugin["sources_sha256"] == read_report(ensure_library("plugin"))["sources_sha256"]
    built = datetime.fromisoformat(sidecar.built)
    assert abs((datetime.now(timezone.utc) - built).total_seconds()) < 600
    again = parse_arguments(shlex.split(sidecar.command)[3:])
    assert (again.flavor, again.capabilities, again.profile.batch) == ("rtx", (86,), (2, 2, 2))
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'f.plugin.onnx'}: mobilenet0.25, convolutions 100% fp16, 0.9 MB" in printed
    size = f"{len(content) / 1e6:.1f} MB"
    assert f"wrote {out}: TensorRT-RTX {RTX.version()}, fp16, sm_86, {size}, 53 kernels, and f.engine.json; " in printed
    assert "note: --timing-cache was not used" in printed
    assert "large engines" not in printed
    # an engine that the checks refuse leaves the old one
    monkeypatch.setattr("export.to_trt.check_engine", lambda engine, sidecar: ["it computes otherwise"])
    with pytest.raises(BuildError, match=r"f\.engine is not written: it computes otherwise"):
        main(line)
    assert out.read_bytes() == content
    assert read_sidecar(out) == sidecar


def test_large_engines_for_old_gpus_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sidecar = read_sidecar(write_engine(tmp_path))
    monkeypatch.chdir(tmp_path)
    for size, gpus, flavor, large in (
        (20_000_001, (75, 86), "rtx", True),
        (20_000_000, (75, 86), "rtx", False),
        (30_000_000, (86,), "rtx", False),
    ):
        built = dataclasses.replace(sidecar, engine_bytes=size, compute_capabilities=gpus, flavor=flavor)
        monkeypatch.setattr("export.to_trt.build_engine", lambda options, built=built: built)
        assert main([]) == 0
        printed = capsys.readouterr().out
        assert ("large engines" in printed) == large
        assert "--timing-cache" not in printed
    tensorrt = dataclasses.replace(sidecar, flavor="tensorrt")
    monkeypatch.setattr("export.to_trt.build_engine", lambda options: tensorrt)
    assert main(["--timing-cache", "t"]) == 0
    assert "was not used" not in capsys.readouterr().out
    monkeypatch.setattr("export.to_trt.build_engine", lambda options: None)
    assert main(["--timing-cache", "t", "--onnx-only"]) == 0
    printed = capsys.readouterr().out
    assert "--timing-cache was not used" in printed
    assert "--optimization-level" not in printed
    rtx = dataclasses.replace(sidecar, flavor="rtx")
    settings = ["--optimization-level", "3", "--timing-iterations", "1", "--aux-streams", "0"]
    for made, ignored in ((rtx, True), (tensorrt, False)):
        monkeypatch.setattr("export.to_trt.build_engine", lambda options, made=made: made)
        assert main(settings) == 0
        printed = capsys.readouterr().out
        for option in ("--optimization-level", "--timing-iterations"):
            assert (f"note: {option} was not used: it is for TensorRT alone" in printed) == ignored
        assert "--aux-streams" not in printed


def test_the_log_of_a_build_that_fails_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing was logged; without it there would be the log of an earlier one."""
    options = _engine(tmp_path)
    graph = ExportedGraph(options.plugin_form, b"graph", ModelSpec(), {}, {}, ParityReport(ModelSpec(), ()))
    requests = []

    def run(request: dict[str, Any], environment: dict[str, str], flavor: Flavor, progress: bool) -> str:
        requests.append(request)
        assert Path(request["onnx"]).read_bytes() == b"graph"
        if len(requests) != 2:
            Path(request["log"]).write_text("what TensorRT said")
        if len(requests) < 3:
            raise BuildError("it fails")
        Path(request["out"]).write_bytes(b"engine")
        Path(request["timing_cache_out"]).write_bytes(b"measured")
        return "10.1"

    monkeypatch.setattr("export.to_trt.run_builder", run)
    cache = tmp_path / "t.cache"
    kept = dataclasses.replace(options, timing_cache=cache)
    for said in ("what TensorRT said", ""):
        with pytest.raises(BuildError, match=r"^it fails \(log: .*f\.engine\.build\.log\)$"):
            _build(kept, graph, TENSORRT, (86,), Path("p.so"))
        assert options.log.read_text() == said
    assert not cache.exists()
    assert _build(kept, graph, TENSORRT, (86,), Path("p.so")) == (b"engine", "10.1", None)
    assert cache.read_bytes() == b"measured"
    assert requests[-1]["timing_cache"] == str(cache)
    assert (requests[-1]["capabilities"], requests[-1]["module"], requests[-1]["plugin"]) == ([], "tensorrt", "p.so")
    assert requests[-1]["plugin_name"] == [PLUGIN.name, PLUGIN.version, PLUGIN.namespace]
    assert requests[-1]["profile"] == kept.profile.shapes
    settings = ("optimization_level", "timing_iterations", "aux_streams")
    assert [requests[-1][name] for name in settings] == [5, 8, None]
    set_otherwise = dataclasses.replace(kept, optimization_level=0, timing_iterations=3, aux_streams=0)
    _build(set_otherwise, graph, TENSORRT, (86,), Path("p.so"))
    assert [requests[-1][name] for name in settings] == [0, 3, 0]
    _build(set_otherwise, graph, RTX, (86, 89), Path("p.so"))
    assert (requests[-1]["capabilities"], requests[-1]["timing_cache"]) == ((86, 89), None)
    assert [requests[-1][name] for name in settings] == [None, None, 0]  # it times nothing
    assert not Path(requests[-1]["onnx"]).parent.exists()
    # a cache that cannot be kept is no failure
    locked = dataclasses.replace(options, timing_cache=tmp_path)
    assert _build(locked, graph, TENSORRT, (86,), Path("p.so"))[0] == b"engine"


@needs_rtx
@pytest.mark.usefixtures("shared_cache")
def test_int8_in_rtx_spares_the_first_convolution_and_says_what_it_is_worth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The channels of a frame are three: INT8 kernels pad and quantise them for nothing."""
    calibration = CalibrationOptions("demo", images=16)
    sidecar = build_engine(
        _engine(tmp_path, precision="int8", calibration=calibration, profile=Profile(sizes_hw=SMALL))
    )
    assert sidecar is not None
    assert "INT8 is probably slower than FP16 in TensorRT-RTX, and was never timed" in capsys.readouterr().out
    first = next(iter(sidecar.convolutions))
    assert sidecar.convolutions[first][1] == "fp16"
    assert first in sidecar.calibration["recipe"]["float_layers"]
    assert sidecar.mac_shares["int8"] > 0.8
    assert sidecar.kernels is not None
    assert sidecar.kernels <= 81


def test_what_int8_is_worth_is_said_of_rtx_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Flavor, "installed", lambda self: True)
    calibrated = EngineOptions("w", Path("f"), precision="int8", calibration=CalibrationOptions("demo"), flavor="rtx")
    for options in (
        dataclasses.replace(calibrated, flavor="tensorrt"),
        dataclasses.replace(calibrated, onnx_only=True),
        EngineOptions("w", Path("f"), precision="fp16", flavor="rtx"),
    ):
        assert _suit_int8(options) is options
    assert capsys.readouterr().out == ""
    assert _suit_int8(calibrated).float_first
    assert _suit_int8(dataclasses.replace(calibrated, weights="q.pth", calibration=None)).float_first
    monkeypatch.setattr(Flavor, "installed", lambda self: False)
    assert _suit_int8(calibrated) is calibrated  # what is missing is said where the engine would be built
