"""OpenVINO against ONNX Runtime and PyTorch, the choice between them, and what both say of threads and closing."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest

from export.verify import BUDGETS
from facespec.agreement import Agreement
from facespec.detections import Detections
from facespec.errors import BuildError, ClosedError, FrameError, ModelFileError, NonFiniteError, SpecError, reason
from facespec.images import find_images, read_image
from facespec.letterbox import Frame, Letterbox
from facespec.samples import sample_crops
from facespec.spec import SPEC_KEY, DecodeSpec, ModelSpec, NetworkSize, PreprocessSpec
from tests.conftest import Exported
from tests.faces import assert_identical
from trainer import load_model
from trainer.model import TorchRetinaFace
from trt_runtime import OpenVinoRetinaFace, OrtRetinaFace, cpu, load_detector
from trt_runtime.cpu import COMPILED_SIZES, best_backend
from trt_runtime.kernels import decode_nms
from trt_runtime.measure import StageTimer, cores
from trt_runtime.onnx_model import OnnxModel

openvino = pytest.importorskip("openvino", reason="pip install -e '.[cpu]'")

Kind = type[OrtRetinaFace] | type[OpenVinoRetinaFace]
FLOOR = 0.02
ROOT = Path(__file__).parents[2]

both = pytest.mark.parametrize("kind", [OrtRetinaFace, OpenVinoRetinaFace])


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def frames(crowd: Frame, astronaut: Frame) -> list[Frame]:
    """Frames of many shapes: one without a face, views, one of the network's size and one larger than it."""
    return [
        astronaut,
        crowd,
        np.full((70, 130, 3), 90, np.uint8),
        np.asarray(cv2.resize(astronaut, (320, 320))),
        np.asarray(cv2.resize(astronaut, (700, 620))),
        astronaut[:400, 100:333],
        crowd[:, ::-1],
    ]


def _assert_close(found: Detections, expected: Detections, pixels: float, scores: float = 1e-4) -> None:
    assert found.frame_hw == expected.frame_hw
    assert len(found) == len(expected)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=pixels)
    np.testing.assert_allclose(found.scores, expected.scores, atol=scores)
    np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=pixels)


def _changed(path: Path, out: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, out)
    return out


# the same faces


@pytest.mark.parametrize("size", [(192, 480), (224, 128), 320, 64, None])
def test_openvino_finds_what_onnx_runtime_finds(
    size: NetworkSize, frames: list[Frame], dynamic_onnx: Path, plugin_form: Path
) -> None:
    """Down to the floor, in both forms, at one size, by the longer side, and at each frame's own size."""
    expected = OrtRetinaFace(dynamic_onnx, score_threshold=FLOOR, size_hw=size)
    several = list(frames) if isinstance(size, tuple) else frames[:4]  # each size costs a compilation
    for path in (dynamic_onnx, plugin_form):
        with OpenVinoRetinaFace(path, score_threshold=FLOOR, size_hw=size, threads=1) as detector:
            assert detector.size_hw == size
            assert sum(len(detector.detect(frame)) for frame in several[:2]) >= (4 if size != 64 else 0)
            for frame in several:
                # what the network sees as one pixel may be many pixels of the frame
                pixel = max(1, 1 / min(Letterbox.place(frame.shape[:2], size).scale_xy))
                _assert_close(detector.detect(frame), expected.detect(frame), 2e-3 * pixel, 1e-5)


def test_openvino_finds_what_pytorch_finds(frames: list[Frame], static_onnx: Path, dynamic_onnx: Path) -> None:
    torch_side = TorchRetinaFace(load_model(), score_threshold=FLOOR, size_hw=(320, 320))
    with OpenVinoRetinaFace(static_onnx, score_threshold=FLOOR) as detector:
        assert detector.size_hw == (320, 320)
        for frame in frames:
            _assert_close(detector.detect(frame), torch_side.detect(frame), 0.01 * max(1, max(frame.shape) / 320))
    crowd = frames[1]  # of whole multiples of 32, so that PyTorch sees the same, without padding
    with OpenVinoRetinaFace(dynamic_onnx, score_threshold=FLOOR) as detector:
        _assert_close(detector.detect(crowd), TorchRetinaFace(load_model(), score_threshold=FLOOR).detect(crowd), 0.01)


