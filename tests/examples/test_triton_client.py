"""The example client against a server of the protocol that answers what a test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.triton_client import ServerError, TritonRetinaFace, main
from facespec.errors import FrameError, ImageError, ModelFileError, OutputError, SpecError
from facespec.images import read_image, write_image
from facespec.letterbox import Letterbox
from facespec.spec import DecodeSpec, ModelSpec, PreprocessSpec

grpc: Any = pytest.importorskip("grpc")
service_pb2: Any = pytest.importorskip("tritonclient.grpc.service_pb2")
service_pb2_grpc: Any = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")

SPEC = ModelSpec(preprocess=PreprocessSpec((10, 20, 30)), decode=DecodeSpec(score_threshold=0.3, max_detections=4))


def _faces() -> dict[str, np.ndarray]:
    """Two faces over 0.5 and one below, in pixels of the network's input."""
    boxes = np.zeros((1, 4, 4), np.float32)
    boxes[0, :3] = [[8, 4, 24, 20], [40, 8, 56, 24], [1, 1, 9, 9]]
    return {
        "num_detections": np.array([[3]], np.int32),
        "boxes": boxes,
        "scores": np.array([[0.9, 0.6, 0.4, 0]], np.float32),
        "landmarks": np.arange(40, dtype=np.float32).reshape(1, 4, 5, 2),
        "num_candidates": np.array([[7]], np.int32),
    }


class _Server:
    """A model of a size, and what it answers."""

    def __init__(self) -> None:
        server = self
        self.sides, self.parameters = [64, 96], {"retinaface.spec": SPEC.to_json(), "retinaface.size_hw": "64x96"}
        self.outputs = _faces()
        self.batches: list[np.ndarray] = []
        self.hold = threading.Event()
        self.hold.set()

        class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
            def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
                if request.name != "faces":
                    context.abort(grpc.StatusCode.NOT_FOUND, f"unknown\n  model {request.name}")
                response = service_pb2.ModelConfigResponse()
                response.config.input.add(name="other", dims=[1, 2, 3])
                response.config.input.add(name="images", dims=[*server.sides, 3])
                for key, value in server.parameters.items():
                    response.config.parameters[key].string_value = value
                return response

            def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
                server.hold.wait(20)
                (images,) = request.inputs
                assert (images.name, images.datatype) == ("images", "UINT8")
                server.batches.append(
                    np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(tuple(images.shape))
                )
                response = service_pb2.ModelInferResponse()
                for name, values in server.outputs.items():
                    kind = {"int32": "INT32", "float32": "FP32", "float64": "FP64"}[str(values.dtype)]
                    response.outputs.add(name=name, datatype=kind, shape=values.shape)
                    response.raw_output_contents.append(values.tobytes())
                return response

        self.grpc = grpc.server(ThreadPoolExecutor(2))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), self.grpc)
        self.address = f"localhost:{self.grpc.add_insecure_port('localhost:0')}"
        self.grpc.start()


@pytest.fixture(scope="module")
def running() -> Iterator[_Server]:
    server = _Server()
    yield server
    server.hold.set()
    server.grpc.stop(None).wait()


@pytest.fixture
def server(running: _Server) -> _Server:
    """As it is at first."""
    running.sides, running.outputs = [64, 96], _faces()
    running.parameters = {"retinaface.spec": SPEC.to_json(), "retinaface.size_hw": "64x96"}
    running.batches.clear()
    return running


FRAME = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)


def test_a_frame_goes_letterboxed_and_faces_come_back_in_its_pixels(server: _Server) -> None:
    with TritonRetinaFace(server.address, "faces") as client:
        assert (client.spec, client.score_threshold, client.size_hw) == (SPEC, 0.5, (64, 96))
        found = client.detect(FRAME)
    box = Letterbox((100, 100), (64, 64), (64, 96))
    (batch,) = server.batches
    np.testing.assert_array_equal(batch, box.apply(FRAME, (10, 20, 30))[None])
    factor = np.float32(100 / 64)
    np.testing.assert_allclose(found.boxes, np.float32([[8, 4, 24, 20], [40, 8, 56, 24]]) * factor)
    np.testing.assert_allclose(found.landmarks, np.arange(20, dtype=np.float32).reshape(2, 5, 2) * factor)
    np.testing.assert_array_equal(found.scores, np.float32([0.9, 0.6]))
    assert (found.frame_hw, found.truncated) == ((100, 100), False)
    with TritonRetinaFace(server.address, "faces", score_threshold=0.35) as client:
        assert len(client.detect(FRAME)) == 3


def test_a_model_of_any_size_takes_each_frame_at_its_own_or_as_asked(server: _Server) -> None:
    server.sides = [-1, -1]
    del server.parameters["retinaface.size_hw"]
    for size_hw, expected in ((None, (1, 128, 128, 3)), ((32, 160), (1, 32, 160, 3))):
        with TritonRetinaFace(server.address, "faces", size_hw=size_hw) as client:
            client.detect(FRAME)
        assert server.batches[-1].shape == expected
    server.sides = [64, 96]
    with TritonRetinaFace(server.address, "faces", size_hw=(64, 96)) as client:  # its own may be said
        assert client.size_hw == (64, 96)
    with pytest.raises(SpecError, match="takes 64x96 only, not 96x64"):
        TritonRetinaFace(server.address, "faces", size_hw=(96, 64))


