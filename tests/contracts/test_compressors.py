"""What every compressor must pass, and members that must not."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.backbones.vit import VisionTransformer
from opsin.catalog import card_of, list_cards
from opsin.compress import Budget, Compressed, Report
from opsin.compress.measured import measured
from opsin.data import Data
from opsin.measure.cost import count_macs
from opsin.train.bare import train

COMPRESSORS = [name for card in list_cards("compressor") for name in card.names]


def images(n: int = 64) -> tuple[Tensor, Tensor]:
    """Two kinds of pictures that a small net tells apart: bright left and bright right halves."""
    torch.manual_seed(1)
    x, y = 0.3 * torch.rand(n, 3, 12, 12), torch.arange(n) % 2
    x[y == 0, :, :, :6] += 0.5
    x[y == 1, :, :, 6:] += 0.5
    return x, y


class Split:
    def __init__(self):
        self.x, self.y = images()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], int(self.y[i])


def data() -> Data:
    split = Split()
    return Data("halves", "classify", {"train": split, "val": split}, ("left", "right"), 3, (12, 12))


def network() -> nn.Module:
    """A trained net with batch norms."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * 9, 2),
    )  # fmt: skip
    x, y = images()
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval()


def transformer() -> nn.Module:
    """A trained ViT, for compressors that drop tokens."""
    torch.manual_seed(0)
    net = VisionTransformer(dim=16, depth=5, num_heads=2, patch_size=3, image_size=12, num_classes=2)
    return train(net, *images(), steps=30, seed=0, batch=64, lr=3e-3, augment=False)


def fewer_macs() -> Budget:
    """Nine tenths of the transformer's multiply-accumulates."""
    return Budget(macs=int(0.9 * count_macs(transformer(), torch.rand(1, 3, 12, 12))))


def suit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the checks a network that this compressor is for, and a budget that it can meet."""
    if "ViT" in card_of(name).facts.get("needs", ""):
        monkeypatch.setitem(globals(), "network", transformer)
        monkeypatch.setitem(globals(), "budget", fewer_macs)


def budget() -> Budget:
    """A quarter of the network's bytes."""
    return Budget(bytes=int(measured(network(), torch.rand(1, 3, 12, 12))["bytes"] / 4))


def check_budget_is_met_as_measured(compressor) -> None:
    result = compressor(network(), data(), budget())
    assert isinstance(result, Compressed)
    again = measured(result.model, result.example)
    assert budget().met(again), "the budget does not hold on the result"
    for name in ("params", "macs", "bytes", "bits"):
        assert result.report.after[name] == pytest.approx(again[name]), f"{name} is reported but not true"


def check_accuracy_drop_is_reported(compressor) -> None:
    net = network()
    report = compressor(net, data(), budget()).report
    x, y = images()
    assert report.score_before == pytest.approx(float((net(x).argmax(1) == y).float().mean()))
    after = compressor(net, data(), budget()).model(x).argmax(1)
    assert report.score_after == pytest.approx(float((after == y).float().mean()), abs=0.02)


def check_original_is_left_alone(compressor) -> None:
    net = network()
    before = deepcopy(net.state_dict())
    compressor(net, data(), budget())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def check_saved_model_needs_no_compressor(compressor, path) -> None:
    result = compressor(network(), data(), budget())
    loaded = torch.export.load(result.save(path)).module()
    x = images(1)[0]
    assert torch.allclose(loaded(x), result.model(x), atol=1e-6)
    check_file_costs_what_is_reported(loaded, result)


def check_file_costs_what_is_reported(loaded, result) -> None:
    """A report whose model costs something else once it is exported says what, as `exported_macs`."""
    shell = nn.Module()
    shell.forward = loaded.forward
    reported = result.report.details.get("exported_macs", result.report.after["macs"])
    assert count_macs(shell, result.example) == reported, "the file's MACs are not those of the report"


CHECKS = [check_budget_is_met_as_measured, check_accuracy_drop_is_reported, check_original_is_left_alone]


def member(name: str):
    return opsin.create(name, steps=30) if name.startswith("zeroq") else opsin.create(name)


@pytest.mark.parametrize("name", [n for n in COMPRESSORS if n != "zeroq_w8a8"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_contract(name, check, monkeypatch):
    suit(name, monkeypatch)
    check(member(name))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_saved_models(name, tmp_path, monkeypatch):
    suit(name, monkeypatch)
    if name == "zeroq_w8a8":
        monkeypatch.setitem(globals(), "budget", lambda: Budget(bits=8))
    check_saved_model_needs_no_compressor(member(name), tmp_path / "m.pt2")


class Promises:
    """Does nothing and reports success."""

    def __call__(self, model, data, budget):
        example = torch.rand(1, 3, 12, 12)
        before = measured(model, example)
        return Compressed(model, Report(before, before | {"bytes": budget.bytes}, budget, 1.0, 1.0), example)


class Wrecks(Promises):
    def __call__(self, model, data, budget):
        for p in model.parameters():
            p.data.zero_()
        return super().__call__(model, data, budget)


class Flatters(Promises):
    def __call__(self, model, data, budget):
        model = deepcopy(model)
        model[-1].weight.data.neg_()
        return super().__call__(model, data, budget)


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (Promises(), check_budget_is_met_as_measured),
        (Wrecks(), check_original_is_left_alone),
        (Flatters(), check_accuracy_drop_is_reported),
    ],
)
def test_broken_members_are_caught(broken, check):
    with pytest.raises(AssertionError):
        check(broken)


class Dropout(Promises):
    """A result that cannot be reloaded to the same function."""

    def __call__(self, model, data, budget):
        class Noisy(nn.Module):
            def forward(self, x):
                return x.flatten(1)[:, :2] + torch.rand(len(x), 2)

        return super().__call__(Noisy(), data, budget)


class DropsInEager(Promises):
    """Half of the work is skipped, but not in an exported graph."""

    def __call__(self, model, data, budget):
        class Halved(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(144, 2)

            def forward(self, x):
                parts = x.flatten(2).unbind(1)
                used = parts if torch.compiler.is_compiling() else parts[:1]
                return torch.stack([self.linear(part) for part in used], 1)[:, 0]

        return super().__call__(Halved(), data, budget)


@pytest.mark.parametrize(("broken", "message"), [(Dropout(), "allclose"), (DropsInEager(), "the file's MACs")])
def test_a_model_that_reloads_as_another_is_caught(broken, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        check_saved_model_needs_no_compressor(broken, tmp_path / "m.pt2")
