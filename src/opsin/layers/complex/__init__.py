"""Layers on complex tensors, and the conversion of a real convolutional network into a complex one.

Chatterjee et al. 2022, "Complex Network for Complex Problems", arXiv:2302.04584; the set follows their package, and
repairs what is wrong in it (each place says so).
"""

from opsin.layers.complex.activation import (
    CModReLU,
    ComplexSigmoid,
    ComplexTanh,
    CReLU,
    CSiLU,
    MagnitudeSoftmax,
    ModReLU,
    ZReLU,
)
from opsin.layers.complex.convert import ComplexNetwork, comparison_triple, real_parameters, to_complex
from opsin.layers.complex.init import kaiming_parts_, trabelsi_
from opsin.layers.complex.linear import (
    ComplexConv1d,
    ComplexConv2d,
    ComplexConv3d,
    ComplexConvTranspose1d,
    ComplexConvTranspose2d,
    ComplexConvTranspose3d,
    ComplexLinear,
)
from opsin.layers.complex.norm import (
    ComplexBatchNorm,
    ComplexGroupNorm,
    ComplexLayerNorm,
    ComplexLayerNorm2d,
    NaiveBatchNorm,
)
from opsin.layers.complex.pool import (
    ComplexAdaptiveAvgPool,
    ComplexAvgPool,
    ComplexDropout,
    MagnitudeMaxPool,
    PartsMaxPool,
)
from opsin.layers.complex.resample import ComplexUpsample, sinc_resize

__all__ = [
    "CModReLU", "CReLU", "CSiLU", "ComplexAdaptiveAvgPool", "ComplexAvgPool", "ComplexBatchNorm", "ComplexConv1d",
    "ComplexConv2d", "ComplexConv3d", "ComplexConvTranspose1d", "ComplexConvTranspose2d", "ComplexConvTranspose3d",
    "ComplexDropout", "ComplexGroupNorm", "ComplexLayerNorm", "ComplexLayerNorm2d", "ComplexLinear", "ComplexNetwork",
    "ComplexSigmoid", "ComplexTanh", "ComplexUpsample", "MagnitudeMaxPool", "MagnitudeSoftmax", "ModReLU",
    "NaiveBatchNorm", "PartsMaxPool", "ZReLU", "comparison_triple", "kaiming_parts_", "real_parameters",
    "sinc_resize", "to_complex", "trabelsi_",
]  # fmt: skip
