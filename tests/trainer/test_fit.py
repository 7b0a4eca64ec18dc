"""Training for real, on a few small images: what it leaves behind, what stops it, and that it resumes to the bit."""

from __future__ import annotations

import csv
import dataclasses
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.to_onnx import ExportOptions, export_onnx
from facespec.boxes import iou_matrix
from facespec.errors import ConfigError, DataError, NonFiniteError, OutputError, RetinaFaceError, WeightsError
from facespec.images import read_image, write_image
from facespec.letterbox import Frame
from facespec.spec import ModelSpec
from tests.trainer.conftest import label_lines
from trainer import RetinaFace, load_model, loop
from trainer.checkpoint import load_pretrained, read_training, save_checkpoint, weights_sha256
from trainer.config import TrainConfig, resolve, write_yaml
from trainer.data import open_dataset, synthetic
from trainer.data.batches import Targets
from trainer.data.dataset import Faces
from trainer.distributed import World, has_bf16
from trainer.fit import FLAGS, main, parse_arguments
from trainer.loop import TrainState, fit
from trainer.model import Features, TorchRetinaFace
from trainer.step import Heads, PixelTerm

ROOT = Path(__file__).parents[2]
CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path, list[dict[str, float]]]:
    """The settings, the folder and the history of a run of two epochs of three steps; nobody may change them."""
    run = tmp_path_factory.mktemp("trained") / "run"
    settings = {"data.source": str(images), "data.size": 160, "data.batch": 4, "schedule.epochs": 2}
    config = resolve(settings | {"run.workers": 0, "run.evaluate_every": 0, "run.output": str(run)})
    return config, run, fit(config)


