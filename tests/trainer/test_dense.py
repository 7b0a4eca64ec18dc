"""The fourth term: its camera, light and meshes, against OpenCV, SciPy and loops; and how it is trained."""

from __future__ import annotations

import dataclasses
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
from trainer import load_model, loop
from trainer.checkpoint import read_training
from trainer.config import TrainConfig
from trainer.data import open_dataset
from trainer.data.batches import AsTheyAre, Targets, collate
from trainer.data.dataset import Faces
from trainer.dense import (
    DISTANCE,
    MESH,
    DenseFaces,
    FaceMesh,
    expose,
    harmonics,
    project,
    rotations,
    sample,
    vertex_normals,
)
from trainer.distributed import World
from trainer.fit import main as fit_command
from trainer.loop import TrainState, fit
from trainer.model import Features, Heads

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
        again = sample(
            torch.from_numpy(images).permute(0, 3, 1, 2), image, torch.from_numpy(place + 0.5).expand(5, 7, 2)
        )
        wanted = cv2.remap(images[index], place[None], None, cv2.INTER_LINEAR)[0]
        np.testing.assert_allclose(again[row].numpy(), wanted, rtol=0, atol=0.01)
    assert found.shape == (5, 7, 3)
    middle = sample(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor([1]), torch.tensor([[[3.5, 2.5]]]))
    np.testing.assert_allclose(middle[0, 0].numpy(), images[1, 2, 3], atol=1e-3)
    outside = sample(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor([1]), torch.tensor([[[-9.0, 2.5]]]))
    assert not outside.any()


