"""CutMix: labels follow from the pixels that were really pasted."""

import pytest
import torch

import opsin
from opsin.backbones.metanet import MetaNet
from opsin.errors import BadInput
from opsin.recipes.cutmix import CutMix, FeatureCutMix, random_box
from opsin.recipes.cutout import Cutout
from opsin.recipes.mixup import Mixup


def batch(n: int = 4, height: int = 12, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Image i is the constant i + 1 and has label i, so that pixels tell where they come from."""
    images = torch.arange(1.0, n + 1)[:, None, None, None].expand(n, 3, height, width).clone()
    return images, torch.arange(n)


@pytest.mark.parametrize("seed", range(30))
def test_label_shares_are_pixel_shares_with_clipped_boxes_too(seed):
    torch.manual_seed(seed)
    images, labels = batch()
    mixed, soft = CutMix().transform(images, labels, 4)
    for i in range(4):
        shares = torch.stack([(mixed[i] == k + 1).float().mean() for k in range(4)])
        assert torch.allclose(soft[i], shares, atol=1e-6)
    assert torch.equal(images, batch()[0]), "the batch itself must not change"


def test_one_box_serves_the_whole_batch():
    images, labels = batch(8)
    mixed, _ = CutMix().transform(images, labels, 8)
    changed = (mixed != images).any(1)
    touched = changed[changed.flatten(1).any(1)]
    assert (touched == touched[0]).all()


def test_box_sides_follow_lambda_and_the_expected_share_after_clipping():
    """With lambda uniform the unclipped share is 1 - lambda; clipping takes some of it away.

    One axis of length 1 with a side s centred uniformly keeps on average s - s^2 / 4, so the kept area is
    E[(s - s^2/4)^2] with s = sqrt(u): 1/2 - 1/2 E[u^{3/2}] + 1/16 E[u^2] = 0.5 - 0.2 + 1/48.
    """
    size = 400
    areas = [random_box(size, size, float(torch.rand(()))).area / size**2 for _ in range(8000)]
    assert sum(areas) / len(areas) == pytest.approx(0.5 - 0.2 + 1 / 48, abs=0.01)


def test_lambda_one_and_probability_zero_change_nothing():
    assert random_box(10, 10, 1.0).area == 0
    images, labels = batch()
    same, targets = CutMix(prob=0).transform(images, labels, 4)
    assert same is images and targets is labels


def test_probability_is_the_share_of_batches():
    recipe = opsin.create("cutmix_cifar")
    images, labels = batch()
    mixed = sum(recipe.transform(images, labels, 4)[1].ndim == 2 for _ in range(400))
    assert 150 < mixed < 250


def test_soft_targets_can_be_mixed_again():
    images, labels = batch()
    images, soft = Mixup().transform(images, labels, 4)
    _, again = CutMix().transform(images, soft, 4)
    assert torch.allclose(again.sum(1), torch.ones(4))


def test_feature_cutmix_pastes_on_one_level_and_labels_it_exactly():
    net = MetaNet("depthwise", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), stem_stride=1, num_classes=4)
    recipe = FeatureCutMix()
    recipe.attach(net)
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    seen = set()
    for _ in range(40):
        same, soft = recipe.transform(images, labels, 4)
        assert same is images
        index, order, box = recipe.pending
        side = 16 // recipe.strides[index]
        own = soft[torch.arange(4), labels]
        expected = torch.where(order == labels, 1.0, 1 - box.area / side**2)
        assert torch.allclose(own, expected, atol=1e-6)
        seen.add(index)
    assert seen == {0, 1, 2, 3}
    recipe.pending = (0, torch.tensor([1, 0, 3, 2]), random_box(16, 16, 0.0))
    mixed = net.features(images)[0]
    recipe.detach()
    plain = net.features(images)[0]
    assert not torch.equal(mixed, plain)
    net.eval()
    assert torch.equal(net.features(images)[0], plain)


def test_feature_cutmix_names_what_it_needs():
    with pytest.raises(BadInput, match="stages"):
        FeatureCutMix().attach(torch.nn.Linear(2, 2))


def test_cutout_hides_one_square_per_image_and_keeps_labels():
    images, labels = torch.rand(64, 3, 32, 32), torch.arange(64)
    out, targets = Cutout(0.5).transform(images, labels, 64)
    assert targets is labels
    counts = (out != images).any(1).flatten(1).sum(1)
    assert counts.max() == 16 * 16 and counts.min() >= 8 * 8 and counts.float().std() > 0
