"""What time buys: how far estimates scatter at the cost of a call, and likelihood over training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nflows_iresnet import datasets, logdet
from nflows_iresnet.experiments.bench import (
    BASELINE,
    GRADIENT_MSE,
    NLL,
    OURS,
    REACH,
    STEPS,
    VALUE_BASELINE,
    VALUE_BIAS,
    VALUE_STD,
)
from nflows_iresnet.experiments.bench.inverses import (
    ConstantRate,
    FrozenNet,
    default_block,
    trained_branch,
)
from nflows_iresnet.experiments.bench.measure import Case, Measurement, Run, trusts_cpu_time
from nflows_iresnet.experiments.config import describe
from nflows_iresnet.experiments.data import training_batches
from nflows_iresnet.experiments.evaluation import exact_nll
from nflows_iresnet.experiments.models import MODELS, Architecture
from nflows_iresnet.experiments.options import BenchOptions
from nflows_iresnet.training.loop import Training
from nflows_iresnet.training.processes import seed_everything
from nflows_iresnet.training.progress import TrainingPlan

# --- estimates ------------------------------------------------------------------------------------

_EVALUATION = "normflows-eval"
Estimate = Callable[[nn.Module, Tensor], Tensor]


def _our_estimate(estimator: logdet.LogDetEstimator) -> Estimate:
    return lambda net, inputs: estimator(net, inputs)[1]


def _normflows_estimate(*, neumann: bool, training: bool = True) -> Estimate:
    """Return normflows' estimate: its default in training, or one of the value itself."""
    from normflows.flows.residual import iResBlock

    def estimate(net: nn.Module, inputs: Tensor) -> Tensor:
        block = iResBlock(net, neumann_grad=neumann, grad_in_forward=neumann).to(inputs.device)
        block.train(training)
        return -block(inputs.clone(), 0)[1].flatten()

    return estimate


def estimates() -> dict[str, Estimate]:
    """Return the estimates that are compared."""
    return {
        OURS: _our_estimate(default_block().estimator),
        "ours-exact": _our_estimate(logdet.Exact()),
        "ours-series": _our_estimate(logdet.PowerSeries()),
        "ours-roulette": _our_estimate(logdet.RussianRoulette()),
        BASELINE: _normflows_estimate(neumann=True),
        VALUE_BASELINE: _normflows_estimate(neumann=False),
        _EVALUATION: _normflows_estimate(neumann=False, training=False),
    }


class Draw(NamedTuple):
    """One estimate: log|det|, (B,), and the gradient of its mean in all weights, flat, if any."""

    values: Tensor
    gradient: Tensor | None


def draw(estimate: Estimate, net: nn.Module, inputs: Tensor) -> Draw:
    """Estimate once, with the gradient where the estimate has one."""
    values = estimate(net, inputs)
    if not values.requires_grad:
        return Draw(values, None)
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(
        values.mean(), parameters, allow_unused=True, materialize_grads=True
    )
    return Draw(values.detach(), torch.cat([gradient.flatten() for gradient in gradients]))


def scatter(draws: list[Draw], truth: Draw) -> dict[str, float]:
    """Return the numbers of some draws beside the truth.

    The standard deviation is that of one row's value over the draws, root mean square over rows;
    the bias that of the mean over rows and draws. The mean square error of the gradient is
    relative to the square of the true gradient.
    """
    values = torch.stack([each.values for each in draws]).double()
    numbers = {
        VALUE_STD.key: float(values.var(dim=0).mean().sqrt()),
        VALUE_BIAS.key: float(values.mean() - truth.values.double().mean()),
    }
    errors = _squared_errors(draws, truth)
    return {**numbers, GRADIENT_MSE.key: sum(errors) / len(errors)} if errors else numbers


def _squared_errors(draws: list[Draw], truth: Draw) -> list[float]:
    assert truth.gradient is not None
    expected = truth.gradient.double()
    gradients = [each.gradient.double() for each in draws if each.gradient is not None]
    return [float((each - expected).square().sum() / expected.square().sum()) for each in gradients]


def of_estimates(options: BenchOptions) -> list[Case]:
    """Return the case of the trained branch on 64 dimensions."""
    return [Case.timed(lambda options: _runs(options, batch=128), d=64, h=128, B=128)]


def _runs(options: BenchOptions, batch: int) -> list[Run]:
    branch, rows = trained_branch(64, options)
    net, inputs = FrozenNet(branch), rows[:batch]
    truth = draw(_our_estimate(logdet.Exact()), net, inputs)

    def run(name: str, estimate: Estimate) -> Run:
        raw: dict[str, tuple[float, ...]] = {}

        def numbers() -> dict[str, float]:
            seed_everything(options.seed)
            draws = [draw(estimate, net, inputs) for _ in range(40 if options.quick else 200)]
            raw["gradient_squared_error"] = tuple(_squared_errors(draws, truth))
            raw["mean_value"] = tuple(float(each.values.mean()) for each in draws)
            return scatter(draws, truth)

        note = "value only" if name == _EVALUATION else None
        return Run(name, lambda: draw(estimate, net, inputs), numbers, raw, note)

    return [run(name, estimate) for name, estimate in estimates().items()]


