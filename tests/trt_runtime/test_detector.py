from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from facespec.detections import Detections
from facespec.errors import ClosedError, FrameError, ModelFileError, NonFiniteError, SpecError
from facespec.letterbox import Frame, Letterbox
from facespec.spec import MAX_NETWORK_PIXELS, SPEC_KEY, DecodeSpec, ModelSpec, PreprocessSpec
from tests.engines import write_engine
from tests.trt_runtime.handmade import SPEC, HandmadeDetector, HandmadeLane, frame_of, in_time
from trainer import load_model
from trainer.model import TorchRetinaFace
from trt_runtime import OpenVinoRetinaFace, OrtRetinaFace, load_detector
from trt_runtime import detector as detector_module
from trt_runtime.detector import RetinaFaceDetector, letterboxed, network_size
from trt_runtime.gpu.sidecar import sidecar_path
from trt_runtime.measure import StageTimer
from trt_runtime.onnx_model import OnnxModel

Kind = type[OrtRetinaFace] | type[OpenVinoRetinaFace]
KINDS: tuple[Kind, ...] = (OrtRetinaFace, OpenVinoRetinaFace)
both = pytest.mark.parametrize("kind", KINDS)


def _assert_same(found: Detections, expected: Detections, pixels: float = 0.05) -> None:
    assert found.frame_hw == expected.frame_hw
    assert len(found) == len(expected)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=pixels)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=pixels)


@pytest.fixture(scope="module")
def frames(crowd: Frame, photographs: dict[str, Frame]) -> list[Frame]:
    """Frames of many sizes, among them one without a face."""
    import cv2

    astronaut = photographs["astronaut"]
    return [
        astronaut,
        crowd,
        np.full((70, 130, 3), 90, np.uint8),
        photographs["grace_hopper"],
        cv2.resize(astronaut, (320, 320)),
        cv2.resize(astronaut, (1300, 1100)),
        astronaut[:400, 100:333],
    ]


def test_letterboxed_detections_equal_pytorch(frames: list[Frame], static_onnx: Path) -> None:
    detector = OrtRetinaFace(static_onnx, score_threshold=0.02)
    expected = TorchRetinaFace(load_model(), score_threshold=0.02, size_hw=(320, 320))
    assert detector.size_hw == (320, 320)
    for frame in frames:
        # a pixel of the network is more than one of a large frame
        _assert_same(detector.detect(frame), expected.detect(frame), 0.05 * max(1, max(frame.shape) / 320))


def test_dynamic_sizes_equal_pytorch(frames: list[Frame], dynamic_onnx: Path) -> None:
    detector = OrtRetinaFace(dynamic_onnx, size_hw=(192, 480))
    expected = TorchRetinaFace(load_model(), size_hw=(192, 480))
    for frame in frames:
        _assert_same(detector.detect(frame), expected.detect(frame), 0.05 * max(1, max(frame.shape) / 192))
    # at its own size a frame of whole multiples of 32 is not padded, so PyTorch sees the same
    aligned = frames[1]
    assert aligned.shape[0] % 32 == aligned.shape[1] % 32 == 0
    _assert_same(OrtRetinaFace(dynamic_onnx).detect(aligned), TorchRetinaFace(load_model()).detect(aligned))


@pytest.mark.parametrize("fixture", ["static_onnx", "dynamic_onnx"])
def test_a_batch_gives_what_single_frames_give(
    fixture: str, frames: list[Frame], request: pytest.FixtureRequest
) -> None:
    """Every slot, in any order, mixed sizes, a frame without faces in between."""
    detector = OrtRetinaFace(request.getfixturevalue(fixture))
    single = [detector.detect(frame) for frame in frames]
    assert [len(found) for found in single] == [1, 3, 0, 1, 1, 1, 1]
    for order in (range(7), [2, 2, 0, 0, 6, 5, 4], [3]):
        for index, found in zip(order, detector.detect_batch([frames[i] for i in order]), strict=True):
            _assert_same(found, single[index], 1e-3)
    assert detector.detect_batch([]) == []


@both
def test_a_raised_threshold_gives_the_prefix(kind: Kind, crowd: Frame, dynamic_onnx: Path) -> None:
    low, high = (kind(dynamic_onnx, score_threshold=score).detect(crowd) for score in (0.02, 0.6))
    assert 0 < len(high) < len(low)
    np.testing.assert_array_equal(low.boxes[: len(high)], high.boxes)
    assert (low.scores[len(high) :] < 0.6).all()
    with pytest.raises(SpecError, match=r"below the model's floor of 0\.02.*--score 0\.01"):
        kind(dynamic_onnx, score_threshold=0.01)


