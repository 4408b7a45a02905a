"""The default number of heads, the same in every attention."""

import pytest

import opsin
from opsin.errors import BadInput
from opsin.ops.attention.heads import heads_of

OPERATORS = ["neighborhood_attention", "poly_anchor_vit", "self_attention", "subsampled_attention", "window_attention"]
NEAREST = {100: 4, 112: 4, 176: 4, 200: 5, 240: 8, 101: 1, 8: 1}


def test_heads_of_32_channels_or_the_nearest_that_divide():
    assert {dim: heads_of(dim) for dim in NEAREST} == NEAREST
    for dim in range(1, 1025):
        assert dim % heads_of(dim) == 0
        if dim % max(1, dim // 32) == 0:
            assert heads_of(dim) == max(1, dim // 32)


@pytest.mark.parametrize("key", OPERATORS)
def test_every_attention_has_the_same_rule(key):
    for dim in (48, 96, 112, 200):
        assert opsin.create(key, dim=dim).num_heads == heads_of(dim)
    for wrong in (0, -1, 5):
        with pytest.raises(BadInput, match=f"num_heads={wrong} does not divide the 32 channels"):
            opsin.create(key, dim=32, num_heads=wrong)
