"""Invertible residual networks for nflows: every number is exact, or carries its error.

    from nflows_iresnet import ResidualFlow, ResidualTransform

`ResidualFlow` is a whole model with the arguments of nflows' `SimpleRealNVP`; `ResidualTransform`
is one block y = x + g(x) to put between other transforms. The rooms: `nn` (networks with a
certified Lipschitz bound), `logdet` and `solvers` (strategies), `transforms`, `flows`,
`classifiers`, `interop` (normflows), `datasets`, `testing` (the contract, for your own transforms
too).
"""

from nflows_iresnet import (
    classifiers,
    datasets,
    flows,
    linearization,
    logdet,
    nn,
    solvers,
    testing,
    transforms,
)
from nflows_iresnet.flows import ResidualFlow
from nflows_iresnet.transforms import ResidualTransform

__version__ = "0.1.0"
__all__ = [
    "ResidualFlow",
    "ResidualTransform",
    "classifiers",
    "datasets",
    "flows",
    "linearization",
    "logdet",
    "nn",
    "solvers",
    "testing",
    "transforms",
]
