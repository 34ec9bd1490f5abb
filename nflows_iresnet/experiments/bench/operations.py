"""How many operations a training step asks for: what a step of a small model takes, whatever the
load of the machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nflows_iresnet.experiments.adapters import ResidualModel
from nflows_iresnet.experiments.bench.items import BASELINE, FLOOR, OPERATIONS, OURS
from nflows_iresnet.experiments.bench.measure import Case, Run, Settings, Work
from nflows_iresnet.experiments.bench.models import Size, Trainable, plain
from nflows_iresnet.experiments.bench.steps import training_step
from nflows_iresnet.experiments.models import MODELS
from nflows_iresnet.flows import ImageResidualFlow
from nflows_iresnet.training import seed_everything

_VIEWS = frozenset(
    {
        "_reshape_alias",
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
)
"""Operations that make another view of the same memory."""


def moves_data(name: str) -> bool:
    """Whether an operation of torch, by its name without a namespace, is more than a view."""
    return name not in _VIEWS


class OperationCounter(TorchDispatchMode):
    """Counts what is asked of the device inside its context, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take note of an operation, and do it."""
        kwargs = kwargs or {}
        self.see(func._schema.name.split("::")[-1], args, kwargs)
        return func(*args, **kwargs)

    def see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count an operation, unless it moves no data."""
        self.count += moves_data(name)


def counted_operations(work: Work) -> int:
    """Return how many operations some work asks for, the first call apart."""
    work()
    with OperationCounter() as counter:
        work()
    return counter.count


def _run(name: str, build: Callable[[], Trainable], batch: Tensor, settings: Settings) -> Run:
    seed_everything(settings.seed)
    model, batch = build(), batch.to(settings.device)
    model.to(settings.device)

    def gradient() -> None:
        (-model.log_prob(batch).mean()).backward()
        model.after_step()

    def numbers() -> dict[str, float]:
        return {OPERATIONS.key: float(counted_operations(gradient))}

    return Run(name, training_step(model, itertools.repeat(batch)), numbers)


def _registered(name: str) -> Callable[[Size], Trainable]:
    return lambda size: MODELS[name].build(size.architecture)


_MODELS: dict[str, Callable[[Size], Trainable]] = {
    OURS: _registered("residual-flow"),
    BASELINE: _registered("normflows-residual"),
    FLOOR: plain,
    **{name: _registered(name) for name in ("realnvp", "maf", "nsf-coupling")},
}


def _rows(size: Size, batch: int) -> Case:
    def prepare(settings: Settings) -> list[Run]:
        return [
            _run(name, partial(build, size), torch.randn(batch, size.features), settings)
            for name, build in _MODELS.items()
        ]

    return Case.timed(prepare, d=size.features, h=size.hidden, B=batch, blocks=size.blocks)


def _images(pixels: int, hidden: int, blocks: int, batch: int) -> Case:
    shape = (1, pixels, pixels)

    def build() -> Trainable:
        return ResidualModel(ImageResidualFlow(shape, hidden, blocks, num_scales=1))

    def prepare(settings: Settings) -> list[Run]:
        return [_run(OURS, build, 256 * torch.rand(batch, *shape), settings)]

    return Case.timed(prepare, c=1, pixels=pixels, h=hidden, B=batch, blocks=blocks)


def cases(settings: Settings) -> list[Case]:
    """Return the cases: flows of six blocks on rows, and one on images."""
    sizes = [Size(2, 64, 6, bare=False), Size(64, 128, 6, bare=False)]
    vectors = [_rows(size, 128) for size in sizes[: 1 if settings.quick else None]]
    return [*vectors, _rows(Size(10, 116, 6, bare=False), 512), _images(8, 32, 4, 64)]
