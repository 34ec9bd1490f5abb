"""The classifiers of the table: one architecture with and without constraint, and a ResNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nflows_iresnet.classifiers import InvertibleClassifier, ResidualClassifier
from nflows_iresnet.experiments.models import count_parameters
from nflows_iresnet.experiments.table1.settings import Settings
from nflows_iresnet.solvers import FixedPointIteration

Shape = tuple[int, int, int]
SOLVER = FixedPointIteration()
"""The inverse of the papers, for every classifier that has one."""


@dataclass(frozen=True)
class Size:
    """What all classifiers have in common."""

    shape: Shape
    num_classes: int
    levels: int
    settings: Settings


@dataclass(frozen=True)
class Contestant:
    """A row of the table.

    Args:
        name: as it is printed.
        description: one line for `--help`.
        build: makes a fresh classifier of a given size.
    """

    name: str
    description: str
    build: Callable[[Size], nn.Module]


class ResNet(nn.Module):
    """Stem, then per scale one strided and `num_blocks - 1` plain blocks, mean, linear map.

    Args:
        size: what it has in common with the others; `num_scales` halvings, each doubles the width.
        width: channels of the stem.

    References:
        He, Zhang, Ren, Sun. Deep residual learning for image recognition, 2016.
    """

    def __init__(self, size: Size, width: int) -> None:
        super().__init__()
        self.levels = size.levels
        layers: list[nn.Module] = [_conv(size.shape[0], width), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(size.settings.num_scales):
            layers.append(_BasicBlock(width, 2 * width, stride=2))
            width *= 2
            plain = range(size.settings.num_blocks - 1)
            layers += [_BasicBlock(width, width, stride=1) for _ in plain]
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, size.num_classes)]
        self.net = nn.Sequential(*layers, *pool)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.net(images.float() / (self.levels - 1) - 0.5)
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(_conv(before, after, stride=stride), nn.BatchNorm2d(after), nn.ReLU()),
            *(_conv(after, after), nn.BatchNorm2d(after)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.shortcut(inputs) + self.branch(inputs))


def _conv(before: int, after: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)


def _invertible(coeff: float) -> Callable[[Size], nn.Module]:
    def build(size: Size) -> nn.Module:
        settings = size.settings
        return InvertibleClassifier(
            *(size.shape, size.num_classes, settings.hidden_channels),
            num_blocks=settings.num_blocks,
            num_scales=settings.num_scales,
            padding=settings.padding,
            levels=size.levels,
            coeff=coeff,
            solver=SOLVER,
        )

    return build


def vanilla(size: Size) -> ResidualClassifier:
    """Build the architecture of the invertible classifiers with ordinary convolutions."""
    settings, hidden = size.settings, size.settings.hidden_channels

    def branch(channels: int) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(channels, hidden, 3, padding=1), nn.ELU()),
            *(nn.Conv2d(hidden, hidden, 1), nn.ELU()),
            nn.Conv2d(hidden, channels, 3, padding=1),
        )

    return ResidualClassifier(
        *(size.shape, size.num_classes, branch),
        num_blocks=settings.num_blocks,
        num_scales=settings.num_scales,
        padding=settings.padding,
        levels=size.levels,
        solver=SOLVER,
    )


def resnet(size: Size) -> ResNet:
    """Build the ResNet whose parameters come nearest to those of the vanilla architecture."""
    with torch.random.fork_rng(devices=[]):
        target = count_parameters(vanilla(size))
        counts = {width: count_parameters(ResNet(size, width)) for width in range(2, 65, 2)}
    return ResNet(size, min(counts, key=lambda width: abs(counts[width] - target)))


def contestants(coeffs: Sequence[float]) -> list[Contestant]:
    """Return the rows of the table."""
    return [
        Contestant("resnet", "an ordinary ResNet with strided blocks", resnet),
        Contestant("vanilla", "y = x + g(x) with ordinary convolutions", vanilla),
        *(Contestant(f"c={c:g}", f"certified Lip(g) <= {c:g}", _invertible(c)) for c in coeffs),
    ]
