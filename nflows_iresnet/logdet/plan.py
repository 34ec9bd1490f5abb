"""How many terms each series of a whole training step takes, drawn before the step.

A step that is recorded once and replayed (a CUDA graph, see `graphs.GraphedStep`) runs no Python
again. A number of terms that is drawn while it is recorded would be that of every later step: the
average over steps would no longer be the log-determinant, and nothing would tell. `TermPlan` takes
the drawing out of the step:

    plan = TermPlan(device)
    with plan.recording():                  # once: who draws, in which order
        step()
    num_terms = plan.draw()                 # before each step, from torch's CPU generator
    with plan.applied():                    # a step that runs Python: the weights as numbers
        step()
    with plan.applied(capacity=8):          # while recording, for num_terms <= 8: the weights as
        step()                              # tensors on the device, zero beyond a block's own N
    plan.fill(capacity=8)                   # before each replay: the weights that were drawn

**One random number for all blocks.** The N of a block is drawn by the block's own law, but all
blocks of a step from the same random number, so that their N are alike, and the longest, whose
products all pay for in a recorded step, is no longer than most. Each block's estimate stays
unbiased, and so does the sum. Their errors are no longer independent; measured, that matters
little: docs/measurements.md#the-roulette-in-a-cuda-graph. Several probes of one block have each
their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class DrawsTerms(Protocol):
    """An estimator that weights the terms of a series, as `SeriesEstimator` does."""

    def term_weights(
        self, lipschitz: float | None, generator: torch.Generator | None = None
    ) -> list[float]:
        """Draw the weights c_1, ..., c_N."""


@dataclass(frozen=True)
class _Request:
    """What a series asks for: the weights of one draw for one probe of one block."""

    estimator: DrawsTerms
    lipschitz: float | None
    generator: torch.Generator | None
    probe: int

    def draw(self) -> list[float]:
        return self.estimator.term_weights(self.lipschitz, self.generator)


_PRESENT: ContextVar[TermPlan | None] = ContextVar("term_plan", default=None)


def planned_weights(
    estimator: DrawsTerms,
    lipschitz: float | None,
    generator: torch.Generator | None,
    probe: int,
) -> Sequence[float] | Tensor:
    """Return the weights of one draw: those of the plan that applies, or newly drawn ones.

    Args:
        estimator: the law of the weights.
        lipschitz: the guaranteed bound of Lip(g), None where the network has none.
        generator: source of randomness.
        probe: which of the estimator's probes they are for.
    """
    plan, request = _PRESENT.get(), _Request(estimator, lipschitz, generator, probe)
    return request.draw() if plan is None else plan.answer(request)


class TermPlan:
    """The weights of all series of a step, for steps that are recorded and replayed.

    It concerns the thread that enters it. Unbiased as each law is: what is drawn before the step is
    what would have been drawn in it.

    Args:
        device: where the weights are read.

    Example:
        >>> from nflows_iresnet.logdet import RussianRoulette
        >>> plan, inputs = TermPlan(torch.device("cpu")), torch.randn(5, 3)
        >>> roulette = RussianRoulette(lipschitz=0.5)
        >>> def estimates():
        ...     return [roulette(lambda x: 0.4 * x, inputs)[1] for _ in range(2)]
        >>> with plan.recording():
        ...     _ = estimates()
        >>> plan.num_draws, plan.draw() >= 1
        (2, True)
        >>> with plan.applied():
        ...     first, second = estimates()
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._requests: list[_Request] = []
        self._drawn: list[list[float]] = []
        self._tables: dict[int, Tensor] = {}
        self._is_recording = False
        self._capacity: int | None = None
        self._next = 0

    @property
    def num_draws(self) -> int:
        """How many draws a step makes."""
        return len(self._requests)

    @property
    def uses_generators(self) -> bool:
        """Whether a series draws from a generator of its own."""
        return any(request.generator is not None for request in self._requests)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember who draws; everybody draws as without a plan."""
        self._requests, self._is_recording = [], True
        try:
            with self._present():
                yield
        finally:
            self._is_recording = False

    def draw(self) -> int:
        """Draw the weights of the next step, and return the largest number of terms, or 0."""
        self._drawn = [[] for _ in self._requests]
        for probe in sorted({request.probe for request in self._requests}):
            state = after = torch.get_rng_state()
            for index, request in enumerate(self._requests):
                if request.probe == probe:
                    torch.set_rng_state(state)
                    self._drawn[index] = request.draw()
                    now = torch.get_rng_state()
                    after = after if torch.equal(now, state) else now
            torch.set_rng_state(after)
        return max(map(len, self._drawn), default=0)

    @contextmanager
    def applied(self, *, capacity: int | None = None) -> Iterator[None]:
        """Answer with what was drawn, as numbers, or as tensors of `capacity` weights.

        Raises:
            RuntimeError: if other draws are asked for than were recorded, or another number.
        """
        self._capacity, self._next = capacity, 0
        with self._present():
            yield
        if self._next != len(self._requests):
            raise RuntimeError(_OTHER_DRAWS)

    def fill(self, *, capacity: int) -> None:
        """Write what was drawn where a step reads that was recorded with this capacity.

        The device is not waited for.
        """
        if not self._drawn:
            return
        padded = [row + [0.0] * (capacity - len(row)) for row in self._drawn]
        weights = torch.tensor(padded, dtype=torch.float64, device="cpu")
        if self._device.type == "cuda":
            weights = weights.pin_memory()
        self._table(capacity).copy_(weights, non_blocking=True)

    def _table(self, capacity: int) -> Tensor:
        if capacity not in self._tables:
            self._tables[capacity] = torch.zeros(
                len(self._requests), capacity, dtype=torch.float64, device=self._device
            )
        return self._tables[capacity]

    def answer(self, request: _Request) -> Sequence[float] | Tensor:
        """Return the weights of the next draw of a step."""
        if self._is_recording:
            self._requests.append(request)
            return request.draw()
        index, self._next = self._next, self._next + 1
        if index >= len(self._requests) or request != self._requests[index]:
            raise RuntimeError(_OTHER_DRAWS)
        if self._capacity is None:
            return self._drawn[index]
        return self._table(self._capacity)[index]

    @contextmanager
    def _present(self) -> Iterator[None]:
        token = _PRESENT.set(self)
        try:
            yield
        finally:
            _PRESENT.reset(token)


_OTHER_DRAWS = (
    "the step asks for other numbers of terms than when it was recorded: its blocks, their order, "
    "estimators or Lipschitz bounds have changed since. Build another GraphedStep"
)
