r"""The roulette with a fitted coefficient: a Krylov method inside, unbiased outside.

Let u_k = (J^T)^k v. Of the n terms that a roulette always keeps, w = sum_{k < n} (-1)^k u_k, the
last is multiplied by 1 + d. For EVERY number d,

    (I + J^T)^{-1} v
        = sum_{k < n-1} (-1)^k u_k + (-1)^{n-1} (1 + d) u_{n-1} + sum_{j >= 1} (-J^T)^j r

with r = (-1)^{n-1} (u_{n-1} + d (u_{n-2} + u_{n-1})). The number d is chosen, for each row, such
that |r| is least: a step of the method of minimal residuals in span(u_0, ..., u_{n-1}). It leaves
|u_{n-1}| at most, which is what the series leaves (d = 0). The roulette is played on what is left:
(-J^T)^j r has the weight c_{n+j} = 1{n + j <= N} / P(N >= n + j). Collected by powers of J, the
terms of the series have the weights

    c_k for k < n,    c_k + d (c_k - c_{k+1}) for k >= n.

**No bias.** Given x and v, d is a constant and the truncation N does not depend on it, so that the
mean of each weight is 1 + d (1 - 1) = 1: d may be fitted to the very probe that it is used with,
and value and derivative are as unbiased as those of the plain roulette, row by row. Each row has
its own d, from its own products: rows do not see each other. (One d for the whole batch would be
as unbiased, but rows would share it.)

**Variance.** Finite for the same laws as that of `RussianRoulette`, see `Krylov.variance_bound`.

Proofs: docs/guarantees.md#the-fitted-roulette.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet.linearization import Linearization, row_products
from nflows_iresnet.logdet.power_series import (
    fourth_moment,
    validated_lipschitz,
    weighted_series,
)
from nflows_iresnet.logdet.russian_roulette import (
    LipschitzTruncation,
    RussianRoulette,
    Truncation,
    grows,
)


@dataclass(frozen=True, kw_only=True)
class Krylov(RussianRoulette):
    r"""`RussianRoulette` with its last certain term fitted row by row: equal mean, less scatter.

    Unbiased for the value and, for any weight of each row, for its derivative. What the truncation
    adds to the variance is down to half of what it is with the plain roulette of the same law, for
    about the time of one product with J in small networks; what the probe adds, which is more than
    that, stays. Hence not the default: docs/measurements.md#the-fitted-roulette.

    Cost: `expected_terms` products with J per probe, 4.0 at the default for L = 0.97, and two
    products of rows; for networks without structure one more where a gradient is recorded. Memory
    O(1) in the number of terms. Nothing is asked of the device, and no system is solved.

    References:
        Saad. Iterative methods for sparse linear systems, 2003, section 5.3 (minimal residuals).
        Chen, Behrmann, Duvenaud, Jacobsen. Residual flows for invertible generative modeling, 2019.

    Args:
        num_exact_terms: n, the number of terms that are always computed, at least 2: the last of
            them is fitted.
        truncation: the law of N beyond them, as for `RussianRoulette`.
        lipschitz: upper bound L of Lip(g) for the law; by default the one that the network
            guarantees.
        num_probes: independent draws of probe and truncation, averaged. With two or more,
            `estimate` knows its standard error.
        probe: the law of the probe vectors.
        exact_trace: use the exact trace as control variate; by default where it is cheap.

    Raises:
        ValueError: when called with a network that guarantees no bound, and `lipschitz` is None.

    Example:
        >>> import torch
        >>> estimate = Krylov(lipschitz=0.5).estimate(lambda x: 0.5 * x.sin(), torch.ones(3, 8))
        >>> estimate.logabsdet.shape
        torch.Size([3])
    """

    num_exact_terms: int = 3
    truncation: Truncation = LipschitzTruncation(power=3.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_exact_terms < 2:
            raise ValueError(
                f"num_exact_terms must be at least 2, got {self.num_exact_terms}: the last of them "
                "is fitted with the help of the one before; RussianRoulette takes 1"
            )

    def _draw(
        self,
        at_inputs: Linearization,
        probe: Tensor,
        weights: Sequence[float] | Tensor,
        exact_trace: bool,
    ) -> Tensor:
        """Return the estimate from one probe and one truncation, shape (B,)."""
        return weighted_series(at_inputs, probe, weights, exact_trace, self._sums)

    def _sums(
        self,
        at_inputs: Linearization,
        probe: Tensor,
        weights: Sequence[float | Tensor],
        exact_trace: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return w and s: w^T dJ v is the derivative, s^T J v the value."""
        fitted_terms = zip(weights, self.corrections(weights), strict=True)
        before = power = probe
        for_derivative, for_value = torch.zeros_like(probe), torch.zeros_like(probe)
        excess: Tensor | None = None
        for index, (weight, correction) in enumerate(fitted_terms):
            if index > 0:
                before, power = power, at_inputs.vjp(power)
            if index == self.num_exact_terms - 1:
                excess = self.excess(before, power)
            if index == 0 and exact_trace:
                continue
            term = power * weight if excess is None else power * (excess * correction + weight)
            sign = -1 if index % 2 else 1
            for_derivative = for_derivative.add(term, alpha=sign)
            for_value = for_value.add(term, alpha=sign / (index + 1))
        return for_derivative, for_value

    def excess(self, before: Tensor, last: Tensor) -> Tensor:
        """Return d, for each row, such that |last + d (before + last)| is least.

        Args:
            before: u, shape (B, *).
            last: J^T u, of the same shape.

        Returns:
            Shape (B, 1, ...), at most L / (1 - L) in absolute value; zero where the rows are zero.
        """
        direction = before + last
        length = row_products(direction, direction) + torch.finfo(last.dtype).tiny
        excess = -row_products(direction, last) / length
        return excess.reshape(-1, *(1 for _ in last.shape[1:]))

    def corrections(self, weights: Sequence[float | Tensor]) -> list[float | Tensor]:
        """Return c_k - c_{k+1} for the terms k >= n that the fit changes, and 0 for those before.

        Args:
            weights: c_1, ..., c_N as `term_weights` drew them; those after are zero.
        """
        following = [*weights[1:], 0.0]
        kept = self.num_exact_terms - 1
        changes: list[float | Tensor] = [
            now - after for now, after in zip(weights, following, strict=True)
        ]
        return [*[0.0] * kept, *changes[kept:]]

    def variance_bound(self, lipschitz: float, features: int) -> float:
        r"""Return a bound of the variance of one draw, in nats^2, for any J with \|J\| <= L.

        The probe adds at most E\|v\|^4 log(1 - L)^2. The truncation adds at most
        E\|v\|^4 sum_{i,j >= 1} (1 / p_{n + min(i,j)} - 1) b_i b_j, where the j-th term of the
        residual is at most b_j = L^{n+j} / (1 - L) (1 / (n + j - 1) + 1 / (n + j)), as
        \|d\| <= L / (1 - L). See `RussianRoulette.variance_bound` for E\|v\|^4 and the p_k.

        Args:
            lipschitz: L in [0, 1).
            features: D, the number of dimensions.

        Returns:
            The bound, `math.inf` where the law does not guarantee a finite variance, and for a
            probe that does not say its `fourth_moment(features)`.
        """
        bound = validated_lipschitz(lipschitz)
        if not self.truncation.has_finite_variance(bound):
            return math.inf
        if bound == 0:
            return 0.0
        total, added, term = 0.0, math.inf, self.num_exact_terms
        of_law = self._of_law(bound)
        while added > 1e-9 * (1 - bound) * total:
            term += 1
            size = bound**term / (1 - bound) * (1 / (term - 1) + 1 / term)
            later = bound ** (term + 1) / (1 - bound) ** 2 * (1 / term + 1 / (term + 1))
            survival, before = self.survival(term, of_law), added
            if survival == 0:
                return math.inf
            added = size * (size + 2 * later) * (1 / survival - 1)
            if grows(size, before, added):
                return math.inf
            total += added
        return fourth_moment(self.probe, features) * (
            math.log1p(-bound) ** 2 + total * (1 + _LEFT_OUT)
        )


_LEFT_OUT = 1e-6
"""Relatively more than what is left out of the sum."""
