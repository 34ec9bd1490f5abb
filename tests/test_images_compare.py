"""The comparison of image models: exact, and fair."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nflows_iresnet import transforms
from nflows_iresnet.experiments import adapters, models, runs
from nflows_iresnet.experiments.adapters import CouplingNet
from nflows_iresnet.experiments.config import RunConfig
from nflows_iresnet.experiments.data import ImageTask
from nflows_iresnet.experiments.evaluation import CHUNK, EvaluationData, evaluate, exact_log_prob
from nflows_iresnet.experiments.models import IMAGE_MODELS, ImageArchitecture, count_parameters
from nflows_iresnet.training.processes import seed_everything
from nflows_iresnet.training.progress import Steps, TrainingPlan
from nflows_iresnet.training.rows import Batches
from tests.optional import named
from tests.trained import train

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

SMALL = ImageArchitecture(16, 8, 2, 1, shape=(1, 4, 4), levels=17, num_scales=2)
CONFIG = RunConfig(("digits",), ("glow",), steps=3, images=True, num_train=64, batch_size=16)


def images(rows: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.arange(16.0).reshape(1, 1, 4, 4)
    return (ramp + 3 * torch.rand(rows, 1, 4, 4, generator=generator)).clamp(0, 16.99)


def trained(name: str, size: ImageArchitecture = SMALL) -> adapters.DensityModel:
    """Return a model after steps that move it off its start."""
    seed_everything(1)
    model, falling = IMAGE_MODELS[name].build(size), iter(range(20, 0, -1))
    stream = Batches(images(), 32, 0)
    train(model, stream, lambda: float(next(falling)), TrainingPlan(1e-2, Steps(15)))
    return model


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", named(IMAGE_MODELS))
def test_exact_log_prob_and_round_trip(name: str) -> None:
    """Against slogdet of the Jacobian of the whole model."""
    model, points = trained(name), images(3, seed=9)
    flat = points.flatten(1)
    _, jacobian = adapters.value_and_jacobian(
        lambda rows: model.encode(rows.reshape(-1, 1, 4, 4)), flat
    )
    noise = model.encode(points).detach()
    base = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(dim=1)
    expected = base + torch.linalg.slogdet(jacobian.double()).logabsdet
    found = exact_log_prob(model, points).double()
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(noise), points, atol=1e-3, rtol=1e-4)
        assert model.sample(5).shape == (5, 1, 4, 4)
    logits = [each for each in model.modules() if isinstance(each, transforms.LogitTransform)]
    assert [each.levels for each in logits] == [17]


def test_bits_of_the_summary_are_those_of_the_data() -> None:
    task = ImageTask.load("digits", CONFIG)
    summary = task.summarise()
    assert summary.bits_per_dim(64 * math.log(17)) == pytest.approx(math.log2(17))
    for nats in (3.0, 150.0):
        assert summary.bits_per_dim(nats) == pytest.approx(task.data.to_bits_per_dim(nats))


class Estimating(adapters.NflowsModel):
    """Estimates with an error that a chunk of rows shares."""

    estimates = True
    bias = 0.0

    def log_prob(self, inputs: Tensor) -> Tensor:
        return super().log_prob(inputs) + self.bias + torch.randn(())


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_the_estimate_is_held_against_the_exact_value(bias: float) -> None:
    model = Estimating(trained("glow").flow)
    model.bias = bias
    test = images(20 * CHUNK)
    exam = EvaluationData(test, test[:8], None, None, max_exact_rows=80)
    metrics = evaluate(model, exam, seed=0).metrics
    assert metrics.exact_gap is not None
    assert metrics.exact_gap_se is not None
    assert metrics.test_nll_se is not None
    assert metrics.exact_rows == 80
    assert not metrics.test_nll_exact
    assert abs(metrics.exact_gap - bias) < 4 * metrics.exact_gap_se
    assert metrics.exact_gap_se == pytest.approx(1 / math.sqrt(160), rel=0.4)
    assert metrics.test_nll_se > 0.1, "rows of a chunk are not independent"
    exact = evaluate(model, replace(exam, max_exact_rows=None), seed=0).metrics
    assert exact.test_nll_exact
    assert exact.test_nll == pytest.approx(-float(exact_log_prob(model, test).mean()), abs=1e-4)


def test_likelihoods_are_averaged_over_the_draws_of_noise() -> None:
    model, one, two = trained("realnvp"), images(40), images(40, seed=5)
    exams = [EvaluationData(one, one, None, None), EvaluationData(two, two, None, None)]
    exams.append(replace(exams[0], more_draws=(two,)))
    first, second, both = (evaluate(model, exam, 0).metrics.test_nll or 0.0 for exam in exams)
    assert both == pytest.approx((first + second) / 2, abs=1e-4)
    assert first != pytest.approx(second, abs=1e-3)


@pytest.mark.parametrize(("side", "expected"), [(8, 256), (28, 256), (56, 27)])
def test_large_images_get_fewer_jacobians(side: int, expected: int) -> None:
    data = ImageTask.load("digits", CONFIG).data
    task = ImageTask(replace(data, train=torch.zeros(20, 1, side, side, dtype=torch.uint8)))
    assert task.evaluation_data(CONFIG).max_exact_rows == expected
    assert task.evaluation_data(replace(CONFIG, exact_images=3)).max_exact_rows == 3


def test_validation_and_test_noise_are_fixed_and_leave_no_trace() -> None:
    task, other = (ImageTask.load("digits", replace(CONFIG, batch_size=size)) for size in (8, 16))
    assert torch.equal(task.evaluation_data(CONFIG).test, other.evaluation_data(CONFIG).test)
    assert torch.equal(task.evaluation_data(CONFIG).test.floor(), task.data.test.float())
    (draw,) = task.evaluation_data(replace(CONFIG, dequantisations=2)).more_draws
    assert torch.equal(draw.floor(), task.data.test.float())
    assert not torch.equal(draw, task.evaluation_data(CONFIG).test)
    model = Estimating(IMAGE_MODELS["glow"].build(task.reference(CONFIG)).flow)
    before = torch.get_rng_state()
    values = {task.validate(model, CONFIG), task.validate(model, CONFIG)}
    assert len(values) == 1
    assert torch.equal(torch.get_rng_state(), before)


# --- fair -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
@pytest.mark.parametrize("name", named(IMAGE_MODELS))
def test_parameter_counts_are_within_ten_percent(name: str, shape: tuple[int, int, int]) -> None:
    reference = ImageArchitecture(math.prod(shape), 32, 2, 2, shape, 256, num_scales=2)
    target = count_parameters(IMAGE_MODELS["residual-flow"].build(reference))
    model = IMAGE_MODELS[name].build(models.match_parameters(name, reference))
    tolerance = 0.25 if IMAGE_MODELS[name].is_coarse else 0.1
    assert abs(count_parameters(model) - target) <= tolerance * target


def test_every_model_sees_the_same_pixels_and_the_same_fresh_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    log_prob = adapters.NflowsModel.log_prob

    def spy(self: adapters.NflowsModel, inputs: Tensor) -> Tensor:
        if self.training:
            seen.append(inputs)
        return log_prob(self, inputs)

    monkeypatch.setattr(adapters.NflowsModel, "log_prob", spy)
    config = replace(CONFIG, models=("glow", "realnvp"), batch_size=64)
    for run in runs.prepare(config):
        model = IMAGE_MODELS[run.model].build(replace(run.size, num_layers=1))
        runs.train_run(model, runs.Job(run, config))
    first, second = seen[:3], seen[3:]
    assert len(seen) == 6
    assert all(map(torch.equal, first, second))
    epochs = [batch.flatten(1).sort(dim=0).values for batch in first]
    assert torch.equal(epochs[0].floor(), epochs[1].floor()), "an epoch is every image once"
    assert not torch.equal(epochs[0], epochs[1]), "with other noise"


def test_half_precision_is_for_networks_in_training_alone() -> None:
    seen: list[torch.dtype] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.layer(inputs)
            seen.append(outputs.dtype)
            return outputs

    for half_precision in (True, False):
        net = CouplingNet(Net(), half_precision=half_precision)
        for training in (True, False):
            assert net.train(training)(torch.ones(2, 1, 4, 4)).dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32, torch.float32, torch.float32]


@pytest.mark.parametrize("name", ["glow", "realnvp", "glow-normflows"])
def test_half_precision_reaches_the_networks_of_a_model_and_only_them(name: str) -> None:
    seen: set[torch.dtype] = set()
    model = IMAGE_MODELS[name].build(replace(SMALL, half_precision=True))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda net, inputs, outputs: seen.add(outputs.dtype))
    assert model.train().log_prob(images(8)).dtype in (torch.float32, torch.float64)
    assert seen == {torch.bfloat16}
    assert model.encode(images(8)).dtype == torch.float32
