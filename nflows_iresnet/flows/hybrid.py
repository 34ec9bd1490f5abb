"""Residual blocks alternating with couplings or autoregressive transforms of nflows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    AffineCouplingTransform,
    MaskedAffineAutoregressiveTransform,
    PiecewiseRationalQuadraticCouplingTransform,
    ReversePermutation,
    Transform,
)
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.conditioning import check_context
from nflows_iresnet.flows.base import Expected, Flow, StandardNormal
from nflows_iresnet.flows.residual import start_from_data
from nflows_iresnet.logdet import LogDetEstimator
from nflows_iresnet.nn import LipschitzMLP, MatrixNorm
from nflows_iresnet.precision import context_like_weights, like_weights, training_precision
from nflows_iresnet.solvers import Solver
from nflows_iresnet.transforms import (
    ActNorm,
    CompositeTransform,
    ConditionalAffine,
    LinearTransform,
    ResidualTransform,
)
from nflows_iresnet.transforms.rational_quadratic import Bins
from nflows_iresnet.validation import validated_size

Partner = Callable[[int, int, int, int, int | None], Transform]
"""Makes the i-th transform that is no residual block from its index i, features, hidden_features,
num_blocks_per_layer and context_features."""


class HybridFlow(Flow):
    r"""Residual blocks alternating with partners that stretch: spline couplings by default.

    From data to noise, with T = `num_layers`:

        start, B_0, LU, P_0, LU, B_1, LU, P_1, ..., ActNorm    (T blocks B and P in all),

    where B_i is y = x + g(x), P_i = `partner(i, ...)`, LU a `LinearTransform`, and the start
    ActNorm, a spline of each feature from its quantiles, and whitening. An odd T ends with
    a residual block. What one kind cannot do, the other can: a residual block moves all features at
    once, by less than their distances; a coupling stretches without limit, but half of the features
    given the other half, whose roles alternate from one to the next. With a context it enters each
    g and each partner, and a `ConditionalAffine` map precedes each residual block; to forget it is
    an error.

    **When to pick it.** On tables, where a residual flow alone needs many blocks for what must be
    stretched. With 100,000 parameters and 150 CPU-seconds on CASP (45,730 x 10) 3 + 3 blocks
    reached -6.01 nats; with the same start and as many parameters spline couplings alone -5.39,
    residual blocks alone -5.62 to -5.74. On MAGIC, with 19,020 rows, residual blocks alone were
    better (3.70 against 3.85), and on 2-D densities, too. There is no Lipschitz constant of the
    whole: `lipschitz_bound()` certifies the residual blocks, and says infinity for all.

    **Cost.** A residual block costs as in `ResidualFlow`, a coupling one evaluation of its network
    both ways: half of the solves in sampling. An autoregressive partner samples with `features`
    evaluations. `GraphedStep` captures it with each of the ready-made partners, but not with the
    spline couplings and spline autoregressive transforms of nflows, which select by boolean masks.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.
        Chen, Behrmann, Duvenaud, Jacobsen. Residual flows for invertible generative modeling, 2019.

    Args:
        features: number of dimensions of the data; at least 2 for couplings.
        hidden_features: width of the hidden layers of each network.
        num_layers: number of residual blocks and partners together, T.
        num_blocks_per_layer: number of hidden layers of each g, and of residual blocks in the
            networks of the ready-made partners.
        context_features: number of context values, or None.
        partner: makes the transforms between the residual blocks: `spline_coupling`,
            `affine_coupling`, `masked_autoregressive`, one of them with other options by
            `functools.partial`, or your own, called with (index, features, hidden_features,
            num_blocks_per_layer, context_features), all by position.
        net: makes each g, see `ResidualFlow`.
        estimator: strategy for the log-determinant of residual blocks; `logdet.Auto()` by default.
        solver: strategy for their inverse; `solvers.Anderson()` by default.
        activation: of each g, see `ResidualFlow`.
        coeff: bound of the Lipschitz constant of each g, in (0, 1).
        norm: the norm that weights of each g are divided by, see `ResidualFlow`.
        recompute: trade time for memory, see `transforms.CompositeTransform`.
        marginal_bins: bins of the spline of each feature in the start; 0 leaves it out.

    Raises:
        ValueError: if a size is not positive, features cannot be split by the partner, or another
            argument is none of its kind.

    Example:
        >>> from functools import partial
        >>> flow = HybridFlow(features=3, hidden_features=16, num_layers=4)
        >>> flow.initialize(torch.randn(2000, 3) * 5 + 2)
        >>> flow.log_prob(torch.zeros(5, 3)).shape, flow.sample(3).shape
        (torch.Size([5]), torch.Size([3, 3]))
        >>> finer = HybridFlow(3, 16, 4, partner=partial(spline_coupling, num_bins=16))
        >>> autoregressive = HybridFlow(3, 16, 4, partner=masked_autoregressive)
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_layers: int,
        num_blocks_per_layer: int = 2,
        *,
        context_features: int | None = None,
        partner: Partner | None = None,
        net: Callable[..., nn.Module] = LipschitzMLP,
        estimator: LogDetEstimator | None = None,
        solver: Solver | None = None,
        activation: nn.Module | None = None,
        coeff: float = 0.97,
        norm: MatrixNorm | None = None,
        recompute: bool = False,
        marginal_bins: int = 16,
    ) -> None:
        features = validated_size("features", features)
        hidden = validated_size("hidden_features", hidden_features)
        depth = validated_size("num_blocks_per_layer", num_blocks_per_layer)
        make_partner = spline_coupling if partner is None else partner
        _require_maker("net", net, "a network for each block, as the class LipschitzMLP")
        _require_maker("partner", make_partner, "a transform, as the function spline_coupling")

        def residual() -> list[Transform]:
            branch = net(
                *(features, [hidden] * depth, context_features),
                activation=activation,
                coeff=coeff,
                norm=norm,
            )
            block = ResidualTransform(branch, estimator=estimator, solver=solver)
            if context_features is None:
                return [block]
            return [ConditionalAffine(features, context_features), block]

        layers = start_from_data(features, marginal_bins)
        for layer in range(validated_size("num_layers", num_layers)):
            if layer > 0:
                layers.append(LinearTransform(features))
            if layer % 2 == 0:
                layers += residual()
            else:
                sizes = (features, hidden, depth, context_features)
                layers.append(_built(make_partner, layer // 2, *sizes))
        layers.append(ActNorm(features))
        super().__init__(
            CompositeTransform(layers, recompute=recompute),
            StandardNormal([features]),
            expects=Expected((features,), context_features),
        )


def _require_maker(name: str, maker: object, example: str) -> None:
    if isinstance(maker, nn.Module) or not callable(maker):
        raise ValueError(f"{name} must make {example} does, got {maker!r}")


def _built(make: Partner, *sizes: Any) -> Transform:
    """Return a partner, built on the CPU: nflows looks at its masks, which "meta" has not."""
    device = torch.empty(0).device
    with torch.device("cpu"):
        partner: object = make(*sizes)
    if not isinstance(partner, Transform):
        raise ValueError(
            f"partner must return a Transform of nflows, but partner returned {partner!r}"
        )
    return partner if device.type == "cpu" else partner.to(device)


class SplineCoupling(PiecewiseRationalQuadraticCouplingTransform):
    """nflows' rational-quadratic coupling with linear tails, evaluated without masks and checks.

    The same parameters, state_dict and values. nflows selects what is inside of the bound by
    boolean masks, which wait for a GPU and cannot be captured in a graph, raises an AssertionError
    where rounding makes the discriminant of its inverse negative, refuses an empty batch, and
    computes in bfloat16 inside autocast. Here all are evaluated at values within the bound, what is
    outside stays as it is, and the discriminant is at least zero.

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
        if not 0 < bound < math.inf:
            raise ValueError(f"bound must be positive and finite, got {bound}; try 5.0")
        super().__init__(
            _alternating_mask(features, parity),
            _conditioner(hidden_features, num_blocks, context_features),
            num_bins=validated_size("num_bins", num_bins),
            tails="linear",
            tail_bound=float(bound),
        )
        self.context_features = context_features

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (outputs, logabsdet), shapes (B, features) and (B,)."""
        inputs, context = self._given(inputs, context)
        with training_precision(self, inputs.device, "anything"):
            outputs, logabsdet = super().forward(inputs, context)
        return outputs, logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (outputs, logabsdet), shapes (B, features) and (B,)."""
        inputs, context = self._given(inputs, context)
        with training_precision(self, inputs.device, "anything"):
            outputs, logabsdet = super().inverse(inputs, context)
        return outputs, logabsdet

    def _given(self, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        check_context(context, self.context_features)
        return like_weights(inputs, self), context_like_weights(context, self)

    def _coupling_transform(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the values and the sum of the logarithms of the slopes, (B, F) and (B,)."""
        bins, bound = self.num_bins, self.tail_bound
        of_each = transform_params.reshape(*inputs.shape, 3 * bins - 1)
        widths, heights, slopes = of_each.split([bins, bins, bins - 1], dim=-1)
        scale = math.sqrt(self.transform_net.hidden_features)
        across = _knots(widths / scale, bound, self.min_bin_width)
        along = _knots(heights / scale, bound, self.min_bin_height)
        slopes = F.pad(self.min_derivative + F.softplus(slopes), (1, 1), value=1.0)
        inside = inputs.clamp(-bound, bound)
        found = _bins(inside, along if inverse else across, across, along, slopes)
        if inverse:
            part = found.part_at(inside)
            values = found.left + part * found.width
            log_slopes = -found.value_and_log_slope(part)[1]
        else:
            values, log_slopes = found.value_and_log_slope((inside - found.left) / found.width)
        is_inside = inputs.abs() <= bound
        logabsdet = torch.where(is_inside, log_slopes, 0.0).sum(dim=1)
        return torch.where(is_inside, values, inputs), logabsdet


def _knots(raw: Tensor, bound: float, smallest: float) -> Tensor:
    """Return increasing knots from -bound to bound, (..., K + 1), from any numbers (..., K)."""
    parts = smallest + (1 - smallest * raw.shape[-1]) * raw.softmax(dim=-1)
    inner = 2 * bound * parts[..., :-1].cumsum(dim=-1) - bound
    return F.pad(F.pad(inner, (1, 0), value=-bound), (0, 1), value=bound)


def _bins(values: Tensor, knots: Tensor, across: Tensor, along: Tensor, slopes: Tensor) -> Bins:
    """Return the bins of values (...) between knots (..., K + 1), of one spline for each value.

    Args:
        values: x, or y for the inverse.
        knots: `across` for x, `along` for y.
        across: knots along x, shape (..., K + 1).
        along: their images, shape (..., K + 1).
        slopes: there, shape (..., K + 1).
    """
    index = (values[..., None] >= knots[..., 1:-1]).sum(dim=-1)[..., None, None]
    ends = [across[..., :-1], across.diff(), along[..., :-1], along.diff()]
    table = torch.stack([*ends, slopes[..., :-1], slopes[..., 1:]], dim=-1)
    found = table.gather(-2, index.expand(*values.shape, 1, 6))
    left, width, bottom, height, first, last = found.squeeze(-2).unbind(-1)
    mean = height / width
    return Bins(left, width, bottom, height, first, last, mean, first + last - 2 * mean)


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
    return AffineCouplingTransform(
        _alternating_mask(features, index % 2),
        _conditioner(hidden_features, num_blocks, context_features),
    )


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
    masked = MaskedAffineAutoregressiveTransform(
        features, hidden_features, context_features, num_blocks=num_blocks
    )
    return CompositeTransform([ReversePermutation(features), masked])


def _alternating_mask(features: int, parity: int) -> Tensor:
    if features < 2:
        raise ValueError(
            f"a coupling transforms one part of the features given the others, and features is "
            f"{features}: use partner=masked_autoregressive, or ResidualFlow"
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
