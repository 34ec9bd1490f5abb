"""Checks of a network of your own: its Lipschitz bound, and the products that it claims."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from nflows_iresnet.linearization import (
    AutogradLinearization,
    Linearization,
    ResidualFunction,
    bind,
)
from nflows_iresnet.testing.subject import drawn, require, require_close


def check_lipschitz(
    net: Callable[..., Tensor],
    inputs: Tensor,
    bound: float,
    context: Tensor | None = None,
    *,
    num_steps: int = 50,
) -> float:
    r"""Search for a stretch of g above `bound` by gradient ascent on \|J v\| / \|v\|, in float64.

    Args:
        net: g, mapping (B, *) to (B, *) row by row; a module is copied.
        inputs: starting points, shape (B, *).
        bound: the claimed upper bound of Lip(g).
        context: shape (B, C), or None.
        num_steps: steps of the search.

    Returns:
        The largest stretch that was found, a lower bound of Lip(g).

    Raises:
        AssertionError: if it exceeds `bound`.

    Example:
        >>> round(check_lipschitz(lambda x: 0.5 * x, torch.randn(4, 2), bound=0.5), 3)
        0.5
    """
    function = bind(_in_double(net), None if context is None else context.double())
    points = inputs.detach().double().requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.05)
    largest = 0.0
    for _ in range(num_steps):
        norms = torch.linalg.matrix_norm(_jacobian(function, points), ord=2)
        largest = max(largest, float(norms.detach().max()))
        if norms.requires_grad:
            (gradient,) = torch.autograd.grad(
                -norms.sum(), points, allow_unused=True, retain_graph=True
            )
            if gradient is None:  # piecewise linear: the Jacobian does not depend on the point
                break
            points.grad = gradient
            optimizer.step()
    require(largest <= bound * (1 + 1e-9), f"found a stretch of {largest:.9g} > bound {bound:.9g}")
    return largest


def check_linearization(
    net: Callable[..., Tensor], inputs: Tensor, context: Tensor | None = None, *, atol: float = 1e-8
) -> None:
    """Check what `bind(net, context)` returns against automatic differentiation, in float64.

    The value, which is also that of a call where g is a module, all products with the Jacobian, its
    trace, and the function of some rows alone.

    Args:
        net: g; a module is copied.
        inputs: rows to check at, shape (B, *), B at least 2.
        context: shape (B, C), or None.
        atol: how far numbers may be off.

    Raises:
        AssertionError: naming what is off, and by how much.

    Example:
        >>> from nflows_iresnet.nn import LipschitzMLP
        >>> check_linearization(LipschitzMLP(2, [8]), torch.randn(4, 2))
    """
    if inputs.shape[0] < 2:
        raise ValueError(f"at least 2 rows are needed to check a network, got {inputs.shape[0]}")
    rows = inputs.detach().double()
    conditions = () if context is None else (context.detach().double(),)
    copy = _in_double(net)
    function = bind(copy, *conditions)
    expected = _answers(AutogradLinearization(function, rows))
    is_function = isinstance(copy, ResidualFunction)
    if isinstance(copy, nn.Module) and _has_forward(copy) and not is_function:
        require_close(copy(rows, *conditions), expected["value"], atol, "a call")
    for name, value in _answers(function.linearize(rows)).items():
        require_close(value, expected[name], atol, name)
    some = torch.arange(rows.shape[0] - 1, 0, -1, device=rows.device)
    selected = function.select(some)(rows[some])
    require_close(selected, expected["value"][some], atol, "the value of selected rows")


def _answers(at: Linearization) -> dict[str, Tensor]:
    tangent, cotangent = drawn((2, *at.shape), at.like, seed=0)
    return {
        "jvp": at.jvp(tangent),
        "vjp": at.vjp(cotangent),
        "bilinear": torch.stack(at.bilinear([cotangent, tangent], tangent)),
        "jacobian": at.jacobian(),
        "trace": at.trace(),
        "value": at.value,
    }


def _has_forward(net: nn.Module) -> bool:
    """Whether it can be called, which a block does not ask for."""
    return type(net).forward is not nn.Module.forward


def _in_double(net: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return deepcopy(net).double() if isinstance(net, nn.Module) else net


def _jacobian(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Return the Jacobians (B, D, D) of a function that maps row by row, differentiable."""
    outputs = function(points).flatten(start_dim=1)
    rows = [
        torch.autograd.grad(
            column.sum(), points, create_graph=True, allow_unused=True, materialize_grads=True
        )[0]
        for column in outputs.unbind(1)
    ]
    return torch.stack([row.flatten(start_dim=1) for row in rows], dim=1)
