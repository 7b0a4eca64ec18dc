"""Model repositories for Triton: their configuration, and the client against a gRPC server that serves them.

No Triton runs here. The server below holds to the protocol and to config.pbtxt as Triton does, and runs the model.onnx
of the repository in ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from examples.triton_client import ServerError, TritonRetinaFace
from examples.triton_client import main as client_main
from export.to_triton import PLUGIN_FILE, PLUGIN_REPORT, TritonOptions, main, parse_arguments, plan, write
from facespec.errors import BuildError, FrameError, ModelFileError, NonFiniteError, OutputError, SpecError
from facespec.images import write_image
from facespec.letterbox import Frame
from facespec.spec import ModelSpec
from tests.engines import write_engine
from trt_runtime import load_detector
from trt_runtime.gpu.sidecar import check_engine, read_sidecar
from trt_runtime.kernels import PLUGIN

grpc = pytest.importorskip("grpc", reason="pip install -e '.[serve]'")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="pip install -e '.[serve]'")

NUMPY = {"TYPE_UINT8": np.uint8, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32}
ORT = {"TYPE_UINT8": "tensor(uint8)", "TYPE_INT32": "tensor(int32)", "TYPE_FP32": "tensor(float)"}


def _config(folder: Path) -> Any:
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def _kind(item: Any) -> str:
    return model_config_pb2.DataType.Name(item.data_type)


def _shape(item: Any) -> list[int]:
    """Return what the model itself sees after the batch."""
    return list(item.reshape.shape) if item.HasField("reshape") else list(item.dims)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin library of a user's own; nothing is compiled."""
    library = tmp_path / "own" / "mine.so"
    library.parent.mkdir()
    library.write_bytes(b"\x7fELF")
    library.with_suffix(".json").write_text('{"headers_version": "10.16.0"}')
    monkeypatch.setenv("RETINAFACE_PLUGIN", str(library))
    return library


