"""config.pbtxt, field by field; that Triton's own parser takes it is tested with the export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from export.to_triton import SIZE_KEY, Keyword, Layout, TritonOptions, to_pbtxt
from facespec.spec import DecodeSpec, ModelSpec, PreprocessSpec
from tests.engines import make_sidecar

SPEC = ModelSpec(
    decode=DecodeSpec(score_threshold=0.3, max_detections=99), preprocess=PreprocessSpec(mean_bgr=(1, 2, 3))
)
MODEL = Layout(
    options=TritonOptions(Path("m"), Path("out"), name="faces", instances=3, max_queue_delay_us=77),
    spec=SPEC,
    fixed_hw=(320, 640),
    size_hw=(320, 640),
    best_batch=4,
    max_batch=16,
    sidecar=make_sidecar(b"engine"),
    versioned={},
    shared={},
)


def _config(**changes: Any) -> dict[str, Any]:
    return dataclasses.replace(MODEL, **changes).config()


def test_the_fields_of_an_engine() -> None:
    config = _config()
    assert (config["name"], config["platform"], config["max_batch_size"]) == ("faces", "tensorrt_plan", 16)
    assert "backend" not in config
    assert config["input"] == [{"name": "images", "data_type": "TYPE_UINT8", "dims": [320, 640, 3]}]
    assert config["instance_group"] == [{"count": 3, "kind": "KIND_GPU"}]
    assert config["version_policy"] == {"latest": {"num_versions": 1}}
    assert config["dynamic_batching"] == {"preferred_batch_size": [4, 16], "max_queue_delay_microseconds": 77}
    assert config["optimization"] == {"cuda": {"graphs": True}}
    outputs = {output["name"]: output for output in config["output"]}
    assert outputs["num_detections"] == {
        "name": "num_detections", "data_type": "TYPE_INT32", "dims": [1], "reshape": {"shape": []},
    }  # fmt: skip
    assert outputs["landmarks"] == {"name": "landmarks", "data_type": "TYPE_FP32", "dims": [99, 5, 2]}
    assert list(outputs) == ["num_detections", "boxes", "scores", "landmarks", "num_candidates"]


@pytest.mark.parametrize(
    ("best", "most", "preferred", "warmed"),
    [
        (1, 16, [16], [1, 16]),
        (4, 4, [4], [1, 4]),
        (4, 16, [4, 16], [1, 4, 16]),
        (1, 1, None, [1]),
        (2, 2, [2], [1, 2]),
    ],
)
def test_batches(best: int, most: int, preferred: list[int] | None, warmed: list[int]) -> None:
    config = _config(best_batch=best, max_batch=most)
    assert config.get("dynamic_batching", {}).get("preferred_batch_size") == preferred
    assert [item["batch_size"] for item in config["model_warmup"]] == warmed
    assert [item["name"] for item in config["model_warmup"]] == [f"batch {batch}" for batch in warmed]


def test_sizes() -> None:
    """A graph of one shape for an engine of one; the warm-up is of a size the model takes."""
    image = {"data_type": "TYPE_UINT8", "dims": [320, 640, 3], "zero_data": True}
    assert _config()["model_warmup"][0]["inputs"] == [{"key": "images", "value": image}]
    free = _config(fixed_hw=None)
    assert free["input"][0]["dims"] == [-1, -1, 3]
    assert "optimization" not in free
    assert free["model_warmup"][0]["inputs"][0]["value"]["dims"] == [320, 640, 3]
    anywhere = _config(fixed_hw=None, size_hw=None)
    assert anywhere["model_warmup"][0]["inputs"][0]["value"]["dims"] == [640, 640, 3]
    onnx = _config(sidecar=None)
    assert "optimization" not in onnx
    assert "platform" not in onnx
    assert onnx["backend"] == "onnxruntime"
    assert onnx["instance_group"][0]["kind"] == "KIND_CPU"


def test_what_clients_must_know() -> None:
    said = MODEL.parameters()
    assert ModelSpec.from_json(said["retinaface.spec"]) == SPEC
    assert said["retinaface.spec_sha256"] == SPEC.sha256()
    assert said["retinaface.score_floor"] == "0.3"
    assert said[SIZE_KEY] == "320x640"
    letterbox = said["retinaface.letterbox"]
    assert letterbox.startswith(
        "a uint8 BGR frame, scaled by one factor, bilinear, until it touches the size, top left"
    )
    assert "padded right and below to it with BGR 1,2,3" in letterbox
    free = dataclasses.replace(MODEL, size_hw=None, fixed_hw=None).parameters()
    assert SIZE_KEY not in free
    assert (
        "not scaled, top left, padded right and below to multiples of 32 with BGR 1,2,3" in free["retinaface.letterbox"]
    )
    assert [item["key"] for item in MODEL.config()["parameters"]] == list(said)
    assert [item["value"]["string_value"] for item in MODEL.config()["parameters"]] == list(said.values())


def test_the_text_form() -> None:
    message = {
        "text": 'a "b" \\ c\nd',
        "number": -1,
        "flag": True,
        "off": False,
        "kind": Keyword("KIND_GPU"),
        "numbers": [1, 2],
        "none": [],
        "inner": {"deep": {"x": 1}},
        "many": [{"x": 1}, {"y": Keyword("Z")}],
    }
    assert to_pbtxt(message) == (
        'text: "a \\"b\\" \\\\ c\\nd"\n'
        "number: -1\n"
        "flag: true\n"
        "off: false\n"
        "kind: KIND_GPU\n"
        "numbers: [1, 2]\n"
        "none: []\n"
        "inner {\n  deep {\n    x: 1\n  }\n}\n"
        "many [\n  {\n    x: 1\n  },\n  {\n    y: Z\n  }\n]\n"
    )
