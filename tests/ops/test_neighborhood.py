"""Neighborhood attention: NATTEN's numbers, one rule written twice, three implementations, and what they cost."""

import random
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask

import opsin
from opsin.errors import BadInput, UnknownName
from opsin.measure.cost import count_macs
from opsin.measure.memory import LiveTensors
from opsin.ops.attention import neighborhood
from opsin.ops.attention.neighborhood import Axis, flex_mask, neighborhood_attention, pairs, rule, small
from opsin.ops.attention.neighborhood_attention import NeighborhoodAttention
from opsin.ops.attention.self_attention import SelfAttention

BACKENDS = ("block", "gather", "dense")
# SHI-Labs/NATTEN, na1d on seven tokens and na2d on 4x5, one head of 32, filled by `wave`; the result's first channel.
NATTEN_1D = {
    (3, 2, False): [-0.277085, -0.630295, -0.137728, -0.736322, 0.661407, -0.739743, 0.619796],
    (4, 1, False): [-0.602678, -0.780177, -0.24043, -0.84285, 0.259041, -0.586665, 0.650629],
    (3, 2, True): [0.0, -0.664161, -0.075142, -0.78321, -0.071524, -0.739743, 0.619796],
}
NATTEN_2D = [
    -0.638761, -0.591872, -0.673421, -0.727943, -0.489198, 0.958135, 0.791713, 0.810543, 0.451083, 0.016572,
    -0.395575, -0.630298, -0.888926, -0.746258, -0.329236, 0.565573, 0.816514, 0.833375, 0.491453, 0.022206,
]  # fmt: skip


