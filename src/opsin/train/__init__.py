"""Training: fit one model, compare several, on Lightning."""

from typing import Any

__all__ = ["compare", "fit"]


def __getattr__(name: str) -> Any:
    if name == "fit":
        from opsin.train.fit import fit

        return fit
    if name == "compare":
        from opsin.train.compare import compare

        return compare
    raise AttributeError(f"module 'opsin.train' has no attribute {name!r}")
