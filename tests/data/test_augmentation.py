"""Batch transforms: seeded by torch alone, and images move together with what belongs to them."""

import random

import numpy as np
import pytest
import torch
from kornia.augmentation import RandomAffine

from opsin.data import IGNORE, Boxes
from opsin.data.transforms import (
    Augment,
    Chain,
    ColourJitter,
    Dihedral,
    FlipBoxes,
    JointMask,
    RandAugment,
    crop_and_pad,
    default_augment,
    denormalise,
    erase,
    flip,
    normalise,
    random_resized_crop,
)  # fmt: skip
from opsin.errors import BadInput

STEPS = {
    "crop": lambda: crop_and_pad((16, 16), 2), "flip": flip, "resized": lambda: random_resized_crop((16, 16)),
    "erase": lambda: erase(0.5), "jitter": ColourJitter, "randaugment": RandAugment,
}  # fmt: skip


def pictures(n: int = 8, channels: int = 3, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", list(STEPS))
@pytest.mark.parametrize("channels", [1, 3])
def test_torchs_generator_is_the_only_randomness(name, channels):
    step, images = STEPS[name](), pictures(channels=channels)
    results = []
    for other in (1, 2):
        random.seed(other)
        np.random.seed(other)  # noqa: NPY002
        torch.manual_seed(0)
        results.append(step(images))
    assert torch.equal(*results)
    assert results[0].shape == images.shape and results[0].dtype == torch.float32
    assert results[0].min() >= 0 and results[0].max() <= 1
    torch.manual_seed(1)
    assert not torch.equal(step(images), results[0])
    assert torch.equal(images, pictures(channels=channels))


@pytest.mark.parametrize("task", ["classify", "images", "segment", "detect", "restore"])
def test_default_augmentation_follows_the_seed(task):
    images = pictures()
    targets = {
        "segment": torch.randint(0, 5, (8, 16, 16)), "restore": pictures(size=(32, 32)),
        "detect": [Boxes(torch.tensor([[1.0, 2.0, 5.0, 9.0]]), torch.tensor([0]))] * 8,
    }.get(task, torch.arange(8))  # fmt: skip
    augment = default_augment(task, (16, 16), ("cat", "dog"))
    torch.manual_seed(0)
    first, _ = augment(images, targets)
    torch.manual_seed(0)
    assert torch.equal(augment(images, targets)[0], first)
    assert not torch.equal(first, images)


def test_digits_are_not_mirrored():
    marked = torch.zeros(256, 1, 8, 8)
    marked[..., 3] = 1
    marked[..., 4] = 0.5
    moved, labels = default_augment("classify", (8, 8), tuple("0123456789"))(marked, torch.arange(256))
    assert torch.equal(labels, torch.arange(256))
    places = [(image[0, 4] == 1).nonzero().flatten() for image in moved]
    assert {int(p) for p in places} == {2, 3, 4}
    assert all(image[0, 4, p + 1] == 0.5 for image, p in zip(moved, places))
    mirrored, _ = default_augment("classify", (8, 8), ("cat", "dog"))(marked, None)
    assert any(image[0, 4, (image[0, 4] == 1).nonzero()[0, 0] - 1] == 0.5 for image in mirrored)


def test_presets_by_size():
    assert default_augment("classify", (32, 32), ("a1", "b1"))(pictures(size=(32, 32)))[0].shape == (8, 3, 32, 32)
    assert default_augment("classify", (80, 96), ("a1", "b1"))(pictures(size=(80, 96)))[0].shape == (8, 3, 80, 96)
    assert default_augment("images", None)(pictures())[0].shape == (8, 3, 16, 16)
    with pytest.raises(BadInput, match="no augmentation"):
        default_augment("track", (8, 8))


def test_masks_move_with_their_images():
    """The image shows the mask's number, so that the two can be compared after any geometry."""
    masks = torch.zeros(16, 24, 32, dtype=torch.long)
    masks[:, 6:18, 4:15], masks[:, 10:, 20:] = 1, 2
    images = ((masks + 1).float() / 4)[:, None].repeat(1, 3, 1, 1)
    moved, result = default_augment("segment", (24, 32))(images, masks)
    assert moved.shape == images.shape and result.shape == masks.shape and result.dtype == torch.int64
    assert set(result.unique().tolist()) <= {0, 1, 2, IGNORE}
    assert (result == IGNORE).any() and not torch.equal(result, masks)
    shown = (moved[:, 0] * 4).round().long() - 1
    shown[shown < 0] = IGNORE
    assert (shown == result).float().mean() > 0.93  # they may differ along edges, where the image is interpolated
    flat = moved[:, 0].sub(((result + 1) % 256).float() / 4).abs() < 1e-3
    assert flat.float().mean() > 0.8


def test_ignored_pixels_stay_ignored_and_class_zero_stays():
    shift = JointMask(RandomAffine(0.0, translate=(0.4, 0.4), p=1.0))
    masks = torch.full((4, 20, 20), IGNORE)
    masks[:, :, :10] = 0
    _, result = shift(torch.rand(4, 3, 20, 20), masks)
    assert set(result.unique().tolist()) == {0, IGNORE}


def test_boxes_are_mirrored_with_the_image():
    images = torch.zeros(32, 1, 10, 20)
    images[..., 2:5, 3:9] = 1
    boxes = [Boxes(torch.tensor([[3.0, 2.0, 9.0, 5.0]]), torch.tensor([1])) for _ in range(32)]
    moved, result = FlipBoxes()(images, boxes)
    starts = set()
    for image, target in zip(moved, result):
        x0, y0, x1, y1 = (int(v) for v in target.boxes[0])
        assert image[0, y0:y1, x0:x1].eq(1).all() and image.sum() == (y1 - y0) * (x1 - x0)
        starts.add(x0)
    assert starts == {3, 11}


def test_pairs_turn_together():
    clean = torch.rand(64, 3, 12, 12)
    low = clean[..., ::2, ::2] * 0 + torch.nn.functional.avg_pool2d(clean, 2)
    turned, targets = Dihedral()(low, clean)
    assert torch.allclose(torch.nn.functional.avg_pool2d(targets, 2), turned, atol=1e-6)
    asymmetric = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(200, 1, 1, 1)
    assert len({tuple(t.flatten().tolist()) for t in Dihedral()(asymmetric, asymmetric)[0]}) == 8
    oblong, _ = Dihedral()(torch.rand(9, 3, 4, 6), torch.rand(9, 3, 8, 12))
    assert oblong.shape == (9, 3, 4, 6)


def test_normalising_and_back():
    images = pictures()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.0, 0.3)
    result = normalise(images, mean, std)
    assert torch.allclose(result[:, 0], (images[:, 0] - 0.4) / 0.2, atol=1e-6)
    assert torch.allclose(result[:, 1], images[:, 1] - 0.5, atol=1e-6)
    assert torch.allclose(denormalise(result, mean, std), images, atol=1e-6)


def test_chain_and_targets_pass():
    images, labels = Chain(Augment(flip(1.0)), Augment(flip(1.0)))(pictures(), torch.arange(8))
    assert torch.equal(images, pictures()) and torch.equal(labels, torch.arange(8))
