"""The models of the comparisons by name, and the search that gives them equally many parameters.

A model is one entry, of `MODELS` for rows of a table or of `IMAGE_MODELS` for images: what builds
its flow at a given size. All commands take it from there; `adapters` finds the face for the library
of the flow. Nothing here imports torch before a model is built.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nflows.transforms import Transform
    from torch import Tensor, nn

    from nflows_iresnet.experiments.adapters import DensityModel

REFERENCE = "residual-flow"
TOLERANCE = 0.1
SAME_START = "-same-start"
"""After the name of a model for rows: with this library's start in front of it."""
_WIDEST = 2**14
_SAME = 0.01
"""Counts this close keep the width of the reference, which saves the search."""


@dataclass(frozen=True)
class Architecture:
    """The size of a model for rows of a table.

    Args:
        features: dimensions of the data.
        hidden_features: width of the hidden layers.
        num_layers: transforms in the flow.
        num_blocks_per_layer: depth of the network in each transform.
    """

    features: int
    hidden_features: int
    num_layers: int
    num_blocks_per_layer: int

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        """The models that are built by such a size."""
        return MODELS

    def as_tuple(self) -> tuple[int, int, int, int]:
        """Return the four arguments in the order that nflows' flows take them."""
        return self.features, self.hidden_features, self.num_layers, self.num_blocks_per_layer


@dataclass(frozen=True)
class ImageArchitecture(Architecture):
    """The size of a model for images; `num_layers` counts the steps of one scale.

    Args:
        shape: channels, height and width of the images.
        levels: how many values a pixel can take.
        num_scales: how often the image is squeezed and half of it factored out.
        half_precision: whether networks compute in bfloat16 while training.
        alpha: of the logit in front of every model.
        marginal_bins: bins of the splines of residual-flow, which then has 1x1 convolutions; or 0.
        num_terms: of the power series that residual-flow is trained by, 0 for its default.
    """

    shape: tuple[int, int, int]
    levels: int
    num_scales: int
    half_precision: bool = False
    alpha: float = 0.05
    marginal_bins: int = 0
    num_terms: int = 0

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        """The models that are built by such a size."""
        return IMAGE_MODELS


Build = Callable[[Any], "nn.Module"]
"""Makes a fresh flow of an `Architecture`, or of an `ImageArchitecture`."""


@dataclass(frozen=True)
class ModelSpec:
    """A model of the comparisons.

    Args:
        description: one line for `--list`.
        build_flow: makes a fresh flow of nflows, this library, zuko or normflows of a given size,
            or a `DensityModel` of your own.
        is_coarse: whether a single hidden unit can have more parameters than the tolerance, so that
            the nearest count has to do.
        has_start: whether this library's start is part of it.
    """

    description: str
    build_flow: Build
    is_coarse: bool = False
    has_start: bool = False

    def build(self, size: Architecture) -> DensityModel:
        """Make a fresh model of a given size."""
        from nflows_iresnet.experiments.adapters import as_density_model

        return as_density_model(self.build_flow(size))


def find_model(name: str, known: Mapping[str, ModelSpec] | None = None) -> ModelSpec:
    """Look a model up by name, in `MODELS` unless told otherwise; for rows also NAME-same-start.

    Raises:
        ValueError: there is no such model; the message names the nearest one.
    """
    known = MODELS if known is None else known
    if name in known:
        return known[name]
    plain = name.removesuffix(SAME_START)
    if plain not in known or known is not MODELS:
        from nflows_iresnet.experiments.config import suggest

        raise ValueError(f"unknown model {name!r}: {suggest(name, known)}")
    if known[plain].has_start:
        raise ValueError(f"unknown model {name!r}: {plain!r} has this start itself")
    return same_start(known[plain])


def same_start(spec: ModelSpec) -> ModelSpec:
    """Return a model for rows with the start of this library's flows in front of it.

    That is ActNorm, a spline of each feature from its quantiles, and whitening: with it in front of
    all, a comparison says what the blocks do. Its parameters count as the model's.
    """

    def build(size: Architecture) -> nn.Module:
        from nflows_iresnet.experiments.adapters import StartedModel
        from nflows_iresnet.flows.residual import start_from_data
        from nflows_iresnet.transforms import CompositeTransform

        start = CompositeTransform(start_from_data(size.features))
        return StartedModel(start, spec.build(size))

    description = f"{spec.description}; this library's start in front"
    return replace(spec, description=description, build_flow=build, has_start=True)


