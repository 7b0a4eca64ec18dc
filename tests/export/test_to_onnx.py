from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import export.calibration
from export.calibration import Calibration, report_calibration
from export.graph import HEAD_NAMES, build_heads, build_portable
from export.options import CalibrationOptions, parity_frames
from export.parity import check_parity
from export.to_onnx import CALIBRATION_HW, ExportOptions, export_onnx, main, parse_arguments
from facespec.errors import DataError, ParityError, SpecError
from facespec.images import write_image
from facespec.letterbox import Frame
from facespec.samples import sample_photographs
from facespec.spec import SPEC_KEY, DecodeSpec, ModelSpec
from trainer import load_model, save_checkpoint
from trainer.model import BACKBONES, RetinaFace


def _shape(value: onnx.ValueInfoProto) -> list[object]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_contract_of_the_graph(static_onnx: Path, dynamic_onnx: Path) -> None:
    for path, size in ((static_onnx, [320, 320]), (dynamic_onnx, ["height", "width"])):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        (images,) = model.graph.input
        assert (images.name, _shape(images)) == ("images", ["batch", *size, 3])
        assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        outputs = {o.name: (o.type.tensor_type.elem_type, _shape(o)) for o in model.graph.output}
        assert outputs == {
            "num_detections": (onnx.TensorProto.INT32, ["batch"]),
            "boxes": (onnx.TensorProto.FLOAT, ["batch", 750, 4]),
            "scores": (onnx.TensorProto.FLOAT, ["batch", 750]),
            "landmarks": (onnx.TensorProto.FLOAT, ["batch", 750, 5, 2]),
            "num_candidates": (onnx.TensorProto.INT32, ["batch"]),
        }
        # the spec travels, with the hash of the weights
        metadata = {item.key: item.value for item in model.metadata_props}
        assert ModelSpec.from_json(metadata[SPEC_KEY]) == load_model().spec
        # standard operators only, heads merged, batch normalisation folded, nothing stored outside the file
        assert {node.domain for node in model.graph.node} == {""}
        kinds = [node.op_type for node in model.graph.node]
        assert (kinds.count("Conv"), kinds.count("BatchNormalization"), kinds.count("NonMaxSuppression")) == (50, 0, 1)
        assert "Softmax" not in kinds
        heads = [node for node in model.graph.node if node.output[0] in HEAD_NAMES]
        shapes = {item.name: item.dims for item in model.graph.initializer}
        assert [list(shapes[node.input[1]]) for node in heads] == [[32, 64, 1, 1]] * 3


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("resnet34", "resnet50") else name
        for name in BACKBONES
        if name != "mobilenet0.25"
    ],
)
def test_every_backbone_exports_with_parity(backbone: str) -> None:
    """Untrained weights find nothing, so the heads are what is compared; the head bias makes some priors faces."""
    torch.manual_seed(0)
    spec = ModelSpec(backbone=backbone, fpn_channels=BACKBONES[backbone][1])
    model = RetinaFace(spec).eval()
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    # each takes seconds to export: but for the smallest, the larger are of one kind, in turns
    turns = {"mobilenet1.0": [(64, 96)], "resnet18": [None], "resnet34": [(64, 96)], "resnet50": [None]}
    for size_hw in turns.get(backbone, [(64, 96), None]):
        graph = build_portable(build_heads(model, size_hw), model.spec, size_hw)
        report = check_parity(graph, model, {"noise": frame}, size_hw)
        assert report.rows[0].faces > 0
        assert report.rows[0].equal


