"""`opsin.explain`: why a model said what it said about an image."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from opsin.catalog import card_of, create
from opsin.data.images import read_image
from opsin.deploy.source import open_model
from opsin.errors import BadInput
from opsin.explain import Explainer, Explanation


def explainer_by_name(method: str) -> Explainer:
    """An explainer from the catalogue. Raises BadInput where the name is of another kind."""
    if card_of(method).kind != "explainer":
        raise BadInput(f"'{method}' is not an explainer; `opsin list --kind explainer` shows them")
    explainer: Explainer = create(method)
    return explainer


def explain(
    image: str | Path, model: nn.Module | str | Path, *, method: str = "salient_relevance", target: int | None = None,
    output: str | Path | None = None, force: bool = False,
) -> Explanation:  # fmt: skip
    """Explains one image file and writes the picture if `output` is given.

    model: a run's folder, a module, or a name of the catalogue. target: a class index; the predicted class by default.
    The image is resized to the size that the run was trained on. Raises BadInput.
    """
    explainer = explainer_by_name(method)
    if output and Path(output).exists() and not force:
        raise BadInput(f"'{output}' exists; use --force to replace it, or -o to write another file")
    network, facts = open_model(model)
    pixels = read_image(Path(image), channels=facts.channels if facts else 3)
    if facts and facts.size and tuple(pixels.shape[1:]) != tuple(facts.size):
        pixels = F.interpolate(pixels[None], size=facts.size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    classes = len(facts.classes) if facts else 0
    if target is not None and (target < 0 or (classes and target >= classes)):
        raise BadInput(f"there is no class {target}; the model has {classes} classes, counted from 0")
    with torch.enable_grad():
        explanation = explainer(network, pixels, target)
    if output:
        explanation.save(output)
    return explanation
