"""The contract of the room `ops`, over every card, and over members that are broken on purpose."""

import ast
import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.catalog import all_cards, entry
from opsin.catalog.cards import Card
from opsin.measure.cost import count_macs

CARDS = [card for card in all_cards().values() if card.kind == "operator"]
MIXERS = [card for card in CARDS if card.mixer]
DIM, SIZE = 32, (8, 12)
ODD = ((7, 9), (5, 13))
Build = Callable[[tuple[int, int]], nn.Module]  # build(size) -> the operator for DIM channels and maps of this size


def builder(card: Card) -> Build:
    def build(size: tuple[int, int]) -> nn.Module:
        place = {"input_size": size} if card.facts.get("fixed_size") else {}
        return opsin.create(card.key, dim=DIM, **place)

    return build


def stirred(op: nn.Module) -> nn.Module:
    """The operator with all vectors moved: gains and biases start at 0 or 1, which hides mistakes."""
    with torch.no_grad():
        for parameter in op.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return op


def image(size: tuple[int, int] = SIZE, n: int = 2) -> Tensor:
    return torch.randn(n, DIM, *size)


def keeps_shape(build: Build) -> None:
    """A mixer returns a map like its input, finite, at even and at odd sizes."""
    for size in (SIZE, *ODD):
        x = image(size)
        y = build(size)(x)
        assert y.shape == x.shape, f"{tuple(x.shape)} became {tuple(y.shape)}"
        assert y.isfinite().all()


def returns_maps(build: Build) -> None:
    """Any operator maps NCHW to NCHW with the same samples."""
    for size in (SIZE, *ODD):
        y = build(size)(image(size))
        assert y.ndim == 4 and len(y) == 2 and y.isfinite().all()


