"""Adaptive token sampling: the choice, batches, the cost that is met, and the official sampler's numbers."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.backbones.vit import VisionTransformer
from opsin.compress import Budget
from opsin.compress.adaptive_token_sampler import (
    SOURCE,
    AdaptiveTokenSampler,
    SampledViT,
    first_tokens,
    insert,
    inverse_transform,
    random_choice,
    significance,
    top_k,
    trace,
)
from opsin.data import Data
from opsin.deploy import export
from opsin.deploy.runner import open_runner
from opsin.errors import BadInput
from opsin.measure.cost import count_macs
from opsin.ops import native

# adaptivetokensampling/ATS, AdaptiveTokenSampler: patches kept of these scores, with 9 and with 17 reference tokens.
OFFICIAL = {
    9: [[1, 3, 4, 6, 8, 11, 12, 13], [0, 1, 2, 4, 5, 7, 12, 14]],
    17: [[1, 4, 6, 8, 9, 11, 12, 13, 14, 15], [0, 1, 2, 4, 5, 7, 9, 10, 11, 12, 14]],
}


def network(**options) -> VisionTransformer:
    """A ViT of 26 tokens whose attention is peaked, as after training."""
    torch.manual_seed(3)
    vit = VisionTransformer(dim=16, depth=5, num_heads=2, patch_size=4, image_size=20, num_classes=3, **options)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight.mul_(20)
        vit.pos_embed.mul_(20)
    return vit.double().eval()


def images(n: int = 6, seed: int = 0) -> Tensor:
    """From flat to busy."""
    noise = torch.randn(n, 3, 20, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * torch.linspace(0.05, 2, n, dtype=torch.float64)[:, None, None, None]


def kept(choice, scores: Tensor, tokens: int, exists: Tensor | None = None) -> list[list[int]]:
    exists = torch.ones_like(scores, dtype=torch.bool) if exists is None else exists
    return [row.nonzero().flatten().tolist() for row in choice(scores, exists, tokens)]


def normalised(scores: Tensor) -> Tensor:
    return scores / scores.sum(1, keepdim=True)


@pytest.mark.parametrize("tokens", OFFICIAL)
def test_the_choice_of_the_official_sampler(tokens):
    scores = normalised(torch.sin(1.3 * torch.arange(32.0)).view(2, 16).abs().pow(3))
    assert kept(inverse_transform, scores, tokens) == OFFICIAL[tokens]


def test_flat_scores_keep_many_and_peaked_ones_few():
    flat, peaked = 1 + 0.01 * torch.rand(1, 40), 1e-4 * torch.rand(1, 40)
    peaked[:, 7] = 1.0
    counts = [len(kept(inverse_transform, normalised(s), 41)[0]) for s in (flat, peaked)]
    assert counts[0] >= 38 and counts[1] <= 3
    assert 7 in kept(inverse_transform, normalised(peaked), 41)[0]


def test_the_points_start_at_the_first_value_above_zero():
    """The trap: from 0 on, the least token, whose cumulative score is 0, would always stay."""
    scores = normalised(torch.tensor([[0.1, 1.0, 2.0, 3.0, 4.0]]))
    assert kept(inverse_transform, scores, 6) == [[1, 2, 3, 4]]


def test_fillings_do_not_move_the_points():
    """The trap: a cumulative sum that starts at the fillings' 0 would keep the least token of padded images."""
    scores = normalised(torch.tensor([[0.1, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0]]))
    exists = torch.tensor([[True] * 5 + [False] * 2])
    assert kept(inverse_transform, scores, 6, exists) == [[1, 2, 3, 4]]
    assert kept(inverse_transform, scores[:, :1], 6, exists[:, :1]) == [[0]], "one token alone stays"