def wave(*shape: int, step: float) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def waves(*shape: int) -> list[Tensor]:
    return [wave(*shape, step=step) for step in (0.11, 0.23, 0.37)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_natten(backend):
    for (kernel, dilation, causal), expected in NATTEN_1D.items():
        y = neighborhood_attention(*waves(1, 7, 1, 32), kernel, dilation, causal, backend=backend)
        assert torch.allclose(y[0, :, 0, 0], torch.tensor(expected), atol=2e-6)
    y = neighborhood_attention(*waves(1, 4, 5, 1, 32), (2, 3), (2, 1), (False, True), backend=backend)
    assert torch.allclose(y[0, :, :, 0, 0].flatten(), torch.tensor(NATTEN_2D), atol=2e-6)


def window(i: int, axis: Axis) -> list[int]:
    """The rule in the words of the fact sheet: a centre that is kept away from the group's ends."""
    group = [j for j in range(axis.length) if j % axis.dilation == i % axis.dilation]
    place = group.index(i)
    if axis.causal:
        return group[max(0, place - axis.kernel + 1) : place + 1]
    left, right = axis.kernel // 2, axis.kernel // 2 + axis.kernel % 2 - 1
    centre = min(max(place, left), len(group) - 1 - right)
    return group[centre - left : centre + right + 1]


def test_the_rule_of_one_axis():
    for length in range(1, 14):
        for dilation in (1, 2, 3):
            for kernel in range(1, length // dilation + 1):
                for causal in (False, True):
                    axis = Axis(length, kernel, dilation, causal)
                    start, stop = axis.windows()
                    for i in range(length):
                        members = range(i % dilation, length, dilation)[start[i] : stop[i]]
                        assert list(members) == window(i, axis), (axis, i)
                        assert len(members) == (min(kernel, i // dilation + 1) if causal else kernel)


def test_tiles_cover_their_windows():
    for axis in (Axis(23, 5, 2), Axis(17, 4, 3, True), Axis(9, 9), Axis(40, 7, 1)):
        for side in (2, 3, 8, 64):
            cut = neighborhood.cut(axis, side)
            for i in range(axis.length):
                tile, slot = cut.tile[i], cut.slot[i]
                assert cut.query[tile, slot] == i
                assert sorted(cut.key[tile][cut.inside[tile, slot]]) == window(i, axis)


def cases(count: int) -> list[tuple]:
    """Random shapes, windows, dilations and causal axes."""
    draw, found = random.Random(0), []
    for n in range(count):
        axes = 1 + n % 3
        kernel = [draw.randint(1, 6 if axes < 3 else 4) for _ in range(axes)]
        dilation = [draw.randint(1, 3) for _ in range(axes)]
        space = [k * d + draw.randint(0, 10 if axes < 3 else 3) for k, d in zip(kernel, dilation)]
        found.append((space, kernel, dilation, [draw.random() < 0.4 for _ in range(axes)], n % 2 == 0))
    return found


@pytest.mark.parametrize("scratch", [1, neighborhood.SCRATCH_BYTES], ids=["tile by tile", "at once"])
def test_all_implementations_agree(scratch, monkeypatch):
    monkeypatch.setattr(neighborhood, "SCRATCH_BYTES", scratch)
    for space, kernel, dilation, causal, biased in cases(18):
        q, k, v = (torch.randn(2, *space, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
        bias = torch.randn(3, *(2 * size - 1 for size in kernel), dtype=torch.float64, requires_grad=True)
        bias = bias if biased else None
        inputs = [q, k, v] + [bias] * biased
        weight = torch.randn_like(v)
        results = {}
        for backend in BACKENDS:
            y = neighborhood_attention(q, k, v, kernel, dilation, causal, bias=bias, backend=backend)
            results[backend] = (y, *torch.autograd.grad((y * weight).sum(), inputs))
        for backend in ("block", "gather"):
            for ours, exact in zip(results[backend], results["dense"], strict=True):
                assert (ours - exact).abs().max() < 1e-10, (backend, space, kernel, dilation, causal)


def test_a_window_as_large_as_the_map_is_self_attention():
    q, k, v = torch.randn(3, 2, 5, 6, 2, 8).unbind()
    plain = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)))
    for backend in BACKENDS:
        y = neighborhood_attention(q, k, v, (5, 6), backend=backend)
        assert torch.allclose(y.flatten(1, 2).transpose(1, 2), plain, atol=1e-6)
        assert torch.allclose(neighborhood_attention(q, k, v, 1, backend=backend), v)
    op, full = NeighborhoodAttention(32, kernel_size=7), SelfAttention(32)
    full.load_state_dict(op.state_dict())
    x = torch.randn(2, 32, 5, 6)
    assert op.window((5, 6)) == ((5, 6), (1, 1))
    assert torch.allclose(op(x), full(x), atol=1e-6)


def test_causal_axes_do_not_look_ahead():
    q, k, v = torch.randn(3, 1, 9, 8, 1, 4).unbind()
    later_k, later_v = k.clone(), v.clone()
    later_k[:, 5:] += 1
    later_v[:, 5:] += 1
    for backend in BACKENDS:
        before, after = (neighborhood_attention(q, a, b, 3, 1, (True, False), backend=backend)
                         for a, b in ((k, v), (later_k, later_v)))  # fmt: skip
        assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(before[:, 5:], after[:, 5:])


def test_translation_equivariance_inside():
    q, k, v = torch.randn(3, 1, 20, 20, 2, 8).unbind()
    y = neighborhood_attention(q, k, v, 5)
    moved = neighborhood_attention(*(t.roll((2, 3), (1, 2)) for t in (q, k, v)), 5)
    assert torch.allclose(moved[:, 5:-2, 6:-2], y.roll((2, 3), (1, 2))[:, 5:-2, 6:-2], atol=1e-5)


def test_mask_for_flex_attention():
    axes = rule((7, 9), (4, 3), (1, 2), (True, False))
    mask = create_mask(flex_mask(axes), 1, 1, 63, 63, device="cpu")[0, 0]
    for i in range(63):
        expected = {r * 9 + c for r in window(i // 9, axes[0]) for c in window(i % 9, axes[1])}
        assert set(mask[i].nonzero().flatten().tolist()) == expected


def scratch_of(backend: str, kernel: int, training: bool) -> int:
    """Bytes that are alive at the worst moment, beyond what was there before."""
    q, k, v = (torch.randn(8, 48, 48, 2, 16, requires_grad=training) for _ in range(3))
    known = [q, k, v]
    with LiveTensors(known) as memory, torch.set_grad_enabled(training):
        y = neighborhood_attention(q, k, v, kernel, backend=backend)
        if training:
            y.square().sum().backward()
    return memory.peak - sum(t.untyped_storage().nbytes() for t in known)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training step"])
def test_memory_does_not_grow_with_the_window(training):
    small, *larger = (scratch_of("block", kernel, training) for kernel in (5, 7, 13, 21))
    assert max(larger) < 1.1 * small
    if not training:
        assert scratch_of("gather", 5, False) > 2 * scratch_of("gather", 3, False) > 4 * small


def test_counts_are_those_of_the_definition():
    with torch.device("meta"):
        for side in (14, 28):
            op = NeighborhoodAttention(64, kernel_size=7)
            macs = count_macs(op, torch.empty(1, 64, side, side))
            assert macs == side**2 * (4 * 64**2 + 2 * 64 * 49)
    built = opsin.measure(NeighborhoodAttention(64), 28, channels=64, modes=())
    assert built.macs == macs, "a network that is built is counted by the definition, too"


def test_small_maps_shrink_dilation_first_and_keep_the_bias_aligned():
    op = NeighborhoodAttention(32, kernel_size=5, dilation=(3, 2), rel_pos_bias=True)
    assert op.window((15, 10)) == ((5, 5), (3, 2))
    assert op.window((14, 9)) == ((5, 5), (2, 1))
    assert op.window((4, 12)) == ((4, 5), (1, 2))
    small = NeighborhoodAttention(32, kernel_size=(4, 5), dilation=(1, 2), rel_pos_bias=True)
    state = op.state_dict()
    small.load_state_dict({**state, "rpb": state["rpb"][:, 1:-1]})
    x = torch.randn(1, 32, 4, 12)
    assert torch.allclose(op(x), small(x), atol=1e-6)


@pytest.mark.parametrize("space", [(11,), (6, 7), (4, 5, 6)], ids=["1-D", "2-D", "3-D"])
def test_one_to_three_axes(space):
    op = NeighborhoodAttention(32, num_heads=4, kernel_size=3, axes=len(space), rel_pos_bias=True)
    x = torch.randn(2, 32, *space, requires_grad=True)
    y = op(x)
    assert y.shape == x.shape and torch.allclose(y, op.reference(x), atol=1e-5)
    y.square().sum().backward()
    assert op.rpb.grad.any() and x.grad.any()


def test_complaints_are_sentences():
    q = torch.randn(1, 6, 6, 2, 4)
    for options, words in (
        (dict(kernel_size=7), "window of 7 tokens with dilation 1 does not fit an axis of 6"),
        (dict(kernel_size=3, dilation=(1, 3)), "dilation 3 does not fit"),
        (dict(kernel_size=0), "at least 1"),
        (dict(kernel_size=(3, 3, 3)), "names 3 axes"),
        (dict(kernel_size=3, bias=torch.zeros(2, 5, 4)), r"wants \(2, 5, 5\)"),
    ):
        with pytest.raises(BadInput, match=words):
            neighborhood_attention(q, q, q, **options)
    with pytest.raises(BadInput, match="differ in shape"):
        neighborhood_attention(q, q[:, :5], q, 3)
    with pytest.raises(BadInput, match="1 to 3 spatial axes"):
        neighborhood_attention(*[q[0, 0]] * 3, 3)
    with pytest.raises(UnknownName, match="block"):
        neighborhood_attention(q, q, q, 3, backend="blok")
    with pytest.raises(BadInput, match="num_heads=5 does not divide"):
        NeighborhoodAttention(32, num_heads=5)
    with pytest.raises(BadInput, match="2 spatial axes"):
        NeighborhoodAttention(32)(torch.randn(1, 32, 9))
    with pytest.raises(BadInput, match="the operator has 2"):
        NeighborhoodAttention(32, kernel_size=(3, 3, 3))
    with pytest.raises(BadInput, match="does not divide"):
        SelfAttention(32, num_heads=5)
    for options in (dict(num_heads=0), dict(kernel_size=0), dict(kernel_size=(3, -1)), dict(dilation=0)):
        name, value = next(iter(options.items()))
        with pytest.raises(BadInput, match=re.escape(f"{name}={value} ")):
            NeighborhoodAttention(32, **options)
    with pytest.raises(UnknownName, match="did you mean block"):
        NeighborhoodAttention(32, backend="blok")


def test_the_bias_starts_near_zero_and_not_at_it():
    bias = NeighborhoodAttention(128, kernel_size=13, rel_pos_bias=True).rpb.detach()
    assert bias.shape == (4, 25, 25)
    assert float(bias.std()) == pytest.approx(0.02, rel=0.1) and abs(float(bias.mean())) < 0.002


def test_small_maps_take_all_pairs():
    """Where a tile's keys are nearly the whole map, copying them would only cost; large maps never take all pairs."""
    assert small(rule((14, 14), 7)) and small(rule((16, 16), 7)) and small(rule((9,), 9))
    assert not small(rule((24, 24), 7)) and not small(rule((16, 16), 3)) and not small(rule((64, 64), 63))


def test_masks_of_small_maps_only_are_kept():
    pairs.cache_clear()
    for side, kept in ((6, 1), (36, 1), (7, 2)):
        q = torch.randn(1, side, side, 1, 4)
        neighborhood_attention(q, q, q, 3, backend="dense")
        assert pairs.cache_info().currsize == kept
