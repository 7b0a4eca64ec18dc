"""What travels beside an engine, and what is checked before one is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from facespec.errors import ModelFileError, SpecError
from facespec.spec import AnchorSpec, DecodeSpec, ModelSpec
from tests.engines import RTX_BITS, rtx_content, write_engine, write_rtx_engine
from trt_runtime.gpu.sidecar import (
    MAX_SIDECAR_BYTES,
    EngineHeader,
    Sidecar,
    check_engine,
    precision_shares,
    read_header,
    read_sidecar,
    sidecar_path,
)
from trt_runtime.kernels import PLUGIN

COMMAND = "python -m export.to_trt --weights w --fp16 --flavor rtx --compute-capability 86,89 --out f.engine"


@pytest.fixture
def sidecar(tmp_path: Path) -> Sidecar:
    return read_sidecar(write_engine(tmp_path))


def _sealed(data: dict[str, Any]) -> str:
    """Return a sidecar's text with its own hash, as the format has it: of everything else, with sorted keys."""
    data.pop("sidecar_sha256", None)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    return json.dumps({**data, "sidecar_sha256": digest})


def test_what_is_written_is_read(sidecar: Sidecar) -> None:
    text = sidecar.to_json()
    assert Sidecar.from_json(text) == Sidecar.from_json(text.encode()) == sidecar
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == ("{", "}")
    assert len(lines) == 2 + 1 + len(dataclasses.fields(Sidecar)) + 1  # format, one field a line, and the hash
    data = json.loads(text)
    assert data["format"] == 1
    assert json.loads(_sealed(dict(data))) == data
    assert data["spec"] == json.loads(sidecar.spec.to_json())
    for name in ("compute_capabilities", "profile", "convolutions"):  # JSON has no tuples
        assert type(getattr(sidecar, name)) is type(getattr(Sidecar.from_json(text), name))
    assert sidecar.profile == {"min": (1, 320, 640, 3), "opt": (4, 320, 640, 3), "max": (16, 320, 640, 3)}
    assert sidecar.convolutions == {"c": (100, "fp16")}
    assert sidecar.compute_capabilities == (86,)


def test_shares_of_the_precisions(sidecar: Sidecar) -> None:
    convolutions = {"a": (100, "fp16"), "b": (600, "int8"), "c": (200, "fp16"), "d": (100, "fp32")}
    assert list(precision_shares(convolutions).items()) == [("int8", 0.6), ("fp16", 0.3), ("fp32", 0.1)]
    assert dataclasses.replace(sidecar, convolutions=convolutions).mac_shares == precision_shares(convolutions)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, value) for name in ("engine_sha256", "flavor", "version", "precision") for value in (1, None, ["x"])),
        *((name, value) for name in ("onnx_sha256", "built", "toolkit", "command") for value in (1.5, None, {})),
        *(("command", "x" * 10_000), ("version", "1" * 10_000)),
        *(("engine_bytes", value) for value in (0, -1, True, 1.0, "204", 1 << 48)),
        *(("compute_capabilities", value) for value in (86, [86.0], ["86"], [0], [86, -1], {"86": 1}, [True])),
        *(("plugin", value) for value in ("x", ["x"], {"name": 1}, {"name": "x" * 10_000})),
        *(("convolutions", value) for value in ({}, [], {"c": 1}, {"c": [1]}, {"c": [0, "fp16"]}, {"c": [1, 2]})),
        *(("convolutions", value) for value in ({"c": [1, "fp16", 2]}, {"c": "xy"}, {"c": [True, "fp16"]}, None)),
        *(("parity", value) for value in ([1], {"boxes": "1"}, {"boxes": True}, {"boxes": None})),
        *(("calibration", value) for value in ([], None, "")),
        *(("kernels", value) for value in (0, -1, "59", True)),
        *(("version", value) for value in ("10.14.1 run: curl x | sh", "10.14\n", "", "\x1b[2J", "v1", "1" * 41)),
        *(("engine_sha256", value) for value in ("0" * 63, "0" * 65, "F" * 64, "")),
        *(("onnx_sha256", "x" * 64), ("flavor", "rtx\n"), ("precision", "fp16 "), ("built", "yesterday")),
        *(("toolkit", "0.1 0"), ("plugin", {"name": "a b"}), ("plugin", {"version": "\x1b"})),
        *(("command", value) for value in ("", "curl x | sh", "python -m export.to_trt; rm -r x", "python -m export")),
        *(("command", f"python -m export.to_trt --out {value}") for value in ("$(x)", "'a", "a\x1b", "a&b", "a  b")),
        ("spec", []),
        *(("profile", value) for value in ({}, [], {"min": [1, 1, 1, 3], "opt": [1, 1, 1, 3]})),
    ],
)
def test_impossible_values(sidecar: Sidecar, name: str, wrong: object) -> None:
    data = json.loads(sidecar.to_json())
    words = r"(\[.*\])?( is (not what it should be: |.*: expected |too long$)|: not a JSON object$)"
    with pytest.raises(SpecError, match=f"^{name}{words}"):
        Sidecar.from_json(_sealed({**data, name: wrong}))


