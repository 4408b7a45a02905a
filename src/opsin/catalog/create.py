"""`create(name, **overrides)`: from a name to the object, importing one file."""

import ast
import re
from importlib import import_module
from typing import Any

from opsin.catalog.cards import Card, card_of, find, operators
from opsin.errors import BadInput

WILDCARD = re.compile(r"(?P<option>\w+)\s*=\s*\*\s*(?=[,)])")
SPEC = re.compile(r"^(?P<name>[\w:./-]+)\s*(?:\((?P<options>.*)\))?$", re.DOTALL)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Splits `"metanet_t(mixer=tvconv, kernel_size=3)"` into a name and options.

    Values are Python literals; a bare word is a string. Raises BadInput where the text does not parse.
    """
    match = SPEC.match(spec.strip())
    if not match:
        raise BadInput(f"'{spec}' is not a name or name(option=value, ...)")
    if not match["options"]:
        return match["name"], {}
    try:
        call = ast.parse(f"f({match['options']})", mode="eval").body
        if isinstance(call, ast.Call) and not call.args and all(keyword.arg for keyword in call.keywords):
            return match["name"], {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise BadInput(f"the options of '{spec}' do not read as option=value, option=value")


def expand(spec: str) -> list[str]:
    """What `"metanet_t(mixer=*)"` stands for: one spec for every operator that the option takes.

    A network's card says which options these are, and what an operator's card must say to be taken (`mixer`, `norm`).
    A spec without a star stands for itself. Raises UnknownName, or BadInput where the option takes no operators.
    """
    star = WILDCARD.search(spec)
    if not star:
        return [spec]
    match = SPEC.match(spec.strip())
    name = match["name"] if match else spec
    roles = card_of(name).facts.get("operators", {})
    if star["option"] not in roles:
        known = f"only {' and '.join(f'{option}=*' for option in roles)}" if roles else "no option=*"
        raise BadInput(f"'{spec}' asks for every {star['option']}, but '{name}' takes {known}")
    before, after = spec[: star.start()], spec[star.end() :]
    choices = operators(roles[star["option"]])
    return [one for choice in choices for one in expand(f"{before}{star['option']}={choice}{after}")]


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def entry(card: Card) -> Any:
    """The class or function that a card points at."""
    module, _, attribute = card.entry.partition(":")
    return getattr(import_module(module), attribute)


def create(name: str, *, weights: str | None = None, **overrides: Any) -> Any:
    """Builds a system by key or variant name; overrides go to its constructor.

    name: a key (`"tvconv"`), a variant (`"convnext_tiny"`), a spec with options (`"metanet_t(mixer=tvconv)"`), or
        `"timm:resnet50"` for a timm model behind the backbone contract.
    weights: None for fresh weights, `"shipped"` or `"hub"` for those that the card names, or the path of a
        .safetensors or .pth file.
    Raises UnknownName, or BadInput where an override is not an option of the system.
    """
    name, options = parse_spec(name)
    options |= overrides
    if name.startswith("timm:"):
        return import_module("opsin.backbones.timm_model").TimmBackbone(name.removeprefix("timm:"), **options)
    card, variant = find(name)
    build = entry(card)
    variants = getattr(import_module(build.__module__), "VARIANTS", {})
    config = {**variants.get(name, {}), **options}
    try:
        system = build(**config)
    except TypeError as error:
        if "argument" in str(error):
            raise BadInput(f"'{name}' cannot be built with {options or 'no options'}: {error}") from error
        raise
    if weights is not None:
        import_module("opsin.layers.weights").load_published(system, weights, card, variant)
    return system
