"""The fourth term: its camera, light and meshes, against OpenCV, SciPy and loops; and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from facespec.boxes import decode_boxes, iou_matrix, make_priors
from facespec.spec import ModelSpec
from tests.trainer.conftest import published
from trainer import load_model
from trainer.checkpoint import read_training
from trainer.config import TrainConfig, resolve
from trainer.data.batches import Targets, collate
from trainer.data.dataset import Faces
from trainer.dense import (
    DISTANCE,
    MESH,
    DenseFaces,
    FaceMesh,
    harmonics,
    project,
    rotations,
    sample,
    vertex_normals,
)
from trainer.loop import fit
from trainer.losses import LossSettings, MultiBoxLoss
from trainer.model import Features, Heads
from trainer.step import Learner

HW = (96, 128)
RNG = np.random.default_rng


@cache
def _mesh() -> FaceMesh:
    return FaceMesh().double()


def _doubles(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(RNG(seed).normal(0, scale, shape))


def _parameters(count: int, seed: int = 0, scale: float = 0.3) -> Tensor:
    return _doubles(count, len(_mesh().limits), seed=seed, scale=scale)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 0.4, 2.0])
def test_the_camera_is_that_of_opencv(scale: float) -> None:
    vectors, points = _doubles(4, 3, scale=scale), _doubles(4, 20, 3, seed=1)
    shift, focal, centre = _doubles(4, 3, seed=2) + torch.tensor([0, 0, 9.0]), torch.tensor([50.0, 80, 200, 1000]), 40
    centres = torch.full((4, 2), float(centre), dtype=torch.float64)
    turned = points @ rotations(vectors).transpose(1, 2) + shift[:, None]
    found = project(turned, focal.double(), centres).numpy()
    for row in range(4):
        camera = np.array([[float(focal[row]), 0, centre], [0, float(focal[row]), centre], [0, 0, 1]])
        wanted, _ = cv2.projectPoints(points[row].numpy(), vectors[row].numpy(), shift[row].numpy(), camera, None)
        np.testing.assert_allclose(found[row], wanted[:, 0], rtol=0, atol=1e-8)


def _scipy_harmonic(degree: int, order: int, x: float, y: float, z: float) -> float:
    polar, azimuth = math.acos(z), math.atan2(y, x)
    if hasattr(scipy.special, "sph_harm_y"):
        value = scipy.special.sph_harm_y(degree, abs(order), polar, azimuth)
    else:
        value = scipy.special.sph_harm(abs(order), degree, azimuth, polar)
    if order == 0:
        return value.real
    return math.sqrt(2) * (-1) ** order * (value.real if order > 0 else value.imag)


def test_the_light_is_in_the_spherical_harmonics_of_scipy() -> None:
    directions = torch.nn.functional.normalize(_doubles(50, 3), dim=1)
    found = harmonics(directions).numpy()
    assert found.shape == (50, 9)
    orders = [(degree, order) for degree in range(3) for order in range(-degree, degree + 1)]
    for row, xyz in zip(found, directions.tolist(), strict=True):
        wanted = [_scipy_harmonic(degree, order, *xyz) * math.sqrt(4 * math.pi) for degree, order in orders]
        np.testing.assert_allclose(row, wanted, rtol=0, atol=1e-12)


def test_normals_are_those_of_a_loop_and_point_outwards() -> None:
    mesh = _mesh()
    vertices, triangles = mesh.mean + _doubles(2, 468, 3, scale=0.002), mesh.triangles
    found = vertex_normals(vertices, triangles).numpy()
    for face, normals in zip(vertices.numpy(), found, strict=True):
        wanted = np.zeros((468, 3))
        for a, b, c in triangles.tolist():
            wanted[[a, b, c]] += np.cross(face[b] - face[a], face[c] - face[a])
        np.testing.assert_allclose(normals, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-9)
    assert (found[0, :, 2] < 0).mean() > 0.9  # towards the camera
    nose, cheeks = 1, (234, 454)
    assert found[0, nose, 2] < -0.5
    assert found[0, cheeks[0], 0] < 0 < found[0, cheeks[1], 0]


def test_colours_are_read_as_opencv_reads_them_each_from_its_own_image() -> None:
    images = RNG(0).uniform(-100, 100, (3, *HW, 3)).astype(np.float32)
    points = RNG(1).uniform(0.5, (HW[1] - 0.5, HW[0] - 0.5), (5, 7, 2)).astype(np.float32)
    image = torch.tensor([2, 0, 1, 1, 2])
    found = sample(torch.from_numpy(images).permute(0, 3, 1, 2), image, torch.from_numpy(points))
    for row, index in enumerate(image.tolist()):
        # OpenCV counts from the centre of a pixel, and has 32 steps between two
        place = np.round((points[row] - 0.5) * 32) / 32
        again = sample(torch.from_numpy(images).permute(0, 3, 1, 2), image, torch.from_numpy(place + 0.5).expand(5, 7, 2))
        wanted = cv2.remap(images[index], place[None], None, cv2.INTER_LINEAR)[0]
        np.testing.assert_allclose(again[row].numpy(), wanted, rtol=0, atol=0.01)
    assert found.shape == (5, 7, 3)
    middle = sample(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor([1]), torch.tensor([[[3.5, 2.5]]]))
    np.testing.assert_allclose(middle[0, 0].numpy(), images[1, 2, 3], atol=1e-3)
    outside = sample(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor([1]), torch.tensor([[[-9.0, 2.5]]]))
    assert not outside.any()


def test_gradients_are_those_of_finite_differences() -> None:
    mesh, boxes = _mesh(), torch.tensor([[60.0, 50, 30, 40], [20, 30, 50, 50]], dtype=torch.float64)
    some = torch.tensor([0, 7, 133, 263, 467])

    def draw(parameters: Tensor) -> tuple[Tensor, Tensor]:
        points, colours, _ = mesh(mesh.bounded(parameters), boxes)
        return points[:, some], colours[:, some]

    for scale in (0.0, 0.5):
        parameters = _parameters(2, scale=scale).requires_grad_()
        assert torch.autograd.gradcheck(draw, (parameters,), eps=1e-6, atol=1e-4, rtol=1e-4)
    images = _doubles(2, 3, 8, 9, scale=50)
    points = (torch.rand(2, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 7 + 0.8).requires_grad_()
    assert torch.autograd.gradcheck(lambda at: sample(images, torch.tensor([1, 0]), at), (points,))


def test_parameters_stay_within_what_a_face_may_be() -> None:
    mesh = _mesh()
    assert mesh.widths[2:] == (3, 2, 1, 1, 9)  # 7 of the camera, 9 of the light
    small, large = _parameters(3, scale=1e-3), _parameters(3, scale=1e3)
    torch.testing.assert_close(mesh.bounded(small), small, rtol=1e-4, atol=1e-6)
    assert (mesh.bounded(large).abs() <= mesh.limits).all()
    assert (mesh.bounded(large).abs() > 0.9 * mesh.limits).float().mean() > 0.9


def test_each_parameter_does_what_it_is_called() -> None:
    mesh = _mesh()
    boxes = torch.tensor([[60.0, 50, 32, 50]], dtype=torch.float64)  # of 40 pixels a side
    camera = sum(mesh.widths[:2])
    plain = torch.zeros(1, len(mesh.limits), dtype=torch.float64)
    mean = mesh(plain, boxes)
    left, right, chin = 234, 454, 152
    assert mean.points_px[0].mean(dim=0).tolist() == pytest.approx([60, 50], abs=4)
    assert mean.points_px[0, left, 0] < 60 < mean.points_px[0, right, 0]
    assert mean.points_px[0, chin, 1] > 50
    width = mean.points_px[0, right, 0] - mean.points_px[0, left, 0]
    assert 0.6 * 40 < width < 1.2 * 40
    assert mean.visible.float().mean() > 0.9

    def changed(index: int, value: float) -> tuple[Tensor, Tensor]:
        parameters = plain.clone()
        parameters[0, index] = value
        found = mesh(parameters, boxes)
        return found.points_px[0], found.colours[0]

    moved, _ = changed(camera + 3, 0.25)
    np.testing.assert_allclose((moved - mean.points_px[0])[:, 0].mean(), 0.25 * 40, rtol=0.05)
    moved, _ = changed(camera + 4, 0.25)
    np.testing.assert_allclose((moved - mean.points_px[0])[:, 1].mean(), 0.25 * 40, rtol=0.05)
    farther, _ = changed(camera + 5, math.log(2))
    assert farther[right, 0] - farther[left, 0] == pytest.approx(float(width) / 2, rel=0.1)
    longer, _ = changed(camera + 6, math.log(2))
    assert longer[right, 0] - longer[left, 0] == pytest.approx(float(width) * 2, rel=1e-6)
    turned, _ = changed(camera + 2, math.pi / 2)  # clockwise in the image, for y points downwards
    assert turned[chin, 0] < 50
    _, brighter = changed(camera + 7, 0.5)
    np.testing.assert_allclose(brighter, 1.5 * mesh.texture_mean)
    _, lit = changed(camera + 7 + 3, 0.3)  # from the right
    ratio = lit.mean(dim=1) / mesh.texture_mean.mean(dim=1)
    assert ratio[right] > 1.1 > 0.9 > ratio[left]


def _render(vertices_px: np.ndarray, depth: np.ndarray, colours: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Fill triangles with colours that run from corner to corner, the nearest in front: (*HW, 3) float32."""
    image, nearest = np.full((*HW, 3), 60, np.float32), np.full(HW, np.inf)
    for corners in triangles:
        a, b, c = vertices_px[corners]
        low = np.maximum(np.floor(np.min([a, b, c], axis=0)).astype(int), 0)
        high = np.minimum(np.ceil(np.max([a, b, c], axis=0)).astype(int) + 1, [HW[1], HW[0]])
        x, y = np.meshgrid(*(np.arange(low[i], high[i]) for i in (0, 1)))
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if x.size == 0 or abs(area) < 1e-12:
            continue
        px, py = x + 0.5, y + 0.5
        second = ((px - a[0]) * (c[1] - a[1]) - (py - a[1]) * (c[0] - a[0])) / area
        third = ((b[0] - a[0]) * (py - a[1]) - (b[1] - a[1]) * (px - a[0])) / area
        weights = np.stack([1 - second - third, second, third], -1)
        z = weights @ depth[corners]
        shown = (weights >= 0).all(axis=-1) & (z < nearest[y, x])
        nearest[y[shown], x[shown]] = z[shown]
        image[y[shown], x[shown]] = weights[shown] @ colours[corners]
    return image


