"""Two processes under torchrun, on the CPU: the gradients of one large batch, one log, and one end for all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from facespec.images import write_image
from trainer import load_model
from trainer.batches import Order, read_batches
from trainer.checkpoint import read_training
from trainer.data import AugmentSettings, TrainingSet, open_dataset
from trainer.distributed import join_world
from trainer.engine import Learner
from trainer.losses import LossSettings, MultiBoxLoss

ROOT = Path(__file__).parents[2]


def _torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *map(str, arguments),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def save_gradients(path: Path) -> None:
    """Save the gradients of a batch of four images, shared by the processes there are; torchrun calls this."""
    with join_world("cpu") as world:
        model = load_model()
        # by the statistics of a batch, each process would see its own images alone
        learner: torch.nn.Module = Learner(model, MultiBoxLoss(model.spec, LossSettings()), freeze_batch_norm=True)
        if world.size > 1:
            learner = torch.nn.parallel.DistributedDataParallel(learner)
        samples = TrainingSet(open_dataset("synthetic"), 160, AugmentSettings(), seed=1)
        ((images, targets),) = read_batches(samples, Order(len(samples), 4, seed=2), world, 0, first=0, last=1)
        assert len(images) == 4 // world.size
        learner(images, targets).total.backward()
        if world.leads:
            torch.save({name: value.grad for name, value in model.named_parameters()}, path)


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    save_gradients(tmp_path / "one.pth")
    result = _torchrun(tmp_path, __file__, tmp_path / "two.pth")
    assert result.returncode == 0, result.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pth", "two.pth"))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(two[name], gradient, atol=1e-4 * max(scale, 1.0), rtol=1e-4)


def _labelled(folder: Path, split: str) -> None:
    for index in range(4):
        image = np.full((96, 96, 3), 60 * index, np.uint8)
        image[20:60, 30:70] = 255
        write_image(folder / split / "images" / f"{split}{index}.png", image)
    text = "".join(f"# {split}{index}.png\n30 20 40 40\n" for index in range(4))
    (folder / split / "label.txt").write_text(text)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    for split in ("train", "val"):
        _labelled(tmp_path, split)
    line = f"-m trainer.fit --data {tmp_path} --size 96 --batch 2 --epochs 2 --workers 0 --output run"
    return line.split()


def test_a_run_of_two_processes_writes_once_and_resumes(arguments: list[str], tmp_path: Path) -> None:
    result = _torchrun(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 2/2") == 1
    assert (tmp_path / "run" / "steps.csv").read_text().count("\n") == 1 + 4
    _, training = read_training(tmp_path / "run" / "last.pth")
    assert training["step"] == 4
    assert "ap" in training["history"][-1]
    result = _torchrun(tmp_path, *arguments, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert "resumed after step 4 of 4" in result.stdout


def test_an_error_of_one_process_ends_both(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "train" / "images" / "train2.png").write_bytes(b"")
    result = _torchrun(tmp_path, *arguments)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "train2.png" in errors[0]
    result = _torchrun(tmp_path, *arguments, "--batch", "3")
    assert "it must be a multiple of 2, the number of processes" in result.stderr


if __name__ == "__main__":
    save_gradients(Path(sys.argv[1]))
