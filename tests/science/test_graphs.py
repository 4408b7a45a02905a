"""Graphs: the normalised walks, their limits, the smoothness metric, the Planetoid files, and training."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from opsin.data import IGNORE
from opsin.errors import BadInput, MissingData, TrainingFailed
from opsin.science.gcn import Gcn
from opsin.science.graphs import (
    components,
    fit_nodes,
    load_planetoid,
    predict_nodes,
    propagate,
    smoothness,
    symmetric_adjacency,
    symmetric_limit,
    walk_adjacency,
    walk_limit,
)
from opsin.science.mlp import DropLinear


def dense(edges: torch.Tensor, count: int) -> torch.Tensor:
    looped = torch.eye(count)
    looped[edges[0], edges[1]] = 1
    return looped


def test_adjacencies_are_the_formulas(graph):
    looped = dense(graph.edges, len(graph))
    degrees = looped.sum(1)
    symmetric = looped / (degrees[:, None] * degrees).sqrt()
    torch.testing.assert_close(symmetric_adjacency(graph.edges, len(graph)).to_dense(), symmetric)
    torch.testing.assert_close(walk_adjacency(graph.edges, len(graph)).to_dense(), looped / degrees[:, None])


@pytest.mark.parametrize(("adjacency", "limit"), [(symmetric_adjacency, symmetric_limit), (walk_adjacency, walk_limit)])
def test_limits_are_where_powers_go(adjacency, limit):
    edges = torch.tensor([[0, 1], [1, 2], [2, 0], [2, 3], [4, 5]]).T  # two components and the lone node 6
    edges = torch.cat((edges, edges.flip(0)), 1)
    x = torch.randn(7, 3)
    power = torch.linalg.matrix_power(adjacency(edges, 7).to_dense().double(), 200).float() @ x
    torch.testing.assert_close(limit(x, edges), power, atol=1e-5, rtol=1e-4)
    assert components(edges, 7).unique().tolist() == [0, 1, 2]


def test_smoothness_is_the_mean_over_pairs():
    x = torch.randn(9, 4)
    unit = x / x.norm(dim=1, keepdim=True)
    pairs = [(unit[i] - unit[j]).norm() / 2 for i in range(9) for j in range(9) if i != j]
    assert smoothness(x, block=4) == pytest.approx(float(sum(pairs) / 72), abs=1e-6)
    assert smoothness(torch.ones(5, 3) * torch.arange(1, 6)[:, None]) == pytest.approx(0, abs=1e-7)


def test_the_gradient_of_propagation(graph):
    adjacency = symmetric_adjacency(graph.edges, len(graph))
    x, y = (torch.randn(len(graph), 3, requires_grad=True) for _ in range(2))
    y.data = x.data.clone()
    weight = torch.randn(len(graph), 3)
    (propagate(adjacency, x) * weight).sum().backward()
    (adjacency.to_dense() @ y * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_sparse_features_give_the_dense_result():
    x = (torch.rand(20, 30) < 0.1).float()
    layer = DropLinear(30, 4, 0.5).eval()
    torch.testing.assert_close(layer(x.to_sparse()), layer(x))
    layer.train()
    ones = torch.ones(50, 400)
    layer = DropLinear(400, 1, 0.5)
    nn.init.constant_(layer.weight, 1 / 400)
    assert layer(ones.to_sparse()).mean().item() == pytest.approx(1, abs=0.1)
    assert layer(ones.to_sparse()).std() > 0.01


def test_training_stops_early_and_keeps_the_best_weights(graph):
    model = Gcn(graph.features.shape[1], 16, 3)
    run = fit_nodes(model, graph, epochs=200, patience=10)
    assert run.epoch == int(np.argmin(run.losses))
    assert len(run.losses) == min(200, run.epoch + 11)
    logits = predict_nodes(model, graph)
    loss = nn.functional.cross_entropy(logits[graph.val], graph.labels[graph.val])
    assert float(loss) == pytest.approx(min(run.losses), rel=1e-5)
    assert run.test > 80


def test_training_repeats_and_reports_broken_losses(graph):
    torch.manual_seed(1)
    first, second = Gcn(graph.features.shape[1], 8, 3), Gcn(graph.features.shape[1], 8, 3)
    second.load_state_dict(first.state_dict())
    assert fit_nodes(first, graph, epochs=5, seed=3).losses == fit_nodes(second, graph, epochs=5, seed=3).losses
    nn.init.constant_(first.layers[0].weight, float("nan"))
    with pytest.raises(TrainingFailed, match="learning rate"):
        fit_nodes(first, graph, epochs=2)


def write_planetoid(folder: Path) -> None:
    """Six nodes, two classes; the test nodes are 5 and 3 in this order, and 4 is isolated."""
    onehot = np.eye(2)
    x, labels = sp.csr_matrix(np.diag([1.0, 2, 3])), onehot[[0, 1, 0]]
    parts = {
        "x": x[:2], "y": labels[:2], "allx": x, "ally": labels, "tx": sp.csr_matrix([[4.0, 4, 0], [0, 0, 5]]),
        "ty": onehot[[1, 0]], "graph": {0: [1, 1, 0], 1: [0], 2: [3], 3: [2, 5], 5: [3]},
    }  # fmt: skip
    for name, value in parts.items():
        (folder / f"ind.cora.{name}").write_bytes(pickle.dumps(value, protocol=2))
    (folder / "ind.cora.test.index").write_text("5\n3\n")


def test_planetoid_files(tmp_path, monkeypatch):
    monkeypatch.setattr("opsin.science.graphs.PICKLED", _with_new_names())
    write_planetoid(tmp_path)
    graph = load_planetoid("cora", tmp_path)
    assert graph.features.to_dense().tolist() == [
        [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0], [0.5, 0.5, 0]
    ]  # fmt: skip
    assert graph.labels.tolist() == [0, 1, 0, 0, IGNORE, 1]
    assert graph.edges.T.tolist() == [[0, 1], [1, 0], [2, 3], [3, 2], [3, 5], [5, 3]]
    assert graph.test.tolist() == [3, 5]
    assert graph.num_classes == 2


def _with_new_names() -> set[tuple[str, str]]:
    """What today's numpy and scipy call the classes that the published files name."""
    from opsin.science.graphs import PICKLED

    new = {("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar")}
    return PICKLED | new | {("scipy.sparse._csr", "csr_matrix"), ("_codecs", "encode")}


