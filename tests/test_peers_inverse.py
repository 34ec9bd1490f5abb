"""Faults of normflows' inverse and of its Lipschitz constants, each beside ours."""

from __future__ import annotations

import math

import normflows
import pytest
import torch
from torch import Tensor, nn

from nflows_iresnet import solvers
from nflows_iresnet.nn import LipschitzMLP, PowerIteration, spectral_norm_bound
from nflows_iresnet.testing import check_lipschitz
from nflows_iresnet.transforms import ResidualTransform
from tests.peers import (
    Block,
    Normflows,
    normflows_mlp,
    rows,
    scaled_identity,
    seed,
)

STEEP = 0.97
ANDERSON = pytest.param(solvers.Anderson(), id="anderson")
PICARD = pytest.param(solvers.FixedPointIteration(), id="picard")


def round_trip_error(block: Block, inputs: Tensor) -> float:
    """Largest error of inverse(forward(x)) in the 2-norm of a row."""
    with torch.no_grad():
        found = block.inverse(block(inputs)[0])[0].detach()
    return (found - inputs).norm(dim=1).max().item()


class TestInverseTolerance:
    """normflows' inverse stops when the square of a step is small: "1e-5" means 3e-3."""

    @pytest.mark.parametrize("solver", [ANDERSON, PICARD])
    def test_ours(self, solver: solvers.Solver) -> None:
        """Contraction by 0.97 per step: as exact as float32 allows."""
        assert (
            round_trip_error(ResidualTransform(scaled_identity(-STEEP), solver=solver), rows(32))
            < 1e-3
        )

    def test_ours_bounds_its_error(self) -> None:
        """The error is at most residual / (1 - L), for a loose tolerance too."""
        inputs = rows(32).double()
        outputs = inputs - STEEP * inputs
        solver = solvers.FixedPointIteration(atol=1e-3, rtol=0.0)
        solution = solver(lambda point: outputs + STEEP * point, outputs)
        errors = (solution.value - inputs).norm(dim=1)
        assert bool((solution.residual <= 1e-3).all())
        assert bool((errors <= solution.error_bound(STEEP)).all())
        assert float(errors.max()) > 1e-2, "the bound is not idle"

    @pytest.mark.peer
    def test_normflows_is_off_by_a_tenth(self) -> None:
        """Four orders of magnitude above its tolerance."""
        assert round_trip_error(Normflows(scaled_identity(-STEEP)), rows(32)) > 0.05


class TestInverseFailure:
    """normflows' inverse returns whatever it has after NaN, divergence or 1000 iterations."""

    @staticmethod
    def worst_residual(block: Block, outputs: Tensor) -> float:
        """Largest |x + g(x) - y| of the x that is returned; NaN or infinite where it is."""
        with torch.no_grad():
            found = block.inverse(outputs)[0]
            return float((block(found)[0] - outputs).abs().max())

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_ours_refuses_values_that_are_not_finite(self, value: float) -> None:
        """The exception counts the rows, and keeps what was found for those who look."""
        outputs = rows(3)
        outputs[1, 0] = value
        block = ResidualTransform(scaled_identity(0.5))
        with pytest.raises(solvers.FixedPointNotConverged, match="1 of 3 rows") as caught:
            block.inverse(outputs)
        assert caught.value.solution.residual.isfinite().tolist() == [True, False, True]

    @pytest.mark.parametrize("solver", [ANDERSON, PICARD])
    def test_ours_refuses_to_diverge(self, solver: solvers.Solver) -> None:
        """x - x = 0 for all x: there is no inverse, and the exception says why."""
        block = ResidualTransform(scaled_identity(-1.0), solver=solver)
        with pytest.raises(solvers.FixedPointNotConverged, match="contraction"):
            block.inverse(rows(8))

    def test_ours_refuses_to_stop_early(self) -> None:
        """Too few steps: the exception names the residual and the tolerance."""
        solver = solvers.FixedPointIteration(max_steps=12)
        block = ResidualTransform(scaled_identity(-STEEP), solver=solver)
        with pytest.raises(solvers.FixedPointNotConverged, match=r"after 12 steps.* > "):
            block.inverse(rows(4))

    @pytest.mark.peer
    def test_normflows_returns_nan(self) -> None:
        """NaN goes in, NaN comes out, and nothing is raised (after 1000 iterations)."""
        outputs = rows(3)
        outputs[1, 0] = math.nan
        assert math.isnan(self.worst_residual(Normflows(scaled_identity(0.5)), outputs))

    @pytest.mark.peer
    def test_normflows_returns_a_point_that_is_no_solution(self) -> None:
        """For g(x) = -x, which has no inverse, the last of 1000 iterates is returned."""
        assert self.worst_residual(Normflows(scaled_identity(-1.0)), rows(8)) > 0.1


