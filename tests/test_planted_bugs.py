"""The contract must be able to fail: each bug is planted once, and its clause turns red."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nflows_iresnet import logdet, testing
from nflows_iresnet.transforms import ResidualTransform
from tests import planted, planted_logdet
from tests.peers import Wave, rows

Factory = Callable[[], nn.Module]


def _steep(estimator: logdet.LogDetEstimator) -> Factory:
    return lambda: ResidualTransform(planted.steep(), estimator=estimator)


def _wave(block: Callable[[nn.Module], nn.Module]) -> Factory:
    return lambda: block(Wave())


def _conditional(block: Callable[[nn.Module], nn.Module]) -> Factory:
    return lambda: block(planted.Conditional())


PLANTED: dict[str, dict[str, Factory]] = {
    "shapes_and_dtype": {
        "a column instead of a row": lambda: planted_logdet.changed(lambda values: values[:, None]),
        "float32 in a float64 flow": lambda: planted_logdet.changed(torch.Tensor.float),
    },
    "round_trip": {
        "stop after 12 steps": lambda: ResidualTransform(
            planted.steep(), solver=planted.TwelveSteps()
        ),
        "g moves in training": lambda: ResidualTransform(planted.MovesWhileTraining()),
    },
    "logabsdet_is_exact_or_unbiased": {
        "log-det = 0": lambda: planted_logdet.changed(torch.zeros_like),
        "wrong sign": lambda: planted_logdet.changed(torch.neg),
        "wrong sign, only without gradients": lambda: planted_logdet.changed(
            lambda values: values if torch.is_grad_enabled() else -values
        ),
        "value of the surrogate": _steep(planted_logdet.Surrogate(as_value=True)),
        "roulette without weights": _steep(planted_logdet.Unweighted(lipschitz=0.8)),
        "roulette weights off by one": _steep(planted_logdet.OffByOne(lipschitz=0.8)),
        "fitted, and not made good": _steep(planted_logdet.FittedWithoutWhatFollows(lipschitz=0.8)),
        "fitted where it ends": _steep(planted_logdet.FittedWhereItEnds(lipschitz=0.8)),
    },
    "same_seed_negates": {
        "inverse with the sign of forward": _wave(planted.InverseHasForwardsSign),
        "inverse evaluated at its inputs": _wave(planted.LogDetAtTheWrongPoint),
        "numpy decides": _wave(planted.SeededByNumpy),
    },
    "rows_are_independent": {
        "mean over the batch": _wave(planted.RowsSeeEachOther),
        "log-det of the batch": lambda: planted_logdet.changed(
            lambda values: values.mean().expand_as(values)
        ),
        "fitted to the batch": lambda: ResidualTransform(
            Wave(), estimator=planted_logdet.FittedToTheBatch(lipschitz=0.8)
        ),
    },
    "context_matters": {
        "context without gradient": _conditional(planted.ContextWithoutGradient),
        "context ignored": _conditional(planted.ContextIgnored),
        "context of the first row": _conditional(planted.ContextOfTheFirstRow),
    },
    "forgotten_context": {
        "works without": lambda: ResidualTransform(planted.ForgetsItsContext()),
    },
    "few_rows": {"two rows needed": _wave(planted.NeedsTwoRows)},
    "weighted_gradient": {
        "gradient scaled by the first sample": lambda: planted_logdet.changed(
            planted_logdet.gradient_of_the_first_sample
        ),
        "log-det without gradient": lambda: planted_logdet.changed(Tensor.detach),
        "gradient of the trace": lambda: ResidualTransform(
            Wave(), estimator=planted_logdet.Surrogate(as_value=False)
        ),
    },
    "every_parameter_learns": {
        "unused parameter": lambda: ResidualTransform(planted.UnusedParameter())
    },
    "frozen_parameters": {"parameters must train": _wave(planted.DifferentiatesItsParameters)},
    "inverse_gradients": {
        "inverse detached": _wave(planted.InverseWithoutGradient),
        "log-det of the inverse detached": _wave(planted.InverseLogDetWithoutGradient),
        "one step differentiated": _wave(planted.LastStepDifferentiated),
    },
    "vmap_and_jacrev": {"branch on a value": _wave(planted.BranchesOnValues)},
    "no_graph_without_gradients": {"records under no_grad": _wave(planted.AlwaysRecords)},
    "tensors_of_the_caller": {
        "requires_grad switched on": _wave(planted.WantsGradientsOfInputs),
        "inputs of forward overwritten": _wave(planted.WritesIntoInputs),
        "inputs of inverse overwritten": _wave(planted.WritesIntoOutputs),
    },
    "survives_serialisation": {
        "cannot be pickled": _wave(planted.CannotBePickled),
        "state is lost": lambda: ResidualTransform(planted.LosesState()),
    },
    "autocast": {
        "half precision": lambda: planted.HalfPrecision(planted.steep()),
    },
}
BUGS = [
    pytest.param(clause, factory, id=f"{clause}-{bug}")
    for clause, bugs in PLANTED.items()
    for bug, factory in bugs.items()
]


def _check(transform: nn.Module, clause: str) -> None:
    is_conditional = isinstance(getattr(transform, "net", None), planted.Conditional)
    context = rows(4, 2) if is_conditional else None
    inputs = rows(4, planted.FEATURES)
    draws = 2000 if clause == "logabsdet_is_exact_or_unbiased" else 200
    testing.check_transform(transform, inputs, context, clauses=(clause,), num_draws=draws)


@pytest.mark.parametrize(("clause", "factory"), BUGS)
def test_planted_bug_turns_its_clause_red(clause: str, factory: Factory) -> None:
    """The error names the clause."""
    with pytest.raises(AssertionError, match=rf"^{clause}: "):
        _check(factory(), clause)


@pytest.mark.parametrize("clause", testing.CLAUSES)
@pytest.mark.parametrize("net", [Wave, planted.steep, planted.Conditional])
def test_healthy_twin_is_green(net: Callable[[], nn.Module], clause: str) -> None:
    """Without the bug the same networks keep every clause, so that it is the bug which is seen."""
    _check(ResidualTransform(net()), clause)


def test_every_clause_has_a_planted_bug() -> None:
    """A clause that cannot fail is no clause."""
    assert set(PLANTED) == set(testing.CLAUSES)


def _zero(function: Callable[..., Any]) -> Callable[..., Any]:
    def without_logdet(*args: Any, **kwargs: Any) -> Any:
        outputs, logabsdet = function(*args, **kwargs)
        return outputs, 0 * logabsdet

    return without_logdet


@pytest.mark.peer
@pytest.mark.usefixtures("values_are_seen")
def test_normflows_tests_stay_green_with_log_det_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own residual tests compare the log-determinants of both directions: 0 = -0."""
    tests = pytest.importorskip("normflows.flows.residual_test")
    block = pytest.importorskip("normflows.flows.residual").iResBlock
    monkeypatch.setattr(block, "_logdetgrad", _zero(block._logdetgrad))
    suite = unittest.defaultTestLoader.loadTestsFromName("test_residual_mlp", tests.ResidualTest)
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun == 1
    assert result.wasSuccessful()
