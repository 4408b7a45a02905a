"""Tasks by name; a task's file is imported when it is asked for."""

from importlib import import_module

from opsin.errors import UnknownName
from opsin.tasks import Task

TASKS = {
    "classify": "opsin.tasks.classify:Classify",
    "segment": "opsin.tasks.segment:Segment",
    "detect": "opsin.tasks.detect:Detect",
    "restore": "opsin.tasks.restore:Restore",
    "pretrain": "opsin.pretrain.task:Pretrain",
}


def task_by_name(name: str, label_smoothing: float = 0.0) -> Task:
    """The task of this name. Label smoothing goes to tasks that have classes. Raises UnknownName."""
    if name not in TASKS:
        raise UnknownName("task", name, TASKS)
    module, _, attribute = TASKS[name].partition(":")
    build = getattr(import_module(module), attribute)
    return build(label_smoothing=label_smoothing) if name == "classify" else build()
