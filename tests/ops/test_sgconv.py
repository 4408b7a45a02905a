"""Structured global convolutions: the official layer's numbers, the shape of the kernel, and its norm."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput
from opsin.ops.spectral.sequence import parameter_groups
from opsin.ops.spectral.sgconv import SGConv, SGConv2d, cosine_bank, remap, stretched
from opsin.ops.spectral.sgconv_model import SGConvModel

# ctlllll/SGConv, gconv_standalone.py: GConv(2, l_max=12, bidirectional, mode "cat_randn", kernel_dim=4, postact "glu",
# decay 1.5 to 2.5), with every parameter and the input filled by `wave`. With random weights, two channels and modes
# cat, sum, learnable, nearest and cos, in one and both directions, the layers agreed to 6e-7.
OFFICIAL = [
    -0.047808, -0.079559, -0.082416, -0.074338, -0.037886, 0.035325, 0.122127, 0.186095, 0.511235, 0.717032, 0.699088,
    0.44373, 0.727614, 0.690547, 0.657033, 0.643207, 0.739872, 0.800386, 0.807601, 0.794075, 0.592335, 0.413498,
    0.421237, 0.639949,
]  # fmt: skip


def wave(*shape: int, step: float = 0.7) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def ones(**options: object) -> SGConv:
    """A layer whose pieces are all ones, so that the kernel is its envelope."""
    made = SGConv(3, 64, kernel_dim=8, **options)
    with torch.no_grad():
        for piece in made.kernel_list:
            piece.fill_(1.0)
    return made


def test_numbers_of_the_official_layer():
    made = SGConv(2, 12, bidirectional=True, kernel_dim=4, decay_min=1.5, decay_max=2.5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(wave(*parameter.shape))
    made.kernel_norm.copy_(made.raw_kernels().detach().norm(dim=-1, keepdim=True))  # the official first forward pass
    state = {**made.state_dict(), "kernel_norm_initialized": torch.tensor(True)}
    fresh = SGConv(2, 12, bidirectional=True, kernel_dim=4, decay_min=1.5, decay_max=2.5)
    fresh.load_state_dict(remap(state))
    for mode in (True, False):
        y = fresh.train(mode)(wave(1, 2, 12, step=0.3))
        assert torch.allclose(y.flatten(), torch.tensor(OFFICIAL), atol=2e-6)


def test_a_learned_decay_of_the_official_repository_loads():
    made = SGConv(2, 12, kernel_dim=4, mode="learnable")
    state = {**made.state_dict(), "multiplier": torch.tensor(1.0)}
    made.load_state_dict(remap(state))


def test_pieces_start_as_standard_normal():
    for piece in SGConv(64, 512).kernel_list:
        assert float(piece.std()) == pytest.approx(1, rel=0.05) and abs(float(piece.mean())) < 0.05


@pytest.mark.parametrize(("length", "scales"), [(4, 1), (8, 1), (9, 2), (16, 2), (17, 3), (64, 4), (100, 5)])
def test_number_and_lengths_of_pieces(length, scales):
    made = SGConv(2, length, channels=3, kernel_dim=8)
    assert made.scales == len(made.kernel_list) == scales == 1 + max(0, math.ceil(math.log2(length / 8)))
    assert made.raw_kernels().shape[-1] == 8 * 2 ** (scales - 1) >= length
    assert made.kernels().shape == (3, 2, length)
    assert sum(p.numel() for p in made.kernel_list) == 3 * 2 * 8 * scales


def test_the_envelope_falls_by_m_per_scale():
    made = ones(decay_min=2.0, decay_max=4.0)
    k = made.raw_kernels()[0]
    for feature, m in enumerate((2.0, 3.0, 4.0)):
        steps = [k[feature, i] for i in (0, 7, 8, 15, 16, 31, 32, 63)]
        assert torch.allclose(torch.stack(steps), torch.tensor([m**3, m**3, m**2, m**2, m, m, 1.0, 1.0]))
    flat = ones(decay_min=1.0, decay_max=1.0).raw_kernels()
    assert torch.allclose(flat, torch.ones_like(flat))


def test_pieces_are_stretched_by_interpolation():
    made = SGConv(3, 64, kernel_dim=8, decay_min=1.0, decay_max=1.0)
    k = made.raw_kernels()
    for i, (begin, scale) in enumerate([(0, 1), (8, 1), (16, 2), (32, 4)]):
        part = k[..., begin : begin + 8 * scale]
        assert torch.allclose(part, F.interpolate(made.kernel_list[i], scale_factor=scale, mode="linear"))
    w = torch.tensor([[[0.0, 1.0]]])
    assert stretched(w, 2, "linear").flatten().tolist() == [0.0, 0.25, 0.75, 1.0]  # between centres, not corners
    assert stretched(w, 2, "nearest").flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_sum_mode_adds_pieces_up_from_lag_zero():
    k = ones(mode="sum").raw_kernels()[0, 0]
    for lag, expected in ((0, 15.0), (7, 15.0), (8, 7.0), (16, 3.0), (32, 1.0), (63, 1.0)):
        assert k[lag] == expected


def test_learned_decay_is_a_power_law():
    made = ones(mode="learnable", decay_min=0.5, decay_max=0.5)
    lags = torch.arange(1.0, 65.0)
    assert torch.allclose(made.raw_kernels()[0, 0], lags**-0.5, atol=1e-6)
    made.kernels().sum().backward()
    assert made.decay.grad.any() and "decay" in made.kernel_parameters
    spread = SGConv(200, 16, kernel_dim=8, mode="learnable", decay_min=1.0, decay_max=3.0).decay
    assert 1.0 <= spread.min() < 1.2 and 2.8 < spread.max() <= 3.0


def test_cosine_bank():
    bank = cosine_bank(2, 5, 9)
    assert torch.equal(bank[0], bank[1]) and bank.shape == (2, 5, 9)
    turns = {round(float(torch.fft.rfft(row[:-1]).abs().argmax())) for row in bank[0]}
    assert turns == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("mode", ["cat", "sum", "learnable"])
def test_the_norm_is_one_at_the_start_and_stays_as_it_was(mode):
    made = SGConv(3, 64, channels=2, bidirectional=True, kernel_dim=8, mode=mode)
    assert torch.allclose(made.kernels().norm(dim=-1), torch.ones(4, 3), atol=1e-5)
    norm = made.kernel_norm.clone()
    with torch.no_grad():
        for piece in made.kernel_list:
            piece.mul_(3.0)
    made(torch.randn(1, 3, 64))
    assert torch.equal(made.kernel_norm, norm) and "kernel_norm" in made.state_dict()
    assert torch.allclose(made.kernels().norm(dim=-1), torch.full((4, 3), 3.0), atol=1e-4)
    second = SGConv(3, 64, channels=2, bidirectional=True, kernel_dim=8, mode=mode)
    second.load_state_dict(made.state_dict())
    assert torch.equal(second.kernels(), made.kernels()), "a trained layer keeps its norm when it is loaded"


@pytest.mark.parametrize("mode", ["cat", "learnable"])
def test_pieces_that_were_filled_anew_get_their_norm(mode):
    made = SGConv(3, 64, kernel_dim=8, mode=mode, decay_min=1.5)
    with torch.device("meta"):
        empty = SGConv(3, 64, kernel_dim=8, mode=mode, decay_min=1.5)
    empty.to_empty(device="cpu")
    for buffer in empty.buffers():
        buffer.fill_(math.nan)
    for layer in (made, empty):
        state = {name: 0.1 * torch.rand_like(p) for name, p in layer.named_parameters()}
        layer.load_state_dict(state, strict=False)
        layer.reset_buffers()
        assert torch.allclose(layer.kernels().norm(dim=-1), torch.ones(1, 3), atol=1e-5)
        assert torch.allclose(layer(torch.ones(1, 3, 64)), layer.reference(torch.ones(1, 3, 64)), atol=1e-5)
        assert not layer.kernel_norm.requires_grad
    assert torch.equal(made.multiplier, empty.multiplier)


def test_kept_spectra_follow_norm_and_options():
    made, u = SGConv(3, 64, kernel_dim=8, mode="sum").eval(), torch.randn(2, 3, 64)

    def check() -> Tensor:
        assert torch.allclose(made(u), made.reference(u), atol=1e-5)
        return made(u)

    with torch.no_grad():
        outputs = [check()]
        made.stretch = "nearest"
        outputs.append(check())
        made.mode = "cat"
        outputs.append(check())
        made.reset_buffers()
        outputs.append(check())
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in pairwise(outputs))


def test_the_norm_is_of_the_whole_kernel_before_it_is_cut():
    made = SGConv(3, 33, kernel_dim=8)
    assert made.raw_kernels().shape[-1] == 64 and (made.kernels().norm(dim=-1) < 1).all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_convolution_is_the_direct_sum(bidirectional):
    made, u = SGConv(3, 40, channels=2, bidirectional=bidirectional, kernel_dim=8), torch.randn(2, 3, 40)
    k = made.kernels()
    y = made.convolve(u)
    for c in range(2):
        back = F.conv1d(F.pad(u, (39, 0)), k[c].flip(-1)[:, None], groups=3)
        ahead = F.conv1d(F.pad(u, (0, 40)), k[2 + c][:, None], groups=3)[..., 1:] if bidirectional else 0.0
        assert torch.allclose(y[:, c], back + ahead, atol=1e-5)


def test_parameters_grow_with_the_logarithm_of_the_length():
    counts = [sum(p.numel() for p in SGConv(2, 2**i, kernel_dim=16).kernel_list) for i in range(6, 16)]
    assert len({b - a for a, b in pairwise(counts)}) == 1


def test_the_operator_and_the_published_length():
    op, x = SGConv2d(4, (3, 5)), torch.randn(2, 4, 3, 5)
    assert torch.equal(op(x).flatten(2), op.layer(x.flatten(2))) and op.layer.bidirectional
    with torch.device("meta"):
        million = opsin.create("sgconv_1m")
    assert million.layer.length == 2**20 and million.layer.scales == 16
    assert sum(p.numel() for p in million.layer.kernel_list) == 2 * 256 * 32 * 16


def test_the_network_and_its_groups():
    net = opsin.create("sgconv_lra")
    assert len(net.conv_layers) == 6 and net.conv_layers[0].dim == 512
    small = SGConvModel(2, 3, 8, depth=2, length=64, kernel_dim=8, mode="learnable")
    assert small(torch.randn(2, 64, 2)).shape == (2, 3)
    rest, kernels = parameter_groups(small, 0.01, 0.05)
    assert len(kernels["params"]) == 2 * (4 + 1) and kernels["lr"] == 1e-3
    assert len(rest["params"]) + len(kernels["params"]) == len(list(small.parameters()))


def test_complaints_are_sentences():
    for options in ({"mode": "dog"}, {"init": "dog"}, {"stretch": "dog"}):
        with pytest.raises(BadInput, match=f"{next(iter(options))}='dog' is not known"):
            SGConv(2, 8, **options)
    with pytest.raises(BadInput, match="kernel_dim=0"):
        SGConv(2, 8, kernel_dim=0)
    with pytest.raises(BadInput, match="length=0"):
        SGConv(2, 0)