def test_a_point_halfway_between_two_tokens_takes_the_lower_one():
    scores = torch.tensor([[0.5, 1.0, 2.0, 3.5, 4.0, 5.5]])  # sums of 1, 3, 6.5, 10.5, 16; points at 1, 8.5, 16
    assert kept(inverse_transform, scores, 4) == [[1, 3, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # in C++, where there is a compiler, and in PyTorch
def test_a_filling_is_never_chosen_even_where_all_scores_are_zero(dtype):
    for exists in ([True] * 3 + [False] * 2, [False] * 2 + [True] * 3, [False, True, False, True, True]):
        exists = torch.tensor([exists])
        here = exists[0].nonzero().flatten().tolist()
        alone = kept(inverse_transform, torch.zeros(1, 3, dtype=dtype), 8)[0]
        padded = kept(inverse_transform, torch.zeros(1, 5, dtype=dtype), 8, exists)[0]
        assert alone and padded == [here[i] for i in alone]
    nobody = torch.zeros(1, 5, dtype=torch.bool)
    assert kept(inverse_transform, torch.zeros(1, 5, dtype=dtype), 8, nobody) == [[]]


def test_many_fillings_cost_no_precision():
    alone = normalised(torch.rand(64, 40).pow(4))
    exists = torch.tensor([[False] * 4000 + [True] * 40]).expand(64, -1)
    rows = kept(inverse_transform, torch.cat((torch.zeros(64, 4000), alone), 1), 30, exists)
    assert [[i - 4000 for i in row] for row in rows] == kept(inverse_transform, alone, 30)


def test_baselines_keep_equal_numbers():
    scores = normalised(torch.rand(3, 20))
    exists = torch.ones(3, 20, dtype=torch.bool)
    exists[0, :10] = False
    for choice in (top_k, random_choice):
        rows = kept(choice, scores, 9, exists)
        assert [len(row) for row in rows] == [8, 8, 8] and min(rows[0]) >= 10
    best = scores[1].topk(8).indices.tolist()
    assert kept(top_k, scores, 9)[1] == sorted(best) != kept(random_choice, scores, 9)[1]


@torch.no_grad()
def test_scores_are_attention_times_the_length_of_the_value():
    q, k, v = torch.randn(3, 2, 4, 9, 5).unbind()
    weights = (0.5 * q @ k.transpose(2, 3)).softmax(-1)[:, :, 0].sum(1)
    length = v.transpose(1, 2).flatten(2).norm(dim=2)
    exists = torch.ones(2, 9, dtype=torch.bool)
    for score, plain in (("attention_value", weights * length), ("attention", weights)):
        found = significance(q[:, :, 0], k, v, 0.5, exists, score)
        assert torch.allclose(found, plain[:, 1:], rtol=1e-5), "the class token takes no part"


@pytest.mark.skipif(native.library(Path(SOURCE)) is None, reason="no C++ compiler, or OPSIN_NATIVE=0")
@torch.no_grad()
@pytest.mark.parametrize("missing", [False, True])
def test_the_loops_do_what_the_operators_do(missing, monkeypatch):
    packed = torch.randn(3, 50, 3, 4, 16)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    exists = torch.rand(3, 50) > 0.4 if missing else torch.ones(3, 50, dtype=torch.bool)
    exists[:, 0] = True
    given = q[:, :, 0], k, v, 0.25, exists if missing else None
    looped = [significance(*given, score) for score in ("attention_value", "attention")]
    scores = looped[0].double().pow(torch.arange(1, 4)[:, None]).float()  # from flat to peaked
    numbers = [3, 8, 20, 50]
    chosen = [inverse_transform(scores, exists[:, 1:], number) for number in numbers]
    alone = [inverse_transform(scores[:, :1], exists[:, :1], 8)]
    many, all_exist = torch.rand(4, 20000), torch.ones(4, 20000, dtype=torch.bool)
    of_many = inverse_transform(many, all_exist, 20000)
    monkeypatch.setattr(native, "takes", lambda x: False)
    for found, score in zip(looped, ("attention_value", "attention")):
        assert torch.allclose(found, significance(*given, score), rtol=1e-5, atol=0)
    for found, number in zip(chosen, numbers):
        assert torch.equal(found, inverse_transform(scores, exists[:, 1:], number))
    assert (of_many != inverse_transform(many, all_exist, 20000)).sum() < 60, "of 80,000, where a rounding decides"
    assert torch.equal(alone[0], inverse_transform(scores[:, :1], exists[:, :1], 8))


@pytest.mark.skipif(native.library(Path(SOURCE)) is None, reason="no C++ compiler, or OPSIN_NATIVE=0")
@torch.no_grad()
@pytest.mark.parametrize("n", [1, 5])
def test_the_loops_run_on_threads(n):
    """Tokens and images are shared out; no sum is."""
    q, k, v = torch.randn(n, 50, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind()
    exists, threads = torch.rand(n, 50) > 0.2, torch.get_num_threads()

    def found() -> list[torch.Tensor]:
        scores = significance(q[:, :, 0], k, v, 0.25, exists, "attention_value")
        return [scores, inverse_transform(scores, exists[:, 1:], 20)]

    torch.set_num_threads(1)
    try:
        alone = found()
        torch.set_num_threads(3)
        assert all(map(torch.equal, found(), alone))
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_scores_want_no_particular_memory():
    q, k, v = torch.randn(3, 2, 4, 9, 5).unbind()
    exists = torch.ones(2, 9, dtype=torch.bool)
    expected = significance(q[:, :, 0], k, v, 0.5, exists, "attention_value")
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.allclose(significance(q[:, :, 0], turned, v, 0.5, exists, "attention_value"), expected, rtol=1e-5)
    assert torch.allclose(significance(q[:, :, 0].clone(), k, v, 0.5, exists, "attention_value"), expected, rtol=1e-5)
    apart = torch.cat((k, k), 1)[:, :4]
    assert torch.allclose(significance(q[:, :, 0], apart, v, 0.5, exists, "attention_value"), expected, rtol=1e-5)
    exists[0, 5:], exists[1, 2:4] = False, False
    strided = exists.T.contiguous().T
    masked = significance(q[:, :, 0], k, v, 0.5, exists, "attention_value")
    assert torch.allclose(significance(q[:, :, 0], k, v, 0.5, strided, "attention_value"), masked, rtol=1e-5)
    for scores, present in ((masked.T.contiguous().T, exists[:, 1:]), (masked, strided[:, 1:])):
        chosen = inverse_transform(scores, present, 6)
        assert torch.equal(chosen, inverse_transform(masked, exists[:, 1:], 6))


@torch.no_grad()
def test_all_tokens_kept_is_the_plain_network():
    vit, x = network(), images()
    assert torch.allclose(SampledViT(vit, 1, choice="top_k")(x), vit(x), atol=1e-12)
    assert not torch.allclose(SampledViT(vit, 1)(x), vit(x), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1.0, 0.5, 12])
def test_a_batch_is_its_images_one_by_one(tokens):
    sampled, x = SampledViT(network(), 1, tokens), images()
    counts = torch.stack([exists.sum(1) for exists in sampled.run(x)[1]]).double()
    assert counts.std(1).max() > 0, "images keep different numbers"
    assert all(exists[:, 0].all() for exists in sampled.run(x)[1]), "the class token stays"
    assert all(exists.sum(1).max() == exists.shape[1] for exists in sampled.run(x)[1]), "cut to the longest"
    assert torch.allclose(sampled(x), torch.cat([sampled(image[None]) for image in x]), atol=1e-12)
    few, many = sampled(x[[0, 5]])
    assert torch.allclose(torch.stack((few, many)), sampled(x)[[0, 5]], atol=1e-12), "two images are a batch too"
    assert (counts[1:] <= counts[:-1]).all() and counts.max() <= sampled.limit(26, 0)


@torch.no_grad()
def test_kept_tokens_still_read_all_tokens_of_their_block():
    """Soft down-sampling: the block is the plain block, of which some rows are taken."""
    vit, x = network(), images()
    sampled, z = SampledViT(vit, 0, 10), first_tokens(vit, x)
    y, exists = sampled.sampled(vit.blocks[0], z, torch.ones(z.shape[:2], dtype=torch.bool), 10)
    plain = vit.blocks[0](z)
    for i in range(len(x)):
        away = (y[i][exists[i]][:, None] - plain[i][None]).abs().amax(2)
        assert away.amin(1).max() < 1e-10 and torch.allclose(y[i, 0], plain[i, 0])


def test_gradients_flow_and_the_choice_has_none():
    sampled = SampledViT(network(), 1).train()
    sampled(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in sampled.parameters())


@pytest.mark.parametrize("tokens", [1.0, 12])
def test_exported_programs_mask_what_eager_drops(tokens):
    sampled, x = SampledViT(network(), 1, tokens).eval(), images()
    program = torch.export.export(sampled, (x,)).module()
    with torch.no_grad():
        assert torch.allclose(program(x), sampled(x), atol=1e-12)
        other = images(seed=1)
        assert torch.allclose(program(other), sampled(other), atol=1e-12), "another image, other tokens"


def test_it_leaves_as_an_onnx_file(tmp_path):
    sampled, x = SampledViT(network().float(), 1, 12).eval(), images().float()
    runner = open_runner(export(sampled, tmp_path / "m.onnx", input_size=20))
    assert torch.allclose(runner(x), sampled(x), atol=1e-4)


def test_cost_by_formula_is_the_cost_that_is_counted():
    vit, x = network(), images()
    sampled = SampledViT(vit, 1)
    found = trace(sampled, x, count_macs(vit, x[:1]))
    assert found.macs.tolist() == [count_macs(sampled, image[None]) for image in x]
    assert found.counts.shape == (6, 4) and found.macs.std() > 0


def data(n: int = 20) -> Data:
    pairs = [(image.float(), i % 3) for i, image in enumerate(images(n))]
    return Data("waves", "classify", {"train": pairs, "val": pairs}, ("a", "b", "c"), 3, (20, 20))


def test_the_largest_number_within_the_budget():
    vit = network().float()
    model = nn.Sequential(nn.Identity(), deepcopy(vit))
    plain = count_macs(vit, images(1).float())
    result = AdaptiveTokenSampler(first=1)(model, data(), Budget(macs=int(0.42 * plain)))
    details, sampled = result.report.details, result.model[1]
    counted = [count_macs(result.model, image[None]) for image, _ in data().val]
    assert details["macs_mean"] == pytest.approx(sum(counted) / len(counted)) and details["macs_mean"] <= 0.42 * plain
    assert count_macs(result.model, result.example) <= 0.42 * plain
    assert sampled.tokens < 26
    sampled.tokens += 1
    more = [count_macs(result.model, image[None]) for image, _ in data().val]
    assert sum(more) / len(more) > 0.42 * plain, "one more would not fit"
    assert isinstance(model[1], VisionTransformer), "the original stays"


@pytest.mark.parametrize(("tokens", "share"), [(1.0, None), (1.0, 0.5), (0.6, None), ([20, 12, 16, 9], None)])
def test_a_saved_file_costs_what_the_report_says(tokens, share, tmp_path):
    vit = network().float()
    plain = count_macs(vit, images(1).float())
    budget = Budget(macs=share and int(share * plain))
    result = AdaptiveTokenSampler(first=1, tokens=tokens)(vit, data(), budget)
    program = nn.Module()
    program.forward = torch.export.load(result.save(tmp_path / "m.pt2")).module().forward
    found = count_macs(program, result.example)
    assert result.report.details["exported_macs"] == found > result.report.after["macs"]
    assert (found == plain) == (tokens == 1.0 and share is None), "K = N saves nothing there"


def test_images_go_where_the_network_lies():
    """On the meta device, where the first block that samples fails for want of values."""
    seen = []
    entrance = nn.Identity()
    entrance.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].device.type))
    model = nn.Sequential(entrance, network().float()).to("meta")
    unlabelled = Data("waves", "images", data().splits, (), 3, (20, 20))
    with pytest.raises(RuntimeError):
        AdaptiveTokenSampler(first=1)(model, unlabelled)
    assert len(seen) > 3 and set(seen) == {"meta"}


