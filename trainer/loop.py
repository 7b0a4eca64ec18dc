"""A whole run: data, steps, evaluation, checkpoints. `trainer.fit` is its command."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from facespec.cli import counted, finishing
from facespec.codec import build
from facespec.errors import (
    ConfigError,
    DataError,
    MissingPackageError,
    NonFiniteError,
    OutputError,
    SpecError,
    WeightsError,
    reason,
)
from facespec.spec import ModelSpec
from trainer.average_precision import LEVELS
from trainer.checkpoint import is_folded, load_pretrained, read_training, save_checkpoint, unfold
from trainer.config import TrainConfig, changed, from_settings, to_settings, write_yaml
from trainer.data import Dataset, Sample, TrainingSet, open_dataset
from trainer.data.batches import AsTheyAre, Order, Targets, explain_dead_workers, read_batches
from trainer.data.check import find_damaged, replace_damaged
from trainer.dense import DenseFaces
from trainer.distributed import World, has_bf16, join_world
from trainer.losses import MultiBoxLoss
from trainer.model import BACKBONES, RetinaFace
from trainer.records import STEP_COLUMNS, Records, draw_curves, read_epochs
from trainer.step import Ema, Learner, PixelTerm, lr_factor, make_optimizer, seed_step, train_step
from trainer.teacher import add_unlabelled, teach
from trainer.validation import SIMPLE_LEVEL, Scores, Validation, find_validation

LAST, BEST, TAUGHT = "last.pth", "best.pth", "teacher.npz"

OVERFIT_STEPS = 100
"""Steps of an epoch on a few images, which it sees many times over."""

UNFOLDING_IMAGES = 64
"""Images that tell the statistics of pretrained weights whose batch normalisation was folded."""

Row = dict[str, float]
Samples = TrainingSet | AsTheyAre


def fit(config: TrainConfig, *, pixel_term: PixelTerm | None = None, resume: Path | None = None) -> list[Row]:
    """Train, and return what was noted of each epoch.

    `config.run.output` gets config.yaml, steps.csv, epochs.csv, last.pth (to resume, evaluate or export) and best.pth
    (to evaluate or export). Under torchrun every process calls this, and the first writes.

    Args:
        config: All settings.
        pixel_term: The fourth term of the loss, where `config.loss.pixel_weight` is over 0; None takes `DenseFaces`.
        resume: Checkpoint to go on from, with the same settings.

    Raises:
        RetinaFaceError: Settings, data, weights or the disk do not allow it, or the loss is not finite.
        KeyboardInterrupt: It was asked to stop, and has saved where it was.
    """
    if pixel_term is not None and config.loss.pixel_weight == 0:
        raise ConfigError("loss.pixel_weight is 0 and there is a pixel-wise term: give it a weight, such as 0.01")
    with join_world(config.run.device) as world, _repeatable(world.device):
        if config.precision == "auto":
            config = dataclasses.replace(config, precision="bf16" if has_bf16(world.device) else "fp32")
        last = Path(config.run.output) / LAST
        if last.exists() and (resume is None or not resume.exists() or not resume.samefile(last)):
            raise OutputError(
                f"{config.run.output} holds a run already: --resume auto goes on with it, or choose another --out"
            )
        if config.model.sync_batch_norm and world.device.type != "cuda":
            raise ConfigError("model.sync_batch_norm needs CUDA")
        data = _without_damaged(_open_data(config, world, resume), world, config.data.skip_damaged)
        if config.teacher.weights is not None:
            path = Path(config.run.output) / TAUGHT
            data = data.of(teach(data.dataset, config.teacher, config.data.size, world, path))
        pretrained = None if resume else config.model.pretrained
        state = TrainState.start(config, world, data.samples, pixel_term, pretrained)
        if resume is not None:
            state.load(resume, config, data.names)
        if world.size > 1:
            steps = world.gather({world.rank: state.step})
            if len(set(steps.values())) > 1:
                raise ConfigError(
                    f"the processes would start after different steps ({', '.join(map(str, steps.values()))}): all of "
                    f"them must see {config.run.output}"
                )
        return _Run(config, world, data, state).train()


@dataclass(frozen=True)
class _Data:
    """What is trained on, and what is measured on; `samples` gives an image for epoch * count + index.

    `names` are those of the images before any was left out.
    """

    dataset: Dataset
    names: str
    samples: Samples
    order: Order
    validation: Validation | None

    def of(self, dataset: Dataset) -> _Data:
        """Return the same with another data set of as many images."""
        samples = copy.copy(self.samples)
        samples.dataset = dataset
        return dataclasses.replace(self, dataset=dataset, samples=samples)


def _open_data(config: TrainConfig, world: World, resume: Path | None = None) -> _Data:
    settings = config.data
    dataset = open_dataset(settings.source, "train", settings.root, images=settings.images, category=settings.category)
    if config.teacher.images is not None:
        dataset = add_unlabelled(dataset, config.teacher.images)
    batch = settings.batch
    if settings.overfit:
        dataset = dataclasses.replace(dataset, samples=dataset.samples[: settings.overfit])
        batch = min(batch, len(dataset) // world.size * world.size)
    if batch == 0 or batch % world.size or batch > len(dataset):
        raise ConfigError(
            f"data.batch is {settings.batch}: it must be a multiple of {world.size}, the number of processes, and at "
            f"most {len(dataset)}, the number of images"
        )
    names = dataset.names()
    if resume is not None and settings.skip_damaged:  # some may be gone; those that are there keep their places
        before = str(read_training(resume)[1].get("data"))
        if not set(before.split("\n")).isdisjoint(names.split("\n")):
            names, dataset = before, dataclasses.replace(dataset, samples=dataset.arranged(before))
    samples: Samples = TrainingSet(dataset, settings.size, config.augment, config.seed)
    if settings.overfit:
        samples = AsTheyAre(dataset, settings.size, OVERFIT_STEPS * batch)
    order = Order(len(samples), batch, config.seed)
    return _Data(dataset, names, samples, order, find_validation(settings, dataset, config.run.evaluate_size))


def _without_damaged(data: _Data, world: World, skip: bool) -> _Data:
    """Return the data with every image file read once, so that a run does not end when it gets to a damaged one.

    Raises:
        DataError: There are some, and they are not to be skipped.
    """
    damaged = _find_damaged(data.dataset.samples, world, skip)
    data = data.of(dataclasses.replace(data.dataset, samples=replace_damaged(data.dataset.samples, damaged)))
    validation = data.validation
    if validation is not None:
        validation = validation.without(_find_damaged(validation.samples(), world, skip))
    return dataclasses.replace(data, validation=validation)


def _find_damaged(samples: Sequence[Sample], world: World, skip: bool) -> dict[int, str]:
    damaged = world.gather(find_damaged(samples, range(world.rank, len(samples), world.size), world.leads))
    if damaged:
        first = damaged[min(damaged)]
        if not skip:
            raise DataError(
                f"{len(damaged)} of {len(samples)} images cannot be read, the first: {first}; --check-data names all, "
                "--set data.skip_damaged=true leaves them out"
            )
        if world.leads:
            print(f"left out: {len(damaged)} of {len(samples)} images, which cannot be read, the first: {first}")
    return damaged


@dataclass
class TrainState:
    """Everything that training changes, and a checkpoint keeps.

    The learning rate, the order of the images, their augmentation and the random generators are functions of the seed
    and the step: `step` is all that is kept of them.

    Attributes:
        model: The detector as it is trained.
        pixel_term: Fourth term of the loss.
        optimizer: Of both.
        ema: Average of the model.
        step: Steps done.
        sums: Over the steps of the epoch so far, by column.
        history: A row for each epoch.
        fine_tunes: It started from the weights of a whole detector, which are worth measuring.
        extended: It goes on with a run that was finished, for more epochs.
    """

    model: RetinaFace
    pixel_term: PixelTerm | None
    optimizer: SGD
    ema: Ema | None
    step: int = 0
    sums: Row = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)
    fine_tunes: bool = False
    extended: bool = False

    @classmethod
    def start(
        cls, config: TrainConfig, world: World, samples: Samples, pixel_term: PixelTerm | None, pretrained: str | None
    ) -> TrainState:
        """Return the state before the first step, from pretrained or random weights."""
        torch.manual_seed(config.seed)
        backbone = config.model.backbone
        channels = config.model.fpn_channels or BACKBONES[backbone][1]
        model = RetinaFace(ModelSpec(backbone, channels, anchors=config.model.anchors))
        head = next(model.ClassHead.parameters())
        random = head.detach().clone()
        if pretrained:
            load_pretrained(model, pretrained)
            if is_folded(model):
                unfold(model, _first_images(samples, model.spec.preprocess.mean_bgr))
        if pixel_term is None and config.loss.pixel_weight:
            pixel_term = DenseFaces(model.spec)
        trained = nn.ModuleList([model] if pixel_term is None else [model, pixel_term]).to(world.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = make_optimizer(trained, config.optimizer)
        ema = Ema(model, config.ema.decay) if config.ema.decay else None
        return cls(model, pixel_term, optimizer, ema, fine_tunes=not torch.equal(head.detach().cpu(), random))

    def averaged(self) -> RetinaFace:
        """Return a copy of what is evaluated and exported, in eval mode."""
        model = copy.deepcopy(self.ema.model if self.ema else self.model)
        return model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def save(self, path: Path, config: TrainConfig, names: str) -> None:
        """Write a checkpoint to resume, evaluate or export; `names` are those of the data set's images."""
        training = {
            "settings": to_settings(config),
            "data": names,
            "weights": self.model.state_dict(),
            "pixel_term": self.pixel_term.state_dict() if self.pixel_term else {},
            "optimizer": self.optimizer.state_dict(),
            "ema_updates": self.ema.updates if self.ema else 0,
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
        }
        save_checkpoint(path, self.averaged(), training=training)

    def load(self, path: Path, config: TrainConfig, names: str) -> None:
        """Take over what `save` wrote, unless the settings or the images are others than those of the run.

        Raises:
            ConfigError: They are others.
            WeightsError: The checkpoint is not one that `save` wrote for this model.
        """
        average, training = read_training(path)
        check_training(path, training)
        before = from_settings(training["settings"])
        others = changed(before, config)
        if len(training["history"]) >= before.schedule.epochs < config.schedule.epochs:  # a finished run is extended
            others = [name for name in others if name != "schedule.epochs"]
            self.extended = True
        if others:
            old, new = training["settings"], to_settings(config)
            raise ConfigError(
                f"{path} cannot be resumed with another {', '.join(f'{n} ({old.get(n)} -> {new[n]})' for n in others)}"
                ": leave them as they are, or start a new run with --pretrained; of a finished run --epochs may grow"
            )
        if training["data"] != names:
            then, now = training["data"].split("\n"), names.split("\n")
            apart = [name for name in then if name not in set(now)] or [name for name in now if name not in then]
            raise ConfigError(
                f"{path} was trained on other images than there are now ({len(then)}, now {len(now)}; for instance "
                f"{(apart or now)[0]}): bring them back, leave them out with --set data.skip_damaged=true, or start a "
                "new run with --pretrained"
            )
        try:
            self._take(average, training)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:  # PyTorch raises all these
            raise WeightsError(
                f"{path}: cannot be resumed, it was not written for this model ({reason(error)})"
            ) from None

    def _take(self, average: dict[str, Tensor], training: dict[str, Any]) -> None:
        self.model.load_state_dict(training["weights"])
        if self.pixel_term is not None:
            self.pixel_term.load_state_dict(training["pixel_term"])
        # of the optimizer the momenta alone; all else is said by the settings
        trained = [value for group in self.optimizer.param_groups for value in group["params"]]
        momenta = {number: kept["momentum_buffer"] for number, kept in training["optimizer"]["state"].items()}
        for number, momentum in momenta.items():
            if not 0 <= number < len(trained) or (momentum is not None and momentum.shape != trained[number].shape):
                raise ValueError(f"its momentum {number} is of no parameter")
        state = {number: {"momentum_buffer": momentum} for number, momentum in momenta.items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if self.ema is not None:
            self.ema.model.load_state_dict(average)
            self.ema.updates = training["ema_updates"]
        if training["step"] < 0:
            raise ValueError(f"step {training['step']}")
        self.step, self.sums, self.history = training["step"], training["sums"], training["history"]


@dataclass(frozen=True)
class _Training:
    """What `TrainState.save` writes."""

    settings: dict[str, Any]
    data: Any  # the names of the images, which may be longer than texts of settings
    weights: dict[str, Any]
    pixel_term: dict[str, Any]
    optimizer: dict[str, Any]
    ema_updates: int
    step: int
    sums: dict[str, float]
    history: tuple[dict[str, float], ...]


def check_training(path: Path, training: dict[str, Any]) -> None:
    """Raise WeightsError unless the state of a run, of a checkpoint `path`, is such as `TrainState.save` writes."""
    try:
        build(_Training, training, "training")
        json.dumps(training["settings"])  # plain values, which can be compared
        if not all(isinstance(name, str) for name in training["settings"]):
            raise SpecError("a setting without a name")
        if not isinstance(training["data"], str):
            raise SpecError("data is no text")
    except (SpecError, TypeError) as error:
        raise WeightsError(f"{path}: holds no state of a training run to resume ({reason(error)})") from None


class _Run:
    """The loop over the steps of one process."""

    def __init__(self, config: TrainConfig, world: World, data: _Data, state: TrainState) -> None:
        self.config, self.world, self.data, self.state = config, world, data, state
        self.folder = Path(config.run.output)
        self.per_epoch = data.order.steps_per_epoch
        self.steps = config.schedule.epochs * self.per_epoch
        self.saved_step, self.first_step = state.step, state.step
        self.started = self.epoch_started = time.monotonic()
        if config.model.sync_batch_norm and world.size > 1:
            state.model = nn.SyncBatchNorm.convert_sync_batchnorm(state.model)
        loss = MultiBoxLoss(state.model.spec, config.loss)
        bf16, freeze = config.precision == "bf16", config.model.freeze_batch_norm
        learner = Learner(
            state.model, loss, state.pixel_term, bf16=bf16, freeze_batch_norm=freeze, compile=config.run.compile
        ).to(world.device)
        self.learner = DistributedDataParallel(learner) if world.size > 1 else learner
        self.records: Records | None = None

    def train(self) -> list[Row]:
        """Take all steps that are left; return a row for each epoch."""
        state, checkpoint_every = self.state, self.config.run.checkpoint_every
        if self.world.leads:
            write_yaml(self.folder / "config.yaml", self.config)
            self.records = Records(self.folder, self._epoch_columns(), state.step, len(state.history), self.steps)
            self._announce()
        if state.fine_tunes and not state.step and self.config.run.evaluate_every:
            self._measure_start()
        try:
            with _StopSignals() as signals, explain_dead_workers():
                if state.step == (len(state.history) + 1) * self.per_epoch:
                    self._end_epoch()  # it was stopped while it evaluated
                for images, targets in self._batches():
                    with finishing():  # so that a step that takes long is not lost
                        stop = self._step(images, targets, signals.seen)
                        if stop or state.step % checkpoint_every == 0:
                            self._save()
                    if stop:
                        self._draw_curves()
                        self._say(f"stopped after step {state.step}: --resume auto goes on from there")
                        raise KeyboardInterrupt
                    if state.step % self.per_epoch == 0:
                        self._end_epoch()
        finally:
            if self.records is not None:
                self.records.close()
        self._draw_curves()
        written = [path for path in (self.folder / BEST, self.folder / LAST) if path.exists()]
        start = max((_score(row) for row in read_epochs(self.folder) if row["epoch"] == 0), default=-math.inf)
        best = max(map(_score, state.history), default=-math.inf)
        if best < start:
            self._say(f"no epoch is better than the weights it started from: AP {best:.2f}, before it {start:.2f}")
        self._say(f"wrote {', '.join(map(str, written))}; next: python -m export.to_onnx --weights {written[0]}")
        return state.history

    def _measure_start(self) -> None:
        """Measure what a fine-tune starts from, as epoch 0: without it nobody could tell what training has changed."""
        if self.data.validation is None:
            return
        start, model = time.monotonic(), self.state.averaged()
        scores = self.data.validation.measure(model, self.world)
        if self.records is not None and scores:
            measured = "/".join(f"{value:.2f}" for value in scores.values())
            row = {"epoch": 0, **scores, "seconds": time.monotonic() - start}
            self.records.add_epoch(row, f"before training  AP {measured}")
        self.epoch_started = self.started = time.monotonic()

    def _draw_curves(self) -> None:
        if self.world.leads:
            with suppress(MissingPackageError):  # of matplotlib; the CSV files hold the same
                draw_curves(self.folder)

    def _batches(self) -> Iterator[tuple[Tensor, Targets]]:
        data, workers = self.data, self.config.run.workers
        return read_batches(data.samples, data.order, self.world, workers, self.state.step, self.steps)

    def _step(self, images: Tensor, targets: Targets, stop: bool) -> bool:
        """Take a step and note it; return whether any process was asked to stop."""
        config, state, world = self.config, self.state, self.world
        seed_step(config.seed, state.step, world.rank)
        lr = config.optimizer.lr * lr_factor(state.step, self.per_epoch, config.schedule)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        images = images.to(world.device, non_blocking=True)
        losses, norm = train_step(self.learner, state.optimizer, images, targets, config.optimizer.clip_norm)
        if state.ema is not None:
            state.ema.update(state.model)
        # one small tensor brings all figures to the host and to the other processes
        report = torch.stack([value.detach().to(world.device, torch.float64) for value in (*losses, norm)])
        reports = world.gather_rows(torch.cat([report, report.new_tensor([stop])]))
        if not all(math.isfinite(value) for row in reports for value in row):
            self._refuse_non_finite(reports)
        state.step += 1
        row = _step_row(reports)
        state.sums = {name: state.sums.get(name, 0.0) + value for name, value in row.items()}
        if self.records is not None:
            self.records.add_step({"step": state.step, "epoch": len(state.history) + 1, "lr": lr, **row})
        return any(values[-1] for values in reports)

    def _refuse_non_finite(self, reports: list[list[float]]) -> NoReturn:
        """Name the step and its images; weights that are on disk were good."""
        step, dataset = self.state.step, self.data.dataset
        # where only the gradient overflowed, it may have been any process's
        guilty = [rank for rank, row in enumerate(reports) if not all(map(math.isfinite, row[:-2]))]
        ranks = guilty or range(len(reports))
        images = [
            dataset.samples[index % len(dataset)].name
            for rank in ranks
            for index in self.data.order.images(step, dataclasses.replace(self.world, rank=rank))
        ]
        saved = self.saved_step
        kept = f"{self.folder / LAST} is from step {saved}" if saved else "no checkpoint was written"
        raise NonFiniteError(
            f"step {step + 1}: the {'loss' if guilty else 'gradient'} is not finite: try a lower --lr, more warm-up "
            f"or --precision fp32; {kept}. Images of the step: {', '.join(images)}"
        )

    def _end_epoch(self) -> None:
        """Evaluate if it is time, and note the epoch."""
        config, state, validation = self.config, self.state, self.data.validation
        epoch, seconds = len(state.history) + 1, time.monotonic() - self.epoch_started
        row = {"epoch": epoch, **{name: value / self.per_epoch for name, value in state.sums.items()}}
        scores: Scores = {}
        every = config.run.evaluate_every
        if validation is not None and (epoch == config.schedule.epochs or (every and epoch % every == 0)):
            self._save()  # it may take long
            model = state.averaged()
            self.world.agree(model)  # the running statistics of batch normalisation are each process's own
            scores = validation.measure(model, self.world)
            if not scores:
                self._say("nothing was measured: no face of the validation counts, they are all too small")
        best = max((_score(past) for past in state.history if scores.keys() <= past.keys()), default=-math.inf)
        state.history.append({**row, **scores})
        state.sums = {}
        if self.world.leads and scores and _score(scores) > best:
            figures = {"settings": to_settings(config), "scores": scores, "epoch": epoch}
            save_checkpoint(self.folder / BEST, state.averaged(), **figures)
        if self.records is not None:
            done = (state.step - self.first_step) or 1
            left = (time.monotonic() - self.started) / done * (self.steps - state.step)
            line = _epoch_line(row, scores, config.schedule.epochs, _score(scores) > best)
            line += f"  {_clock(seconds)}, {_clock(left)} left"
            self.records.add_epoch({**row, **scores, "seconds": seconds}, line)
        self._save()  # after the row: one that is written twice is taken back, one that is missing stays so
        self.epoch_started = time.monotonic()

    def _save(self) -> None:
        if self.world.leads:
            self.state.save(self.folder / LAST, self.config, self.data.names)
        self.saved_step = self.state.step

    def _epoch_columns(self) -> list[str]:
        levels = self.data.validation.levels if self.data.validation else ()
        return ["epoch", *REPORTED, *levels, "seconds"]

    def _announce(self) -> None:
        data, config = self.data, self.config
        print(f"{data.dataset.name}: {data.dataset.report.summary()}")
        print(
            f"{config.model.backbone} on {self.world.device.type} in {config.precision}, processes: {self.world.size}; "
            f"{counted(config.schedule.epochs, 'epoch')} of {self.per_epoch} steps of {data.order.batch} images of "
            f"{config.data.size}x{config.data.size}"
        )
        print(f"measured: {data.validation.what if data.validation else 'nothing, there are no other labelled images'}")
        if self.state.step:
            print(f"resumed after step {self.state.step} of {self.steps}")
            more = config.schedule.epochs - len(self.state.history)
            if more > 0 and self.state.extended:
                lr = config.optimizer.lr * lr_factor(self.state.step, self.per_epoch, config.schedule)
                print(f"the run was finished: {counted(more, 'more epoch')}, from a learning rate of {lr:.2g}")

    def _say(self, text: str) -> None:
        if self.world.leads:
            print(text)


def _first_images(samples: Samples, mean_bgr: tuple[int, int, int]) -> Iterator[Tensor]:
    """Yield some images as they are trained, one at a time: (1, 3, H, W) float32, BGR minus the mean."""
    for index in np.unique(np.linspace(0, len(samples) - 1, UNFOLDING_IMAGES).astype(int)).tolist():
        image = torch.from_numpy(samples[index][0]).permute(2, 0, 1)[None]
        yield image.float() - torch.tensor(mean_bgr).view(3, 1, 1)


REPORTED = STEP_COLUMNS[3:]
"""What a step reports: the fields of `Losses`, and the norm of the gradient."""

_COUNTS = ("positives", "landmark_positives", "dropped")


def _step_row(reports: list[list[float]]) -> Row:
    """Return what a step reports over all processes: sums of counts, means of everything else."""
    return {
        name: math.fsum(values) / (1 if name in _COUNTS else len(reports))
        for name, values in zip(REPORTED, zip(*reports, strict=True), strict=False)
    }


def _score(scores: Row) -> float:
    """Return what the best checkpoint is chosen by: the mean of the levels; -inf where nothing was measured."""
    values = [scores[level] for level in (*LEVELS, SIMPLE_LEVEL) if level in scores]
    return sum(values) / len(values) if values else -math.inf


def _epoch_line(row: Row, scores: Row, epochs: int, best: bool) -> str:
    terms = ", ".join(f"{name} {row[name]:.3f}" for name in REPORTED[1:5] if row[name])
    measured = "  AP " + "/".join(f"{value:.2f}" for value in scores.values()) if scores else ""
    return f"epoch {row['epoch']:.0f}/{epochs}  loss {row['total']:.3f} ({terms}){measured}{' (best)' * best}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class _StopSignals:
    """While it is open, SIGINT, SIGTERM and SIGHUP are noted in `seen`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.seen = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup's, others'
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """On a CPU the same steps give the same bits, which costs nothing measurable; on CUDA speed comes first."""
    memory: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    if device.type == "cpu":
        torch.set_deterministic_debug_mode("error")
        memory.fill_uninitialized_memory = False  # this does cost, and we read no such memory
    else:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        memory.fill_uninitialized_memory = before[1]
