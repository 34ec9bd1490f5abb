"""Training steps: zero_grad, log_prob, backward, Adam, and what the library asks for after it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from nflows_iresnet.experiments.bench.clock import Work
from nflows_iresnet.experiments.bench.contestants import Model, Size, contestants_for
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
from nflows_iresnet.experiments.evaluation import peak_megabytes
from nflows_iresnet.training import seed_everything

LEARNING_RATE = 1e-4
MEMORY = Figure("memory_mb", "peak\nMB")
TRIO = (OURS, BASELINE, FLOOR)
Figures = Callable[[Work, torch.device], dict[str, float]]


def training_step(
    model: Model, stream: Iterator[Tensor], learning_rate: float = LEARNING_RATE
) -> Work:
    """Return a function that takes one optimiser step of a model.

    Args:
        model: what is trained, with Adam.
        stream: batches (B, d), for ever.
        learning_rate: of Adam; by default so small that many steps leave the model as it is.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()

    def step() -> None:
        batch = next(stream)
        optimizer.zero_grad(set_to_none=True)
        (-model.log_prob(batch).mean()).backward()
        optimizer.step()
        model.after_step()

    return step


def _no_figures(work: Work, device: torch.device) -> dict[str, float]:
    return {}


def _memory(work: Work, device: torch.device) -> dict[str, float]:
    return {MEMORY.key: peak_megabytes(work, device)}


def step_entrant(
    name: str,
    build: Callable[[], Model],
    shape: Sequence[int],
    settings: Settings,
    figures: Figures = _no_figures,
) -> Entrant:
    """Return a contestant that takes steps on one batch of normal numbers.

    Args:
        name: of the contestant.
        build: makes its model.
        shape: of the batch, (B, *).
        settings: of the benchmark.
        figures: what is measured beside the time.
    """
    seed_everything(settings.seed)
    batch = torch.randn(*shape).to(settings.device)
    model = build()
    model.to(settings.device)
    step = training_step(model, itertools.repeat(batch))
    return Entrant(name, step, lambda: figures(step, settings.device))


def step_case(
    size: Size, batch: int, names: tuple[str, ...] = (), figures: Figures = _no_figures
) -> Case:
    """Return the case of one size and one batch.

    Args:
        size: of the model.
        batch: rows, B.
        names: contestants; all by default.
        figures: what is measured beside the time.
    """

    def enter(settings: Settings) -> list[Entrant]:
        return [
            step_entrant(name, partial(each.build, size), (batch, size.features), settings, figures)
            for name, each in contestants_for(size, batch, names).items()
        ]

    return Case.of(enter, d=size.features, h=size.hidden, B=batch, blocks=size.blocks)


def _subset(quick: bool, few: Iterable[int], all_of_them: Iterable[int]) -> Iterable[int]:
    return few if quick else all_of_them


HIDDEN = {2: 64, 8: 64, 16: 64, 64: 128, 256: 256, 512: 512}
"""Hidden width for each dimension."""


def _flow(features: int) -> Size:
    """Return a flow of six blocks; of two where they are wide."""
    return Size(features, HIDDEN[features], 2 if features >= 256 else 6, bare=False)


def _over_dimension(settings: Settings) -> list[Case]:
    chosen = _subset(settings.quick, (2, 16, 64, 512), HIDDEN)
    return [step_case(_flow(features), 128) for features in chosen]


def _over_batch(features: int) -> Callable[[Settings], list[Case]]:
    def cases(settings: Settings) -> list[Case]:
        chosen = _subset(settings.quick, (32, 1024), (32, 128, 1024, 8192))
        return [step_case(_flow(features), batch, TRIO) for batch in chosen]

    return cases


def _over_depth(settings: Settings) -> list[Case]:
    chosen = _subset(settings.quick, (1, 10), (1, 3, 10, 30, 100))
    return [step_case(Size(2, 64, blocks, bare=False), 256, TRIO) for blocks in chosen]


def _memory_cases(settings: Settings) -> list[Case]:
    sizes = [(Size(2, 64), 256), (Size(64, 128), 128), (Size(512, 512), 128)]
    sizes += [(Size(2, 64, 10, bare=False), 256)]
    return [step_case(size, batch, TRIO, _memory) for size, batch in sizes]


def our_speed(result: CaseResult) -> float | None:
    """Return how many times faster this library's default is than normflows."""
    ratio = result.speed(OURS)
    return None if ratio is None else ratio.median


def _above_floor(result: CaseResult) -> float | None:
    ratio = result.speed(FLOOR, against=OURS)
    return None if ratio is None else ratio.median


STEP_DIMENSION = Item(
    "training step of six blocks (two from d = 256 on) over the dimension, B = 128",
    _over_dimension,
    targets=(
        Target("step at d = 2, times faster", 3.0, our_speed, lambda p: p["d"] == 2),
        Target("step at d = 8..64, times faster", 2.5, our_speed, lambda p: 8 <= p["d"] <= 64),
        Target("step at d = h = 512, times faster", 1.9, our_speed, lambda p: p["d"] == 512),
        Target("step beside the plain net, times slower", 2.5, _above_floor, at_least=False),
    ),
    variable="d",
)
STEP_BATCH_2 = Item(
    "training step of six blocks over the batch, d = 2",
    _over_batch(2),
    targets=(Target("step at B = 1024, times faster", 2.0, our_speed, lambda p: p["B"] == 1024),),
    variable="B",
)
STEP_BATCH_64 = Item(
    "training step of six blocks over the batch, d = 64",
    _over_batch(64),
    targets=STEP_BATCH_2.targets,
    variable="B",
)
STEP_DEPTH = Item(
    "training step over the number of blocks, with ActNorm, d = 2, B = 256",
    _over_depth,
    variable="blocks",
)
STEP_MEMORY = Item(
    "peak memory of a training step",
    _memory_cases,
    figures=(MEMORY,),
    targets=(
        Target(
            "training memory, times less",
            1.0,
            lambda result: result.figure_ratio(OURS, MEMORY.key),
        ),
    ),
)
