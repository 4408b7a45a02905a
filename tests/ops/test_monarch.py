"""The Monarch decomposition and block FFTs: torch.fft's numbers, the order of frequencies, what is skipped."""

from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from opsin.errors import BadInput
from opsin.ops.spectral import monarch
from opsin.ops.spectral.butterfly import BlockFFT
from opsin.ops.spectral.long_conv import ButterflyLongConv
from opsin.ops.spectral.monarch import (
    Accelerator,
    best_factors,
    complex_flops,
    inverse,
    permutation,
    real_inverse,
    real_product,
    real_transform,
    transform,
)

FACTORS = [(8,), (16, 16), (32, 16), (4, 8, 2), (16, 16, 16), (2, 3, 4, 5)]


def signal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def products(function: object) -> int:
    """Real multiply-adds."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("factors", FACTORS)
def test_permuted_fft_and_back(factors):
    n = prod(factors)
    x, y = signal(2, 3, n), signal(2, 3, n)
    re, im = transform((x, y), factors)
    expected = torch.fft.fft(torch.complex(x, y))[..., permutation(factors)]
    assert torch.allclose(torch.complex(re, im), expected, atol=1e-11)
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(inverse((re, im), factors), (x, y), strict=True))


def test_frequencies_are_not_in_natural_order():
    x = signal(16)
    re, _ = transform((x, None), (4, 4))
    natural = torch.fft.fft(x).real
    assert permutation((4, 4)).tolist()[:6] == [0, 4, 8, 12, 1, 5]
    assert not torch.allclose(re, natural) and torch.allclose(re, natural[permutation((4, 4))])


@pytest.mark.parametrize("length", [1, 37, 128, 200, 256])
def test_zeros_and_unwanted_rows_are_implied(length):
    x = signal(2, length)
    spectrum = transform((x, None), (16, 16))
    assert torch.allclose(torch.complex(*spectrum), torch.fft.fft(x, 256)[:, permutation((16, 16))], atol=1e-12)
    assert torch.allclose(inverse(spectrum, (16, 16), length)[0], x, atol=1e-13)
    rows = -(-length // 16)
    assert products(lambda: transform((x, None), (16, 16))) == 2 * (2 * 16 * rows * 16 + 4 * 16**3)
    assert products(lambda: inverse(spectrum, (16, 16), length)) == 2 * (4 * 16**3 + 4 * rows * 16 * 16)


@pytest.mark.parametrize("factors", [(8,), (16, 8), (4, 4, 4)])
def test_real_signals_take_half_the_size(factors):
    n = 2 * prod(factors)
    x, k = signal(2, n), signal(2, n)
    y = torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(k), n)
    ours = real_inverse(real_product(real_transform(x, factors), real_transform(k, factors)), factors)
    assert torch.allclose(ours, y, atol=1e-11)
    short = real_transform(x[:, : n // 2 - 1], factors)
    assert torch.allclose(real_inverse(short, factors, n // 2 - 1), x[:, : n // 2 - 1], atol=1e-12)
    spectrum = torch.complex(*real_transform(x, factors))[:, 1:]
    assert torch.allclose(spectrum, torch.fft.fft(x)[:, permutation(factors)][:, 1:], atol=1e-11)


@pytest.mark.parametrize("factors", FACTORS)
def test_counted_products(factors):
    pair = (signal(1, prod(factors)), signal(1, prod(factors)))
    assert products(lambda: transform(pair, factors)) == 2 * complex_flops(factors)
    assert products(lambda: inverse(pair, factors)) == 2 * complex_flops(factors)


def test_corners_skip_products_and_keep_their_frequencies():
    x, factors, keep = signal(1, 512), (8, 8, 8), (8, 3, 2)
    part = torch.complex(*transform((x, signal(1, 512) * 0), factors, keep))
    order = permutation(factors, keep)
    assert len(order) == 48 and torch.allclose(part, torch.fft.fft(x)[:, order], atol=1e-12)
    counted = products(lambda: transform((x, x), factors, keep))
    assert counted == 4 * (8 * 8 * 64 + 8 * 3 * 8 * 8 + 8 * 3 * 2 * 8)
    masked = torch.zeros(512)
    masked[order] = 1
    back = inverse((part.real, part.imag), factors, keep=keep)
    assert torch.allclose(torch.complex(*back), torch.fft.ifft(torch.fft.fft(x) * masked), atol=1e-13)


def test_the_cost_model_takes_the_published_sizes():
    """The sizes of the CUDA kernels in HazyResearch/flash-fft-conv."""
    published = {256: (16, 16), 1024: (32, 32), 4096: (16, 16, 16), 8192: (32, 16, 16), 32768: (32, 32, 32)}
    assert {n: best_factors(n) for n in published} == published
    assert len(best_factors(2**20)) == 4
    assert prod(best_factors(196)) == 196 and max(best_factors(196)) <= 64
    slow_units = Accelerator(matmul=17.6e12)
    assert len(best_factors(4096, slow_units)) > 3, "without matrix units smaller factors win"
    with pytest.raises(BadInput, match="size 97 does not split"):
        best_factors(97)


def test_one_over_n_is_applied_once():
    x = torch.zeros(1, 64)
    x[0, 0] = 1.0
    assert torch.allclose(transform((x, None), (8, 8))[0], torch.ones(1, 64))
    assert torch.allclose(inverse((torch.ones(1, 64), torch.zeros(1, 64)), (8, 8))[0], x, atol=1e-6)


def test_no_table_made_under_a_meta_or_fake_device_stays():
    monarch._roots.cache_clear()
    permutation.cache_clear()
    with torch.device("meta"):
        transform((torch.empty(1, 64), None), (8, 8))
        BlockFFT(16, "fixed")(torch.empty(1, 64), 64)
    assert torch.allclose(transform((torch.ones(1, 64), None), (8, 8))[0].sum(), torch.tensor(64.0))
    assert permutation((8, 8)).device.type == "cpu"


def test_exported_transforms_leave_no_fake_tables():
    monarch._roots.cache_clear()
    layer, u = ButterflyLongConv(4, 32).eval(), torch.randn(2, 4, 32)
    program = torch.export.export(layer, (u,)).module()
    assert torch.allclose(program(u), layer(u), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 8, 16, 32, 512, 8192])
def test_block_fft_is_the_fft(n):
    """n <= 16 is the base case, where the published code fails for want of a name."""
    block, x = BlockFFT(16, "fixed"), torch.complex(signal(2, n), signal(2, n))
    assert torch.allclose(block(x, n), torch.fft.fft(x), atol=1e-9)
    assert torch.allclose(block.inverse(block(x, n)), x, atol=1e-11)
    assert torch.allclose(block(x[:, : n // 2 + 1], n), torch.fft.fft(x[:, : n // 2 + 1], n), atol=1e-9)
    assert not list(block.parameters())


def test_learned_matrices_start_at_the_fft_and_are_reached():
    x = torch.randn(2, 64)
    exact = torch.fft.fft(x)
    block = BlockFFT(16, "replaced")
    assert {name for name, _ in block.named_parameters()} == {"mat_2", "mat_4", "mat_8", "mat_16"}
    assert torch.allclose(block(x, 64), exact, atol=1e-4)
    block(x, 64).abs().square().sum().backward()
    assert block.mat_16.grad.any() and block.mat_4.grad.any() and block.mat_8.grad is None  # 64 = 16 x 4
    added = BlockFFT(16, "additive")
    distance = (added(x, 64) - exact).norm() / exact.norm()
    assert 0.005 < distance < 0.3
    with torch.no_grad():
        for parameter in added.parameters():
            parameter.zero_()
    assert torch.allclose(added(x, 64), exact, atol=1e-4)
    assert set(block.no_weight_decay()) == {"mat_2", "mat_4", "mat_8", "mat_16"}


def test_a_learned_matrix_acts_on_its_columns_on_both_sides():
    block, x = BlockFFT(4, "replaced").double(), signal(4)
    with torch.no_grad():
        block.mat_4.copy_(signal(4, 4, 2))
    matrix = torch.view_as_complex(block.mat_4.detach().contiguous())
    assert torch.allclose(block(x, 4), matrix @ x.to(matrix.dtype))
    wide = signal(16)
    twiddle = torch.exp(-2j * torch.pi * torch.outer(torch.arange(4), torch.arange(4)) / 16)
    expected = (matrix @ wide.view(4, 4).to(matrix.dtype) * twiddle) @ matrix.T
    assert torch.allclose(block(wide, 16), expected.T.flatten())


def test_activation_and_complaints():
    x = torch.randn(1, 32)
    assert not torch.allclose(BlockFFT(16, "fixed", activation=nn.Tanh())(x, 32), torch.fft.fft(x), atol=0.1)
    with pytest.raises(BadInput, match="factor=12"):
        BlockFFT(12)
    with pytest.raises(BadInput, match="not 24"):
        BlockFFT()(x, 24)