@pytest.mark.parametrize(
    "frame",
    [
        np.full((64, 64, 3), np.nan, np.float32),
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((1, 64, 64, 3), np.uint8),
        np.zeros((0, 0, 3), np.uint8),
        [[1, 2, 3]],
    ],
)
@both
def test_wrong_frames_are_refused(kind: Kind, frame: object, static_onnx: Path) -> None:
    detector = kind(static_onnx)
    with pytest.raises(FrameError):
        detector.detect(frame)  # type: ignore[arg-type]
    with pytest.raises(FrameError):
        detector.detect_batch([np.zeros((4, 4, 3), np.uint8), frame])  # type: ignore[list-item]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
@both
def test_extreme_shapes_run(kind: Kind, shape: tuple[int, int], static_onnx: Path, dynamic_onnx: Path) -> None:
    frame = np.full((*shape, 3), 128, np.uint8)
    for path in (static_onnx, dynamic_onnx):
        assert len(kind(path).detect(frame)) == 0
    assert len(kind(dynamic_onnx, size_hw=320).detect(frame)) == 0


@both
def test_a_frame_too_large_for_its_own_size_is_refused(kind: Kind, dynamic_onnx: Path) -> None:
    frame = np.broadcast_to(np.uint8(0), (8000, 8000, 3))
    with pytest.raises(FrameError, match="size_hw"):
        kind(dynamic_onnx).detect(frame)
    assert len(kind(dynamic_onnx, size_hw=(320, 320)).detect(frame)) == 0


def _changed(path: Path, out: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, out)
    return out


def test_a_network_that_gives_nan_raises(astronaut: Frame, static_onnx: Path, tmp_path: Path) -> None:
    """A weight that is NaN, or so large that a box overflows, is never "no faces"."""

    def poison(model: onnx.ModelProto, value: float, channel: int) -> None:
        node = next(node for node in model.graph.node if node.output[0] == "head_32")
        bias = next(item for item in model.graph.initializer if item.name == node.input[2])
        values = numpy_helper.to_array(bias).copy()
        values[channel] = value
        bias.CopyFrom(numpy_helper.from_array(values, bias.name))

    for value, channel in ((np.nan, 31), (np.inf, 0)):
        path = _changed(static_onnx, tmp_path / "m.onnx", lambda m, v=value, c=channel: poison(m, v, c))
        with pytest.raises(NonFiniteError):
            OrtRetinaFace(path).detect(astronaut)

    def overflow(model: onnx.ModelProto) -> None:
        poison(model, 1e4, 6)  # exp(0.2 * 1e4) is infinite
        poison(model, 1e2, 1)  # and the prior is surely a face

    with pytest.raises(NonFiniteError):
        OrtRetinaFace(_changed(static_onnx, tmp_path / "m.onnx", overflow)).detect(astronaut)


TRUNCATIONS = (
    # three faces over 0.5, more below: a cut is worth a word only where it lies above the threshold asked for
    (DecodeSpec(max_detections=2), 0.5, True),
    (DecodeSpec(top_k=5), 0.5, True),
    (DecodeSpec(), 0.02, False),
    (DecodeSpec(max_detections=4), 0.5, False),
    (DecodeSpec(max_detections=4), 0.02, True),
)


def test_truncation_shows(crowd: Frame, plugin_form: Path, tmp_path: Path) -> None:
    """Of the plugin's kernels, told other limits."""

    def limit(model: onnx.ModelProto, decode: DecodeSpec) -> None:
        for attribute in model.graph.node[-1].attribute:
            if attribute.name in ("top_k", "max_detections"):
                attribute.i = getattr(decode, attribute.name)
        spec = json.loads(next(item.value for item in model.metadata_props if item.key == SPEC_KEY))
        helper.set_model_props(model, {SPEC_KEY: json.dumps({**spec, "decode": dataclasses.asdict(decode)})})

    for decode, score, truncated in TRUNCATIONS:
        path = _changed(plugin_form, tmp_path / "m.onnx", lambda m, decode=decode: limit(m, decode))
        for kind in KINDS:
            with kind(path, score_threshold=score, threads=1, size_hw=(256, 768)) as detector:
                assert detector.detect(crowd).truncated == truncated


def test_truncation_shows_in_graphs_that_decode_by_themselves(crowd: Frame, dynamic_onnx: Path, tmp_path: Path) -> None:
    from export.graph import build_portable

    model = OnnxModel(dynamic_onnx)
    heads = onnx.load_model_from_string(model.heads_graph.content)
    exported: dict[DecodeSpec, Path] = {}
    for decode, score, truncated in TRUNCATIONS:
        if decode not in exported:
            exported[decode] = tmp_path / f"{len(exported)}.onnx"
            onnx.save(build_portable(heads, dataclasses.replace(model.spec, decode=decode), None), exported[decode])
        with OrtRetinaFace(exported[decode], score_threshold=score, threads=1, size_hw=(256, 768)) as detector:
            assert detector.detect(crowd).truncated == truncated