def gradients(build: Build) -> None:
    """The loss reaches the input and every parameter."""
    op, x = stirred(build(SIZE)), image().requires_grad_()
    op(x).square().sum().backward()
    idle = [name for name, p in op.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle, f"no gradient reaches {idle}"
    assert x.grad is not None and x.grad.flatten(1).any(1).all(), "no gradient reaches the input"


@torch.no_grad()
def independent_samples(build: Build) -> None:
    """In eval, what a sample becomes does not depend on the rest of the batch."""
    op, x = stirred(build(SIZE)).eval(), image(n=3)
    together, changed = op(x), op(torch.cat((x[:1], 5 * image())))
    assert torch.allclose(together[0], changed[0], atol=1e-5), "other samples change the output"
    assert torch.allclose(op(x[:1])[0], together[0], atol=1e-5), "a sample alone becomes something else"


@torch.no_grad()
def bfloat16(build: Build) -> None:
    """In bfloat16 it runs, stays finite and near itself in float32."""
    op, x = stirred(build(SIZE)).eval(), image()
    exact, rough = op(x), copy.deepcopy(op).bfloat16()(x.bfloat16())
    assert rough.dtype == torch.bfloat16 and rough.isfinite().all()
    error = float((rough.float() - exact).norm() / exact.norm())
    assert error < 0.05, f"bfloat16 is off by {error:.3f}"


def autocast(build: Build) -> None:
    """Under bfloat16 autocast it trains, on float32 maps and on the bfloat16 maps of a layer before it."""
    for dtype in (torch.float32, torch.bfloat16):
        op, x = stirred(build(SIZE)), image().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = op(x)
        assert y.shape == op(x.float()).shape and y.isfinite().all()
        y.float().square().mean().backward()
        grads = {"the input": x.grad} | {name: p.grad for name, p in op.named_parameters()}
        wrong = [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]
        assert not wrong, f"from {dtype} maps, no finite gradient reaches {wrong}"


def exports(build: Build) -> None:
    """torch.export gives a program with the same outputs, for any batch size."""
    op, x = stirred(build(SIZE)).eval(), image()
    program = torch.export.export(op, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    with torch.no_grad():
        for n in (2, 3):
            x = image(n=n)
            assert torch.allclose(program(x), op(x), atol=1e-5), "the exported program computes something else"


@torch.no_grad()
def round_trip(build: Build) -> None:
    """A second instance with the first one's state is the first one."""
    first, x = stirred(build(SIZE)), image()
    first.train()(x)
    second = build(SIZE).eval()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(second(x), first.eval()(x)), "something that the output depends on is not in the state"


def follows_training(build: Build) -> None:
    """Evaluated before and after a step of an optimizer that writes without counting, it is what its state says."""
    op, x = stirred(build(SIZE)).eval(), image()
    parameters = list(op.parameters())
    if not parameters:
        return
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    with torch.no_grad():
        op(x)
        fused = all(p.is_floating_point() for p in parameters)
        torch.optim.AdamW(parameters, lr=0.01, fused=fused).step()
        fresh = build(SIZE).eval()
        fresh.load_state_dict(copy.deepcopy(op.state_dict()))
        assert torch.equal(op(x), fresh(x)), "it keeps something that was made from older parameters"


def matches_reference(build: Build) -> None:
    """The fast path and the readable one agree, in values and in gradients; at odd sizes, and with repeated use."""
    for size in (SIZE, *ODD):
        op = stirred(build(size))
        reference = getattr(op, "reference", None)
        if reference is None:
            continue
        for mode in (True, False):
            op.train(mode)
            x = image(size).requires_grad_()
            variables = [x, *op.parameters()]
            fast, plain = op(x), reference(x)
            weight = torch.randn_like(fast)
            assert torch.allclose(fast, plain, atol=1e-5), "the fast path computes something else"
            with torch.no_grad():
                assert torch.allclose(op(x), plain, atol=1e-5), "without gradients it computes something else"
            for a, b in zip(*(torch.autograd.grad((y * weight).sum(), variables) for y in (fast, plain)), strict=True):
                assert torch.allclose(a, b, atol=1e-4, rtol=1e-4), "the fast path has other gradients"


def evaluated(formula: object, names: dict[str, object]) -> float | None:
    """The number of a fact that is a number or a formula in these names, or None where it is in words."""
    try:
        tree = ast.parse(str(formula), mode="eval")
    except SyntaxError:
        return None
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    plain = not any(isinstance(node, ast.Call | ast.Attribute) for node in ast.walk(tree))
    return eval(compile(tree, "fact", "eval"), {}, names) if plain and used <= set(names) else None


def field_of(op: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the input that the output at the centre depends on."""
    x = torch.randn(1, DIM, *size, requires_grad=True)
    y = op(x)
    y[0, :, y.shape[2] // 2, y.shape[3] // 2].square().sum().backward()
    seen = x.grad.abs().amax((0, 1)) > 0
    rows, columns = (seen.any(axis).nonzero().flatten() for axis in (1, 0))
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


def facts_hold(build: Build, facts: dict[str, object], options: dict[str, object]) -> None:
    """The card says what the operator costs and sees, and where it says so as a formula, that is what is measured.

    Formulas are Python: N positions, C channels, H and W, and the names of options. A field "all" is the whole map.
    """
    missing = {"macs", "memory", "receptive_field"} - set(facts)
    assert not missing, f"the card's [facts] lack {sorted(missing)}"
    size = (17, 21)
    names = {"N": size[0] * size[1], "C": DIM, "H": size[0], "W": size[1], **options}
    macs = evaluated(facts["macs"], names)
    if macs is not None:
        with torch.device("meta"):
            counted = count_macs(build(size).eval(), torch.empty(1, DIM, *size))
        assert counted == macs, f"the card says {macs} multiply-adds, and there are {counted}"
    claimed = facts["receptive_field"]
    side = evaluated(claimed, names)
    if claimed == "all" or side is not None:
        expected = size if claimed == "all" else (side, side)
        assert field_of(stirred(build(size)), size) == expected, f"the field is not {claimed}"


def defaults(card: Card) -> dict[str, object]:
    """The options' default values, as the formulas of a card use them."""
    parameters = inspect.signature(entry(card)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


ALWAYS = (
    returns_maps,
    gradients,
    independent_samples,
    bfloat16,
    autocast,
    exports,
    round_trip,
    follows_training,
    matches_reference,
)
MIXERS_ONLY = (keeps_shape,)


@pytest.mark.parametrize("check", ALWAYS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.key)
def test_contract(card, check):
    check(builder(card))


@pytest.mark.parametrize("card", MIXERS, ids=lambda c: c.key)
def test_mixers_keep_the_shape(card):
    keeps_shape(builder(card))


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.key)
def test_facts_of_the_card(card):
    facts_hold(builder(card), card.facts, defaults(card))


@pytest.mark.parametrize("card", MIXERS, ids=lambda c: c.key)
def test_metanet_takes_every_mixer(card):
    net = opsin.create("metanet_n", mixer=card.key, image_size=16, num_classes=3)
    net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle, f"no gradient reaches {idle}"


class Good(nn.Module):
    """The smallest member: a depthwise filter with a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(DIM, 1, 3, 3))
        self.gain = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, padding=1, groups=DIM) * self.gain[:, None, None]

    def reference(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, 3, padding=1).unflatten(1, (DIM, 9))
        y = (patches * self.weight.view(DIM, 9, 1)).sum(2) * self.gain[:, None]
        return y.unflatten(2, x.shape[2:])


FACTS = {"macs": "N * C * 9", "memory": "N * C", "receptive_field": 3}


class LosesPositions(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(2)


class OnlyEvenSides(Good):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return super().forward(x.view(n, c, h // 2, 2, w // 2, 2).reshape(x.shape))


class Shrinks(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :, ::2, ::2]


class DropsAParameter(Good):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, padding=1, groups=DIM) * self.gain.detach()[:, None, None]


class MixesSamples(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


class OnlyFloat32(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(1, dtype=torch.float32)


class AddsInPlace(Good):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add_(0, torch.arange(len(x)), super().forward(x))


class BranchesOnValues(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > 0 else -x)


class FreezesTheBatch(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(int(x.shape[0]), *x.shape[1:])) * torch.ones(int(x.shape[0]), 1, 1, 1)


class UnsavedTensor(Good):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.rand(DIM, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.hidden.to(x.dtype)


class AnotherFastPath(Good):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class AnotherGradient(Good):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 0.9 * y + 0.1 * y.detach()


class StaleInEval(Good):
    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return super().forward(x)
        return nn.functional.conv2d(x, self.weight, padding=1, groups=DIM)


class KeepsUntilCounted(Good):
    def __init__(self) -> None:
        super().__init__()
        self.kept: tuple[int, Tensor] = (-1, self.gain)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        if self.kept[0] != self.gain._version:
            self.kept = (self.gain._version, self.gain.clone())
        return nn.functional.conv2d(x, self.weight, padding=1, groups=DIM) * self.kept[1][:, None, None]


BROKEN = [
    (returns_maps, LosesPositions), (returns_maps, OnlyEvenSides), (keeps_shape, Shrinks), (keeps_shape, OnlyEvenSides),
    (gradients, DropsAParameter), (independent_samples, MixesSamples), (bfloat16, OnlyFloat32), (autocast, AddsInPlace),
    (exports, BranchesOnValues), (exports, FreezesTheBatch), (round_trip, UnsavedTensor),
    (follows_training, KeepsUntilCounted),
    (matches_reference, AnotherFastPath), (matches_reference, AnotherGradient), (matches_reference, StaleInEval),
]  # fmt: skip


@pytest.mark.parametrize("check", [*ALWAYS, *MIXERS_ONLY], ids=lambda c: c.__name__)
def test_checks_pass_a_good_member(check):
    check(lambda size: Good())


@pytest.mark.parametrize(("check", "member"), BROKEN, ids=lambda p: p.__name__)
def test_checks_catch_a_broken_member(check, member):
    with pytest.raises((AssertionError, RuntimeError, ValueError, torch._dynamo.exc.UserError)):
        check(lambda size: member())


def test_every_check_has_a_broken_member():
    assert {check for check, _ in BROKEN} == {*ALWAYS, *MIXERS_ONLY}


def test_the_check_of_facts():
    facts_hold(lambda size: Good(), FACTS, {})
    for wrong in ({"macs": "N * C * 10"}, {"receptive_field": 5}, {"receptive_field": "all"}):
        with pytest.raises(AssertionError):
            facts_hold(lambda size: Good(), FACTS | wrong, {})
    with pytest.raises(AssertionError, match="memory"):
        facts_hold(lambda size: Good(), {"macs": "N * C * 9", "receptive_field": 3}, {})
    assert evaluated("linear in the map", {}) is None and evaluated("2 * k", {"k": 3}) == 6
