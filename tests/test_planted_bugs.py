"""The contract must be able to fail: each bug is planted once, and its clause turns red."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nflows_iresnet import logdet, testing
from nflows_iresnet.linearization import ResidualFunction
from nflows_iresnet.testing.subject import require_close
from nflows_iresnet.transforms import ResidualTransform
from tests.peers import Wave, rows
from tests.planted import logdet as planted_logdet
from tests.planted import transforms as planted

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
        "infinite": lambda: planted_logdet.changed(lambda values: values + torch.inf),
    },
    "round_trip": {
        "stop after 12 steps": lambda: ResidualTransform(
            planted.steep(), solver=planted.TwelveSteps()
        ),
        "g moves in training": lambda: ResidualTransform(planted.MovesWhileTraining()),
        "another inverse in training": _wave(planted.WrongInOneMode),
        "another inverse in evaluation": _wave(planted.WrongInEvaluation),
        "another forward in each call": _wave(planted.CountsItsCalls),
    },
    "logabsdet_is_exact_or_unbiased": {
        "log-det = 0": lambda: planted_logdet.changed(torch.zeros_like),
        "a bias of one deviation": lambda: ResidualTransform(
            Wave(), estimator=planted_logdet.OffByOneDeviation()
        ),
        "wrong sign": lambda: planted_logdet.changed(torch.neg),
        "wrong sign, only without gradients": lambda: planted_logdet.changed(
            lambda values: values if torch.is_grad_enabled() else -values
        ),
        "wrong sign, only in evaluation": _wave(planted.NegativeInEvaluation),
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
    "few_rows": {
        "two rows needed": _wave(planted.NeedsTwoRows),
        "a row needed": _wave(planted.NeedsARow),
    },
    "weighted_gradient": {
        "gradient scaled by the first sample": lambda: planted_logdet.changed(
            planted_logdet.gradient_of_the_first_sample
        ),
        "log-det without gradient": lambda: planted_logdet.changed(Tensor.detach),
        "gradient of the trace": lambda: ResidualTransform(
            Wave(), estimator=planted_logdet.Surrogate(as_value=False)
        ),
    },
    "gradients_with_a_graph": {
        "what is made from an argument is an argument": _wave(planted.CountsTwiceWithAGraph),
    },
    "every_parameter_learns": {
        "unused parameter": lambda: ResidualTransform(planted.UnusedParameter()),
        "infinite gradient": lambda: ResidualTransform(planted.InfiniteGradient()),
    },
    "frozen_parameters": {
        "parameters must train": _wave(planted.DifferentiatesItsParameters),
        "another gradient": _wave(planted.OtherGradientWhereFrozen),
    },
    "inverse_gradients": {
        "inverse detached": _wave(planted.InverseWithoutGradient),
        "log-det of the inverse detached": _wave(planted.InverseLogDetWithoutGradient),
        "one step differentiated": _wave(planted.LastStepDifferentiated),
    },
    "vmap_and_jacrev": {"branch on a value": _wave(planted.BranchesOnValues)},
    "no_graph_without_gradients": {
        "records under no_grad": _wave(planted.AlwaysRecords),
        "another number in inference mode": _wave(planted.OtherInInferenceMode),
    },
    "graphs_are_freed": {
        "a view of an output is saved": _wave(planted.SavesViewOfOutput),
        "the last pass is kept": _wave(planted.KeepsItsLastPass),
    },
    "tensors_of_the_caller": {
        "requires_grad switched on": _wave(planted.WantsGradientsOfInputs),
        "inputs of forward overwritten": _wave(planted.WritesIntoInputs),
        "inputs of inverse overwritten": _wave(planted.WritesIntoOutputs),
    },
    "survives_serialisation": {
        "cannot be pickled": _wave(planted.CannotBePickled),
        "state is lost": lambda: ResidualTransform(planted.LosesState()),
        "the start is not kept": planted.KeepsItsStartToItself,
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


def test_the_check_leaves_transform_and_generators_as_they_were() -> None:
    """It works on a copy in float64."""
    transform = ResidualTransform(Wave()).eval()
    weight, state = transform.net.amplitude.detach().clone(), torch.get_rng_state()
    testing.check_transform(transform, rows(4, planted.FEATURES), clauses=("round_trip",))
    assert torch.equal(torch.get_rng_state(), state)
    assert not transform.training
    assert transform.net.amplitude.dtype == torch.float32
    assert torch.equal(transform.net.amplitude, weight)


def test_values_that_would_broadcast_are_not_close() -> None:
    with pytest.raises(AssertionError, match="shape"):
        require_close(torch.zeros(3, 1), torch.zeros(3), 1e-6, "a column")


def test_a_stretch_that_is_far_from_the_start_and_little_above_the_bound_is_found() -> None:
    """0.9 sin(x) has the slope 0.33 where the search starts, and 0.9 where it ends."""
    start = torch.full((2, 1), 1.2)
    found = testing.check_lipschitz(lambda x: 0.9 * x.sin(), start, bound=0.9)
    assert found > 0.85
    with pytest.raises(AssertionError, match="stretch"):
        testing.check_lipschitz(lambda x: 0.5 * x, start, bound=0.4999)


class SelectsNothing(ResidualFunction):
    """Each row has a shift of its own, whatever rows it is asked for."""

    def __init__(self, shifts: torch.Tensor) -> None:
        self._shifts = shifts

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return 0.5 * inputs + self._shifts[: inputs.shape[0]]


def test_a_function_that_selects_no_rows_is_found() -> None:
    with pytest.raises(AssertionError, match="selected rows"):
        testing.check_linearization(SelectsNothing(rows(4, 2).double()), rows(4, 2))