def _export(model: Path, out: Path, **options: Any) -> Path:
    options_ = TritonOptions(model, out, **options)
    write(plan(options_))
    return options_.folder


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_an_onnx_configuration_is_what_onnx_runtime_finds(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(f"{kind}_onnx")
    folder = _export(model, tmp_path / "deep" / "repository", name="faces", instances=3, max_queue_delay_us=77)
    assert sorted(os.listdir(folder)) == ["1", "README.md", "config.pbtxt"]
    assert os.listdir(folder.parent) == ["faces"]
    assert (folder / "1" / "model.onnx").read_bytes() == model.read_bytes()
    config = _config(folder)
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
    assert (config.name, config.backend, config.platform, config.max_batch_size) == ("faces", "onnxruntime", "", 8)
    for described, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [item.name for item in described] == [item.name for item in found]
        for item, real in zip(described, found, strict=True):
            assert ORT[_kind(item)] == real.type
            assert [-1 if isinstance(side, str) else side for side in real.shape] == [-1, *_shape(item)]
            assert len(item.dims) > 0  # Triton's rule
    (group,) = config.instance_group
    assert (group.count, group.kind) == (3, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert list(config.dynamic_batching.preferred_batch_size) == [8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 77
    assert not config.HasField("optimization")
    spec = ModelSpec.from_json(config.parameters["retinaface.spec"].string_value)
    assert spec == load_detector(model).spec
    assert config.parameters["retinaface.spec_sha256"].string_value == spec.sha256()
    assert float(config.parameters["retinaface.score_floor"].string_value) == spec.decode.score_threshold
    assert ("retinaface.size_hw" in config.parameters) == (kind == "static")
    # the warm-up runs, as it is described
    for sample in config.model_warmup:
        images = sample.inputs["images"]
        assert images.zero_data
        batch = np.zeros((sample.batch_size, *images.dims), NUMPY[_kind(images)])
        if sample.batch_size == 1:
            session.run(None, {"images": batch})
    assert [sample.batch_size for sample in config.model_warmup] == [1, 8]


def test_an_engine_configuration_is_what_its_sidecar_says(tmp_path: Path, plugin: Path) -> None:
    engine = write_engine(tmp_path)
    folder = _export(engine, tmp_path / "repository")
    assert sorted(os.listdir(folder)) == [
        *("1", "README.md", "config.pbtxt", "libretinaface_plugin.json", "libretinaface_plugin.so"),
    ]
    assert (folder / "libretinaface_plugin.so").read_bytes() == plugin.read_bytes()
    assert check_engine(folder / "1" / "model.plan", read_sidecar(folder / "1" / "model.plan")) == []
    config = _config(folder)
    assert (config.platform, config.backend, config.max_batch_size) == ("tensorrt_plan", "", 16)
    assert list(config.input[0].dims) == [320, 640, 3]
    found = {item.name: (_kind(item), _shape(item)) for item in config.output}
    assert found == {
        "num_detections": ("TYPE_INT32", []),
        "boxes": ("TYPE_FP32", [99, 4]),
        "scores": ("TYPE_FP32", [99]),
        "landmarks": ("TYPE_FP32", [99, 5, 2]),
        "num_candidates": ("TYPE_INT32", []),
    }
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.optimization.cuda.graphs
    warmed = [(sample.batch_size, list(sample.inputs["images"].dims)) for sample in config.model_warmup]
    assert warmed == [(batch, [320, 640, 3]) for batch in (1, 4, 16)]
    assert config.parameters["retinaface.size_hw"].string_value == "320x640"
    readme = (folder / "README.md").read_text()
    assert "--gpus all" in readme
    assert "plugins=/models/retinaface/libretinaface_plugin.so" in readme
    assert "10.14.1" in readme
    assert str(tmp_path) not in readme
    # fewer frames, sizes that vary: no graphs, which serve one shape
    shapes = {"min": (1, 320, 320, 3), "opt": (4, 640, 640, 3), "max": (8, 640, 1280, 3)}
    folder = _export(write_engine(tmp_path, profile=shapes), tmp_path / "repository", name="small", max_batch=1)
    config = _config(folder)
    assert (config.max_batch_size, list(config.input[0].dims)) == (1, [-1, -1, 3])
    assert not config.HasField("dynamic_batching")
    assert not config.HasField("optimization")
    (sample,) = config.model_warmup
    assert (sample.batch_size, list(sample.inputs["images"].dims)) == (1, [640, 640, 3])
    assert config.parameters["retinaface.size_hw"].string_value == "640x640"


def test_engines_that_triton_cannot_run(tmp_path: Path, plugin: Path) -> None:
    options = TritonOptions(tmp_path / "f.engine", tmp_path / "out")
    write_engine(tmp_path, flavor="rtx")
    with pytest.raises(ModelFileError, match=r"TensorRT-RTX.*--weights w --fp16 --flavor tensorrt --out f\.engine"):
        plan(options)
    write_engine(tmp_path, profile={"min": (2, 320, 640, 3), "opt": (4, 320, 640, 3), "max": (16, 320, 640, 3)})
    with pytest.raises(SpecError, match="--batch 1:4:16"):
        plan(options)
    write_engine(tmp_path)
    with pytest.raises(SpecError, match="--batch 1:4:17"):
        plan(dataclasses.replace(options, max_batch=17))
    with pytest.raises(SpecError, match="always runs on the GPU"):
        plan(dataclasses.replace(options, gpu=True))
    plugin.with_suffix(".json").write_text('{"headers_version": "11.1.0"}')
    with pytest.raises(BuildError, match=r"headers of TensorRT 11\.1\.0.*of TensorRT 10\.14\.1"):
        plan(options)
    options.model.write_bytes(b"ftrt and other bytes")
    with pytest.raises(ModelFileError, match="bytes, its sidecar says"):
        plan(options)
    assert not options.out.exists()


def test_onnx_files_that_triton_cannot_run(static_onnx: Path, tmp_path: Path, error_line: Callable[..., str]) -> None:
    model = onnx.load(static_onnx)
    model.opset_import.append(onnx.helper.make_opsetid(PLUGIN.domain, 1))
    onnx.save(model, tmp_path / "plugin.onnx")
    line = error_line(main, tmp_path / "plugin.onnx", "--out", "repository")
    assert "plugin form" in line
    assert "python -m export.to_onnx" in line
    del model.metadata_props[:], model.opset_import[-1]
    onnx.save(model, tmp_path / "foreign.onnx")
    assert "not a detector" in error_line(main, tmp_path / "foreign.onnx", "--out", "repository")
    assert "export it first" in error_line(main, "w.pth", "--out", "repository")
    assert "no such" in error_line(main, "none.onnx", "--out", "repository")
    assert "no such model file" in error_line(main, "none.engine", "--out", "repository")
    for option, value in (("--name", "a/b"), ("--version", 0), ("--instances", 0), ("--max-batch", 0)):
        assert option in error_line(main, static_onnx, "--out", "repository", option, value)
    assert not (tmp_path / "repository").exists()


def test_weights_beside_an_onnx_file_come_along(static_onnx: Path, tmp_path: Path, astronaut: Frame) -> None:
    (tmp_path / "large").mkdir()
    onnx.save(onnx.load(static_onnx), tmp_path / "large" / "m.onnx", save_as_external_data=True, location="m.data")
    folder = _export(tmp_path / "large" / "m.onnx", tmp_path / "repository")
    shutil.rmtree(tmp_path / "large")
    assert sorted(os.listdir(folder / "1")) == ["m.data", "model.onnx"]
    assert len(load_detector(folder / "1" / "model.onnx").detect(astronaut)) == 1


def test_a_folder_is_written_whole_and_replaced_on_demand(
    static_onnx: Path, dynamic_onnx: Path, tmp_path: Path
) -> None:
    out = tmp_path / "repository"
    folder = _export(static_onnx, out)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"retinaface/1 is there.*--version.*--force"):
        _export(static_onnx, out)
    with pytest.raises(OutputError, match="another model"):
        _export(dynamic_onnx, out, version=2)
    with pytest.raises(OutputError, match="another model"):
        _export(static_onnx, out, version=2, instances=2)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert _export(static_onnx, out, version=2) == folder
    assert sorted(os.listdir(folder)) == ["1", "2", "README.md", "config.pbtxt"]
    assert (folder / "2" / "model.onnx").read_bytes() == static_onnx.read_bytes()
    with pytest.raises(OutputError, match="would be written"):
        _export(folder / "1" / "model.onnx", out, force=True)
    _export(dynamic_onnx, out, force=True)
    assert sorted(os.listdir(folder)) == ["1", "README.md", "config.pbtxt"]
    assert (folder / "1" / "model.onnx").read_bytes() == dynamic_onnx.read_bytes()
    assert os.listdir(out) == ["retinaface"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        _export(static_onnx, tmp_path / "file" / "repository")


def test_an_interrupted_export_leaves_what_was_there(
    static_onnx: Path, dynamic_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _export(static_onnx, tmp_path)

    def interrupted(self: Path, target: Path) -> Path:
        if target == folder and self.name == "new":
            raise KeyboardInterrupt
        os.rename(self, target)
        return target

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _export(dynamic_onnx, tmp_path, force=True)
    assert (folder / "1" / "model.onnx").read_bytes() == static_onnx.read_bytes()
    assert os.listdir(tmp_path) == ["retinaface"]


class _Server:
    """A gRPC server of the inference protocol for the models of a repository."""

    def __init__(self, repository: Path) -> None:
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        server = self
        self.repository, self.batches, self.poison = repository, list[tuple[int, ...]](), False

        class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
            def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802, the protocol's name
                if not (repository / request.name / "config.pbtxt").is_file():
                    context.abort(
                        grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found"
                    )
                return service_pb2.ModelConfigResponse(config=_config(repository / request.name))

            def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
                return server.infer(request, context, service_pb2.ModelInferResponse())

        limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.grpc = grpc.server(ThreadPoolExecutor(2), options=limits)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), self.grpc)
        self.address = f"localhost:{self.grpc.add_insecure_port('localhost:0')}"
        self.grpc.start()

    def infer(self, request: Any, context: Any, response: Any) -> Any:
        """Check a request against config.pbtxt, run the model, reshape its outputs as config.pbtxt says."""
        config = _config(self.repository / request.model_name)
        (item,), (images,) = config.input, request.inputs
        shape = tuple(images.shape)
        fits = len(shape) == 4 and all(want in (-1, side) for want, side in zip(item.dims, shape[1:], strict=True))
        if images.name != item.name or f"TYPE_{images.datatype}" != _kind(item) or not fits:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"unexpected shape for input '{images.name}': {shape}")
        assert 1 <= shape[0] <= config.max_batch_size
        self.batches.append(shape)
        session = onnxruntime.InferenceSession(self.repository / request.model_name / "1" / "model.onnx")
        batch = np.frombuffer(request.raw_input_contents[0], NUMPY[_kind(item)]).reshape(shape)
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"images": batch}), strict=True))
        if self.poison:
            outputs["num_candidates"][:] = -1
        for described in config.output:
            values = outputs[described.name]
            assert list(values.shape[1:]) == _shape(described)
            kind = _kind(described).removeprefix("TYPE_")
            response.outputs.add(name=described.name, datatype=kind, shape=[shape[0], *described.dims])
            response.raw_output_contents.append(values.tobytes())
        return response


