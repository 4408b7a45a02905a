"""Adaptive token sampling's claim: without training it saves a third of a ViT's work at almost no loss of accuracy.

A small ViT with a class token on CIFAR-10, trained plainly. Then sampling goes in from block 3 on: what it saves and
costs, against the same number of tokens per block by the highest score and by lot, and whether the number kept follows
the scores' entropy. Exact: all tokens kept is the plain ViT; a batch is its images one by one.
"""

import statistics
import time
from collections.abc import Sequence
from copy import deepcopy

import torch
from scipy.stats import spearmanr
from torch import Tensor

import opsin
from opsin.backbones.vit import VisionTransformer
from opsin.compress import Budget
from opsin.compress.adaptive_token_sampler import (
    AdaptiveTokenSampler,
    SampledViT,
    Trace,
    first_tokens,
    inner_images,
    inverse_transform,
    significance,
    trace,
)
from opsin.data import Data
from opsin.measure.cost import count_macs
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.train.bare import accuracy, tensors, train

FIRST, COUNTED = 3, 250  # the first block that samples; images that cost and entropy are measured on
WITHIN = 0.69  # of the multiply-adds, a little less than the 70 % that are to be left on other images


def network() -> VisionTransformer:
    """65 tokens of 64 channels, 8 blocks."""
    return VisionTransformer(dim=64, depth=8, num_heads=4, mlp_ratio=2.0, patch_size=4, image_size=32, num_classes=10)


@torch.no_grad()
def exact(experiment: Experiment, vit: VisionTransformer, images: Tensor) -> None:
    """On a trained net; the baselines keep all tokens where asked to."""
    everything = SampledViT(deepcopy(vit), FIRST, choice="top_k").double()
    doubled, x = deepcopy(vit).double(), images[:16].double()
    difference = (everything(x) - doubled(x)).abs().max()
    experiment.check("all tokens kept against the plain ViT (max error of logits)", difference, "<", 1e-10)
    sampled = SampledViT(deepcopy(vit), FIRST).double()
    together, alone = sampled(x), torch.cat([sampled(image[None]) for image in x])
    experiment.check("a batch against its images one by one (max error)", (together - alone).abs().max(), "<", 1e-10)
    lost = sum(int((~exists[:, 0]).sum()) for exists in sampled.run(x)[1])
    experiment.check("class tokens lost", lost, "==", 0)


@torch.no_grad()
def entropies(vit: VisionTransformer, images: Tensor) -> tuple[list[float], list[float]]:
    """Of the scores in the first sampled block, with the patches that are then kept, per image."""
    z = first_tokens(vit, images)
    for block in vit.blocks[:FIRST]:
        z = block(z)
    attn = vit.blocks[FIRST].attn
    q, k, v = attn.heads(vit.blocks[FIRST].norm1(z))
    exists = torch.ones(z.shape[:2], dtype=torch.bool)
    scores = significance(q[:, :, 0], k, v, attn.scale, exists, "attention_value")
    kept = inverse_transform(scores, exists[:, 1:], z.shape[1]).sum(1)
    return torch.special.entr(scores / scores.sum(1, keepdim=True)).sum(1).tolist(), kept.float().tolist()


def adapted(vit: VisionTransformer, held_out: Data, plain: int) -> SampledViT:
    """The net with the largest K that saves enough on images that it was trained on; all tokens if that saves it."""
    result = AdaptiveTokenSampler(first=FIRST)(vit, held_out, Budget(macs=int(WITHIN * plain)))
    assert isinstance(result.model, SampledViT)
    return result.model


def cost(sampled: SampledViT, images: Tensor, plain: int) -> Trace:
    return trace(sampled, inner_images(sampled, sampled, images), plain)


