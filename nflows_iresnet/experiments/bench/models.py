"""What `bench` measures beside the flows of `compare`: single blocks, and the plain net below all.

Whole flows come from `experiments.models.MODELS`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from nflows_iresnet import datasets, logdet
from nflows_iresnet.experiments.adapters import (
    NormflowsResidualModel,
    ResidualModel,
    residual_blocks,
    value_and_jacobian,
)
from nflows_iresnet.experiments.bench.items import BASELINE, FLOOR, OURS, STEP_MODELS, StepModel
from nflows_iresnet.experiments.bench.measure import Settings
from nflows_iresnet.experiments.models import MODELS, Architecture
from nflows_iresnet.flows import ResidualFlow
from nflows_iresnet.flows.base import Flow, StandardNormal
from nflows_iresnet.linearization import ResidualFunction
from nflows_iresnet.nn import LipschitzCNN, LipschitzMLP
from nflows_iresnet.training import Batches, Training, TrainingPlan, run, seed_everything
from nflows_iresnet.transforms import CompositeTransform, ResidualTransform

HIDDEN_LAYERS = 2


class Trainable(Protocol):
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


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The size of a model whose residual branches have two hidden layers.

    Args:
        features: dimensions of the data, d.
        hidden: width of the hidden layers, h.
        blocks: residual blocks.
        bare: one block alone, without the ActNorm beside it.
        has_start: our flow with splines and linear maps, as users have it; by default without, so
            that all models do the same work.
    """

    features: int
    hidden: int
    blocks: int = 1
    bare: bool = True
    has_start: bool = False

    @property
    def architecture(self) -> Architecture:
        """The same as the arguments of the models of `compare`."""
        return Architecture(self.features, self.hidden, self.blocks, HIDDEN_LAYERS)


def ours(estimator: str | None, size: Size) -> ResidualModel:
    """Build a flow of this library, or a block of it.

    Args:
        estimator: name of the class in `logdet`; None for the default.
        size: of the flow.
    """
    name = "residual-flow" if size.has_start else "residual-flow-plain"
    flow: Flow = MODELS[name].build(size.architecture).flow
    for block in residual_blocks(flow) if estimator is not None else ():
        block.estimator = getattr(logdet, str(estimator))()
    if size.bare:
        flow = Flow(residual_blocks(flow)[0], StandardNormal([size.features]))
    return ResidualModel(flow)


def default_block() -> ResidualTransform:
    """Return a block with the estimator and the solver that `ResidualFlow` has by default."""
    return residual_blocks(ResidualFlow(2, 8, 1))[0]


def normflows_residual(size: Size) -> NormflowsResidualModel:
    """Build the flow of normflows, or a block of it."""
    from normflows.flows import Residual

    model = MODELS["normflows-residual"].build(size.architecture)
    assert isinstance(model, NormflowsResidualModel)
    if size.bare:
        blocks = (flow for flow in model.flow.flows if isinstance(flow, Residual))
        model.flow.flows = nn.ModuleList(blocks)
    return model


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


def plain(size: Size) -> PlainNet:
    """Build the plain net with the widths and the activations of our flow."""
    return PlainNet(_plain_branch(size) for _ in range(size.blocks))


def _plain_branch(size: Size) -> nn.Sequential:
    widths = [size.features, *[size.hidden] * HIDDEN_LAYERS, size.features]
    activations = LipschitzMLP(size.features, widths[1:-1]).activations
    layers = map(nn.Linear, widths, widths[1:])
    return _alternating(layers, (copy.deepcopy(each) for each in activations))


def _alternating(layers: Iterable[nn.Module], between: Iterable[nn.Module]) -> nn.Sequential:
    first, *others = layers
    pairs = zip(between, others, strict=True)
    return nn.Sequential(first, *(module for pair in pairs for module in pair))


class TorchflowsModel(nn.Module):
    """A residual block of torchflows on its own layers, as wide and as many as everyone's.

    (The network that torchflows makes by default has as many layers as hidden units.)
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        from torchflows.bijections.finite.residual.iterative import ResFlowBlock, SpectralLinear
        from torchflows.flows import Flow as TorchFlow

        widths = [size.features, *[size.hidden] * HIDDEN_LAYERS, size.features]
        net = _alternating(
            map(SpectralLinear, widths, widths[1:]), [nn.Tanh() for _ in widths[1:-1]]
        )
        self.flow = TorchFlow(ResFlowBlock((size.features,), g=net))

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the flow's own log-density."""
        return self.flow.log_prob(inputs)

    def after_step(self) -> None:
        """Do nothing: torchflows normalises in each call."""


