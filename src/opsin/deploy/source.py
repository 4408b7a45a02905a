"""From what a user names (a module, a run, its folder, a catalogue name) to a model and what is known of it."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from opsin.catalog import create, find, parse_spec
from opsin.deploy.facts import Facts
from opsin.errors import BadInput


def is_run_folder(path: Path) -> bool:
    """Whether `fit` wrote this folder."""
    return (path / "config.json").is_file()


def open_model(
    source: nn.Module | str | os.PathLike[str] | Any, *, weights: str | None = None
) -> tuple[nn.Module, Facts | None]:
    """The model, and its description where the source has one (a run does).

    weights: for a name of the catalogue, as `create` takes them.
    Raises BadInput, UnknownName.
    """
    if isinstance(source, nn.Module):
        return source, None
    if not isinstance(source, str | os.PathLike):
        return source.model(), run_facts(source)
    path = Path(source)
    if is_run_folder(path):
        run = import_module("opsin.train.run").Run.load(path)  # by name: training ranks above deployment
        return run.model(), run_facts(run)
    if path.exists():
        raise BadInput(f"'{path}' is not the folder of a run (it has no config.json)")
    name = str(source)
    variant = None if name.startswith("timm:") else find(parse_spec(name)[0])[1]
    facts = Facts(name=name, size=(variant.input, variant.input)) if variant and variant.input else None
    return create(name, weights=weights), facts


def run_facts(run: Any) -> Facts:
    """What a run's configuration says about its model; the size stays unknown where its images differed in size."""
    data, request = run.config["data"], run.config["request"]
    height, width = data["size"] or (0, 0)
    return Facts(
        name=request["model"], task=request["task"], classes=tuple(data["classes"]), channels=data["channels"],
        size=(height, width),
    )  # fmt: skip
