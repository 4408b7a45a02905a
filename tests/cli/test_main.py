"""The command line: fast, lazy, and one sentence for every mistake."""

import json
import resource
import subprocess
import sys

import pytest

from opsin._verbs import VERBS as PYTHON_VERBS
from opsin.catalog import all_cards
from opsin.cli import VERBS, run


def test_verbs_are_the_same_words_in_python_and_on_the_command_line():
    assert set(VERBS) == set(PYTHON_VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert run([verb, "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 4


@pytest.mark.parametrize("verb", PYTHON_VERBS)
def test_every_verb_is_callable_from_python(verb):
    import importlib

    import opsin

    module, function = PYTHON_VERBS[verb].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert callable(getattr(opsin, verb))


def test_no_arguments_list_the_verbs(capsys):
    assert run([]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize(
    "arguments",
    [["shwo"], ["show", "convnxt_tiny"], ["list", "--kind", "nothing"], ["list", "--nonsense"], ["show"],
     ["claim", "nothing"], ["measure", "convnext_tiny", "--input", "x"], ["claim", "convnext", "--budget", "soon"]],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_code_2(arguments, capsys):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("opsin: ") and len(err.strip().splitlines()) == 1 and "Traceback" not in out + err


def test_list_and_show(capsys):
    assert run(["list", "--json"]) == 0
    assert {row["key"] for row in json.loads(capsys.readouterr().out)} == set(all_cards())
    assert run(["list", "--kind", "backbone"]) == 0
    assert "inceptionnext" in capsys.readouterr().out
    assert run(["show", "inceptionnext"]) == 0
    text = capsys.readouterr().out
    assert "inception_next_tiny" in text and "28.06" in text and "arXiv:2303.16900" in text and "verdict" in text


def seconds(*arguments: str) -> float:
    """Processor seconds of a fresh interpreter, the least of five runs: what the code needs on an idle machine."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


@pytest.fixture(scope="module")
def slowness() -> float:
    """How much slower this machine is than one that loads what every command needs in 0.12 processor seconds."""
    return max(1.0, seconds("-c", "import json, tomllib, typer.main, rich.console, rich.table") / 0.12)


@pytest.mark.parametrize("command", [["--version"], ["list"], ["show", "inceptionnext"]])
def test_the_catalogue_answers_quickly_and_without_torch(command, slowness):
    heavy = "{'torch', 'numpy', 'pydantic'}"
    code = f"import sys; from opsin.cli import run; run({command!r}); assert not {heavy} & set(sys.modules)"
    assert seconds("-c", code) < 0.3 * slowness


def test_import_is_light(slowness):
    code = "import sys, opsin; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert seconds("-c", code) < 0.15 * slowness


def test_python_dash_m_is_the_same():
    out = subprocess.run([sys.executable, "-m", "opsin", "--version"], check=True, capture_output=True, text=True)
    assert out.stdout.startswith("opsin ")
