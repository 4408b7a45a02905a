"""The Poincare ball: backward passes, identities, numbers of geoopt and hypll, and what its layers promise."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from opsin.errors import BadInput
from opsin.layers import poincare as ball
from opsin.layers.poincare_layers import (
    FrechetBatchNorm2d,
    FrechetMean,
    PoincareBatchNorm2d,
    PoincareLinear,
    init_directions_,
)
from opsin.layers.riemannian_adam import BallParameter, RiemannianAdam

C = 0.3
BORDER = 4  # a tangent vector of this length times sqrt(c) lies beyond the border of float32


def tangent(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def point(*shape: int) -> Tensor:
    return ball.exp0(tangent(*shape).detach(), C).requires_grad_()


def wave(*shape: int, step: float = 0.7) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).reshape(shape)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.05, 1.0, 5.0], ids=lambda s: f"scale{s}")
@pytest.mark.parametrize("name", ["exp0", "project", "from_distances", "log0"])
def test_backward_of_radial_maps(name, scale):
    c, x = torch.tensor(C, dtype=torch.float64, requires_grad=True), tangent(4, 5, scale=scale)
    if name == "log0":
        x = ball.exp0(min(1, 2 / max(scale, 1)) * x.detach(), C).requires_grad_()
    assert torch.autograd.gradcheck(getattr(ball, name), (x, c))


@pytest.mark.parametrize("name", ["mobius_add", "exp_map", "log_map", "distance", "square_distance"])
@pytest.mark.parametrize("broadcast", [False, True])
def test_backward_of_maps_of_two(name, broadcast):
    c = torch.tensor(C, dtype=torch.float64, requires_grad=True)
    x, y = point(1 if broadcast else 4, 5), point(4, 5)
    assert torch.autograd.gradcheck(getattr(ball, name), (x, y, c))
    assert torch.autograd.gradcheck(getattr(ball, name), (y, x, c))


def test_backward_of_the_mean_at_its_fixed_point(monkeypatch):
    monkeypatch.setattr(FrechetMean, "tolerance", 1e-13)
    assert torch.autograd.gradcheck(lambda x: FrechetMean.apply(x, C), (point(5, 3),))


def test_backward_keeps_little():
    """A plain composition of the same formula keeps three times as many numbers."""

    def kept(function) -> int:
        total: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.numel()) or t, lambda t: t):
            function(x, y)
        return sum(total)

    x, y = point(64, 16), point(64, 16)
    c = torch.tensor(C, dtype=torch.float64)

    def plain(x: Tensor, y: Tensor) -> Tensor:
        x2, y2, xy = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True), (x * y).sum(-1, keepdim=True)
        top = (1 + 2 * c * xy + c * y2) * x + (1 - c * x2) * y
        return top / (1 + 2 * c * xy + c**2 * x2 * y2)

    assert torch.allclose(plain(x, y), ball.mobius_add(x, y, C))
    assert 3 * kept(lambda a, b: ball.mobius_add(a, b, c)) <= kept(plain)


def test_the_maps_are_inverse_and_mobius_addition_cancels():
    x, y, v = point(20, 4), point(20, 4), tangent(20, 4)
    assert torch.allclose(ball.log0(ball.exp0(v, C), C), v)
    assert torch.allclose(ball.exp_map(x, ball.log_map(x, y, C), C), y)
    assert torch.allclose(ball.mobius_add(-x, ball.mobius_add(x, y, C), C), y)
    assert torch.allclose(ball.mobius_add(x, torch.zeros_like(x), C), x)
    assert not torch.allclose(ball.mobius_add(x, y, C), ball.mobius_add(y, x, C), atol=1e-3)
    assert torch.allclose(ball.mobius_add(x, y, 1e-12), x + y)


def test_geodesics_have_the_length_of_their_tangent_and_transport_keeps_lengths():
    x, y, v = 0.7 * point(20, 4), 0.7 * point(20, 4), tangent(20, 4, scale=0.1)

    def length(at: Tensor, vector: Tensor) -> Tensor:
        return ball.conformal(at, C) * vector.norm(dim=-1, keepdim=True)

    assert torch.allclose(ball.distance(x, ball.exp_map(x, v, C), C), length(x, v))
    assert torch.allclose(length(y, ball.transport(x, y, v, C)), length(x, v))
    assert torch.allclose(ball.transport(y, x, ball.transport(x, y, v, C), C), v)
    assert torch.allclose(ball.distance(x, y, C), ball.distance(y, x, C))
    u, w = point(20, 4), tangent(20, 4, scale=0.2)
    inner = ball.mobius_add(u, ball.mobius_add(x, w, C), C)
    definition = ball.mobius_add(-ball.mobius_add(u, x, C), inner, C)
    assert torch.allclose(ball.gyration(u, x, w, C), definition, atol=1e-9)


# geoopt 0.5.1, PoincareBall(0.3), of x = exp0(wave), y = exp0(wave of step 0.4), shape (1, 3); the last from hypll
# 0.1.1, poincare_fully_connected of x with z = wave(3, 2), offsets 0.3, -0.2. In double precision, beside ours.
PEERS = {
    "expmap": [0.0, 1.0177457, 1.3437405],
    "logmap": [0.0, -0.1775223, -0.1803086],
    "mobius_add": [0.0, 0.7733007, 1.2333687],
    "transp": [0.0, 1.1332427, 0.9273121],
    "dist": [0.7473417],
    "midpoint": [0.0, 0.3842809, 0.6395558],
    "fully_connected": [0.8870996, 0.9457799],
}


@pytest.mark.parametrize("name", ["expmap", "logmap", "mobius_add", "transp", "dist", "midpoint", "fully_connected"])
def test_numbers_of_peers(name):
    x, y, v = ball.exp0(wave(1, 3), C), ball.exp0(wave(1, 3, step=0.4), C), wave(1, 3, step=1.1)
    ours = {
        "expmap": lambda: ball.exp_map(x, v, C), "logmap": lambda: ball.log_map(x, y, C),
        "mobius_add": lambda: ball.mobius_add(x, y, C), "transp": lambda: ball.transport(x, y, v, C),
        "dist": lambda: ball.distance(x, y, C),
        "midpoint": lambda: ball.midpoint(torch.cat((x, y, 0.5 * y)), C, -1, (0,)),
        "fully_connected": lambda: ball.fully_connected(
            x, wave(3, 2), torch.tensor([0.3, -0.2], dtype=torch.float64), C
        ),
    }  # fmt: skip
    assert torch.allclose(ours[name]().flatten(), torch.tensor(PEERS[name], dtype=torch.float64), atol=1e-6)


def test_the_midpoint_is_einsteins_and_the_frechet_mean_of_two():
    x = point(9, 4).detach()
    klein = 2 * x / (1 + C * x.square().sum(-1, keepdim=True))
    gamma = (1 - C * klein.square().sum(-1, keepdim=True)).rsqrt()
    mean = (gamma * klein).sum(0) / gamma.sum(0)
    expected = mean / (1 + (1 - C * mean.square().sum()).sqrt())
    assert torch.allclose(ball.midpoint(x, C, -1, (0,))[0], expected)
    pair, middle = x[:2], ball.midpoint(x[:2], C, -1, (0,))
    assert torch.allclose(2 * ball.distance(pair, middle, C), ball.distance(pair[:1], pair[1:], C))
    assert torch.allclose(FrechetMean.apply(pair, C), middle[0], atol=1e-5)
    best = FrechetMean.apply(x, C)
    spread = [ball.square_distance(x, m[None], C).mean() for m in (best, best + 0.01, ball.midpoint(x, C, -1, (0,))[0])]
    assert spread[0] < spread[1] and spread[0] <= spread[2]


def test_fully_connected_tends_to_a_linear_layer():
    x, z, r = 0.5 * tangent(8, 5), tangent(5, 3), tangent(3)
    assert torch.allclose(ball.fully_connected(x, z, r, 1e-10), 2 * x @ z - 2 * z.norm(dim=0) * r, atol=1e-5)
    identity = torch.eye(5, dtype=torch.float64) / 2
    assert torch.allclose(ball.fully_connected(x, identity, None, 1e-10), x, atol=1e-6)
    curved = 0.5 * point(8, 5)
    assert torch.allclose(ball.fully_connected(curved, identity, None, C), curved, atol=1e-9)


def test_the_factor_lambda_is_not_upside_down():
    """The first repository takes 2 (1 - c|x|^2) for 2 / (1 - c|x|^2), and half the identity is no identity then."""
    x, identity = point(8, 5), torch.eye(5, dtype=torch.float64) / 2
    lam = ball.conformal(x, C)
    assert torch.allclose(
        lam * (1 - C * x.square().sum(-1, keepdim=True)), torch.full((8, 1), 2.0, dtype=torch.float64)
    )
    norm, inner = identity.norm(dim=0), x @ identity
    on_axis = torch.zeros(1, 5, dtype=torch.float64)
    on_axis[0, 0] = 1.2
    for factor, same in (
        (ball.conformal(on_axis, C), True),
        (2 * (1 - C * on_axis.square().sum(-1, keepdim=True)), False),
    ):
        v = ball.signed_distances(on_axis @ identity, factor, norm, None, C)
        assert torch.allclose(ball.from_distances(v, C), ball.log0(on_axis, C), atol=1e-6) == same
    assert torch.isfinite(ball.signed_distances(inner, lam, norm, None, C)).all()


def test_the_shortcut_adds_along_the_channels():
    """The first repository adds along the last axis, the width, which ties the columns of an image together."""
    x, y = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    z = ball.mobius_residual(x, y, C)
    one = ball.mobius_residual(x[..., 2:3], y[..., 2:3], C)
    assert torch.allclose(z[..., 2:3], one, atol=1e-6)
    assert not torch.allclose(z, ball.mobius_residual(x, y, C, dim=-1), atol=1e-2)
    expected = ball.log0(ball.mobius_add(ball.exp0(x[0, :, 1, 2], C), ball.exp0(y[0, :, 1, 2], C), C), C)
    assert torch.allclose(z[0, :, 1, 2], expected, atol=1e-5)


def test_points_stay_inside_in_single_precision():
    far = BORDER * torch.randn(100, 8) / C**0.5
    far.requires_grad_()
    y = ball.exp0(far, C)
    assert (C**0.5 * y.norm(dim=-1)).max() <= 1 - 4e-3 + 1e-6
    back = ball.log0(ball.project(ball.mobius_add(y, y.flip(0), C), C), C)
    back.square().sum().backward()
    assert back.isfinite().all() and far.grad.isfinite().all()
    huge = ball.from_distances(1e3 * torch.randn(5, 8), C)
    assert huge.isfinite().all() and huge.norm(dim=-1).max() == pytest.approx(math.atanh(1 - 4e-3) / C**0.5, rel=1e-4)


def test_lengths_after_twenty_layers():
    x = torch.randn(64, 16)
    kept = {}
    with torch.no_grad():
        for init in ("identity", "gaussian"):
            y = x
            for _ in range(20):
                y = PoincareLinear(16, 16, init=init)(y)
            kept[init] = float(y.norm(dim=1).mean() / x.norm(dim=1).mean())
    assert 0.5 < kept["identity"] < 2 and kept["gaussian"] < 1e-3
    gaussian = init_directions_(torch.empty(200, 300), "gaussian")
    assert float(gaussian.std()) == pytest.approx((2 * 200 * 300) ** -0.5, rel=0.05)


def test_linear_layer_is_the_definition_between_tangents():
    layer, v = PoincareLinear(6, 4, C), torch.randn(3, 6)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    expected = ball.log0(ball.fully_connected(ball.exp0(v, C), layer.weight.T, layer.bias, C), C)
    assert torch.allclose(layer(v), expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", [PoincareBatchNorm2d, FrechetBatchNorm2d])
def test_batch_norm_moves_the_mean_to_the_bias_and_scales_the_variance(kind):
    norm, v = kind(4, C), torch.randn(6, 4, 5, 3) + torch.tensor([1.0, 0, 0, -1])[:, None, None]
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([0.5, 0, -0.5, 0]))
        norm.scale.fill_(0.5)
    y = ball.exp0(norm(v), C, 1)
    mean = norm.mean(y)
    assert ball.square_distance(mean, y, C, 1).mean() == pytest.approx(0.5, rel=0.1)
    if kind is FrechetBatchNorm2d:
        goal = ball.exp0(norm.bias[None, :, None, None], C, 1)
        assert ball.distance(mean, goal, C, 1).max() < 1e-3
        assert ball.square_distance(mean, y, C, 1).mean() == pytest.approx(0.5, rel=1e-3)


def test_batch_norm_in_eval_looks_at_no_neighbours():
    """The authors' layer always takes the statistics of the batch."""
    norm, v = PoincareBatchNorm2d(4, momentum=1.0), torch.randn(6, 4, 5, 3) + 0.5
    trained = norm(v)
    assert not torch.allclose(norm(v[:2]), trained[:2], atol=1e-3)
    norm(v)
    assert torch.allclose(norm.eval()(v), trained, atol=1e-4)
    assert torch.allclose(norm(v[:2]), trained[:2], atol=1e-4)


