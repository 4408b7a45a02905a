"""UnifiedNorm: the official layer's numbers over several steps, the true gradient, the filter, and folding."""

import copy

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.deploy import fuse
from opsin.errors import BadInput
from opsin.layers import LayerNorm2d
from opsin.layers.affine import ChannelAffine
from opsin.ops.normact.unified_norm import UnifiedNorm, unify_norms

# hikvision-research/Unified-Normalization: UN1d(2, window 4, warmup 5, outlier filtration), its constant of 1000 steps
# set to 6, after twelve steps on `batches` with an outlier in the ninth; the last step's tensors and the state.
OFFICIAL = {
    "y": [-0.6496017, 0.441676, 1.296846, 2.023534, 1.369823, 0.5754381, -0.5518177, -1.498677, -1.278025, -0.7556454,
          0.3967514, 1.571055],
    "grad": [-0.06912654, 0.1958494, 0.1618518, -0.09179744, -0.16323, -0.01252581, 0.1658208, 0.1186366, -0.1496775,
             -0.2149674, 0.03299491, 0.236179],
    "weight": [0.03168135, 0.1023898],
    "bias": [-0.06873024, 0.9779607],
    "running_var": [59.93864, 66.83042],
    "ema_gz": [-0.02038965, -0.008652831],
    "buffer_x2": [1.110767, 1.177575, 0.8500258, 0.8479687, 1.172503, 1.286321, 1.331131, 1.109779],
    "buffer_gz": [0.005280223, 0.02036303, -0.0204072, -0.002591004, 0.02267972, -0.009133916, 0.01850582, -0.00984804],
    "iters": [12.0],
    "skip_counter": [1.0],
}  # fmt: skip


def wave(*shape: int, step: float = 0.7, phase: float = 0.0) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + phase).reshape(shape)


def waved(dim: int = 2, **options: object) -> UnifiedNorm:
    norm = UnifiedNorm(dim, **{"warmup": 5, "scale_warmup": 6, **options})
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * wave(dim))
        norm.bias.copy_(0.2 * wave(dim, phase=1.0))
    return norm


def take_step(norm: UnifiedNorm, step: int, outlier: int = 9) -> tuple[Tensor, Tensor]:
    x = wave(2, 3, 2, phase=float(step)) * (1 + 0.05 * step) * (30 if step == outlier else 1)
    x.requires_grad_()
    norm.zero_grad()
    y = norm(x)
    y.backward(wave(2, 3, 2, step=1.3, phase=0.5 * step))
    return y.detach(), x.grad


def test_twelve_steps_of_the_official_layer():
    norm = waved()
    for step in range(1, 13):
        y, grad = take_step(norm, step)
    found = {"y": y, "grad": grad, "weight": norm.weight.grad, "bias": norm.bias.grad, **dict(norm.named_buffers())}
    for name, expected in OFFICIAL.items():
        assert torch.allclose(found[name].flatten().float(), torch.tensor(expected), rtol=1e-4, atol=1e-6), name


def test_the_state_is_what_the_official_one_is():
    assert set(UnifiedNorm(3).state_dict()) == {
        "weight", "bias", "running_var", "ema_gz", "iters", "buffer_x2", "buffer_gz", "skip_counter"
    }  # fmt: skip


@pytest.mark.parametrize("step", [3, 8])
def test_training_goes_on_from_a_saved_state(step):
    first = waved()
    for i in range(1, step):
        take_step(first, i)
    second = waved()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for i in range(step, step + 4):
        for a, b in zip(take_step(first, i), take_step(second, i), strict=True):
            assert torch.equal(a, b)


def plain(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None = None) -> Tensor:
    valid = torch.ones(x.shape[:-1], dtype=torch.bool) if valid is None else valid
    return weight * x * torch.rsqrt(x[valid].square().mean(0) + 1e-5) + bias