def test_the_published_network():
    with torch.device("meta"):
        vit = opsin.create("vit_small_patch16_224")
    sampled = insert(vit, **vars_of(opsin.create("ats_deit_s")))[1]
    assert (sampled.first, len(vit.blocks[sampled.first :]), sampled.limit(197, 0)) == (3, 9, 197)
    assert sum(p.numel() for p in sampled.parameters()) == pytest.approx(22.05e6, rel=0.005)


def vars_of(sampler: AdaptiveTokenSampler) -> dict[str, object]:
    return {name: getattr(sampler, name) for name in ("first", "tokens", "choice", "score")}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: SampledViT(network(global_pool="avg"), 1), "class token"),
        (lambda: SampledViT(network(), 5), "names no block"),
        (lambda: SampledViT(network(), choice="best"), "the choices are"),
        *((lambda k=k: SampledViT(network(), 1, k), "int of at least 1") for k in (20.0, 2.0, 0.0, -0.5, 0, -3, "all")),
        (lambda: SampledViT(network(), 1, [12, 12, 1.5, 12]), "tokens=1.5 is no"),
        (lambda: SampledViT(network(), 1, [12, 12]), "2 numbers for 4 sampled blocks"),
        (lambda: AdaptiveTokenSampler(tokens=20.0)(network().float(), data()), "int of at least 1"),
        (lambda: AdaptiveTokenSampler()(nn.Linear(3, 3), data()), "0 plain ViTs"),
        (lambda: AdaptiveTokenSampler()(network(), None, Budget(macs=1)), "pass data"),
        (lambda: AdaptiveTokenSampler()(network()), "input_size"),
        (lambda: AdaptiveTokenSampler(first=1)(network().float(), data(), Budget(macs=1000)), "cannot meet macs"),
        (lambda: AdaptiveTokenSampler(first=1)(network().float(), data(), Budget(bytes=10)), "MACs only"),
    ],
)
def test_what_does_not_fit_says_so(wrong, message):
    with pytest.raises(BadInput, match=message):
        wrong()
