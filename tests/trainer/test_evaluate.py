from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from facespec.boxes import iou_matrix
from facespec.detections import Detections
from facespec.errors import DataError, RetinaFaceError, SpecError
from facespec.images import write_image
from facespec.kinds import sidecar_path
from facespec.letterbox import Frame
from tests.engines import write_engine
from trainer.average_precision import LEVELS, ImageTruth, load_ground_truth
from trainer.evaluate import (
    EvaluateOptions,
    Predictions,
    evaluate,
    main,
    open_detector,
    parse_arguments,
    predict,
    read_predictions,
    write_predictions,
)

PUBLISHED_DEV_AP = {"easy": 92.36, "medium": 89.47, "hard": 80.44}
"""The published mobilenet0.25 on the 323 dev images: original scale, score 0.02, NMS 0.4, top 5000, keep 750."""


def _cell(items: list[object]) -> np.ndarray:
    """A MATLAB cell column of any objects."""
    cell = np.empty((len(items), 1), object)
    for index, item in enumerate(items):
        cell[index, 0] = item
    return cell


@pytest.fixture(scope="module")
def face_boxes(photographs: dict[str, Frame]) -> list[np.ndarray]:
    """The face in each photograph, as (1, 4) x, y, width, height."""
    from trainer import load_model
    from trainer.model import TorchRetinaFace

    detector = TorchRetinaFace(load_model())
    boxes = []
    for image in photographs.values():
        x1, y1, x2, y2 = detector.detect(image).boxes[0]
        boxes.append(np.array([[x1, y1, x2 - x1, y2 - y1]]))
    return boxes


@pytest.fixture
def tiny_widerface(tmp_path: Path, photographs: dict[str, Frame], face_boxes: list[np.ndarray]) -> Path:
    """A data set of WIDER FACE's layout: two photographs with one face each, and a third image that is not there."""
    from scipy.io import savemat

    for name, image in photographs.items():
        write_image(tmp_path / "val" / "images" / "0--Event" / f"{name}.jpg", image)
    boxes = face_boxes
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
            tiny_widerface, detector="mobilenet0.25", plot=out / "ap.png", save_predictions=out / "txt",
        )
    )  # fmt: skip
    assert (result["images"], result["images_missing"]) == (2, 1)
    assert result["faces"] == {"easy": 1, "medium": 2, "hard": 2}
    assert [result[level] for level in LEVELS] == pytest.approx([100, 100, 100])
    assert json.loads(json.dumps(result)) == result
    assert (out / "ap.png").read_bytes().startswith(b"\x89PNG")
    again = evaluate(_options(tiny_widerface, predictions=out / "txt", subset=True))
    for key in (*LEVELS, "images", "images_missing", "faces", "predictions"):
        assert again[key] == result[key]
    for detector, protocol in ((dynamic_onnx, "original"), (static_onnx, "letterbox")):
        other = evaluate(_options(tiny_widerface, detector=str(detector), protocol=protocol))
        assert other["size_hw"] == (None if protocol == "original" else [320, 320])
        assert [other[level] for level in LEVELS] == pytest.approx([100, 100, 100])


def test_several_sizes_in_one_run(tiny_widerface: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--weights", "mobilenet0.25", "--data", str(tiny_widerface), "--size", "32,320,160x320"]
    assert main([*line, "--json", str(tmp_path / "ap.json")]) == 0
    found = json.loads((tmp_path / "ap.json").read_text())["sizes"]
    assert [part["size_hw"] for part in found] == [[32, 32], [320, 320], [160, 320]]
    assert found[0]["hard"] < 100  # nothing can be seen at that size
    for part, size_hw in zip(found, [(32, 32), (320, 320), (160, 320)], strict=True):
        alone = evaluate(_options(tiny_widerface, detector="mobilenet0.25", protocol="letterbox", size_hw=size_hw))
        assert [part[level] for level in LEVELS] == [alone[level] for level in LEVELS]
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line in ("32x32", "320x320", "160x320")] == ["32x32", "320x320", "160x320"]


