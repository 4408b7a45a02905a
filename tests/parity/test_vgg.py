"""The same weights in timm's VGG and here give the same logits and the same pyramid."""

import pytest
import torch

import opsin
from opsin.backbones.vgg import remap

pytestmark = pytest.mark.parity


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg11", "vgg16", "vgg16_bn"])
def test_logits_and_features(timm, name):
    theirs = timm.create_model(name).eval()
    for tensor in theirs.state_dict().values():
        if tensor.ndim == 1:
            tensor.uniform_(0.1, 0.5)
    ours = opsin.create(name).eval()
    ours.load_state_dict(remap(theirs.state_dict()))
    for size in (224, 96):
        x = torch.randn(1, 3, size, size)
        expected = theirs(x)
        assert (ours(x) - expected).abs().max() <= 5e-5 * expected.abs().max()
        last = theirs.forward_features(x)
        assert (ours.features(x)[-1] - last).abs().max() <= 5e-5 * last.abs().max()
