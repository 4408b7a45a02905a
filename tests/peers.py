"""Other libraries to compare with. They live in .venv-peers (`make parity`), never in the default environment."""

import importlib.util
import sys
from types import ModuleType

import torch

_LIBRARY: list[torch.library.Library] = []  # operators stay declared as long as their library object lives


class NoPeer(Exception):
    """Why a peer cannot be used here."""


def declare_torchvision_operators() -> None:
    """Names the operators that torchvision registers shapes for; its compiled ones need another build of PyTorch."""
    if not _LIBRARY:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARY.append(library)


def import_peer(name: str) -> ModuleType:
    """The package `timm` or `torchvision`. Raises NoPeer with the reason."""
    if importlib.util.find_spec(name) is None:
        raise NoPeer(f"{name} is not installed in this environment; run `make parity`")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # its operators do not load beside this PyTorch
        for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        declare_torchvision_operators()
    except ModuleNotFoundError as error:
        raise NoPeer(f"torchvision, which {name} needs, is not installed in this environment") from error
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise NoPeer(f"{name} cannot be imported here: {type(error).__name__}: {error}") from error
