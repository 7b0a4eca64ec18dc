"""A detector that runs the PyTorch model itself, with the reference decoding: the yardstick of every other backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from facespec.boxes import Decoded, decode_detections, make_priors
from facespec.detections import Detections, to_detections
from facespec.letterbox import Frame, Letterbox, check_frame
from trainer.model import RetinaFace


class Heads(NamedTuple):
    """Raw network outputs of one image: (N, 4), (N, 2) and (N, 10) float32."""

    boxes: NDArray[np.float32]
    logits: NDArray[np.float32]
    landmarks: NDArray[np.float32]


class TorchRetinaFace:
    """RetinaFace in PyTorch as a `facespec.Detector`.

    Args:
        model: From `trainer.load_model`; used on the device it is on.
        score_threshold: Lowest score reported, by default 0.5; not below the floor in the model's spec.
        size_hw: Letterbox frames to this size; None runs them at their own size, without padding.
    """

    def __init__(
        self, model: RetinaFace, *, score_threshold: float | None = None, size_hw: tuple[int, int] | None = None
    ) -> None:
        self.model = model
        self.spec = model.spec
        self.score_threshold = self.spec.decode.run_threshold(score_threshold)
        self.size_hw = size_hw
        self._device = next(model.parameters()).device

    def heads(self, network_input: Frame) -> Heads:
        """Return the raw outputs for one image that is already letterboxed, uint8 (H, W, 3)."""
        pixels = torch.from_numpy(network_input).to(self._device).permute(2, 0, 1)[None].float()
        mean = torch.tensor(self.spec.preprocess.mean_bgr, device=self._device, dtype=torch.float32)
        with torch.inference_mode():
            outputs = self.model(pixels - mean[:, None, None])
        return Heads(*(output[0].cpu().numpy() for output in outputs))

    def decode(self, heads: Heads, size_hw: tuple[int, int]) -> Decoded:
        """Return the faces down to the model's floor, in pixels of the network input of `size_hw`."""
        return decode_detections(*heads, make_priors(self.spec.anchors, size_hw), self.spec.decode)

    def detect(self, frame: Frame) -> Detections:
        """Return the faces of one frame, uint8 (H, W, 3) BGR, in its own pixels.

        Raises:
            FrameError: Not such a frame.
            NonFiniteError: The network gave NaN or infinity.
        """
        frame = check_frame(frame)
        frame_hw = (frame.shape[0], frame.shape[1])
        box = Letterbox.fit(frame_hw, self.size_hw) if self.size_hw else Letterbox(frame_hw, frame_hw, frame_hw)
        found = self.decode(self.heads(box.apply(frame, self.spec.preprocess.mean_bgr)), box.size_hw)
        faces = found.boxes, found.scores, found.landmarks
        return to_detections(
            box, self.spec.decode, self.score_threshold, len(found.scores), *faces, found.num_candidates
        )

    def detect_batch(self, frames: Iterable[Frame]) -> list[Detections]:
        """Return the faces of several frames, one after the other."""
        return [self.detect(frame) for frame in frames]
