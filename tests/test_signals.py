"""Commands as a user runs them, and SIGTERM: each ends within 5 s, whatever it reads."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from facespec.images import write_image
from facespec.letterbox import Frame
from tests.conftest import ROOT
from trt_runtime.media.files import VideoFile, VideoWriter


@contextmanager
def _ended_by_sigterm(
    folder: Path, *words: object, when: Callable[[], bool], may_be_done: bool = False
) -> Iterator[None]:
    """Run `python -m WORDS` until `when` holds, and end it unless it `may_be_done`: it must, in time and one line."""
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, words)], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        end = time.monotonic() + 100
        while not when():
            if may_be_done and process.poll() is not None:
                yield
                return
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        process.wait(timeout=60)
        assert time.monotonic() - start < 6  # 5, and what a busy machine adds
        said = process.communicate(timeout=60)[1]  # its children end with it, a moment later
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in said
    # it may not have been running yet; Python ends by SIGINT where C code was calling Python, as in an import of torch
    assert process.returncode in (130, -signal.SIGTERM, -signal.SIGINT)
    yield


class Silent:
    """A server that takes connections and says `greeting`, then nothing; what it read is in `heard`."""

    def __init__(self, greeting: bytes = b"") -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        self.heard = b""
        self.greeting = greeting
        self.clients: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client = self.server.accept()[0]
                self.clients.append(client)
                self.heard += client.recv(4096)
                client.sendall(self.greeting)

    def close(self) -> None:
        for item in (self.server, *self.clients):
            item.close()


@pytest.fixture
def silent() -> Iterator[Callable[..., Silent]]:
    made: list[Silent] = []

    def make(greeting: bytes = b"") -> Silent:
        made.append(Silent(greeting))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.mark.parametrize("scheme", ["rtsp", "http", "tcp"])
def test_a_stream_that_does_not_open_beside_a_video(
    scheme: str, silent: Callable[..., Silent], static_onnx: Path, tmp_path: Path, astronaut: Frame
) -> None:
    """The video is finished: it can be played."""
    server = silent()
    with VideoWriter(tmp_path / "long.mp4", 25) as writer:
        for index in range(400):
            writer.write(np.roll(astronaut[:256, :256], index % 16, axis=1))
    words = [
        "trt_runtime.detect", tmp_path / "long.mp4", f"{scheme}://{server.address}/a", "--model", static_onnx,
        "--out", "out", "--threads", 1, "--backend", "onnxruntime",
    ]  # fmt: skip
    out = tmp_path / "out"

    def under_way() -> bool:
        files = list(out.glob(".long.*.mp4"))
        return bool(server.clients) and bool(files) and files[0].stat().st_size > 0

    with _ended_by_sigterm(tmp_path, *words, when=under_way):
        pass
    assert os.listdir(out) == ["long.mp4"]
    with VideoFile(out / "long.mp4") as video:
        assert 1 <= len(list(video)) < 400


def test_a_model_that_never_ends(static_onnx: Path, tmp_path: Path, astronaut: Frame) -> None:
    """A loop of an ONNX file runs in C code, where Python handles no signal."""
    model = onnx.load(static_onnx)
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("go", TensorProto.BOOL, []),
         helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
         helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    scores = next(node for node in model.graph.node if "scores" in node.output)
    scores.output[list(scores.output).index("scores")] = "scores_once"
    for name, value in (("endless", np.int64((1 << 63) - 1)), ("true", np.bool_(True))):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    model.graph.node.append(helper.make_node("Loop", ["endless", "true", "scores_once"], ["scores"], body=body))
    onnx.save(model, tmp_path / "loop.onnx")
    write_image(tmp_path / "a.png", astronaut)
    words = ["trt_runtime.detect", "a.png", "--model", "loop.onnx", "--json", "o.json", "--backend", "onnxruntime"]
    started: list[float] = []

    def hangs() -> bool:
        if list(tmp_path.glob(".o.*")):
            started.append(time.monotonic())
        return bool(started) and time.monotonic() > started[0] + 1

    with _ended_by_sigterm(tmp_path, *words, when=hangs):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a.png", "loop.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("trt_runtime.detect", "photos", "--model", "MODEL"),
        ("trt_runtime.benchmark", "--model", "MODEL"),
        ("export.verify", "--reference", "mobilenet0.25", "--candidate", "MODEL"),
        ("export.to_onnx", "--weights", "mobilenet0.25", "--out", "m.onnx", "--int8", "--calib", "photos"),
        ("trainer.fit", "--data", "synthetic", "--out", "run"),
        ("trainer.evaluate", "--model", "MODEL", "--data", "WIDER", "--protocol", "letterbox"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("after_s", [1, 3, 8])
def test_every_command_ends(
    words: tuple[str, ...], after_s: float, static_onnx: Path, tmp_path: Path, astronaut: Frame, request: Any
) -> None:
    for index in range(3000):  # of sixteen pictures, since INT8 is not calibrated on copies of one
        if index < 16:
            write_image(tmp_path / "photos" / f"{index}.png", np.roll(astronaut, 8 * index, axis=1))
        else:
            os.link(tmp_path / "photos" / f"{index % 16}.png", tmp_path / "photos" / f"{index}.png")
    end = time.monotonic() + after_s
    places = {"MODEL": lambda: static_onnx, "WIDER": lambda: request.getfixturevalue("widerface")}
    words = tuple(str(places[word]()) if word in places else word for word in words)
    with _ended_by_sigterm(tmp_path, *words, when=lambda: time.monotonic() > end, may_be_done=after_s > 1):
        pass
