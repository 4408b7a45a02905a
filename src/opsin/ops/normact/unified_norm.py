"""Unified normalization: batch statistics that a transformer can live with, and that cost nothing at inference.

Yang et al. 2022, "Unified Normalization for Accelerating and Stabilizing Transformers", arXiv:2208.01313. Every channel
is divided by the root of its second moment over all tokens of the batch; nothing is centred. Tokens' statistics jump
between batches, so the moment is smoothed over the last M batches by a geometric mean, and what goes back through the
statistics by a moving average (section 3.2):

    m_t = mean of x^2,   v_t = (m_t m_{t-1} ... m_{t-M+1})^(1/M),   z = x / sqrt(v_t + eps),   y = gamma z + beta
    dL/dx = (g - c z) / sqrt(v_t + eps),   g = r gamma dL/dy,   c = average of mean(g z),   r = sqrt(v_t / running)

A batch whose moments leave the others behind (arithmetic less geometric mean beyond a threshold, section 3.3) goes
without smoothing, and stays out of the windows. The running moment takes it in all the same, as in the official code:
one batch of 100 times the contrast makes it a thousand times as large, and inference gives far too small values until
about a hundred steps later. At inference y is an affine map per channel with the running moment, which the Linear or
1x1 convolution behind it swallows. Names of parameters and buffers follow the official repository.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opsin.errors import BadInput
from opsin.layers.affine import ChannelAffine, channel_affine
from opsin.layers.norm import LayerNorm2d

LIMIT = 5.0  # of the ratio r and of its inverse


class UnifiedNorm(nn.Module):
    """Tokens (N, T, C), or any shape with channels last, and maps (N, C, H, W) -> the same shape.

    Args:
        dim: channels.
        window: M, batches that are smoothed over; one number, or (forward, backward). 1 is plain batch statistics.
        warmup: steps before smoothing begins (4000 in the paper).
        outlier_filtration: whether outlying batches go without smoothing (images: on, text: off); they enter the
            running moment either way.
        momentum: what the running moment and the gradient's average keep per step.
        scale_warmup: steps before r may differ from 1.
        channels_last: the channels of a four-dimensional input are in its last axis.
    Raises BadInput for a window below 1, and where a padding mask does not fit.
    """

    def __init__(
        self, dim: int, window: int | tuple[int, int] = 4, warmup: int = 4000, outlier_filtration: bool = True,
        eps: float = 1e-5, momentum: float = 0.9, scale_warmup: int = 1000, channels_last: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.windows = (window, window) if isinstance(window, int) else tuple(window)
        if len(self.windows) != 2 or min(self.windows) < 1:
            raise BadInput(f"window={window} is not possible; take a number of batches from 1, or (forward, backward)")
        self.dim, self.warmup, self.outlier_filtration = dim, warmup, outlier_filtration
        self.eps, self.momentum, self.channels_last = eps, momentum, channels_last
        self.scale_warmup = max(scale_warmup, warmup)
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("ema_gz", torch.zeros(dim))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.long))
        self.register_buffer("buffer_x2", torch.zeros(self.windows[0], dim))
        self.register_buffer("buffer_gz", torch.zeros(self.windows[1], dim))
        self.register_buffer("skip_counter", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Float[Tensor, "n ..."], pad_mask: Bool[Tensor, "n t"] | None = None) -> Float[Tensor, "n ..."]:
        """pad_mask: True at tokens that are padding; they are normalised but do not count."""
        if not self.training:
            return channel_affine(x, self.gain(), self.bias, self.channels_last)
        tokens = x.movedim(1, -1) if x.ndim == 4 and not self.channels_last else x
        if pad_mask is not None and pad_mask.shape != tokens.shape[:-1]:
            raise BadInput(
                f"pad_mask has the shape {tuple(pad_mask.shape)} but the tokens have {tuple(tokens.shape[:-1])}; "
                "give one value per token"
            )
        y = _Normalise.apply(tokens, self.weight, self.bias, None if pad_mask is None else ~pad_mask, self)
        return y if tokens is x else y.movedim(-1, 1)

    def gain(self) -> Float[Tensor, " c"]:
        """What multiplies the channels at inference."""
        return self.weight * torch.rsqrt(self.running_var + self.eps)

    def fuse(self) -> ChannelAffine:
        """The inference form on its own; `deploy.fuse` folds it into the layer that reads it."""
        return ChannelAffine(self.gain(), self.bias, self.channels_last)

    def observe(self, moment: Float[Tensor, " c"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Takes in the moment of a batch. Returns v, r, whether the batch is skipped, and the step's number."""
        window = self.windows[0]
        moment, step = moment.to(self.running_var.dtype), self.iters.add_(1).clone()
        spread = self.buffer_x2.sqrt().var() if window > 1 else moment.new_zeros(())  # before the new entry
        filled = self.buffer_x2.index_copy(0, step % window, moment[None])
        geometric, late = filled.log().mean(0).exp(), self._late(step, window)
        outlier = ((filled.mean(0) - geometric) > window * spread).any() & late
        outlier = outlier if self.outlier_filtration and window > 1 else torch.zeros_like(late)
        self.buffer_x2.index_copy_(0, step % window, torch.where(outlier, self.running_var, moment)[None])
        self.skip_counter.add_(outlier)
        skipped = outlier if window > 1 else torch.ones_like(outlier)
        var = torch.where(late & ~skipped, geometric, moment)
        ratio = ((var + self.eps) / (self.running_var + self.eps)).sqrt().clamp(1 / LIMIT, LIMIT)
        ratio = torch.where((step > self.scale_warmup) & ~skipped, ratio, torch.ones_like(ratio))
        self.running_var.lerp_(var, 1 - self.momentum)
        return var, ratio, skipped, step

    def observe_gradient(
        self, gz: Float[Tensor, " c"], skipped: Bool[Tensor, "1"], step: Int[Tensor, "1"]
    ) -> Float[Tensor, " c"]:
        """Takes in mean(g z) of a batch. Returns c, what goes back through the statistics."""
        window = self.windows[1]
        gz = gz.to(self.ema_gz.dtype)
        self.buffer_gz.index_copy_(0, step % window, torch.where(skipped, self.ema_gz, gz)[None])
        smooth = torch.where(self._late(step, window) & ~skipped, self.buffer_gz.mean(0), gz)
        self.ema_gz.lerp_(smooth, 1 - self.momentum)
        return torch.where(skipped, smooth, self.ema_gz)

    def _late(self, step: Int[Tensor, "1"], window: int) -> Bool[Tensor, "1"]:
        """Whether smoothing has begun; a buffer starts with zeros, so it must have been filled."""
        return (step >= self.warmup) & (step > window)

    def extra_repr(self) -> str:
        return f"{self.dim}, window={self.windows}, warmup={self.warmup}, outlier_filtration={self.outlier_filtration}"


