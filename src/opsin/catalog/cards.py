"""Cards: one TOML file beside each system, the single source for catalogue, documentation and size tests."""

import json
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from opsin.errors import BadInput, UnknownName

PACKAGE = Path(__file__).resolve().parent.parent
KINDS = (
    "operator", "backbone", "restorer", "generator", "trick", "classifier", "segmenter", "detector", "dense",
    "embedder", "video", "language", "science", "pretrainer", "recipe", "adapter", "compressor", "explainer", "attack",
    "defence", "theory", "toolbox",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A published size of a system. Numbers are as published unless a name says otherwise."""

    name: str
    params_m: float | None = None
    macs_g: float | None = None
    input: int | None = None
    top1: float | None = None
    weights: str | None = None  # a file shipped beside the card, or a hub repository "owner/name"
    note: str = ""
    published: dict[str, Any] = field(default_factory=dict)  # any further published numbers


@dataclass(frozen=True)
class Card:
    """What a system is, where it lives, and what its paper reports."""

    key: str
    kind: str
    summary: str
    entry: str
    room: str
    path: Path
    paper: str = ""  # empty for a baseline that belongs to no paper of the collection
    arxiv: str = ""
    year: int | None = None
    mixer: bool = False
    headline: str = ""  # as published
    usage: str = ""  # Python that shows the system at work, if `create` alone does not
    command: str = ""  # the same on the command line
    options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # complexity, receptive field, supported backbones ...
    variants: dict[str, Variant] = field(default_factory=dict)

    @property
    def baseline(self) -> bool:
        """True where the system is a plain reference that other systems are compared with."""
        return not self.paper

    def role(self, name: str) -> bool:
        """Whether the card says that the operator can be this part of a network: `mixer`, or a fact such as `norm`."""
        return self.mixer if name == "mixer" else bool(self.facts.get(name))

    @property
    def names(self) -> tuple[str, ...]:
        return (self.key, *(v for v in self.variants if v != self.key))


def read_card(path: Path) -> Card:
    """Reads one card. Raises BadInput that names the file and the field at fault."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"the card {path} is not valid TOML: {error}") from error
    system = dict(table.get("system", {}))
    missing = [name for name in ("key", "kind", "summary", "entry") if not system.get(name)]
    if missing:
        raise BadInput(f"the card {path} lacks [system] {', '.join(missing)}")
    if system["kind"] not in KINDS:
        raise BadInput(f"the card {path} has the unknown kind '{system['kind']}'; the kinds are {', '.join(KINDS)}")
    variants = {name: _variant(name, dict(values)) for name, values in table.get("variants", {}).items()}
    room = path.relative_to(PACKAGE).parts[0] if path.is_relative_to(PACKAGE) else ""
    try:
        return Card(
            **system, room=room, path=path, variants=variants,
            options=table.get("options", {}), facts=table.get("facts", {}),
        )  # fmt: skip
    except TypeError as error:
        raise BadInput(f"the card {path} has a field that cards do not have: {error}") from error


def _variant(name: str, values: dict[str, Any]) -> Variant:
    known = {f: values.pop(f) for f in tuple(values) if f in Variant.__dataclass_fields__ and f != "published"}
    return Variant(name, **known, published=values)


@cache
def all_cards() -> dict[str, Card]:
    """Every card by key, in the order of the rooms' names. Raises BadInput where two cards or variants share a name."""
    cards: dict[str, Card] = {}
    owner: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.toml")):
        card = read_card(path)
        for name in card.names:
            if name in owner:
                raise BadInput(f"the name '{name}' stands in two cards: {owner[name]} and {path}")
            owner[name] = path
        cards[card.key] = card
    return cards


def find(name: str) -> tuple[Card, Variant | None]:
    """The card that has this key or variant, and the variant if the name is one. Raises UnknownName."""
    cards = all_cards()
    if name in cards:
        return cards[name], cards[name].variants.get(name)
    for card in cards.values():
        if name in card.variants:
            return card, card.variants[name]
    raise UnknownName("system", name, [n for card in cards.values() for n in card.names])


def card_of(name: str) -> Card:
    """The card that has this key or variant. Raises UnknownName."""
    return find(name)[0]


def list_cards(kind: str | None = None, search: str | None = None) -> list[Card]:
    """The cards of one kind, or those in which every word of `search` occurs. Raises UnknownName (kind)."""
    if kind is not None and kind not in KINDS:
        raise UnknownName("kind", kind, KINDS)
    words = (search or "").lower().split()
    return [
        card
        for card in all_cards().values()
        if (kind is None or card.kind == kind) and all(word in _text(card) for word in words)
    ]


def operators(role: str) -> list[str]:
    """The keys of the operators that can be this part of a network: `mixer`, `norm`."""
    return [card.key for card in list_cards("operator") if card.role(role)]


def _text(card: Card) -> str:
    return " ".join((*card.names, card.kind, card.paper, card.summary, card.arxiv, str(card.year))).lower()


def house(name: str) -> Path:
    """The folder `claims` or `evidence`: in the checkout, or inside an installed package."""
    checkout = PACKAGE.parent.parent / name
    return checkout if checkout.is_dir() else PACKAGE / f"_{name}"


def claim_file(card: Card) -> Path:
    """Where the claim of a system is written."""
    return house("claims") / card.room / f"{card.key}.py"


def evidence_file(card: Card) -> Path:
    """Where what the claim measured is kept."""
    return house("evidence") / f"{card.key}.json"


def verdict_of(card: Card) -> dict[str, Any] | None:
    """The evidence record of a system as plain data, or None where its claim has not been run."""
    path = evidence_file(card)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def show(name: str) -> dict[str, Any]:
    """Everything the catalogue knows of a system: its card, its variants as published, and its claim's verdict."""
    card, variant = find(name)
    return {"card": card, "variant": variant, "evidence": verdict_of(card), "usage": usage(card)}


def usage(card: Card) -> tuple[str, str]:
    """How to use a system, in Python and on the command line."""
    name = next(iter(card.variants), card.key)
    verbs = {
        "operator": (f'opsin.create("{name}", dim=64)', f'opsin measure "metanet_t(mixer={name})"'),
        "backbone": (f'opsin.create("{name}", num_classes=10)', f"opsin compare DATA --models {name}"),
        "restorer": (f'opsin.restore("photo.jpg", model="{name}")', f"opsin restore photo.jpg --model {name} -o OUT"),
    }
    python, command = verbs.get(card.kind, (f'opsin.create("{name}")', f"opsin show {name}"))
    return card.usage or f"import opsin\n{python}", card.command or command
