"""Reading EngineInspector's JSON. To ask it takes a GPU; the form is that of NVIDIA's documentation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from export.engine_layers import compare, count_kernels, engine_shares, is_readable, layer_precisions, read_information
from export.graph import build_heads
from export.options import DEMO, CalibrationOptions
from export.quantize import convolutions, to_fp16
from export.to_trt import EngineOptions, Profile, build_engine
from facespec.errors import BuildError
from tests.engines import write_engine
from trainer import load_model
from trt_runtime.gpu.flavor import FLAVORS, RTX, Flavor, gpu_capability
from trt_runtime.gpu.sidecar import read_sidecar

NAMES = {"/body/a/Conv", "/body/b/Conv", "/body/c/Conv"}


def _layer(metadata: str, weights: str | None, data: str, kind: str = "CaskConvolution", name: str = "x") -> Any:
    layer = {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": "in", "Location": "Device", "Dimensions": [1, 8, 80, 80], "Format/Datatype": data}],
        "Outputs": [{"Name": "out", "Dimensions": [1, 8, 80, 80], "Format/Datatype": "Row major linear FP16 format"}],
        "TacticName": "sm80_xmma_fprop_implicit_gemm",
        "Metadata": metadata,
    }
    return layer if weights is None else {**layer, "Weights": {"Type": weights, "Count": 64}}


def _found(*layers: Any) -> dict[str, str]:
    return layer_precisions({"Layers": list(layers), "Bindings": ["images"]}, NAMES)


INT8 = "Thirty-two wide channel vectorized row major Int8 format"
HALF = "Channel major FP16 format where channel % 8 == 0"


@pytest.mark.parametrize(
    ("weights", "data", "expected"),
    [
        ("Int8", INT8, "int8"),
        ("Half", HALF, "fp16"),
        ("Float", "Row major linear FP32", "fp32"),
        ("BFloat16", "Row major linear BF16", "bf16"),
        ("Int8", HALF, "fp16"),  # weights that are stored small are no INT8 arithmetic
        ("Half", "Row major UInt8 format", "fp16"),  # frames
        (None, INT8, "int8"),
        ("Int8", "N/A due to dynamic shapes", "int8"),
    ],
)
def test_a_layer_by_its_metadata(weights: str | None, data: str, expected: str) -> None:
    layer = _layer("[ONNX Layer: /body/a/Conv]\x1f[ONNX Layer: /body/a/LeakyRelu]", weights, data)
    assert _found(layer) == {"/body/a/Conv": expected}


def _myelin(kind: str, data: str, weights: str) -> Any:
    """A layer as TensorRT 11 and RTX list it: the datatype apart from the format, weights as constants."""
    form = "(NHWC) Channel major format"
    return {
        "Name": "/body/a/Conv_myl0_5",
        "LayerType": kind,
        "Inputs": [{"Name": "in", "Dimensions": [1, 4, 64, 64], "Datatype": data, "Format": form}],
        "Constants": [
            {"Name": "weights", "Dimensions": [8, 4, 3, 3], "Datatype": weights, "Format": form},
            {"Name": "scales", "Dimensions": [1, 8, 1, 1], "Datatype": "Float", "Format": form},
        ],
        "Outputs": [{"Name": "out", "Dimensions": [1, 8, 64, 64], "Datatype": "Float", "Format": form}],
        "TacticName": "__myelin_CASK_STUB",
        "Metadata": "[ONNX Layer: /body/a/Conv][ONNX Layer: x_dq]",
    }


@pytest.mark.parametrize("kind", ["correlation", "runtime_fusion"])
def test_a_layer_in_the_form_of_tensorrt_11_and_rtx(kind: str) -> None:
    """The kernel that scales an INT8 convolution's FP32 result names the convolution too."""
    scales = {
        **_myelin("kgen", "Float", "Half"),
        "Name": "__myl_MulMaxAddRoun",
        "TacticName": "__myl_MulMaxAddRoun_0x1",
    }
    for data, expected in (("Int8", "int8"), ("Half", "fp16"), ("Float", "fp32")):
        assert _found(scales, _myelin(kind, data, data)) == {"/body/a/Conv": expected}
    weights_given = _myelin(kind, "Half", "Float")  # Turing makes INT8 weights FP16 first: they are an input then
    weights_given["Inputs"] *= 2
    assert _found(weights_given) == {"/body/a/Conv": "fp16"}
    assert _found(scales) == {"/body/a/Conv": "fp32"}  # nothing better is known