@pytest.mark.parametrize("kind", [PoincareBatchNorm2d, FrechetBatchNorm2d])
def test_a_scale_that_trains_below_zero_counts_by_its_magnitude(kind):
    v, outputs = torch.randn(6, 4, 5, 3), []
    for scale in (0.7, -0.7, 0.0):
        norm = kind(4, C)
        torch.nn.init.constant_(norm.scale, scale)
        outputs.append(norm(v))
        outputs[-1].square().sum().backward()
        assert norm.scale.grad.isfinite() and outputs[-1].isfinite().all()
        assert (norm.scale.grad < 0) == (scale < 0), "the gradient leads the magnitude down from either side"
    assert torch.equal(outputs[0], outputs[1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_points_of_half_precision_vectors_are_single(dtype):
    v, weight = torch.randn(5, 4).to(dtype), torch.randn(4, 3).to(dtype)
    y = ball.exp0(v, C)
    assert torch.equal(y, ball.exp0(v.float(), C))
    for function in (ball.log0, ball.project, ball.from_distances):
        assert torch.equal(function(v / 4, C), function((v / 4).float(), C))
    assert torch.equal(
        ball.fully_connected(y.to(dtype), weight, weight[0], C),
        ball.fully_connected(y.to(dtype).float(), weight.float(), weight[0].float(), C),
    )


# hypll 0.1.1, HBatchNorm2d(use_midpoint=True) at c = 0.1 with bias 0.3, -0.2 and scale 1.7, of wave(2, 2, 1, 2) as
# tangent vectors; log0 of its output.
HYPLL_NORM = [0.2065099, 0.6313501, 0.4390793, 0.3550127, 0.4344239, -0.0021768, -0.7652311, -0.8432373]


def test_numbers_of_hypll_batch_norm():
    norm = PoincareBatchNorm2d(2, 0.1)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([0.3, -0.2]))
        norm.scale.fill_(1.7)
    assert torch.allclose(norm(wave(2, 2, 1, 2).float()).flatten(), torch.tensor(HYPLL_NORM), atol=1e-5)


def test_adam_on_the_ball_reaches_its_goal_inside_and_is_adam_elsewhere():
    start, goal = point(3, 4).detach(), point(3, 4).detach()
    p, flat = BallParameter(start.clone(), C), nn.Parameter(torch.ones(3))
    twin = nn.Parameter(torch.ones(3))
    ours, adam = RiemannianAdam([p, flat], 0.05), torch.optim.Adam([twin], 0.05)
    for _ in range(300):
        for optimiser, extra in ((ours, flat), (adam, twin)):
            optimiser.zero_grad()
            loss = (extra - 0.3).square().sum()
            (loss + ball.square_distance(p, goal, C).sum() if optimiser is ours else loss).backward()
            optimiser.step()
        assert (C**0.5 * p.norm(dim=-1)).max() < 1
    assert ball.distance(p, goal, C).max() < 0.2 < ball.distance(start, goal, C).min() / 2
    assert torch.allclose(flat, twin, atol=1e-6)


# geoopt 0.5.1: RiemannianAdam(lr=0.05) on PoincareBallExact(0.1), three steps of the squared distance from
# exp0(wave(1, 3)) to exp0(wave of step 0.4). Measured beside ours.
GEOOPT_ADAM = [0.0, 0.570310775, 0.894934361]


def test_numbers_of_geoopt_adam():
    p = BallParameter(ball.exp0(wave(1, 3), 0.1), 0.1)
    goal, optimiser = ball.exp0(wave(1, 3, step=0.4), 0.1), RiemannianAdam([p], 0.05)
    for _ in range(3):
        optimiser.zero_grad()
        ball.square_distance(p, goal, 0.1).sum().backward()
        optimiser.step()
    assert torch.allclose(p.detach().flatten(), torch.tensor(GEOOPT_ADAM, dtype=torch.float64), atol=1e-7)


def test_a_learned_curvature_trains_and_stays_positive():
    curvature = ball.LearnedCurvature(0.1)
    assert float(curvature()) == pytest.approx(0.1, rel=1e-5)
    layers = nn.Sequential(PoincareLinear(6, 6, curvature), PoincareLinear(6, 3, curvature))
    assert sum(p is curvature.free for p in layers.parameters()) == 1
    layers(torch.randn(4, 6)).square().sum().backward()
    assert curvature.free.grad is not None and curvature.free.grad != 0
    with pytest.raises(BadInput, match="curvature=-1 is not positive"):
        PoincareLinear(3, 3, -1)


@pytest.mark.parametrize("start", [0, -1, math.nan, math.inf])
def test_a_curvature_that_is_not_positive_is_refused(start):
    for build in (ball.LearnedCurvature, lambda c: PoincareLinear(3, 3, c)):
        with pytest.raises(BadInput, match=f"curvature={start} is not positive and finite"):
            build(start)


@pytest.mark.parametrize("start", [1e-6, 100])
def test_a_learned_curvature_may_start_anywhere_above_zero(start):
    curvature = ball.LearnedCurvature(start)
    assert float(curvature().detach()) == pytest.approx(start, rel=1e-5)
    layer = PoincareLinear(4, 3, curvature)
    y = layer(torch.randn(5, 4))
    y.square().sum().backward()
    assert y.isfinite().all() and layer.weight.grad.isfinite().all() and curvature.free.grad.isfinite()


def saved(p: nn.Parameter) -> nn.Parameter:
    file = io.BytesIO()
    torch.save(p, file)
    file.seek(0)
    return torch.load(file)


class Bias(nn.Module):
    def __init__(self, p: nn.Parameter):
        super().__init__()
        self.p = self.twin = p


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p)), saved, lambda p: copy.deepcopy(Bias(p)).p,
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save", "module"],
)  # fmt: skip
def test_copies_of_a_ball_parameter_stay_on_its_ball(copied):
    p = BallParameter(point(3, 4).detach(), C)
    q = copied(p)
    assert isinstance(q, BallParameter) and q.curvature == C and q.requires_grad and torch.equal(p, q)
    goal, p = point(3, 4).detach(), BallParameter(p.detach().clone(), C)
    for one in (p, q):
        ball.square_distance(one, goal, C).sum().backward()
        RiemannianAdam([one], 0.05).step()
    assert torch.equal(p, q), "RiemannianAdam moves the copy differently"
    assert not copied(BallParameter(p.detach(), C, requires_grad=False)).requires_grad


def test_a_ball_parameter_in_two_places_is_copied_once():
    twice = copy.deepcopy(Bias(BallParameter(torch.zeros(3), C)))
    assert twice.p is twice.twin
