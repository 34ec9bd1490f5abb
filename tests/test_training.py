"""Training that stops by itself: what is counted, kept, clipped, seeded and refused."""

from __future__ import annotations

import math
import os
import signal
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nflows.flows import MaskedAutoregressiveFlow
from nflows.transforms import LULinear
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from nflows_iresnet import ResidualFlow, interruption, logdet, transforms
from nflows_iresnet.flows import Flow, ImageResidualFlow, StandardNormal
from nflows_iresnet.nn import PowerIteration
from nflows_iresnet.training import History, TrainingDivergedError, fit
from nflows_iresnet.training.loop import Stepper, Training, WeightAverage, adam, run
from nflows_iresnet.training.progress import FirstOf, Seconds, Steps, TrainingPlan
from nflows_iresnet.training.rows import Batches, Validator
from nflows_iresnet.transforms.image import PixelwiseSpline


def rows_of(count: int, features: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def residual_flow(**options: Any) -> ResidualFlow:
    torch.manual_seed(0)
    return ResidualFlow(2, 8, num_layers=2, num_blocks_per_layer=1, **options)


class Line(nn.Module):
    """A "density" whose gradient is as steep as one likes."""

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.weight, self.slope = nn.Parameter(torch.zeros(2)), slope

    def log_prob(self, inputs: Tensor) -> Tensor:
        return inputs.sum(dim=1) * 0 + self.slope * self.weight.sum()


def quick(model: Any, **options: Any) -> History:
    given: dict[str, Any] = {"max_steps": 10, "validations": 5, "batch_size": 8, **options}
    return fit(model, rows_of(40), given.pop("validation", rows_of(20, seed=1)), **given)


# --- what is learned ------------------------------------------------------------------------------


def test_a_flow_learns_and_its_best_state_is_restored() -> None:
    flow = residual_flow()
    train, validation = rows_of(400), rows_of(200, seed=1)
    history = fit(flow, train, validation, max_steps=60, validations=6, learning_rate=1e-2)
    with torch.no_grad(), transforms.using(flow, estimator=logdet.Exact()):
        value = -float(flow.log_prob(validation).double().mean())
    assert value == pytest.approx(history.best_validation, abs=1e-6), "exact, and of the average"
    assert history.best_validation == min(point.validation for point in history.curve)
    gaussian = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(3))
    assert history.best_validation < gaussian + 0.5
    assert not flow.training


def test_a_flow_of_nflows_with_context_learns_from_a_data_loader() -> None:
    rows = rows_of(64)
    context = rows[:, :1] + 0.1
    torch.manual_seed(0)
    flow = MaskedAutoregressiveFlow(2, 8, num_layers=1, num_blocks_per_layer=1)
    plain = fit(flow, DataLoader(TensorDataset(rows), 16, shuffle=True), rows, max_steps=8)
    assert plain.steps == 8
    conditional = residual_flow(context_features=1)
    loader = DataLoader(TensorDataset(rows, context), 16, shuffle=True)
    from_loader = fit(conditional, loader, (rows, context), max_steps=8, validations=2)
    assert from_loader.curve[-1].validation < from_loader.curve[0].validation + 1
    from_pair = fit(residual_flow(context_features=1), (rows, context), loader, max_steps=4)
    assert from_pair.steps == 4


def test_a_model_of_normflows_learns_by_a_loss_of_its_own() -> None:
    normflows = pytest.importorskip("normflows")
    from normflows.utils import update_lipschitz

    torch.manual_seed(0)
    blocks = [normflows.flows.Residual(normflows.nets.LipschitzMLP([2, 8, 2])) for _ in range(2)]
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), blocks)
    calls: list[int] = []

    def after_step() -> None:
        calls.append(1)
        update_lipschitz(model, 5)

    def loss(flow: Any, rows: Tensor) -> Tensor:
        value: Tensor = flow.forward_kld(rows.clone())
        return value

    history = quick(model, loss=loss, after_step=after_step, learning_rate=1e-2)
    assert history.steps == len(calls) == 10
    assert history.curve[-1].validation < history.curve[0].validation


def smaller(flow: Any, rows: Tensor) -> Tensor:
    mean: Tensor = -flow.log_prob(rows / 50).mean()
    return mean


