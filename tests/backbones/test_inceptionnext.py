"""InceptionNeXt's mixer, block order and head."""

import pytest
import torch
from torch.nn import functional as F

import opsin
from opsin.backbones.inceptionnext import MetaNeXtBlock
from opsin.errors import BadInput
from opsin.measure.cost import count_macs
from opsin.ops.conv.inception_depthwise import InceptionDepthwiseConv


def test_mixer_is_identity_square_row_column():
    mixer = InceptionDepthwiseConv(16, square_size=3, band_size=5, branch_ratio=0.25)
    x = torch.zeros(1, 16, 11, 11)
    x[:, :, 5, 5] = 1
    for conv in (mixer.dwconv_hw, mixer.dwconv_w, mixer.dwconv_h):
        torch.nn.init.ones_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    y = mixer(x)[0]
    assert torch.equal(y[:4], x[0, :4]), "the identity comes first"
    assert torch.equal(y[4, 4:7, 4:7], torch.ones(3, 3)) and y[4].sum() == 9
    assert torch.equal(y[8, 5, 3:8], torch.ones(5)) and y[8].sum() == 5, "then the row"
    assert torch.equal(y[12, 3:8, 5], torch.ones(5)) and y[12].sum() == 5, "then the column"


def test_mixer_equals_one_dense_kernel():
    mixer = InceptionDepthwiseConv(24)
    x = torch.randn(2, 24, 13, 9)
    assert (mixer(x) - mixer.reference(x)).abs().max() < 1e-5


def test_on_few_pixels_the_branches_are_one_convolution_unless_somebody_would_miss_them(monkeypatch):
    mixer, x, heard, calls = InceptionDepthwiseConv(24, square_size=13).eval(), torch.randn(2, 24, 9, 14), [], []
    monkeypatch.setattr(F, "conv2d", lambda *given, run=F.conv2d, **how: calls.append(1) or run(*given, **how))

    def convolutions(x: torch.Tensor = x) -> int:
        with torch.no_grad():
            expected = mixer.reference(x)
            calls.clear()
            assert torch.allclose(mixer(x), expected, atol=1e-5)
        return len(calls)

    assert convolutions() == 1
    assert convolutions(x.repeat(1, 1, 20, 30)) == 3, "many pixels"
    assert convolutions(x.to(memory_format=torch.channels_last)) == 3
    mixer.dwconv_w.weight.data = torch.randn_like(mixer.dwconv_w.weight)
    assert convolutions() == 1, "of the new weights"
    handle = mixer.dwconv_h.register_forward_hook(lambda *_: heard.append(1))
    assert convolutions() == 3 and heard == [1]
    handle.remove()
    assert mixer(x).requires_grad and count_macs(mixer, x) == 2 * 9 * 14 * 3 * (13**2 + 2 * 11)
    mixer.dwconv_hw.padding_mode = "circular"
    with torch.no_grad():
        square = slice(15, 18)
        assert torch.allclose(mixer(x.roll(3, 3))[:, square], mixer(x)[:, square].roll(3, 3), atol=1e-5)
        mixer.dwconv_h = torch.nn.Sequential(mixer.dwconv_h, torch.nn.ReLU())
        assert (mixer(x)[:, 21:] >= 0).all()


@pytest.mark.parametrize(
    "options", [dict(band_size=4), dict(square_size=2), dict(branch_ratio=0.01), dict(branch_ratio=0.5)]
)
def test_mixer_refuses(options):
    with pytest.raises(BadInput, match=r"odd|branches"):
        InceptionDepthwiseConv(16, **options)


def test_norm_follows_the_mixer():
    block = MetaNeXtBlock(8, torch.nn.Conv2d(8, 8, 3, padding=1), 4, 0.0, layer_scale=0.5).eval()
    torch.nn.init.normal_(block.norm.weight)
    block.norm.running_mean.normal_()
    x = torch.randn(2, 8, 5, 5)
    y = block.norm(block.token_mixer(x))
    y = F.conv2d(
        F.gelu(F.conv2d(y, block.mlp.fc1.weight, block.mlp.fc1.bias)), block.mlp.fc2.weight, block.mlp.fc2.bias
    )
    torch.testing.assert_close(block(x), x + 0.5 * y)


def test_last_stage_is_narrower_and_head_wider():
    model = opsin.create("inception_next_atto", num_classes=5)
    ratios = [s.blocks[0].mlp.fc1.out_channels // s.blocks[0].mlp.fc1.in_channels for s in model.stages]
    assert ratios == [4, 4, 4, 3]
    assert model.head.fc1.out_features == 3 * 320 and model.head.norm.eps == 1e-6
    assert model.stages[0].blocks[0].token_mixer.dwconv_w.kernel_size == (1, 9)
    assert model.stages[0].blocks[0].token_mixer.dwconv_hw.out_channels == 10