@pytest.mark.parametrize("form", ["portable", "plugin"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_reduced_precision_stays_within_its_budget(precision: str, form: str, exported: Exported) -> None:
    """Against PyTorch in float32, on crops of photographs, by the limits of export.verify for few images."""
    reference = TorchRetinaFace(load_model(), size_hw=(320, 320))
    budget = BUDGETS[precision]
    agreement = Agreement()
    with OpenVinoRetinaFace(exported(precision, form), threads=1) as detector:
        for _, frame in sample_crops(16, seed=5):
            agreement.add(reference.detect(frame), detector.detect(frame))
    assert agreement.faces >= 10
    assert agreement.recall is not None
    assert agreement.precision is not None
    assert agreement.recall >= budget.case_recall
    assert agreement.precision >= budget.case_precision
    assert np.mean(agreement.landmarks) <= 2 * budget.landmark_error
    assert np.mean(agreement.scores) <= budget.score_drift


@pytest.mark.data
def test_the_same_faces_on_wider_face(widerface: Path, static_onnx: Path) -> None:
    images = [read_image(path) for path in find_images(widerface / "val" / "images")[::20]]
    with OpenVinoRetinaFace(static_onnx) as openvino_side, OrtRetinaFace(static_onnx) as ort_side:
        found = [openvino_side.detect(image) for image in images]
        for image, ours in zip(images, found, strict=True):
            _assert_close(ours, ort_side.detect(image), 0.01 * max(1, max(image.shape) / 320), 1e-5)
    assert sum(map(len, found)) >= 10


@both
def test_less_padding_finds_the_same_faces(kind: Kind, crowd: Frame, astronaut: Frame, dynamic_onnx: Path) -> None:
    """The longer side of 320 against a square of 320: the same pixels of the frame, fewer of padding.

    Both networks see the same but for the rows and columns where padding ends: where there is none, its convolutions
    take zeros, and where there is some, what its layers made of it. Faces near that edge move by a part of a pixel.
    """
    upright = np.vstack(np.split(crowd, 3, axis=1))
    with (
        kind(dynamic_onnx, size_hw=320, threads=1) as longest,
        kind(dynamic_onnx, size_hw=(320, 320), threads=1) as square,
    ):
        assert_identical(longest.detect(astronaut), square.detect(astronaut))  # square itself
        for frame, faces in ((crowd, 3), (upright, 3), (astronaut[:300], 1)):
            found = longest.detect(frame)
            assert len(found) == faces
            pixel = max(1, max(frame.shape) / 320)
            _assert_close(found, square.detect(frame), 0.3 * pixel, 0.01)


def test_no_frame_stays_in_the_next(crowd: Frame, astronaut: Frame, dynamic_onnx: Path) -> None:
    """Larger, smaller and other shapes share the memory that frames are letterboxed to."""
    frames = [astronaut, crowd, np.vstack(np.split(crowd, 3, axis=1)), astronaut[:300]]
    with OpenVinoRetinaFace(dynamic_onnx, size_hw=320, threads=1) as detector:
        found = [detector.detect(frame) for frame in frames + frames[::-1]]
    for frame, first, again in zip(frames, found[:4], found[:3:-1], strict=True):
        with OpenVinoRetinaFace(dynamic_onnx, size_hw=320, threads=1) as fresh:
            alone = fresh.detect(frame)
        assert len(alone)
        assert_identical(first, alone)
        assert_identical(again, alone)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (640, [(480, 640), (640, 480), (448, 640), (640, 448), (384, 640), (640, 384)]),
        (64, [(64, 64)]),
        (1312, []),
        (None, []),
        ((96, 64), [(96, 64)]),
    ],
)
def test_what_is_run_before_the_first_frame(
    size: NetworkSize, expected: list[tuple[int, int]], dynamic_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size that photographs and videos of that longer side have, once."""
    ran: list[tuple[int, ...]] = []
    monkeypatch.setattr(cpu, "_infer", lambda _, pixels: ran.append(pixels.shape))
    with OpenVinoRetinaFace(dynamic_onnx, size_hw=size, threads=1):
        pass
    assert ran == [(*size_hw, 3) for size_hw in expected]


@pytest.mark.data
def test_less_padding_finds_the_same_faces_on_wider_face(widerface: Path, dynamic_onnx: Path) -> None:
    agreement = Agreement()
    with OrtRetinaFace(dynamic_onnx, size_hw=640) as longest, OrtRetinaFace(dynamic_onnx, size_hw=(640, 640)) as square:
        for path in find_images(widerface / "val" / "images")[::20]:
            image = read_image(path)
            agreement.add(square.detect(image), longest.detect(image))
    assert agreement.faces >= 30
    assert (agreement.recall or 0) >= 98
    assert (agreement.precision or 0) >= 98
    assert np.mean(agreement.iou) > 0.995
    assert np.mean(agreement.scores) < 0.01
    assert np.mean(agreement.landmarks) < 0.1  # percent of the face size


@both
def test_views_and_read_only_frames(kind: Kind, astronaut: Frame, static_onnx: Path) -> None:
    """At the size of the network, where nothing is resized or padded, and at another."""
    read_only = astronaut.copy()
    read_only.flags.writeable = False
    with kind(static_onnx) as detector:
        for wide in (read_only, np.asarray(cv2.resize(astronaut, (640, 640)))[::2, ::2], read_only[:320, 60:380]):
            for view in (wide, wide[::-1], wide[:, ::-1], wide[::-1, ::-1], wide[..., ::-1], np.asfortranarray(wide)):
                before = view.copy()
                assert_identical(detector.detect(view), detector.detect(np.ascontiguousarray(view)))
                np.testing.assert_array_equal(view, before)
        assert len(detector.detect(read_only)) == 1
        for flat in (np.broadcast_to(np.uint8(9), (320, 320, 3)), np.frombuffer(bytes(30_000), np.uint8)):
            assert len(detector.detect(flat.reshape(-1, 100, 3) if flat.ndim == 1 else flat)) == 0


@both
def test_results_are_the_callers_own(kind: Kind, astronaut: Frame, static_onnx: Path) -> None:
    """The buffers serve the next call; of a frame that fits the network reads the caller's own array."""
    fits = np.asarray(cv2.resize(astronaut, (320, 320)))
    with kind(static_onnx) as detector:
        for frame in (fits, astronaut):
            first = detector.detect(frame)
            kept = dataclasses.replace(first, **{n: getattr(first, n).copy() for n in ("boxes", "scores", "landmarks")})
            for other in (frame[:, ::-1], np.zeros_like(frame)):
                detector.detect(other)
            assert_identical(first, kept)
            changed = frame.copy()
            detector.detect(changed)
            changed[:] = 0
            assert len(detector.detect(changed)) == 0


# batches, sizes, runs and threads


@pytest.mark.parametrize("size", [(192, 480), 320, None])
def test_every_slot_of_an_openvino_batch_has_the_bits_of_the_frame_alone(
    size: NetworkSize, frames: list[Frame], dynamic_onnx: Path
) -> None:
    with OpenVinoRetinaFace(dynamic_onnx, score_threshold=FLOOR, size_hw=size, threads=1) as detector:
        alone = [detector.detect(frame) for frame in frames[:4]]
        for order in (range(4), [1, 1, 0, 3, 2, 0, 1], [2]):
            for index, found in zip(order, detector.detect_batch([frames[i] for i in order]), strict=True):
                assert_identical(found, alone[index])
        assert detector.detect_batch([]) == []


def test_no_more_than_so_many_sizes_stay_compiled(dynamic_onnx: Path) -> None:
    """However many threads have used them: a request that is kept keeps its compiled model alive."""

    def alive() -> set[tuple[int, ...]]:
        gc.collect()
        requests = [item for item in gc.get_objects() if type(item) is openvino.InferRequest]
        return {tuple(request.get_input_tensor().shape) for request in requests} - before

    before: set[tuple[int, ...]] = set()
    before = alive()
    sizes = [(32 * rows, 32 * columns) for rows, columns in [(1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]]
    frames = [np.full((*size, 3), 90, np.uint8) for size in sizes]
    assert len(frames) > COMPILED_SIZES
    with OpenVinoRetinaFace(dynamic_onnx, size_hw=sizes[0], threads=1) as detector:

        def work(frame: Frame) -> None:
            with detector._lane():  # so that two lanes are in use, whatever the threads do
                meet.wait()
                detector.detect(frame)

        meet = threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            for frame in frames[::-1]:
                detector.size_hw = (frame.shape[0], frame.shape[1])
                list(pool.map(work, [frame] * 2))
        assert 1 <= len(alive()) <= COMPILED_SIZES
        for frame in frames:
            detector.size_hw = (frame.shape[0], frame.shape[1])
            detector.detect(frame)
        last = {(1, *frame.shape) for frame in frames[-COMPILED_SIZES:]}
        assert alive() == last  # those used last
    assert alive() == set()


@both
@pytest.mark.parametrize("threads", [1, 2])
def test_results_are_identical_from_run_to_run(kind: Kind, threads: int, crowd: Frame, dynamic_onnx: Path) -> None:
    runs = []
    for _ in range(2):
        with kind(dynamic_onnx, size_hw=(192, 480), score_threshold=FLOOR, threads=threads) as detector:
            runs += [detector.detect(crowd) for _ in range(3)]
    assert len(runs[0]) > 3
    for run in runs[1:]:
        assert_identical(run, runs[0])


@both
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("size", [160, (96, 224), None])
def test_eight_threads_share_a_detector(
    kind: Kind, streams: int, size: NetworkSize, frames: list[Frame], dynamic_onnx: Path
) -> None:
    """With the results of one thread and one stream, to the bit."""
    some = [frames[3], np.asarray(cv2.resize(frames[1], (384, 128)), np.uint8), frames[2], frames[5][:200]]
    with kind(dynamic_onnx, size_hw=size, threads=1) as detector:
        expected = [detector.detect(frame) for frame in some]
    with kind(dynamic_onnx, size_hw=size, threads=2, streams=streams) as detector:

        def work(shift: int) -> None:
            for step in range(4):
                index = (step * (1 + shift % 3) + shift) % len(some)
                if step % 4 == 3:
                    pair = detector.detect_batch([some[index], some[index - 1]])
                    assert_identical(pair[0], expected[index])
                    assert_identical(pair[1], expected[index - 1])
                else:
                    assert_identical(detector.detect(some[index]), expected[index])

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, shift) for shift in range(8)]:
                done.result()


