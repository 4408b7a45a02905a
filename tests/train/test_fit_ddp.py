"""Two processes train what one does with the same global batch."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from opsin.data import Data
from opsin.data.splits import Arrays
from opsin.errors import TrainingFailed
from opsin.train.fit import fit


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(216, 4))


def data(mean: float = 0.5) -> Data:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (53, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(53) % 4
    splits = {"train": Arrays(images, labels), "val": Arrays(images[:21], labels[:21]), "test": Arrays(images, labels)}
    return Data("noise", "classify", splits, tuple("abcd"), 1, (8, 8), (mean,), (0.3,))


OPTIONS = dict(epochs=2, batch_size=16, augment=False, ema=True, logger=False, progress=False)


def test_two_processes_are_one_with_the_doubled_batch(tmp_path, capfd):
    one = fit(network(), data(), out=tmp_path / "one", **OPTIONS)
    network_of_two = network()
    two = fit(network_of_two, data(), out=tmp_path / "two", devices=2, **OPTIONS)
    assert capfd.readouterr() == ("", "")
    rows = [{(r["step"], r["split"], r["name"]): r["value"] for r in run.metrics().to_pylist()} for run in (one, two)]
    assert rows[0].keys() == rows[1].keys() and len(rows[0]) == 2 * 6 + 2 * 2
    assert rows[1] == pytest.approx(rows[0], rel=1e-5)
    assert two.test_score == pytest.approx(one.test_score)
    weights = [load_file(run.path / "weights.safetensors") for run in (one, two)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network_of_two[0].weight, weights[1]["network.0.weight"], rtol=0, atol=0)


@pytest.mark.slow
def test_what_goes_wrong_in_another_process_is_told_in_one_sentence(tmp_path):
    with pytest.raises(TrainingFailed, match=r"not a number at step 1 .*last good checkpoint is kept; .* warm-up$"):
        fit(network(), data(float("nan")), out=tmp_path / "run", devices=2, **OPTIONS)