@pytest.mark.parametrize("padded", [False, True])
def test_window_one_is_plain_batch_statistics_with_the_true_gradient(padded):
    norm = UnifiedNorm(3, window=1, warmup=0, scale_warmup=0).double()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    for _ in range(3):
        x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
        weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        y = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, mask if padded else None))
        expected, upstream = plain(x, weight, bias, ~mask), torch.randn_like(x)
        assert torch.allclose(y, expected)
        pairs = zip(*(torch.autograd.grad(z, (x, weight, bias), upstream) for z in (y, expected)), strict=True)
        assert all(torch.allclose(a, b) for a, b in pairs)


def test_smoothing_is_a_geometric_mean_of_the_last_batches():
    norm = waved(warmup=5)
    norm.outlier_filtration = False
    moments = []
    for step in range(1, 9):
        x = wave(2, 3, 2, phase=float(step)) * step
        moments.append(x.square().mean((0, 1)))
        expected = torch.stack(moments[-4:]).log().mean(0).exp() if step >= 5 else moments[-1]
        y = norm.weight * x * torch.rsqrt(expected + 1e-5) + norm.bias
        assert torch.allclose(norm(x), y, atol=1e-5), step


def test_buffers_of_zeros_are_never_averaged():
    norm = UnifiedNorm(2, warmup=0)
    for step in range(1, 5):
        x = wave(2, 3, 2, phase=float(step))
        assert torch.allclose(norm(x), plain(x, norm.weight, norm.bias), atol=1e-5)
    assert not norm.skip_counter


@pytest.mark.parametrize("filtered", [True, False])
def test_an_outlier_leaves_no_trace_in_the_window(filtered):
    norm = waved(outlier_filtration=filtered)
    for step in range(1, 10):
        before, average = norm.running_var.clone(), norm.ema_gz.clone()
        y, _ = take_step(norm, step)
    x = wave(2, 3, 2, phase=9.0) * 1.45 * 30
    slot = 9 % 4
    if filtered:
        assert torch.equal(norm.buffer_x2[slot], before)
        assert torch.allclose(y, plain(x, norm.weight, norm.bias), atol=1e-4)
        assert torch.equal(norm.buffer_gz[slot], average) and int(norm.skip_counter) == 1
        assert torch.allclose(norm.running_var, 0.9 * before + 0.1 * x.square().mean((0, 1))), "as in the official code"
    else:
        assert torch.allclose(norm.buffer_x2[slot], x.square().mean((0, 1)))
        assert not torch.equal(norm.buffer_gz[slot], average) and not norm.skip_counter
        assert not torch.allclose(y, plain(x, norm.weight, norm.bias), atol=1e-1)


def test_padding_does_not_count():
    x, mask = wave(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 2:] = True
    first, second = UnifiedNorm(3), UnifiedNorm(3)
    y = first(x, mask)
    x[mask] = 100.0
    changed = second(x, mask)
    assert torch.equal(y[~mask], changed[~mask]) and torch.equal(first.running_var, second.running_var)
    with pytest.raises(BadInput, match="one value per token"):
        first(x, mask[:, :4])


def test_maps_are_tokens():
    x = torch.randn(2, 3, 4, 5)
    maps, tokens, last = UnifiedNorm(3), UnifiedNorm(3), UnifiedNorm(3, channels_last=True)
    for mode in (True, False):
        expected = tokens.train(mode)(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x)
        assert torch.allclose(maps.train(mode)(x), expected, atol=1e-6)
        assert torch.allclose(last.train(mode)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), expected, atol=1e-6)


