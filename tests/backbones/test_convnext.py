"""ConvNeXt's block, its checkpoints' names, and the ladder's two ends."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import opsin
from opsin.backbones import convnext_ladder as ladder
from opsin.backbones.convnext import Block, remap
from opsin.errors import UnknownName

SMALL = dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64), num_classes=5)


def scramble(model: nn.Module) -> nn.Module:
    """Norms, biases and statistics away from 0 and 1."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(std=0.5)
    return model.eval()


def test_block_is_depthwise_norm_expand_gelu_project_scale():
    block = scramble(Block(6, 7, 1.0, 0.0))
    x = torch.randn(2, 6, 9, 8)
    y = F.conv2d(x, block.conv_dw.weight, block.conv_dw.bias, padding=3, groups=6)
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    y = y * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]
    y = F.gelu(F.conv2d(y, block.mlp.fc1.weight[..., None, None], block.mlp.fc1.bias))
    y = F.conv2d(y, block.mlp.fc2.weight[..., None, None], block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), x + block.gamma[:, None, None] * y)


def test_channels_last_stays_channels_last():
    model = scramble(opsin.create("convnext", **SMALL))
    x = torch.randn(2, 3, 64, 64)
    maps = model.to(memory_format=torch.channels_last).features(x.to(memory_format=torch.channels_last))
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_head_scale_and_isotropic():
    torch.manual_seed(0)
    plain = opsin.create("convnext", **SMALL)
    torch.manual_seed(0)
    tuned = opsin.create("convnext", head_scale=0.001, **SMALL)
    torch.testing.assert_close(tuned.head.fc.weight, 0.001 * plain.head.fc.weight)
    iso = opsin.create("convnext_iso_small", depths=(2,), dims=(16,), num_classes=5)
    assert [m.shape[1:] for m in iso.features(torch.randn(1, 3, 64, 64))] == [(16, 4, 4)]
    assert not any("gamma" in name for name in iso.state_dict())


def original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in state.items():
        name = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        name = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        out[name.replace("head.norm", "norm").replace("head.fc", "head")] = tensor
    return out


def isotropic(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in state.items():
        name = name.replace("stem.0.", "stem.").replace("stages.0.blocks.", "blocks.")
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        out[name.replace("head.norm", "norm").replace("head.fc", "head")] = tensor
    return out


def torchvision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = {"conv_dw": "block.0", "norm": "block.2", "mlp.fc1": "block.3", "mlp.fc2": "block.5"}
    out = {}
    for name, tensor in state.items():
        place = re.match(r"stages\.(\d)\.(blocks|downsample)\.(\d+)\.(.+)$", name)
        if place and place[2] == "blocks":
            if place[4] == "gamma":
                rest, tensor = "layer_scale", tensor[:, None, None]
            else:
                part, _, kind = place[4].rpartition(".")
                rest = f"{parts[part]}.{kind}"
            name = f"features.{2 * int(place[1]) + 1}.{place[3]}.{rest}"
        elif place:
            name = f"features.{2 * int(place[1])}.{place[3]}.{place[4]}"
        name = name.replace("stem.", "features.0.").replace("head.norm", "classifier.0")
        out[name.replace("head.fc", "classifier.2")] = tensor
    return out


@pytest.mark.parametrize("rename", [original, torchvision, dict])
def test_checkpoint_names(rename):
    model = scramble(opsin.create("convnext", **SMALL))
    state = model.state_dict()
    again = remap(rename(state))
    assert again.keys() == state.keys() and all(torch.equal(again[n], state[n]) for n in state)


def test_isotropic_checkpoint_names():
    model = opsin.create("convnext_iso_small", depths=(2,), dims=(16,))
    again = remap(isotropic(model.state_dict()))
    model.load_state_dict(again, strict=True)


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Carries weights over between networks whose layers are registered in the same order."""
    pairs = zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a.view_as(b))


def test_last_rung_is_convnext():
    last = scramble(opsin.create("convnext_ladder", width=8, depths=(1, 1, 2, 1), num_classes=5))
    model = opsin.create("convnext", layer_scale=None, **SMALL).eval()
    copy_in_order(last, model)
    x = torch.randn(2, 3, 64, 64)
    for a, b in zip(last.features(x), model.features(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last(x), model(x), rtol=1e-4, atol=1e-4)


def test_first_rung_is_resnet():
    options = dict(depths=(1, 2, 1, 1), num_classes=5)
    first = scramble(opsin.create("convnext_ladder", step="resnet", width=8, **options))
    model = opsin.create("resnet", dims=(8, 16, 32, 64), **options).eval()
    copy_in_order(first, model)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(first(x), model(x), rtol=1e-4, atol=1e-4)


def test_every_rung_changes_what_it_says():
    rungs = [ladder.rung_of(step) for step in ladder.STEPS]
    assert len(rungs) == 13 and len({str(r) for r in rungs}) == 13
    for step, before, after in zip(ladder.STEPS[1:], rungs, rungs[1:]):
        changed = {f for f in vars(after) if getattr(after, f) != getattr(before, f)}
        assert changed == set(ladder.CHANGES[step]), step


def layers(step: str, kind: type | tuple[type, ...]) -> int:
    net = opsin.create("convnext_ladder", step=step, width=8, depths=(1, 2), stem_stride=2, num_classes=5)
    return sum(isinstance(m, kind) for m in net.modules())


def test_fewer_activations_and_norms():
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    assert layers("gelu", nn.ReLU) == 0 and layers("gelu", nn.GELU) == 1 + 3 * 3
    assert layers("fewer_acts", nn.GELU) == 3, "one per block"
    assert layers("fewer_acts", norms) - layers("fewer_norms", norms) == 2 * 3, "two fewer per block"
    assert layers("layer_norm", nn.BatchNorm2d) == 0
    assert layers("separate_downsampling", nn.Conv2d) == layers("layer_norm", nn.Conv2d)  # shortcut's for the layer's


def test_unknown_rung_is_named():
    with pytest.raises(UnknownName, match="kernel_7"):
        opsin.create("convnext_ladder", step="kernel7")
