"""What makes Swin Swin: windows that do not talk, shifts that make them, and a bias by offset."""

import pytest
import torch

import opsin
from opsin.backbones.swin import PatchMerging, Stage, SwinBlock, SwinMlpBlock, WindowAttention, remap
from opsin.errors import BadInput
from opsin.layers.relative_position import relative_position_index, resize_table
from opsin.layers.windows import merge, partition, shift_for
from opsin.measure.cost import count_macs

SMALL = dict(dim=12, depths=(2, 2, 2), num_heads=(1, 2, 4), window_size=4, patch_size=2, image_size=32, num_classes=5)


def open_biases(model: torch.nn.Module) -> torch.nn.Module:
    """Bias tables of order one instead of 0.02, so that a wrong index shows."""
    for module in model.modules():
        if isinstance(module, WindowAttention):
            torch.nn.init.normal_(module.relative_position_bias_table)
    return model.eval()


def test_bias_index_is_the_signed_offset():
    height, width = 3, 4
    index = relative_position_index(height, width)
    for i in range(height * width):
        for j in range(height * width):
            dy, dx = i // width - j // width, i % width - j % width
            assert index[i, j] == (dy + height - 1) * (2 * width - 1) + dx + width - 1
    assert not torch.equal(index, index.T)


def test_partition_and_merge():
    x = torch.arange(2 * 6 * 8 * 3.0).view(2, 6, 8, 3)
    windows = partition(x, (3, 4))
    assert torch.equal(windows[1, 1], x[1, :3, 4:].flatten(0, 1))
    assert torch.equal(merge(windows, (3, 4), (6, 8)), x)


def test_merging_takes_the_first_column_first():
    layer = PatchMerging(1, 2)
    layer.norm, layer.reduction = torch.nn.Identity(), torch.nn.Identity()
    x = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).view(1, 2, 2, 1)
    assert layer(x).flatten().tolist() == [1, 2, 3, 4]
    assert layer(torch.ones(1, 3, 5, 1)).shape == (1, 2, 3, 4)


def influence(stage: Stage, row: int, column: int, side: int = 16) -> torch.Tensor:
    """Which tokens of a map change the stage's output at one token: (side, side) of bool."""
    x = torch.randn(1, side, side, 12, requires_grad=True)
    stage(x)[0, row, column].sum().backward()
    return x.grad[0].abs().amax(-1) > 1e-12


def test_windows_are_alone_without_a_shift_and_meet_with_one():
    block = lambda: SwinBlock(12, 2, (4, 4), 4.0, 0.0)  # noqa: E731
    alone = influence(Stage(torch.nn.Identity(), [block()], (4, 4)), 5, 6)
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:8, 4:8] = True
    assert torch.equal(alone, expected)
    two = influence(Stage(torch.nn.Identity(), [block(), block()], (4, 4)), 5, 6)
    expected[:8, 4:12] = True  # token (5, 6) lies in the shifted window of rows 2-5, columns 6-9
    assert torch.equal(two, expected)


def test_the_mask_keeps_opposite_borders_apart():
    blocks = [SwinBlock(12, 2, (4, 4), 4.0, 0.0) for _ in range(2)]
    corner = influence(Stage(torch.nn.Identity(), blocks, (4, 4)), 0, 0)
    assert corner[:4, :4].all() and corner.sum() == 16


@pytest.mark.parametrize(
    ("size", "window"), [((16, 16), (4, 4)), ((14, 21), (7, 7)), ((6, 15), (6, 5)), ((8, 8), (8, 4))]
)
def test_roll_and_mask_equal_framed_windows(size, window):
    block = open_biases(SwinBlock(12, 3, window, 4.0, 0.0))
    x = torch.randn(2, *size, 12)
    shift = shift_for(size, window, x.device)
    assert shift is not None
    assert (block.attend(x, shift) - block.reference(x, shift)).abs().max() < 1e-6
    assert (block.attend(x, None) - block.reference(x, shift)).abs().max() > 1e-2


