"""The restorer contract, over every card of the kind; and restorers that are broken in one way each, to be caught."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opsin.catalog import create, list_cards
from opsin.restore import Restorer
from opsin.restore.tiling import plan, tiled

CASES = [(card.key, name) for card in list_cards("restorer") for name in (card.variants or (card.key,))]
SIZES = ((7, 13), (1, 9), (23, 1), (16, 16), (1, 1))


def image(height, width, channels=3, batch=1):
    return torch.rand(batch, channels, height, width)


@torch.no_grad()
def check_sizes(net):
    """Sizes that no window or stride divides, down to one pixel, with every number of channels that the net takes."""
    for channels in net.channels:
        for height, width in SIZES:
            out = net(image(height, width, channels))
            assert out.shape == (1, channels, height * net.scale, width * net.scale), (height, width, out.shape)
            assert out.isfinite().all()


@torch.no_grad()
def check_range(net):
    """Values in [0, 1], also for images of nothing but black and white pixels."""
    for channels in net.channels:
        for x in (image(12, 11, channels).round(), torch.zeros(1, channels, 8, 8), torch.ones(1, channels, 8, 8)):
            out = net(x)
            assert out.min() >= 0 and out.max() <= 1, (out.min(), out.max())


@torch.no_grad()
def check_tiling(net):
    """A convolutional net gives in tiles what it gives at once; a net that looks further gives it away from seams."""
    field = net.receptive_field
    tile = max(16, 2 * (field or 8))
    height, width = 2 * tile + 5, 3 * tile - 7
    x = image(height, width)
    whole, parts = net(x), tiled(net, x, tile)
    error = (whole - parts).abs().amax((0, 1))
    if field is not None:
        assert error.max() <= 1e-6, error.max()
        return
    rows, columns, _ = plan(net, (height, width), tile)
    far = torch.ones(height, width, dtype=torch.bool)
    for spans, axis in ((rows, 0), (columns, 1)):
        for before, after in pairwise(spans):
            far.index_fill_(axis, torch.arange(after.start, before.stop), False)
    far = far.repeat_interleave(net.scale, 0).repeat_interleave(net.scale, 1)
    assert far.any() and error[far].max() <= 1e-3, error[far].max()


def check_params(net, params_m):
    """The published number of parameters, within 0.5 %."""
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(params_m, rel=0.005)


@torch.no_grad()
def check_export(net):
    """torch.export captures it, and the captured program gives the same."""
    x = image(9, 14)
    program = torch.export.export(net, (x,)).module()
    for y in (x, image(9, 14)):
        assert (program(y) - net(y)).abs().max() <= 1e-5


@torch.no_grad()
def check_state_dict(net, fresh):
    """Another instance with the same state_dict is the same function."""
    fresh.load_state_dict(net.state_dict())
    x = image(9, 14)
    assert torch.equal(fresh.eval()(x), net(x))


@torch.no_grad()
def check_batch(net):
    """An image's result does not depend on its neighbours in the batch."""
    x = image(9, 14, batch=3)
    assert (net(x)[:1] - net(x[:1])).abs().max() <= 1e-6


@torch.no_grad()
def check_bfloat16(net):
    """Runs in bfloat16 and stays near its float32 result."""
    x = image(16, 17)
    expected = net(x)
    net.to(torch.bfloat16)
    out = net(x.to(torch.bfloat16))
    net.to(torch.float32)
    assert out.dtype == torch.bfloat16 and (out.float() - expected).abs().mean() <= 0.02


def check_gradients(net):
    """In training every parameter gets a gradient, from each image of a batch."""
    net.train()
    x = image(12, 13, batch=2).requires_grad_()
    net(x).square().sum().backward()
    net.eval()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()


@pytest.fixture(scope="module", params=CASES, ids=[name for _, name in CASES])
def case(request):
    """A variant with the weights that ship with it, or random ones where none do."""
    from opsin.catalog import find

    _, name = request.param
    card, variant = find(name)
    shipped = bool(variant and variant.weights and (card.path.parent / variant.weights).is_file())
    return create(name, weights="shipped" if shipped else None).eval(), name, variant


def test_sizes(case):
    check_sizes(case[0])


def test_range(case):
    check_range(case[0])


def test_tiling(case):
    check_tiling(case[0])


def test_published_parameters(case):
    if case[2] is None or case[2].params_m is None:
        pytest.skip("the card has no published number of parameters")
    check_params(case[0], case[2].params_m)


def test_export(case):
    check_export(case[0])


def test_state_dict(case):
    check_state_dict(case[0], create(case[1]))


def test_batch(case):
    check_batch(case[0])


def test_bfloat16(case):
    check_bfloat16(case[0])


def test_gradients(case):
    check_gradients(create(case[1]))


# Broken members: each is the sound one but for one thing, and each check must catch its own.


class Sound(Restorer):
    """A 3x3 convolution twice as large; passes every check."""

    scale, receptive_field = 2, 1

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)

    channels = (3,)

    def forward(self, x):
        out = F.pixel_shuffle(self.conv(x), 2)
        return out if self.training else out.clamp(0, 1)


class NeedsEvenSizes(Sound):
    def forward(self, x):
        return F.interpolate(super().forward(F.avg_pool2d(x, 2, ceil_mode=False)), scale_factor=2)


class WrongScale(Sound):
    scale = 3


class Unclamped(Sound):
    def forward(self, x):
        return F.pixel_shuffle(self.conv(x), 2) * 5


class LooksFurtherThanItSays(Sound):
    receptive_field = 0


class SeesWhereItIs(Sound):
    """Adds a ramp over whatever it is given: blending cannot hide that."""

    receptive_field = None

    def forward(self, x):
        out = super().forward(x)
        return (out * torch.linspace(0, 1, out.shape[-1])).clamp(0, 1)


class BranchesOnValues(Sound):
    def forward(self, x):
        return super().forward(x) if x.mean().item() > 0.5 else super().forward(x) * 0.5


class KeepsStateElsewhere(Sound):
    def __init__(self):
        super().__init__()
        self.gain = [torch.rand(())]

    def forward(self, x):
        return super().forward(x) * self.gain[0]


class MixesTheBatch(Sound):
    def forward(self, x):
        return super().forward(x - x.mean((0, 2, 3), keepdim=True))


class FloatOnly(Sound):
    def forward(self, x):
        return super().forward(x).float()


class UnusedParameter(Sound):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(3))


BROKEN = [
    (NeedsEvenSizes, check_sizes), (WrongScale, check_sizes), (Unclamped, check_range),
    (LooksFurtherThanItSays, check_tiling), (SeesWhereItIs, check_tiling), (BranchesOnValues, check_export),
    (MixesTheBatch, check_batch), (FloatOnly, check_bfloat16), (UnusedParameter, check_gradients),
    (KeepsStateElsewhere, lambda net: check_state_dict(net, type(net)())),
    (UnusedParameter, lambda net: check_params(net, 336 / 1e6)),
]  # fmt: skip


@pytest.mark.parametrize(("broken", "check"), BROKEN, ids=[f"{b.__name__}" for b, _ in BROKEN])
def test_broken_member_is_caught(broken, check):
    check(Sound().eval())
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken().eval())