def test_other_models_are_refused(static_onnx: Path, tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        model.graph.output[0].name = "count"
        for node in model.graph.node:
            for index, name in enumerate(node.output):
                if name == "num_detections":
                    node.output[index] = "count"

    cases = {
        "not a detector written by this toolkit": lambda m: m.ClearField("metadata_props"),
        "not JSON": lambda m: helper.set_model_props(m, {SPEC_KEY: "{"}),
        "format 7": lambda m: helper.set_model_props(
            m, {SPEC_KEY: ModelSpec().to_json().replace('"format":1', '"format":7')}
        ),
        "not those of a detector": rename,
        "not those of a detector:": lambda m: (
            m.graph.input[0].type.tensor_type.shape.dim[0].__setattr__("dim_value", 1)
        ),
        "not those of a detector: ": lambda m: helper.set_model_props(
            m, {SPEC_KEY: ModelSpec(decode=DecodeSpec(max_detections=7)).to_json()}
        ),
        "ONNX Runtime cannot load it": lambda m: setattr(m.graph.node[0], "op_type", "NoSuchOperator"),
    }
    for words, change in cases.items():
        path = _changed(static_onnx, tmp_path / "m.onnx", change)
        with pytest.raises((ModelFileError, SpecError), match=words) as caught:
            OrtRetinaFace(path)
        assert "\n" not in str(caught.value)


def test_a_model_whose_weights_lie_beside_it_runs(astronaut: Frame, static_onnx: Path, tmp_path: Path) -> None:
    onnx.save(
        onnx.load(static_onnx), tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin",
        size_threshold=1024,
    )  # fmt: skip
    assert (tmp_path / "weights.bin").stat().st_size > 1_000_000
    _assert_same(OrtRetinaFace(tmp_path / "m.onnx").detect(astronaut), OrtRetinaFace(static_onnx).detect(astronaut), 0)
    outside = _changed(
        static_onnx,
        tmp_path / "evil.onnx",
        lambda m: m.graph.initializer.append(
            TensorProto(
                name="t", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL,
                external_data=[onnx.StringStringEntryProto(key="location", value="../../etc/passwd")],
            )
        ),
    )  # fmt: skip
    with pytest.raises(ModelFileError, match="outside its own folder"):
        load_detector(outside)


def test_load_detector_names_what_it_was_given(tmp_path: Path, static_onnx: Path) -> None:
    with load_detector(static_onnx, threads=1) as fast, load_detector(static_onnx, backend="onnxruntime") as plain:
        assert (type(fast), type(plain)) == (OpenVinoRetinaFace, OrtRetinaFace)
    with pytest.raises(ModelFileError, match=r"no such model file; python -m export\.to_onnx"):
        load_detector(tmp_path / "m.onnx")
    for name, words in (
        ("w.pth", r"export it first: python -m export\.to_onnx --weights"),
        ("m.bin", r"expected a \.onnx"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ModelFileError, match=words):
            load_detector(tmp_path / name)


def test_sizes_that_do_not_fit(static_onnx: Path, dynamic_onnx: Path) -> None:
    assert OrtRetinaFace(static_onnx, size_hw=(320, 320)).size_hw == (320, 320)
    with pytest.raises(SpecError, match="takes 320x320 only"):
        OrtRetinaFace(static_onnx, size_hw=(640, 640))
    for wrong in ((100, 100), (0, 32), (8192, 8192), (640.0, 640.0), (640,), "640x640"):
        with pytest.raises(SpecError, match="network size"):
            OrtRetinaFace(dynamic_onnx, size_hw=wrong)  # type: ignore[arg-type]
    for threads in (0, 100_000, "2"):
        with pytest.raises(SpecError, match="threads"):
            OrtRetinaFace(static_onnx, threads=threads)  # type: ignore[arg-type]


def test_a_fixed_size_no_machine_could_hold_is_refused(static_onnx: Path, tmp_path: Path) -> None:
    def enlarge(model: onnx.ModelProto) -> None:
        for side in model.graph.input[0].type.tensor_type.shape.dim[1:3]:
            side.dim_value = 8192

    with pytest.raises((ModelFileError, SpecError), match=r"8192x8192 is more than|cannot load"):
        OrtRetinaFace(_changed(static_onnx, tmp_path / "m.onnx", enlarge))


@pytest.mark.parametrize("lie", [-5, 751, "batch"])
def test_outputs_that_are_not_what_they_announce(
    lie: object, astronaut: Frame, static_onnx: Path, tmp_path: Path
) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if "num_detections" in node.output)
        node.output[list(node.output).index("num_detections")] = "true_count"
        if lie == "batch":
            model.graph.node.append(helper.make_node("Concat", ["true_count"] * 2, ["num_detections"], axis=0))
        else:
            value = numpy_helper.from_array(np.array([lie], np.int32), "lie")
            model.graph.initializer.append(value)
            zero = numpy_helper.from_array(np.array([0], np.int32), "zero_count")
            model.graph.initializer.append(zero)
            model.graph.node.append(helper.make_node("Mul", ["true_count", "zero_count"], ["nothing"]))
            model.graph.node.append(helper.make_node("Add", ["nothing", "lie"], ["num_detections"]))

    detector = OrtRetinaFace(_changed(static_onnx, tmp_path / "m.onnx", change))
    with pytest.raises(ModelFileError, match="not what it announces"):
        detector.detect(astronaut)


def test_large_batches_go_through_in_parts(
    frames: list[Frame], dynamic_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound on pixels holds for the batch, seen by what reaches ONNX Runtime, and changes no result."""
    import trt_runtime.detector

    expected = OrtRetinaFace(dynamic_onnx, size_hw=(320, 320)).detect_batch(frames)
    detector = OrtRetinaFace(dynamic_onnx, size_hw=(320, 320))  # new: a lane that has run keeps its session
    sizes: list[int] = []

    class Watched:
        def run(self, names: list[str], inputs: dict[str, np.ndarray], session: object = detector._session) -> object:
            sizes.append(len(inputs["images"]))
            return session.run(names, inputs)  # type: ignore[attr-defined]

    monkeypatch.setattr(detector, "_session", Watched())
    monkeypatch.setattr(trt_runtime.detector, "MAX_NETWORK_PIXELS", 3 * 320 * 320)
    for found, single in zip(detector.detect_batch(frames), expected, strict=True):
        _assert_same(found, single, 1e-3)
    assert sizes == [3, 3, 1]


@both
def test_the_threshold_may_be_set_but_not_below_the_floor(kind: Kind, crowd: Frame, dynamic_onnx: Path) -> None:
    detector = kind(dynamic_onnx)
    assert detector.score_threshold == 0.5
    few = detector.detect(crowd)
    detector.score_threshold = 0.02
    many = detector.detect(crowd)
    assert len(many) > len(few) == 3
    np.testing.assert_array_equal(many.boxes[:3], few.boxes)
    for wrong in (0.001, float("nan"), 1.0, -1, "a"):
        with pytest.raises(SpecError):
            detector.score_threshold = wrong  # type: ignore[assignment]
    assert detector.score_threshold == 0.02


@both
def test_batches_may_be_any_iterable(kind: Kind, frames: list[Frame], static_onnx: Path) -> None:
    detector = kind(static_onnx)
    assert [len(found) for found in detector.detect_batch(frame for frame in frames[:3])] == [1, 3, 0]
    assert [len(found) for found in detector.detect_batch(np.stack([frames[0]] * 2))] == [1, 1]
    with pytest.raises(FrameError, match="one frame goes to detect"):
        detector.detect_batch(frames[0])


@pytest.mark.data
@both
def test_scores_fall_even_where_the_sigmoid_rounds(kind: Kind, widerface: Path, dynamic_onnx: Path) -> None:
    from facespec.images import find_images, read_image

    detector = kind(dynamic_onnx, score_threshold=0.02)
    for path in find_images(widerface / "val" / "images")[::40]:
        assert (np.diff(detector.detect(read_image(path)).scores) <= 0).all()


def test_a_model_at_odds_with_itself_ends_in_one_line(astronaut: Frame, static_onnx: Path, tmp_path: Path) -> None:
    """The priors of 320x320 in a graph that says it takes any size."""

    def loosen(model: onnx.ModelProto) -> None:
        for index, side in enumerate(model.graph.input[0].type.tensor_type.shape.dim[1:3]):
            side.ClearField("dim_value")
            side.dim_param = f"side{index}"
        model.graph.ClearField("value_info")

    detector = OrtRetinaFace(_changed(static_onnx, tmp_path / "m.onnx", loosen), score_threshold=0.02)
    assert detector.size_hw is None
    with pytest.raises(ModelFileError, match="ONNX Runtime failed on a batch of") as caught:
        detector.detect(np.tile(astronaut, (2, 2, 1)))
    assert "\n" not in str(caught.value)


# what all detectors share, without a model

SOON_S = 20.0


def test_lanes_are_made_as_calls_meet_and_used_again_the_last_first() -> None:
    detector = HandmadeDetector()
    for _ in range(3):
        assert len(detector.detect(frame_of(2))) == 2
    assert len(detector.lanes) == 1
    meet = threading.Barrier(3)
    detector.on_run = lambda lane: meet.wait(SOON_S)
    with ThreadPoolExecutor(3) as pool:
        assert [len(found) for found in pool.map(detector.detect, map(frame_of, (1, 2, 3)))] == [1, 2, 3]
    assert len(detector.lanes) == 3
    detector.on_run = lambda lane: None
    last = detector._idle[-1]
    before = [lane.runs for lane in detector.lanes]
    detector.detect(frame_of(1))
    detector.detect(frame_of(1))
    assert [lane.runs - runs for lane, runs in zip(detector.lanes, before, strict=True)] == [
        2 * (lane is last) for lane in detector.lanes
    ]
    detector.close()
    assert [lane.closed for lane in detector.lanes] == [True] * 3


@pytest.mark.parametrize("error", [ModelFileError("m"), RuntimeError("r"), KeyboardInterrupt(), MemoryError()])
def test_a_lane_that_broke_is_closed_and_never_used_again(error: BaseException) -> None:
    detector = HandmadeDetector()

    def fail(lane: HandmadeLane) -> None:
        raise error

    detector.on_run = fail
    for count in (1, 2):
        with pytest.raises(type(error)):
            detector.detect(frame_of(1))
        assert [lane.closed for lane in detector.lanes] == [True] * count
    detector.on_run = lambda lane: None
    assert len(detector.detect(frame_of(3))) == 3
    assert [lane.closed for lane in detector.lanes] == [True, True, False]
    in_time(detector.close)


@pytest.mark.parametrize("error", [FrameError("f"), NonFiniteError("n")])
def test_a_lane_outlives_a_wrong_frame(error: Exception) -> None:
    detector = HandmadeDetector()

    def fail(lane: HandmadeLane) -> None:
        raise error

    detector.detect(frame_of(1))
    detector.on_run = fail
    with pytest.raises(type(error)):
        detector.detect(frame_of(1))
    detector.on_run = lambda lane: None
    detector.detect(frame_of(1))
    assert [(lane.closed, lane.runs) for lane in detector.lanes] == [(False, 3)]
    in_time(detector.close)


def test_a_lane_that_cannot_be_made_leaves_the_detector_as_it_was() -> None:
    detector = HandmadeDetector()
    detector.on_new = lambda: (_ for _ in ()).throw(ModelFileError("no memory"))
    for _ in range(2):
        with pytest.raises(ModelFileError, match="no memory"):
            detector.detect(frame_of(1))
    detector.on_new = lambda: None
    assert len(detector.detect(frame_of(1))) == 1
    in_time(detector.close)


def test_results_are_read_before_another_call_gets_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that begins while results are read must not write over them."""
    detector = HandmadeDetector()
    real, depth = detector_module.to_detections, [0]

    def reading(*args: Any) -> Detections:
        depth[0] += 1
        if depth[0] == 1:
            assert len(detector.detect(frame_of(7))) == 7
        return real(*args)

    monkeypatch.setattr(detector_module, "to_detections", reading)
    found = detector.detect(frame_of(2))
    assert len(found) == 2
    np.testing.assert_array_equal(found.boxes[1], [6, 7, 8, 9])
    assert len(detector.lanes) == 2
    kept = found.boxes.copy(), found.scores.copy(), found.landmarks.copy()
    for _ in range(3):
        detector.detect(frame_of(5))
    for mine, before in zip((found.boxes, found.scores, found.landmarks), kept, strict=True):
        np.testing.assert_array_equal(mine, before)


def test_closing_waits_for_calls_and_every_close_for_the_first() -> None:
    detector = HandmadeDetector()
    running, go_on, freeing, freed = (threading.Event() for _ in range(4))
    detector.on_run = lambda lane: (running.set(), go_on.wait(SOON_S))
    free = detector._free

    def slowly() -> None:
        assert not freeing.is_set()  # once
        freeing.set()
        assert freed.wait(SOON_S)
        free()

    detector._free = slowly  # type: ignore[method-assign]
    with ThreadPoolExecutor(3) as pool:
        call = pool.submit(detector.detect, frame_of(4))
        assert running.wait(SOON_S)
        first = pool.submit(detector.close)
        assert not freeing.wait(0.1)  # a call is under way
        go_on.set()
        assert len(call.result(SOON_S)) == 4
        assert freeing.wait(SOON_S)
        second = pool.submit(detector.close)
        with pytest.raises(TimeoutError):
            second.result(0.1)  # not before everything is free
        assert not detector.lanes[0].closed
        freed.set()
        first.result(SOON_S)
        second.result(SOON_S)
    assert detector.lanes[0].closed
    in_time(detector.close)
    with pytest.raises(ClosedError, match="the detector is closed: make a new one"), detector:
        pass


def test_a_detector_that_cannot_be_freed_is_closed_all_the_same() -> None:
    detector = HandmadeDetector()
    detector.detect(frame_of(1))

    def fail() -> None:
        raise OSError("the GPU is gone")

    detector.lanes[0].close = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the GPU is gone"):
        detector.close()
    in_time(detector.close)
    with pytest.raises(ClosedError):
        detector.detect(frame_of(1))


def test_leaving_its_context_closes_a_detector() -> None:
    with HandmadeDetector() as detector:
        assert isinstance(detector, HandmadeDetector)
        detector.detect(frame_of(1))
    assert detector.lanes[0].closed
    with pytest.raises(ClosedError):
        detector.detect_batch([])


def test_frames_of_one_network_size_run_together_up_to_the_limit() -> None:
    class Limited(HandmadeDetector):
        def _batch_limit(self, size_hw: tuple[int, int]) -> int:
            return {(32, 64): 3, (64, 32): 2}[size_hw]

    detector = Limited()
    wide, tall = (32, 64), (64, 32)
    frames = [frame_of(i, wide) for i in range(4)] + [frame_of(i, tall) for i in (4, 5, 6)] + [frame_of(7, wide)]
    frames.append(frame_of(8, (20, 50)))  # another frame size, the same network size
    found = detector.detect_batch(frames)
    assert detector.calls == [[0, 1, 2], [3], [4, 5], [6], [7, 8]]
    assert [len(faces) for faces in found] == list(range(9))
    assert [faces.frame_hw for faces in found] == [wide] * 4 + [tall] * 3 + [wide, (20, 50)]
    for value, faces in enumerate(found):
        np.testing.assert_array_equal(faces.boxes, np.arange(32).reshape(8, 4)[:value] + value)
        np.testing.assert_array_equal(faces.landmarks, np.arange(80).reshape(8, 5, 2)[:value] + value)


def test_nothing_runs_if_one_frame_of_many_is_wrong() -> None:
    detector = HandmadeDetector()
    with pytest.raises(FrameError):
        detector.detect_batch([frame_of(1), np.zeros((4, 4), np.uint8)])
    assert detector.calls == []


def test_the_limit_of_pixels() -> None:
    """Exactly so many may run; with a pixel row more nothing may, and the message says height first."""
    detector = HandmadeDetector()
    assert MAX_NETWORK_PIXELS == 4096 * 4096
    assert detector._batch_limit((4096, 4096)) == 1
    assert detector._batch_limit((2048, 4096)) == 2
    assert detector._batch_limit((32, 32)) == MAX_NETWORK_PIXELS // 1024
    with pytest.raises(FrameError, match=r"input of 4128x4096 is too large: give size_hw \(--size HEIGHTxWIDTH\)"):
        detector._batch_limit((4128, 4096))


@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: outputs[:4],
        lambda outputs: [*outputs, outputs[0]],
        lambda outputs: [outputs[0] * 0 - 1, *outputs[1:]],
        lambda outputs: [outputs[0] * 0 + 9, *outputs[1:]],
        lambda outputs: [np.array([1, -1], np.int32), *outputs[1:]],
        lambda outputs: [np.array([9, 1], np.int32), *outputs[1:]],
        lambda outputs: [output[:1] for output in outputs],
        lambda outputs: [outputs[0], outputs[1][:, :7], *outputs[2:]],
        lambda outputs: [outputs[0], outputs[1].transpose(0, 2, 1), *outputs[2:]],
        lambda outputs: [*outputs[:3], outputs[3].transpose(0, 1, 3, 2), outputs[4]],
        lambda outputs: [*outputs[:4], outputs[4][:, None]],
    ],
)
def test_outputs_of_another_shape_or_count_are_refused(change: Callable[[list[Any]], list[Any]]) -> None:
    detector = HandmadeDetector()
    frames = [frame_of(8), frame_of(1)]  # as many as there is room for
    assert [len(found) for found in detector.detect_batch(frames)] == [8, 1]
    detector.change = change
    with pytest.raises(ModelFileError, match="outputs are not what it announces: export it again"):
        detector.detect_batch(frames)
    assert detector.lanes[0].closed


