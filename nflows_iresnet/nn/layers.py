"""Layers with a certified Lipschitz constant, and how weights are divided by their norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.linearization import WEIGHT_HOOKS, is_traced, run_weight_hooks
from nflows_iresnet.nn.balancing import as_factor, multiplied, share_of_budget
from nflows_iresnet.nn.bounds import conv_norm_bound, spectral_norm_bound
from nflows_iresnet.nn.cholesky_norm import default_norm
from nflows_iresnet.nn.conv_norms import ConvNorm, ConvPowerIteration, FourierNorm
from nflows_iresnet.nn.convolution import PaddingMode, convolve, validated_padding_mode
from nflows_iresnet.nn.norms import (
    NOT_FINITE,
    MatrixNorm,
    OperatorNorm,
    SchattenNorm,
    State,
    norms_of,
)
from nflows_iresnet.settings import SettingsInState
from nflows_iresnet.tensor_float import in_full_products
from nflows_iresnet.validation import validated_size


def validated_coeff(coeff: float) -> float:
    """Return a Lipschitz coefficient if it is in (0, 1)."""
    if isinstance(coeff, bool) or not isinstance(coeff, (int, float)) or not 0 < coeff < 1:
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

    Raises:
        ValueError: if rounding alone may spend the whole norm.
    """
    margin = _left_by_rounding(weight)
    if margin <= 0:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} is too wide for {dtype}: rounding may change "
            "its norm by as much as the norm itself, so nothing can be guaranteed; use float32, "
            "by .float()"
        )
    return margin


def _left_by_rounding(weight: Tensor) -> float:
    """Return `rounding_margin`, whether or not it leaves anything."""
    terms = min(weight.shape[:2]) * weight.shape[2:].numel()
    return 1 - 2 * torch.finfo(weight.dtype).eps * terms**0.5


class NormedLayer(nn.Module):
    """A layer with a weight whose norm it knows; mixed into a layer of torch."""

    weight: Tensor
    norm: OperatorNorm
    _norm_is_open = False

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

    def refuse_other_hooks(self) -> None:
        """Raise for hooks before a call that would never run: networks do not call their layers."""
        for hook in self._forward_pre_hooks.values():
            if not isinstance(hook, WEIGHT_HOOKS):
                raise ValueError(
                    f"{type(self).__name__} has a forward_pre_hook that would never run, {hook!r}: "
                    "the layers of a network are evaluated together. Use "
                    "torch.nn.utils.parametrize to change a weight, or a hook of the whole network"
                )

    def advance_norm(self) -> None:
        """Improve the buffers of the norm, in training mode; not inside `torch.func`."""
        is_writable = torch.compiler.is_compiling() or not is_traced()
        if self.training and self._state_names and is_writable:
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
        norm: the strategy for \|W\|_2; by default `cholesky_norm.default_norm` of the sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        norm: MatrixNorm | None = None,
    ) -> None:
        sizes = (
            validated_size("in_features", in_features),
            validated_size("out_features", out_features),
        )
        super().__init__(*sizes, bias=bias)
        self._adopt(norm if norm is not None else default_norm(*self.weight.shape), MatrixNorm)
        self._norm_is_open = norm is None


def adopt_norms(layers: Sequence[NormedLayer], saved: str) -> None:
    """Give layers that were built without a norm the default of the time when they were saved.

    It was `SchattenNorm()` for all sizes once: those weights are of the function with that norm.

    Args:
        layers: the layers.
        saved: the `repr` of the list of their norms.
    """
    defaults: list[list[OperatorNorm]] = [
        [default_norm(*layer.weight.shape[:2]) for layer in layers],
        [SchattenNorm() for _ in layers],
    ]
    norms = next((each for each in defaults if repr(each) == saved), None)
    if norms is not None and all(layer._norm_is_open for layer in layers):
        for layer, norm in zip(layers, norms, strict=True):
            layer.norm = norm


