"""The parametric multi-loss: the numbers that mix a network's kernels in a step also mix its objectives.

Maggioni et al. 2023, "Tunable Convolutions with Parametric Multi-Loss Optimization" (arXiv:2304.00898):

    L(w) = sum_i w_i lambda_i L_i(f(x; w), y)

w is drawn anew for every sample of every step, sometimes from the corners, so that the pure objectives are seen too;
lambda only brings the objectives to one scale.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from opsin.errors import BadInput, UnknownName
from opsin.ops.conv.tunable_conv import controlled

Objective = Callable[..., Float[Tensor, " n"]]  # (output, *targets) -> one loss per sample
SPACES = ("cube", "simplex")


def per_sample(distance: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Float[Tensor, " n"]]:
    """An objective from an elementwise distance such as `torch.nn.functional.mse_loss` (reduction "none")."""
    return lambda output, target: distance(output, target).flatten(1).mean(1)


class ParametricMultiLoss(nn.Module):
    """Draws controls, and mixes the objectives with them.

    Args:
        objectives: p functions (output, *targets) -> (n,). One that depends on the control itself (a target whose
            strength is set) has a parameter named `control`, and gets those of the samples, (n, p).
        space: "cube", w in [0, 1]^p, or "simplex", w >= 0 that sum to 1.
        corners: the part of the draws that lies on corners: of the cube all but 0, of the simplex the pure objectives.
    Raises BadInput (no objective, a part outside [0, 1]), UnknownName (space).
    """

    scales: Tensor

    def __init__(
        self, objectives: Sequence[Objective], space: Literal["cube", "simplex"] = "cube", corners: float = 0.25
    ):
        super().__init__()
        if not objectives:
            raise BadInput("a multi-loss needs at least one objective")
        if not 0 <= corners <= 1:
            raise BadInput(f"corners={corners} is not a part; take a number from 0 to 1")
        if space not in SPACES:
            raise UnknownName("space of controls", space, SPACES)
        self.objectives, self.space, self.corners = list(objectives), space, corners
        self.turned = [_has_control(objective) for objective in self.objectives]
        self.register_buffer("scales", torch.ones(len(self.objectives)))

    def draw(self, count: int, generator: Generator | None = None) -> Float[Tensor, "n p"]:
        """Controls for `count` samples."""
        size = len(self.objectives)
        inside = torch.rand(count, size, generator=generator)
        pure = torch.eye(size)[torch.randint(size, (count,), generator=generator)]
        if self.space == "simplex":
            inside = -inside.clamp_min(1e-12).log()  # exponential numbers over their sum lie evenly on the simplex
            inside, corner = inside / inside.sum(1, keepdim=True), pure
        else:
            corner = torch.maximum(pure, (torch.rand(count, size, generator=generator) < 0.5).float())
        at_corner = torch.rand(count, 1, generator=generator) < self.corners
        return torch.where(at_corner, corner, inside).to(self.scales.device)

    def values(
        self, output: Tensor, *targets: Tensor, control: Float[Tensor, "n p"] | None = None
    ) -> Float[Tensor, "n p"]:
        """Every objective of every sample, as it is. Raises BadInput: one needs the control, and there is none."""
        if control is None and any(self.turned):
            raise BadInput("an objective depends on the control; give control=")
        given = ({"control": control} if turned else {} for turned in self.turned)
        return torch.stack([objective(output, *targets, **how) for objective, how in zip(self.objectives, given)], 1)

    @torch.no_grad()
    def balance(self, output: Tensor, *targets: Tensor, control: Float[Tensor, "n p"] | None = None) -> None:
        """Sets lambda so that on these outputs all objectives are 1 on average. Raises BadInput where one is 0."""
        means = self.values(output, *targets, control=control).mean(0)
        if not (means > 0).all():
            raise BadInput(f"the objectives are {means.tolist()} here; scales need all of them above 0")
        self.scales.copy_(1 / means)

    def forward(self, output: Tensor, *targets: Tensor, control: Float[Tensor, "n p"]) -> Float[Tensor, ""]:
        """The mixed loss, averaged over samples."""
        return (control * self.scales * self.values(output, *targets, control=control)).sum(1).mean()

    def step(
        self, model: nn.Module, image: Tensor, *targets: Tensor, generator: Generator | None = None
    ) -> Float[Tensor, ""]:
        """One step's loss: the same fresh controls turn the tunable layers of `model` and mix the objectives."""
        control = self.draw(len(image), generator).to(image)
        with controlled(model, control):
            return self(model(image), *targets, control=control)


def _has_control(objective: Objective) -> bool:
    try:
        return "control" in signature(objective).parameters
    except ValueError:  # a builtin that tells nothing
        return False
