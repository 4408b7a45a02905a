"""The task of detection: any backbone and any detector learn boxes through `fit`, and are compared."""

import pytest
import torch
from torch import Tensor

import opsin
from opsin.data import Boxes, Data
from opsin.errors import BadInput
from opsin.tasks import Detections
from opsin.tasks.centernet import PyramidDetector
from opsin.tasks.detect import Detect
from opsin.train.costs import cost_of

BACKBONE = "shufflenet_v2_x0_5(dims=(16, 32, 48, 64, 64), stem_stride=1)"
SMALL = "codenet(dims=(16, 24, 48, 96, 64), decoder_dims=(48, 32, 24))"


def scene(seed: int, side: int = 64) -> tuple[Tensor, Boxes]:
    """Bright squares of class 0 and dark ones of class 1 on grey noise."""
    draw = torch.Generator().manual_seed(seed)
    image, boxes, labels = 0.5 + 0.03 * torch.randn(3, side, side, generator=draw), [], []
    for corner in ((4, 4), (36, 4), (4, 36), (36, 36)):
        label, size, shift = (int(torch.randint(n, (), generator=draw)) for n in (3, 10, 8))
        if label < 2:
            x, y, size = corner[0] + shift, corner[1] + shift, 10 + size
            image[:, y : y + size, x : x + size] = 0.95 - 0.9 * label
            boxes.append((x, y, x + size, y + size))
            labels.append(label)
    return image.clamp(0, 1), Boxes(torch.tensor(boxes).float().reshape(-1, 4), torch.tensor(labels).long())


def data(train: int = 16) -> Data:
    splits = {"train": [scene(i) for i in range(train)], "val": [scene(100 + i) for i in range(6)]}
    return Data("squares", "detect", splits, ("light", "dark"), 3, (64, 64), (0.5,) * 3, (0.2,) * 3)


def test_fit_trains_a_detector(tmp_path):
    run = opsin.fit(SMALL, data(), out=tmp_path, epochs=2, progress=False, logger=False)
    assert run.config["request"]["task"] == "detect" and run.result["score_name"] == "ap50"
    assert 0 <= run.result["val_score"] <= 1
    assert run.model().num_classes == 2


def test_a_backbone_learns_to_find_squares(tmp_path):
    run = opsin.fit(BACKBONE, data(24), out=tmp_path, epochs=14, lr=1e-2, progress=False, logger=False)
    assert isinstance(run.model(), PyramidDetector) and run.result["val_score"] > 0.5, run.result


def test_costs_of_a_detector():
    model = Detect().wrap(opsin.create(SMALL, num_classes=2), data(2))
    cost = cost_of(model, data(2))
    assert cost["macs"] > 1e6 and cost["train_memory"] > cost["memory"]


def test_the_metric_takes_perfect_predictions():
    task, (_, target) = Detect(), scene(3)
    metric = task.metric(data(1))
    wrong = Boxes(target.boxes.flip(0) + 30, target.labels)
    task.update_metric(metric, Detections([target], [torch.ones(len(target.labels))]), [target])
    assert metric.compute() == 1
    task.update_metric(metric, Detections([wrong], [torch.ones(len(target.labels))]), [target])
    assert metric.compute() < 0.8


def test_complaints_are_sentences():
    task = Detect()
    with pytest.raises(BadInput, match="finds 5 classes but 'squares' has 2"):
        task.wrap(opsin.create(SMALL, num_classes=5), data(1))
    with pytest.raises(BadInput, match="has no boxes"):
        task.wrap(opsin.create("metanet_n"), opsin.data.open("digits"))
    with pytest.raises(BadInput, match="in_chans=3"):
        task.wrap(opsin.create("metanet_n", in_chans=1), data(1))
    with pytest.raises(BadInput, match="Linear is neither"):
        task.wrap(torch.nn.Linear(2, 2), data(1))
