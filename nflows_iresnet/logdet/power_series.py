r"""Log-determinants from products with J: the power series, truncated or randomised.

With \|J\| <= L < 1,

    log det(I + J) = tr log(I + J) = sum_{k >= 1} (-1)^{k+1} tr(J^k) / k,

and tr(J^k) = E[v^T J^k v] for a random probe v. Both estimators below weight the k-th term by
c_k, with c_k = 1 for k <= N (truncation) or c_k = 1{k <= N} / P(N >= k) (roulette).

**Value.** u_k = (J^T)^k v is built by repeated products, and the estimate is
sum_k (-1)^{k+1} c_k u_k . v / k = s^T J v with s = sum_{k >= 1} (-1)^{k+1} c_k u_{k-1} / k: an
estimate of the log-determinant itself, in training too.

**Derivative.** d tr(J^k) = k tr(J^{k-1} dJ), so the derivative of the weighted series is
sum_k (-1)^{k-1} c_k tr(J^{k-1} dJ) = E[w^T dJ v] with w = sum_{j >= 0} (-1)^j c_{j+1} (J^T)^j v.
The u_j are computed without a graph, w is a constant, and the surrogate w^T J v is differentiated
through ONE product with J, which is also the last one that the value needs: memory does not grow
with the number of terms, and the derivative is right for any upstream gradient because the
surrogate is a value per row. A second derivative would treat w as the constant that it is not: it
raises `SecondDerivativeError` (`Exact` has derivatives of any order). See
docs/guarantees.md#second-derivatives.

**Control variate.** Where the network knows tr J exactly and cheaply, the term k = 1 is that exact
trace instead of v^T J v (and c_1 v is left out of s and w): the same expectation, less variance.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from nflows_iresnet.linearization import (
    Linearization,
    first_derivative_only,
    is_differentiated,
    is_traced,
)
from nflows_iresnet.logdet.base import LogDetEstimator
from nflows_iresnet.logdet.plan import planned_weights
from nflows_iresnet.validation import validated_size


class Probe(Protocol):
    """A law of random vectors with zero mean and identity covariance."""

    def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return one vector per row, of the shape, dtype and device of `inputs`."""


@dataclass(frozen=True)
class Rademacher:
    """Independent signs. The least variance of all probes with independent entries.

    Var[v^T A v] = 2 sum_{i != j} S_ij^2 with S the symmetric part of A: the diagonal adds none.

    References:
        Hutchinson. A stochastic estimator of the trace of the influence matrix, 1989.
    """

    def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return signs +1 and -1 with probability one half each."""
        if generator is None:
            bits = torch.randint_like(inputs, 2, memory_format=torch.contiguous_format)
            return torch.rsub(bits, 1, alpha=2)
        bits = torch.randint(
            2, inputs.shape, generator=generator, dtype=inputs.dtype, device=inputs.device
        )
        return torch.rsub(bits, 1, alpha=2)

    def fourth_moment(self, features: int) -> float:
        r"""Return E\|v\|^4 = D^2."""
        return float(features**2)


@dataclass(frozen=True)
class Gaussian:
    """Standard normal entries, as used by Behrmann et al. 2019 and Chen et al. 2019.

    Var[v^T A v] = 2 sum_ij S_ij^2: never less than with `Rademacher`.
    """

    def sample_like(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return independent standard normal entries."""
        kept = torch.contiguous_format
        values = torch.empty_like(inputs, requires_grad=False, memory_format=kept)
        return values.normal_(generator=generator)

    def fourth_moment(self, features: int) -> float:
        r"""Return E\|v\|^4 = D (D + 2)."""
        return float(features * (features + 2))


def fourth_moment(probe: Probe, features: int) -> float:
    r"""Return E\|v\|^4 of a probe of D features, infinity if it does not say it.

    Example:
        >>> fourth_moment(Rademacher(), 4), fourth_moment(Gaussian(), 4)
        (16.0, 24.0)
    """
    own = getattr(probe, "fourth_moment", None)
    return math.inf if own is None else float(own(features))


Sums = Callable[[Linearization, Tensor, Sequence[float | Tensor], bool], Sequence[Tensor]]


