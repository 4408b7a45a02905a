"""Complex convolution on halves of channels: three products or four, PyTorch's own, and the phase."""

import pytest
import torch
from torch import Tensor

from opsin.errors import BadInput
from opsin.ops.conv import complex_cnn
from opsin.ops.conv.complex_cnn import ComplexConv

# torchcomplex 0.2.1: conv2d of weight sin(0.7 n) + i cos(0.7 n), shape (1, 1, 3, 3), no offset, padding 1, with the
# input sin(0.3 n) + i cos(0.3 n), shape (1, 1, 2, 3): real parts, then imaginary parts.
PACKAGE = [
    -0.021727,
    0.033013,
    0.076314,
    0.224491,
    0.235818,
    0.165444,
    -0.247358,
    -0.292495,
    -0.236293,
    0.106123,
    0.176162,
    0.185167,
]


def wave(*shape: int, step: float) -> Tensor:
    angle = step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
    return torch.stack((angle.sin(), angle.cos())).view(2, *shape)


def test_numbers_of_the_authors_package():
    op = ComplexConv(2, bias=False)
    with torch.no_grad():
        op.weight.copy_(wave(1, 1, 3, 3, step=0.7))
    x = wave(1, 1, 2, 3, step=0.3).transpose(0, 1).flatten(1, 2)
    assert torch.allclose(op(x).flatten(), torch.tensor(PACKAGE), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 5, "dilation": 2}, {"stride": 2}, {"bias": False}])
def test_three_products_and_four_are_the_same(options):
    op, x = ComplexConv(6, **options), torch.randn(2, 6, 9, 8)
    if op.bias is not None:
        torch.nn.init.normal_(op.bias)
    for path in (op.block, op.gauss):
        assert torch.allclose(path(x), op.reference(x), atol=1e-5)


def test_the_number_of_products_follows_the_size(monkeypatch):
    assert ComplexConv(32).products == 4 and ComplexConv(128).products == 3 and ComplexConv(32, 7).products == 3
    monkeypatch.setattr(complex_cnn, "GAUSS_FROM", 1)
    op, called = ComplexConv(4), []
    monkeypatch.setattr(op, "gauss", lambda x: called.append(x) or x)
    op(torch.randn(1, 4, 5, 5))
    assert called


def test_turning_the_phase_turns_the_output():
    x, (cos, sin) = torch.randn(2, 8, 7, 6), (0.6, 0.8)

    def turned(t: Tensor) -> Tensor:
        u, v = t.chunk(2, 1)
        return torch.cat((cos * u - sin * v, sin * u + cos * v), 1)

    free = ComplexConv(8, bias=False)
    assert torch.allclose(free(turned(x)), turned(free(x)), atol=1e-5)
    offset = ComplexConv(8)
    torch.nn.init.ones_(offset.bias)
    assert not torch.allclose(offset(turned(x)), turned(offset(x)), atol=1e-2)
    real = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False)
    assert not torch.allclose(real(turned(x)), turned(real(x)), atol=1e-2)


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="dim=7 is odd"):
        ComplexConv(7)
    with pytest.raises(BadInput, match="kernel_size=4 is even"):
        ComplexConv(8, 4)
