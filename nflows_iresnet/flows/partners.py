"""What can stand between residual blocks: couplings and autoregressive transforms of nflows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    AffineCouplingTransform,
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    PiecewiseRationalQuadraticCouplingTransform,
    ReversePermutation,
    Transform,
)
from torch import Tensor, nn

from nflows_iresnet.conditioning import check_context
from nflows_iresnet.precision import (
    context_like_weights,
    full_precision,
    like_weights,
    training_precision,
)
from nflows_iresnet.settings import SettingsInState
from nflows_iresnet.transforms import CompositeTransform
from nflows_iresnet.transforms.conditional_splines import Family
from nflows_iresnet.validation import validated_bound, validated_size

Partner = Callable[[int, int, int, int, int | None], Transform]
"""Makes the i-th transform that is no residual block from its index i, features, hidden_features,
num_blocks_per_layer and context_features."""


class _OfNflows(Transform):
    """A transform of nflows that checks its context and computes in the precision of its weights,
    inside autocast, too.
    """

    context_features: int | None

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (outputs, logabsdet), shapes (B, features) and (B,)."""
        inputs, context = self._given(inputs, context)
        with training_precision(self, inputs.device, "anything"):
            outputs, logabsdet = super().forward(inputs, context)
        return outputs, logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (outputs, logabsdet), shapes (B, features) and (B,)."""
        inputs, context = self._given(inputs, context)
        with full_precision(inputs.device, "anything"):
            outputs, logabsdet = super().inverse(inputs, context)
        return outputs, logabsdet

    def _given(self, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        check_context(context, self.context_features)
        return like_weights(inputs, self), context_like_weights(context, self)


class _ConditionalSplines(SettingsInState, _OfNflows):
    """A transform of nflows by rational-quadratic splines, with its masks and checks mended.

    nflows selects what is inside of the bound by boolean masks, which wait for a GPU and cannot be
    captured in a graph, raises an AssertionError where rounding makes the discriminant of its
    inverse negative, and refuses an empty batch. Here all are evaluated at values within the bound
    by `Family`, what is outside stays as it is, and the discriminant is at least zero. Parameters
    and values are the same; the state says the bound, too.
    """

    num_bins: int
    tail_bound: float
    min_bin_width: float
    min_derivative: float
    _scale: float

    def _settle(self, context_features: int | None, scale: float = 1.0) -> None:
        """Take note of what the two kinds have in common, and check it.

        Args:
            context_features: number of context values, or None.
            scale: what the numbers for widths and heights are multiplied by.
        """
        self.context_features, self._scale = context_features, scale
        _ = self._family

    @property
    def _family(self) -> Family:
        least = self.min_bin_width, self.min_derivative
        return Family(self.num_bins, self.tail_bound, self._scale, *least)

    def settings(self) -> dict[str, object]:
        """Return what the splines depend on beside their parameters."""
        return {"bound": self.tail_bound}

    def extra_repr(self) -> str:
        """Describe the splines."""
        return f"num_bins={self.num_bins}, bound={self.tail_bound}"

    def _splines(self, values: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Return splines of values, or what they are splines of, and the sums of log-slopes."""
        return (self._family.inverse if inverse else self._family.forward)(values, numbers)


class AffineCoupling(_OfNflows, AffineCouplingTransform):
    """nflows' affine coupling, see `_OfNflows`."""


class AffineAutoregressive(_OfNflows, MaskedAffineAutoregressiveTransform):
    """nflows' masked affine autoregressive transform, see `_OfNflows`."""