def test_kernels_are_counted_from_a_log() -> None:
    kinds = ("shape_call", "signal", "wait", "kgen", "correlation", "runtime_fusion")
    layers = [f"Name: a, b_{kind}, LayerType: {kind}, Inputs: [ {{ Name: x }}], Metadata: " for kind in kinds]
    plugin = "Name: decode_nms_myl0_95, LayerType: custom_layer, Inputs: [], Metadata: [ONNX Layer: decode_nms]"
    assert count_kernels("\n".join(["    0.771 VERBOSE Layers:", *layers, plugin, "I/O Tensors:"])) == 3
    assert count_kernels("    0.771 VERBOSE words\n") is None
    assert count_kernels("") is None


def test_names_are_whole_and_fused_layers_have_several() -> None:
    assert _found(_layer("[ONNX Layer: /body/a/Conv_q]", "Int8", INT8)) == {}
    assert _found(_layer("", "Half", HALF, name="/body/a/Conv + /body/b/Conv")) == {
        "/body/a/Conv": "fp16",
        "/body/b/Conv": "fp16",
    }


def test_what_moves_data_does_not_count_where_a_convolution_does() -> None:
    reformat = _layer("[ONNX Layer: /body/a/Conv]", None, "Row major linear FP32", "Reformat")
    reformat["TacticName"] = ""
    convolution = _layer("[ONNX Layer: /body/a/Conv]", "Int8", INT8)
    assert _found(reformat, convolution) == _found(convolution, reformat) == {"/body/a/Conv": "int8"}
    # part of it in a wider type: the wider one counts
    assert _found(convolution, _layer("[ONNX Layer: /body/a/Conv]", "Half", HALF)) == {"/body/a/Conv": "fp16"}


def test_an_engine_without_details() -> None:
    assert _found("/body/a/Conv + /body/a/LeakyRelu", "/body/b/Conv") == {}
    assert layer_precisions({}, NAMES) == {}


def test_shares_and_disagreements() -> None:
    graph = {"/body/a/Conv": (60, "int8"), "/body/b/Conv": (30, "int8"), "/body/c/Conv": (10, "fp16")}
    same = {name: kind for name, (_, kind) in graph.items()}
    assert compare(graph, same) == ({"int8": 0.9, "fp16": 0.1}, [])
    shares, problems = compare(graph, {**same, "/body/b/Conv": "fp32"})
    assert shares == {"int8": 0.6, "fp32": 0.3, "fp16": 0.1}
    assert problems == ["/body/b/Conv computes in fp32 in the engine, the graph has it in int8"]
    del same["/body/a/Conv"]
    assert compare(graph, same) == ({"unknown": 0.6, "int8": 0.3, "fp16": 0.1}, [])


def test_the_graph_names_every_convolution() -> None:
    """They are found by name, so names must be there, each once, and go through the parser's "[ONNX Layer: ...]"."""
    heads = build_heads(load_model(), (64, 64))
    found = convolutions(to_fp16(heads), (64, 64))
    nodes = [node.name for node in heads.graph.node if node.op_type == "Conv"]
    assert list(found) == nodes
    assert not any("]" in name or " + " in name for name in nodes)
    information = {"Layers": [_layer(f"[ONNX Layer: {name}]", "Half", HALF) for name in nodes]}
    assert compare(found, layer_precisions(json.loads(json.dumps(information)), set(found))) == ({"fp16": 1.0}, [])


