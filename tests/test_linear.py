"""The linear map: against nflows' LULinear, its derivatives, and what a graph asks of it."""

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
from nflows import transforms as nflows_transforms
from nflows.distributions.normal import StandardNormal
from nflows.flows import Flow
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from nflows_iresnet import flows
from nflows_iresnet.experiments.bench.steps import counted_operations
from nflows_iresnet.flows import ResidualFlow
from nflows_iresnet.flows.lipschitz import lipschitz_constants
from nflows_iresnet.transforms import ActNorm, CompositeTransform, LinearTransform
from nflows_iresnet.transforms.linear import _products, weights_together
from tests import device

MIXING = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 2.0], [0.1, 0.0, 1.0]], dtype=torch.float64)


def data(rows: int = 500, features: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Correlated rows away from zero."""
    generator = device.generator(5)
    noise = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    mixed = noise @ MIXING if features == 3 else noise.cumsum(1)
    return (mixed + 5).to(dtype)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return data(8 * 4 * 5).reshape(8, 4, 5, 3).movedim(-1, 1).contiguous().to(dtype)


def random_linear(features: int = 3, dtype: torch.dtype = torch.float64) -> LinearTransform:
    torch.manual_seed(7)
    linear = LinearTransform(features).to(dtype)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, std=0.7)
    return linear


def whitening(features: int = 3, *, bias: bool = True) -> LinearTransform:
    return LinearTransform(features, initialization="whitening", bias=bias).double()


def rows_of(values: Tensor) -> Tensor:
    return values.detach().movedim(1, -1).reshape(-1, values.shape[1])


def assert_white(outputs: Tensor, atol: float = 1e-9) -> None:
    rows = rows_of(outputs)
    torch.testing.assert_close(rows.mean(0), torch.zeros_like(rows[0]), rtol=0, atol=atol)
    identity = torch.eye(rows.shape[1], dtype=rows.dtype)
    torch.testing.assert_close(rows.T.cov(), identity, rtol=0, atol=atol)


def test_its_log_determinant_is_that_of_its_weight() -> None:
    linear = random_linear()
    expected = torch.linalg.slogdet(linear.weight())
    assert expected.sign == 1
    for inputs, pixels in ((data(4), 1), (images(), 20)):
        outputs, logabsdet = linear(inputs)
        wanted = (pixels * expected.logabsdet).expand(inputs.shape[0])
        torch.testing.assert_close(logabsdet, wanted)
        torch.testing.assert_close(linear.inverse(outputs)[0], inputs)
        torch.testing.assert_close(linear.inverse(outputs)[1], -wanted)


def test_it_is_the_lu_linear_of_nflows_with_the_same_factors() -> None:
    torch.manual_seed(1)
    theirs = nflows_transforms.LULinear(4, identity_init=False).double()
    nn.init.normal_(theirs.bias)
    lower, upper = theirs._create_lower_upper()
    ours = LinearTransform(4).double()
    with torch.no_grad():
        raw = 80 * (upper.diagonal().log() / 80).atanh()
        ours.factors.copy_(lower.tril(-1) + upper.triu(1) + raw.diag())
        ours.bias.copy_(theirs.bias)
    torch.testing.assert_close(ours.weight(), theirs.weight())
    inputs = data(6, 4)
    for direction in ("forward", "inverse"):
        found, expected = getattr(ours, direction)(inputs), getattr(theirs, direction)(inputs)
        torch.testing.assert_close(found, expected)


def test_for_images_it_is_a_convolution_of_one_pixel() -> None:
    linear, inputs = random_linear(), images()
    expected = nn.functional.conv2d(inputs, linear.weight()[:, :, None, None], linear.bias)
    outputs, _ = linear(inputs)
    torch.testing.assert_close(outputs, expected)
    assert outputs.is_contiguous()


@pytest.mark.parametrize("bias", [True, False])
def test_it_starts_as_the_identity_and_first_batches_do_not_change_that(bias: bool) -> None:
    linear = LinearTransform(3, bias=bias).double()
    for values in (linear(data())[0], linear.inverse(data())[0]):
        assert torch.equal(values, data())
    assert torch.equal(linear(data())[1], torch.zeros(500, dtype=torch.float64))
    assert ("bias" in linear.state_dict()) is bias


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("initialization", ["identity", "whitening"])
def test_what_was_built_on_the_meta_device_computes_the_same(
    assign: bool, initialization: Any
) -> None:
    trained = whitening()
    trained(data())
    with torch.device("meta"):
        built = LinearTransform(3, initialization=initialization).double()
    if not assign:
        built.to_empty(device=device.current())
    built.load_state_dict(trained.state_dict(), assign=assign)
    torch.testing.assert_close(built(2 * data()), trained(2 * data()), rtol=0, atol=0)


def test_loading_into_the_meta_device_is_no_error_of_its_own() -> None:
    with torch.device("meta"):
        built = LinearTransform(3).double()
    with pytest.warns(UserWarning, match="no-op"):
        built.load_state_dict(whitening().state_dict())


@pytest.mark.parametrize("raw", [-1e30, -1e4, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_step_of_an_optimiser_makes_it_singular(raw: float, dtype: torch.dtype) -> None:
    linear = LinearTransform(2).to(dtype)
    with torch.no_grad():
        linear.factors.diagonal().fill_(raw)
    outputs, logabsdet = linear(torch.ones(1, 2, dtype=dtype))
    torch.testing.assert_close(logabsdet.abs(), torch.full((1,), 160.0, dtype=dtype))
    assert bool((linear.weight().diagonal() > 0).all())
    torch.testing.assert_close(linear.inverse(outputs)[0], torch.ones(1, 2, dtype=dtype))


SHAPES = [(5, 2), (5,), (), (5, 3, 4), (5, 4, 4, 3), (5, 3, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    linear, inputs = LinearTransform(3), torch.zeros(shape)
    for call in (linear, linear.inverse, linear.initialize):
        with pytest.raises(ValueError, match=r"expected inputs of shape \(batch, 3\b.*, got \("):
            call(inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_inputs_of_another_dtype_are_refused_by_name(dtype: torch.dtype) -> None:
    linear, inputs = LinearTransform(3), torch.zeros(2, 3, dtype=dtype)
    for call in (linear, linear.inverse):
        with pytest.raises(ValueError, match=r"convert the inputs by \.to\(torch\.float32\)"):
            call(inputs)


def test_impossible_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        LinearTransform(0)
    with pytest.raises(ValueError, match="'identity' or 'whitening', got 'pca'"):
        LinearTransform(2, initialization="pca")  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", [data(dtype=torch.float32), images(torch.float32)])
def test_inside_autocast_it_computes_in_the_precision_of_its_weights(inputs: Tensor) -> None:
    linear, plain = (LinearTransform(3, initialization="whitening") for _ in range(2))
    expected = plain(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear(inputs)
        weight, back = linear.weight(), linear.inverse(found[0])[0]
        halves = linear(inputs.bfloat16())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(weight, plain.weight(), rtol=0, atol=0)
    torch.testing.assert_close(back, inputs, rtol=1e-4, atol=1e-4)
    assert {each.dtype for each in halves} == {torch.float32}


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("inputs", [data(2), images()[:1, :, :1, :2]])
def test_second_derivatives_are_right(direction: str, inputs: Tensor) -> None:
    linear = random_linear()

    def loss(values: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
        moved = {"linear.factors": factors, "linear.bias": bias}
        module = _Direction(linear, direction)
        outputs, logabsdet = torch.func.functional_call(module, moved, (values,))
        return outputs.pow(3).sum() + logabsdet.pow(2).sum()

    assert linear.bias is not None
    arguments = [inputs / 5, linear.factors.detach(), linear.bias.detach()]
    moving = tuple(each.clone().requires_grad_() for each in arguments)
    assert torch.autograd.gradcheck(loss, moving)
    assert torch.autograd.gradgradcheck(loss, moving)


class _Direction(nn.Module):
    def __init__(self, linear: LinearTransform, direction: str) -> None:
        super().__init__()
        self.linear, self.direction = linear, direction

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        outputs, logabsdet = getattr(self.linear, self.direction)(values)
        return outputs, logabsdet


@pytest.mark.parametrize("inputs", [data(4), images()])
def test_jacobians_and_per_row_gradients_by_vmap(inputs: Tensor) -> None:
    linear = random_linear()
    row = torch.func.jacrev(lambda each: linear(each[None])[0][0])
    jacobians = torch.func.vmap(row)(inputs).reshape(inputs.shape[0], *2 * (inputs[0].numel(),))
    logabsdet = torch.linalg.slogdet(jacobians).logabsdet
    torch.testing.assert_close(logabsdet, linear(inputs)[1])
    back = torch.func.jacrev(lambda each: linear.inverse(each[None])[0][0])
    inverses = torch.func.vmap(back)(inputs).reshape(jacobians.shape)
    identity = torch.eye(jacobians.shape[1], dtype=torch.float64).expand_as(jacobians)
    torch.testing.assert_close(inverses @ jacobians, identity)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_its_node_is_its_slow_twin(rate: float) -> None:
    linears = [random_linear(), random_linear()]
    with torch.no_grad():
        linears[1].factors.mul_(60)
    factors = torch.stack([each.factors for each in linears]).detach().requires_grad_()

    def loss(matrices: Tensor, logabsdets: Tensor) -> Tensor:
        return (matrices.cos().sum((1, 2)) + rate * logabsdets.pow(3)).sum()

    found = weights_together(linears)
    matrices, logabsdets = (torch.stack(each) for each in zip(*found, strict=True))
    expected = _products(factors)
    torch.testing.assert_close((matrices, logabsdets), expected)
    gradients = torch.autograd.grad(loss(matrices, logabsdets), [each.factors for each in linears])
    (wanted,) = torch.autograd.grad(loss(*expected), factors)
    torch.testing.assert_close(torch.stack(gradients), wanted)


def test_in_a_composite_all_are_computed_together_and_none_that_might_change() -> None:
    linears = [random_linear(), whitening(), random_linear(), whitening()]
    linears[3](data())
    changed = random_linear()
    changed.register_forward_pre_hook(lambda module, _: module.factors.data.mul_(1))
    assert [each.takes_weight for each in (*linears, changed)] == [True, False, True, True, False]
    apart = deepcopy(linears)
    outputs, logabsdet = data(), torch.zeros(1, dtype=torch.float64)
    for linear in apart:
        outputs, each = linear(outputs)
        logabsdet = logabsdet + each
    together = CompositeTransform(linears)
    torch.testing.assert_close(together(data()), (outputs, logabsdet))
    assert linears[1].takes_weight
    (logabsdet + outputs.square().sum(1)).sum().backward()
    found, logabsdet = together(data())
    (logabsdet + found.square().sum(1)).sum().backward()
    for one, other in zip(together.parameters(), nn.ModuleList(apart).parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_step_through_many_in_a_composite_asks_for_few_operations_more() -> None:
    def step(count: int) -> int:
        parts = [part for _ in range(count) for part in (LinearTransform(3), ActNorm(3))]
        composite = CompositeTransform(parts[:-1])

        def work() -> None:
            composite.zero_grad()
            outputs, logabsdet = composite(torch.randn(8, 3))
            (outputs.square().sum(1) - logabsdet).sum().backward()

        return counted_operations(work)

    assert step(6) - step(5) < 25


@pytest.mark.parametrize("inputs", [data(), images()])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_it_exports_with_a_dynamic_batch(inputs: Tensor, direction: str) -> None:
    linear = whitening()
    linear(inputs)
    module = _Direction(linear, direction).eval()
    size = {"values": {0: torch.export.Dim("batch", min=1, max=4096)}}
    program = torch.export.export(module, (inputs[:4],), dynamic_shapes=size)
    for rows in (1, 3, inputs.shape[0]):
        part = inputs[:rows].contiguous()
        torch.testing.assert_close(program.module()(part), module(part))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_once_started_it_compiles_to_one_graph(direction: str) -> None:
    torch.compiler.reset()
    started, restored = whitening(), whitening()
    started(data())
    restored.load_state_dict(started.state_dict())
    expected = getattr(started, direction)(data())
    for linear in (started, restored):
        step = torch.compile(getattr(linear, direction), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(step(data()), expected)


class Waits(TorchDispatchMode):
    """Names what makes a host wait for its device, or copies from one to the other."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
    copying = ("_to_copy", "lift_fresh", "lift_fresh_copy", "copy_", "scalar_tensor")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in (*self.waiting, *self.copying):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def waits_of_a_step(linear: nn.Module, inputs: Tensor) -> list[str]:
    with Waits() as waits:
        outputs, logabsdet = linear(inputs)
        (outputs.square().sum() - logabsdet.sum()).backward()
        linear.inverse(outputs.detach())  # type: ignore[operator]
    return waits.seen


@pytest.mark.parametrize("inputs", [data(), images()])
def test_once_started_nothing_waits_or_copies_from_the_host(inputs: Tensor) -> None:
    started, restored = whitening(), whitening()
    assert "_local_scalar_dense" in waits_of_a_step(started, inputs)
    restored.load_state_dict(started.state_dict())
    for linear in (started, restored, LinearTransform(3).double()):
        assert waits_of_a_step(linear, inputs) == []


def test_the_instrument_sees_what_nflows_copies() -> None:
    assert waits_of_a_step(nflows_transforms.LULinear(3).double(), data()) != []


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
    others = outputs[:, [0, 2]].detach()
    torch.testing.assert_close(others.mean(0), torch.zeros_like(others[0]), rtol=0, atol=1e-9)
    torch.testing.assert_close(others.std(0), torch.ones_like(others[0]), rtol=0, atol=0.02)
    expected = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(linear.weight()[1].detach(), expected)
    assert torch.equal(linear.weight()[:, 1].detach(), expected)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_few_rows_start_it_as_they_start_act_norm(rows: int) -> None:
    linear, norm = whitening(), ActNorm(3).double()
    torch.testing.assert_close(linear(data(rows)), norm(data(rows)))
    assert not bool(linear.factors.detach().tril(-1).any())


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


def test_a_flow_on_dependent_features_learns_instead_of_falling_apart() -> None:
    """The first step of four seeds loses 2,000 to 6,000 nats; 10^7 where the stretch is 10^4."""
    torch.manual_seed(0)
    rows = torch.randn(600, 1) * torch.tensor([1.0, 2.0, 3.0])
    flow = ResidualFlow(3, 8, num_layers=2)
    flow.initialize(rows)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = -flow.log_prob(rows).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 3e5, losses


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


def test_samples_of_its_own_start_nothing() -> None:
    linear = LinearTransform(3, initialization="whitening")
    samples, _ = linear.inverse(5 * torch.randn(50, 3))
    linear(samples)
    assert not bool(linear.initialized)


def test_the_log_determinant_of_images_counts_every_pixel() -> None:
    torch.manual_seed(0)
    linear = LinearTransform(2).double()
    torch.nn.init.normal_(linear.factors, std=0.5)
    images = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    expected = 12 * torch.linalg.slogdet(linear.weight()).logabsdet.expand(5)
    outputs, logabsdet = linear(images)
    torch.testing.assert_close(logabsdet, expected)
    torch.testing.assert_close(linear.inverse(outputs)[1], -expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_its_inverse_in_half_precision_is_solved_in_float32(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = LinearTransform(3, bias=bias)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, std=0.3)
    single, given = linear.to(dtype).float(), torch.randn(40, 3).to(dtype)
    expected = single.inverse(given.float())[0]
    found, logabsdet = linear.to(dtype).inverse(given)
    assert found.dtype == logabsdet.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_the_inverse_and_the_certificate_of_a_pruned_map_are_of_the_present_weights() -> None:
    """They were those of the last call: hooks before it are what computes them."""
    linear = random_linear()
    prune.l1_unstructured(linear, "factors", 0.3)
    linear(data())
    with torch.no_grad():
        linear.get_parameter("factors_orig").mul_(2)
    constants, outputs = lipschitz_constants(linear), torch.randn(5, 3, dtype=torch.float64)
    back = linear.inverse(outputs)[0]
    torch.testing.assert_close(linear(back)[0], outputs)
    singular = torch.linalg.svdvals(linear.weight().detach())
    assert constants == pytest.approx((float(singular[0]), 1 / float(singular[-1])))
    back.square().sum().backward()
    assert linear.get_parameter("factors_orig").grad is not None


@pytest.mark.skipif(
    [int(each) for each in torch.__version__.split(".")[:2]] < [2, 9],
    reason="compilers of older versions of torch do not know modes of functions",
)
def test_a_flow_of_parts_in_closed_form_samples_in_one_graph() -> None:
    """What keeps samples from starting anything is no part of it."""
    torch.compiler.reset()
    composite = CompositeTransform([ActNorm(2), LinearTransform(2)])
    flow = flows.Flow(composite, flows.StandardNormal([2]))
    flow.log_prob(torch.randn(9, 2))
    step = torch.compile(flow.sample_and_log_prob, fullgraph=True, backend="aot_eager")
    samples, log_prob = step(3)
    torch.testing.assert_close(flow.log_prob(samples), log_prob)


def test_another_diagonal_is_refused_where_forward_would_not_see_it() -> None:
    with pytest.raises(TypeError, match="replaces log_diagonal, from which inverse alone"):

        class Preserving(LinearTransform):
            def log_diagonal(self) -> Tensor:
                diagonal = super().log_diagonal()
                return diagonal - diagonal.mean()
