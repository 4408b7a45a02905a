"""A comparison is fair, goes on after a kill without touching what is finished, and says what failed."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import opsin
from opsin.catalog import list_cards
from opsin.cli import run as opsin_command
from opsin.data import open as open_data
from opsin.deploy.export import ExportFailed
from opsin.errors import BadInput, TrainingFailed, UnknownName
from opsin.train.compare import compare
from opsin.train.comparison import Comparison
from opsin.train.names import check_models, slug, split_models
from opsin.train.run import Run
from opsin.train.table import difference

MODELS = "metanet_n, metanet_n(mlp_ratio=1)"
SMALL = {"models": MODELS, "epochs": 2, "seeds": 2, "data_options": {"limit": 64}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Sums in the same order in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return compare("digits", out=tmp_path_factory.mktemp("compare") / "c", progress=False, **SMALL)


@pytest.fixture
def no_export(monkeypatch):
    """Seconds saved where the exported file is not the point; the report says why there is none."""

    def refuse(*arguments, **options):
        raise ExportFailed("not in this test")

    monkeypatch.setattr("opsin.train.report.export", refuse)


def trial_table(comparison):
    return comparison.query("SELECT model, seed, status, val, test, steps FROM trials ORDER BY model, seed")


def digests(folder):
    """What every file of the trials holds, and when it was written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, hashlib.md5(f.read_bytes()).hexdigest()) for f in files}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b", ["a", "b"]),
        ("a(mixer=b,k=3),c", ["a(mixer=b,k=3)", "c"]),
        (" a( o={'x': 1, 'y': (2, 3)} ) , b,", ["a( o={'x': 1, 'y': (2, 3)} )", "b"]),
        ("a(note='x),y'),b", ["a(note='x),y')", "b"]),
    ],
)
def test_models_are_split_at_outer_commas(text, parts):
    assert split_models(text) == parts


@pytest.mark.parametrize("text", ["a(b,c", "a)b", "a(b='x)"])
def test_brackets_that_do_not_close_are_told(text):
    with pytest.raises(BadInput, match="do not close"):
        split_models(text)


@pytest.mark.parametrize(
    ("models", "error", "sentence"),
    [
        ("", BadInput, "names no model"),
        (" , ", BadInput, "names no model"),
        ("metanet_n,metanet_q", UnknownName, "metanet_q"),
        ("metanet_n,metanet_n", BadInput, "twice"),
        ("metanet_n(mlp_ratio=1, depths=(1,1,1,1)),metanet_n(depths=(1, 1, 1, 1),mlp_ratio=1)", BadInput, "twice"),
    ],
)
def test_bad_models_are_told_before_anything_is_read(models, error, sentence):
    with pytest.raises(error, match=sentence):
        check_models(models)


def test_a_star_stands_for_every_operator_that_fits():
    mixers = [card.key for card in list_cards("operator") if card.mixer]
    named = check_models("resnet18, metanet_n(mixer=*, mlp_ratio=1)")
    assert named == ("resnet18", *(f"metanet_n(mixer={key}, mlp_ratio=1)" for key in mixers))
    assert "depthwise" in mixers and len(mixers) > 5
    norms = [card.key for card in list_cards("operator") if card.facts.get("norm")]
    both = check_models("metanet_n(norm=*,mixer=*)") if norms else ()
    assert len(both) == len(norms) * len(mixers)


@pytest.mark.parametrize(
    ("models", "error", "sentence"),
    [
        ("metanet_n(mlp_ratio=*)", BadInput, "every mlp_ratio.*mixer=\\*"),
        ("resnet18(mixer=*)", BadInput, "no option=\\*"),
        ("metanet_q(mixer=*)", UnknownName, "metanet_q"),
        ("metanet_n(mixer=*),metanet_n(mixer=depthwise)", BadInput, "twice"),
    ],
)
def test_a_star_elsewhere_is_told(models, error, sentence):
    with pytest.raises(error, match=sentence):
        check_models(models)