def test_where_an_engine_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its TensorRT is installed and the GPU here is one of those it was built for."""
    sidecar = read_sidecar(write_engine(tmp_path, compute_capabilities=(86, 89)))

    def readable(gpu: int | None, installed: bool = True, **changes: object) -> bool:
        monkeypatch.setattr("export.engine_layers.gpu_capability", lambda: gpu)
        monkeypatch.setattr(Flavor, "installed", lambda self: installed and self.name == "tensorrt")
        return is_readable(dataclasses.replace(sidecar, **changes))  # type: ignore[arg-type]

    assert readable(86)
    assert readable(89)
    assert not readable(None)
    assert not readable(90)
    assert not readable(86, installed=False)
    assert not readable(86, flavor="rtx")
    assert not readable(86, flavor="unheard")


def test_how_the_inspector_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the best shape, of the file wherever it is called from; by a child that says what it is told to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RETINAFACE_PLUGIN", str(tmp_path / "p.so"))
    (tmp_path / "p.so").write_bytes(b"")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "__init__.py").write_text("")
    write_engine(tmp_path)
    sidecar = read_sidecar("f.engine")
    child = "import json, sys\nrequest = json.load(sys.stdin)\n"
    done = "\nprint(json.dumps({'event': 'done', 'version': '1'}))"
    place = tmp_path / "export" / "engine_builder.py"

    def ask(rest: str) -> Any:
        place.write_text(child + rest + done)
        return read_information(Path("f.engine"), sidecar)

    asked = ask("open(request['out'], 'w').write(json.dumps({'asked': request}))")["asked"]
    assert (asked["shape"], asked["module"]) == ([4, 320, 640, 3], "tensorrt")
    assert (asked["engine"], asked["plugin"]) == (str(tmp_path / "f.engine"), str(tmp_path / "p.so"))
    assert not Path(asked["out"]).parent.exists()
    with pytest.raises(
        BuildError,
        match=r"^f\.engine: EngineInspector fails: TensorRT: the build process ended with exit code 1: last$",
    ):
        ask("print('first\\nlast', file=sys.stderr); sys.exit(1)")
    with pytest.raises(BuildError, match="EngineInspector fails: TensorRT: the build process ended with exit code 3"):
        ask("sys.exit(3)")
    with pytest.raises(BuildError, match="EngineInspector's answer is not JSON"):
        ask("open(request['out'], 'w').write('rubbish')")
    layers = {"Layers": [_layer("[ONNX Layer: c]", "Float", "FP32")]}
    place.write_text(f"{child}open(request['out'], 'w').write({json.dumps(layers)!r}){done}")
    problem = "c computes in fp32 in the engine, the graph has it in fp16"
    assert engine_shares(Path("f.engine"), sidecar) == ({"fp32": 1.0}, [problem])


@pytest.mark.skipif(not RTX.installed(), reason="TensorRT-RTX is not installed")
@pytest.mark.skipif(gpu_capability() is not None, reason="there is a GPU: the next test asks it")
def test_without_a_gpu_the_inspector_ends_in_one_line(tmp_path: Path) -> None:
    profile = Profile((1, 1, 1), ((64, 64),) * 3)
    options = EngineOptions("mobilenet0.25", tmp_path / "a.engine", profile, precision="fp16", capabilities=(86,))
    sidecar = build_engine(options)
    assert sidecar is not None
    with pytest.raises(BuildError, match=r"EngineInspector fails: TensorRT-RTX: the engine cannot be loaded.*driver"):
        read_information(options.out, sidecar)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("flavor", FLAVORS)
def test_the_engine_computes_in_what_the_graph_says(flavor: str, precision: str, tmp_path: Path) -> None:
    if not FLAVORS[flavor].installed():
        pytest.skip(f"{FLAVORS[flavor].title} is not installed")
    if flavor == RTX.name and gpu_capability() not in RTX.capabilities:
        pytest.skip(f"TensorRT-RTX does not build for sm_{gpu_capability()}")
    calibration = CalibrationOptions(DEMO) if precision == "int8" else None
    options = EngineOptions(
        "mobilenet0.25", tmp_path / "a.engine", precision=precision, calibration=calibration, flavor=flavor
    )
    sidecar = build_engine(options)
    assert sidecar is not None
    shares, problems = engine_shares(options.out, sidecar)
    assert problems == []
    assert shares == pytest.approx(sidecar.mac_shares)
