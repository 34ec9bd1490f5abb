"""What faults of whole rooms would leave alive, and no other file of tests looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nflows_iresnet import datasets, flows, logdet, transforms
from nflows_iresnet.linearization import linearize
from nflows_iresnet.transforms.image import dequantize
from nflows_iresnet.transforms.residual import inverse_values_only
from tests.peers import Wave

# --- flows ----------------------------------------------------------------------------------------


def test_an_invertible_resnet_is_that_of_the_paper() -> None:
    """Gaussian probes, no control variate, and as many terms as are asked for."""
    flow = flows.InvertibleResNet(2, 8, 2, num_terms=3)
    blocks = [each for each in flow.modules() if isinstance(each, transforms.ResidualTransform)]
    expected = logdet.PowerSeries(num_terms=3, probe=logdet.Gaussian(), exact_trace=False)
    assert [block.estimator for block in blocks] == [expected] * 2


def test_a_start_embeds_its_context_as_an_evaluation_does() -> None:
    """Nothing is dropped at random, and no running statistic moves."""
    torch.manual_seed(0)
    flow = flows.ResidualFlow(2, 8, 1, context_features=3)
    seen: list[bool] = []
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    net.register_forward_hook(lambda module, *_: seen.append(module.training))
    conditional = flows.Flow(flow._transform, flow._distribution, net)
    conditional.initialize(torch.randn(50, 2), torch.randn(50, 4), batch_size=20)
    assert seen == [False] * 3
    assert net.training


def test_a_log_determinant_that_was_not_computed_is_no_number() -> None:
    block = transforms.ResidualTransform(Wave())
    outputs = torch.randn(3, 2)
    with inverse_values_only():
        assert bool(block.inverse(outputs)[1].isnan().all())
    assert bool(block.inverse(outputs)[1].isfinite().all())


# --- splines --------------------------------------------------------------------------------------


def _started(rows: Tensor, num_bins: int = 8) -> transforms.ElementwiseRationalQuadraticSpline:
    spline = transforms.ElementwiseRationalQuadraticSpline(rows.shape[1], num_bins).double()
    spline.initialize(rows)
    return spline


def test_the_quantiles_of_few_rows_lie_in_the_middle_of_their_steps() -> None:
    """Half of the rows are below their median, and data that are mirrored start as a mirror."""
    torch.manual_seed(0)
    rows = torch.rand(101, 1, dtype=torch.float64) ** 3 * 3 - 1
    spline, mirrored = _started(rows), _started(-rows)
    assert bool(spline.sizes.any())
    torch.testing.assert_close(spline(rows)[0], -mirrored(-rows)[0], rtol=0, atol=1e-9)


def test_the_slope_at_a_knot_is_the_geometric_mean_of_both_sides() -> None:
    torch.manual_seed(0)
    spline = _started(torch.rand(5000, 1, dtype=torch.float64) * 3 - 1.5)
    widths, heights = spline._knots().diff(dim=2).detach()[:, 0]
    logs = (heights / widths).log()
    slopes = 5 * (spline.log_slopes.detach()[0] / 5).tanh()
    torch.testing.assert_close(slopes, (logs[1:] + logs[:-1]) / 2, rtol=0, atol=1e-9)


def test_the_rows_that_judge_a_spline_are_spread_over_all() -> None:
    """The first ones are normal, to which no spline is a gain; the others are at two peaks."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(5000, 1, generator=generator, dtype=torch.float64)
    peaks = 0.05 * torch.randn(15_000, 1, generator=generator, dtype=torch.float64)
    peaks = peaks + torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(7500)[:, None]
    assert bool(_started(torch.cat([normal, peaks])).sizes.any())


# --- images ---------------------------------------------------------------------------------------