# which backend


def test_the_best_backend(static_onnx: Path, dynamic_onnx: Path, plugin_form: Path, tmp_path: Path) -> None:
    outside = tmp_path / "m.onnx"
    onnx.save(onnx.load(static_onnx), outside, save_as_external_data=True, location="w.bin", size_threshold=1024)
    cases: list[tuple[Path, NetworkSize, type]] = [
        (static_onnx, None, OpenVinoRetinaFace),
        (static_onnx, (320, 320), OpenVinoRetinaFace),
        (dynamic_onnx, None, OrtRetinaFace),
        (dynamic_onnx, (320, 320), OpenVinoRetinaFace),
        (dynamic_onnx, 320, OpenVinoRetinaFace),
        (plugin_form, None, OrtRetinaFace),
        (plugin_form, (320, 320), OpenVinoRetinaFace),
        (outside, None, OrtRetinaFace),
        (outside, (320, 320), OrtRetinaFace),
    ]
    for path, size, kind in cases:
        assert best_backend(OnnxModel(path), size) == kind.backend, (path, size)
        with load_detector(path, size_hw=size) as detector:
            assert type(detector) is kind
    with load_detector(dynamic_onnx, backend="openvino") as detector:
        assert type(detector) is OpenVinoRetinaFace


WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == HIDDEN else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)

HIDDEN, model = sys.argv[1:]
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

from facespec.errors import MissingPackageError
from facespec.images import read_image
from facespec.samples import sample_photographs
from trt_runtime import load_detector

with load_detector(model) as detector:
    print(detector.backend, len(detector.detect(read_image(next(iter(sample_photographs()))))))
try:
    load_detector(model, backend="openvino")
except MissingPackageError as error:
    print(error)
