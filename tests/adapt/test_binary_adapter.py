"""Binary adapters: the codes, the straight-through gradient, the bytes."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

import opsin
from opsin.adapt.quantised import QLinear, code_indices, codebook
from opsin.adapt.storage import Packed, pack, unpack
from opsin.errors import BadInput


def vit(num_classes: int = 8) -> nn.Module:
    torch.manual_seed(5)
    return opsin.create(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, dim=32, depth=2, num_heads=2, num_classes=num_classes
    )


def test_one_bit_codes_are_the_medians_of_the_halves():
    assert codebook(1) == pytest.approx((-norm.ppf(0.75), norm.ppf(0.75)), abs=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_are_a_fixed_point(bits):
    codes = np.array(codebook(bits))
    edges = np.concatenate(([-np.inf], (codes[1:] + codes[:-1]) / 2, [np.inf]))
    medians = norm.ppf((norm.cdf(edges[:-1]) + norm.cdf(edges[1:])) / 2)
    assert np.abs(medians - codes).max() < 1e-6 and np.allclose(codes, -codes[::-1])


def test_medians_beat_means_in_absolute_error():
    w = torch.randn(200_000)
    error = {code: float((w - torch.sign(w) * code).abs().mean()) for code in (codebook(1)[1], (2 / np.pi) ** 0.5)}
    assert error[codebook(1)[1]] < error[(2 / np.pi) ** 0.5]


def test_more_bits_come_closer():
    w = torch.randn(64, 64)
    errors = []
    for bits in (1, 2, 4, 8):
        layer = QLinear(64, 64, bits)
        layer.weight.data.copy_(w)
        errors.append(float((layer.effective_weight() - w).abs().mean().detach()))
    assert errors == sorted(errors, reverse=True)


def test_statistics_are_of_the_whole_matrix_and_unbiased():
    layer = QLinear(6, 4)
    w = layer.weight.detach()
    values = layer.effective_weight().unique()
    assert len(values) == 2
    expected = torch.tensor(codebook(1)) * w.std(unbiased=True) + w.mean()
    assert torch.allclose(values.detach(), expected, atol=1e-6)


def test_the_gradient_passes_straight_through_and_through_mean_and_deviation():
    layer = QLinear(5, 3, 1).double()
    weight = layer.weight.detach().clone().requires_grad_()
    grad_out = torch.randn(3, 5).double()
    (layer.effective_weight() * grad_out).sum().backward()
    m, s = weight.mean(), weight.std()
    w = (weight - m) / (s + 1e-5)
    code = torch.tensor(codebook(1)).double()[code_indices(weight, 1)[0]]
    (((code - w.detach() + w) * s + m) * grad_out).sum().backward()
    assert torch.allclose(layer.weight.grad, weight.grad, atol=1e-12)


def test_ties_go_up():
    weight = torch.tensor([[-1.0, 0.0, 1.0]])
    assert code_indices(weight, 1)[0].tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_is_exact_and_as_small_as_said(bits):
    rng = np.random.default_rng(0)
    matrices = [Packed(torch.from_numpy(rng.integers(0, 2**bits, (16, 24))), 0.25, 1.5) for _ in range(3)]
    data = pack(matrices, bits)
    assert len(data) == 3 * (16 * 24 * bits // 8 + 8)
    back, rest = unpack(data + b"rest", [(16, 24)] * 3, bits)
    assert rest == b"rest"
    assert all(torch.equal(a.indices, b.indices) and a[1:] == b[1:] for a, b in zip(matrices, back, strict=True))


def test_the_first_code_fills_the_lowest_bits():
    data = pack([Packed(torch.tensor([[1, 2, 3, 0, 0, 0, 0, 1]]), 0.0, 1.0)], 2)
    assert data[:2] == bytes([0b00111001, 0b01000000])


@pytest.mark.parametrize(
    ("name", "bi_head", "size"),
    [("bi_adaptformer_h32", True, 83_528), ("bi_adaptformer_h1", True, 12_104)],
)
def test_files_have_the_published_size(name, bi_head, size, tmp_path):
    """ViT-B/16 with 100 classes: the size of the published files for CIFAR-100."""
    adapter = opsin.create(name, bi_head=bi_head)
    model = adapter.adapt(opsin.create("vit_base_patch16_224", num_classes=100))
    assert adapter.save(model, tmp_path / "a.bin").stat().st_size == size


@pytest.mark.parametrize("place", ["adaptformer", "lora"])
@pytest.mark.parametrize("bi_head", [False, True])
def test_a_saved_difference_gives_the_same_answers(place, bi_head, tmp_path):
    adapter = opsin.create("binary_adapter", place=place, hidden=8, bi_head=bi_head)
    model = adapter.adapt(vit())
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    x = torch.rand(3, 3, 32, 32)
    expected = model.eval()(x)
    path = adapter.save(model, tmp_path / "a.bin")
    fresh = adapter.load(adapter.adapt(vit()), path).eval()
    assert torch.allclose(fresh(x), expected, atol=1e-5)
    assert not any(isinstance(m, QLinear) for m in fresh.modules())


def test_files_that_do_not_fit_are_named(tmp_path):
    adapter = opsin.create("binary_adapter", hidden=8)
    path = adapter.save(adapter.adapt(vit()), tmp_path / "a.bin")
    wider = opsin.create("binary_adapter", hidden=16)
    with pytest.raises(BadInput, match="too short"):
        wider.load(wider.adapt(vit()), path)
    with pytest.raises(BadInput, match="too many"):
        adapter.load(adapter.adapt(vit(num_classes=2)), path)


def test_full_precision_starts_as_the_network_itself():
    net, x = vit().eval(), torch.rand(2, 3, 32, 32)
    before = net(x)
    for place in ("adaptformer", "lora"):
        adapted = opsin.create("binary_adapter", place=place, bits=32).adapt(vit().eval())
        assert torch.equal(adapted(x), before)


def test_lora_merges_into_the_plain_network():
    adapter = opsin.create("bi_lora_h32")
    merged = adapter.merge(adapter.adapt(vit()))
    assert [type(m) for m in merged.modules()] == [type(m) for m in vit().modules()]


def test_networks_without_blocks_and_odd_bits_are_named():
    with pytest.raises(BadInput, match="blocks of a ViT"):
        opsin.create("binary_adapter").adapt(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="not 3"):
        QLinear(2, 2, bits=3)
