"""When ActNorm starts from data, and what it keeps."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from copy import deepcopy
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from nflows import transforms
from torch import Tensor, distributed
from torch.multiprocessing.spawn import start_processes
from torch.nn.utils import prune

from nflows_iresnet import ResidualFlow, flows
from nflows_iresnet.transforms import ActNorm
from tests import device

# --- when it starts -------------------------------------------------------------------------------


def far_data() -> Tensor:
    return torch.randn(512, 2, generator=device.generator(3)) * 20 + 100


def nll(flow: Any, *context: Tensor) -> float:
    return float(-flow.log_prob(far_data(), *context).mean().detach())


def vector_flow() -> ResidualFlow:
    torch.manual_seed(0)
    return ResidualFlow(2, 16, 2)


BEFORE_TRAINING: dict[str, Callable[[Any], Any]] = {
    "sample": lambda flow: flow.sample(5),
    "sample_and_log_prob": lambda flow: flow.sample_and_log_prob(5),
    "own-samples-scored": lambda flow: flow.log_prob(flow.sample(5)),
    "inverse": lambda flow: flow._transform.inverse(torch.randn(4, 2)),
    "evaluation": lambda flow: flow.eval().log_prob(far_data()),
    "empty-batch": lambda flow: flow.log_prob(torch.zeros(0, 2)),
    "step-without-gradient": lambda flow: torch.optim.Adam(flow.parameters()).step(),
}


@pytest.mark.parametrize("use", BEFORE_TRAINING.values(), ids=BEFORE_TRAINING)
def test_what_comes_before_training_does_not_end_the_waiting_for_data(
    use: Callable[[Any], Any],
) -> None:
    expected, flow = nll(vector_flow()), vector_flow()
    use(flow)
    assert nll(flow.train()) == pytest.approx(expected, abs=1e-4)
    assert expected < 100


def test_conditional_and_image_flows_wait_too() -> None:
    def conditional() -> ResidualFlow:
        torch.manual_seed(0)
        return ResidualFlow(2, 16, 2, context_features=1)

    used, context = conditional(), torch.zeros(512, 1)
    used.sample_and_log_prob(3, context[:2])
    assert nll(used, context) == pytest.approx(nll(conditional(), context), abs=1e-4)

    def image() -> flows.ImageResidualFlow:
        torch.manual_seed(0)
        return flows.ImageResidualFlow((1, 4, 4), 8, 1, num_scales=1, levels=17, alpha=None)

    pixels = 8 + torch.rand(64, 1, 4, 4, generator=device.generator(1))
    used_image = image()
    used_image.sample_and_log_prob(3)
    values = []
    for flow in (used_image, image()):
        torch.manual_seed(2)
        values.append(flow.log_prob(pixels))
    torch.testing.assert_close(*values)


def trained_by_inverse(steps: int = 3) -> ActNorm:
    norm = ActNorm(2)
    optimizer = torch.optim.Adam(norm.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs, logabsdet = norm.inverse(torch.randn(16, 2))
        ((outputs - 3).square().sum(1) - logabsdet).mean().backward()
        optimizer.step()
    return norm


def saved_and_loaded(norm: ActNorm) -> ActNorm:
    stored = io.BytesIO()
    torch.save(norm.state_dict(), stored)
    stored.seek(0)
    fresh = ActNorm(2)
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    return fresh


def parameters_alone(norm: ActNorm) -> ActNorm:
    fresh = ActNorm(2)
    fresh.load_state_dict(dict(norm.named_parameters()), strict=False)
    return fresh


def as_one_vector(norm: ActNorm) -> ActNorm:
    fresh = ActNorm(2)
    vector = torch.nn.utils.parameters_to_vector(norm.parameters())
    torch.nn.utils.vector_to_parameters(vector, fresh.parameters())
    return fresh


WAYS: dict[str, Callable[[ActNorm], ActNorm]] = {
    "as-it-is": lambda norm: norm,
    "saved-and-loaded": saved_and_loaded,
    "parameters-alone": parameters_alone,
    "one-vector": as_one_vector,
    "deepcopy": deepcopy,
    "evaluation-and-back": lambda norm: norm.eval().train(),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("steps", [1, 3])
def test_what_was_learned_through_the_inverse_is_kept(
    way: Callable[[ActNorm], ActNorm], steps: int
) -> None:
    norm = trained_by_inverse(steps)
    learned = deepcopy(dict(norm.named_parameters()))
    used = way(norm)
    for _ in range(2):
        used(far_data())
    for name, parameter in used.named_parameters():
        assert torch.equal(parameter, learned[name])
    assert bool(used.initialized)
    assert torch.equal(saved_and_loaded(used)(far_data())[0], norm(far_data())[0])


def test_parameters_restored_without_the_flag_keep_their_density() -> None:
    trained = vector_flow()
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (-trained.log_prob(far_data()).mean()).backward()
        optimizer.step()
    restored = ResidualFlow(2, 16, 2)
    restored.load_state_dict(dict(trained.named_parameters()), strict=False)
    batch = torch.randn(16, 2)
    torch.testing.assert_close(restored.log_prob(batch), trained.log_prob(batch))


def test_a_started_model_that_loads_an_unstarted_one_starts_again() -> None:
    norm, fresh = ActNorm(2), ActNorm(2)
    norm(far_data())
    norm.load_state_dict(fresh.state_dict())
    assert norm(far_data())[0].std().item() == pytest.approx(1, abs=0.01)


def test_a_step_that_samples_and_scores_sees_one_model() -> None:
    flow = vector_flow()
    samples, log_prob = flow.sample_and_log_prob(64)
    torch.testing.assert_close(flow.log_prob(samples), log_prob, rtol=0, atol=1e-4)
    frozen = samples.clone()
    flow.requires_grad_(False)
    torch.testing.assert_close(flow.log_prob(frozen), log_prob, rtol=0, atol=1e-4)


# --- several processes ----------------------------------------------------------------------------


def halves() -> tuple[Tensor, Tensor]:
    rows = torch.randn(16, 2, generator=device.generator(1)).double() * 1e-21
    return rows[:13], rows[13:]


def worker(rank: int, folder: str) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    norm, rows = ActNorm(2).double(), halves()[rank]
    spoiled = rows.clone()
    if rank == 1:
        spoiled[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite" if rank == 1 else "another process"):
        norm(spoiled)
    assert not bool(norm.initialized)
    norm.inverse(torch.randn(rank + 1, 2).double())
    norm(rows if rank == 0 else rows[:0])
    joined = ActNorm(2).double()
    joined(rows)
    torch.save([dict(norm.named_parameters()), dict(joined.named_parameters())], f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_start_from_the_joined_batch_and_refuse_together(tmp_path: Path) -> None:
    start_processes(worker, (str(tmp_path),), nprocs=2, start_method="spawn")
    for index, rows in enumerate((halves()[0], torch.cat(halves()))):
        expected = ActNorm(2).double()
        expected(rows)
        for rank in (0, 1):
            found = torch.load(tmp_path / str(rank), weights_only=False)[index]
            for name, parameter in expected.named_parameters():
                torch.testing.assert_close(found[name], parameter, rtol=1e-12, atol=1e-12)


def test_the_decision_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started, restored = ActNorm(2), ActNorm(2)
    started(far_data())
    restored.load_state_dict(dict(started.named_parameters()), strict=False)
    restored(far_data())

    def refuse(tensor: Tensor) -> bool:
        raise AssertionError("a value was asked for")

    monkeypatch.setattr(Tensor, "__bool__", refuse)
    for norm in (started, restored):
        norm(far_data())
        norm.inverse(far_data())


# --- what it makes of data ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-6, 1.0, 1e6, 1e18, 1e30])
def test_data_of_any_scale_come_out_with_mean_0_and_deviation_1(
    scale: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows = torch.randn(512, 2, dtype=dtype) * torch.tensor([scale, 3.0], dtype=dtype)
    norm = ActNorm(2).to(dtype)
    outputs, logabsdet = norm(rows)
    torch.testing.assert_close(outputs.mean(0), torch.zeros(2, dtype=dtype), rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.std(0), torch.ones(2, dtype=dtype), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        norm.inverse(outputs)[0] / rows, torch.ones_like(rows), rtol=0, atol=1e-2
    )
    expected = -rows.double().std(0).log().sum().to(dtype).expand(512)
    torch.testing.assert_close(logabsdet, expected, rtol=1e-5, atol=1e-4)


def test_float64_data_near_the_limits_of_the_type() -> None:
    torch.manual_seed(0)
    rows = torch.randn(512, 2, dtype=torch.float64) * torch.tensor(
        [1e-300, 1e300], dtype=torch.float64
    )
    outputs, _ = ActNorm(2).double()(rows.clone())
    torch.testing.assert_close(outputs.std(0), torch.ones(2).double(), rtol=1e-6, atol=0)


def test_the_smallest_numbers_of_the_type_give_finite_values() -> None:
    rows = torch.tensor([[1e-44, 3e38], [3e-44, -3e38], [0.0, 1e38]])
    norm = ActNorm(2)
    outputs, logabsdet = norm(rows)
    assert bool(outputs.isfinite().all() and logabsdet.isfinite().all())
    assert bool(norm.inverse(outputs)[0].isfinite().all())


CONSTANTS = {
    "zero": torch.zeros(64),
    "one": torch.ones(64),
    "tiny": torch.full((64,), 1e-21),
    "huge": torch.full((64,), 1e30),
    "far-with-rounding": 1e6 + 0.0625 * (torch.arange(64.0) % 2),
    "third": torch.full((64,), 1 / 3),
}


@pytest.mark.parametrize("constant", CONSTANTS.values(), ids=CONSTANTS)
def test_a_constant_feature_is_centred_only(constant: Tensor) -> None:
    torch.manual_seed(0)
    rows = torch.stack([constant, 1e-6 * torch.randn(64)], dim=1)
    norm = ActNorm(2)
    outputs, _ = norm(rows)
    assert norm.log_scale[0].item() == 0
    assert float(outputs[:, 0].detach().abs().max()) <= float(constant.max() - constant.min())
    assert outputs[:, 1].std().item() == pytest.approx(1, rel=1e-4)


def test_a_batch_of_one_tells_magnitudes_alone() -> None:
    norm = ActNorm(3)
    outputs, _ = norm(torch.tensor([[1e-6, 1e6, 1.5]]))
    torch.testing.assert_close(outputs, torch.tensor([[6.266e-3, 1, 1.5]]), rtol=0, atol=1e-5)
    assert norm.scale[2].item() == 1


def tails(count: int) -> Tensor:
    """Return a normal feature, one with a long tail, and the square of the first."""
    rows = torch.randn(count, 2, generator=device.generator(7))
    return torch.stack([rows[:, 0], rows[:, 1].sinh(), rows[:, 0].square()], dim=1)


def test_long_tails_are_scaled_to_start_within_a_bound() -> None:
    rows, norm, plain = tails(4000), ActNorm(3, bound=4.0), ActNorm(3)
    outputs, expected = norm(rows)[0].detach(), plain(rows)[0].detach()
    assert torch.equal(outputs[:, 0], expected[:, 0])
    for index in (1, 2):
        beyond = (outputs[:, index].abs() > 4).double().mean()
        assert 0 < float(beyond) <= 0.001 + 1e-9
        assert float((expected[:, index].abs() > 4).double().mean()) > 0.002
        assert outputs[:, index].mean().item() == pytest.approx(0, abs=1e-5)
    farthest = torch.cat([tails(200)[:, :1], rows.new_tensor([[30.0]])])
    assert torch.equal(ActNorm(1, bound=4.0)(farthest)[0], ActNorm(1)(farthest)[0])
    few = tails(7)
    assert torch.equal(ActNorm(3, bound=1.0)(few)[0], ActNorm(3)(few)[0])


def test_a_constant_has_no_tail() -> None:
    constant = 1e6 + 0.0625 * (torch.arange(64.0) % 2)
    rows = torch.stack([constant, torch.randn(64, generator=device.generator(1))], dim=1)
    for scale in (1.0, 1e24):
        norm = ActNorm(2, bound=1e-3)
        norm(scale * rows)
        assert norm.log_scale[0].item() == 0


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf])
def test_a_bound_that_is_none_is_named(bound: float) -> None:
    with pytest.raises(ValueError, match="bound must be positive and finite"):
        ActNorm(2, bound=bound)


def steps_of_a_flow(flow: Any, rows: Tensor, deviations: float) -> list[float]:
    """Return the losses on rows that are moved away from zero, in twenty steps without clipping."""
    rows = rows + deviations * rows.std(0)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss = -flow.log_prob(rows).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


FLOWS: dict[str, Callable[[], Any]] = {
    "default": lambda: ResidualFlow(2, 16, 2),
    "papers": lambda: ResidualFlow(2, 16, 2, marginal_bins=0, linear=False),
    "hybrid": lambda: flows.HybridFlow(2, 16, 2),
}


@pytest.mark.parametrize("build", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("deviations", [3e3, -1e5])
def test_rows_far_from_zero_learn_as_those_about_it(
    build: Callable[[], Any], deviations: float
) -> None:
    rows = torch.randn(128, 2, generator=device.generator(5)).double().cumsum(1)
    found = []
    for moved in (0.0, deviations):
        torch.manual_seed(0)
        found.append(steps_of_a_flow(build().double(), rows - rows.mean(0), moved))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def far_norm() -> ActNorm:
    """Return an ActNorm that started from images 3,000 deviations from zero."""
    norm = ActNorm(2)
    norm(torch.randn(64, 2, 3, 3, generator=device.generator(3)) + 3000)
    return norm


def test_rows_far_from_zero_come_back_to_their_rounding() -> None:
    norm = far_norm()
    images = torch.randn(64, 2, 3, 3, generator=device.generator(4)) + 3000
    outputs, logabsdet = norm(images)
    again, back = norm.inverse(outputs)
    assert float((again - images).detach().abs().max()) < 4 * 3000 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(back, -logabsdet)


def test_a_state_without_a_center_replaces_that_of_rows_far_from_zero() -> None:
    theirs, norm = transforms.ActNorm(2), far_norm()
    theirs(far_data())
    norm.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(norm(far_data())[0], theirs(far_data())[0])
    with torch.device("meta"):
        empty = ActNorm(2)
    empty.load_state_dict(theirs.state_dict(), assign=True)
    torch.testing.assert_close(empty(far_data())[0], theirs(far_data())[0])


def test_a_state_of_other_parts_leaves_the_center() -> None:
    norm, inputs = far_norm(), torch.randn(5, 2) + 1000
    expected = norm(inputs)[0]
    for state in ({}, dict(norm.named_parameters())):
        norm.load_state_dict(state, strict=False)
        assert torch.equal(norm(inputs)[0], expected)
    with pytest.raises(RuntimeError, match="center"):
        norm.load_state_dict(dict(norm.named_parameters()))


def test_a_pickle_without_a_center_is_one_about_zero() -> None:
    norm = ActNorm(2)
    norm(far_data())
    old = {name: value for name, value in vars(norm).items() if name != "bound"}
    old["_buffers"] = {name: each for name, each in old["_buffers"].items() if name != "center"}
    again = ActNorm.__new__(ActNorm)
    again.__setstate__(old)
    assert torch.equal(again(far_data())[0], norm(far_data())[0])
    again.initialize(far_data())


def test_what_is_lent_starts_without_moving_the_center_of_the_owner() -> None:
    images = torch.randn(64, 2, 3, 3, generator=device.generator(3)) - 5000
    norm = ActNorm(2)
    lent = {name: torch.zeros_like(each) for name, each in norm.named_parameters()}
    outputs = torch.func.functional_call(norm, lent, (images,), {})[0]
    assert outputs.mean().item() == pytest.approx(0, abs=1e-2)
    assert not bool(norm.has_learned())


def test_small_data_learn_as_fast_as_large_ones() -> None:
    losses = []
    for scale in (1.0, 1e-6):
        torch.manual_seed(0)
        flow, rows = ResidualFlow(2, 16, 2).double(), torch.randn(128, 2).double().cumsum(1)
        optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
        for _ in range(10):
            loss = -flow.log_prob(scale * rows).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item() - 2 * torch.tensor(scale).double().log().item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-2)


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(8, 2), (8, 2, 3, 3)])
def test_a_first_batch_that_is_not_finite_is_named_and_nothing_is_stored(
    bad: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    norm, rows = ActNorm(2), torch.randn(shape)
    spoiled = rows.clone()
    spoiled[3, 1] = bad
    before = deepcopy(norm.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 of 8 rows of the inputs, first row 3.*[Dd]rop"):
            norm(spoiled)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert norm(5 * rows + 1)[0].std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_inputs_of_another_precision_are_named_with_the_remedy(dtype: torch.dtype) -> None:
    rows = torch.ones(3, 2, dtype=dtype)
    for direction in (ActNorm(2), ActNorm(2).inverse):
        with pytest.raises(ValueError, match=r"the inputs are .*\.to\(torch\.float32\)"):
            direction(rows)


def test_half_precision_is_computed_in_that_of_the_weights() -> None:
    assert ActNorm(2)(torch.ones(3, 2, dtype=torch.bfloat16))[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 3), r"\(batch, 2\), got \(5, 3\)$"),
        ((5, 3, 4, 4), r"\(batch, 2, height, width\), got \(5, 3, 4, 4\)$"),
        ((2,), r"\(batch, 2\), or .* for images, got \(2,\)$"),
        ((), r"for images, got \(\)$"),
    ],
)
def test_another_shape_is_named_for_its_kind(shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ActNorm(2)(torch.zeros(shape))


@pytest.mark.parametrize("features", [0, -1, 2.0, True])
def test_features_that_are_no_size_are_named(features: Any) -> None:
    with pytest.raises(ValueError, match="features"):
        ActNorm(features)


def test_what_was_trained_by_its_inverse_alone_is_kept_after_saving_and_loading() -> None:
    """The flag says nothing then: no batch was seen."""
    norm = ActNorm(2)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    outputs, logabsdet = norm.inverse(torch.randn(16, 2, generator=device.generator(0)))
    (outputs.square().mean() - logabsdet.mean()).backward()
    optimizer.step()
    stored = io.BytesIO()
    torch.save(norm.state_dict(), stored)
    stored.seek(0)
    other = ActNorm(2)
    other.load_state_dict(torch.load(stored, weights_only=True))
    rows = far_data()
    expected = norm.eval()(rows)[0]
    torch.testing.assert_close(other.train()(rows)[0], expected, rtol=0, atol=0)
    assert torch.equal(other.log_scale, norm.log_scale)


def test_the_bounds_of_scales_are_above_their_exact_exponentials() -> None:
    """The exponential of a scale is rounded, and down as often as up."""
    for scale in torch.linspace(-3, 3, 301, dtype=torch.float64).tolist():
        norm = ActNorm(1).double()
        with torch.no_grad():
            norm.log_scale.fill_(scale)
        forward, inverse = norm.lipschitz_constants()
        assert Decimal(scale).exp() <= Decimal(forward) <= Decimal(scale).exp() * Decimal("1.0001")
        assert Decimal(-scale).exp() <= Decimal(inverse)


def test_a_pruned_norm_inverts_and_certifies_its_present_scales() -> None:
    norm = ActNorm(2).double()
    norm(far_data().double())
    prune.l1_unstructured(norm, "log_scale", 1)
    norm(far_data().double())
    with torch.no_grad():
        norm.get_parameter("log_scale_orig").mul_(3)
    rows = torch.randn(5, 2, dtype=torch.float64)
    constants, back = norm.lipschitz_constants(), norm.inverse(rows)[0]
    torch.testing.assert_close(norm(back)[0], rows)
    scales = norm.scale.detach()
    assert constants == pytest.approx((float(scales.max()), 1 / float(scales.min())))


def test_what_a_transform_computes_forward_to_sample_starts_nothing() -> None:
    """An inverse of nflows samples by the forward pass of its part: from noise."""
    norm = ActNorm(2)
    inverse = transforms.InverseTransform(norm)
    flow = flows.Flow(inverse, flows.StandardNormal([2]))
    flow.sample(50)
    flow.sample_and_log_prob(50)
    assert not bool(norm.initialized | norm.has_learned())
    norm(far_data())
    assert bool(norm.initialized)
