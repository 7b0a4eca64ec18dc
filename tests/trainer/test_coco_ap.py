"""COCO's average precision: by hand, and of a detector on labels of one's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from facespec.detections import Detections
from facespec.images import write_image
from facespec.letterbox import Frame
from tests.trainer.conftest import published
from trainer.coco_ap import Truth, coco_average_precision
from trainer.data import open_dataset
from trainer.evaluate import main, parse_arguments
from trainer.model import TorchRetinaFace

Boxes = list[list[float]]


def _found(boxes: Boxes, scores: list[float]) -> Detections:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return Detections(array, np.array(scores, np.float32), np.zeros((len(array), 5, 2), np.float32), (480, 640))


def _truth(boxes: Boxes, ignored: Boxes | None = None) -> Truth:
    return Truth(*(np.array(part, np.float32).reshape(-1, 4) for part in (boxes, ignored or [])))


def _ap(found: list[Detections], truth: list[Truth]) -> tuple[float, float]:
    curves = coco_average_precision(found, truth)
    return curves["ap50"].ap, curves["ap50_95"].ap


A, B = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]


def test_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    both = _truth([A, B])
    assert _ap([_found([A, B], [0.9, 0.8])], [both]) == (1, 1)
    # of ten thresholds, 0.5 to 0.95, an IoU of 0.72 passes five: 0.5, 0.55, 0.6, 0.65, 0.7
    assert _ap([_found([[0, 0, 10, 7.2], B], [0.9, 0.8])], [both]) == pytest.approx((1, 0.5 + 0.5 * 51 / 101 / 2))
    # half of the faces: precision 1 at the recalls 0, 0.01, ... 0.5
    assert _ap([_found([A], [0.9])], [both]) == pytest.approx((51 / 101, 51 / 101))
    # a false one before: precision 1/2 at each recall, 2/3 with the second face
    assert _ap([_found([[200, 0, 210, 10], A, B], [0.95, 0.9, 0.8])], [both]) == pytest.approx((2 / 3, 2 / 3))
    # the order goes over all images
    assert _ap([_found([[200, 0, 210, 10]], [0.95]), _found([A], [0.9])], [_truth([]), _truth([A])])[0] == 0.5
    assert np.isnan(_ap([_found([A], [0.9])], [_truth([])])[0])
    assert _ap([_found([], [])], [both]) == (0, 0)
    assert capsys.readouterr().out == ""


def test_whether_crowds_are_found_does_not_count() -> None:
    found = _found([A, [51, 51, 53, 53], [55, 55, 57, 57]], [0.7, 0.9, 0.8])
    assert _ap([found], [_truth([A])]) == pytest.approx((1 / 3, 1 / 3))
    assert _ap([found], [_truth([A], [B])]) == pytest.approx((1, 1))


def test_all_faces_of_a_crowd_count() -> None:
    boxes = [[20.0 * (index % 30), 20.0 * (index // 30), 20.0 * (index % 30) + 15, 20.0 * (index // 30) + 15]
             for index in range(250)]  # fmt: skip
    assert _ap([_found(boxes, [0.9] * 250)], [_truth(boxes)]) == (1, 1)


@pytest.fixture
def own(tmp_path: Path, photographs: dict[str, Frame]) -> Path:
    """A COCO file over the sample photographs: two labelled rightly, one with a box elsewhere."""
    detector = TorchRetinaFace(published())
    images, annotations = [], []
    for number, (name, frame) in enumerate(sorted(photographs.items())):
        write_image(tmp_path / "pictures" / f"{name}.png", frame)
        images.append({"id": number, "file_name": f"{name}.png"})
        x1, y1, x2, y2 = detector.detect(frame).boxes[0].tolist() if number else (0.0, 0.0, 9.0, 9.0)
        annotations.append({"image_id": number, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    annotations.append({"image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 1})
    path = tmp_path / "own.json"
    categories = [{"id": 1, "name": "head"}, {"id": 2, "name": "face"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_a_detector_is_measured_on_own_labels(own: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dataset = open_dataset(str(own), images=own.parent / "pictures")
    line = ["--weights", "mobilenet0.25", "--data", str(own), "--images", str(own.parent / "pictures")]
    assert main([*line, "--json", str(tmp_path / "ap.json"), "--plot", str(tmp_path / "ap.png")]) == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "ap.json").read_text())
    detector = TorchRetinaFace(published(), score_threshold=published().spec.decode.score_threshold)
    found = [detector.detect(sample.load()[0]) for sample in dataset.samples]
    curves = coco_average_precision(found, [Truth.of(sample) for sample in dataset.samples])
    assert result["ap50"] == pytest.approx(100 * curves["ap50"].ap)
    assert result["ap50_95"] == pytest.approx(100 * curves["ap50_95"].ap)
    assert 0 < result["ap50_95"] <= result["ap50"] < 100
    assert (result["images"], result["faces"], result["faces_ignored"]) == (len(found), len(found), 1)
    assert (result["detector"], result["protocol"], result["size_hw"]) == ("mobilenet0.25", "original", None)
    assert f"0.5       {result['ap50']:.2f}" in said
    assert f"0.5:0.95  {result['ap50_95']:.2f}" in said
    assert "note: faces are the annotations of 'head'" in said
    assert (tmp_path / "ap.png").stat().st_size > 1000


def test_an_exported_model_is_measured_without_torch(own: Path, static_onnx: Path) -> None:
    code = """import sys
sys.modules["torch"] = None
from trainer.evaluate import main
sys.exit(main(sys.argv[1:]))
"""
    options = ["--data", str(own), "--images", str(own.parent / "pictures"), "--protocol", "letterbox"]
    line = [sys.executable, "-c", code, "--model", str(static_onnx), *options]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^0\.5 +\d", done.stdout, re.MULTILINE)


def test_what_cannot_be_measured_says_what_can(own: Path, tmp_path: Path, refused_here: Callable[..., str]) -> None:
    line = ["--weights", "mobilenet0.25", "--data", own]
    assert "--images FOLDER names another" in refused_here(main, *line)
    assert "no annotation is of the category 'dog'" in refused_here(main, *line, "--category", "dog")
    assert "--data is not its folder" in refused_here(main, *line, "--save-predictions", tmp_path / "p")
    plain = refused_here(main, "--weights", "mobilenet0.25", "--data", own.parent / "pictures")
    assert "Without labels" not in refused_here(main, *line)
    (tmp_path / "instances_train.json").write_text("{}")
    assert "Without labels" not in refused_here(main, "--weights", "mobilenet0.25", "--data", tmp_path)
    assert plain.endswith(f"export.verify tells: --reference A --candidate B --data {own.parent / 'pictures'}")
    options = parse_arguments(["--model", "m.onnx", "--data", "d.json", "--images", "i", "--category", "c"])
    assert (options.images, options.category) == (Path("i"), "c")
