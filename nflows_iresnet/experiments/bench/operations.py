"""How many operations a training step asks for: what a step of a small model takes, whatever the
load of the machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    CompositeTransform,
    PiecewiseRationalQuadraticCouplingTransform,
    RandomPermutation,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nflows_iresnet.experiments.adapters import NflowsModel, ResidualModel
from nflows_iresnet.experiments.bench.clock import Work
from nflows_iresnet.experiments.bench.contestants import CONTESTANTS, Model, Size
from nflows_iresnet.experiments.bench.items import (
    BASELINE,
    FLOOR,
    OURS,
    Case,
    CaseResult,
    Entrant,
    Figure,
    Item,
    Settings,
    Target,
)
from nflows_iresnet.experiments.bench.steps import training_step
from nflows_iresnet.experiments.models import MODELS
from nflows_iresnet.flows import ImageResidualFlow
from nflows_iresnet.flows.base import Flow, StandardNormal
from nflows_iresnet.training import seed_everything

OPERATIONS = Figure("operations", "operations", style=".0f")
REALNVP = "realnvp"
_WITHOUT_WORK = {
    "_unsafe_view",
    "alias",
    "as_strided",
    "chunk",
    "detach",
    "diagonal",
    "expand",
    "lift_fresh",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}
"""Operations that make another view of the same memory."""


class OperationCounter(TorchDispatchMode):
    """Counts what is asked of the device inside its context, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation, unless it moves no data."""
        name = func._schema.name.split("::")[-1]
        self.count += name not in _WITHOUT_WORK
        return func(*args, **(kwargs or {}))


def counted_operations(work: Work) -> int:
    """Return how many operations some work asks for, the first call apart."""
    work()
    with OperationCounter() as counter:
        work()
    return counter.count


def _counted_step(model: Model, batch: Tensor) -> dict[str, float]:
    def step() -> None:
        (-model.log_prob(batch).mean()).backward()
        model.after_step()

    return {OPERATIONS.key: float(counted_operations(step))}


def _nsf(size: Size) -> Model:
    masks = itertools.cycle(
        [torch.arange(size.features) % 2, (torch.arange(size.features) + 1) % 2]
    )

    def net(in_features: int, out_features: int) -> nn.Module:
        return ResidualNet(in_features, out_features, size.hidden, num_blocks=2)

    layers = [
        part
        for _ in range(size.blocks)
        for part in (
            RandomPermutation(size.features),
            PiecewiseRationalQuadraticCouplingTransform(
                next(masks), net, num_bins=8, tails="linear", tail_bound=3.0
            ),
        )
    ]
    return NflowsModel(Flow(CompositeTransform(layers), StandardNormal([size.features])))


def _of_compare(name: str) -> Callable[[Size], Model]:
    return lambda size: MODELS[name].build(size.architecture)


_BUILDERS: dict[str, Callable[[Size], Model]] = {
    OURS: _of_compare("residual-flow"),
    BASELINE: CONTESTANTS[BASELINE].build,
    FLOOR: CONTESTANTS[FLOOR].build,
    REALNVP: _of_compare("realnvp"),
    "maf": _of_compare("maf"),
    "nsf": _nsf,
}


def _entrant(name: str, build: Callable[[], Model], batch: Tensor, settings: Settings) -> Entrant:
    seed_everything(settings.seed)
    model, batch = build(), batch.to(settings.device)
    model.to(settings.device)
    step = training_step(model, itertools.repeat(batch))
    return Entrant(name, step, lambda: _counted_step(model, batch))


def _vectors(size: Size, batch: int) -> Case:
    def enter(settings: Settings) -> list[Entrant]:
        return [
            _entrant(name, partial(build, size), torch.randn(batch, size.features), settings)
            for name, build in _BUILDERS.items()
        ]

    return Case.of(enter, d=size.features, h=size.hidden, B=batch, blocks=size.blocks)


def _images(pixels: int, hidden: int, blocks: int, batch: int) -> Case:
    shape = (1, pixels, pixels)

    def build() -> Model:
        return ResidualModel(ImageResidualFlow(shape, hidden, blocks, num_scales=1))

    def enter(settings: Settings) -> list[Entrant]:
        return [_entrant(OURS, build, 256 * torch.rand(batch, *shape), settings)]

    return Case.of(enter, c=1, pixels=pixels, h=hidden, B=batch, blocks=blocks)


def _cases(settings: Settings) -> list[Case]:
    sizes = [Size(2, 64, 6, bare=False), Size(64, 128, 6, bare=False)]
    vectors = [_vectors(size, 128) for size in sizes[: 1 if settings.quick else None]]
    return [*vectors, _vectors(Size(10, 116, 6, bare=False), 512), _images(8, 32, 4, 64)]


def _our_operations(result: CaseResult) -> float | None:
    return result.figure(OURS, OPERATIONS.key)


ITEM = Item(
    "operations of a training step, gradients added to those before, and its time",
    _cases,
    figures=(OPERATIONS,),
    targets=(
        Target(
            "operations at d = 2", 478, _our_operations, lambda p: p.get("d") == 2, at_least=False
        ),
        Target(
            "operations at d = 64",
            800,
            _our_operations,
            lambda p: p.get("d") == 64,
            at_least=False,
        ),
        Target(
            "operations, images 1 x 8 x 8",
            1000,
            _our_operations,
            lambda p: p.get("pixels") == 8,
            at_least=False,
        ),
    ),
)