"""


@pytest.mark.parametrize("package", ["openvino", "onnx"])
def test_without_openvino_a_model_runs_in_onnx_runtime(package: str, static_onnx: Path, tmp_path: Path) -> None:
    """In a process that finds no such package, as where it is not installed."""
    line = [sys.executable, "-c", WITHOUT, package, str(static_onnx)]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "onnxruntime 1"
    assert f"needs {package}, which is not installed" in second
    assert ".[cpu]" in second


AT_ONCE = """
import sys, threading
import numpy as np
from trt_runtime import OpenVinoRetinaFace

def first(detector):
    meet.wait()
    (detector or OpenVinoRetinaFace(sys.argv[1])).detect(np.zeros((64, 64, 3), np.uint8))

meet = threading.Barrier(4)
shared = OpenVinoRetinaFace(sys.argv[1]) if sys.argv[2] == "shared" else None
sys.setswitchinterval(1e-7)
threads = [threading.Thread(target=first, args=(shared,)) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("done")
"""


@pytest.mark.parametrize("detectors", ["shared", "each its own"])
def test_the_first_calls_of_a_process_may_come_from_many_threads(detectors: str, static_onnx: Path) -> None:
    """OpenVINO alone hangs there, holding the GIL; a process of its own can be ended."""
    line = [sys.executable, "-c", AT_ONCE, str(static_onnx), detectors]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


CLOSED_ELSEWHERE = """
import faulthandler, signal, subprocess, sys, threading
import numpy as np
from trt_runtime import OpenVinoRetinaFace

faulthandler.enable()
detectors = [OpenVinoRetinaFace(sys.argv[1])]
detectors[0].detect(np.zeros((64, 64, 3), np.uint8))

def close():
    detectors.pop().close()

thread = threading.Thread(target=close)
thread.start()
thread.join()
signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch's loaders do
subprocess.run([sys.executable, "-c", ""], check=True)
print("done")
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_fork_may_use_its_parent_s_detector(backend: str, static_onnx: Path) -> None:
    code = f"""import os, signal, warnings
import numpy as np
from trt_runtime import load_detector
warnings.simplefilter("ignore", DeprecationWarning)
for used in (False, True):
    detector = load_detector({str(static_onnx)!r}, backend={backend!r}, threads=2)
    if used:
        detector.detect(np.zeros((320, 320, 3), np.uint8))
    child = os.fork()
    if not child:
        signal.alarm(60)
        print(len(detector.detect(np.zeros((320, 320, 3), np.uint8))), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (0, ["0", "0"]), done.stderr


def test_a_detector_may_end_on_another_thread_and_signals_still_come(static_onnx: Path) -> None:
    """OpenVINO alone unmaps the stack that signals run on; the process ends with a segmentation fault then."""
    line = [sys.executable, "-c", CLOSED_ELSEWHERE, str(static_onnx)]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


# what is refused


@both
@pytest.mark.parametrize("name", ["threads", "streams"])
@pytest.mark.parametrize("value", [0, -1, 257, 1.0, "2"])
def test_threads_and_streams_are_numbers(kind: Kind, name: str, value: object, static_onnx: Path) -> None:
    with pytest.raises(SpecError, match=f"{name} must be a number from 1 to 256, got {value!r}"):
        kind(static_onnx, **{name: value})  # type: ignore[arg-type, call-arg]
    with pytest.raises(SpecError, match=name):
        load_detector(static_onnx, **{name: value})  # type: ignore[arg-type]


@both
def test_sizes_that_do_not_fit(kind: Kind, static_onnx: Path, dynamic_onnx: Path) -> None:
    for size, words in (
        ((640, 640), "640x640"),
        (640, "a longer side of 640"),
        (320, "a longer side of 320"),
        ([640, 320], "640x320"),
    ):
        with pytest.raises(SpecError, match=f"takes 320x320 only, not {words}: "):
            kind(static_onnx, size_hw=size)
    for wrong in ((100, 100), 100, 0, -32, (0, 32), (8192, 8192), 4128, (640.0, 640.0), 640.0, (640,), "640", True):
        with pytest.raises(SpecError, match="network size"):
            kind(dynamic_onnx, size_hw=wrong)
    for path in (static_onnx, dynamic_onnx):
        with kind(path, size_hw=[320, 320]) as detector:
            assert detector.size_hw == (320, 320)
            assert len(detector.detect(np.zeros((9, 9, 3), np.uint8))) == 0


def test_files_that_openvino_cannot_run(
    static_onnx: Path, dynamic_onnx: Path, plugin_form: Path, tmp_path: Path, astronaut: Frame
) -> None:
    out = tmp_path / "m.onnx"

    def nameless(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [name.replace("head_", "h") for name in names]

    def spec(model: onnx.ModelProto, **changes: object) -> None:
        onnx.helper.set_model_props(model, {SPEC_KEY: dataclasses.replace(ModelSpec(), **changes).to_json()})  # type: ignore[arg-type]

    def enlarge(model: onnx.ModelProto) -> None:
        for side in model.graph.input[0].type.tensor_type.shape.dim[1:3]:
            side.dim_value = 8192

    cases: list[tuple[str, Path, Callable[[onnx.ModelProto], object]]] = [
        ("not a detector written by this toolkit", static_onnx, lambda m: m.ClearField("metadata_props")),
        ("not JSON", static_onnx, lambda m: onnx.helper.set_model_props(m, {SPEC_KEY: "{"})),
        ("head maps cannot be told apart", static_onnx, nameless),
        ("the plugin's max_detections is 750, the spec says 7", plugin_form,
         lambda m: spec(m, decode=DecodeSpec(max_detections=7))),
        ("OpenVINO cannot run it", static_onnx, lambda m: setattr(m.graph.node[0], "op_type", "NoSuchOperator")),
        ("OpenVINO cannot run it", static_onnx, lambda m: setattr(m.graph.input[0], "name", "pictures")),
        ("8192x8192 is more than", static_onnx, enlarge),
    ]  # fmt: skip
    for words, path, change in cases:
        with pytest.raises((ModelFileError, SpecError), match=words) as caught:
            OpenVinoRetinaFace(_changed(path, out, change))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    for content in (b"", b"\x00" * 99, static_onnx.read_bytes()[:-1000], static_onnx.read_bytes()[:3000]):
        out.write_bytes(content)
        with pytest.raises(ModelFileError, match=r"m\.onnx"):
            OpenVinoRetinaFace(out)
    onnx.save(onnx.load(static_onnx), out, save_as_external_data=True, location="w.bin", size_threshold=1024)
    with pytest.raises(ModelFileError, match="weights in other files runs in ONNX Runtime only"):
        OpenVinoRetinaFace(out)
    with pytest.raises(ModelFileError, match="no such model file"):
        OpenVinoRetinaFace(tmp_path / "nothing.onnx")


@both
def test_a_network_that_gives_nan_raises_and_may_be_called_again(
    kind: Kind, static_onnx: Path, tmp_path: Path, astronaut: Frame
) -> None:
    def poison(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.output[0] == "head_32")
        bias = next(item for item in model.graph.initializer if item.name == node.input[2])
        values = onnx.numpy_helper.to_array(bias).copy()
        values[31] = np.nan
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))

    with kind(_changed(static_onnx, tmp_path / "m.onnx", poison)) as detector:
        for _ in range(2):
            with pytest.raises(NonFiniteError):
                detector.detect(astronaut)


# environment, stages, closing


def test_what_the_speed_depends_on(static_onnx: Path, exported: Exported) -> None:
    import onnxruntime

    with OrtRetinaFace(static_onnx) as plain, OrtRetinaFace(static_onnx, threads=4, streams=2) as shared:
        assert plain.environment() == {
            "backend": "onnxruntime", "onnxruntime": onnxruntime.__version__, "threads": "every core",
        }  # fmt: skip
        assert shared.environment()["threads"] == 2
    native = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    ways = [(kind, "fp32") for kind in ("fp32", "fp16", "int8")]  # bf16 is for those who ask for it
    if "BF16" in native:
        ways += [("fp32", "bf16"), ("fp16", "bf16"), ("int8", "bf16")]
    for kind, expected in ways:
        asked = {} if expected == "fp32" else {"precision": expected}
        with OpenVinoRetinaFace(exported(kind, "portable"), threads=2, streams=2, **asked) as detector:
            found = detector.environment()
            assert found.pop("openvino") == openvino.__version__
            assert found == {"backend": "openvino", "threads": 2, "streams": 2, "precision": expected}
            # OpenVINO's own word for what its operators compute in
            (compiled,) = detector._compiled._values.values()
            operators = compiled.get_runtime_model().get_ops()
            computed = {str(operator.get_rt_info()["runtimePrecision"].astype(str)) for operator in operators}
            assert ("bf16" in computed) == (expected == "bf16")


@both
def test_the_timer_knows_every_stage(kind: Kind, frames: list[Frame], static_onnx: Path, plugin_form: Path) -> None:
    for path in (static_onnx, plugin_form):
        timer = StageTimer()
        with kind(path, size_hw=(320, 320)) as detector:
            detector.detect_batch(frames[:3], timer)
        host = kind is OpenVinoRetinaFace or path == plugin_form
        assert list(timer.total_ms) == ["letterbox", "network", *(["decode+NMS"] if host else []), "results"]
        assert all(value > 0 for value in timer.total_ms.values())


@both
def test_a_closed_detector_says_so(kind: Kind, static_onnx: Path, astronaut: Frame) -> None:
    with kind(static_onnx) as detector:
        assert len(detector.detect(astronaut)) == 1
    for call in (lambda: detector.detect(astronaut), lambda: detector.detect_batch([astronaut] * 2)):
        with pytest.raises(ClosedError, match="the detector is closed: make a new one"):
            call()
    detector.close()
    with pytest.raises(RuntimeError, match="mine"), kind(static_onnx) as detector:
        raise RuntimeError("mine")
    with pytest.raises(ClosedError):
        detector.detect(astronaut)
    with kind(static_onnx) as unused:
        pass
    unused.close()


@both
def test_close_waits_for_the_call_that_runs(kind: Kind, static_onnx: Path, astronaut: Frame) -> None:
    """The call is held up where its timer is told of the network."""
    detector = kind(static_onnx)
    running, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    class Held(StageTimer):
        def add(self, stage: str, ms: float) -> None:
            if stage == "letterbox":
                running.set()
                assert go_on.wait(30)

    def close() -> None:
        detector.close()
        closed.set()

    with ThreadPoolExecutor(3) as pool:
        call = pool.submit(detector.detect, astronaut, Held())
        assert running.wait(30)
        closing = [pool.submit(close) for _ in range(2)]
        assert not closed.wait(0.2)
        with pytest.raises(ClosedError):  # no new ones meanwhile
            detector.detect(astronaut)
        go_on.set()
        assert len(call.result(30)) == 1
        for done in closing:
            done.result(30)
    assert closed.is_set()


@both
def test_closing_under_load(kind: Kind, dynamic_onnx: Path, astronaut: Frame) -> None:
    """Each call of four threads returns the faces, or says that the detector is closed; nothing else happens."""
    small = np.asarray(cv2.resize(astronaut, (160, 160)))
    for _ in range(3):
        detector = kind(dynamic_onnx, size_hw=(160, 160), threads=1)
        expected = detector.detect(small)
        assert len(expected) == 1
        begun = threading.Barrier(5)

        def work() -> int:
            begun.wait(30)  # noqa: B023
            calls = 0
            while True:
                try:
                    assert_identical(detector.detect(small), expected)  # noqa: B023
                except ClosedError:
                    return calls
                calls += 1

        with ThreadPoolExecutor(4) as pool:
            threads = [pool.submit(work) for _ in range(4)]
            begun.wait(30)
            threading.Event().wait(0.1)
            detector.close()
            assert sum(thread.result(30) for thread in threads) > 0


# what ONNX Runtime and OpenVINO are told


def _tiny(path: Path, faces: int = 2, **changes: Any) -> Path:
    """Write an ONNX detector of a few nodes: so many faces in each slot, whatever the frame.

    Args:
        path: File.
        faces: Faces.
        changes: Of what it declares: `kind` and `shape` of the input, and of outputs by name a type and a shape.
    """
    helper, proto = onnx.helper, onnx.TensorProto
    kinds = {"int32": proto.INT32, "float32": proto.FLOAT}
    spec = ModelSpec(decode=DecodeSpec(max_detections=4))
    values = {
        "num_detections": np.full(1, faces, np.int32),
        "boxes": np.arange(16, dtype=np.float32).reshape(1, 4, 4),
        "scores": np.linspace(0.9, 0.6, 4, dtype=np.float32)[None],
        "landmarks": np.arange(40, dtype=np.float32).reshape(1, 4, 5, 2),
        "num_candidates": np.full(1, faces, np.int32),
    }
    nodes = [helper.make_node("Shape", ["images"], ["batch"], start=0, end=1)]
    constants, outputs = [], []
    for name, value in values.items():
        kind, shape = changes.get(name, (kinds[spec.decode.outputs[name][0]], ["N", *value.shape[1:]]))
        rest = value.astype(helper.tensor_dtype_to_np_dtype(kind))
        constants += [
            onnx.numpy_helper.from_array(rest, f"{name}_one"),
            onnx.numpy_helper.from_array(np.array(value.shape[1:], np.int64), f"{name}_rest"),
        ]
        nodes += [
            helper.make_node("Concat", ["batch", f"{name}_rest"], [f"{name}_shape"], axis=0),
            helper.make_node("Expand", [f"{name}_one", f"{name}_shape"], [name]),
        ]
        outputs.append(helper.make_tensor_value_info(changes.get("rename", {}).get(name, name), kind, shape))
        if name in changes.get("rename", {}):
            nodes[-1].output[0] = changes["rename"][name]
    outputs = [output for output in outputs if output.name not in changes.get("without", ())]
    images = helper.make_tensor_value_info(
        changes.get("input", "images"), changes.get("kind", proto.UINT8), changes.get("shape", ["N", "H", "W", 3])
    )
    nodes[0].input[0] = images.name
    model = helper.make_model(
        helper.make_graph(nodes, "tiny", [images], outputs, constants), opset_imports=[helper.make_opsetid("", 19)],
        ir_version=9,
    )  # fmt: skip
    helper.set_model_props(model, {SPEC_KEY: spec.to_json()})
    onnx.save(model, path)
    return path


def test_a_graph_that_is_no_network_is_a_detector_all_the_same(tmp_path: Path) -> None:
    with OrtRetinaFace(_tiny(tmp_path / "m.onnx")) as detector:
        found = detector.detect_batch([np.zeros((64, 32, 3), np.uint8)] * 3)
        assert [len(faces) for faces in found] == [2] * 3
        np.testing.assert_array_equal(found[2].boxes, np.arange(8).reshape(2, 4))
        assert (detector.size_hw, detector.files) == (None, [tmp_path / "m.onnx"])
    with OrtRetinaFace(_tiny(tmp_path / "m.onnx", shape=["N", 32, 64, 3])) as detector:
        assert detector.size_hw == (32, 64)  # height first
    assert OrtRetinaFace(_tiny(tmp_path / "m.onnx", shape=["N", 32, "W", 3])).size_hw is None


F32, I32, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": onnx.TensorProto.INT8},
        {"kind": F32},
        {"shape": ["N", "H", "W", 4]},
        {"shape": ["N", "H", "W", "C"]},
        {"shape": ["N", "H", "W"]},
        {"shape": ["N", "H", "W", 3, 1]},
        {"shape": [1, "H", "W", 3]},
        {"shape": [8, 32, 32, 3]},
        {"input": "pictures"},
        {"num_detections": (I64, ["N"])},
        {"num_candidates": (I64, ["N"])},
        {"scores": (F32, [1, 4])},
        {"landmarks": (onnx.TensorProto.DOUBLE, ["N", 4, 5, 2])},
        {"without": ["num_candidates"]},
        {"without": ["landmarks"]},
        {"rename": {"scores": "score"}},
    ],
)
def test_inputs_and_outputs_must_be_those_of_a_detector(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"not those of a detector: export it again|cannot load"):
        OrtRetinaFace(_tiny(tmp_path / "m.onnx", **changes))


@pytest.mark.parametrize("shape", [["N", 33, 32, 3], ["N", 32, 8192 * 4096, 3]])
def test_fixed_sizes_are_sizes_that_a_network_can_have(shape: list[Any], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="network size"):
        OrtRetinaFace(_tiny(tmp_path / "m.onnx", shape=shape))


def test_threads_that_calls_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _tiny(tmp_path / "m.onnx")
    monkeypatch.setattr(cpu, "cores", lambda: 12)
    for threads, streams, expected in (
        (None, 1, "every core"), (5, 1, 5), (None, 2, 6), (None, 5, 2), (None, 64, 1), (8, 3, 2), (2, 3, 1),
        (1, 256, 1),
    ):  # fmt: skip
        with OrtRetinaFace(path, threads=threads, streams=streams) as detector:
            assert detector.environment()["threads"] == expected
    for threads, streams in ((True, 1), (1, True), (1.0, 1), (257, 1), (1, 0)):
        with pytest.raises(SpecError, match="must be a number from 1 to 256, got"):
            OrtRetinaFace(path, threads=threads, streams=streams)  # type: ignore[arg-type]


def test_onnx_runtime_is_told_its_threads(tmp_path: Path) -> None:
    path = _tiny(tmp_path / "m.onnx")
    for options, expected in (({}, 0), ({"threads": 3}, 3), ({"threads": 6, "streams": 2}, 3)):
        with OrtRetinaFace(path, **options) as detector:  # type: ignore[arg-type]
            session = detector._session
            assert session.get_session_options().intra_op_num_threads == expected
            assert session.get_session_options().log_severity_level == 4
            assert session.get_providers() == ["CPUExecutionProvider"]
            assert detector.environment()["threads"] == (expected or "every core")
    for backend in (OrtRetinaFace, OpenVinoRetinaFace):
        assert backend.max_batch == 1


def test_openvino_is_told_its_threads_and_streams(static_onnx: Path) -> None:
    for options, threads, streams in (({}, cores(), 1), ({"threads": 1}, 1, 1), ({"threads": 4, "streams": 2}, 4, 2)):
        with OpenVinoRetinaFace(static_onnx, **options) as detector:
            compiled = detector._compiled.get((320, 320))
            assert (detector._options["INFERENCE_NUM_THREADS"], detector._options["NUM_STREAMS"]) == (threads, streams)
            if threads <= cores():  # of more, OpenVINO takes those that there are
                assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
                assert compiled.get_property("NUM_STREAMS") == streams
            assert compiled.get_property("PERFORMANCE_HINT") == "LATENCY"
            assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
            assert detector._options["CPU_RUNTIME_CACHE_CAPACITY"] == 64
            found = detector.environment()
            assert (found["threads"], found["streams"], found["precision"]) == (threads, streams, "fp32")


def test_openvino_compiles_when_it_is_made_and_one_model_for_frames_of_many_sizes(dynamic_onnx: Path) -> None:
    assert COMPILED_SIZES == 4
    for size, at_once, later in ((None, 1, 1), ((64, 96), 1, 1), (96, 1, 1)):
        with OpenVinoRetinaFace(dynamic_onnx, size_hw=size, threads=1) as detector:
            assert detector._compiled.made == at_once
            for frame in (np.zeros((64, 96, 3), np.uint8), np.zeros((96, 40, 3), np.uint8)):
                detector.detect(frame)
            assert detector._compiled.made == later
            assert detector._compiled.capacity == COMPILED_SIZES
        assert len(detector._compiled) == 0


def test_the_frames_of_an_openvino_batch_run_one_by_one(dynamic_onnx: Path) -> None:
    with OpenVinoRetinaFace(dynamic_onnx, size_hw=(32, 32), threads=1) as detector:
        assert detector._batch_limit((32, 32)) == 1
        with pytest.raises(FrameError, match="is too large"):
            detector._batch_limit((8192, 4096))


@pytest.mark.parametrize("size", [(32, 64), None])
def test_a_request_is_used_again_unless_its_call_failed(size: tuple[int, int] | None, dynamic_onnx: Path) -> None:
    with OpenVinoRetinaFace(dynamic_onnx, size_hw=size, threads=1) as detector:

        def request() -> Any:
            """Detect; return the one request of the one lane."""
            assert len(detector.detect(np.zeros((32, 64, 3), np.uint8))) == 0
            (lane,) = detector._idle
            (request,) = lane._requests.values()  # type: ignore[attr-defined]
            return request

        first = request()
        assert request() is first

        class Interrupted(StageTimer):
            def add(self, stage: str, ms: float) -> None:
                if stage == "network":
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            detector.detect(np.zeros((32, 64, 3), np.uint8), Interrupted())
        assert detector._idle == []
        assert request() is not first


def test_precisions_that_cannot_be_had(static_onnx: Path) -> None:
    with pytest.raises(SpecError, match="precision 'fp8' is not one of fp32, bf16"):
        OpenVinoRetinaFace(static_onnx, precision="fp8")
    with pytest.raises(SpecError, match="ONNX Runtime computes in fp32 on a CPU: bf16 needs backend openvino"):
        load_detector(static_onnx, backend="onnxruntime", precision="bf16")
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with load_detector(static_onnx, precision="bf16") as detector:
            assert (detector.backend, detector.environment()["precision"]) == ("openvino", "bf16")
    else:
        with pytest.raises(SpecError, match="this CPU does not compute in bf16"):
            load_detector(static_onnx, precision="bf16")


def test_requests_go_when_the_detector_gives_up_their_model(dynamic_onnx: Path) -> None:
    with OpenVinoRetinaFace(dynamic_onnx, size_hw=32, threads=1) as detector:
        for width in range(32, 32 * (COMPILED_SIZES + 3), 32):
            detector.size_hw = 32, width
            detector.detect(np.zeros((32, 64, 3), np.uint8))
        (lane,) = detector._idle
        gc.collect()
        assert len(lane._requests) == len(detector._compiled) == COMPILED_SIZES  # type: ignore[attr-defined]


def test_half_a_model_is_for_openvino_at_any_size(dynamic_onnx: Path, tmp_path: Path) -> None:
    """What computes in fp16 gains more than the new sizes of its frames cost."""

    def half(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.output[0] == "head_32")
        bias = next(item for item in model.graph.initializer if item.name == node.input[2])
        values = onnx.numpy_helper.to_array(bias)
        bias.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), "half"))
        model.graph.node.insert(0, onnx.helper.make_node("Cast", ["half"], [node.input[2]], to=F32))

    assert best_backend(OnnxModel(dynamic_onnx), None) == "onnxruntime"
    assert best_backend(OnnxModel(_changed(dynamic_onnx, tmp_path / "half.onnx", half)), None) == "openvino"


def test_without_head_maps_or_a_compiler_a_portable_graph_is_for_onnx_runtime(
    static_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert best_backend(OnnxModel(_tiny(tmp_path / "m.onnx")), 320) == "onnxruntime"
    assert best_backend(OnnxModel(static_onnx), None) == "openvino"

    def none() -> Any:
        raise BuildError("there is no C++ compiler")

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "library", none)
        with pytest.warns(UserWarning, match=r"ONNX Runtime, which takes .* times as .*: there is no C\+\+"):
            assert best_backend(OnnxModel(static_onnx), None) == "onnxruntime"
        with pytest.raises(BuildError):  # said now, and not with the first frame
            OpenVinoRetinaFace(static_onnx)
    for hidden in ("openvino", "onnx"):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_installed", lambda name, hidden=hidden: name != hidden)
            assert best_backend(OnnxModel(static_onnx), None) == "onnxruntime"
    assert cpu._installed("numpy")
    assert not cpu._installed("no_such_package")


def test_a_plugin_form_needs_its_kernels_at_once_and_its_weights_inside(
    plugin_form: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "m.onnx"
    onnx.save(onnx.load(plugin_form), outside, save_as_external_data=True, location="w.bin", size_threshold=1024)
    with pytest.raises(ModelFileError, match=r"m\.onnx: a plugin form with weights in other files cannot be run"):
        OrtRetinaFace(outside)

    def none() -> Any:
        raise BuildError("there is no C++ compiler")

    monkeypatch.setattr(cpu, "library", none)
    with pytest.raises(BuildError):
        OrtRetinaFace(plugin_form)


def test_the_files_of_a_model(static_onnx: Path, tmp_path: Path, astronaut: Frame) -> None:
    """Through a link, too: the weights lie beside the file itself."""
    (tmp_path / "there").mkdir()
    place = tmp_path / "there" / "m.onnx"
    onnx.save(onnx.load(static_onnx), place, save_as_external_data=True, location="w.bin", size_threshold=1024)
    (tmp_path / "link.onnx").symlink_to(place)
    for path in (place, tmp_path / "link.onnx"):
        with OrtRetinaFace(path, threads=1) as detector:
            assert [file.resolve() for file in detector.files][:1] == [place]
            assert set(detector.files) == {path, tmp_path / "there" / "w.bin"}
            assert len(detector.detect(astronaut)) == 1
    for kind in (OrtRetinaFace, OpenVinoRetinaFace):
        with kind(static_onnx, threads=1) as detector:
            assert detector.files == [static_onnx]


def test_head_maps_at_odds_with_the_spec_end_in_one_line() -> None:
    heads = [np.zeros((1, 32, side, side), np.float32) for side in (8, 4, 2)]
    for found, expected in zip(
        cpu._decode(heads, (64, 64), ModelSpec()), decode_nms(heads, (64, 64), ModelSpec()).values(), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ModelFileError, match="the head maps are at odds with the model's spec: heads of shapes"):
        cpu._decode(heads, (64, 96), ModelSpec())
    assert reason(RuntimeError("two\n  lines")) == "two lines"
    assert len(reason(RuntimeError("x" * 1000))) == 200


@both
def test_the_mean_colour_of_the_spec_is_the_padding(kind: Kind, plugin_form: Path, tmp_path: Path) -> None:
    """A frame that is its own padding gives what the whole input of that colour gives."""

    def other(model: onnx.ModelProto) -> None:
        spec = ModelSpec(preprocess=PreprocessSpec((10, 200, 90)))
        onnx.helper.set_model_props(model, {SPEC_KEY: spec.to_json()})

    path = _changed(plugin_form, tmp_path / "m.onnx", other)
    seen: list[Frame] = []
    real = Letterbox.apply

    def watched(self: Letterbox, frame: Frame, pad: tuple[int, int, int], out: Frame | None = None) -> Frame:
        seen.append(real(self, frame, pad, out).copy())
        return real(self, frame, pad, out)

    with pytest.MonkeyPatch.context() as patch, kind(path, size_hw=(64, 96), threads=1) as detector:
        patch.setattr(Letterbox, "apply", watched)
        detector.detect(np.zeros((32, 32, 3), np.uint8))
    assert (seen[0][:64, :64] == 0).all()
    assert (seen[0][:, 64:] == (10, 200, 90)).all()
