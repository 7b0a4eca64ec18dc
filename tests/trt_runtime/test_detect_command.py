from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from PIL import Image

from facespec.cli import run
from facespec.images import read_image, write_image
from facespec.letterbox import Frame
from tests.conftest import ROOT
from tests.trt_runtime.rtsp_server import RtspServer, Visit, encode_h264
from trt_runtime import OrtRetinaFace, load_detector
from trt_runtime.detect import DetectOptions, detect, main
from trt_runtime.media.files import Source, VideoFile, VideoWriter
from trt_runtime.media.live import open_source

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command as `command` does, but in this process; what C libraries print counts, too."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def call(module: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        assert module == "trt_runtime.detect"
        capfd.readouterr()
        with (
            monkeypatch.context() as patch,
            open(1, "w", closefd=False) as stdout,
            open(2, "w", closefd=False) as stderr,
        ):
            patch.chdir(tmp_path)
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as left:
                run(lambda: main([*map(str, args)]))
        assert isinstance(left.value.code, int)
        return subprocess.CompletedProcess(args, left.value.code, *capfd.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(inside: Run) -> Callable[..., str]:
    """Run the command, which must end in one line on stderr (exit code 2 of a wrong command line, else 1), returned."""

    def call(module: str, *args: object, env: dict[str, str] | None = None) -> str:
        backend = () if "--backend" in args else ("--backend", "onnxruntime")  # it is loaded soonest
        result = inside(module, *args, *backend, env=env)
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, lines
        assert result.returncode == (2 if lines[0].endswith(" --help)") else 1), lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return call


@pytest.fixture
def photos(tmp_path: Path, photographs: dict[str, Frame]) -> Path:
    """A folder with two photographs, one of them in a folder below."""
    write_image(tmp_path / "photos" / "astronaut.png", photographs["astronaut"])
    write_image(tmp_path / "photos" / "more" / "hopper.jpg", photographs["grace_hopper"])
    return tmp_path / "photos"


@pytest.fixture
def video(tmp_path: Path, astronaut: Frame) -> Path:
    """Twelve frames; the photograph moves to the right by four pixels each."""
    with VideoWriter(tmp_path / "clip.mp4", 25) as writer:
        for index in range(12):
            writer.write(np.roll(astronaut, 4 * index, axis=1))
    return tmp_path / "clip.mp4"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory, astronaut: Frame) -> Path:
    """Long enough to be interrupted, and small."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    small = np.asarray(cv2.resize(astronaut, (160, 160)), np.uint8)
    with VideoWriter(path, 25) as writer:
        for index in range(LONG):
            writer.write(np.roll(small, index % 16, axis=1))
    return path


LONG = 600
SMALL = "--size", "160"  # for models of dynamic size


@contextmanager
def _started(folder: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run the command until it has written some lines to o.json; it can be interrupted, whatever a shell says."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trt_runtime.detect", *map(str, arguments), "--json", "o.json", "--threads", "1"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _wait_for_lines(process: subprocess.Popen[str], folder: Path, count: int, word: str = "frame") -> None:
    while process.poll() is None and sum(path.read_text().count(word) for path in folder.glob(".o.*.json")) < count:
        time.sleep(0.02)


def test_one_image(command: Run, photos: Path, static_onnx: Path, tmp_path: Path, astronaut: Frame) -> None:
    result = command(
        "trt_runtime.detect", photos / "astronaut.png", "--model", static_onnx, "--out", "out/faces.png",
        "--json", "out/faces.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "1 frame, 1 face," in result.stdout
    assert "network" in result.stdout
    (record,) = _lines(tmp_path / "out" / "faces.json")
    expected = OrtRetinaFace(static_onnx).detect(astronaut)
    assert record == {"source": str(photos / "astronaut.png"), **expected.to_dict()}
    drawn = read_image(tmp_path / "out" / "faces.png")
    changed = np.argwhere((drawn != astronaut).any(axis=2))
    x1, y1, x2, y2 = expected.boxes[0]
    # what was drawn lies at the face, and its label above it
    assert np.abs(changed.min(axis=0) - (y1, x1)).max() < 40
    assert np.abs(changed.max(axis=0) - (y2, x2)).max() < 4


def test_json_to_standard_output(inside: Run, photos: Path, static_onnx: Path) -> None:
    result = inside("trt_runtime.detect", photos, "--model", static_onnx, "--json", "-", "--score", "0.9")
    assert result.returncode == 0
    assert [len(json.loads(line)["faces"]) for line in result.stdout.splitlines()] == [1, 1]
    assert "2 frames, 2 faces" in result.stderr


@pytest.mark.parametrize("source", ["photos", "photos/**/*"])
def test_folders_and_patterns(
    source: str, photos: Path, static_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = detect(DetectOptions(source, static_onnx, out=Path("out"), json="faces.json"))
    assert (summary.frames, summary.faces, summary.failures) == (2, 2, [])
    assert {str(path.relative_to("out")) for path in Path("out").rglob("*.*")} == {"astronaut.png", "more/hopper.jpg"}
    assert [Path(record["source"]).name for record in _lines(tmp_path / "faces.json")] == [
        "astronaut.png",
        "hopper.jpg",
    ]


def test_a_bad_image_among_good_ones_is_named_and_passed_over(
    inside: Run, photos: Path, static_onnx: Path, tmp_path: Path
) -> None:
    (photos / "bad.jpg").write_bytes((photos / "more" / "hopper.jpg").read_bytes()[:5000])
    result = inside("trt_runtime.detect", photos, "--model", static_onnx, "--json", "f.json", "--out", "out")
    assert result.returncode == 1
    assert f"error: {photos / 'bad.jpg'}: the JPEG file is truncated" in result.stderr
    assert "Traceback" not in result.stderr
    assert "1 image could not be read" in result.stdout
    records = _lines(tmp_path / "f.json")
    assert [sorted(record)[:2] for record in records if "error" in record] == [["error", "source"]]
    assert len(records) == 3
    assert len(list((tmp_path / "out").rglob("*.*"))) == 2


def test_names_that_are_no_utf8_and_names_that_steer_a_terminal(
    inside: Run, photos: Path, static_onnx: Path, tmp_path: Path
) -> None:
    """The names are in the lines, in the files and in what is printed, and nothing is lost."""
    names = [os.fsdecode(b"caf\xe9.jpg"), "a\x1b[2J\u202egpj.jpg"]
    shown = ["caf\\udce9.jpg", "a\\u001b[2J\\u202egpj.jpg"]
    (photos / "astronaut.png").unlink()
    photo = (photos / "more" / "hopper.jpg").rename(photos / names[0])
    (photos / names[1]).write_bytes(photo.read_bytes()[:5000])
    result = inside("trt_runtime.detect", photos, "--model", static_onnx, "--json", "f.json", "--out", "out")
    assert result.returncode == 1
    assert "1 frame, 1 face" in result.stdout
    assert f"error: {photos}/{shown[1]}: the JPEG file is truncated" in result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    assert sorted(Path(record["source"]).name for record in _lines(tmp_path / "f.json")) == sorted(names)
    assert os.listdir(tmp_path / "out") == [names[0]]


def test_a_video(inside: Run, video: Path, static_onnx: Path, tmp_path: Path) -> None:
    result = inside("trt_runtime.detect", video, "--model", static_onnx, "--out", "out.mp4", "--json", "out.json")
    assert result.returncode == 0, result.stderr
    records = _lines(tmp_path / "out.json")
    assert [record["frame"] for record in records] == list(range(12))
    assert [record["time_s"] for record in records] == pytest.approx([index / 25 for index in range(12)], abs=1e-3)
    left = [record["faces"][0]["box"][0] for record in records]
    # boxes follow the photograph, in pixels of the frame
    assert left[-1] - left[0] == pytest.approx(44, abs=4)
    with VideoFile(tmp_path / "out.mp4") as drawn, VideoFile(video) as plain:
        pairs = [(a.image.astype(int), b.image) for a, b in zip(drawn, plain, strict=True)]
    for (image, original), record in zip(pairs, records, strict=True):
        x1, y1, _, y2 = (round(value) for value in record["faces"][0]["box"])
        assert np.abs(image - original)[y1 + 5 : y2 - 5, x1].mean() > 30  # the left edge of the box is drawn


@pytest.fixture
def second_video(tmp_path: Path, photographs: dict[str, Frame]) -> Path:
    """Seven frames of another size and rate."""
    small = np.asarray(cv2.resize(photographs["grace_hopper"], (256, 300)), np.uint8)
    with VideoWriter(tmp_path / "other.mkv", 10) as writer:
        for index in range(7):
            writer.write(np.roll(small, 2 * index, axis=0))
    return tmp_path / "other.mkv"


def _times(path: Path) -> list[float]:
    with VideoFile(path) as video:
        return [frame.seconds for frame in video]


def test_several_videos_at_once_though_one_is_damaged(
    command: Run, video: Path, second_video: Path, static_onnx: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.mp4").write_text("this is text")
    sources = ["text.mp4", "clip.mp4", "other.mkv"]
    result = command("trt_runtime.detect", *sources, "--model", static_onnx, "--out", "out", "--json", "out.json")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: text.mp4: not a video")
    assert "Traceback" not in result.stderr
    records = _lines(tmp_path / "out.json")
    for source, count in (("clip.mp4", 12), ("other.mkv", 7)):
        own = [record for record in records if record["source"] == source]
        assert [record["frame"] for record in own] == list(range(count))
        with VideoFile(tmp_path / source) as plain:
            detector = load_detector(static_onnx)
            for record, frame in zip(own, plain, strict=True):
                assert {**record, **detector.detect(frame.image).to_dict()} == record
                assert record["time_s"] == round(frame.seconds, 4)
        assert f"{source}: {count} decoded, {count} detected, 0 dropped, 0 reconnects, 0 damaged" in result.stdout
        drawn = Path(source).with_suffix(".mp4").name
        assert _times(tmp_path / "out" / drawn) == pytest.approx(_times(tmp_path / source), abs=2e-3)
    assert [record["source"] for record in records if "error" in record] == ["text.mp4"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.mp4", "other.mp4"]
    assert "19 frames, " in result.stdout
    assert "1 source could not be read" in result.stdout
    stages = re.search(r"ms per frame: read [\d.]+, .*write ([\d.]+), encode ([\d.]+)", result.stdout)
    assert stages
    assert float(stages[1]) > 0
    assert float(stages[2]) > 0


def test_what_failed_is_told_though_another_source_is_still_being_opened(
    video: Path, static_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Meanwhile nothing that libraries write to stderr is seen."""
    (tmp_path / "text.mp4").write_text("this is text")

    def slowly(source: str) -> Source:
        if source == str(video):
            time.sleep(0.5)
        return open_source(source)

    monkeypatch.setattr("trt_runtime.detect.open_source", slowly)
    with open(2, "w", buffering=1, closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        summary = detect(DetectOptions((str(tmp_path / "text.mp4"), str(video)), static_onnx, threads=1))
        monkeypatch.undo()
    assert summary.frames == 12
    assert f"error: {tmp_path / 'text.mp4'}: not a video" in capfd.readouterr().err


def test_stride_draws_every_frame_and_writes_a_line_for_those_the_network_saw(
    inside: Run, video: Path, static_onnx: Path, tmp_path: Path
) -> None:
    line = ("trt_runtime.detect", video, "--model", static_onnx)
    result = inside(*line, "--stride", "5", "--out", "out.mp4", "--json", "out.json")
    assert result.returncode == 0, result.stderr
    assert "12 frames (3 through the network), 3 faces" in result.stdout
    records = _lines(tmp_path / "out.json")
    assert [record["frame"] for record in records] == [0, 5, 10]
    with VideoFile(tmp_path / "out.mp4") as drawn, VideoFile(video) as plain:
        pairs = [(a.image.astype(int), b.image) for a, b in zip(drawn, plain, strict=True)]
    for number, (image, original) in enumerate(pairs):
        x1, y1, _, y2 = (round(value) for value in records[number // 5]["faces"][0]["box"])
        assert np.abs(image - original)[y1 + 5 : y2 - 5, x1].mean() > 30


def test_images_of_several_sources(photos: Path, static_onnx: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "one.png", read_image(photos / "astronaut.png"))
    sources = (str(tmp_path / "one.png"), str(photos), str(photos / "astronaut.png"))
    summary = detect(DetectOptions(sources, static_onnx, out=tmp_path / "out", json=str(tmp_path / "f.json")))
    assert (summary.frames, summary.faces) == (3, 3)  # one of them is named twice
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert found == {"one.png", "photos/astronaut.png", "photos/more/hopper.jpg"}


def test_interrupted_videos_are_playable(long_video: Path, dynamic_onnx: Path, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(long_video, tmp_path / name)
    line = ("a.mp4", "b.mp4", "--model", dynamic_onnx, *SMALL, "--out", "out")
    with _started(tmp_path, *line) as process:
        for name in ("a.mp4", "b.mp4"):
            _wait_for_lines(process, tmp_path, 5, f'"{name}", "frame"')
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert not errors
    records = _lines(tmp_path / "o.json")
    for name in ("a.mp4", "b.mp4"):
        count = len(_times(tmp_path / "out" / name))
        assert 0 < count < LONG
        assert [record["frame"] for record in records if record["source"] == name] == list(range(count))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.mp4", "b.mp4"]


def test_a_camera_that_is_lost_for_a_while_beside_a_file(
    video: Path, astronaut: Frame, static_onnx: Path, tmp_path: Path
) -> None:
    small = np.asarray(cv2.resize(astronaut, (256, 256)), np.uint8)
    units = encode_h264([np.roll(small, index, axis=1) for index in range(30)], rate=25, key_every=10)
    with RtspServer(units, 25, [Visit(20), Visit()], login="user:geheim") as server:
        sources = [server.url("user:geheim"), "clip.mp4"]
        with _started(tmp_path, *sources, "--model", static_onnx, "--out", "out") as process:
            while process.poll() is None and server.played < 2:
                time.sleep(0.02)
            _wait_for_lines(process, tmp_path, 26, "rtsp:")
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    told = [re.sub(r" \(.*\)| after .*", "", line.partition("camera: ")[2]) for line in errors.splitlines()]
    assert told == ["lost; connecting again", "connected again"]
    assert "geheim" not in output + errors
    camera = re.search(r"rtsp://.*: (\d+) decoded, (\d+) detected, (\d+) dropped, 1 reconnects", output)
    assert camera, output
    assert "clip.mp4: 12 decoded, 12 detected, 0 dropped, 0 reconnects" in output
    records = [record for record in _lines(tmp_path / "o.json") if record["source"].startswith("rtsp://")]
    assert "geheim" not in (tmp_path / "o.json").read_text()
    assert len(records) == int(camera[2])
    assert all(len(record["faces"]) == 1 for record in records if not record["truncated"])
    for key in ("frame", "time_s"):
        values = [record[key] for record in records]
        assert values == sorted(set(values))
    (drawn,) = (path for path in (tmp_path / "out").iterdir() if path.name != "clip.mp4")
    assert len(_times(drawn)) == len(records)


def test_passwords_are_not_shown(refused: Callable[..., str], static_onnx: Path) -> None:
    line = refused("trt_runtime.detect", "rtsp://user:geheim@127.0.0.1:1/x", "--model", static_onnx, "--json", "-")
    assert "127.0.0.1:1" in line
    assert "geheim" not in line


def test_an_interrupted_video_is_playable(long_video: Path, dynamic_onnx: Path, tmp_path: Path) -> None:
    with _started(tmp_path, long_video, "--model", dynamic_onnx, *SMALL, "--out", "o.mp4") as process:
        _wait_for_lines(process, tmp_path, 20)
        assert not (tmp_path / "o.mp4").exists()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted: everything up to here was written" in output
    assert "Traceback" not in errors
    with VideoFile(tmp_path / "o.mp4") as drawn:
        count = sum(1 for _ in drawn)
    assert 0 < count < LONG
    assert abs(len(_lines(tmp_path / "o.json")) - count) <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.jpg"], "none.jpg: no such file or folder"),
        (["*.bmp"], "no image matches"),
        (["empty"], "no images in this folder"),
        (["97"], "camera 97"),
        (["ftp://host/clip.mp4"], "ftp://host/clip.mp4"),
        (["photos/astronaut.png", "--score", "0.001"], "below the model's floor"),
        (["photos/astronaut.png", "--score", "nan"], "score threshold"),
        (["photos/astronaut.png", "--size", "640x640"], "takes 320x320 only"),
        (["photos/astronaut.png", "--size", "big"], "HEIGHTxWIDTH"),
        (["photos/astronaut.png", "--threads", "0"], "threads"),
        (["photos/astronaut.png", "--out", "photos/astronaut.png"], "is a file that is read"),
        (["photos/astronaut.png", "--out", "out.mp4"], "for one image"),
        (["photos", "--out", "out.jpg"], "give a folder"),
        (["photos", "--out", "photos"], "lies in the source folder"),
        (["clip.mp4", "--out", "out.jpg"], "video is written as"),
        (["clip.mp4", "--out", "clip.mp4"], "is a file that is read"),
        (["clip.mp4", "clip.mp4"], "clip.mp4 is given more than once"),
        (["clip.mp4", "text.mp4", "--out", "out.mp4"], "for several videos give a folder"),
        (["clip.mp4", "text.mp4", "--out", "."], "is a file that is read"),
        (["clip.mp4", "--stride", "0"], "stride must be"),
        (["clip.mp4", "--batch", "0"], "batch must be"),
        (["photos/astronaut.png", "--show"], "needs a display"),
        (["photos/astronaut.png", "--model", "none.onnx"], "no such model file"),
        (["photos/astronaut.png", "--model", "clip.mp4"], "expected a .onnx"),
        (["text.jpg"], "not a JPEG"),
        (["text.mp4"], "not a video"),
        ([], "required: source"),
    ],
)
def test_wrong_use_ends_in_one_line_and_writes_nothing(
    arguments: list[str], words: str, refused: Callable[..., str], photos: Path, video: Path, static_onnx: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    for name in ("text.jpg", "text.mp4"):
        (tmp_path / name).write_text("this is text")
    before = sorted(tmp_path.rglob("*"))
    model = [] if "--model" in arguments else ["--model", static_onnx]
    environment = {"DISPLAY": "", "WAYLAND_DISPLAY": ""}
    assert words in refused("trt_runtime.detect", *arguments, *model, "--json", "faces.json", env=environment)
    assert sorted(tmp_path.rglob("*")) == before


def test_every_kind_of_image_gives_the_face(static_onnx: Path, tmp_path: Path, astronaut: Frame) -> None:
    """Grey, CMYK, RGBA, 16-bit and turned by EXIF: the face is found where a viewer shows it."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    rgb = Image.fromarray(astronaut[..., ::-1].copy())
    for mode in ("L", "CMYK", "RGBA"):
        rgb.convert(mode).save(folder / f"{mode}.{'png' if mode == 'RGBA' else 'jpg'}", quality=95)
    cv2.imwrite(str(folder / "deep.png"), astronaut.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: viewers turn the picture a quarter clockwise
    rgb.rotate(90, expand=True).save(folder / "turned.jpg", quality=95, exif=exif)
    summary = detect(DetectOptions(str(folder), static_onnx, json=str(tmp_path / "f.json")))
    assert (summary.frames, summary.failures) == (5, [])
    expected = OrtRetinaFace(static_onnx).detect(astronaut).boxes[0]
    for record in _lines(tmp_path / "f.json"):
        (face,) = record["faces"]
        np.testing.assert_allclose(face["box"], expected, atol=6, err_msg=record["source"])


@pytest.mark.parametrize(
    "spelling", ["./photos/astronaut.png", "photos//astronaut.png", "photos/../photos/astronaut.png"]
)
def test_one_image_however_it_is_spelled(spelling: str, inside: Run, photos: Path, static_onnx: Path) -> None:
    result = inside("trt_runtime.detect", spelling, "--model", static_onnx, "--out", "faces.jpg")
    assert result.returncode == 0, result.stderr
    assert (photos.parent / "faces.jpg").is_file()


def test_outputs_never_destroy_what_is_read(
    refused: Callable[..., str], photos: Path, video: Path, static_onnx: Path, tmp_path: Path
) -> None:
    shutil.copy(static_onnx, tmp_path / "m.onnx")
    (tmp_path / "linked.json").symlink_to(video)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    image = "photos/astronaut.png"
    for arguments, words in (
        ([image, "--json", image], "is a file that is read"),
        ([image, "--json", "m.onnx"], "is a file that is read"),
        ([image, "--out", "same.png", "--json", "same.png"], "is the file of --out, too"),
        (["clip.mp4", "--json", "linked.json"], "is a file that is read"),
        (["photos", "--json", "photos/more/hopper.jpg"], "is a file that is read"),
        ([image, "--json", "/dev/null"], "it is a device"),
        ([image, "--json", "photos"], "it is a folder"),
        ([image, "--out", "/proc/x.png"], "/proc/x.png: cannot be written"),
        ([image, "--out", "grey.pgm"], "cannot be written as '.pgm'"),
    ):
        assert words in refused("trt_runtime.detect", *arguments, "--model", "m.onnx")
    assert Path("/dev/null").is_char_device()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_output_of_a_folder_lies_outside_of_it(
    refused: Callable[..., str], photos: Path, static_onnx: Path
) -> None:
    """Inside, it would overwrite photographs below, or be taken for a source by the next run."""
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    for output in ("photos", "photos/more", "photos/new", "./photos/../photos/new"):
        assert "lies in the source folder" in refused(
            "trt_runtime.detect", "photos", "--model", static_onnx, "--out", output
        )
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before


def test_the_weights_beside_a_model_are_not_overwritten(
    refused: Callable[..., str], photos: Path, static_onnx: Path, tmp_path: Path
) -> None:
    onnx.save(onnx.load(static_onnx), tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    before = (tmp_path / "m.data").read_bytes()
    line = ("trt_runtime.detect", photos / "astronaut.png", "--model", "m.onnx", "--json", "m.data")
    assert "is a file that is read" in refused(*line)
    assert (tmp_path / "m.data").read_bytes() == before


def test_loops_of_links_end_in_one_line(
    refused: Callable[..., str], photos: Path, static_onnx: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    line = ("trt_runtime.detect", photos / "astronaut.png", "--model")
    for arguments in ((static_onnx, "--json", "a"), (static_onnx, "--out", "a/x.png"), ("a",)):
        refused(*line, *arguments)


@pytest.mark.parametrize("kind", ["tiff", "pgm", "png"])
def test_damaged_images_end_in_one_line(
    kind: str, refused: Callable[..., str], astronaut: Frame, static_onnx: Path, tmp_path: Path
) -> None:
    """Also where the libraries that decode them have their own word to say."""
    data = cv2.imencode(f".{kind}", astronaut[..., 0] if kind == "pgm" else astronaut)[1].tobytes()
    if kind == "png":  # all chunks are there, one holds too little
        start = data.index(b"IDAT") - 4
        body = data[start + 8 : start + 2008]
        chunk = struct.pack(">I", 2000) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
        data = data[:start] + chunk + data[data.index(b"IEND") - 4 :]
    else:
        data = data[: len(data) // 2]
    (tmp_path / f"x.{kind}").write_bytes(data)
    result = refused("trt_runtime.detect", f"x.{kind}", "--model", static_onnx)
    assert f"x.{kind}" in result


def test_the_end_of_a_container_leaves_nothing_half_written(
    long_video: Path, dynamic_onnx: Path, tmp_path: Path
) -> None:
    with _started(tmp_path, long_video, "--model", dynamic_onnx, *SMALL, "--out", "o.mp4") as process:
        _wait_for_lines(process, tmp_path, 20)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert not list(tmp_path.glob(".*"))
    with VideoFile(tmp_path / "o.mp4") as drawn:
        assert sum(1 for _ in drawn) > 0


def test_a_video_ends_with_the_reader_of_its_lines(video: Path, static_onnx: Path, tmp_path: Path) -> None:
    line = f"{sys.executable} -m trt_runtime.detect clip.mp4 --model {static_onnx} --json - --out o.mp4 | head -c 10"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert len(result.stdout) == 10
    assert not result.stderr
    assert not list(tmp_path.glob("*o.*.mp4"))


def test_closed_streams_and_other_encodings(photos: Path, static_onnx: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "astronaut.png", tmp_path / "日本.png")
    line = f"{sys.executable} -m trt_runtime.detect 日本.png --model {static_onnx} --json f.json"
    for suffix in (">&-", "2>&-", ">&- 2>&-", "--json - | head -c 10"):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"}
        result = subprocess.run(
            f"{line.replace('日本.png', str(photos)) if suffix.startswith('2') else line} {suffix}",
            shell=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