def test_planetoid_refuses_what_it_should(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="not a Planetoid graph; choose one of cora"):
        load_planetoid("karate")
    with pytest.raises(MissingData, match=r"ind\.cora\.x"):
        load_planetoid("cora", tmp_path)
    (tmp_path / "ind.cora.x").write_bytes(pickle.dumps(Path("/")))
    with pytest.raises(BadInput, match="pathlib"):
        load_planetoid("cora", tmp_path)
    (tmp_path / "ind.cora.x").write_bytes(b"no pickle")
    with pytest.raises(BadInput, match="not a Planetoid file"):
        load_planetoid("cora", tmp_path)


@pytest.mark.parametrize(
    ("name", "nodes", "edges", "features", "classes", "unlabelled"),
    [("cora", 2708, 10556, 1433, 7, 0), ("citeseer", 3327, 9104, 3703, 6, 15)],
)
def test_the_public_graphs(opsin_data, name, nodes, edges, features, classes, unlabelled):
    graph = load_planetoid(name, opsin_data / "planetoid")
    assert tuple(graph.features.shape) == (nodes, features)
    assert graph.edges.shape[1] == edges
    assert graph.num_classes == classes
    assert int((graph.labels == IGNORE).sum()) == unlabelled
    assert graph.labels[graph.train].bincount().tolist() == [20] * classes
    assert (len(graph.val), len(graph.test)) == (500, 1000)
    sums = graph.features.sum(1).to_dense()
    assert ((sums - 1).abs() < 1e-5).logical_or(sums == 0).all()
    assert not set(graph.test.tolist()) & set((graph.labels == IGNORE).nonzero()[:, 0].tolist())