def trained(norm: UnifiedNorm) -> UnifiedNorm:
    nn.init.uniform_(norm.running_var, 0.3, 3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize(
    ("build", "shape", "left"),
    [
        (lambda: nn.Sequential(trained(UnifiedNorm(4)), nn.Linear(4, 3)), (2, 5, 4), 0),
        (lambda: nn.Sequential(trained(UnifiedNorm(4)), nn.Linear(4, 3, bias=False)), (2, 5, 4), 0),
        (lambda: nn.Sequential(trained(UnifiedNorm(4)), nn.Conv2d(4, 6, 1, bias=False)), (2, 4, 5, 3), 0),
        (lambda: nn.Sequential(trained(UnifiedNorm(4)), nn.Conv2d(4, 6, 1, groups=2)), (2, 4, 5, 3), 0),
        (lambda: nn.Sequential(trained(UnifiedNorm(4)), nn.Conv2d(4, 6, 1, padding=1)), (2, 4, 5, 3), 1),
        (lambda: nn.Sequential(trained(UnifiedNorm(4)), nn.Conv2d(4, 6, 3, padding=1)), (2, 4, 5, 3), 1),
        (lambda: nn.Sequential(trained(UnifiedNorm(4)), nn.Conv2d(4, 6, 3)), (2, 4, 5, 3), 1),
        (lambda: nn.Sequential(trained(UnifiedNorm(4)), nn.ReLU(), nn.Linear(4, 3)), (2, 5, 4), 1),
    ],
)
@torch.no_grad()
def test_folding_into_the_layer_that_reads(build, shape, left):
    model, x = build().eval(), torch.randn(shape)
    fused = fuse(model)
    assert torch.allclose(fused(x), model(x), atol=1e-5)
    assert sum(isinstance(m, ChannelAffine) for m in fused.modules()) == left
    assert not any(isinstance(m, UnifiedNorm) for m in fused.modules())


@torch.no_grad()
def test_a_transformer_folds_but_for_its_last_norm():
    model = opsin.create("vit", dim=24, depth=2, num_heads=3, patch_size=8, image_size=32, num_classes=5)
    assert unify_norms(model) == 5
    for module in model.modules():
        if isinstance(module, UnifiedNorm):
            trained(module)
    x = torch.randn(2, 3, 32, 32)
    fused = fuse(model)
    assert torch.allclose(fused(x), model.eval()(x), atol=1e-5)
    assert [n for n, m in fused.named_modules() if isinstance(m, ChannelAffine)] == ["norm"]


def test_layer_norms_of_any_network_are_replaced():
    model = nn.ModuleDict({
        "tokens": nn.LayerNorm(4), "map": LayerNorm2d(4), "bare": nn.LayerNorm(4, elementwise_affine=False),
        "whole": nn.LayerNorm((4, 3)), "batch": nn.BatchNorm2d(4),
    })  # fmt: skip
    nn.init.normal_(model["tokens"].weight)
    weight = model["tokens"].weight.detach().clone()
    assert unify_norms(model, warmup=7) == 3
    assert torch.equal(model["tokens"].weight, weight) and model["tokens"].warmup == 7
    assert model["tokens"].eps == model["map"].eps == 1e-5, "the paper's, not the 1e-6 of a map's layer norm"
    assert [model[n].channels_last for n in ("tokens", "map", "bare")] == [True, False, True]
    assert not model["bare"].weight.requires_grad
    assert type(model["whole"]) is nn.LayerNorm and type(model["batch"]) is nn.BatchNorm2d


def test_complaints_are_sentences():
    for window in (0, (4, 0), (4,), -1):
        with pytest.raises(BadInput, match="is not possible; take a number of batches from 1"):
            UnifiedNorm(4, window=window)
    with pytest.raises(BadInput, match="itself a layer norm"):
        unify_norms(nn.LayerNorm(4))


def test_networks_with_channels_last_inside_train_and_fold():
    model = opsin.create("swin_tiny_patch4_window7_224", num_classes=3)
    assert unify_norms(model) > 20
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        model.train()(x)
        assert torch.allclose(fuse(model)(x), model.eval()(x), atol=1e-4)


def test_backward_keeps_the_input_alone():
    norm, x = UnifiedNorm(8), torch.randn(4, 50, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        norm(x)
    assert [n for n in kept if n > 50] == [x.numel()]


def test_metanet_takes_it_by_name():
    net = opsin.create("metanet_n", norm="unified_norm", num_classes=3, image_size=16)
    assert sum(isinstance(m, UnifiedNorm) for m in net.modules()) == 10
    net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
