"""What a teacher adds to the labels, and that a run with one resumes to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from facespec.errors import DataError
from facespec.images import write_image
from facespec.letterbox import Frame
from tests.trainer.conftest import published
from trainer.config import ConfigError, TeacherConfig, TrainConfig, resolve
from trainer.data import Dataset, FileSample, Report, TrainingSet
from trainer.data.batches import collate
from trainer.data.dataset import Faces
from trainer.distributed import World
from trainer.loop import TAUGHT, _open_data, fit
from trainer.model import TorchRetinaFace
from trainer.teacher import Taught, TaughtSample, Unlabelled, add_unlabelled, merge, teach

CPU = World(torch.device("cpu"))
SIZE = 160


def faces_at(*corners: tuple[float, float], side: float = 40, known: bool = False) -> Faces:
    boxes = np.array([[x, y, x + side, y + side] for x, y in corners], np.float32).reshape(-1, 4)
    points = np.repeat(boxes[:, None, :2], 5, axis=1) + 7 * known
    return Faces(boxes, points * known, np.full(len(boxes), known))


def taught_at(*found: tuple[float, float, float]) -> Taught:
    faces = faces_at(*(corner[:2] for corner in found))
    points = np.repeat(faces.boxes[:, None, :2], 5, axis=1) + 3
    return faces.boxes, points, np.array([score for _, _, score in found], np.float32)


def test_labels_and_teacher_have_their_shares() -> None:
    config = TeacherConfig("x", share=0.25, least=0.4)
    labels = faces_at((0, 0), (100, 100))
    found = taught_at(
        (4, 4, 0.8), (200, 0, 0.6), (300, 0, 0.3), (112, 112, 0.9)
    )  # the last is neither the same nor new
    merged = merge(labels, found, config, labelled=True)
    np.testing.assert_array_equal(merged.boxes, np.concatenate([labels.boxes, found[0][1:2]]))
    assert merged.scores is not None
    assert merged.scores.tolist() == pytest.approx([0.75 + 0.25 * 0.8, 0.75, 0.25 * 0.6])
    assert merged.has_landmarks.tolist() == [True, False, True]  # the first lacks them, and the teacher is certain
    np.testing.assert_array_equal(merged.landmarks, np.stack([found[1][0], np.zeros((5, 2)), found[1][1]]))


def test_labelled_landmarks_stay_and_doubtful_ones_are_not_taken() -> None:
    config = TeacherConfig("x")
    known = merge(faces_at((0, 0), known=True), taught_at((0, 0, 0.9)), config, labelled=True)
    np.testing.assert_array_equal(known.landmarks, faces_at((0, 0), known=True).landmarks)
    doubtful = merge(faces_at((0, 0)), taught_at((0, 0, 0.49)), config, labelled=True)
    assert not doubtful.has_landmarks.any()
    assert not doubtful.landmarks.any()


def test_images_without_labels_are_the_teachers_alone() -> None:
    merged = merge(Faces.none(), taught_at((0, 0, 0.8), (90, 0, 0.2)), TeacherConfig("x", share=0.25), labelled=False)
    assert merged.scores is not None
    assert merged.scores.tolist() == pytest.approx([0.8])
    assert merged.has_landmarks.all()


def test_nothing_found_and_nothing_labelled() -> None:
    config, nothing = TeacherConfig("x", share=0.25), taught_at()
    assert len(merge(Faces.none(), nothing, config, labelled=True)) == 0
    alone = merge(faces_at((0, 0)), nothing, config, labelled=True)
    assert alone.scores is not None
    assert alone.scores.tolist() == [0.75]
    without = merge(faces_at((0, 0)), nothing, dataclasses.replace(config, share=0.0), labelled=True)
    assert without.scores is not None
    assert without.scores.tolist() == [1]


def test_scores_go_through_augmentation_and_batches(photographs: dict[str, Frame], tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", photographs["astronaut"])
    labels = faces_at((180, 60), (10, 10), (400, 400), side=90)
    sample = TaughtSample(
        FileSample(tmp_path / "a.png", labels), taught_at((20, 400, 0.5)), TeacherConfig("x", share=1)
    )
    dataset = TrainingSet(Dataset("a", [sample], Report()), SIZE, resolve({}).augment, 0)
    seen = set()
    for epoch in range(8):
        image, faces = dataset[epoch]
        _, targets = collate([(image, faces), (image, faces[:0]), (image, dataclasses.replace(faces, scores=None))])
        assert faces.scores is not None
        assert len(faces.scores) == len(faces)
        assert targets.scores[0, : len(faces)].tolist() == faces.scores.tolist()
        assert targets.scores[2, : len(faces)].tolist() == [1] * len(faces)
        assert not targets.scores[1].any()
        seen |= set(faces.scores.tolist())
    assert seen <= {0.0, 0.5}
    assert 0.5 in seen


def test_the_teacher_looks_at_larger_images_once(
    photographs: dict[str, Frame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "a.png", photographs["astronaut"])
    dataset = Dataset("a", [FileSample(tmp_path / "a.png"), Unlabelled(tmp_path / "a.png")], Report())
    config = TeacherConfig("mobilenet0.25", scale=2.0, share=0.5)
    file = tmp_path / "t.npz"
    taught = teach(dataset, config, SIZE, CPU, file)
    expected = TorchRetinaFace(published(), score_threshold=0.05, size_hw=(320, 320)).detect(photographs["astronaut"])
    (first, second) = (sample.load()[1] for sample in taught.samples)
    certain = expected.scores >= 0.3
    np.testing.assert_array_equal(second.boxes, expected.boxes[certain])
    np.testing.assert_array_equal(second.landmarks, expected.landmarks[certain])
    assert second.scores is not None
    assert first.scores is not None
    np.testing.assert_array_equal(second.scores, expected.scores[certain])
    np.testing.assert_array_equal(first.scores, second.scores / 2)
    assert [sample.name for sample in taught.samples] == [sample.name for sample in dataset.samples]
    with monkeypatch.context() as patch:  # it is read again, and not looked for
        patch.setattr(TorchRetinaFace, "detect", None)
        again = teach(dataset, config, SIZE, CPU, file)
        np.testing.assert_array_equal(again.samples[1].load()[1].boxes, second.boxes)
    for changed, size in ((dataclasses.replace(config, scale=1.0), SIZE), (config, 2 * SIZE)):
        other = teach(dataset, changed, size, CPU, file).samples[1].load()[1]
        assert not np.array_equal(other.boxes, second.boxes)
    file.write_bytes(b"damaged")
    np.testing.assert_array_equal(teach(dataset, config, SIZE, CPU, file).samples[1].load()[1].boxes, second.boxes)


def test_images_of_a_folder_come_behind_those_with_labels(
    images: Path, tmp_path: Path, photographs: dict[str, Frame]
) -> None:
    for name in ("b/2.png", "b/1.jpg"):
        write_image(tmp_path / name, photographs["astronaut"])
    (tmp_path / "b" / "notes.txt").write_text("no image")
    config = resolve(
        {"data.source": str(images), "data.size": SIZE, "data.batch": 2, "run.output": str(tmp_path / "r")}
    )
    teacher = TeacherConfig("mobilenet0.25", str(tmp_path / "b"))
    data = _open_data(dataclasses.replace(config, teacher=teacher), CPU)
    before = _open_data(config, CPU)
    assert data.names.split("\n") == [*before.names.split("\n"), "b/1.jpg", "b/2.png"]
    assert [isinstance(sample, Unlabelled) for sample in data.dataset.samples] == [False] * 12 + [True] * 2
    assert "2 more images without labels" in data.dataset.report.summary()
    with pytest.raises(DataError, match=r"teacher\.images is no folder with images"):
        add_unlabelled(before.dataset, str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher.images": "x"}, "images without labels need teacher.weights"),
        ({"teacher.weights": "x", "teacher.scale": 1.33}, "times data.size it must be a multiple of 32"),
        ({"teacher.weights": "x", "teacher.scale": 8}, "up to 4096, not 5120"),
        ({"teacher.weights": "x", "teacher.scale": 0.1}, "teacher.scale is 0.1: it must lie in 0.5..8"),
        ({"teacher.share": 1.5}, "teacher.share is 1.5"),
        ({"teacher.least": 0}, "teacher.least is 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        resolve(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher__weights": "mobilenet0.25", "loss__assign": "atss", "loss__box": "ciou"},
        {"loss__assign": "simota", "loss__box": "diou", "model__min_sizes": [[8, 16], [32, 64], [128, 256]]},
    ],
)
def test_such_runs_resume_to_the_bit(
    changes: dict[str, object], config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Stopped after two of six steps, in the first epoch."""
    from trainer.checkpoint import read_training
    from trainer.loop import _Run

    whole = config(**changes, precision="fp32", run__output=str(tmp_path / "whole"))
    fit(whole)
    parts = dataclasses.replace(whole, run=dataclasses.replace(whole.run, output=str(tmp_path / "parts")))
    stop = _Run._step

    def step(run: _Run, images: torch.Tensor, targets: object, seen: bool) -> bool:
        return stop(run, images, targets, seen) or run.state.step == 2  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            fit(parts)
    last = tmp_path / "parts" / "last.pth"
    assert read_training(last)[1]["step"] == 2
    fit(parts, resume=last)
    (one, first), (other, second) = (read_training(tmp_path / name / "last.pth") for name in ("whole", "parts"))
    assert first["step"] == second["step"] == 6
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert (tmp_path / "parts" / "steps.csv").read_text() == (tmp_path / "whole" / "steps.csv").read_text()
    assert (tmp_path / "whole" / TAUGHT).exists() == ("teacher__weights" in changes)
