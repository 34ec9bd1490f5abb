"""Accuracy at cost: how far the estimates of a call scatter, beside the time that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nflows_iresnet import logdet
from nflows_iresnet.experiments.bench.items import (
    BASELINE,
    GRADIENT_MSE,
    OURS,
    VALUE_BASELINE,
    VALUE_BIAS,
    VALUE_STD,
)
from nflows_iresnet.experiments.bench.measure import Case, Run, Settings
from nflows_iresnet.experiments.bench.models import FrozenNet, default_block, trained_branch
from nflows_iresnet.training import seed_everything

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


def cases(settings: Settings) -> list[Case]:
    """Return the case of the trained branch on 64 dimensions."""
    return [Case.timed(lambda settings: _runs(settings, batch=128), d=64, h=128, B=128)]


def _runs(settings: Settings, batch: int) -> list[Run]:
    branch = trained_branch(64, settings)
    net, inputs = FrozenNet(branch.net), branch.inputs[:batch]
    truth = draw(_our_estimate(logdet.Exact()), net, inputs)
    return [
        _run(name, estimate, net, inputs, truth, settings) for name, estimate in estimates().items()
    ]


def _run(
    name: str, estimate: Estimate, net: nn.Module, inputs: Tensor, truth: Draw, settings: Settings
) -> Run:
    raw: dict[str, list[float]] = {}

    def numbers() -> dict[str, float]:
        seed_everything(settings.seed)
        count = 40 if settings.quick else 200
        draws = [draw(estimate, net, inputs) for _ in range(count)]
        raw["gradient_squared_error"] = _squared_errors(draws, truth)
        raw["mean_value"] = [float(each.values.mean()) for each in draws]
        return scatter(draws, truth)

    note = "value only" if name == _EVALUATION else None
    return Run(name, lambda: draw(estimate, net, inputs), numbers, raw, note)
