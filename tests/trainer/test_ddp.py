"""Two processes under torchrun, on the CPU: the gradients of one large batch, one log, and one end for all."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from facespec.cli import run
from facespec.errors import RetinaFaceError
from facespec.images import write_image
from facespec.letterbox import Frame
from trainer import load_model
from trainer.checkpoint import read_training, weights_sha256
from trainer.config import resolve
from trainer.data import AugmentSettings, Dataset, Report, TrainingSet, open_dataset
from trainer.data.batches import Order, collate, read_batches
from trainer.data.dataset import Faces
from trainer.data.synthetic import SyntheticSample
from trainer.distributed import World, join_world
from trainer.fit import main, parse_arguments
from trainer.loop import TrainState, fit
from trainer.losses import LossSettings, MultiBoxLoss
from trainer.step import Learner
from trainer.validation import LabelledValidation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # two processes and torchrun, on one core

ROOT = Path(__file__).parents[2]
CPU = World(torch.device("cpu"))
ARGUMENTS = "--data set --size 96 --batch 2 --epochs 2 --workers 0 --precision fp32 --out"


def save_gradients(path: Path, world: World) -> None:
    """Save the gradients of a batch of four images, shared by the processes there are."""
    model = load_model()
    # by the statistics of a batch, each process would see its own images alone
    learner: nn.Module = Learner(model, MultiBoxLoss(model.spec, LossSettings()), freeze_batch_norm=True)
    if world.size > 1:
        learner = DistributedDataParallel(learner)
    dataset = Dataset("few", [SyntheticSample("train", index) for index in range(8)], Report())
    samples = TrainingSet(dataset, 160, AugmentSettings(), seed=1)
    ((images, targets),) = read_batches(samples, Order(len(samples), 4, seed=2), world, 0, first=0, last=1)
    assert len(images) == 4 // world.size
    losses = learner(images, targets)
    losses.total.backward()
    rows = world.gather_rows(losses.total.detach()[None])
    if world.leads:
        gradients = {name: value.grad for name, value in model.named_parameters()}
        torch.save({"gradients": gradients, "loss": float(np.mean(rows))}, path)


def save_uneven_gradients(path: Path, world: World) -> None:
    """Save the loss and the gradients where one process has an image with faces, and the other one without, and one."""
    from tests.trainer.test_losses import linear_and_batch

    model, features, images = linear_and_batch()
    mine = slice(world.rank, 1 + 2 * world.rank) if world.size > 1 else slice(0, 3)
    learner = DistributedDataParallel(model) if world.size > 1 else model
    spec = load_model().spec
    heads = learner(features[mine]).split([4, 2, 10], dim=2)
    faces = [(np.zeros((1, 1, 3), np.uint8), one) for one in images[mine]]
    losses = MultiBoxLoss(spec)(heads, collate(faces)[1], (128, 160))
    losses.total.backward()
    gradients = [p.grad for p in model.parameters()]
    totals = [row[0] for row in world.gather_rows(losses.total.detach()[None])]
    if world.leads:
        torch.save({"gradients": gradients, "loss": float(np.mean(totals))}, path)


@dataclasses.dataclass(frozen=True)
class Blank:
    """An image without anything that could be taken for its face."""

    name: str = "blank"

    def load(self) -> tuple[Frame, Faces]:
        box = np.array([[4, 4, 60, 60]], np.float32)
        return np.full((64, 64, 3), 99, np.uint8), Faces(box, np.zeros((1, 5, 2), np.float32), np.zeros(1, bool))


def save_what_is_shared(folder: Path, world: World) -> None:
    """Save what each process knows after telling the others."""
    model = load_model()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(world.rank)
    world.agree(model)
    names = {f"of {world.rank}": world.rank * 10, "of all": world.rank}
    scores = LabelledValidation(Dataset("b", [Blank(), Blank(), Blank()], Report()), 64).measure(model, world)
    shared = {
        "world": (world.rank, world.size, world.leads, world.device.type),
        "rows": world.gather_rows(torch.tensor([1.5 + world.rank, 2.0])),
        "dictionaries": world.gather(names),
        "weights": weights_sha256(model.state_dict()),
        "counters": {int(value) for name, value in model.state_dict().items() if name.endswith("tracked")},
        "scores": scores,
        "initialised": dist.is_initialized(),
    }
    torch.save(shared, folder / f"shared{world.rank}.pth")


def begin(port: str) -> None:
    """Let the processes meet at a place of their own: what torchrun gives them serves for one meeting."""
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def work(folder: Path, ports: list[str]) -> None:
    """What torchrun's processes do, one thing after the other; starting them takes longest."""
    begin(ports[0])
    with join_world("cpu") as world:
        save_gradients(folder / "two.pth", world)
        save_uneven_gradients(folder / "uneven.pth", world)
        save_what_is_shared(folder, world)
    assert not dist.is_initialized()
    begin(ports[1])
    assert main([*ARGUMENTS.split(), "run", "--resume", "auto"]) == 0
    # the second process looks into a folder of its own: it would begin anew
    begin(ports[2])
    output = "run" if os.environ["RANK"] == "0" else "own"
    config = resolve(parse_arguments([*ARGUMENTS.split(), output]).settings)
    try:
        fit(config, resume=Path("run", "last.pth") if output == "run" else None)
    except RetinaFaceError as error:
        Path(f"refused_{output}.txt").write_text(str(error))
    dist.destroy_process_group()
    begin(ports[3])
    run(lambda: main([*ARGUMENTS.replace("set", "damaged").split(), "other"]))


