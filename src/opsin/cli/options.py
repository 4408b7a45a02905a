"""Options that are handed through to a system: `--option name=value`, several times."""

from typing import Any

from opsin.catalog import parse_spec
from opsin.errors import BadInput


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """The options by name; values are Python literals or bare words. Raises BadInput."""
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, sign, _ = pair.partition("=")
        if not sign or not name.isidentifier():
            raise BadInput(f"--option {pair}: write name=value")
        options |= parse_spec(f"option({pair})")[1]
    return options
