"""EvoNorm's layers: timm's numbers, the formulas' limits, running statistics, and swapping them into networks."""

import importlib.util
import json

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.backbones.metanet import MetaNet
from opsin.catalog import card_of
from opsin.catalog.cards import claim_file, evidence_file
from opsin.errors import BadInput
from opsin.layers import LayerNorm2d
from opsin.measure.evidence import Experiment
from opsin.ops.normact.evonorm import FORMS, EvoNorm, EvoNormB0, EvoNormS0, evolve, evonorm, fitting_groups

EPS = {"b0": 1e-3, "s0a": 1e-3, "s1a": 1e-3, "s2a": 1e-3}

# timm 1.0.31, EvoNorm2d*(4, groups=2), parameters and input by `wave`: six outputs in training, six in eval after it.
TIMM = {
    "b0": (
        [1.392086, 0.440931, -0.295426, 0.805184, 1.724507, 2.122755],
        [1.392086, 0.378752, -0.382753, 0.792737, 1.724507, 2.122755],
    ),
    "b1": (
        [1.393709, 0.440571, -0.296044, 0.804992, 1.705656, 1.884066],
        [1.393709, 0.378308, -0.383492, 0.792528, 1.705656, 1.884066],
    ),
    "b2": (
        [1.452484, 0.823264, 0.482644, 0.953639, 2.000273, 3.118772],
        [1.459432, 0.823264, 0.482644, 0.953639, 2.051556, 3.239598],
    ),
    "s0": (
        [1.356607, 1.028449, 0.687699, 1.084923, 1.771542, 2.668691],
        [1.356607, 1.028449, 0.687699, 1.084923, 1.771542, 2.668691],
    ),
    "s1": (
        [1.352355, 1.026332, 0.798905, 1.072328, 1.770059, 2.845725],
        [1.352355, 1.026332, 0.798905, 1.072328, 1.770059, 2.845725],
    ),
    "s2": (
        [1.34582, 1.039712, 0.817466, 1.075336, 1.760445, 2.786304],
        [1.34582, 1.039712, 0.817466, 1.075336, 1.760445, 2.786304],
    ),
    "s0a": (
        [1.356546, 1.028569, 0.687897, 1.084982, 1.771336, 2.667991],
        [1.356546, 1.028569, 0.687897, 1.084982, 1.771336, 2.667991],
    ),
    "s1a": (
        [1.352295, 1.026454, 0.799054, 1.072392, 1.769853, 2.844945],
        [1.352295, 1.026454, 0.799054, 1.072392, 1.769853, 2.844945],
    ),
    "s2a": (
        [1.34577, 1.039816, 0.817592, 1.075397, 1.760252, 2.785602],
        [1.34577, 1.039816, 0.817592, 1.075397, 1.760252, 2.785602],
    ),
}


def wave(*shape: int, step: float = 0.7, phase: float = 0.0) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + phase).reshape(shape)


def waved(form: str, dim: int = 4, **options: object) -> EvoNorm:
    layer = evonorm(dim, form, **({"groups": 2} if form[0] == "s" else {}), **options)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.8 + 0.5 * wave(dim, phase=float(i)))
    return layer


def picture() -> Tensor:
    return 0.3 + 1.5 * wave(2, 4, 3, 5, step=0.9)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_timm(form):
    layer, x = waved(form), picture()
    for mode in (True, False):
        found = layer.train(mode)(x).flatten()[::20]
        assert torch.allclose(found, torch.tensor(TIMM[form][not mode]), atol=1e-5)


def formula(form: str, x: Tensor, v: Tensor | float) -> Tensor:
    """Table 2, with every statistic by `var` and `mean` on the map itself."""
    eps = EPS.get(form, 1e-5)
    if form[0] == "b":
        batch = (x.var((0, 2, 3), correction=0, keepdim=True) + eps).sqrt()
        std = (x.var((2, 3), correction=0, keepdim=True) + eps).sqrt()
        rms = (x.square().mean((2, 3), keepdim=True) + eps).sqrt()
        return x / torch.maximum(batch, {"b0": v * x + std, "b1": (x + 1) * rms, "b2": rms - x}[form])
    grouped = x.unflatten(1, (2, -1))
    if form[1] == "2":
        moment = grouped.square().mean((2, 3, 4), keepdim=True)
    else:
        moment = grouped.var((2, 3, 4), correction=0, keepdim=True)
    return x * torch.sigmoid(v * x) / (moment.expand_as(grouped).flatten(1, 2) + eps).sqrt()


