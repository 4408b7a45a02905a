"""Layer-wise relevance propagation (Bach et al. 2015), for any network that autograd can run through.

Relevance R of an activation a is carried as a multiplier m with R = a m. In that form the rules are modified gradients:

    LRP-0      y = W x + b:   R_x = x W^T (R_y / y)              =>  m_x = W^T m_y, the gradient itself
    epsilon    denominators y + eps sign(y)                     =>  m_x = W^T (m_y y / (y + eps sign(y)))
    z+         V = max(W, 0), z = V x                           =>  m_x = V^T (m_y y / z)
    ReLU       R_x = R_y                                        =>  m_x = m_y 1[x > 0], the gradient
    f(x)       R_x = R_y, any activation                        =>  m_x = m_y f(x) / x
    max pool   the winner takes all                             =>  the gradient
    sum        a + b: each by its share                         =>  m_a = m_b = m_y, the gradient

So every rule is a layer whose value is unchanged and whose backward is the rule; residual sums, reshapes and pooling
need nothing. Attention weights and the scale of a layer norm count as constants (Ali et al. 2022, arXiv:2202.07304).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.layers import LayerNorm2d
from opsin.layers.attention import Attention
from opsin.tasks.outputs import scores

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ACTIVATIONS = (nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Mish, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus)
Rule = Callable[[nn.Module, Tensor], Tensor]


def with_multiplier(carrier: Tensor, value: Tensor, denominator: Tensor) -> Tensor:
    """A tensor equal to `value` through which a multiplier flows as carrier * (value / denominator)."""
    through = carrier * (value / denominator).detach()
    return through + (value - through).detach()


def apply_with(module: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The linear or convolutional map of `module` with other weights."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    return module._conv_forward(x, weight, bias)  # type: ignore[operator, no-any-return]


def lrp_0(module: nn.Module, x: Tensor) -> Tensor:
    """R_x = x W^T (R_y / y)."""
    return apply_with(module, module.weight, module.bias, x)  # type: ignore[arg-type]


def ratio(module: nn.Module, x: Tensor) -> Tensor:
    """LRP-0 with the paper's denominator y + 1e-9, which does not protect negative y near zero."""
    y = lrp_0(module, x)
    return with_multiplier(y, y, y + 1e-9)


class Epsilon:
    """LRP-epsilon: denominators are kept away from zero, on their own side of it.

    eps is relative to the layer's root mean square output.
    """

    def __init__(self, eps: float = 1e-2):
        self.eps = eps

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        y = lrp_0(module, x)
        eps = self.eps * y.detach().square().mean().sqrt()
        return with_multiplier(y, y, y + eps * torch.where(y >= 0, 1.0, -1.0))


def z_plus(module: nn.Module, x: Tensor) -> Tensor:
    """Only positive weights carry relevance; biases take none."""
    y = lrp_0(module, x)
    z = apply_with(module, module.weight.clamp(min=0), None, x)  # type: ignore[operator, arg-type]
    return with_multiplier(z, y, z + 1e-9)


def activation(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Relevance passes an activation function unchanged: m_x = m_y f(x) / x."""
    safe = torch.where(x.abs() < 1e-6, 1e-6, x)
    return with_multiplier(x, forward(x), safe)


def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm with its standard deviation taken as a constant; over the channels of a map where it is a 2-d one."""
    if isinstance(module, LayerNorm2d):
        return _layer_norm(module, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return _layer_norm(module, x)


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    axes = tuple(range(-len(module.normalized_shape), 0))
    scale = (x.var(axes, keepdim=True, unbiased=False) + module.eps).rsqrt().detach()
    y = (x - x.mean(axes, keepdim=True)) * scale
    y = y * module.weight if module.weight is not None else y
    return y + module.bias if module.bias is not None else y


def attention(module: Attention, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Self-attention whose weights are constants: relevance flows through the values alone."""
    _, _, v = module.heads(x)
    return module.proj((module.attention_map(x, bias).detach() @ v).transpose(1, 2).flatten(2))


@contextmanager
def rules(model: nn.Module, conv: Rule, linear: Rule) -> Iterator[None]:
    """Within the block, backward through `model` propagates multipliers by the rules; values are unchanged."""
    with ExitStack() as stack:
        for module in model.modules():
            forward = _ruled(module, conv, linear)
            if forward is not None:
                had = module.__dict__.get("forward")
                module.forward = forward  # type: ignore[method-assign]
                stack.callback(_restore, module, had)
        yield


def _ruled(module: nn.Module, conv: Rule, linear: Rule) -> Callable[..., Tensor] | None:
    if isinstance(module, LINEAR):
        rule = linear if isinstance(module, nn.Linear) else conv
        return lambda x: rule(module, x)
    if isinstance(module, ACTIVATIONS):
        original = module.forward
        return lambda x: activation(module, original, x)
    if isinstance(module, nn.LayerNorm):
        return lambda x: layer_norm(module, x)
    if isinstance(module, Attention):
        return lambda x, bias=None: attention(module, x, bias)
    return None


def _restore(module: nn.Module, forward: Any) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward  # type: ignore[method-assign]


def relevance(
    model: nn.Module, image: Float[Tensor, "c h w"], target: int | None = None, *, conv: Rule | None = None,
    linear: Rule = z_plus,
) -> tuple[Float[Tensor, "c h w"], int]:  # fmt: skip
    """Relevance of every input value for one class score, and that class.

    The model is run in eval mode and left as it was. target: a class, or None for the predicted one. Relevance starts
    from the logit itself, so that it sums to the logit as far as biases and the rules' denominators allow. The rule for
    convolutions is `Epsilon()` unless another is given.
    """
    x = image.detach()[None].requires_grad_()
    was_training = model.training
    model.eval()
    try:
        with rules(model, conv or Epsilon(), linear), torch.enable_grad():
            logits = scores(model, x)
            chosen = int(logits[0].argmax()) if target is None else target
            (multiplier,) = torch.autograd.grad(logits[0, chosen], x)
    finally:
        model.train(was_training)
    return (x * multiplier)[0].detach(), chosen