def test_attention_is_softmax_of_logits_plus_bias():
    attention = open_biases(WindowAttention(8, 2, (2, 3)))
    x = torch.randn(1, 1, 6, 8)
    q, k, v = attention.heads(x[0])
    table = attention.relative_position_bias_table
    for head in range(2):
        for i in range(6):
            logits = []
            for j in range(6):
                offset = (i // 3 - j // 3 + 1) * 5 + (i % 3 - j % 3 + 2)
                logits.append(q[0, head, i] @ k[0, head, j] / 2 + table[offset, head])
            weights = torch.stack(logits).softmax(0)
            ours = attention.attention_map(x[0], attention.position_bias())[0, head, i]
            torch.testing.assert_close(ours, weights)
    mixed = attention.attention_map(x[0], attention.position_bias()) @ v
    torch.testing.assert_close(attention(x)[0], attention.proj(mixed.transpose(1, 2).flatten(2)))


def test_one_window_is_not_shifted():
    assert shift_for((4, 4), (4, 4), torch.device("cpu")) is None
    assert shift_for((3, 4), (4, 4), torch.device("cpu")) is None
    shift = shift_for((4, 8), (4, 4), torch.device("cpu"))
    assert shift and (shift.rows, shift.columns) == (0, 2)
    model = opsin.create("swin", **SMALL | dict(image_size=16))
    assert [stage.window for stage in model.layers] == [(4, 4), (4, 4), (2, 2)]


def test_embed_and_encode_are_the_features():
    model = open_biases(opsin.create("swin", **SMALL))
    x = torch.randn(1, 3, 32, 32)
    tokens = model.embed(x)
    assert tokens.shape == (1, 16, 16, 12)
    for a, b in zip(model.encode(tokens), model.features(x), strict=True):
        assert torch.equal(a, b)
    masked = tokens.clone()
    masked[:, 3, 3] = 0
    assert not torch.equal(model.encode(masked)[-1], model.encode(tokens)[-1])


def test_padding_changes_nothing_where_none_is_needed():
    """A map of whole windows inside a larger one: the first window of an unshifted block is the same."""
    block = open_biases(SwinBlock(12, 2, (4, 4), 4.0, 0.0))
    x = torch.randn(1, 7, 9, 12)
    assert block(x).shape == x.shape
    torch.testing.assert_close(block(x)[:, :4, :8], block(x[:, :4, :8]))


def test_changing_the_window_interpolates_the_bias():
    model = open_biases(opsin.create("swin", **SMALL))
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    model.set_input_size(32)
    assert torch.equal(model(x), before)
    model.set_input_size(48, window_size=6)
    assert [stage.window for stage in model.layers] == [(6, 6)] * 3
    assert model.layers[0].blocks[0].attn.relative_position_bias_table.shape == (121, 1)
    assert model(torch.randn(1, 3, 48, 48)).isfinite().all()
    ramp = torch.arange(-3.0, 4)[:, None].expand(7, 7).reshape(-1, 1)  # grows with dy, constant in dx
    wide = resize_table(ramp, (4, 4), (6, 6)).view(11, 11)
    assert (wide - wide[:, :1]).abs().max() < 1e-5 and (wide[1:, 0] > wide[:-1, 0]).all() and abs(wide[5, 0]) < 1e-5


def test_window_attention_is_linear_in_pixels():
    swin, vit = opsin.create("swin", **SMALL), opsin.create("vit", dim=12, depth=2, num_heads=2, patch_size=4)
    trunk = torch.nn.Sequential(swin.patch_embed, *swin.layers)
    assert count_macs(trunk, torch.zeros(1, 3, 128, 128)) == 4 * count_macs(trunk, torch.zeros(1, 3, 64, 64))
    assert count_macs(vit, torch.zeros(1, 3, 128, 128)) > 6 * count_macs(vit, torch.zeros(1, 3, 64, 64))


def test_swin_mlp_is_one_matrix_per_head_and_window():
    block = SwinMlpBlock(8, 2, (4, 4), 4.0, 0.0).eval()
    x = torch.randn(1, 8, 8, 8)
    weight = block.spatial_mlp.weight.view(2, 16, 16)
    bias = block.spatial_mlp.bias.view(2, 16)
    for shift, start in ((None, 0), (shift_for((8, 8), (4, 4), x.device), 2)):
        frame = torch.nn.functional.pad(x, (0, 0, 2, 2, 2, 2)) if shift else x
        out = torch.zeros_like(frame)
        for i in range(0, frame.shape[1], 4):
            for j in range(0, frame.shape[2], 4):
                tokens = frame[0, i : i + 4, j : j + 4].reshape(16, 2, 4)
                mixed = torch.einsum("gst,tgd->sgd", weight, tokens) + bias.T[:, :, None]
                out[0, i : i + 4, j : j + 4] = mixed.reshape(4, 4, 8)
        expected = out[:, start : start + 8, start : start + 8]
        torch.testing.assert_close(block.mix(x, shift), expected)
    with pytest.raises(BadInput, match="window"):
        block.set_window((3, 3))


def test_original_names():
    ours = opsin.create("swin", **SMALL)
    state = ours.state_dict()
    original = {}
    for name, tensor in state.items():
        name = (
            name.replace("layers.1.downsample", "layers.0.downsample")
            if "layers.1.down" in name
            else name.replace("layers.2.downsample", "layers.1.downsample")
        )
        original[name.replace("head.fc", "head")] = tensor
    original["layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    original["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(1)
    again = remap(original)
    assert again.keys() == state.keys() and all(torch.equal(again[n], state[n]) for n in state)
    assert remap(state).keys() == state.keys()
