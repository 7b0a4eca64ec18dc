"""What is said of engines and ONNX files, and what speaks against them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export import inspect as module
from export.inspect import Inspection, inspect, main
from facespec.errors import BuildError, ModelFileError
from facespec.spec import SPEC_KEY, DecodeSpec, ModelSpec
from tests.engines import write_engine
from trt_runtime.gpu.sidecar import read_sidecar, sidecar_path


def test_what_is_said_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that its sidecar says, and the GPU here."""
    monkeypatch.setattr(module, "gpu_capability", lambda: None)
    calibration = {"source": "demo", "images": 16, "seed": 0}
    path = write_engine(
        tmp_path,
        parity={"heads": 0.0012345, "faces": 7},
        convolutions={"a": (90, "int8"), "b": (10, "fp16")},
        precision="int8",
        calibration=calibration,
        compute_capabilities=(86, 89),
    )
    found = inspect(path)
    assert (found.kind, found.problems, found.valid) == ("engine", [], True)
    assert found.file == str(path)
    sidecar = read_sidecar(path)
    assert found.facts == {
        "flavor": "TensorRT",
        "version": "10.14.1",
        "compute_capabilities": [86, 89],
        "gpu_here": "none",
        "precision": "int8",
        "calibration": calibration,
        "parity": {"heads": 0.0012, "faces": 7.0},
        "bytes": 204,
        "sha256": sidecar.engine_sha256,
        "onnx_sha256": "0" * 64,
        "built": "2026-01-01T00:00:00+00:00",
        "toolkit": "0.1.0",
        "command": sidecar.command,
    }
    shapes = {"min": [1, 320, 640, 3], "opt": [4, 320, 640, 3], "max": [16, 320, 640, 3]}
    assert found.inputs == {"images": {"type": "uint8", **shapes}}
    assert found.outputs["scores"] == {"type": "float32", "shape": ["B", 99]}
    assert found.precision == {"int8": 0.9, "fp16": 0.1}
    assert found.kernels is None
    assert found.plugin["name"] == "RetinaFaceDecodeNMS"
    assert ModelSpec.from_json(json.dumps(found.spec)) == sidecar.spec
    monkeypatch.setattr(module, "gpu_capability", lambda: 90)
    assert inspect(path).facts["gpu_here"] == 90
    assert "calibration" not in inspect(write_engine(tmp_path)).facts
    counted = inspect(write_engine(tmp_path, kernels=59))
    assert json.loads(counted.to_json())["kernels"] == 59
    assert "\nkernels              59 in a call, beside the plugin\n" in str(counted)


