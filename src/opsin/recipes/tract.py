"""TrAct as a recipe: the first layer's weights take the step that best realises a gradient step on its outputs.

Petersen et al. 2024, "TrAct: Making First-layer Pre-Activations Trainable", arXiv:2410.23970; the mathematics is in
`opsin.layers.tract`. Learning rate, optimiser and the rest of the network stay as they are, and so do the modules: the
layer that is applied first in the first forward pass gets a hook for the time of the training.
"""

from lightning import LightningModule, Trainer

from opsin.layers.tract import LAMBDA, FirstLayerHook
from opsin.recipes import Recipe

VARIANTS = {"tract_l0_05": dict(lam=0.05), "tract_l0_2": dict(lam=0.2)}


class TrAct(Recipe):
    """Args: lam, the penalty on the weights' change, in units of the inputs' variance (0.05 to 0.2)."""

    def __init__(self, lam: float = LAMBDA):
        super().__init__()
        self.lam = lam
        self.hook: FirstLayerHook | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hook = FirstLayerHook(pl_module, self.lam)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.detach()

    def detach(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.hook = None
