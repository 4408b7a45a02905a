"""LRP against the layer-by-layer definition, and its conservation; the saliency step against hand-made cases."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput
from opsin.explain.context_aware import context_aware_saliency, distance_to, patches, resized, saliency_at
from opsin.explain.lrp import Epsilon, lrp_0, ratio, relevance, z_plus


def network(bias: bool) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10, bias=bias),
    )  # fmt: skip
    return net.double()


def by_definition(net: nn.Sequential, x: Tensor, target: int) -> Tensor:
    """The paper's backward, layer by layer: conv and pooling by R/(Y + 1e-9), linear by z+."""
    inputs = [x[None]]
    for layer in net:
        inputs.append(layer(inputs[-1]))
    r = torch.zeros_like(inputs[-1])
    r[0, target] = inputs[-1][0, target]
    for layer, a, y in zip(reversed(net), reversed(inputs[:-1]), reversed(inputs[1:]), strict=True):
        if isinstance(layer, nn.Linear):
            v = layer.weight.clamp(min=0)
            r = a * ((r / (a @ v.T + 1e-9)) @ v)
        elif isinstance(layer, nn.Conv2d):
            left = (a.shape[-1] + 2 * layer.padding[0] - layer.kernel_size[0]) % layer.stride[0]
            r = a * F.conv_transpose2d(r / (y + 1e-9), layer.weight, None, layer.stride, layer.padding, left)
        elif isinstance(layer, nn.MaxPool2d):
            y, where = F.max_pool2d(a, 2, return_indices=True)
            r = a * F.max_unpool2d(r / (y + 1e-9), where, 2, output_size=a.shape)
        elif isinstance(layer, nn.Flatten):
            r = r.view(a.shape)
    return r[0].detach()


@pytest.mark.parametrize("bias", [False, True])
def test_the_modified_gradient_is_the_published_backward(bias):
    net, x = network(bias), torch.rand(3, 16, 16).double()
    ours, _ = relevance(net, x, 3, conv=ratio, linear=z_plus)
    assert torch.allclose(ours, by_definition(net, x, 3), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("linear", [lrp_0, z_plus])
def test_relevance_sums_to_the_logit_without_biases(linear):
    net, x = network(False), torch.rand(3, 16, 16).double()
    for target in range(10):
        r, _ = relevance(net, x, target, conv=lrp_0, linear=linear)
        logit = float(net(x[None])[0, target].detach())
        assert abs(float(r.sum()) - logit) / abs(logit) < 1e-3


def test_lrp_0_is_gradient_times_input():
    net, x = network(True), torch.rand(1, 3, 16, 16).double().requires_grad_()
    net(x)[0, 2].backward()
    r, _ = relevance(net, x[0].detach(), 2, conv=lrp_0, linear=lrp_0)
    assert torch.allclose(r, (x * x.grad)[0], atol=1e-12)


def test_the_stable_rule_does_not_explode_where_the_published_one_does():
    """A unit whose output is nearly zero but whose parts are large."""
    net = nn.Sequential(
        nn.Conv2d(1, 1, (1, 2), bias=True), nn.Tanh(), nn.Flatten(), nn.Linear(1, 2, bias=False)
    ).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[[[1.0, -1.0]]]]))
        net[0].bias.fill_(-1e-9 + 1e-13)
        net[3].weight.fill_(1.0)
    x = torch.tensor([[[0.5, 0.5]]]).double()
    published, _ = relevance(net, x, 0, conv=ratio, linear=lrp_0)
    stable, _ = relevance(net, x, 0, conv=Epsilon(), linear=lrp_0)
    assert stable.abs().max() < 2
    assert published.abs().max() > 100 * stable.abs().max()


@pytest.mark.parametrize("name", ["inception_next_atto", "metanet_n(mixer=depthwise)"])
def test_any_backbone_can_be_explained_and_comes_back_unchanged(name):
    net, x = opsin.create(name, num_classes=5).eval(), torch.rand(3, 64, 64)
    before = net(x[None])
    e = opsin.create("lrp")(net, x)
    assert e.map.isfinite().all() and torch.equal(net(x[None]), before)


def test_transformers_pass_relevance_through_their_values():
    net = opsin.create("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2, num_classes=5)
    r, _ = relevance(net, torch.rand(3, 32, 32), 1)
    assert r.isfinite().all() and r.abs().sum() > 0


def test_a_model_without_class_scores_is_named():
    with pytest.raises(BadInput, match="no class scores"):
        relevance(nn.Conv2d(3, 4, 3), torch.rand(3, 8, 8))


def test_one_scale_follows_the_formula():
    """A map of 7 x 7 has 3 x 3 patches at scale 1, and as many at each smaller scale: few enough to write out."""
    image = torch.rand(7, 7)
    candidates = [patches(resized(image, share)) for share in (1.0, 0.5, 0.25)]
    own, place, grid = candidates[0]
    expected = torch.empty(len(own))
    pairs = [(v, p) for values, places, _ in candidates for v, p in zip(values, places)]
    top = max(float((a - v).norm()) for a in own for v, _ in pairs)
    for i, (a, at) in enumerate(zip(own, place)):
        d = sorted(float((a - v).norm()) / top / (1 + 3 * float((at - p).norm())) for v, p in pairs)[:64]
        expected[i] = 1 - torch.exp(-torch.tensor(d).mean())
    assert torch.allclose(saliency_at(image, 1.0), expected.view(grid), atol=1e-5)


def test_distance_to_foci():
    foci = torch.zeros(4, 8, dtype=torch.bool)
    foci[0, 0] = True
    assert float(distance_to(foci)[3, 4]) == pytest.approx(5 / 8)


def test_an_odd_object_is_salient_and_a_flat_map_is_not():
    image = torch.zeros(60, 80)
    image[20:32, 50:62] = 1
    s = context_aware_saliency(image)
    assert s.shape == image.shape and s.min() >= 0 and s.max() == 1
    assert s[20:32, 50:62].mean() > 5 * s[:, :30].mean()
    assert context_aware_saliency(torch.ones(20, 20)).abs().max() == 0
