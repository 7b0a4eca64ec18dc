"""Make trainer/face_mesh.npz: a mean face and how faces vary, from what MediaPipe finds in the training images.

pip download --no-deps mediapipe==0.10.21
python -m benchmarks.face_mesh --wheel mediapipe-0.10.21-*.whl --data WIDERFACE

The wheel (Apache-2.0) is read, not installed: the network face_landmark.tflite, which gives 468 vertices, and their
triangles. What is kept are statistics over all faces: no face and no image is in the file.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from facespec.cli import ArgumentParser, require, run
from facespec.files import atomic_path, work_folder
from facespec.opencv import cv2
from trainer.data import open_dataset
from trainer.dense import MESH, harmonics, vertex_normals

Floats = NDArray[np.float64]

SIDE = 192
"""Of the network's input in pixels."""

LEAST_FACE_PX = 72.0
LEAST_SCORE = 0.95
SHAPES, TEXTURES = 24, 16


class Meshes(NamedTuple):
    """(N, 468, 3) vertices in units of the boxes, from their middles; (N, 468, 3) colours where they are seen."""

    vertices: Floats
    colours: Floats


def read_wheel(path: Path) -> tuple[Any, NDArray[np.int64]]:
    """Return the compiled network and the triangles (T, 3), which the wheel lists edge by edge."""
    openvino = require("openvino", "cpu", "reading face_landmark.tflite")
    core = openvino.Core()
    with zipfile.ZipFile(path) as wheel, work_folder() as folder:
        model = core.read_model(wheel.extract("mediapipe/modules/face_landmark/face_landmark.tflite", folder))
        text = wheel.read("mediapipe/python/solutions/face_mesh_connections.py").decode()
    edges = np.array(re.findall(r"\((\d+), (\d+)\)", text[text.index("FACEMESH_TESSELATION") :]), int).reshape(-1, 3, 2)
    if not (edges[:, :, 1] == np.roll(edges[:, :, 0], -1, axis=1)).all():
        raise ValueError(f"{path}: its edges are not those of triangles, three by three")
    return core.compile_model(model, "CPU"), edges[:, :, 0]


def find_mesh(network: Any, image: NDArray[np.uint8], box: Floats, eyes: Floats) -> tuple[Floats, Floats] | None:
    """Return (468, 3) vertices in pixels of an image and (468, 3) BGR there, or None where no face is seen.

    As MediaPipe does it: a square of 1.5 faces around what is known, turned upright; then again around what was found.
    """
    across = eyes[1] - eyes[0]
    angle, middle, side = np.arctan2(across[1], across[0]), (box[:2] + box[2:]) / 2, 1.5 * (box[2:] - box[:2]).max()
    for _ in range(2):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        scale = side / SIDE
        to_image = np.hstack([scale * turn, (middle - scale * turn @ [SIDE / 2, SIDE / 2])[:, None]])
        small = cv2.GaussianBlur(image, (0, 0), scale / 2) if scale > 1.5 else image
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        # cv2 counts pixel centres
        shifted = to_image + np.hstack([np.zeros((2, 2)), (to_image[:, :2] @ [0.5, 0.5] - 0.5)[:, None]])
        crop = cv2.warpAffine(small, shifted, (SIDE, SIDE), flags=flags)
        points, logit = network(np.float32(crop[None, ..., ::-1] / 255)).values()
        found = points.reshape(468, 3).astype(float)
        if 1 / (1 + np.exp(-float(logit.squeeze()))) < LEAST_SCORE:
            return None
        colours = cv2.remap(crop, np.float32(found[:, None, :2] - 0.5), np.empty(0), cv2.INTER_LINEAR)[:, 0].astype(
            float
        )
        xy = found[:, :2] @ to_image[:, :2].T + to_image[:, 2]
        vertices = np.hstack([xy, scale * found[:, 2:]])
        low, high = xy.min(axis=0), xy.max(axis=0)
        across = xy[263] - xy[33]  # outer corners of the eyes
        angle, middle, side = np.arctan2(across[1], across[0]), (low + high) / 2, 1.5 * (high - low).max()
    return vertices, colours


def find_meshes(network: Any, source: str) -> Meshes:
    """Return the meshes of the large faces of a data set, and of their mirror images."""
    vertices, colours = [], []
    dataset = open_dataset("widerface", "train", source)
    for sample in dataset.samples:
        frame, faces = sample.load()
        for mirrored in (False, True):
            image = np.ascontiguousarray(frame[:, ::-1]) if mirrored else frame
            for box, points, known in zip(faces.boxes, faces.landmarks, faces.has_landmarks, strict=True):
                if not known or (box[2:] - box[:2]).min() < LEAST_FACE_PX:
                    continue
                corners, eyes = box.reshape(2, 2).astype(float), points[:2].astype(float)
                if mirrored:
                    corners[:, 0], eyes = frame.shape[1] - corners[::-1, 0], eyes[::-1] * [-1, 1] + [frame.shape[1], 0]
                found = find_mesh(network, image, corners.ravel(), eyes)
                if found is not None:
                    placed = found[0] - [*corners.mean(axis=0), found[0][:, 2].mean()]
                    vertices.append(placed / np.sqrt(np.prod(corners[1] - corners[0])))
                    colours.append(found[1])
    return Meshes(np.array(vertices), np.array(colours))


