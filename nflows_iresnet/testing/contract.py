"""All clauses in one dictionary, and the check that runs them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from nflows_iresnet.testing import clauses as of
from nflows_iresnet.testing.subject import Subject, generators_kept

Clause = Callable[[Subject], None]

CLAUSES: dict[str, Clause] = {
    clause.__name__: clause
    for clause in (
        of.shapes_and_dtype,
        of.round_trip,
        of.logabsdet_is_exact_or_unbiased,
        of.same_seed_negates,
        of.rows_are_independent,
        of.context_matters,
        of.forgotten_context,
        of.few_rows,
        of.weighted_gradient,
        of.gradients_with_a_graph,
        of.every_parameter_learns,
        of.frozen_parameters,
        of.inverse_gradients,
        of.vmap_and_jacrev,
        of.no_graph_without_gradients,
        of.graphs_are_freed,
        of.tensors_of_the_caller,
        of.survives_serialisation,
        of.autocast,
    )
}


def check_transform(
    transform: nn.Module,
    inputs: Tensor,
    context: Tensor | None = None,
    *,
    clauses: tuple[str, ...] | None = None,
    atol: float = 1e-6,
    num_draws: int = 200,
    bias: float = 0.0,
) -> None:
    """Check that a transform keeps the contract, in float64, on a copy, where its tensors are.

    Torch's generators, of the CPU and of the device, are afterwards as they were.

    Args:
        transform: a module with forward and inverse, (inputs, context) -> (outputs, logabsdet).
        inputs: rows to check at, shape (B, *), B at least 2; a handful of rows is enough.
        context: shape (B, C), or None.
        clauses: names from `CLAUSES`; all by default.
        atol: how far exact numbers may be off.
        num_draws: draws that a random log-determinant is averaged over.
        bias: nats by which its mean may be off, for estimators that are biased by design.

    Raises:
        AssertionError: naming the clause, and what broke by how much.
        ValueError: if a clause is unknown or there are fewer than two rows.

    Example:
        >>> from nflows.transforms import LULinear
        >>> check_transform(LULinear(3), torch.randn(4, 3), clauses=("round_trip",))
    """
    if inputs.shape[0] < 2:
        raise ValueError(f"at least 2 rows are needed to check a transform, got {inputs.shape[0]}")
    for name in CLAUSES if clauses is None else clauses:
        if name not in CLAUSES:
            raise ValueError(f"unknown clause {name!r}; known are {', '.join(CLAUSES)}")
        with generators_kept(inputs, *transform.parameters()):
            try:
                subject = _prepared(transform, inputs, context, atol, num_draws, bias)
                CLAUSES[name](subject)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
            except Exception as error:
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error


def _prepared(
    transform: nn.Module,
    inputs: Tensor,
    context: Tensor | None,
    atol: float,
    num_draws: int,
    bias: float,
) -> Subject:
    """Return copies in float64, after one forward for what starts from its first batch."""
    copy = deepcopy(transform).double()
    rows = inputs.detach().double().clone()
    conditions = None if context is None else context.detach().double().clone()
    torch.manual_seed(0)
    copy.forward(rows.clone(), None if conditions is None else conditions.clone())
    return Subject(copy, rows, conditions, atol, num_draws, bias, transform)
