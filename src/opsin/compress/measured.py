"""What a compressor reports: measured on the model as it is, before and after."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.compress.quantiser import QUANTISABLE, QuantisedLayer, weight_of
from opsin.compress.sparse import SparseLayer
from opsin.data import Data
from opsin.layers.device import device_of
from opsin.measure.cost import count_macs
from opsin.measure.latency import latency
from opsin.tasks.outputs import scores


def weight_bits(model: nn.Module) -> float:
    """Stored bits per weight, averaged over the weights of all convolutions and linear layers."""
    bits = weights = 0
    for module in model.modules():
        if isinstance(module, QuantisedLayer):
            bits += 8 * module.codes.numel()
            weights += torch.Size(module.shape).numel()
        elif isinstance(module, SparseLayer):
            bits += 8 * (module.values.element_size() * module.values.numel() + module.places.numel())
            weights += torch.Size(module.shape).numel()
        elif isinstance(module, QUANTISABLE):
            weight = weight_of(module)
            bits += 8 * weight.element_size() * weight.numel()
            weights += weight.numel()
    return bits / max(weights, 1)


def measured(model: nn.Module, example: Float[Tensor, "1 c h w"]) -> dict[str, float]:
    """params, macs, bytes, bits and latency_ms of a model, by the names of `Budget`."""
    example = example.to(device_of(model))
    stored = [*model.parameters(), *(b for b in model.buffers())]
    quantised = [m for m in model.modules() if isinstance(m, QuantisedLayer)]
    params = sum(p.numel() for p in model.parameters()) + sum(torch.Size(m.shape).numel() for m in quantised)
    return {
        "params": params,
        "macs": count_macs(model, example),
        "bytes": sum(t.numel() * t.element_size() for t in stored),
        "bits": weight_bits(model),
        "latency_ms": latency(model, example, "eager").median_ms,
    }


@torch.no_grad()
def accuracy(model: nn.Module, data: Data | None, limit: int = 2000) -> float | None:
    """Share of right answers on up to `limit` validation images; None without labelled data."""
    if data is None or data.task != "classify":
        return None
    was_training, device = model.training, device_of(model)
    model.eval()
    right = count = 0
    for start in range(0, min(limit, len(data.val)), 100):
        pairs = [data.val[i] for i in range(start, min(start + 100, limit, len(data.val)))]
        images, labels = torch.stack([x for x, _ in pairs]), torch.tensor([label for _, label in pairs])
        right += int((scores(model, images.to(device)).argmax(1) == labels.to(device)).sum())
        count += len(pairs)
    model.train(was_training)
    return right / max(count, 1)
