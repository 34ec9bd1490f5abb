r"""Estimators of log\|det(I + J)\|, J = dg/dx, for residual blocks y = x + g(x).

How to choose: `Exact` wherever you can afford it (about 6 dimensions in training, any dimension
for the final numbers); `RussianRoulette` for unbiased training beyond; `PowerSeries` where a fixed
cost matters more than a bias whose bound you know. `Adaptive` is the default and makes the first
two choices for you.
"""

from nflows_iresnet.logdet.adaptive import Adaptive
from nflows_iresnet.logdet.base import Exact, LogDetEstimate, LogDetEstimator
from nflows_iresnet.logdet.probes import Gaussian, Probe, Rademacher
from nflows_iresnet.logdet.roulette import (
    GeometricTail,
    InfiniteVarianceWarning,
    MatchedTail,
    RussianRoulette,
    Truncation,
)
from nflows_iresnet.logdet.series import PowerSeries

__all__ = [
    "Adaptive",
    "Exact",
    "Gaussian",
    "GeometricTail",
    "InfiniteVarianceWarning",
    "LogDetEstimate",
    "LogDetEstimator",
    "MatchedTail",
    "PowerSeries",
    "Probe",
    "Rademacher",
    "RussianRoulette",
    "Truncation",
]
