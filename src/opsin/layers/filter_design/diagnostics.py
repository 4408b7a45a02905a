"""What a network's filters are like: how signals and gradients fare in every layer, and how filters differ.

`diagnose(model, batch)` reports for each convolution and linear layer, on one batch and without changing anything:
the deviation of its output and of the gradient there, the share of dead channels (never above 0, behind the norm where
one follows), and of its weights the spectral entropy, the sparsity, the share of duplicates and the effective rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.filter_design.initialisers import layers_of
from opsin.layers.readers import sole_readers

Weight = Float[Tensor, "m c *k"]
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def spectral_entropy(weight: Weight) -> float:
    """Mean over the filters of the entropy of their power spectrum over its greatest, 0 for a wave and 1 for noise.

    NaN where the kernel has one tap.
    """
    axes = tuple(range(2, weight.ndim))
    if not axes or weight.shape[2:].numel() == 1:
        return float("nan")
    power = torch.fft.fftn(weight.float(), dim=axes).abs().square().sum(1).flatten(1)
    share = power / power.sum(1, keepdim=True).clamp(min=1e-30)
    return float(torch.special.entr(share).sum(1).mean() / torch.tensor(float(share.shape[1])).log())


def sparsity(weight: Weight, threshold: float = 0.01) -> float:
    """Share of weights below `threshold` times the largest."""
    return float((weight.abs() <= threshold * weight.abs().max()).float().mean())


def duplicate_rate(weight: Weight, cosine: float = 0.95) -> float:
    """Share of filters that resemble an earlier one, or its negative, with a cosine above `cosine`."""
    filters = F.normalize(weight.float().flatten(1), dim=1)
    alike = (filters @ filters.T).abs().tril(-1) > cosine
    return float(alike.any(1).float().mean())


def effective_rank(weight: Weight) -> float:
    """exp of the entropy of the normalised singular values of the C_out x (C_in k k) matrix (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals(weight.float().flatten(1))
    share = values / values.sum().clamp(min=1e-30)
    return float(torch.special.entr(share).sum().exp()) if values.any() else 0.0


MEASURES: dict[str, Callable[[Tensor], float]] = {
    "spectral_entropy": spectral_entropy, "sparsity": sparsity, "duplicate_rate": duplicate_rate,
    "effective_rank": effective_rank,
}  # fmt: skip


class LayerReport(NamedTuple):
    """One layer. activation and gradient are deviations of the output and of the loss's gradient there; dead is the
    share of output channels that are at most 0 for the whole batch, behind the norm where one alone reads them."""

    name: str
    shape: tuple[int, ...]
    activation: float
    gradient: float
    dead: float
    spectral_entropy: float
    sparsity: float
    duplicate_rate: float
    effective_rank: float


def diagnose(
    model: nn.Module, batch: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"] | None = None
) -> list[LayerReport]:
    """A report per layer, in the order of the forward pass; a layer that is used twice is reported for its last use.

    The loss is cross-entropy with labels, else a random projection of the output. The model is used in the mode that
    it is in; its gradients and running statistics stay as they are. Raises BadInput where the network has no layers.
    """
    names = {layer: name for name, layer in model.named_modules() if layer in set(layers_of(model))}
    if not names:
        raise BadInput(f"{type(model).__name__} has no convolutions and no linear layers")
    norms = norms_behind(model)
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs.pop(module, None)
        outputs[module] = output
        return output.clone()  # which the next module may change in place

    handles = [module.register_forward_hook(keep) for module in {**names, **dict.fromkeys(norms.values())}]
    try:
        with torch.enable_grad():
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            y = torch.func.functional_call(model, buffers, (batch.detach().clone().requires_grad_(),))
            random = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
            loss = (y * random).sum() / len(batch) if labels is None else F.cross_entropy(y, labels)
        met = {layer: output for layer, output in outputs.items() if layer in names}
        gradients = torch.autograd.grad(loss, list(met.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return [
        report(names[m], m.weight.detach(), output, outputs[norms.get(m, m)], gradient)
        for (m, output), gradient in zip(met.items(), gradients, strict=True)
    ]


def norms_behind(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The norm that alone reads a layer's output, by layer."""
    layers = set(layers_of(model))
    pairs = sole_readers(model, layers.__contains__, lambda m: isinstance(m, NORMS))
    return {model.get_submodule(layer): model.get_submodule(norm) for layer, norm in pairs}


def report(name: str, weight: Tensor, output: Tensor, passed_on: Tensor, gradient: Tensor | None) -> LayerReport:
    axis = 1 if weight.ndim > 2 else output.ndim - 1
    channels = passed_on.detach().movedim(axis, 0).flatten(1)
    values = {measure: function(weight) for measure, function in MEASURES.items()}
    deviation = 0.0 if gradient is None else float(gradient.std())
    dead = float((channels.amax(1) <= 0).float().mean())
    return LayerReport(name, tuple(weight.shape), float(output.detach().std()), deviation, dead, **values)


def table(reports: list[LayerReport]) -> str:
    """The reports in aligned columns, one layer per line."""
    rows = [
        LayerReport._fields,
        *([r.name, "x".join(map(str, r.shape)), *(f"{v:.3g}" for v in r[2:])] for r in reports),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
