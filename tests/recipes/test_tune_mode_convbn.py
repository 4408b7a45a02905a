"""Tune mode: Eval mode's values and gradients, fewer bytes, and nothing left behind."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.catalog import card_of
from opsin.deploy import fuse
from opsin.errors import BadInput
from opsin.layers.conv_bn import FoldedConv, conv_norm_pairs, fold, tune, untune
from opsin.measure.saved import saved_bytes
from opsin.recipes.tune_mode_convbn import TuneModeConvBN, freeze_norms, in_mode, tune_mode


def settled(model: nn.Module) -> nn.Module:
    """Float64, with statistics, gains and offsets that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.3, 3)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.double()


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of all parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def same(model: nn.Module, x: Tensor) -> int:
    """Whether Tune is Eval, to the last digits; returns how many pairs are folded."""
    plain, tuned = in_mode(model, "eval"), in_mode(model, "tune")
    for a, b in zip(results(plain, x), results(tuned, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    return sum(isinstance(vars(m).get("forward"), FoldedConv) for m in tuned.modules())


@pytest.mark.parametrize(("name", "pairs"), [("resnet18", 20), ("mobilenetv2_050", 52)])
def test_networks_of_the_package(name, pairs):
    model = settled(opsin.create(name, num_classes=5, drop=0.0) if "mobile" in name else opsin.create(name))
    assert same(model, torch.randn(2, 3, 32, 32, dtype=torch.float64)) == pairs


KINDS = [
    (nn.Conv1d, nn.BatchNorm1d, 1), (nn.Conv2d, nn.BatchNorm2d, 2), (nn.Conv3d, nn.BatchNorm3d, 3),
    (nn.ConvTranspose1d, nn.BatchNorm1d, 1), (nn.ConvTranspose2d, nn.BatchNorm2d, 2),
    (nn.ConvTranspose3d, nn.BatchNorm3d, 3),
]  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("conv", "norm", "dims"), KINDS)
def test_every_kind_of_convolution(conv, norm, dims, bias, groups):
    model = settled(nn.Sequential(conv(4, 6, 3, stride=2, padding=1, bias=bias, groups=groups), norm(6)))
    assert same(model, torch.randn(2, 4, *[5] * dims, dtype=torch.float64)) == 1


def test_norm_without_affine_part_and_padding_by_reflection():
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False)
    assert same(settled(nn.Sequential(conv, nn.BatchNorm2d(4, affine=False))), torch.randn(2, 3, 6, 6).double()) == 1


class Shared(nn.Module):
    """The convolution's output is read twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Choosy(nn.Module):
    """Its forward cannot be traced; its block's can."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        return self.block(x) if float(x.detach().sum()) > -1e9 else x


class Own(nn.Conv2d):
    """A convolution that computes something else."""

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("build", "pairs"),
    [
        (Shared, 0), (Choosy, 1), (lambda: nn.Sequential(Own(3, 3, 1), nn.BatchNorm2d(3)), 0),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), 0),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.Identity(), nn.BatchNorm2d(3))), 1),
    ],
)  # fmt: skip
def test_only_sole_readers_of_plain_convolutions(build, pairs):
    assert same(settled(build()), torch.randn(2, 3, 5, 5).double()) == pairs


def test_a_hooked_convolution_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda *_: None)
    assert not conv_norm_pairs(model)


def block(dim: int = 4) -> nn.Module:
    return settled(nn.Sequential(nn.Conv2d(3, dim, 3, bias=False), nn.BatchNorm2d(dim), nn.ReLU()))


def test_in_training_mode_the_block_is_an_ordinary_one():
    plain, x = block(), torch.randn(2, 3, 5, 5).double()
    tuned = copy.deepcopy(plain)
    tune(tuned)
    for mode in (True, False, True):
        plain.train(mode)
        tuned.train(mode)
        assert torch.allclose(plain(x), tuned(x))
    assert torch.equal(plain[1].running_mean, tuned[1].running_mean)
    assert int(tuned[1].num_batches_tracked) == 2


def test_statistics_stay_and_parameters_learn():
    model, x = block().train(), torch.randn(2, 3, 5, 5).double()
    before = copy.deepcopy(model.state_dict())
    with tune_mode(model):
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"0.weight", "1.weight", "1.bias"}


def test_undo_leaves_nothing_behind():
    model, x = block().train(), torch.randn(2, 3, 5, 5).double()
    names = list(model.state_dict())
    with tune_mode(model) as tuned:
        assert tuned.pairs == [("0", "1")] and not model[1].training and model[2].training
        assert list(model.state_dict()) == names
    assert model[1].training and all("forward" not in vars(m) for m in model.modules())
    model(x)
    assert int(model[1].num_batches_tracked) == 1


def test_copies_and_pickles_fold_their_own_parameters():
    model, x = block().eval(), torch.randn(2, 3, 5, 5).double()
    tune(model)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other[0].weight.mul_(3)
            other[1].weight.mul_(2)
        assert torch.equal(model(x), y) and not torch.allclose(other(x), y)
        expected = copy.deepcopy(other)
        untune(expected)
        assert torch.allclose(other(x), expected(x))


def test_deploy_has_other_gradients():
    """The gradient of the folded weight lacks the factor s, which is why Deploy is another training."""
    model, x = block(), torch.randn(2, 3, 5, 5).double()
    scale = model[1].weight * torch.rsqrt(model[1].running_var + model[1].eps)
    tuned, deployed = in_mode(model, "tune"), in_mode(model, "deploy")
    ours, theirs = results(tuned, x), results(deployed, x)
    assert torch.allclose(ours[0], theirs[0]) and isinstance(deployed[1], nn.Identity)
    assert torch.allclose(ours[2], scale[:, None, None, None] * theirs[2])
    assert not torch.allclose(ours[2], theirs[2])


