"""Which images INT8 is calibrated on, how they are fed, and what is kept of them."""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.calibration import (
    _frames,
    calibrate,
    letterboxed,
    load_inputs,
)
from export.graph import build_heads
from export.options import CalibrationOptions, calibration_files, check_calibration, find_calibration_images
from facespec.errors import DataError, SpecError
from facespec.images import write_image
from facespec.letterbox import Frame
from facespec.samples import sample_crops
from facespec.spec import ModelSpec, PreprocessSpec
from trainer import load_model
from trainer.model import TorchRetinaFace

SIZE = (320, 320)
SMALL = (64, 64)
DEMO = CalibrationOptions("demo", images=16)


def _write(folder: Path, frames: list[Frame]) -> Path:
    for index, frame in enumerate(frames):
        write_image(folder / f"{index:02d}.png", frame)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Thirty small images, each of its own."""
    rng = np.random.default_rng(0)
    return _write(tmp_path / "pictures", list(rng.integers(0, 256, (30, 8, 8, 3), np.uint8)))


@pytest.mark.parametrize("mean", [(104, 117, 123), (1, 2, 3)])
def test_images_are_fed_as_a_detector_feeds_them(mean: tuple[int, int, int]) -> None:
    """Scaled by one factor, at the top left, padded with the mean: against cv2."""
    spec = ModelSpec(preprocess=PreprocessSpec(mean_bgr=mean))
    wide = np.random.default_rng(0).integers(0, 256, (50, 100, 3), np.uint8)
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    names, pixels = letterboxed([("wide", wide), ("tall", tall)], (64, 96), spec)
    assert names == ["wide", "tall"]
    assert [image.shape for image in pixels] == [(64, 96, 3)] * 2
    assert (pixels[0][48:] == mean).all()
    assert (pixels[1][:, 32:] == mean).all()
    for found, frame, size in ((pixels[0][:48], wide, (96, 48)), (pixels[1][:, :32], tall, (32, 64))):
        expected = cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR).astype(int)
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_widerface_is_looked_for_where_the_message_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WIDERFACE_ROOT", raising=False)
    frame = np.zeros((8, 8, 3), np.uint8)
    for place in ("option", "variable", "data/widerface"):
        for part in ("val", "train"):
            for name in ("b", "a", "c"):
                write_image(tmp_path / place / part / "images" / name / "x.png", frame)
    write_image(tmp_path / "option" / "WIDER_val" / "images" / "z.png", frame)
    options = CalibrationOptions("widerface_val")

    def found(options: CalibrationOptions) -> list[str]:
        return [str(path) for path in find_calibration_images(options)]

    assert found(options) == [f"data/widerface/val/images/{name}/x.png" for name in "abc"]
    assert found(CalibrationOptions("widerface_train"))[0] == "data/widerface/train/images/a/x.png"
    monkeypatch.setenv("WIDERFACE_ROOT", "variable")
    assert found(options)[0] == "variable/val/images/a/x.png"
    assert found(CalibrationOptions("widerface_val", Path("option")))[0] == "option/val/images/a/x.png"
    monkeypatch.setenv("WIDERFACE_ROOT", "")
    assert found(options)[0] == "data/widerface/val/images/a/x.png"
    with pytest.raises(DataError, match="no val/images in nowhere"):
        find_calibration_images(CalibrationOptions("widerface_val", Path("nowhere")))


def test_what_is_read_is_known(pictures: Path, tmp_path: Path) -> None:
    """Everything that may be read: any of the images, and the recipe."""
    recipe = tmp_path / "recipe.json"
    assert calibration_files(None) == []
    assert calibration_files(CalibrationOptions("demo")) == []
    assert calibration_files(CalibrationOptions("demo", recipe=recipe)) == [recipe]
    expected = sorted(pictures.iterdir())
    assert calibration_files(CalibrationOptions(str(pictures), images=8)) == expected
    assert calibration_files(CalibrationOptions(str(pictures), images=8, recipe=recipe)) == [*expected, recipe]
    with pytest.raises(DataError):
        calibration_files(CalibrationOptions(str(tmp_path / "nowhere")))


def test_crops_of_photographs(photographs: dict[str, Frame]) -> None:
    """By turns of each photograph; square, from a third to all of its height, every other one mirrored."""
    found = list(sample_crops(24, seed=0))
    assert [name.split(" #")[1] for name, _ in found] == [str(index) for index in range(24)]
    sources = {Path(name.split(" #")[0]).stem for name, _ in found}
    assert sources == set(photographs)
    shares, brightness = [], []
    for index, (name, frame) in enumerate(found):
        image = photographs[Path(name.split(" #")[0]).stem]
        assert Path(name).stem.split(" #")[0].startswith(list(photographs)[index % 2])
        least = min(image.shape[:2])
        assert abs(frame.shape[0] - frame.shape[1]) <= 1
        shares.append(frame.shape[0] / least)
        assert 0.34 <= shares[-1] <= 1
        if index < 8:
            right, wrong = (
                float(cv2.matchTemplate(image, side, cv2.TM_CCOEFF_NORMED).max())
                for side in ((frame[:, ::-1], frame) if index % 2 else (frame, frame[:, ::-1]))
            )
            assert right > 0.9
            assert right > wrong + 0.1
        brightness.append(frame.mean())
    assert min(shares) < 0.5
    assert max(shares) > 0.85
    assert np.std(brightness) > 15
    again, other = list(sample_crops(24, seed=0)), list(sample_crops(24, seed=1))
    assert all((a == b).all() for (_, a), (_, b) in zip(found, again, strict=True))
    assert not any(a.shape == b.shape and (a == b).all() for (_, a), (_, b) in zip(found, other, strict=True))


def test_which_images_are_taken(pictures: Path) -> None:
    """A sample of all, by the seed, in the order of their names."""
    names, pixels, skipped = load_inputs(CalibrationOptions(str(pictures), images=9, seed=3), SMALL, ModelSpec())
    everything = sorted(map(str, pictures.iterdir()))
    assert names == sorted(random.Random(3).sample(everything, 9))
    assert len(pixels) == 9
    assert skipped == []
    assert names != everything[:9]


def test_how_many_may_be_damaged_or_alike(tmp_path: Path) -> None:
    frames = list(np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8))

    def load(folder: Path, damaged: int = 0) -> tuple[int, int]:
        for index in range(damaged):
            (folder / f"{index:02d}.png").write_bytes(b"no picture")
        names, _, skipped = load_inputs(CalibrationOptions(str(folder)), SMALL, ModelSpec())
        return len(names), len(skipped)

    assert load(_write(tmp_path / "a", frames[:8])) == (8, 0)
    assert load(_write(tmp_path / "b", frames), damaged=2) == (18, 2)  # a tenth
    with pytest.raises(DataError, match="3 of 20 images cannot be read"):
        load(_write(tmp_path / "c", frames), damaged=3)
    assert load(_write(tmp_path / "d", [*frames[:8], *frames[:4]])) == (12, 0)
    with pytest.raises(DataError, match="copies of fewer than 8"):
        load(_write(tmp_path / "e", [*frames[:7], *frames[:5]]))
    with pytest.raises(DataError, match="7 images are too few, give at least 8"):
        load(_write(tmp_path / "f", frames[:7]))


def test_images_with_faces_are_counted(heads: onnx.ModelProto, tmp_path: Path, shared_cache: None) -> None:
    """Those on which PyTorch has a prior that is sooner a face than none."""
    frames = [frame for _, frame in sample_crops(6, 0)]
    frames += [np.full((64, 64, 3), 40 * level, np.uint8) for level in range(4)]
    options = CalibrationOptions(str(_write(tmp_path / "mixed", frames)))
    found = calibrate(heads, options, SIZE, ModelSpec())
    _, pixels, _ = load_inputs(options, SIZE, ModelSpec())
    model = TorchRetinaFace(load_model())
    logits = [model.heads(image)[1] for image in pixels]
    assert found.with_faces == sum(bool((values[:, 1] > values[:, 0]).any()) for values in logits)
    assert 0 < found.with_faces < len(found.images) == 10
    again = calibrate(heads, options, SIZE, ModelSpec())
    assert (again.cached, again.with_faces) == (True, found.with_faces)


def test_what_is_kept_is_of_this_graph_and_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    heads = build_heads(load_model(), SMALL)
    demo, spec = CalibrationOptions("demo", images=8), ModelSpec()
    first = calibrate(heads, demo, SMALL, spec)
    (place,) = (tmp_path / "retinaface-trt" / "calibration").iterdir()
    # numbers that no measurement gives are measured again
    with np.load(place) as file:
        arrays = [file[f"arr_{index}"] for index in range(len(file.files))]
    for wrong in (
        [arrays[0] * np.nan, *arrays[1:]],
        [np.full_like(arrays[0], np.inf), *arrays[1:]],
        [arrays[0][None], *arrays[1:]],
        [*arrays[:-1], np.zeros(2, np.float32)],
        arrays[:-1],
    ):
        np.savez(place, *wrong)
        again = calibrate(heads, demo, SMALL, spec)
        assert not again.cached
        assert all((again.ranges[name] == values).all() for name, values in first.ranges.items())
    # another network on the same images
    other = onnx.ModelProto()
    other.CopyFrom(heads)
    weight = next(tensor for tensor in other.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    assert not calibrate(other, demo, SMALL, spec).cached
    # without a place to keep it, it is measured all the same
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = calibrate(heads, demo, SMALL, spec)
    assert not found.cached
    assert found.ranges.keys() == first.ranges.keys()


def test_options_have_bounds() -> None:
    for images in (8, 2048):
        assert CalibrationOptions("demo", images=images).images == images
    for images in (7, 2049):
        with pytest.raises(SpecError, match=f"--images {images}: give a number from 8 to 2048"):
            CalibrationOptions("demo", images=images)
    with pytest.raises(SpecError, match="--seed -1"):
        CalibrationOptions("demo", seed=-1)
    with pytest.raises(SpecError, match="--calib: give widerface_val, widerface_train, demo, or a folder"):
        CalibrationOptions("")
    assert (CalibrationOptions("demo").images, CalibrationOptions("demo").seed) == (128, 0)
    check_calibration("int8", DEMO)
    check_calibration("fp16", None)
    with pytest.raises(SpecError, match="--int8 needs images"):
        check_calibration("int8", None)
    for precision in ("fp32", "fp16"):
        with pytest.raises(SpecError, match=f"--calib is for --int8, not for --{precision}"):
            check_calibration(precision, DEMO)


def test_what_a_folder_holds_beside_images_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What an image is, its content says; what could have been meant as one is not missed in silence."""
    write_image(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "a.png").rename(tmp_path / "a")
    (tmp_path / "notes.txt").write_text("text")
    options = CalibrationOptions(str(tmp_path))
    assert find_calibration_images(options) == [tmp_path / "a"]
    assert [name for name, _ in _frames(options, [])] == [str(tmp_path / "a")]
    assert caplog.messages == [f"1 file was not taken, no images: {tmp_path / 'notes.txt'}"]