def test_a_timer_sees_the_stages_of_all_parts() -> None:
    detector = HandmadeDetector()
    for call in (
        lambda timer: detector.detect(frame_of(1), timer),
        lambda timer: detector.detect_batch([frame_of(1), frame_of(1, (64, 64))], timer),
    ):
        timer = StageTimer()
        call(timer)
        assert list(timer.total_ms) == ["network", "results"]


def test_a_stream_runs_two_calls_at_once_unless_told_otherwise() -> None:
    detector = HandmadeDetector()
    for stream, depth in ((detector.stream(), 2), (detector.stream(3), 3)):
        meet = threading.Barrier(depth)
        detector.on_run = lambda lane, meet=meet: meet.wait(SOON_S)  # type: ignore[misc]
        with stream:
            found = [faces for _, faces in stream.map([frame_of(1)] * 2 * depth)]
        assert [len(faces) for faces in found] == [1] * 2 * depth
    assert len(detector.lanes) == 3


def test_what_a_detector_says_of_itself() -> None:
    detector = HandmadeDetector(size=(32, 64), score_threshold=None)
    assert (detector.score_threshold, detector.size_hw, detector.max_batch) == (0.5, (32, 64), 1)
    assert detector.environment() == {"backend": "handmade"}
    assert detector.spec is SPEC
    detector.score_threshold = 0.65
    assert len(detector.detect(frame_of(8))) == 3  # of 0.9, 0.8, 0.7, 0.6 ...
    assert RetinaFaceDetector.max_batch == 1