def test_a_known_face_is_found_again_in_its_picture() -> None:
    """The picture is filled triangle by triangle, from OpenCV's projection; the start is several pixels away."""
    mesh, boxes = _mesh(), torch.tensor([[64.0, 48, 72, 72]], dtype=torch.float64)
    known = mesh.bounded(_parameters(1, seed=3, scale=1.0))
    shapes, textures = mesh.widths[:2]
    camera, light = known[0, shapes + textures :].split([7, 9])
    camera.copy_(torch.tensor([0.1, -0.35, 0.12, 0.06, -0.05, 0.08, 0.0]))
    light.mul_(0.15)
    turn, shift = camera[:3].numpy(), np.array([*camera[3:5].tolist(), DISTANCE * math.exp(camera[5])])
    shape = (mesh.mean + (known[0, :shapes, None, None] * mesh.shape).sum(0)).numpy()
    focal = 72 * DISTANCE
    points, _ = cv2.projectPoints(shape, turn, shift, np.array([[focal, 0, 64.0], [0, focal, 48], [0, 0, 1]]), None)
    drawn = mesh(known, boxes)
    np.testing.assert_allclose(drawn.points_px[0].numpy(), points[:, 0], atol=1e-6)
    depth = shape @ cv2.Rodrigues(turn)[0][2] + shift[2]
    picture = _render(points[:, 0], depth, drawn.colours[0].numpy(), mesh.triangles.numpy())
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].double()

    # an image of the known face costs next to nothing
    def cost(parameters: Tensor) -> tuple[Tensor, Tensor]:
        faces = mesh(parameters, boxes)
        difference = (sample(images, torch.tensor([0]), faces.points_px) - faces.colours).abs().mean(dim=-1)
        return (difference * faces.visible).sum() / faces.visible.sum(), faces.points_px

    start = known.clone()
    start[:, : shapes + textures] = 0  # nothing is known of shape and texture
    start[0, -16:-9] += torch.tensor([-0.1, 0.2, -0.12, 0.07, 0.06, -0.08, 0.0])
    start[0, -9:] = 0
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=0.02)
    first, points_px = cost(parameters)
    away = (points_px - drawn.points_px).norm(dim=-1).mean()
    for _ in range(400):
        optimizer.zero_grad()
        cost(parameters)[0].backward()
        optimizer.step()
    last, points_px = cost(parameters)
    left = (points_px - drawn.points_px).norm(dim=-1).mean()
    assert cost(known)[0] < 0.3 * first
    print(f"cost {first:.2f} -> {last:.2f}, of the known {cost(known)[0]:.2f}; points {away:.2f} -> {left:.2f} px")
    assert last < 0.25 * first
    assert left < 0.25 * away
