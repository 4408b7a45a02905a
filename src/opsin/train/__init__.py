"""Training: fit one model, compare several, on Lightning."""

from importlib import import_module
from typing import Any

__all__ = ["compare", "fit"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # the file is callable, so it does not matter who imported it first
        return import_module(f"opsin.train.{name}")
    raise AttributeError(f"module 'opsin.train' has no attribute {name!r}")
