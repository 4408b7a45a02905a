"""AP and what it stands on: importances, sparse layers, the meter of dead ReLUs, and rounds that never regrow."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import opsin
from opsin.compress import Budget
from opsin.compress import activate_while_pruning as module
from opsin.compress.activate_while_pruning import ActivateWhilePruning, sample, small_moving_negative, weights_within
from opsin.compress.dead_neurons import dead_rates, unreachable, zeros_of
from opsin.compress.importance import gradient, importance_of, lamp, least, lookahead, magnitude, prunable, synflow
from opsin.compress.measured import accuracy, measured
from opsin.compress.quantiser import QuantisedLayer
from opsin.compress.sparse import SparseLayer
from opsin.data import Data
from opsin.data.splits import Arrays
from opsin.errors import BadInput, UnknownName

X = torch.tensor([[[[1.0, -1.0]]]])  # one image of one row and two columns


def data(n: int = 48) -> Data:
    """Two classes of noisy 8x8 images: bright above, or bright below."""
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randint(90, (n, 3, 8, 8), generator=draw, dtype=torch.uint8), torch.arange(n) % 2
    images[labels == 0, :, :4] += 120
    images[labels == 1, :, 4:] += 120
    split = Arrays(images, labels)
    return Data("halves", "classify", {"train": split, "val": split}, ("up", "down"), 3, (8, 8))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(128, 2),
    )  # fmt: skip


def ones(net: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(layer.weight) for name, layer in prunable(net).items()}


def linear_net() -> nn.Sequential:
    """Two inputs, three hidden ReLUs, one output; the weights are chosen by hand."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
        net[1].bias.copy_(torch.tensor([0.0, 0.0, -1.0]))
        net[3].weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]))
        net[3].bias.copy_(torch.tensor([-0.5, 0.5]))
        net[5].weight.copy_(torch.tensor([[3.0, -1.0]]))
    return net


def test_the_meter_against_a_count_by_hand():
    # image (1, -1): hidden (1, 0, 0), then (0.5, 0.5). Unit 3 has no weights: static. Unit 2 is dead for this input.
    # image (1, 1): hidden (1, 2, 0), then (2.5, 0.5). image (-1, -1): (0, 0, 0), then (0, 0.5).
    images = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]]).view(3, 1, 1, 2)
    rates = dead_rates(linear_net(), images, batch=2)
    assert rates.units == 5
    assert rates.dynamic == pytest.approx((1 + 0 + 3) / 15) and rates.static == pytest.approx(3 / 15)


def test_a_unit_behind_units_without_weights_is_static_if_it_is_dead_at_all():
    net = linear_net()
    assert unreachable(net, X).tolist() == [False, False, True, False, True], "the last one lives on its bias alone"
    with torch.no_grad():
        net[3].bias[1] = -0.5
    assert dead_rates(net, X).static == pytest.approx(2 / 5)


@pytest.mark.parametrize("pack", [SparseLayer, lambda layer, mask: QuantisedLayer(layer, 8)], ids=["sparse", "codes"])
def test_the_meter_does_not_mind_how_weights_are_stored(pack):
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 8, 3, padding="same", bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 9), nn.ReLU(),
    )  # fmt: skip
    packed, state = nn.Sequential(*net), torch.get_rng_state()
    for i in (0, 2, 5):
        mask = (torch.rand_like(net[i].weight) < 0.04).float()
        packed[i] = pack(net[i], mask)
        with torch.no_grad():
            net[i].weight.copy_(packed[i].weight())
    torch.set_rng_state(state)
    images = torch.randn(20, 4, 8, 8)
    assert torch.equal(packed(images), net(images))
    state = torch.get_rng_state()
    assert dead_rates(packed, images) == dead_rates(net, images)
    assert torch.equal(torch.get_rng_state(), state), "measuring draws nothing"


