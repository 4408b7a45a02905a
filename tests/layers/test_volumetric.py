"""Networks of volumes out of networks of images."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.replace import with_layers_replaced
from opsin.layers.volumetric import ACSConv3d, acs, cube, inflated, volumetric


@torch.no_grad()
def test_a_volume_of_equal_slices_gives_what_a_slice_gave():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=(0, 1)), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)).train()
    net(torch.randn(8, 2, 9, 9))
    net[0].padding = (0, 0)  # zeros above and below a volume are no slices
    solid, x = volumetric(net.eval(), inflated), torch.randn(2, 2, 8, 8)
    y = solid(x[:, :, None].expand(-1, -1, 6, -1, -1))
    assert torch.allclose(y, net(x)[:, :, None].expand_as(y), atol=1e-5)


@torch.no_grad()
def test_acs_kernels_look_at_three_kinds_of_planes():
    conv = nn.Conv2d(2, 7, 3, stride=2, padding=1)
    solid, x = ACSConv3d(conv), torch.randn(1, 2, 6, 7, 8)
    full = torch.zeros(7, 2, 3, 3, 3)
    full[:3, :, 1], full[3:5, :, :, 1], full[5:, :, :, :, 1] = conv.weight[:3], conv.weight[3:5], conv.weight[5:]
    assert torch.allclose(solid(x), F.conv3d(x, full, conv.bias, 2, 1), atol=1e-5)
    assert sum(p.numel() for p in solid.parameters()) == sum(p.numel() for p in conv.parameters())
    for bad in (nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Conv2d(2, 4, (3, 1), padding=(1, 0))):
        with pytest.raises(BadInput, match="odd, 'same' padded, ungrouped"):
            acs(bad)


def test_pools_keep_their_sizes():
    net = nn.Sequential(nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(1))
    solid, x = volumetric(net, inflated), torch.rand(1, 2, 8, 8, 8)
    assert solid[0](x).shape[2:] == net[0](x[:, :, 0]).shape[2:] + (5,) and solid(x).shape == (1, 2, 1, 1, 1)
    assert cube(3) == (3, 3, 3) and cube((1, 5)) == (5, 1, 5)


def test_what_has_no_form_is_named_and_shared_layers_stay_shared():
    with pytest.raises(BadInput, match="ConvTranspose2d has no form"):
        volumetric(nn.Sequential(nn.ConvTranspose2d(2, 2, 2)), inflated)
    conv = nn.Conv2d(2, 2, 3)
    net = nn.Sequential(conv, conv)
    new = volumetric(net, inflated)
    assert new[0] is new[1] and net[0] is conv
    assert isinstance(with_layers_replaced(conv, inflated)[0], nn.Conv3d)


@torch.no_grad()
def test_networks_in_double_and_without_numbers():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).double()
    nn.init.uniform_(net[1].running_mean)
    solid, x = volumetric(net.eval(), inflated), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    y = solid(x[:, :, None].expand(-1, -1, 3, -1, -1))
    assert torch.allclose(y[:, :, 0], net(x), rtol=1e-12, atol=1e-12), "nothing passed through single precision"
    assert inflated(net[0]).weight.dtype == torch.float64
    empty = volumetric(net.to("meta"), inflated)
    assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