@pytest.mark.parametrize("name", list(_faces()))
def test_outputs_that_are_not_those_of_the_spec_are_refused(server: _Server, name: str) -> None:
    good = server.outputs[name]
    with TritonRetinaFace(server.address, "faces") as client:
        for bad in (None, good.astype(np.float64), good[:, :0], np.concatenate([good, good])):
            server.outputs = _faces()
            if bad is None:
                del server.outputs[name]
            else:
                server.outputs[name] = bad
            with pytest.raises(ModelFileError, match=f"faces at {server.address}: output {name} is not what its spec"):
                client.detect(FRAME)


def test_what_is_no_model_of_ours_is_told(server: _Server, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    close = TritonRetinaFace.close
    monkeypatch.setattr(TritonRetinaFace, "close", lambda self: (closed.append(self), close(self))[1])
    with pytest.raises(ServerError, match=f"^other at {server.address}: unknown model other$"):
        TritonRetinaFace(server.address, "other")
    server.parameters = {"another": "x"}
    with pytest.raises(ModelFileError, match=r"not a model written by python -m export\.to_triton"):
        TritonRetinaFace(server.address, "faces")
    server.parameters = {"retinaface.spec": "{"}
    with pytest.raises(SpecError, match="not JSON"):
        TritonRetinaFace(server.address, "faces")
    server.parameters = {"retinaface.spec": SPEC.to_json()}
    with pytest.raises(SpecError, match=r"below the model's floor of 0\.3"):
        TritonRetinaFace(server.address, "faces", score_threshold=0.2)
    assert len(closed) == 4  # no connection is left behind
    with TritonRetinaFace(server.address, "faces") as client:
        with pytest.raises(FrameError, match="uint8"):
            client.detect(FRAME.astype(np.float32))
    assert closed[-1] is client
    assert not server.batches


def test_a_server_that_does_not_answer_in_time(server: _Server) -> None:
    with TritonRetinaFace(server.address, "faces", timeout_s=0.3) as client:
        server.hold.clear()
        try:
            with pytest.raises(ServerError, match=f"^{server.address}: no answer from a Triton server's gRPC service"):
                client.detect(FRAME)
        finally:
            server.hold.set()


def test_the_command(server: _Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, out = tmp_path / "photo.png", tmp_path / "faces.png"
    write_image(photo, FRAME)
    options = ["--server", server.address, "--model", "faces"]
    assert main([str(photo), "--out", str(out), *options, "--score", "0.7"]) == 0
    assert capsys.readouterr().out.splitlines() == ["12 6 38 31 0.9", f"wrote {out}: 1 face"]
    drawn = read_image(out)
    assert drawn.shape == FRAME.shape
    assert (drawn != FRAME).any()
    np.testing.assert_array_equal(read_image(photo), FRAME)
    server.sides = [-1, -1]
    assert main([str(photo), "--out", str(out), *options, "--size", "32x64"]) == 0
    assert server.batches[-1].shape == (1, 32, 64, 3)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {out}: 2 faces"


def test_the_command_refuses_before_it_asks_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "photo.png"
    write_image(photo, FRAME)
    none = ["--server", "localhost:1"]
    refused: list[tuple[list[str], type[Exception], str]] = [
        ([str(photo), "--out", "faces.gif", *none], OutputError, r"--out faces\.gif: give a name that ends in"),
        ([str(photo), "--server", "http://localhost:1"], ServerError, "give HOST:PORT alone"),
        ([str(photo), "--out", str(photo), *none], OutputError, "is a file that is read"),
        ([str(tmp_path / "none.png"), "--out", str(tmp_path / "x.png"), *none], ImageError, "no such file"),
        ([str(photo), "--out", str(tmp_path / "x.png"), *none], ServerError, "localhost:1: no answer"),
    ]
    for arguments, error, words in refused:
        with pytest.raises(error, match=words):
            main(arguments)
    with pytest.raises(SystemExit) as left:
        main([str(photo), "--out", str(tmp_path / "x.png"), "--size", "9x", *none])
    assert left.value.code == 2
    assert "HEIGHTxWIDTH" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_what_the_command_asks_unless_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], defaults: Callable[[str], dict[str, str]]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert defaults(capsys.readouterr().out) == {
        "--out": "faces.jpg", "--server": "localhost:8001", "--model": "retinaface",
        "--score": "0.5, or the model's floor",
    }  # fmt: skip


@pytest.fixture
def defaults() -> Callable[[str], dict[str, str]]:
    """Read the defaults off a help text."""
    import re

    return lambda text: {m[1]: m[2] for m in re.finditer(r"(--\w+) .*?\(default: ([^)]*)\)", text)}
