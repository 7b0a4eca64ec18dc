"""Find faces through NVIDIA Triton Inference Server, in a model laid out by `python -m export.to_triton`.

python -m examples.triton_client photo.jpg --out faces.jpg --server localhost:8001 --model retinaface
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from facespec.cli import ArgumentParser, argument, require, run
from facespec.detections import Detections, to_detections
from facespec.draw import draw_detections
from facespec.errors import ModelFileError, OutputError, RetinaFaceError, SpecError
from facespec.files import check_outputs
from facespec.images import read_image, write_image
from facespec.letterbox import Frame, Letterbox, check_frame
from facespec.spec import SPEC_KEY, ModelSpec, parse_size

SIZE_KEY = "retinaface.size_hw"
"""Parameter of the served model: HEIGHTxWIDTH to letterbox to; missing where each frame goes at its own size."""


class ServerError(RetinaFaceError):
    """The server cannot be reached, or refuses."""


class TritonRetinaFace:
    """A detector that a Triton server runs. What it must know about the model it asks the server.

    Args:
        server: HOST:PORT of its gRPC service.
        model: Name of the model.
        score_threshold: Lowest score reported: 0.5 unless given, not below the model's floor.
        size_hw: Height and width frames are letterboxed to, for models of dynamic size; None takes what the model asks.
        timeout_s: Longest that a call may take, in seconds.

    Raises:
        ServerError: No answer, or no such model.
        ModelFileError: Not a model of this toolkit.
        SpecError: `score_threshold` or `size_hw` does not fit the model.
    """

    def __init__(
        self,
        server: str = "localhost:8001",
        model: str = "retinaface",
        *,
        score_threshold: float | None = None,
        size_hw: tuple[int, int] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self._grpc = require("tritonclient.grpc", "serve", "the client")
        self._server, self._model, self._timeout_s = server, model, timeout_s
        self._client = self._grpc.InferenceServerClient(server)
        try:
            config = self._call("get_model_config", model).config
            parameters = {key: found.string_value for key, found in config.parameters.items()}
            sides = next((tuple(item.dims[:2]) for item in config.input if item.name == "images"), ())
            if SPEC_KEY not in parameters or len(sides) != 2:
                raise ModelFileError(f"{model} at {server}: not a model written by python -m export.to_triton")
            self.spec = ModelSpec.from_json(parameters[SPEC_KEY])
            self.score_threshold = self.spec.decode.run_threshold(score_threshold)
            wanted = parse_size(parameters[SIZE_KEY]) if SIZE_KEY in parameters else None
            if size_hw and -1 not in sides and size_hw != sides:
                raise SpecError(f"{model} at {server} takes {sides[0]}x{sides[1]} only, not {size_hw[0]}x{size_hw[1]}")
            self.size_hw = size_hw or wanted
        except BaseException:
            self.close()
            raise

    def detect(self, frame: Frame) -> Detections:
        """Return the faces of one frame, uint8 (H, W, 3) BGR, in its own pixels.

        Raises:
            FrameError: Not such a frame.
            ServerError: The server does not answer, or refuses.
            NonFiniteError: The network gave NaN or infinity.
        """
        frame_hw = check_frame(frame).shape[:2]
        box = Letterbox.place((frame_hw[0], frame_hw[1]), self.size_hw)
        batch = box.apply(frame, self.spec.preprocess.mean_bgr)[None]
        images = self._grpc.InferInput("images", list(batch.shape), "UINT8")
        images.set_data_from_numpy(batch)
        result = self._call("infer", self._model, [images])
        outputs = []
        for name, (kind, shape) in self.spec.decode.outputs.items():
            found = result.as_numpy(name)
            if found is None or found.dtype != kind or found.shape != (1, *(shape or (1,))):
                raise ModelFileError(f"{self._model} at {self._server}: output {name} is not what its spec says")
            outputs.append(found[0] if shape else found.item())
        return to_detections(box, self.spec.decode, self.score_threshold, *outputs)

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def __enter__(self) -> TritonRetinaFace:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._client, method)(*arguments, client_timeout=self._timeout_s)
        except self._grpc.InferenceServerException as error:
            status, message = error.status() or "", " ".join(str(error.message()).split())[:300]
            if "UNAVAILABLE" in status or "DEADLINE" in status:
                raise ServerError(
                    f"{self._server}: no answer from a Triton server's gRPC service ({message})"
                ) from None
            raise ServerError(f"{self._model} at {self._server}: {message}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = ArgumentParser(
        prog="python -m examples.triton_client", description="Find faces in a photograph through a Triton server."
    )
    parser.add_argument("image", type=Path, help="photograph")
    parser.add_argument("--out", type=Path, default=Path("faces.jpg"), help="where to draw the faces")
    parser.add_argument("--server", default="localhost:8001", help="HOST:PORT of the gRPC service")
    parser.add_argument("--model", default="retinaface", help="name of the model on the server")
    parser.add_argument("--score", type=float, help="lowest score reported (default: 0.5, or the model's floor)")
    parser.add_argument(
        "--size", type=argument(parse_size), help="HEIGHTxWIDTH to letterbox to, for models of dynamic size"
    )
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp"):
        raise OutputError(f"--out {args.out}: give a name that ends in .jpg or .png")
    if "://" in args.server:
        raise ServerError(f"--server {args.server}: give HOST:PORT alone, for instance localhost:8001")
    check_outputs([("--out", args.out)], [args.image])
    frame = read_image(args.image)
    with TritonRetinaFace(args.server, args.model, score_threshold=args.score, size_hw=args.size) as detector:
        faces = detector.detect(frame)
    write_image(args.out, draw_detections(frame, faces))
    for face in faces.to_dict()["faces"]:
        print(*np.rint(face["box"]).astype(int), face["score"])
    print(f"wrote {args.out}: {len(faces)} face{'' if len(faces) == 1 else 's'}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
