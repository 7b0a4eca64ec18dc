"""What a run does between its steps, without taking any: epochs, checkpoints, messages, signals."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from facespec.errors import ConfigError, NonFiniteError, OutputError, WeightsError
from facespec.letterbox import Frame
from facespec.spec import ModelSpec
from trainer import RetinaFace, load_model, save_checkpoint
from trainer.checkpoint import is_folded, read_training, weights_sha256
from trainer.config import TrainConfig, resolve, to_settings
from trainer.data import Dataset, Report, TrainingSet
from trainer.data.batches import AsTheyAre, Order
from trainer.data.dataset import Faces
from trainer.distributed import World
from trainer.loop import (
    REPORTED,
    Row,
    TrainState,
    _clock,
    _Data,
    _epoch_line,
    _first_images,
    _open_data,
    _repeatable,
    _Run,
    _score,
    _step_row,
    _StopSignals,
    fit,
)
from trainer.step import Learner, PixelTerm, seed_step
from trainer.validation import LabelledValidation, Scores

CPU = World(torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Plain:
    """An image of one colour with a face in it."""

    number: int

    @property
    def name(self) -> str:
        return f"plain {self.number}"

    def load(self) -> tuple[Frame, Faces]:
        box = np.array([[4, 4, 24, 24]], np.float32)
        return np.full((32, 32, 3), self.number, np.uint8), Faces(
            box, np.zeros((1, 5, 2), np.float32), np.zeros(1, bool)
        )


class Scripted:
    """A validation whose scores are known beforehand; it notes the models it is shown."""

    what = "scripted scores"
    levels = ("ap",)

    def __init__(self, scores: Sequence[Scores]) -> None:
        self.scores = iter(scores)
        self.seen: list[RetinaFace] = []

    def measure(self, model: RetinaFace, world: World) -> Scores:
        assert not model.training
        self.seen.append(model)
        return next(self.scores)


def _settings(tmp_path: Path, **changes: object) -> TrainConfig:
    settings = {"data.size": 32, "data.batch": 2, "run.workers": 0, "run.output": str(tmp_path / "run")}
    return resolve(settings | {name.replace("__", "."): value for name, value in changes.items()})


def _run(config: TrainConfig, scores: Sequence[Scores] = (), images: int = 5, rank: int = 0) -> tuple[_Run, Scripted]:
    """A run before its first step; one of another rank than 0 does the same but writes nothing."""
    dataset = Dataset("plain", [Plain(number) for number in range(images)], Report())
    samples = TrainingSet(dataset, config.data.size, config.augment, config.seed)
    validation = Scripted(scores)
    state = TrainState.start(config, CPU, samples, None, None)
    data = _Data(dataset, dataset.names(), samples, Order(len(samples), config.data.batch, config.seed), validation)
    return _Run(config, dataclasses.replace(CPU, rank=rank), data, state), validation


def _finish_epochs(run: _Run, count: int) -> None:
    for _ in range(count):
        run.state.step += run.per_epoch
        run.state.sums = {name: float(run.per_epoch) for name in REPORTED}
        run._end_epoch()


def test_the_best_checkpoint_is_that_of_the_best_epoch(tmp_path: Path) -> None:
    config = _settings(tmp_path, schedule__epochs=9)
    scores = [{"ap": value} for value in (30.0, 20.0, 30.0, 40.0)]
    run, _ = _run(config, scores)
    best = run.folder / "best.pth"
    weights: list[str] = []
    for wanted in (1, 1, 1, 4):
        with torch.no_grad():
            assert run.state.ema is not None
            next(iter(run.state.ema.model.parameters())).add_(0.125)
        weights.append(weights_sha256(run.state.averaged().state_dict()))
        _finish_epochs(run, 1)
        assert run.saved_step == run.state.step
        content = torch.load(best, weights_only=True)
        assert content["epoch"] == wanted
        assert content["scores"] == scores[wanted - 1]
        assert content["settings"] == to_settings(config)
        assert weights_sha256(content["model"]) == weights[wanted - 1]
        assert "training" not in content
    with pytest.raises(WeightsError, match="holds no state of a training run"):
        read_training(best)


def test_a_resumed_run_knows_its_best_epoch(tmp_path: Path) -> None:
    config = _settings(tmp_path, schedule__epochs=9)
    run, _ = _run(config, [{"ap": 50.0}])
    _finish_epochs(run, 1)
    again, _ = _run(config, [{"ap": 20.0}, {"ap": 60.0}])
    again.state.load(run.folder / "last.pth", config, run.data.names)
    before = (run.folder / "best.pth").read_bytes()
    _finish_epochs(again, 1)
    assert (run.folder / "best.pth").read_bytes() == before
    _finish_epochs(again, 1)
    assert torch.load(run.folder / "best.pth", weights_only=True)["epoch"] == 3


def test_a_run_over_as_many_images_as_wider_face_has_is_resumed(tmp_path: Path) -> None:
    config = _settings(tmp_path, schedule__epochs=9)
    names = "\n".join(f"0--Parade/0_Parade_marchingband_1_{index}.jpg" for index in range(12_880))
    run, _ = _run(config, [{"ap": 50.0}])
    run.data = dataclasses.replace(run.data, names=names)
    _finish_epochs(run, 1)
    again, _ = _run(config, [{"ap": 20.0}])
    again.state.load(run.folder / "last.pth", config, names)
    assert again.state.step == run.state.step > 0


def test_epochs_of_other_levels_are_not_compared(tmp_path: Path) -> None:
    """Where --val has changed, the simple and the official average precision have nothing to say of each other."""
    run, _ = _run(_settings(tmp_path, schedule__epochs=9), [{"ap": 90.0}, {"easy": 30.0, "medium": 20.0, "hard": 10.0}])
    _finish_epochs(run, 2)
    assert torch.load(run.folder / "best.pth", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize(
    ("every", "epochs", "measured"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (2, 4, [2, 4]), (0, 3, [3]), (9, 3, [3])]
)
def test_it_is_measured_every_so_many_epochs_and_at_the_end(
    every: int, epochs: int, measured: list[int], tmp_path: Path
) -> None:
    config = _settings(tmp_path, schedule__epochs=epochs, run__evaluate_every=every)
    run, validation = _run(config, [{"ap": 1.0}] * 9, rank=1)
    _finish_epochs(run, epochs)
    assert [int(row["epoch"]) for row in run.state.history if "ap" in row] == measured
    assert [row["epoch"] for row in run.state.history] == list(range(1, epochs + 1))
    assert len(validation.seen) == len(measured)


def test_an_epoch_notes_the_mean_of_its_steps_and_starts_anew(tmp_path: Path) -> None:
    run, validation = _run(_settings(tmp_path, schedule__epochs=3, run__evaluate_every=1), [{}, {"ap": 2.0}])
    assert (run.per_epoch, run.steps) == (2, 6)
    run.state.step = 2
    run.state.sums = {name: 3.0 + index for index, name in enumerate(REPORTED)}
    run._end_epoch()
    assert run.state.history == [{"epoch": 1, **{name: (3.0 + index) / 2 for index, name in enumerate(REPORTED)}}]
    assert run.state.sums == {}
    assert not (run.folder / "best.pth").exists()  # nothing was measured
    # what is measured is the average, and a copy: it goes on changing while it is saved
    assert run.state.ema is not None
    (seen,) = validation.seen
    assert weights_sha256(seen.state_dict()) == weights_sha256(run.state.ema.model.state_dict())
    assert seen is not run.state.ema.model
    # the checkpoint holds the row
    training = read_training(run.folder / "last.pth")[1]
    assert training["history"] == run.state.history
    assert (training["step"], training["sums"]) == (2, {})
    assert run.saved_step == 2


def test_it_is_saved_before_it_is_measured_and_all_measure_one_model(tmp_path: Path) -> None:
    agreed: list[nn.Module] = []

    class Noted(World):
        def agree(self, model: nn.Module) -> None:
            agreed.append(model)

    run, validation = _run(_settings(tmp_path, schedule__epochs=3), [{"ap": 1.0}])
    run.world = Noted(CPU.device)
    _finish_epochs(run, 1)
    assert len(agreed) == 1
    assert agreed == validation.seen
    with pytest.raises(StopIteration):  # whatever happens while it is measured
        _finish_epochs(run, 1)
    training = read_training(run.folder / "last.pth")[1]
    assert training["step"] == 4
    assert len(training["history"]) == 1
    assert training["sums"]["total"] == 2


def test_a_step_moves_the_weights_and_their_average_and_is_noted(tmp_path: Path) -> None:
    drawn: list[float] = []

    class Drawing(PixelTerm):
        def forward(self, features: object, heads: object, images: torch.Tensor, targets: object) -> torch.Tensor:
            drawn.append(torch.rand(()).item())
            return images.new_zeros(())

    config = _settings(tmp_path, seed=5, schedule__epochs=4, schedule__warmup_epochs=2, loss__pixel_weight=1.0)
    run, _ = _run(config)
    run.learner.pixel_term = Drawing()
    rows: list[Row] = []

    class Book:
        def add_step(self, row: Row) -> None:
            rows.append(row)

    run.records = Book()  # type: ignore[assignment]
    assert run.state.ema is not None
    batches = list(run._batches())
    assert len(batches) == 8
    before = weights_sha256(run.state.model.state_dict())
    assert run._step(*batches[0], False) is False
    assert run._step(*batches[1], True) is True
    assert (run.state.step, run.state.ema.updates) == (2, 2)
    assert weights_sha256(run.state.model.state_dict()) != before
    assert [row["lr"] for row in rows] == pytest.approx([0.0025, 0.005])
    assert [group["lr"] for group in run.state.optimizer.param_groups] == pytest.approx([0.005] * 2)
    assert [(row["step"], row["epoch"]) for row in rows] == [(1, 1), (2, 1)]
    for name in REPORTED:
        assert run.state.sums[name] == pytest.approx(rows[0][name] + rows[1][name])
    for step in (0, 1):
        seed_step(5, step, 0)
        assert drawn[step] == torch.rand(()).item()


def test_settings_reach_what_they_are_for(tmp_path: Path) -> None:
    config = _settings(
        tmp_path, precision="bf16", model__freeze_batch_norm=True, loss__box_weight=3.0, augment__flip=0.25, seed=2
    )
    run, _ = _run(config, images=7)
    assert isinstance(run.learner, Learner)
    assert (run.learner.bf16, run.learner.freeze_batch_norm) == (True, True)
    assert run.learner.loss.settings == config.loss
    assert run.learner.model is run.state.model
    assert (run.per_epoch, run.steps) == (3, 300)
    run, _ = _run(_settings(tmp_path, precision="fp32"))
    assert isinstance(run.learner, Learner)
    assert (run.learner.bf16, run.learner.freeze_batch_norm) == (False, False)
    assert run._epoch_columns() == ["epoch", *REPORTED, "ap", "seconds"]
    run.data = dataclasses.replace(run.data, validation=None)
    assert run._epoch_columns() == ["epoch", *REPORTED, "seconds"]


def test_nothing_measured_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = _run(_settings(tmp_path, schedule__epochs=2), [{}, {"ap": 1.0}])
    _finish_epochs(run, 2)
    assert capsys.readouterr().out == (
        "nothing was measured: no face of the validation counts, they are all too small\n"
    )
    run, _ = _run(run.config, [{}, {}], rank=1)
    _finish_epochs(run, 2)
    assert capsys.readouterr().out == ""


def test_a_state_that_is_saved_is_the_state_that_is_loaded(tmp_path: Path) -> None:
    config = _settings(tmp_path, seed=3, ema__decay=0.5)
    run, _ = _run(config)
    state = run.state
    for value in state.model.parameters():
        value.grad = torch.full_like(value, 0.25)
    state.optimizer.step()
    assert state.ema is not None
    state.ema.update(state.model)
    state.step, state.sums, state.history = 7, {"total": 1.5}, [{"epoch": 1, "total": 2.5}]
    state.save(tmp_path / "s.pth", config, "digest")
    average, training = read_training(tmp_path / "s.pth")
    assert training["settings"] == to_settings(config)
    assert training["data"] == "digest"
    assert weights_sha256(average) == weights_sha256(state.ema.model.state_dict())
    other, _ = _run(_settings(tmp_path, seed=3, ema__decay=0.5))
    other.state.load(tmp_path / "s.pth", config, "digest")
    assert (other.state.step, other.state.sums, other.state.history) == (7, {"total": 1.5}, state.history)
    assert weights_sha256(other.state.model.state_dict()) == weights_sha256(state.model.state_dict())
    assert other.state.ema is not None
    assert weights_sha256(other.state.ema.model.state_dict()) == weights_sha256(state.ema.model.state_dict())
    assert other.state.ema.updates == 1
    momenta = [
        [one.optimizer.state[value]["momentum_buffer"] for value in one.model.parameters()]
        for one in (state, other.state)
    ]
    assert all(torch.equal(one, two) for one, two in zip(*momenta, strict=True))
    with pytest.raises(ConfigError, match="was trained on other images than there are now"):
        other.state.load(tmp_path / "s.pth", config, "another")
    faster = _settings(tmp_path, seed=4, ema__decay=0.5, optimizer__lr=1.0)
    with pytest.raises(ConfigError, match=r"another seed \(3 -> 4\), optimizer\.lr \(0\.01 -> 1\.0\): leave them"):
        other.state.load(tmp_path / "s.pth", faster, "digest")
    save_checkpoint(tmp_path / "w.pth", state.model)
    with pytest.raises(WeightsError, match="no state of a training run to resume; --pretrained"):
        other.state.load(tmp_path / "w.pth", config, "digest")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content, training: training.pop("settings"),
        lambda content, training: training.update(settings=[1]),
        lambda content, training: training.update(settings={3: 1}),
        lambda content, training: training["settings"].update({"data.overfit": torch.zeros(2)}),
        lambda content, training: training.update(data=torch.zeros(3)),
        lambda content, training: training.pop("weights"),
        lambda content, training: training["weights"].popitem(),
        lambda content, training: training["weights"].update({"fpn.output1.0.weight": 3}),
        lambda content, training: training["weights"].update({"fpn.output1.0.weight": torch.zeros(1)}),
        lambda content, training: training["optimizer"].pop("state"),
        lambda content, training: training["optimizer"].update(state=[1]),
        lambda content, training: training["optimizer"].update(state={"x": {"momentum_buffer": None}}),
        lambda content, training: training["optimizer"].update(state={9999: {"momentum_buffer": torch.zeros(1)}}),
        lambda content, training: training["optimizer"]["state"].update({0: 5}),
        lambda content, training: training["optimizer"]["state"].update({0: {}}),
        lambda content, training: training["optimizer"]["state"].update({0: {"momentum_buffer": "x"}}),
        lambda content, training: training["optimizer"]["state"].update({0: {"momentum_buffer": torch.zeros(5)}}),
        lambda content, training: training.update(step="7"),
        lambda content, training: training.update(step=-1),
        lambda content, training: training.update(sums=[("total", 1.0)]),
        lambda content, training: training.update(sums={"total": "1"}),
        lambda content, training: training.update(history=[3]),
        lambda content, training: training.update(history={"epoch": torch.zeros(4)}),
        lambda content, training: training.update(ema_updates=None),
        lambda content, training: content.pop("model"),
        lambda content, training: content.update(model=[1, 2]),
        lambda content, training: content["model"].popitem(),
    ],
)
def test_a_malformed_checkpoint_is_not_resumed(
    tmp_path: Path, spoil: Callable[[dict[str, Any], dict[str, Any]], object]
) -> None:
    config = _settings(tmp_path, ema__decay=0.5)
    run, _ = _run(config)
    for value in run.state.model.parameters():
        value.grad = torch.full_like(value, 0.25)
    run.state.optimizer.step()
    run.state.save(tmp_path / "s.pth", config, "digest")
    content = torch.load(tmp_path / "s.pth", weights_only=True)
    spoil(content, content["training"])
    torch.save(content, tmp_path / "s.pth")
    with pytest.raises((WeightsError, ConfigError), match=r"s\.pth") as caught:
        run.state.load(tmp_path / "s.pth", config, "digest")
    assert "\n" not in str(caught.value)


def test_settings_of_the_optimizer_do_not_come_from_a_checkpoint(tmp_path: Path) -> None:
    config = _settings(tmp_path)
    run, _ = _run(config)
    run.state.save(tmp_path / "s.pth", config, "digest")
    content = torch.load(tmp_path / "s.pth", weights_only=True)
    content["training"]["optimizer"]["param_groups"][0].update(lr="fast", momentum=9, maximize=True)
    torch.save(content, tmp_path / "s.pth")
    before = [dict(group, params=0) for group in run.state.optimizer.param_groups]
    run.state.load(tmp_path / "s.pth", config, "digest")
    assert [dict(group, params=0) for group in run.state.optimizer.param_groups] == before


def _start(config: TrainConfig, pixel_term: PixelTerm | None = None, pretrained: str | None = None) -> TrainState:
    samples = TrainingSet(Dataset("p", [Plain(n) for n in range(3)], Report()), 32, config.augment, 0)
    return TrainState.start(config, CPU, samples, pixel_term, pretrained)


def test_the_seed_gives_the_first_weights(tmp_path: Path) -> None:
    one, same, other = (weights_sha256(_start(_settings(tmp_path, seed=seed)).model.state_dict()) for seed in (5, 5, 6))
    assert one == same != other


def test_what_training_starts_from(tmp_path: Path) -> None:
    class Term(PixelTerm):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 1, 1)

    plain = _start(_settings(tmp_path, ema__decay=0.25, model__backbone="resnet18"))
    assert (plain.model.spec.backbone, plain.model.spec.fpn_channels) == ("resnet18", 128)
    assert plain.model.body.conv1.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    assert plain.ema is not None
    assert plain.ema.decay == 0.25
    assert (plain.step, plain.sums, plain.history) == (0, {}, [])
    term = Term()
    few = _start(_settings(tmp_path, ema__decay=0.0, model__fpn_channels=32, optimizer__lr=0.5), term)
    assert few.model.spec == ModelSpec("mobilenet0.25", 32)
    assert few.ema is None
    trained = {id(value) for group in few.optimizer.param_groups for value in group["params"]}
    assert trained == {id(value) for value in (*few.model.parameters(), *term.parameters())}
    assert few.optimizer.param_groups[0]["lr"] == 0.5
    # without an average it is the weights themselves that are exported: as a copy, in eval mode
    few.model.train()
    copy = few.averaged()
    assert not copy.training
    assert few.model.training
    assert copy.ssh1.conv3X3[0].weight.is_contiguous()  # type: ignore[union-attr, operator]
    assert weights_sha256(copy.state_dict()) == weights_sha256(few.model.state_dict())
    with torch.no_grad():
        next(copy.parameters()).zero_()
    assert next(few.model.parameters()).any()


def test_folded_weights_get_their_batch_normalisation_back_and_others_stay(tmp_path: Path) -> None:
    config = _settings(tmp_path, recipe="finetune")
    model = _start(config, pretrained=config.model.pretrained).model
    assert not is_folded(model)
    whole = load_model().eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 50
    with torch.no_grad():
        for one, other in zip(model.eval()(images), whole(images), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    save_checkpoint(tmp_path / "own.pth", model)
    again = _start(config, pretrained=str(tmp_path / "own.pth")).model
    assert weights_sha256(again.state_dict()) == weights_sha256(model.state_dict())


def test_images_for_the_statistics_are_spread_over_the_set() -> None:
    dataset = Dataset("p", [Plain(number) for number in range(200)], Report())
    views = list(_first_images(AsTheyAre(dataset, 32, 200), (1, 2, 3)))
    assert {tuple(view.shape) for view in views} == {(1, 3, 32, 32)}
    numbers = [int(view[0, 0, 0, 0]) + 1 for view in views]
    assert len(numbers) == len(set(numbers)) == 64
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (0, 199)
    assert max(np.diff(numbers)) <= 4
    assert views[5][0, :, 3, 4].tolist() == [numbers[5] - mean for mean in (1, 2, 3)]
    few = list(_first_images(AsTheyAre(Dataset("p", [Plain(7)], Report()), 32, 3), (0, 0, 0)))
    assert len(few) == 3


def test_data_is_opened_as_it_is_asked_for(images: Path, config: Callable[..., TrainConfig]) -> None:
    data = _open_data(config(seed=4, data__size=64), CPU)
    assert (len(data.dataset), data.order) == (12, Order(12, 4, 4))
    assert isinstance(data.samples, TrainingSet)
    assert (data.samples.size, data.samples.seed) == (64, 4)
    assert data.samples.settings == config().augment
    few = _open_data(config(data__overfit=3, data__batch=8, data__size=64), CPU)
    assert isinstance(few.samples, AsTheyAre)
    assert [Path(sample.name).name for sample in few.dataset.samples] == ["0.png", "1.png", "2.png"]
    assert (few.samples.size, few.order) == (64, Order(300, 3, 0))  # 100 steps of all there are
    assert isinstance(few.validation, LabelledValidation)
    assert len(few.validation.dataset) == 3
    three = dataclasses.replace(CPU, size=2)
    assert _open_data(config(data__overfit=5), three).order == Order(400, 4, 0)
    assert _open_data(config(data__batch=12), CPU).order.steps_per_epoch == 1
    for world, batch, overfit in ((CPU, 13, 0), (three, 3, 0), (three, 4, 1)):
        with pytest.raises(ConfigError, match=rf"data\.batch is {batch}: it must be a multiple of {world.size}, "):
            _open_data(config(data__batch=batch, data__overfit=overfit), world)


@pytest.mark.parametrize(("weight", "term", "words"), [(0.0, PixelTerm(), "there is a"), (1.5, None, "there is no")])
def test_a_pixel_term_and_its_weight_go_together(
    weight: float, term: PixelTerm | None, words: str, config: Callable[..., TrainConfig]
) -> None:
    with pytest.raises(ConfigError, match=rf"loss\.pixel_weight is {weight:g} and {words} pixel-wise term"):
        fit(config(loss__pixel_weight=weight), pixel_term=term)


def test_settings_for_other_machines_are_refused(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sync_batch_norm needs CUDA"):
        fit(config(model__sync_batch_norm=True, run__device="cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="use --device cpu"):
            fit(config(run__device="cuda"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_is_not_written_over(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    last = tmp_path / "run" / "last.pth"
    last.parent.mkdir()
    last.write_bytes(b"precious")
    other = tmp_path / "other.pth"
    other.write_bytes(b"other")
    for resume in (None, other, tmp_path / "none.pth"):
        with pytest.raises(OutputError, match="holds a run already: --resume auto goes on with it"):
            fit(config(), resume=resume)
    (tmp_path / "link.pth").symlink_to(last)
    for resume in (last, tmp_path / "link.pth"):  # another name of the same file
        with pytest.raises(WeightsError, match="not a PyTorch checkpoint"):
            fit(config(), resume=resume)
    assert last.read_bytes() == b"precious"


def test_rows_add_counts_up_and_take_the_mean_of_the_rest() -> None:
    reports = [[float(index + 1) for index in range(len(REPORTED))] + [0.0], [10.0 * (i + 1) for i in range(9)] + [1.0]]
    row = _step_row(reports)
    assert REPORTED == (
        *("total", "classification", "box", "landmark", "pixel"),
        *("positives", "landmark_positives", "dropped", "grad_norm"),
    )
    assert row == {
        **{"total": 5.5, "classification": 11.0, "box": 16.5, "landmark": 22.0, "pixel": 27.5},
        **{"positives": 66.0, "landmark_positives": 77.0, "dropped": 88.0, "grad_norm": 49.5},
    }
    assert _step_row([[2.0] * 9 + [0.0]]) == dict.fromkeys(REPORTED, 2.0)


def test_scores_are_the_mean_of_the_levels_there_are() -> None:
    assert _score({"easy": 90.0, "medium": 60.0, "hard": 30.0}) == 60
    assert _score({"easy": 90.0, "medium": 60.0, "total": 999.0, "epoch": 3}) == 75
    assert _score({"ap": 12.5, "seconds": 1.0}) == 12.5
    assert _score({"total": 3.0}) == -math.inf


def test_an_epoch_in_a_line() -> None:
    row = {"epoch": 3, **dict.fromkeys(REPORTED, 0.0), "total": 1.25, "classification": 0.5, "landmark": 0.25}
    assert _epoch_line(row, {}, 7, False) == "epoch 3/7  loss 1.250 (classification 0.500, landmark 0.250)"
    line = _epoch_line({**row, "pixel": 2.0}, {"easy": 1.234, "hard": 5.0}, 7, True)
    assert line == ("epoch 3/7  loss 1.250 (classification 0.500, landmark 0.250, pixel 2.000)  AP 1.23/5.00 (best)")
    assert _clock(3725.4) == "1:02:05"


@pytest.mark.parametrize(("bad", "word"), [(0, "loss"), (8, "gradient")])
def test_what_is_not_finite_is_named_with_its_process_and_images(bad: int, word: str, tmp_path: Path) -> None:
    run, _ = _run(_settings(tmp_path, data__batch=4), images=12)
    run.world = dataclasses.replace(CPU, size=2)
    run.state.step = 4
    reports = [[1.0] * 9 + [0.0], [1.0] * 9 + [0.0]]
    reports[1][bad] = math.nan
    with pytest.raises(NonFiniteError) as caught:
        run._refuse_non_finite(reports)
    message = str(caught.value)
    assert message.startswith(f"step 5: the {word} is not finite: try a lower --lr, more warm-up or --precision fp32")
    assert "no checkpoint was written" in message
    indices = run.data.order.images(4, CPU)
    guilty = indices[1::2] if word == "loss" else indices[::2] + indices[1::2]
    assert message.endswith(f"Images of the step: {', '.join(f'plain {index}' for index in guilty)}")
    run.saved_step = 2
    with pytest.raises(NonFiniteError, match=r"run/last\.pth is from step 2\. Images"):
        run._refuse_non_finite(reports)


def test_a_second_signal_does_not_wait_and_handlers_are_put_back() -> None:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in kept:
            signal.signal(number, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with _StopSignals() as signals:
            assert not signals.seen
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.seen  # nohup's
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.seen
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        for number in (signal.SIGINT, signal.SIGTERM):
            assert signal.getsignal(number) is signal.default_int_handler
            with _StopSignals() as signals:
                os.kill(os.getpid(), number)
                assert signals.seen
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with _StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.seen
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_a_thread_takes_no_signals_and_says_nothing_of_it() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with _StopSignals() as signals:
                assert not signals.seen
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


@pytest.mark.parametrize("raises", [False, True])
def test_the_same_bits_are_asked_for_while_it_trains_alone(raises: bool) -> None:
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        with _repeatable(torch.device("cpu")):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            if raises:
                raise ValueError
    except ValueError:
        assert raises
    assert (torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory) == before