def test_parity_frames(tmp_path: Path, photographs: dict[str, Frame]) -> None:
    assert len(parity_frames(None)) == 2
    for index in range(20):
        write_image(tmp_path / "many" / f"{index}.png", np.full((8, 8 + index, 3), index, np.uint8))
    assert len(parity_frames(tmp_path / "many")) == 8
    assert list(parity_frames(tmp_path / "many" / "3.png")) == ["3.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        parity_frames(tmp_path / "empty")


@pytest.mark.parametrize(
    ("target", "amount"),
    [("head_8", 0.02), ("body", 0.01), ("priors", 0.5), ("mean", 2)],
)
def test_a_graph_that_differs_fails_the_report(
    target: str, amount: float, static_onnx: Path, photographs: dict[str, Frame]
) -> None:
    """Every stage is really compared: a wrong weight, prior or mean colour is noticed."""
    model = load_model()
    graph = onnx.load(static_onnx)
    assert not any(not row.equal for row in check_parity(graph, model, photographs, (320, 320)).rows)
    by_output = {node.output[0]: node for node in graph.graph.node}
    tensors = {item.name: item for item in graph.graph.initializer}
    if target == "head_8":
        chosen = tensors[by_output["head_8"].input[2]]
    elif target == "body":
        chosen = tensors[next(node for node in graph.graph.node if node.op_type == "Conv").input[1]]
    elif target == "priors":
        chosen = next(item for item in graph.graph.initializer if list(item.dims) == [4200, 4])
    else:
        chosen = next(item for item in graph.graph.initializer if list(item.dims) == [1, 3, 1, 1])
    chosen.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(chosen) + amount).astype(np.float32), chosen.name))
    report = check_parity(graph, model, photographs, (320, 320))
    with pytest.raises(ParityError, match="differs from PyTorch"):
        report.require_equal()
    assert "DIFFERS" in str(report)


