"""A-priori compressed convolution: one kernel in every format, its rank, its variance, and networks made of it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import opsin
from opsin.deploy import fuse
from opsin.errors import BadInput, UnknownName
from opsin.measure.cost import count_macs, count_params
from opsin.ops.conv.apriori_separable_conv import (
    FORMS,
    CPConv,
    PairConv,
    SharedConv,
    compress_a_priori,
    equal_rank,
    pair_ranks,
)
from opsin.ops.conv.depthwise import DepthwiseConv

SIZES = ((11,), (11, 9), (9, 7, 8))
PLAIN = (F.conv1d, F.conv2d, F.conv3d)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_both_evaluation_orders_are_the_plain_convolution_of_the_kernel(form, axes):
    sides, x = (3, 5, 3)[:axes], torch.randn(2, 4, *SIZES[axes - 1])
    conv = FORMS[form](4, 6, sides, 3, stride=2, padding=2, dilation=2)
    nn.init.normal_(conv.bias)
    expected = PLAIN[axes - 1](x, conv.kernel(), conv.bias, 2, 2, 2)
    assert conv.kernel().shape == (6, 4, *sides)
    for y in (conv(x), conv.reference(x), conv.fuse()(x)):
        assert torch.allclose(y, expected, atol=1e-5)


def test_factors_make_the_kernel_of_the_formula():
    pair, shared, cp = PairConv(2, 3, (3, 5), 2), SharedConv(2, 3, (3, 5), 4), CPConv(2, 3, (3, 5), 4)
    o, c, i, j = 2, 1, 0, 3
    u, v = pair.factors
    assert torch.allclose(pair.kernel()[o, c, i, j], sum(u[o, c, r, i] * v[o, c, r, j] for r in range(2)))
    u, v = shared.factors
    assert torch.allclose(shared.kernel()[o, c, i, j], sum(v[o, r, j] * u[r, c, i] for r in range(4)))
    (u, v), a, b = cp.factors, cp.outputs, cp.inputs
    assert torch.allclose(cp.kernel()[o, c, i, j], sum(a[o, r] * b[r, c] * u[r, i] * v[r, j] for r in range(4)))


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_in_the_pair_format(groups):
    conv, x = PairConv(4, 8, 3, 2, padding=1, groups=groups), torch.randn(2, 4, 7, 6)
    expected = F.conv2d(x, conv.kernel(), conv.bias, padding=1, groups=groups)
    for y in (conv(x), conv.reference(x), conv.fuse()(x)):
        assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_fresh_kernels_have_the_variance_of_he(form, axes):
    sides = (5, 3, 3)[:axes]
    conv = FORMS[form](64, 64, sides, equal_rank(form, 64, 64, sides))
    variance = float(conv.kernel().detach().var()) * conv.kernel()[0].numel()
    assert variance == pytest.approx(2, rel=0.15)
    naive = PairConv(64, 64, sides, 1)  # the trap: every factor with the dense kernel's variance
    with torch.no_grad():
        for factor in naive.factors:
            factor.copy_(torch.randn_like(factor) * (2 / conv.kernel()[0].numel()) ** 0.5)
    assert float(naive.kernel().detach().var()) * conv.kernel()[0].numel() < 0.02


def test_pairs_keep_their_rank_in_training_and_the_bottleneck_is_another_format():
    for axes, rank in ((2, 1), (2, 2), (3, 1)):
        conv, x = PairConv(3, 4, (5, 5, 5)[:axes], rank, padding=2), torch.randn(2, 3, *SIZES[axes - 1])
        optimiser = torch.optim.SGD(conv.parameters(), 0.05)
        before = conv.kernel().detach().clone()
        for _ in range(5):
            optimiser.zero_grad()
            (conv(x) - 1).square().mean().backward()
            optimiser.step()
        assert (conv.kernel() - before).abs().max() > 1e-3
        assert (pair_ranks(conv.kernel()) == rank).all()
    assert (pair_ranks(SharedConv(3, 4, (5, 5), 3).kernel()) == 3).all()  # R shared filters, rank R in every pair
    assert (pair_ranks(torch.randn(2, 2, 5, 5)) == 5).all()


def test_numbers_that_are_trained():
    assert count_params(PairConv(6, 8, (5, 5), 1, bias=False)) == 6 * 8 * 10
    assert count_params(PairConv(6, 8, (5, 5, 5), 1, bias=False)) == 6 * 8 * 15
    for form in FORMS:
        for sides in ((5, 5), (3, 3, 3)):
            conv = FORMS[form](48, 32, sides, equal_rank(form, 48, 32, sides), bias=False)
            assert count_params(conv) == pytest.approx(48 * 32 * sum(sides), rel=0.02)


@pytest.mark.parametrize("form", ["shared", "cp"])
def test_macs_of_the_other_formats(form):
    op = opsin.create("apriori_separable_conv", dim=16, form=form, rank=12)
    facts = opsin.show("apriori_separable_conv")["card"].facts[f"macs_{form}"]
    expected = eval(facts, {}, {"N": 9 * 7, "C": 16, "rank": 12, "kernel_size": 5})
    assert count_macs(op, torch.randn(1, 16, 9, 7)) == expected


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_operator(form):
    op, x = opsin.create("apriori_separable_conv", dim=8, form=form, kernel_size=3), torch.randn(2, 8, 7, 9)
    assert op(x).shape == x.shape and torch.allclose(op(x), op.reference(x), atol=1e-5)
    assert type(op.fuse()) is nn.Conv2d


def test_a_network_is_compressed_before_training():
    net = opsin.create("resnet18", num_classes=3)
    before = copy.deepcopy(net.state_dict())
    new = compress_a_priori(net)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "the given network changed"
    wide = [m for m in new.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.kernel_size == (1, 1) for m in wide) and any(isinstance(m, PairConv) for m in new.modules())
    x = torch.randn(2, 3, 33, 35)
    assert new(x).shape == net(x).shape and count_params(new) < 0.75 * count_params(net)
    plain = fuse(new)
    assert not any(isinstance(m, PairConv) for m in plain.modules())
    assert torch.allclose(plain(x), new.eval()(x), atol=1e-4)


def test_what_cannot_be_compressed_stays():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(
        shared, nn.Conv2d(4, 4, (1, 7)), nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1),
        nn.Conv2d(4, 4, 3, padding="same"), nn.Conv3d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), shared,
    )  # fmt: skip
    pairs, bottleneck = compress_a_priori(net), compress_a_priori(net, "shared", rank=2)
    replaced = [i for i in range(7) if isinstance(pairs[i], PairConv)]
    assert replaced == [0, 4, 5, 6] and pairs[0] is pairs[6] and pairs[5].groups == 2
    assert [i for i in range(7) if isinstance(bottleneck[i], SharedConv)] == [0, 4, 6]
    assert isinstance(compress_a_priori(shared, "cp"), CPConv)


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="kernel_size=4 is even"):
        opsin.create("apriori_separable_conv", dim=8, kernel_size=4)
    with pytest.raises(BadInput, match="rank=0"):
        PairConv(2, 2, 3, 0)
    with pytest.raises(BadInput, match="4 axes"):
        PairConv(2, 2, (3, 3, 3, 3))
    with pytest.raises(BadInput, match="groups=3"):
        PairConv(4, 4, 3, groups=3)
    with pytest.raises(BadInput, match="Linear has no convolution"):
        compress_a_priori(nn.Linear(2, 2))
    with pytest.raises(UnknownName, match="pairs"):
        opsin.create("apriori_separable_conv", dim=8, form="pair")
    with pytest.raises(UnknownName, match="shared"):
        compress_a_priori(nn.Conv2d(2, 2, 3), "share")


def test_layers_that_compute_something_of_their_own_stay():
    class Doubled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4, 4, 3), DepthwiseConv(4, 3))
    new = compress_a_priori(net)
    assert [type(layer) is type(old) for layer, old in zip(new, net, strict=True)] == [False, True, False]
