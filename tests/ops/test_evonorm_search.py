"""EvoNorm's search: graphs as layers, mutation, the two rejections, the tournament, and going on where it stopped."""

import random
from functools import partial

import pytest
import torch
from torch import nn

from opsin.errors import BadInput
from opsin.ops.normact.evonorm import EvoNormB0, EvoNormS0
from opsin.ops.normact.evonorm_graph import (
    B0,
    BINARY,
    BN_RELU,
    INITIAL,
    INTERMEDIATE,
    MOMENTS,
    OPS,
    S0,
    V0,
    V1,
    ZERO,
    Graph,
    GraphNorm,
    Node,
    X,
    graph_of,
    mutate,
    random_graph,
)  # fmt: skip
from opsin.ops.normact.evonorm_search import (
    ANCHORS,
    Individual,
    Judge,
    Search,
    anchor,
    largest_gradient,
    pareto_front,
)  # fmt: skip


@pytest.mark.parametrize(("graph", "layer"), [(B0, EvoNormB0(8)), (S0, EvoNormS0(8))])
def test_published_layers_are_graphs(graph, layer):
    norm = GraphNorm(graph, 8, eps=layer.eps)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(norm, name).copy_(torch.randn(8))
            getattr(layer, name).copy_(getattr(norm, name))
        norm.v1.copy_(torch.randn(8))
        layer.v.copy_(norm.v1)
    for mode in (True, True, False):
        x = 1 + 2 * torch.randn(4, 8, 5, 3)
        x.requires_grad_()
        y, expected = norm.train(mode)(x), layer.train(mode)(x)
        assert torch.allclose(y, expected, atol=1e-5)
        a, b = (torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected))
        assert torch.allclose(a, b, atol=1e-4)


