"""The contestants of a training step: this library with each estimator, the others, the floor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from nflows_iresnet import logdet
from nflows_iresnet.experiments.adapters import NormflowsResidualModel, ResidualModel
from nflows_iresnet.experiments.bench.items import BASELINE, FLOOR, OURS
from nflows_iresnet.experiments.models import MODELS, Architecture
from nflows_iresnet.flows import ResidualFlow
from nflows_iresnet.flows.base import Flow, StandardNormal
from nflows_iresnet.nn import LipschitzMLP
from nflows_iresnet.transforms import ResidualTransform

HIDDEN_LAYERS = 2


@dataclass(frozen=True)
class Size:
    """The size of a model whose residual branches have two hidden layers.

    Args:
        features: dimensions of the data, d.
        hidden: width of the hidden layers, h.
        blocks: residual blocks.
        bare: leave out the ActNorm beside each block.
        marginal_bins: bins of this library's splines, without linear maps, or None for its default
            flow; by default none of either, so that all contestants do the same work.
    """

    features: int
    hidden: int
    blocks: int = 1
    bare: bool = True
    marginal_bins: int | None = 0

    @property
    def architecture(self) -> Architecture:
        """The same as the arguments of the models of `compare`."""
        return Architecture(self.features, self.hidden, self.blocks, HIDDEN_LAYERS)


class Model(Protocol):
    """What a training step asks of a model."""

    def log_prob(self, inputs: Tensor, /) -> Tensor:
        """Log-density in nats, (B, d) -> (B,)."""

    def after_step(self) -> None:
        """Do what the library asks for after each optimiser step."""

    def parameters(self) -> Iterator[Parameter]:
        """Everything the optimiser trains."""

    def to(self, device: torch.device) -> Any:
        """Move to a device."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training."""


@dataclass(frozen=True)
class Contestant:
    """A model that takes part.

    Args:
        description: one line.
        build: makes a fresh model of a given size.
        affords: whether a size and a batch are within its means.
        package: what has to be installed, or None.
    """

    description: str
    build: Callable[[Size], Model]
    affords: Callable[[Size, int], bool] = lambda size, batch: True
    package: str | None = None

    @property
    def is_available(self) -> bool:
        """Whether what it needs is installed."""
        return self.package is None or find_spec(self.package) is not None


def our_flow(size: Size, estimator: logdet.LogDetEstimator | None = None) -> Flow:
    """Build a flow of this library; bare, it is the residual block of `ResidualFlow` alone."""
    sizes = (size.features, size.hidden, size.blocks, HIDDEN_LAYERS)
    if size.marginal_bins is None:
        flow = ResidualFlow(*sizes, estimator=estimator)
    else:
        flow = ResidualFlow(
            *sizes, estimator=estimator, marginal_bins=size.marginal_bins, linear=False
        )
    return flow if not size.bare else Flow(residual_block(flow), StandardNormal([size.features]))


def residual_block(flow: nn.Module) -> ResidualTransform:
    """Return the first residual block of a flow."""
    return next(block for block in flow.modules() if isinstance(block, ResidualTransform))


def _ours(estimator: logdet.LogDetEstimator | None = None) -> Callable[[Size], Model]:
    return lambda size: ResidualModel(our_flow(size, estimator))


def _normflows(size: Size) -> Model:
    import normflows

    if not size.bare:
        return MODELS["normflows-residual"].build(size.architecture)
    widths = [size.features, *[size.hidden] * HIDDEN_LAYERS, size.features]
    block = normflows.flows.Residual(normflows.nets.LipschitzMLP(widths))
    base = normflows.distributions.DiagGaussian(size.features, trainable=False)
    return NormflowsResidualModel(normflows.NormalizingFlow(base, [block]))


class PlainNet(nn.Module):
    """x + g(x) with ordinary layers, scored without a log-determinant: the floor.

    Args:
        branches: the functions g, one per block.
    """

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the log-density of the outputs under a standard normal, (B, *) -> (B,)."""
        for branch in self.branches:
            inputs = inputs + branch(inputs)
        constant = 0.5 * inputs.shape[1:].numel() * math.log(2 * math.pi)
        return -0.5 * inputs.square().flatten(start_dim=1).sum(1) - constant

    def after_step(self) -> None:
        """Do nothing."""


def _plain(size: Size) -> PlainNet:
    return PlainNet(_plain_branch(size) for _ in range(size.blocks))


def _plain_branch(size: Size) -> nn.Sequential:
    net = residual_block(our_flow(size)).net
    assert isinstance(net, LipschitzMLP)
    layers: list[nn.Module] = []
    for index, layer in enumerate(net.layers):
        assert isinstance(layer, nn.Linear)
        layers += [copy.deepcopy(net.activations[index - 1])] if index else []
        layers.append(nn.Linear(layer.in_features, layer.out_features))
    return nn.Sequential(*layers)


class TorchflowsModel(nn.Module):
    """A residual block of torchflows on its own layers, as wide and as many as everyone's.

    (The network that torchflows makes by default has as many layers as hidden units.)
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        from torchflows.bijections.finite.residual.iterative import ResFlowBlock, SpectralLinear
        from torchflows.flows import Flow as TorchFlow

        net = nn.Sequential(
            SpectralLinear(size.features, size.hidden),
            nn.Tanh(),
            SpectralLinear(size.hidden, size.hidden),
            nn.Tanh(),
            SpectralLinear(size.hidden, size.features),
        )
        self.flow = TorchFlow(ResFlowBlock((size.features,), g=net))

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the flow's own log-density."""
        return self.flow.log_prob(inputs)

    def after_step(self) -> None:
        """Do nothing: torchflows normalises in each call."""


_DENSE_ELEMENTS = 2**24
"""Tangents of hidden units that the exact estimator may keep: 64 MiB per layer in float32."""


def _affords_jacobian(size: Size, batch: int) -> bool:
    return batch * size.features * max(size.hidden, size.features) <= _DENSE_ELEMENTS


CONTESTANTS: dict[str, Contestant] = {
    OURS: Contestant("this library, ResidualFlow's defaults (splines in quality only)", _ours()),
    "ours-exact": Contestant("logdet.Exact", _ours(logdet.Exact()), _affords_jacobian),
    "ours-series": Contestant("logdet.PowerSeries", _ours(logdet.PowerSeries())),
    "ours-roulette": Contestant("logdet.RussianRoulette", _ours(logdet.RussianRoulette())),
    BASELINE: Contestant("Residual of normflows, as its users run it", _normflows),
    "torchflows": Contestant(
        "ResFlowBlock of torchflows, where it is installed",
        TorchflowsModel,
        affords=lambda size, batch: size.bare and size.blocks == 1,
        package="torchflows",
    ),
    FLOOR: Contestant("x + g(x) of the same widths, no bound and no log-determinant", _plain),
}


def contestants_for(size: Size, batch: int, names: tuple[str, ...] = ()) -> dict[str, Contestant]:
    """Return those, of some names or of all, that are installed and can afford a size."""
    return {
        name: contestant
        for name, contestant in CONTESTANTS.items()
        if (not names or name in names)
        and contestant.is_available
        and contestant.affords(size, batch)
    }
