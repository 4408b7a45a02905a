"""Evidence: the verdict follows from what was measured, by one rule."""

import json

import pytest

from opsin.catalog import cards
from opsin.cli import run
from opsin.errors import BadInput
from opsin.measure import evidence
from opsin.measure.duration import parse_duration
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment

CLAIM = """
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment

def run(budget: ClaimBudget) -> Evidence:
    experiment = Experiment("depthwise", "A test.", seeds=range(budget.seeds))
    experiment.check("seconds", budget.seconds, ">=", 60)
    return experiment.evidence(budget)
"""


def experiment() -> Experiment:
    return Experiment("depthwise", "A test.", data="none", baseline="none", seeds=[0, 1, 2])


@pytest.mark.parametrize(
    ("ours", "baseline", "margin", "held"),
    [
        ([3.0, 3.1, 2.9], [1.0, 1.0, 1.0], 1.0, True),
        ([3.0, 3.1, 2.9], [1.0, 1.0, 1.0], 3.0, False),
        ([3.0, 1.0, 2.0], [1.0, 1.0, 1.0], 0.9, None),
        ([5.0], [1.0], 1.0, None),
        ([1.0, 1.0], [1.0, 1.0], 0.0, True),
    ],
)
def test_a_comparison_holds_only_beyond_its_error(ours, baseline, margin, held):
    e = experiment()
    assert e.compare("x", ours, baseline, margin) is held
    assert e.evidence().verdict == {True: "holds", False: "fails", None: "inconclusive"}[held]
    assert e.numbers["x"]["ours"] == ours


def test_pairs_matter_and_must_match():
    e = experiment()
    assert e.compare("paired", [1.0, 11.0, 21.0], [0.0, 10.0, 20.0], 0.9) is True, "spread that is shared cancels"
    with pytest.raises(ValueError, match="zip"):
        e.compare("unpaired", [1.0, 2.0], [1.0], 0.0)


def test_one_refuted_criterion_refutes_and_none_is_refused():
    e = experiment()
    with pytest.raises(BadInput, match="checked nothing"):
        e.evidence()
    assert e.check("exact", 0.5, "<", 1)
    assert e.evidence().verdict == "holds"
    e.compare("unclear", [3.0, 1.0, 2.0], [1.0, 1.0, 1.0], 0.9)
    assert e.evidence().verdict == "inconclusive"
    assert not e.check("refuted", 2, "<=", 1)
    assert e.evidence().verdict == "fails"


def test_a_record_is_complete_and_reads_back(tmp_path):
    e = experiment()
    e.record("series", [0.12345678, 2])
    e.check("exact", 1, "==", 1)
    path = e.evidence(ClaimBudget(90, 3), notes="n").save(tmp_path / "a" / "e.json")
    record = Evidence.model_validate(json.loads(path.read_text()))
    assert record.machine and record.date and record.budget == "90 s, 3 seeds" and record.notes == "n"
    assert record.numbers["series"] == [0.123457, 2.0] and record.seconds >= 0


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A checkout of its own with one claim."""
    monkeypatch.setattr(cards, "house", lambda name: tmp_path / name)
    monkeypatch.setattr(evidence, "house", lambda name: tmp_path / name)
    (tmp_path / "claims" / "ops").mkdir(parents=True)
    (tmp_path / "claims" / "ops" / "depthwise.py").write_text(CLAIM)
    return tmp_path


def test_the_verb_runs_a_claim_and_keeps_what_is_there(house, capsys):
    assert run(["claim", "depthwise", "--budget", "2m", "--seeds", "2"]) == 0
    assert "depthwise: holds" in capsys.readouterr().out
    record = json.loads((house / "evidence" / "depthwise.json").read_text())
    assert record["seeds"] == [0, 1] and record["criteria"][0]["value"] == 120
    assert run(["claim", "depthwise"]) == 2 and "--force" in capsys.readouterr().err
    assert run(["claim", "depthwise", "--budget", "30s", "--force"]) == 0
    assert "depthwise: fails" in capsys.readouterr().out
    assert run(["claim", "depthwise", "-o", str(house / "other.json")]) == 0
    assert (house / "other.json").is_file()
    assert run(["claim", "pooling"]) == 2 and "has no claim" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("12", 12), (7, 7)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["soon", "-1s", "0s", "", "5 minutes"])
def test_durations_that_are_none(text):
    with pytest.raises(BadInput, match="not a duration"):
        parse_duration(text)


def test_create_prints_the_network(capsys):
    assert run(["create", "depthwise(dim=4)"]) == 0
    assert "DepthwiseConv(4, 4" in capsys.readouterr().out
