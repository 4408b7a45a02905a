"""Opsin: computer vision's ideas as interchangeable, measured parts.

The verbs are attributes of this package and load only when they are used:

    import opsin
    opsin.list(kind="backbone")
    model = opsin.create("convnext_tiny", num_classes=10)
    opsin.measure(model, 224)
"""

from importlib import import_module
from typing import Any

from opsin._verbs import ROOM_VERBS, VERBS

__version__ = "0.1.0"
__all__ = ["__version__", "data", *VERBS]


def __getattr__(name: str) -> Any:
    if name in ROOM_VERBS or name == "data":  # the room itself is callable: `opsin.measure(model)`
        return import_module(f"opsin.{name}")
    if name in VERBS:
        module, function = VERBS[name].split(":")
        return getattr(import_module(module), function)
    raise AttributeError(f"module 'opsin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
