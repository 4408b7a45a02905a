"""The catalogue: every card reads, points at something, and is found; broken cards are named."""

import importlib
import inspect
import json
from pathlib import Path

import pytest

from opsin.catalog import all_cards, cards, create, entry, find, list_cards, parse_spec, show
from opsin.catalog.cards import PACKAGE, claim_file, evidence_file, read_card
from opsin.errors import BadInput, UnknownName

GOOD = """
[system]
key = "{key}"
kind = "operator"
summary = "A test."
entry = "opsin.ops.conv.depthwise:DepthwiseConv"
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty catalogue in a folder of its own."""
    monkeypatch.setattr(cards, "PACKAGE", tmp_path)
    all_cards.cache_clear()
    yield tmp_path
    all_cards.cache_clear()


@pytest.mark.parametrize("card", all_cards().values(), ids=lambda c: c.key)
def test_every_card_has_its_entry_beside_it(card):
    target = entry(card)
    assert callable(target)
    module = inspect.getmodule(target)
    assert module is not None and Path(module.__file__).is_relative_to(PACKAGE)
    known = getattr(importlib.import_module(card.entry.partition(":")[0]), "VARIANTS", {})
    beside = [c for c in all_cards().values() if c.entry.partition(":")[0] == card.entry.partition(":")[0]]
    assert set(known) <= {name for c in beside for name in c.names}, "a variant in the code is missing from its card"


@pytest.mark.parametrize("card", [c for c in all_cards().values() if c.paper], ids=lambda c: c.key)
def test_every_paper_has_a_claim_and_evidence(card):
    assert card.year and card.headline
    assert claim_file(card).is_file(), "no claim"
    record = json.loads(evidence_file(card).read_text())
    assert record["key"] == card.key and record["verdict"] in ("holds", "fails", "inconclusive")
    answers = [c["held"] for c in record["criteria"]]
    expected = "fails" if False in answers else "inconclusive" if None in answers else "holds"
    assert record["verdict"] == expected, "the verdict does not follow from the criteria"


def test_every_module_with_variants_has_a_card():
    pointed = {card.entry.partition(":")[0] for card in all_cards().values()}
    orphans = []
    for path in PACKAGE.rglob("*.py"):
        if "\nVARIANTS = " in path.read_text() or "\nVARIANTS: " in path.read_text():
            module = ".".join(("opsin", *path.relative_to(PACKAGE).with_suffix("").parts))
            orphans += [module] if module not in pointed else []
    assert not orphans


def test_claims_and_evidence_belong_to_cards():
    keys = set(all_cards())
    root = PACKAGE.parent.parent
    assert {p.stem for p in (root / "claims").rglob("*.py")} <= keys
    assert {p.stem for p in (root / "evidence").glob("*.json")} <= keys


def test_variants_are_found_and_unknown_names_get_near_ones():
    assert find("inception_next_tiny")[0].key == "inceptionnext"
    with pytest.raises(UnknownName, match="inception_next_tiny"):
        find("inception_nxt_tiny")
    with pytest.raises(UnknownName):
        list_cards(kind="backbon")


def test_search_needs_every_word():
    assert "inceptionnext" in {c.key for c in list_cards(search="convnext bands")}
    assert not list_cards(search="convnext nosuchword")


def test_two_cards_with_one_name_are_refused(house):
    (house / "a.toml").write_text(GOOD.format(key="same"))
    (house / "b.toml").write_text(GOOD.format(key="same"))
    with pytest.raises(BadInput, match=r"same.*a\.toml.*b\.toml"):
        all_cards()


def test_a_variant_may_not_take_the_name_of_another_card(house):
    (house / "a.toml").write_text(GOOD.format(key="one") + "[variants.two]\n")
    (house / "b.toml").write_text(GOOD.format(key="two"))
    with pytest.raises(BadInput, match="two"):
        all_cards()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[system\n", "not valid TOML"),
        ('[system]\nkey = "x"\n', "lacks .* kind, summary, entry"),
        (GOOD.format(key="x").replace("operator", "gadget"), "unknown kind 'gadget'"),
        (GOOD.format(key="x") + 'color = "red"\n', "color"),
    ],
)
def test_a_broken_card_is_named(tmp_path, text, fault):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=fault) as error:
        read_card(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("tvconv", ("tvconv", {})),
        ("metanet_t(mixer=tvconv, depths=(1, 2), rate=0.5)",
         ("metanet_t", {"mixer": "tvconv", "depths": (1, 2), "rate": 0.5})),
        ("a(b={'k': 3})", ("a", {"b": {"k": 3}})),
        ("timm:resnet50", ("timm:resnet50", {})),
    ],
)  # fmt: skip
def test_specs(spec, expected):
    assert parse_spec(spec) == expected


@pytest.mark.parametrize("spec", ["a(b", "a(1)", "a(b=c.d)", "", "a(b=)", "a(**b)", "a(*b)"])
def test_bad_specs_are_one_sentence(spec):
    with pytest.raises(BadInput) as error:
        parse_spec(spec)
    assert "\n" not in str(error.value)


def test_overrides_win_and_wrong_ones_are_named():
    net = create("metanet_n(num_classes=3)", num_classes=5, in_chans=1)
    assert net.num_classes == 5
    with pytest.raises(BadInput, match="no_such_option"):
        create("metanet_n", no_such_option=1)


def test_show_has_usage_for_every_card():
    for key in all_cards():
        python, shell = show(key)["usage"]
        assert "opsin" in python and shell.startswith("opsin ")