class LipschitzLinear(SettingsInState, NormedLinear):
    r"""x -> W x + b with \|W\|_2 <= coeff at every moment: W = V min(1, coeff / norm(V)).

    Stateless: the stored weight V may be anything, at any time, in any mode; the weight used is
    computed from it in each call.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        bias: whether to add a bias.
        coeff: the bound, in (0, 1).
        norm: an upper bound of the spectral norm; by default `CholeskyNorm()` for matrices of 256
            rows and columns or more, `SchattenNorm()` for others. With `PowerIteration` nothing is
            guaranteed.

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
        super().__init__(in_features, out_features, bias=bias, norm=norm)
        self.coeff = validated_coeff(coeff)

    def settings(self) -> Mapping[str, object]:
        """Return the coefficient and the norm."""
        return {"coeff": self.coeff, "norm": self.norm}

    def adopt(self, saved: Mapping[str, str]) -> None:
        """Take over the norm of an older default."""
        adopt_norms([self], f"[{saved.get('norm')}]")

    def effective_weight(self) -> Tensor:
        """Return W, the weight that is used, shape (out, in)."""
        return _divided(self, self.coeff)

    @in_full_products()
    def forward(self, inputs: Tensor) -> Tensor:
        """Return W x + b, shape (*, out)."""
        return F.linear(inputs, self.effective_weight(), self.bias)

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of the norm of the weight that is used."""
        return spectral_norm_bound(self.effective_weight())

    def extra_repr(self) -> str:
        """Show the sizes, the norm and the coefficient."""
        return f"{super().extra_repr()}, coeff={self.coeff}"


class NormedConv2d(NormedLayer, nn.Conv2d):
    r"""A convolution that keeps the image's size and knows a norm of its weight, but uses none.

    The building block of networks that normalise several layers together.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: odd.
        bias: whether to add a bias.
        padding_mode: 'zeros' or 'circular'.
        norm: the strategy for the operator norm.
    """

    padding_mode: PaddingMode

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        norm: ConvNorm,
    ) -> None:
        size = validated_kernel_size(kernel_size)
        super().__init__(
            validated_size("in_channels", in_channels),
            validated_size("out_channels", out_channels),
            size,
            padding=size // 2,
            bias=bias,
            padding_mode=validated_padding_mode(padding_mode),
        )
        if isinstance(norm, ConvPowerIteration) and norm.padding_mode != padding_mode:
            raise ValueError(
                f"the layer has padding_mode {padding_mode!r}, but its norm iterates with "
                f"{norm.padding_mode!r}; give {norm} the same"
            )
        self._adopt(norm, ConvNorm)


def validated_kernel_size(kernel_size: int) -> int:
    """Return the size of a kernel if it is odd."""
    if validated_size("kernel_size", kernel_size) % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd, got {kernel_size}: an even kernel has no centre, so it "
            "cannot keep the size of an image"
        )
    return int(kernel_size)