class TestLipschitzInTraining:
    """Lip(g) < 1 holds in normflows only if the user calls `update_lipschitz` after each step."""

    @staticmethod
    def fit(block: Block) -> None:
        """Maximum likelihood of two narrow modes: 200 steps of Adam, and no other call."""
        seed(0)
        modes = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(32, 1)
        points = modes + 0.1 * rows(64, 2)
        optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
        for _ in range(200):
            outputs, logabsdet = block(points)
            optimizer.zero_grad()
            (outputs.square().sum(dim=1) / 2 - logabsdet).mean().backward()
            optimizer.step()

    def test_ours(self) -> None:
        """The certificate holds, a search cannot refute it, and the round trip is exact."""
        seed(0)
        block = ResidualTransform(LipschitzMLP(2, [32], coeff=STEEP))
        self.fit(block)
        assert 0.9 < block.lipschitz_bound() <= STEEP, "training uses the budget, and no more"
        assert round_trip_error(block, rows(64, 2)) < 1e-4
        check_lipschitz(block.net.double(), rows(64, 2), block.lipschitz_bound())

    @pytest.mark.peer
    def test_normflows_grows_beyond_one(self) -> None:
        """A stretch of g above 1 is found, and the inverse is lost."""
        seed(0)
        block = Normflows(normflows_mlp(2, 32, 2), brute_force=True)
        self.fit(block)
        assert math.prod(used_norms(block.net)) > 2
        assert round_trip_error(block, rows(64, 2)) > 0.1
        with pytest.raises(AssertionError, match="found a stretch"):
            check_lipschitz(block.net.double(), rows(64, 2), bound=1.0)


def used_norms(net: nn.Module) -> list[float]:
    """Spectral norms of the weights that a network of normflows computes with."""
    layer_type = normflows.nets.lipschitz.InducedNormLinear
    layers = [module for module in net.modules() if isinstance(module, layer_type)]
    return [spectral_norm_bound(layer.compute_weight(update=False)) for layer in layers]


class TestPowerIteration:
    """Power iteration is a lower bound of a norm: a weight divided by it is not certified."""

    @staticmethod
    def overwrite(net: nn.Module) -> None:
        """As an optimiser might, and with singular values that are close to each other."""
        for parameter in net.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter)

    def test_ours_says_what_it_does_not_guarantee(self) -> None:
        """The default is certified; with power iteration the bound is above and is reported."""
        seed(0)
        certified, estimated = LipschitzMLP(64, []), LipschitzMLP(64, [], norm=PowerIteration())
        self.overwrite(certified)
        self.overwrite(estimated)
        estimated(rows(2, 64))
        assert certified.lipschitz_bound() <= certified.coeff
        assert estimated.lipschitz_bound() > estimated.coeff
        assert certified.bind().lipschitz == certified.coeff
        assert estimated.bind().lipschitz is None

    @pytest.mark.peer
    def test_normflows_exceeds_its_coefficient_after_the_update(self) -> None:
        """The call that the user has to remember leaves a norm above the one asked for."""
        seed(0)
        net = normflows_mlp(64, 64)
        self.overwrite(net)
        normflows.utils.update_lipschitz(net, 5)
        assert used_norms(net)[0] > 0.97 * 1.01
