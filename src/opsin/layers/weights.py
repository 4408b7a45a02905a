"""Weights from files and hubs into systems."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opsin.errors import BadInput

HEADS = ("head.", "fc.", "classifier.")


def load_published(system: nn.Module, weights: str, card: Any, variant: Any) -> nn.Module:
    """Loads `"shipped"` or `"hub"` weights that a card names, or a file, through the `remap` of the system's module.

    Weights without a classifier (of pre-training) leave the system's own as it is. Raises BadInput where the card has
    no such weights, the file cannot be read, or the names do not match.
    """
    named = getattr(variant, "weights", None)
    if weights == "shipped":
        if not named or not (card.path.parent / named).is_file():
            raise BadInput(f"'{card.key}' has no weights that come with the package")
        path = card.path.parent / named
    elif weights == "hub":
        if not named or named.count("/") != 1 or (card.path.parent / named).is_file():
            raise BadInput(f"the card of '{card.key}' names no hub repository for this variant")
        path = _from_hub(named)
    else:
        path = Path(weights)
    state = read_state_dict(path)
    remap = getattr(import_module(type(system).__module__), "remap", None)
    state = remap(state) if remap else state
    heads = [name for name in system.state_dict() if name.startswith(HEADS)]
    if not any(name in state for name in heads):  # a backbone without its classifier: the fresh one stays
        state |= {name: system.state_dict()[name] for name in heads}
    try:
        system.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise BadInput(f"the weights {path} do not fit '{card.key}': {first}") from error
    return system


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch checkpoint with the usual wrappers taken off."""
    if not path.is_file():
        raise BadInput(f"there is no weights file '{path}'")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BadInput(f"the weights file '{path}' cannot be read: {error}") from error
    for wrapper in ("state_dict", "model", "model_state"):
        state = state[wrapper] if isinstance(state, dict) and isinstance(state.get(wrapper), dict) else state
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _from_hub(repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:
        raise BadInput(f"the weights of '{repository}' could not be fetched: {error}") from error
