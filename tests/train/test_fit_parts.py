"""The parts of training by themselves: order, schedule, decay, averages, rates, loaders."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from opsin.train import budget, sampler
from opsin.train.defaults import DEFAULTS, Plan, choose_batch_size, choose_lr
from opsin.train.optimizer import WarmupCosine, adamw, averaged, parameter_groups
from opsin.train.sampler import EvalBatches, Reader, TrainBatches, loader, mix, seed_generators

PLAN = Plan(
    steps=100, steps_per_epoch=10, validate_every=10, log_every=1, batch_size=4, eval_batch_size=8, lr=0.1,
    weight_decay=0.5, warmup_steps=10, ema_decay=0.9,
)  # fmt: skip


def batches(count=23, size=5, seed=1, epoch=0):
    order = TrainBatches(count, size, seed)
    order.set_epoch(epoch)
    return order


def test_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch():
    epochs = [[i for batch in batches(epoch=e) for i in batch.indices] for e in (0, 1)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    assert [b.indices for b in batches()] == [b.indices for b in batches()]
    assert [b.indices for b in batches(seed=2)] != [b.indices for b in batches()]
    seeds = [batch.seed for epoch in (0, 1) for batch in batches(epoch=epoch)]
    assert len(set(seeds)) == 8


@given(step=st.integers(0, 40))
@settings(max_examples=41, deadline=None)
def test_resuming_skips_exactly_what_was_trained_on(step):
    """Four steps in an epoch; at the end of an epoch nothing of it is left, and the next one is whole."""
    order = batches()
    order.resume(step)
    epoch = max(step - 1, 0) // 4
    assert list(order) == list(batches(epoch=epoch))[step - 4 * epoch :]
    order.set_epoch(epoch + 1)
    assert list(order) == list(batches(epoch=epoch + 1))


def test_processes_share_each_batch(monkeypatch):
    whole = list(batches(size=6))
    shares = []
    for rank in range(2):
        monkeypatch.setattr(sampler, "world", lambda rank=rank: (rank, 2))
        shares.append((list(batches(size=6)), list(EvalBatches(21, 5))))
    for batch, one, two in zip(whole, shares[0][0], shares[1][0], strict=True):
        assert len(one.indices) == len(two.indices) == 3
        assert sorted(one.indices + two.indices) == sorted(batch.indices)
        assert one.seed != two.seed
    assert sorted(i for _, evaluation in shares for b in evaluation for i in b.indices) == list(range(21))
    assert all(batch.indices for _, evaluation in shares for batch in evaluation)


@given(count=st.integers(1, 300), size=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_evaluation_sees_every_sample_once_in_order(count, size):
    order = EvalBatches(count, size)
    sizes = [len(batch.indices) for batch in order]
    assert [i for batch in order for i in batch.indices] == list(range(count))
    assert len(sizes) == len(order) and max(sizes) <= size and max(sizes) - min(sizes) <= 1


class Drawing:
    """A split that draws from the global random numbers, and follows the epochs."""

    epoch = -1

    def __len__(self):
        return 12

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return torch.rand(1, 2, 2) + self.epoch, index


def test_what_a_split_draws_is_a_function_of_the_batch():
    def read(start, workers=0):
        order = TrainBatches(12, 3, seed=0)
        order.resume(start)
        order.set_epoch(1)
        torch.manual_seed(start)
        before = torch.get_rng_state()
        images = [images for images, _ in loader(Drawing(), "classify", order, workers)]
        assert torch.equal(torch.get_rng_state(), before)
        return images

    whole, rest, ahead = read(0), read(6), read(0, workers=1)
    assert len(whole) == 4 and len(rest) == 2
    torch.testing.assert_close(whole[2:], rest, rtol=0, atol=0)
    torch.testing.assert_close(whole, ahead, rtol=0, atol=0)
    assert min(float(x.min()) for x in whole) >= 1, "set_epoch(1) was not heard"


def test_reading_whole_batches_from_memory(data):
    from opsin.data.splits import Arrays

    split = Arrays((data.train.images * 255).round().byte(), data.train.labels)
    one_by_one = Reader(split, "classify")
    one_by_one.gather = None
    key = next(iter(batches()))
    for fast, slow in zip(Reader(split, "classify")[key], one_by_one[key], strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=0)


def test_seeds_look_unrelated():
    seeds = [mix(seed, "network", step) for seed in range(20) for step in range(20)]
    low = {seed & 0xFFFFFFFF for seed in seeds}  # what the Mersenne twister takes
    assert len(low) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert mix(1, 23) != mix(12, 3)
    seed_generators(5, torch.device("cpu"))
    first = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(2))


def test_schedule_rises_and_falls():
    factor = WarmupCosine(PLAN)
    values = [factor(step) for step in range(100)]
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert values[10] == 1 and values[55] == pytest.approx(0.505) and values[99] < 0.012
    assert all(a > b for a, b in pairwise(values[10:]))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.table = nn.Parameter(torch.ones(3, 3))
        self.inner = Inner()
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def no_weight_decay(self):
        return {"table"}


class Inner(nn.Module):
    no_weight_decay = ("place",)

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.ones(1, 4, 4))
        self.weight = nn.Parameter(torch.ones(4, 4))


def test_norms_biases_and_declared_names_do_not_decay():
    net = Net()
    decayed, spared = parameter_groups(net, 0.5)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"conv.weight", "inner.weight"}
    assert {names[id(p)] for p in spared["params"]} == {"conv.bias", "norm.weight", "norm.bias", "table", "inner.place"}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    optimizer = adamw(net, PLAN)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert net.inner.weight[0, 0].item() == pytest.approx(1 - 0.1 * 0.5)
    assert net.inner.place[0, 0, 0].item() == net.frozen[0, 0].item() == 1


def test_averages_follow_weights_and_buffers():
    net = Net()
    follower = averaged(net, decay=0.9)
    assert not any(p.requires_grad for p in follower.parameters())
    expected: dict[str, torch.Tensor] = {}
    for step in range(5):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        net.norm(torch.rand(2, 4, 3, 3))
        follower.update_parameters(net)
        for name, value in net.state_dict().items():
            old = expected.get(name, value)
            expected[name] = old + 0.1 * (value - old) if value.is_floating_point() and step else value.clone()
    torch.testing.assert_close(dict(follower.module.state_dict()), expected)
    assert int(follower.module.norm.num_batches_tracked) == 5


def test_batch_sizes_and_rates_suit_small_data():
    assert [choose_batch_size("classify", n) for n in (5, 100, 1257, 45_000)] == [5, 8, 32, 128]
    assert choose_batch_size("classify", 1257, devices=3) == 30
    assert choose_batch_size("segment", 367) == 8
    usual = DEFAULTS["classify"].lr
    assert choose_lr("classify", 200_000, 128) == usual
    assert choose_lr("classify", 20_000_000, 128) == pytest.approx(usual / 10, rel=0.01)
    assert choose_lr("classify", 200_000, 32) == pytest.approx(usual / 2)
    assert math.isclose(choose_lr("classify", 10, 512), usual)


@pytest.mark.parametrize(
    ("ends", "per_step", "stops"),
    [
        ([0, 5, 6, 7, 7.1, 7.2, 7.3, 7.41, 7.52], 0.104, 8),  # a slow start is no measure
        ([0, 20], 20, 1),  # a step that takes the limit is all there is
        ([0, 7, 9, 11], 2, 3),  # without the first at least
    ],
)
def test_the_stopwatch(ends, per_step, stops, monkeypatch):
    clock = iter(ends)
    monkeypatch.setattr(budget.time, "perf_counter", lambda: next(clock))
    trainer = SimpleNamespace(should_stop=False)
    watch = budget.Stopwatch(seconds=0.5, limit=10)
    watch.on_train_start(trainer, None)
    steps = 0
    while not trainer.should_stop:
        watch.on_train_batch_end(trainer, None)
        steps += 1
    assert (steps, watch.per_step) == (stops, pytest.approx(per_step))
