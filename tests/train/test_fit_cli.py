"""`opsin fit` and `python -c "opsin.fit"` are the same; mistakes are one sentence and code 2."""

import json

import pytest

import opsin
from opsin.cli import run
from opsin.train.run import Run

QUICK = ["--limit", "40", "--epochs", "2", "--batch-size", "10"]


def test_fit_prints_the_score_and_where_things_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["fit", "metanet_n", "digits", *QUICK, "--recipe", "mixup", "--recipe", "cutmix", "--ema"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = Run.load("runs/metanet_n-digits-s0")
    assert lines[0] == (
        f"accuracy: validation {result.val_score:.4g} (step {result.result['best_step']}), test {result.test_score:.4g}"
    )
    assert lines[1].startswith("0.20 M parameters, 8 steps in ")
    assert lines[2].endswith("runs/metanet_n-digits-s0/weights.safetensors")
    request = result.config["request"]
    assert (request["recipe"], request["ema"], request["data_options"]) == (["mixup", "cutmix"], True, {"limit": 40})
    assert opsin.fit is not None
    again = opsin.fit(
        "metanet_n", "digits", data_options={"limit": 40}, epochs=2, batch_size=10, recipe=["mixup", "cutmix"], ema=True
    )
    assert again.result == result.result


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["metanet_q", "digits"], "there is no system called 'metanet_q'; did you mean"),
        (["metanet_n", "digitz"], "digitz"),
        (["metanet_t", "digits"], "8x8 pixels, smaller than the network's stride of 32"),
        (["espcn_x2", "digits"], "not (1, 10): one logit per class"),
        (["metanet_n", "digits", "--task", "segment"], "'digits' has no masks"),
        (["metanet_n", "digits", "--epochs", "1", "--budget", "1m"], "give epochs or a budget, not both"),
        (["metanet_n", "digits", "--recipe", "cutmixx"], "did you mean cutmix"),
        (["metanet_n", "digits", "--batch-size", "5000"], "5000 does not go with"),
    ],
)
def test_mistakes_are_one_sentence(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["fit", *arguments]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.startswith("opsin: ")
    assert len(captured.err.splitlines()) == 1 and captured.out == ""
    assert not any(tmp_path.rglob("*.safetensors"))


def test_another_run_is_kept_without_force(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["fit", "metanet_n", "digits", *QUICK, "-o", "here"]
    assert run(command) == 0
    before = json.loads((tmp_path / "here/result.json").read_text())
    assert run([*command, "--lr", "0.01"]) == 2
    assert "use --force" in capsys.readouterr().err
    assert json.loads((tmp_path / "here/result.json").read_text()) == before
    assert run([*command, "--lr", "0.01", "--force"]) == 0
    assert Run.load("here").config["plan"]["lr"] == 0.01