def test_frames_are_letterboxed_slot_by_slot(astronaut: Frame) -> None:
    import cv2

    frames = [astronaut, astronaut[:100, :300], np.asarray(cv2.resize(astronaut, (96, 64)), np.uint8)]
    boxes = [Letterbox.fit((frame.shape[0], frame.shape[1]), (64, 96)) for frame in frames]
    spec = ModelSpec(preprocess=PreprocessSpec((1, 2, 3)))
    batch = letterboxed(frames, boxes, spec)
    assert (batch.shape, batch.dtype) == ((3, 64, 96, 3), np.uint8)
    for slot, frame, box in zip(batch, frames, boxes, strict=True):
        height, width = box.scaled_hw
        assert (np.array_equal(frame, slot)) or (slot[height:] == (1, 2, 3)).all()
        assert (slot[:height, width:] == (1, 2, 3)).all()
        inside = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(slot[:height, :width], inside)
        np.testing.assert_array_equal(letterboxed([frame], [box], spec), slot[None])


# which detector


def test_a_size_that_was_asked_for_and_the_one_a_model_takes() -> None:
    assert network_size((320, 640), None, "m") == (320, 640)
    assert network_size(None, None, "m") is None
    assert network_size(None, 640, "m") == 640
    assert network_size((320, 640), [320, 640], "m") == (320, 640)  # type: ignore[arg-type]
    assert type(network_size(None, [320, 640], "m")) is tuple  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=re.escape("m takes 320x640 only, not 640x320: leave the size out, or export")):
        network_size((320, 640), (640, 320), "m")
    for other in ((320, 320), (640, 640)):  # one side as it is
        with pytest.raises(SpecError, match="m takes 320x640 only, not"):
            network_size((320, 640), other, "m")
    with pytest.raises(SpecError, match="m takes 320x320 only, not a longer side of 320: "):
        network_size((320, 320), 320, "m")
    for wrong in (33, (32, 33), (0, 32)):
        with pytest.raises(SpecError, match="not a multiple of 32"):
            network_size((320, 320), wrong, "m")


