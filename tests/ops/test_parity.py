"""MobileNetV2 and ShuffleNetV2 compute what timm and torchvision compute from the same weights."""

import pytest
import torch
from torch import nn

import opsin
from peers import NoPeer, import_peer

pytestmark = pytest.mark.parity


def stirred(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def peer(name: str) -> nn.Module:
    try:
        timm = import_peer("timm")
    except NoPeer as reason:
        pytest.skip(str(reason))
    if name.startswith("mobilenetv2"):
        return stirred(timm.create_model(name))
    return stirred(getattr(import_peer("torchvision").models, name)())


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["mobilenetv2_050", "mobilenetv2_100", "mobilenetv2_140", "shufflenet_v2_x0_5", "shufflenet_v2_x1_5"]
)
def test_same_logits(name):
    theirs, ours = peer(name), opsin.create(name).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 96, 128)
    assert (ours(x) - theirs(x)).abs().max() < 1e-5 * theirs(x).abs().max()