def test_wrong_use_is_named(
    tiny_widerface: Path, static_onnx: Path, refused_here: Callable[..., str], refused: Callable[..., str]
) -> None:
    root = tiny_widerface
    with pytest.raises(DataError, match="takes 320x320 only"):
        evaluate(_options(root, detector=str(static_onnx)))
    with pytest.raises(DataError, match="none of the 3 WIDER FACE images"):
        evaluate(_options(root, detector="mobilenet0.25", data=root / "gt"))
    assert "--data" in refused_here(main, "--weights", "mobilenet0.25")
    assert "--data" in refused_here(main, "--predictions", root)
    assert "required" in refused("trainer.evaluate")
    line = ["--weights", "x", "--data", root, "--protocol", "original", "--size", "640x640"]
    assert "letterbox" in refused_here(main, *line)
    assert "no such weights" in refused_here(main, "--weights", "x.pth", "--data", root)
    assert "missing" in refused_here(main, "--predictions", root, "--ground-truth", root / "val")
    assert "no such folder" in refused_here(main, "--predictions", "none", "--data", root)
    assert "no predictions" in refused_here(main, "--predictions", root / "gt", "--data", root)


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
    options = parse_arguments(["--model", "m", "--data", "d"])
    assert (options.protocol, options.ground_truth) == ("original", Path("d/gt"))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dev_set_gives_the_published_ap(widerface: Path, dynamic_onnx: Path, tmp_path: Path) -> None:
    """With an exported model, all of it; with PyTorch, which takes five times as long, the same faces in a sample."""
    result = evaluate(_options(widerface, detector=str(dynamic_onnx), save_predictions=tmp_path / "onnx"))
    assert result["images"] == 323
    assert {level: result[level] for level in LEVELS} == pytest.approx(PUBLISHED_DEV_AP, abs=0.10)
    images = widerface / "val" / "images"
    for path in sorted(images.glob("*/*.jpg"))[::150]:
        link = tmp_path / "val" / "images" / path.relative_to(images)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    saved = tmp_path / "torch"
    truth = widerface / "gt"
    evaluate(_options(tmp_path, ground_truth=truth, detector="mobilenet0.25", save_predictions=saved))
    names = sorted(path.relative_to(saved) for path in saved.glob("*/*.txt"))
    assert len(names) == 3
    for name in names:
        found, expected = (np.loadtxt(folder / name, skiprows=2, ndmin=2) for folder in (tmp_path / "onnx", saved))
        boxes, certain = (
            rows[:, :4] + np.pad(rows[:, :2], ((0, 0), (2, 0))) for rows in (found, expected[expected[:, 4] > 0.6])
        )
        assert len(certain)
        # the exported model sees a few more rows and columns
        assert (iou_matrix(certain, boxes).max(axis=1) > 0.85).all()


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


def test_outputs_are_checked_before_the_work(tiny_widerface: Path, refused_here: Callable[..., str]) -> None:
    common = (main, "--weights", "mobilenet0.25", "--data", tiny_widerface)
    truth = tiny_widerface / "gt" / "wider_hard_val.mat"
    assert "is a file that is read" in refused_here(*common, "--json", truth)
    assert "it is a folder" in refused_here(*common, "--json", tiny_widerface)
    assert "ends in .png" in refused_here(*common, "--plot", "curve.jpg")
    assert "--json /proc/x.json: cannot be written" in refused_here(*common, "--json", "/proc/x.json")
    assert "--save-predictions" in refused_here(*common, "--save-predictions", "/proc/x")
    assert "go with --weights and --model" in refused_here(main, "--predictions", "x", "--data", "y", "--size", "32x32")


