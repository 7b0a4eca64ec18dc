"""The demo: its pictures and its video by themselves, and all of it once, small."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from export import demo as module
from export.demo import contact_sheet, demo, demo_engine, main, render_video
from facespec.detections import Detections
from facespec.draw import draw_detections
from facespec.errors import DataError, MissingToolError, RetinaFaceError
from facespec.images import read_image
from facespec.letterbox import Frame
from facespec.samples import sample_photographs
from trt_runtime.gpu.flavor import RTX
from trt_runtime.media.files import VideoFile


def _face(x: float, width: int = 280) -> Detections:
    points = np.array([[[x + 20, 30], [x + 40, 30], [x + 30, 42], [x + 22, 52], [x + 38, 52]]], np.float32)
    box = np.array([[x + 10, 10, x + 50, 60]], np.float32)
    return Detections(box, np.array([0.9], np.float32), points, (140, width))


def test_a_video_pans_over_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From all of one to a part of it, then the next; a photograph always fills the frame."""
    monkeypatch.setattr(module, "SECONDS_PER_PHOTOGRAPH", 1)
    board = (np.indices((300, 900)).sum(axis=0) // 60 % 2 * 120 + 60).astype(np.uint8)
    wide = np.repeat(board[..., None], 3, axis=2)
    tall = np.full((900, 300, 3), (200, 50, 50), np.uint8)
    render_video([wide, tall], tmp_path / "v.mp4")
    with VideoFile(tmp_path / "v.mp4") as video:
        frames = [np.asarray(item.image) for item in video]
        assert video.rate == pytest.approx(25)
    assert len(frames) == 50
    assert {frame.shape for frame in frames} == {(480, 640, 3)}
    assert np.abs(frames[25].astype(int) - (200, 50, 50)).max() < 12
    assert np.abs(frames[49].astype(int) - (200, 50, 50)).max() < 12
    # as high as the frame, at first 40 % from the top: clipped to the edge; 640 of its 1440 columns, the middle ones
    expected = cv2.resize(wide, (1440, 480), interpolation=cv2.INTER_LINEAR)[:, 400:1040]
    assert np.abs(frames[0].astype(int) - expected).mean() < 8
    # in the end 1.6 times as large, around 42 % of the width and 35 % of the height
    last = cv2.resize(wide, (2304, 768), interpolation=cv2.INTER_LINEAR)
    left, top = round(2304 * 0.42 - 320), round(768 * 0.35 - 240)
    assert np.abs(frames[24].astype(int) - last[top : top + 480, left : left + 640]).mean() < 8


def test_a_sheet_of_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    one, two = (rng.integers(0, 256, (140, width, 3), np.uint8) for width in (280, 70))
    nobody = _face(0, 70)[np.zeros(1, bool)]
    sheet = contact_sheet([one, two], [_face(100), nobody])
    assert sheet.shape == (560 + 8 + 112, 1120 + 8 + 280, 3)
    expected = cv2.resize(draw_detections(one, _face(100)), (1120, 560), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(sheet[:560, :1120], expected)
    np.testing.assert_array_equal(sheet[:560, 1128:], cv2.resize(two, (280, 560), interpolation=cv2.INTER_AREA))
    (crop,) = _face(100).aligned_crops(one)
    np.testing.assert_array_equal(sheet[568:, :112], crop)
    assert (sheet[568:, 112:] == 255).all()
    assert (sheet[560:568] == 255).all()
    assert (sheet[:, 1120:1128] == 255).all()
    # no more crops than fit
    face = _face(9)
    many = Detections(*(np.repeat(part, 3, axis=0) for part in (face.boxes, face.scores, face.landmarks)), (140, 70))
    sheet = contact_sheet([two], [many])
    assert sheet.shape == (680, 280, 3)
    np.testing.assert_array_equal(sheet[568:, :112], sheet[568:, 120:232])
    assert (sheet[568:, 232:] == 255).all()


@pytest.mark.slow
@pytest.mark.skipif(not RTX.installed(), reason="TensorRT-RTX is not installed (Linux on x86_64 only)")
def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "SECONDS_PER_PHOTOGRAPH", 1)
    monkeypatch.setattr(module, "VIDEO_RATE", 3)
    monkeypatch.setattr(module, "NETWORK_HW", (320, 320))
    out = tmp_path / "deep" / "demo"
    assert main(["--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("retinaface.onnx", "faces.png", "sample.mp4", "faces.mp4", "faces.json"),
        *("retinaface.engine", "retinaface.engine.json", "retinaface.plugin.onnx"),
    }
    lines = [json.loads(line) for line in (out / "faces.json").read_text().splitlines()]
    photographs = list(sample_photographs())
    assert [line["source"] for line in lines[:2]] == [path.name for path in photographs]
    assert [len(line["faces"]) for line in lines[:2]] == [1, 1]
    assert len(lines) >= 2 + 6
    height, width = read_image(photographs[0]).shape[:2]
    assert (lines[0]["height"], lines[0]["width"]) == (height, width)
    assert read_image(out / "faces.png").shape[0] == 680
    printed = capsys.readouterr().out
    for words in ("1. exported mobilenet0.25", "2. photographs", "3. video", "4. TensorRT engine"):
        assert words in printed
    assert "with the CPU as its device: 2 faces" in printed
    assert f"python -m export.inspect {out / 'retinaface.engine'}" in printed
    assert f'TRTRetinaFace("{out / "retinaface.engine"}")' in printed


def test_a_face_too_few_is_an_error(
    static_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures are there to look at, and nothing after them was done."""
    monkeypatch.setattr(module, "NETWORK_HW", (64, 64))
    samples = sample_photographs()
    last = list(samples)[-1]
    monkeypatch.setattr(module, "sample_photographs", lambda: {**samples, last: 2})
    monkeypatch.setattr(module, "load_detector", lambda path: _detector(static_onnx))
    with pytest.raises(RetinaFaceError, match=rf"{last.name} shows 2 face\(s\), found 1: see .*faces\.png"):
        demo(tmp_path)
    assert "2. photographs" in capsys.readouterr().out
    assert (tmp_path / "faces.png").is_file()
    assert not (tmp_path / "sample.mp4").exists()
    monkeypatch.setattr(module, "sample_photographs", dict)
    with pytest.raises(DataError, match="no sample photographs"):
        demo(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _detector(path: Path) -> object:
    from trt_runtime import load_detector

    return load_detector(path)


def test_without_tensorrt_the_demo_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], astronaut: Frame
) -> None:
    def missing(options: object) -> None:
        raise MissingToolError("no compiler")

    monkeypatch.setattr(module, "build_engine", missing)
    assert demo_engine(tmp_path, [astronaut]) == ""
    assert capsys.readouterr().out == "   not built: no compiler\n"

    def fails(options: object) -> None:
        raise RetinaFaceError("something else")

    monkeypatch.setattr(module, "build_engine", fails)
    with pytest.raises(RetinaFaceError, match="something else"):
        demo_engine(tmp_path, [astronaut])
