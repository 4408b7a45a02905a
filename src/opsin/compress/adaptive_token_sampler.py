"""Adaptive token sampling: a trained ViT keeps few tokens of easy images and many of hard ones, without training.

Fayyaz et al. 2022, "Adaptive Token Sampling For Efficient Vision Transformers", arXiv:2111.15667. In the blocks from
`first` on, attention is asked what the class token reads (section 3.1, eq. 3, with the heads' values put together),

    S_j = sum_heads A[class, j] ||V_j|| / sum_i ...,

and tokens are drawn by inverse transform sampling without randomness (section 3.2): with the scores in rising order,
their cumulative sum C scaled to [0, 1], and K - 1 equidistant points y between C's first value above 0 and 1, the token
whose C is nearest to each y stays. Where scores are flat, points meet many tokens; where they are peaked, the same ones
over and over. So the number kept depends on the image, at most K with the class token. Kept tokens still attend to all
tokens of their block (soft down-sampling, eq. 2); the others are gone afterwards.

In a batch, images keep different numbers: the tensor is as long as the longest, and what fills up is never attended to.
Every image gives what it gives alone. That needs care: the official code takes the least cumulative sum over fillings
too, which then moves the first point for all images but the longest.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.backbones.vit import Block, VisionTransformer, interpolate_positions
from opsin.compress import Budget, Compressed, Report
from opsin.compress.measured import accuracy, measured
from opsin.data import Data
from opsin.errors import BadInput
from opsin.layers.device import device_of
from opsin.layers.tokens import addresses, at
from opsin.ops import native

Score = Literal["attention_value", "attention"]
SOURCE = str(Path(__file__).with_suffix(".cpp"))
FEWEST = 8  # tokens, as in the official code
IMAGES = 64  # of the validation split, that the cost is averaged over
VARIANTS = {"ats_deit_s": dict(first=3, tokens=197)}

# Chosen patches of every image, by the scores (0 where there is no token), which tokens exist, and the number K.
Choice = Callable[[Float[Tensor, "n p"], Bool[Tensor, "n p"], int], Bool[Tensor, "n p"]]


def inverse_transform(
    scores: Float[Tensor, "n p"], exists: Bool[Tensor, "n p"], tokens: int
) -> Bool[Tensor, "n p"]:  # fmt: skip
    """The paper's choice: tokens whose cumulative score is nearest to one of K - 1 > 1 points. The least one never is.

    A token is nearest to what lies between the midpoints around it, and points are equidistant: the number of points up
    to a midpoint is a division. (The sum is not scaled to [0, 1], which would move tokens and points alike.)
    """
    rows = scores.stride(1) == exists.stride(1) == 1 and exists.dtype == torch.bool and native.takes(scores)
    if rows and (run := native.loop(SOURCE, "inverse_transform", "ppp" + 6 * "l")):
        chosen = torch.empty(scores.shape, dtype=torch.bool)
        places = scores.data_ptr(), exists.data_ptr(), chosen.data_ptr()
        run(*places, *scores.shape, scores.stride(0), exists.stride(0), tokens, torch.get_num_threads())
        return chosen
    ordered, order = scores.masked_fill(~exists, -1.0).sort(1)  # what does not exist comes first and adds nothing
    absent, total = ordered < 0, ordered.clamp_min(0).cumsum(1)
    least, most = scores.masked_fill(~exists, torch.inf).amin(1, keepdim=True), total[:, -1:]
    start = total.masked_fill(total <= least, torch.inf).amin(1, keepdim=True).minimum(most)
    midway = (total[:, 1:] + total[:, :-1]) / 2
    share = (midway - start) / (most - start).clamp_min(torch.finfo(total.dtype).tiny)
    passed = (share * (tokens - 2)).floor()  # the last point's number, below 0 where there is none yet
    passed = passed.masked_fill(absent[:, :-1], -1.0)
    between = passed[:, 1:] > passed[:, :-1].clamp_min(-1)
    highest = (most >= start) & ~absent[:, -1:]  # the last point is the last token
    chosen = torch.cat((passed[:, :1] >= 0, between, highest), 1)
    return torch.empty_like(exists).scatter_(1, order, chosen)


def top_k(scores: Float[Tensor, "n p"], exists: Bool[Tensor, "n p"], tokens: int) -> Bool[Tensor, "n p"]:
    """The K - 1 highest scores: the same number for every image."""
    best = scores.masked_fill(~exists, -1.0).topk(min(tokens - 1, scores.shape[1]), dim=1).indices
    return torch.zeros_like(exists).scatter_(1, best, True) & exists


def random_choice(scores: Float[Tensor, "n p"], exists: Bool[Tensor, "n p"], tokens: int) -> Bool[Tensor, "n p"]:
    """K - 1 tokens by lot, whatever their scores."""
    return top_k(torch.rand_like(scores), exists, tokens)


CHOICES: dict[str, Choice] = {"inverse_transform": inverse_transform, "top_k": top_k, "random": random_choice}


def significance(
    query: Float[Tensor, "n h d"], keys: Float[Tensor, "n h t d"], values: Float[Tensor, "n h t d"], scale: float,
    exists: Bool[Tensor, "n t"] | None, score: Score,
) -> Float[Tensor, "n p"]:  # fmt: skip
    """The class token's attention to the patches, times the length of what it would read: S up to its sum.

    exists: None where all tokens do.
    """
    alike = keys.stride() == values.stride() == (*query.stride()[:2], keys.stride(2), 1)
    rows = exists is None or (exists.stride(1) == 1 and exists.dtype == torch.bool)
    plain = alike and rows and all(map(native.takes, (query, keys, values)))
    if plain and (run := native.loop(SOURCE, "significance", "ppppp" + 9 * "l" + "fl")):
        scores = torch.empty(keys.shape[0], keys.shape[2] - 1)
        present, stride = (None, 0) if exists is None else (exists.data_ptr(), exists.stride(0))
        places = query.data_ptr(), keys.data_ptr(), values.data_ptr(), present, scores.data_ptr()
        numbers = score == "attention_value", scale, torch.get_num_threads()
        run(*places, *keys.shape, *keys.stride()[:3], stride, *numbers)
        return scores
    logits = torch.linalg.vecdot(keys.float(), scale * query.unsqueeze(2).float())
    logits = logits if exists is None else logits.masked_fill(~exists[:, None], -torch.inf)
    attention = logits.softmax(-1).sum(1)
    if score == "attention_value":
        attention = attention * torch.linalg.vector_norm(values.float(), dim=(1, 3))
    return attention[:, 1:]


class SampledViT(nn.Module):
    """A ViT whose blocks from `first` on drop tokens: images to logits, as before. Its weights are under `vit`.

    In a compiled or exported graph, whose shapes are fixed, every block is as long as its K whatever the image keeps:
    the rest is masked, the logits are the same, and each image costs as much as one that keeps K tokens.

    Args:
        tokens: K, at most the tokens of the image and at least 8; as a float up to 1.0 the share of them; or a list of
            one number for each of the sampled blocks.
        choice: "inverse_transform", or the baselines "top_k" and "random". score: with the values' lengths or without.
    Raises BadInput: no class token at the end, biases of attention, options that do not exist, or such a K.
    """

    def __init__(
        self, vit: VisionTransformer, first: int = 3, tokens: float | list[int] = 1.0,
        choice: str = "inverse_transform", score: Score = "attention_value",
    ):  # fmt: skip
        super().__init__()
        biased = vit.rel_pos_bias is not None or any(block.rel_pos_bias is not None for block in vit.blocks)
        if vit.global_pool != "token" or biased:
            raise BadInput(
                "tokens are sampled by what the class token reads; this ViT pools over tokens or has biases of "
                'attention: build it with global_pool="token" and without rel_pos_bias'
            )
        if choice not in CHOICES or score not in ("attention_value", "attention"):
            raise BadInput(f"choice='{choice}', score='{score}' is unknown; the choices are {', '.join(CHOICES)}, and "
                           "the scores attention_value and attention")  # fmt: skip
        if not 0 <= first < len(vit.blocks):
            raise BadInput(f"first={first} names no block; this ViT has the blocks 0 to {len(vit.blocks) - 1}")
        check_tokens(tokens, len(vit.blocks) - first)
        self.vit, self.first, self.tokens, self.choice, self.score = vit, first, tokens, choice, score
        self.num_classes, self.num_features = vit.num_classes, vit.num_features

    def forward(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n c"]:
        return self.vit.forward_head(self.run(x)[0])

    def run(self, x: Float[Tensor, "n k h w"]) -> tuple[Float[Tensor, "n t c"], list[Tensor]]:
        """Tokens after the last block, the class token first, and which tokens exist after each sampled block."""
        z = first_tokens(self.vit, x)
        blocks = blocks_of(self.vit)
        for block in blocks[: self.first]:
            z = block(z)
        start, exists, kept = z.shape[1], torch.ones(z.shape[:2], dtype=torch.bool, device=z.device), []
        for number, block in enumerate(blocks[self.first :]):
            z, exists = self.sampled(block, z, exists, self.limit(start, number))
            kept.append(exists)
        return z, kept

    def limit(self, tokens: int, number: int) -> int:
        """K in the sampled block `number`, for images of so many tokens."""
        wanted = self.tokens[number] if isinstance(self.tokens, list) else self.tokens
        return min(max(round(wanted * tokens if isinstance(wanted, float) else wanted), FEWEST), tokens)

    def sampled(
        self, block: Block, z: Float[Tensor, "n t c"], exists: Bool[Tensor, "n t"], tokens: int
    ) -> tuple[Float[Tensor, "n s c"], Bool[Tensor, "n s"]]:
        """A block whose attention has the kept tokens' queries only, on all keys."""
        q, k, v = block.attn.heads(block.norm1(z))
        missing = torch.compiler.is_compiling() or (len(z) > 1 and not exists.all())
        with torch.no_grad():
            scores = significance(q[:, :, 0], k, v, block.attn.scale, exists if missing else None, self.score)
            keep = torch.cat((exists[:, :1], CHOICES[self.choice](scores, exists[:, 1:], tokens)), 1)
            early = keep * torch.arange(keep.shape[1], 0, -1, device=keep.device)  # above 0 where a token is kept
            first, kept = early.topk(self._width(keep, tokens))  # in their order, then the rest
            still = first > 0
        mask = exists[:, None, None] if missing else None
        where = addresses(kept, z.shape[1])
        q = at(q.transpose(1, 2), where).transpose(1, 2)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=block.attn.scale)
        z = at(z, where).add_(block.drop_path(block.ls1(block.attn.proj(read.transpose(1, 2).flatten(2)))))
        return z + block.drop_path(block.ls2(block.mlp(block.norm2(z)))), still

    def _width(self, keep: Bool[Tensor, "n t"], tokens: int) -> int:
        """How long the tensor stays: the most tokens that an image keeps, or may keep where shapes are fixed."""
        if torch.compiler.is_compiling():
            return min(tokens, keep.shape[1])
        return int(keep.sum(1).max())


