"""Networks with a certified Lipschitz bound: layers, activations, norms, bounds."""

from typing import TYPE_CHECKING

from nflows_iresnet.conditioning import context_mlp
from nflows_iresnet.nn.activations import (
    ELU,
    Activation,
    CLipSwish,
    LipSwish,
    MaxMin,
    Mixed,
    Sine,
    SmoothAbs,
    Softplus,
    Tanh,
)
from nflows_iresnet.nn.base import LipschitzNet
from nflows_iresnet.nn.bounds import (
    conv_norm_bound,
    lipschitz_bound,
    spectral_norm_bound,
    spectral_penalty,
)
from nflows_iresnet.nn.cholesky_norm import CholeskyNorm
from nflows_iresnet.nn.cnn import LipschitzCNN
from nflows_iresnet.nn.conv_norms import ConvNorm, ConvPowerIteration, FourierNorm
from nflows_iresnet.nn.dense import LipschitzDenseNet
from nflows_iresnet.nn.layers import LipschitzConv2d, LipschitzLinear
from nflows_iresnet.nn.mlp import LipschitzMLP
from nflows_iresnet.nn.norms import (
    FrobeniusNorm,
    MatrixNorm,
    OperatorNorm,
    PowerIteration,
    SchattenNorm,
    SpectralNorm,
)
from nflows_iresnet.renamed import renamed

__all__ = [
    "ELU",
    "Activation",
    "CLipSwish",
    "CholeskyNorm",
    "ConvNorm",
    "ConvPowerIteration",
    "FourierNorm",
    "FrobeniusNorm",
    "LipSwish",
    "LipschitzCNN",
    "LipschitzConv2d",
    "LipschitzDenseNet",
    "LipschitzLinear",
    "LipschitzMLP",
    "LipschitzNet",
    "MatrixNorm",
    "MaxMin",
    "Mixed",
    "OperatorNorm",
    "PowerIteration",
    "SchattenNorm",
    "Sine",
    "SmoothAbs",
    "Softplus",
    "SpectralNorm",
    "Tanh",
    "context_mlp",
    "conv_norm_bound",
    "lipschitz_bound",
    "spectral_norm_bound",
    "spectral_penalty",
]

if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {"SymbolNorm": "FourierNorm"})
