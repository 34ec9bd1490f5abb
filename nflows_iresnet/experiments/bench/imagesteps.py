"""Training steps of convolutional residual blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from nflows_iresnet.experiments.adapters import NormflowsResidualModel, ResidualModel
from nflows_iresnet.experiments.bench.contestants import Model, PlainNet
from nflows_iresnet.experiments.bench.items import (
    BASELINE,
    FLOOR,
    OURS,
    Case,
    Entrant,
    Item,
    Settings,
)
from nflows_iresnet.experiments.bench.steps import step_entrant
from nflows_iresnet.flows.base import Flow, StandardNormal
from nflows_iresnet.nn import LipschitzCNN
from nflows_iresnet.transforms import CompositeTransform, ResidualTransform

KERNEL_SIZES = (3, 1, 3)


@dataclass(frozen=True)
class ImageSize:
    """The size of a model of convolutional blocks, without ActNorm or changes of the shape.

    Args:
        channels: of the images, c.
        pixels: rows and columns of the images.
        hidden: channels of the two hidden layers, h.
        blocks: residual blocks.
    """

    channels: int
    pixels: int
    hidden: int
    blocks: int = 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return self.channels, self.pixels, self.pixels

    @property
    def widths(self) -> list[int]:
        """Channels before and after each layer."""
        return [self.channels, self.hidden, self.hidden, self.channels]


def _ours(size: ImageSize) -> Model:
    nets = [LipschitzCNN(size.channels, [size.hidden] * 2) for _ in range(size.blocks)]
    transform = CompositeTransform(ResidualTransform(net) for net in nets)
    return ResidualModel(Flow(transform, StandardNormal(size.shape)))


def _normflows(size: ImageSize) -> Model:
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


def _plain_branch(size: ImageSize) -> nn.Sequential:
    activations = iter(LipschitzCNN(size.channels, [size.hidden] * 2).activations)
    layers: list[nn.Module] = []
    widths = zip(size.widths, size.widths[1:], KERNEL_SIZES, strict=False)
    for inputs, outputs, kernel in widths:
        layers += [_UnitsLast(next(activations))] if layers else []
        layers.append(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))
    return nn.Sequential(*layers)


def _plain(size: ImageSize) -> Model:
    return PlainNet(_plain_branch(size) for _ in range(size.blocks))


BUILDERS: dict[str, Callable[[ImageSize], Model]] = {
    OURS: _ours,
    BASELINE: _normflows,
    FLOOR: _plain,
}


def image_step_case(size: ImageSize, batch: int) -> Case:
    """Return the case of one size and one batch."""

    def enter(settings: Settings) -> list[Entrant]:
        return [
            step_entrant(name, partial(build, size), (batch, *size.shape), settings)
            for name, build in BUILDERS.items()
        ]

    return Case.of(enter, c=size.channels, pixels=size.pixels, h=size.hidden, B=batch)


def _cases(settings: Settings) -> list[Case]:
    all_of_them = [
        (ImageSize(1, 8, 32), 64),
        (ImageSize(1, 28, 32), 16),
        (ImageSize(4, 14, 64), 16),
        (ImageSize(12, 8, 64), 32),
    ]
    return [image_step_case(*each) for each in all_of_them[: 2 if settings.quick else None]]


STEP_IMAGE = Item("training step of two blocks of 3 x 3, 1 x 1 and 3 x 3 convolutions", _cases)
