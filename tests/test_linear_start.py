"""The start of the linear map by whitening: what comes out, also of the worst first batches."""

from __future__ import annotations

import io
import math
import os
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from nflows.distributions.normal import StandardNormal
from nflows.flows import Flow
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes

from nflows_iresnet.transforms import LinearTransform
from tests.test_linear import assert_white, data, images, rows_of, whitening


@pytest.mark.parametrize("inputs", [data(), images(), 1e-21 * data(), 1e25 * data()])
def test_whitening_gives_mean_0_and_covariance_1_by_the_inverse_cholesky_factor(
    inputs: Tensor,
) -> None:
    linear = whitening()
    outputs, _ = linear(inputs)
    assert_white(outputs)
    factor = torch.linalg.cholesky(rows_of(inputs).T.cov())
    torch.testing.assert_close(linear.weight().detach() @ factor, torch.eye(3).double())
    later, _ = linear(2 * inputs + 1)
    torch.testing.assert_close(linear.inverse(later)[0], 2 * inputs + 1)


@pytest.mark.parametrize("scale", [1e-21, 1.0, 1e20])
def test_whitening_in_float32_is_as_exact_as_its_numbers(scale: float) -> None:
    linear = LinearTransform(3, initialization="whitening")
    outputs, logabsdet = linear((scale * data()).float())
    assert_white(outputs.double(), atol=1e-4)
    assert bool(logabsdet.isfinite().all())


def test_without_bias_whitening_is_about_zero() -> None:
    outputs, _ = whitening(bias=False)(data())
    second = outputs.T @ outputs / outputs.shape[0]
    torch.testing.assert_close(second.detach(), torch.eye(3, dtype=torch.float64))


def test_features_of_unequal_scales_are_whitened_alike() -> None:
    scales = torch.tensor([1e-21, 1.0, 1e15], dtype=torch.float64)
    assert_white(whitening()(data() * scales)[0])


def degenerate(name: str) -> Tensor:
    inputs = data(40)
    if name == "constant":
        inputs[:, 1] = 1e6
    elif name == "zeros":
        inputs[:] = 0
    elif name == "dependent":
        inputs[:, 2] = 2 * inputs[:, 0] - 7 * inputs[:, 1]
    elif name == "copied":
        inputs[:] = inputs[:, :1]
    elif name == "discrete":
        inputs = (inputs > 9).double()
    elif name == "sparse":
        inputs = torch.zeros(40, 3, dtype=torch.float64)
        inputs[0] = 1
    elif name == "outlier":
        inputs[0] = 1e12
    elif name in ("tiny", "huge", "denormal", "largest"):
        inputs *= {"tiny": 1e-200, "huge": 1e200, "denormal": 5e-318, "largest": 1e306}[name]
    else:
        inputs = inputs[: int(name)]
    return inputs


DEGENERATE = ["constant", "zeros", "dependent", "copied", "discrete", "sparse", "outlier"]
EXTREME = ["tiny", "huge", "denormal", "largest"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [*DEGENERATE, *EXTREME, "1", "2", "3", "7", "8", "9"])
def test_a_degenerate_first_batch_starts_something_finite_and_invertible(
    name: str, bias: bool
) -> None:
    linear, inputs = whitening(bias=bias), degenerate(name)
    outputs, logabsdet = linear(inputs)
    assert bool(linear.initialized)
    assert bool(outputs.isfinite().all())
    assert bool(logabsdet.isfinite().all())
    size = inputs.abs().max().clamp_min(1)
    recovered = linear.inverse(outputs)[0]
    torch.testing.assert_close(recovered / size, inputs / size, rtol=0, atol=1e-9)
    inverse = torch.linalg.inv(linear.weight().detach())
    assert bool(inverse.isfinite().all())


@pytest.mark.parametrize("name", [*DEGENERATE, "2", "9"])
def test_a_degenerate_first_batch_in_float32_round_trips(name: str) -> None:
    linear, inputs = LinearTransform(3, initialization="whitening"), degenerate(name).float()
    outputs, _ = linear(inputs)
    recovered = linear.inverse(outputs)[0]
    size = inputs.abs().max().clamp_min(1)
    torch.testing.assert_close(recovered / size, inputs / size, rtol=0, atol=1e-4)


