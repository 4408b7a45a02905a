"""Who reads whose output: pairs of modules of which the second alone reads what the first gives.

The answer is read from the forward itself, traced by `torch.fx`. A whole network is traced in one go where its forward
allows that; where it does not (control flow on values), each module's own forward is looked at, one level deep, and
then everything below it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import fx, nn

Test = Callable[[nn.Module], bool]


class _Tracer(fx.Tracer):
    """Goes into modules down to those without children, and stops before where `stop` says so. Identities vanish."""

    def __init__(self, stop: Test):
        super().__init__()
        self.stop = stop

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) is nn.Identity:
            return False
        return self.stop(m) or next(m.children(), None) is None or super().is_leaf_module(m, module_qualified_name)


class Reading(NamedTuple):
    """One call of a module: the module whose output it reads, as that output's only reader, if there is one."""

    source: str | None
    reader: str


def sole_readers(model: nn.Module, first: Test, second: Test) -> list[tuple[str, str]]:
    """Names of modules (a, b): `first(a)`, `second(b)`, and b is the only reader of what a gives.

    Each of the two stands at one place of the network and is called once.
    """
    if not any(first(m) for m in model.modules()):
        return []
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    found = readings(model, lambda m: first(m) or second(m))
    calls = Counter(reading.reader for reading in found)

    def fits(name: str, test: Test) -> bool:
        module = model.get_submodule(name)
        return calls[name] == 1 and test(module) and places[id(module)] == 1

    return [(a, b) for a, b in found if a is not None and fits(a, first) and fits(b, second)]


def quiet(module: nn.Module) -> bool:
    """Nobody listens to this module, and its forward is that of its class."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def readings(model: nn.Module, stop: Test) -> list[Reading]:
    """The calls of modules in the forward, under their names; modules for which `stop` holds are not looked into."""
    return list(_readings(model, "", stop))


def _readings(module: nn.Module, place: str, stop: Test) -> Iterator[Reading]:
    whole = _graph(module, stop)
    graph = whole or _graph(module, lambda m: True)
    if graph is not None:
        for source, reader in _calls(graph):
            yield Reading(None if source is None else place + source, place + reader)
    if whole is None:
        for name, child in module.named_children():
            yield from _readings(child, f"{place}{name}.", stop)


def _graph(module: nn.Module, stop: Test) -> fx.Graph | None:
    """The traced forward, or None where it cannot be traced."""
    try:
        return _Tracer(stop).trace(module)
    except Exception:  # `fx` raises whatever the forward does on a proxy
        return None


def _calls(graph: fx.Graph) -> Iterator[Reading]:
    calls: list[Any] = [node for node in graph.nodes if node.op == "call_module"]
    for reader in calls:
        given = [*reader.args, *reader.kwargs.values()]
        source = given[0] if len(given) == 1 else None
        called = isinstance(source, fx.Node) and source.op == "call_module"
        alone = called and all(user is reader or _asks_for_form(user) for user in source.users)
        yield Reading(str(source.target) if alone else None, str(reader.target))


def _asks_for_form(node: fx.Node) -> bool:
    """Whether a reader looks at the shape or type of a tensor only."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_method" and node.target in ("size", "dim")
