"""The residual block y = x + g(x) as a transform of nflows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from nflows.transforms import Transform
from torch import Tensor, nn

from nflows_iresnet.linearization import ResidualFunction, bind
from nflows_iresnet.logdet import Adaptive, LogDetEstimator
from nflows_iresnet.precision import context_like_weights, full_precision, like_weights
from nflows_iresnet.solvers import Anderson, Solver


class ResidualTransform(Transform):
    r"""An invertible residual block y = x + g(x), Lip(g) < 1. Forward is data -> noise.

    * `forward`: y and an estimate of log\|det(I + dg/dx)\| as the estimator defines it.
    * `inverse`: x with \|x + g(x) - y\| below the solver's tolerance, verified, or
      `FixedPointNotConverged`. The error of x is at most that residual / (1 - L). It is
      differentiated by the implicit function theorem: with J at the solution,

          dx = (I + J)^{-1} (dy - d_theta g),

      so that a cotangent v is pulled back as lambda = (I + J)^{-T} v, which the same solver finds
      as the fixed point lambda = v - J^T lambda. Memory does not grow with the number of steps.

    One call sees one g: the weights are normalised once, and used for all evaluations of the call.
    Inside `torch.autocast` the block computes in the precision of its weights.

    Cost: forward is one evaluation of g plus the estimator's; inverse is the solver's number of
    evaluations, plus one forward.

    Args:
        net: g, a module of (inputs) or (inputs, context) that maps (B, *) to (B, *) row by row,
            with Lip(g) < 1 in inputs. Networks of `nflows_iresnet.nn` guarantee that.
        estimator: the strategy for the log-determinant; `logdet.Adaptive()` by default.
        solver: the strategy for the inverse; `solvers.Anderson()` by default.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen. Invertible residual networks, 2019.
        Chen, Behrmann, Duvenaud, Jacobsen. Residual flows for invertible generative modeling, 2019.
        Bai, Kolter, Koltun. Deep equilibrium models, 2019 (implicit differentiation).

    Example:
        >>> import torch
        >>> from nflows_iresnet.nn import LipschitzMLP
        >>> block = ResidualTransform(LipschitzMLP(2, [32, 32]))
        >>> inputs = torch.randn(5, 2)
        >>> outputs, logabsdet = block(inputs)
        >>> torch.allclose(block.inverse(outputs)[0], inputs, atol=1e-4)
        True
        >>> block.lipschitz_bound() < 1
        True
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        estimator: LogDetEstimator | None = None,
        solver: Solver | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.estimator = Adaptive() if estimator is None else estimator
        self.solver = Anderson() if solver is None else solver

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x + g(x), log|det|), shapes (B, *) and (B,)."""
        return self.forward_bound(self.bind(context), inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, -log|det|) with x + g(x) = inputs, shapes (B, *) and (B,).

        Raises:
            FixedPointNotConverged: if the residual does not get below the tolerance.
        """
        return self.inverse_bound(self.bind(context), inputs)

    def bind(self, context: Tensor | None = None) -> ResidualFunction:
        """Return g for the present weights and one context, see `linearization.bind`."""
        with full_precision(next(self.net.parameters(), torch.empty(0)).device):
            return bind(self.net, context_like_weights(context, self.net))

    def forward_bound(
        self,
        function: ResidualFunction,
        inputs: Tensor,
        estimator: LogDetEstimator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, for a g that is bound already.

        Args:
            function: g, as `bind` returns it.
            inputs: x, shape (B, *).
            estimator: in place of the block's own.
        """
        with full_precision(inputs.device):
            inputs = like_weights(inputs, self.net)
            residual, logabsdet = (estimator or self.estimator)(function, inputs)
            return inputs + residual, logabsdet

    def inverse_bound(self, function: ResidualFunction, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `inverse` does, for a g that is bound already."""
        with full_precision(inputs.device):
            inputs = like_weights(inputs, self.net)
            outputs = _ImplicitInverse.solve(function, inputs, self.solver)
            if not _NEEDS_LOGABSDET.get():
                return outputs, outputs.new_full((len(outputs),), torch.nan)
            _, logabsdet = self.estimator(function, outputs)
            return outputs, -logabsdet

    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of Lip(g) for the present weights.

        Raises:
            ValueError: if the network has no method `lipschitz_bound`.
        """
        certify = getattr(self.net, "lipschitz_bound", None)
        if not callable(certify):
            raise ValueError(
                f"{type(self.net).__name__} has no certified Lipschitz bound; use a network of "
                "nflows_iresnet.nn, or give yours a method lipschitz_bound() -> float"
            )
        return float(certify())

    def extra_repr(self) -> str:
        """Show the strategies in `print(flow)`."""
        return f"estimator={self.estimator}, solver={self.solver}"


@dataclass(frozen=True)
class _FixedPointMap:
    """x -> y - g(x), whose fixed point is the inverse of y."""

    function: ResidualFunction
    targets: Tensor

    def __call__(self, point: Tensor) -> Tensor:
        return self.targets - self.function(point)

    def select(self, rows: Tensor) -> _FixedPointMap:
        return _FixedPointMap(self.function.select(rows), self.targets[rows])


class _ImplicitInverse(torch.autograd.Function):
    """The identity on a solution, whose backward solves the adjoint equation."""

    @staticmethod
    def solve(function: ResidualFunction, inputs: Tensor, solver: Solver) -> Tensor:
        targets = inputs.detach()
        solution = solver(_FixedPointMap(function, targets), targets, function.lipschitz).value
        if not torch.is_grad_enabled():
            return solution
        attached = inputs - function(solution)
        if not attached.requires_grad:
            return solution
        outputs: Tensor = _ImplicitInverse.apply(attached, solution, function, solver)
        return outputs

    @staticmethod
    def forward(
        ctx: Any,
        attached: Tensor,
        solution: Tensor,
        function: ResidualFunction,
        solver: Solver,
    ) -> Tensor:
        ctx.save_for_backward(solution)
        ctx.function, ctx.solver = function, solver
        return solution.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        (solution,) = ctx.saved_tensors
        with full_precision(cotangent.device):
            adjoint = solve_adjoint(ctx.function, solution, cotangent, ctx.solver)
        return adjoint, None, None, None


def solve_adjoint(
    function: ResidualFunction, solution: Tensor, cotangent: Tensor, solver: Solver
) -> Tensor:
    """Return lambda with (I + J)^T lambda = cotangent, to the solver's verified tolerance.

    The equation is homogeneous, so each row is solved for its own scale: gradients of 1e-9 are
    found to the same relative accuracy as those of 1.
    """
    flat = torch.linalg.vector_norm(cotangent.flatten(start_dim=1), dim=1)
    scale = torch.where(flat > 0, flat, torch.ones_like(flat))
    scale = scale.reshape(-1, *[1] * (cotangent.dim() - 1))
    target, at_solution = cotangent / scale, function.linearize(solution)
    adjoint = solver(
        lambda point: target - at_solution.vjp(point), target, function.lipschitz
    ).value
    return adjoint * scale


_NEEDS_LOGABSDET: ContextVar[bool] = ContextVar("needs_logabsdet", default=True)


@contextmanager
def inverse_values_only() -> Iterator[None]:
    """Let the inverses of residual blocks return NaN for the log-determinant that nobody reads.

    It concerns this thread alone. Samples are the same; estimators are not asked, and draw nothing.
    """
    token = _NEEDS_LOGABSDET.set(False)
    try:
        yield
    finally:
        _NEEDS_LOGABSDET.reset(token)


@contextmanager
def using(
    module: nn.Module,
    *,
    estimator: LogDetEstimator | None = None,
    solver: Solver | None = None,
) -> Iterator[None]:
    """Use other strategies in all residual blocks of a module for the duration of a block.

    Args:
        module: a flow, a transform, or any module that contains residual blocks.
        estimator: replaces the estimators, unless None.
        solver: replaces the solvers, unless None.

    Raises:
        ValueError: if the module contains no residual block.

    Example:
        >>> import torch
        >>> from nflows_iresnet import flows, logdet
        >>> flow = flows.ResidualFlow(2, 16, num_layers=2)
        >>> with using(flow, estimator=logdet.Exact()):
        ...     log_prob = flow.log_prob(torch.randn(3, 2))
    """
    blocks = [block for block in module.modules() if isinstance(block, ResidualTransform)]
    if not blocks:
        raise ValueError(f"{type(module).__name__} contains no ResidualTransform to be changed")
    before = [(block.estimator, block.solver) for block in blocks]
    try:
        for block in blocks:
            block.estimator = estimator or block.estimator
            block.solver = solver or block.solver
        yield
    finally:
        for block, (old_estimator, old_solver) in zip(blocks, before, strict=True):
            block.estimator, block.solver = old_estimator, old_solver
