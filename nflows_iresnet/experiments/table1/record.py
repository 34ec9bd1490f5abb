"""What is kept of a table of classifiers, and the rows that are shown of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import numpy as np

from nflows_iresnet.experiments.record import RunRecord


@dataclass(frozen=True)
class Inversion:
    """What became of images that were encoded and decoded.

    Args:
        num_failed: how many images have a block where the solver gave up.
        residual_max: largest residual of a block's solution, in the 2-norm.
        error_max: largest error of a pixel, where a level has width 1; the best point that was
            found counts where the solver gave up.
        error_median: median over the images of their largest error.
    """

    num_images: int
    num_failed: int
    residual_max: float
    error_max: float
    error_median: float


@dataclass(frozen=True)
class Outcome:
    """One classifier trained and examined once.

    Args:
        model: name of the row.
        repeat: 0, 1, ...
        best_step: the step whose state was examined.
        train_seconds: time of the training, validation not counted.
        num_wrong: test images that were misclassified.
        lipschitz_bound: largest certified bound over the blocks, None where none is known.
        inversion: what became of test images in the inverse, None where there is none.
        failure: what went wrong, None if nothing did.
        is_captured: whether a training step was one CUDA graph.
        capture_reason: why it was not, None where it was, and on a CPU.
    """

    model: str
    repeat: int
    model_class: str
    num_parameters: int
    steps: int = 0
    best_step: int = 0
    train_seconds: float = 0.0
    num_test: int = 0
    num_wrong: int = 0
    lipschitz_bound: float | None = None
    inversion: Inversion | None = None
    failure: str | None = None
    is_captured: bool = False
    capture_reason: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Model and repeat."""
        return self.model, self.repeat


@dataclass(frozen=True)
class DataSummary:
    """What a reader needs to know about the images.

    Args:
        split: how the splits of the first repeat were made.
        levels: values that a pixel can take.
        num_train: training images per repeat.
        num_test: test images per repeat.
        num_distinct: distinct test images over all repeats.
    """

    name: str
    source: str
    split: str
    shape: tuple[int, ...]
    levels: int
    num_classes: int
    num_train: int
    num_test: int
    num_distinct: int


@dataclass(frozen=True)
class Row:
    """One classifier over all its repeats.

    Args:
        error_se: binomial standard error of the test error, for the distinct test images.
        lipschitz_bound: the largest over the repeats, None where none is known.
        guaranteed_inverse: whether that bound is below 1.
        inversion: the worst over the repeats, counts added up.
        train_seconds: mean over the repeats.
        published: published test errors in percent, by data set.
        failures: what went wrong.
    """

    model: str
    error_percent: float | None
    error_se: float | None
    lipschitz_bound: float | None
    guaranteed_inverse: bool
    inversion: Inversion | None
    num_parameters: int
    train_seconds: float
    published: dict[str, str]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Record(RunRecord):
    """The content of results.json.

    Args:
        arguments: the settings of the run.
        started: ISO date and time.
        published: by row and data set, published test errors in percent.
        outcomes: what is finished.
    """

    FORMAT = "table1-1"
    DERIVED = ("table",)

    data: DataSummary
    published: dict[str, dict[str, str]]
    outcomes: tuple[Outcome, ...] = ()

    @property
    def table(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [asdict(row) for row in self.rows()]

    def rows(self) -> list[Row]:
        """Return the rows of the table, in the order in which they were finished."""
        models = dict.fromkeys(outcome.model for outcome in self.outcomes)
        return [self._row([each for each in self.outcomes if each.model == m]) for m in models]

    def _row(self, outcomes: Sequence[Outcome]) -> Row:
        name, done = outcomes[0].model, [each for each in outcomes if each.failure is None]
        known = [each.lipschitz_bound for each in done if each.lipschitz_bound is not None]
        bound = max(known) if known and len(known) == len(done) else None
        error, standard_error = _error(done, self.data.num_distinct)
        return Row(
            model=name,
            error_percent=error,
            error_se=standard_error,
            lipschitz_bound=bound,
            guaranteed_inverse=bound is not None and bound < 1,
            inversion=_worst([each.inversion for each in done if each.inversion is not None]),
            num_parameters=outcomes[0].num_parameters,
            train_seconds=sum(each.train_seconds for each in done) / max(1, len(done)),
            published=self.published.get(name, {}),
            failures=tuple(each.failure for each in outcomes if each.failure is not None),
        )

    def captures(self) -> list[str]:
        """Say of each row whose steps ran one by one on a GPU why they were not one graph."""
        reasons = {each.model: each.capture_reason for each in self.outcomes}
        return [
            f"{model}: its training step was not captured as one CUDA graph: {reason}"
            for model, reason in reasons.items()
            if reason is not None
        ]

    def caption(self) -> str:
        """Describe the images and the training in one line."""
        data, repeats = self.data, self.arguments["repeats"]
        budget = self.arguments.get("budget")
        length = (
            f"{self.arguments['steps']} steps" if budget is None else f"{budget:g} s of training"
        )
        return (
            f"{data.num_train} training and {data.num_test} test images of "
            f"{'x'.join(map(str, data.shape))}, {repeats} repeat{'s' if repeats > 1 else ''}, "
            f"{data.num_distinct} distinct test images, {length}"
        )

    def adding(self, outcome: Outcome) -> Record:
        """Return the record with one more outcome."""
        return replace(self, outcomes=(*self.outcomes, outcome))


def _error(outcomes: Sequence[Outcome], distinct: int) -> tuple[float | None, float | None]:
    """Return the test error in percent and its binomial standard error."""
    total = sum(each.num_test for each in outcomes)
    if not total:
        return None, None
    rate = sum(each.num_wrong for each in outcomes) / total
    return 100 * rate, 100 * math.sqrt(rate * (1 - rate) / min(total, distinct))


def _worst(inversions: Sequence[Inversion]) -> Inversion | None:
    """Add the counts and take the largest errors; NaN is worse than any."""
    if not inversions:
        return None
    images, failed, *errors = zip(*map(astuple, inversions), strict=True)
    return Inversion(sum(images), sum(failed), *(float(np.max(each)) for each in errors))
