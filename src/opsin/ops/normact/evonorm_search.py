"""The evolution that found EvoNorm.

Liu et al. 2020, arXiv:2004.02967, section 4. Most graphs are useless, so a candidate has to pass two tests before it is
scored. Quality: a short training on three tiny anchor networks (in the manner of ResNet, MobileNetV2 and EfficientNet)
must leave each above a floor of accuracy. Stability: the weights of an anchor are moved so as to make its gradient as
large as possible; where the norm of that gradient can be driven beyond a limit, the layer is thrown away. Survivors
compete in tournaments: of a random subset of the population one of the Pareto front (accuracy on each anchor) is
mutated, and the oldest member dies.

The search keeps its state in a file after every candidate, and goes on from there: the same seed gives the same search.
"""

import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.ops.normact.evonorm_graph import Graph, GraphNorm, Node, mutate, random_graph

NormAct = Callable[[int], nn.Module]  # a layer for this many channels
Fit = Callable[[nn.Module], float]  # trains a network for the proxy steps, and gives its accuracy in percent


class Residual(nn.Module):
    """Pre-activation residual block: two 3x3 convolutions, each behind a layer under search."""

    def __init__(self, dim: int, norm_act: NormAct):
        super().__init__()
        self.branch = nn.Sequential(
            norm_act(dim), nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            norm_act(dim), nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x + self.branch(x)


class Squeeze(nn.Module):
    """Gates each channel by what all channels are on average (EfficientNet's squeeze and excitation)."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(dim, dim // 4, 1), nn.Conv2d(dim // 4, dim, 1)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Inverted(nn.Module):
    """Expand, filter each channel, (gate,) project; the layer under search stands behind the first two."""

    def __init__(self, dim: int, norm_act: NormAct, squeeze: bool):
        super().__init__()
        wide = 3 * dim
        gate = Squeeze(wide) if squeeze else nn.Identity()
        self.branch = nn.Sequential(
            nn.Conv2d(dim, wide, 1, bias=False), norm_act(wide),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), norm_act(wide), gate,
            nn.Conv2d(wide, dim, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x + self.branch(x)


def anchor(block: Callable[..., nn.Module], norm_act: NormAct, in_chans: int, classes: int, dim: int) -> nn.Module:
    """Stem, block, a stride of 2, block, and a linear classifier on the pooled map."""
    return nn.Sequential(
        nn.Conv2d(in_chans, dim, 3, padding=1, bias=False), block(dim, norm_act),
        nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False), block(2 * dim, norm_act), norm_act(2 * dim),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * dim, classes),
    )  # fmt: skip


ANCHORS: dict[str, Callable[..., nn.Module]] = {
    "resnet": Residual,
    "mobilenetv2": partial(Inverted, squeeze=False),
    "efficientnet": partial(Inverted, squeeze=True),
}


def largest_gradient(
    model: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], steps: int = 100, rate: float = 0.1,
    limit: float = 1e8,
) -> float:  # fmt: skip
    """The norm of the loss's gradient after moving the convolutions' weights up that norm; stops beyond `limit`.

    A step has `rate` times the length of the weights. Infinite where something is not a number.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    largest = 0.0
    for _ in range(steps):
        slopes = torch.autograd.grad(F.cross_entropy(model(x), y), weights, create_graph=True, allow_unused=True)
        norm = torch.stack([slope.square().sum() for slope in slopes if slope is not None]).sum().sqrt()
        largest = max(largest, float(norm.detach())) if norm.isfinite() else float("inf")
        if largest > limit or not norm.requires_grad:
            break
        up = torch.autograd.grad(norm, weights, allow_unused=True)
        length = torch.stack([u.square().sum() for u in up if u is not None]).sum().sqrt()
        if not length.isfinite():
            return float("inf")
        size = torch.stack([w.detach().square().sum() for w in weights]).sum().sqrt()
        with torch.no_grad():
            for weight, u in zip(weights, up, strict=True):
                if u is not None:
                    weight.add_(u, alpha=float(rate * size / length.clamp_min(1e-12)))
    return largest


@dataclass
class Judge:
    """Scores a graph, or says why it is thrown away.

    Args:
        fit: trains a network for the proxy steps and gives its accuracy in percent.
        x, y: a batch on which stability is tested.
        floor: percent that every anchor must reach; limit: of the gradient's norm.
    """

    fit: Fit
    x: Tensor
    y: Tensor
    classes: int
    dim: int = 8
    floor: float = 20.0
    limit: float = 1e8
    ascent: int = 100
    seed: int = 0

    def build(self, name: str, graph: Graph) -> nn.Module:
        """An anchor with this layer, from the judge's seed."""
        torch.manual_seed(self.seed)
        return anchor(ANCHORS[name], partial(GraphNorm, graph), self.x.shape[1], self.classes, self.dim)

    def __call__(self, graph: Graph) -> "tuple[str, tuple[float, ...]]":
        """("", accuracies), or ("quality" or "stability", what was measured until then)."""
        scores: list[float] = []
        if not graph.reads_input():
            return "quality", ()
        for name in ANCHORS:
            scores.append(self.fit(self.build(name, graph)))
            if scores[-1] < self.floor:
                return "quality", tuple(scores)
        worst = largest_gradient(self.build("resnet", graph).train(), self.x, self.y, self.ascent, limit=self.limit)
        return ("stability" if worst > self.limit else ""), tuple(scores)


@dataclass
class Individual:
    """A graph and its accuracies on the anchors."""

    graph: Graph
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


def pareto_front(members: Sequence[Individual]) -> list[Individual]:
    """Those that no other beats on one anchor without being worse on another."""

    def dominated(a: Individual) -> bool:
        return any(
            all(q >= p for p, q in zip(a.scores, b.scores, strict=True)) and b.scores != a.scores for b in members
        )

    return [a for a in members if not dominated(a)]


@dataclass
class Search:
    """Evolution of norm-activation layers.

    Args:
        judge: Graph -> (why it is rejected or "", its scores).
        population: survivors that live at a time (2500 in the paper, where 20,000 candidates are tried).
        tournament: share of the population that a parent is drawn from.
        initial: survivors of random graphs before mutation begins.
        file: where the state is kept; an existing one is taken up. Raises BadInput where it cannot be.
    """

    judge: Callable[[Graph], tuple[str, tuple[float, ...]]]
    population: int = 2500
    tournament: float = 0.05
    initial: int = 100
    seed: int = 0
    file: Path | None = None
    members: deque[Individual] = field(default_factory=deque, init=False)
    history: list[dict[str, Any]] = field(default_factory=list, init=False)
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        if self.file is not None and self.file.is_file():
            self._load()

    def run(self, candidates: int) -> Individual | None:
        """Goes on until `candidates` graphs have been judged in all; returns the best survivor by mean score."""
        while len(self.history) < candidates:
            self.step()
        return max(self.survivors(), key=lambda member: member.mean, default=None)

    def survivors(self, random_only: bool = False) -> list[Individual]:
        """Everything that passed both tests so far, or what of it was not bred."""
        passed = [r for r in self.history if not r["rejected"] and (r["random"] or not random_only)]
        return [Individual(_graph(r["graph"]), tuple(r["scores"])) for r in passed]

    def step(self) -> None:
        """Judges one more graph: a random one, or a child once there are enough survivors."""
        born = sum(not record["rejected"] for record in self.history if record["random"])
        fresh = born < self.initial
        graph = random_graph(self.draw) if fresh else mutate(self.parent().graph, self.draw)
        rejected, scores = self.judge(graph)
        if not rejected:
            self.members.append(Individual(graph, scores))
            if len(self.members) > self.population:
                self.members.popleft()  # ageing: the oldest goes, not the worst
        self.history.append({"graph": graph.nodes, "random": fresh, "rejected": rejected, "scores": list(scores)})
        self._save()

    def parent(self) -> Individual:
        """One of the Pareto front of a random subset."""
        count = min(len(self.members), max(2, round(self.tournament * self.population)))
        return self.draw.choice(pareto_front(self.draw.sample(list(self.members), count)))

    def _save(self) -> None:
        if self.file is None:
            return
        version, internal, gauss = self.draw.getstate()
        state = {
            "settings": self._settings(), "draw": [version, list(internal), gauss], "history": self.history,
            "members": [asdict(m) for m in self.members],
        }  # fmt: skip
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(state), encoding="utf-8")
        part.replace(self.file)

    def _load(self) -> None:
        assert self.file is not None
        state = json.loads(self.file.read_text(encoding="utf-8"))
        if state["settings"] != self._settings():
            raise BadInput(
                f"the search in {self.file} was begun with {state['settings']}, not with {self._settings()}; "
                "name another file, or the same settings"
            )
        version, internal, gauss = state["draw"]
        self.draw.setstate((version, tuple(internal), gauss))
        self.history = state["history"]
        self.members = deque(Individual(_graph(m["graph"]), tuple(m["scores"])) for m in state["members"])

    def _settings(self) -> dict[str, Any]:
        names = ("population", "tournament", "initial", "seed")
        return {name: getattr(self, name) for name in names}


def _graph(nodes: Any) -> Graph:
    """A graph from what JSON makes of it: its nodes, or the tuple that holds them."""
    nodes = nodes[0] if len(nodes) == 1 else nodes
    return Graph(tuple(Node(op, tuple(inputs)) for op, inputs in nodes))
