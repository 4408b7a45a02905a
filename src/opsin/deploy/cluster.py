"""A map over a Ray cluster: the same function on many machines, results as they come.

Ray takes the address from RAY_ADDRESS; without one it starts (or joins) a cluster on this machine. Items are run again
where a machine was lost, so the function must be idempotent. Functions that work in a folder need one that every
machine sees; `shared` is looked for on each machine before the function runs there.
"""

import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from opsin.errors import BadInput, MissingExtra, OpsinError

Item = TypeVar("Item")
Result = TypeVar("Result")


class ClusterFailed(OpsinError):
    """The cluster cannot be reached, or lost an item more often than it tries again."""


@dataclass(frozen=True)
class Cluster:
    """Maps over a Ray cluster.

    per_machine: how many items run on one machine at a time; they share its processors.
    shared: a folder that all machines must see.
    retries: how often an item is run again after its machine was lost.
    """

    per_machine: int = 1
    shared: Path | None = None
    retries: int = 2

    def __call__(self, run: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yields (item, run(item)) in the order of completion. Raises MissingExtra, ClusterFailed, BadInput."""
        ray = connect()
        cpus = max(1, _processors(ray) // self.per_machine)
        gpus = 1 / self.per_machine if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=self.retries)(_work)
        with _mark(self.shared) as mark:
            waiting = {remote.remote(run, item, cpus, mark): item for item in items}
            try:
                while waiting:
                    (done,), _ = ray.wait(list(waiting), num_returns=1)
                    yield waiting.pop(done), _result(ray, done)
            finally:
                for left in waiting:
                    ray.cancel(left, force=True)


def connect() -> Any:
    """Ray, connected. Raises MissingExtra, ClusterFailed."""
    if find_spec("ray") is None:
        raise MissingExtra("ray", "cluster")
    import ray

    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            where = os.environ.get("RAY_ADDRESS", "this machine")
            raise ClusterFailed(f"Ray cannot be reached at {where}: {str(error).splitlines()[0]}") from error
    return ray


def _processors(ray: Any) -> int:
    """Of the smallest machine that has any."""
    counts = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return min((count for count in counts if count), default=1)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayError as error:
        raise ClusterFailed(
            f"the cluster lost a part of the work: {str(error).splitlines()[0]}; the same command goes on where it "
            "stopped"
        ) from error


@contextmanager
def _mark(folder: Path | None) -> Iterator[Path | None]:
    """A file by which machines recognise the shared folder."""
    if folder is None:
        yield None
        return
    mark = folder.resolve() / f".cluster-{uuid.uuid4().hex}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _work(run: Callable[[Any], Any], item: Any, threads: int, mark: Path | None) -> Any:
    """On a machine of the cluster."""
    import platform

    import torch

    if mark is not None and not mark.is_file():
        raise BadInput(
            f"the machine {platform.node()} does not see the folder '{mark.parent}'; choose --out on a file system "
            "that all machines of the cluster share"
        )
    torch.set_num_threads(threads)
    return run(item)
