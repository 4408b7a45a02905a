"""InceptionNeXt's mixer, block order and head."""

import torch
from torch.nn import functional as F

import opsin
from opsin.backbones.inceptionnext import MetaNeXtBlock
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
