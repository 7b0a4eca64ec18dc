from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from facespec.errors import DataError
from facespec.images import write_image
from facespec.letterbox import Frame
from trainer.average_precision import LEVELS
from trainer.evaluate import EvaluateOptions, evaluate, parse_arguments

PUBLISHED_DEV_AP = {"easy": 92.36, "medium": 89.47, "hard": 80.44}
"""The published mobilenet0.25 on the 323 dev images: original scale, score 0.02, NMS 0.4, top 5000, keep 750."""


def _cell(items: list[object]) -> np.ndarray:
    """A MATLAB cell column of any objects."""
    cell = np.empty((len(items), 1), object)
    for index, item in enumerate(items):
        cell[index, 0] = item
    return cell


@pytest.fixture
def tiny_widerface(tmp_path: Path, photographs: dict[str, Frame]) -> Path:
    """A data set of WIDER FACE's layout: two photographs with one face each, and a third image that is not there."""
    from scipy.io import savemat

    from trainer import load_model
    from trainer.detector import TorchRetinaFace

    detector = TorchRetinaFace(load_model())
    boxes = []
    for name, image in photographs.items():
        write_image(tmp_path / "val" / "images" / "0--Event" / f"{name}.jpg", image)
        x1, y1, x2, y2 = detector.detect(image).boxes[0]
        boxes.append(np.array([[x1, y1, x2 - x1, y2 - y1]]))
    names, boxes = [*photographs, "absent"], [*boxes, np.array([[1.0, 2, 30, 40]])]
    (tmp_path / "gt").mkdir()
    savemat(
        tmp_path / "gt" / "wider_face_val.mat",
        {
            "event_list": _cell(["0--Event"]),
            "file_list": _cell([_cell(list(names))]),
            "face_bbx_list": _cell([_cell(list(boxes))]),
        },
    )
    for level in LEVELS:
        listed = [
            np.array([[1]], np.uint16) if level != "easy" or name == names[0] else np.zeros((0, 1)) for name in names
        ]
        savemat(tmp_path / "gt" / f"wider_{level}_val.mat", {"gt_list": _cell([_cell(listed)])})
    return tmp_path


def _options(root: Path, **changes: object) -> EvaluateOptions:
    return EvaluateOptions(**{"ground_truth": root / "gt", "data": root, **changes})  # type: ignore[arg-type]


def test_detector_to_files_and_back(tiny_widerface: Path, dynamic_onnx: Path, static_onnx: Path) -> None:
    """Every way in gives the same figures, here those of a perfect detector, and counts what was left out."""
    out = tiny_widerface / "out"
    result = evaluate(
        _options(
            tiny_widerface, detector="mobilenet0.25", json_file=out / "ap.json", plot=out / "ap.png",
            save_predictions=out / "txt",
        )
    )  # fmt: skip
    assert (result["images"], result["images_missing"]) == (2, 1)
    assert result["faces"] == {"easy": 1, "medium": 2, "hard": 2}
    assert [result[level] for level in LEVELS] == pytest.approx([100, 100, 100])
    assert json.loads((out / "ap.json").read_text()) == result
    assert (out / "ap.png").read_bytes().startswith(b"\x89PNG")
    again = evaluate(_options(tiny_widerface, predictions=out / "txt", subset=True))
    for key in (*LEVELS, "images", "images_missing", "faces", "predictions"):
        assert again[key] == result[key]
    for detector, protocol in ((dynamic_onnx, "original"), (static_onnx, "letterbox")):
        other = evaluate(_options(tiny_widerface, detector=str(detector), protocol=protocol))
        assert other["size_hw"] == (None if protocol == "original" else [320, 320])
        assert [other[level] for level in LEVELS] == pytest.approx([100, 100, 100])


def test_wrong_use_is_named(tiny_widerface: Path, static_onnx: Path, refused: Callable[..., str]) -> None:
    root = tiny_widerface
    with pytest.raises(DataError, match="takes 320x320 only"):
        evaluate(_options(root, detector=str(static_onnx)))
    with pytest.raises(DataError, match="none of the 3 WIDER FACE images"):
        evaluate(_options(root, detector="mobilenet0.25", data=root / "gt"))
    assert "--data" in refused("trainer.evaluate", "--detector", "mobilenet0.25")
    assert "--ground-truth" in refused("trainer.evaluate", "--predictions", root)
    assert "required" in refused("trainer.evaluate")
    assert "letterbox" in refused("trainer.evaluate", "--detector", "x", "--data", root, "--size", "640x640")
    assert "no such weights" in refused("trainer.evaluate", "--detector", "x.pth", "--data", root)
    assert "missing" in refused("trainer.evaluate", "--predictions", root, "--ground-truth", root / "val")
    assert "no such folder" in refused("trainer.evaluate", "--predictions", "none", "--data", root)
    assert "no predictions" in refused("trainer.evaluate", "--predictions", root / "gt", "--data", root)