@pytest.fixture(scope="module")
def server(static_onnx: Path, dynamic_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Server]:
    repository = tmp_path_factory.mktemp("repository")
    _export(static_onnx, repository)
    _export(dynamic_onnx, repository, name="dynamic")
    _export(static_onnx, repository, name="foreign")
    config = (repository / "foreign" / "config.pbtxt").read_text()
    (repository / "foreign" / "config.pbtxt").write_text(config.replace('"retinaface.spec"', '"another.spec"'))
    server = _Server(repository)
    yield server
    server.grpc.stop(None).wait()


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_client_finds_what_the_detector_finds(
    kind: str, request: pytest.FixtureRequest, server: _Server, photographs: dict[str, Frame], crowd: Frame
) -> None:
    model = request.getfixturevalue(f"{kind}_onnx")
    with TritonRetinaFace(server.address, "retinaface" if kind == "static" else kind, score_threshold=0.3) as client:
        local = load_detector(model, score_threshold=0.3)
        for frame in (*photographs.values(), crowd, crowd[:333, :1001]):
            ours, theirs = client.detect(frame), local.detect(frame)
            assert len(theirs) >= 1
            for field in ("boxes", "scores", "landmarks"):
                np.testing.assert_allclose(getattr(ours, field), getattr(theirs, field), rtol=1e-5, atol=1e-3)
            assert (ours.frame_hw, ours.truncated) == (theirs.frame_hw, theirs.truncated)
        assert server.batches[-1] == ((1, 320, 320, 3) if kind == "static" else (1, 352, 1024, 3))


