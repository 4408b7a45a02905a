"""Importance: how much each weight matters, one small function per idea. Pruners remove what matters least.

Every function takes a network, the masks of its prunable weights (1 alive, 0 pruned) and a batch, and gives scores of
the weights' shapes; they are compared over all layers. Networks may be any that end in class scores.

    magnitude   |w|                                          (Han et al. 2015, arXiv:1506.02626)
    gradient    |w dL/dw|                                    (Blalock et al. 2020, arXiv:2003.03033, "global gradient")
    lamp        w^2 / sum of the layer's squares not below   (Lee et al. 2021, arXiv:2010.07611, eq. 3)
    lookahead   |w| |W_before[to it]| |W_after[from it]|     (Park et al. 2020, arXiv:2002.04809, eq. 4)
    synflow     |w dR/dw|, R = 1^T prod |W| 1                (Tanaka et al. 2020, arXiv:2006.05467, eq. 2)
"""

from collections.abc import Callable, Mapping
from copy import deepcopy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.compress.quantiser import is_plain, weight_of
from opsin.errors import UnknownName
from opsin.tasks.outputs import TensorOutput, scores

Masks = Mapping[str, Tensor]  # name of the layer to 1 (alive) or 0 (pruned) for each of its weights
Batch = tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]
Importance = Callable[[nn.Module, Masks, Batch], dict[str, Tensor]]
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name, in order. Biases and norms are no part of what is pruned."""
    return {name: module for name, module in model.named_modules() if is_plain(module)}


def magnitude(model: nn.Module, masks: Masks, batch: Batch) -> dict[str, Tensor]:
    return {name: weight_of(model.get_submodule(name)).detach().abs() for name in masks}


def gradient(model: nn.Module, masks: Masks, batch: Batch) -> dict[str, Tensor]:
    weights = [weight_of(model.get_submodule(name)) for name in masks]
    grads = torch.autograd.grad(F.cross_entropy(scores(model, batch[0]), batch[1]), weights)
    return {name: (w.detach() * g).abs() for name, w, g in zip(masks, weights, grads)}


def lamp(model: nn.Module, masks: Masks, batch: Batch) -> dict[str, Tensor]:
    found = {}
    for name, mask in masks.items():
        squares = (weight_of(model.get_submodule(name)).detach() * mask).square().double()
        ordered, order = squares.flatten().sort(descending=True, stable=True)
        share = ordered / ordered.cumsum(0).clamp_min(1e-300)
        found[name] = torch.empty_like(share).scatter(0, order, share).view(mask.shape)
    return found


def lookahead(model: nn.Module, masks: Masks, batch: Batch) -> dict[str, Tensor]:
    """Layers are neighbours where one takes as many channels (or whole maps of them) as the one before gives."""
    weights = [weight_of(model.get_submodule(name)).detach() * mask for name, mask in masks.items()]
    found = {}
    for i, name in enumerate(masks):
        score = weights[i].abs()
        if i > 0 and _follows(weights[i - 1], weights[i]):
            norms = weights[i - 1].flatten(1).norm(dim=1)
            sources = norms.repeat_interleave(weights[i].shape[1] // len(norms))
            score = score * sources.view(1, -1, *[1] * (score.ndim - 2))
        if i + 1 < len(weights) and _follows(weights[i], weights[i + 1]):
            after = weights[i + 1].unflatten(1, (len(weights[i]), -1)).transpose(0, 1)
            score = score * after.flatten(1).norm(dim=1).view(-1, *[1] * (score.ndim - 1))
        found[name] = score
    return found


def _follows(before: Tensor, after: Tensor) -> bool:
    return after.shape[1] % before.shape[0] == 0 and (after.ndim == 2 or after.shape[1] == before.shape[0])


def synflow(model: nn.Module, masks: Masks, batch: Batch) -> dict[str, Tensor]:
    net = path_network(model, {name: weight_of(model.get_submodule(name)).detach().abs() for name in masks})
    weights = [weight_of(net.get_submodule(name)) for name in masks]
    flow = TensorOutput(net)(torch.ones_like(batch[0][:1], dtype=torch.float64)).sum()
    grads = torch.autograd.grad(flow, weights)
    return {name: (w.detach() * g).abs() for name, w, g in zip(masks, weights, grads)}


def path_network(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy in double precision with other weights, no biases and no norms: what is left are sums over paths."""
    net = deepcopy(model).double().eval()
    for name, weight in weights.items():
        layer = net.get_submodule(name)
        layer.weight = nn.Parameter(weight.double())
        layer.register_parameter("bias", None)
    for name, module in tuple(net.named_modules()):
        if isinstance(module, NORMS) and name:
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, nn.Identity())
    return net


IMPORTANCES: dict[str, Importance] = {
    "magnitude": magnitude, "gradient": gradient, "lamp": lamp, "lookahead": lookahead, "synflow": synflow,
}  # fmt: skip


def importance_of(name: str) -> Importance:
    """By name. Raises UnknownName."""
    if name not in IMPORTANCES:
        raise UnknownName("importance", name, IMPORTANCES)
    return IMPORTANCES[name]


def least(found: Mapping[str, Tensor], alive: Masks, count: int) -> dict[str, Tensor]:
    """The alive weights with the `count` lowest scores over all layers, as masks of booleans; ties go by place.

    A score of infinity is never chosen.
    """
    flat = torch.cat([found[n].flatten().masked_fill(alive[n].flatten() == 0, torch.inf).double() for n in alive])
    order = flat.argsort(stable=True)[:count]
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[order] = flat[order] < torch.inf
    parts = chosen.split([alive[n].numel() for n in alive])
    return {name: part.view(alive[name].shape) for name, part in zip(alive, parts)}
