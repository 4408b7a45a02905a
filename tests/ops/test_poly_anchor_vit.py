"""Anchoring: the definition, exact equivariance, the official operator's choice, and the attentions around it."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from opsin.errors import BadInput
from opsin.layers import PatchEmbed
from opsin.ops import native
from opsin.ops.attention import poly_anchor_vit
from opsin.ops.attention.poly_anchor_vit import PolyAnchorAttention, anchor, counted, embedded, strongest
from opsin.ops.attention.subsampled_attention import SubsampledAttention
from opsin.ops.attention.window_attention import WindowAttention

SHIFTS = [(0, 1), (3, 5), (-2, 7), (11, 4)]


def phases(x: torch.Tensor, stride: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the strongest component."""
    counts = counted(x.shape[2:], stride)
    number = strongest(x, counts)
    return number // counts[1], number % counts[1]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_the_strongest_component_comes_first_in_every_sample():
    x = 0.1 * torch.randn(3, 2, 8, 12)
    for sample, (row, column) in enumerate([(1, 3), (0, 0), (2, 1)]):
        x[sample, :, row::4, column::4] += 5
    assert [t.tolist() for t in phases(x, (4, 4))] == [[1, 0, 2], [3, 0, 1]]
    moved = anchor(x, 4)
    for sample, shift in enumerate([(-1, -3), (0, 0), (-2, -1)]):
        assert torch.equal(moved[sample], x[sample].roll(shift, (1, 2))), "each sample moves by its own phase"


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_choice_is_that_of_the_norms(memory):
    x = torch.randn(32, 3, 8, 12).to(memory_format=memory)
    norms = torch.stack([x[:, :, i::4, j::4].flatten(1).norm(dim=1) for i in range(4) for j in range(4)], 1)
    down, right = phases(x, (4, 4))
    assert torch.equal(4 * down + right, norms.argmax(1))


def test_the_choice_of_the_official_operator():
    """willding123/Shift-Equivariant-Vision-Transformers, PolyOrder with patches of 3 on a 6x6 map of this formula."""
    x = torch.sin(0.9 * torch.arange(144.0) ** 1.1).view(2, 2, 6, 6)
    assert [t.tolist() for t in phases(x, (3, 3))] == [[0, 2], [1, 2]]
    assert torch.allclose(
        anchor(x, 3)[:, 0, 0, :3].flatten(),
        torch.tensor([0.783327, 0.936461, 0.12771, 0.993181, 0.140724, -0.986622]),
        atol=1e-5,
    )


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_anchored_maps_of_shifted_images_differ_by_whole_strides(memory):
    x = double(2, 5, 12, 8).contiguous(memory_format=memory)
    base = anchor(x, 4)
    assert base.stride(1) == x.stride(1), "the memory format stays"
    for shift in SHIFTS:
        moved = anchor(x.roll(shift, (2, 3)).contiguous(memory_format=memory), 4)
        options = [base.roll((4 * i, 4 * j), (2, 3)) for i in range(3) for j in range(2)]
        assert all(any(torch.equal(moved[n], option[n]) for option in options) for n in range(2))


needs_compiler = pytest.mark.skipif(
    native.library(Path(poly_anchor_vit.SOURCE)) is None, reason="no C++ compiler, or OPSIN_NATIVE=0"
)
MEMORY = [torch.contiguous_format, torch.channels_last]


@needs_compiler
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    ("shape", "stride"),
    [((3, 3, 24, 40), 8), ((2, 5, 21, 14), 7), ((2, 1, 16, 16), 4), ((2, 64, 28, 28), 4), ((2, 3, 20, 21), (4, 5)),
     ((3, 3, 128, 128), 4), ((2, 3, 12, 48), 6), ((2, 3, 64, 64), 32), ((2, 3, 32, 48), 16)],
)  # fmt: skip
def test_the_loops_do_what_the_operators_do(shape, stride, memory, monkeypatch):
    x = torch.randn(shape).contiguous(memory_format=memory)
    counts = counted(shape[2:], (stride, stride) if isinstance(stride, int) else stride)
    looped = strongest(x, counts), anchor(x, stride)
    monkeypatch.setattr(native, "takes", lambda x: False)
    assert torch.equal(looped[0], strongest(x, counts)) and torch.equal(looped[1], anchor(x, stride))


