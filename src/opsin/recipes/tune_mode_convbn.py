"""Tune mode: fine-tuning with frozen batch-norm statistics that are folded into the convolutions at every step.

You et al. 2023, "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv:2305.11624 (section 3). A convolution
with a batch norm behind it, y = BN(conv(x; w, b)), can run in four modes:

    Train   statistics of the batch
    Eval    running statistics; the convolution's output is kept for the gradient of gamma
    Deploy  w' = s w is computed once and becomes the parameter, s = gamma / sqrt(v + eps)
    Tune    w' = s w is computed at every step from w, gamma and beta, which stay the parameters

Tune gives what Eval gives, values and gradients. It keeps one map less per block but the folded weights w' more, so it
pays where maps are larger than weights: bytes kept for backward, Tune over Eval, are 2.61 for ResNet-18 on 1 image of
224 pixels, 1.33 on 8 of 128, 0.80 on 8 of 224 and 0.60 on 32 of 224; for MobileNetV2 0.77 on 1 and 0.66 on 32 of 224.
Deploy's gradient lacks the factor s: a step on w' is one on w scaled by 1 / s^2, channel by channel.
"""

import copy
from types import TracebackType
from typing import Any, Literal

from lightning import LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from opsin.errors import BadInput
from opsin.layers.conv_bn import fold_once, tune, untune
from opsin.recipes import Recipe

Mode = Literal["train", "eval", "deploy", "tune"]


def freeze_norms(model: nn.Module) -> None:
    """Puts every batch norm with running statistics into eval mode; the statistics stay as they are."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.eval()


class Tuned:
    """A model in Tune mode; `undo()`, or leaving the `with` block, brings back its forwards and its modes."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modes = [(module, module.training) for module in model.modules() if isinstance(module, _BatchNorm)]
        self.pairs = tune(model)
        freeze_norms(model)

    def undo(self) -> None:
        untune(self.model)
        for module, mode in self.modes:
            module.training = mode

    def __enter__(self) -> "Tuned":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def tune_mode(model: nn.Module) -> Tuned:
    """Freezes the batch norms and folds those that alone read a convolution into it, on the fly, in place.

    Works on any network: which norm reads which convolution is found by `torch.fx`, module by module where the whole
    forward cannot be traced. Where `model.train()` puts a norm back into training mode, its block is an ordinary one.
    """
    return Tuned(model)


def in_mode(model: nn.Module, mode: Mode) -> nn.Module:
    """A copy of the model in one of the paper's four modes, to compare them. Other layers are in training mode.

    Raises BadInput where the mode is none of the four.
    """
    model = copy.deepcopy(model).train()
    untune(model)
    if mode == "tune":
        tune_mode(model)
    elif mode == "deploy":
        fold_once(model)
        freeze_norms(model)
    elif mode == "eval":
        freeze_norms(model)
    elif mode != "train":
        raise BadInput(f"mode='{mode}' is none of train, eval, deploy and tune")
    return model


class TuneModeConvBN(Recipe):
    """Trains with all batch norms frozen, and those behind a convolution folded into it at every step.

    For networks with trained statistics. Raises BadInput at the start of a training where no batch norm follows a
    convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tuned: Tuned | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tuned = tune_mode(pl_module)
        if not self.tuned.pairs:
            self.undo()
            raise BadInput(
                "the recipe tune_mode_convbn found no batch norm that alone reads a convolution in this network; "
                "leave the recipe out, or take a network with Conv-BN blocks"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        freeze_norms(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.undo()

    def undo(self) -> None:
        if self.tuned is not None:
            self.tuned.undo()
            self.tuned = None
