"""SimMIM's claim: large hidden cells and a one-layer head make masked image modelling a good pre-training.

A small ViT on CIFAR-10: pre-trained without labels with hidden cells of 4, 8 and 16 pixels, and with a two-block
decoder in place of the linear head; then fine-tuned on 1,000 labels, against the same fine-tuning from scratch.
"""

import torch
from torch import Tensor, nn

import opsin
from opsin.backbones.vit import Block, VisionTransformer
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.pretrain.masking import cell_mask, mean_distance_to_visible, spread
from opsin.pretrain.simmim import SimMIM
from opsin.train.bare import accuracy, flip_and_shift, tensors, train

DIM, DEPTH, PATCH = 64, 3, 4
CELLS = (4, 8, 16)


def backbone() -> VisionTransformer:
    return VisionTransformer(
        dim=DIM, depth=DEPTH, num_heads=4, mlp_ratio=2.0, patch_size=PATCH, image_size=32, num_classes=0,
        global_pool="avg",
    )  # fmt: skip


class HeavyDecoder(nn.Module):
    """Two transformer blocks in front of SimMIM's linear head."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(DIM, 4, 2.0, None, 0.0) for _ in range(2)))
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        return self.head(self.blocks(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, grid))


def pretrained(cell: int, heavy: bool, images: Tensor, steps: int, seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    net = SimMIM(backbone(), mask_patch=cell)
    net.decoder = HeavyDecoder(net.decoder) if heavy else net.decoder
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = flip_and_shift(images[torch.randint(len(images), (128,), generator=order)])
        optimiser.zero_grad()
        net(x)["loss"].backward()
        optimiser.step()
        schedule.step()
    return net.backbone


def fine_tuned(net: VisionTransformer, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> float:
    torch.manual_seed(seed)
    net.head, net.num_classes = nn.Linear(DIM, 10), 10
    nn.init.trunc_normal_(net.head.weight, std=0.02)
    return accuracy(train(net, *data, steps=300, seed=seed, batch=64, lr=1e-3), *test)


def normalised(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return (pair[0] - 0.47) / 0.25, pair[1]


def invisible_gradient(net: SimMIM) -> float:
    """The largest gradient of the loss at a visible pixel of the reconstruction."""
    x = torch.randn(4, 3, 32, 32)
    mask = cell_mask(4, 32, 32, 8, 0.6)
    imagined = net.reconstruct(x, mask).detach().requires_grad_()
    hidden = spread(mask, 32, 32)[:, None]
    (((imagined - x).abs() * hidden).sum() / hidden.sum()).backward()
    return float(imagined.grad.masked_fill(hidden, 0).abs().max())


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(budget.seeds)
    experiment = Experiment(
        "simmim",
        "Masked image modelling with moderately large cells and a one-layer head beats training from scratch, small "
        "cells, and needs no heavier decoder.",
        data="CIFAR-10: 5,000 images without labels, 1,000 with, 2,000 test images",
        baseline="fine-tuning from scratch; cells of one token; a two-block decoder", seeds=seeds,
    )  # fmt: skip
    experiment.check("gradient at visible pixels (max)", invisible_gradient(SimMIM(backbone(), mask_patch=8)), "==", 0)
    torch.manual_seed(0)
    distance = {c: mean_distance_to_visible(spread(cell_mask(500, 32, 32, c, 0.6), 32, 32)) for c in CELLS}
    experiment.record("mean distance to a visible pixel", distance)
    experiment.check("distance, cell 8 over 4", distance[8] / distance[4], ">", 1)
    experiment.check("distance, cell 16 over 8", distance[16] / distance[8], ">", 1)

    data = opsin.data.open("cifar10")
    images, labels = normalised(tensors(data.train, 5_000))
    few, test = (images[:1_000], labels[:1_000]), normalised(tensors(data.test, 2_000))
    steps = max(20, int(budget.seconds / budget.seeds / 4 * 5))
    scores: dict[str, list[float]] = {"scratch": []}
    for seed in seeds:
        torch.manual_seed(seed)
        scores["scratch"].append(fine_tuned(backbone(), few, test, seed))
        for cell in CELLS:
            net = pretrained(cell, False, images, steps, seed)
            scores.setdefault(f"cell {cell}", []).append(fine_tuned(net, few, test, seed))
        net = pretrained(8, True, images, steps, seed)
        scores.setdefault("cell 8, heavy decoder", []).append(fine_tuned(net, few, test, seed))
    experiment.record("percent after fine-tuning", scores)
    experiment.compare("cell 8 over cell 4 (points)", scores["cell 8"], scores["cell 4"], 1.0)
    experiment.compare("linear head over decoder (points)", scores["cell 8"], scores["cell 8, heavy decoder"], -0.5)
    experiment.compare("cell 8 over scratch (points)", scores["cell 8"], scores["scratch"], 3.0)
    return experiment.evidence(
        budget,
        notes=f"ViT of width {DIM} and depth {DEPTH}, {steps} steps of 128 images of pre-training: far from the "
        "paper's 800 epochs; a smaller net and shorter schedule than the fact sheet's proposal, to fit a laptop.",
    )