@pytest.fixture
def scored(tiny_widerface: Path) -> Path:
    """The folder of tiny_widerface with predictions of two images in txt/: three boxes, of which one is a face."""
    folder = tiny_widerface / "txt" / "0--Event"
    folder.mkdir(parents=True)
    truth = load_ground_truth(tiny_widerface / "gt")
    x, y, w, h = truth["0--Event", "astronaut"].boxes_xywh[0]
    (folder / "astronaut.txt").write_text(f"astronaut\n2\n{x} {y} {w} {h} 0.9\n400 400 30 40 0.8\n")
    (folder / "grace_hopper.txt").write_text("grace_hopper\n1\n1 1 30 40 0.7\n")
    return tiny_widerface


@pytest.mark.parametrize("words", ["import trainer", "import trainer.evaluate", "from trainer.evaluate import main"])
def test_the_package_has_it_as_a_function(words: str) -> None:
    """Whatever was imported before, and as the module that it also is."""
    code = f"""import sys
from pathlib import Path
{words}
import trainer
from trainer import evaluate
from facespec.errors import DataError
for function in (trainer.evaluate, evaluate, evaluate.evaluate):
    try:
        function(evaluate.EvaluateOptions(Path("nowhere")))
    except DataError:
        print("called")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["called"] * 3


def test_the_table_is_printed(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--predictions", str(scored / "txt"), "--data", str(scored), "--subset"]
    assert main(line) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split() for row in rows[:4]] == [
        ["AP", "%", "faces"],
        ["easy", "100.00", "1"],
        ["medium", "50.00", "2"],
        ["hard", "50.00", "2"],
    ]
    assert rows[4:] == ["2 images, 3 predictions; 1 images left out"]
    folder = scored / "txt" / "0--Event"
    (folder / "astronaut.txt").write_text("astronaut\n2\n400 400 30 40 0.8\n1 1 5 5 0.9\n")
    (folder / "stranger.txt").write_text("stranger\n0\n")
    main(line)
    assert capsys.readouterr().out.splitlines()[4] == (
        "2 images, 3 predictions; 1 images left out; 1 prediction files without an image in the ground truth, left "
        "out; 1 files were not sorted by score and have been sorted"
    )


def test_json_goes_to_stdout_or_into_a_file(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--predictions", str(scored / "txt"), "--ground-truth", str(scored / "gt"), "--subset"]
    assert main([*line, "--json", "-"]) == 0
    said = capsys.readouterr()
    printed = json.loads(said.out)
    assert said.err.split()[:2] == ["AP", "%"]
    main([*line, "--json", str(scored / "r" / "ap.json")])
    written = json.loads((scored / "r" / "ap.json").read_text())
    said = capsys.readouterr()
    assert said.out.split()[:2] == ["AP", "%"]
    assert said.out.endswith(f"wrote {scored / 'r' / 'ap.json'}\n")
    for result in (printed, written):
        assert result.pop("seconds_collecting") >= 0
        assert result.pop("seconds_scoring") >= 0
        assert [bool(result.pop(key)) for key in ("date", "command", "machine", "versions")] == [True] * 4
        assert result == {
            **{"easy": 100.0, "medium": 50.0, "hard": 50.0, "images": 2, "images_missing": 1, "predictions": 3},
            "faces": {"easy": 1, "medium": 2, "hard": 2},
            **{"files_without_image": 0, "files_unsorted": 0, "images_truncated": 0},
        }
    # a level of which no face counts has no number
    (scored / "txt" / "0--Event" / "astronaut.txt").unlink()
    main([*line, "--json", "-"])
    assert json.loads(capsys.readouterr().out)["easy"] is None
    main(line)
    assert capsys.readouterr().out.splitlines()[1].split() == ["easy", "none", "0"]


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".PNG"])
def test_curves_are_drawn(suffix: str, scored: Path) -> None:
    path = scored / "plots" / f"ap{suffix}"
    evaluate(_options(scored, predictions=scored / "txt", subset=True, plot=path))
    data = path.read_bytes()
    assert data.startswith({".svg": b"<?xml", ".pdf": b"%PDF", ".PNG": b"\x89PNG"}[suffix])
    if suffix == ".svg":
        text = data.decode()
        for words in ("easy: AP 100.00 %", "medium: AP 50.00 %", "hard: AP 50.00 %", "recall", "precision"):
            assert f"<!-- {words} -->" in text
        assert [text.index(f"<!-- {axis} -->") for axis in ("recall", "precision")] == sorted(
            text.index(f"<!-- {axis} -->") for axis in ("recall", "precision")
        )
        for colour in ("#2a9d4b", "#e09f1f", "#c8373a"):
            assert colour in text


def test_predictions_are_written_as_the_usual_tools_read_them(tmp_path: Path) -> None:
    rows = np.array([[1.0, 2, 30, 40, 0.123456789], [-5, 0, 7, 8, 1 / 3]])
    write_predictions(tmp_path, Predictions({("0--E", "a"): rows, ("1--F", "b"): np.zeros((0, 5))}))
    assert (tmp_path / "0--E" / "a.txt").read_text() == "a\n2\n1 2 30 40 0.123456789\n-5 0 7 8 0.333333333\n"
    assert (tmp_path / "1--F" / "b.txt").read_text() == "b\n0\n"
    truth = {("0--E", "a"): None, ("1--F", "b"): None}
    found = read_predictions(tmp_path, truth)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.by_image["0--E", "a"], rows, atol=1e-9)
    assert found.by_image["1--F", "b"].shape == (0, 5)
    assert (found.missing, found.unknown, found.unsorted) == (0, 0, 1)


class Fixed:
    """A detector that finds the same in every frame, and notes the frames."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def detect(self, frame: Frame) -> Detections:
        self.frames.append(frame)
        boxes = np.array([[10.9, 20.9, 40.2, 60.99], [-1.9, -0.5, 7.5, 8.5]], np.float32)
        points = np.zeros((2, 5, 2), np.float32)
        return Detections(boxes, np.array([0.9, 0.1], np.float32), points, frame.shape[:2], len(self.frames) == 1)

    def detect_batch(self, frames: object) -> list[Detections]:
        raise NotImplementedError


