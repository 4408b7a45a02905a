"""PolyTwins away from its published strides: shifts change no logit wherever strides divide their maps."""

import pytest
import torch
from torch import Tensor

import opsin
from opsin.backbones.polytwins import PolyTwins

SHIFTS = [(1, 0), (0, 1), (2, 3), (5, -3), (17, 22)]


def stirred(**options) -> PolyTwins:
    """In double, with weights far from their start, so that every part counts."""
    model = PolyTwins(**dict(dims=(16, 32), depths=(2, 2), num_heads=(1, 2), sr_ratios=(2, 1), window_size=3) | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def change(model: PolyTwins, x: Tensor) -> float:
    """The largest change of a logit over circular shifts, for the spread of the logits."""
    y = model(x)
    return max(float((model(x.roll(s, (2, 3))) - y).abs().max()) for s in SHIFTS) / float(y.std())


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "side"),
    [
        (dict(depths=(1, 1)), 24), (dict(sr_ratios=(3, 1)), 24), (dict(sr_ratios=(1, 1)), 24),
        (dict(sr_ratios=(2, 1)), 24), (dict(depths=(1, 1), window_size=1), 24), (dict(depths=(3, 2)), 48),
        (dict(sr_ratios=(6, 3)), 24), (dict(sr_ratios=(1, 1), window_size=4), 32),
        (dict(depths=(2, 1, 1), dims=(16, 16, 32), num_heads=(1, 1, 2), sr_ratios=(3, 1, 1)), 48),
    ],
    ids=str,
)  # fmt: skip
def test_any_strides_that_divide_their_maps_are_exact(options, side):
    assert change(stirred(**options), torch.rand(2, 3, side, side, dtype=torch.float64)) < 1e-10


def test_published_strides_need_no_anchor_before_later_patches():
    with torch.device("meta"):
        nets = [opsin.create(name) for name in ("polytwins_svt_small", "polytwins_svt_base")]
    assert all([net.anchored(i, 2) for i in range(4)] == [False, True, True, True] for net in nets)
    even = stirred(sr_ratios=(1, 1), window_size=4)
    assert even.anchored(1, 2) and not even.anchored(1, 8), "a ratio of 1 moves nothing"