def models_for(size: Size, batch: int, names: tuple[str, ...] = ()) -> dict[str, StepModel]:
    """Return those, of some names or of all, that are installed and can afford a size."""
    return {
        name: model
        for name, model in STEP_MODELS.items()
        if (not names or name in names) and model.is_available and model.affords(size, batch)
    }


class CompiledModel(ResidualModel):
    """A flow of this library whose `log_prob` goes through `torch.compile`, as one graph.

    With the exact log-determinant where that is the default, else with the power series: the random
    number of terms of the roulette cannot be compiled.
    """

    NUM_TERMS = 6
    """About as many as the roulette needs on average for a bound of 0.97."""

    def __init__(self, size: Size) -> None:
        super().__init__(ours(None, size).flow)
        exact = size.features <= logdet.Auto().max_exact_features
        for block in residual_blocks(self.flow):
            block.estimator = (
                logdet.Exact() if exact else logdet.PowerSeries(num_terms=self.NUM_TERMS)
            )
        self._compiled = torch.compile(self.flow.log_prob, fullgraph=True)
        self._has_started = False

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the flow's log-density; the first call, which starts ActNorm, is not compiled."""
        if self._has_started:
            return self._compiled(inputs)
        self._has_started = True
        return super().log_prob(inputs)


# --- images ---------------------------------------------------------------------------------------

KERNEL_SIZES = (3, 1, 3)


@dataclass(frozen=True)
class ImageSize:
    """The size of a model of two convolutional blocks, without ActNorm or changes of the shape.

    Args:
        channels: of the images, c.
        pixels: rows and columns of the images.
        hidden: channels of the two hidden layers, h.
    """

    channels: int
    pixels: int
    hidden: int
    blocks = 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return self.channels, self.pixels, self.pixels

    @property
    def widths(self) -> list[int]:
        """Channels before and after each layer."""
        return [self.channels, self.hidden, self.hidden, self.channels]


def _our_images(size: ImageSize) -> Trainable:
    nets = [LipschitzCNN(size.channels, size.widths[1:-1]) for _ in range(size.blocks)]
    transform = CompositeTransform(ResidualTransform(net) for net in nets)
    return ResidualModel(Flow(transform, StandardNormal(size.shape)))


def _normflows_images(size: ImageSize) -> Trainable:
    import normflows

    nets = [
        normflows.nets.LipschitzCNN(size.widths, list(KERNEL_SIZES)) for _ in range(size.blocks)
    ]
    base = normflows.distributions.DiagGaussian(size.shape, trainable=False)
    blocks = [normflows.flows.Residual(net) for net in nets]
    return NormflowsResidualModel(normflows.NormalizingFlow(base, blocks))


class _UnitsLast(nn.Module):
    """An activation along the channels of images."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply it, (B, channels, H, W) to the same shape."""
        outputs: Tensor = self.activation(inputs.movedim(1, -1)).movedim(-1, 1)
        return outputs


def _plain_images(size: ImageSize) -> Trainable:
    def branch() -> nn.Sequential:
        activations = LipschitzCNN(size.channels, size.widths[1:-1]).activations
        layers = (
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
            for inputs, outputs, kernel in zip(
                size.widths, size.widths[1:], KERNEL_SIZES, strict=False
            )
        )
        return _alternating(layers, map(_UnitsLast, activations))

    return PlainNet(branch() for _ in range(size.blocks))


IMAGE_MODELS: dict[str, Callable[[ImageSize], Trainable]] = {
    OURS: _our_images,
    BASELINE: _normflows_images,
    FLOOR: _plain_images,
}


# --- networks of a block --------------------------------------------------------------------------