@needs_compiler
def test_loops_want_memory_without_gaps():
    x = torch.randn(2, 3, 16, 32)
    assert torch.equal(anchor(x[..., ::2], 4), anchor(x[..., ::2].contiguous(), 4))
    assert torch.equal(anchor(x.transpose(2, 3), 4), anchor(x.transpose(2, 3).contiguous(), 4))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_what_ties_stays(kind):
    assert strongest(torch.ones(2, 3, 16, 16, dtype=kind), (4, 4)).tolist() == [0, 0]


@needs_compiler
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("n", "stride"), [(1, 16), (1, 4), (1, 2), (7, 16), (7, 4)])
def test_the_loops_run_on_threads(n, stride, memory):
    """A map for each of them, or all of them for one map."""
    x, threads = torch.randn(n, 3, 256, 256).contiguous(memory_format=memory), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone, best = anchor(x, stride), strongest(x, (stride, stride))
        torch.set_num_threads(3)
        assert torch.equal(anchor(x, stride), alone) and torch.equal(strongest(x, (stride, stride)), best)
    finally:
        torch.set_num_threads(threads)
    rolled = [one.roll((-(int(b) // stride), -(int(b) % stride)), (1, 2)) for one, b in zip(x, best)]
    assert torch.equal(alone, torch.stack(rolled))


def read(embed: PatchEmbed, x: Tensor) -> Tensor:
    """The embedded map, which no convolution has seen."""
    with torch.no_grad(), patch.object(PatchEmbed, "forward", side_effect=AssertionError):
        return embedded(embed, x)


@needs_compiler
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kept", MEMORY)
@pytest.mark.parametrize(
    ("shape", "patch_size", "dim"),
    [((2, 3, 64, 224), 16, 384), ((3, 3, 20, 32), 4, 64), ((1, 3, 32, 60), 4, 96), ((2, 64, 14, 30), 2, 40),
     ((4, 1, 21, 7), 7, 7), ((2, 5, 4, 3), 1, 130), ((0, 3, 8, 8), 4, 16)],
)  # fmt: skip
def test_patches_are_read_where_they_begin(shape, patch_size, dim, memory, kept):
    embed = PatchEmbed(shape[1], dim, patch_size, nn.LayerNorm).eval().to(memory_format=kept)
    x = torch.randn(shape).contiguous(memory_format=memory)
    with torch.no_grad():
        assert torch.allclose(read(embed, x), embed(anchor(x, patch_size)), atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("memory", MEMORY)
def test_what_is_read_moves_with_the_image_bit_for_bit(memory):
    embed, x = PatchEmbed(3, 48, 4).eval(), torch.randn(2, 3, 40, 44)
    base = read(embed, x.contiguous(memory_format=memory))
    for shift in SHIFTS:
        moved = read(embed, x.roll(shift, (2, 3)).contiguous(memory_format=memory))
        options = [base.roll((i, j), (1, 2)) for i in range(10) for j in range(11)]
        assert all(any(torch.equal(moved[n], option[n]) for option in options) for n in range(2))


@needs_compiler
def test_patches_are_read_on_threads():
    embed, threads = PatchEmbed(3, 96, 4).eval(), torch.get_num_threads()
    try:
        for n in (1, 5):
            x = torch.randn(n, 3, 100, 100)
            torch.set_num_threads(1)
            alone = read(embed, x)
            torch.set_num_threads(3)
            assert torch.equal(read(embed, x), alone)
    finally:
        torch.set_num_threads(threads)


def hooked(embed: PatchEmbed) -> None:
    embed.proj.register_forward_hook(lambda conv, given, out: 2 * out)


def scaled(embed: PatchEmbed) -> None:
    parametrize.register_parametrization(embed.proj, "weight", nn.Sequential())


def replaced(embed: PatchEmbed, **options) -> None:
    embed.proj = nn.Conv2d(3, 16, **options).eval()


@pytest.mark.parametrize(
    "change",
    [
        hooked, scaled, lambda embed: embed.register_forward_hook(lambda embed, given, out: 2 * out),
        lambda embed: embed.register_forward_pre_hook(lambda embed, given: 2 * given[0]),
        lambda embed: replaced(embed, kernel_size=4, stride=4, bias=False), lambda embed: embed.train(),
        lambda embed: replaced(embed, kernel_size=3, stride=4, padding=1), lambda embed: embed.double(),
        lambda embed: replaced(embed, kernel_size=4, stride=2), lambda embed: replaced(embed, kernel_size=4, padding=4),
        lambda embed: setattr(embed.proj, "forward", lambda x: F.conv2d(x.abs(), embed.proj.weight, stride=4)),
        lambda embed: setattr(embed.proj, "bias", nn.Parameter(torch.randn(1).expand(16))),
    ],
)  # fmt: skip
@torch.no_grad()
def test_an_embedding_that_is_not_as_made_is_called(change):
    """Bit for bit: the loop's rounding would differ."""
    embed = PatchEmbed(3, 16, 4).eval()
    change(embed)
    x = torch.randn(2, 3, 64, 96, dtype=embed.proj.weight.dtype)
    assert torch.equal(embedded(embed, x), embed(anchor(x, 4)))


def test_gradients_autocast_counters_and_odd_sizes_see_the_convolution():
    embed, x = PatchEmbed(3, 16, 4).eval(), torch.randn(2, 3, 16, 24)
    embedded(embed, x).sum().backward()
    assert embed.proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert embedded(embed, x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            embedded(embed, x)
        assert counter.get_total_flops() == 2 * 2 * 24 * 48 * 16
        odd = torch.randn(2, 3, 15, 24)
        assert torch.equal(embedded(embed, odd), embed(anchor(odd, 4)))
        for empty in ((1, 3, 0, 16), (1, 3, 16, 0)):
            with pytest.raises(RuntimeError):
                embedded(PatchEmbed(3, 384, 16).eval(), torch.empty(empty))
        with pytest.raises(RuntimeError, match="channels"):
            embedded(embed, torch.randn(2, 5, 16, 16))


@needs_compiler
@pytest.mark.parametrize("memory", MEMORY)
def test_the_loops_add_up_exactly_enough(memory):
    """A shift changes the order of the sum but not the choice, even between components that are close."""
    x = torch.rand(64, 3, 64, 16).add(100)
    near = (x[:, :, ::2, ::2].square().sum((1, 2, 3)) / x[:, :, 1::2, 1::2].square().sum((1, 2, 3))).sqrt()
    x[:, :, 1::2, 1::2] *= near[:, None, None, None]
    base = anchor(x.contiguous(memory_format=memory), 2)
    for shift in SHIFTS:
        moved = anchor(x.roll(shift, (2, 3)).contiguous(memory_format=memory), 2)
        options = torch.stack([base.roll((2 * i, 2 * j), (2, 3)) for i in range(32) for j in range(8)])
        assert (options == moved).flatten(2).all(2).any(0).all()


def test_sides_that_do_not_divide_stay():
    x = double(2, 3, 9, 8)
    assert torch.equal(phases(x, (4, 4))[0], torch.zeros(2, dtype=torch.long))
    columns = phases(x, (4, 4))[1]
    for n in range(2):
        assert torch.equal(anchor(x, 4)[n], x[n].roll(-int(columns[n]), 2))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", MEMORY)
def test_gradients_move_back_and_none_goes_through_the_choice(memory, kind):
    x = torch.randn(2, 3, 8, 8, dtype=kind).contiguous(memory_format=memory).requires_grad_()
    down, right = phases(x, (4, 4))
    weight = torch.randn(2, 3, 8, 8, dtype=kind)
    (anchor(x, 4) * weight).sum().backward()
    for n in range(2):
        assert torch.equal(x.grad[n], weight[n].roll((int(down[n]), int(right[n])), (1, 2)))


@torch.no_grad()
def test_the_operator_commutes_with_every_shift_and_plain_windows_do_not():
    op, x = PolyAnchorAttention(16, 2, window_size=4).double(), double(2, 16, 8, 12)
    plain = WindowAttention(16, 2, window_size=4).double()
    plain.load_state_dict(op.state_dict())
    for shift in SHIFTS:
        shifted = x.roll(shift, (2, 3))
        assert (op(shifted) - op(x).roll(shift, (2, 3))).abs().max() < 1e-12
        assert (plain(shifted) - plain(x).roll(shift, (2, 3))).abs().max() > 1e-6
    assert torch.allclose(op(x), torch.cat([op(s[None]) for s in x])), "phases are per sample"


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 12), (7, 12), (5, 5)])
def test_the_operator_is_window_attention_of_the_anchored_map(size):
    op, x = PolyAnchorAttention(16, 2, window_size=4).double(), double(1, 16, *size)
    plain = WindowAttention(16, 2, window_size=4).double()
    plain.load_state_dict(op.state_dict())
    shift = [int(p) for p in phases(x, (4, 4))]
    assert torch.allclose(op(x), plain(anchor(x, 4)).roll(shift, (2, 3)), atol=1e-12)


@torch.no_grad()
def test_convolutions_and_reductions_on_an_anchored_map_move_by_their_stride():
    x, weight = double(1, 3, 16, 16), double(6, 3, 4, 4)
    attend = SubsampledAttention(8, 1, sr_ratio=4).double()
    maps = double(1, 8, 8, 8)
    convolved, attended = F.conv2d(anchor(x, 4), weight, stride=4), attend(anchor(maps, 4))
    for shift in SHIFTS:
        moved = F.conv2d(anchor(x.roll(shift, (2, 3)), 4), weight, stride=4)
        options = [convolved.roll((i, j), (2, 3)) for i in range(4) for j in range(4)]
        assert min(float((moved - option).abs().max()) for option in options) < 1e-12
        moved = attend(anchor(maps.roll(shift, (2, 3)), 4))
        options = [attended.roll((4 * i, 4 * j), (2, 3)) for i in range(2) for j in range(2)]
        assert min(float((moved - option).abs().max()) for option in options) < 1e-12


@torch.no_grad()
def test_a_window_as_large_as_the_map_is_self_attention():
    op, x = WindowAttention(16, 2, window_size=6).double(), double(2, 16, 6, 6)
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = op.qkv(tokens).view(2, 36, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = op.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert torch.allclose(op(x).flatten(2).transpose(1, 2), expected, atol=1e-12)


@torch.no_grad()
def test_a_ratio_of_one_is_self_attention_and_reduced_tokens_are_few():
    op, x = SubsampledAttention(16, 2, sr_ratio=1).double(), double(2, 16, 5, 6)
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = (t.view(2, 30, 2, 8).transpose(1, 2) for t in (op.q(tokens), *op.kv(tokens).chunk(2, -1)))
    expected = op.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert torch.allclose(op(x).flatten(2).transpose(1, 2), expected, atol=1e-12)
    for size, ratio, keys in (((8, 12), 4, (2, 3)), ((9, 5), 4, (3, 3)), ((4, 2), 8, (2, 2)), ((1, 1), 8, (1, 1))):
        assert SubsampledAttention(16, 2, ratio).reduced(torch.randn(1, 16, *size)).shape[1:3] == keys


@pytest.mark.parametrize(
    "build",
    [
        lambda: WindowAttention(16, 3), lambda: WindowAttention(16, window_size=0),
        lambda: SubsampledAttention(16, sr_ratio=0), lambda: PolyAnchorAttention(10, 4),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(build):
    with pytest.raises(BadInput, match=r"does not divide|at least"):
        build()