def test_names_of_folders():
    assert slug("metanet_n(mixer=tvconv, k=3)") == "metanet_n-mixer=tvconv-k=3"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget": "1m", "epochs": 1}, "exclude each other"),
        ({"budget": "soon"}, "not a duration"),
        ({"epochs": 0}, "at least 1"),
        ({"seeds": 0}, "at least one"),
        ({"seeds": (1, 1)}, "each once"),
        ({"jobs": 0}, "at least 1"),
        ({"recipe": ["cutmux"]}, "cutmux"),
        ({"models": "convnext_tiny"}, "convnext_tiny.*smaller than the network's stride"),
        ({"models": "metanet_n(mlp_ration=1)"}, "mlp_ration"),
        ({"models": "depthwise"}, "not a network"),
    ],
)
def test_bad_requests_fail_before_anything_is_trained(tmp_path, options, sentence):
    with pytest.raises((BadInput, UnknownName), match=sentence):
        compare("digits", **{"models": "metanet_n", **options}, out=tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


def test_one_class_is_nothing_to_classify(tmp_path):
    (tmp_path / "data" / "cats").mkdir(parents=True)
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / "data" / "cats" / f"{i}.png")
    with pytest.raises(BadInput, match="one class only"):
        compare(str(tmp_path / "data"), "metanet_n", epochs=1, out=tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


def test_tables_hold_every_trial_and_every_cost(finished):
    rows = trial_table(finished)
    assert [(row["model"], row["seed"]) for row in rows] == [
        ("metanet_n", 0), ("metanet_n", 1), ("metanet_n(mlp_ratio=1)", 0), ("metanet_n(mlp_ratio=1)", 1),
    ]  # fmt: skip
    for row in rows:
        run = Run.load(finished.trial_folder(row["model"], row["seed"]))
        assert (row["status"], row["val"], row["test"]) == ("done", run.val_score, run.test_score)
        assert run.config["request"]["seed"] == row["seed"] and run.config["request"]["epochs"] == 2
    large, small = finished.query("SELECT * FROM costs ORDER BY params DESC")
    assert large["model"] == "metanet_n" and small["macs"] < large["macs"] and small["memory"] < large["memory"]
    assert large["train_memory"] > large["memory"] > 4 * large["params"]
    assert large["latency_ms"] > 0
    curves = finished.query("SELECT count(*) AS n FROM curves WHERE split = 'val' AND name = 'accuracy' AND seed = 1")
    assert curves[0]["n"] == 4


def test_ranking_is_by_mean_validation_score(finished):
    rows, scores = finished.ranking, trial_table(finished)
    for row in rows:
        own = torch.tensor([s["val"] for s in scores if s["model"] == row.model], dtype=torch.float64)
        assert row.val == pytest.approx(own.mean().item()) and row.val_sd == pytest.approx(own.std().item())
    assert [row.val for row in rows] == sorted((row.val for row in rows), reverse=True)
    by_seed = [{s["seed"]: s["val"] for s in scores if s["model"] == row.model} for row in rows]
    assert rows[0].behind is None
    assert rows[1].behind == difference([by_seed[0][seed] - by_seed[1][seed] for seed in (0, 1)])


def test_wrong_sql_names_the_tables(finished):
    with pytest.raises(BadInput, match="trials, costs, curves"):
        finished.query("SELECT nothing FROM nowhere")


def test_the_winner_is_exported_as_trained(finished):
    run = Run.load(finished.best_run)
    known = json.loads((finished.folder / "winner.json").read_text())
    best = max(row["val"] for row in trial_table(finished) if row["model"] == finished.winner.model)
    assert known["run"] == run.path.name and run.val_score == best
    assert known["difference"] < 1e-4
    images = torch.rand(3, 1, 8, 8)
    session = onnxruntime.InferenceSession(finished.folder / "winner.onnx")
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"image": images.numpy()})[0]), run.model()(images).logits, atol=1e-4, rtol=0
    )


