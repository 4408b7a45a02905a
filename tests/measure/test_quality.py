"""Quality metrics against scikit-image, torchmetrics and brute force."""

import numpy as np
import pytest
import torch
from skimage import color, data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.classification import MulticlassJaccardIndex

from opsin.errors import BadInput
from opsin.measure.image_quality import luminance, psnr_y, rgb_to_ycbcr, ssim_y, ycbcr_to_rgb
from opsin.measure.quality import CocoMAP, MeanIoU, PsnrY, SsimY, VocAP


@pytest.fixture(scope="module")
def pair():
    clean = torch.from_numpy(data.astronaut()[:160, :120].copy()).permute(2, 0, 1)[None] / 255
    noisy = clean + 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return noisy.clamp(0, 1), clean


def skimage_y(image):
    return color.rgb2ycbcr(image[0].permute(1, 2, 0).double().numpy())[..., 0]


def as_file(image):
    return (image.double() * 255).round() / 255


def test_colour_agrees_with_skimage_and_inverts(pair):
    expected = torch.from_numpy(color.rgb2ycbcr(pair[1][0].permute(1, 2, 0).double().numpy())).permute(2, 0, 1) / 255
    assert torch.allclose(rgb_to_ycbcr(pair[1])[0].double(), expected, atol=1e-6)
    assert torch.allclose(ycbcr_to_rgb(rgb_to_ycbcr(pair[1])), pair[1], atol=1e-5)
    assert torch.equal(luminance(pair[1])[0, 0], luminance(pair[1][0])[0])
    white, black = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    assert (luminance(white) * 255).item() == pytest.approx(235) and (luminance(black) * 255).item() == pytest.approx(
        16
    )


@pytest.mark.parametrize("border", [0, 3])
def test_psnr_and_ssim_agree_with_skimage(pair, border):
    noisy, clean = pair
    crop = (slice(border, 160 - border), slice(border, 120 - border))
    a, b = skimage_y(as_file(noisy))[crop], skimage_y(clean)[crop]
    assert psnr_y(noisy, clean, border).item() == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255), abs=1e-4)
    reference = structural_similarity(
        a, b, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )  # fmt: skip
    assert ssim_y(noisy, clean, border).item() == pytest.approx(reference, abs=1e-5)


def test_border_and_rounding_matter(pair):
    _, clean = pair
    damaged = clean.clone()
    damaged[..., :2, :] = 0
    assert psnr_y(damaged, clean, 2).item() == float("inf") and psnr_y(damaged, clean, 1).item() < 40
    assert psnr_y(clean + 0.3 / 255, clean).item() == float("inf")
    assert psnr_y(clean + 0.3 / 255, clean, levels=None).item() < 70


def test_metrics_average_over_images_not_over_errors(pair):
    noisy, clean = pair
    worse = (clean + 0.2 * torch.randn(clean.shape)).clamp(0, 1)
    for metric, function in ((PsnrY(2), psnr_y), (SsimY(2), ssim_y)):
        metric.update(noisy, clean)
        metric.update(torch.cat([worse, worse]), torch.cat([clean, clean]))
        expected = (function(noisy, clean, 2) + 2 * function(worse, clean, 2)) / 3
        assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-5)


def test_images_that_cannot_be_compared():
    with pytest.raises(BadInput):
        psnr_y(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 9))
    with pytest.raises(BadInput):
        psnr_y(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), border=4)
    with pytest.raises(BadInput, match="11x11"):
        ssim_y(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def brute_iou(predicted, truth, classes, ignore):
    scores = []
    for c in range(classes):
        inside = union = 0
        for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist()):
            if t != ignore:
                inside += p == c and t == c
                union += p == c or t == c
        if union:
            scores.append(inside / union)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("ignore", [255, 2])
