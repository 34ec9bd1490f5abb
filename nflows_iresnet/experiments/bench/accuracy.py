"""Accuracy at cost: how far the estimates of a call scatter, beside the time that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nflows_iresnet import logdet
from nflows_iresnet.experiments.bench.contestants import Size, our_flow, residual_block
from nflows_iresnet.experiments.bench.functions import FrozenNet
from nflows_iresnet.experiments.bench.items import (
    BASELINE,
    OURS,
    Case,
    CaseResult,
    Entrant,
    Figure,
    Item,
    Settings,
    Target,
)
from nflows_iresnet.experiments.bench.trained import trained_branch
from nflows_iresnet.training import seed_everything

VALUE_BASELINE = "normflows-value"
EVALUATION = "normflows-eval"
VALUE_STD = Figure("value_std", "value\nstd", ".3f", baseline=VALUE_BASELINE)
VALUE_BIAS = Figure("value_bias", "value\nbias", ".3f", baseline=None)
GRADIENT_MSE = Figure("gradient_mse", "gradient\nMSE", ".3g")
AT_COST = Figure("gradient_mse", "gradient\nMSE * ms", ".3g", times_milliseconds=True)
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


def estimates(settings: Settings) -> dict[str, Estimate]:
    """Return the estimators that take part."""
    default = residual_block(our_flow(Size(64, 8))).estimator
    return {
        OURS: _our_estimate(default),
        "ours-exact": _our_estimate(logdet.Exact()),
        "ours-series": _our_estimate(logdet.PowerSeries()),
        "ours-roulette": _our_estimate(logdet.RussianRoulette()),
        BASELINE: _normflows_estimate(neumann=True),
        VALUE_BASELINE: _normflows_estimate(neumann=False),
        EVALUATION: _normflows_estimate(neumann=False, training=False),
    }


@dataclass(frozen=True, eq=False)
class Draw:
    """One estimate.

    Args:
        values: log|det|, (B,).
        gradient: of its mean over the batch in all weights, flat; None where there is none.
    """

    values: Tensor
    gradient: Tensor | None


def draw(estimate: Estimate, net: nn.Module, inputs: Tensor) -> Draw:
    """Estimate once, with the gradient where the estimate has one."""
    values = estimate(net, inputs)
    if not values.requires_grad:
        return Draw(values, None)
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(values.mean(), parameters, allow_unused=True)
    parts = [
        (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    return Draw(values.detach(), torch.cat(parts))


def scatter(draws: list[Draw], truth: Draw) -> dict[str, float]:
    """Return the figures of some draws beside the truth.

    The standard deviation is that of one row's value over the draws, root mean square over rows;
    the bias that of the mean over rows and draws. The mean square error of the gradient is
    relative to the square of the true gradient.
    """
    values = torch.stack([each.values for each in draws]).double()
    figures = {
        VALUE_STD.key: float(values.var(dim=0).mean().sqrt()),
        VALUE_BIAS.key: float(values.mean() - truth.values.double().mean()),
    }
    errors = _squared_errors(draws, truth)
    return {**figures, GRADIENT_MSE.key: sum(errors) / len(errors)} if errors else figures


def _squared_errors(draws: list[Draw], truth: Draw) -> list[float]:
    assert truth.gradient is not None
    expected = truth.gradient.double()
    gradients = [each.gradient.double() for each in draws if each.gradient is not None]
    return [float((each - expected).square().sum() / expected.square().sum()) for each in gradients]


def accuracy_case(batch: int) -> Case:
    """Return the case of the trained branch on 64 dimensions."""

    def enter(settings: Settings) -> list[Entrant]:
        branch = trained_branch(64, settings)
        net, inputs = FrozenNet(branch.net), branch.inputs[:batch]
        truth = draw(_our_estimate(logdet.Exact()), net, inputs)
        return [
            _entrant(name, estimate, net, inputs, truth, settings)
            for name, estimate in estimates(settings).items()
        ]

    return Case(f"d=64 h=128 B={batch}", {"d": 64, "h": 128, "B": batch}, enter)


def _entrant(
    name: str, estimate: Estimate, net: nn.Module, inputs: Tensor, truth: Draw, settings: Settings
) -> Entrant:
    raw: dict[str, list[float]] = {}

    def figures() -> dict[str, float]:
        seed_everything(settings.seed)
        count = 40 if settings.quick else 200
        draws = [draw(estimate, net, inputs) for _ in range(count)]
        raw["gradient_squared_error"] = _squared_errors(draws, truth)
        raw["mean_value"] = [float(each.values.mean()) for each in draws]
        return scatter(draws, truth)

    note = "value only" if name == EVALUATION else None
    return Entrant(name, lambda: draw(estimate, net, inputs), figures, raw, note)


def _cases(settings: Settings) -> list[Case]:
    return [accuracy_case(128)]


def _ratio(figure: Figure) -> Callable[[CaseResult], float | None]:
    return lambda result: result.ratio_of(OURS, figure)


ACCURACY = Item(
    "scatter of value and parameter gradient of a trained block on digits, beside the time",
    _cases,
    figures=(VALUE_STD, VALUE_BIAS, GRADIENT_MSE, AT_COST),
    targets=(
        Target("gradient MSE at equal cost, times less", 4.0, _ratio(AT_COST)),
        Target("std of the value, times less", 3.0, _ratio(VALUE_STD)),
    ),
)
