"""Layers with a certified Lipschitz constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.nn.bounds import spectral_norm_bound
from nflows_iresnet.nn.norms import MatrixNorm, SpectralNorm


def validated_coeff(coeff: float) -> float:
    """Return a Lipschitz coefficient if it is in (0, 1)."""
    if not 0 < coeff < 1:
        raise ValueError(
            f"coeff must be between 0 and 1, exclusive, got {coeff}: y = x + g(x) is guaranteed to "
            "be invertible only for Lip(g) < 1; try 0.97"
        )
    return float(coeff)


def rounding_margin(weight: Tensor) -> float:
    r"""Return by how much a target norm is lowered so that rounded weights still respect it.

    Rounding moves each entry by at most eps / 2 relatively, hence the 2-norm by at most
    eps \|W\|_F / 2 <= eps sqrt(rank) \|W\|_2 / 2. Three roundings and a reserve are allowed.
    """
    return 1 - 2 * torch.finfo(weight.dtype).eps * min(weight.shape) ** 0.5


class NormedLinear(nn.Linear):
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
        self.norm = norm
        state = norm.initial_state(self.weight.detach())
        self._state_names = tuple(state)
        for name, buffer in state.items():
            self.register_buffer(name, buffer)

    def weight_norm(self) -> Tensor:
        """Return the norm of the stored weight, a float64 scalar."""
        state = {name: getattr(self, name) for name in self._state_names}
        if self.training and torch.is_grad_enabled():
            self.norm.advance(self.weight, state)
        return self.norm(self.weight, state)

    def extra_repr(self) -> str:
        """Show the sizes and the norm."""
        return f"{super().extra_repr()}, norm={self.norm}"


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
        target = self.coeff * rounding_margin(self.weight)
        return self.weight * budget_factor(self.weight_norm(), target).to(self.weight.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return W x + b, shape (*, out)."""
        return F.linear(inputs, self.effective_weight(), self.bias)

    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of the norm of the weight that is used."""
        return spectral_norm_bound(self.effective_weight())

    def extra_repr(self) -> str:
        """Show the sizes, the norm and the coefficient."""
        return f"{super().extra_repr()}, coeff={self.coeff}"


def budget_factor(norm: Tensor, target: float) -> Tensor:
    """Return min(1, target / norm), 1 for a norm of zero."""
    return (target / norm.clamp_min(target)).clamp(max=1.0)