def test_the_meter_counts_maps_by_position_and_functional_relus():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu6(self.conv(x)).clamp(-1, 1).relu_()

    net = Net()
    with torch.no_grad():
        net.conv.weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
    rates = dead_rates(net, X)
    assert rates.units == 8 and rates.dynamic == pytest.approx(2 / 8) and rates.static == pytest.approx(4 / 8)
    with pytest.raises(BadInput, match="no ReLU"):
        dead_rates(nn.Conv2d(1, 1, 1), X)


def test_deep_networks_stay_in_range():
    net = opsin.create("resnet56_cifar").eval()
    assert not unreachable(net, torch.randn(1, 3, 32, 32)).any()


def test_magnitude_prunes_what_pytorch_prunes():
    net = network()
    chosen = least(magnitude(net, ones(net), sample(data(), 4)), ones(net), 200)
    layers = prunable(net)
    torch_prune.global_unstructured([(m, "weight") for m in layers.values()], torch_prune.L1Unstructured, amount=200)
    for name, layer in layers.items():
        assert torch.equal(~chosen[name], layer.weight_mask.bool())


def test_lamp_scores_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
    mask = {"1": torch.tensor([[1.0, 1.0], [1.0, 0.0]])}
    found = lamp(net, mask, (X, torch.tensor([0])))["1"]
    assert torch.allclose(found[0], torch.tensor([1 / 14, 4 / 13]).double()) and found[1, 0] == 1


def test_lookahead_multiplies_the_norms_of_both_neighbours():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(6, 4))
    found = lookahead(net, ones(net), (X, torch.tensor([0])))
    a, b, c = (net[i].weight.detach() for i in (0, 1, 3))
    i, j = 2, 1
    expected = b[i, j].abs() * a[j].norm() * c[:, 2 * i : 2 * i + 2].norm()
    assert torch.allclose(found["1"][i, j], expected)
    assert torch.allclose(found["0"][j, 0], a[j, 0].abs() * b[:, j].norm())


def test_synflow_is_the_product_over_paths():
    net = linear_net()
    before = deepcopy(net.state_dict())
    found = synflow(net, ones(net), (X, torch.tensor([0])))
    w1, w2, w3 = (net[i].weight.detach().abs().double() for i in (1, 3, 5))
    assert torch.allclose(found["3"], w2 * w3.T * w1.sum(1))
    sums = [float(score.sum()) for score in found.values()]
    assert sums == pytest.approx([sums[0]] * 3), "each layer holds all of the flow"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_gradient_importance_is_the_first_order_change_of_the_loss():
    net, (x, y) = network().eval(), sample(data(), 16)
    found = gradient(net, ones(net), (x, y))["7"]
    with torch.no_grad():
        loss, step = F.cross_entropy(net(x), y), 1e-2
        net[7].weight[1, 5] *= 1 - step
        change = (F.cross_entropy(net(x), y) - loss).abs() / step
    assert torch.allclose(found[1, 5], change, rtol=0.05, atol=1e-5)
    with pytest.raises(UnknownName):
        importance_of("magnitud")


def test_the_least_are_taken_over_all_layers_and_never_twice():
    found = {"a": torch.tensor([1.0, 5.0, 0.0]), "b": torch.tensor([[2.0, torch.inf]])}
    alive = {"a": torch.tensor([1.0, 1.0, 0.0]), "b": torch.ones(1, 2)}
    chosen = least(found, alive, 2)
    assert chosen["a"].tolist() == [True, False, False] and chosen["b"].tolist() == [[True, False]]
    assert sum(int(c.sum()) for c in least(found, alive, 9).values()) == 3, "infinity is never chosen"


def test_ap_takes_negative_weights_that_hardly_moved():
    start = torch.tensor([-1.0, -2.0, 0.5, 1.0, -0.1])
    now = torch.tensor([-1.1, -2.5, 0.5, -0.2, 0.0])
    score = small_moving_negative(now, start)
    assert score.argsort().tolist()[:3] == [0, 1, 3] and score[2] == score[4] == torch.inf