def test_what_starts_from_data_starts_from_the_training_rows_and_only_once() -> None:
    flow, rows = residual_flow(), rows_of(6000) * 50
    seen: list[Tensor] = []
    start = flow.initialize
    flow.initialize = lambda *given: (seen.append(given[0]), start(*given))[1]  # type: ignore
    fit(flow, rows, rows[:100], max_steps=2, validations=1)
    fit(flow, rows, rows[:100], max_steps=2, validations=1)
    (first,) = seen
    assert torch.equal(first, rows[torch.arange(5000) * 6000 // 5000]), (
        "from all over: it is sorted"
    )
    untouched = residual_flow()
    untouched.initialize = lambda *given: pytest.fail("it was started")  # type: ignore
    fit(untouched, rows, rows[:100], max_steps=1, validations=1, initialize=False)
    given_other_rows = residual_flow()
    fit(given_other_rows, rows, rows[:100], loss=smaller, max_steps=1, validations=1)
    assert bool((given_other_rows._transform._transforms[0].scale > 0.05).all())


def test_a_start_from_a_look_at_the_flow_is_said() -> None:
    flow, rows = residual_flow(), rows_of(100)
    flow.log_prob(torch.zeros(5, 2))
    with pytest.warns(UserWarning, match=r"has started from the rows of an earlier call"):
        fit(flow, rows, rows, max_steps=2, validations=1)
    given = residual_flow()
    given.initialize(rows)
    looked_at = residual_flow()
    looked_at.eval().log_prob(rows[:5])
    looked_at.train()
    trained = residual_flow()
    optimizer = torch.optim.Adam(trained.parameters(), fused=True)
    (-trained.log_prob(rows).mean()).backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for each in (flow, given, looked_at, trained):
            fit(each, rows, rows, max_steps=2, validations=1)


# --- when it stops, and what it keeps -------------------------------------------------------------


def test_patience_ends_it_and_the_history_says_so() -> None:
    values, model = iter([9.0, 3.0, 1.0, *[2.0] * 90]), Line()
    weights: list[Tensor] = []

    def validate(flow: Any) -> float:
        weights.append(flow.weight.detach().clone())
        return next(values)

    history = quick(model, validation=validate, max_steps=90, validations=90, patience=4)
    assert (history.stopped, history.steps, history.best_step) == ("patience", 6, 2)
    assert history.best_validation == 1.0
    assert torch.equal(model.weight, weights[2])


def test_a_flow_that_was_trained_before_does_not_come_back_worse() -> None:
    flow = residual_flow()
    quick(flow, max_steps=40)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    history = quick(flow, learning_rate=1.0, max_grad_norm=None)
    assert history.best_step == history.curve[0].step == 0
    assert history.best_validation < min(point.validation for point in history.curve[1:])
    assert math.isnan(history.curve[0].train)
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), name


def learned_through_its_inverse() -> ResidualFlow:
    flow = residual_flow()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        samples, log_prob = flow.sample_and_log_prob(16)
        (log_prob + (samples - 3).square().sum(1)).mean().backward()
        optimizer.step()
    return flow


def parameters_of_another() -> ResidualFlow:
    trained, flow = residual_flow(), residual_flow()
    quick(trained, max_steps=40)
    flow.load_state_dict(dict(trained.named_parameters()), strict=False)
    return flow


def half_of_it_new() -> Flow:
    trained, flow = residual_flow(), residual_flow()
    quick(trained, max_steps=40)
    both = transforms.CompositeTransform([*trained._transform._transforms, transforms.ActNorm(2)])
    return Flow(both, flow._distribution)


@pytest.mark.parametrize("make", [learned_through_its_inverse, parameters_of_another])
def test_what_was_learned_without_its_flag_is_not_started_anew(
    make: Callable[[], ResidualFlow],
) -> None:
    flow, rows = make(), rows_of(20, seed=1)
    with torch.no_grad(), transforms.using(flow, estimator=logdet.Exact()):
        expected = -float(flow.eval().log_prob(rows).double().mean())
    history = quick(flow.train(), validation=rows, learning_rate=1e-9)
    assert history.curve[0].step == 0
    for point in history.curve:
        assert point.validation == pytest.approx(expected, abs=1e-4)


class PartOfAUser(LULinear):
    """Its flag is no tensor."""

    starts_from_rows, initialized, rows = True, False, 0

    def initialize(self, rows: Tensor) -> None:
        self.rows, self.initialized = len(rows), True


@pytest.mark.parametrize("loss", [None, lambda flow, rows: -flow.log_prob(rows).mean()])
def test_parts_of_users_and_pixels_are_started_from_the_rows(loss: Any) -> None:
    rows = rows_of(6000)
    part = PartOfAUser(2)
    quick_on: Any = {"max_steps": 1, "validations": 1, "loss": loss}
    fit(Flow(transforms.CompositeTransform([part]), StandardNormal([2])), rows, rows, **quick_on)
    assert part.rows == 5000
    torch.manual_seed(0)
    images = torch.rand(40, 1, 4, 4) ** 4 * 17
    flow = ImageResidualFlow((1, 4, 4), 8, 1, num_scales=1, levels=17, alpha=1e-6, marginal_bins=8)
    fit(flow, images, images[:10], **quick_on)
    pixels = next(each for each in flow.modules() if isinstance(each, PixelwiseSpline))
    assert bool(pixels.log_slopes.abs().max() > 0.1)