def test_the_exposure_of_a_face_is_that_of_the_image_channel_by_channel() -> None:
    seen, colours = 100 + _doubles(2, 50, 3, scale=20), 60 + _doubles(2, 50, 3, seed=1, scale=10)
    counted = torch.ones(2, 50).double()
    counted[0, 20:] = 0
    found = expose(colours, seen, counted)
    for row, count in enumerate((20, 50)):
        torch.testing.assert_close(found[row, :count].mean(dim=0), seen[row, :count].mean(dim=0))
        ratio = found[row] / colours[row]
        torch.testing.assert_close(ratio, ratio[:1].expand(50, 3))
    # a picture in another light costs the same
    torch.testing.assert_close(expose(colours * torch.tensor([0.3, 1.0, 2.0]), seen, counted), found)
    nobody = expose(colours, seen, torch.zeros(2, 50).double())
    assert nobody.isfinite().all()


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
    points = (
        torch.rand(2, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 7 + 0.8
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda at: sample(images, torch.tensor([1, 0]), at), (points,))


def test_parameters_stay_within_what_a_face_may_be() -> None:
    mesh = _mesh()
    assert mesh.widths[2:] == (3, 2, 1, 1, 9)  # 7 of the camera, 9 of the light
    small, large = _parameters(3, scale=1e-3), _parameters(3, scale=1e3)
    torch.testing.assert_close(mesh.bounded(small), small * mesh.units, rtol=1e-4, atol=1e-6)
    assert (mesh.bounded(large).abs() <= mesh.limits).all()
    assert (mesh.bounded(large).abs() > 0.9 * mesh.limits).float().mean() > 0.9


def test_no_camera_hides_the_face_on_a_cheek() -> None:
    """A mesh that shrinks to a patch without features costs little, and a branch that is free to finds that out."""
    mesh, camera = _mesh(), sum(_mesh().widths[:2])
    far = torch.zeros(1, len(mesh.limits), dtype=torch.float64)
    far[0, camera + 3 : camera + 7] = torch.tensor([9e9, -9e9, 9e9, -9e9])
    boxes = torch.tensor([[60.0, 50, 40, 40]], dtype=torch.float64)
    sides = [
        points.amax(dim=0) - points.amin(dim=0)
        for points in (mesh(mesh.bounded(one), boxes).points_px[0] for one in (far, torch.zeros_like(far)))
    ]
    assert (sides[0] > 0.75 * sides[1]).all()


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
    known = mesh.bounded(_parameters(1, seed=3, scale=1.0) / mesh.units)
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


def _batch(*sides: float) -> tuple[Tensor, Targets]:
    """Images of noise, each with a face of a side in pixels, or none where it is 0."""
    rng, images = RNG(5), []
    for index, side in enumerate(sides):
        box = np.array([[30 + 9 * index, 20, 30 + 9 * index + side, 20 + side * 1.1]], np.float32)
        faces = Faces(box, np.zeros((1, 5, 2), np.float32), np.zeros(1, bool)) if side else Faces.none()
        images.append((rng.integers(0, 256, (*HW, 3), np.uint8), faces))
    return collate(images)


def _term(seed: int = 0) -> DenseFaces:
    """A term whose branch gives different parameters everywhere."""
    torch.manual_seed(seed)
    term = DenseFaces(ModelSpec())
    for value in term.branch.parameters():
        torch.nn.init.normal_(value, std=0.08)
    return term


def _seen(count: int, seed: int = 0) -> tuple[Features, Heads]:
    """Feature maps and heads of `count` images of `HW`, at random."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(count, 64, -(-HW[0] // s), -(-HW[1] // s), generator=generator) for s in (8, 16, 32)]
    priors = ModelSpec().anchors.count(HW)
    heads = [torch.randn(count, priors, width, generator=generator) for width in (4, 2, 10)]
    return (maps[0], maps[1], maps[2]), (heads[0], heads[1], heads[2])


def _pixels(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() - torch.tensor([104.0, 117, 123])[:, None, None]


def test_the_term_is_that_of_a_loop_over_faces_priors_and_vertices() -> None:
    images, targets = _batch(60, 0, 40, 20)
    features, heads = _seen(4)
    term, spec = _term(), ModelSpec()
    with torch.no_grad():
        found = term(features, heads, _pixels(images), targets)
    priors, mesh = make_priors(spec.anchors, HW), _mesh()
    shapes, textures = mesh.widths[:2]
    width = len(mesh.limits)
    weights, biases = term.branch.weight.reshape(3, 2 * width, 64, 1, 1), term.branch.bias.reshape(3, 2 * width)
    values = [  # rows of a level: cells in row-major order, the two priors of a cell adjacent
        torch.nn.functional.conv2d(x, *head).permute(0, 2, 3, 1).reshape(4, -1, width)
        for x, *head in zip(features, weights, biases, strict=True)
    ]
    branch = torch.cat(values, 1).detach().double().numpy()
    costs = []
    for image, side in enumerate((60, 0, 40, 20)):
        if side < 32:  # 20 pixels are too few
            continue
        box = targets.boxes[image, :1].numpy()
        iou = iou_matrix(box, np.hstack([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2]))[0]
        for prior in sorted({*np.flatnonzero(iou >= 0.35).tolist(), int(iou.argmax())}):
            x1, y1, x2, y2 = decode_boxes(
                heads[0][image, prior : prior + 1].numpy(), priors[prior : prior + 1], (0.1, 0.2)
            )[0]
            limits, units = mesh.limits.numpy(), mesh.units.numpy()
            values = limits * np.tanh(branch[image, prior] * units / limits)
            turn, light = values[shapes + textures :][:3], values[-9:]
            shift = np.array([*values[shapes + textures + 3 :][:2], DISTANCE * np.exp(values[shapes + textures + 5])])
            focal = math.sqrt((x2 - x1) * (y2 - y1)) * DISTANCE * math.exp(values[shapes + textures + 6])
            vertices = mesh.mean.numpy() + np.tensordot(values[:shapes], mesh.shape.numpy(), 1)
            camera = np.array([[focal, 0, (x1 + x2) / 2], [0, focal, (y1 + y2) / 2], [0, 0, 1]])
            points = cv2.projectPoints(vertices, turn, shift, camera, None)[0][:, 0]
            placed = vertices @ cv2.Rodrigues(turn)[0].T
            normals = vertex_normals(torch.from_numpy(placed)[None], mesh.triangles)[0].numpy()
            colours = mesh.texture_mean.numpy() + np.tensordot(
                values[shapes : shapes + textures], mesh.texture.numpy(), 1
            )
            colours *= np.maximum(1 + harmonics(torch.from_numpy(normals)).numpy() @ light, 0.1)[:, None]
            seen, drawn = [], []
            for point, normal, place, colour in zip(points, normals, placed + shift, colours, strict=True):
                if normal @ place < 0 and 0 < point[0] < HW[1] and 0 < point[1] < HW[0]:
                    patch = cv2.getRectSubPix(  # outside of the image it is its mean colour
                        np.pad(_pixels(images)[image].permute(1, 2, 0).numpy(), ((2, 2), (2, 2), (0, 0))),
                        (1, 1),
                        (float(point[0]) + 1.5, float(point[1]) + 1.5),
                    )[0, 0]
                    seen.append(patch + np.array([104, 117, 123]))
                    drawn.append(colour)
            gain = np.mean(seen, axis=0) / np.mean(drawn, axis=0) if seen else 1
            costs.append(np.abs(np.array(seen) - gain * np.array(drawn)).mean() if seen else 0)
    assert len(costs) > 4
    assert found.item() == pytest.approx(np.mean(costs), rel=2e-3)


def test_gradients_of_the_term_reach_the_features_and_the_branch_but_no_head() -> None:
    images, targets = _batch(60, 40)
    features, heads = _seen(2)
    for value in (*features, *heads):
        value.requires_grad_()
    term = _term()
    term(features, heads, _pixels(images), targets).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (*features, *term.parameters()))
    assert any(x.grad.any() for x in features)
    assert all(head.grad is None for head in heads)
    # downhill, by as much as the gradient says
    weight = term.branch.weight
    change = 1e-4 * weight.grad / weight.grad.norm()
    costs = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * change
            costs.append(term(features, heads, _pixels(images), targets).item())
            weight -= sign * change
    assert (costs[0] - costs[1]) / 2e-4 == pytest.approx(weight.grad.norm().item(), rel=0.1)


@pytest.mark.parametrize("sides", [(0,), (20, 31)])
def test_without_large_faces_the_term_is_zero_and_has_gradients(sides: tuple[float, ...]) -> None:
    """Of every parameter: DistributedDataParallel waits for them."""
    images, targets = _batch(*sides)
    features, heads = _seen(len(sides))
    term = _term()
    cost = term(features, heads, _pixels(images), targets)
    assert cost.item() == 0
    cost.backward()
    assert all(p.grad is not None and not p.grad.any() for p in term.parameters())


def test_a_fresh_branch_draws_mean_faces_and_leaves_the_detector_as_it_starts(
    config: Callable[..., TrainConfig],
) -> None:
    plain = TrainState.start(config(), World(torch.device("cpu")), None, None, None)  # type: ignore[arg-type]
    dense = TrainState.start(config(loss__pixel_weight=0.01), World(torch.device("cpu")), None, None, None)  # type: ignore[arg-type]
    assert plain.pixel_term is None
    assert isinstance(dense.pixel_term, DenseFaces)
    assert not any(value.any() for value in dense.pixel_term.parameters())
    assert set(dense.pixel_term.state_dict()) == {"branch.weight", "branch.bias"}
    state = dense.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.model.state_dict().items())


def test_the_recipe_is_trained_resumed_bit_for_bit_and_not_exported(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    settings = config(recipe="dense", schedule__epochs=3, run__output=str(tmp_path / "whole"))
    assert settings.loss.pixel_weight == 0.01
    fit(settings)
    whole = read_training(tmp_path / "whole" / "last.pth")
    assert any(row["pixel"] > 0 for row in whole[1]["history"])
    assert load_model(tmp_path / "whole" / "last.pth").state_dict().keys() == published().state_dict().keys()
    assert not any("mesh" in name or "dense" in name for name in whole[0])
    parts = config(recipe="dense", schedule__epochs=3, run__output=str(tmp_path / "parts"))
    steps, real = [], loop.train_step

    def interrupted(*given: object) -> object:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(*given)  # type: ignore[arg-type]

    parts = dataclasses.replace(parts, run=dataclasses.replace(parts.run, checkpoint_every=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(parts)
    fit(parts, resume=tmp_path / "parts" / "last.pth")
    again = read_training(tmp_path / "parts" / "last.pth")
    for one, other in ((whole[0], again[0]), *((whole[1][n], again[1][n]) for n in ("weights", "pixel_term"))):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_file_of_the_mesh_is_small_and_holds_what_its_name_says() -> None:
    assert MESH.stat().st_size < 200_000
    with np.load(MESH, allow_pickle=False) as file:
        shapes = {name: (file[name].shape, file[name].dtype) for name in file.files}
        triangles, mean = file["triangles"], file["mean"].astype(float)
    half = np.dtype(np.float16)
    assert shapes == {
        "mean": ((468, 3), half),
        "shape": ((24, 468, 3), half),
        "texture_mean": ((468, 3), half),
        "texture": ((16, 468, 3), half),
        "triangles": ((852, 3), np.dtype(np.int16)),
    }
    assert (triangles.min(), triangles.max()) == (0, 467)
    # every edge is that of one or two triangles, in both directions: a surface, and one side of it is outside
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    assert len(np.unique(edges, axis=0)) == len(edges)
    # eyes over the nose over the mouth over the chin, left and right as seen; the nose is nearest
    left, right, nose, mouth, chin = mean[[33, 263, 1, 13, 152]]
    assert left[0] < nose[0] < right[0]
    assert max(left[1], right[1]) < nose[1] < mouth[1] < chin[1]
    assert np.argmin(mean[:, 2]) in (1, 4)


@pytest.mark.slow
def test_the_command_of_the_document_trains_it(tmp_path: Path) -> None:
    """On images that it was not trained on, faces are drawn better than the mean face is.

    The network normalises by the batch, as in training: its running statistics are still those of other weights.
    """
    command = "--data synthetic --size 128 --recipe dense --epochs 1 --workers 0"
    fit_command([*command.split(), "--out", str(tmp_path)])
    last = tmp_path / "last.pth"
    model, training = load_model(last), read_training(last)[1]
    model.load_state_dict(training["weights"])
    model.train()
    fresh, trained = DenseFaces(model.spec), DenseFaces(model.spec)
    trained.load_state_dict(training["pixel_term"])
    batches = [AsTheyAre(open_dataset("synthetic", "val"), 128, 64)[index] for index in range(64)]
    images, targets = collate(batches)
    with torch.no_grad():
        features = model.features(_pixels(images))
        heads = model.heads(features)
        before, after = (float(term(features, heads, _pixels(images), targets)) for term in (fresh, trained))
    print(f"{before:.2f} -> {after:.2f}")
    assert after < 0.95 * before