def test_the_noise_of_a_pixel_starts_at_zero_and_ends_below_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for drawn, expected in ((0.0, 0.0), (2.0**-20, 0.0), (1 - 2.0**-24, 1 - 2.0**-16)):
        monkeypatch.setattr(torch, "rand", lambda shape, drawn=drawn, **_: torch.full(shape, drawn))
        assert float(dequantize(torch.zeros(1, dtype=torch.uint8))) == expected


# --- data sets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moons", "circles", "pinwheel", "two-spirals"])
def test_densities_are_those_of_float64_whatever_the_points(name: str) -> None:
    density = datasets.make(name, num_train=10, num_validation=10, num_test=10).density
    assert density is not None
    points = 5 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    found, expected = density.log_prob(points), density.log_prob(points.double()).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_labels_go_with_their_images() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = sklearn.load_digits()
    known = {
        image.astype(np.uint8).tobytes(): label
        for image, label in zip(digits.images, digits.target, strict=True)
    }
    found = datasets.load_images("digits")
    for part in ("train", "validation", "test"):
        images, labels = getattr(found, part), getattr(found, f"{part}_labels")
        wanted = [known[image.numpy().astype(np.uint8).tobytes()] for image in images]
        assert labels.tolist() == wanted


# --- comparisons ----------------------------------------------------------------------------------


def _result(model: str, repeat: int, nll: float | None) -> Any:
    from nflows_iresnet.experiments.evaluation import Metrics
    from nflows_iresnet.experiments.record import Result

    return Result("d", model, repeat, 0, {}, 1, (), None, Metrics(test_nll=nll))


@dataclass(frozen=True)
class _Arrays:
    """Stands for the folder: the log-density of each test row, by model and repeat."""

    log_probs: dict[tuple[str, int], np.ndarray[Any, Any]]

    def load_arrays(self, key: tuple[str, str, int]) -> dict[str, np.ndarray[Any, Any]]:
        return {"test_log_prob": self.log_probs[key[1:]]}


def _verdict(log_probs: dict[tuple[str, int], np.ndarray[Any, Any]]) -> str:
    pytest.importorskip("rich")
    from nflows_iresnet.experiments.tables import verdict

    results = [_result(*key, -float(values.mean())) for key, values in log_probs.items()]
    data = SimpleNamespace(name="d")
    record: Any = SimpleNamespace(of=lambda _: results, datasets=[data], command="compare")
    folder: Any = _Arrays(log_probs)
    return verdict(record, folder, "d")


def test_the_verdict_is_that_of_all_repeats() -> None:
    """One model leads by a nat in the first, the other by three in the second."""
    rows = np.random.default_rng(0).normal(size=400) * 0.1
    said = _verdict({("a", 0): rows + 1, ("b", 0): rows, ("a", 1): rows, ("b", 1): rows[::-1] + 3})
    assert said.startswith("b and a ")
    assert "by 1.000 ±" in said


def test_a_lead_within_two_standard_errors_is_none() -> None:
    """Of the paired differences, whose mean is 1.5 or 2.5 of its standard errors."""
    noise = np.random.default_rng(0).normal(size=1000)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    zero = np.zeros(1000)
    for errors, is_ahead in ((1.5, False), (2.5, True)):
        said = _verdict({("a", 0): zero, ("b", 0): noise - errors / math.sqrt(1000)})
        assert ("is best" in said) == is_ahead
        assert ("are level" in said) != is_ahead


def test_models_are_examined_in_evaluation_mode_and_left_without_gradients() -> None:
    from nflows_iresnet.experiments import evaluation
    from nflows_iresnet.experiments.adapters import NflowsModel

    torch.manual_seed(0)
    model = NflowsModel(flows.ResidualFlow(2, 8, 1))
    modes: dict[str, set[bool]] = {"log_prob": set(), "sample": set()}
    for name in modes:
        original = getattr(model, name)

        def remember(*given: Any, name: str = name, original: Any = original) -> Any:
            modes[name].add(model.training)
            return original(*given)

        setattr(model, name, remember)
    model.train()
    rows = torch.randn(20, 2)
    exam = evaluation.EvaluationData(test=rows, batch=rows, true_log_prob=None, grid=None)
    evaluation.evaluate(model, exam, seed=0)
    assert modes["sample"] == {False}
    assert not model.training
    assert all(each.grad is None for each in model.parameters())


