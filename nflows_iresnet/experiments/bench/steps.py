"""Training steps: zero_grad, log_prob, backward, Adam, and what the library asks for after it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.bench.items import (
    BASELINE,
    COMPILE_SECONDS,
    FLOOR,
    MEMORY,
    OURS,
    STEP_MODELS,
)
from nflows_iresnet.experiments.bench.measure import Case, Run, Settings, Work
from nflows_iresnet.experiments.bench.models import (
    IMAGE_MODELS,
    CompiledModel,
    ImageSize,
    Size,
    Trainable,
    models_for,
)
from nflows_iresnet.experiments.evaluation import peak_megabytes
from nflows_iresnet.training import seed_everything

TRIO = (OURS, BASELINE, FLOOR)
_LEARNING_RATE = 1e-4
"""So small that many steps leave a model as it is."""
Numbers = Callable[[Work, torch.device], dict[str, float]]


def training_step(
    model: Trainable, batches: Iterator[Tensor], learning_rate: float = _LEARNING_RATE
) -> Work:
    """Return a function that takes one step of Adam on the next batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()

    def step() -> None:
        batch = next(batches)
        optimizer.zero_grad(set_to_none=True)
        (-model.log_prob(batch).mean()).backward()
        optimizer.step()
        model.after_step()

    return step


def _time_alone(work: Work, device: torch.device) -> dict[str, float]:
    return {}


def _peak_memory(work: Work, device: torch.device) -> dict[str, float]:
    return {MEMORY.key: peak_megabytes(work, device)}


def step_run(
    name: str,
    build: Callable[[], Trainable],
    shape: Sequence[int],
    settings: Settings,
    numbers: Numbers = _time_alone,
) -> Run:
    """Return a run that takes steps on one batch of normal numbers.

    Args:
        name: of the model.
        build: makes it.
        shape: of the batch, (B, *).
        settings: of the benchmark.
        numbers: what is measured beside the time.
    """
    seed_everything(settings.seed)
    batch = torch.randn(*shape).to(settings.device)
    model = build()
    model.to(settings.device)
    step = training_step(model, itertools.repeat(batch))
    return Run(name, step, lambda: numbers(step, settings.device))


def step_case(
    size: Size,
    batch: int,
    names: tuple[str, ...] = (),
    numbers: Numbers = _time_alone,
    more: Callable[[Settings], list[Run]] = lambda settings: [],
) -> Case:
    """Return the case of one size and one batch.

    Args:
        size: of the models.
        batch: rows, B.
        names: of models; all by default.
        numbers: what is measured beside the time.
        more: runs of other models.
    """
    shape = (batch, size.features)

    def prepare(settings: Settings) -> list[Run]:
        found = models_for(size, batch, names).items()
        runs = [
            step_run(name, partial(model.build, size), shape, settings, numbers)
            for name, model in found
        ]
        return runs + more(settings)

    return Case.timed(prepare, d=size.features, h=size.hidden, B=batch, blocks=size.blocks)


_HIDDEN = {2: 64, 8: 64, 16: 64, 64: 128, 256: 256, 512: 512}
"""Hidden width for each dimension."""


def _flow(features: int) -> Size:
    """Return a flow of six blocks; of two where they are wide."""
    return Size(features, _HIDDEN[features], 2 if features >= 256 else 6, bare=False)


def over_dimension(settings: Settings) -> list[Case]:
    """Return the cases of all models over the dimension."""
    chosen = (2, 16, 64, 512) if settings.quick else tuple(_HIDDEN)
    return [step_case(_flow(features), 128) for features in chosen]


def over_batch(features: int, settings: Settings) -> list[Case]:
    """Return the cases over the batch."""
    chosen = (32, 1024) if settings.quick else (32, 128, 1024, 8192)
    return [step_case(_flow(features), batch, TRIO) for batch in chosen]


def over_depth(settings: Settings) -> list[Case]:
    """Return the cases over the number of blocks."""
    chosen = (1, 10) if settings.quick else (1, 3, 10, 30, 100)
    return [step_case(Size(2, 64, blocks, bare=False), 256, TRIO) for blocks in chosen]


def memory(settings: Settings) -> list[Case]:
    """Return the cases whose peak memory is measured."""
    sizes = [(Size(2, 64), 256), (Size(64, 128), 128), (Size(512, 512), 128)]
    sizes += [(Size(2, 64, 10, bare=False), 256)]
    return [step_case(size, batch, TRIO, _peak_memory) for size, batch in sizes]


def compiled(settings: Settings) -> list[Case]:
    """Return the cases that also go through `torch.compile`."""
    blocks = 1 if settings.quick else 6
    return [_compiled(Size(d, h, blocks, bare=False)) for d, h in ((2, 64), (64, 128))]


def _compiled(size: Size, batch: int = 128) -> Case:
    def run(settings: Settings) -> list[Run]:
        shape = (batch, size.features)
        step = step_run("ours-compiled", partial(CompiledModel, size), shape, settings)
        assert step.work is not None
        step.work()
        started = time.perf_counter()
        step.work()
        seconds = time.perf_counter() - started
        return [replace(step, numbers=lambda: {COMPILE_SECONDS.key: seconds})]

    return step_case(size, batch, TRIO, more=run)


def of_images(settings: Settings) -> list[Case]:
    """Return the cases of convolutional blocks."""
    sizes = [
        (ImageSize(1, 8, 32), 64),
        (ImageSize(1, 28, 32), 16),
        (ImageSize(4, 14, 64), 16),
        (ImageSize(12, 8, 64), 32),
    ]
    return [_image_case(*each) for each in sizes[: 2 if settings.quick else None]]


def _image_case(size: ImageSize, batch: int) -> Case:
    def prepare(settings: Settings) -> list[Run]:
        return [
            step_run(name, partial(build, size), (batch, *size.shape), settings)
            for name, build in IMAGE_MODELS.items()
        ]

    return Case.timed(prepare, c=size.channels, pixels=size.pixels, h=size.hidden, B=batch)


def exact_likelihood(settings: Settings) -> list[Case]:
    """Return the cases of our exact estimator beside the full Jacobian of normflows."""
    sizes = [(Size(2, 64), 1024), (Size(8, 64), 1024), (Size(64, 128), 128)]
    return [_likelihood_case(*each) for each in sizes]


def _likelihood_case(size: Size, batch: int) -> Case:
    def run(name: str, settings: Settings) -> Run:
        seed_everything(settings.seed)
        rows = torch.randn(batch, size.features).to(settings.device)
        model = STEP_MODELS[name].build(size)
        assert isinstance(model, DensityModel)
        model.to(settings.device).eval()
        return Run(name, lambda: model.exact_log_prob(rows))

    def prepare(settings: Settings) -> list[Run]:
        return [run(name, settings) for name in (OURS, BASELINE)]

    return Case.timed(prepare, d=size.features, h=size.hidden, B=batch)