class _Normalise(torch.autograd.Function):
    """x (..., c) with the smoothed statistics of a `UnifiedNorm`; only x is kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "... c"], weight: Float[Tensor, " c"], bias: Float[Tensor, " c"],
        valid: Bool[Tensor, "..."] | None, norm: UnifiedNorm,
    ) -> Float[Tensor, "... c"]:  # fmt: skip
        axes = tuple(range(x.ndim - 1))
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
        if valid is None:
            count = x.shape[:-1].numel()
            moment = squares.mean(axes)
        else:
            count = valid.sum().clamp_min(1)
            moment = (squares * valid[..., None]).sum(axes) / count
        var, ratio, skipped, step = norm.observe(moment)
        scale = torch.rsqrt(var + norm.eps)
        ctx.norm, ctx.count = norm, count
        ctx.save_for_backward(x, weight, scale, ratio, skipped, step, valid)
        return torch.addcmul(bias.to(x.dtype), x, (weight * scale).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "... c"]) -> tuple[Tensor | None, ...]:
        x, weight, scale, ratio, skipped, step, valid = ctx.saved_tensors
        axes = tuple(range(x.ndim - 1))
        product = (grad * x).sum(axes, dtype=scale.dtype)
        back = ctx.norm.observe_gradient(weight * ratio * scale * product / ctx.count, skipped, step)
        pull = (back * scale.square()).to(x.dtype)
        pull = pull if valid is None else pull * valid[..., None]
        grad_x = (grad * (weight * ratio * scale).to(x.dtype)).addcmul_(x, pull, value=-1)
        return grad_x, (ratio * scale * product).to(weight.dtype), grad.sum(axes).to(weight.dtype), None, None


def unify_norms(
    model: nn.Module, window: int = 4, warmup: int = 4000, outlier_filtration: bool = True, scale_warmup: int = 1000
) -> int:
    """Puts a `UnifiedNorm` in the place of every layer norm over the channels, in place; returns how many.

    Gains and offsets are taken over, eps is not (1e-5, as in the paper); the running moments are yet to be trained.
    Layer norms over several axes stay. Raises BadInput where the model is itself a layer norm.
    """
    if isinstance(model, nn.LayerNorm):
        raise BadInput("the model is itself a layer norm and cannot be replaced in place; build a UnifiedNorm instead")
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and len(m.normalized_shape) == 1]
    for name, norm in found:
        unified = UnifiedNorm(
            norm.normalized_shape[0], window, warmup, outlier_filtration, scale_warmup=scale_warmup,
            channels_last=not isinstance(norm, LayerNorm2d),
        )  # fmt: skip
        for ours, theirs in ((unified.weight, norm.weight), (unified.bias, norm.bias)):
            if theirs is None:
                ours.requires_grad_(False)
            else:
                ours.data = theirs.detach().clone()
        model.set_submodule(name, unified.to(unified.weight.device).train(norm.training))
    return len(found)