def test_the_client_on_a_model_of_any_size(server: _Server, dynamic_onnx: Path, crowd: Frame) -> None:
    with TritonRetinaFace(server.address, "dynamic", size_hw=(256, 640)) as client:
        ours, theirs = client.detect(crowd), load_detector(dynamic_onnx, size_hw=(256, 640)).detect(crowd)
    assert server.batches[-1] == (1, 256, 640, 3)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, rtol=1e-5, atol=1e-3)


def test_what_the_client_refuses(server: _Server, astronaut: Frame) -> None:
    with pytest.raises(ServerError, match="unknown model: 'other'"):
        TritonRetinaFace(server.address, "other")
    with pytest.raises(ModelFileError, match=r"not a model written by python -m export\.to_triton"):
        TritonRetinaFace(server.address, "foreign")
    with pytest.raises(SpecError, match="320x320 only, not 640x640"):
        TritonRetinaFace(server.address, size_hw=(640, 640))
    with pytest.raises(SpecError, match=r"below the model's floor of 0\.02"):
        TritonRetinaFace(server.address, score_threshold=0.01)
    with TritonRetinaFace(server.address) as client:
        with pytest.raises(FrameError, match="uint8"):
            client.detect(astronaut.astype(np.float32))
        server.poison = True
        try:
            with pytest.raises(NonFiniteError):
                client.detect(astronaut)
        finally:
            server.poison = False
        client.size_hw = (352, 352)
        with pytest.raises(ServerError, match="unexpected shape"):
            client.detect(astronaut)


def test_the_client_command(
    server: _Server,
    astronaut: Frame,
    tmp_path: Path,
    command: Callable[..., subprocess.CompletedProcess[str]],
    error_line: Callable[..., str],
) -> None:
    write_image(tmp_path / "photo.png", astronaut)
    result = command("examples.triton_client", "photo.png", "--out", "faces.png", "--server", server.address)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "wrote faces.png: 1 face"
    assert (tmp_path / "faces.png").stat().st_size > 1000
    assert "no answer" in error_line(client_main, "photo.png", "--server", "localhost:1")
    assert "unknown model" in error_line(client_main, "photo.png", "--server", server.address, "--model", "none")


def test_the_command(static_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(static_onnx), "--out", str(tmp_path), "--max-batch", "2", "--gpu"]) == 0
    config = _config(tmp_path / "retinaface")
    assert config.max_batch_size == 2
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    said = capsys.readouterr().out
    assert "320x320, up to 2 frames" in said
    assert json.loads(config.parameters["retinaface.spec"].string_value)["format"] == 1


def test_options_have_bounds(tmp_path: Path) -> None:
    def accepted(**options: Any) -> bool:
        named = ""
        try:
            TritonOptions(tmp_path / "m.onnx", tmp_path, **options)
        except SpecError as error:
            named = str(error).split()[0]
        assert named in ("", *(f"--{option.replace('_', '-')}" for option in options))
        return not named

    for name in ("a", "A.b-c_9", "_x", "9", "a" * 100):
        assert accepted(name=name)
    for name in ("", ".a", "-a", "a/b", "a b", "ä", "a" * 101, "a\n"):
        assert not accepted(name=name)
    for option, least, most in (
        *(("version", 1, 10**9), ("instances", 1, 256), ("max_batch", 1, 65535), ("max_queue_delay_us", 0, 10**7)),
    ):
        assert accepted(**{option: least})
        assert accepted(**{option: most})
        assert not accepted(**{option: least - 1})
        assert not accepted(**{option: most + 1})