@pytest.mark.parametrize("jitter", [0, 1, 2])
def test_features_constant_but_for_rounding_are_centred_and_keep_their_scale(jitter: int) -> None:
    linear, inputs = whitening(), degenerate("constant")
    inputs[::3, 1] += jitter * math.ulp(1e6)
    outputs, _ = linear(inputs)
    torch.testing.assert_close(outputs[:, 1], torch.zeros_like(outputs[:, 1]), rtol=0, atol=1e-8)
    assert_white(outputs[:, [0, 2]])
    expected = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(linear.weight()[1].detach(), expected)
    assert torch.equal(linear.weight()[:, 1].detach(), expected)


@pytest.mark.parametrize("rows", [1, 7])
def test_few_rows_only_centre(rows: int) -> None:
    linear = whitening()
    outputs, logabsdet = linear(data(rows))
    torch.testing.assert_close(outputs, data(rows) - data(rows).mean(0))
    assert torch.equal(logabsdet, torch.zeros_like(logabsdet))


def test_fewer_rows_than_features_cost_unseen_rows_little() -> None:
    """Independent features, where whitening cannot gain: without shrinkage it loses thousands.

    Over 20 seeds at most 0.34 nats a feature, from 8 rows; from 40 and more at most 0.12.
    """
    torch.manual_seed(0)
    features, unseen = 64, torch.randn(1000, 64, dtype=torch.float64)
    for rows in (8, 40, 65, 128, 260):
        linear = whitening(features)
        linear(torch.randn(rows, features, dtype=torch.float64))
        outputs, logabsdet = linear(unseen)
        loss = (outputs.square() - unseen.square()).sum(1).mean() / 2 - logabsdet.mean()
        assert loss.item() < 0.75 * features


def test_dependent_features_leave_with_a_variance_of_at_most_one() -> None:
    outputs, logabsdet = whitening()(degenerate("dependent"))
    variance = outputs.detach().var(0)
    assert bool((variance < 1 + 1e-6).all())
    assert variance.min().item() < 1e-3
    assert logabsdet[0].item() < 3 * math.log(1e4)


def test_an_offset_of_rounded_values_is_not_stretched_into_noise() -> None:
    """Two copies of a feature at 1e4 standard deviations from zero differ by their rounding."""
    base = 1e4 + data(1000, 1)
    rows = torch.cat([base.float(), (3 * base).float()], 1)
    linear = LinearTransform(2, initialization="whitening")
    outputs, _ = linear(rows)
    precise = deepcopy(linear).double()
    error = (outputs - precise(rows.double())[0]).abs().max()
    assert error.item() < 0.5
    assert outputs.var(0)[1].item() < 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("inputs", [data(20), images(), data(1)])
def test_values_that_are_not_finite_are_named_and_nothing_is_stored(
    value: float, inputs: Tensor
) -> None:
    linear, before = whitening(), whitening().state_dict()
    inputs = inputs.clone()
    inputs[0, 2] = value
    for start in (linear, linear.initialize):
        with pytest.raises(ValueError, match=r"NaN or infinite values in features \[2\]"):
            start(inputs)
    assert all(torch.equal(each, before[name]) for name, each in linear.state_dict().items())
    assert_white(linear(data())[0])


def test_an_empty_batch_starts_nothing() -> None:
    linear = whitening()
    outputs, logabsdet = linear(data(0))
    assert outputs.shape == (0, 3)
    assert logabsdet.shape == (0,)
    assert not linear.initialized
    assert_white(linear(data())[0])
    with pytest.raises(ValueError, match=r"at least one row .* \(0, 3\)"):
        linear.initialize(data(0))


def test_only_training_mode_starts() -> None:
    linear = whitening().eval()
    assert torch.equal(linear(data())[0], data())
    assert not linear.initialized
    assert_white(linear.train()(data())[0])