def _free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Ran(NamedTuple):
    """Where two processes have worked, and what they said."""

    folder: Path
    result: subprocess.CompletedProcess[str]


def _labelled(folder: Path, split: str) -> None:
    for index in range(4):
        image = np.full((96, 96, 3), 60 * index, np.uint8)
        image[20:60, 30:70] = 255
        write_image(folder / split / "images" / f"{split}{index}.png", image)
    text = "".join(f"# {split}{index}.png\n30 20 40 40\n" for index in range(4))
    (folder / split / "label.txt").write_text(text)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two processes, which go on with a run that one process has begun, and then meet an image that is damaged."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("set", "damaged"):
        for split in ("train", "val"):
            _labelled(folder / name, split)
    (folder / "damaged" / "train" / "images" / "train2.png").write_bytes(b"")
    before = Path.cwd()
    os.chdir(folder)
    try:
        config = resolve(parse_arguments([*ARGUMENTS.split(), "run"]).settings)
        state = TrainState.start(config, CPU, None, None, None)  # type: ignore[arg-type]
        state.step, state.history = 2, [{"epoch": 1, "total": 9.0, "ap": 0.0}]
        state.save(Path("run") / "last.pth", config, open_dataset("set", "train").names())
    finally:
        os.chdir(before)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    process = subprocess.Popen(
        [*line, str(folder), *_free_ports(4)], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=350)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes then; they would wait for each other for an hour
        said = process.communicate(timeout=40)
    result = subprocess.CompletedProcess(line, process.returncode, *said)
    return Ran(folder, result)


def _assert_equal(two: dict[str, Tensor], one: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(two[name], gradient, atol=1e-4 * max(scale, 1.0), rtol=1e-4)


def test_two_processes_have_the_gradients_of_one(ran: Ran, tmp_path: Path) -> None:
    assert (ran.folder / "two.pth").exists(), ran.result.stderr
    save_gradients(tmp_path / "one.pth", CPU)
    one, two = (torch.load(path, weights_only=True) for path in (tmp_path / "one.pth", ran.folder / "two.pth"))
    _assert_equal(two["gradients"], one["gradients"])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_two_ranks_train_as_one_batch_however_its_faces_are_spread(ran: Ran, tmp_path: Path) -> None:
    assert (ran.folder / "uneven.pth").exists(), ran.result.stderr
    save_uneven_gradients(tmp_path / "one.pth", CPU)
    one, two = (torch.load(path, weights_only=True) for path in (tmp_path / "one.pth", ran.folder / "uneven.pth"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for found, expected in zip(two["gradients"], one["gradients"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_processes_know_what_the_others_know(ran: Ran) -> None:
    shared = [torch.load(ran.folder / f"shared{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert [one["world"] for one in shared] == [(0, 2, True, "cpu"), (1, 2, False, "cpu")]
    for one in shared:
        assert one["rows"] == [[1.5, 2.0], [2.5, 2.0]]
        assert one["dictionaries"] == {"of 0": 0, "of 1": 10, "of all": 1}
        assert one["weights"] == load_model().spec.weights_sha256  # the first one's
        assert one["counters"] == {0}
        assert one["scores"] == {"ap": 0.0}  # over all images, for each process has a share of them
        assert one["initialised"]


def test_a_run_of_two_processes_resumes_and_writes_once(ran: Ran) -> None:
    said = ran.result.stdout
    assert "resumed after step 2 of 4" in said, ran.result.stderr
    assert "mobilenet0.25 on cpu in fp32, processes: 2; 2 epochs of 2 steps of 2 images of 96x96" in said
    assert said.count("epoch 2/2") == 1
    rows = (ran.folder / "run" / "steps.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "3", "4"]
    _, training = read_training(ran.folder / "run" / "last.pth")
    assert training["step"] == 4
    assert "ap" in training["history"][-1]
    # every image has one face, and a positive prior at least: the counts are those of both processes
    positives = rows[0].split(",").index("positives")
    assert all(float(row.split(",")[positives]) >= 2 for row in rows[1:])


def test_processes_that_see_different_checkpoints_do_not_start(ran: Ran) -> None:
    for output in ("run", "own"):
        text = (ran.folder / f"refused_{output}.txt").read_text()
        assert text == f"the processes would start after different steps (4, 0): all of them must see {output}"
    assert not (ran.folder / "own").exists()


def test_an_error_of_one_process_ends_both(ran: Ran) -> None:
    assert ran.result.returncode != 0
    errors = [line for line in ran.result.stderr.splitlines() if line.startswith("error: ")]
    assert len(set(errors)) == 1  # each process reads a share of the images before the first step, and all know
    assert "train2.png" in errors[0]


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2:])
