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
surrogate is a value per row. This is for first
derivatives: a second derivative would treat w as the constant that it is not. Where second
derivatives are needed (Hessians, score matching), use `Exact`.

**Control variate.** Where the network knows tr J exactly and cheaply, the term k = 1 is that exact
trace instead of v^T J v (and c_1 v is left out of s and w): the same expectation, less variance.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet.linearization import Linearization, bind, is_traced
from nflows_iresnet.logdet.base import LogDetEstimate, LogDetEstimator, linearize_endomap
from nflows_iresnet.logdet.probes import Probe, Rademacher


def weighted_series(
    linearization: Linearization, probe: Tensor, weights: Sequence[float], exact_trace: bool
) -> Tensor:
    """Return sum_k (-1)^{k+1} weights[k-1] v^T J^k v / k, with the derivative described above.

    Args:
        linearization: g at x.
        probe: v, shape (B, *).
        weights: c_1, c_2, ..., one per term.
        exact_trace: replace v^T J v by tr J in the first term.

    Returns:
        Shape (B,). Cost: one product with J per term. (With a linearisation whose `pairings` takes
        one for each vector: one more where a gradient is recorded.)
    """
    with torch.no_grad():
        sums = _weighted_sums(linearization, probe, weights, exact_trace)
    if torch.is_grad_enabled():
        surrogate, value = linearization.pairings(sums, probe)
        value = value.detach() + (surrogate - surrogate.detach())
    else:
        (value,) = linearization.pairings(sums[1:], probe)
    return value + weights[0] * linearization.trace() if exact_trace else value


def _weighted_sums(
    linearization: Linearization, probe: Tensor, weights: Sequence[float], exact_trace: bool
) -> list[Tensor]:
    """Return w and s, the vectors of the derivative and of the value."""
    power = probe
    for_derivative, for_value = torch.zeros_like(probe), torch.zeros_like(probe)
    for index, weight in enumerate(weights):
        if index % 4 == 0 and index > 0 and _is_negligible(power):
            break
        power = linearization.vjp(power) if index > 0 else power
        if index > 0 or not exact_trace:
            signed = -weight if index % 2 else weight
            for_derivative = for_derivative.add(power, alpha=signed)
            for_value = for_value.add(power, alpha=signed / (index + 1))
    return [for_derivative, for_value]


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

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ValueError(f"num_probes must be at least 1, got {self.num_probes}")

    @abstractmethod
    def term_weights(
        self, lipschitz: float | None, generator: torch.Generator | None = None
    ) -> list[float]:
        """Return the weights c_1, ..., c_N of one draw.

        Args:
            lipschitz: the guaranteed bound of Lip(g), None where the network has none.
            generator: source of randomness.
        """

    def estimate(
        self,
        net: Callable[..., Tensor],
        inputs: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> LogDetEstimate:
        """Return g(x), the mean over the probes and, with several probes, its standard error.

        Each probe draws its own vector and its own truncation. Within one probe the truncation is
        shared by the batch: rows of one call are not independent draws.
        """
        function = bind(net, context)
        at_inputs = linearize_endomap(function, inputs)
        exact_trace = at_inputs.has_cheap_trace if self.exact_trace is None else self.exact_trace
        draws = [
            weighted_series(
                at_inputs,
                self.probe.sample_like(inputs, generator),
                self.term_weights(function.lipschitz, generator),
                exact_trace,
            )
            for _ in range(self.num_probes)
        ]
        return _summarise(at_inputs.value, draws)


def _summarise(outputs: Tensor, independent: Sequence[Tensor]) -> LogDetEstimate:
    count = len(independent)
    if count == 1:
        return LogDetEstimate(outputs, independent[0], None)
    draws = torch.stack(list(independent))
    mean = draws.mean(0)
    squares = (draws - mean).detach().square().sum(0)
    return LogDetEstimate(outputs, mean, (squares / (count * (count - 1))).sqrt())


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

    Args:
        num_terms: N, the number of terms kept.
        num_probes: independent probes, averaged.
        probe: the law of the probe vectors.
        exact_trace: use the exact trace as control variate; by default where it is cheap.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen. Invertible residual networks, 2019.

    Example:
        >>> PowerSeries(num_terms=10).bias_bound(lipschitz=0.5, features=2) < 2e-4
        True
    """

    num_terms: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_terms < 1:
            raise ValueError(f"num_terms must be at least 1, got {self.num_terms}")

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