@pytest.mark.parametrize(
    "change",
    [
        {"max": [16, 320, 640]},
        {"max": [16, 320, 640, 3, 1]},
        {"max": [16, 320, 640, 4], "opt": [4, 320, 640, 4]},
        {"min": [1, 320, 640, 1]},
        {"min": [5, 320, 640, 3]},
        {"opt": [17, 320, 640, 3]},
        {"opt": [4, 319, 640, 3]},
        {"opt": [4, 320, 641, 3]},
        {"min": [0, 320, 640, 3]},
        {"min": [1, 320.0, 640, 3]},
        {"min": "1234"},
        {"best": [1, 1, 1, 3]},
    ],
)
def test_impossible_profiles(sidecar: Sidecar, change: dict[str, object]) -> None:
    data = json.loads(sidecar.to_json())
    data["profile"].update(change)
    with pytest.raises(SpecError, match=r"^profile(\['min'\])? is (not what it should be: \{|.*: expected )"):
        Sidecar.from_json(_sealed(data))


@pytest.mark.parametrize(
    ("out", "shown"),
    [
        ("models/f.engine", "models/f.engine"),
        ("'a b.engine'", "'a b.engine'"),
        ("/home/me/.ssh/authorized_keys", None),
        ("../f.engine", None),
        ("'/tmp/;x'", None),
    ],
)
def test_the_command_writes_where_the_engine_lies(tmp_path: Path, out: str, shown: str | None) -> None:
    """It is advice, and who wrote the sidecar may be anyone."""
    path = write_engine(tmp_path, command=f"python -m export.to_trt --weights w --out {out} --fp16")
    assert read_sidecar(path).command == f"python -m export.to_trt --weights w --out {shown or path} --fp16"


def test_a_sidecar_from_before_kernels_were_counted(sidecar: Sidecar) -> None:
    data = json.loads(dataclasses.replace(sidecar, kernels=59).to_json())
    assert Sidecar.from_json(_sealed(data)).kernels == 59
    del data["kernels"]
    assert Sidecar.from_json(_sealed(data)) == sidecar


def test_values_at_their_bounds(sidecar: Sidecar) -> None:
    data = json.loads(sidecar.to_json())
    command = "python -m export.to_trt --weights "
    command += "x" * (9_999 - len(command))
    data.update(
        engine_bytes=(1 << 48) - 1, command=command, parity={"boxes": 0, "scores": 1e-3}, calibration={"images": 16}
    )
    data["profile"]["opt"] = data["profile"]["max"]
    found = Sidecar.from_json(_sealed(data))
    assert (found.engine_bytes, len(found.command)) == ((1 << 48) - 1, 9_999)
    assert found.parity == {"boxes": 0, "scores": 1e-3}
    assert found.calibration == {"images": 16}
    assert Sidecar.from_json(_sealed({**data, "engine_bytes": 1})).engine_bytes == 1


def test_text_that_is_no_sidecar(sidecar: Sidecar) -> None:
    data = json.loads(sidecar.to_json())
    for text in ("[1]", "1"):
        with pytest.raises(SpecError, match=r"^sidecar: not a JSON object$"):
            Sidecar.from_json(text)
    for text in ("{}", json.dumps({**data, "format": 2}), json.dumps({**data, "format": "1"})):
        with pytest.raises(SpecError, match=r"^not a sidecar of format 1$"):
            Sidecar.from_json(text)
    for text in ("", "{", "[" * 100_000, b"\xff\xfe\xfa"):
        with pytest.raises(SpecError, match=r"^sidecar: not JSON: "):
            Sidecar.from_json(text)
    for changed in ({**data, "precision": "int8"}, {**data, "sidecar_sha256": "0" * 64}):
        with pytest.raises(SpecError, match=r"^it is not as it was written: its own hash differs$"):
            Sidecar.from_json(json.dumps(changed))
    without = {name: value for name, value in data.items() if name != "sidecar_sha256"}
    with pytest.raises(SpecError, match="its own hash differs"):
        Sidecar.from_json(json.dumps(without))
    with pytest.raises(SpecError, match=r"^unknown fields \['extra'\]$"):
        Sidecar.from_json(_sealed({**without, "extra": 1}))
    del without["parity"]
    with pytest.raises(SpecError, match=r"^missing fields \['parity'\]$"):
        Sidecar.from_json(_sealed(dict(without)))
    with pytest.raises(SpecError, match=r"^unknown fields \['extra'\]$"):
        Sidecar.from_json(_sealed({**without, "extra": 1}))
    spec = {**data["spec"], "decode": {**data["spec"]["decode"], "top_k": 0}}
    with pytest.raises(SpecError, match="top_k"):
        Sidecar.from_json(_sealed({**data, "spec": spec}))
    with pytest.raises(SpecError) as caught:
        Sidecar.from_json(_sealed({**data, "calibration": ["x" * 500]}))
    assert len(str(caught.value)) < 130  # what is wrong may be long


