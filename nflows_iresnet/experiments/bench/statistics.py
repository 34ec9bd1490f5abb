"""Medians with their spread, ratios in pairs, and fitted exponents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """The median of some values and their quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles, interpolated linearly.

    Raises:
        ValueError: there are no values.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0)
    """
    if not len(values):
        raise ValueError("no values to summarise: at least one is needed")
    low, median, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return Spread(median, low, high)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the spread of numerator / denominator over rounds.

    The two of a pair come from the same round, so that a slow moment of the machine, which makes
    both longer, leaves their ratio as it is.

    Raises:
        ValueError: the rounds are not the same, or there are none.

    Example:
        >>> paired_ratio([2.0, 40.0, 6.0], [1.0, 20.0, 3.0]).median
        2.0
    """
    if len(numerators) != len(denominators):
        raise ValueError(
            f"{len(numerators)} and {len(denominators)} rounds cannot be paired: "
            "take both from one race"
        )
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x^exponent.

    Args:
        exponent: fitted by least squares in log y and log x.
        standard_error: of the exponent, from the residuals; None for two points, which say nothing.
        factor: y at x = 1.
    """

    exponent: float
    standard_error: float | None
    factor: float


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fit a straight line to log y over log x.

    Raises:
        ValueError: fewer than two different x, or a value that has no logarithm.

    Example:
        >>> round(fit_power_law([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]).exponent, 6)
        2.0
    """
    if len(set(x)) < 2 or len(x) != len(y):
        raise ValueError(f"a power law needs two different x and a y for each, got {x} and {y}")
    if min(*x, *y) <= 0:
        raise ValueError(f"a power law needs positive values, got {x} and {y}")
    log_x, log_y = np.log(x), np.log(y)
    centred = log_x - log_x.mean()
    squares = float(centred @ centred)
    exponent = float(centred @ log_y) / squares
    intercept = float(log_y.mean() - exponent * log_x.mean())
    residual = log_y - intercept - exponent * log_x
    degrees = len(x) - 2
    error = float(np.sqrt(residual @ residual / degrees / squares)) if degrees else None
    return PowerLaw(exponent, error, float(np.exp(intercept)))