def test_the_layers_are_read_only_where_the_engine_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded for that: not before its hash is known, and not where TensorRT or the GPU is missing."""
    asked = []

    def shares(path: Path, sidecar: object) -> tuple[dict[str, float], list[str]]:
        asked.append(path)
        return {"fp16": 0.75, "unknown": 0.25}, ["c computes in fp32"]

    path = write_engine(tmp_path)
    monkeypatch.setattr(module, "engine_shares", shares)
    monkeypatch.setattr(module, "is_readable", lambda sidecar: False)
    assert inspect(path).valid
    assert asked == []
    monkeypatch.setattr(module, "is_readable", lambda sidecar: True)
    found = inspect(path)
    assert asked == [path]
    assert found.valid  # what a version of EngineInspector says of fused layers is no reason to refuse an engine
    assert found.facts["doubts"] == ["c computes in fp32"]
    assert found.facts["engine_inspector"] == {"fp16": "75.0 %", "unknown": "25.0 %"}

    def fails(path: Path, sidecar: object) -> None:
        raise BuildError("it cannot be asked")

    monkeypatch.setattr(module, "engine_shares", fails)
    assert inspect(path).problems == ["it cannot be asked"]
    monkeypatch.setattr(module, "engine_shares", shares)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert ["SHA-256" in problem for problem in inspect(path).problems] == [True]
    assert len(asked) == 1


@pytest.mark.parametrize(("content", "last"), [(b"ftrt" + bytes(226), "yes"), (b"text" + bytes(226), "unverified")])
def test_what_only_its_sidecar_says_to_be_an_engine_is_unverified(tmp_path: Path, content: bytes, last: str) -> None:
    found = inspect(write_engine(tmp_path, content))
    assert found.problems == []
    assert bool(found.unverified) is (last == "unverified")
    assert str(found).splitlines()[-1].split()[:2] == ["valid", f"{last}{':' * bool(found.unverified)}"]


def test_a_table() -> None:
    found = Inspection("f", "engine", facts={"a_b": None, "hash": "0123456789abcdef" * 4, "list": [1, "x"], "no": ""})
    found.inputs = {"images": {"type": "uint8"}}
    found.outputs = {"boxes": {"shape": ["B", 4]}}
    found.precision = {"int8": 0.876, "fp16": 0.124}
    found.plugin = {"top_k": 5}
    found.spec = {"format": 1, "decode": {"x": 0.5}}
    rows = [(line[:20].strip(), line[21:]) for line in str(found).splitlines()]
    assert rows == [
        ("file", "f"),
        ("kind", "engine"),
        ("a b", "unknown"),
        ("hash", "0123456789ab..."),
        ("list", "[1, x]"),
        ("no", "unknown"),
        ("input", "images: type uint8"),
        ("output", "boxes: shape [B, 4]"),
        ("convolutions", "87.6 % int8, 12.4 % fp16 (by multiply-accumulates)"),
        ("plugin", "top_k 5"),
        ("decode", "x 0.5"),
        ("valid", "yes"),
    ]
    assert json.loads(found.to_json())["valid"] is True
    found.unverified = "only its sidecar says so"
    assert str(found).splitlines()[-1].split(maxsplit=1) == ["valid", "unverified: only its sidecar says so"]
    assert json.loads(found.to_json())["unverified"] == "only its sidecar says so"
    found.problems = ["one", "two\x1b[2J\nvalid yes"]
    lines = str(found).splitlines()
    assert [line.split() for line in lines[-2:]] == [["PROBLEM", "one"], ["PROBLEM", "two\\x1b[2J\\nvalid", "yes"]]
    assert not any(line.startswith("valid") for line in lines)
    assert json.loads(found.to_json())["valid"] is False


def test_what_is_said_of_a_portable_graph(static_onnx: Path) -> None:
    found = inspect(str(static_onnx))
    model = onnx.load(static_onnx)
    kinds = [node.op_type for node in model.graph.node]
    counted = dict(reversed(item.split(" ")) for item in found.facts["operators"].split(", "))
    assert {kind: int(number) for kind, number in counted.items()} == {kind: kinds.count(kind) for kind in set(kinds)}
    assert found.facts["operators"].startswith(f"{kinds.count('Conv')} Conv") or kinds.count("Conv") < 50
    assert found.facts["operator_sets"] == {"ai.onnx": 19}
    assert found.facts["bytes"] == static_onnx.stat().st_size
    assert found.inputs == {"images": {"type": "uint8", "shape": ["batch", 320, 320, 3]}}
    assert found.outputs["num_detections"] == {"type": "int32", "shape": ["batch"]}
    assert found.outputs["landmarks"] == {"type": "float32", "shape": ["batch", 750, 5, 2]}
    assert ModelSpec.from_json(json.dumps(found.spec)).backbone == "mobilenet0.25"
    assert found.plugin == {}


def test_a_fixed_size_is_counted_at_that_size(tmp_path: Path) -> None:
    """Shares of a graph with two convolutions of unlike growth differ by size."""
    nodes = [
        helper.make_node("Cast", ["images"], ["f"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["x"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["x", "w"], ["a"], name="a"),
        helper.make_node("GlobalAveragePool", ["a"], ["m"]),
        helper.make_node("Cast", ["m"], ["h"], to=onnx.TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "v"], ["y"], name="y"),
    ]
    weights = [
        numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "w"),
        numpy_helper.from_array(np.ones((4096, 1, 1, 1), np.float16), "v"),
    ]
    for size, share in (((32, 64), 0.6), (("height", "width"), 3 * 640 * 640 / (3 * 640 * 640 + 4096))):
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", *size, 3])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["batch", 4096, 1, 1])],
            weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
        helper.set_model_props(model, {SPEC_KEY: ModelSpec().to_json()})
        onnx.save(model, tmp_path / "m.onnx")
        found = inspect(tmp_path / "m.onnx")
        assert found.precision == pytest.approx({"fp32": share, "fp16": 1 - share})
        assert found.problems == ["its outputs are not those of a detector with its spec"]


@pytest.fixture
def changed(static_onnx: Path, tmp_path: Path) -> Callable[[Callable[[onnx.ModelProto], None]], Inspection]:
    def call(change: Callable[[onnx.ModelProto], None]) -> Inspection:
        model = onnx.load(static_onnx)
        change(model)
        (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
        return inspect(tmp_path / "changed.onnx")

    return call


def test_what_speaks_against_a_graph(changed: Callable[..., Inspection], static_onnx: Path) -> None:
    assert changed(lambda model: None).problems == []
    spec = ModelSpec.from_json(onnx.load(static_onnx).metadata_props[0].value)
    other = dataclasses.replace(spec, decode=dataclasses.replace(spec.decode, max_detections=99))
    found = changed(lambda model: helper.set_model_props(model, {SPEC_KEY: other.to_json()}))
    assert found.problems == ["its outputs are not those of a detector with its spec"]
    found = changed(lambda model: helper.set_model_props(model, {SPEC_KEY: "{}"}))
    assert (found.kind, len(found.problems), found.spec) == ("portable ONNX", 1, {})
    found = changed(lambda model: model.metadata_props.pop())
    assert found.problems == ["not written by this toolkit: there is no model spec in its metadata"]
    assert found.kind == "ONNX"
    found = changed(lambda model: setattr(model.graph.node[5], "op_type", "NoSuchOperator"))
    assert found.problems[0].startswith("the ONNX checker finds a fault: ")
    assert all("\n" not in problem for problem in found.problems)

    def quantize(model: onnx.ModelProto) -> None:  # TensorRT builds it without a word, and wrongly
        model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
        model.graph.node.append(helper.make_node("QuantizeLinear", ["boxes", "one"], ["q"], name="q"))

    found = changed(quantize)
    assert any("zero point is missing" in problem for problem in found.problems)
    assert not found.valid
    found = changed(lambda model: model.graph.input[0].type.tensor_type.shape.dim.pop())
    assert any("its convolutions cannot be counted" in problem for problem in found.problems)


def test_weights_beside_the_file(static_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From whatever folder it is asked."""
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.load(static_onnx), "deep/m.ONNX", save_as_external_data=True, location="m.data")
    found = inspect("deep/m.ONNX")
    assert (found.problems, found.precision, found.kind) == ([], {"fp32": 1.0}, "portable ONNX")


