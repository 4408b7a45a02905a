"""Binary adapters: many small differences stored in one bit each beat few stored in 32.

Jie, Wang and Deng 2023, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
arXiv:2307.16867. The minima that adapters find are flat, so their weights stand coarse rounding; what a task needs is
stored in 1-bit matrices trained through a straight-through estimator (section 4). Two places for them in a frozen ViT:

    AdaptFormer   x <- x + MLP(LN x) + s Up(Dropout(ReLU(Down x)))       parallel to the MLP, on the un-normalised x
    LoRA          q, v <- q, v + s Up(Dropout(Down x))                   beside the query and value projections

With `bi_head` the classifier is a 1-bit matrix too.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.adapt.quantised import QLinear, code_indices
from opsin.adapt.storage import Packed, pack, unpack
from opsin.backbones.vit import Block
from opsin.errors import BadInput

VARIANTS = {
    "bi_adaptformer_h32": dict(place="adaptformer", hidden=32),
    "bi_adaptformer_h1": dict(place="adaptformer", hidden=1),
    "bi_lora_h32": dict(place="lora", hidden=32),
}
DROPOUT = 0.1


def bottleneck(dim: int, hidden: int, bits: int) -> tuple[nn.Linear, nn.Linear]:
    """Down and Up without biases; Up starts at zero in full precision, and near it (0.001) where it is quantised."""
    if bits == 32:
        down, up = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        nn.init.zeros_(up.weight)
    else:
        down, up = QLinear(dim, hidden, bits), QLinear(hidden, dim, bits)
        nn.init.trunc_normal_(up.weight, std=0.001, a=-0.002, b=0.002)
    return down, up


class Parallel(nn.Module):
    """A ViT block with an adapter beside its MLP (AdaptFormer, Chen et al. 2022, arXiv:2205.13535)."""

    def __init__(self, block: Block, hidden: int, bits: int, scale: float):
        super().__init__()
        self.block, self.scale = block, scale
        self.down, self.up = bottleneck(block.norm1.normalized_shape[0], hidden, bits)
        self.dropout = nn.Dropout(DROPOUT)

    @property
    def rel_pos_bias(self) -> nn.Module | None:
        return self.block.rel_pos_bias

    def forward(self, x: Float[Tensor, "n t c"], bias: Tensor | None = None) -> Float[Tensor, "n t c"]:
        b = self.block
        x = x + b.drop_path(b.ls1(b.attn(b.norm1(x), bias)))
        adapted = self.scale * self.up(self.dropout(self.down(x).relu()))
        return x + b.drop_path(b.ls2(b.mlp(b.norm2(x)))) + adapted


class LowRank(nn.Module):
    """A qkv projection with low-rank additions to queries and values (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, qkv: nn.Linear, hidden: int, bits: int, scale: float):
        super().__init__()
        self.qkv, self.scale = qkv, scale
        self.q_down, self.q_up = bottleneck(qkv.in_features, hidden, bits)
        self.v_down, self.v_up = bottleneck(qkv.in_features, hidden, bits)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c3"]:
        q = self.q_up(self.dropout(self.q_down(x)))
        v = self.v_up(self.dropout(self.v_down(x)))
        return self.qkv(x) + self.scale * torch.cat((q, torch.zeros_like(q), v), -1)

    def merged(self) -> nn.Linear:
        """One plain projection with the same output."""
        with torch.no_grad():
            q = matrix(self.q_up) @ matrix(self.q_down)
            v = matrix(self.v_up) @ matrix(self.v_down)
            self.qkv.weight += self.scale * torch.cat((q, torch.zeros_like(q), v))
        return self.qkv


def matrix(layer: nn.Linear) -> Tensor:
    """The weights that a layer multiplies with."""
    return layer.effective_weight() if isinstance(layer, QLinear) else layer.weight