def with_same_start(names: Iterable[str]) -> tuple[str, ...]:
    """Return names of models for rows, each followed by itself with the start in front.

    Those that have this start anyway are not repeated.

    Example:
        >>> with_same_start(["hybrid", "maf"])
        ('hybrid', 'maf', 'maf-same-start')
    """
    every: list[str] = []
    for name in names:
        every.append(name)
        if name in MODELS and not MODELS[name].has_start:
            every.append(name + SAME_START)
    return tuple(dict.fromkeys(every))


def count_parameters(model: nn.Module) -> int:
    """Count the numbers that the optimiser trains."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def match_parameters(name: str, reference: Architecture) -> Architecture:
    """Find the width at which a model has as many parameters as the residual flow of a given size.

    Args:
        name: a name in `reference.models`.
        reference: the size of the residual flow.

    Returns:
        The same size with another `hidden_features`.

    Raises:
        ValueError: no width comes within 10% of the count, and the model is not coarse.
    """
    best, count, target = _nearest(name, reference)
    if not (_is_near(count, target) or find_model(name, reference.models).is_coarse):
        now = reference.hidden_features
        wider = (replace(reference, hidden_features=factor * now) for factor in (2, 4, 8, 16, 32))
        fits = (each for each in wider if _is_near(*_nearest(name, each)[1:]))
        enough = next((f" {each.hidden_features}" for each in fits), "")
        raise ValueError(
            f"model {name!r} cannot match the {target} parameters of {REFERENCE}: the nearest is "
            f"{count} with {best} hidden features; give --hidden-features{enough} (now {now}) or "
            f"other --num-layers (now {reference.num_layers})"
        )
    return replace(reference, hidden_features=best)


def _is_near(count: int, target: int) -> bool:
    return abs(count - target) <= TOLERANCE * target


def _nearest(name: str, reference: Architecture) -> tuple[int, int, int]:
    """Return the width whose count comes nearest, that count, and the one to come near to."""
    target, own = _count(REFERENCE, reference), _count(name, reference)
    if abs(own - target) <= _SAME * target:
        return reference.hidden_features, own, target

    def count_at(width: int) -> int:
        return _count(name, replace(reference, hidden_features=width))

    high = 2
    while count_at(high) < target and high < _WIDEST:
        high *= 2
    between = range(high // 2 + 1, high)
    enough = between.start + bisect_left(between, target, key=count_at)
    best = min((enough - 1, enough), key=lambda width: abs(count_at(width) - target))
    return best, count_at(best), target


@lru_cache(maxsize=1024)
def _count(name: str, size: Architecture) -> int:
    import torch

    with torch.random.fork_rng(devices=[]):
        return count_parameters(find_model(name, size.models).build(size))


# --- models for rows ------------------------------------------------------------------------------


def _class(name: str, **options: Any) -> Build:
    """Return what builds a flow of a "module:class" whose size is given as to nflows' flows."""
    return lambda size: resolve_name(name)(*size.as_tuple(), **options)


def _nflows(transform: Callable[[Architecture], Transform]) -> Build:
    """Return what builds a flow of nflows from its transform, data to noise."""

    def build(size: Architecture) -> nn.Module:
        from nflows.distributions import StandardNormal
        from nflows.flows import Flow

        return Flow(transform(size), StandardNormal([size.features]))

    return build


def _nice_scaled(size: Architecture) -> Transform:
    """NICE as published: after the couplings a diagonal scaling, started from the data."""
    from nflows.flows import SimpleRealNVP
    from nflows.transforms import CompositeTransform

    from nflows_iresnet.transforms import ActNorm

    couplings = SimpleRealNVP(*size.as_tuple(), use_volume_preserving=True)._transform
    return CompositeTransform([couplings, ActNorm(size.features)])