@pytest.fixture(autouse=True)
def few_synthetic_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning the whole synthetic set takes seconds."""
    monkeypatch.setattr(synthetic, "IMAGES", {"train": 40, "val": 8})


def _not_started(config: TrainConfig) -> Path:
    """Leave the checkpoint of a run that has not taken a step yet; return its path."""
    dataset = open_dataset(config.data.source, "train")
    config = dataclasses.replace(config, precision="bf16" if has_bf16(CPU.device) else "fp32")
    last = Path(config.run.output) / "last.pth"
    TrainState.start(config, CPU, None, None, None).save(last, config, dataset.names())  # type: ignore[arg-type]
    return last


def _rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_run_leaves_logs_and_checkpoints_that_evaluate(
    trained: tuple[TrainConfig, Path, list[dict[str, float]]],
) -> None:
    config, run, history = trained
    steps, epochs = _rows(run / "steps.csv"), _rows(run / "epochs.csv")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in steps] == [1, 1, 1, 2, 2, 2]
    assert [row["lr"] for row in steps][:4] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
    for row in steps:
        parts = row["classification"] + 2 * row["box"] + row["landmark"]
        assert row["total"] == pytest.approx(parts, rel=1e-6)
        assert row["positives"] > 0 < row["grad_norm"]
        assert 0 < row["landmark_positives"] <= row["positives"]
    for epoch, row in enumerate(epochs):
        of_epoch = steps[3 * epoch : 3 * epoch + 3]
        for name in ("total", "box", "positives", "grad_norm"):
            assert row[name] == pytest.approx(sum(step[name] for step in of_epoch) / 3)
            assert row[name] == pytest.approx(history[epoch][name])
        assert row["seconds"] > 0
    assert "ap" not in epochs[0]
    assert epochs[1]["ap"] == pytest.approx(history[1]["ap"])
    last, best = load_model(run / "last.pth"), load_model(run / "best.pth")
    assert last.spec == best.spec
    average, state = read_training(run / "last.pth")
    assert weights_sha256(average) == last.spec.weights_sha256 != weights_sha256(state["weights"])
    assert (state["step"], state["ema_updates"], state["sums"], state["history"]) == (6, 6, {}, history)
    with pytest.raises(WeightsError, match=r"best\.pth: holds no state of a training run"):
        read_training(run / "best.pth")
    with pytest.raises(OutputError, match="holds a run already: --resume auto"):
        fit(config)
    assert (run / "config.yaml").read_text().startswith("recipe: default\nseed: 0\n")
    assert sorted(path.name for path in run.iterdir()) == [
        *("best.pth", "config.yaml", "curves.png", "epochs.csv", "last.pth", "steps.csv", "tensorboard"),
    ]


@pytest.mark.slow
def test_a_checkpoint_exports(trained: tuple[TrainConfig, Path, list[dict[str, float]]], tmp_path: Path) -> None:
    options = ExportOptions(str(trained[1] / "last.pth"), tmp_path / "m.onnx", (64, 64))
    export_onnx(options)
    assert options.out.stat().st_size > 1_000_000


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as the processes of the test have: the order of additions depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_training_that_is_killed_resumes_to_the_bit(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at any moment, SIGTERM, and --resume auto: logs and weights of a run that nobody disturbed."""
    monkeypatch.chdir(tmp_path)
    line = f"--data {images} --size 128 --batch 4 --epochs 5 --workers 1 --checkpoint-every 2".split()
    line += ["--set", "run.evaluate_every=2", "--precision", "fp32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def ignore_hangups() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def start(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "trainer.fit", *line, "--out", "killed", *more]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=ignore_hangups,
        )  # fmt: skip

    def rows() -> int:
        log = tmp_path / "killed" / "steps.csv"
        return log.read_text().count("\n") - 1 if log.exists() else 0

    def wait_for(count: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 90
        while rows() < count:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.002)

    process = start()
    wait_for(2, process)
    time.sleep(random.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    process = start("--resume", "auto")
    wait_for(5, process)
    process.send_signal(signal.SIGHUP)  # nohup's
    wait_for(rows() + 1, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "stopped after step" in output
    stopped = read_training(tmp_path / "killed" / "last.pth")[1]["step"]
    assert f"stopped after step {stopped}:" in output
    assert rows() == stopped
    assert main([*line, "--out", "killed", "--resume", "auto"]) == 0
    assert f"resumed after step {stopped} of 15" in capsys.readouterr().out
    assert main([*line, "--out", "whole", "--workers", "0"]) == 0
    assert (tmp_path / "killed" / "steps.csv").read_bytes() == (tmp_path / "whole" / "steps.csv").read_bytes()
    assert len(_rows(tmp_path / "whole" / "steps.csv")) == 15
    for name in ("last.pth", "best.pth"):
        one, other = (load_model(tmp_path / run / name).spec.weights_sha256 for run in ("whole", "killed"))
        assert one == other
    one, other = (_rows(tmp_path / run / "epochs.csv") for run in ("whole", "killed"))
    assert ["ap" in row for row in one] == [False, True, False, True, True]
    for row in (*one, *other):
        del row["seconds"]
    assert one == other
    raw = [read_training(tmp_path / run / "last.pth")[1] for run in ("whole", "killed")]
    assert weights_sha256(raw[0]["weights"]) == weights_sha256(raw[1]["weights"])


def test_a_run_that_changes_is_not_resumed(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    last = _not_started(config(schedule__epochs=1, schedule__warmup_epochs=0.0))
    with pytest.raises(
        RetinaFaceError, match=r"another optimizer\.lr \(0\.01 -> 0\.5\), schedule\.epochs \(1 -> 3\): leave"
    ):
        fit(config(schedule__epochs=3, schedule__warmup_epochs=0.0, optimizer__lr=0.5), resume=last)
    assert len(fit(config(schedule__epochs=1, schedule__warmup_epochs=0.0, run__workers=1), resume=last)) == 1


def test_a_run_that_is_over_is_over(
    trained: tuple[TrainConfig, Path, list[dict[str, float]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed, it takes no step and says what there was; what is not said again holds on."""
    shutil.copytree(trained[1], tmp_path / "run")
    before = (tmp_path / "run" / "steps.csv").read_bytes()
    assert main(["--resume", str(tmp_path / "run" / "last.pth"), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "resumed after step 6 of 6" in said
    assert "2 epochs of 3 steps of 4 images of 160x160" in said
    assert "mobilenet0.25 on cpu in " in said
    assert "measured: AP at IoU 0.5 over the labels of 4 images" in said
    assert "12 images (" in said
    best, last = (tmp_path / "run" / name for name in ("best.pth", "last.pth"))
    assert said.splitlines()[-1] == f"wrote {best}, {last}; next: python -m export.to_onnx --weights {best}"
    assert (tmp_path / "run" / "steps.csv").read_bytes() == before
    assert read_training(tmp_path / "run" / "last.pth")[1]["history"] == trained[2]


def test_a_finished_run_is_extended(
    trained: tuple[TrainConfig, Path, list[dict[str, float]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    assert main(["--resume", str(run / "last.pth"), "--out", str(run), "--epochs", "3"]) == 0
    said = capsys.readouterr().out
    # 0.01 * (1 + cos(0.6 pi)) / 2: step 3 of the 5 behind the warm-up
    assert "the run was finished: 1 more epoch, from a learning rate of 0.0035" in said
    _, state = read_training(run / "last.pth")
    assert (state["step"], len(state["history"])) == (9, 3)
    assert state["history"][:2] == trained[2]
    assert [row["epoch"] for row in _rows(run / "epochs.csv")] == [1, 2, 3]
    picture = read_image(run / "curves.png")
    assert min(picture.shape[:2]) > 300
    for epochs in ("2", "1"):
        with pytest.raises(ConfigError, match=r"cannot be resumed with another schedule\.epochs"):
            main(["--resume", str(run / "last.pth"), "--out", str(run), "--epochs", epochs])


def test_an_unfinished_run_keeps_its_length(config: Callable[..., TrainConfig]) -> None:
    settings = config(schedule__epochs=2)
    last = _not_started(settings)
    with pytest.raises(ConfigError, match=r"of a finished run --epochs may grow"):
        fit(config(schedule__epochs=3), resume=last)


def test_the_settings_are_listed_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(" = ", 1) for line in lines[::2])
    assert listed == {name: str(value) for name, value in _settings(TrainConfig()).items()}
    assert all(len(line.split()) >= 2 for line in lines[1::2])
    assert "    Highest learning rate." in lines


def test_an_epoch_that_was_stopped_while_it_was_measured_is_finished(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    settings = config(schedule__epochs=1)
    last = _not_started(settings)
    content = torch.load(last, weights_only=True)
    content["training"] |= {"step": 3, "sums": dict.fromkeys(loop.REPORTED, 6.0)}
    torch.save(content, last)
    (row,) = fit(settings, resume=last)
    assert {name: row[name] for name in loop.REPORTED} == dict.fromkeys(loop.REPORTED, 2.0)
    assert "ap" in row
    assert len(_rows(tmp_path / "run" / "epochs.csv")) == 1
    assert read_training(last)[1]["history"] == [row]


def test_a_run_is_not_resumed_on_other_images_or_over_another_run(
    config: Callable[..., TrainConfig], images: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(images, own)
    last = _not_started(config(data__source=str(own)))
    (own / "train" / "images" / "3.png").unlink()
    with pytest.raises(ConfigError, match="was trained on other images"):
        fit(config(data__source=str(own)), resume=last)
    _not_started(config(run__output=str(tmp_path / "second")))
    with pytest.raises(OutputError, match="second holds a run already"):
        fit(config(run__output=str(tmp_path / "second")), resume=last)


def test_a_loss_that_is_not_finite_names_step_and_images(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step \d+: the (loss|gradient) is not finite.*images/\d+\.png") as caught:
        fit(config(optimizer__lr=1e18, optimizer__clip_norm=0.0, run__checkpoint_every=1, schedule__warmup_epochs=0.0))
    message = str(caught.value)
    step = int(re.findall(r"step (\d+)", message)[0])
    assert step > 1
    assert len(set(re.findall(r"images/\d+\.png", message))) == 4
    assert f"last.pth is from step {step - 1}" in message
    assert read_training(tmp_path / "run" / "last.pth")[1]["step"] == step - 1
    assert len(_rows(tmp_path / "run" / "steps.csv")) == step - 1


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    model = load_model()
    save_checkpoint(path, model)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"last\.pth: cannot be written, the disk may be full \(\d+ MiB free\)"):
            save_checkpoint(path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_image_ends_in_one_line(workers: int, config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        write_image(tmp_path / "images" / name, np.full((80, 80, 3), 99, np.uint8))
    (tmp_path / "label.txt").write_text("# 0.png\n10 10 40 40\n# 1.png\n10 10 40 40\n")
    dataset = str(tmp_path / "label.txt")
    (tmp_path / "images" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.png") as caught:
        fit(config(data__source=dataset, data__batch=2, run__workers=workers))
    assert "\n" not in str(caught.value)


WRONG = [
    (["--data", "widerface"], "--data synthetic"),
    (["--data", "nowhere"], "nowhere"),
    (["--data", "synthetic", "--pretrained", "none.pth"], "none.pth: no such weights file"),
    (["--data", "synthetic", "--backbone", "resnet18", "--pretrained", "mobilenet0.25"], "--backbone mobilenet0.25"),
    (["--data", "synthetic", "--batch", "41"], "at most 40, the number of images"),
    (["--set", "loss.pixel_weight=-1"], "pixel_weight must be a number from 0 up to a million"),
    (["--set", "loss.box_weigh=1"], "did you mean loss.box_weight?"),
    (["--set", "loss.box_weight"], "--set loss.box_weight: expected NAME=VALUE"),
    (["--set", "seed=[1"], "--set seed: cannot be read"),
    (["--config", "none.yaml"], "none.yaml: cannot be read"),
    (["--resume", "none.pth"], "none.pth: no such weights file"),
    (["--epochs", "two"], "--epochs"),
    (["--lr", "-1"], "optimizer.lr is -1.0: it must be positive"),
    (["--device", "tpu"], "run.device is 'tpu': choose from auto, cpu, cuda, cuda:N"),
    (["--device", "cuda:x"], "run.device is 'cuda:x': choose from auto, cpu, cuda, cuda:N"),
    (["--data", "synthetic", "--device", "cuda:9"], "run.device is 'cuda:9': "),
    (["--overfit", "-1"], "data.overfit is -1"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_wrong_commands_end_in_one_line(
    arguments: list[str], words: str, refused_here: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WIDERFACE_ROOT", raising=False)
    assert words in refused_here(main, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_command_ends_in_one_line_in_its_own_process(refused: Callable[..., str]) -> None:
    assert "did you mean loss.box_weight?" in refused("trainer.fit", "--set", "loss.box_weigh=1")


@pytest.mark.parametrize("words", ["import trainer", "import trainer.fit", "from trainer.fit import main"])
def test_the_package_has_it_as_a_function(words: str) -> None:
    """Whatever was imported before, and as the module that it also is; torch is imported by the call."""
    code = f"""import sys
{words}
import trainer
from trainer import fit
from facespec.errors import ConfigError
functions = trainer.fit, fit, sys.modules["trainer.fit"]
assert callable(fit.main) and "torch" not in sys.modules
from trainer.config import resolve
for function in functions:
    try:
        function(resolve({{}}), pixel_term="some")
    except ConfigError as error:
        assert "there is a pixel-wise term" in str(error)
        print("called")
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["called"] * 3


def test_flags_are_settings() -> None:
    given = {
        "--recipe": ("recipe", "original", "original"),
        "--data": ("data.source", "synthetic", "synthetic"),
        "--val": ("data.val", "v", "v"),
        "--images": ("data.images", "i", "i"),
        "--category": ("data.category", "c", "c"),
        "--size": ("data.size", "96", 96),
        "--batch": ("data.batch", "3", 3),
        "--overfit": ("data.overfit", "5", 5),
        "--backbone": ("model.backbone", "resnet34", "resnet34"),
        "--pretrained": ("model.pretrained", "p.pth", "p.pth"),
        "--teacher": ("teacher.weights", "t.pth", "t.pth"),
        "--unlabelled": ("teacher.images", "u", "u"),
        "--epochs": ("schedule.epochs", "7", 7),
        "--lr": ("optimizer.lr", "1e-3", 1e-3),
        "--precision": ("precision", "bf16", "bf16"),
        "--seed": ("seed", "11", 11),
        "--out": ("run.output", "o", "o"),
        "--device": ("run.device", "cpu", "cpu"),
        "--workers": ("run.workers", "0", 0),
        "--checkpoint-every": ("run.checkpoint_every", "9", 9),
        "--evaluate-every": ("run.evaluate_every", "0", 0),
    }
    assert given.keys() == FLAGS.keys()
    for flag, (name, text, value) in given.items():
        options = parse_arguments([flag, text])
        assert options.settings == {name: value}, flag
        assert type(options.settings[name]) is type(value)
        resolve({"teacher.weights": "t.pth", **options.settings})
    assert vars(parse_arguments([])) == {
        "settings": {},
        "config": None,
        "resume": None,
        "check_data": False,
        "list_settings": False,
    }
    line = [
        "--compile",
        "--set",
        "loss.box_weight=1.5",
        "--set",
        "data.root=",
        "--set",
        "schedule.milestones=[0.5, 1]",
    ]
    options = parse_arguments([*line, "--config", "c.yaml", "--resume", "auto", "--check-data"])
    assert options.settings == {
        **{"run.compile": True, "loss.box_weight": 1.5, "data.root": None, "schedule.milestones": [0.5, 1]},
    }
    assert (options.config, options.resume, options.check_data) == (Path("c.yaml"), "auto", True)


def test_help_names_every_flag_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    defaults = _settings(TrainConfig())
    for flag, (name, _, text) in FLAGS.items():
        assert f"{flag} " in said
        if defaults[name] is None:
            assert text in said
        else:
            assert f"{text} (default: {defaults[name]})" in said


def test_flags_win_over_the_file_and_a_run_that_is_not_there_is_a_new_one(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[TrainConfig, Path | None]] = []
    monkeypatch.setattr(loop, "fit", lambda config, resume: seen.append((config, resume)))
    (tmp_path / "c.yaml").write_text("seed: 3\ndata: {size: 64}\nrun.output: there\n")
    monkeypatch.chdir(tmp_path)
    line = ["--config", "c.yaml", "--size", "96", "--resume", "auto"]
    assert main(line) == 0
    config, resume = seen.pop()
    assert (config.seed, config.data.size, config.run.output, resume) == (3, 96, "there", None)
    assert capsys.readouterr().out == "nothing to resume in there: a new run\n"
    # what the run was started with holds unless it is said anew; its folder is where it is looked for
    last = Path("there") / "last.pth"
    state = {"data": "", "weights": {}, "pixel_term": {}, "optimizer": {}, "ema_updates": 0, "step": 0, "sums": {}}
    settings = {"seed": 8, "optimizer.lr": 0.5, "run.output": "moved"}
    save_checkpoint(last, load_model(), training={"settings": settings, **state, "history": []})
    main(line)
    config, resume = seen.pop()
    assert (config.seed, config.data.size, config.optimizer.lr, config.run.output) == (3, 96, 0.5, "there")
    assert resume == last
    assert capsys.readouterr().out == ""
    main(["--resume", str(last)])
    config, resume = seen.pop()
    assert (config.seed, config.run.output, resume) == (8, "moved", last)
    main(["--seed", "1"])
    assert seen.pop() == (resolve({"seed": 1}), None)
    for spoilt, words in (
        ({"settings": 3, "history": []}, "settings is 3: expected an object"),
        ({}, "missing fields"),
    ):
        save_checkpoint(last, load_model(), training={**state, **spoilt})
        with pytest.raises(WeightsError, match=f"{last}: holds no state of a training run to resume .*{words}"):
            main(["--resume", str(last)])


def test_a_run_is_written_down_so_that_it_can_be_run_again(
    trained: tuple[TrainConfig, Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    """auto has become what it stood for: resumed on another machine the run stays the same."""
    text = (trained[1] / "config.yaml").read_text()
    precision = re.findall(r"^precision: (\w+)$", text, re.MULTILINE)
    assert precision in (["fp32"], ["bf16"])
    settled = resolve({**{name: value for name, value in _settings(trained[0]).items()}, "precision": precision[0]})
    write_yaml(tmp_path / "c.yaml", settled)
    assert text == (tmp_path / "c.yaml").read_text()


def _settings(config: TrainConfig) -> dict[str, object]:
    from trainer.config import to_settings

    return to_settings(config)


@pytest.mark.data
def test_imagenet_weights_fill_the_backbone_and_nothing_else(weights_dir: Path, tmp_path: Path) -> None:
    path = weights_dir / "mobilenetV1X0.25_pretrain.tar"
    model = RetinaFace(ModelSpec())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_pretrained(model, path)
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    for key, value in model.state_dict().items():
        expected = state[f"module.{key.removeprefix('body.')}"] if key.startswith("body.") else before[key]
        assert torch.equal(value, expected), key
    with pytest.raises(WeightsError, match=r"not ImageNet weights of mobilenet0\.5: has other shapes"):
        load_pretrained(RetinaFace(ModelSpec("mobilenet0.5", 128)), path)
    for change, words in (
        ({"module.extra": torch.zeros(1)}, "unknown 1 keys, for instance extra"),
        ({}, "lacks 1 keys"),
    ):
        other = {**state, **change}
        if not change:
            del other["module.stage2.0.0.weight"]
        torch.save(other, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=words):
            load_pretrained(model, tmp_path / "w.pth")


def test_fine_tuning_starts_where_the_weights_are_and_keeps_their_statistics(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """From AP 90 on, by the statistics that were measured for it; only scale and shift are learned."""
    settings = config(recipe="finetune", schedule__epochs=1, run__evaluate_every=1)
    history = fit(settings)
    assert history[0]["ap"] > 90
    before, after = _rows(tmp_path / "run" / "epochs.csv")
    assert (before["epoch"], after["epoch"]) == (0, 1)
    assert before["ap"] > 90
    assert "total" not in before
    weights = read_training(tmp_path / "run" / "last.pth")[1]["weights"]
    start = TrainState.start(
        settings, CPU, loop._open_data(settings, CPU).samples, None, settings.model.pretrained
    ).model.state_dict()
    kept = [name for name in start if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(kept) > 60
    assert all(torch.equal(weights[name], start[name]) for name in kept)
    scales = [name.replace("running_mean", "weight") for name in kept if name.endswith("running_mean")]
    assert np.mean([not torch.equal(weights[name], start[name]) for name in scales]) > 0.5
    moving = str(tmp_path / "moving")
    fit(
        config(
            recipe="finetune", schedule__epochs=1, data__batch=12, model__freeze_batch_norm=False, run__output=moving
        )
    )
    weights = read_training(tmp_path / "moving" / "last.pth")[1]["weights"]
    assert not any(torch.equal(weights[name], start[name]) for name in kept)


def _learn_by_heart(root: Path, photographs: dict[str, Frame]) -> list[tuple[Frame, Faces]]:
    """Write two photographs of 64x64 pixels, each with a face in another place; return them with their faces."""
    detector = TorchRetinaFace(load_model())
    lines, samples = [], []
    for index, image in enumerate(photographs.values()):
        found = detector.detect(image)
        x1, y1, x2, y2 = found.boxes[0].tolist()
        scale = 32 / (1.2 * max(x2 - x1, y2 - y1))
        move = np.array(
            [[scale, 0, 32 + 8 * index - (x1 + x2) / 2 * scale], [0, scale, 32 - (y1 + y2) / 2 * scale]], np.float32
        )
        view = np.asarray(cv2.warpAffine(image, move, (64, 64), flags=cv2.INTER_AREA), np.uint8)
        corners = found.boxes[:1].reshape(1, 2, 2) @ move[:, :2].T + move[:, 2]
        points = found.landmarks[:1] @ move[:, :2].T + move[:, 2]
        faces = Faces(corners.reshape(1, 4), points, np.ones(1, bool))
        write_image(root / "train" / "images" / f"{index}.png", view)
        lines += [f"# {index}.png", *label_lines(faces)]
        samples.append((view, faces))
    (root / "train" / "label.txt").write_text("\n".join(lines))
    return samples


@pytest.mark.slow
def test_a_few_images_are_learned_by_heart(photographs: dict[str, Frame], tmp_path: Path) -> None:
    """From random weights, in a hundred steps: boxes and landmarks are where they were labelled, and nowhere else."""
    samples = _learn_by_heart(tmp_path / "set", photographs)
    settings = {"data.source": str(tmp_path / "set"), "data.overfit": 2, "data.size": 64, "schedule.epochs": 1}
    history = fit(resolve(settings | {"run.workers": 0, "run.output": str(tmp_path / "run")}))
    assert history[-1]["ap"] > 95
    steps = _rows(tmp_path / "run" / "steps.csv")
    assert len(steps) == 100
    assert steps[-1]["total"] < 1 < 20 < steps[0]["total"]
    detector = TorchRetinaFace(load_model(tmp_path / "run" / "last.pth"))
    for image, faces in samples:
        found = detector.detect(image)
        assert len(found) == 1
        assert iou_matrix(faces.boxes, found.boxes)[0, 0] > 0.85
        assert np.abs(found.landmarks - faces.landmarks).max() < 2


class Brightness(PixelTerm):
    """A term for tests: the finest features tell how bright their part of the image is."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = nn.Conv2d(64, 1, 1)

    def forward(self, features: Features, heads: Heads, images: Tensor, targets: Targets) -> Tensor:
        assert [f.shape[-1] * stride for f, stride in zip(features, (8, 16, 32), strict=True)] == [images.shape[-1]] * 3
        assert heads[0].shape[0] == len(targets.valid) == len(images)
        brightness = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8) / 128
        return nn.functional.mse_loss(self.decode(features[0]).float(), brightness)


def test_a_pixel_wise_term_is_trained_resumed_and_not_exported(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    term = Brightness()
    start = term.decode.weight.detach().clone()
    settings = config(loss__pixel_weight=0.5)
    fit(settings, pixel_term=term)
    rows = _rows(tmp_path / "run" / "steps.csv")
    assert all(row["pixel"] > 0 for row in rows)
    last = tmp_path / "run" / "last.pth"
    assert not torch.equal(term.decode.weight, start)
    average, training = read_training(last)
    assert torch.equal(training["pixel_term"]["decode.weight"], term.decode.weight)
    assert not [key for key in average if "decode" in key]
    assert load_model(last).spec.backbone == "mobilenet0.25"
    other = Brightness()
    fit(settings, pixel_term=other, resume=last)
    assert torch.equal(other.decode.weight, term.decode.weight)


def test_the_example_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "OVERFIT_STEPS", 3)
    exec(compile(example, "docs/training.md", "exec"), {"__name__": "example"})
    assert load_model(tmp_path / "runs" / "bright" / "last.pth")
    assert len(_rows(tmp_path / "runs" / "bright" / "steps.csv")) == 3


def test_check_data_draws_a_picture(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    shutil.copytree(images, own)
    line = ["--data", str(own), "--check-data", "--size", "64"]
    assert main([*line, "--out", "seen"]) == 0
    said = capsys.readouterr()
    assert "12 images (" in said.out
    assert said.out.splitlines()[0].startswith(f"{own}: 12 images")
    assert said.out.endswith(f"some of it, as it is trained: {Path('seen') / 'data.png'}\n")
    assert not said.err
    picture = read_image(tmp_path / "seen" / "data.png")
    # size, seed and augmentation are those of the training
    main([*line, "--out", "again"])
    assert (read_image(tmp_path / "again" / "data.png") == picture).all()
    for index, other in enumerate((["--seed", "4"], ["--size", "32"], ["--set", "augment.flip=1"])):
        main([*line, *other, "--out", str(index)])
        assert (read_image(tmp_path / str(index) / "data.png") != picture).any(), other
    # training would refuse an image that cannot be read
    (own / "train" / "images" / "2.png").write_bytes(b"damaged")
    capsys.readouterr()
    assert main([*line, "--out", "seen"]) == 1
    assert "2.png" in capsys.readouterr().out.splitlines()[0]
    assert main([*line, "--out", "seen", "--set", "data.skip_damaged=true"]) == 0


def test_a_damaged_image_is_found_before_the_first_step(
    images: Path, config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be left out, in the middle of a run too, and the other images keep their places."""
    own = tmp_path / "own"
    shutil.copytree(images, own)
    damaged = own / "train" / "images" / "2.png"
    settings = config(data__source=str(own), schedule__epochs=1)
    last = _not_started(settings)  # all images were sound then
    damaged.write_bytes(damaged.read_bytes()[:-100])
    told = "1 of 12 images cannot be read, the first: .*2.png.*--check-data .*--set data.skip_damaged=true"
    with pytest.raises(DataError, match=told):
        fit(settings, resume=last)
    skipping = dataclasses.replace(settings, data=dataclasses.replace(settings.data, skip_damaged=True))
    assert len(fit(skipping, resume=last)) == 1
    assert "left out: 1 of 12 images, which cannot be read, the first: " in capsys.readouterr().out
    _, training = read_training(last)
    assert len(training["data"].splitlines()) == 12
    # it is gone, and its label with it
    damaged.unlink()
    label = own / "train" / "label.txt"
    label.write_text(re.sub(r"# 2\.png\n[^#]*", "", label.read_text()))
    last.unlink()
    last = _not_started(settings)
    assert len(read_training(last)[1]["data"].splitlines()) == 11
    content = torch.load(last, weights_only=True)
    content["training"]["data"] = training["data"]  # as it was when the run began
    torch.save(content, last)
    with pytest.raises(ConfigError, match=r"\(12, now 11; for instance images/2\.png\).*data\.skip_damaged=true"):
        fit(settings, resume=last)
    assert len(fit(skipping, resume=last)) == 1
    assert "left out: 1 of 12 images" in capsys.readouterr().out
    # what is measured on is read, too
    (own / "val" / "images" / "1.png").write_bytes(b"")
    last.unlink()
    with pytest.raises(DataError, match=r"1 of 4 images cannot be read, the first: .*1\.png"):
        fit(settings)
    assert fit(skipping)[0]["ap"] >= 0
    assert "left out: 1 of 4 images" in capsys.readouterr().out