# --- training -------------------------------------------------------------------------------------

MODELS_OF_QUALITY = {OURS: "residual-flow", BASELINE: "normflows-residual"}
"""By their names in the comparisons."""
HIDDEN = {"checkerboard": 64, "two-spirals": 64, "digits": 128}
"""Width of the hidden layers for each data set."""
BATCH = 256
TEST_ROWS = 2000
VALIDATION_ROWS = 1000
_CHECKPOINTS = 17
"""Checkpoints at the budget times 2^(-k/2): the first after a 256th of it."""


class Point(NamedTuple):
    """An examination: training time in seconds, exact NLL of the validation and test rows."""

    seconds: float
    validation: float
    test: float


@dataclass
class Curve:
    """The examinations of a model in order, and what went wrong, after which there are no more."""

    points: list[Point] = field(default_factory=list)
    failure: str | None = None

    @property
    def best(self) -> Point:
        """The point of the lowest validation NLL, infinite where none was finite."""
        finite = (point for point in self.points if math.isfinite(point.validation))
        none = Point(math.inf, math.inf, math.inf)
        return min(finite, key=lambda point: point.validation, default=none)

    def seconds_to(self, validation: float) -> float | None:
        """Return the training time of the first point that validates as well, or None."""
        return next((each.seconds for each in self.points if each.validation <= validation), None)

    def go_on(self, training: Training, seconds: float, *rows: Tensor) -> None:
        """Train until so much time is used up in all and add a point, or the failure.

        Args:
            training: what is gone on with.
            seconds: of training in all.
            rows: validation rows, which choose, and test rows, which are reported.
        """
        if self.failure is None:
            try:
                _train_until(training, seconds)
                training.model.eval()
                validation, test = (exact_nll(training.model, each) for each in rows)
                self.points.append(Point(training.progress.elapsed, validation, test))
            except Exception as error:
                self.failure = describe(error)


def _train_until(training: Training, seconds: float) -> None:
    training.model.train()
    while training.progress.elapsed < seconds:
        training.step()
        if training.is_to_be_looked_at:
            training.look()


def _training(name: str, dataset: datasets.Dataset, seed: int, options: BenchOptions) -> Training:
    seed_everything(seed)
    size = Architecture(dataset.features, HIDDEN[dataset.name], 6, 2)
    model = MODELS[MODELS_OF_QUALITY[name]].build(size).to(options.device)
    clock = time.process_time if trusts_cpu_time(options) else time.perf_counter
    plan = TrainingPlan(options.rate, ConstantRate(), clip_norm=None, clock=clock)
    batches = training_batches(dataset, BATCH, seed, options.device)
    return Training(model, batches, plan, lambda: math.nan, after_step=model.after_step)


def checkpoints(budget: float) -> list[float]:
    """Return the training times at which models are examined, in geometric progression."""
    return [budget * 2 ** (-k / 2) for k in reversed(range(_CHECKPOINTS))]


def train_side_by_side(name: str, seed: int, options: BenchOptions) -> tuple[Measurement, ...]:
    """Train the models in turns, from one checkpoint to the next."""
    dataset = datasets.load(name, seed=seed)
    test = dataset.test[:TEST_ROWS].to(options.device)
    validation = dataset.validation[:VALIDATION_ROWS].to(options.device)
    trainings = {each: _training(each, dataset, seed, options) for each in MODELS_OF_QUALITY}
    curves = {each: Curve() for each in trainings}
    for seconds in checkpoints(options.seconds or (10.0 if options.quick else 80.0)):
        for each, curve in curves.items():
            curve.go_on(trainings[each], seconds, validation, test)
    goal = curves[BASELINE].best.validation
    return tuple(
        _measurement(each, curve, trainings[each].progress.begun, goal)
        for each, curve in curves.items()
    )


def _measurement(name: str, curve: Curve, steps: int, goal: float) -> Measurement:
    reached = curve.seconds_to(goal) if math.isfinite(goal) else None
    numbers = {NLL.key: curve.best.test, STEPS.key: float(steps)}
    seconds, validation, nll = (tuple(point[axis] for point in curve.points) for axis in range(3))
    return Measurement(
        name,
        numbers=numbers if reached is None else {**numbers, REACH.key: reached},
        raw={"seconds": seconds, "validation": validation, "nll": nll},
        note=_note(curve, reached),
    )


def _note(curve: Curve, reached: float | None) -> str | None:
    if curve.failure is not None:
        return curve.failure
    if not math.isfinite(curve.best.validation):
        return "its validation NLL was never finite: lower --learning-rate"
    return "normflows' best not reached" if reached is None else None


def over_training_time(options: BenchOptions) -> list[Case]:
    """Return a case for each data set and seed."""
    seeds = range(options.seed, options.seed + (1 if options.quick else 3))
    return [
        Case(f"{name} seed={seed}", {"seed": seed}, partial(train_side_by_side, name, seed))
        for name in HIDDEN
        for seed in seeds
    ]
