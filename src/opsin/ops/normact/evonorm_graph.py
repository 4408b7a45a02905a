"""Norm-activation layers as computation graphs: what EvoNorm's search evolves.

Liu et al. 2020, arXiv:2004.02967, section 3. A graph has four initial nodes (the input, zero, and two learned values
per channel that start at 0 and at 1) and ten more, each an elementary function of one or two earlier nodes; the last
one is the layer, up to a gain and an offset. Moments are taken over the batch (nhw), a sample's channel (hw), the
channels of a position (c) or a group of channels (hwg).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.ops.normact.evonorm import fitting_groups, on_map, precise

INITIAL, INTERMEDIATE = 4, 10
X, ZERO, V0, V1 = range(INITIAL)

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp,
    "log": lambda x: x.sign() * x.abs().log(), "abs": torch.abs, "square": torch.square,
    "sqrt": lambda x: x.sign() * x.abs().sqrt(),
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "mul": torch.mul, "div": torch.div, "max": torch.maximum,
}  # fmt: skip
AXES = {"nhw": (0, 2, 3), "hw": (2, 3), "c": (1,), "hwg": ()}
MOMENTS = tuple(f"{kind}_{axes}" for kind in ("mean", "std", "rms") for axes in AXES)
OPS = (*UNARY, *BINARY, *MOMENTS)


class Node(NamedTuple):
    """A function and the numbers of the nodes that it reads."""

    op: str
    inputs: tuple[int, ...]


class Graph(NamedTuple):
    """The intermediate nodes in order; node i of them has the number 4 + i."""

    nodes: tuple[Node, ...]

    def reachable(self) -> list[int]:
        """Numbers of the intermediate nodes that the last one depends on, in order."""
        needed = {INITIAL + len(self.nodes) - 1}
        for number in range(INITIAL + len(self.nodes) - 1, INITIAL - 1, -1):
            if number in needed:
                needed |= set(self.nodes[number - INITIAL].inputs)
        return sorted(number for number in needed if number >= INITIAL)

    def reads_input(self) -> bool:
        """Whether the layer depends on what comes in."""
        return any(X in self.nodes[number - INITIAL].inputs for number in self.reachable())

    def __str__(self) -> str:
        names = ["x", "0", "v0", "v1"]
        for op, inputs in self.nodes:
            names.append(f"{op}({', '.join(names[i] for i in inputs)})")
        return names[-1]


def graph_of(*nodes: tuple[str, tuple[int, ...]]) -> Graph:
    """A graph that ends in these nodes, with idle ones before; numbers from 4 on count among `nodes`."""
    idle = INTERMEDIATE - len(nodes)
    moved = [Node(op, tuple(i + idle if i >= INITIAL else i for i in inputs)) for op, inputs in nodes]
    return Graph((*[Node("neg", (X,))] * idle, *moved))


B0 = graph_of(
    ("std_nhw", (X,)), ("mul", (V1, X)), ("std_hw", (X,)), ("add", (5, 6)), ("max", (4, 7)), ("div", (X, 8)),
)  # fmt: skip
S0 = graph_of(("mul", (V1, X)), ("sigmoid", (4,)), ("mul", (X, 5)), ("std_hwg", (X,)), ("div", (6, 7)))
BN_RELU = graph_of(
    ("mean_nhw", (X,)), ("neg", (4,)), ("add", (X, 5)), ("std_nhw", (X,)), ("div", (6, 7)), ("max", (8, ZERO)),
)  # fmt: skip


def random_node(number: int, draw: random.Random) -> Node:
    """A function drawn uniformly, reading nodes before `number` drawn uniformly."""
    op = draw.choice(OPS)
    return Node(op, tuple(draw.randrange(number) for _ in range(2 if op in BINARY else 1)))


def random_graph(draw: random.Random) -> Graph:
    """Ten random nodes."""
    return Graph(tuple(random_node(INITIAL + i, draw) for i in range(INTERMEDIATE)))


def mutate(graph: Graph, draw: random.Random) -> Graph:
    """One node, drawn uniformly, gets another function and other inputs."""
    i = draw.randrange(len(graph.nodes))
    return Graph((*graph.nodes[:i], random_node(INITIAL + i, draw), *graph.nodes[i + 1 :]))


class GraphNorm(nn.Module):
    """gamma * graph(x) + beta; (N, C, H, W) -> the same.

    Moments over the batch are running averages at inference: of means and mean squares as they are, of variances
    unbiased. Args: dim, channels; groups, of channels; eps, below every root.
    """

    def __init__(self, graph: Graph, dim: int, groups: int | None = None, eps: float = 1e-3, momentum: float = 0.1):
        super().__init__()
        self.graph, self.eps, self.momentum = graph, eps, momentum
        self.groups = fitting_groups(dim) if groups is None else groups
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        used = {i for number in graph.reachable() for i in graph.nodes[number - INITIAL].inputs}
        self.v0 = nn.Parameter(torch.zeros(dim)) if V0 in used else None
        self.v1 = nn.Parameter(torch.ones(dim)) if V1 in used else None
        for number, node in self._used():
            if node.op.endswith("_nhw"):
                self.register_buffer(f"running_{number}", torch.full((1, dim, 1, 1), 0.0 if "mean" in node.op else 1.0))

    def _used(self) -> Iterator[tuple[int, Node]]:
        return ((number, self.graph.nodes[number - INITIAL]) for number in self.graph.reachable())

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        values: dict[int, Tensor] = {X: x, ZERO: x.new_zeros(1, 1, 1, 1)}
        for number, vector in ((V0, self.v0), (V1, self.v1)):
            if vector is not None:
                values[number] = on_map(vector, x)[None]
        for number, (op, inputs) in self._used():
            given = [values[i] for i in inputs]
            if op in BINARY:
                values[number] = BINARY[op](given[0], given[1])
            else:
                values[number] = UNARY[op](given[0]) if op in UNARY else self._moment(number, op, given[0], x)
        y = values[INITIAL + len(self.graph.nodes) - 1].broadcast_to(x.shape)
        return y * on_map(self.weight, x) + on_map(self.bias, x)

    def _moment(self, number: int, op: str, y: Tensor, x: Tensor) -> Tensor:
        """A mean, or the root of a variance or mean square, over the axes that the name says."""
        kind, axes = op.split("_")
        y = precise(y)
        if axes == "nhw":
            moment = self._running(number, kind, y, x)
        elif axes == "hwg":
            grouped = y.broadcast_to(x.shape).unflatten(1, (self.groups, -1))
            moment = _plain_moment(kind, grouped, (2, 3, 4)).expand(-1, -1, grouped.shape[2], -1, -1).flatten(1, 2)
        else:
            moment = _plain_moment(kind, y.broadcast_to(x.shape) if axes == "c" else y, AXES[axes])
        return (moment if kind == "mean" else (moment + self.eps).sqrt()).to(x.dtype)

    def _running(self, number: int, kind: str, y: Tensor, x: Tensor) -> Float[Tensor, "1 #c 1 1"]:
        """A moment over the batch, or at inference its running average."""
        running: Tensor = getattr(self, f"running_{number}")
        if not self.training:
            return running
        moment = _plain_moment(kind, y, AXES["nhw"])
        count = x.numel() // x.shape[1]
        unbiased = moment.detach() * (count / max(count - 1, 1) if kind == "std" else 1.0)
        running.lerp_(unbiased.expand_as(running).to(running.dtype), self.momentum)
        return moment

    def extra_repr(self) -> str:
        return str(self.graph)


def _plain_moment(kind: str, y: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean, biased variance or mean square, with the axes kept."""
    if kind == "std":
        return (y - y.mean(axes, keepdim=True)).square().mean(axes, keepdim=True)
    return (y if kind == "mean" else y.square()).mean(axes, keepdim=True)
