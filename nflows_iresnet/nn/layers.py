"""Layers with a certified Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.linearization import is_traced
from nflows_iresnet.nn.bounds import spectral_norm_bound
from nflows_iresnet.nn.norms import NOT_FINITE, MatrixNorm, OperatorNorm, State
from nflows_iresnet.nn.schatten import SchattenNorm


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
        if type(norm).__hash__ is None:
            raise ValueError(f"{norm!r} must be hashable: make its class a frozen dataclass")
        self.norm = norm
        state = norm.initial_state(self.weight.detach())
        self._state_names = tuple(state)
        for name, buffer in state.items():
            self.register_buffer(name, buffer)

    def advance_norm(self) -> None:
        """Improve the buffers of the norm, in training mode."""
        if self.training and self._state_names:
            self.norm.advance(self.weight, self.norm_state())

    def norm_state(self) -> State:
        """Return the buffers of the norm."""
        return {name: getattr(self, name) for name in self._state_names}

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
        norm: an upper bound of the spectral norm; `SchattenNorm()` by default. With
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
        super().__init__(in_features, out_features, bias=bias, norm=norm or SchattenNorm())
        self.coeff = validated_coeff(coeff)

    def effective_weight(self) -> Tensor:
        """Return W, the weight that is used, shape (out, in)."""
        log_target = math.log(self.coeff * rounding_margin(self.weight))
        (weight,), factor = normalised([[self]], log_target)
        return weight[0] * factor

    def forward(self, inputs: Tensor) -> Tensor:
        """Return W x + b, shape (*, out)."""
        return F.linear(inputs, self.effective_weight(), self.bias)

    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of the norm of the weight that is used."""
        return spectral_norm_bound(self.effective_weight())

    def extra_repr(self) -> str:
        """Show the sizes, the norm and the coefficient."""
        return f"{super().extra_repr()}, coeff={self.coeff}"


def normalised(
    nets: Sequence[Sequence[NormedLayer]], log_budget: float
) -> tuple[list[Tensor], Tensor]:
    r"""Return the stored weights V_i and f = min(1, exp(log_budget) / s)^{1/n}, s = prod norm(V_i).

    Layers at the same place in several networks are normalised together: K networks cost hardly
    more than one. All norms are computed without a graph. By Euler's theorem (see `OperatorNorm`)
    the derivative of log s = sum_i log norm(V_i) is that of t = sum_i <N_i, V_i> with N_i = grad
    norm(V_i) / norm(V_i) held constant, so the factor f has the value computed in float64 and the
    derivative -f / n dt where the budget is exceeded.

    Args:
        nets: for each network the layers that share its budget; those at the same place have the
            same shape and norm.
        log_budget: logarithm of what the product of the norms of the f V_i may be.

    Returns:
        For each place the stored weights of all networks, shape (K, out, in), and the factors,
        shape (K,), differentiable in them.
    """
    places = list(zip(*nets, strict=True))
    stacks = [stacked(layer.weight for layer in place) for place in places]
    if torch.is_grad_enabled():
        for layer in chain.from_iterable(places):
            layer.advance_norm()
    with torch.no_grad(), torch.autocast(stacks[0].device.type, enabled=False):
        values, gradients = _norms_and_gradients(places, stacks)
        _check_finite(values)
        norms = values.clamp_min(_TINY)
        excess = (norms.log().sum(0) - log_budget).clamp_min(0)
        factors = (-excess / len(places)).exp()
        rates = torch.where(excess > 0, factors / len(places), 0.0) / norms
        factors, rates = factors.to(stacks[0].dtype), rates.to(stacks[0].dtype)
    if torch.is_grad_enabled():
        changes = torch.stack(
            [
                (gradient.to(stack.dtype) * stack).flatten(start_dim=1).sum(1)
                for gradient, stack in zip(gradients, stacks, strict=True)
            ]
        )
        paired = (rates * changes).sum(0)
        factors = factors - (paired - paired.detach())
    return stacks, factors


_TINY = torch.finfo(torch.float64).tiny


def _check_finite(norms: Tensor) -> None:
    """Say that training has diverged; only where asking costs nothing."""
    if norms.device.type == "cpu" and not is_traced() and not bool(norms.isfinite().all()):
        raise ValueError(f"the norm of a weight cannot be computed: {NOT_FINITE}")


def stacked(tensors: Iterable[Tensor]) -> Tensor:
    """Stack tensors of one shape along a new first dimension; a single one is not copied."""
    several = list(tensors)
    return several[0][None] if len(several) == 1 else torch.stack(several)


def _norms_and_gradients(
    places: Sequence[Sequence[NormedLayer]], stacks: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the norms (places, K) and their gradients; places of one size are taken together."""
    groups: dict[object, list[int]] = {}
    for index, (place, stack) in enumerate(zip(places, stacks, strict=True)):
        is_plain_matrix = stack.dim() == 3 and not place[0].norm_state()
        size = tuple(sorted(stack.shape[1:])) if is_plain_matrix else ("place", index)
        groups.setdefault((place[0].norm, size), []).append(index)
    of_place: dict[int, tuple[Tensor, Tensor]] = {}
    for indices in groups.values():
        pairs = _of_one_size([places[i] for i in indices], [stacks[i] for i in indices])
        of_place.update(zip(indices, pairs, strict=True))
    values, gradients = zip(*[of_place[index] for index in range(len(places))], strict=True)
    return torch.stack(values), list(gradients)


def _of_one_size(
    places: Sequence[Sequence[NormedLayer]], stacks: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return norms and gradients of stacks of weights that differ by a transposition at most."""
    is_turned = [stack.shape != stacks[0].shape for stack in stacks]
    alike = [stack.mT if turned else stack for stack, turned in zip(stacks, is_turned, strict=True)]
    states = [layer.norm_state() for layer in chain.from_iterable(places)]
    together = alike[0] if len(alike) == 1 else torch.cat(alike)
    values, gradients = places[0][0].norm.of_stack(together, states)
    count = len(stacks[0])
    parts = zip(values.split(count), gradients.split(count), is_turned, strict=True)
    return [(value, each.mT if turned else each) for value, each, turned in parts]