def test_parameters_of_every_kind_come_back_trained() -> None:
    class Mixed(Line):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
            self.count = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)

        def log_prob(self, inputs: Tensor) -> Tensor:
            if self.training:
                self.count.add_(1)
            return super().log_prob(inputs) + self.phase.real.sum()

    model = Mixed()
    quick(model, learning_rate=0.1)
    assert float(model.phase.detach().real.min()) > 0.1
    assert int(model.count.min()) == 10


def test_what_others_keep_in_evaluation_mode_is_up_to_date() -> None:
    """nflows' linear maps may keep their inverse there, until `train` is called."""
    torch.manual_seed(0)
    linear = LULinear(2, using_cache=True)
    flow = Flow(transforms.CompositeTransform([linear]), StandardNormal([2]))
    rows = rows_of(50)
    history = fit(flow, 3 * rows, rows, max_steps=20, learning_rate=0.1, validations=4)
    assert len({point.validation for point in history.curve}) > 2
    kept = flow.log_prob(rows)
    torch.testing.assert_close(flow.train().eval().log_prob(rows), kept)


def test_a_new_part_does_not_have_the_others_started_anew() -> None:
    flow = half_of_it_new()
    before = {name: value.clone() for name, value in flow.named_parameters()}
    history = quick(flow, learning_rate=1e-9, max_steps=2, validations=1)
    assert history.curve[0].step == 2, "there is nothing to validate before its first batch"
    *learned, last = (module for module in flow.modules() if isinstance(module, transforms.ActNorm))
    assert learned
    assert bool(last.initialized)
    assert bool(last.log_scale.any())
    for name, value in flow.named_parameters():
        if value is not last.log_scale and value is not last.shift:
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_patience_does_not_count_from_the_start() -> None:
    """A trained flow is worse at first, when the learning rate is high again."""
    values = iter([0.0, *range(90, 0, -1)])
    history = quick(Line(), validation=lambda flow: next(values), validations=10, patience=2)
    assert (history.stopped, history.steps, history.best_step) == ("length", 10, 0)


def test_a_part_that_has_not_started_is_not_validated_before_its_first_batch() -> None:
    history = quick(residual_flow(), initialize=False)
    assert [point.step for point in history.curve] == [2, 4, 6, 8, 10]


def test_patience_ends_a_training_whose_validations_are_not_finite() -> None:
    steps: list[float] = []
    values = iter([1.0, *[math.nan] * 90])
    with pytest.raises(TrainingDivergedError, match="validation NLL was never finite"):
        quick(
            Line(),
            validation=lambda flow: next(values),
            on_step=lambda done, loss: steps.append(done),
            max_steps=90,
            validations=90,
            patience=4,
        )
    assert len(steps) == 4


@pytest.mark.parametrize("steps", [50, 100, 117])
def test_as_many_validations_as_steps_are_one_after_each(steps: int) -> None:
    """0.29 * 100 is 28.999999999999996."""
    options = {"max_steps": steps, "validations": steps, "patience": 1000}
    history = quick(Line(), validation=lambda flow: 0.0, **options)
    assert [point.step for point in history.curve] == list(range(steps + 1))


def test_the_first_of_steps_and_seconds_ends_it() -> None:
    both = FirstOf((Steps(100), Seconds(10.0)))
    assert both.progress(50, 1.0) == 0.5
    assert both.progress(10, 9.0) == 0.9
    assert quick(Line(), max_steps=7, max_seconds=1e6).steps == 7
    assert quick(Line(), max_steps=10**9, max_seconds=1e-9).steps == 1


