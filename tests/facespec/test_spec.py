from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facespec import spec as spec_module
from facespec.boxes import make_priors
from facespec.errors import SpecError
from facespec.spec import (
    MAX_NETWORK_PIXELS,
    AnchorSpec,
    DecodeSpec,
    ModelSpec,
    PreprocessSpec,
    check_size,
    parse_network_size,
    parse_size,
)


def test_prior_counts_are_the_published_ones() -> None:
    assert AnchorSpec().count((640, 640)) == 16_800
    assert AnchorSpec().count((320, 320)) == 4_200
    assert AnchorSpec().count((1088, 1920)) == 85_680


@given(st.integers(1, 300), st.integers(1, 300))
def test_priors_equal_the_original_loops(height: int, width: int) -> None:
    """Against the literal definition: nested loops over levels, rows, columns and sizes."""
    expected = []
    for stride, sizes in zip((8, 16, 32), ((16, 32), (64, 128), (256, 512)), strict=True):
        for row in range(math.ceil(height / stride)):
            for column in range(math.ceil(width / stride)):
                expected += [((column + 0.5) * stride, (row + 0.5) * stride, size, size) for size in sizes]
    priors = make_priors(AnchorSpec(), (height, width))
    assert priors.dtype == np.float32
    np.testing.assert_array_equal(priors, np.array(expected, np.float32))


specs = st.builds(
    ModelSpec,
    backbone=st.sampled_from(["mobilenet0.25", "resnet50"]),
    fpn_channels=st.sampled_from([64, 256]),
    weights_sha256=st.sampled_from(["", "0" * 64]),
    preprocess=st.builds(PreprocessSpec, st.tuples(*[st.integers(0, 255)] * 3)),
    decode=st.builds(
        DecodeSpec,
        score_threshold=st.floats(0.001, 0.999),
        iou_threshold=st.floats(0.001, 0.999),
        top_k=st.integers(1, 10**6),
        max_detections=st.integers(1, 10**6),
    ),
)


@given(specs)
def test_json_round_trip_keeps_everything(spec: ModelSpec) -> None:
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec
    assert again.sha256() == spec.sha256()
    assert again.decode.logit_threshold == spec.decode.logit_threshold


def test_hash_is_the_same_in_every_process_and_changes_with_every_field() -> None:
    code = "from facespec.spec import ModelSpec; print(ModelSpec().sha256())"
    hashes = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()}
    assert hashes == {ModelSpec().sha256()}
    changed = [
        ModelSpec(backbone="resnet50"),
        ModelSpec(fpn_channels=128),
        ModelSpec(weights_sha256="f" * 64),
        ModelSpec(preprocess=PreprocessSpec((104, 117, 124))),
        *(ModelSpec(decode=DecodeSpec(**{name: value})) for name, value in
          [("score_threshold", 0.03), ("iou_threshold", 0.5), ("top_k", 1), ("max_detections", 1)]),
    ]  # fmt: skip
    assert len({spec.sha256() for spec in changed} | hashes) == len(changed) + 1


def test_the_form_that_travels_in_files_stays_what_it_is() -> None:
    """Keys sorted, no spaces, every default: a model of this version must be read, and found unchanged, by the next."""
    text = (
        '{"anchors":{"min_sizes":[[16,32],[64,128],[256,512]],"strides":[8,16,32]},"backbone":"mobilenet0.25",'
        '"decode":{"iou_threshold":0.4,"max_detections":750,"score_threshold":0.02,"top_k":5000,'
        '"variances":[0.1,0.2]},"format":1,"fpn_channels":64,"preprocess":{"mean_bgr":[104,117,123]},'
        '"weights_sha256":""}'
    )
    assert ModelSpec().to_json() == text
    assert ModelSpec().sha256() == "361483ceaf08144e0bd9d5af0e914ff245a274b709b50fe7f3a766991d637711"
    for written in (text, text.encode(), json.dumps(dict(reversed(json.loads(text).items())), indent=1)):
        assert ModelSpec.from_json(written) == ModelSpec()
    assert isinstance(ModelSpec.from_json(text).anchors.min_sizes[0], tuple)
    assert spec_module.SPEC_KEY == "retinaface.spec"
    assert spec_module.CHECKPOINT_SUFFIXES == (".pth", ".pt", ".tar", ".ckpt", ".safetensors")
    assert (spec_module.DEFAULT_WEIGHTS, spec_module.SIZE_MULTIPLE) == ("mobilenet0.25", 32)
    assert MAX_NETWORK_PIXELS == 16_777_216


