"""Tiles: exact for convolutional nets, smooth for others, bounded in memory, smaller when memory runs out."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.measure.memory import peak_memory
from opsin.restore import Restorer
from opsin.restore.tiling import (
    LARGEST,
    SMALLEST,
    blended_spans,
    choose_tile,
    exact_spans,
    plan,
    ramps,
    restore_tiles,
    tiled,
)


class Convolutional(Restorer):
    """Two 5x5 convolutions, three times as large."""

    scale, receptive_field, channels = 3, 4, (3,)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, 27, 5, padding=2))

    def forward(self, x):
        return F.pixel_shuffle(self.body(x), 3)


class Global(Restorer):
    """Adds a share of the mean of what it sees: no tile knows the whole."""

    def forward(self, x):
        return 0.9 * x + 0.1 * x.mean((2, 3), keepdim=True)


@given(st.integers(1, 400), st.integers(16, 130), st.integers(0, 40))
def test_exact_spans_cover_once_with_context(length, tile, context):
    spans = exact_spans(length, tile, context)
    assert [i for s in spans for i in range(s.start, s.stop)] == list(range(length))
    for s in spans:
        assert s.low == max(0, s.start - context) and s.high == min(length, s.stop + context)
        assert 0 < s.stop - s.start <= tile
    sizes = {s.stop - s.start for s in spans}
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 400), st.integers(16, 130), st.integers(1, 3))
def test_blended_spans_overlap_and_their_weights_sum_to_one(length, tile, scale):
    overlap = tile // 4
    spans = blended_spans(length, tile, overlap)
    assert spans[0].start == 0 and spans[-1].stop == length
    assert all(a.stop - b.start >= overlap for a, b in pairwise(spans))
    total = torch.zeros(length * scale)
    for span, weight in zip(spans, ramps(spans, scale)):
        assert (weight > 0).all()
        total[span.start * scale : span.stop * scale] += weight
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(16, 50))
@torch.no_grad()
def test_tiles_of_a_convolutional_net_are_the_whole(height, width, tile):
    net = Convolutional().double().eval()
    x = torch.rand(1, 3, height, width, dtype=torch.float64)
    assert (tiled(net, x, tile) - net(x)).abs().max() < 1e-12


@torch.no_grad()
def test_too_little_context_would_show():
    net = Convolutional().eval()
    net.receptive_field = 3
    x = torch.rand(1, 3, 60, 60)
    assert (tiled(net, x, 20) - net(x)).abs().max() > 1e-4


@torch.no_grad()
def test_blending_leaves_no_step_where_cutting_does():
    net = Global()
    x = torch.linspace(0, 1, 128).expand(1, 1, 64, 128).contiguous()  # a smooth image: every step is the tiling's

    def roughness(y):
        return (y.diff(dim=-1) - y.diff(dim=-1).mean()).abs().max().item()

    cut = torch.cat([net(x[..., a : a + 32]) for a in range(0, 128, 32)], -1)
    blended = tiled(net, x, 32)
    assert roughness(cut) > 0.01
    assert roughness(blended) < roughness(cut) / 5


def test_a_large_known_field_blends_rather_than_reads_everything():
    net = Convolutional()
    net.receptive_field = 100
    assert plan(net, (500, 500), 64)[2].__name__ == "blended_tiles"
    assert plan(net, (500, 500), 256)[2].__name__ == "exact_tiles"


@torch.no_grad()
def test_out_of_memory_takes_smaller_tiles():
    class Hungry(Convolutional):
        def forward(self, x):
            if x.shape[-1] > 40:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
            return super().forward(x)

    net = Hungry().eval()
    x = torch.rand(1, 3, 100, 120)
    out = torch.zeros(1, 3, 300, 360)

    def write(top, left, pixels):
        out[..., top : top + pixels.shape[-2], left : left + pixels.shape[-1]] = pixels

    seen = []
    side = restore_tiles(
        net, (100, 120), lambda r, c: x[..., r, c], write, tile=120, tick=lambda done, total: seen.append((done, total))
    )
    assert side == 30 and seen[-1] == (16, 16)
    plainly = Convolutional().eval()
    plainly.load_state_dict(net.state_dict())
    assert (out - plainly(x)).abs().max() <= 1e-6


def test_no_memory_at_all_is_a_sentence_and_other_errors_pass():
    class Starved(Convolutional):
        def forward(self, x):
            raise MemoryError

    class Wrong(Convolutional):
        def forward(self, x):
            raise RuntimeError("shapes do not match")

    x = torch.rand(1, 3, 50, 50)
    with pytest.raises(BadInput, match="no memory for tiles"):
        tiled(Starved(), x, 32)
    with pytest.raises(RuntimeError, match="shapes"):
        tiled(Wrong(), x, 32)
    with pytest.raises(BadInput, match="too small"):
        tiled(Convolutional(), x, SMALLEST - 1)


@torch.no_grad()
def test_the_chosen_tile_keeps_within_memory():
    net = Convolutional().eval()
    x = torch.rand(1, 3, 700, 700)

    def read(rows, columns):
        return x[..., rows, columns].clone()

    sides = [choose_tile(net, read, (700, 700), megabytes * 2**20) for megabytes in (4, 16, 64)]
    assert sides == sorted(set(sides)) and sides[0] >= SMALLEST
    for side, megabytes in zip(sides, (4, 16, 64)):
        whole = side + 2 * net.receptive_field
        assert 0.2 * megabytes * 2**20 < peak_memory(net, (torch.rand(1, 3, whole, whole),)) < megabytes * 2**20
    assert choose_tile(net, read, (700, 700), 1) == SMALLEST
    assert choose_tile(net, read, (700, 700), 2**40) == LARGEST
