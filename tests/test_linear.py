"""The linear map: against nflows' LULinear, its derivatives, and what a graph asks of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nflows import transforms as nflows_transforms
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nflows_iresnet.transforms import LinearTransform

MIXING = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 2.0], [0.1, 0.0, 1.0]], dtype=torch.float64)


def data(rows: int = 500, features: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Correlated rows away from zero."""
    generator = torch.Generator().manual_seed(5)
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
        built.to_empty(device="cpu")
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
        with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), got \("):
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
