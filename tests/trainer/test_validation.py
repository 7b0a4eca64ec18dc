"""What a model is measured on while it trains, and which faces count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.io import savemat

from facespec.errors import DataError
from facespec.images import write_image
from facespec.letterbox import Frame
from tests.trainer.conftest import published
from trainer import RetinaFace
from trainer.average_precision import LEVELS, ImageTruth
from trainer.config import DataConfig
from trainer.data import Dataset, Report, open_dataset
from trainer.data.dataset import Faces
from trainer.distributed import World
from trainer.model import TorchRetinaFace
from trainer.validation import LabelledValidation, Validation, WiderValidation, find_validation

CPU = World(torch.device("cpu"))
SIZE = 256


class Alone(World):
    """A process among several that hears nothing of the others."""

    def gather(self, value: dict) -> dict:
        return value


@pytest.fixture(scope="module")
def model() -> RetinaFace:
    return published()


@dataclasses.dataclass(frozen=True)
class Labelled:
    """An image with labels of any kind."""

    image: Frame
    boxes: np.ndarray
    name: str = "labelled"

    def load(self) -> tuple[Frame, Faces]:
        count = len(self.boxes)
        return self.image, Faces(
            self.boxes.astype(np.float32), np.zeros((count, 5, 2), np.float32), np.zeros(count, bool)
        )


@pytest.fixture(scope="module")
def portrait(photographs: dict[str, Frame], model: RetinaFace) -> tuple[Frame, np.ndarray]:
    """A photograph of 512x512 pixels, and the box of its face."""
    from trainer.model import TorchRetinaFace

    image = photographs["astronaut"]
    assert image.shape[:2] == (512, 512)
    return image, TorchRetinaFace(model, size_hw=(SIZE, SIZE)).detect(image).boxes[:1]


def _labelled(*samples: Labelled) -> LabelledValidation:
    return LabelledValidation(Dataset("some", list(samples), Report()), SIZE)


def _ap(model: RetinaFace, *samples: Labelled) -> float:
    return _labelled(*samples).measure(model, CPU).get("ap", -1)


@pytest.mark.parametrize(
    ("width", "height", "counts"),
    [(31, 200, False), (200, 31, False), (31, 31, False), (32, 200, True), (200, 32, True), (32, 32, True)],
)
def test_faces_count_from_16_pixels_of_their_shorter_side_in_the_network(
    width: int, height: int, counts: bool, portrait: tuple[Frame, np.ndarray], model: RetinaFace
) -> None:
    """The network sees the photograph at half its size."""
    image, face = portrait
    missed = np.array([[300, 280, 300 + width, 280 + height]])
    assert _ap(model, Labelled(image, np.concatenate([face, missed]))) == pytest.approx(50 if counts else 100)


def test_a_small_face_that_is_found_is_no_false_alarm(portrait: tuple[Frame, np.ndarray], model: RetinaFace) -> None:
    image, face = portrait
    tiny = cv2.resize(image, (96, 96))
    away = Labelled(tiny, face * 96 / 512)  # enlarged by the letterbox: it counts
    assert _ap(model, away) == pytest.approx(100)
    sheet = np.full((512, 512, 3), 117, np.uint8)
    sheet[:64, :64] = cv2.resize(image, (64, 64))
    assert _ap(model, Labelled(sheet, face * 64 / 512)) == -1  # nothing counts, nothing is said
    assert _ap(model, Labelled(sheet, face * 64 / 512), Labelled(image, face)) == pytest.approx(100)


def test_it_is_the_iou_of_boxes_without_a_border_that_counts(
    portrait: tuple[Frame, np.ndarray], model: RetinaFace
) -> None:
    """With a border of a pixel the first would be over a half, too; faces of low score are measured as well."""
    image, face = portrait
    x1, y1, x2, y2 = face[0].tolist()
    for share, ap in ((0.499, 0), (0.501, 100)):
        lower = np.array([[x1, y1, x2, y1 + (y2 - y1) * share]])
        assert _ap(model, Labelled(image, lower)) == pytest.approx(ap), share
    sideways = np.array([[x1 + (x2 - x1) * 0.1, y1, x2 + (x2 - x1) * 0.1, y2]])
    assert _ap(model, Labelled(image, sideways)) == pytest.approx(100)


def test_images_are_shared_out_and_frames_keep_their_shape(
    portrait: tuple[Frame, np.ndarray], model: RetinaFace
) -> None:
    image, face = portrait
    wide = np.full((512, 1024, 3), 117, np.uint8)
    wide[:, 512:] = image
    shifted = Labelled(wide, face + np.array([512, 0, 512, 0]))
    nobody = Labelled(np.full((64, 64, 3), 9, np.uint8), np.array([[0, 0, 40, 40]]))
    validation = _labelled(shifted, nobody, shifted)
    assert validation.measure(model, CPU) == pytest.approx({"ap": 200 / 3})
    shares = [validation.measure(model, Alone(CPU.device, rank, 2)) for rank in (0, 1)]
    assert [share["ap"] for share in shares] == pytest.approx([100, 0])
    assert validation.levels == ("ap",)
    assert validation.what == (
        "AP at IoU 0.5 over the labels of 3 images of some, letterboxed to 256, faces from 16 pixels"
    )


def test_the_official_validation_takes_images_at_their_own_size_and_leaves_empty_levels_out(
    portrait: tuple[Frame, np.ndarray], model: RetinaFace, tmp_path: Path
) -> None:
    image, face = portrait
    truth = {}
    for index, counted in enumerate(({"easy": True, "medium": True}, {"medium": True})):
        write_image(tmp_path / "e" / f"{index}.jpg", np.full((64, 96, 3), 90, np.uint8) if index else image)
        box = np.hstack([face[:, :2], face[:, 2:] - face[:, :2]]).astype(np.float64)
        masks = {level: np.array([counted.get(level, False)]) for level in LEVELS}
        truth["e", str(index)] = ImageTruth(box, masks)
    validation = WiderValidation(tmp_path, truth)
    scores = validation.measure(model, CPU)
    assert scores == pytest.approx({"easy": 100, "medium": 50})  # there is no face in the second one
    assert validation.measure(model, Alone(CPU.device, 1, 2)) == pytest.approx({"easy": 0, "medium": 0})
    assert validation.measure(model, Alone(CPU.device, 2, 3)) == pytest.approx({"easy": 0, "medium": 0})
    assert validation.levels == ("easy", "medium", "hard")
    assert "on 2 images of its val split at their own size" in validation.what


def test_the_official_validation_letterboxes_to_the_size_that_is_deployed(
    portrait: tuple[Frame, np.ndarray], model: RetinaFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, face = portrait
    write_image(tmp_path / "e" / "0.jpg", image)
    box = np.hstack([face[:, :2], face[:, 2:] - face[:, :2]]).astype(np.float64)
    truth = {("e", "0"): ImageTruth(box, {level: np.array([True]) for level in LEVELS})}
    seen = []
    heads = TorchRetinaFace.heads

    def seeing(self: TorchRetinaFace, pixels: Frame) -> object:
        seen.append(pixels.shape)
        return heads(self, pixels)

    monkeypatch.setattr(TorchRetinaFace, "heads", seeing)
    validation = WiderValidation(tmp_path, truth, 96)
    assert validation.measure(model, CPU) == pytest.approx({"easy": 100, "medium": 100, "hard": 100})
    assert seen == [(96, 96, 3)]
    assert "on 1 images of its val split letterboxed to 96" in validation.what


def _set(folder: Path, names: str, images: str = "images") -> Path:
    for name in names:
        write_image(folder / images / f"{name}.png", np.full((64, 64, 3), 50, np.uint8))
    (folder / "label.txt").write_text("".join(f"# {name}.png\n1 1 40 40\n" for name in names))
    return folder


def _names(validation: Validation | None) -> list[str]:
    assert isinstance(validation, LabelledValidation)
    return [Path(sample.name).stem for sample in validation.dataset.samples]


def test_what_is_measured_is_what_val_names_or_the_val_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WIDERFACE_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    both, other = tmp_path / "both", tmp_path / "other"
    _set(both / "train", "abc")
    _set(both / "val", "de")
    _set(other, "fg")
    trained = open_dataset(str(both), "train")
    config = DataConfig(source=str(both), size=96)
    found = find_validation(config, trained)
    assert _names(found) == ["d", "e"]
    assert isinstance(found, LabelledValidation)
    assert found.size == 96
    assert _names(find_validation(dataclasses.replace(config, val=str(other)), trained)) == ["f", "g"]
    few = dataclasses.replace(trained, samples=trained.samples[:2])
    found = find_validation(dataclasses.replace(config, overfit=2, val=str(other)), few)
    assert _names(found) == ["a", "b"]
    # a label file has no splits: what is trained is not what is measured, unless it is named
    alone = open_dataset(str(other), "train")
    file = DataConfig(source=str(other))
    assert find_validation(file, alone) is None
    assert _names(find_validation(dataclasses.replace(file, val=str(other)), alone)) == ["f", "g"]
    assert capsys.readouterr().out == ""
    # without a val split it trains all the same, but a set that is named must be there
    _set(tmp_path / "trained" / "train", "h")
    only = str(tmp_path / "trained")
    assert find_validation(DataConfig(source=only), open_dataset(only, "train")) is None
    assert capsys.readouterr().out.startswith("note: there is nothing to measure on: --data ")
    with pytest.raises(DataError, match="nowhere"):
        find_validation(dataclasses.replace(config, val="nowhere"), trained)
    # root and the environment are places of WIDER FACE
    named = DataConfig(source="widerface", root=str(both))
    assert _names(find_validation(named, open_dataset("widerface", "train", both))) == ["d", "e"]
    monkeypatch.setenv("WIDERFACE_ROOT", str(both))
    assert _names(find_validation(DataConfig(source="widerface"), trained)) == ["d", "e"]


def _cell(items: list[object]) -> np.ndarray:
    cell = np.empty((len(items), 1), object)
    for index, item in enumerate(items):
        cell[index, 0] = item
    return cell


def _official(root: Path, images: str, gt: str, there: str = "ab") -> None:
    """Images and ground truth of WIDER FACE in one of its layouts; the ground truth has a, b and c."""
    for name in there:
        write_image(root / images / "e" / f"{name}.jpg", np.full((32, 32, 3), 9, np.uint8))
    (root / gt).mkdir(parents=True)
    savemat(
        root / gt / "wider_face_val.mat",
        {
            "event_list": _cell(["e"]),
            "file_list": _cell([_cell(["a", "b", "c"])]),
            "face_bbx_list": _cell([_cell([np.array([[1.0, 2, 30, 40]])] * 3)]),
        },
    )
    for level in LEVELS:
        savemat(root / gt / f"wider_{level}_val.mat", {"gt_list": _cell([_cell([np.array([[1]], np.uint16)] * 3)])})


@pytest.mark.parametrize("images", ["val/images", "WIDER_val/images"])
@pytest.mark.parametrize("gt", ["gt", "eval_tools/ground_truth"])
def test_the_ground_truth_of_wider_face_is_found_in_its_layouts(
    images: str, gt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WIDERFACE_ROOT", raising=False)
    root = tmp_path / "data" / "widerface"
    _official(root, images, gt)
    trained = Dataset("widerface", [], Report())
    found = find_validation(DataConfig(source=str(root)), trained)
    assert isinstance(found, WiderValidation)
    assert found.images == root / images
    assert list(found.truth) == [("e", "a"), ("e", "b")]
    ways: list[tuple[DataConfig, Callable[[], None]]] = [
        (DataConfig(root=str(root)), lambda: None),
        (DataConfig(source="x", val="widerface", root=str(root)), lambda: None),
        (DataConfig(), lambda: monkeypatch.setenv("WIDERFACE_ROOT", str(root))),
        (DataConfig(), lambda: (monkeypatch.delenv("WIDERFACE_ROOT"), monkeypatch.chdir(tmp_path))[1]),
    ]
    for config, prepare in ways:
        prepare()
        assert isinstance(find_validation(config, trained), WiderValidation)
    # images that are trained on are measured by their labels, whatever else there is
    overfit = find_validation(DataConfig(source=str(root), overfit=1), trained)
    assert isinstance(overfit, LabelledValidation)


def test_a_ground_truth_without_its_images_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _official(tmp_path, "val/images", "gt", there="")
    (tmp_path / "val" / "images").mkdir(parents=True)
    assert find_validation(DataConfig(source=str(tmp_path)), Dataset("w", [], Report())) is None
    assert "nothing to measure on" in capsys.readouterr().out