def test_what_load_detector_refuses(tmp_path: Path) -> None:
    for name in ("m.engine", "m.plan", "m.onnx", "m.ONNX", "w.pt", "w.tar", "w.ckpt", "w.PTH", "m.bin"):
        (tmp_path / name).write_bytes(b"x")
    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("m.onnx", {"backend": "tflite"}, SpecError,
         "backend 'tflite' is not one of auto, onnxruntime, openvino, tensorrt"),
        (".", {}, ModelFileError, "a folder; give the model file in it"),
        ("none.onnx", {}, ModelFileError, r"no such model file; python -m export.to_onnx --out \S+none.onnx writes"),
        *[(f"none.{end}", {}, ModelFileError,
           rf"no such model file; python -m export.to_trt --out \S+none\.{end} builds one")
          for end in ("engine", "plan", "trt", "TRT")],
        *[(f"none.{end}", {}, ModelFileError, "no such model file; detectors run exported models: python -m export.to")
          for end in ("pth", "pt", "tar", "ckpt")],
        ("resnet50", {}, ModelFileError, r"no such model file; models are files, or mobilenet0\.25 by its name"),
        ("m.engine", {"backend": "openvino"}, SpecError, "an engine runs in TensorRT only, not in openvino"),
        ("m.plan", {"backend": "onnxruntime"}, SpecError, "an engine runs in TensorRT only, not in onnxruntime"),
        ("m.onnx", {"backend": "tensorrt"}, SpecError, "TensorRT runs engines: python -m export.to_trt builds one"),
        ("m.onnx", {"device": 1}, SpecError, "an ONNX file runs on the CPU, --device is for engines"),
        *[("m.ONNX", {"device": device}, SpecError, "an ONNX file runs on the CPU, --device is for engines")
          for device in (0, "cuda", "cuda:0", "pycuda")],
        ("m.onnx", {"device": "cpu"}, ModelFileError, "not an ONNX file"),
        ("m.engine", {"device": "cpu"}, ModelFileError, "engines run on a GPU; device cpu runs the .plugin.onnx"),
        ("m.onnx", {}, ModelFileError, "not an ONNX file"),
        ("m.engine", {"precision": "bf16"}, SpecError, "an engine has the precision it was built in, not bf16"),
        ("m.bin", {}, ModelFileError, "expected a .onnx file of python -m export.to_onnx, or an engine of python"),
        *[(f"w.{end}", {}, ModelFileError,
           rf"a checkpoint; export it first: python -m export.to_onnx --weights \S+w.{end}")
          for end in ("pt", "tar", "ckpt", "PTH")],
    ]  # fmt: skip
    for name, options, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            load_detector(tmp_path / name, **options)
        assert type(caught.value) is kind


