"""`opsin.adapt`: fit a frozen network to new data through an adapter of a few kilobytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import opsin.data
from opsin.adapt import Adapter
from opsin.backbones import Backbone
from opsin.catalog import card_of, create
from opsin.data import Data
from opsin.deploy.source import open_model
from opsin.errors import BadInput
from opsin.train.fit import fit
from opsin.train.run import Run


@dataclass
class Adapted:
    """run: the training. model: the adapted network. file: the adapter alone, where the method can store it."""

    run: Run
    model: nn.Module
    file: Path | None


def adapt(
    method: str, model: nn.Module | str | Path, data: Data | str, *, budget: str | float | None = None,
    epochs: int | None = None, lr: float | None = None, seed: int = 0, out: str | Path = "runs/adapted",
    force: bool = False, progress: bool = True, **options: Any,
) -> Adapted:  # fmt: skip
    """Adapts a network to classified data; `options` go to the adapter (`bits=1, hidden=8`).

    model: a run's folder, a backbone, or a name. Its classifier is replaced by a fresh one for the data's classes.
    Raises BadInput where the method is no adapter or the network has no classifier called `head`.
    """
    if card_of(method).kind != "adapter":
        raise BadInput(f"'{method}' is not an adapter; `opsin list --kind adapter` shows them")
    adapter: Adapter = create(method, **options)
    source = opsin.data.open(data) if isinstance(data, str) else data
    network = with_new_head(backbone_of(open_model(model)[0]), len(source.classes))
    adapted = adapter.adapt(network)
    run = fit(
        adapted, source, "classify", budget=budget, epochs=epochs, lr=lr, seed=seed, out=out, force=force,
        progress=progress,
    )  # fmt: skip
    file = None
    if hasattr(adapter, "save") and getattr(adapter, "bits", 32) != 32:
        file = adapter.save(adapted, run.path / "adapter.bin")
    return Adapted(run, adapted, file)


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone itself, or the one inside a task model. Raises BadInput where there is none."""
    found = next((m for m in model.modules() if isinstance(m, Backbone)), None)
    if found is None:
        raise BadInput(f"{type(model).__name__} has no backbone in it to adapt")
    return found


def with_new_head(backbone: Backbone, num_classes: int) -> Backbone:
    """The backbone with a fresh linear classifier."""
    if not isinstance(getattr(backbone, "head", None), nn.Linear | nn.Identity):
        raise BadInput(f"the classifier of {type(backbone).__name__} is not one linear layer called `head`")
    backbone.head, backbone.num_classes = nn.Linear(backbone.num_features, num_classes), num_classes
    nn.init.trunc_normal_(backbone.head.weight, std=0.02)
    nn.init.zeros_(backbone.head.bias)
    return backbone
