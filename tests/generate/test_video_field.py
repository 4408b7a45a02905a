"""A video as a network of time: its sizes, quantisation, flows, and that it learns."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput
from opsin.generate import video_field
from opsin.generate.video_field import (
    VideoField,
    at_times,
    coded_bits,
    fit_video,
    neighbours_of,
    quantised,
    warp,
)  # fmt: skip
from opsin.measure.cost import count_params

SMALL = dict(base=(3, 4), dim=8, times=(4, 8), strides=(2, 2, 2), min_width=8, nodes=5)


def clip(length: int = 6) -> Tensor:
    """A bright bar that moves to the right."""
    frames = torch.full((length, 3, 24, 32), 0.2)
    for i in range(length):
        frames[i, :, 6:18, 4 * i : 4 * i + 8] = 0.9
    return frames


def test_published_settings_build_at_full_size():
    with torch.device("meta"):
        for name, size in (("cam_ffnerv_repr", (720, 1280)), ("cam_ffnerv_compress", (1080, 1920))):
            field = opsin.create(name)
            assert field.size == size
            frames = field(torch.empty(1))
            assert frames.own.shape == (1, 3, *size) and frames.flows.shape[1:3] == (4, 2)
            assert frames.flows.shape[3] * 4 == size[0]
        assert [b.conv1.groups for b in field.blocks] == [1, 8, 8, 8, 8] and field.head.bits == 8
        assert count_params(opsin.create("cam_ffnerv_repr")) > 5e6


def test_quantised_weights_and_their_gradient():
    w = torch.linspace(-3, 3, 101, requires_grad=True)
    for bits in (3, 6, 8):
        levels = 2 ** (bits - 1) - 1
        q = quantised(w, bits)
        assert len(q.unique()) <= 2 * levels + 1 and (q.abs() <= w.tanh().abs() + 1e-6).all()
        assert torch.allclose(q * levels, (q * levels).round(), atol=1e-4)
        (grad,) = torch.autograd.grad(q.sum(), w)
        assert torch.allclose(grad, 1 - w.tanh() ** 2, atol=1e-6)
    assert quantised(w, 32) is w


def test_grids_in_time_are_linear_and_hold_to_the_end():
    grid = torch.randn(4, 2, 1, 1)
    y = at_times(grid, torch.tensor([0.25, 0.375, 0.999]))
    assert (
        torch.allclose(y[0], grid[1])
        and torch.allclose(y[1], (grid[1] + grid[2]) / 2)
        and torch.allclose(y[2], grid[3])
    )


def test_a_flow_of_zero_is_the_identity_and_flows_point_to_where_to_fetch():
    x = torch.rand(2, 3, 8, 12)
    assert torch.allclose(warp(x, torch.zeros(2, 2, 2, 3)), x, atol=1e-5)
    flow = torch.zeros(2, 2, 2, 3)
    flow[:, 0] = 0.5  # half a coarse pixel is two fine ones
    assert torch.allclose(warp(x, flow)[..., :-2], x[..., 2:], atol=1e-5)


def test_neighbours_beyond_the_ends_are_black():
    own = torch.rand(4, 3, 2, 2) + 0.1
    found = neighbours_of(own, torch.tensor([0, 2]), (-1, 1))
    assert not found[0, 0].any() and torch.equal(found[0, 1], own[1]) and torch.equal(found[1], own[[1, 3]])


def test_frames_are_blends_of_their_own_and_the_fetched():
    field = VideoField(**SMALL, neighbours=(-1, 1))
    said = field(torch.tensor([0.0, 0.5]))
    assert torch.allclose(said.blend.sum(1), torch.ones(2, 24, 32)) and torch.allclose(
        said.shares.sum(1), torch.ones(2, 24, 32)
    )
    near = torch.rand(2, 2, 3, 24, 32)
    fetched, final = said.blended(near)
    expected = sum(warp(near[:, i], said.flows[:, i]) * said.shares[:, i : i + 1] for i in range(2))
    assert torch.allclose(fetched, expected, atol=1e-6)
    assert torch.allclose(final, said.own * said.blend[:, :1] + fetched * said.blend[:, 1:], atol=1e-6)


def test_it_learns_a_clip_and_its_bits_are_counted():
    torch.manual_seed(0)
    frames, losses = clip(), []
    field = VideoField(**SMALL, bits=6)
    fit_video(field, frames, epochs=60, lr=1e-2, on_epoch=lambda epoch, loss: losses.append(loss))
    assert losses[-1] < 0.5 * losses[0]
    video = field.video(6, batch=4)
    assert video.shape == frames.shape
    still = frames.mean(0, keepdim=True).expand_as(frames)
    assert F.mse_loss(video, frames) < 0.5 * F.mse_loss(still, frames), "better than one still picture"
    heads = sum(p.numel() for m in (field.head, field.flow_head) for p in m.parameters())
    stored, coded = coded_bits(field)
    assert stored == 6 * (count_params(field) - heads) + 8 * heads and 0 < coded < stored
    assert all(p.grad is not None and p.grad.any() for p in field.parameters())


def test_another_device(monkeypatch):
    """The meta device stands for any but the CPU; its tensors have no values to be read."""
    monkeypatch.setattr(Tensor, "isfinite", lambda self: True)
    monkeypatch.setattr(Tensor, "item", lambda self: 1.0)
    monkeypatch.setattr(video_field, "frame_loss", lambda frame, target: F.mse_loss(frame, target))
    field = VideoField(**SMALL).to("meta")
    assert fit_video(field, clip(), epochs=1) is field
    assert all(p.grad.is_meta for p in field.parameters())
    video = field.video(6)
    assert video.is_meta and video.shape == (6, 3, 24, 32)


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="2 to 8 bits"):
        VideoField(bits=12)
    with pytest.raises(BadInput, match="multiple of the 2 grids"):
        VideoField(**SMALL | dict(dim=9))
    with pytest.raises(BadInput, match="the video has"):
        fit_video(VideoField(**SMALL), torch.rand(2, 3, 8, 8))