def test_other_anchors() -> None:
    anchors = AnchorSpec((4, 100), ((6, 9, 12.5), (200, 300, 400)))
    assert anchors.per_cell == 3
    assert anchors.grids_hw((201, 80)) == [(51, 20), (3, 1)]
    assert anchors.count((201, 80)) == 3 * (51 * 20 + 3)
    priors = make_priors(anchors, (201, 80))
    assert priors.shape == (anchors.count((201, 80)), 4)
    np.testing.assert_array_equal(priors[:4], [[2, 2, 6, 6], [2, 2, 9, 9], [2, 2, 12.5, 12.5], [6, 2, 6, 6]])
    np.testing.assert_array_equal(priors[-1], [50, 250, 400, 400])


NAN, HUGE = float("nan"), 10**400


@pytest.mark.parametrize(
    ("kind", "values", "wrong"),
    [
        (AnchorSpec, {"strides": (1, 1024), "min_sizes": ((1,), (2,))}, {}),
        (AnchorSpec, {"strides": (1, 1025), "min_sizes": ((1,), (2,))}, {"strides"}),
        (AnchorSpec, {"strides": (0, 8), "min_sizes": ((1,), (2,))}, {"strides"}),
        (AnchorSpec, {"strides": (16, 8), "min_sizes": ((1,), (2,))}, {"strides"}),
        (AnchorSpec, {"strides": (8.0, 16), "min_sizes": ((1,), (2,))}, {"strides"}),
        (AnchorSpec, {"strides": (True, 16), "min_sizes": ((1,), (2,))}, {"strides"}),
        (AnchorSpec, {"strides": (8, 16), "min_sizes": ((1,),)}, {"min_sizes has 1 levels, strides has 2"}),
        (AnchorSpec, {"strides": (), "min_sizes": ()}, {"min_sizes has 0 levels"}),
        (AnchorSpec, {"strides": (8, 16), "min_sizes": ((1,), (2, 3))}, {"the same number"}),
        (AnchorSpec, {"strides": (8,), "min_sizes": ((),)}, {"the same number"}),
        (AnchorSpec, {"strides": (8, 16), "min_sizes": ((1,), (0,))}, {"must be positive"}),
        (AnchorSpec, {"strides": (8, 16), "min_sizes": ((1,), (-2,))}, {"must be positive"}),
        (AnchorSpec, {"strides": (8, 16), "min_sizes": ((1,), (1e-60,))}, {"must be positive"}),  # 0 in float32
        (AnchorSpec, {"strides": (8, 16), "min_sizes": ((1,), (HUGE,))}, {"min_sizes", "finite"}),
        (PreprocessSpec, {"mean_bgr": (0, 255, 0)}, {}),
        (PreprocessSpec, {"mean_bgr": (0, 255)}, {"mean_bgr"}),
        (PreprocessSpec, {"mean_bgr": (-1, 0, 0)}, {"mean_bgr"}),
        (PreprocessSpec, {"mean_bgr": (0, 0, 256)}, {"mean_bgr"}),
        (PreprocessSpec, {"mean_bgr": (0, 0, 1.0)}, {"mean_bgr"}),
        (DecodeSpec, {"variances": (0.1, 0.2, 0.3)}, {"variances"}),
        (DecodeSpec, {"variances": (0.1, 0)}, {"variances"}),
        (DecodeSpec, {"variances": (-0.1, 0.2)}, {"variances"}),
        (DecodeSpec, {"variances": (0.1, NAN)}, {"variances"}),
        (DecodeSpec, {"variances": (1e30, 0.2)}, {"variances"}),
        (DecodeSpec, {"variances": (9e29, 1e-40)}, {}),
        (DecodeSpec, {"score_threshold": 0}, {"score_threshold must lie between 0 and 1"}),
        (DecodeSpec, {"score_threshold": 1}, {"score_threshold must lie between 0 and 1"}),
        (DecodeSpec, {"score_threshold": NAN}, {"score_threshold"}),
        (DecodeSpec, {"score_threshold": True}, {"score_threshold"}),
        (DecodeSpec, {"iou_threshold": 0}, {"iou_threshold must lie between 0 and 1"}),
        (DecodeSpec, {"iou_threshold": 1}, {"iou_threshold must lie between 0 and 1"}),
        (DecodeSpec, {"iou_threshold": 1 - 1e-12}, {"iou_threshold"}),  # 1 in float32
        (DecodeSpec, {"top_k": 1_000_000, "max_detections": 1}, {}),
        (DecodeSpec, {"top_k": 1, "max_detections": 1_000_000}, {}),
        (DecodeSpec, {"top_k": 1_000_001}, {"top_k must be in 1..1000000"}),
        (DecodeSpec, {"max_detections": 1_000_001}, {"max_detections must be in 1..1000000"}),
        (DecodeSpec, {"max_detections": 0}, {"max_detections"}),
        (DecodeSpec, {"top_k": 5.0}, {"top_k"}),
        (DecodeSpec, {"top_k": True}, {"top_k"}),
        (ModelSpec, {"fpn_channels": 2048, "weights_sha256": "0" * 64}, {}),
        (ModelSpec, {"fpn_channels": 2052}, {"up to 2048"}),
        (ModelSpec, {"fpn_channels": 0}, {"fpn_channels"}),
        (ModelSpec, {"fpn_channels": 64.0}, {"fpn_channels"}),
        (ModelSpec, {"weights_sha256": "0" * 63}, {"weights_sha256"}),
        (ModelSpec, {"weights_sha256": None}, {"weights_sha256"}),
        (ModelSpec, {"backbone": 7}, {"backbone"}),
    ],
)
def test_values_at_and_beyond_their_limits(kind: Any, values: dict[str, Any], wrong: set[str]) -> None:
    if not wrong:
        assert kind(**values) == kind(**values)
        return
    with pytest.raises(SpecError) as caught:
        kind(**values)
    assert all(words in str(caught.value) for words in wrong)


