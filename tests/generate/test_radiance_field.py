"""A scene as a network of points: the volume renderer in closed form, the grids, and that a small scene is learned."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput
from opsin.generate.radiance_field import (
    RadianceField,
    Rays,
    camera_rays,
    composite,
    fit_scene,
    render,
    render_image,
)  # fmt: skip

SMALL = dict(width=24, depth=3, octaves=(4, 2), view_width=16)


class Fog(nn.Module):
    """Density 0.7 and one colour everywhere."""

    def forward(self, points: Tensor, views: Tensor, times: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.tensor([0.2, 0.5, 0.9]).expand(len(points), 3), torch.full((len(points),), 0.7)


def test_fog_has_the_colour_of_the_closed_form():
    rays = Rays(torch.zeros(4, 3), F.normalize(torch.randn(4, 3), dim=1))
    length = 3.0 - 1.0 - 2.0 / 64 / 2  # from the middle of the first of 64 strata to the end
    passed = math.exp(-0.7 * length)
    expected = (1 - passed) * torch.tensor([0.2, 0.5, 0.9]) + passed
    assert torch.allclose(render(Fog(), rays, 1.0, 3.0, 64), expected.expand(4, 3), atol=1e-5)


def test_weights_by_hand_and_a_wall_hides_what_is_behind():
    densities, lengths = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 0.5, 0.5]])
    _, weights = composite(torch.rand(1, 3, 3), densities, lengths)
    first = 1 - math.exp(-0.5)
    assert torch.allclose(weights[0], torch.tensor([0.0, first, math.exp(-0.5) * (1 - math.exp(-1.0))]))
    colours = torch.rand(1, 3, 3)
    assert torch.allclose(composite(colours, torch.tensor([[0.0, 1e4, 5.0]]), lengths)[0], colours[:, 1], atol=1e-5)


def test_rays_of_a_camera():
    pose = torch.tensor([[1.0, 0, 0, 5], [0, 1, 0, 6], [0, 0, 1, 7]])
    rays = camera_rays(pose, 2, 4, 2.0)
    assert torch.equal(rays.origins[0], torch.tensor([5.0, 6, 7])) and len(rays.origins) == 8
    assert torch.allclose(rays.directions[0], F.normalize(torch.tensor([-0.75, 0.25, -1.0]), dim=0))
    assert torch.allclose(rays.directions[7], F.normalize(torch.tensor([0.75, -0.25, -1.0]), dim=0))


@pytest.mark.parametrize(("coordinate", "grid"), [("space", (6,)), ("view", (10, 3)), ("time", (5,)), (None, (1,))])
def test_every_kind_of_grid_reaches_its_parameters(coordinate, grid):
    field = RadianceField(coordinate, grid, **SMALL)
    points, views, times = torch.rand(50, 3) - 0.5, F.normalize(torch.randn(50, 3), dim=1), torch.rand(50, 1)
    colour, density = field(points, views, times)
    assert colour.shape == (50, 3) and density.shape == (50,) and (density >= 0).all() and (colour >= 0).all()
    (colour.sum() + density.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in field.parameters())
    if coordinate == "space":
        assert all(layer.modulation.grid.grad[:, 1].any() for layer in field.layers), "shifts learn too"


@torch.no_grad()
def test_what_a_field_depends_on():
    points, views = torch.rand(5, 3), F.normalize(torch.randn(5, 3), dim=1)
    field = RadianceField("time", (5,), **SMALL)
    for layer in field.layers:
        layer.modulation.grid.add_(torch.randn_like(layer.modulation.grid))
    early, late = (field(points, views, torch.full((5, 1), t))[1] for t in (0.0, 1.0))
    assert (early - late).abs().max() > 1e-3
    with pytest.raises(BadInput, match="pass times"):
        field(points, views)
    plain = RadianceField(None, (1,), **SMALL)
    assert torch.equal(plain(points, views)[1], plain(points, -views)[1]), "density does not see the view"
    assert not torch.equal(plain(points, views)[0], plain(points, -views)[0])


def test_published_settings():
    with torch.device("meta"):
        field = opsin.create("cam_nerf_space")
        assert field.layers[0].modulation.grid.shape == (3, 2, 512, 512) and len(field.layers) == 8
        assert field.layers[5].linear.in_features == 256 + 63
        assert opsin.create("cam_nerf_view").layers[0].modulation.grid.shape == (2, 10, 3)
    with pytest.raises(BadInput, match="does not fit"):
        RadianceField("view", (5,))


def test_a_ball_is_learned():
    """A red ball on white from four sides."""
    poses, images = [], []
    for turn in range(4):
        a = turn * math.pi / 2
        pose = torch.tensor([[math.cos(a), 0, math.sin(a), 3 * math.sin(a)], [0, 1, 0, 0],
                             [-math.sin(a), 0, math.cos(a), 3 * math.cos(a)]])  # fmt: skip
        rays = camera_rays(pose, 10, 10, 12.0)
        along = -(rays.origins * rays.directions).sum(1)
        hit = (rays.origins + along[:, None] * rays.directions).norm(dim=1) < 0.7
        images.append(torch.where(hit[:, None], torch.tensor([0.9, 0.1, 0.1]), torch.ones(3)).T.view(3, 10, 10))
        poses.append(pose)
    torch.manual_seed(0)
    field = RadianceField("space", (8,), **SMALL)
    pictures, places = torch.stack(images), torch.stack(poses)
    fit_scene(field, pictures, places, 12.0, near=2.0, far=4.0, steps=150, lr=3e-3, batch=200, samples=16)
    seen = render_image(field, places[1], (10, 10), 12.0, 2.0, 4.0, samples=16)
    assert F.mse_loss(seen, pictures[1]) < 0.25 * pictures[1].var(correction=0)


def test_another_device(monkeypatch):
    """The meta device stands for any but the CPU; its tensors have no values to be read."""
    monkeypatch.setattr(Tensor, "isfinite", lambda self: True)
    field = RadianceField("time", (5,), **SMALL).to("meta")
    poses, images = torch.eye(4)[None, :3].repeat(2, 1, 1), torch.rand(2, 3, 5, 6)
    fit_scene(field, images, poses, 6.0, near=2.0, far=4.0, times=torch.tensor([0.0, 1.0]), steps=2, samples=4)
    assert field.density.weight.grad.is_meta
    seen = render_image(field, poses[0], (5, 6), 6.0, 2.0, 4.0, samples=4, time=0.5)
    assert seen.is_meta and seen.shape == (3, 5, 6)
    rays = camera_rays(poses[0].to("meta"), 5, 6, 6.0)
    assert rays.directions.is_meta
    assert render(RadianceField("space", (5,), **SMALL).to("meta"), rays, 2.0, 4.0, jitter=True).is_meta