def check_tokens(tokens: float | list[int], blocks: int) -> None:
    """Raises BadInput where K is no number of tokens, no share, and no list of one for each of the sampled blocks."""
    numbers = tokens if isinstance(tokens, list) else [tokens]
    if isinstance(tokens, list) and len(tokens) != blocks:
        raise BadInput(f"tokens={tokens} has {len(tokens)} numbers for {blocks} sampled blocks; pass one for each, or "
                       "a single number for all")  # fmt: skip
    for number in numbers:
        share, count = isinstance(number, float) and 0 < number <= 1, isinstance(number, int) and number >= 1
        if not share and not count:
            raise BadInput(f"tokens={number} is no number of tokens and no share of them; pass an int of at least 1, "
                           "or a float above 0 and up to 1.0")  # fmt: skip


def blocks_of(vit: VisionTransformer) -> list[Block]:
    """In their order."""
    return [block for block in vit.blocks if isinstance(block, Block)]


def first_tokens(vit: VisionTransformer, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n t c"]:
    """Class token and patches with their positions, as the first block gets them."""
    patches = vit.embed(x)
    z = torch.cat((vit.cls_token.expand(x.shape[0], -1, -1), patches.flatten(1, 2)), 1)
    if vit.pos_embed is None:
        return z
    return z + interpolate_positions(vit.pos_embed, vit.grid, (patches.shape[1], patches.shape[2]))


def saved_macs(vit: VisionTransformer, before: int, counts: Float[Tensor, "n blocks"]) -> Float[Tensor, " n"]:
    """Multiply-accumulates that sampling saves an image that enters with `before` tokens and keeps these.

    A block of N tokens, of which M stay, in C channels with h in the MLP: 3 N C^2 for queries, keys and values,
    2 M N C to attend, M C^2 for the projection, and 2 M C h. Scoring (N C, element by element) does not count.
    """
    dim, hidden = vit.num_features, blocks_of(vit)[0].mlp.fc1.out_features
    entering = torch.cat((torch.full_like(counts[:, :1], before), counts[:, :-1]), 1)
    spent = entering * 3 * dim**2 + counts * (2 * entering * dim + dim**2 + 2 * dim * hidden)
    plain = before * (4 * dim**2 + 2 * before * dim + 2 * dim * hidden)
    return counts.shape[1] * plain - spent.sum(1)


@dataclass
class Trace:
    """Tokens that images keep in each sampled block, and the cost that follows."""

    counts: Float[Tensor, "n blocks"]
    macs: Float[Tensor, " n"]


@torch.no_grad()
def inner_images(model: nn.Module, sampled: SampledViT, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h w"]:
    """What `sampled` gets when the model, of which it is a part, gets these images."""
    seen: list[Tensor] = []
    handle = sampled.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for part in images.split(32):
            model(part)
    finally:
        handle.remove()
    return torch.cat(seen)


@torch.no_grad()
def trace(sampled: SampledViT, images: Float[Tensor, "n k h w"], plain: int) -> Trace:
    """Runs images and notes what they keep. plain: multiply-accumulates of an image in the whole model, unsampled."""
    kept = [torch.stack([exists.sum(1) for exists in sampled.run(part)[1]], 1) for part in images.split(32)]
    counts = torch.cat(kept).double()
    return Trace(counts, plain - saved_macs(sampled.vit, first_tokens(sampled.vit, images[:1]).shape[1], counts))


def exported_macs(sampled: SampledViT, images: Float[Tensor, "n k h w"], plain: int) -> int:
    """Multiply-accumulates of every image in an exported file, whose shapes are fixed: each block as long as its K."""
    start = first_tokens(sampled.vit, images[:1]).shape[1]
    limits = [sampled.limit(start, number) for number in range(len(blocks_of(sampled.vit)) - sampled.first)]
    widths = torch.tensor([list(accumulate(limits, min))], dtype=torch.double)
    return plain - int(saved_macs(sampled.vit, start, widths))


@dataclass
class AdaptiveTokenSampler:
    """Puts sampling into the ViT inside a model, with the largest K that meets the budget of MACs.

    The budget holds for the mean over up to 64 validation images, and for the report's example, the image nearest to
    that mean among those below it, on which params, macs and latency are measured as of any model. Details of the
    report: K, mean and deviation of the MACs, and of the tokens kept per sampled block. A saved or exported file has
    fixed shapes and costs every image `exported_macs`, which may exceed the budget.

    Args:
        first: the first block that samples. tokens: K where the budget says nothing, in tokens or as a share.
        choice, score: as of SampledViT.
        input_size: (channels, height, width) where no data tells it.
    """

    first: int = 3
    tokens: float = 1.0
    choice: str = "inverse_transform"
    score: Score = "attention_value"
    input_size: tuple[int, int, int] | None = field(default=None)

    def __call__(self, model: nn.Module, data: Data | None = None, budget: Budget = Budget()) -> Compressed:  # noqa: B008
        """A copy that samples. Raises BadInput: no plain ViT inside, no images for a budget, or one beyond reach."""
        place_of_vit(model)
        images = self._images(data, budget).to(device_of(model))
        model = deepcopy(model).eval()
        before, score_before = measured(model, images[:1]), accuracy(model, data)
        model, sampled = insert(model, self.first, self.tokens, self.choice, self.score)
        inner, plain = inner_images(model, sampled, images), int(before["macs"])
        found = trace(sampled, inner, plain)
        if budget.macs is not None and not _within(found, budget.macs):
            found = self._search(sampled, inner, plain, budget.macs)
        below = torch.where(found.macs <= (budget.macs or torch.inf), found.macs, torch.inf)
        example = images[int((below - found.macs.mean()).abs().argmin())][None]
        details = {
            "tokens": sampled.tokens, "first": self.first, "macs_mean": float(found.macs.mean()),
            "macs_std": float(found.macs.std(correction=0)), "exported_macs": exported_macs(sampled, inner, plain),
            "kept_mean": found.counts.mean(0).tolist(), "kept_std": found.counts.std(0, correction=0).tolist(),
        }  # fmt: skip
        report = Report(before, measured(model, example), budget, score_before, accuracy(model, data), details)
        if not report.met:
            missed = {k: v for k, v in vars(budget).items() if v is not None and report.after[k] > v}
            raise BadInput(f"sampling tokens lowers the MACs only and cannot meet {missed}: it reached {report.after}")
        return Compressed(model, report, example)

    def _images(self, data: Data | None, budget: Budget) -> Float[Tensor, "n c h w"]:
        """What the cost is averaged over; without data one random image, which no budget can rest on."""
        if data is not None:
            return torch.stack([data.val[i][0] for i in range(min(IMAGES, len(data.val)))])
        if budget.macs is not None:
            raise BadInput("the cost of sampled tokens depends on the images; pass data to meet a budget of macs")
        if self.input_size is None:
            raise BadInput("the images' size is not known; pass input_size=(channels, height, width)")
        return torch.rand(1, *self.input_size)

    def _search(self, sampled: SampledViT, images: Float[Tensor, "n k h w"], plain: int, limit: int) -> Trace:
        """The largest K within the limit, by bisection; sets it."""
        low, high = FEWEST, sampled.limit(first_tokens(sampled.vit, images[:1]).shape[1], 0)
        best: tuple[int, Trace] | None = None
        while low <= high:
            sampled.tokens = (low + high) // 2
            found = trace(sampled, images, plain)
            if _within(found, limit):
                best, low = (sampled.tokens, found), sampled.tokens + 1
            else:
                high = sampled.tokens - 1
        if best is None:
            raise BadInput(
                f"sampling from block {self.first} on cannot meet macs={limit}: with {FEWEST} tokens the mean is "
                f"{float(found.macs.mean()):.0f}; take a smaller `first` or a larger budget"
            )
        sampled.tokens = best[0]
        return best[1]


def _within(found: Trace, limit: int) -> bool:
    return float(found.macs.mean()) <= limit


def insert(
    model: nn.Module, first: int = 3, tokens: float | list[int] = 1.0, choice: str = "inverse_transform",
    score: Score = "attention_value",
) -> tuple[nn.Module, SampledViT]:  # fmt: skip
    """Puts a SampledViT where the model has its ViT, in place; returns the model and it.

    Raises BadInput where there is not exactly one ViT of the package.
    """
    place = place_of_vit(model)
    vit = model.get_submodule(place)
    assert isinstance(vit, VisionTransformer)
    sampled = SampledViT(vit, first, tokens, choice, score).train(model.training)
    if not place:
        return sampled, sampled
    parent, _, last = place.rpartition(".")
    setattr(model.get_submodule(parent), last, sampled)
    return model, sampled


def place_of_vit(model: nn.Module) -> str:
    """The name of the ViT inside a model, "" for itself. Raises BadInput where there is not exactly one."""
    places = [name for name, module in model.named_modules() if isinstance(module, VisionTransformer)]
    if len(places) != 1:
        raise BadInput(f"{type(model).__name__} has {len(places)} plain ViTs inside; tokens are sampled in exactly one")
    return places[0]
