"""Adam for parameters that are points of the Poincare ball (Becigneul and Ganea 2019, 1810.00760).

The gradient is rescaled to the ball's metric, the second moment is that of its length (one number per point), the step
follows a geodesic, and the first moment is carried along it. Plain tensors among the parameters get plain Adam.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from opsin.layers.poincare import conformal, exp_map, square_norm, transport


class BallParameter(nn.Parameter):
    """A parameter whose last axis is a point of the ball of curvature -c; copies and saved ones stay on their ball."""

    curvature: float

    def __new__(cls, data: Tensor, curvature: float = 0.1, requires_grad: bool = True) -> "BallParameter":
        point = super().__new__(cls, data, requires_grad)
        point.curvature = curvature
        return point

    def __deepcopy__(self, memo: dict[int, Any]) -> "BallParameter":
        return BallParameter(self.detach().clone(), self.curvature, self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return BallParameter, (self.detach(), self.curvature, self.requires_grad)


torch.serialization.add_safe_globals([BallParameter])  # torch.load reads it without weights_only=False


class RiemannianAdam(torch.optim.Optimizer):
    """Adam on the ball for every `BallParameter`, Adam elsewhere. weight_decay is added to the gradient."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0,
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: nn.Parameter, group: dict) -> None:
        c = p.curvature if isinstance(p, BallParameter) else None
        grad = p.grad + group["weight_decay"] * p
        if c is None:
            square = grad.square()
        else:
            lam = conformal(p, c)
            grad = grad / lam.square()
            square = lam.square() * square_norm(grad, -1)
        state = self.state[p]
        if not state:
            state.update(step=0, first=torch.zeros_like(grad), second=torch.zeros_like(square))
        state["step"] += 1
        (one, two), first, second = group["betas"], state["first"], state["second"]
        first.lerp_(grad, 1 - one)
        second.lerp_(square, 1 - two)
        size = (second / (1 - two ** state["step"])).sqrt() + group["eps"]
        move = -group["lr"] / (1 - one ** state["step"]) * first / size
        if c is None:
            p.add_(move)
            return
        goal = exp_map(p.detach(), move, c)
        first.copy_(transport(p, goal, first, c))
        p.copy_(goal)