def test_where_a_sidecar_lies() -> None:
    assert sidecar_path("a/f.engine") == sidecar_path(Path("a/f.engine")) == Path("a/f.engine.json")


def test_files_that_are_no_sidecars(tmp_path: Path, sidecar: Sidecar) -> None:
    path = tmp_path / "f.engine"

    def message() -> str:
        with pytest.raises(ModelFileError) as caught:
            read_sidecar(path)
        assert str(caught.value).startswith(f"{path}.json: ")
        return str(caught.value)

    text = sidecar.to_json()
    pad = " " * (MAX_SIDECAR_BYTES - len(text.encode()))
    sidecar_path(path).write_text(text + pad)
    assert read_sidecar(path) == sidecar
    sidecar_path(path).write_text(text + pad + " ")
    assert message().endswith("too large for a sidecar")
    assert MAX_SIDECAR_BYTES == 1 << 20
    sidecar_path(path).write_text(text.replace("fp16", "fp32"))
    assert message().endswith("its own hash differs; build the engine again with python -m export.to_trt")
    sidecar_path(path).unlink()
    assert message().endswith("missing, an engine is used with the file that was written beside it")
    sidecar_path(path).mkdir()
    assert "missing" in message()
    sidecar_path(path).rmdir()
    sidecar_path(path).symlink_to(sidecar_path(path).name)
    assert "missing" in message() or "cannot be read" in message()