@torch.no_grad()
def relative_time(net: torch.nn.Module, plain: torch.nn.Module, images: Tensor, rounds: int = 7) -> float:
    """Median time of a batch over that of the plain network, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for spent, model in zip(times, (net, plain), strict=True):
            start = time.perf_counter()
            model(images)
            if turn:
                spent.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def run(budget: ClaimBudget) -> Evidence:
    seeds, steps = range(budget.seeds), max(5, round(budget.seconds * 4 / 3))
    experiment = Experiment(
        "adaptive_token_sampler",
        "Sampling without training saves at least 30 % of the multiply-adds for at most 2 points; it is no worse than "
        "the highest scores and better than chance at equal numbers; the number kept follows the scores' entropy.",
        data="CIFAR-10, 10,000 train / 2,000 test images",
        baseline="the plain ViT; as many tokens per block by the highest score, or by lot", seeds=seeds,
    )  # fmt: skip
    data = opsin.data.open("cifar10")
    train_set, (images, labels) = tensors(data.train, 10_000), tensors(data.test, 2_000)
    scores: dict[str, list[float]] = {n: [] for n in ("plain", "sampled", "K = N", "attention only", "top-K", "random")}
    pairs = list(zip(*(t[:COUNTED] for t in train_set), strict=True))
    seen = Data("cifar10", "classify", {"train": pairs, "val": pairs}, data.classes, 3, (32, 32))
    saved, spread, follows = [], [], []
    for seed in seeds:
        torch.manual_seed(seed)
        vit = train(network(), *train_set, steps=steps, seed=seed)
        assert isinstance(vit, VisionTransformer)
        if seed == seeds[0]:
            exact(experiment, vit, images)
        plain = count_macs(vit, images[:1])
        sampled = adapted(vit, seen, plain)
        found, full = (cost(net, images[:COUNTED], plain) for net in (sampled, SampledViT(vit, FIRST)))
        measured = [count_macs(sampled, image[None]) for image in images[:10]]
        wrong = max(abs(a - b) for a, b in zip(measured, found.macs[:10].tolist(), strict=True))
        experiment.check(f"formula against counted multiply-adds, seed {seed} (largest difference)", wrong, "==", 0)
        saved.append(100 * (1 - float(found.macs.mean()) / plain))
        spread.append(float(full.counts[:, 0].std()))
        follows.append(float(spearmanr(*entropies(vit, images[:COUNTED])).statistic))
        equal = [round(count) for count in found.counts.mean(0).tolist()]
        nets = {
            "plain": vit, "sampled": sampled, "K = N": SampledViT(vit, FIRST),
            "attention only": SampledViT(vit, FIRST, sampled.tokens, score="attention"),
            "top-K": SampledViT(vit, FIRST, equal, "top_k"), "random": SampledViT(vit, FIRST, equal, "random"),
        }  # fmt: skip
        for name, net in nets.items():
            torch.manual_seed(seed)
            scores[name].append(accuracy(net, images, labels))
        tokens = {f"K = {sampled.tokens}": found.counts.mean(0).tolist(), "K = N": full.counts.mean(0).tolist()}
        experiment.record(f"mean tokens per sampled block, seed {seed}", tokens)
        slower = {n: relative_time(nets[n], vit, images[:50]) for n in ("sampled", "K = N")}
        experiment.record(f"time over the plain net's, 50 images, seed {seed}", slower)
        experiment.record(f"saved at K = N, seed {seed} (percent)", 100 * (1 - float(full.macs.mean()) / plain))
    experiment.record("percent", scores)
    conclude(experiment, scores, saved, spread, follows)
    return experiment.evidence(
        budget,
        notes=f"A ViT of width 64, depth 8, patches of 4, {steps} steps of 128, 65 tokens; width 96 and 10 epochs were "
        "intended. K is the largest that saves the 30 % on training images. Plain accuracy "
        f"{statistics.fmean(scores['plain']):.1f} %.",
    )


def conclude(
    experiment: Experiment, scores: dict[str, list[float]], saved: Sequence[float], spread: Sequence[float],
    follows: Sequence[float],
) -> None:  # fmt: skip
    zeros = [0.0] * len(saved)
    experiment.compare("multiply-adds saved (percent)", saved, zeros, 30.0)
    experiment.compare("sampled less plain accuracy (points)", scores["sampled"], scores["plain"], -2.0)
    experiment.compare("sampled over the highest scores (points)", scores["sampled"], scores["top-K"], 0.0)
    experiment.compare("sampled over chance (points)", scores["sampled"], scores["random"], 2.0)
    experiment.check("deviation of the number kept over images (tokens)", min(spread), ">", 0.0)
    experiment.compare("rank correlation of the number kept with entropy", follows, zeros, 0.5)
