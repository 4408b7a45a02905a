"""The surrogate of a wave solver: any size and format, roll-outs of its own results, and that it learns."""

import pytest
import torch
from torch import nn

import opsin
from opsin.errors import BadInput, UnknownName
from opsin.measure.cost import count_params
from opsin.ops.conv.apriori_separable_conv import FORMS, FactoredConv, PairConv
from opsin.science.wave import trajectories
from opsin.science.wave_surrogate import WaveSurrogate, fit, rollout_error


def stirred(model: nn.Module) -> nn.Module:
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("form", ["dense", *FORMS])
def test_every_format_takes_any_size(form):
    model = stirred(WaveSurrogate(4, form=form))
    for height, width in ((16, 16), (21, 18), (5, 7)):
        y = model(torch.randn(2, 2, height, width), torch.rand(2, height, width))
        assert y.shape == (2, 1, height, width) and y.isfinite().all()
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert any(isinstance(m, FactoredConv) for m in model.modules()) == (form != "dense")


def test_sizes_of_the_formats():
    dense, one, two = (
        count_params(WaveSurrogate(8, **o)) for o in ({}, {"form": "pairs"}, {"form": "pairs", "rank": 2})
    )
    assert 0.39 < one / dense < 0.45 and 0.79 < two / dense < 0.82
    model = opsin.create("wave_surrogate", form="pairs", rank=2)
    assert sum(isinstance(m, PairConv) for m in model.modules()) == 10
    assert {m.rank for m in model.modules() if isinstance(m, PairConv)} == {2}


def test_a_fresh_one_keeps_the_field_and_scales_with_it():
    model, history, speed = WaveSurrogate(4), torch.randn(2, 2, 16, 16), torch.rand(2, 16, 16)
    assert torch.equal(model(history, speed), history[:, 1:])
    stirred(model)
    assert torch.allclose(model(100 * history, speed), 100 * model(history, speed), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_rollouts_feed_on_themselves():
    model, history, speed = stirred(WaveSurrogate(4)), torch.randn(2, 2, 16, 16), torch.rand(2, 16, 16)
    fields = model.rollout(history, speed, 3)
    first = model(history, speed)
    second = model(torch.cat((history[:, 1:], first), 1), speed)
    third = model(torch.cat((first, second), 1), speed)
    assert torch.allclose(fields, torch.cat((first, second, third), 1), atol=1e-5)


def test_the_error_is_one_for_silence_and_zero_for_the_truth():
    data = trajectories(3, size=20, snapshots=6)

    class Truth(WaveSurrogate):
        def rollout(self, history, speed, steps):
            return self.factor * data.fields[:, 2 : 2 + steps]

    for factor, error in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        model = Truth(4)
        model.factor = factor
        assert rollout_error(model, data, steps=3) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize("form", ["dense", "pairs"])
def test_it_learns(form):
    torch.manual_seed(0)
    train, test = trajectories(30, size=24, snapshots=10, seed=1), trajectories(6, size=24, snapshots=10, seed=2)
    model = WaveSurrogate(6, levels=2, form=form)
    before = rollout_error(model, test, 4)
    losses = fit(model, train, steps=120, batch=4)
    assert losses[0] == pytest.approx(1, abs=1e-3), "a fresh one predicts no change"
    assert sum(losses[-20:]) / 20 < 0.35 and rollout_error(model, test, 4) < 0.6 * before


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="kernel_size=4 is even"):
        WaveSurrogate(kernel_size=4)
    with pytest.raises(UnknownName, match="pairs"):
        WaveSurrogate(form="pair")