def test_a_threshold_as_a_difference_of_logits() -> None:
    assert DecodeSpec(score_threshold=0.5).logit_threshold == 0
    assert DecodeSpec(score_threshold=0.9).logit_threshold == pytest.approx(math.log(9), rel=1e-12)
    assert DecodeSpec(score_threshold=0.02).logit_threshold == pytest.approx(-math.log(49), rel=1e-12)


def test_the_outputs_of_a_detector_graph() -> None:
    assert list(DecodeSpec(max_detections=7).outputs.items()) == [
        ("num_detections", ("int32", ())),
        ("boxes", ("float32", (7, 4))),
        ("scores", ("float32", (7,))),
        ("landmarks", ("float32", (7, 5, 2))),
        ("num_candidates", ("int32", ())),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": ""}, "backbone"),
        ({"fpn_channels": 66}, "multiple of 4"),
        ({"weights_sha256": "abc"}, "64 hex"),
        ({"extra": 1}, "unknown fields"),
        ({"anchors": {}}, "missing fields"),
        ({"anchors": None}, "anchors is missing"),
        ({"format": 99}, "format 99"),
        ({"decode": {**dataclasses.asdict(DecodeSpec()), "score_threshold": 1.0}}, "score_threshold"),
        ({"decode": {**dataclasses.asdict(DecodeSpec()), "score_threshold": "0.5"}}, "score_threshold"),
        ({"decode": {**dataclasses.asdict(DecodeSpec()), "top_k": 0}}, "top_k"),
        ({"decode": {**dataclasses.asdict(DecodeSpec()), "variances": 7}}, "decode"),
        ({"preprocess": {"mean_bgr": [104, 117, 256]}}, "mean_bgr"),
        ({"anchors": {"strides": [8, 8], "min_sizes": [[1], [2]]}}, "ascending"),
    ],
)
def test_impossible_json_is_named(change: dict[str, object], words: str) -> None:
    data = {**json.loads(ModelSpec().to_json()), **change}
    with pytest.raises(SpecError, match=words):
        ModelSpec.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "[" * 100_000])
def test_text_that_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        ModelSpec.from_json(text)


