"""The training step through `torch.compile`: what it gains, and how long compiling takes."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nflows_iresnet import logdet
from nflows_iresnet.experiments.adapters import ResidualModel
from nflows_iresnet.experiments.bench.contestants import Size, our_flow
from nflows_iresnet.experiments.bench.items import Case, Entrant, Figure, Item, Settings
from nflows_iresnet.experiments.bench.steps import TRIO, step_case, step_entrant

COMPILED = "ours-compiled"
COMPILE_SECONDS = Figure("compile_seconds", "compile\ns", ".0f", baseline=None)
_NUM_TERMS = 6
"""About as many as the roulette needs on average for a bound of 0.97."""


class CompiledModel(ResidualModel):
    """A flow of this library whose `log_prob` goes through `torch.compile`, as one graph.

    With the exact log-determinant where that is the default, else with the power series: the random
    number of terms of the roulette cannot be compiled.
    """

    def __init__(self, size: Size) -> None:
        exact = size.features <= logdet.Auto().max_exact_features
        estimator = logdet.Exact() if exact else logdet.PowerSeries(num_terms=_NUM_TERMS)
        super().__init__(our_flow(size, estimator))
        self._compiled = torch.compile(self.flow.log_prob, fullgraph=True)
        self._has_started = False

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the flow's log-density; the first call, which starts ActNorm, is not compiled."""
        if self._has_started:
            return self._compiled(inputs)
        self._has_started = True
        return super().log_prob(inputs)


def _compiled_entrant(size: Size, batch: int, settings: Settings) -> Entrant:
    shape = (batch, size.features)
    entrant = step_entrant(COMPILED, partial(CompiledModel, size), shape, settings)
    assert entrant.work is not None
    entrant.work()
    started = time.perf_counter()
    entrant.work()
    seconds = time.perf_counter() - started
    return replace(entrant, figures=lambda: {COMPILE_SECONDS.key: seconds})


def _case(size: Size, batch: int) -> Case:
    eager = step_case(size, batch, TRIO)

    def enter(settings: Settings) -> list[Entrant]:
        return [*eager.enter(settings), _compiled_entrant(size, batch, settings)]

    return replace(eager, enter=enter)


def _cases(settings: Settings) -> list[Case]:
    blocks = 1 if settings.quick else 6
    return [_case(Size(d, h, blocks, bare=False), 128) for d, h in ((2, 64), (64, 128))]


STEP_COMPILED = Item(
    "training step of six blocks through torch.compile (compiling takes minutes)",
    _cases,
    figures=(COMPILE_SECONDS,),
    is_optional=True,
)
