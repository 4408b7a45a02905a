"""The same weights in timm (or torchvision) and here give the same logits and the same feature maps."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import opsin
import opsin.errors
from opsin.backbones import convnext, swin, vit
from opsin.catalog import all_cards, find
from opsin.measure.cost import count_macs, count_params

pytestmark = pytest.mark.parity
TOLERANCE = 5e-5  # of the largest value; float32 in another order of operations
CARDS = ("convnext", "swin", "inceptionnext", "vit", "resnet")
NOT_IN_TIMM = re.compile(r"convnext_iso|swin_mlp|_cifar")
NAMES = [name for key in CARDS for name in all_cards()[key].variants if not NOT_IN_TIMM.search(name)]


def scramble(model: nn.Module) -> nn.Module:
    """Random norms, gains, biases and statistics: fresh ones are 0, 1 or 1e-6, which hides mistakes."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith(("weight", "gamma"))):
                tensor.uniform_(0.5, 1.5).mul_(0.3 if name.endswith("gamma") else 1.0)
            elif (tensor.is_floating_point() and tensor.ndim == 1) or "relative_position_bias" in name:
                tensor.normal_(std=0.2)
    return model.eval()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference over the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def size_of(name: str) -> int:
    """Pixels: what the network is built for where that matters, else few."""
    return find(name)[1].input if name.startswith(("vit", "swin")) else 64


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_features(timm, name, record_property, capsys):
    theirs = scramble(timm.create_model(name))
    ours = opsin.create(name).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, size_of(name), size_of(name))
    logits = difference(ours(x), theirs(x))
    maps = ours.features(x)
    normalised = name.startswith(("vit", "swin"))
    indices = [tap - 1 for tap in ours.taps] if name.startswith("vit") else list(range(len(maps)))
    if name.startswith("resnet"):
        indices = [i + 1 for i in indices]  # timm's first level is the stem
    expected = theirs.forward_intermediates(x, indices=indices, intermediates_only=True)
    if normalised:
        expected[-1] = theirs.forward_intermediates(x, indices=indices, intermediates_only=True, norm=True)[-1]
    features = max(difference(a, b) for a, b in zip(maps, expected, strict=True))
    record_property("logits", logits)
    record_property("features", features)
    with capsys.disabled():
        print(f"\n{name}: logits {logits:.1e}, features {features:.1e} of the largest value", end=" ")
    assert logits < TOLERANCE and features < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["convnext_tiny", "swin_tiny_patch4_window7_224", "inception_next_atto", "vit_tiny_patch16_224", "resnet18"],
)
def test_checkpoint_file_loads(timm, name, tmp_path: Path):
    """A checkpoint in timm's format, through the public call."""
    theirs = scramble(timm.create_model(name))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = opsin.create(name, weights=str(tmp_path / "model.safetensors")).eval()
    x = torch.randn(1, 3, 224, 224)
    assert difference(ours(x), theirs(x)) < TOLERANCE


def official_convnext(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those of the original repository, written from its checkpoints' side."""
    out = {}
    for name, tensor in state.items():
        name = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        name = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        out[name.replace("head.norm", "norm").replace("head.fc", "head")] = tensor
    return out


def official_swin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those of the original repository: merging at a stage's end, and buffers that are saved."""
    out = {}
    for name, tensor in state.items():
        move = re.match(r"layers\.(\d)\.downsample(.*)", name)
        out[f"layers.{int(move[1]) - 1}.downsample{move[2]}" if move else name.replace("head.fc", "head")] = tensor
    out["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    out["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return out


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "rename"),
    [("convnext_tiny", official_convnext), ("swin_tiny_patch4_window7_224", official_swin)],
)
def test_original_checkpoint_loads(timm, name, rename, tmp_path: Path):
    """A .pth file with the original repository's names and wrapper."""
    theirs = scramble(timm.create_model(name))
    torch.save({"model": rename(theirs.state_dict())}, tmp_path / "original.pth")
    ours = opsin.create(name, weights=str(tmp_path / "original.pth")).eval()
    x = torch.randn(1, 3, 224, 224)
    assert difference(ours(x), theirs(x)) < TOLERANCE


@torch.no_grad()
def test_torchvision_convnext(torchvision):
    from torchvision.models import convnext_tiny

    theirs = scramble(convnext_tiny())
    ours = opsin.create("convnext_tiny").eval()
    ours.load_state_dict(convnext.remap(theirs.state_dict()))
    x = torch.randn(1, 3, 96, 64)
    assert difference(ours(x), theirs(x)) < TOLERANCE


@torch.no_grad()
def test_torchvision_resnet(torchvision):
    from torchvision.models import resnet50

    theirs = scramble(resnet50())
    ours = opsin.create("resnet50").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 96, 65)
    assert difference(ours(x), theirs(x)) < TOLERANCE


@torch.no_grad()
def test_swin_at_another_window_and_a_rectangle(timm):
    theirs = scramble(timm.create_model("swin_tiny_patch4_window7_224", img_size=(256, 128), window_size=8))
    ours = opsin.create("swin_tiny_patch4_window7_224", image_size=(256, 128), window_size=8).eval()
    ours.load_state_dict(swin.remap(theirs.state_dict()))
    x = torch.randn(1, 3, 256, 128)
    assert difference(ours(x), theirs(x)) < TOLERANCE


@torch.no_grad()
def test_vit_interpolates_positions_as_timm(timm):
    theirs = scramble(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, global_pool="avg"))
    ours = opsin.create("vit_tiny_patch16_224", global_pool="avg").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 160, 288)
    assert difference(ours(x), theirs(x)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_relative_position_bias_as_in_beit(timm, shared):
    from timm.models.beit import Beit

    theirs = Beit(
        img_size=64, embed_dim=48, depth=3, num_heads=4, init_values=0.1, num_classes=10, use_abs_pos_emb=False,
        use_rel_pos_bias=not shared, use_shared_rel_pos_bias=shared,
    )  # fmt: skip
    scramble(theirs)
    ours = opsin.create(
        "vit", dim=48, depth=3, num_heads=4, image_size=64, num_classes=10, layer_scale=0.1, global_pool="avg",
        rel_pos_bias="shared" if shared else "per_layer",
    ).eval()  # fmt: skip
    ours.load_state_dict(vit.remap(theirs.state_dict()))
    x = torch.randn(2, 3, 64, 64)
    assert difference(ours(x), theirs(x)) < TOLERANCE


@torch.no_grad()
def test_timm_models_behind_our_contract(timm):
    model = opsin.create("timm:resnet18", num_classes=7, in_chans=1).eval()
    x = torch.randn(2, 1, 64, 64)
    assert [(m.shape[1], 64 // m.shape[2]) for m in model.features(x)] == [tuple(i) for i in model.feature_info]
    assert model(x).shape == (2, 7)
    assert opsin.create("timm:vit_tiny_patch16_224", num_classes=0).eval()(torch.randn(1, 3, 224, 224)).shape == (
        1,
        192,
    )
    with pytest.raises(opsin.errors.UnknownName, match="resnet18"):
        opsin.create("timm:resnet81")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("convnext")])
def test_counts_equal_to_the_last_unit(timm, name):
    with torch.device("meta"):
        theirs, x = timm.create_model(name), torch.empty(1, 3, 224, 224)
        ours = opsin.create(name)
        assert count_params(ours) == count_params(theirs) and count_macs(ours, x) == count_macs(theirs, x)
