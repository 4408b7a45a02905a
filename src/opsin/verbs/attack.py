"""`opsin.attack`: how often a perturbed patch changes a model's mind."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import opsin.data
from opsin.catalog import card_of, create
from opsin.data import Data
from opsin.deploy.source import open_model
from opsin.errors import BadInput
from opsin.robust.attention_tools import AttentionTemperature
from opsin.robust.corruptions import Corrupt
from opsin.robust.vit_patch_robustness import PatchCorruption
from opsin.tasks.outputs import scores


@dataclass
class AttackReport:
    """Accuracy and fooling rates in percent, and the adversarial rate by position (rows x columns)."""

    images: int
    clean_accuracy: float
    adversarial: float
    natural: float
    map: Tensor


def attack(
    model: nn.Module | str, data: Data | str, *, method: str = "vit_patch_robustness", patch_size: int = 16,
    steps: int = 100, step_size: float = 2 / 255, limit: int = 20, temperature: float = 1.0,
    corruption: str = "gaussian_noise", severity: int = 5, seed: int = 0,
) -> AttackReport:  # fmt: skip
    """Attacks up to `limit` correctly classified test images at every position of the patch grid.

    model: a run's folder, a module (images in [0, 1]), or a name. temperature above 1 smooths attention (the defence).
    corruption, severity: what stands in the natural patches, one of ImageNet-C's.
    Raises BadInput where no image is classified correctly, or the data has no classes.
    """
    if card_of(method).kind != "attack":
        raise BadInput(f"'{method}' is not an attack; `opsin list --kind attack` shows them")
    corrupt = Corrupt(corruption, severity)
    network, _ = open_model(model)
    network.eval()
    source = opsin.data.open(data) if isinstance(data, str) else data
    if source.task != "classify":
        raise BadInput(f"attacks need data with classes; '{source.name}' is for the task {source.task}")
    torch.manual_seed(seed)
    defence = AttentionTemperature(temperature).apply(network) if temperature != 1 else nullcontext()
    with defence:
        images, accuracy = _rightly_classified(network, source, limit)
        adversarial = create(method, patch_size=patch_size, steps=steps, step_size=step_size).fooling(network, images)
        natural = PatchCorruption(corrupt, patch_size).fooling(network, images)
    return AttackReport(len(images), accuracy, 100 * adversarial.rate, 100 * natural.rate, adversarial.map)


@torch.no_grad()
def _rightly_classified(model: nn.Module, data: Data, limit: int) -> tuple[Tensor, float]:
    """Up to `limit` test images that the model gets right, and its accuracy in percent on those looked at."""
    right, seen = [], 0
    for i in range(len(data.test)):
        image, label = data.test[i]
        seen += 1
        if int(scores(model, image[None]).argmax()) == label:
            right.append(image)
            if len(right) == limit:
                break
    if not right:
        raise BadInput(f"the model classifies no test image of '{data.name}' correctly, so there is nothing to fool")
    return torch.stack(right), 100 * len(right) / seen
