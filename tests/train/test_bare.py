"""The bare loop of the claims: the same seed gives the same batches, and it learns."""

import torch
from torch import nn

from opsin.train.bare import accuracy, flip_and_shift, tensors, train


def halves(n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, y = 0.3 * torch.rand(n, 3, 8, 8), torch.arange(n) % 2
    x[y == 1, :, :4] += 0.5
    return x, y


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))


def test_it_learns_and_the_seed_decides_everything():
    x, y = halves()
    first, second = (train(network(), x, y, steps=40, seed=3, batch=32, lr=1e-2, augment=False) for _ in range(2))
    other = train(network(), x, y, steps=40, seed=4, batch=32, lr=1e-2, augment=False)
    assert accuracy(first, x, y) > 95 and not first.training
    assert torch.equal(first[1].weight, second[1].weight) and not torch.equal(first[1].weight, other[1].weight)


def test_a_transform_changes_the_batch_but_not_its_order():
    x, y = halves()
    seen: list[torch.Tensor] = []

    def keep(images, labels):
        seen.append(labels)
        return images, labels

    train(network(), x, y, steps=3, seed=0, batch=8, transform=keep)
    train(network(), x, y, steps=3, seed=0, batch=8, transform=keep, augment=False)
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))


def test_flip_and_shift_moves_by_at_most_two_pixels():
    x = torch.zeros(64, 1, 9, 9)
    x[:, :, 4, 3] = 1
    y = flip_and_shift(x)
    rows, columns = (y[:, 0].flatten(1).argmax(1) // 9), (y[:, 0].flatten(1).argmax(1) % 9)
    assert y.shape == x.shape and (y.flatten(1).sum(1) == 1).all()
    assert set((rows - 4).abs().tolist()) == {0, 1, 2}
    assert set(columns.tolist()) <= set(range(1, 8)) and len(set(columns.tolist())) > 5


def test_tensors_stops_at_the_end():
    class Split:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return torch.full((1, 2, 2), float(i)), i

    images, labels = tensors(Split(), 10)
    assert images.shape == (3, 1, 2, 2) and labels.tolist() == [0, 1, 2]
