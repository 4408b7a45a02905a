"""Fusing for inference: branches that are linear at test time become one convolution.

Three rules. A module that declares `fuse()` knows how to re-parameterise itself: `fuse()` returns the equivalent module
(or changes itself in place and returns None). A module that declares `fold_into(reader)` can be absorbed by the module
that alone reads it: `fold_into` returns what takes the reader's place, or None. And a batch norm behind a convolution
is an affine map of its output, so it folds into the convolution's weights (`torch.nn.utils.fusion`):

    BN(W * x + b) = (g / s) W * x + (b - m) g / s + beta,    s = sqrt(var + eps)

Who reads whom is traced from the forwards (`opsin.layers.readers`): a forward that cannot be traced keeps its pairs,
and everything below it is still looked at.
"""

import copy
from typing import Any, cast

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from opsin.layers.readers import quiet, sole_readers

NORMS: dict[type, type] = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}


def fuse(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode with everything fused that can be; the outputs stay within 1e-4."""
    holder = nn.ModuleDict({"model": copy.deepcopy(model).eval()})
    _reparameterise(holder)
    _absorb(holder["model"])
    _fold_norms(holder["model"])
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


def _absorb(model: nn.Module) -> None:
    """Lets every module that declares `fold_into` vanish in its only reader, where that can take it."""
    for name, reader_name in sole_readers(model, lambda m: callable(getattr(m, "fold_into", None)), _is_layer):
        declared = cast(Any, model.get_submodule(name)).fold_into
        absorbed = declared(model.get_submodule(reader_name))
        if absorbed is not None:
            model.set_submodule(reader_name, absorbed.eval())
            model.set_submodule(name, nn.Identity())


def _fold_norms(model: nn.Module) -> None:
    for conv_name, norm_name in sole_readers(model, _is_conv, _is_norm):
        conv, norm = cast(Any, model.get_submodule(conv_name)), cast(Any, model.get_submodule(norm_name))
        if type(norm) is NORMS[type(conv)]:
            model.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
            model.set_submodule(norm_name, nn.Identity())


def _is_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is None and quiet(module)


def _is_conv(module: nn.Module) -> bool:
    return type(module) in NORMS and quiet(module)


def _is_norm(module: Any) -> bool:
    return type(module) in NORMS.values() and module.running_mean is not None and quiet(module)
