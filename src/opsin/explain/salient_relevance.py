"""Salient Relevance: from scattered relevant pixels to the areas that a network attends to.

Li, Tian, Mueller and Chen 2019, "Beyond saliency: understanding convolutional neural networks from saliency prediction
on layer-wise relevance propagation", arXiv:1712.08268. Two steps:

    1. R = LRP of one class score down to the pixels, |R| summed over channels and scaled to [0, 1]     (section 3.1)
    2. SR = context-aware saliency of that map, taken as an image                                       (section 3.2)
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.explain import Explanation
from opsin.explain.context_aware import context_aware_saliency, normalised
from opsin.explain.lrp import Epsilon, ratio, relevance, z_plus

VARIANTS = {"salient_relevance": dict(mode="stable"), "salient_relevance_paper": dict(mode="paper")}
CONV_RULES = {"stable": Epsilon(), "paper": ratio}


class Lrp:
    """Layer-wise relevance propagation alone: signed relevance per pixel, summed over channels.

    mode: "stable" keeps denominators of convolutions away from zero; "paper" divides by y + 1e-9 as published, which
    can explode.
    """

    method = "lrp"

    def __init__(self, mode: str = "stable"):
        self.conv = CONV_RULES[mode]

    def __call__(self, model: nn.Module, image: Float[Tensor, "c h w"], target: int | None = None) -> Explanation:
        r, chosen = relevance(model, image, target, conv=self.conv, linear=z_plus)
        return Explanation(r.sum(0), image.detach(), chosen, self.method)


class SalientRelevance:
    """SR maps in [0, 1]. Args: mode as in Lrp; side, to which larger maps are reduced for the saliency step."""

    method = "salient_relevance"

    def __init__(self, mode: str = "stable", side: int = 250):
        self.conv, self.side = CONV_RULES[mode], side

    def __call__(self, model: nn.Module, image: Float[Tensor, "c h w"], target: int | None = None) -> Explanation:
        r, chosen = relevance(model, image, target, conv=self.conv, linear=z_plus)
        pixels = normalised(r.abs().sum(0))
        with torch.no_grad():
            area = context_aware_saliency(pixels, side=self.side)
        return Explanation(area, image.detach(), chosen, self.method)
