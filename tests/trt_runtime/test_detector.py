from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from facespec.detections import Detections
from facespec.errors import FrameError, ModelFileError, NonFiniteError, SpecError
from facespec.letterbox import Frame
from facespec.spec import SPEC_KEY, DecodeSpec, ModelSpec
from trainer import load_model
from trainer.detector import TorchRetinaFace
from trt_runtime import OpenVinoRetinaFace, OrtRetinaFace, load_detector

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


def test_truncation_shows(crowd: Frame, tmp_path: Path) -> None:
    from export.to_onnx import ExportOptions, export_onnx

    # three faces over 0.5, more below: a cut is worth a word only where it lies above the threshold asked for
    for decode, score, truncated in (
        (DecodeSpec(max_detections=2), 0.5, True),
        (DecodeSpec(top_k=5), 0.5, True),
        (DecodeSpec(), 0.02, False),
        (DecodeSpec(max_detections=4), 0.5, False),
        (DecodeSpec(max_detections=4), 0.02, True),
    ):
        export_onnx(ExportOptions("mobilenet0.25", tmp_path / "m.onnx", (512, 1536), decode))
        for kind in KINDS:
            assert kind(tmp_path / "m.onnx", score_threshold=score).detect(crowd).truncated == truncated


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
    for path in find_images(widerface / "val" / "images")[::20]:
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
