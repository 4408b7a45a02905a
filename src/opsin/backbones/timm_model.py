"""Any timm model behind the backbone contract: `opsin.create("timm:resnet50")`."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from opsin.backbones import Backbone, FeatureInfo
from opsin.errors import BadInput, MissingExtra, UnknownName


def import_timm() -> Any:
    """The package. Raises MissingExtra where it is not installed, BadInput where its torchvision does not load."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "timm", "peers") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        raise BadInput(
            f"timm cannot be imported because its torchvision lacks compiled operators for this PyTorch ({error}); "
            "install the torchvision build that belongs to your PyTorch"
        ) from error
    return timm


class TimmBackbone(Backbone):
    """A timm model by its timm name.

    Args: pretrained fetches timm's weights; further options go to `timm.create_model`.
    Raises MissingExtra, UnknownName with the nearest names, BadInput where the model gives no feature maps.
    """

    def __init__(self, name: str, num_classes: int = 1000, in_chans: int = 3, pretrained: bool = False, **options: Any):
        super().__init__()
        timm = import_timm()
        if not timm.is_model(name):
            raise UnknownName("timm model", name, timm.list_models())
        self.model = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **options
        )
        if not hasattr(self.model, "forward_intermediates"):
            raise BadInput(f"timm's '{name}' gives no feature maps, so it cannot be a backbone")
        self.num_classes = num_classes
        self.num_features = self.model.head_hidden_size
        levels = self.model.feature_info
        self.feature_info = [FeatureInfo(level["num_chs"], level["reduction"]) for level in levels]

    def features(self, x: Float[Tensor, "n k h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        return self.model.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")

    def forward_features(self, x: Float[Tensor, "n k h w"]) -> Tensor:
        return self.model.forward_features(x)

    def forward_head(self, x: Tensor) -> Float[Tensor, "n k"]:
        return self.model.forward_head(x)