def test_corners_are_cut_to_whole_pixels_and_images_are_counted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / "e" / f"{name}.jpg", np.full((20, 30, 3), 9, np.uint8))
    truth = {("e", name): ImageTruth(np.zeros((0, 4)), {}) for name in "abc"}
    detector = Fixed()
    found, there = predict(detector, tmp_path, truth, progress=False)  # type: ignore[arg-type]
    assert list(there) == list(found.by_image) == [("e", "a"), ("e", "b")]
    assert [frame.shape for frame in detector.frames] == [(20, 30, 3)] * 2
    expected = [[10, 20, 30, 40, np.float32(0.9)], [-1, 0, 8, 8, np.float32(0.1)]]
    np.testing.assert_array_equal(found.by_image["e", "b"], expected)
    assert found.by_image["e", "b"].dtype == np.float64
    assert (found.missing, found.truncated) == (1, 1)


def test_detectors_report_down_to_the_floor_at_the_size_that_is_asked_for(
    static_onnx: Path, dynamic_onnx: Path
) -> None:
    for name, protocol, given, size in (
        ("mobilenet0.25", "original", None, None),
        ("mobilenet0.25", "letterbox", None, (640, 640)),
        ("mobilenet0.25", "letterbox", (96, 128), (96, 128)),
        (str(static_onnx), "letterbox", None, (320, 320)),
        (str(dynamic_onnx), "original", None, None),
        (str(dynamic_onnx), "letterbox", None, (640, 640)),
        (str(dynamic_onnx), "letterbox", (96, 128), (96, 128)),
    ):
        detector, size_hw = open_detector(name, protocol, given)
        assert size_hw == size
        assert detector.size_hw == size  # type: ignore[attr-defined]
        assert detector.score_threshold == 0.02  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"--backend is for exported models, mobilenet0\.25 is none"):
        open_detector("mobilenet0.25", "original", None, "openvino")
    for protocol in ("original", "letterbox"):
        with pytest.raises(RetinaFaceError, match="abacus"):
            open_detector(str(dynamic_onnx), protocol, None, "abacus")