def test_rounds_take_p_minus_q_and_q_and_never_regrow(monkeypatch):
    net, seen = network(), []
    first = deepcopy(net.state_dict())
    tool = ActivateWhilePruning(rate=0.3, share=0.1, epochs=1, lr=0.02)
    original = tool.remove

    def remove(model, layers, masks, start, batch, count, number):
        assert all(torch.equal(start[n], first[f"{n}.weight"] * masks[n]) for n in masks), "each round starts anew"
        moved = {n: layer.weight.detach().clone() for n, layer in layers.items()}
        assert all((moved[n][masks[n] == 0] == 0).all() for n in masks), "what is pruned does not train"
        before = {n: m.clone() for n, m in masks.items()}
        report = original(model, layers, masks, start, batch, count, number)
        seen.append((before, {n: m.clone() for n, m in masks.items()}, moved, start, report))
        return report

    monkeypatch.setattr(tool, "remove", remove)
    masks, rounds = tool.prune(net, data(), 300)
    assert rounds[0]["alive"] == 216 + 576 + 256 and rounds[-1]["alive"] == 300
    for (before, after, moved, start, report), entry in zip(seen, rounds):
        assert report["host"] + report["ap"] == min(entry["alive"] - 300, round(0.3 * entry["alive"]))
        assert report["ap"] == pytest.approx((report["host"] + report["ap"]) / 3, abs=0.51)
        gone = {n: (before[n] == 1) & (after[n] == 0) for n in before}
        assert sum(int(g.sum()) for g in gone.values()) == report["host"] + report["ap"]
        assert all((after[n] <= before[n]).all() for n in before), "masks only shrink"
        lost = least({n: w.abs() for n, w in moved.items()}, before, report["host"])
        woken = {n: gone[n] & ~lost[n] for n in gone}
        assert all((moved[n][woken[n]] < 0).all() for n in woken)
        movement = {n: (moved[n] - start[n]).abs() for n in woken}
        farthest = max(float(movement[n][woken[n]].max()) for n in woken if woken[n].any())
        left = [movement[n][(after[n] == 1) & (moved[n] < 0)] for n in woken]
        assert farthest <= float(torch.cat(left).min()) + 1e-9
    assert all((layer.weight[masks[n] == 0] == 0).all() for n, layer in prunable(net).items())
    for i in (0, 4, 7):
        assert net[i].bias.all(), "biases are no part of it"


def test_a_weight_that_happens_to_be_zero_is_not_pruned():
    net = network()
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = 0.0
    masks, _ = ActivateWhilePruning(epochs=1).prune(net, data(), 216 + 576 + 256)
    assert all(mask.all() for mask in masks.values()) and net[0].weight[0, 0, 0, 0] != 0


def test_the_host_alone_and_late_rounds(monkeypatch):
    _, rounds = ActivateWhilePruning(share=0, epochs=0).prune(network(), data(), 700)
    assert all(entry["ap"] == 0 for entry in rounds)
    _, rounds = ActivateWhilePruning(first_ap_round=1, epochs=0).prune(network(), data(), 700)
    assert rounds[0]["ap"] == 0 and rounds[1]["ap"] > 0
    net = network()
    with torch.no_grad():
        for layer in prunable(net).values():
            layer.weight.abs_()
    _, rounds = ActivateWhilePruning(epochs=0).prune(net, data(), 700)
    assert rounds[0]["ap"] == 0 and rounds[1]["alive"] < rounds[0]["alive"], "without negative weights the host goes on"


@pytest.mark.parametrize("layer", [nn.Linear(20, 7), nn.Conv2d(4, 6, 3, 2, 1, 1, 2, bias=False), nn.Conv1d(3, 5, 3)])
def test_sparse_layers_compute_what_the_masked_ones_do(layer):
    mask = (torch.rand_like(layer.weight) < 0.3).float()
    sparse = SparseLayer(layer, mask)
    with torch.no_grad():
        layer.weight.mul_(mask)
    x = {nn.Linear: torch.randn(2, 20), nn.Conv2d: torch.randn(2, 4, 9, 9), nn.Conv1d: torch.randn(2, 3, 9)}[
        type(layer)
    ]
    assert torch.equal(sparse(x), layer(x)) and sparse.values.numel() == int(mask.sum())
    sparse(x).sum().backward()
    assert sparse.values.grad.any()
    again = SparseLayer(layer, mask)
    again.load_state_dict(deepcopy(sparse.state_dict()))
    assert torch.equal(again(x), sparse(x))


