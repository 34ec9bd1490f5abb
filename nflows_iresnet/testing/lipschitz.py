"""A search that tries to refute a claimed Lipschitz bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nflows_iresnet.testing.subject import require


def check_lipschitz(
    net: Callable[[Tensor], Tensor], inputs: Tensor, bound: float, *, num_steps: int = 50
) -> float:
    r"""Search for a stretch of g above `bound` by gradient ascent on \|J v\| / \|v\|.

    Args:
        net: g, mapping (B, *) to (B, *) row by row.
        inputs: starting points, shape (B, *).
        bound: the claimed upper bound of Lip(g).
        num_steps: steps of the search.

    Returns:
        The largest stretch that was found, a lower bound of Lip(g).

    Raises:
        AssertionError: if it exceeds `bound`.

    Example:
        >>> round(check_lipschitz(lambda x: 0.5 * x, torch.randn(4, 2), bound=0.5), 3)
        0.5
    """
    points = inputs.detach().double().requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.05)
    largest = 0.0
    for _ in range(num_steps):
        norms = torch.linalg.matrix_norm(_batch_jacobian(net, points), ord=2)
        largest = max(largest, float(norms.detach().max()))
        if norms.requires_grad:
            (gradient,) = torch.autograd.grad(-norms.sum(), points, allow_unused=True)
            if gradient is None:  # piecewise linear: the Jacobian does not depend on the point
                break
            points.grad = gradient
            optimizer.step()
    require(largest <= bound * (1 + 1e-9), f"found a stretch of {largest:.9g} > bound {bound:.9g}")
    return largest


def _batch_jacobian(net: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    outputs = net(points).flatten(start_dim=1)
    rows = [
        torch.autograd.grad(
            outputs[:, i].sum(),
            points,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )[0]
        for i in range(outputs.shape[1])
    ]
    return torch.stack([row.flatten(start_dim=1) for row in rows], dim=1)
