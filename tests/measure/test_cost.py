"""Counts against hand-made sums, memory against the allocator's own log, and latency's form."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opsin.cli import run
from opsin.errors import BadInput, UnknownName
from opsin.measure.cost import count_activations, count_macs, count_params, latency, measure, peak_memory


class Attention(nn.Module):
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


class VectorProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7))

    def forward(self, x):
        return self.weight @ x


CASES = [  # layer, input, MACs, activations, all by hand
    (nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 10, 10), 2 * 100 * 8 * 2 * 9, 2 * 8 * 100),
    (nn.Conv2d(6, 6, 7, stride=2, groups=6), (1, 6, 21, 15), 8 * 5 * 6 * 49, 6 * 8 * 5),
    (nn.ConvTranspose2d(4, 8, 3, groups=2, stride=2), (2, 4, 10, 10), 2 * 100 * 4 * 4 * 9, 2 * 8 * 21 * 21),
    (nn.Conv3d(4, 8, 3), (2, 4, 10, 10, 10), 2 * 512 * 8 * 4 * 27, 2 * 8 * 512),
    (nn.Linear(8, 9), (2, 3, 8), 6 * 72, 54),
    (nn.Linear(8, 9), (8,), 72, 9),
    (VectorProduct(), (7,), 35, 5),
    (Attention(), (2, 16, 8, 8), 2 * (2 * 64 * 64 * 16), 2 * (64 * 64 + 64 * 16)),
    (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)), (1, 3, 8, 8), 0, 0),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("layer", "shape", "macs", "activations"), CASES)
def test_counts_by_hand(layer, shape, macs, activations, device):
    layer = copy.deepcopy(layer).to(device)
    x = torch.zeros(shape, device=device)
    assert count_macs(layer, x) == macs
    assert count_activations(layer, x) == activations


def test_attention_layers_count_their_attention():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    projections, attention, mlp = 10 * 16 * 48 + 10 * 16 * 16, 2 * 2 * 4 * 5 * 5 * 4, 2 * 10 * 16 * 32
    assert count_macs(layer, torch.zeros(2, 5, 16)) == projections + attention + mlp
    assert layer.training


def test_shared_parameters_count_once():
    layer = nn.Linear(5, 5, bias=False)
    assert count_params(nn.Sequential(layer, layer)) == 25


def net():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 4, 1)
    )


def test_forward_peak_by_hand():
    model, x = net(), torch.randn(1, 3, 64, 64)
    weights = 4 * count_params(model)
    wide = 32 * 64 * 64 * 4
    assert peak_memory(model, (x,)) == weights + x.nbytes + 2 * wide  # an operator's input and its output at a time


def test_a_wider_branch_that_is_kept_raises_the_peak():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            first = self.net[0](x)
            return self.net[1:](first) + first.mean()

    x = torch.randn(1, 3, 64, 64)
    assert peak_memory(Kept(), (x,)) == peak_memory(net(), (x,)) + 32 * 64 * 64 * 4


def test_forward_peak_agrees_with_the_allocator(capfd):
    model, x = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(3)]), torch.randn(999, 256)
    base = 4 * count_params(model) + x.nbytes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.no_grad():
            model(x)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak_memory(model, (x,)) == pytest.approx(base + peak, rel=0.02)


def test_training_peak_holds_weights_gradients_moments_and_what_backward_needs():
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))
    weights = 4 * count_params(model)
    small = peak_memory(model, (torch.randn(1, 512),), training=True)
    assert 4 * weights <= small <= 6 * weights
    deep = nn.Sequential(*[nn.Tanh() for _ in range(20)])
    x = torch.randn(100, 1000, requires_grad=True)
    assert peak_memory(deep, (x,), training=True) >= 21 * x.nbytes  # every tanh keeps its output
    assert peak_memory(deep, (x,)) == 3 * x.nbytes


def test_measuring_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(model.state_dict())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    cost = measure(model, 16, batch=2, training=True, modes=("eager", "channels_last+bf16"), repeats=3)
    assert model.training and set(cost.latency) == {"eager", "channels_last+bf16"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[0].weight.dtype == torch.float32


def test_one_channel_and_oblong_input():
    cost = measure(nn.Conv2d(1, 2, 3), (20, 10), channels=1, batch=3, modes=())
    assert cost.input == (3, 1, 20, 10)
    assert cost.macs == 3 * 18 * 8 * 2 * 9
    assert cost.activations == 3 * 18 * 8 * 2
    assert cost.peak_memory_forward and cost.peak_memory_train is None


def test_latency_states_runs_threads_and_spread():
    class Sometimes(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            for _ in range(200 if self.calls % 2 else 1):
                x = x.sin()
            return x

    model = Sometimes()
    result = latency(model, torch.randn(100, 100), repeats=8, warmup=2)
    assert (result.runs, result.threads, model.calls) == (8, torch.get_num_threads(), 10)
    assert result.iqr_ms > 0.5 * result.median_ms > 0


def test_latency_stops_in_time():
    model = nn.Linear(300, 300)
    assert latency(model, torch.randn(300, 300), repeats=10_000, max_seconds=0.0).runs == 3


def test_unknown_mode_and_wrong_input_are_sentences():
    with pytest.raises(UnknownName, match="channels_last"):
        latency(net(), torch.zeros(1, 3, 8, 8), "chanels_last")
    with pytest.raises(BadInput, match="1x1x8x8"):
        measure(net(), 8, channels=1)
    with pytest.raises(BadInput, match="at least 1"):
        measure(net(), 0)


def test_cost_prints_and_serialises():
    cost = measure(net(), 16, repeats=3)
    assert json.loads(json.dumps(cost.to_dict()))["latency"]["eager"]["runs"] == 3
    assert "parameters" in str(cost) and "thread" in str(cost)


def test_command_line_counts_without_building(capsys):
    assert run(["measure", "espcn_x3", "--input", "8x9", "--channels", "1", "--modes", "none", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["params"] == 22_729
    assert out["macs"] == 8 * 9 * (25 * 64 + 9 * 64 * 32 + 9 * 32 * 9)
    assert out["peak_memory_forward"] is None and out["latency"] == {}


def test_command_line_table_and_errors(capsys):
    assert run(["measure", "espcn_x2", "--input", "16", "--channels", "1", "--repeats", "3", "--training"]) == 0
    out = capsys.readouterr().out
    assert "21.284 k" in out and "training step" in out and "latency, eager" in out
    assert run(["measure", "espcn_x2", "--input", "big"]) == 2
    assert run(["measure", "espcn_x2(nonsense=1)"]) == 2
    assert run(["measure", "espcn_x2", "--device", "cuda"]) == 2 or torch.cuda.is_available()


@pytest.mark.slow
def test_compiled_latency():
    assert latency(net(), torch.randn(1, 3, 16, 16), "compiled", repeats=3).median_ms > 0


def test_a_network_of_more_than_an_image_is_named():
    with pytest.raises(BadInput, match="more than an image"):
        measure("edm_digits", 8, channels=1, modes=())
