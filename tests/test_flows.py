"""The presets, used as a stranger would use them."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from nflows.flows import MaskedAutoregressiveFlow, SimpleRealNVP
from torch import Tensor

from nflows_iresnet import ResidualFlow, datasets, flows, logdet, nn, solvers, transforms

PRESETS = {"residual": flows.ResidualFlow, "iresnet": flows.InvertibleResNet}


def train(flow: torch.nn.Module, rows: Tensor, steps: int = 60) -> list[float]:
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = -flow.log_prob(rows).mean()  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def blocks(flow: torch.nn.Module) -> list[transforms.ResidualTransform]:
    return [each for each in flow.modules() if isinstance(each, transforms.ResidualTransform)]


def test_the_arguments_stand_in_the_order_of_nflows() -> None:
    ours = list(inspect.signature(ResidualFlow.__init__).parameters)[1:5]
    for theirs in (SimpleRealNVP, MaskedAutoregressiveFlow):
        assert ours == list(inspect.signature(theirs.__init__).parameters)[1:5]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_training_keeps_the_certificate_and_the_round_trip(preset: type[ResidualFlow]) -> None:
    torch.manual_seed(0)
    flow = preset(2, 32, 3, 2)
    rows = datasets.Moons().sample(256)
    losses = train(flow, rows)
    assert losses[-1] < losses[0] - 0.1
    for block in blocks(flow):
        assert block.lipschitz_bound() < 1
    samples = flow.sample(100)
    again, _ = flow._transform.inverse(flow.transform_to_noise(samples))
    assert float((again - samples).detach().abs().max()) < 1e-3


def test_the_density_integrates_to_one() -> None:
    """Of smooth rows, for peaks as narrow as the grid would have a mass of their own."""
    torch.manual_seed(0)
    first, second = torch.randn(2000, 2).unbind(1)
    rows = torch.stack([first + 1.5 * first.sign(), second + first.sin()], dim=1)
    flow = ResidualFlow(2, 32, 3)
    train(flow, rows, steps=40)
    flow = flow.double().eval()
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = float(flow.log_prob(grid).exp().sum()) * float(axis[1] - axis[0]) ** 2
    assert mass == pytest.approx(1, abs=2e-3)  # over six seeds at most 5e-4 off


def test_samples_and_log_prob_agree() -> None:
    torch.manual_seed(0)
    flow = ResidualFlow(3, 16, 2, context_features=2).double().eval()
    context = torch.randn(4, 2, dtype=torch.float64)
    samples, log_prob = flow.sample_and_log_prob(5, context)
    assert samples.shape == (4, 5, 3)
    direct = flow.log_prob(samples.reshape(20, 3), context.repeat_interleave(5, dim=0))
    torch.testing.assert_close(log_prob.flatten(), direct, rtol=0, atol=1e-9)
    other = torch.randn(4, 2, dtype=torch.float64)
    assert not torch.allclose(
        flow.log_prob(samples[:, 0], context), flow.log_prob(samples[:, 0], other)
    )


def test_gradients_reach_an_embedding_net() -> None:
    flow = ResidualFlow(2, 16, 2, context_features=3)
    flow._embedding_net = torch.nn.Linear(7, 3)
    flow.log_prob(torch.randn(5, 2), torch.randn(5, 7)).sum().backward()
    assert flow._embedding_net.weight.grad is not None
    assert flow.sample(4, torch.randn(1, 7)).shape == (1, 4, 2)


def test_double_stays_double_in_sampling_too() -> None:
    flow = ResidualFlow(2, 16, 2).double()
    assert flow.sample(3).dtype == torch.float64
    assert flow.log_prob(torch.zeros(2, 2, dtype=torch.float64)).dtype == torch.float64
    conditional = ResidualFlow(2, 16, 2, context_features=1).double()
    assert conditional.sample(3, torch.zeros(2, 1).double()).dtype == torch.float64


def test_one_seed_reproduces_training_and_sampling() -> None:
    def run(numpy_seed: int) -> tuple[list[float], Tensor]:
        np.random.seed(numpy_seed)
        torch.manual_seed(5)
        flow = flows.InvertibleResNet(3, 8, 2)
        return train(flow, torch.randn(32, 3), steps=5), flow.sample(4)

    (losses, samples), (again, resampled) = run(0), run(1)
    assert losses == again
    assert torch.equal(samples, resampled)


def test_the_presets_take_strategies_and_show_them() -> None:
    flow = ResidualFlow(
        2,
        16,
        2,
        estimator=logdet.Exact(),
        solver=solvers.FixedPointIteration(atol=1e-5),
        activation=nn.LipSwish(),
        coeff=0.9,
        norm=nn.SchattenNorm(),
    )
    text = repr(flow)
    for shown in ("Exact(", "FixedPointIteration(atol=1e-05", "LipSwish", "coeff=0.9", "Schatten"):
        assert shown in text
    assert "PowerSeries(" in repr(flows.InvertibleResNet(2, 16, 2))


def test_the_bias_of_the_truncated_series_is_within_its_bound() -> None:
    torch.manual_seed(0)
    flow = flows.InvertibleResNet(2, 16, 2, coeff=0.7, num_terms=4).double()
    rows = torch.randn(1, 2, dtype=torch.float64)
    flow.log_prob(rows)
    with transforms.using(flow, estimator=logdet.Exact()):
        exact = float(flow.log_prob(rows).detach())
    estimator = logdet.PowerSeries(num_terms=4, num_probes=500)
    with transforms.using(flow, estimator=estimator), torch.no_grad():
        draws = torch.stack([flow.log_prob(rows) for _ in range(5)])
    bound = 2 * estimator.bias_bound(0.7, 2)
    assert abs(float(draws.mean()) - exact) < bound + 5 * float(draws.std()) / math.sqrt(5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16, 2), "features"),
        ((2, 0, 2), "hidden_features"),
        ((2, 16, 0), "num_layers"),
        ((2, 16, 2, 0), "num_blocks_per_layer"),
    ],
)
def test_bad_sizes_are_named(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualFlow(*arguments)
    with pytest.raises(ValueError, match="coeff"):
        flows.InvertibleResNet(2, 16, 2, coeff=1.0)


def test_numpy_integers_are_accepted() -> None:
    ResidualFlow(np.int64(2), np.int64(8), np.int64(1), np.int64(1))


@pytest.mark.parametrize("shape", [(2,), (5, 3), (5, 2, 2)])
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    flow = ResidualFlow(2, 8, 1)
    with pytest.raises(ValueError, match=r"batch, 2"):
        flow.log_prob(torch.zeros(shape))
    conditional = ResidualFlow(2, 8, 1, context_features=3)
    with pytest.raises(ValueError, match=r"batch, 3"):
        conditional.log_prob(torch.randn(5, 2), torch.zeros(5, 4))


def _peak_and_gradients(recompute: bool) -> tuple[float, list[Tensor]]:
    torch.manual_seed(0)
    flow = ResidualFlow(8, 32, 12, estimator=logdet.RussianRoulette(), recompute=recompute)
    inputs = torch.randn(256, 8)
    flow.log_prob(inputs)
    torch.manual_seed(1)
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = -flow.log_prob(inputs).mean()
    loss.backward()
    gradients = [each.grad for each in flow.parameters() if each.grad is not None]
    return sum(saved), gradients


def test_recomputing_gives_the_same_gradients_and_keeps_less() -> None:
    """The roulette draws the same probes and the same number of terms the second time."""
    kept, plain = _peak_and_gradients(recompute=False)
    recomputing, again = _peak_and_gradients(recompute=True)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert recomputing < 0.5 * kept


def test_samples_need_no_log_determinant() -> None:
    """The estimator is not asked, the samples are those of the inverse, and gradients flow."""

    @dataclass(frozen=True)
    class Refusing(logdet.LogDetEstimator):
        def estimate(self, *_: object, **__: object) -> logdet.LogDetEstimate:
            raise RuntimeError("nobody reads this")

    torch.manual_seed(0)
    flow = flows.ResidualFlow(2, 8, num_layers=2)
    flow.log_prob(torch.randn(16, 2))
    with transforms.using(flow, estimator=Refusing()):
        torch.manual_seed(1)
        samples = flow.sample(5)
        with pytest.raises(RuntimeError, match="nobody"):
            flow.sample_and_log_prob(5)
    torch.manual_seed(1)
    noise = flow._distribution.sample(5)
    torch.testing.assert_close(samples, flow._transform.inverse(noise)[0])
    samples.sum().backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())
    assert bool(flow.sample_and_log_prob(5)[1].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flows_of_half_precision_sample(dtype: torch.dtype) -> None:
    """Triangular matrices are solved in no such precision by torch."""
    torch.manual_seed(0)
    flow = ResidualFlow(2, 8, 2).to(dtype)
    for samples in (flow.sample(3), flow.sample_and_log_prob(3)[0]):
        assert samples.dtype == dtype
        assert bool(samples.isfinite().all())
