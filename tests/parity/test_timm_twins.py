"""Twins with timm's weights gives timm's logits and maps."""

import pytest
import torch
from test_timm import TOLERANCE, difference, scramble

import opsin

pytestmark = pytest.mark.parity


@torch.no_grad()
@pytest.mark.parametrize(("name", "side"), [("twins_svt_small", 224), ("twins_svt_small", 96), ("twins_svt_base", 64)])
def test_logits_and_features(timm, name, side, capsys):
    theirs = scramble(timm.create_model(name, img_size=side) if side != 224 else timm.create_model(name))
    ours = opsin.create(name).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, side, side)
    logits = difference(ours(x), theirs(x))
    maps = theirs.forward_intermediates(x, intermediates_only=True)
    features = max(difference(a, b) for a, b in zip(ours.features(x), maps, strict=True))
    with capsys.disabled():
        print(f"\n{name} at {side}: logits {logits:.1e}, features {features:.1e} of the largest value", end=" ")
    assert logits < TOLERANCE and features < TOLERANCE
