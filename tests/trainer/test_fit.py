"""Training for real, on a few small images: what it leaves behind, what stops it, and that it resumes to the bit."""

from __future__ import annotations

import csv
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.to_onnx import ExportOptions, export_onnx
from facespec.errors import ConfigError, DataError, NonFiniteError, OutputError, RetinaFaceError, WeightsError
from facespec.images import write_image
from facespec.letterbox import Frame, Letterbox
from facespec.spec import DecodeSpec, ModelSpec
from trainer import RetinaFace, load_model
from trainer.backbones import Features
from trainer.batches import Order, explain_dead_workers, place_faces, read_batches
from trainer.checkpoint import load_pretrained, read_training, save_checkpoint, weights_sha256
from trainer.config import ScheduleConfig, Settings, TrainConfig, resolve
from trainer.data import open_dataset
from trainer.distributed import World
from trainer.engine import Ema, Heads, PixelTerm, lr_factor, make_optimizer
from trainer.folding import is_folded, unfold
from trainer.records import CsvLog
from trainer.targets import Faces, Targets
from trainer.training import fit

ROOT = Path(__file__).parents[2]
CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small labelled images to train on and four to evaluate on, in a folder like WIDER FACE's."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("val", 4)):
        lines = []
        for index, sample in enumerate(open_dataset("synthetic", split).samples[:count]):
            image, faces = sample.load()
            box = Letterbox.fit((image.shape[0], image.shape[1]), (160, 160))
            faces = place_faces(faces, box)
            write_image(root / split / "images" / f"{index}.png", box.apply(image, (104, 117, 123)))
            lines.append(f"# {index}.png")
            for xyxy, points, known in zip(faces.boxes, faces.landmarks, faces.has_landmarks, strict=True):
                values = [*xyxy[:2], *(xyxy[2:] - xyxy[:2])]
                values += [number for point in points for number in (*point, 0.0)] if known else []
                lines.append(" ".join(f"{value:.3f}" for value in values))
        (root / split / "label.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def config(images: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of six steps that takes a second or two."""

    def make(**changes: object) -> TrainConfig:
        settings: Settings = {
            "data.source": str(images),
            "data.size": 160,
            "data.batch": 4,
            "schedule.epochs": 2,
            "run.workers": 0,
            "run.evaluate_every": 0,
            "run.output": str(tmp_path / "run"),
        }
        return resolve(settings | {name.replace("__", "."): value for name, value in changes.items()})

    return make


def _rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_run_leaves_logs_and_checkpoints_that_export_and_evaluate(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    history = fit(config())
    run = tmp_path / "run"
    steps, epochs = _rows(run / "steps.csv"), _rows(run / "epochs.csv")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in steps] == [1, 1, 1, 2, 2, 2]
    for row in steps:
        parts = row["classification"] + 2 * row["box"] + row["landmark"]
        assert row["total"] == pytest.approx(parts, rel=1e-6)
        assert row["positives"] > 0 < row["grad_norm"]
    for epoch, row in enumerate(epochs):
        of_epoch = steps[3 * epoch : 3 * epoch + 3]
        assert row["total"] == pytest.approx(sum(step["total"] for step in of_epoch) / 3)
    assert "ap" not in epochs[0]
    assert epochs[1]["ap"] == pytest.approx(history[1]["ap"])
    last, best = load_model(run / "last.pth"), load_model(run / "best.pth")
    assert last.spec == best.spec
    average, training = read_training(run / "last.pth")
    assert weights_sha256(average) == last.spec.weights_sha256 != weights_sha256(training["weights"])
    with pytest.raises(WeightsError, match=r"best\.pth: holds no state of a training run"):
        read_training(run / "best.pth")
    with pytest.raises(OutputError, match="holds a run already: --resume auto"):
        fit(config())


@pytest.mark.slow
def test_a_checkpoint_exports(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    fit(config(schedule__epochs=1))
    options = ExportOptions(str(tmp_path / "run" / "last.pth"), tmp_path / "m.onnx", (64, 64), DecodeSpec())
    export_onnx(options)
    assert options.out.stat().st_size > 1_000_000


def test_learning_rates() -> None:
    cosine = ScheduleConfig(epochs=4, warmup_epochs=0.5, final=0.1)
    rates = [lr_factor(step, 10, cosine) for step in range(40)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[22] == pytest.approx(0.55)
    assert rates[39] == pytest.approx(0.1)
    assert sorted(rates[5:], reverse=True) == rates[5:]
    original = resolve({"recipe": "original"}).schedule
    steps = [lr_factor(step, 7, original) for step in range(700)]
    assert steps == pytest.approx([1.0] * 490 + [0.1] * 140 + [0.01] * 70)


def test_the_average_of_weights_is_what_a_hand_computes() -> None:
    model = nn.BatchNorm1d(1)
    ema = Ema(model, 0.2)
    values = [(1.0, 0.0)]
    for step in range(3):
        nn.init.constant_(model.weight, 10.0 * step)
        model.running_mean.fill_(step)  # type: ignore[union-attr, operator]
        model.num_batches_tracked.fill_(step)  # type: ignore[union-attr, operator]
        ema.update(model)
        decay = min(0.2, (1 + step) / (10 + step))
        values.append((decay * values[-1][0] + (1 - decay) * 10.0 * step, decay * values[-1][1] + (1 - decay) * step))
    assert ema.model.weight.item() == pytest.approx(values[-1][0])  # type: ignore[union-attr, operator]
    assert ema.model.running_mean.item() == pytest.approx(values[-1][1])  # type: ignore[union-attr, operator]
    assert ema.model.num_batches_tracked == 2
    assert not ema.model.training


def test_weight_decay_spares_vectors() -> None:
    settings = resolve({}).optimizer
    model = RetinaFace(ModelSpec())
    decayed, spared = make_optimizer(model, settings).param_groups
    assert {p.ndim for p in decayed["params"]} == {4}
    assert {p.ndim for p in spared["params"]} == {1}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0)
    (everything,) = make_optimizer(model, resolve({"recipe": "original"}).optimizer).param_groups
    assert len(everything["params"]) == len(list(model.parameters()))


def test_every_image_once_an_epoch_and_from_any_step_on() -> None:
    order = Order(count=10, batch=4, seed=3)
    steps = list(order.steps(0, 6))
    for epoch in range(3):
        seen = steps[2 * epoch] + steps[2 * epoch + 1]
        assert len(set(seen)) == 8
        assert all(index // 10 == epoch for index in seen)
    assert steps[0] != [index - 10 for index in steps[2]]
    for first in range(6):
        assert list(order.steps(first, 6)) == steps[first:]
    halves = [order.images(3, World(CPU.device, rank, 2)) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(index % 10 for index in steps[3])


def test_training_that_is_killed_resumes_to_the_bit(images: Path, tmp_path: Path) -> None:
    """SIGKILL at any moment, SIGTERM, and --resume auto: logs and weights of a run that nobody disturbed."""
    line = [
        sys.executable,
        "-m",
        "trainer.fit",
        "--data",
        str(images),
        "--size",
        "160",
        "--batch",
        "4",
        "--epochs",
        "5",
    ]
    line += ["--workers", "1", "--checkpoint-every", "2", "--set", "run.evaluate_every=2", "--precision", "fp32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(name: str, *more: str) -> subprocess.Popen[str]:
        command = [*line, "--output", name, *more]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def stop_at(process: subprocess.Popen[str], rows: int, number: int) -> str:
        log, deadline = tmp_path / "killed" / "steps.csv", time.monotonic() + 60
        while not log.exists() or log.read_text().count("\n") <= rows:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.random() * 0.1)
        process.send_signal(number)
        return process.communicate(timeout=60)[0]

    whole = start("whole")
    stop_at(start("killed"), 3, signal.SIGKILL)
    output = stop_at(start("killed", "--resume", "auto"), 6, signal.SIGTERM)
    assert "stopped after step" in output
    resumed = start("killed", "--resume", "auto")
    output = resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, output
    assert "resumed after step" in output
    assert whole.wait(timeout=120) == 0
    assert (tmp_path / "killed" / "steps.csv").read_bytes() == (tmp_path / "whole" / "steps.csv").read_bytes()
    assert len(_rows(tmp_path / "whole" / "steps.csv")) == 15
    for name in ("last.pth", "best.pth"):
        one, other = (load_model(tmp_path / run / name).spec.weights_sha256 for run in ("whole", "killed"))
        assert one == other
    one, other = (_rows(tmp_path / run / "epochs.csv") for run in ("whole", "killed"))
    for row in (*one, *other):
        del row["seconds"]
    assert one == other
    raw = [read_training(tmp_path / run / "last.pth")[1] for run in ("whole", "killed")]
    assert weights_sha256(raw[0]["weights"]) == weights_sha256(raw[1]["weights"])


def test_a_run_that_changes_is_not_resumed(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    fit(config(schedule__epochs=1, schedule__warmup_epochs=0.0))
    last = tmp_path / "run" / "last.pth"
    with pytest.raises(
        RetinaFaceError, match=r"another optimizer\.lr \(0\.01 -> 0\.5\), schedule\.epochs \(1 -> 3\): leave"
    ):
        fit(config(schedule__epochs=3, schedule__warmup_epochs=0.0, optimizer__lr=0.5), resume=last)
    assert len(fit(config(schedule__epochs=1, schedule__warmup_epochs=0.0, run__workers=1), resume=last)) == 1


def test_a_run_is_not_resumed_on_other_images_or_over_another_run(
    config: Callable[..., TrainConfig], images: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(images, own)
    fit(config(data__source=str(own)))
    last = tmp_path / "run" / "last.pth"
    (own / "train" / "images" / "3.png").unlink()
    with pytest.raises(ConfigError, match="was trained on other images"):
        fit(config(data__source=str(own)), resume=last)
    fit(config(run__output=str(tmp_path / "second")))
    with pytest.raises(OutputError, match="second holds a run already"):
        fit(config(run__output=str(tmp_path / "second")), resume=last)


def test_logs_of_a_resumed_run_keep_their_columns_and_lose_what_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "epochs.csv"
    path.write_bytes(b"epoch,total,seconds\n1,5.5,7\n\n2,4.5,7\nx,1,1\n3,\0\0\0\0\n\xff\n4,1,1\n5,0.")
    log = CsvLog(path, ["epoch", "total", "ap", "seconds"], last=3)
    log.add({"epoch": 3, "total": 2.5, "ap": 0.25})
    log.close()
    assert path.read_text().splitlines() == ["epoch,total,ap,seconds", "1,5.5,,7", "2,4.5,,7", "3,2.5,0.25,"]


def test_what_nohup_ignores_stays_ignored(images: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(images), "--size", "160", "--batch", "4", "--epochs", "60", "--workers", "0"]
    command = [
        sys.executable,
        "-m",
        "trainer.fit",
        *arguments,
        "--evaluate-every",
        "0",
        "--output",
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    run = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        preexec_fn=ignore,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    steps = tmp_path / "run" / "steps.csv"
    _wait_for(lambda: steps.is_file() and len(steps.read_text().splitlines()) > 2, run)
    run.send_signal(signal.SIGHUP)
    before = len(steps.read_text().splitlines())
    _wait_for(lambda: len(steps.read_text().splitlines()) > before + 3, run)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "stopped after step" in said


def _wait_for(happened: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while not happened():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)


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


class _Murder:
    """Samples that kill the process which reads them."""

    def __getitem__(self, index: int) -> tuple[Frame, Faces]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_reader_is_named() -> None:
    batches = read_batches(_Murder(), Order(4, 2, 0), CPU, 1, 0, 2)
    with (
        pytest.raises(DataError, match=r"DataLoader worker.*has died.*fewer --workers \(0 reads in"),
        explain_dead_workers(),
    ):
        next(iter(batches))


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data-root", "."], "--data synthetic"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "synthetic", "--pretrained", "none.pth"], "none.pth: no such weights file"),
        (
            ["--data", "synthetic", "--backbone", "resnet18", "--pretrained", "mobilenet0.25"],
            "--backbone mobilenet0.25",
        ),
        (["--data", "synthetic", "--batch", "2000"], "at most 1000, the number of images"),
        (["--set", "loss.pixel_weight=1"], "there is no pixel-wise term"),
        (["--set", "loss.box=1"], "did you mean loss.box_weight?"),
        (["--config", "none.yaml"], "none.yaml: cannot be read"),
        (["--resume", "none.pth"], "none.pth: no such weights file"),
    ],
)
def test_wrong_commands_end_in_one_line(arguments: list[str], words: str, refused: Callable[..., str]) -> None:
    assert words in refused("trainer.fit", *arguments)


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


def test_a_detector_fills_everything(tmp_path: Path) -> None:
    model = RetinaFace(ModelSpec())
    load_pretrained(model, "mobilenet0.25")
    assert weights_sha256(model.state_dict()) == load_model().spec.weights_sha256


def test_folded_batch_normalisation_is_given_back() -> None:
    """The published weights come folded: by a batch's statistics they would be another network."""
    rng = np.random.default_rng(0)
    photographs = torch.from_numpy(rng.normal(0, 50, (6, 3, 160, 192)).astype(np.float32))
    model, folded = load_model(), load_model()
    assert is_folded(folded)
    unfold(model, photographs.split(2))
    assert not is_folded(model)
    with torch.no_grad():
        for after, before in zip(model(photographs), folded(photographs), strict=True):
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        by_statistics = [head.clone() for head in model(photographs)]
        for module in (model, folded):
            module.train()
        for head, wanted, wrong in zip(model(photographs), by_statistics, folded(photographs), strict=True):
            assert (head - wanted).abs().mean() < 0.01
            assert (wrong - wanted).abs().mean() > 0.1


def test_fine_tuning_starts_where_the_weights_are(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    history = fit(config(recipe="finetune", schedule__epochs=1))
    assert history[0]["ap"] > 90


def test_frozen_batch_normalisation_keeps_its_statistics(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    fit(config(recipe="finetune", schedule__epochs=1))
    training = read_training(tmp_path / "run" / "last.pth")[1]
    fit(
        config(
            recipe="finetune", schedule__epochs=1, model__freeze_batch_norm=False, run__output=str(tmp_path / "moving")
        )
    )
    moving = read_training(tmp_path / "moving" / "last.pth")[1]
    counters = [name for name in moving["weights"] if name.endswith("num_batches_tracked")]
    assert counters
    assert all(training["weights"][name] == 0 < moving["weights"][name] for name in counters)


def test_a_few_images_are_learned_by_heart(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    history = fit(config(data__overfit=2, schedule__epochs=1))
    assert history[-1]["ap"] > 95


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


def test_the_example_of_the_document_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert load_model(tmp_path / "runs" / "dense" / "last.pth")


def test_check_data_draws_a_picture(
    images: Path, command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = command("trainer.fit", "--data", images, "--check-data", "--size", "64", "--output", "seen")
    assert result.returncode == 0, result.stderr
    assert "12 images" in result.stdout
    assert not result.stderr
    assert cv2.imread(str(tmp_path / "seen" / "data.png")) is not None
