"""Scattering with any frames, non-linearities and pooling, scaled so that the theorems on it hold.

Wiatowski and Boelcskei 2018, "A Mathematical Theory of Deep Convolutional Neural Networks for Feature Extraction",
arXiv:1512.06293. From f, layer by layer along all paths q = (l_1 .. l_n), with the frames Psi_n of `frames.py`, a
Lipschitz non-linearity M_n and a pooling by the factor S_n:

    U_n[l] f (x) = S_n^{d/2} P_n( M_n(f * g_l) )(S_n x),     Phi^n(f) = { (U[q] f) * chi_n },     Phi = all Phi^n
    admissible:  max(B_n, B_n L_n^2 R_n^2) <= 1    (frame bound B, Lipschitz constants L of M and R of P)

Then Phi does not expand distances; layer n is invariant to a translation t up to 2 pi |t| K / (S_1 .. S_n), for any
filters; and a deformation moves Phi by no more than it moves f. Every frame is divided here by the root of
B max(1, L^2 R^2), which makes it admissible. On a grid, taking every S-th sample keeps norms only of band-limited
signals: sup ||S^{d/2} f(S x)|| / ||f|| is S^{d/2} and not 1 as on the plane, and that R is used.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from opsin.errors import BadInput, UnknownName
from opsin.ops.spectral.frames import FRAMES, Frame, littlewood_paley

Layers = str | Sequence[str]
Path = tuple[int, ...]  # the atoms of one path
DIMENSIONS = 2


def by_parts(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A real function, on the real and the imaginary part of complex signals."""

    def apply(x: Tensor) -> Tensor:
        return torch.complex(function(x.real), function(x.imag)) if x.is_complex() else function(x)

    return apply


class Nonlinearity(NamedTuple):
    """A pointwise function with M(0) = 0, and its Lipschitz constant in the paper."""

    function: Callable[[Tensor], Tensor]
    constant: float


NONLINEARITIES = {
    "modulus": Nonlinearity(torch.abs, 1.0),
    "relu": Nonlinearity(by_parts(torch.relu), 2.0),
    "tanh": Nonlinearity(by_parts(torch.tanh), 2.0),
    "logistic": Nonlinearity(by_parts(lambda x: torch.sigmoid(x) - 0.5), 0.5),
}


def blocks(x: Tensor, factor: int) -> Float[Tensor, "... h w f f"]:
    """Squares of factor x factor pixels, with zeros after the last row and column where they do not fill one."""
    x = nn.functional.pad(x, (0, -x.shape[-1] % factor, 0, -x.shape[-2] % factor))
    return x.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).transpose(-3, -2)


class Pooling(NamedTuple):
    """f -> S^{d/2} P(f)(S x). constant(S): its Lipschitz constant on the grid; on_plane: the paper's R of P alone."""

    function: Callable[[Tensor, int], Tensor]
    constant: Callable[[int], float]
    on_plane: float = 1.0


def subsample(x: Tensor, factor: int) -> Tensor:
    return x[..., ::factor, ::factor] * factor ** (DIMENSIONS / 2)


def average(x: Tensor, factor: int) -> Tensor:
    return blocks(x, factor).mean((-2, -1)) * factor ** (DIMENSIONS / 2)


def maximum(x: Tensor, factor: int) -> Tensor:
    return by_parts(lambda part: blocks(part, factor).amax((-2, -1)))(x) * factor ** (DIMENSIONS / 2)


POOLINGS = {
    "subsample": Pooling(subsample, lambda s: s ** (DIMENSIONS / 2)),
    "average": Pooling(average, lambda s: 1.0),
    "max": Pooling(maximum, lambda s: s ** (DIMENSIONS / 2)),
}


class Layer(nn.Module):
    """One step along the paths: a frame, a non-linearity and a pooling, admissible together."""

    def __init__(self, frame: Frame, nonlinearity: str, pooling: str, factor: int):
        super().__init__()
        for what, name, known in (("non-linearity", nonlinearity, NONLINEARITIES), ("pooling", pooling, POOLINGS)):
            if name not in known:
                raise UnknownName(what, name, known)
        if factor < 1:
            raise BadInput(f"factor={factor}: a pooling factor is 1 (no pooling) or more")
        self.frame, self.factor = frame, factor
        self.nonlinearity, self.pooling = NONLINEARITIES[nonlinearity], POOLINGS[pooling]

    @property
    def gain(self) -> float:
        """L R of what follows the filters."""
        return self.nonlinearity.constant * self.pooling.constant(self.factor)

    def spectrum(self, u: Tensor) -> Complex[Tensor, "atoms h w"]:
        """The frame on the grid of u, divided so that max(B, B L^2 R^2) = 1; chi last."""
        spectrum = self.frame.spectrum(*u.shape[-2:], u)
        return spectrum * (littlewood_paley(spectrum).max() * max(1.0, self.gain**2)).rsqrt()

    def after(self, u: Tensor) -> Tensor:
        """M and P."""
        return self.pooling.function(self.nonlinearity.function(u), self.factor)


def parted(values: object, count: int, what: str) -> list:
    """One value per layer, from one for all or a sequence."""
    each = list(values) if isinstance(values, list | tuple) else [values] * count
    if len(each) != count:
        raise BadInput(f"{what} has {len(each)} entries, and there are {count} layers; give one for all or {count}")
    return each