@pytest.mark.parametrize("name", ["model", "model.bin", "model.trt", "model.pth"])
def test_exported_models_of_any_name(name: str, static_onnx: Path, tmp_path: Path) -> None:
    engine, place = write_engine(tmp_path), tmp_path / name
    engine.rename(place)
    sidecar_path(engine).rename(sidecar_path(place))
    with pytest.raises(SpecError, match="an engine runs in TensorRT only"):
        open_detector(str(place), "letterbox", None, "openvino")
    sidecar_path(place).unlink()
    if place.suffix in ("", ".bin"):
        place.write_bytes(static_onnx.read_bytes())
        detector, size_hw = open_detector(str(place), "letterbox", None)
        assert (size_hw, detector.score_threshold) == ((320, 320), 0.02)  # type: ignore[attr-defined]


def test_options_are_what_the_line_says() -> None:
    line = "--model m.onnx --data d --protocol letterbox --size 320x640 --backend openvino --json j --plot p.png"
    assert parse_arguments([*line.split(), "--save-predictions", "s", "--ground-truth", "g"]) == EvaluateOptions(
        ground_truth=Path("g"), detector="m.onnx", data=Path("d"), protocol="letterbox", size_hw=(320, 640),
        backend="openvino", json=Path("j"), plot=Path("p.png"), save_predictions=Path("s"),
    )  # fmt: skip
    assert parse_arguments(["--predictions", "p", "--data", "d", "--subset"]) == EvaluateOptions(
        ground_truth=Path("d/gt"), predictions=Path("p"), data=Path("d"), subset=True
    )
    assert parse_arguments(["--model", "m", "--data", "d", "--size", "320,64x96,640"]) == EvaluateOptions(
        ground_truth=Path("d/gt"), detector="m", data=Path("d"), protocol="letterbox", size_hw=(320, 320),
        more_sizes=((64, 96), (640, 640)),
    )  # fmt: skip
    assert parse_arguments(["--model", "m", "--data", "d", "--protocol", "tile", "--size", "64"]).protocol == "tile"
    assert parse_arguments(["--model", "m", "--data", "d"]) == EvaluateOptions(
        ground_truth=Path("d/gt"), detector="m", data=Path("d"), protocol="original", backend="auto", subset=False
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--weights x", "data/widerface/gt/wider_face_val.mat: missing"),
        ("--predictions x", "data/widerface/gt/wider_face_val.mat: missing"),
        (
            "--predictions x --data y --size 32x32",
            "--save-predictions, --protocol and --size go with --weights and --model",
        ),
        ("--predictions x --data y --protocol letterbox", "go with --weights and --model"),
        ("--predictions x --data y --save-predictions z", "go with --weights and --model"),
        ("--weights x --data y --protocol original --size 32x32", "--size goes with --protocol letterbox"),
        ("--weights x --data y --size 320,33", "try 32"),
        ("--weights x --data y --size 320,", "is not HEIGHTxWIDTH"),
        ("--weights x --data y --size 320,64,320x320", "names one twice"),
        ("--weights x --data y --size 320,64 --plot p.png", "--plot and --save-predictions take one --size"),
        ("--weights x --data y --predictions z", "not allowed with"),
        ("--weights x --data y --protocol other", "--protocol"),
        ("--weights x.pth --data none --json none/ap.json", "none/gt/wider_face_val.mat: missing"),
        ("--predictions none --data none --plot p.gif", "give a name that ends in .png, .svg, .pdf"),
        ("--weights x --data y --protocol letterbox --size 33x32", "try 32"),
    ],
)
def test_wrong_lines_name_the_mend(
    line: str, words: str, refused_here: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused_here(main, *line.split())


def test_there_must_be_something_to_evaluate(scored: Path) -> None:
    for changes in ({}, {"detector": "mobilenet0.25", "data": None}):
        with pytest.raises(DataError, match="nothing to evaluate: give predictions, or a detector and a WIDER FACE"):
            evaluate(_options(scored, **changes))
