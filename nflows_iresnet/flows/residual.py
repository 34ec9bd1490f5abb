"""Named models: residual blocks, what stands between them, a normal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nflows.transforms import Transform
from torch import nn

from nflows_iresnet.flows.base import Expected, Flow, StandardNormal
from nflows_iresnet.logdet import Gaussian, LogDetEstimator, PowerSeries
from nflows_iresnet.nn import ELU, LipschitzMLP, MatrixNorm
from nflows_iresnet.solvers import FixedPointIteration, Solver
from nflows_iresnet.transforms import (
    ActNorm,
    CompositeTransform,
    ConditionalAffine,
    ElementwiseRationalQuadraticSpline,
    LinearTransform,
    ResidualTransform,
)
from nflows_iresnet.validation import validated_bins, validated_size


def start_from_data(
    features: int, marginal_bins: int = 16, *, linear: bool = True
) -> list[Transform]:
    """Return ActNorm, a spline of each feature, and a linear map that whitens.

    Started from rows by `transforms.initialize`, or by the first batch, they return features of
    nearly normal marginals, mean 0 and covariance I.

    Args:
        features: number of features.
        marginal_bins: bins of the splines; 0 leaves them out.
        linear: whether there is the linear map.

    Raises:
        ValueError: if a size is not positive, or `marginal_bins` negative.
    """
    splines = quantile_splines("marginal_bins", features, marginal_bins)
    whitening = [LinearTransform(features, initialization="whitening")] if linear else []
    bound = splines[0].bound if splines else None
    return [ActNorm(features, bound=bound), *splines, *whitening]


def quantile_splines(name: str, features: int, num_bins: int) -> list[Transform]:
    """Return the spline of each feature, or channel, that starts at the quantiles; none for 0."""
    if (bins := validated_bins(name, num_bins)) == 0:
        return []
    return [ElementwiseRationalQuadraticSpline(features, bins, initialization="quantiles")]


def block_bins_of(given: int | None, *, pays: bool) -> int:
    """Return the bins of the splines before blocks: what was given, or 8 where they pay."""
    if given is None:
        return 8 if pays else 0
    return validated_bins("block_bins", given)


class ResidualFlow(Flow):
    r"""A residual flow for vectors: blocks y = x + g(x), and what such blocks cannot do between.

    A block moves points by less than their distances: many are needed to stretch, to whiten, or to
    change the shape of a marginal. So from data to noise there are

    1. `ActNorm`, so that rows of any scale are of unit scale;
    2. a spline of each feature that starts at the quantiles: marginals become normal, or nearly;
    3. a `LinearTransform` that starts by whitening, then the first block;
    4. before each other block a `LinearTransform`, started as the identity, and from three
       features another spline (`block_bins`): in two dimensions they gain little, and a step would
       take a third longer; so it does in 784, where the start from 5,000 rows takes 11 seconds
       instead of 4, but there they gain most;
    5. `ActNorm`, so that what the blocks return starts with the scale of the noise.

    The start comes from the first batch in training mode, or better from some thousand rows by
    `initialize(rows)`. It is made not to be worse for unseen rows than none, see the parts: few
    rows, constants, discrete, dependent or heavy-tailed features start less. One value of 1e8 is
    the scale of its feature, though: drop or clip it, or take logarithms.

    `marginal_bins=0, linear=False` is the flow of the papers: ActNorm before each block, and after
    the last. All numbers: docs/measurements.md.

    With a context, a `ConditionalAffine` map stands before each block, and at the end: after the
    splines and linear maps, which know p(x) alone and are started without the context, so that it
    acts on features of unit scale. To forget the context is an error: without one it would be
    another density. With `optional_context=True` it is that density.

    Takes the four sizes of nflows' `SimpleRealNVP` and `MaskedAutoregressiveFlow` in their order,
    so that one line swaps the model, and all else by keyword.

    References:
        Chen, Behrmann, Duvenaud, Jacobsen. Residual flows for invertible generative modeling, 2019.
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.

    Args:
        features: number of dimensions of the data.
        hidden_features: width of the hidden layers of each g.
        num_layers: number of residual blocks.
        num_blocks_per_layer: number of hidden layers of each g.
        context_features: number of context values, or None.
        optional_context: whether it may be called without its context, too.
        net: makes each g, as `LipschitzMLP` and `LipschitzDenseNet` do, from (features, widths of
            hidden layers, context_features) and the keywords activation, coeff, norm and
            optional_context.
        estimator: strategy for the log-determinant; `logdet.Auto()` by default.
        solver: strategy for the inverse; `solvers.Anderson()` by default.
        activation: a unit-wise activation of `nflows_iresnet.nn`; by default
            `Mixed(Sine(), SmoothAbs())`.
        coeff: bound of the Lipschitz constant of each g, in (0, 1).
        norm: the norm that weights are divided by; by default `CholeskyNorm()` for
            matrices of 256 rows and columns or more, `SchattenNorm()` for others.
        recompute: trade time for memory, see `transforms.CompositeTransform`.
        marginal_bins: bins of the spline of each feature; 0 leaves the splines out.
        linear: whether there are linear maps; without, there is an ActNorm before each block.
        block_bins: bins of a further spline of each feature before each block but the first, after
            its linear map; 0 for none. By default 8 from three features, and none in two, nor where
            one of the two above is left out.

    Raises:
        ValueError: if a size is not positive or another argument is none of its kind.

    Example:
        >>> import torch
        >>> flow = ResidualFlow(features=2, hidden_features=32, num_layers=2)
        >>> flow.log_prob(torch.zeros(5, 2)).shape, flow.sample(3).shape
        (torch.Size([5]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_layers: int,
        num_blocks_per_layer: int = 2,
        *,
        context_features: int | None = None,
        optional_context: bool = False,
        net: Callable[..., nn.Module] = LipschitzMLP,
        estimator: LogDetEstimator | None = None,
        solver: Solver | None = None,
        activation: nn.Module | None = None,
        coeff: float = 0.97,
        norm: MatrixNorm | None = None,
        recompute: bool = False,
        marginal_bins: int = 16,
        linear: bool = True,
        block_bins: int | None = None,
    ) -> None:
        features = validated_size("features", features)
        pays = features > 2 and linear and marginal_bins != 0
        block_bins = block_bins_of(block_bins, pays=pays)
        hidden = validated_size("hidden_features", hidden_features)
        depth = validated_size("num_blocks_per_layer", num_blocks_per_layer)
        if isinstance(net, nn.Module) or not callable(net):
            raise ValueError(
                f"net must make a network for each block, as the class LipschitzMLP does, got "
                f"{net!r}"
            )
        make = partial(
            net,
            features,
            [hidden] * depth,
            context_features,
            optional_context=optional_context,
            activation=activation,
            coeff=coeff,
            norm=norm,
        )
        between = _Between(features, context_features, optional_context, linear, block_bins)
        layers: list[Transform] = []
        for index in range(validated_size("num_layers", num_layers)):
            block = ResidualTransform(make(), estimator=estimator, solver=solver)
            before = between.before_first(marginal_bins) if index == 0 else between.before_next()
            layers += [*before, block]
        super().__init__(
            CompositeTransform([*layers, *between.after_last()], recompute=recompute),
            StandardNormal([features]),
            expects=Expected((features,), context_features, optional_context),
        )


@dataclass(frozen=True)
class _Between:
    """What stands before each block of a `ResidualFlow`, and after the last."""

    features: int
    context_features: int | None
    optional_context: bool
    linear: bool
    block_bins: int

    def before_first(self, marginal_bins: int) -> list[Transform]:
        start = start_from_data(self.features, marginal_bins, linear=self.linear)
        return [*start, *self._conditional()]

    def before_next(self) -> list[Transform]:
        mixing = LinearTransform(self.features) if self.linear else ActNorm(self.features)
        splines = quantile_splines("block_bins", self.features, self.block_bins)
        return [mixing, *splines, *self._conditional()]

    def after_last(self) -> list[Transform]:
        return [ActNorm(self.features), *self._conditional()]

    def _conditional(self) -> list[Transform]:
        if self.context_features is None:
            return []
        optional = self.optional_context
        return [ConditionalAffine(self.features, self.context_features, optional_context=optional)]


class InvertibleResNet(ResidualFlow):
    r"""The i-ResNet of Behrmann et al.: truncated series, spectral normalisation, plain iteration.

    The difference to `ResidualFlow` is that there are no splines, and in the strategies: the power
    series cut after `num_terms` terms (biased by at most `estimator.bias_bound(coeff, features)`
    nats per block) with Gaussian probes as in the paper, ELU activations, and fixed-point iteration
    for the inverse. Two things are stricter than in the paper: the norm is exact, not estimated by
    power iteration, so that the certificate holds, and `coeff` bounds each whole g, not each layer.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen. Invertible residual networks, 2019.

    Args:
        features: number of dimensions of the data.
        hidden_features: width of the hidden layers of each g.
        num_layers: number of residual blocks.
        num_blocks_per_layer: number of hidden layers of each g.
        context_features: number of context values, or None.
        optional_context: whether it may be called without its context, too.
        net: makes each g, see `ResidualFlow`.
        coeff: c, the bound of Lip(g); the paper uses 0.5 to 0.99.
        num_terms: terms of the power series.
        norm: the norm that weights are divided by; `nn.PowerIteration()` is the paper's, and
            guarantees nothing.
        estimator: replaces the power series.
        solver: strategy for the inverse; `solvers.FixedPointIteration()` by default.
        activation: a unit-wise activation of `nflows_iresnet.nn`; `ELU()` by default.
        recompute: trade time for memory, see `transforms.CompositeTransform`.

    Example:
        >>> flow = InvertibleResNet(features=2, hidden_features=32, num_layers=2, coeff=0.9)
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_layers: int,
        num_blocks_per_layer: int = 2,
        *,
        context_features: int | None = None,
        optional_context: bool = False,
        net: Callable[..., nn.Module] = LipschitzMLP,
        coeff: float = 0.9,
        num_terms: int = 10,
        norm: MatrixNorm | None = None,
        estimator: LogDetEstimator | None = None,
        solver: Solver | None = None,
        activation: nn.Module | None = None,
        recompute: bool = False,
    ) -> None:
        series = PowerSeries(num_terms=num_terms, probe=Gaussian(), exact_trace=False)
        super().__init__(
            features,
            hidden_features,
            num_layers,
            num_blocks_per_layer,
            context_features=context_features,
            optional_context=optional_context,
            net=net,
            estimator=series if estimator is None else estimator,
            solver=FixedPointIteration() if solver is None else solver,
            activation=ELU() if activation is None else activation,
            coeff=coeff,
            norm=norm,
            recompute=recompute,
            marginal_bins=0,
            linear=False,
        )