@pytest.mark.parametrize("form", FORMS)
def test_formulas_and_their_reference(form):
    layer, x = waved(form), 2 + picture()
    v = 1.0 if layer.v is None else layer.v[:, None, None]
    expected = layer.weight[:, None, None] * formula(form, x, v) + layer.bias[:, None, None]
    assert torch.allclose(layer(x), expected, atol=1e-5) and torch.allclose(layer.reference(x), expected, atol=1e-5)


def test_limits_of_v():
    x = torch.randn(3, 8, 5, 4)
    layer = EvoNormS0(8, groups=2)
    grouped = x.view(3, 2, -1)
    normed = (grouped / (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()).view_as(x)
    for v, share in ((0.0, 0.5 * normed), (1e6, normed.relu())):
        nn.init.constant_(layer.v, v)
        assert torch.allclose(layer(x), share, atol=1e-4)
    layer = EvoNormB0(8)
    nn.init.zeros_(layer.v)
    deviations = [x.var((0, 2, 3), correction=0, keepdim=True), x.var((2, 3), correction=0, keepdim=True)]
    assert torch.allclose(layer(x), x / (torch.maximum(*deviations) + 1e-3).sqrt(), atol=1e-5)


@pytest.mark.parametrize("form", ["b0", "b1", "b2"])
def test_running_variance_is_unbiased_and_used_in_eval(form):
    layer, x = evonorm(4, form), 3 * torch.randn(5, 4, 3, 3)
    layer(x)
    assert torch.allclose(layer.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))
    layer.eval()
    kept = layer.running_var.clone()
    layer.running_var.fill_(1e8)
    y = layer(x)
    assert torch.allclose(y, x / 1e4, atol=1e-6) and torch.equal(layer.running_var, torch.full((4,), 1e8))
    layer.running_var.copy_(kept)
    alone = torch.cat([layer(one) for one in x.split(1)])
    assert torch.allclose(layer(x), alone, atol=1e-6), "the instance term is of the sample, at inference too"


