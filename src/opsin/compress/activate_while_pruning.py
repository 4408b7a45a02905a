"""AP: while a network is pruned, a part of each round removes weights that keep ReLUs from firing.

Liu et al. 2022, "AP: Selective Activation for De-sparsifying Pruned Neural Networks", arXiv:2212.06145. Pruned networks
have many ReLUs that are 0 for an input although paths lead to them, and the share hardly falls with training. AP is an
add-on to an iterative pruner. One round, of rate p of the weights that are left, with AP's share q of it (section 4):

    1. train from the first weights w0, masked; remember the weights at the start of this training
    2. the host method removes p - q (`opsin.compress.importance`)
    3. of the NEGATIVE weights that are left, the q that moved least in this training go: a node wakes up
       where negative inputs go, and what hardly moved is hardly missed
    4. the weights that are left go back to w0; next round

What is pruned is never used again. Weights of convolutions and linear layers are pruned, biases and norms are not (the
official code also masks the norms' gains, and takes every weight that happens to be 0 for a pruned one).
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from opsin.compress import Budget, Compressed, Report
from opsin.compress.dead_neurons import dead_rates
from opsin.compress.importance import Batch, importance_of, least, prunable
from opsin.compress.measured import accuracy, measured
from opsin.compress.quantiser import weight_of
from opsin.compress.sparse import SparseLayer, place_bytes
from opsin.data import Data
from opsin.data.batches import collate
from opsin.errors import BadInput
from opsin.layers.device import device_of
from opsin.tasks.outputs import scores

HOSTS = ("magnitude", "gradient", "lamp", "lookahead", "synflow")
VARIANTS = {f"ap_{host}": dict(host=host) for host in HOSTS} | {
    "ap_resnet20_cifar10": dict(
        epochs=50, lr=0.1, weight_decay=5e-4, batch_size=64, rate=0.2, share=0.02, warmup=20000
    ),
}
SAMPLES = 256  # images for importances and for the meter
Choose = Callable[[Tensor, Tensor], Tensor]  # weights now and at the start of the round to a score; infinity: never


def small_moving_negative(weight: Tensor, start: Tensor) -> Tensor:
    """AP's choice: how far a negative weight moved in the round; others never."""
    return (weight - start).abs().masked_fill(weight >= 0, torch.inf)