def test_batch_norm_and_relu_is_a_graph():
    norm, plain = GraphNorm(BN_RELU, 4), nn.BatchNorm2d(4, eps=1e-3)
    for mode in (True, True, False):
        x = 1 + 2 * torch.randn(6, 4, 5, 3)
        assert torch.allclose(norm.train(mode)(x), plain.train(mode)(x).relu(), atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_every_function_runs_and_learns(op):
    graph = graph_of((op, (X, V1) if op in BINARY else (X,)), ("mul", (4, X)))
    norm, x = GraphNorm(graph, 8), torch.randn(3, 8, 4, 5).requires_grad_()
    y = norm(x)
    y.square().sum().backward()
    assert y.shape == x.shape and y.isfinite().all() and x.grad.any() and norm.weight.grad.any()
    assert norm.eval()(x).shape == x.shape


@pytest.mark.parametrize("op", MOMENTS)
@pytest.mark.parametrize("source", [ZERO, V0, V1])
def test_moments_of_what_is_no_map(op, source):
    norm, x = GraphNorm(graph_of((op, (source,)), ("add", (4, X))), 8), torch.randn(3, 8, 4, 5)
    for mode in (True, False):
        assert norm.train(mode)(x).isfinite().all()


def test_moments_over_their_axes():
    x = 1 + 2 * torch.randn(3, 8, 4, 5)
    grouped = x.unflatten(1, (4, 2))
    expected = {
        "mean_nhw": x.mean((0, 2, 3), keepdim=True), "mean_hw": x.mean((2, 3), keepdim=True),
        "mean_c": x.mean(1, keepdim=True),
        "std_hwg": grouped.std((2, 3, 4), correction=0, keepdim=True).expand_as(grouped).flatten(1, 2),
        "rms_c": x.square().mean(1, keepdim=True).sqrt(), "std_hw": x.std((2, 3), correction=0, keepdim=True),
    }  # fmt: skip
    for op, y in expected.items():
        assert torch.allclose(GraphNorm(graph_of((op, (X,))), 8, eps=0)(x), y.expand_as(x), atol=1e-5), op


def test_random_graphs_are_well_formed_and_seeded():
    draw = random.Random(0)
    graphs = [random_graph(draw) for _ in range(200)]
    for graph in graphs:
        assert len(graph.nodes) == INTERMEDIATE
        for i, (op, inputs) in enumerate(graph.nodes):
            assert len(inputs) == (2 if op in BINARY else 1) and all(0 <= n < INITIAL + i for n in inputs)
    assert {node.op for graph in graphs for node in graph.nodes} == set(OPS)
    assert graphs[0] == random_graph(random.Random(0)) and graphs[0] != graphs[1]


def test_mutation_changes_one_node():
    draw = random.Random(1)
    places = set()
    for _ in range(200):
        child = mutate(S0, draw)
        changed = [i for i, (a, b) in enumerate(zip(S0.nodes, child.nodes, strict=True)) if a != b]
        assert len(changed) <= 1
        places |= set(changed)
    assert places == set(range(INTERMEDIATE))


def test_idle_nodes_are_not_computed():
    assert S0.reachable() == [9, 10, 11, 12, 13] and S0.reads_input()
    blind = Graph((*S0.nodes[:-1], Node("exp", (V0,))))
    assert not blind.reads_input() and GraphNorm(S0, 4).v0 is None
    assert str(S0) == "div(mul(x, sigmoid(mul(v1, x))), std_hwg(x))"


def net(graph: Graph, name: str = "resnet") -> nn.Module:
    return anchor(ANCHORS[name], partial(GraphNorm, graph), 1, 3, 4)


@pytest.mark.parametrize("name", ANCHORS)
def test_anchors_learn_through_the_layer(name):
    model = net(B0, name)
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_stability_tells_a_layer_that_explodes():
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    exploding = graph_of(("exp", (X,)), ("square", (4,)), ("mul", (5, 4)))
    torch.manual_seed(0)
    calm = largest_gradient(net(S0), x, y, steps=30)
    assert 0 < calm < 1e4
    torch.manual_seed(0)
    assert largest_gradient(net(exploding), x, y, steps=30) > 1e8


def test_ascent_raises_the_gradient():
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    torch.manual_seed(0)
    first = largest_gradient(net(S0), x, y, steps=1)
    torch.manual_seed(0)
    assert largest_gradient(net(S0), x, y, steps=30) > 2 * first


def judge(accuracies: list[float], **options: object) -> tuple[Judge, list[int]]:
    calls: list[int] = []

    def fit(model: nn.Module) -> float:
        calls.append(1)
        return accuracies[len(calls) - 1]

    return Judge(fit, torch.randn(8, 1, 8, 8), torch.arange(8) % 3, classes=3, dim=4, ascent=5, **options), calls


def test_rejections_in_their_order():
    test, calls = judge([30.0, 10.0, 90.0])
    assert test(S0) == ("quality", (30.0, 10.0)) and len(calls) == 2
    test, calls = judge([30.0, 40.0, 90.0])
    assert test(S0) == ("", (30.0, 40.0, 90.0))
    test, _ = judge([30.0, 40.0, 90.0], limit=1e-9)
    assert test(S0) == ("stability", (30.0, 40.0, 90.0))
    test, calls = judge([])
    assert test(graph_of(("exp", (V0,)))) == ("quality", ()) and not calls


def individual(*scores: float) -> Individual:
    return Individual(S0, scores)


def test_pareto_front():
    a, b, c, d = individual(3, 1), individual(1, 3), individual(2, 2), individual(1, 2)
    assert pareto_front([a, b, c, d]) == [a, b, c]
    assert pareto_front([c, individual(2, 2)]) == [c, individual(2, 2)], "equals do not beat each other"


def toy(graph: Graph) -> tuple[str, tuple[float, ...]]:
    """Likes sigmoids and squares; throws away what does not read its input."""
    ops = [node.op for node in graph.nodes]
    return ("" if graph.reads_input() else "quality"), (float(ops.count("sigmoid")), float(ops.count("square")))


def test_evolution_climbs_and_ages():
    search = Search(toy, population=20, tournament=0.4, initial=20, seed=3)
    best = search.run(600)
    start = max(sum(member.scores) for member in search.survivors(random_only=True))
    assert best is not None and sum(best.scores) > start + 2 and len(search.members) == 20
    survivors = search.survivors()
    assert [m.graph for m in search.members] == [m.graph for m in survivors[-20:]], "the youngest live, not the best"
    assert sum(r["random"] and not r["rejected"] for r in search.history) == 20


def test_same_seed_same_search():
    first, second, other = (Search(toy, 10, initial=5, seed=s) for s in (1, 1, 2))
    for search in (first, second, other):
        search.run(60)
    assert first.history == second.history != other.history


def test_goes_on_where_it_stopped(tmp_path):
    straight = Search(toy, 10, initial=5, seed=1)
    straight.run(60)
    file = tmp_path / "search.json"
    for stop in (3, 25, 60):
        search = Search(toy, 10, initial=5, seed=1, file=file)
        best = search.run(stop)
    assert [r["scores"] for r in search.history] == [r["scores"] for r in straight.history]
    assert best == straight.run(60) and [m.graph for m in search.members] == [m.graph for m in straight.members]
    with pytest.raises(BadInput, match="was begun with"):
        Search(toy, 11, initial=5, seed=1, file=file)