GOOD = "{name}\n2\n1 2 30 40 0.9\n5 6 7 8 0.1 \n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "line 2 should hold the number of boxes"),
        ("name\n", "line 2 should hold the number of boxes"),
        ("name\n1\n", "announces 1 boxes, the file holds 0"),
        ("name\n3\n1 2 30 40 0.9\n5 6 7 8 0.1\n", "announces 3 boxes, the file holds 2"),
        ("name\n1\n1 2 30 40\n", r":3: expected 'x y w h score', found '1 2 30 40'"),
        ("name\n2\n1 2 30 40 0.9\n1 2 x 40 0.9\n", r":4: expected"),
        ("name\n1\n1 2 30 40 nan\n", "box 1 has a value that is not finite"),
        ("name\n1\n1 2 inf 40 0.5\n", "box 1 has a value that is not finite"),
        ("name\n1\n1 2 -3 40 0.5\n", "box 1 has a negative size"),
        ("name\n1\n\x00\x01\n", ":3: expected"),
    ],
)
def test_malformed_predictions_are_named_with_their_line(content: str, words: str, tiny_widerface: Path) -> None:
    folder = tiny_widerface / "txt" / "0--Event"
    folder.mkdir(parents=True)
    for name in ("astronaut", "grace_hopper", "absent"):
        (folder / f"{name}.txt").write_text(GOOD.format(name=name))
    assert evaluate(_options(tiny_widerface, predictions=folder.parent))["predictions"] == 6
    (folder / "grace_hopper.txt").write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        evaluate(_options(tiny_widerface, predictions=folder.parent))
    assert "grace_hopper.txt" in str(caught.value)


def test_missing_unsorted_and_unknown_files_are_counted(tiny_widerface: Path) -> None:
    folder = tiny_widerface / "txt" / "0--Event"
    folder.mkdir(parents=True)
    (folder / "astronaut.txt").write_text("astronaut\r\n2\r\n5 6 7 8 0.1\r\n1 2 30 40 0.9\r\n")
    (folder / "stranger.txt").write_text("stranger\n0\n")
    with pytest.raises(DataError, match=r"2 of 3 images have no prediction file.*--subset"):
        evaluate(_options(tiny_widerface, predictions=folder.parent))
    result = evaluate(_options(tiny_widerface, predictions=folder.parent, subset=True))
    assert (result["images"], result["images_missing"]) == (1, 2)
    assert (result["files_unsorted"], result["files_without_image"]) == (1, 1)
    (folder / "astronaut.txt").unlink()
    with pytest.raises(DataError, match="none of its 1 files"):
        evaluate(_options(tiny_widerface, predictions=folder.parent, subset=True))


def test_defaults_are_the_original_protocol() -> None:
    options = parse_arguments(["--detector", "m", "--data", "d"])
    assert (options.protocol, options.ground_truth) == ("original", Path("d/gt"))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_dev_set_gives_the_published_ap(backend: str, widerface: Path, dynamic_onnx: Path) -> None:
    detector = "mobilenet0.25" if backend == "torch" else str(dynamic_onnx)
    result = evaluate(_options(widerface, detector=detector))
    assert result["images"] == 323
    assert {level: result[level] for level in LEVELS} == pytest.approx(PUBLISHED_DEV_AP, abs=0.10)


@pytest.mark.parametrize("name", ["../escaped", "/absolute", "..", "a\\b", ""])
@pytest.mark.parametrize("where", ["event_list", "file_list"])
def test_names_in_the_ground_truth_do_not_lead_elsewhere(name: str, where: str, tiny_widerface: Path) -> None:
    from scipy.io import loadmat, savemat

    path = tiny_widerface / "gt" / "wider_face_val.mat"
    content = {key: value for key, value in loadmat(path).items() if not key.startswith("__")}
    cell = content["event_list"] if where == "event_list" else content["file_list"][0, 0]
    cell[0, 0] = np.array([name])
    savemat(path, content)
    with pytest.raises(DataError, match=r"is not a file name|not WIDER FACE"):
        evaluate(_options(tiny_widerface, detector="mobilenet0.25", save_predictions=tiny_widerface / "out"))
    assert not (tiny_widerface / "out").exists()


@pytest.mark.parametrize(("index", "box"), [(0, 1.0), (2, 1.0), (1, np.nan)])
def test_impossible_ground_truth_is_refused(index: int, box: float, tiny_widerface: Path) -> None:
    from scipy.io import loadmat, savemat

    for name in ("face", "hard"):
        path = tiny_widerface / "gt" / f"wider_{name}_val.mat"
        content = {key: value for key, value in loadmat(path).items() if not key.startswith("__")}
        if name == "hard":
            content["gt_list"][0, 0][0, 0] = np.array([[index]])
        else:
            content["face_bbx_list"][0, 0][0, 0] = content["face_bbx_list"][0, 0][0, 0] * box
        savemat(path, content)
    with pytest.raises(DataError, match=r"counts faces it does not have|not finite"):
        evaluate(_options(tiny_widerface, detector="mobilenet0.25"))


def test_outputs_are_checked_before_the_work(tiny_widerface: Path, refused: Callable[..., str]) -> None:
    common = ("trainer.evaluate", "--detector", "mobilenet0.25", "--data", tiny_widerface)
    truth = tiny_widerface / "gt" / "wider_hard_val.mat"
    assert "is a file that is read" in refused(*common, "--json", truth)
    assert "it is a folder" in refused(*common, "--json", tiny_widerface)
    assert "ends in .png" in refused(*common, "--plot", "curve.jpg")
    assert "--json /proc/x.json: cannot be written" in refused(*common, "--json", "/proc/x.json")
    assert "--save-predictions" in refused(*common, "--save-predictions", "/proc/x")
    assert "go with --detector" in refused("trainer.evaluate", "--predictions", "x", "--data", "y", "--size", "32x32")