class ActivateWhilePruning:
    """Iterative pruning by a host method and AP, every round from the weights that come in.

    Args:
        host: "magnitude", "gradient", "lamp", "lookahead" or "synflow". rate, share: p and q of the remaining weights;
            share 0 is the host alone. first_ap_round: rounds before it are the host's alone.
        sparsity: of the prunable weights at the end, where the budget says nothing.
        epochs, batch_size, lr, momentum, weight_decay, warmup (steps): of each round's SGD; the rate falls to a tenth
            at a half and at 64 % of the epochs.
        choose: what AP removes first.
    """

    def __init__(
        self, host: str = "magnitude", rate: float = 0.2, share: float = 0.02, sparsity: float = 0.9, epochs: int = 10,
        batch_size: int = 64, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 5e-4, warmup: int = 0,
        first_ap_round: int = 0, choose: Choose = small_moving_negative, seed: int = 0,
    ):  # fmt: skip
        if not 0 <= share <= rate < 1 or rate == 0 or not 0 <= sparsity < 1:
            raise BadInput(f"0 <= share <= rate < 1 and 0 <= sparsity < 1, not {share}, {rate} and {sparsity}")
        self.importance, self.rate, self.share, self.sparsity = importance_of(host), rate, share, sparsity
        self.epochs, self.batch_size, self.lr, self.momentum = epochs, batch_size, lr, momentum
        self.weight_decay, self.warmup, self.first_ap_round = weight_decay, warmup, first_ap_round
        self.choose, self.seed = choose, seed

    def __call__(self, model: nn.Module, data: Data | None = None, budget: Budget = Budget()) -> Compressed:  # noqa: B008
        """A pruned copy, trained. Raises BadInput: no labelled data, or a budget that pruning cannot meet."""
        if data is None or data.task != "classify":
            raise BadInput("pruning by rounds of training needs labelled images; pass a classification data set")
        example = sample(data, 1, device_of(model))[0]
        model = deepcopy(model).eval().requires_grad_(True)
        before, score_before = measured(model, example), accuracy(model, data)
        masks, rounds = self.prune(model, data, weights_within(budget, model, before, self.sparsity))
        for name, mask in masks.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, SparseLayer(model.get_submodule(name), mask))
        model.eval()
        report = Report(
            before, measured(model, example), budget, score_before, accuracy(model, data),
            details={"rounds": rounds, "density": {n: float(m.mean()) for n, m in masks.items()}},
        )  # fmt: skip
        if not report.met:
            missed = {k: v for k, v in vars(budget).items() if v is not None and report.after[k] > v}
            raise BadInput(f"pruning weights cannot meet the budget {missed}: it reached {report.after}")
        return Compressed(model, report, example)

    def prune(self, model: nn.Module, data: Data, keep: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Rounds in place until `keep` weights are left and trained. The masks, and what each round did."""
        first = deepcopy(model.state_dict())
        layers = prunable(model)
        masks = {name: torch.ones_like(weight_of(layer)) for name, layer in layers.items()}
        batch = sample(data, SAMPLES, device_of(model))
        rounds: list[dict[str, Any]] = []
        while True:
            model.load_state_dict(first)
            apply_masks(layers, masks)
            start = {name: weight_of(layer).detach().clone() for name, layer in layers.items()}
            self.train(model, layers, masks, data, len(rounds))
            alive = sum(int(mask.sum()) for mask in masks.values())
            rates = dead_rates(model, batch[0]) if has_relu(model) else None
            rounds.append({"alive": alive, "host": 0, "ap": 0, "dead": vars(rates) if rates else None})
            if alive <= keep:
                return masks, rounds
            remove = min(alive - keep, max(1, round(self.rate * alive)))
            rounds[-1] |= self.remove(model, layers, masks, start, batch, remove, len(rounds) - 1)

    def remove(
        self, model: nn.Module, layers: dict[str, nn.Module], masks: dict[str, Tensor], start: dict[str, Tensor],
        batch: Batch, count: int, number: int,
    ) -> dict[str, int]:  # fmt: skip
        """Takes `count` weights out of the masks, AP's part of them where there are enough negative ones."""
        wanted = round(count * self.share / self.rate) if number >= self.first_ap_round else 0
        self._take(self.importance(model, masks, batch), masks, count - wanted)
        moved = {name: self.choose(weight_of(layer).detach(), start[name]) for name, layer in layers.items()}
        woken = self._take(moved, masks, wanted)
        if woken < wanted:
            self._take(self.importance(model, masks, batch), masks, wanted - woken)
        return {"host": count - woken, "ap": woken}

    def _take(self, found: dict[str, Tensor], masks: dict[str, Tensor], count: int) -> int:
        """Prunes the `count` weights that are least by these scores, and says how many there were."""
        chosen = least(found, masks, count)
        for name, mask in masks.items():
            mask[chosen[name]] = 0
        return sum(int(part.sum()) for part in chosen.values())

    def train(
        self, model: nn.Module, layers: dict[str, nn.Module], masks: dict[str, Tensor], data: Data, number: int
    ) -> None:
        """SGD on the weights that are left; the order of the images depends on the seed and the round alone."""
        optimiser = torch.optim.SGD(
            model.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )  # fmt: skip
        torch.manual_seed(self.seed * 1009 + number)
        model.train()
        step = 0
        for epoch in range(self.epochs):
            decay = 0.1 ** sum(epoch >= round(self.epochs * part) for part in (0.5, 0.64))
            for images, labels in batches(data, self.batch_size, device_of(model)):
                step += 1
                for group in optimiser.param_groups:
                    group["lr"] = self.lr * decay * min(1.0, step / max(self.warmup, 1))
                optimiser.zero_grad(set_to_none=True)
                F.cross_entropy(scores(model, images), labels).backward()
                for name, layer in layers.items():
                    grad = weight_of(layer).grad
                    if grad is not None:
                        grad.mul_(masks[name])
                optimiser.step()
                apply_masks(layers, masks)
        model.eval()


def batches(data: Data, size: int, device: torch.device | str) -> Iterator[Batch]:
    """One epoch over the training split in an order from torch's generator; no batch of one sample, for batch norms."""
    drop = len(data.train) % size == 1 and len(data.train) > 1
    loader: DataLoader[Any] = DataLoader(
        data.train, size, shuffle=True, drop_last=drop, collate_fn=collate("classify")  # type: ignore[arg-type]
    )  # fmt: skip
    for images, labels in loader:
        yield images.to(device), labels.to(device)


def sample(data: Data, count: int, device: torch.device | str = "cpu") -> Batch:
    """The first images of the training split."""
    images, labels = collate("classify")([data.train[i] for i in range(min(count, len(data.train)))])
    return images.to(device), labels.to(device)


@torch.no_grad()
def apply_masks(layers: dict[str, nn.Module], masks: dict[str, Tensor]) -> None:
    """Pruned weights to zero, in place."""
    for name, layer in layers.items():
        weight_of(layer).mul_(masks[name])


def has_relu(model: nn.Module) -> bool:
    """Whether a ReLU module is in it: then the report has the rate of dead ones."""
    return any(isinstance(module, nn.ReLU | nn.ReLU6) for module in model.modules())


def weights_within(budget: Budget, model: nn.Module, before: dict[str, float], sparsity: float) -> int:
    """How many prunable weights may stay. Raises BadInput for bounds that pruning does not move, or too tight ones."""
    weights = [weight_of(layer) for layer in prunable(model).values()]
    total = sum(weight.numel() for weight in weights)
    limits = []
    if budget.params is not None:
        limits.append(budget.params - (int(before["params"]) - total))
    if budget.bytes is not None:
        size = weights[0].element_size()
        fixed = int(before["bytes"]) - size * total + sum(place_bytes(weight) for weight in weights)
        limits.append((budget.bytes - fixed) // size)
    if not limits:
        limits.append(round(total * (1 - sparsity)))
    if min(limits) < 1:
        raise BadInput(f"the budget {budget.params or budget.bytes} leaves no weights after biases, norms and places")
    return min(total, *limits)