class LipschitzConv2d(SettingsInState, NormedConv2d):
    r"""x -> W * x + b with \|W *\| <= coeff at every moment, for images of every size.

    W = V min(1, coeff / norm(V)) of the stored V, with stride 1 and a padding that keeps the size.
    Stateless: the stored weight V may be anything, at any time, in any mode; the weight used is
    computed from it in each call, whatever the size of the images.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: odd.
        bias: whether to add a bias.
        padding_mode: 'zeros' or 'circular'.
        coeff: the bound, in (0, 1).
        norm: an upper bound of the operator norm; `FourierNorm()` by default. With
            `ConvPowerIteration` nothing is guaranteed.

    Raises:
        ValueError: if `coeff` is not in (0, 1), the kernel is even, or the padding mode is another.

    Example:
        >>> layer = LipschitzConv2d(3, 4, 3, coeff=0.9)
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(1e6)
        >>> layer(torch.zeros(2, 3, 8, 5)).shape
        torch.Size([2, 4, 8, 5])
        >>> layer.lipschitz_bound() <= 0.9
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        *,
        padding_mode: PaddingMode = "zeros",
        coeff: float = 0.97,
        norm: ConvNorm | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            bias=bias,
            padding_mode=padding_mode,
            norm=norm or FourierNorm(),
        )
        self.coeff = validated_coeff(coeff)

    def settings(self) -> Mapping[str, object]:
        """Return the coefficient, the norm and the padding."""
        return {"coeff": self.coeff, "norm": self.norm, "padding_mode": self.padding_mode}

    def effective_weight(self) -> Tensor:
        """Return W, the weight that is used, shape (out, in, k, k)."""
        return _divided(self, self.coeff)

    @in_full_products()
    def forward(self, input: Tensor) -> Tensor:
        """Return W * x + b, shape (B, out, H, W), or (out, H, W) for one image."""
        if input.dim() == 3:
            return self.forward(input[None])[0]
        return convolve(input, self.effective_weight(), self.padding_mode, self.bias)

    @torch.no_grad()
    def lipschitz_bound(self) -> float:
        """Return a certified upper bound of the norm of the convolution that is used."""
        return conv_norm_bound(self.effective_weight())

    def extra_repr(self) -> str:
        """Show the sizes, the norm and the coefficient."""
        return f"{super().extra_repr()}, coeff={self.coeff}"


def normalised(
    nets: Sequence[Sequence[NormedLayer]], log_budget: float
) -> tuple[list[Tensor], Tensor]:
    r"""Return the stored weights V_i and what to multiply them by, so that they keep a budget.

    f = min(1, exp(log_budget) / s)^{1/n} with s = prod_i norm(V_i): the product of the norms of the
    f V_i is at most exp(log_budget). Layers at the same place in several networks are normalised
    together: K networks cost hardly more than one.

    Args:
        nets: for each network the layers that share its budget; those at the same place have the
            same shape and norm.
        log_budget: logarithm of what the product of the norms of the f V_i may be.

    Returns:
        For each place the stored weights of all networks, shape (K, out, in), and the factors,
        shape (K,), differentiable in them, at least in float32.

    Raises:
        ValueError: if a weight is not finite, on the CPU; elsewhere the factor is not finite.
    """
    stacks, norms = weights_and_norms(nets)
    return stacks, as_factor(share_of_budget(norms, log_budget), stacks[0])


def weights_and_norms(nets: Sequence[Sequence[NormedLayer]]) -> tuple[list[Tensor], Tensor]:
    """Return stored weights and their norms, those at the same place in several networks together.

    Args:
        nets: for each network its layers; those at the same place have the same shape and norm.

    Returns:
        For each place the stored weights of all K networks, shape (K, out, in), and the norms,
        shape (places, K) in float64, positive and differentiable in the weights.

    Raises:
        ValueError: if a weight is not finite, on the CPU.
    """
    for layer in [layer for net in nets for layer in net]:
        run_weight_hooks(layer)
        if torch.is_grad_enabled():
            layer.advance_norm()
    places = list(zip(*nets, strict=True))
    stacks = [stacked(layer.weight for layer in place) for place in places]
    states = [[layer.norm_state() for layer in place] for place in places]
    norms = norms_of(stacks, [place[0].norm for place in places], states)
    _check_finite(norms)
    return stacks, norms.clamp_min(_TINY)


_TINY = torch.finfo(torch.float64).tiny


def _check_finite(norms: Tensor) -> None:
    """Say that training has diverged; only where asking costs nothing."""
    if norms.device.type == "cpu" and not is_traced() and not bool(norms.isfinite().all()):
        raise ValueError(f"the norm of a weight cannot be computed: {NOT_FINITE}")


def stacked(tensors: Iterable[Tensor]) -> Tensor:
    """Stack tensors of one shape along a new first dimension; a single one is not copied."""
    several = list(tensors)
    return several[0][None] if len(several) == 1 else torch.stack(several)


def _divided(layer: NormedLayer, coeff: float) -> Tensor:
    """Return the weight of a layer, divided by its norm where that exceeds a coefficient."""
    target = validated_coeff(coeff) * rounding_margin(layer.weight)
    (weight,), factor = normalised([[layer]], math.log(target))
    return multiplied(weight[0], factor)