def align(vertices: Floats, mean: Floats) -> Floats:
    """Return meshes (N, V, 3), turned, scaled and moved onto the mean (V, 3) (Umeyama, PAMI 1991)."""
    middle, target = vertices.mean(axis=1, keepdims=True), mean - mean.mean(axis=0)
    apart = vertices - middle
    left, values, right = np.linalg.svd(np.einsum("nvi,vj->nij", apart, target))
    signs = np.ones((len(vertices), 3))
    signs[:, 2] = np.sign(np.linalg.det(left @ right))
    scale = (values * signs).sum(axis=1) / (apart**2).sum(axis=(1, 2))
    return scale[:, None, None] * apart @ ((left * signs[:, None]) @ right) + mean.mean(axis=0)


def components(rows: Floats, seen: NDArray[np.bool_], count: int) -> tuple[Floats, Floats, float]:
    """Return mean, components as long as their standard deviations, and the share of the variance they explain.

    Where `seen` is False a value is unknown: it is taken from the components, again and again.
    """
    rows = np.where(seen, rows, (rows * seen).sum(axis=0) / seen.sum(axis=0).clip(1))
    for _ in range(1 if seen.all() else 20):
        mean = rows.mean(axis=0)
        left, values, right = np.linalg.svd(rows - mean, full_matrices=False)
        rows = np.where(seen, rows, left[:, :count] * values[:count] @ right[:count] + mean)
    share = (values[:count] ** 2).sum() / (values**2).sum()
    return mean, right[:count] * values[:count, None] / np.sqrt(len(rows)), share


def without_light(colours: Floats, normals: Floats, seen: NDArray[np.bool_]) -> Floats:
    """Return colours divided by the light on each face that explains its brightness best, beside the mean face's."""
    basis, albedo = harmonics(torch.from_numpy(normals)).numpy(), colours
    for _ in range(3):
        mean = (albedo * seen[..., None]).sum(axis=0) / seen.sum(axis=0).clip(1)[:, None]
        grey = mean.mean(axis=1)
        lights = [
            np.linalg.lstsq(grey[s, None] * b[s], c[s].mean(axis=1), rcond=None)[0]
            for b, c, s in zip(basis, colours, seen, strict=True)
        ]
        shade = np.einsum("nvk,nk->nv", basis, np.array(lights)).clip(0.2, 3)
        albedo = (colours / shade[..., None]).clip(0, 255)
    return albedo


def main() -> int:
    """Make the file."""
    parser = ArgumentParser(prog="python -m benchmarks.face_mesh", description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="mediapipe-0.10.21, as pip downloads it")
    parser.add_argument("--data", required=True, help="folder of WIDER FACE")
    parser.add_argument("--out", type=Path, default=MESH, help="(default: %(default)s)")
    args = parser.parse_args()
    network, triangles = read_wheel(args.wheel)
    vertices, colours = find_meshes(network, args.data)
    mean = vertices.mean(axis=0)
    for _ in range(10):  # onto the mean of those before it, in the mean pose and at the mean size
        mean = align(align(vertices, mean).mean(axis=0)[None], vertices.mean(axis=0))[0]
    aligned = align(vertices, mean)
    everything = np.ones((len(vertices), mean.size), bool)
    mean, shape, shape_share = components(aligned.reshape(len(vertices), -1), everything, SHAPES)
    corners = torch.from_numpy(triangles)
    if (vertex_normals(torch.from_numpy(mean.reshape(1, -1, 3)), corners)[0, :, 2].mean()) > 0:
        triangles = triangles[:, ::-1]  # outward is towards the camera
    normals = vertex_normals(torch.from_numpy(vertices), torch.from_numpy(triangles.copy())).numpy()
    seen = normals[..., 2] < -0.25
    albedo = without_light(colours, normals, seen).reshape(len(vertices), -1)
    texture_mean, texture, texture_share = components(albedo, np.repeat(seen, 3, axis=1), TEXTURES)
    arrays = {
        "mean": mean.reshape(-1, 3),
        "shape": shape.reshape(SHAPES, -1, 3),
        "texture_mean": texture_mean.reshape(-1, 3),
        "texture": texture.reshape(TEXTURES, -1, 3),
    }
    with atomic_path(args.out) as path, path.open("wb") as file:
        halves: dict[str, Any] = {name: value.astype(np.float16) for name, value in arrays.items()}
        np.savez_compressed(file, **halves, triangles=triangles.astype(np.int16))
    print(
        f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB of {len(vertices)} meshes, half of them mirrored; "
        f"{SHAPES} shapes explain {shape_share:.1%} of their variance, {TEXTURES} textures {texture_share:.1%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