def test_a_sidecar_that_may_not_be_read(tmp_path: Path, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.engine"

    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # root reads everything
        patch.setattr(Path, "read_bytes", denied)
        with pytest.raises(ModelFileError, match=r"f\.engine\.json: cannot be read \(Permission denied\)$"):
            read_sidecar(path)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", denied)
        with pytest.raises(ModelFileError, match=r"f\.engine: cannot be read \(Permission denied\)$"):
            check_engine(path, sidecar)


# headers


def test_headers_of_rtx() -> None:
    for capability in RTX_BITS:
        content = rtx_content(ModelSpec(), (1, 4, 250, 0), (capability,))
        assert read_header(content) == EngineHeader("rtx", "1.4.250.0", (capability,), len(content))
        assert read_header(content[:64]) == read_header(content)
        assert read_header(content[:63]) == EngineHeader("unknown")
    every = rtx_content(ModelSpec(), capabilities=tuple(RTX_BITS))
    assert read_header(every).compute_capabilities == (75, 80, 86, 89, 120, 121)


def test_headers_of_others() -> None:
    assert read_header(b"ftrt") == read_header(b"ftrt" + bytes(100)) == EngineHeader("tensorrt")
    for content in (b"", b"ftr", b"trtf" + bytes(100), b"\x7fELF" + bytes(100), b"vtrt"):
        assert read_header(content) == EngineHeader("unknown", "", (), 0)


# engines


def test_engines_as_they_were_written(tmp_path: Path) -> None:
    for write in (write_engine, write_rtx_engine):
        path = write(tmp_path)
        assert check_engine(path, read_sidecar(path)) == check_engine(str(path), read_sidecar(path)) == []
    path = write_engine(tmp_path, b"older TensorRT began otherwise")
    assert check_engine(path, read_sidecar(path)) == []


def test_engines_that_changed(tmp_path: Path) -> None:
    path = write_rtx_engine(tmp_path)
    content, sidecar = path.read_bytes(), read_sidecar(path)

    def problems(content: bytes = content, **changes: Any) -> list[str]:
        path.write_bytes(content)
        return check_engine(path, dataclasses.replace(sidecar, **changes))

    size = len(content)
    differs = "the engine is not the one its sidecar describes: its SHA-256 differs"
    assert problems(content[:-1]) == [f"the file has {size - 1} bytes, its sidecar says {size}"]
    assert problems(content + b"x") == [f"the file has {size + 1} bytes, its sidecar says {size}"]
    assert problems(b"") == [f"the file has 0 bytes, its sidecar says {size}"]
    assert problems(content[:70] + b"x" + content[71:]) == [differs]
    assert problems(engine_sha256="0" * 64) == [differs]
    assert problems(b"ftrt" + content[4:]) == [differs, "the file is of kind tensorrt, its sidecar says rtx"]
    assert problems(bytes(size)) == [differs, "the file is of kind unknown, its sidecar says rtx"]
    assert problems(flavor="tensorrt") == ["the file is of kind rtx, its sidecar says tensorrt"]
    other = content[:16] + b"\x01" + content[17:]
    assert problems(other, engine_sha256=hashlib.sha256(other).hexdigest()) == [
        f"the file has {size} bytes, its header says {int.from_bytes(other[16:24], 'little')}"
    ]
    assert problems(version="1.7.1.117") == ["its header says TensorRT-RTX 1.7.1.116, its sidecar 1.7.1.117"]
    assert problems(compute_capabilities=(86, 89)) == [
        "its header says compute capabilities [86], its sidecar [86, 89]"
    ]
    plugin = sidecar.plugin
    again = f"this version has RetinaFaceDecodeNMS 2: build the engine again: {COMMAND}"
    assert problems(plugin={**plugin, "version": "1"}) == [f"its plugin is RetinaFaceDecodeNMS 1, {again}"]
    assert problems(plugin={**plugin, "name": "NMS"}) == [f"its plugin is NMS 2, {again}"]
    assert problems(plugin={**plugin, "namespace": ""}) == [f"its plugin is RetinaFaceDecodeNMS 2, {again}"]
    assert problems(plugin={}) == [f"its plugin is None None, {again}"]
    assert problems(plugin={**plugin, "sources_sha256": "0" * 64}) == []  # kernels may be mended, engines stay
    # of a file that is another one, what else is wrong comes after that
    assert problems(content[:-1], plugin={})[0].startswith("the file has ")
    assert len(problems(content[:-1], plugin={})) == 2


@pytest.mark.parametrize("name", ["strides", "min_sizes", "variances", "logit_threshold", "iou_threshold", "top_k"])
def test_another_plugin_in_the_engine(tmp_path: Path, name: str) -> None:
    """The last value of each attribute differs between engine and sidecar."""
    others = {
        "strides": {"anchors": AnchorSpec(strides=(8, 16, 64))},
        "min_sizes": {"anchors": AnchorSpec(min_sizes=((16, 32), (64, 128), (256, 500)))},
        "variances": {"decode": DecodeSpec(variances=(0.1, 0.3))},
        "logit_threshold": {"decode": DecodeSpec(score_threshold=0.021)},
        "iou_threshold": {"decode": DecodeSpec(iou_threshold=0.41)},
        "top_k": {"decode": DecodeSpec(top_k=5001)},
    }
    path = write_rtx_engine(tmp_path, spec=ModelSpec())
    sidecar = read_sidecar(path)
    assert check_engine(path, sidecar) == []
    other = dataclasses.replace(sidecar, spec=ModelSpec(**others[name]))  # type: ignore[arg-type]
    assert check_engine(path, other) == [f"the plugin in it does not have the {name} its sidecar says"]


def test_where_the_attributes_are_looked_for(tmp_path: Path) -> None:
    """After the plugin's name, and each value right after its own name: elsewhere the bytes mean something else."""

    def problems(content: bytes) -> list[str]:
        path = write_engine(
            tmp_path, content, flavor="rtx", version="1.7.1.116", spec=ModelSpec(), compute_capabilities=(86,)
        )
        return [problem for problem in check_engine(path, read_sidecar(path)) if "header" not in problem]

    content = rtx_content(ModelSpec())
    assert problems(content) == []
    name = PLUGIN.name.encode()
    assert problems(content.replace(name, name.lower())) == [f"there is no {PLUGIN.name} in it"]
    start = content.index(name)
    assert problems(content[:start] + content[start + len(name) :] + name) != []
    for attribute in ("strides", "max_detections"):
        gone = content.replace(attribute.encode(), b"x" * len(attribute))
        assert problems(gone) == [f"the plugin in it does not have the {attribute} its sidecar says"]
    assert problems(rtx_content(ModelSpec(), gap=bytes(100))) == []
    assert problems(rtx_content(ModelSpec(), gap=bytes(260))) != []
    far = rtx_content(ModelSpec())
    assert problems(far[:start] + name + bytes(4096) + far[start + len(name) :]) != []
    assert problems(far + bytes(5000)) == []
    maximum = dataclasses.replace(ModelSpec(), decode=DecodeSpec(max_detections=751))
    assert problems(rtx_content(maximum)) == ["the plugin in it does not have the max_detections its sidecar says"]


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    path = write_engine(tmp_path)
    sidecar = read_sidecar(path)
    path.unlink()
    with pytest.raises(ModelFileError, match=r"f\.engine: no such engine$"):
        check_engine(path, sidecar)
    path.mkdir()
    size = os.stat(path).st_size
    with pytest.raises(ModelFileError, match=r"f\.engine: cannot be read \(Is a directory\)$"):
        check_engine(path, dataclasses.replace(sidecar, engine_bytes=size))
