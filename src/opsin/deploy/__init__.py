"""Deployment: fuse, export, predict with what was exported."""

from typing import Any

__all__ = ["export", "fuse", "predict"]


def __getattr__(name: str) -> Any:
    if name == "export":
        from opsin.deploy.export import export

        return export
    if name == "predict":
        from opsin.deploy.predict import predict

        return predict
    if name == "fuse":
        from opsin.deploy.fusing import fuse

        return fuse
    raise AttributeError(f"module 'opsin.deploy' has no attribute {name!r}")