class Clock:
    """A step takes one second of it, and a validation a thousand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_training_time_includes_neither_validation_nor_what_is_shown() -> None:
    clock, model = Clock(), Line()

    def validate() -> float:
        clock.now += 1000.0
        return 0.0

    def step() -> None:
        clock.now += 1.0

    def show(done: float, loss: float) -> None:
        clock.now += 500.0

    plan = TrainingPlan(1e-2, Seconds(12.0), validations=4, clock=clock)
    stream = Batches(rows_of(20), 4, 0)
    history = run(Training(model, stream, plan, validate, after_step=step), show)
    assert (history.steps, history.seconds) == (12, 12.0)
    assert [point.seconds for point in history.curve] == [3.0, 6.0, 9.0, 12.0]


class Noting(torch.optim.SGD):
    """Notes the learning rates of its steps."""

    rates: list[list[float]]

    def step(self, closure: Any = None) -> Any:
        self.rates = [*getattr(self, "rates", []), [group["lr"] for group in self.param_groups]]
        return super().step(closure)


def test_the_schedule_scales_every_rate_by_the_part_that_is_done() -> None:
    model = Line()
    model.other = nn.Parameter(torch.ones(1))
    groups: Any = [{"params": [model.weight], "lr": 0.5}, {"params": [model.other]}]
    optimizer = Noting(groups, lr=2.0)
    quick(model, optimizer=optimizer, warmup=0.2)
    plan = TrainingPlan(0.5, Steps(10), warmup=0.2)
    expected = [plan.learning_rate * plan.factor_at(k / 10) for k in range(10)]
    assert [first for first, _ in optimizer.rates] == pytest.approx(expected)
    assert [second for _, second in optimizer.rates] == pytest.approx([4 * r for r in expected])


@pytest.mark.parametrize("limit", [1e-3, None])
def test_gradients_are_clipped(limit: float | None) -> None:
    model = Line(slope=1e6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    moved = []

    def note() -> None:
        moved.append(float(model.weight.detach().norm()))

    quick(model, optimizer=optimizer, max_grad_norm=limit, max_steps=1, after_step=note, warmup=0)
    assert moved[0] == pytest.approx(1e6 * math.sqrt(2) if limit is None else limit, rel=1e-4)


class Two(Line):
    """A line with another parameter, that an optimiser may leave alone."""

    def __init__(self, slope: float, slope_of_other: float) -> None:
        super().__init__(slope)
        self.other, self.slope_of_other = nn.Parameter(torch.zeros(1)), slope_of_other

    def log_prob(self, inputs: Tensor) -> Tensor:
        return super().log_prob(inputs) + self.slope_of_other * self.other


def test_gradients_that_the_optimizer_does_not_take_do_not_pile_up_in_the_norm() -> None:
    model, moved = Two(slope=0.5, slope_of_other=0.5), [torch.zeros(2)]
    optimizer = torch.optim.SGD([model.weight], lr=1.0)

    def note() -> None:
        moved.append(model.weight.detach().clone())

    quick(model, optimizer=optimizer, max_grad_norm=1.0, after_step=note, warmup=0.0)
    lengths = [float((b - a).norm()) for a, b in pairwise(moved)]
    plan, rate = TrainingPlan(1.0, Steps(10)), math.sqrt(0.5)
    assert lengths == pytest.approx([rate * plan.factor_at(k / 10) for k in range(10)], rel=1e-3)


def test_gradients_that_the_optimizer_does_not_take_are_not_clipped_with_the_others() -> None:
    model = Two(slope=0.25, slope_of_other=1e3)
    optimizer = torch.optim.SGD([model.weight], lr=1.0)
    ends = []
    after_step = lambda: ends.append(float(model.weight.detach()[0]))  # noqa: E731
    quick(model, optimizer=optimizer, max_grad_norm=1.0, after_step=after_step, warmup=0.0)
    assert ends[0] == pytest.approx(0.25, rel=1e-3)


def test_weights_that_are_strided_are_trained_as_others() -> None:
    plain, strided = Line(), Line()
    strided.weight = nn.Parameter(torch.zeros(4)[::2])
    for model in (plain, strided):
        quick(model)
    assert float(plain.weight.detach().abs().min()) > 0
    torch.testing.assert_close(strided.weight, plain.weight, rtol=1e-6, atol=0)


def test_adam_is_one_operation_where_that_is_exact() -> None:
    plain, strided, hooked, half = (nn.Parameter(torch.ones(2, 3)) for _ in range(4))
    strided.data = torch.ones(3, 2).t()
    hooked.register_post_accumulate_grad_hook(lambda parameter: None)
    half.data = half.data.bfloat16()
    assert adam([plain, nn.Parameter(torch.ones(2).double())], 0.1).param_groups[0]["fused"]
    for other in (strided, hooked, half):
        assert not adam([plain, other], 0.1).param_groups[0]["fused"]


def test_an_optimizer_has_its_learning_rates_again_afterwards() -> None:
    model = Line()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.25)
    quick(model, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    model = Line()
    with pytest.raises(ValueError, match=r"LBFGS needs a closure.*torch.optim.Adam"):
        quick(model, optimizer=torch.optim.LBFGS(model.parameters()))


def test_a_scheduler_that_is_overridden_is_said() -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    torch.optim.lr_scheduler.LinearLR(optimizer, 0.1)
    with pytest.warns(UserWarning, match="SGD has, or had, a scheduler .* overrides it") as caught:
        quick(model, optimizer=optimizer)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(Line())


def test_an_optimizer_of_another_flow_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SGD has none of the parameters of this Line"):
        quick(Line(), optimizer=torch.optim.SGD(Line().parameters(), lr=0.1))


def test_an_optimizer_of_more_than_the_flow_is_refused() -> None:
    model, beside = Line(), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *beside.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"SGD has 2 parameters that are not of this Line"):
        quick(model, optimizer=optimizer)


def test_a_loss_that_is_no_scalar_is_named() -> None:
    with pytest.raises(ValueError, match=r"the loss must be a scalar, got shape \(8,\)"):
        quick(Line(), loss=lambda flow, rows: -flow.log_prob(rows), validation=lambda flow: 0.0)


def test_processes_that_do_not_know_of_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group"):
        quick(Line())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert quick(Line()).steps == 10


# --- the average of the weights -------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, PowerIteration()], ids=["exact", "power-iteration"])
def test_the_averaged_flow_is_whole(norm: Any) -> None:
    """Buffers are those of the trained flow, certificates hold, and it can be saved and loaded."""
    flow = residual_flow(norm=norm)
    quick(flow, learning_rate=0.1, max_steps=30)
    if norm is None:
        assert max(flow.lipschitz_bound().blocks) <= 0.97
    other, rows = residual_flow(norm=norm), rows_of(10)
    other.load_state_dict(flow.state_dict())
    other.eval()
    with torch.no_grad(), transforms.using(flow, estimator=logdet.Exact()):
        first = flow.log_prob(rows)
        with transforms.using(other, estimator=logdet.Exact()):
            torch.testing.assert_close(other.log_prob(rows), first)
    noise = flow.transform_to_noise(rows)
    torch.testing.assert_close(flow._transform.inverse(noise)[0], rows, atol=1e-3, rtol=1e-3)


def test_averages_are_of_the_weights_after_each_step() -> None:
    model, seen, weights = Line(), [], []

    def validate(flow: Any) -> float:
        seen.append(flow.weight.detach().clone())
        return -len(seen)

    def note() -> None:
        weights.append(model.weight.detach().clone())

    options: dict[str, Any] = {"validation": validate, "after_step": note, "validations": 10}
    quick(model, average_decay=0.9, **options)
    average = weights[0]
    for k, weight in enumerate(weights[1:], start=1):
        average = torch.lerp(weight, average, min(0.9, k / (k + 10)))
        torch.testing.assert_close(seen[k + 1], average)
    assert torch.equal(model.weight, seen[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_averages_of_half_precision_move(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    average = WeightAverage([weight], 0.999)
    for _ in range(3000):
        average.update()
    with torch.no_grad():
        weight.fill_(2.0)
    for _ in range(5000):
        average.update()
    with average.applied():
        assert weight.dtype == dtype
        assert float(weight.detach()[0]) == pytest.approx(2.0, abs=0.02)
    assert float(weight.detach()[0]) == 2.0


def test_a_net_that_is_no_flow_of_ours_keeps_its_buffers() -> None:
    class Counting(Line):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2, affine=False)

        def log_prob(self, inputs: Tensor) -> Tensor:
            return super().log_prob(self.norm(inputs))

    model = Counting()
    quick(model)
    assert int(model.norm.num_batches_tracked) == 10  # type: ignore[arg-type]


def test_whether_steps_were_captured_is_known_without_another_step() -> None:
    first, second = (
        Training(Line(), Batches(rows_of(40), 8, 0), TrainingPlan(1e-2, Steps(4)), lambda: 0.0)
        for _ in range(2)
    )
    state = first.state_dict()
    assert state["capture"] == (False, None)
    second.load_state_dict({**state, "capture": (True, None)})
    assert second.capture == (True, None)


def test_a_part_in_evaluation_mode_stays_there() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.line = nn.BatchNorm1d(2), Line()

        def log_prob(self, rows: Tensor) -> Tensor:
            return self.line.log_prob(self.norm(rows))

    for frozen, expected in ((True, 0), (False, 10)):
        model = Embedding()
        model.norm.train(not frozen)
        quick(model)
        assert int(model.norm.num_batches_tracked) == expected  # type: ignore[arg-type]
    quick(model.eval())
    assert int(model.norm.num_batches_tracked) == 20  # type: ignore[arg-type]


def test_a_part_in_evaluation_mode_stays_there_in_the_next_training() -> None:
    model = nn.Module()
    model.norm, model.line = nn.BatchNorm1d(2), Line()
    model.log_prob = lambda rows: model.line.log_prob(model.norm(rows))  # type: ignore[assignment]
    model.norm.eval()
    for told, expected in ((False, 0), (False, 0), (True, 10)):
        model.norm.train(told)
        quick(model)
        assert not model.training
        assert int(model.norm.num_batches_tracked) == expected  # type: ignore[arg-type]


# --- seeds, records, interruption -----------------------------------------------------------------


def test_a_training_on_one_device_leaves_the_generators_of_others_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Noise drawn on a GPU between trainings on the CPU would be the same each time."""
    touched: list[str] = []
    given = [residual_flow() for _ in range(2)]
    for name in ("manual_seed", "manual_seed_all", "get_rng_state_all", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: touched.append(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for index, flow in enumerate(given):
        quick(flow, seed=3, checkpoint=tmp_path / f"{index}.pt")
    assert touched == []


def test_one_seed_reproduces_everything_and_nothing_global_is_touched() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy = torch.get_rng_state(), str(np.random.get_state())
    ends = []
    for seed in (3, 3, 4):
        flow = residual_flow(estimator=logdet.RussianRoulette())
        torch.set_rng_state(before)
        history = quick(flow, seed=seed)
        ends.append(([(p.train, p.validation) for p in history.curve], flow.state_dict()))
        assert torch.equal(torch.get_rng_state(), before)
        assert str(np.random.get_state()) == numpy
    assert ends[0][0] == ends[1][0] != ends[2][0]
    for name, value in ends[0][1].items():
        assert torch.equal(value, ends[1][1][name]), name


def test_the_history_is_its_json() -> None:
    values = iter([4.0, 2.0, math.nan, 1.0, math.inf, 3.0])
    history = quick(Line(), validation=lambda flow: next(values))
    again = History.from_json(history.to_json())
    assert again.to_json() == history.to_json()
    assert (again.best_validation, again.best_step, again.stopped) == (1.0, 6, "length")
    assert math.isnan(again.curve[2].validation)
    assert math.isnan(again.curve[0].train)


def test_ctrl_c_returns_what_was_reached() -> None:
    def press(limit: float) -> Callable[[float, float], None]:
        def on_step(done: float, loss: float) -> None:
            if done >= limit:
                raise KeyboardInterrupt

        return on_step

    falling = iter(range(90, 0, -1))
    history = quick(Line(), on_step=press(0.7), validation=lambda flow: next(falling))
    assert (history.stopped, history.steps, history.best_step) == ("interrupted", 7, 6)
    history = quick(Line(), on_step=press(0.1))
    assert (history.stopped, history.steps, history.best_step) == ("interrupted", 1, 0)
    with pytest.raises(KeyboardInterrupt):
        quick(Line(), on_step=press(0.1), validation=lambda flow: math.nan)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_ends_the_training_after_its_step() -> None:
    before, steps = signal.getsignal(signal.SIGINT), 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            press()
            press()  # launchers repeat what the terminal has said

    history = quick(Line(), after_step=after_step)
    assert (history.stopped, history.steps) == ("interrupted", 3)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "SECONDS_OF_ONE_PRESS", -1.0)
    seen: list[float] = []

    def press_twice() -> None:
        press()
        press()

    quick(Line(), after_step=press_twice, on_step=lambda done, loss: seen.append(done))
    assert not seen


def test_validations_are_shown_where_they_are_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    quick(Line(), progress=True)
    assert "best validation" in capsys.readouterr().err
    quick(Line())
    assert capsys.readouterr().err == ""


# --- what is refused ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_step_and_the_remedy() -> None:
    class Broken(Line):
        steps = 0

        def log_prob(self, inputs: Tensor) -> Tensor:
            self.steps += self.training
            return super().log_prob(inputs) * (math.nan if self.steps == 6 else 1.0)

    broken = Broken()
    optimizer = torch.optim.SGD(broken.parameters(), lr=0.25)
    with pytest.raises(TrainingDivergedError, match="nan at step 6; lower the learning rate"):
        quick(broken, optimizer=optimizer)
    assert bool(broken.weight.isfinite().all()), "the best state is back"
    assert bool(broken.weight.any())
    assert optimizer.param_groups[0]["lr"] == 0.25
    with pytest.raises(TrainingDivergedError, match="validation NLL was never finite"):
        quick(Line(), validation=lambda flow: math.nan)
    assert not broken.training


ROWS = rows_of(20)
WITH_NAN = torch.where(torch.arange(20)[:, None] == 3, math.nan, ROWS)


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (ROWS[:0], {}, "there are no training rows"),
        (WITH_NAN, {}, "1 of 20 training rows are not finite, first row 3"),
        (ROWS.numpy(), {}, "ndarray"),
        ((ROWS, ROWS[:5]), {}, "one context for each of the 20"),
        (5, {}, "data loader, got int"),
        (iter(()), {"initialize": False}, "training loader has no batch"),
        (iter([ROWS]), {}, "runs out after one pass; give a data loader"),
        (ROWS, {"max_steps": 0}, "max_steps must be at least 1"),
        (ROWS, {"max_seconds": -1.0}, "max_seconds must be a positive number"),
        (ROWS, {"learning_rate": math.nan}, "learning_rate must be a positive number"),
        (ROWS, {"patience": 0}, "patience must be at least 1"),
        (ROWS, {"warmup": 1.0}, "warmup must be a part of the training"),
        (ROWS, {"average_decay": 1.0}, "decay must be in"),
        (ROWS, {"batch_size": 0}, "batch_size must be at least 1"),
        (ROWS, {"max_grad_norm": 0.0}, "max_grad_norm must be a positive number"),
        (ROWS, {"seed": -1}, "seed must be None, or an integer from 0 to 4294967295, got -1"),
        (ROWS, {"seed": 2**32}, "seed must be None, or an integer from 0 to"),
        (ROWS, {"seed": 0.5}, "seed must be None, or an integer from 0 to"),
        (ROWS, {"loss": lambda flow, rows: 1.5}, "must be a tensor with a gradient, got a float"),
    ],
)
def test_what_cannot_work_is_refused(train: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Line(), train, ROWS, **{"max_steps": 2, **options})


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (iter([ROWS] * 9), "runs out after one pass"),
        (DataLoader(TensorDataset(WITH_NAN), 2), "1 of 2 validation rows .* first row 3"),
        (lambda flow: None, "validation must return one number, to be minimised, got None"),
        (lambda flow: flow.log_prob(ROWS), r"got shape \(20,\)"),
    ],
)
def test_what_cannot_be_validated_is_named_and_not_the_learning_rate(
    validation: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quick(residual_flow(), validation=validation)


@pytest.mark.filterwarnings("error")
def test_a_validation_may_return_a_tensor_with_its_graph() -> None:
    def validation(flow: ResidualFlow) -> Tensor:
        return -flow.log_prob(ROWS).mean()

    assert quick(residual_flow(), validation=validation).steps == 10


def test_an_empty_loader_is_named_where_a_flow_starts_from_its_rows() -> None:
    with pytest.raises(ValueError, match="training loader has no batch"):
        fit(residual_flow(), [], ROWS, max_steps=2)


def test_rows_or_contexts_of_one_dimension_are_looked_at_as_any_other() -> None:
    class Labelled(Line):
        def log_prob(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().log_prob(inputs)

    labels = torch.arange(20.0)
    assert fit(Labelled(), (ROWS, labels), (ROWS, labels), max_steps=2, validations=1).steps == 2
    labels[3] = math.nan
    with pytest.raises(ValueError, match="1 of 20 training rows are not finite, first row 3"):
        fit(Labelled(), (ROWS, labels), ROWS, max_steps=2)
    with pytest.raises(ValueError, match=r"expected inputs of shape \(batch, 2\)"):
        fit(residual_flow(), ROWS[:, 0], ROWS, max_steps=2)


def test_one_number_of_another_precision_does_not_cast_the_rows() -> None:
    """As `geom_p` of normflows' residual blocks, the first parameter of its models."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decay = nn.Parameter(torch.zeros((), dtype=torch.float64))
            self.flow = MaskedAutoregressiveFlow(2, 8, 1, 1)

        def log_prob(self, inputs: Tensor) -> Tensor:
            value: Tensor = self.flow.log_prob(inputs)
            return value + self.decay.float()

    assert quick(Mixed()).steps == 10


def test_frozen_flows_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing is to be trained"):
        quick(residual_flow().requires_grad_(False))


def test_rows_are_cast_to_the_precision_of_the_flow() -> None:
    flow = residual_flow()
    assert fit(flow, ROWS.double(), ROWS.double(), max_steps=2, validations=1).steps == 2


def test_rows_that_are_lost_to_the_precision_of_the_flow_are_refused() -> None:
    times = torch.cat([ROWS[:, :1].double(), 1.7e9 + 50 * ROWS[:, :1].double()], dim=1)
    message = r"1 features of the training rows.* feature 1 has mean 1\.7e\+09.*flow\.double\(\)"
    with pytest.raises(ValueError, match=message):
        fit(residual_flow(), times, ROWS, max_steps=2)
    shifted = times - times.mean(0)
    assert fit(residual_flow(), shifted, shifted, max_steps=2, validations=1).steps == 2
    assert fit(residual_flow().double(), times, times, max_steps=2, validations=1).steps == 2


def test_rows_of_a_loader_that_are_lost_to_the_precision_of_the_flow_are_refused() -> None:
    times = 1.7e9 + 50 * rows_of(320).double()
    loader = DataLoader(TensorDataset(times), 16)
    with pytest.raises(ValueError, match=r"2 features of the training rows.*flow\.double\(\)"):
        fit(residual_flow(), loader, ROWS, max_steps=20, validations=1)
    with pytest.raises(ValueError, match=r"2 features of the validation rows"):
        fit(residual_flow(), ROWS, loader, max_steps=2, validations=1)
    fit(residual_flow().double(), loader, loader, max_steps=2, validations=1)


def test_rows_of_a_loader_are_judged_together() -> None:
    rows = torch.stack([1.7e9 + 60 * torch.arange(2000).double(), rows_of(2000)[:, 0]], dim=1)
    for each in (rows, DataLoader(TensorDataset(rows), 16)):
        assert fit(residual_flow(), each, each, max_steps=2, validations=1).steps == 2


def test_batches_of_a_loader_may_have_different_shapes() -> None:
    class Pooled(Line):
        def log_prob(self, inputs: Tensor) -> Tensor:
            return super().log_prob(inputs.mean((2, 3)))

    for dtype in (torch.float32, torch.float64):
        images = [torch.randn(8, 2, 4 + size, 4, dtype=dtype) for size in (0, 1, 2)]
        assert fit(Pooled(), images, images, max_steps=6, validations=2).steps == 6


def test_validation_by_a_loss_keeps_no_graph() -> None:
    kept: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    flow = residual_flow()
    validate = Validator(ROWS, ROWS, lambda flow, rows: -flow.log_prob(rows).mean())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        validate(flow.eval())
    assert not kept


def test_rows_with_a_graph_are_numbers() -> None:
    leaf = rows_of(40).requires_grad_()
    for rows in (leaf, 2 * leaf, DataLoader(TensorDataset(2 * leaf), 16)):
        fit(residual_flow(), rows, rows, max_steps=4, validations=2)
    assert leaf.grad is None


def test_a_loss_that_differentiates_in_its_rows_is_validated() -> None:
    def score_matching(flow: Any, rows: Tensor) -> Tensor:
        rows = rows.clone().requires_grad_()
        (score,) = torch.autograd.grad(flow.log_prob(rows).sum(), rows, create_graph=True)
        return score.square().sum(1).mean()

    flow = residual_flow()
    with transforms.using(flow, estimator=logdet.Exact()):
        history = fit(flow, ROWS, ROWS, loss=score_matching, max_steps=4, validations=2)
    assert history.steps == 4


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_training_without_gradients_says_so(without: Any) -> None:
    with without(), pytest.raises(ValueError, match="gradients are switched off here"):
        quick(Line())


def test_a_graph_of_three_tensors_is_refused_and_the_step_taken() -> None:
    model, rows = Line(), rows_of(8)
    loss = lambda flow, rows, context, weights: flow.log_prob(rows).mean()  # noqa: E731
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=1e-2), None, loss)
    stepper._graphed(rows, rows, rows)(rows, rows, rows)
    assert stepper.capture_reason == "batches have 3 tensors, and a graph rows and their context"


def test_batches_are_drawn_whatever_the_default_device() -> None:
    with torch.device("meta"):
        batch = next(Batches(ROWS, 4, seed=0))
    assert torch.equal(batch, next(Batches(ROWS, 4, seed=0)))


def test_a_sampler_inside_a_sampler_of_batches_is_told_its_epoch() -> None:
    class Told(RandomSampler):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    epochs: list[int] = []
    inner = Told(TensorDataset(ROWS))
    loader = DataLoader(TensorDataset(ROWS), batch_sampler=BatchSampler(inner, 10, drop_last=True))
    fit(residual_flow(), loader, ROWS, max_steps=5, validations=1, initialize=False)
    assert epochs == [0, 1, 2]


@pytest.mark.parametrize("second", ["constant", "sparse", "far, but not too far"])
def test_rows_that_lose_nothing_are_taken(second: str) -> None:
    rows = rows_of(64).double()
    rows[:, 1] = {
        "constant": torch.full((64,), 0.1, dtype=torch.float64),
        "sparse": torch.where(torch.arange(64) == 63, 0.7, 0.1).double(),
        "far, but not too far": 1e4 + rows[:, 1],
    }[second]
    for train in (rows, DataLoader(TensorDataset(rows), 16)):
        assert fit(residual_flow(), train, rows, max_steps=2, validations=1).steps == 2
