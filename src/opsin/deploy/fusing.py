"""Fusing for inference: branches that are linear at test time become one convolution.

Two rules. A module that declares `fuse()` knows how to re-parameterise itself: `fuse()` returns the equivalent module
(or changes itself in place and returns None). And a batch norm behind a convolution is an affine map of its output, so
it folds into the convolution's weights (`torch.nn.utils.fusion`):

    BN(W * x + b) = (g / s) W * x + (b - m) g / s + beta,    s = sqrt(var + eps)

Which batch norm follows which convolution is read from each module's own forward, traced one level deep: a parent whose
forward cannot be traced keeps its pairs, and everything below it is still looked at.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

NORMS: dict[type, type] = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}


def fuse(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode with everything fused that can be; the outputs stay within 1e-4."""
    holder = nn.ModuleDict({"model": copy.deepcopy(model).eval()})
    _reparameterise(holder)
    _fold_norms(holder)
    return holder["model"]


def _reparameterise(parent: nn.Module) -> None:
    """Asks every module that declares `fuse()`, outermost first; what a module returns replaces it."""
    for name, child in list(parent.named_children()):
        declared = getattr(child, "fuse", None)
        if callable(declared):
            fused = declared()
            if isinstance(fused, nn.Module) and fused is not child:
                parent.register_module(name, fused.eval())
                continue
        _reparameterise(child)


def _fold_norms(model: nn.Module) -> None:
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for parent in list(model.modules()):
        for conv_name, norm_name in _pairs(parent):
            conv, norm = parent.get_submodule(conv_name), cast(Any, parent.get_submodule(norm_name))
            if places[id(conv)] == places[id(norm)] == 1 and _foldable(conv, norm):
                parent.set_submodule(conv_name, fuse_conv_bn_eval(cast(Any, conv), norm))
                parent.set_submodule(norm_name, nn.Identity())


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    plain = type(conv) in NORMS and type(norm) is NORMS[type(conv)]
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (conv, norm))
    return plain and not hooked and getattr(norm, "running_mean", None) is not None


class _OneLevel(fx.Tracer):
    """Traces a forward with every submodule as one node."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _pairs(parent: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of (convolution, what alone reads its output) in the forward of `parent`, each called once."""
    if not any(type(child) in NORMS for child in parent.modules()):
        return
    try:
        graph: Any = _OneLevel().trace(parent)
    except Exception:  # control flow on values; `fx` raises whatever the forward does on a proxy
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    for norm in calls:
        conv = norm.args[0] if norm.args else None
        if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.users) > 1:
            continue
        if times[conv.target] == times[norm.target] == 1:
            yield str(conv.target), str(norm.target)