@pytest.mark.parametrize("name", ["model", "model.bin", "model.trt", "model.pth"])
@pytest.mark.parametrize("start", [b"ftrt", b"vtrt" + bytes(64), b"something of a later version"])
def test_what_an_engine_is_its_content_or_its_sidecar_says(name: str, start: bytes, tmp_path: Path) -> None:
    engine = write_engine(tmp_path, start + bytes(80))
    place = tmp_path / name
    engine.rename(place)
    sidecar_path(engine).rename(sidecar_path(place))
    with pytest.raises(SpecError, match="an engine runs in TensorRT only"):
        load_detector(place, backend="openvino")


def test_a_model_and_a_checkpoint_of_any_name(static_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(static_onnx.read_bytes())
    with load_detector(tmp_path / "model", threads=1) as detector:
        assert detector.size_hw == (320, 320)
    (tmp_path / "weights").write_bytes(b"PK\3\4")
    with pytest.raises(ModelFileError, match=r"a checkpoint; export it first: python -m export\.to_onnx --weights"):
        load_detector(tmp_path / "weights")


class _Asked:
    """Stands where a detector would be made; what it was asked for shows."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path, self.options = path, options


@pytest.mark.parametrize("name", ["m.engine", "m.plan", "M.ENGINE"])
@pytest.mark.parametrize("backend", ["auto", "tensorrt"])
def test_an_engine_gets_what_was_asked_for(
    name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU none can be loaded."""
    monkeypatch.setattr("trt_runtime.load.TRTRetinaFace", _Asked)
    (tmp_path / name).write_bytes(b"x")
    made: Any = load_detector(str(tmp_path / name), score_threshold=0.3, size_hw=640, device=2, backend=backend)
    assert made.path == tmp_path / name
    assert made.options == {"score_threshold": 0.3, "size_hw": 640, "device": 2}
    made = load_detector(tmp_path / name, backend=backend)
    assert made.options == {"score_threshold": None, "size_hw": None, "device": 0}
    for device in ("cuda", "cuda:3", "pycuda"):
        made = load_detector(tmp_path / name, device=device)
        assert made.options["device"] == device


@pytest.mark.parametrize(("backend", "name"), [("onnxruntime", "OrtRetinaFace"), ("openvino", "OpenVinoRetinaFace")])
def test_a_detector_of_the_cpu_gets_what_was_asked_for(
    backend: str, name: str, static_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"trt_runtime.cpu.{name}", _Asked)
    options = {"score_threshold": 0.3, "size_hw": 640, "threads": 3, "streams": 2, "precision": "fp32"}
    made: Any = load_detector(static_onnx, backend=backend, **options)
    assert (made.path.path, made.options) == (static_onnx, options)
    made = load_detector(static_onnx, backend=backend)
    assert made.options == {"score_threshold": None, "size_hw": None, "threads": None, "streams": 1}


def test_a_network_size_may_be_set_between_calls(dynamic_onnx: Path, astronaut: Frame) -> None:
    """Though frames of that shape have been seen."""
    with OrtRetinaFace(dynamic_onnx, size_hw=(160, 160)) as detector:
        small = detector.detect(astronaut)
        detector.size_hw = (320, 320)
        found = detector.detect(astronaut)
    with OrtRetinaFace(dynamic_onnx, size_hw=(320, 320)) as other:
        expected = other.detect(astronaut)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert not np.array_equal(found.boxes, small.boxes)


def test_the_package_hands_out_every_name_it_promises() -> None:
    import trt_runtime

    for name in set(trt_runtime.__all__) - {"__version__"}:
        assert getattr(trt_runtime, name).__name__ == name
    assert trt_runtime.__version__ == importlib.metadata.version("retinaface-trt")
    assert trt_runtime.__all__ == sorted(trt_runtime._PLACES)
    assert {"load_detector", "Detections", "__version__"} <= set(dir(trt_runtime))
    with pytest.raises(AttributeError, match="module 'trt_runtime' has no attribute 'nothing'"):
        trt_runtime.nothing  # noqa: B018


def test_the_package_imports_what_is_asked_for_only() -> None:
    import subprocess

    code = (
        "import sys, trt_runtime\nassert 'trt_runtime.detector' not in sys.modules\n"
        "trt_runtime.OrtRetinaFace\n"
        "print(sorted({'torch', 'onnxruntime', 'openvino', 'tensorrt', 'av'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
