"""AdamW with decay where it belongs, the cosine schedule, and the moving average of the weights."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from opsin.train.defaults import Plan

FINAL_LR = 0.01  # of the peak


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: decayed, and not. Vectors (biases, the scales of norms) and declared names are not decayed.

    A module declares names of its own parameters with `no_weight_decay`, an iterable or a method that gives one.
    """
    declared = set(_declared(model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    spared = [p for name, p in trained if p.ndim <= 1 or name in declared]
    ids = {id(p) for p in spared}
    decayed = [p for _, p in trained if id(p) not in ids]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _declared(model: nn.Module) -> Iterable[str]:
    for place, module in model.named_modules():
        names = getattr(module, "no_weight_decay", ())
        for name in names() if callable(names) else names:
            yield f"{place}.{name}" if place else name


def adamw(model: nn.Module, plan: Plan) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), in one kernel where PyTorch has it for the parameters."""
    parameters = list(model.parameters())
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(parameter_groups(model, plan.weight_decay), lr=plan.lr, fused=fused)


class WarmupCosine:
    """The factor of the learning rate at a step: a line up to 1, then half a cosine down to `FINAL_LR`."""

    def __init__(self, plan: Plan):
        self.warmup, self.steps = plan.warmup_steps, plan.steps

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


class MovingAverage:
    """average = decay * average + (1 - decay) * weights; integer buffers are copied."""

    def __init__(self, decay: float):
        self.decay = decay

    @torch.no_grad()
    def __call__(self, average: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int) -> None:
        if average[0].is_floating_point() or average[0].is_complex():
            torch._foreach_lerp_(list(average), list(weights), 1 - self.decay)
        else:
            torch._foreach_copy_(list(average), list(weights))


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that follows it, buffers too, at each `update_parameters`."""
    copy = AveragedModel(model, multi_avg_fn=MovingAverage(decay), use_buffers=True)
    return copy.requires_grad_(False)