def test_mean_iou_agrees_with_brute_force_and_torchmetrics(ignore):
    truth = torch.randint(0, 3, (4, 6, 7))
    truth[torch.rand(truth.shape) < 0.3] = ignore
    logits = torch.randn(4, 5, 6, 7)
    logits[:, 4] = -100  # class 4 never occurs and must not count as 0
    metric = MeanIoU(5, ignore)
    for i in range(4):
        metric.update(logits[i : i + 1], truth[i : i + 1])
    expected = brute_iou(logits.argmax(1), truth, 5, ignore)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
    peer = MulticlassJaccardIndex(5, ignore_index=ignore)(logits.argmax(1), truth)
    assert ignore == 2 or metric.compute().item() == pytest.approx(peer.item(), abs=1e-6)
    assert metric.per_class()[4].isnan()


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def scene(images=12, seed=0):
    """Random scenes: jittered copies of true boxes, some with the wrong class, plus false alarms."""
    rng = np.random.default_rng(seed)
    predictions, targets = [], []
    for _ in range(images):
        corners = rng.uniform(0, 60, (rng.integers(0, 5), 2))
        truth = np.concatenate([corners, corners + rng.uniform(8, 30, corners.shape)], 1)
        labels = rng.integers(0, 3, len(truth))
        guess = np.repeat(truth, 2, 0) + rng.normal(0, 3, (2 * len(truth), 4))
        alarm = rng.uniform(0, 50, (2, 2))
        guess = np.concatenate([guess, np.concatenate([alarm, alarm + 15], 1)])
        kinds = np.concatenate([np.repeat(labels, 2), rng.integers(0, 3, 2)])
        predictions.append({
            "boxes": torch.from_numpy(guess), "labels": torch.from_numpy(kinds),
            "scores": torch.from_numpy(rng.uniform(0, 1, len(guess))),
        })  # fmt: skip
        targets.append({
            "boxes": torch.from_numpy(truth), "labels": torch.from_numpy(labels),
            "difficult": torch.from_numpy(rng.uniform(0, 1, len(truth)) < 0.2),
        })  # fmt: skip
    return predictions, targets