def test_run_threshold_rises_but_never_falls_below_the_floor() -> None:
    decode = DecodeSpec(score_threshold=0.02)
    assert decode.run_threshold(None) == 0.5
    assert decode.run_threshold(0.02) == 0.02
    assert DecodeSpec(score_threshold=0.7).run_threshold(None) == 0.7
    for wrong in (0.01, 1.0, float("nan")):
        with pytest.raises(SpecError):
            decode.run_threshold(wrong)
    with pytest.raises(
        SpecError, match=r"0\.01 is below the model's floor of 0\.02: export it again with --score 0\.01"
    ):
        decode.run_threshold(0.01)
    for wrong in (0.0, 1, True, "0.5", -0.1):
        with pytest.raises(SpecError, match="must lie between 0 and 1"):
            decode.run_threshold(wrong)  # type: ignore[arg-type]


def test_parse_size() -> None:
    assert parse_size("640x320") == (640, 320)
    assert parse_size("640") == (640, 640)
    for wrong in ("", "640x", "x640", "640x100", "0x0", "-32x32", "640x640x3", "99999x32", "²x32"):
        with pytest.raises(SpecError):
            parse_size(wrong)
    with pytest.raises(SpecError, match="try 608"):
        parse_size("600x600")


def test_parse_network_size() -> None:
    assert parse_network_size("384x640") == (384, 640)
    assert parse_network_size("640") == 640
    for wrong in ("", "0", "600", "-32", "+64", "6 40", "640.0", "1e3", "٦٤٠", "²", "640x", "4128", "x"):
        with pytest.raises(SpecError, match="size"):
            parse_network_size(wrong)
    with pytest.raises(SpecError, match="try 608"):
        parse_network_size("600")
    with pytest.raises(SpecError, match="HEIGHTxWIDTH"):
        parse_network_size("big")


@given(st.integers(0, 130).map(lambda n: 32 * n) | st.integers(0, 10**12), st.integers(0, 40))
def test_parsed_sizes_are_the_numbers_as_they_stand(value: int, zeros: int) -> None:
    """Or refused: never other numbers, whatever zeros lead, and never beyond the limit."""
    text = "0" * zeros + str(value)
    fits = value % 32 == 0 and 0 < value and value * value <= MAX_NETWORK_PIXELS
    for parse, written, expected in (
        (parse_network_size, text, value),
        (parse_network_size, f"{text}x{text}", (value, value)),
        (parse_size, f"{text}X{text}", (value, value)),
    ):
        if fits:
            assert parse(written) == expected
        else:
            with pytest.raises(SpecError):
                parse(written)


@pytest.mark.parametrize("text", ["000000064001", "000000064" * 600, "9" * 5000])
def test_long_numbers_are_no_sizes(text: str) -> None:
    for parse, written in ((parse_network_size, text), (parse_size, f"{text}x64"), (parse_size, f"64x{text}")):
        with pytest.raises(SpecError) as caught:
            parse(written)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("value", "nearest"),
    [(1, 32), (33, 32), (47, 32), (49, 64), (600, 608), (4080, 4096), (10**30 + 1, 4096), (-5, 32), (0, 32)],
)
def test_the_nearest_size_is_offered(value: int, nearest: int) -> None:
    for size in (value, (32, value), (value, 32)):
        with pytest.raises(SpecError, match=rf"{value} is not a multiple of 32; try {nearest}$"):
            check_size(size)


def test_check_size() -> None:
    for right in ((32, 32), (4096, 4096), (32, 4096 * 128), [64, 32], 32, 4096):
        check_size(right)  # type: ignore[arg-type]
    wrong = ((32, 33), (0, 32), (-32, 32), (32,), (32, 32, 32), (32.0, 32), (True, 32), True, 32.0, "32", None, 33, 0)
    for size in (*wrong, -32, 4128, (4096, 4128), (32, 4096 * 128 + 32), 10**30):
        with pytest.raises(SpecError, match="network size"):
            check_size(size)  # type: ignore[arg-type]


def test_a_size_with_the_width_first_is_told_the_order() -> None:
    hint = (
        "1080 is not a multiple of 32; try 1088; sizes are HEIGHTxWIDTH: for frames that are wider than high, 1088x1920"
    )
    with pytest.raises(SpecError, match=rf"{hint}$"):
        parse_size("1920x1080")
    with pytest.raises(SpecError, match=r"1080 is not a multiple of 32; try 1088$"):
        parse_size("1080x1920")
    with pytest.raises(SpecError, match="wider than high, 96x4000"):
        parse_size("4000x99")
    assert parse_size("640x384") == (640, 384)