def test_nothing_is_written_without_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that goes wrong, here by other weights on one side, leaves the old file as it was."""
    import export.graph

    def other_weights(model: RetinaFace, size_hw: tuple[int, int] | None) -> onnx.ModelProto:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            next(changed.parameters()).add_(0.01)
        return build_heads(changed, size_hw)

    monkeypatch.setattr(export.graph, "build_heads", other_weights)
    (tmp_path / "m.onnx").write_text("old")
    options = ExportOptions("mobilenet0.25", tmp_path / "m.onnx", (320, 320))
    with pytest.raises(ParityError, match="nothing was written"):
        export_onnx(options)
    assert (tmp_path / "m.onnx").read_text() == "old"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_images_without_faces_prove_nothing(tmp_path: Path) -> None:
    write_image(tmp_path / "grey.png", np.full((64, 64, 3), 128, np.uint8))
    options = ExportOptions("mobilenet0.25", tmp_path / "m.onnx", (320, 320), parity_images=tmp_path / "grey.png")
    with pytest.raises(ParityError, match="finds no face"):
        export_onnx(options)


def test_command(
    refused: Callable[..., str], error_line: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--size 96x160 --out new/m.onnx --score 0.3 --iou 0.5 --top-k 77 --max-detections 11"
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "wrote new/m.onnx: mobilenet0.25, 96x160" in printed
    assert "equal; allowed: heads 0.001" in printed
    model = onnx.load(tmp_path / "new" / "m.onnx")
    spec = ModelSpec.from_json({item.key: item.value for item in model.metadata_props}[SPEC_KEY])
    assert spec.decode == DecodeSpec(score_threshold=0.3, iou_threshold=0.5, top_k=77, max_detections=11)
    assert _shape(model.graph.input[0]) == ["batch", 96, 160, 3]
    assert "multiple of 32" in refused("export.to_onnx", "--size", "100x100")
    assert "no such weights" in error_line(main, "--weights", "none.pth")
    assert "score_threshold" in error_line(main, "--score", "2")
    (tmp_path / "evil.pth").write_bytes(b"\x80\x04cposix\nsystem\n(X\x09\x00\x00\x00touch ran\x85R.")
    assert "not a PyTorch checkpoint" in error_line(main, "--weights", "evil.pth")  # nor is it run
    (tmp_path / "evil.pth").unlink()
    assert "ends in .onnx" in error_line(main, "--out", "model")
    assert "try 4096" in error_line(main, "--size", "99999x32")
    assert "pixels" in error_line(main, "--size", "4128x4096")
    (tmp_path / "w.onnx").write_bytes(b"mine")
    assert "is a file that is read" in error_line(main, "--weights", "w.onnx", "--out", "w.onnx")
    assert (tmp_path / "w.onnx").read_bytes() == b"mine"
    (tmp_path / "w.onnx").unlink()
    assert os.listdir(tmp_path) == ["new"]


def test_checkpoints_keep_their_hash_through_the_export(tmp_path: Path) -> None:
    model = load_model()
    with torch.no_grad():
        model.ClassHead[0].get_parameter("conv1x1.bias").add_(0.1)
    save_checkpoint(tmp_path / "own.pth", model)
    loaded = load_model(tmp_path / "own.pth")
    assert loaded.spec.weights_sha256 not in ("", load_model().spec.weights_sha256)
    graph = export_onnx(ExportOptions(str(tmp_path / "own.pth"), tmp_path / "m.onnx", (96, 96)))
    assert graph.spec == dataclasses.replace(loaded.spec, decode=DecodeSpec())


def test_sizes_are_height_first() -> None:
    assert parse_arguments(["--size", "320x640"]).size_hw == (320, 640)
    assert parse_arguments(["--size", "dynamic"]).size_hw is None
    with pytest.raises(SystemExit) as left:
        parse_arguments(["--size", "large"])
    assert left.value.code == 2


@pytest.mark.parametrize(
    "module",
    [
        *("export.to_onnx", "export.to_trt", "export.inspect", "export.demo"),
        *("trainer.evaluate", "trt_runtime.detect"),
    ],
)
def test_missing_packages_are_named_in_one_line(
    module: str, refused: Callable[..., str], static_onnx: Path, tmp_path: Path, astronaut: Frame
) -> None:
    """As on a machine with the core alone: importing an optional package fails."""
    blocked = "('torch', 'onnx', 'onnxsim', 'onnxruntime', 'av', 'scipy')"
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    write_image(tmp_path / "a.png", astronaut)
    write_image(tmp_path / "images" / "a.png", astronaut)
    (tmp_path / "label.txt").write_text("# a.png\n10 10 50 50\n")
    arguments = {
        "export.to_onnx": [],
        "export.to_trt": [],
        "export.inspect": [static_onnx],
        "export.demo": [],
        "trainer.evaluate": ["--weights", "mobilenet0.25", "--data", tmp_path],
        "trt_runtime.detect": ["a.png", "--model", static_onnx],
    }[module]
    root = Path(__file__).parents[2]
    line = refused(module, *arguments, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"})
    assert "pip install -e '.[" in line or "no sample photographs" in line


def test_what_is_exported_by_default() -> None:
    assert parse_arguments([]) == ExportOptions("mobilenet0.25", Path("retinaface.onnx"), (640, 640))
    line = ["--weights", "w.pth", "--out", "o.onnx", "--size", "32x64", "--int8", "--calib", "c", "--images", "9"]
    line += ["--seed", "4", "--data", "d", "--parity", "p", "--iou", "0.5", "--top-k", "6"]
    decode = DecodeSpec(iou_threshold=0.5, top_k=6)
    calibration = CalibrationOptions("c", Path("d"), 9, 4)
    expected = ExportOptions(
        "w.pth",
        Path("o.onnx"),
        (32, 64),
        decode=decode,
        parity_images=Path("p"),
        precision="int8",
        calibration=calibration,
    )
    assert parse_arguments(line) == expected
    assert str(expected.calibration_list) == "o.onnx.calibration.txt"
    assert parse_arguments(["--fp16"]).precision == "fp16"


@pytest.mark.parametrize("option", [("--data", "d"), ("--images", "9"), ("--seed", "1"), ("--int8-recipe", "r.json")])
def test_what_goes_with_calibration_alone(option: tuple[str, str]) -> None:
    for precision in ([], ["--fp16"], ["--int8"]):
        with pytest.raises(SpecError, match=f"^{option[0]} goes with --int8 --calib$"):
            parse_arguments([*precision, *option])


def test_what_is_compared_is_spread_over_a_folder(tmp_path: Path) -> None:
    """The first, the last and what lies evenly between; names are those inside it."""
    for index in range(15):
        name = f"a/{index:02d}.png" if index < 10 else f"b/{index:02d}.png"
        write_image(tmp_path / name, np.full((8, 8, 3), index, np.uint8))
    found = parity_frames(tmp_path)
    names = [f"a/{index:02d}.png" for index in (0, 2, 4, 6, 8)] + [f"b/{index:02d}.png" for index in (10, 12, 14)]
    assert list(found) == names
    assert [int(frame[0, 0, 0]) for frame in found.values()] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert list(parity_frames(None)) == [path.name for path in sample_photographs()]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "calibrated on 3 images; their names are in {path}\n"),
        (
            {"with_faces": 0},
            "calibrated on 3 images; their names are in {path}\nnote: the model finds faces on 0 of them",
        ),
        (
            {"with_faces": 1, "images": ("a",) * 5},
            "on 5 images; their names are in {path}\nnote: the model finds faces on 1",
        ),
        ({"with_faces": 1, "images": ("a",) * 4}, "calibrated on 4 images; their names are in {path}\n"),
        ({"skipped": ("x", "y")}, "calibrated on 3 images, 2 could not be read; their"),
        ({"cached": True}, "calibrated on 3 images (as before, from the cache); their"),
        ({"options": CalibrationOptions("demo")}, "\nnote: crops of a few photographs are a last resort"),
    ],
)
def test_what_is_said_of_a_calibration(
    changes: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "names.txt"
    used = Calibration(CalibrationOptions("folder"), {}, ("a", "b", "c"), (), 3, False)
    used = dataclasses.replace(used, **changes)  # type: ignore[arg-type]
    report_calibration(used, path)
    assert path.read_text() == "".join(f"{name}\n" for name in used.images)
    printed = capsys.readouterr().out
    expected = said.format(path=path)
    assert expected in printed
    assert ("note:" in printed) == ("note:" in expected)


def test_an_int8_export_as_a_command(
    shared_cache: None, tmp_path: Path, astronaut: Frame, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of any size, calibrated at a size of its own; its list of names goes when a later export needs none."""
    assert CALIBRATION_HW == (640, 640)
    out = tmp_path / "m.onnx"
    write_image(tmp_path / "face.png", astronaut[:224, 128:320])
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        real = export.calibration.with_precision

        def noted(*arguments: Any, **more: Any) -> Any:
            sizes.append(arguments[3])
            return real(*arguments, **more)

        patch.setattr("export.calibration.with_precision", noted)
        patch.setattr("export.to_onnx.CALIBRATION_HW", (160, 128))
        line = ["--int8", "--calib", "demo", "--images", "8", "--out", str(out)]
        line += ["--parity", str(tmp_path / "face.png")]
        assert main([*line, "--size", "dynamic"]) == 0
        assert main([*line, "--size", "64x96"]) == 0
    assert sizes == [(160, 128), (64, 96)]
    printed = capsys.readouterr().out
    assert f"wrote {out}: mobilenet0.25, dynamic, convolutions 88% int8, 12% fp16, " in printed
    size = f"{out.stat().st_size / 1e6:.1f} MB"
    assert f"wrote {out}: mobilenet0.25, 64x96, convolutions 88% int8, 12% fp16, {size}, " in printed
    names = Path(f"{out}.calibration.txt")
    assert len(names.read_text().splitlines()) == 8
    assert main(["--size", "64x96", "--out", str(out)]) == 0
    assert not names.exists()
    assert "convolutions 100% fp32" in capsys.readouterr().out


def test_nothing_that_is_read_is_written_over(tmp_path: Path, error_line: Callable[..., str]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    write_image(tmp_path / "a.png", frame)
    (tmp_path / "a.png").rename(tmp_path / "a.onnx")
    assert "is a file that is read" in error_line(main, "--parity", "a.onnx", "--out", "a.onnx")
    (tmp_path / "b.onnx").write_text("{}")
    line = ("--int8", "--calib", "demo", "--int8-recipe", "b.onnx")
    assert "is a file that is read" in error_line(main, *line, "--out", "b.onnx")
    (tmp_path / "c.onnx.calibration.txt").write_text("{}")
    line = ("--int8", "--calib", "demo", "--int8-recipe", "c.onnx.calibration.txt")
    assert "is a file that is read" in error_line(main, *line, "--out", "c.onnx")
    assert (tmp_path / "a.onnx").stat().st_size > 100