def _realnvp_scaled(size: Architecture) -> Transform:
    """Real NVP with ActNorm before each coupling, as the paper has batch normalisation.

    The scales of nflows' couplings are sigmoid(u + 2) + 0.001: without that no layer can expand.
    """
    from nflows.flows import SimpleRealNVP
    from nflows.transforms import CompositeTransform

    from nflows_iresnet.transforms import ActNorm

    couplings = SimpleRealNVP(*size.as_tuple())._transform._transforms
    steps = [each for coupling in couplings for each in (ActNorm(size.features), coupling)]
    return CompositeTransform(steps)


def _made(size: Architecture) -> Transform:
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    features, hidden_features, _, num_blocks = size.as_tuple()
    return MaskedAffineAutoregressiveTransform(features, hidden_features, num_blocks=num_blocks)


def _glow(size: Architecture) -> Transform:
    from nflows.transforms import CompositeTransform

    return CompositeTransform([glow_step(size, layer % 2) for layer in range(size.num_layers)])


def glow_step(size: Architecture, parity: int) -> Transform:
    """Build Glow's step for vectors: ActNorm, LU-parametrised linear map, affine coupling.

    The coupling transforms the features of one parity. ActNorm and the linear map are this
    library's: nflows' divides by zero where a feature is constant in the first batch, and its map
    copies from the host at each call.

    References:
        Kingma and Dhariwal, Glow: Generative Flow with Invertible 1x1 Convolutions, 2018.
    """
    from nflows.transforms import AffineCouplingTransform, CompositeTransform

    from nflows_iresnet.transforms import ActNorm, LinearTransform

    coupling = _coupling(AffineCouplingTransform, size, parity)
    return CompositeTransform([ActNorm(size.features), LinearTransform(size.features), coupling])


def _coupling(kind: type[Any], size: Architecture, parity: int, **options: Any) -> Transform:
    """Build a coupling of nflows that transforms every other feature."""
    import torch
    from nflows.nn.nets import ResidualNet

    def net(in_features: int, out_features: int) -> nn.Module:
        return ResidualNet(
            in_features, out_features, size.hidden_features, num_blocks=size.num_blocks_per_layer
        )

    mask = torch.arange(size.features) % 2 == parity
    return kind(mask.long(), net, **options)


_SPLINES = {"num_bins": 8, "tails": "linear", "tail_bound": 3.0}
"""Of RQ-NSF, as in the paper for tables."""


def _spline_coupling(size: Architecture, layer: int) -> Transform:
    """RQ-NSF (C): couplings by splines, and splines of the features that they are given."""
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform as Coupling

    return _coupling(Coupling, size, layer % 2, apply_unconditional_transform=True, **_SPLINES)


def _autoregressive_spline(size: Architecture, layer: int) -> Transform:
    """RQ-NSF (AR)."""
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform as Masked

    features, hidden_features, _, num_blocks = size.as_tuple()
    return Masked(features, hidden_features, num_blocks=num_blocks, **_SPLINES)


def _nsf(step: Callable[[Architecture, int], Transform]) -> Build:
    """Put a permutation and an LU-parametrised linear map before each step and after the last.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.
    """

    def transform(size: Architecture) -> Transform:
        from nflows.transforms import CompositeTransform, RandomPermutation

        from nflows_iresnet.transforms import LinearTransform

        def mixing() -> list[Transform]:
            return [RandomPermutation(size.features), LinearTransform(size.features)]

        layers = range(size.num_layers)
        steps = [each for layer in layers for each in (*mixing(), step(size, layer))]
        return CompositeTransform([*steps, *mixing()])

    return _nflows(transform)


def _zuko(kind: str, options: Callable[[Architecture], dict[str, Any]] = lambda size: {}) -> Build:
    """Return what builds a flow of zuko, with the options that a size has beside its widths."""

    def build(size: Architecture) -> nn.Module:
        if find_spec("zuko") is None:
            raise ImportError("zuko is not installed: pip install '.[ffjord]' in the clone")
        import zuko

        widths = (size.hidden_features,) * size.num_blocks_per_layer
        return getattr(zuko.flows, kind)(size.features, hidden_features=widths, **options(size))

    return build