def test_what_is_laid_out_by_default(static_onnx: Path, tmp_path: Path) -> None:
    options = parse_arguments(["m.onnx", "--out", "r"])
    assert options == TritonOptions(Path("m.onnx"), Path("r"))
    assert (options.name, options.version, options.instances, options.max_batch) == ("retinaface", 1, 1, None)
    assert (options.max_queue_delay_us, options.gpu, options.force) == (0, False, False)
    line = ["m.engine", "--out", "r", "--name", "n", "--version", "3", "--instances", "2", "--max-batch", "4"]
    line += ["--max-queue-delay-us", "9", "--gpu", "--force"]
    assert parse_arguments(line) == TritonOptions(Path("m.engine"), Path("r"), "n", 3, 2, 4, 9, True, True)
    layout = plan(TritonOptions(static_onnx, tmp_path, max_batch=5))
    assert (layout.best_batch, layout.max_batch, layout.on_gpu) == (5, 5, False)
    assert (layout.versioned, layout.shared) == ({"model.onnx": static_onnx}, {})
    assert "--gpus" not in layout.readme()
    assert '-v "$PWD":/models:ro' in layout.readme()
    assert "plugins=" not in layout.readme()
    assert "--model retinaface\n" in layout.readme()
    gpu = plan(TritonOptions(static_onnx, tmp_path, gpu=True))
    assert gpu.on_gpu
    assert "--gpus all" in gpu.readme()


def test_batches_of_an_engine(tmp_path: Path, plugin: Path) -> None:
    """All that its profile allows; the best one only as far as it is allowed."""
    engine = write_engine(tmp_path)
    for asked, best, most in ((None, 4, 16), (16, 4, 16), (3, 3, 3), (4, 4, 4)):
        model = plan(TritonOptions(engine, tmp_path, max_batch=asked))
        assert (model.best_batch, model.max_batch) == (best, most)
    layout = plan(TritonOptions(engine, tmp_path))
    assert layout.versioned == {"model.plan": engine, "model.plan.json": engine.with_name("f.engine.json")}
    assert layout.shared == {PLUGIN_FILE: plugin, PLUGIN_REPORT: plugin.with_suffix(".json")}
    assert (layout.fixed_hw, layout.size_hw, layout.sidecar is not None) == ((320, 640), (320, 640), True)
    assert "A TensorRT 10.14.1 engine for sm_86, fp16." in layout.readme()
    # one version of a size in one direction only is no fixed size
    shapes = {"min": (1, 320, 640, 3), "opt": (1, 320, 640, 3), "max": (1, 320, 672, 3)}
    model = plan(TritonOptions(write_engine(tmp_path, profile=shapes), tmp_path))
    assert (model.fixed_hw, model.size_hw) == (None, (320, 640))
    # without a report there is nothing to go by: the headers are taken to fit
    plugin.with_suffix(".json").unlink()
    layout = plan(TritonOptions(engine, tmp_path))
    assert layout.shared == {PLUGIN_FILE: plugin}
    # another kind of file
    (tmp_path / "m.txt").write_text("x")
    with pytest.raises(ModelFileError, match=r"expected an ONNX file \(\.onnx\) or an engine"):
        plan(TritonOptions(tmp_path / "m.txt", tmp_path))
    with pytest.raises(ModelFileError, match=r"python -m export\.to_onnx --weights .*w\.pth"):
        plan(TritonOptions(tmp_path / "w.pth", tmp_path))


def test_a_new_version_replaces_nothing(tmp_path: Path, static_onnx: Path) -> None:
    folder = _export(static_onnx, tmp_path, version=7, name="n")
    assert sorted(os.listdir(folder)) == ["7", "README.md", "config.pbtxt"]
    readme = folder / "README.md"
    readme.write_text("mine")
    _export(static_onnx, tmp_path, version=8, name="n")
    assert sorted(os.listdir(folder)) == ["7", "8", "README.md", "config.pbtxt"]
    assert readme.read_text() == "mine"
    assert os.listdir(folder / "8") == ["model.onnx"]
    (folder / "config.pbtxt").unlink()
    with pytest.raises(OutputError, match="another model or other settings"):
        _export(static_onnx, tmp_path, version=9, name="n")
    # forced, the whole folder is new, and only that
    (tmp_path / "other").mkdir()
    assert _export(static_onnx, tmp_path, version=9, name="n", force=True) == folder
    assert sorted(os.listdir(folder)) == ["9", "README.md", "config.pbtxt"]
    assert sorted(os.listdir(tmp_path)) == ["n", "other"]
