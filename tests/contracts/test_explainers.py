"""What every explainer must pass, and members that must not."""

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.catalog import list_cards
from opsin.explain import Explainer, Explanation

EXPLAINERS = [name for card in list_cards("explainer") for name in card.names]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 36, 10),
    )  # fmt: skip


def image(height: int = 24, width: int = 24) -> Tensor:
    torch.manual_seed(1)
    x = torch.rand(3, height, width) * 0.2
    x[:, 5:12, 8:15] += 0.7
    return x


def ranks(x: Tensor) -> Tensor:
    return x.flatten().argsort().argsort().float()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1])


def check_shape(explainer: Explainer) -> None:
    x = image()
    e = explainer(network(), x, 4)
    assert isinstance(e, Explanation) and e.target == 4
    assert e.map.shape == x.shape[1:] and e.map.isfinite().all() and e.map.std() > 0
    assert torch.equal(e.image, x)


def check_default_target_is_the_prediction(explainer: Explainer) -> None:
    model = network().eval()
    assert explainer(model, image()).target == int(model(image()[None]).argmax())


def check_leaves_the_model_alone(explainer: Explainer) -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    forwards = [m.forward for m in model.modules()]
    out = model.eval()(image()[None])
    explainer(model.train(), image())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.forward for m in model.modules()] == forwards
    assert torch.equal(model.eval()(image()[None]), out)
    assert all(p.grad is None for p in model.parameters())


def check_depends_on_the_class(explainer: Explainer) -> None:
    assert not torch.allclose(explainer(network(), image(), 0).map, explainer(network(), image(), 1).map)


def check_weights_matter(explainer: Explainer) -> None:
    """Adebayo et al. 2018 (arXiv:1810.03292): a map that survives new random weights explains nothing of the model.

    The image is noise all over; a model that looks at one corner only is compared with fresh models that look anywhere.
    """
    torch.manual_seed(5)
    x, similar = 0.5 + 0.1 * torch.randn(3, 24, 24), []
    looks_at_a_corner = network()
    with torch.no_grad():
        looks_at_a_corner[-1].weight.view(10, 16, 6, 6)[:, :, 3:, :] = 0
        looks_at_a_corner[-1].weight.view(10, 16, 6, 6)[:, :, :, 3:] = 0
    for seed in range(3):
        other = network()
        torch.manual_seed(100 + seed)
        for module in other.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        similar.append(correlation(explainer(looks_at_a_corner, x, 0).map, explainer(other, x, 0).map))
    assert sum(similar) / 3 < 0.5


def check_picture(explainer: Explainer, path) -> None:
    explainer(network(), image()).save(path)
    assert path.read_bytes().startswith(b"\x89PNG")


CHECKS = [
    check_shape, check_default_target_is_the_prediction, check_leaves_the_model_alone, check_depends_on_the_class,
    check_weights_matter,
]  # fmt: skip


@pytest.mark.parametrize("name", EXPLAINERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_contract(name, check):
    check(opsin.create(name))


@pytest.mark.parametrize("name", EXPLAINERS)
def test_picture(name, tmp_path):
    check_picture(opsin.create(name), tmp_path / "e.png")


def gradient(model: nn.Module, x: Tensor, target: int | None) -> tuple[Tensor, int]:
    x = x[None].requires_grad_()
    logits = model.eval()(x)
    chosen = int(logits.argmax()) if target is None else target
    logits[0, chosen].backward()
    return x.grad[0], chosen


def wrong_size(model, x, target=None):
    return Explanation(torch.rand(5, 5), x, target, "broken")


def wrong_target(model, x, target=None):
    worst = int(model(x[None]).argmin())
    return Explanation(torch.rand(x.shape[1:]), x, worst if target is None else target, "broken")


def trains_the_model(model, x, target=None):
    g, chosen = gradient(model, x.clone(), target)
    return Explanation(g.sum(0), x, chosen, "broken")


def edge_detector(model, x, target=None):
    edges = x.sum(0).diff(dim=1, append=x.sum(0)[:, -1:]).abs()
    return Explanation(edges, x, int(model(x[None]).argmax()) if target is None else target, "broken")


@pytest.mark.parametrize(
    ("member", "check"),
    [
        (wrong_size, check_shape),
        (wrong_target, check_default_target_is_the_prediction),
        (trains_the_model, check_leaves_the_model_alone),
        (edge_detector, check_depends_on_the_class),
        (edge_detector, check_weights_matter),
    ],
)
def test_broken_members_are_caught(member, check):
    with pytest.raises(AssertionError):
        check(member)
