"""From names to what is trained: the network, the recipes, and how both are written down."""

import inspect
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from importlib import import_module
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from opsin.catalog import card_of, create, entry, parse_spec
from opsin.data import Data
from opsin.errors import BadInput
from opsin.tasks import Task, TaskModel

NETWORKS = ("backbone", "classifier", "segmenter", "detector", "restorer", "dense", "pretrainer")


def build_network(spec: str, data: Data) -> nn.Module:
    """A network by name, told what the data asks for (classes, channels, image size) as far as it takes it.

    What the spec itself says comes first. Raises UnknownName, and BadInput where the name is no network.
    """
    name, options = parse_spec(spec)
    if name.startswith("timm:"):
        return create(spec, **{"num_classes": len(data.classes), "in_chans": data.channels} | options)
    card = card_of(name)
    if card.kind not in NETWORKS:
        hint = f"; use it inside a network, as in metanet_xt(mixer={name})" if card.mixer else ""
        raise BadInput(f"'{name}' is of the kind '{card.kind}', not a network that can be trained on a task{hint}")
    build = entry(card)
    takes = inspect.signature(build).parameters
    fixed = getattr(import_module(build.__module__), "VARIANTS", {}).get(name, {})
    asked = {k: v for k, v in _asked(data).items() if k in takes and k not in options and v}
    if "scale" in fixed:
        asked.pop("scale", None)
    return create(spec, **asked)


def _asked(data: Data) -> dict[str, Any]:
    size = data.size and (data.size[0] if data.size[0] == data.size[1] else data.size)
    return {
        "num_classes": len(data.classes), "in_chans": data.channels, "image_size": size,
        "scale": data.scale if data.task == "restore" else None,
    }  # fmt: skip


def build_task_model(network: nn.Module | str, task: Task, data: Data) -> TaskModel:
    """The network with the task's head and loss; a model of the task stays as it is."""
    return task.wrap(build_network(network, data) if isinstance(network, str) else network, data)


def build_recipes(recipes: Sequence[Callback | str]) -> list[Callback]:
    """Recipes by name or as they are. Raises BadInput: not a recipe, or one twice."""
    built = [create(recipe) if isinstance(recipe, str) else recipe for recipe in recipes]
    for given, recipe in zip(recipes, built, strict=True):
        if not isinstance(recipe, Callback):
            raise BadInput(f"'{given}' is not a recipe; `opsin list --kind recipe` shows what there is")
    keys = [recipe.state_key for recipe in built]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise BadInput(f"the recipe {twice} is given twice; give each recipe once")
    return built


def describe(thing: Any) -> str:
    """One line that is the same for two objects exactly if training treats them alike, as far as one can tell.

    A name stays a name; a network is told by its class, the names and shapes of its tensors, and what its frozen ones
    hold; a recipe by its class and its settings.
    """
    if isinstance(thing, str):
        return thing.strip()
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if isinstance(thing, nn.Module):
        shapes = [(name, tuple(tensor.shape)) for name, tensor in thing.state_dict().items()]
        digest = blake2b(repr(shapes).encode(), digest_size=6)
        for parameter in thing.parameters():
            if not parameter.requires_grad:
                digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return f"{kind}#{digest.hexdigest()}"
    plain = {k: v for k, v in sorted(vars(thing).items()) if isinstance(v, int | float | str | bool | tuple | None)}
    return f"{kind}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"


def facts_of(data: Data, source: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a run remembers of its data."""
    return {
        "name": data.name, "source": source, "options": dict(options), "task": data.task,
        "classes": list(data.classes), "channels": data.channels, "size": data.size and list(data.size),
        "mean": list(data.mean), "std": list(data.std), "scale": data.scale,
        "counts": {name: len(split) for name, split in data.splits.items()},
    }  # fmt: skip


def data_from(facts: Mapping[str, Any]) -> Data:
    """Data without samples, of which models can be built."""
    return Data(
        facts["name"], facts["task"], {}, tuple(facts["classes"]), facts["channels"],
        facts["size"] and tuple(facts["size"]), tuple(facts["mean"]), tuple(facts["std"]), scale=facts["scale"],
    )  # fmt: skip
