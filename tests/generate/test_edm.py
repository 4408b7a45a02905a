"""The U-Net, its preconditioning and its loss."""

import pytest
import torch
from torch import nn

import opsin
from opsin.errors import BadInput
from opsin.generate.edm import EDM, EDMLoss, precondition, remap
from opsin.generate.unet import NoiseEmbedding, SkipConcat, UNetBlock


def tiny(**options) -> EDM:
    config = dict(image_size=8, in_chans=1, channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
                  head_dim=8, dropout=0.0)  # fmt: skip
    return EDM(**{**config, **options})


def test_the_published_network():
    with torch.device("meta"):
        model = opsin.create("edm_imagenet64")
    state = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert sum(t.numel() for t in model.parameters()) == 295_899_267
    assert len(model.skip_points()) == 16
    assert state["model.map_label.weight"] == (768, 1000)
    assert state["model.enc.64x64_conv.weight"] == (192, 3, 3, 3)
    assert state["model.enc.32x32_down.conv0.weight"] == (192, 192, 3, 3)
    assert state["model.enc.8x8_block2.qkv.weight"] == (3 * 768, 768, 1, 1)
    assert state["model.dec.8x8_block0.conv0.weight"] == (768, 768 + 768, 3, 3)
    assert state["model.dec.64x64_block3.skip.weight"] == (192, 192 + 192, 1, 1)
    heads = {name: block.heads for name, block in model.model.dec.items()}
    assert (heads["8x8_in0"], heads["8x8_in1"], heads["32x32_block0"], heads["64x64_block0"]) == (12, 0, 6, 0)


def test_remap_drops_only_the_resampling_filters():
    model = tiny()
    state = dict(model.state_dict())
    state["model.enc.4x4_down.conv0.resample_filter"] = torch.ones(1, 1, 2, 2)
    assert set(remap(state)) == set(model.state_dict())


def test_preconditioning_keeps_unit_variance():
    clean, noise = 0.5 * torch.randn(200_000), torch.randn(200_000)
    for level in (0.01, 0.3, 1.0, 30.0):
        c = precondition(torch.tensor(level), 0.5)
        x = clean + level * noise
        assert (c.scale_in * x).std() == pytest.approx(1, abs=0.01)
        assert ((clean - c.skip * x) / c.out).std() == pytest.approx(1, abs=0.01)
        assert float(c.noise) == pytest.approx(torch.tensor(level).log() / 4)


def test_the_loss_is_one_before_training():
    images = (0.5 * torch.randn(2000, 1, 8, 8) + 1) / 2
    assert EDMLoss(tiny())(images, torch.zeros(2000).long())["loss"].item() == pytest.approx(1, abs=0.05)
    assert EDMLoss(tiny())(images[:3]).shape == (3, 1, 8, 8)


def test_the_loss_weighs_the_error():
    model = EDMLoss(tiny(), p_mean=0.0, p_std=1e-9)
    images = torch.rand(64, 1, 8, 8)
    torch.manual_seed(3)
    loss = model(images, torch.zeros(64).long())["loss"]
    torch.manual_seed(3)
    torch.randn(64)
    x = 2 * images - 1 + torch.randn(64, 1, 8, 8)
    error = (model.denoiser(x, torch.ones(64)) - (2 * images - 1)).square().mean()
    assert loss.item() == pytest.approx((1 + 0.25) / 0.25 * error.item(), rel=1e-4)


def test_labels_matter_and_none_means_zeros():
    model = tiny(num_classes=3).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, sigma = torch.randn(3, 1, 8, 8), torch.ones(3)
    by_number = model(x, sigma, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(by_number, model(x, sigma, torch.eye(3)))
    torch.testing.assert_close(model(x, sigma), model(x, sigma, torch.zeros(3, 3)))
    assert (by_number - model(x, sigma, torch.tensor([1, 2, 0]))).abs().max() > 1e-3
    with pytest.raises(BadInput, match=r"0 \.\.\. 2"):
        model(x, sigma, torch.tensor([0, 1, 3]))
    with pytest.raises(BadInput, match="without classes"):
        tiny()(x, sigma, torch.tensor([0, 1, 2]))


def test_label_dropout_only_in_training():
    model = tiny(num_classes=3, label_dropout=1.0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.ones(3), torch.tensor([0, 1, 2])
    torch.testing.assert_close(model.train()(x, sigma, labels), model(x, sigma))
    assert (model.eval()(x, sigma, labels) - model(x, sigma)).abs().max() > 1e-4


def test_attention_is_softmax_over_positions():
    block = UNetBlock(16, 16, 8, heads=2).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 16, 3, 5)
    qkv = block.qkv(block.norm2(x)).reshape(4, 8, 3, 15)
    q, k, v = qkv.unbind(2)
    weights = torch.einsum("ncq,nck->nqk", q, k / 8**0.5).softmax(2)
    expected = block.proj(torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape))
    torch.testing.assert_close(block._attend(x), expected)


def test_a_block_starts_as_its_shortcut():
    x = torch.randn(2, 16, 6, 6)
    torch.testing.assert_close(UNetBlock(16, 16, 8, heads=2)(x, torch.randn(2, 8)), x)


def test_noise_embedding():
    emb = NoiseEmbedding(8)(torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(emb[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    assert emb[1, 0] == pytest.approx(torch.tensor(2.0).cos().item())
    assert emb[1, 7] == pytest.approx(torch.tensor(2.0 * 10_000 ** (-3 / 4)).sin().item())


def test_skips_join_innermost_first_with_the_encoders_maps():
    model = tiny(num_blocks=2).eval()
    seen, outputs = [], []
    for point in model.skip_points():
        assert isinstance(point, SkipConcat)
        point.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    for block in model.model.enc.values():
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(torch.randn(1, 1, 8, 8), torch.ones(1))
    assert [s.shape[2] for s in seen] == [4, 4, 4, 8, 8, 8]
    assert all(a is b for a, b in zip(seen, reversed(outputs), strict=True))


def test_other_sizes_that_can_be_halved():
    model = tiny()
    assert model(torch.randn(1, 1, 12, 6), torch.ones(1)).shape == (1, 1, 12, 6)
    with pytest.raises(BadInput, match="9x8 cannot be halved"):
        model(torch.randn(1, 1, 9, 8), torch.ones(1))
    with pytest.raises(BadInput, match="image_size=9"):
        tiny(image_size=9)


def test_the_embedding_step_by_step():
    model = tiny(num_classes=3).eval().model
    noise, labels = torch.tensor([0.3, -1.0]), torch.eye(3)[:2]
    hidden = nn.functional.silu(model.map_layer0(model.map_noise(noise)))
    expected = nn.functional.silu(model.map_layer1(hidden) + labels @ model.map_label.weight.T)
    torch.testing.assert_close(model.embed(noise, labels), expected)
