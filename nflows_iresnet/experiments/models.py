"""The models of the comparison, and the search that gives them equally many parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nflows_iresnet.experiments.adapters import (
    DensityModel,
    NflowsModel,
    NormflowsResidualModel,
    ResidualModel,
    StartedModel,
    ZukoModel,
)
from nflows_iresnet.experiments.config import suggest

if TYPE_CHECKING:
    from nflows.transforms import Transform

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
        return (
            self.features,
            self.hidden_features,
            self.num_layers,
            self.num_blocks_per_layer,
        )


@dataclass(frozen=True)
class ModelSpec:
    """A model of the comparison.

    Args:
        description: one line for `--list`.
        build: makes a fresh model of a given size.
        is_coarse: whether a single hidden unit can have more parameters than the tolerance, so that
            the nearest count has to do.
        has_start: whether this library's start is part of it.
    """

    description: str
    build: Callable[[Any], DensityModel]
    is_coarse: bool = False
    has_start: bool = False


def _residual_flow(size: Architecture) -> DensityModel:
    from nflows_iresnet.flows import ResidualFlow

    return ResidualModel(ResidualFlow(*size.as_tuple()))


def _residual_flow_plain(size: Architecture) -> DensityModel:
    from nflows_iresnet.flows import ResidualFlow

    return ResidualModel(ResidualFlow(*size.as_tuple(), marginal_bins=0, linear=False))


def _hybrid(size: Architecture) -> DensityModel:
    from nflows_iresnet.flows import HybridFlow

    return ResidualModel(HybridFlow(*size.as_tuple()))


def _i_resnet(size: Architecture) -> DensityModel:
    from nflows_iresnet.flows import InvertibleResNet

    return ResidualModel(InvertibleResNet(*size.as_tuple()))


def _realnvp(size: Architecture) -> DensityModel:
    from nflows.flows import SimpleRealNVP

    return NflowsModel(SimpleRealNVP(*size.as_tuple()))


def _nice(size: Architecture) -> DensityModel:
    from nflows.flows import SimpleRealNVP

    return NflowsModel(SimpleRealNVP(*size.as_tuple(), use_volume_preserving=True))


def _nice_scaled(size: Architecture) -> DensityModel:
    """NICE as published: after the couplings a diagonal scaling, started from the data."""
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform

    from nflows_iresnet.transforms import ActNorm

    plain = _nice(size).flow
    transform = CompositeTransform([plain._transform, ActNorm(size.features)])
    return NflowsModel(Flow(transform, plain._distribution))


def _realnvp_scaled(size: Architecture) -> DensityModel:
    """Real NVP with ActNorm before each coupling, as the paper has batch normalisation.

    The scales of nflows' couplings are sigmoid(u + 2) + 0.001: without that no layer can expand.
    """
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform

    from nflows_iresnet.transforms import ActNorm

    plain = _realnvp(size).flow
    steps = [(ActNorm(size.features), coupling) for coupling in plain._transform._transforms]
    transform = CompositeTransform([each for step in steps for each in step])
    return NflowsModel(Flow(transform, plain._distribution))


def _maf(size: Architecture) -> DensityModel:
    from nflows.flows import MaskedAutoregressiveFlow

    return NflowsModel(MaskedAutoregressiveFlow(*size.as_tuple()))


def _made(size: Architecture) -> DensityModel:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    features, hidden_features, _, num_blocks = size.as_tuple()
    made = MaskedAffineAutoregressiveTransform(features, hidden_features, num_blocks=num_blocks)
    return NflowsModel(Flow(made, StandardNormal([features])))


def _ffjord(size: Architecture) -> DensityModel:
    from nflows_iresnet.experiments.continuous import ffjord

    return ffjord(size.features, size.hidden_features, size.num_blocks_per_layer)


def _glow(size: Architecture) -> DensityModel:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform

    steps = [glow_step(size, parity=layer % 2) for layer in range(size.num_layers)]
    return NflowsModel(Flow(CompositeTransform(steps), StandardNormal([size.features])))


def glow_step(size: Architecture, parity: int) -> Transform:
    """Build Glow's step for vectors: ActNorm, LU-parametrised linear map, affine coupling.

    The linear map is this library's: nflows' copies from the host at each call.

    References:
        Kingma and Dhariwal, Glow: Generative Flow with Invertible 1x1 Convolutions, 2018.

    Args:
        size: the size of the model; `num_layers` is not used.
        parity: 0 or 1, which half of the features the coupling transforms.

    Returns:
        An nflows transform from data to noise.
    """
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import (
        ActNorm,
        AffineCouplingTransform,
        CompositeTransform,
    )

    from nflows_iresnet.transforms import LinearTransform

    def coupling_net(in_features: int, out_features: int) -> nn.Module:
        return ResidualNet(
            in_features, out_features, size.hidden_features, num_blocks=size.num_blocks_per_layer
        )

    mask = torch.arange(size.features) % 2 == parity
    coupling = AffineCouplingTransform(mask.long(), coupling_net)
    return CompositeTransform([ActNorm(size.features), LinearTransform(size.features), coupling])


_NSF_BINS, _NSF_BOUND = 8, 3.0
"""Of the splines, as in the paper for tables."""


def _nsf_coupling(size: Architecture) -> DensityModel:
    """RQ-NSF (C): couplings by splines, and splines of the features that they are given."""
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform

    def coupling_net(in_features: int, out_features: int) -> nn.Module:
        return ResidualNet(
            in_features, out_features, size.hidden_features, num_blocks=size.num_blocks_per_layer
        )

    def step(layer: int) -> Transform:
        return PiecewiseRationalQuadraticCouplingTransform(
            (torch.arange(size.features) % 2 == layer % 2).long(),
            coupling_net,
            num_bins=_NSF_BINS,
            tails="linear",
            tail_bound=_NSF_BOUND,
            apply_unconditional_transform=True,
        )

    return _nsf(size, step)


def _nsf_autoregressive(size: Architecture) -> DensityModel:
    """RQ-NSF (AR)."""
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform

    def step(layer: int) -> Transform:
        return MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            size.features,
            size.hidden_features,
            num_bins=_NSF_BINS,
            tails="linear",
            tail_bound=_NSF_BOUND,
            num_blocks=size.num_blocks_per_layer,
        )

    return _nsf(size, step)


def _nsf(size: Architecture, step: Callable[[int], Transform]) -> DensityModel:
    """Put a permutation and an LU-parametrised linear map before each step and after the last.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.

    Args:
        size: of the model.
        step: makes the i-th transform.
    """
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, RandomPermutation

    from nflows_iresnet.transforms import LinearTransform

    def mixing() -> list[Transform]:
        return [RandomPermutation(size.features), LinearTransform(size.features)]

    steps = [each for layer in range(size.num_layers) for each in (*mixing(), step(layer))]
    transform = CompositeTransform([*steps, *mixing()])
    return NflowsModel(Flow(transform, StandardNormal([size.features])))


def _zuko_nsf(size: Architecture) -> DensityModel:
    zuko = _zuko()
    widths = (size.hidden_features,) * size.num_blocks_per_layer
    return ZukoModel(
        zuko.flows.NSF(size.features, transforms=size.num_layers, hidden_features=widths)
    )


def _zuko_naf(size: Architecture) -> DensityModel:
    """NAF with half of zuko's signals, and monotone networks a quarter as wide as the others.

    zuko's default, a monotone network of two layers of 64 for each feature and transform, has more
    parameters than all else.
    """
    zuko = _zuko()
    depth, width = size.num_blocks_per_layer, size.hidden_features
    return ZukoModel(
        zuko.flows.NAF(
            size.features,
            transforms=size.num_layers,
            hidden_features=(width,) * depth,
            signal=8,
            network={"hidden_features": (max(2, width // 4),) * 2},
        )
    )


def _zuko() -> Any:
    if find_spec("zuko") is None:
        raise ImportError("zuko is not installed: pip install 'nflows-iresnet[ffjord]'")
    import zuko

    return zuko


def _normflows_residual(size: Architecture, *, linear: bool = False) -> DensityModel:
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
    return NormflowsResidualModel(normflows.NormalizingFlow(base, flows))


MODELS: dict[str, ModelSpec] = {
    "residual-flow": ModelSpec("ResidualFlow of this library", _residual_flow, has_start=True),
    "residual-flow-plain": ModelSpec(
        "the flow of the papers: no splines, no linear layers", _residual_flow_plain
    ),
    "hybrid": ModelSpec(
        "HybridFlow of this library: half of it spline couplings", _hybrid, has_start=True
    ),
    "i-resnet": ModelSpec("InvertibleResNet of this library", _i_resnet),
    "realnvp": ModelSpec("SimpleRealNVP of nflows: affine couplings", _realnvp),
    "maf": ModelSpec("MaskedAutoregressiveFlow of nflows", _maf),
    "realnvp-scaled": ModelSpec("realnvp with ActNorm before each coupling", _realnvp_scaled),
    "nice-scaled": ModelSpec("nice with the diagonal scaling of the paper", _nice_scaled),
    "made": ModelSpec("one Gaussian MADE of nflows", _made),
    "ffjord": ModelSpec("FFJORD: CNF of zuko", _ffjord),
    "glow": ModelSpec("Glow's step for vectors: nflows' parts, LinearTransform", _glow),
    "nice": ModelSpec("SimpleRealNVP of nflows, additive couplings", _nice),
    "normflows-residual": ModelSpec(
        "Residual of normflows, as its users run it", _normflows_residual
    ),
    "normflows-residual-linear": ModelSpec(
        "the same with normflows' LU before each", partial(_normflows_residual, linear=True)
    ),
    "nsf-coupling": ModelSpec("RQ-NSF (C) of nflows with LU, as in its paper", _nsf_coupling),
    "nsf-autoregressive": ModelSpec(
        "RQ-NSF (AR) of nflows with LU, as in its paper", _nsf_autoregressive
    ),
    "zuko-nsf": ModelSpec("NSF of zuko: autoregressive splines", _zuko_nsf),
    "zuko-naf": ModelSpec("NAF of zuko, which inverts within 10 units of 0", _zuko_naf),
}

DEFAULT_MODELS = ("residual-flow", "i-resnet", "realnvp", "maf", "glow")


def find_model(name: str, known: Mapping[str, ModelSpec] = MODELS) -> ModelSpec:
    """Look a model up by name; for rows also NAME-same-start.

    Raises:
        ValueError: there is no such model; the message names the nearest one.
    """
    if name in known:
        return known[name]
    behind = known.get(name.removesuffix(SAME_START))
    if behind is None or known is not MODELS:
        raise ValueError(f"unknown model {name!r}: {suggest(name, known)}")
    if behind.has_start:
        plain = name.removesuffix(SAME_START)
        raise ValueError(f"unknown model {name!r}: {plain!r} has this start itself")
    return same_start(behind)


def same_start(spec: ModelSpec) -> ModelSpec:
    """Return a model for rows with the start of this library's flows in front of it.

    That is ActNorm, a spline of each feature from its quantiles, and whitening: with it in front of
    all, a comparison says what the blocks do. Its parameters count as the model's.

    Args:
        spec: of the model behind the start.
    """

    def build(size: Architecture) -> DensityModel:
        from nflows_iresnet.flows.residual import start_from_data
        from nflows_iresnet.transforms import CompositeTransform

        start = CompositeTransform(start_from_data(size.features))
        return StartedModel(start, spec.build(size))

    description = f"{spec.description}; this library's start in front"
    return replace(spec, description=description, build=build, has_start=True)


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
    target = _count(REFERENCE, reference)
    if abs(_count(name, reference) - target) <= _SAME * target:
        return reference
    widths = _bracket(name, reference, target)
    best = min(widths, key=lambda width: abs(_count_at(name, reference, width) - target))
    count = _count_at(name, reference, best)
    is_coarse = find_model(name, reference.models).is_coarse
    if abs(count - target) > TOLERANCE * target and not is_coarse:
        raise ValueError(
            f"model {name!r} cannot match the {target} parameters of {REFERENCE}: "
            f"the nearest is {count} with {best} hidden features; change --hidden-features "
            f"(now {reference.hidden_features}) or --num-layers (now {reference.num_layers})"
        )
    return replace(reference, hidden_features=best)


def _bracket(name: str, reference: Architecture, target: int) -> tuple[int, int]:
    """Return two neighbouring widths, the first with too few and the second with enough."""
    high = 2
    while _count_at(name, reference, high) < target and high < _WIDEST:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if _count_at(name, reference, middle) < target:
            low = middle
        else:
            high = middle
    return low, high


def _count_at(name: str, reference: Architecture, width: int) -> int:
    return _count(name, replace(reference, hidden_features=width))


@lru_cache(maxsize=1024)
def _count(name: str, size: Architecture) -> int:
    with torch.random.fork_rng(devices=[]):
        return count_parameters(find_model(name, size.models).build(size))
