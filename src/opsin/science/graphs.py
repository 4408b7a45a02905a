"""Graphs for node classification: the citation benchmarks, the two normalised walks, their limits, and training.

The self-looped adjacency is A~ = A + I with degrees d~. Propagation averages over neighbours in one of two ways:

    symmetric  A^ = D~^-1/2 A~ D~^-1/2        (what graph convolutions use)
    walk       P  = D~^-1 A~                  (rows sum to one)
"""

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.data import IGNORE
from opsin.errors import BadInput, MissingData, TrainingFailed

PLANETOID = ("cora", "citeseer", "pubmed")
PICKLED = {  # all that the benchmark's files need; anything else in a pickle is refused
    ("builtins", "list"), ("builtins", "object"), ("__builtin__", "object"), ("__builtin__", "list"),
    ("collections", "defaultdict"), ("copy_reg", "_reconstructor"), ("copyreg", "_reconstructor"),
    ("numpy", "dtype"), ("numpy", "ndarray"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"), ("scipy.sparse.csr", "csr_matrix"),
}  # fmt: skip


@dataclass
class Graph:
    """An undirected graph whose nodes have features and classes.

    features: (n, f), dense or sparse COO. edges: both directions of every edge, no self-loops, no duplicates.
    labels: the class of each node; 255 where there is none. train, val, test: indices of nodes.
    """

    name: str
    features: Float[Tensor, "n f"]
    edges: Int[Tensor, "2 e"]
    labels: Int[Tensor, " n"]
    train: Int[Tensor, " a"]
    val: Int[Tensor, " b"]
    test: Int[Tensor, " c"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return int(self.labels[self.labels != IGNORE].max()) + 1

    def to(self, device: torch.device | str) -> "Graph":
        """The same graph on another device."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})


def looped_degrees(edges: Int[Tensor, "2 e"], count: int) -> Float[Tensor, " n"]:
    """d~: the number of neighbours of each of `count` nodes, itself included."""
    return torch.bincount(edges[0], minlength=count).to(torch.get_default_dtype()) + 1


def symmetric_adjacency(edges: Int[Tensor, "2 e"], count: int) -> Float[Tensor, "n n"]:
    """A^ = D~^-1/2 (A + I) D~^-1/2 as a sparse CSR matrix."""
    scale = looped_degrees(edges, count).rsqrt()
    return _looped(edges, count, lambda row, column: scale[row] * scale[column])


def walk_adjacency(edges: Int[Tensor, "2 e"], count: int) -> Float[Tensor, "n n"]:
    """P = D~^-1 (A + I) as a sparse CSR matrix."""
    scale = looped_degrees(edges, count).reciprocal()
    return _looped(edges, count, lambda row, column: scale[row])


def _looped(edges: Tensor, count: int, weight: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    loops = torch.arange(count, device=edges.device).expand(2, -1)
    row, column = torch.cat((edges, loops), 1)
    places = torch.stack((row, column))
    matrix = torch.sparse_coo_tensor(places, weight(row, column), (count, count), check_invariants=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return matrix.to_sparse_csr()


class _SymmetricProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor) -> Tensor:
        ctx.matrix = matrix
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.matrix @ grad


def propagate(adjacency: Float[Tensor, "n n"], x: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
    """A^ x for a symmetric A^, which is a constant: the gradient is A^ times it, with no transpose to build."""
    return _SymmetricProduct.apply(adjacency, x)


def components(edges: Int[Tensor, "2 e"], count: int) -> Int[Tensor, " n"]:
    """The number of each node's connected component."""
    row, column = edges.cpu().numpy()
    matrix = sp.coo_matrix((np.ones(len(row)), (row, column)), shape=(count, count))
    return torch.from_numpy(connected_components(matrix, directed=False)[1]).long().to(edges.device)


def symmetric_limit(x: Float[Tensor, "n f"], edges: Int[Tensor, "2 e"]) -> Float[Tensor, "n f"]:
    """lim_k A^^k x, without forming the limit: per component Pi_ij = sqrt(d~_i d~_j) / sum of d~ (theorem 4.3)."""
    degrees = looped_degrees(edges, len(x)).to(x)
    root = degrees.sqrt()[:, None]
    return root * _component_mean(root * x, degrees, edges)


def walk_limit(x: Float[Tensor, "n f"], edges: Int[Tensor, "2 e"]) -> Float[Tensor, "n f"]:
    """lim_k P^k x: every row of a component becomes the stationary average, pi_j = d~_j / sum of d~ (theorem 4.2)."""
    degrees = looped_degrees(edges, len(x)).to(x)
    return _component_mean(degrees[:, None] * x, degrees, edges)


def _component_mean(values: Tensor, weights: Tensor, edges: Tensor) -> Tensor:
    """Per node, the sum of values over its component divided by that of weights."""
    part = components(edges, len(values))
    count = int(part.max()) + 1
    total = values.new_zeros(count, values.shape[1]).index_add_(0, part, values)
    return (total / weights.new_zeros(count).index_add_(0, part, weights)[:, None])[part]


def smoothness(x: Float[Tensor, "n f"], block: int = 1024) -> float:
    """SMV: the mean over pairs of nodes of half the distance of their unit features; 0 is fully smooth (eq. 4)."""
    unit = F.normalize(x.double(), dim=1)
    total = sum(float(torch.cdist(rows, unit).sum()) for rows in unit.split(block))
    return total / 2 / (len(x) * (len(x) - 1))


def load_planetoid(name: str, folder: str | Path | None = None) -> Graph:
    """Cora, Citeseer or Pubmed with the public split: 20 training nodes per class, 500 to validate, 1000 to test.

    Features are sparse and their rows sum to one. Citeseer lists test nodes that have no features and no class: they
    stay in the graph, with the label 255.
    folder: where the files `ind.NAME.*` lie; by default `planetoid` in the folder that OPSIN_DATA names.
    Raises BadInput (no such benchmark, unreadable file), MissingData.
    """
    if name not in PLANETOID:
        raise BadInput(f"'{name}' is not a Planetoid graph; choose one of {', '.join(PLANETOID)}")
    base = Path(folder or os.environ.get("OPSIN_DATA", "."), "" if folder else "planetoid")
    x, tx, allx = (sp.csr_matrix(_unpickle(base / f"ind.{name}.{part}")) for part in ("x", "tx", "allx"))
    ty, ally, links = (_unpickle(base / f"ind.{name}.{part}") for part in ("ty", "ally", "graph"))
    test = np.loadtxt(_existing(base / f"ind.{name}.test.index"), dtype=np.int64)

    count = max(len(links), test.max() + 1)
    features = sp.lil_matrix((count, allx.shape[1]), dtype=np.float32)
    features[: allx.shape[0]], features[test] = allx, tx
    onehot = np.zeros((count, ally.shape[1]))
    onehot[: len(ally)], onehot[test] = ally, ty
    labels = np.where(onehot.any(1), onehot.argmax(1), IGNORE)
    return Graph(
        name=name, features=_row_normalised(features.tocoo()), edges=_edges(links), labels=torch.from_numpy(labels),
        train=torch.arange(x.shape[0]), val=torch.arange(x.shape[0], x.shape[0] + 500),
        test=torch.from_numpy(np.sort(test)),
    )  # fmt: skip


def _edges(links: dict[int, list[int]]) -> Tensor:
    pairs = {pair for a, others in links.items() for b in others if a != b for pair in ((a, b), (b, a))}
    return torch.tensor(sorted(pairs)).T.contiguous()


def _row_normalised(matrix: sp.coo_matrix) -> Tensor:
    total = np.asarray(matrix.sum(1)).ravel()
    values = torch.from_numpy((matrix.data / total[matrix.row]).astype(np.float32))
    places = torch.from_numpy(np.stack((matrix.row, matrix.col)).astype(np.int64))
    return torch.sparse_coo_tensor(places, values, matrix.shape, check_invariants=True).coalesce()


class _Unpickler(pickle.Unpickler):
    """Reads arrays, sparse matrices and plain containers; refuses every other class."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        if name == "csr_matrix":
            return sp.csr_matrix
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise MissingData(
            f"there is no file '{path}'; put the Planetoid files (github.com/kimiyoung/planetoid, folder data) into "
            f"a folder 'planetoid' and set OPSIN_DATA to the folder above it"
        )
    return path


def _unpickle(path: Path) -> Any:
    try:
        with _existing(path).open("rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError) as error:
        raise BadInput(f"'{path}' is not a Planetoid file: {error}") from error


@dataclass
class NodeRun:
    """What training found. Accuracies are in percent, at the epoch of the lowest validation loss."""

    val: float
    test: float
    epoch: int
    losses: list[float]  # of validation, one per epoch


def accuracy(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"], nodes: Int[Tensor, " a"]) -> float:
    """Percent of `nodes` whose largest logit is their class."""
    return 100 * float((logits[nodes].argmax(1) == labels[nodes]).float().mean())


def fit_nodes(
    model: nn.Module, graph: Graph, *, lr: float = 0.01, weight_decay: float = 5e-3, epochs: int = 1000,
    patience: int = 100, seed: int = 0,
) -> NodeRun:  # fmt: skip
    """Trains `model(features, adjacency) -> logits` on the graph's training nodes, full batch, with Adam.

    Stops once the validation loss has not fallen for `patience` epochs, and leaves the model with the weights of the
    lowest one; test nodes are scored there and nowhere else. Raises TrainingFailed where the loss is not a number.
    """
    torch.manual_seed(seed)
    adjacency = symmetric_adjacency(graph.edges, len(graph)).to(graph.features.dtype)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    best, epoch_of_best, losses, weights = float("inf"), 0, [], copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        model.train()
        optimiser.zero_grad(set_to_none=True)
        logits = model(graph.features, adjacency)
        F.cross_entropy(logits[graph.train], graph.labels[graph.train]).backward()
        optimiser.step()
        losses.append(_validation_loss(model, graph, adjacency))
        if losses[-1] < best:
            best, epoch_of_best, weights = losses[-1], epoch, copy.deepcopy(model.state_dict())
        if epoch - epoch_of_best >= patience:
            break
    model.load_state_dict(weights)
    logits = predict_nodes(model, graph)
    scores = [accuracy(logits, graph.labels, nodes) for nodes in (graph.val, graph.test)]
    return NodeRun(*scores, epoch=epoch_of_best, losses=losses)


def _validation_loss(model: nn.Module, graph: Graph, adjacency: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(graph.features, adjacency)[graph.val], graph.labels[graph.val]))
    if not np.isfinite(loss):
        raise TrainingFailed("the validation loss is not a number; lower the learning rate")
    return loss


@torch.no_grad()
def predict_nodes(model: nn.Module, graph: Graph) -> Float[Tensor, "n k"]:
    """Logits of every node, in eval mode."""
    model.eval()
    return model(graph.features, symmetric_adjacency(graph.edges, len(graph)).to(graph.features.dtype))
