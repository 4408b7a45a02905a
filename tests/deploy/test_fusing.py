"""Fused models compute the same, with fewer modules, and the original is untouched."""

import copy

import pytest
import torch
from torch import nn

from opsin.deploy import fuse


def settle(model):
    """Gives every batch norm statistics and weights that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 3)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def norms(model):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


class Residual(nn.Module):
    """Attributes rather than a Sequential, a norm behind a ReLU, and control flow on shapes."""

    def __init__(self, dim):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
        self.conv2, self.bn2 = nn.Conv2d(dim, dim, 3, padding=1, groups=2), nn.BatchNorm2d(dim)
        self.last = nn.BatchNorm2d(dim)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.last((x + y).relu())


class Untraceable(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.block = Residual(dim)

    def forward(self, x):
        return self.block(x) if float(x.detach().mean()) > -1e9 else x


class Shared(nn.Module):
    """One convolution read by a norm and by a sum: folding would change the sum."""

    def __init__(self, dim):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Twice(nn.Module):
    """One convolution called twice, before a norm and before nothing."""

    def __init__(self, dim):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim)

    def forward(self, x):
        return self.conv(self.bn(self.conv(x)))


class TwoBranches(nn.Module):
    """3x3 + 1x1, which `fuse` merges into one 3x3 kernel (RepVGG's rule)."""

    def __init__(self, dim):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        return self.wide(x) + self.narrow(x)

    def fuse(self):
        one = copy.deepcopy(self.wide)
        one.weight.data += nn.functional.pad(self.narrow.weight, (1, 1, 1, 1))
        one.bias.data += self.narrow.bias
        return one


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)), 0),
        (lambda: Residual(4), 1),
        (lambda: Untraceable(4), 1),
        (lambda: Shared(4), 1),
        (lambda: Twice(4), 1),
        (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), 1),
        (lambda: nn.Sequential(TwoBranches(4), nn.BatchNorm2d(4)), 0),
        (lambda: TwoBranches(4), 0),
    ],
)
def test_fusing_keeps_the_function(build, left):
    model = settle(build())
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 4, 9, 7)
    fused = fuse(model)
    assert (fused(x) - model(x)).abs().max() < 1e-4
    assert norms(fused) == left
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_declared_fusing_replaces_the_module():
    fused = fuse(nn.Sequential(TwoBranches(4)))
    assert isinstance(fused[0], nn.Conv2d)


def test_one_and_three_dimensions():
    for conv, norm, shape in (
        (nn.Conv1d, nn.BatchNorm1d, (2, 3, 11)),
        (nn.Conv3d, nn.BatchNorm3d, (2, 3, 5, 6, 7)),
    ):
        model = settle(nn.Sequential(conv(3, 5, 3), norm(5)))
        fused, x = fuse(model), torch.randn(shape)
        assert norms(fused) == 0 and (fused(x) - model(x)).abs().max() < 1e-4