def weighted_series(
    linearization: Linearization,
    probe: Tensor,
    weights: Sequence[float] | Tensor,
    exact_trace: bool,
    sums: Sums | None = None,
) -> Tensor:
    """Return sum_k (-1)^{k+1} weights[k-1] v^T J^k v / k, with the derivative described above.

    Args:
        linearization: g at x.
        probe: v, shape (B, *).
        weights: c_1, c_2, ..., one per term: numbers, or a tensor that is read on its device.
        exact_trace: replace v^T J v by tr J in the first term.
        sums: returns w and s from the same arguments, the weights one by one; by default those of
            this series.

    Returns:
        Shape (B,). Cost: one product with J per term. (With a linearisation whose `bilinear` takes
        one for each vector: one more where a gradient is recorded.)
    """
    each: Sequence[float | Tensor] = (
        weights.to(probe.dtype).unbind() if isinstance(weights, Tensor) else weights
    )
    with torch.no_grad():
        vectors = (sums or _weighted_sums)(linearization, probe, each, exact_trace)
    for_derivative, for_value = [
        vector.detach() for vector in vectors
    ]  # forward mode ignores no_grad
    if is_differentiated():
        surrogate = linearization.surrogate(for_value, for_derivative, probe)
        value = first_derivative_only(surrogate, _NO_SECOND_DERIVATIVE)
    else:
        (value,) = linearization.bilinear([for_value], probe)
    return _add(value, linearization.trace(), each[0], 1.0) if exact_trace else value


def _weighted_sums(
    linearization: Linearization,
    probe: Tensor,
    weights: Sequence[float | Tensor],
    exact_trace: bool,
) -> list[Tensor]:
    """Return w and s, the vectors of the derivative and of the value."""
    power = probe
    for_derivative: Tensor | None = None
    for_value: Tensor | None = None
    for index, weight in enumerate(weights):
        if index % 4 == 0 and index > 0 and _is_negligible(power):
            break
        power = linearization.vjp(power) if index > 0 else power
        if index > 0 or not exact_trace:
            sign = -1.0 if index % 2 else 1.0
            for_derivative = _add(for_derivative, power, weight, sign)
            for_value = _add(for_value, power, weight, sign / (index + 1))
    sums = (for_derivative, for_value)
    return [torch.zeros_like(probe) if each is None else each for each in sums]


def _add(total: Tensor | None, power: Tensor, weight: float | Tensor, factor: float) -> Tensor:
    """Return total + factor * weight * power, None for a total of zero."""
    if total is None:
        return power * (factor * weight)
    if isinstance(weight, Tensor):
        return torch.addcmul(total, power, weight, value=factor)
    return total.add(power, alpha=factor * weight)


_NO_SECOND_DERIVATIVE = (
    "series estimators of the log-determinant have a first derivative only: a second one would be "
    "wrong. Use logdet.Exact(), for example by `with transforms.using(flow, estimator=Exact())`"
)


def _is_negligible(power: Tensor) -> bool:
    """Whether the remaining terms are lost in rounding; asked on the CPU alone.

    There the products with subnormal numbers that would follow are a hundred times slower than
    others; the threshold is far above them, because the products inside a network meet them
    before the result does. On a GPU they are not slow, and asking would make it wait.
    """
    if power.device.type != "cpu" or is_traced() or power.numel() == 0:
        return False
    return float(power.abs().amax()) < torch.finfo(power.dtype).tiny ** 0.5