def test_files_that_are_neither(tmp_path: Path, error_line: Callable[..., str]) -> None:
    engine = write_engine(tmp_path)
    assert error_line(main, tmp_path) == f"{tmp_path}: a folder; give an engine or an ONNX file"
    assert "no such file" in error_line(main, "nothing.engine")
    for name in ("w.pth", "w.PTH", "w.pt"):
        (tmp_path / name).write_bytes(b"x")
        assert "a checkpoint" in error_line(main, name)
    assert f"give the engine: python -m export.inspect {engine}" in error_line(main, sidecar_path(engine))
    (tmp_path / "other.json").write_text("{}")
    assert "neither a TensorRT engine nor an ONNX file" in error_line(main, "other.json")
    sidecar_path(engine).unlink()
    assert "f.engine.json: missing" in inspect(engine).problems[0]  # its first bytes are an engine's
    with pytest.raises(ModelFileError, match="not an ONNX file"):
        inspect(_write(tmp_path / "w.ONNX"))


@pytest.mark.parametrize("name", ["model", "model.bin"])
def test_files_of_any_name(name: str, static_onnx: Path, tmp_path: Path) -> None:
    place = tmp_path / name
    place.write_bytes(static_onnx.read_bytes())
    assert inspect(place).kind == "portable ONNX"
    engine = write_engine(tmp_path)
    engine.rename(place)
    sidecar_path(engine).rename(sidecar_path(place))
    assert (inspect(place).kind, inspect(place).problems) == ("engine", [])


def _write(path: Path) -> Path:
    path.write_bytes(b"x")
    return path


def test_the_command_fails_where_something_speaks_against_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = write_engine(tmp_path, spec=ModelSpec(decode=DecodeSpec(top_k=9)))
    assert main([str(engine)]) == 0
    assert "top_k 9" in capsys.readouterr().out
    assert main([str(engine), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"]["decode"]["top_k"] == 9
    engine.write_bytes(b"ftrt")
    assert main([str(engine), "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["valid"] is False
