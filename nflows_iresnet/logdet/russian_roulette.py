r"""The unbiased estimator: the power series stopped at a random term (Russian roulette).

With N drawn from a law with survival function p_k = P(N >= k) > 0,

    E[ sum_{k <= N} t_k / p_k ] = sum_k t_k P(N >= k) / p_k = sum_k t_k,

for the terms t_k of the value and of the derivative alike. What the law decides is the variance.
The worst case allowed by \|J\| <= L is t_k ~ L^k / k for the value, L^{k-1} for the derivative:

    E[estimate^2] = sum_{j,k} t_j t_k / p_min(j,k) <= 2 sum_j (|t_j| / p_j) sum_{k >= j} |t_k|.

* `GeometricTruncation(q)`, p_k = q^{k - n} beyond n exact terms: finite if and only if q > L^2.
  The customary q = 1/2 needs L < 0.707.
* `LipschitzTruncation(s)`, p_k = L^{k - n} (n / k)^s: finite for EVERY L < 1. For s > 1 the
  expected number of terms is less than n + n / (s - 1), whatever L.

Proofs: docs/guarantees.md#variance-of-the-roulette. The default keeps three terms always, where
most of the sum is, and has s = 2, because terms of trained flows shrink faster than the bound
allows; Jacobians close to the bound pay for it. Measured:
docs/measurements.md#the-law-of-the-roulette.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch

from nflows_iresnet.linearization import concrete
from nflows_iresnet.logdet.power_series import (
    Rademacher,
    SeriesEstimator,
    fourth_moment,
    validated_lipschitz,
)
from nflows_iresnet.validation import validated_size


class InfiniteVarianceWarning(UserWarning):
    """The law of the truncation does not guarantee a finite variance for the certified bound."""


class Truncation(Protocol):
    """A law of the number of terms N beyond `num_exact` terms that are always kept."""

    def survival(self, term: int, num_exact: int, lipschitz: float) -> float:
        """Return P(N >= term) for term > num_exact."""

    def has_finite_variance(self, lipschitz: float) -> bool:
        r"""Whether value and derivative have finite variance for every J with \|J\| <= L."""


@dataclass(frozen=True)
class LipschitzTruncation:
    """P(N >= k) = L^{k - n} (n / k)^s for k > n: finite variance for every certified L < 1.

    Args:
        power: s, at least 0. Larger values are for terms that shrink faster than the bound allows.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.power < math.inf:
            raise ValueError(f"power must be finite and at least 0, got {self.power}")

    def survival(self, term: int, num_exact: int, lipschitz: float) -> float:
        """Return L^{k - n} (n / k)^s."""
        return lipschitz ** (term - num_exact) * math.pow(num_exact / term, self.power)

    def has_finite_variance(self, lipschitz: float) -> bool:
        """Return True."""
        return True


@dataclass(frozen=True)
class GeometricTruncation:
    """P(N >= k) = q^{k - n} for k > n; Residual Flows use q = 1/2.

    References:
        Chen, Behrmann, Duvenaud, Jacobsen. Residual flows for invertible generative modeling, 2019.

    Args:
        continuation: q, the probability of one more term.
    """

    continuation: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.continuation < 1:
            raise ValueError(f"continuation must be in (0, 1), got {self.continuation}")

    def survival(self, term: int, num_exact: int, lipschitz: float) -> float:
        """Return q^{k - n}."""
        return self.continuation ** (term - num_exact)

    def has_finite_variance(self, lipschitz: float) -> bool:
        """Return whether q > L^2."""
        return self.continuation > lipschitz**2


_OF_A_LAW = ("survival", "has_finite_variance")