class FrozenNet(nn.Module):
    """The function of a `LipschitzMLP` now, with the weights in use as ordinary parameters.

    As a module it is a plain network for any library. This one, which asks for `bind`, sees its
    structure.

    Args:
        net: whose function it is.
    """

    def __init__(self, net: LipschitzMLP) -> None:
        super().__init__()
        with torch.no_grad():
            self._function = net.bind()
        self.weights = nn.ParameterList(each.detach().clone() for each in self._function.weights)
        self.shifts = nn.ParameterList(each.detach().clone() for each in self._function.shifts)
        self.activations = nn.ModuleList(net.activations)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return g(inputs), (B, d) -> (B, d)."""
        hidden = F.linear(inputs, self.weights[0], self.shifts[0])
        for index, activation in enumerate(self.activations, start=1):
            hidden = F.linear(activation(hidden), self.weights[index], self.shifts[index])
        return hidden

    def bind(self, context: Tensor | None = None) -> ResidualFunction:
        """Return the same as a function with structure."""
        return replace(self._function, weights=list(self.weights), shifts=list(self.shifts))


class SlowestMap(nn.Module):
    """x -> -S x, S diagonal from 0 to the bound: linear, and as slow as the bound allows.

    Args:
        features: d.
        lipschitz: the largest element of S.
    """

    def __init__(self, features: int, lipschitz: float) -> None:
        super().__init__()
        self.lipschitz = lipschitz
        self.register_buffer("diagonal", torch.linspace(0.0, lipschitz, features))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return -S x, (B, d) -> (B, d)."""
        return -inputs * self.get_buffer("diagonal")


@dataclass(frozen=True, eq=False)
class TrainedBranch:
    """The branch of a trained flow whose Jacobian is largest.

    Args:
        net: g, with weights enlarged so that the bound 0.97 is used up.
        inputs: rows that enter the block when it sees data, (N, d).
        jacobian_norm: mean of the 2-norm of dg/dx over some of these rows.
    """

    net: LipschitzMLP
    inputs: Tensor
    jacobian_norm: float


_TRAINED = {2: ("checkerboard", 64), 64: ("digits", 128)}
"""Data set and hidden width, by dimension."""
_TRAINED_BLOCKS = 3
_GAIN = 4.0


@dataclass(frozen=True)
class ConstantRate:
    """Some steps of which nothing counts as done before the end: the learning rate stays."""

    steps: float = math.inf

    def progress(self, steps: int, seconds: float) -> float:
        """Return the fraction of the training that is done, by which the schedule goes."""
        return float(steps >= self.steps)


def trained_branch(features: int, settings: Settings) -> TrainedBranch:
    """Train a small flow and return its branch with the largest Jacobian.

    Random weights would make inverses and estimates look too easy: the norms of their layers
    multiply to the bound, the norm of their product stays far below. Training aligns them.

    Args:
        features: 2 (checkerboard) or 64 (digits).
        settings: seed, device, and how long: 300 steps, 150 if quick.
    """
    steps = 150 if settings.quick else 300
    return _trained_branch(features, steps, settings.seed, settings.device)


@lru_cache(maxsize=4)
def _trained_branch(features: int, steps: int, seed: int, device: torch.device) -> TrainedBranch:
    name, hidden = _TRAINED[features]
    rows = datasets.load(name, seed=seed).train.to(device)
    seed_everything(seed)
    flow = ResidualFlow(features, hidden, _TRAINED_BLOCKS, marginal_bins=0, linear=False).to(device)
    plan = TrainingPlan(5e-3, ConstantRate(steps), clip_norm=None)
    run(Training(flow, Batches(rows, 256, seed), plan, validate=lambda: 0.0))
    return max(_branches(flow, rows), key=lambda branch: branch.jacobian_norm)


def _branches(flow: ResidualFlow, rows: Tensor) -> list[TrainedBranch]:
    blocks = residual_blocks(flow)
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(lambda block, inputs: seen.update({block: inputs[0]}))
        for block in blocks
    ]
    with torch.no_grad():
        flow.transform_to_noise(rows[:8192])
    for hook in hooks:
        hook.remove()
    return [_branch(block, seen[block]) for block in blocks]


def _branch(block: ResidualTransform, inputs: Tensor) -> TrainedBranch:
    net = block.net
    assert isinstance(net, LipschitzMLP)
    with torch.no_grad():
        for layer in net.layers:
            assert isinstance(layer, nn.Linear)
            layer.weight.mul_(_GAIN)
    _, jacobian = value_and_jacobian(net, inputs[:64])
    norm = float(torch.linalg.matrix_norm(jacobian.double(), 2).mean())
    return TrainedBranch(net.requires_grad_(True), inputs.detach(), norm)
