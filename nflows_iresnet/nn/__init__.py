"""Networks with a certified Lipschitz bound: layers, activations, norms, bounds."""

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
from nflows_iresnet.nn.bounds import lipschitz_bound, spectral_norm_bound, spectral_penalty
from nflows_iresnet.nn.conditioning import context_mlp
from nflows_iresnet.nn.layers import LipschitzLinear
from nflows_iresnet.nn.nets import LipschitzMLP
from nflows_iresnet.nn.norms import (
    FrobeniusNorm,
    MatrixNorm,
    PowerIteration,
    SchattenNorm,
    SpectralNorm,
)

__all__ = [
    "ELU",
    "Activation",
    "CLipSwish",
    "FrobeniusNorm",
    "LipSwish",
    "LipschitzLinear",
    "LipschitzMLP",
    "MatrixNorm",
    "MaxMin",
    "Mixed",
    "PowerIteration",
    "SchattenNorm",
    "Sine",
    "SmoothAbs",
    "Softplus",
    "SpectralNorm",
    "Tanh",
    "context_mlp",
    "lipschitz_bound",
    "spectral_norm_bound",
    "spectral_penalty",
]