class SplineCoupling(_ConditionalSplines, PiecewiseRationalQuadraticCouplingTransform):
    """nflows' rational-quadratic coupling with linear tails, see `_ConditionalSplines`.

    Args:
        features: number of features, at least 2.
        hidden_features: width of its network.
        num_blocks: residual blocks of its network, of two layers each.
        context_features: number of context values, or None.
        parity: 0 to transform the features 0, 2, ... given the others, 1 to transform 1, 3, ...
        num_bins: bins of each spline.
        bound: the splines act within [-bound, bound].

    Raises:
        ValueError: if there is one feature, which cannot be split.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_blocks: int,
        context_features: int | None,
        *,
        parity: int,
        num_bins: int,
        bound: float,
    ) -> None:
        super().__init__(
            _alternating_mask(features, parity),
            _conditioner(hidden_features, num_blocks, context_features),
            num_bins=validated_size("num_bins", num_bins),
            tails="linear",
            tail_bound=validated_bound(bound, 5.0),
        )
        self._settle(context_features, 1 / math.sqrt(hidden_features))

    def _coupling_transform(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        return self._splines(inputs, transform_params, inverse)


class SplineAutoregressive(
    _ConditionalSplines, MaskedPiecewiseRationalQuadraticAutoregressiveTransform
):
    """nflows' rational-quadratic autoregressive transform, see `_ConditionalSplines`.

    Its inverse evaluates its network once for each feature.

    Args:
        features: number of features.
        hidden_features: width of its network.
        num_blocks: residual blocks of its network, of two layers each.
        context_features: number of context values, or None.
        num_bins: bins of each spline.
        bound: the splines act within [-bound, bound].
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_blocks: int,
        context_features: int | None,
        *,
        num_bins: int,
        bound: float,
    ) -> None:
        super().__init__(
            *(features, hidden_features, context_features),
            num_bins=validated_size("num_bins", num_bins),
            tails="linear",
            tail_bound=validated_bound(bound, 5.0),
            num_blocks=num_blocks,
        )
        self._settle(context_features)

    def _elementwise(
        self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        return self._splines(inputs, autoregressive_params, inverse)


def spline_coupling(
    index: int,
    features: int,
    hidden_features: int,
    num_blocks: int,
    context_features: int | None = None,
    *,
    num_bins: int = 8,
    bound: float = 5.0,
) -> Transform:
    """Make a coupling by rational-quadratic splines, as in neural spline flows.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.

    Args:
        index: which features it transforms alternates with it.
        features: number of features, at least 2.
        hidden_features: width of its network.
        num_blocks: residual blocks of its network, of two layers each.
        context_features: number of context values, or None.
        num_bins: bins of each spline.
        bound: the splines act within [-bound, bound], beyond is the identity.

    Raises:
        ValueError: if there is one feature.
    """
    return SplineCoupling(
        *(features, hidden_features, num_blocks, context_features),
        parity=index % 2,
        num_bins=num_bins,
        bound=bound,
    )


def affine_coupling(
    index: int,
    features: int,
    hidden_features: int,
    num_blocks: int,
    context_features: int | None = None,
) -> Transform:
    """Make an affine coupling of nflows, as in Real NVP; for the arguments see `spline_coupling`.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP, 2017.

    Raises:
        ValueError: if there is one feature.
    """
    coupling = AffineCoupling(
        _alternating_mask(features, index % 2),
        _conditioner(hidden_features, num_blocks, context_features),
    )
    coupling.context_features = context_features
    return coupling


def masked_autoregressive(
    index: int,
    features: int,
    hidden_features: int,
    num_blocks: int,
    context_features: int | None = None,
) -> Transform:
    """Make a masked affine autoregressive transform of nflows, after a reversal of the features.

    For the arguments see `spline_coupling`; what is given what alternates by the reversals. Its
    inverse, and so sampling, evaluates its network once for each feature.

    References:
        Papamakarios, Pavlakou, Murray. Masked autoregressive flow for density estimation, 2017.
    """
    masked = AffineAutoregressive(
        features, hidden_features, context_features, num_blocks=num_blocks
    )
    masked.context_features = context_features
    return CompositeTransform([ReversePermutation(features), masked])


def spline_autoregressive(
    index: int,
    features: int,
    hidden_features: int,
    num_blocks: int,
    context_features: int | None = None,
    *,
    num_bins: int = 8,
    bound: float = 3.0,
) -> Transform:
    """Make a masked autoregressive transform by splines, after a reversal of the features.

    For the arguments see `spline_coupling`, for its inverse `masked_autoregressive`; one feature
    is enough. The bound is that of the paper for tables.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.
    """
    sizes = (features, hidden_features, num_blocks, context_features)
    masked = SplineAutoregressive(*sizes, num_bins=num_bins, bound=bound)
    return CompositeTransform([ReversePermutation(features), masked])


def _alternating_mask(features: int, parity: int) -> Tensor:
    if features < 2:
        raise ValueError(
            f"a coupling transforms one part of the features given the others, and features is "
            f"{features}: use partner=spline_autoregressive, or ResidualFlow"
        )
    return (torch.arange(features) % 2 == parity).long()


def _conditioner(
    hidden_features: int, num_blocks: int, context_features: int | None
) -> Callable[[int, int], nn.Module]:
    """Return what makes the network of a coupling from its numbers of inputs and outputs."""

    def make(in_features: int, out_features: int) -> nn.Module:
        return ResidualNet(
            *(in_features, out_features, hidden_features),
            context_features=context_features,
            num_blocks=num_blocks,
        )

    return make
