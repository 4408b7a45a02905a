"""One tensor out of whatever a model predicts: for files, explainers, attacks and compressors."""

from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput
from opsin.tasks import Classes, Detections, Images, Masks

OUTPUTS = {Classes: "logits", Masks: "logits", Images: "images", Detections: "table"}


class TensorOutput(nn.Module):
    """A model whose typed prediction is taken apart: image in, one tensor out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Float[Tensor, "n c h w"]) -> Tensor:
        prediction = self.model(image)
        return prediction if isinstance(prediction, Tensor) else getattr(prediction, output_name(prediction))


def output_name(prediction: object) -> str:
    """What the one tensor of a prediction is called. Raises BadInput where a prediction is not one tensor."""
    if isinstance(prediction, Tensor):
        return "output"
    for kind, name in OUTPUTS.items():
        if isinstance(prediction, kind):
            return name
    raise BadInput(f"a model that predicts {type(prediction).__name__} has no single tensor to export")


def scores(model: nn.Module, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
    """Logits of a backbone, of a task model (which returns typed predictions), or of any module that gives (n, k)."""
    out = model(images)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise BadInput(f"{type(model).__name__} gives no class scores; a classifier is needed")
    return logits