class FrameScattering(nn.Module):
    """(N, dim, H, W) -> (N, dim * paths, H', W'): the features of all layers on the grid of the last one.

    Channels: layer after layer, in each the paths in order of their first atom; the real and then the imaginary part
    of the features where they are complex. H' = ceil(H / (S_1 .. S_n)).

    Args:
        frame: one name for all of the depth + 1 frames, or one each: morlet, weyl_heisenberg, haar, random, learned.
        nonlinearity, pooling, factor: for all layers or one each; factor 1 is no pooling.
        depth: layers; the last frame gives the output atom of the last one.
        scales, angles: octaves (Morlet, Haar) and directions (Morlet). cells: frequencies per axis (Weyl-Heisenberg).
        filters, kernel_size: of the random and learned frames.
        paths: "all", or "decreasing" to keep those along which the scale grows, which have most of the energy.
    Raises UnknownName, BadInput.
    """

    def __init__(
        self, dim: int, frame: Layers = "morlet", nonlinearity: Layers = "modulus", pooling: Layers = "average",
        factor: int | Sequence[int] = 2, depth: int = 2, scales: int = 2, angles: int = 4, cells: int = 3,
        filters: int = 8, kernel_size: int = 5, paths: str = "all",
    ):  # fmt: skip
        super().__init__()
        options = {
            "morlet": (scales, angles), "weyl_heisenberg": (cells,), "haar": (scales,),
            "random": (filters, kernel_size), "learned": (filters, kernel_size),
        }  # fmt: skip
        names = parted(frame, depth + 1, "frame")
        for name in names:
            if name not in FRAMES:
                raise UnknownName("frame", name, FRAMES)
        frames = [FRAMES[name](*options[name]) for name in names]
        choices = (parted(v, depth, n) for n, v in (
            ("nonlinearity", nonlinearity), ("pooling", pooling), ("factor", factor)
        ))  # fmt: skip
        self.layers = nn.ModuleList(Layer(*each) for each in zip(frames[:-1], *choices, strict=True))
        self.layers.append(Layer(frames[-1], "modulus", "average", 1))
        self.dim = dim
        self.paths: list[list[Path]] = [[()]]
        for n in range(depth):
            self.paths.append(extended(self.paths[n], frames[: n + 1], paths))

    @property
    def depth(self) -> int:
        return len(self.layers) - 1

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f h2 w2"]:
        return self.joined(self.features(x)).to(x.dtype)

    def features(self, x: Float[Tensor, "n c h w"]) -> list[Tensor]:
        """Phi^n for every layer n, (N, C, paths, h_n, w_n), complex where the signals are."""
        u, outputs = self.start(x), []
        for n, layer in enumerate(self.layers):
            waves, spectrum, real = torch.fft.fft2(u), layer.spectrum(u), layer.frame.real and not u.is_complex()
            outputs.append(filtered(waves, spectrum[-1:], not u.is_complex()))
            if n < self.depth:
                parents, atoms = self.steps(n, x.device)
                u = layer.after(filtered(waves.index_select(2, parents), spectrum.index_select(0, atoms), real))
        return outputs

    def start(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c 1 h w"]:
        """The image as the signal of the empty path, in the precision of the transforms."""
        return x[:, :, None].to(torch.promote_types(x.dtype, torch.float32))

    def steps(self, n: int, device: torch.device) -> tuple[Int[Tensor, " paths"], Int[Tensor, " paths"]]:
        """For every path of n + 1 atoms, which path of n atoms it goes on from, and its last atom."""
        place = {path: i for i, path in enumerate(self.paths[n])}
        parents = [place[path[:-1]] for path in self.paths[n + 1]]
        return torch.tensor(parents, device=device), torch.tensor([q[-1] for q in self.paths[n + 1]], device=device)

    def joined(self, features: Sequence[Tensor]) -> Float[Tensor, "n f h2 w2"]:
        """Features as channels of one map: earlier layers keep the positions of the last."""
        maps = []
        for n, phi in enumerate(features):
            step = prod(layer.factor for layer in self.layers[n:])
            phi = phi[..., ::step, ::step]
            phi = torch.cat((phi.real, phi.imag), 2) if phi.is_complex() else phi
            maps.append(phi.transpose(1, 2).flatten(1, 2))
        return torch.cat(maps, 1)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f h2 w2"]:
        """The definition: path by path, one convolution after the other."""
        features = []
        for n, paths in enumerate(self.paths):
            found = []
            for path in paths:
                u = self.start(x)[:, :, 0]
                for layer, l in zip(self.layers, path):
                    real = layer.frame.real and not u.is_complex()
                    u = layer.after(filtered(torch.fft.fft2(u), layer.spectrum(u)[l], real))
                found.append(filtered(torch.fft.fft2(u), self.layers[n].spectrum(u)[-1], not u.is_complex()))
            features.append(torch.stack(found, 2))
        return self.joined(features).to(x.dtype)


def filtered(waves: Tensor, response: Tensor, real: bool) -> Tensor:
    """The periodic convolution, from the two spectra."""
    y = torch.fft.ifft2(waves * response)
    return y.real if real else y


def extended(known: Sequence[Path], frames: Sequence[Frame], which: str) -> list[Path]:
    """The paths that are longer by one atom of the last frame.

    which: "all", or "decreasing" for those along which the scale grows. Raises BadInput where a frame has no scales.
    """
    if which not in ("all", "decreasing"):
        raise BadInput(f"paths='{which}' is unknown; take 'all' or 'decreasing'")
    longer = [(*path, atom) for path in known for atom in range(frames[-1].count)]
    if which == "all":
        return longer
    levels = [frame.levels for frame in frames[-2:]]
    if None in levels:
        raise BadInput("paths='decreasing' needs frames with scales (morlet, haar); take paths='all'")
    return [q for q in longer if len(q) == 1 or levels[-1][q[-1]] > levels[-2][q[-2]]]