def test_the_map_between_convolution_and_norm_is_not_kept():
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)]
    model, x = nn.Sequential(*blocks), torch.randn(8, 4, 16, 16)
    size = x.numel() * x.element_size()
    kept = {}
    for mode in ("eval", "tune"):
        net = in_mode(model, mode)
        kept[mode] = saved_bytes(lambda net=net: net(x), [x, *net.parameters(), *net.buffers()])
    assert kept["eval"] - kept["tune"] == pytest.approx(3 * size, rel=0.05)


def test_saved_bytes_counts_each_storage_once():
    x = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: x.exp().exp(), [x]) == 2 * 40
    assert saved_bytes(lambda: x * x) == 40 and saved_bytes(lambda: x * x, [x]) == 0


def test_fusing_a_tuned_model_keeps_its_function():
    model, x = block().eval(), torch.randn(2, 3, 5, 5).double()
    tune(model)
    assert torch.allclose(fuse(model)(x), model(x))


def test_modes_are_named():
    with pytest.raises(BadInput, match=r"mode='fast' is none of"):
        in_mode(block(), "fast")


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((3, 8, 8), index / 12), index % 2


def test_the_recipe_freezes_statistics_and_goes_away(tmp_path):
    data = opsin.data.Data(
        "ramp", "classify", {"train": Images(), "val": Images()}, ("a", "b"), 3, (8, 8), (0.5,) * 3, (0.3,) * 3
    )
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    before = copy.deepcopy(network.state_dict())
    recipe = TuneModeConvBN()
    opsin.fit(
        network, data, recipe=[recipe], epochs=2, batch_size=4, out=tmp_path / "run", logger=False, progress=False
    )
    assert recipe.tuned is None and all("forward" not in vars(m) for m in network.modules())
    after = network.state_dict()
    assert torch.equal(before["1.running_mean"], after["1.running_mean"]) and int(after["1.num_batches_tracked"]) == 0
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(BadInput, match="found no batch norm that alone reads a convolution"):
        opsin.fit(plain, data, recipe=[TuneModeConvBN()], epochs=1, out=tmp_path / "no", logger=False, progress=False)


def test_the_recipe_freezes_again_what_others_thawed():
    model, recipe = block(), TuneModeConvBN()
    recipe.on_fit_start(None, model)
    model.train()
    recipe.on_train_batch_start(None, model, None, 0)
    assert not model[1].training and model[0].training
    recipe.on_exception(None, model, KeyboardInterrupt())
    assert recipe.tuned is None and "forward" not in vars(model[0])


# mmengine.model.efficient_conv_bn_eval on the same numbers: Conv2d(2, 2, 2, bias) and BatchNorm2d, all by `wave`.
MMENGINE = [0.5616892, 0.6789842, 2.5349870, 1.9047530]


def wave(*shape: int, step: float = 0.7) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def waved() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2)).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(1.5 + wave(*tensor.shape) if "var" in name else wave(*tensor.shape, step=1.1) + 0.3)
    return model


def test_numbers_of_mmengine():
    model = waved()
    tune(model)
    assert torch.allclose(model(wave(1, 2, 3, 2, step=0.3)).flatten(), torch.tensor(MMENGINE), atol=1e-6)


def test_as_pytorch_folds_when_it_compiles():
    """torch._inductor's pass, but for grouped transposed convolutions, whose channels it does not find."""
    from torch._inductor.fx_passes.efficient_conv_bn_eval import efficient_conv_bn_eval

    for conv in (nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, bias=False)):
        model, x = settled(nn.Sequential(conv, nn.BatchNorm2d(6))).eval(), torch.randn(2, 4, 5, 5).double()
        theirs = efficient_conv_bn_eval(model[1], model[0], x)
        tune(model)
        assert torch.allclose(model(x), theirs)
    conv = nn.ConvTranspose2d(4, 6, 3, groups=2)
    model = settled(nn.Sequential(conv, nn.BatchNorm2d(6))).eval()
    with pytest.raises(RuntimeError):
        efficient_conv_bn_eval(model[1], model[0], x)
    assert same(model, x) == 1


def test_fold_keeps_the_type_of_the_weights():
    conv, norm = nn.Conv2d(3, 4, 1).bfloat16(), nn.BatchNorm2d(4)
    assert {t.dtype for t in fold(conv, norm)} == {torch.bfloat16}


def test_freezing_spares_norms_without_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.Dropout())
    freeze_norms(model)
    assert [m.training for m in model] == [False, True, True]


@pytest.mark.parametrize(("images", "size", "ratio"), [(1, 224, 2.61), (8, 128, 1.33), (8, 224, 0.80), (32, 224, 0.60)])
def test_bytes_kept_of_resnet18_are_what_the_card_says(images, size, ratio):
    model, x = opsin.create("resnet18").to("meta"), torch.empty(images, 3, size, size, device="meta")
    nets = [in_mode(model, mode) for mode in ("tune", "eval")]
    tune, plain = (saved_bytes(partial(net, x), [x, *net.parameters(), *net.buffers()]) for net in nets)
    assert tune / plain == pytest.approx(ratio, abs=0.005)
    assert f"{ratio:.2f} at {images} x {size}" in card_of("tune_mode_convbn").facts["memory"]