def overlap(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(w, 0) * max(h, 0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def brute_voc(predictions, targets, label, threshold=0.5):
    """Average precision by the rule book, for every recall level in turn."""
    rows = [
        (float(s), i, b.tolist())
        for i, p in enumerate(predictions)
        for b, k, s in zip(p["boxes"], p["labels"], p["scores"])
        if k == label
    ]
    used, outcomes = set(), []
    for _, i, box in sorted(rows, key=lambda r: -r[0]):
        truths = [(j, b.tolist()) for j, b in enumerate(targets[i]["boxes"]) if targets[i]["labels"][j] == label]
        ious = [(overlap(box, b), j) for j, b in truths]
        best, j = max(ious, default=(0, None))
        if best < threshold:
            outcomes.append(0)
        elif not targets[i]["difficult"][j]:
            outcomes.append(int((i, j) not in used))
            used.add((i, j))
    positives = sum(int(((t["labels"] == label) & ~t["difficult"]).sum()) for t in targets)
    points = [(sum(outcomes[:k]) / positives, sum(outcomes[:k]) / k) for k in range(1, len(outcomes) + 1)]
    area = 0.0
    for step in range(1, positives + 1):
        area += max((p for r, p in points if r >= step / positives - 1e-12), default=0.0) / positives
    return area


def test_voc_ap_agrees_with_the_rule_book():
    predictions, targets = scene()
    metric = VocAP(3)
    for i in range(0, 12, 4):
        metric.update(predictions[i : i + 4], targets[i : i + 4])
    expected = [brute_voc(predictions, targets, label) for label in range(3)]
    assert metric.per_class().tolist() == pytest.approx(expected, abs=1e-6)
    assert metric.compute().item() == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert 0.1 < metric.compute() < 0.9


def test_voc_second_detection_of_one_object_is_wrong():
    metric = VocAP(1)
    twice = {"boxes": boxes([0, 0, 9, 9], [0, 0, 10, 10]), "labels": torch.zeros(2), "scores": torch.tensor([0.9, 0.8])}
    far = {"boxes": boxes([0, 0, 10, 10]), "labels": torch.zeros(1), "scores": torch.tensor([0.7])}
    truth = {"boxes": boxes([0, 0, 10, 10]), "labels": torch.zeros(1)}
    metric.update([twice, far], [truth, truth])
    assert metric.compute().item() == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_coco_map_of_known_cases():
    truth = {"boxes": boxes([0, 0, 100, 100]), "labels": torch.zeros(1)}
    exact = truth | {"scores": torch.ones(1)}
    near = exact | {"boxes": boxes([0, 0, 100, 77])}  # IoU 0.77: right at six of the ten thresholds
    for guess, expected in ((exact, 1.0), (near, 0.6)):
        metric = CocoMAP(2)
        metric.update([guess], [truth])
        result = metric.compute()
        assert result["map"].item() == pytest.approx(expected) and result["map_50"].item() == pytest.approx(1.0)
        assert result["map_large"].item() == pytest.approx(expected) and result["map_small"].item() == -1


def test_coco_and_voc_agree_up_to_interpolation():
    predictions, targets = scene(60, seed=1)
    for target in targets:
        target["difficult"][:] = False
    coco, voc = CocoMAP(3), VocAP(3)
    coco.update(predictions, targets)
    voc.update(predictions, targets)
    assert coco.compute()["map_50"].item() == pytest.approx(voc.compute().item(), abs=0.02)


def test_no_detections_and_no_objects():
    nothing = {"boxes": boxes(), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    truth = {"boxes": boxes([0, 0, 10, 10]), "labels": torch.zeros(1)}
    coco, voc = CocoMAP(1), VocAP(1)
    for metric in (coco, voc):
        metric.update([nothing], [truth])
    assert coco.compute()["map"] == 0 and voc.compute() == 0
    empty = CocoMAP(1)
    empty.update([truth | {"scores": torch.ones(1)}], [{"boxes": boxes(), "labels": torch.zeros(0)}])
    assert empty.compute()["map"] == -1


def halves():
    """Seven images of which the fifth, the other process's first, has false alarms just where the first has objects."""
    predictions, targets = scene(7)
    place = targets[0]
    assert len(place["labels"])
    alarm = {"boxes": place["boxes"], "labels": place["labels"], "scores": torch.full((len(place["labels"]),), 0.99)}
    predictions[4] = {name: torch.cat((alarm[name], predictions[4][name])) for name in alarm}
    return predictions, targets


def _measure_part(rank, folder):
    """One of two processes: the metrics over its half of the images, synchronised by `compute`."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    predictions, targets = halves()
    part = slice(0, 4) if rank == 0 else slice(4, 7)
    voc, coco, iou, psnr = VocAP(3), CocoMAP(3), MeanIoU(2), PsnrY()
    for metric in (voc, coco):
        metric.update(predictions[part], targets[part])
    iou.update(torch.tensor([[[0, 1]]]), torch.tensor([[[rank, 1]]]))
    psnr.update(torch.full((1, 1, 4, 4), 0.5 + 0.1 * rank), torch.zeros(1, 1, 4, 4))
    values = [voc.compute(), coco.compute()["map"], iou.compute(), psnr.compute()]
    torch.save(torch.stack([value.double() for value in values]), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_measure_as_one(tmp_path):
    torch.multiprocessing.spawn(_measure_part, (tmp_path,), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    predictions, targets = halves()
    voc, coco, iou, psnr = VocAP(3), CocoMAP(3), MeanIoU(2), PsnrY()
    for metric in (voc, coco):
        metric.update(predictions, targets)
    iou.update(torch.tensor([[[0, 1]], [[0, 1]]]), torch.tensor([[[0, 1]], [[1, 1]]]))
    psnr.update(torch.tensor([0.5, 0.6]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    values = [voc.compute(), coco.compute()["map"], iou.compute(), psnr.compute()]
    expected = torch.stack([value.double() for value in values])
    assert torch.equal(results[0], results[1])
    assert torch.allclose(results[0], expected, atol=1e-6)
