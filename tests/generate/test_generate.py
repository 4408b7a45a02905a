"""Training in memory, weights files, the verb and the command line."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

import opsin
from opsin.cli import run
from opsin.errors import BadInput, TrainingFailed, UnknownName
from opsin.generate.digits import WEIGHTS, digits, main
from opsin.generate.edm import EDM
from opsin.generate.gaussian import GaussianMixture
from opsin.generate.samplers import Euler
from opsin.generate.skip_tuning import SkipTuning
from opsin.generate.train import fit_denoiser, save_denoiser, spec_of
from opsin.generate.verb import generate, grid

TINY = "edm(image_size=8, in_chans=1, channels=8, channel_mult=(1,2), num_blocks=1, attn_resolutions=(), dropout=0.0)"


def tiny() -> EDM:
    torch.manual_seed(0)
    return opsin.create(TINY)


# --- training and weights ------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_repeats_and_leaves_the_random_state():
    images, _ = digits()
    losses = []
    torch.manual_seed(5)
    first = fit_denoiser(tiny(), images, steps=40, batch=32, lr=5e-3, on_step=lambda step, loss: losses.append(loss))
    torch.manual_seed(6)
    before = torch.get_rng_state()
    network = tiny()
    torch.set_rng_state(before)
    second = fit_denoiser(network, images, steps=40, batch=32, lr=5e-3)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(losses[-10:]) / 10 < 0.9 * sum(losses[:5]) / 5
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not first.training


def test_training_says_what_is_wrong():
    images, labels = digits()
    with pytest.raises(BadInput, match="5 images and 3 labels"):
        fit_denoiser(tiny(), images[:5], labels[:3])
    with pytest.raises(TrainingFailed, match="step 0"):
        fit_denoiser(tiny(), images * float("nan"), steps=1, batch=4)


def test_weights_files_know_their_network(tmp_path):
    model, path = tiny(), tmp_path / "w.safetensors"
    save_denoiser(model, path, TINY)
    assert spec_of(path) == TINY
    loaded = opsin.create(TINY, weights=str(path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(BadInput, match="exists"):
        save_denoiser(model, path, TINY)
    assert generate(path, 2, steps=2).shape == (2, 1, 8, 8)
    save_denoiser(model, path, "", force=True)
    with pytest.raises(BadInput, match="does not say whose"):
        generate(path)
    path.write_bytes(b"nothing")
    with pytest.raises(BadInput, match="cannot be read"):
        generate(path)
    with pytest.raises(BadInput, match="no weights file"):
        generate(tmp_path / "none.safetensors")


def test_the_shipped_weights_are_small_and_exact_in_single_precision():
    from safetensors.torch import load_file

    assert WEIGHTS.stat().st_size < 2_000_000
    loaded = opsin.create("edm_digits", weights="shipped").state_dict()
    for name, tensor in load_file(WEIGHTS).items():
        assert tensor.dtype == torch.float16 and loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.float())


def test_the_weights_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("opsin.generate.digits.WEIGHTS", tmp_path / "edm_digits.safetensors")
    assert main(steps=2).stat().st_size == WEIGHTS.stat().st_size
    assert spec_of(tmp_path / "edm_digits.safetensors") == "edm_digits"


def test_the_shipped_model_draws_the_digit_that_is_asked_for():
    images, labels = digits()
    judge = LogisticRegression(max_iter=500).fit(images.flatten(1), labels)
    right = [
        (judge.predict(generate("edm_digits", 20, steps=8, label=k).flatten(1)) == k).mean() for k in range(0, 10, 3)
    ]
    assert np.mean(right) > 0.85


# --- the verb -------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_the_seed_and_its_place_alone():
    model = GaussianMixture(torch.zeros(1, 1, 4, 4), 0.5)
    many = generate(model, 10, steps=4, batch=3)
    assert many.shape == (10, 1, 4, 4) and many.min() >= 0 and many.max() <= 1
    torch.testing.assert_close(generate(model, 4, steps=4, batch=64), many[:4], rtol=0, atol=1e-5)
    assert not torch.equal(generate(model, 4, steps=4, seed=1), many[:4])
    assert not torch.equal(many[0], many[1])


def test_samplers_and_tricks_by_name_or_object():
    model = tiny()
    torch.nn.init.normal_(model.model.out_conv.weight)
    plain = generate(model, 2, steps=3)
    assert torch.equal(generate(model, 2, steps=3, sampler="euler"), generate(model, 2, steps=3, sampler=Euler()))
    tuned = generate(model, 2, steps=3, trick="skip_tuning(rho_bottom=0.3, rho_top=0.3)")
    assert torch.equal(generate(model, 2, steps=3, trick=SkipTuning(0.3, 0.3)), tuned)
    assert not torch.equal(tuned, plain)
    assert torch.equal(generate(model, 2, steps=3), plain)


def test_the_grid():
    images = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 1, 2, 3)
    sheet = grid(images, zoom=4)
    assert sheet.shape == (2 + 2 * 10, 2 + 3 * 14, 3)
    assert (sheet[2:10, 16:28] == 64).all() and (sheet[12:20, 30:] == 255).all() and (sheet[:2] == 255).all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(model="edm_cifar10"), BadInput, "without weights"),
        (dict(model="skip_tuning"), BadInput, "is a trick, not a generator"),
        (dict(model="edm_digit"), UnknownName, "edm_digits"),
        (dict(model="edm_digits", sampler="hein"), UnknownName, "heun"),
        (dict(model="edm_digits", trick="edm_digits"), BadInput, "not a trick"),
        (dict(model="edm_digits", label=10), BadInput, r"classes 0 \.\.\. 9"),
        (dict(model=tiny(), label=1), BadInput, "has no classes"),
        (dict(model=torch.nn.Linear(2, 2)), BadInput, "sample_shape"),
        (dict(model="edm_digits", n=0), BadInput, "at least 1"),
        (dict(model="edm_digits", seed=-1), BadInput, "negative"),
        (dict(model="edm_digits", steps=1), BadInput, "at least 2"),
        (dict(model="edm_digits", output="digits.jpg"), BadInput, "end in .png"),
        (dict(model="edm_digits", output="nowhere/digits.png"), BadInput, "no folder"),
    ],
)
def test_bad_calls_are_named(options, error, words):
    with pytest.raises(error, match=words):
        generate(**options)


def test_the_command(tmp_path, capsys):
    target = tmp_path / "digits.png"
    arguments = ["generate", "edm_digits", "-n", "9", "--steps", "3", "--label", "4", "-o", str(target)]
    assert run(arguments) == 0
    assert "9 images" in capsys.readouterr().out
    with Image.open(target) as image:
        assert image.size == (2 + 3 * 66, 2 + 3 * 66)
        first = np.asarray(image)
    assert run(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert run([*arguments, "--force", "--trick", "skip_tuning(rho_bottom=0.5)"]) == 0
    with Image.open(target) as image:
        assert not np.array_equal(np.asarray(image), first)
    assert run(["generate", "edm_digits", "-o", str(tmp_path / "b.png"), "--trick", "skip_tuning(rho=1)"]) == 2
    assert "cannot be built" in capsys.readouterr().err