def test_budgets_of_parameters_and_bytes_are_met_exactly():
    tool = ActivateWhilePruning(epochs=1, rate=0.5)
    result = tool(network(), data(), Budget(params=400))
    assert result.report.after["params"] == 400 == sum(p.numel() for p in result.model.parameters())
    size = 3000
    result = tool(network(), data(), Budget(bytes=size))
    assert size - 4 < result.report.after["bytes"] <= size
    weights = sum(layer.values.numel() for layer in result.model.modules() if isinstance(layer, SparseLayer))
    assert result.report.after["bits"] == pytest.approx((32 * weights + 216 + 576 + 256) / (216 + 576 + 256))
    plain = tool(network(), data())
    density = plain.report.details["density"]
    assert sum(int(mask * n) for mask, n in zip(density.values(), (216, 576, 256))) == pytest.approx(105, abs=3)


def test_the_rate_warms_up_in_steps_and_falls_by_epochs(monkeypatch):
    rates = []

    class Noted(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Noted)
    net = network()
    ActivateWhilePruning(epochs=4, batch_size=24, lr=0.8, warmup=5).train(net, {}, {}, data(), 0)
    expected = [0.16, 0.32, 0.48, 0.64, 0.08, 0.08, 0.008, 0.008]  # two steps an epoch; less from epochs 2 and 3 on
    assert rates == [[pytest.approx(rate)] for rate in expected]
    rates.clear()
    ActivateWhilePruning(epochs=4, batch_size=24, lr=0.8).train(net, {}, {}, data(), 0)
    assert rates[:4] == [[0.8]] * 4, "without warm-up"


class There(nn.Module):
    """A network on the meta device that notes where its images come from."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.note = seen.append  # a copy notes it there too
        self.linear = nn.Linear(192, 2, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        self.note(x.device.type)
        return self.linear(x.flatten(1)).relu()


def test_images_and_labels_go_where_the_network_lies(monkeypatch):
    seen: list[str] = []
    asked: list[str] = []
    net = There(seen)
    with pytest.raises(RuntimeError, match="item"):  # which meta tensors do not have, after all else has worked
        accuracy(net, data())
    measured(net, torch.rand(1, 3, 8, 8))
    assert zeros_of(net, torch.rand(2, 3, 8, 8)).is_meta and set(seen) == {"meta"}
    monkeypatch.setattr(module, "accuracy", lambda *_: None)
    monkeypatch.setattr(module, "sample", lambda d, n, device: asked.append(device.type) or sample(d, n, device))
    seen.clear()
    with pytest.raises(RuntimeError, match="item"):
        ActivateWhilePruning(epochs=1)(net, data())
    assert set(seen) == {"meta"} and asked == ["meta", "meta"]
    assert all(part.is_meta for part in sample(data(), 3, "meta"))


def test_complaints_are_sentences():
    net = network()
    for bad, message in ((dict(share=0.3), "share <= rate"), (dict(sparsity=1.0), "sparsity < 1")):
        with pytest.raises(BadInput, match=message):
            ActivateWhilePruning(**bad)
    with pytest.raises(BadInput, match="labelled images"):
        ActivateWhilePruning()(net)
    with pytest.raises(BadInput, match="leaves no weights"):
        weights_within(Budget(params=20), net, measured(net, torch.rand(1, 3, 8, 8)), 0.9)
    with pytest.raises(BadInput, match="cannot meet the budget"):
        ActivateWhilePruning(epochs=0)(net, data(), Budget(macs=10))


def test_a_better_than_chance_network_comes_out():
    result = ActivateWhilePruning(epochs=8, rate=0.3, sparsity=0.5, batch_size=16)(network(), data())
    assert result.report.score_after is not None and result.report.score_after > 0.9
    assert result.report.details["rounds"][-1]["dead"]["units"] == 8 * 64 + 8 * 16
    assert module.has_relu(result.model)
