"""Where each verb lives. Importing this file imports nothing else.

Several verbs share their word with a room (`restore`, `measure`, ...) or with their own file (`opsin/train/fit.py`).
Such a module is callable: `opsin.restore` is the package, and `opsin.restore("photo.jpg")` runs the verb.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

VERBS = {
    "list": "opsin.catalog:list_cards",
    "show": "opsin.catalog:show",
    "create": "opsin.catalog:create",
    "fit": "opsin.train.fit:fit",
    "compare": "opsin.train.compare:compare",
    "pretrain": "opsin.verbs.pretrain:pretrain",
    "compress": "opsin.verbs.compress:compress",
    "adapt": "opsin.verbs.adapt:adapt",
    "explain": "opsin.verbs.explain:explain",
    "restore": "opsin.restore.verb:restore",
    "predict": "opsin.deploy.predict:predict",
    "generate": "opsin.generate.verb:generate",
    "attack": "opsin.verbs.attack:attack",
    "measure": "opsin.measure.cost:measure",
    "export": "opsin.deploy.export:export",
    "claim": "opsin.measure.evidence:claim",
    "app": "opsin.app.page:launch",
}
ROOM_VERBS = frozenset({"pretrain", "compress", "adapt", "explain", "restore", "generate", "measure", "app"})


class CallableRoom(ModuleType):
    """A module that is also the verb of its name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        module, function = VERBS[self.__name__.rpartition(".")[2]].split(":")
        return getattr(import_module(module), function)(*args, **options)


def make_callable(room: str) -> None:
    """Turns the room or file (its `__name__`) into the verb of the same word."""
    sys.modules[room].__class__ = CallableRoom