class BinaryAdapter:
    """Adapts vision transformers.

    Args:
        place: "adaptformer" or "lora". hidden: width of the bottleneck, h. bits: 1, 2, 4, 8, or 32 for no rounding.
        scale: s; the paper chooses it per task from 0.01 to 100.
        bi_head: the classifier too becomes a 1-bit matrix without bias.
    """

    def __init__(
        self, place: str = "adaptformer", hidden: int = 32, bits: int = 1, scale: float = 1.0, bi_head: bool = False
    ):
        if place not in ("adaptformer", "lora"):
            raise BadInput(f"adapters go to the place 'adaptformer' or 'lora', not '{place}'")
        self.place, self.hidden, self.bits, self.scale, self.bi_head = place, hidden, bits, scale, bi_head

    def adapt(self, model: nn.Module) -> nn.Module:
        """Freezes the model, adds adapters to every ViT block in it, and leaves them and the head to be trained.

        Raises BadInput where there are no ViT blocks.
        """
        sites = [(parent, name, child) for parent, name, child in children(model) if isinstance(child, Block)]
        if not sites:
            raise BadInput(f"binary adapters go into the blocks of a ViT; {type(model).__name__} has none")
        model.requires_grad_(False)
        for parent, name, block in sites:
            if self.place == "adaptformer":
                setattr(parent, name, Parallel(block, self.hidden, self.bits, self.scale))
            else:
                block.attn.qkv = LowRank(block.attn.qkv, self.hidden, self.bits, self.scale)
        for parent, name, head in heads(model):
            head = QLinear(head.in_features, head.out_features, 1) if self.bi_head else head
            setattr(parent, name, head.requires_grad_(True))
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        """The same function in plain layers: LoRA folded into qkv; AdaptFormer, not linear, with plain matrices."""
        for parent, name, child in list(children(model)):
            if isinstance(child, LowRank):
                setattr(parent, name, child.merged())
            elif isinstance(child, QLinear):
                setattr(parent, name, child.frozen())
        return model

    def save(self, model: nn.Module, path: str | Path) -> Path:
        """Writes the trained difference to one file: packed matrices, then the head. Needs fewer than 32 bits."""
        if self.bits == 32:
            raise BadInput("adapters of 32 bits are saved with the model's state_dict; packing is for 1 to 8 bits")
        data = pack([packed(layer) for layer in quantised(model) if not is_head(model, layer)], self.bits)
        for _, _, head in heads(model):
            if isinstance(head, QLinear):
                data += pack([packed(head)], 1)
            else:
                data += b"".join(t.detach().cpu().numpy().astype("<f4").tobytes() for t in head.parameters())
        Path(path).write_bytes(data)
        return Path(path)

    def load(self, model: nn.Module, path: str | Path) -> nn.Module:
        """Puts a saved difference into an adapted model; its adapters become plain layers. Raises BadInput: no fit."""
        adapters = [layer for layer in quantised(model) if not is_head(model, layer)]
        shapes = [(layer.out_features, layer.in_features) for layer in adapters]
        matrices, rest = unpack(Path(path).read_bytes(), shapes, self.bits)
        weights = {id(layer): p.weight(self.bits) for layer, p in zip(adapters, matrices, strict=True)}
        for _, _, head in heads(model):
            if isinstance(head, QLinear):
                (matrix,), rest = unpack(rest, [(head.out_features, head.in_features)], 1)
                weights[id(head)] = matrix.weight(1)
            else:
                rest = read_floats(head, rest)
        if rest:
            raise BadInput(f"the adapter file '{path}' has {len(rest)} bytes too many for this model")
        for parent, name, child in list(children(model)):
            if id(child) in weights:
                layer = nn.Linear(child.in_features, child.out_features, bias=False)
                layer.weight.data.copy_(weights[id(child)])
                setattr(parent, name, layer)
        return model


def packed(layer: QLinear) -> Packed:
    """A layer's matrix as it is stored."""
    indices, mean, std = code_indices(layer.weight.detach().cpu(), layer.bits)
    return Packed(indices, float(mean), float(std))


def children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module below `model`, with its parent and its name there."""
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def quantised(model: nn.Module) -> list[QLinear]:
    return [module for module in model.modules() if isinstance(module, QLinear)]


def heads(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The classifiers: linear layers called `head`."""
    return [(p, n, c) for p, n, c in children(model) if n == "head" and isinstance(c, nn.Linear)]


def is_head(model: nn.Module, layer: nn.Module) -> bool:
    return any(layer is head for _, _, head in heads(model))


def read_floats(layer: nn.Linear, data: bytes) -> bytes:
    """Fills a layer's parameters from the front of `data`; returns what is left."""
    for parameter in layer.parameters():
        size = 4 * parameter.numel()
        if len(data) < size:
            raise BadInput("the adapter file is too short for the model's head; it was made for fewer classes")
        values = torch.from_numpy(np.frombuffer(data[:size], "<f4").copy())
        parameter.data.copy_(values.view_as(parameter))
        data = data[size:]
    return data