def _small_naf(size: Architecture) -> dict[str, Any]:
    """Half of zuko's signals, and monotone networks a quarter as wide as the others.

    zuko's default, a monotone network of two layers of 64 for each feature and transform, has more
    parameters than all else.
    """
    network = {"hidden_features": (max(2, size.hidden_features // 4),) * 2}
    return {"transforms": size.num_layers, "signal": 8, "network": network}


def _normflows_residual(size: Architecture, *, linear: bool = False) -> nn.Module:
    """Residual blocks of normflows, with its ActNorm after each, and its LU before, if wanted."""
    import normflows

    widths = [size.features, *[size.hidden_features] * size.num_blocks_per_layer, size.features]
    flows: list[nn.Module] = []
    for _ in range(size.num_layers):
        flows.append(normflows.flows.Residual(normflows.nets.LipschitzMLP(widths)))
        if linear:
            flows.append(normflows.flows.LULinearPermute(size.features))
        flows.append(normflows.flows.ActNorm(size.features))
    base = normflows.distributions.DiagGaussian(size.features, trainable=False)
    return normflows.NormalizingFlow(base, flows)


def _hybrid_autoregressive(size: Architecture) -> nn.Module:
    from nflows_iresnet.flows import HybridFlow, spline_autoregressive

    return HybridFlow(*size.as_tuple(), partner=spline_autoregressive)


def _residual_flow_lipswish(size: Architecture) -> nn.Module:
    from nflows_iresnet.flows import ResidualFlow
    from nflows_iresnet.nn import LipSwish

    return ResidualFlow(*size.as_tuple(), activation=LipSwish())


def _hybrid_autoregressive_lipswish(size: Architecture) -> nn.Module:
    from nflows_iresnet.flows import HybridFlow, spline_autoregressive
    from nflows_iresnet.nn import LipSwish

    return HybridFlow(*size.as_tuple(), partner=spline_autoregressive, activation=LipSwish())


_OURS, _NFLOWS = "nflows_iresnet.flows:", "nflows.flows:"
MODELS: dict[str, ModelSpec] = {
    "residual-flow": ModelSpec(
        "ResidualFlow of this library", _class(_OURS + "ResidualFlow"), has_start=True
    ),
    "residual-flow-plain": ModelSpec(
        "the flow of the papers: no splines, no linear layers",
        _class(_OURS + "ResidualFlow", marginal_bins=0, linear=False),
    ),
    "hybrid": ModelSpec(
        "HybridFlow of this library: half of it spline couplings",
        _class(_OURS + "HybridFlow"),
        has_start=True,
    ),
    "hybrid-autoregressive": ModelSpec(
        "the same with autoregressive splines",
        _hybrid_autoregressive,
        has_start=True,
    ),
    "residual-flow-lipswish": ModelSpec(
        "residual-flow with LipSwish, which learns noise by heart more slowly",
        _residual_flow_lipswish,
        has_start=True,
    ),
    "hybrid-autoregressive-lipswish": ModelSpec(
        "hybrid-autoregressive with LipSwish, likewise",
        _hybrid_autoregressive_lipswish,
        has_start=True,
    ),
    "i-resnet": ModelSpec("InvertibleResNet of this library", _class(_OURS + "InvertibleResNet")),
    "realnvp": ModelSpec(
        "SimpleRealNVP of nflows: affine couplings", _class(_NFLOWS + "SimpleRealNVP")
    ),
    "maf": ModelSpec(
        "MaskedAutoregressiveFlow of nflows", _class(_NFLOWS + "MaskedAutoregressiveFlow")
    ),
    "realnvp-scaled": ModelSpec(
        "realnvp with ActNorm before each coupling", _nflows(_realnvp_scaled)
    ),
    "nice-scaled": ModelSpec("nice with the diagonal scaling of the paper", _nflows(_nice_scaled)),
    "made": ModelSpec("one Gaussian MADE of nflows", _nflows(_made)),
    "ffjord": ModelSpec("FFJORD: CNF of zuko", _zuko("CNF")),
    "glow": ModelSpec(
        "Glow's step for vectors: nflows' couplings, our ActNorm and LU", _nflows(_glow)
    ),
    "nice": ModelSpec(
        "SimpleRealNVP of nflows, additive couplings",
        _class(_NFLOWS + "SimpleRealNVP", use_volume_preserving=True),
    ),
    "normflows-residual": ModelSpec(
        "Residual of normflows, as its users run it", _normflows_residual
    ),
    "normflows-residual-linear": ModelSpec(
        "the same with normflows' LU before each", partial(_normflows_residual, linear=True)
    ),
    "nsf-coupling": ModelSpec(
        "RQ-NSF (C) of nflows with LU, as in its paper", _nsf(_spline_coupling)
    ),
    "nsf-autoregressive": ModelSpec(
        "RQ-NSF (AR) of nflows with LU, as in its paper", _nsf(_autoregressive_spline)
    ),
    "zuko-nsf": ModelSpec(
        "NSF of zuko: autoregressive splines",
        _zuko("NSF", lambda size: {"transforms": size.num_layers}),
    ),
    "zuko-naf": ModelSpec(
        "NAF of zuko, which inverts within 10 units of 0", _zuko("NAF", _small_naf)
    ),
}


# --- models for images ----------------------------------------------------------------------------


def _multiscale(step: Callable[[ImageArchitecture, int, int], list[Transform]]) -> Build:
    """Return what builds a multi-scale flow from what makes step i for so many channels."""

    def build(size: ImageArchitecture) -> nn.Module:
        from nflows_iresnet.transforms import LogitTransform, multiscale

        def steps(shape: tuple[int, int, int]) -> list[Transform]:
            layers = range(size.num_layers)
            return [each for layer in layers for each in step(size, shape[0], layer)]

        logit = LogitTransform(size.levels, size.alpha)
        return _image_flow(size, [logit, multiscale(size.shape, size.num_scales, steps)])

    return build


def _image_flow(size: ImageArchitecture, transforms: list[Transform]) -> nn.Module:
    from nflows.transforms import CompositeTransform

    from nflows_iresnet.flows import Flow, StandardNormal

    return Flow(CompositeTransform(transforms), StandardNormal([size.features]))


def _glow_step(size: ImageArchitecture, channels: int, layer: int) -> list[Transform]:
    """Build a step of Glow: ActNorm, invertible 1 x 1 convolution, affine coupling.

    The convolution starts as the identity, not as a random rotation: the halves that are coupled
    alternate instead.

    References:
        Kingma, Dhariwal. Glow: Generative flow with invertible 1x1 convolutions, 2018.
    """
    import torch

    from nflows_iresnet.transforms import ActNorm, LinearTransform

    half = torch.arange(channels) >= channels // 2
    coupling = _channel_coupling(size, half if layer % 2 else ~half)
    return [ActNorm(channels), LinearTransform(channels), coupling]


def _realnvp_step(size: ImageArchitecture, channels: int, layer: int) -> list[Transform]:
    """Build a step of Real NVP: couplings with checkerboard masks, then with channel masks.

    A checkerboard of pixels is, after the squeeze, the channels {0, 3} against {1, 2} of each
    square of four; both kinds of masks are masks of channels here. ActNorm takes the place of the
    paper's batch normalisation, whose inverse depends on the batch.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP, 2017.
    """
    import torch

    from nflows_iresnet.transforms import ActNorm

    place = torch.arange(channels)
    checkerboard, half = (place % 4 == 1) | (place % 4 == 2), place >= channels // 2
    mask = checkerboard if layer < (size.num_layers + 1) // 2 else half
    return [ActNorm(channels), _channel_coupling(size, mask if layer % 2 else ~mask)]


def _channel_coupling(size: ImageArchitecture, mask: Tensor) -> Transform:
    """Build an affine coupling that changes the channels of a mask, and starts as the identity."""
    from nflows.nn.nets import ConvResidualNet
    from nflows.transforms import AffineCouplingTransform
    from torch import nn

    from nflows_iresnet.experiments.adapters import CouplingNet

    def build(in_channels: int, out_channels: int) -> nn.Module:
        hidden, depth = size.hidden_features, size.num_blocks_per_layer
        net = ConvResidualNet(in_channels, out_channels, hidden, num_blocks=depth)
        nn.init.zeros_(net.final_layer.weight)
        nn.init.zeros_(net.final_layer.bias)
        return CouplingNet(net, half_precision=size.half_precision)

    return AffineCouplingTransform(mask.long(), build)


def _normflows_step(size: ImageArchitecture, channels: int, layer: int) -> list[Transform]:
    import normflows

    from nflows_iresnet.experiments.adapters import CouplingNet
    from nflows_iresnet.interop.normflows import FromNormflows

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.lu is deprecated")
        glow = normflows.flows.GlowBlock(channels, size.hidden_features)
    for flow in glow.flows:
        if isinstance(flow, normflows.flows.AffineCouplingBlock):
            coupling = flow.flows[1]
            net, half = coupling.param_map, size.half_precision
            coupling.param_map = CouplingNet(net, half_precision=half)
    return [FromNormflows(glow)]


def _image_residual_flow(size: ImageArchitecture, **options: Any) -> nn.Module:
    from nflows_iresnet.flows import ImageResidualFlow

    return ImageResidualFlow(
        *(size.shape, size.hidden_features, size.num_layers, size.num_blocks_per_layer),
        num_scales=size.num_scales,
        levels=size.levels,
        alpha=size.alpha,
        **options,
    )


def _residual_flow_for_images(size: ImageArchitecture) -> nn.Module:
    from nflows_iresnet.experiments.adapters import TruncatedModel
    from nflows_iresnet.logdet import PowerSeries

    flow = _image_residual_flow(
        size,
        marginal_bins=size.marginal_bins,
        linear=size.marginal_bins > 0,
        estimator=PowerSeries(num_terms=size.num_terms) if size.num_terms else None,
    )
    return TruncatedModel(flow) if size.num_terms else flow


def _i_resnet_for_images(size: ImageArchitecture) -> nn.Module:
    from nflows_iresnet.experiments.adapters import TruncatedModel
    from nflows_iresnet.logdet import Gaussian, PowerSeries
    from nflows_iresnet.nn import ELU
    from nflows_iresnet.solvers import FixedPointIteration

    flow = _image_residual_flow(
        size,
        estimator=PowerSeries(num_terms=10, probe=Gaussian(), exact_trace=False),
        solver=FixedPointIteration(),
        activation=ELU(),
        coeff=0.9,
    )
    return TruncatedModel(flow)


def _flattened(name: str) -> Build:
    """Return what builds a model for rows, one of nflows, on the flattened logits of the pixels."""

    def build(size: ImageArchitecture) -> nn.Module:
        rows = MODELS[name].build_flow(Architecture(*size.as_tuple()))
        return _image_flow(size, [_flat_logits(size), rows._transform])

    return build


def _flattened_ffjord(size: ImageArchitecture) -> nn.Module:
    from nflows_iresnet.experiments.adapters import PrecededModel

    rows = MODELS["ffjord"].build(Architecture(*size.as_tuple()))
    return PrecededModel(_flat_logits(size), rows)


def _flat_logits(size: ImageArchitecture) -> Transform:
    from nflows.transforms import CompositeTransform

    from nflows_iresnet.experiments.adapters import FlattenTransform
    from nflows_iresnet.transforms import ActNorm, LogitTransform

    logit = LogitTransform(size.levels, size.alpha)
    return CompositeTransform([logit, FlattenTransform(size.shape), ActNorm(size.features)])


IMAGE_MODELS: dict[str, ModelSpec] = {
    "residual-flow": ModelSpec(
        "images: ImageResidualFlow of this library", _residual_flow_for_images
    ),
    "glow": ModelSpec(
        "images: Glow, nflows' couplings and LinearTransform", _multiscale(_glow_step)
    ),
    "realnvp": ModelSpec("images: Real NVP from nflows' parts", _multiscale(_realnvp_step)),
    "i-resnet": ModelSpec(
        "images: ImageResidualFlow with the i-ResNet's strategies", _i_resnet_for_images
    ),
    "nice": ModelSpec("images: nice on flattened logits", _flattened("nice"), is_coarse=True),
    "made": ModelSpec("images: made on flattened logits", _flattened("made"), is_coarse=True),
    "maf": ModelSpec("images: maf on flattened logits", _flattened("maf"), is_coarse=True),
    "ffjord": ModelSpec("images: ffjord on flattened logits", _flattened_ffjord, is_coarse=True),
    "glow-normflows": ModelSpec("images: GlowBlock of normflows", _multiscale(_normflows_step)),
}
