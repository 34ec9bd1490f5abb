"""The residual block y = x + g(x) as a transform of nflows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar

import torch
from nflows.transforms import Transform
from torch import Tensor, nn

from nflows_iresnet.linearization import (
    ResidualFunction,
    SecondDerivativeError,
    bind,
    first_derivative_only,
    first_parameter,
    is_differentiated,
    is_forward_over_forward,
    is_traced,
)
from nflows_iresnet.logdet import Auto, LogDetEstimate, LogDetEstimator
from nflows_iresnet.precision import (
    context_like_weights,
    full_precision,
    like_weights,
    require_finite_in_training,
    training_precision,
    work_of,
)
from nflows_iresnet.renamed import warn_renamed
from nflows_iresnet.solvers import Anderson, Solver
from nflows_iresnet.validation import require_tensor, validated_strategy

_METHODS = ("forward", "inverse", "bind")
_EXAMPLES = {"estimator": "logdet.Exact()", "solver": "solvers.Anderson()"}


class ResidualTransform(Transform):
    r"""An invertible residual block y = x + g(x), Lip(g) < 1. Forward is data -> noise.

    * `forward`: y and an estimate of log\|det(I + dg/dx)\| as the estimator defines it.
    * `inverse`: x with \|x + g(x) - y\| below the solver's tolerance, verified, or
      `FixedPointNotConverged`. The error of x is at most that residual / (1 - L). It is
      differentiated by the implicit function theorem: with J at the solution,

          dx = (I + J)^{-1} (dy - d_theta g),

      so that a cotangent v is pulled back as lambda = (I + J)^{-T} v, which the same solver finds
      as the fixed point lambda = v - J^T lambda. Memory does not grow with the number of steps.
      `torch.func`'s transforms, forward mode, and derivatives of the gradient in the inputs are
      right too; derivatives of that in weights or context raise `SecondDerivativeError`.

    One call sees one g: the weights are normalised once, and used for all evaluations of the call.
    Inside `torch.autocast` the block computes in the precision of its weights.

    Cost: forward is one evaluation of g plus the estimator's; inverse is the solver's number of
    evaluations, plus one forward.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen. Invertible residual networks, 2019.
        Chen, Behrmann, Duvenaud, Jacobsen. Residual flows for invertible generative modeling, 2019.
        Bai, Kolter, Koltun. Deep equilibrium models, 2019 (implicit differentiation).

    Args:
        net: g, a module of (inputs) or (inputs, context) that maps (B, *) to (B, *) row by row,
            with Lip(g) < 1 in inputs. Networks of `nflows_iresnet.nn` guarantee that.
        estimator: the strategy for the log-determinant; `logdet.Auto()` by default.
        solver: the strategy for the inverse; `solvers.Anderson()` by default.

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
        self._uses: list[_Use] = []
        self.net = validated_strategy("net", net, nn.Module, "nn.LipschitzMLP(2, [64, 64])")
        self.estimator = validated_strategy(
            "estimator", estimator or Auto(), LogDetEstimator, _EXAMPLES["estimator"]
        )
        self.solver = validated_strategy(
            "solver",
            solver or Anderson(),
            Solver,  # type: ignore[type-abstract]
            _EXAMPLES["solver"],
        )

    @property
    def estimator(self) -> LogDetEstimator:
        """The strategy for the log-determinant: that of `using` where in force, else its own."""
        for use in _uses_of(self):
            if use.estimator is not None:
                return use.estimator
        return self._estimator

    @estimator.setter
    def estimator(self, estimator: LogDetEstimator) -> None:
        self._estimator = estimator

    @property
    def solver(self) -> Solver:
        """The strategy for the inverse: that of `using` where in force, else its own."""
        for use in _uses_of(self):
            if use.solver is not None:
                return use.solver
        return self._solver

    @solver.setter
    def solver(self, solver: Solver) -> None:
        self._solver = solver

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `using` says at the time: copies have the block's own strategies."""
        return {name: value for name, value in vars(self).items() if name != "_uses"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state, or an older one that has the strategies under their public names."""
        renamed = {"estimator": "_estimator", "solver": "_solver"}
        known = {renamed.get(name, name): value for name, value in state.items()}
        super().__setstate__({**known, "_uses": []})

    def _replicate_for_data_parallel(self) -> ResidualTransform:
        """Return a replica for another thread, with the strategies in force in this one."""
        replica: ResidualTransform = super()._replicate_for_data_parallel()
        replica.estimator, replica.solver = self.estimator, self.solver
        return replica

    _keeps_methods = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Remember whether a subclass replaces a method that `CompositeTransform` would pass by."""
        super().__init_subclass__(**kwargs)
        cls._keeps_methods = all(
            getattr(cls, name) is getattr(ResidualTransform, name) for name in _METHODS
        )

    @property
    def takes_function(self) -> bool:
        """Whether `forward` and `inverse` may be given a g that was bound with others'.

        Not where they, or `bind`, are replaced, and not with hooks before the call, which may
        change the weights: such a block is bound by itself.
        """
        is_patched = any(name in vars(self) for name in _METHODS)
        return self._keeps_methods and not is_patched and not self._forward_pre_hooks

    def bind(self, context: Tensor | None = None) -> ResidualFunction:
        """Return g for the present weights and one context, see `linearization.bind`."""
        parameter = first_parameter(self.net)
        like = torch.empty(0) if parameter is None else parameter
        with training_precision(self, like.device, work_of(self.net, like)):
            return bind(self.net, context_like_weights(context, self.net))

    def forward(
        self,
        inputs: Tensor,
        context: Tensor | None = None,
        *,
        function: ResidualFunction | None = None,
        estimator: LogDetEstimator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (x + g(x), log|det|), shapes (B, *) and (B,).

        Args:
            inputs: x, shape (B, *).
            context: shape (B, C), or None.
            function: g where it is bound already, as `bind(context)` returns it.
            estimator: in place of the block's own.

        Raises:
            ValueError: if inputs or context have another dtype than the weights, or shapes that the
                network does not take; in training on a CPU, if they are not finite.
        """
        inputs = self._checked(inputs, context)
        with training_precision(self, inputs.device, work_of(function or self.net, inputs)):
            if function is None:
                require_finite_in_training(self, inputs, context)
                function = self.bind(context)
            return self._map(function, inputs, estimator or self.estimator)

    def forward_bound(self, function: ResidualFunction, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Old name of `forward(inputs, function=function)`."""
        warn_renamed("forward_bound(function, x)", "forward(x, function=function)")
        return self.forward(inputs, function=function)

    def inverse_bound(self, function: ResidualFunction, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Old name of `inverse(inputs, function=function)`."""
        warn_renamed("inverse_bound(function, x)", "inverse(x, function=function)")
        return self.inverse(inputs, function=function)

    def _checked(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        require_tensor("inputs", inputs)
        if inputs.dim() < 2:
            raise ValueError(
                f"expected inputs of shape (batch, ...), got {tuple(inputs.shape)}: give a tensor "
                "with one row for each sample, inputs[None] for a single one"
            )
        if context is not None:
            require_tensor("context", context)
        require_row_for_each(inputs, context)
        return like_weights(inputs, self.net)

    def inverse(
        self,
        inputs: Tensor,
        context: Tensor | None = None,
        *,
        function: ResidualFunction | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (x, -log|det|) with x + g(x) = inputs, shapes (B, *) and (B,).

        Args:
            inputs: y, shape (B, *).
            context: shape (B, C), or None.
            function: g where it is bound already, as `bind(context)` returns it.

        Raises:
            FixedPointNotConverged: if the residual does not get below the tolerance.
        """
        inputs = self._checked(inputs, context)
        with full_precision(inputs.device, work_of(function or self.net, inputs)):
            function = self.bind(context) if function is None else function
            outputs, point = self._solve(function, inputs)
            if not _NEEDS_LOGABSDET.get():
                return outputs, outputs.new_full((outputs.shape[0],), torch.nan)
            return outputs, -self._estimate(function, point, self.estimator).logabsdet

    def _map(
        self, function: ResidualFunction, inputs: Tensor, estimator: LogDetEstimator
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs and the log-determinant for a g that is bound."""
        estimate = self._estimate(function, inputs, estimator)
        return inputs + estimate.outputs, estimate.logabsdet

    def _solve(self, function: ResidualFunction, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inverse, and the point at which `_estimate` finds its log-determinant."""
        outputs = solve_residual(function, inputs, self.solver)
        return outputs, outputs

    def _estimate(
        self, function: ResidualFunction, point: Tensor, estimator: LogDetEstimator
    ) -> LogDetEstimate:
        """Return g at a point, and the log-determinant of forward that belongs to it."""
        return estimator.estimate(function, point)

    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of Lip(g) for the present weights.

        Raises:
            ValueError: if the network has neither a method `lipschitz_bound` nor a number
                `lipschitz`.
        """
        certify = getattr(self.net, "lipschitz_bound", None)
        if callable(certify):
            return float(certify())
        stated = getattr(self.net, "lipschitz", None)
        if isinstance(stated, float):
            return stated
        raise ValueError(
            f"{type(self.net).__name__} has no certified Lipschitz bound; use a network of "
            "nflows_iresnet.nn, or give yours an attribute `lipschitz`, or a method "
            "lipschitz_bound() -> float"
        )

    def extra_repr(self) -> str:
        """Show the strategies in `print(flow)`."""
        return f"estimator={self.estimator}, solver={self.solver}"


def require_row_for_each(inputs: Tensor, context: Tensor | None) -> None:
    """Raise unless a context has one row for each of the inputs, or one for all."""
    if context is not None and context.shape[:1] not in ((1,), inputs.shape[:1]):
        raise ValueError(
            f"the context must have one row for each of the {inputs.shape[0]} rows of the "
            f"inputs, or one for all, got shape {tuple(context.shape)}"
        )


@dataclass(frozen=True)
class _FixedPointMap:
    """x -> y - g(x), whose fixed point is the inverse of y."""

    function: ResidualFunction
    targets: Tensor

    def __call__(self, point: Tensor) -> Tensor:
        return self.targets - self.function(point)

    def select(self, rows: Tensor) -> _FixedPointMap:
        return _FixedPointMap(self.function.select(rows), self.targets[rows])


def solve_residual(function: ResidualFunction, inputs: Tensor, solver: Solver) -> Tensor:
    """Return x with x + g(x) = inputs, differentiable in all that g and the inputs depend on."""
    targets = inputs.detach()
    found = solver(_FixedPointMap(function, targets), targets, function.lipschitz).value
    solution = found.detach().clone()  # it may be the targets themselves, which are the caller's
    if not is_differentiated():
        return solution
    attached = inputs - first_derivative_only(function(solution), _NO_HIGHER_DERIVATIVE)
    return _implicit(attached, solution, None, function, solver, is_transposed=False)


_NO_HIGHER_DERIVATIVE = (
    "through an inverse, the gradient in its inputs may be differentiated again: not that in its "
    "weights or context, nor a second derivative. Differentiate `forward`, or use differences"
)


def solve_linear(
    function: ResidualFunction,
    at: Tensor,
    target: Tensor,
    solver: Solver,
    *,
    is_transposed: bool,
) -> Tensor:
    r"""Return v with (I + J) v = target, or (I + J)^T v = target, J the Jacobian of g at a point.

    To the solver's verified tolerance, and differentiable. The equation is homogeneous, so each row
    is solved for its own scale: gradients of 1e-25 are found to the same relative accuracy as
    those of 1. A looser `atol` than the default is in units of x, and does not count here. Rows of
    the target that are not finite, as a loss that overflows returns them, are NaN.

    Args:
        function: g.
        at: the points x, shape (B, *).
        target: shape (B, *).
        solver: of the fixed point v = target - J v.
        is_transposed: whether J is transposed.
    """
    at_point = function.linearize(at)
    product = at_point.vjp if is_transposed else at_point.jvp
    with torch.no_grad():
        largest = target.abs().flatten(start_dim=1).amax(dim=1)
        largest = largest.reshape(-1, *[1] * (target.dim() - 1))
        is_finite = largest.isfinite()
        scale = torch.where((largest > 0) & is_finite, largest, 1.0)
        scaled = torch.where(is_finite, target / scale, 0.0)
        relative = solver.without_units(scaled.dtype)
        found = relative(lambda point: scaled - product(point), scaled, function.lipschitz)
        solution = torch.where(is_finite, found.value * scale, torch.nan)
        solution = solution.detach()  # forward mode differentiates here, too
    if not is_differentiated():
        return solution
    attached = target - first_derivative_only(product(solution), _NO_HIGHER_DERIVATIVE)
    return _implicit(attached, solution, at, function, solver, is_transposed=is_transposed)


def _implicit(
    attached: Tensor,
    solution: Tensor,
    at: Tensor | None,
    function: ResidualFunction,
    solver: Solver,
    *,
    is_transposed: bool,
) -> Tensor:
    """Return a solution of x + f(x) = y with the derivative that the equation gives it.

    Args:
        attached: y - f(x*), with the solution x* held constant: equal to x*, and all that the
            solution depends on.
        solution: x*.
        at: where the Jacobian J of g is df/dx, or its transpose; None for x itself.
        function: g.
        solver: solves for the derivatives.
        is_transposed: whether df/dx is the transpose of J.
    """
    if not attached.requires_grad and not is_traced():
        return solution
    if is_forward_over_forward():
        raise SecondDerivativeError(
            "forward mode over forward mode does not go through an inverse: use jacfwd(jacrev(f))"
        )
    tensors, rebuild = function.split()
    outputs: Tensor = _Implicit.apply(
        attached, solution, at, rebuild, solver, is_transposed, *tensors
    )
    return outputs


class _Implicit(torch.autograd.Function):
    """The identity on a solution, dx = (I + df/dx)^{-1} d attached."""

    generate_vmap_rule = True

    @staticmethod
    def forward(attached: Tensor, solution: Tensor, *_: Any) -> Tensor:
        return solution.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, at, ctx.rebuild, ctx.solver, ctx.is_transposed, *tensors = inputs
        saved = [output if at is None else at, *tensors]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.num_inputs = len(inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        solved = _Implicit.solve(ctx, cotangent, is_transposed=not ctx.is_transposed)
        return solved, *[None] * (ctx.num_inputs - 1)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _Implicit.solve(ctx, tangent, is_transposed=ctx.is_transposed)

    @staticmethod
    def solve(ctx: Any, target: Tensor, *, is_transposed: bool) -> Tensor:
        if torch._C._functorch.is_legacy_batchedtensor(target):
            raise ValueError(
                "gradients in batches (is_grads_batched=True, vectorize=True) do not go through a "
                "solver: take them one by one, or by torch.func.jacrev"
            )
        at, *tensors = ctx.saved_tensors
        function = ctx.rebuild(tensors)
        with full_precision(target.device, work_of(function, target)):
            return solve_linear(function, at, target, ctx.solver, is_transposed=is_transposed)


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


@dataclass(eq=False)
class _Use:
    """What one `using` says, until its block ends."""

    blocks: frozenset[nn.Module]
    estimator: LogDetEstimator | None
    solver: Solver | None
    has_ended: bool = False


_USES: ContextVar[tuple[_Use, ...]] = ContextVar("uses", default=())
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _present_uses() -> tuple[_Use, ...]:
    return tuple(use for use in _USES.get() if not use.has_ended)


def _uses_of(block: ResidualTransform) -> Iterable[_Use]:
    """Return what is in force for a block, the innermost first.

    A compiler cannot look into a context variable, and would not notice another value later. It
    does notice a list: where nobody uses a block, in any thread, it need not ask. Else it leaves
    the question to Python, at every call.
    """
    if torch.compiler.is_compiling() and not block._uses:
        return ()
    return [use for use in reversed(_present_uses()) if block in use.blocks]


def as_used(step: _Function) -> _Function:
    """Let a function run with the strategies that are in force now, whatever is where it runs.

    A backward pass runs it when the blocks of `using` have ended or begun, or in another thread.
    """
    kept = tuple(replace(use) for use in _present_uses())

    @wraps(step)
    def governed(*args: Any, **kwargs: Any) -> Any:
        token = _USES.set(kept)
        try:
            return step(*args, **kwargs)
        finally:
            _USES.reset(token)

    return governed  # type: ignore[return-value]


@contextmanager
def using(
    module: nn.Module,
    *,
    estimator: LogDetEstimator | None = None,
    solver: Solver | None = None,
) -> Iterator[None]:
    """Use other strategies in all residual blocks of a module for the duration of a block.

    In this thread and context alone (a `contextvars.ContextVar`): other threads that call the same
    module meanwhile go on with theirs, and so do other asyncio tasks. Tasks that are started
    inside, and functions run there by `asyncio.to_thread` or `contextvars.copy_context().run`, have
    it until the block ends; threads that are started inside do not. A generator that yields inside
    leaves it in force for its caller until it goes on. The innermost block counts, for each of
    the two strategies by itself. The module is not changed: copies and pickles of it have its own
    strategies, and what is assigned to it meanwhile is in force afterwards.

    Only the forward pass has to be inside, except where it is run again in the backward pass: put
    `using` into a function that you give to `torch.utils.checkpoint`. `recompute=True` sees to it.

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
    for name, value, kind in (
        ("estimator", estimator, LogDetEstimator),
        ("solver", solver, Solver),
    ):
        if value is not None:
            validated_strategy(name, value, kind, _EXAMPLES[name])
    blocks = [block for block in module.modules() if isinstance(block, ResidualTransform)]
    if not blocks:
        raise ValueError(f"{type(module).__name__} contains no ResidualTransform to be changed")
    use = _Use(frozenset(blocks), estimator, solver)
    try:
        for block in blocks:
            block._uses.append(use)
        _USES.set((*_present_uses(), use))
        yield
    finally:
        use.has_ended = True
        _USES.set(_present_uses())
        for block in blocks:
            if use in block._uses:
                block._uses.remove(use)