@pytest.mark.parametrize("initialization", ["identity", "whitening"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_rows_that_are_given_start_it_whatever_they_and_it_are(
    initialization: Any, dtype: torch.dtype
) -> None:
    linear = LinearTransform(3, initialization=initialization).double().eval()
    nn.init.normal_(linear.factors)
    rows = (100 * data()).to(dtype)
    linear.initialize(rows)
    assert_white(linear(rows.double())[0], atol=1e-6)
    stored = deepcopy(linear.state_dict())
    linear.train()(5 * rows.double())
    assert all(torch.equal(each, stored[name]) for name, each in linear.state_dict().items())


@pytest.mark.parametrize("with_gradients", [True, False])
def test_sampling_does_not_end_the_waiting(with_gradients: bool) -> None:
    linear = LinearTransform(3, initialization="whitening")
    flow = Flow(linear, StandardNormal([3]))
    with torch.set_grad_enabled(with_gradients):
        flow.sample(5)
        flow.sample_and_log_prob(5)
    flow.log_prob(data(dtype=torch.float32))
    assert_white(linear(data(dtype=torch.float32))[0].double(), atol=1e-4)


def test_what_was_learned_through_the_inverse_stays() -> None:
    linear = whitening()
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.1)
    samples, logabsdet = linear.inverse(torch.randn(50, 3, dtype=torch.float64))
    ((samples - 5).square().sum(1) - logabsdet).mean().backward()
    optimizer.step()
    learned = deepcopy(linear.state_dict())
    linear(data())
    assert bool(linear.initialized)
    for name, parameter in linear.named_parameters():
        assert torch.equal(parameter, learned[name])


def test_parameters_restored_without_the_flag_stay() -> None:
    trained = whitening()
    trained(data())
    restored = whitening()
    restored.load_state_dict(dict(trained.named_parameters()), strict=False)
    restored(3 * data() + 1)
    for name, parameter in restored.named_parameters():
        assert torch.equal(parameter, trained.state_dict()[name])
    waiting = whitening()
    waiting.load_state_dict(dict(whitening().named_parameters()), strict=False)
    assert_white(waiting(data())[0])


def copies_of(linear: LinearTransform) -> list[LinearTransform]:
    stored = io.BytesIO()
    torch.save(linear.state_dict(), stored)
    stored.seek(0)
    loaded = whitening()
    loaded.load_state_dict(torch.load(stored, weights_only=True))
    return [deepcopy(linear), pickle.loads(pickle.dumps(linear)), loaded]


def test_copies_wait_or_have_started_as_what_they_are_copies_of() -> None:
    waiting, started = whitening(), whitening()
    started(data())
    for copy in copies_of(waiting):
        assert_white(copy(3 * data())[0])
    for copy in copies_of(started):
        torch.testing.assert_close(copy(3 * data()), started(3 * data()), rtol=0, atol=0)


def worker(rank: int, folder: str) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    linear, given, wrong = whitening(), whitening(), whitening()
    part = data()[slice(0, 100) if rank == 0 else slice(100, 500)]
    linear(part)
    given.initialize(part)
    broken = part.clone()
    broken[0, 1] = math.nan if rank == 0 else 0
    with pytest.raises(ValueError, match=r"features \[1\]"):
        wrong(broken)
    wrong(part[: 0 if rank == 0 else 400])
    states = {"linear": linear, "given": given, "alone": wrong}
    torch.save({key: each.state_dict() for key, each in states.items()}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_start_from_their_joined_batch(tmp_path: Path) -> None:
    start_processes(worker, (str(tmp_path),), nprocs=2, start_method="spawn")
    joined, alone = whitening(), whitening()
    joined(data())
    alone(data()[100:])
    expected = {"linear": joined, "given": joined, "alone": alone}
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for key, module in expected.items():
            for name, value in module.state_dict().items():
                torch.testing.assert_close(found[key][name], value, rtol=1e-9, atol=1e-9)