def test_runs_are_exported_and_asked_by_name(finished, tmp_path, capsys):
    run = str(finished.best_run)
    Image.fromarray(open_data("digits").test[0][0][0].mul(255).byte().numpy()).save(tmp_path / "digit.png")
    assert opsin_command(["export", run, "-o", str(tmp_path / "m.pt2")]) == 0
    assert "of PyTorch" in capsys.readouterr().out
    answers = []
    for model in (run, str(tmp_path / "m.pt2"), str(finished.folder / "winner.onnx")):
        assert opsin_command(["predict", str(tmp_path / "digit.png"), "--model", model, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["images"][0]["top"])
    for other in answers[1:]:
        assert other == {label: pytest.approx(p, abs=1e-4) for label, p in answers[0].items()}


def test_the_same_call_trains_nothing_again(finished):
    before = digests(finished.folder / "trials")
    winner = (finished.folder / "winner.onnx").stat().st_mtime_ns
    again = compare("digits", out=finished.folder, progress=False, **SMALL)
    assert digests(finished.folder / "trials") == before
    assert (finished.folder / "winner.onnx").stat().st_mtime_ns == winner
    assert again.ranking == finished.ranking and Comparison.load(finished.folder).settings == finished.settings


def test_more_seeds_keep_what_is_there(finished, tmp_path, no_export):
    folder = tmp_path / "c"
    shutil.copytree(finished.folder, folder)
    before = digests(folder / "trials")
    more = compare("digits", out=folder, progress=False, **{**SMALL, "seeds": 3, "models": "metanet_n"})
    after = digests(folder / "trials")
    assert {name: after[name] for name in before} == before
    assert [row["seed"] for row in trial_table(more)] == [0, 1, 2]


def test_another_comparison_needs_force(finished, tmp_path, no_export):
    with pytest.raises(BadInput, match="another epochs"):
        compare("digits", out=finished.folder, progress=False, **{**SMALL, "epochs": 1})
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds no comparison"):
        compare("digits", out=tmp_path, progress=False, force=True, **SMALL)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    tiny = {"models": "metanet_n", "seeds": 1, "data_options": {"limit": 32}, "out": tmp_path / "c", "progress": False}
    started = trial_table(compare("digits", epochs=1, **tiny))
    anew = trial_table(compare("digits", epochs=2, force=True, **tiny))
    assert anew[0]["steps"] == 2 * started[0]["steps"]


def test_a_failing_trial_is_a_row_not_the_end(tmp_path, monkeypatch, capsys, no_export):
    import opsin.train.fit as fit_module

    real = fit_module.fit

    def fit(model, *arguments, **options):
        if "mlp_ratio" in model:
            raise TrainingFailed("the loss is not a number at step 7") if options["seed"] else MemoryError("no memory")
        return real(model, *arguments, **options)

    monkeypatch.setattr(fit_module, "fit", fit)
    comparison = compare("digits", out=tmp_path / "c", **SMALL)
    good, bad = comparison.ranking
    assert (good.model, good.failed, bad.failed, bad.val) == ("metanet_n", 0, 2, None)
    reasons = {row["seed"]: row["reason"] for row in comparison.query("SELECT * FROM trials WHERE status = 'failed'")}
    assert reasons == {0: "MemoryError: no memory", 1: "the loss is not a number at step 7"}
    page = comparison.report.read_text()
    assert "the loss is not a number at step 7" in page and "every trial failed" in page
    assert "The winner was not exported: not in this test." in page and not (tmp_path / "c" / "winner.onnx").exists()
    assert "failed: MemoryError" in capsys.readouterr().err

    monkeypatch.setattr(fit_module, "fit", real)  # memory may be there now; a loss that diverged would diverge again
    table = trial_table(compare("digits", out=tmp_path / "c", progress=False, **SMALL))
    rows = {row["seed"]: row["status"] for row in table if "mlp_ratio" in row["model"]}
    assert rows == {0: "done", 1: "failed"}


def test_options_with_pairs_survive_a_restart(tmp_path, no_export):
    """What JSON turns into lists is still the same trial."""
    sized = {"models": "metanet_n", "epochs": 1, "seeds": 1, "data_options": {"limit": 32, "size": (8, 8)}}
    comparison = compare("digits", out=tmp_path / "c", progress=False, **sized)
    (comparison.trial_folder("metanet_n", 0) / "result.json").unlink()  # as after a kill
    assert compare("digits", out=tmp_path / "c", progress=False, **sized).ranking[0].failed == 0
    assert Comparison.load(tmp_path / "c").settings.fixed == comparison.settings.fixed


def test_nothing_but_failures_is_an_error(tmp_path, monkeypatch):
    import opsin.train.fit as fit_module

    def fit(*arguments, **options):
        raise TrainingFailed("the loss is not a number at step 1")

    monkeypatch.setattr(fit_module, "fit", fit)
    with pytest.raises(TrainingFailed, match=r"every trial.*not a number"):
        compare("digits", out=tmp_path / "c", progress=False, **SMALL)


def test_a_killed_comparison_goes_on(finished, tmp_path, no_export):
    """SIGKILL in the middle of two processes' work: they end too, and the same call reaches the same table."""
    folder = tmp_path / "c"
    code = f"import opsin; opsin.compare('digits', out={str(folder)!r}, jobs=2, **{SMALL!r})"
    script = tmp_path / "script.py"
    script.write_text(f"if __name__ == '__main__':\n    {code}\n")
    process = subprocess.Popen([sys.executable, script], env=os.environ | {"OMP_NUM_THREADS": "2"})
    try:
        while not list(folder.glob("trials/*/result.json")):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        workers = children(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until, "workers outlived their parent"
        time.sleep(0.05)
    done = {path.parent.name for path in folder.glob("trials/*/result.json")}
    before = digests(folder / "trials")
    resumed = compare("digits", out=folder, progress=False, **SMALL)
    after = digests(folder / "trials")
    assert all(after[name] == value for name, value in before.items() if name.split("/")[0] in done)
    assert trial_table(resumed) == trial_table(finished)


def test_a_comparison_goes_on_from_what_a_kill_left_half_written(finished, tmp_path, no_export):
    folder, alone = tmp_path / "c", tmp_path / "d"
    shutil.copytree(finished.folder, folder)
    for name, left in (("metanet_n-s0", ".config.json.99"), ("metanet_n-s1", ".failure.json")):
        shutil.rmtree(folder / "trials" / name)
        (folder / "trials" / name).mkdir()
        (folder / "trials" / name / left).write_text("{")
    assert trial_table(compare("digits", out=folder, progress=False, **SMALL)) == trial_table(finished)
    alone.mkdir()
    (alone / ".comparison.json").write_text("{")
    compare("digits", out=alone, progress=False, **{**SMALL, "models": "metanet_n", "seeds": 1, "epochs": 1})
    assert not (alone / ".comparison.json").exists()


def test_a_polite_kill_is_told(tmp_path, monkeypatch, capsys):
    """Lightning turns SIGTERM into SystemExit, which says nothing by itself."""
    import opsin.train.fit as fit_module

    def fit(*arguments, **options):
        raise SystemExit(143)

    monkeypatch.setattr(fit_module, "fit", fit)
    with pytest.raises(SystemExit):
        compare("digits", out=tmp_path / "c", **SMALL)
    assert "the same command goes on" in capsys.readouterr().err
    assert not list((tmp_path / "c").glob("trials/*/failure.json"))


def children(pid):
    """Processes that this one started."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_command(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "digits", "--models", "metanet_n", "--epochs", "1", "--seeds", "1", "--out", "out"]
    assert opsin_command(words) == 0
    shown = capsys.readouterr()
    assert "metanet_n" in shown.out and "report.html" in shown.out and "winner.onnx" in shown.out
    assert "1 trial: 1 model × 1 seed, 1 epoch each" in shown.err
    assert opsin_command([*words[:2], "--models", "metanet_m"]) == 2
    assert "did you mean metanet" in capsys.readouterr().err
    assert pq.read_table("out/trials.parquet").num_rows == 1


def test_the_verb(finished):
    assert opsin.compare is compare