@dataclass(frozen=True, kw_only=True)
class SeriesEstimator(LogDetEstimator):
    """What the truncated and the randomised series share: probes, errors, the control variate.

    Args:
        num_probes: independent draws, averaged. With two or more, `estimate` knows its
            standard error.
        probe: the law of v.
        exact_trace: use the exact trace as control variate; by default where it is cheap.
    """

    num_probes: int = 1
    probe: Probe = Rademacher()
    exact_trace: bool | None = None
    has_fixed_length: ClassVar[bool] = False
    """Whether `term_weights` draws nothing, so that a recorded step may keep what it returned."""

    def __post_init__(self) -> None:
        validated_size("num_probes", self.num_probes)
        if isinstance(self.probe, type) or not hasattr(self.probe, "sample_like"):
            raise ValueError(f"probe must be a law such as Rademacher(), got {self.probe!r}")

    @abstractmethod
    def term_weights(
        self, lipschitz: float | None, generator: torch.Generator | None = None
    ) -> list[float]:
        """Return the weights c_1, ..., c_N of one draw.

        Args:
            lipschitz: the guaranteed bound of Lip(g), None where the network has none.
            generator: source of randomness.
        """

    def logabsdet(
        self,
        at_inputs: Linearization,
        lipschitz: float | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mean over the probes and, with several probes, its standard error.

        Each probe draws its own vector and its own truncation. Within one probe the truncation is
        shared by the batch: rows of one call are not independent draws.
        """
        exact_trace = at_inputs.has_cheap_trace if self.exact_trace is None else self.exact_trace
        like = at_inputs.like
        draws = [
            self._draw(
                at_inputs,
                self.probe.sample_like(like, generator),
                self._weights(lipschitz, generator, index),
                exact_trace,
            )
            for index in range(self.num_probes)
        ]
        if len(draws) == 1:
            return draws[0], None
        together = torch.stack(draws)
        mean = together.mean(0)
        squares = (together - mean).detach().square().sum(0)
        return mean, (squares / (len(draws) * (len(draws) - 1))).sqrt()

    def _draw(
        self,
        at_inputs: Linearization,
        probe: Tensor,
        weights: Sequence[float] | Tensor,
        exact_trace: bool,
    ) -> Tensor:
        """Return the estimate from one probe and one draw of the weights, shape (B,)."""
        return weighted_series(at_inputs, probe, weights, exact_trace)

    def _weights(
        self, lipschitz: float | None, generator: torch.Generator | None, probe: int
    ) -> Sequence[float] | Tensor:
        if self.has_fixed_length or is_traced():
            return self.term_weights(lipschitz, generator)
        return planned_weights(self, lipschitz, generator, probe)


def validated_lipschitz(lipschitz: float) -> float:
    """Return `lipschitz` if it is a bound that makes the series converge."""
    if not 0 <= lipschitz < 1:
        raise ValueError(
            f"the Lipschitz bound must be at least 0 and less than 1, got {lipschitz}; "
            "the series of log det(I + J) does not converge otherwise"
        )
    return lipschitz


@dataclass(frozen=True, kw_only=True)
class PowerSeries(SeriesEstimator):
    """The power series cut after `num_terms` terms: biased, with a rigorous bound of the bias.

    Cost: `num_terms` products with J per probe; for networks without structure one more where a
    gradient is recorded. Memory O(1) in the number of terms.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen. Invertible residual networks, 2019.

    Args:
        num_terms: N, the number of terms kept.
        num_probes: independent probes, averaged.
        probe: the law of the probe vectors.
        exact_trace: use the exact trace as control variate; by default where it is cheap.

    Example:
        >>> PowerSeries(num_terms=10).bias_bound(lipschitz=0.5, features=2) < 2e-4
        True
    """

    num_terms: int = 10
    has_fixed_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        validated_size("num_terms", self.num_terms)

    def term_weights(
        self, lipschitz: float | None, generator: torch.Generator | None = None
    ) -> list[float]:
        """Return N ones."""
        return [1.0] * self.num_terms

    def bias_bound(self, lipschitz: float, features: int) -> float:
        r"""Return a bound of \|E[estimate] - log det(I + J)\| in nats.

        The tail is sum_{k > N} \|tr J^k\| / k <= D sum_{k > N} L^k / k
        <= D L^{N+1} / ((N + 1) (1 - L)), because \|tr J^k\| <= D L^k.

        Args:
            lipschitz: L, an upper bound of Lip(g), in [0, 1).
            features: D, the number of dimensions.

        Raises:
            ValueError: if the bound is not in [0, 1).
        """
        bound = validated_lipschitz(lipschitz)
        terms = self.num_terms + 1
        return features * bound**terms / (terms * (1 - bound))