def test_the_coefficient_of_an_image_flow_is_that_of_its_blocks() -> None:
    flow = flows.ImageResidualFlow((1, 4, 4), 4, 1, coeff=0.5)
    blocks = [each for each in flow.modules() if isinstance(each, transforms.ResidualTransform)]
    assert {block.net.coeff for block in blocks} == {0.5}


class _Spied:
    """A model that remembers what it was asked the density of."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def log_prob(self, inputs: Tensor) -> Tensor:
        self.seen.append(inputs)
        return torch.zeros(inputs.shape[0])

    exact_log_prob = log_prob


def test_models_are_selected_on_validation_rows() -> None:
    from nflows_iresnet.experiments.data import RowTask

    data = datasets.make("moons", num_train=30, num_validation=20, num_test=10)
    model: Any = _Spied()
    RowTask(data).validate(model, SimpleNamespace(device="cpu"))  # type: ignore[arg-type]
    assert torch.equal(torch.cat(model.seen), data.validation)


def test_models_of_images_are_selected_on_validation_images() -> None:
    pytest.importorskip("sklearn")
    from nflows_iresnet.experiments.data import ImageTask

    data = datasets.load_images("digits")
    model: Any = _Spied()
    ImageTask(data).validate(model, SimpleNamespace(device="cpu"))  # type: ignore[arg-type]
    assert torch.equal(torch.cat(model.seen).floor().to(torch.uint8), data.validation)


def test_the_default_estimator_counts_all_values_of_a_row_and_asks_for_a_bound() -> None:
    """The exact one knows its error, zero; one draw of the roulette knows none."""

    class Claims(Wave):
        lipschitz = 0.9

    auto = logdet.Auto(max_exact_features=6, max_exact_features_without_bound=16)
    for shape, net, is_exact in (
        ((6,), Claims(), True),
        ((7,), Claims(), False),
        ((1, 2, 3), Claims(), True),
        ((1, 3, 3), Claims(), False),
        ((1, 3, 3), Wave(), True),
    ):
        inputs = torch.randn(2, *shape)
        assert (auto.estimate(net, inputs).standard_error is not None) == is_exact
        at_inputs, bound = linearize(net, inputs), getattr(net, "lipschitz", None)
        assert (auto.logabsdet(at_inputs, bound)[1] is not None) == is_exact


def test_the_log_slopes_of_all_features_count_in_every_way_to_ask() -> None:
    """Forward, inverse, and where a transform of torch.func looks into the operations."""
    torch.manual_seed(0)
    spline = transforms.ElementwiseRationalQuadraticSpline(3).double()
    for parameter in spline.parameters():
        nn.init.normal_(parameter)
    rows = torch.randn(5, 3, dtype=torch.float64)
    outputs, logabsdet = spline(rows)
    slopes = torch.func.vmap(torch.func.jacrev(lambda row: spline(row[None])[0][0]))(rows)
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(slopes).logabsdet)
    torch.testing.assert_close(spline.inverse(outputs)[1], -logabsdet)
    traced = torch.func.vmap(lambda row: spline(row[None])[1][0])(rows)
    torch.testing.assert_close(traced, logabsdet)


def test_batches_follow_their_seed_and_go_on_with_their_noise() -> None:
    from nflows_iresnet.training.rows import Batches

    def noisy(rows: Tensor, generator: torch.Generator) -> Tensor:
        return rows + torch.rand(rows.shape, generator=generator)

    rows = torch.arange(20.0)[:, None]
    assert torch.equal(next(Batches(rows, 5, 1)), next(Batches(rows, 5, 1)))
    assert not torch.equal(next(Batches(rows, 5, 1)), next(Batches(rows, 5, 2)))
    first, second = Batches(rows, 5, 1, noisy), Batches(rows, 5, 1, noisy)
    for _ in range(6):
        next(first)
    second.load_state_dict(first.state_dict())
    for _ in range(6):
        assert torch.equal(next(first), next(second))


def test_an_arm_of_the_pinwheel_is_longer_than_it_is_wide() -> None:
    arm = datasets.densities.Pinwheel(1, radial_noise=0.6, tangential_noise=0.2, rate=1e-9)
    samples = arm.sample(4000, torch.Generator().manual_seed(0)).double()
    deviations = samples.std(0) / torch.tensor([0.6, 0.2], dtype=torch.float64)
    assert bool(((deviations > 0.8) & (deviations < 1.25)).all())
    top, outwards = arm.log_prob(torch.tensor([[2.0, 0.0], [2.6, 0.0]], dtype=torch.float64))
    assert float(top - outwards) == pytest.approx(0.5, abs=1e-6)


def test_every_image_is_in_one_split() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    whole = torch.from_numpy(sklearn.load_digits().images).to(torch.uint8)
    found = datasets.load_images("digits")
    parts = torch.cat([found.train, found.validation, found.test])

    def in_order(images: Tensor) -> list[bytes]:
        return sorted(image.numpy().tobytes() for image in images)

    assert in_order(parts) == in_order(whole)


def test_a_model_starts_from_training_rows() -> None:
    from nflows_iresnet.experiments.data import RowTask

    data, config = datasets.make("moons", num_train=30, num_validation=20, num_test=10), _ON_A_CPU
    assert torch.equal(RowTask(data).start_rows(config), data.train)


_ON_A_CPU: Any = SimpleNamespace(device="cpu")


def test_test_images_have_the_same_noise_whatever_the_seed_of_the_run() -> None:
    pytest.importorskip("sklearn")
    from nflows_iresnet.experiments.config import RunConfig
    from nflows_iresnet.experiments.data import ImageTask

    task = ImageTask(datasets.load_images("digits"))
    first, second = (
        task.evaluation_data(RunConfig(("digits",), ("glow",), images=True, seed=seed)).test
        for seed in (0, 1)
    )
    assert torch.equal(first, second)


class _Halves:
    """A model that decodes half of each number."""

    estimates = False

    def eval(self) -> None: ...

    def exact_log_prob(self, inputs: Tensor) -> Tensor:
        return inputs.sum(1)

    def encode(self, inputs: Tensor) -> Tensor:
        return inputs

    def decode(self, noise: Tensor) -> Tensor:
        return noise / 2


def test_what_is_measured_of_rows_is_what_its_name_says() -> None:
    from nflows_iresnet.experiments.evaluation import EvaluationData, evaluate

    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 8.0]])
    model: Any = _Halves()
    exam = EvaluationData(rows, rows, true_log_prob=rows.sum(1) + 3, grid=None)
    found = evaluate(model, exam, seed=0).metrics
    assert found.test_nll == pytest.approx(-3)
    assert found.above_optimum == pytest.approx(3)
    assert found.above_optimum_se == pytest.approx(0)
    assert (found.round_trip_max, found.round_trip_median) == (4, 1)


def test_likelihoods_of_repeats_are_averaged_and_the_best_model_is_first() -> None:
    pytest.importorskip("rich")
    from nflows_iresnet.experiments.tables import rows_of

    numbers = {"bad": (5.0, 6.0, 10.0), "good": (1.0, 2.0, 6.0)}
    results = [
        _result(name, i, nll) for name, nlls in numbers.items() for i, nll in enumerate(nlls)
    ]
    record: Any = SimpleNamespace(of=lambda dataset: [*results, _result("failed", 0, None)])
    rows = rows_of(record, "d")
    assert [(row.model, row.metrics.test_nll) for row in rows] == [
        ("good", 3.0),
        ("bad", 7.0),
        ("failed", None),
    ]
