"""The fourth term of the loss: each face is drawn from a branch of its own, and compared with the image.

RetinaFace (Deng et al., 2019, section 3.2) has a branch that gives shape, texture, camera and illumination of a face;
what they show is to look like the image. Here a 1×1 convolution gives them for each prior. The mesh is linear in them
(`face_mesh.npz`), and the colours of the image are read where the visible vertices fall, rather than the mesh be
rasterised. docs/training.md says what else differs, and why. All of it is for training alone.

Axes are those of cv2: x to the right, y downwards, z away from the camera. A mesh is in units of its face's box: the
square root of its area is 1. Colours are BGR in 0..255.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facespec.spec import ModelSpec
from trainer.data.batches import Targets
from trainer.losses import decode_boxes, divisors, priors_on
from trainer.matching import match_faces
from trainer.model import Features, Heads
from trainer.step import PixelTerm

MESH = Path(__file__).parent / "face_mesh.npz"
"""Mean mesh and texture, how they vary, and triangles; `python -m benchmarks.face_mesh` makes it."""

SMALLEST_FACE_PX = 32.0
"""Shorter side of the smallest face that is drawn: smaller ones have fewer pixels than the mesh has vertices."""

DISTANCE = 5.0
"""From the camera to a face, before the branch has a say: half a metre to a metre, where most portraits are taken."""

HARMONICS = 9

# of shape, texture, rotation, translation, distance, focal length, light
LIMITS = (3.0, 3.0, 1.2, 0.15, 0.1, 0.1, 2.0)
"""What no parameter exceeds. The box says where a face is and how large: a mesh that may shrink hides on a cheek, where
nothing has to be matched."""

UNITS = (2.0, 3.0, 0.6, 0.3, 0.3, 0.3, 0.3)
"""What a number of the branch is worth. One of each changes the colours by about as much, so none runs ahead."""


DARKEST = 0.1
"""Least light on a vertex: less than none would make the colours of a face negative, and their mean, by which they are
exposed, zero."""


class Meshes(NamedTuple):
    """Faces as they are drawn, V vertices each.

    Attributes:
        points_px: (P, V, 2) where the vertices fall in the image.
        colours: (P, V, 3) texture under the light.
        visible: (P, V) bool, whether a vertex looks towards the camera.
    """

    points_px: Tensor
    colours: Tensor
    visible: Tensor


def rotations(vectors: Tensor) -> Tensor:
    """Return (P, 3, 3) rotations about the directions of (P, 3) vectors, by their lengths in radians."""
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    return torch.linalg.matrix_exp(torch.stack(rows, -2))


def project(points: Tensor, focal: Tensor, centre: Tensor) -> Tensor:
    """Return (P, V, 2) pixels of (P, V, 3) points before a pinhole camera: focal (P,) and centre (P, 2) in pixels."""
    return points[..., :2] / points[..., 2:] * focal[:, None, None] + centre[:, None]


def vertex_normals(vertices: Tensor, triangles: Tensor) -> Tensor:
    """Return (P, V, 3) outward unit normals of vertices (P, V, 3): means over their triangles (T, 3), by area."""
    first, second, third = (vertices.index_select(1, corner) for corner in triangles.T)
    areas = torch.linalg.cross(second - first, third - first)
    total = torch.zeros_like(vertices)
    for corner in triangles.T:
        total = total.index_add(1, corner, areas)
    return F.normalize(total, dim=-1)


def harmonics(directions: Tensor) -> Tensor:
    """Return (..., 9) real spherical harmonics of unit vectors (..., 3), of the degrees 0 to 2 and orders -l to l.

    Their scale is that which makes the first one 1. Nine of them give what diffuse reflection leaves of any distant
    light (Ramamoorthi and Hanrahan, SIGGRAPH 2001).
    """
    x, y, z = directions.unbind(-1)
    one, two, three = math.sqrt(3), math.sqrt(15), math.sqrt(5) / 2
    terms = [torch.ones_like(x), one * y, one * z, one * x, two * x * y, two * y * z, three * (3 * z * z - 1)]
    return torch.stack([*terms, two * x * z, two / 2 * (x * x - y * y)], -1)


def sample(images: Tensor, image: Tensor, points_px: Tensor) -> Tensor:
    """Return (P, V, 3) bilinear colours of images (B, 3, H, W) at points (P, V, 2), `image` (P,) naming the image.

    A pixel covers [i, i + 1), as everywhere here. Outside an image colours fall to 0.
    """
    count, _, height, width = images.shape
    # as slices of one volume, every point finds its own image
    depth = (image + 0.5).to(points_px.dtype)[:, None, None].expand(*points_px.shape[:2], 1)
    place = torch.cat([points_px, depth], -1) / points_px.new_tensor([width, height, count]) * 2 - 1
    found = F.grid_sample(images.transpose(0, 1)[None], place[None, :, :, None], align_corners=False)
    return found[0, ..., 0].permute(1, 2, 0)


def expose(colours: Tensor, seen: Tensor, counted: Tensor) -> Tensor:
    """Return colours (P, V, 3), each channel of a face made as bright on average as what is seen (P, V, 3) there.

    `counted` (P, V) are the weights of the vertices. Brightness and white balance are made by the camera, and in
    training by the augmentation: they say nothing of the face.
    """
    weights = counted[..., None]
    wanted, drawn = ((part * weights).sum(dim=1, keepdim=True) for part in (seen, colours))
    return colours * wanted / drawn.clamp(min=1)


class FaceMesh(nn.Module):
    """A linear model of faces and the camera and light they are seen by: from parameters to `Meshes`.

    Parameters are the shape and the texture in standard deviations, then 7 numbers of the camera: a vector of rotation,
    translation to the right and downwards in sides of the box, the logarithms of distance and focal length; and then 9
    of the light, which make it brighter or darker by direction. All at 0 is the mean face in the middle of the box.
    """

    mean: Tensor
    shape: Tensor
    texture_mean: Tensor
    texture: Tensor
    triangles: Tensor
    limits: Tensor
    units: Tensor

    def __init__(self) -> None:
        super().__init__()
        with np.load(MESH, allow_pickle=False) as file:
            for name in ("mean", "shape", "texture_mean", "texture"):
                self.register_buffer(name, torch.from_numpy(file[name].astype(np.float32)), persistent=False)
            triangles = torch.from_numpy(file["triangles"].astype(np.int64))
        self.register_buffer("triangles", triangles, persistent=False)
        self.widths = (len(self.shape), len(self.texture), 3, 2, 1, 1, HARMONICS)
        repeats = torch.tensor(self.widths)
        limits = torch.tensor(LIMITS).repeat_interleave(repeats)
        self.register_buffer("limits", limits, persistent=False)
        self.register_buffer("units", torch.tensor(UNITS).repeat_interleave(repeats), persistent=False)

    def bounded(self, values: Tensor) -> Tensor:
        """Return parameters (P, width) of any numbers, in `UNITS` near 0 and within `LIMITS` far from it."""
        return self.limits * torch.tanh(values * self.units / self.limits)

    def forward(self, parameters: Tensor, boxes_cxcywh: Tensor) -> Meshes:
        """Return the faces of parameters (P, width) in boxes (P, 4): centre and size in pixels."""
        shape, texture, turn, shift, distance, focal, light = parameters.split(self.widths, dim=1)
        vertices = self.mean + torch.einsum("pk,kvi->pvi", shape, self.shape)
        vertices = vertices @ rotations(turn).transpose(1, 2)
        normals = vertex_normals(vertices, self.triangles)
        points = vertices + torch.cat([shift, DISTANCE * distance.exp()], 1)[:, None]
        side_px = boxes_cxcywh[:, 2:].prod(dim=1).sqrt()
        points_px = project(points, side_px * DISTANCE * focal.exp()[:, 0], boxes_cxcywh[:, :2])
        shade = (1 + (harmonics(normals) * light[:, None]).sum(-1, keepdim=True)).clamp(min=DARKEST)
        colours = (self.texture_mean + torch.einsum("pk,kvi->pvi", texture, self.texture)) * shade
        return Meshes(points_px, colours, (normals * points).sum(-1) < 0)


class DenseFaces(PixelTerm):
    """Mean difference of the faces that are drawn and the image, in grey levels: the L_pixel of the paper.

    The faces over `SMALLEST_FACE_PX` are drawn by each prior that finds them, in the box that the detector itself gives
    there; no gradient flows into that box. The difference is a mean over the visible vertices in the image, then over
    priors.

    Args:
        spec: Of the detector that is trained.
    """

    pixel_mean: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, self.mesh = spec, FaceMesh()
        kinds = len(spec.anchors.strides) * spec.anchors.per_cell
        self.branch = nn.Linear(spec.fpn_channels, kinds * len(self.mesh.limits))
        for value in self.branch.parameters():  # mean faces: nothing random, and nothing to forget
            nn.init.zeros_(value)
        mean = torch.tensor(spec.preprocess.mean_bgr, dtype=torch.float32)
        self.register_buffer("pixel_mean", mean, persistent=False)

    def meshes(self, features: Features, deltas: Tensor, rows: Tensor, size_hw: tuple[int, int]) -> Meshes:
        """Return the faces that some priors draw; rows (P,) are in 0..B*N-1 of box deltas (B, N, 4)."""
        anchors, count = self.spec.anchors, deltas.shape[1]
        image, prior = rows // count, rows % count
        cell, slot = prior // anchors.per_cell, prior % anchors.per_cell
        cells = torch.cat([x.float().flatten(2).transpose(1, 2) for x in features], dim=1)
        ends = torch.tensor([x[0, 0].numel() for x in features], device=rows.device).cumsum(0)
        kind = torch.bucketize(cell, ends, right=True) * anchors.per_cell + slot
        # a 1x1 convolution for each level, computed where it is asked for
        values = self.branch(cells.flatten(0, 1).index_select(0, image * cells.shape[1] + cell))
        width = len(self.mesh.limits)
        values = values.unflatten(1, (-1, width)).gather(1, kind[:, None, None].expand(-1, 1, width))[:, 0]
        priors = priors_on(anchors, size_hw, deltas.device)[prior]
        found = decode_boxes(deltas.detach().float().flatten(0, 1)[rows], priors, self.spec.decode.variances)
        low, high = found[:, :2], found[:, 2:]
        boxes = torch.cat([(low + high) / 2, high - low], 1)
        return self.mesh(self.mesh.bounded(values), boxes)

    def forward(self, features: Features, heads: Heads, images: Tensor, targets: Targets) -> Tensor:
        """See `PixelTerm`."""
        size_hw = (images.shape[2], images.shape[3])
        sides = targets.boxes[..., 2:] - targets.boxes[..., :2]
        large = targets.valid & (sides >= SMALLEST_FACE_PX).all(dim=-1)
        positive = match_faces(targets.boxes, large, self.spec.anchors, size_hw).positive
        rows = positive.flatten().nonzero()[:, 0]
        divisor = divisors(torch.tensor([len(rows)]))[0].to(images.device)
        rows = rows.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            faces = self.meshes(features, heads[0], rows, size_hw)
            seen = sample(images, rows // heads[0].shape[1], faces.points_px) + self.pixel_mean
            limits = images.new_tensor([images.shape[3], images.shape[2]])
            inside = ((faces.points_px > 0) & (faces.points_px < limits)).all(dim=-1)
            counted = (faces.visible & inside).float()
            difference = (expose(faces.colours, seen, counted) - seen).abs().mean(dim=-1) * counted
            return (difference.sum(dim=1) / counted.sum(dim=1).clamp(min=1)).sum() / divisor
