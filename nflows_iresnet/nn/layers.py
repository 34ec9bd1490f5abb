"""Layers with a certified Lipschitz constant."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.nn.bounds import spectral_norm_bound
from nflows_iresnet.nn.norms import MatrixNorm, OperatorNorm, SpectralNorm


def validated_coeff(coeff: float) -> float:
    """Return a Lipschitz coefficient if it is in (0, 1)."""
    if not 0 < coeff < 1:
        raise ValueError(
            f"coeff must be between 0 and 1, exclusive, got {coeff}: y = x + g(x) is guaranteed to "
            "be invertible only for Lip(g) < 1; try 0.97"
        )
    return float(coeff)


def validated_size(name: str, value: int) -> int:
    """Return a size as an int, numpy integers included, if it is at least 1."""
    if operator.index(value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return operator.index(value)


def rounding_margin(weight: Tensor) -> float:
    r"""Return by how much a target norm is lowered so that rounded weights still respect it.

    Rounding moves each entry by at most eps / 2 relatively, hence the 2-norm by at most
    eps \|W\|_F / 2 <= eps sqrt(rank) \|W\|_2 / 2. Three roundings and a reserve are allowed.

    For a convolution, with symbol S = sum_a W_a exp(-i a t) over the A entries of its kernel, the
    norm of the symbol moves by at most sum_a \|dW_a\|_F <= sqrt(A) \|dW\|_F, and \|W\|_F^2 is the
    mean of \|S\|_F^2 over all t: A times as much under the root.
    """
    terms = min(weight.shape[:2]) * weight.shape[2:].numel()
    return 1 - 2 * torch.finfo(weight.dtype).eps * terms**0.5


class NormedLayer(nn.Module):
    """A layer with a weight whose norm it knows; mixed into a layer of torch."""

    weight: Tensor
    norm: OperatorNorm

    def _adopt(self, norm: OperatorNorm, kind: type[object]) -> None:
        if not isinstance(norm, kind):
            raise ValueError(f"{type(self).__name__} needs a {kind.__name__}, got {norm!r}")
        self.norm = norm
        state = norm.initial_state(self.weight.detach())
        self._state_names = tuple(state)
        for name, buffer in state.items():
            self.register_buffer(name, buffer)

    @torch.no_grad()
    def norm_and_gradient(self, advance: bool) -> tuple[Tensor, Tensor]:
        """Return the norm of the stored weight and its gradient, both float64.

        Args:
            advance: whether a strategy that keeps buffers improves them first.
        """
        state = {name: getattr(self, name) for name in self._state_names}
        if advance and self.training:
            self.norm.advance(self.weight, state)
        return self.norm.value_and_gradient(self.weight.double(), state)

    def extra_repr(self) -> str:
        """Show the sizes and the norm."""
        return f"{super().extra_repr()}, norm={self.norm}"


class NormedLinear(NormedLayer, nn.Linear):
    r"""A linear layer that knows a norm of its stored weight, and uses none of it.

    The building block of networks that normalise several layers together.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        bias: whether to add a bias.
        norm: the strategy for \|W\|_2.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, norm: MatrixNorm
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._adopt(norm, MatrixNorm)


class LipschitzLinear(NormedLinear):
    r"""x -> W x + b with \|W\|_2 <= coeff at every moment: W = V min(1, coeff / norm(V)).

    Stateless: the stored weight V may be anything, at any time, in any mode; the weight used is
    computed from it in each call.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        bias: whether to add a bias.
        coeff: the bound, in (0, 1).
        norm: an upper bound of the spectral norm; the spectral norm itself by default. With
            `PowerIteration` nothing is guaranteed.

    Raises:
        ValueError: if `coeff` is not in (0, 1).

    Example:
        >>> import torch
        >>> layer = LipschitzLinear(3, 4, coeff=0.9)
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(1e6)
        >>> layer.lipschitz_bound() <= 0.9
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        coeff: float = 0.97,
        norm: MatrixNorm | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, norm=norm or SpectralNorm())
        self.coeff = validated_coeff(coeff)

    def effective_weight(self) -> Tensor:
        """Return W, the weight that is used, shape (out, in)."""
        log_target = math.log(self.coeff * rounding_margin(self.weight))
        return normalised([self], log_target)[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return W x + b, shape (*, out)."""
        return F.linear(inputs, self.effective_weight(), self.bias)

    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of the norm of the weight that is used."""
        return spectral_norm_bound(self.effective_weight())

    def extra_repr(self) -> str:
        """Show the sizes, the norm and the coefficient."""
        return f"{super().extra_repr()}, coeff={self.coeff}"


def normalised(layers: Sequence[NormedLayer], log_budget: float) -> list[Tensor]:
    r"""Return the stored weights V_i times min(1, exp(log_budget) / s)^{1/n}, s = prod norm(V_i).

    All norms are computed without a graph. By Euler's theorem (see `OperatorNorm`) the derivative
    of log s = sum_i log norm(V_i) is that of t = sum_i <N_i, V_i>, N_i = grad norm(V_i) / norm(V_i)
    held constant, so the factor f has the value computed in float64 and the derivative
    -f / n dt where the budget is exceeded: one product for all layers.

    Args:
        layers: those that share the budget.
        log_budget: logarithm of what the product of the norms of the results may be.

    Returns:
        Weights of the shapes of the stored ones, differentiable in the stored ones.
    """
    weights = [layer.weight for layer in layers]
    advance = torch.is_grad_enabled()
    with torch.no_grad():
        values, gradients = zip(
            *[layer.norm_and_gradient(advance) for layer in layers], strict=True
        )
        norms = torch.stack(values).clamp_min(torch.finfo(torch.float64).tiny)
        excess = (norms.log().sum() - log_budget).clamp_min(0)
        factor = (-excess / len(layers)).exp().to(weights[0].dtype)
        unit = torch.cat(
            [(each / norm).flatten() for each, norm in zip(gradients, norms, strict=True)]
        )
        slope = torch.where(excess > 0, unit * factor / len(layers), 0.0).to(weights[0].dtype)
    if torch.is_grad_enabled():
        paired = torch.dot(slope, torch.cat([weight.flatten() for weight in weights]))
        factor = factor - (paired - paired.detach())
    return [weight * factor for weight in weights]
