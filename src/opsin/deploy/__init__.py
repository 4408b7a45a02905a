"""Deployment: fuse, export, predict with what was exported."""

from importlib import import_module
from typing import Any

__all__ = ["export", "fuse", "predict"]


def __getattr__(name: str) -> Any:
    if name in ("export", "predict"):  # the file is callable, so it does not matter who imported it first
        return import_module(f"opsin.deploy.{name}")
    if name == "fuse":
        from opsin.deploy.fusing import fuse

        return fuse
    raise AttributeError(f"module 'opsin.deploy' has no attribute {name!r}")
