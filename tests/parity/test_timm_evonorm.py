"""EvoNorm beside timm's: the same state gives the same outputs, gradients and running variance."""

import pytest
import torch

from opsin.ops.normact.evonorm import FORMS, evonorm

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("apply_act", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_layer(timm, form, apply_act):
    from timm.layers import evo_norm

    group = {"groups": 8} if form[0] == "s" else {}
    name = form[:2].upper() + form[2:]
    theirs = getattr(evo_norm, f"EvoNorm2d{name}")(32, apply_act=apply_act, **group)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = evonorm(32, form, apply_act=apply_act, **group)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for mode in (True, True, False):
        x = 1 + 2 * torch.randn(4, 32, 7, 5)
        weight, results = torch.randn(4, 32, 7, 5), []
        for layer in (theirs.train(mode), ours.train(mode)):
            given = x.clone().requires_grad_()
            y = layer(given)
            results.append((y, *torch.autograd.grad((y * weight).sum(), [given, *layer.parameters()])))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)
    for name, buffer in theirs.named_buffers():
        assert torch.allclose(buffer, ours.get_buffer(name), rtol=1e-5)
