r"""Estimators of log\|det(I + J)\|, J = dg/dx, for residual blocks y = x + g(x).

How to choose: `Exact` wherever you can afford it (about 6 dimensions in training, any dimension
for the final numbers); `RussianRoulette` for unbiased training beyond; `Krylov`, as unbiased, where
g shrinks or stretches on the whole, which it fits; `PowerSeries` where a fixed cost matters more
than a bias whose bound you know. `Auto` is the default and makes the first two choices for you.
"""

from typing import TYPE_CHECKING

from nflows_iresnet.linearization import SecondDerivativeError
from nflows_iresnet.logdet.auto import Auto
from nflows_iresnet.logdet.base import Exact, LogDetEstimate, LogDetEstimator
from nflows_iresnet.logdet.krylov import Krylov
from nflows_iresnet.logdet.plan import TermPlan
from nflows_iresnet.logdet.power_series import (
    Gaussian,
    PowerSeries,
    Probe,
    Rademacher,
)
from nflows_iresnet.logdet.russian_roulette import (
    GeometricTruncation,
    InfiniteVarianceWarning,
    LipschitzTruncation,
    RussianRoulette,
    Truncation,
)
from nflows_iresnet.renamed import renamed

__all__ = [
    "Auto",
    "Exact",
    "Gaussian",
    "GeometricTruncation",
    "InfiniteVarianceWarning",
    "Krylov",
    "LipschitzTruncation",
    "LogDetEstimate",
    "LogDetEstimator",
    "PowerSeries",
    "Probe",
    "Rademacher",
    "RussianRoulette",
    "SecondDerivativeError",
    "TermPlan",
    "Truncation",
]

if not TYPE_CHECKING:
    __getattr__ = renamed(
        __name__,
        {
            "Adaptive": "Auto",
            "GeometricTail": "GeometricTruncation",
            "MatchedTail": "LipschitzTruncation",
        },
    )
