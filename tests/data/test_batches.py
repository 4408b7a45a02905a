"""Batches of every task; what cannot be stacked is padded or refused with a hint."""

import pickle

import pytest
import torch

from opsin.data import IGNORE, Boxes
from opsin.data.batches import COLLATES, collate
from opsin.errors import BadInput


def image(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width)


@pytest.mark.parametrize("task", ["classify", "images"])
def test_labels(task):
    images, labels = collate(task)([(image(4, 5), 2), (image(4, 5), 0)])
    assert images.shape == (2, 3, 4, 5)
    assert torch.equal(labels, torch.tensor([2, 0]))
    with pytest.raises(BadInput, match=r"5 x 4 x 3 and 6 x 4 x 3.*size="):
        collate(task)([(image(4, 5), 2), (image(4, 6), 0)])


def test_masks_are_padded_with_ignore():
    first, second = image(4, 5), image(6, 3)
    images, masks = collate("segment")([(first, torch.ones(4, 5).long()), (second, torch.ones(6, 3).long())])
    assert images.shape == (2, 3, 6, 5) and masks.shape == (2, 6, 5) and masks.dtype == torch.int64
    assert torch.equal(images[0, :, :4], first) and torch.equal(images[1, :, :, :3], second)
    assert (masks[0, 4:] == IGNORE).all() and (masks[1, :, 3:] == IGNORE).all() and (masks == 1).sum() == 38
    assert images[0, :, 4:].eq(0).all()


def test_boxes_stay_a_list():
    boxes = [Boxes(torch.rand(n, 4), torch.zeros(n).long()) for n in (0, 3)]
    images, targets = collate("detect")([(image(4, 5), boxes[0]), (image(2, 9), boxes[1])])
    assert images.shape == (2, 3, 4, 9)
    assert [len(t.labels) for t in targets] == [0, 3] and all(isinstance(t, Boxes) for t in targets)


def test_pairs():
    images, targets = collate("restore")([(image(4, 5), image(8, 10))] * 2)
    assert images.shape == (2, 3, 4, 5) and targets.shape == (2, 3, 8, 10)
    for other in ((image(4, 4), image(8, 10)), (image(4, 5), image(8, 8))):
        with pytest.raises(BadInput, match="crop="):
            collate("restore")([(image(4, 5), image(8, 10)), other])


def test_unknown_task_and_workers():
    with pytest.raises(BadInput, match="no task 'track'"):
        collate("track")
    assert all(pickle.loads(pickle.dumps(function)) is function for function in COLLATES.values())
