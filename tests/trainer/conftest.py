from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from facespec.errors import RetinaFaceError
from facespec.images import write_image
from facespec.letterbox import Letterbox
from trainer import RetinaFace, load_model
from trainer.config import Settings, TrainConfig, resolve
from trainer.data.batches import place_faces
from trainer.data.dataset import Faces
from trainer.data.synthetic import SyntheticSample


@cache
def _published() -> RetinaFace:
    return load_model()


def published() -> RetinaFace:
    """Return the published model, one's own to change; reading its file each time takes longer than most tests."""
    return copy.deepcopy(_published())


SIDE = 160
"""Of the images, and of the network that is trained on them."""


def label_lines(faces: Faces) -> list[str]:
    """Lines of a label.txt for the faces of an image."""
    lines = []
    for xyxy, points, known in zip(faces.boxes, faces.landmarks, faces.has_landmarks, strict=True):
        values = [*xyxy[:2], *(xyxy[2:] - xyxy[:2])]
        values += [number for point in points for number in (*point, 0.0)] if known else []
        lines.append(" ".join(f"{value:.3f}" for value in values))
    return lines


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small labelled images to train on and four to evaluate on, in a folder like WIDER FACE's."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("val", 4)):
        lines = []
        for index in range(count):
            image, faces = SyntheticSample(split, index).load()
            box = Letterbox.fit((image.shape[0], image.shape[1]), (SIDE, SIDE))
            write_image(root / split / "images" / f"{index}.png", box.apply(image, (104, 117, 123)))
            lines += [f"# {index}.png", *label_lines(place_faces(faces, box))]
        (root / split / "label.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def config(images: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of six steps that takes a second or two."""

    def make(**changes: object) -> TrainConfig:
        settings: Settings = {
            "data.source": str(images),
            "data.size": SIDE,
            "data.batch": 4,
            "schedule.epochs": 2,
            "run.workers": 0,
            "run.evaluate_every": 0,
            "run.output": str(tmp_path / "run"),
        }
        return resolve(settings | {name.replace("__", "."): value for name, value in changes.items()})

    return make


def one_face(x: float = 10, y: float = 10, width: float = 40, height: float = 40) -> Faces:
    """A single face without landmarks."""
    box = np.array([[x, y, x + width, y + height]], np.float32)
    return Faces(box, np.zeros((1, 5, 2), np.float32), np.zeros(1, bool))


@pytest.fixture
def refused_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call a command's main function, which must end in an error of one line; return the line.

    `refused` does the same in a process of its own, which takes seconds to import PyTorch.
    """

    def call(main: Callable[[list[str]], int], *args: object) -> str:
        capsys.readouterr()
        with pytest.raises((RetinaFaceError, SystemExit)) as caught:
            main([str(arg) for arg in args])
        if isinstance(caught.value, SystemExit):  # of the parser
            assert caught.value.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ")
            return line
        assert "\n" not in str(caught.value)
        return f"error: {caught.value}"

    return call