@pytest.mark.parametrize("form", ["s0", "s1", "s2"])
def test_samples_do_not_meet_in_training(form):
    layer, x = evonorm(8, form), torch.randn(4, 8, 3, 3)
    assert torch.allclose(layer(x)[:1], layer(x[:1]), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_without_the_activation(form):
    layer, x = waved(form, apply_act=False), picture()
    assert layer.v is None and torch.allclose(layer(x), layer.reference(x), atol=1e-6)
    affine = layer.weight[:, None, None] * x + layer.bias[:, None, None]
    assert torch.allclose(layer(x), affine) != form.endswith("a")


def test_names_of_timm():
    assert set(opsin.create("evonorm_b0", dim=8).state_dict()) == {"weight", "bias", "v", "running_var"}
    assert set(opsin.create("evonorm_b1", dim=8).state_dict()) == {"weight", "bias", "running_var"}
    assert set(opsin.create("evonorm_s0", dim=64).state_dict()) == {"weight", "bias", "v"}
    assert set(opsin.create("evonorm_s2a", dim=64).state_dict()) == {"weight", "bias"}


def test_groups_that_fit():
    assert [fitting_groups(dim) for dim in (1, 3, 7, 8, 12, 48, 64, 256)] == [1, 1, 1, 4, 6, 24, 32, 32]
    assert opsin.create("evonorm_s0", dim=64).groups == 32 and opsin.create("evonorm", dim=12).groups == 6


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="groups=32 does not divide the 48 channels"):
        opsin.create("evonorm_s0", dim=48)
    for groups in (0, -2):
        with pytest.raises(BadInput, match=f"groups={groups} does not divide the 8 channels"):
            opsin.create("evonorm", dim=8, groups=groups)
    with pytest.raises(BadInput, match="form='b9' is no EvoNorm"):
        opsin.create("evonorm", dim=8, form="b9")
    with pytest.raises(BadInput, match="groups=4 means nothing to EvoNorm B0"):
        opsin.create("evonorm_b0", dim=8, groups=4)
    with pytest.raises(BadInput, match="no activation module of this network reads a norm"):
        evolve(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


def forms(model: nn.Module) -> dict[str, bool]:
    return {name: m.apply_act for name, m in model.named_modules() if isinstance(m, EvoNorm)}


def test_swapping_in_a_resnet():
    model = opsin.create("resnet20_cifar")
    nn.init.constant_(model.bn1.weight, 3.0)
    assert evolve(model, "b0") == 10
    kinds = forms(model)
    assert kinds["bn1"] and kinds["layer1.0.bn1"] and not kinds["layer1.0.bn2"] and len(kinds) == 19
    assert isinstance(model.layer1[0].relu1, nn.Identity) and isinstance(model.layer1[0].relu2, nn.ReLU)
    assert (model.bn1.weight == 3).all()
    model(torch.randn(2, 3, 16, 16)).sum().backward()


def test_swapping_where_blocks_share_an_activation():
    model = opsin.create("mobilenetv2_050", num_classes=3)
    evolve(model, "s0")
    kinds = forms(model)
    assert kinds["bn1"] and kinds["blocks.1.0.bn1"] and kinds["blocks.1.0.bn2"] and not kinds["blocks.1.0.bn3"]
    assert not any(isinstance(m, nn.ReLU6) for m in model.modules())
    assert model.eval()(torch.randn(2, 3, 32, 32)).isfinite().all()


class Mixed(nn.Module):
    """One activation for a norm and for a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.ReLU()
        self.own = nn.SiLU()

    def forward(self, x):
        y = self.act(self.a(x))
        return self.act(y + self.own(self.b(x)))


def test_an_activation_that_also_reads_something_else_stays():
    model = Mixed()
    assert evolve(model, "s1") == 1
    assert isinstance(model.act, nn.ReLU) and isinstance(model.own, nn.Identity)
    assert forms(model) == {"a": False, "b": True}


@pytest.mark.parametrize("name", ["evonorm", "evonorm_b0", "unified_norm"])
def test_metanet_takes_norms_by_name(name):
    net = opsin.create("metanet_n", norm=name, num_classes=3)
    wanted = type(opsin.create(name, dim=16))
    assert all(type(b.norm1) is type(b.norm2) is wanted for stage in net.stages for b in stage)
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 3)


def test_metanet_keeps_layer_norm_and_wants_norms():
    assert all(type(b.norm1) is LayerNorm2d for stage in MetaNet(depths=(1,) * 4, dims=(8,) * 4).stages for b in stage)
    with pytest.raises(BadInput, match=r"'tvconv' is not a norm; the norms are .*evonorm.*unified_norm"):
        opsin.create("metanet_n", norm="tvconv")


def test_weight_decay_spares_its_vectors():
    from opsin.train.optimizer import parameter_groups

    (group,) = parameter_groups(EvoNormB0(4), 0.1)
    assert group["weight_decay"] == 0.0 and len(group["params"]) == 3


@pytest.fixture
def claim():
    """The claim's module."""
    spec = importlib.util.spec_from_file_location("claim_of_evonorm", claim_file(card_of("evonorm")))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("bn", "held"), [([6.0, 5.0, 7.0], True), ([-1.0, -2.0, -1.5], None), ([3.0, -3.0, 0.5], None), ([6.0], None)]
)
def test_what_s0_keeps_counts_only_where_batch_norm_loses(claim, bn, held):
    experiment = Experiment("evonorm", "")
    claim.small_batches(
        experiment, {"BN-ReLU": bn, "B0": [9.0, 8.0, 9.5][: len(bn)], "S0": [-5.0, -4.0, -4.5][: len(bn)]}
    )
    assert [c.held for c in experiment.criteria] == [held] * 3
    assert all(bool(c.note) == (held is None) for c in experiment.criteria)


def test_the_evidence_at_small_batches_follows_from_its_numbers(claim):
    record = json.loads(evidence_file(card_of("evonorm")).read_text())
    runs = {
        n: record["numbers"][f"{n}: accuracy in percent by batch size, {claim.SMALL_IMAGES} images"]
        for n in ("BN-ReLU", "B0", "S0")
    }
    losses = {n: [a - b for a, b in zip(r["64"], r["4"], strict=True)] for n, r in runs.items()}
    experiment = Experiment("evonorm", "")
    claim.small_batches(experiment, losses)
    found = {c["name"]: c for c in record["criteria"]}
    for criterion in experiment.criteria:
        assert found[criterion.name]["held"] == criterion.held and found[criterion.name]["note"] == criterion.note
        assert found[criterion.name]["value"] == pytest.approx(criterion.value)
    assert claim.gained(losses) in record["notes"]
