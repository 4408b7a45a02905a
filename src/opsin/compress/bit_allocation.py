"""Which layer gets how many bits (ZeroQ, arXiv:2001.00281, section 3.2).

Layers are taken to act independently, so the cost of all layers is m evaluations each instead of m^L together:

    minimise sum_i Omega_i(k_i)  subject to  sum_i P_i k_i <= S,   Omega_i(k) = KL(M(x) || M with layer i at k bits)

Dynamic programming over the layers keeps, of all allocations, those that no other beats in both size and sensitivity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.compress.quantiser import channel_range, fake_quantise, weight_of
from opsin.errors import BadInput
from opsin.tasks.outputs import scores


@torch.no_grad()
def sensitivities(
    model: nn.Module, layers: Sequence[nn.Module], images: Float[Tensor, "n c h w"], choices: Sequence[int]
) -> Float[Tensor, "layers choices"]:
    """Omega_i(k): mean KL divergence of the predictions when one layer alone is quantised."""
    reference = F.log_softmax(scores(model, images), 1)
    omega = torch.empty(len(layers), len(choices))
    for i, layer in enumerate(layers):
        weight = weight_of(layer).data
        for j, bits in enumerate(choices):
            weight_of(layer).data = fake_quantise(weight, *channel_range(weight), bits)
            moved = F.log_softmax(scores(model, images), 1)
            omega[i, j] = F.kl_div(moved, reference, reduction="batchmean", log_target=True)
        weight_of(layer).data = weight
    return omega


@dataclass(frozen=True)
class Allocation:
    """Bits per layer, their size in bits, and the sum of their sensitivities."""

    bits: tuple[int, ...]
    size: int
    omega: float


def pareto_frontier(
    omega: Float[Tensor, "layers choices"], params: Sequence[int], choices: Sequence[int], most: int = 4096
) -> list[Allocation]:
    """The allocations that none beats in size and sensitivity, from small to large.

    most: points kept between layers; where there are more, they are thinned evenly, and the frontier is approximate.
    """
    size, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps = []
    for i, count in enumerate(params):
        grown = (size[:, None] + count * np.asarray(choices)).ravel()
        costs = (cost[:, None] + omega[i].double().numpy()).ravel()
        order = np.lexsort((costs, grown))
        best_before = np.concatenate(([np.inf], np.minimum.accumulate(costs[order])[:-1]))
        kept = order[costs[order] < best_before]
        if len(kept) > most:
            kept = kept[np.linspace(0, len(kept) - 1, most).round().astype(int)]
        size, cost = grown[kept], costs[kept]
        steps.append((kept // len(choices), kept % len(choices)))
    return [Allocation(_trace(steps, end, choices), int(size[end]), float(cost[end])) for end in range(len(size))]


def _trace(steps: list[tuple[np.ndarray, np.ndarray]], end: int, choices: Sequence[int]) -> tuple[int, ...]:
    """The choices on the way to one final point, from the first layer on."""
    bits = []
    for parent, choice in reversed(steps):
        bits.append(choices[choice[end]])
        end = parent[end]
    return tuple(reversed(bits))


def best_within(frontier: Sequence[Allocation], limit: float) -> Allocation:
    """The least sensitive allocation of at most `limit` bits. Raises BadInput where even the smallest is larger."""
    fitting = [point for point in frontier if point.size <= limit]
    if not fitting:
        raise BadInput(
            f"the budget leaves {limit / 8:.0f} bytes for weights, below the smallest possible "
            f"{frontier[0].size / 8:.0f}"
        )
    return min(fitting, key=lambda point: point.omega)
