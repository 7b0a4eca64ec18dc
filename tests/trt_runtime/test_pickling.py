"""A detector is pickled as its path and options: other processes open it anew."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from facespec.errors import ClosedError, ModelFileError, SpecError
from facespec.letterbox import Frame
from tests.faces import assert_identical
from tests.trt_runtime.handmade import HandmadeDetector
from trt_runtime import OpenVinoRetinaFace, OrtRetinaFace, RetinaFaceDetector, TRTRetinaFace
from trt_runtime.gpu.simulated import HostDevice


def _detectors(plugin_form: Path, dynamic_onnx: Path) -> list[RetinaFaceDetector]:
    return [
        OrtRetinaFace(dynamic_onnx, size_hw=320, threads=1, score_threshold=0.3),
        OpenVinoRetinaFace(dynamic_onnx, size_hw=(320, 320), threads=1, streams=2),
        TRTRetinaFace(plugin_form, device="cpu", graphs=False),
    ]


def test_what_is_unpickled_finds_the_same_with_the_same_options(
    plugin_form: Path, dynamic_onnx: Path, astronaut: Frame
) -> None:
    for detector in _detectors(plugin_form, dynamic_onnx):
        detector.score_threshold = 0.6  # as it is now, not as it was opened
        detector.min_face, detector.roi = 20, (10, 20, 400, 380)
        with detector, pickle.loads(pickle.dumps(detector)) as other:
            assert type(other) is type(detector)
            assert other.environment() == detector.environment()
            assert (other.score_threshold, other.size_hw) == (0.6, detector.size_hw)
            assert (other.min_face, other.roi, other.tile) == (20, (10, 20, 400, 380), False)
            assert_identical(other.detect(astronaut), detector.detect(astronaut))


def test_another_process_opens_it_wherever_it_is(
    dynamic_onnx: Path, astronaut: Frame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method of the detector is sent to a process that is spawned, as workers of a DataLoader may be."""
    monkeypatch.chdir(dynamic_onnx.parent)
    with OrtRetinaFace(dynamic_onnx.name, size_hw=320, threads=1) as detector:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # ends when a call cannot be read
            found = pool.submit(detector.detect, astronaut).result()
        assert_identical(found, detector.detect(astronaut))


def test_what_cannot_be_pickled_names_the_rule(plugin_form: Path, dynamic_onnx: Path, tmp_path: Path) -> None:
    rule = "is pickled as the path of its model and its options, and this one was made of an object"
    device = HostDevice()
    for detector in (TRTRetinaFace(plugin_form, device=device), HandmadeDetector()):
        with detector, pytest.raises(SpecError, match=rule):
            pickle.dumps(detector)
    with OrtRetinaFace(dynamic_onnx, size_hw=320) as detector:
        pass
    with pytest.raises(ClosedError):
        pickle.dumps(detector)


def test_a_model_that_has_gone_is_missed_by_its_name(dynamic_onnx: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m.onnx"
    copy.write_bytes(dynamic_onnx.read_bytes())
    with OrtRetinaFace(copy, size_hw=320) as detector:
        pickled = pickle.dumps(detector)
    copy.unlink()
    with pytest.raises(ModelFileError, match=r"m\.onnx"):
        pickle.loads(pickled)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_and_tiles_are_kept(precision: str, dynamic_onnx: Path) -> None:
    try:
        detector = OpenVinoRetinaFace(dynamic_onnx, size_hw=(320, 320), threads=1, precision=precision)
    except SpecError as error:
        pytest.skip(str(error))
    detector.tile = True
    with detector, pickle.loads(pickle.dumps(detector)) as other:
        assert (other.environment()["precision"], other.tile) == (precision, True)