@dataclass(frozen=True, kw_only=True)
class RussianRoulette(SeriesEstimator):
    r"""Unbiased estimate of log\|det(I + J)\| and of its derivative, with finite variance.

    Cost: E[N] products with J per probe (`expected_terms`); for networks without structure one
    more where a gradient is recorded. Memory O(1) in the number of terms. The truncation is drawn
    from torch's generator, or before the step, where a `logdet.TermPlan` applies.

    References:
        Chen, Behrmann, Duvenaud, Jacobsen. Residual flows for invertible generative modeling, 2019.
        Beatson, Adams. Efficient optimization of loops and limits with randomized telescoping
        sums, 2019 (how the law should follow the size of the terms).

    Args:
        num_exact_terms: n, the number of terms that are always kept, at least 1.
        truncation: the law of N. The default is matched to the Lipschitz bound, so that the
            variance is finite; a law for which it is not warns with `InfiniteVarianceWarning`.
        lipschitz: upper bound L of Lip(g) for the law; by default the one that the network
            guarantees.
        num_probes: independent draws of probe and truncation, averaged.
        probe: the law of the probe vectors.
        exact_trace: use the exact trace as control variate; by default where it is cheap.

    Raises:
        ValueError: when called with a network that guarantees no bound, and `lipschitz` is None.

    Example:
        >>> round(RussianRoulette().expected_terms(lipschitz=0.97), 1)
        5.0
        >>> RussianRoulette(truncation=GeometricTruncation(0.5)).variance_bound(0.9, features=2)
        inf
    """

    num_exact_terms: int = 3
    truncation: Truncation = LipschitzTruncation()
    lipschitz: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        validated_size("num_exact_terms", self.num_exact_terms)
        is_law = all(hasattr(self.truncation, name) for name in _OF_A_LAW)
        if isinstance(self.truncation, type) or not is_law:
            raise ValueError(
                f"truncation must be a law such as LipschitzTruncation(), with the methods "
                f"{' and '.join(_OF_A_LAW)}, got {self.truncation!r}"
            )
        if self.lipschitz is not None:
            validated_lipschitz(self.lipschitz)

    def survival(self, term: int, lipschitz: float) -> float:
        """Return P(N >= term)."""
        if term <= self.num_exact_terms:
            return 1.0
        return self.truncation.survival(term, self.num_exact_terms, lipschitz)

    def term_weights(
        self, lipschitz: float | None, generator: torch.Generator | None = None
    ) -> list[float]:
        """Draw N and return 1 / P(N >= k) for k = 1, ..., N."""
        bound = self._bound(lipschitz)
        uniform = 1 - _uniform(generator)
        weights: list[float] = []
        while (probability := self.survival(len(weights) + 1, bound)) >= uniform:
            weights.append(1 / probability)
        return weights

    def _bound(self, guaranteed: float | None) -> float:
        bound = guaranteed if self.lipschitz is None else self.lipschitz
        if bound is None:
            raise ValueError(
                "the network guarantees no Lipschitz bound, so the roulette cannot match its law "
                "to it; pass RussianRoulette(lipschitz=...) with a bound below 1 that you can "
                "vouch for, or use logdet.Exact(), or a network of nflows_iresnet.nn"
            )
        if not self.truncation.has_finite_variance(bound):
            warnings.warn(
                f"{self.truncation} does not guarantee a finite variance for Lip(g) <= {bound}; "
                "use LipschitzTruncation() or a continuation probability above its square",
                InfiniteVarianceWarning,
                stacklevel=3,
            )
        elif guaranteed is not None and bound < guaranteed and _is_unbounded(self, guaranteed):
            warnings.warn(
                f"the law for Lip(g) <= {bound} does not guarantee a finite variance for the "
                f"network's bound {guaranteed}: pass a `lipschitz` above {guaranteed**2:.4g}, "
                "leave it out, or use another law",
                InfiniteVarianceWarning,
                stacklevel=3,
            )
        return bound

    def _of_law(self, lipschitz: float) -> float:
        """Return the bound that the law of N is for."""
        return validated_lipschitz(lipschitz) if self.lipschitz is None else self.lipschitz

    def expected_terms(self, lipschitz: float) -> float:
        """Return E[N] = sum_k P(N >= k), the expected number of products with J per probe."""
        total, term, of_law = 0.0, 1, self._of_law(lipschitz)
        while (probability := self.survival(term, of_law)) > 1e-9:
            total, term = total + probability, term + 1
        return total

    def variance_bound(self, lipschitz: float, features: int) -> float:
        r"""Return a bound of the variance of one draw, in nats^2, for any J with \|J\| <= L.

        E[estimate^2] <= E\|v\|^4 sum_{j,k} a_j a_k / p_min(j,k) with a_k = L^k / k, because
        \|v^T J^k v\| <= \|v\|^2 L^k. E\|v\|^4 is D^2 for `Rademacher` probes and D (D + 2) for
        `Gaussian` ones. The probabilities p are those of the law that is drawn from, which an own
        `lipschitz` decides.

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
        remaining, of_law = -math.log1p(-bound), self._of_law(bound)
        total, term, size, pairs, is_small = 0.0, 1, bound, 0.0, False
        while size > _SMALL or pairs > 1e-16 * total:
            survival, before = self.survival(term, of_law), pairs
            if survival == 0:
                return math.inf
            rest = remaining if size > _SMALL else size / (1 - bound)
            pairs = size * (2 * rest - size) / survival
            if is_small and grows(size, before, pairs):
                return math.inf
            total, remaining, term = total + pairs, remaining - size, term + 1
            is_small, size = size <= _SMALL, bound**term / term
        return fourth_moment(self.probe, features) * total * (1 + _SMALL)


def _is_unbounded(roulette: RussianRoulette, lipschitz: float) -> bool:
    """Whether the law of an estimator guarantees no finite variance, whatever its probe."""
    with_signs = replace(roulette, probe=Rademacher())
    try:
        return _has_no_bound(with_signs, lipschitz)
    except TypeError:  # a law of one's own that has no hash
        return with_signs.variance_bound(lipschitz, 1) == math.inf


@lru_cache(maxsize=256)
def _has_no_bound(roulette: RussianRoulette, lipschitz: float) -> bool:
    return roulette.variance_bound(lipschitz, 1) == math.inf


def grows(size: float, before: float, added: float) -> bool:
    """Whether what the terms of a sum add does not shrink: for all laws but those whose slow
    factors win for thousands of terms, it never will, and for those infinity is a bound, too.

    It is not asked of large terms, whose factors other than powers may still grow, nor of those
    whose squares lose digits.
    """
    return 1e-100 < size <= _SMALL and added >= before


_SMALL = 1e-9
"""Terms below are summed with a bound of those after them, which rounding would otherwise swamp;
relatively, it is also more than is left out in the end."""


def _uniform(generator: torch.Generator | None) -> float:
    """Draw a number of [0, 1): on the CPU, so that a GPU never waits for it.

    A generator of a GPU decides on this number, too, and then the host waits for it.
    Inside `vmap` one number is drawn for all lanes, as one is for all rows of a batch.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            "torch.jit.trace would keep the number of terms that this call draws: trace with "
            "logdet.Exact() or PowerSeries()"
        )
    device = "cpu" if generator is None else generator.device
    drawn = torch.rand((), dtype=torch.float64, generator=generator, device=device)
    return float(concrete(drawn).flatten()[0])
