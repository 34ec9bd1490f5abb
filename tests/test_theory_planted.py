"""The checks of the theory must be able to fail: each bug is planted once, and seen."""

from __future__ import annotations

import pytest
import torch

from nflows_iresnet import logdet, solvers
from tests import planted_logdet, planted_theory, theory

SERIES = (
    planted_theory.WithoutOneOverK,
    planted_theory.WithoutSigns,
    planted_theory.OneTermShort,
)


@pytest.mark.parametrize("series", SERIES)
def test_a_wrong_series_is_seen(series: type[logdet.PowerSeries]) -> None:
    wrong = series(num_terms=5, num_probes=8, probe=theory.AllSigns(3), exact_trace=False)
    with pytest.raises(AssertionError):
        theory.check_series(wrong, theory.matrix(3, 0.9))


def test_a_bound_that_is_off_by_one_is_seen() -> None:
    with pytest.raises(AssertionError, match="below the tail"):
        theory.check_bias(
            planted_theory.BoundOfOneMoreTerm(num_terms=4, exact_trace=False), 0.5, features=3
        )


@pytest.mark.parametrize("roulette", [planted_logdet.Unweighted, planted_logdet.OffByOne])
def test_wrong_weights_of_the_roulette_are_seen(roulette: type[logdet.RussianRoulette]) -> None:
    with pytest.raises(AssertionError):
        theory.check_weights(roulette(), 0.9)


@pytest.mark.parametrize("lipschitz", [0.3, 0.9])
def test_a_slow_iteration_is_seen(lipschitz: float) -> None:
    targets = torch.ones(1, 3, dtype=torch.float64)
    for solver, is_slow in (
        (solvers.FixedPointIteration(), False),
        (planted_theory.Damped(), True),
    ):
        arguments = (solver, lambda x: targets + lipschitz * x, targets, lipschitz)
        if is_slow:
            with pytest.raises(AssertionError, match="step"):
                theory.check_banach_rate(*arguments)
        else:
            theory.check_banach_rate(*arguments)


def test_a_density_with_the_wrong_sign_is_seen() -> None:
    torch.manual_seed(0)
    flow = planted_theory.WrongSign(1, 16, num_layers=3, coeff=0.9).double().eval()
    with pytest.raises(AssertionError):
        theory.check_density(flow)
