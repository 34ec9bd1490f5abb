"""What flows say to what they were not built for, at every door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nflows.distributions
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nflows_iresnet import ResidualFlow, flows, transforms

PRESETS = {"residual": ResidualFlow, "iresnet": flows.InvertibleResNet}
every_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)

WITH_DATA: dict[str, Callable[..., Any]] = {
    "log_prob": lambda flow, inputs, context=None: flow.log_prob(inputs, context),
    "transform_to_noise": lambda flow, inputs, context=None: flow.transform_to_noise(
        inputs, context
    ),
}
WITHOUT_DATA: dict[str, Callable[..., Any]] = {
    "sample": lambda flow, context=None: flow.sample(3, context),
    "sample_and_log_prob": lambda flow, context=None: flow.sample_and_log_prob(3, context),
    "sample-in-batches": lambda flow, context=None: flow.sample(3, context, batch_size=2),
}
DOORS: dict[str, Callable[..., Any]] = {
    **{
        name: lambda flow, context=None, door=door: door(flow, torch.zeros(4, 2), context)
        for name, door in WITH_DATA.items()
    },
    **WITHOUT_DATA,
}
every_data_door = pytest.mark.parametrize("door", WITH_DATA.values(), ids=WITH_DATA)
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


def conditional(preset: type[ResidualFlow] = ResidualFlow, **options: Any) -> ResidualFlow:
    torch.manual_seed(0)
    return preset(2, 8, 1, context_features=3, **options)


# --- a context ------------------------------------------------------------------------------------


@every_preset
@every_door
def test_a_forgotten_context_is_an_error(
    preset: type[ResidualFlow], door: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=r"context_features=3, but no context.*optional_context"):
        door(conditional(preset))


@every_preset
@every_door
def test_a_flow_with_optional_context_works_without(
    preset: type[ResidualFlow], door: Callable[..., Any]
) -> None:
    flow = conditional(preset, optional_context=True)
    door(flow)
    door(flow, torch.zeros(4, 3))
    flow._embedding_net = nn.Linear(7, 3)
    door(flow)
    door(flow, torch.zeros(4, 7))


@every_preset
@every_door
def test_a_context_for_a_flow_without_is_an_error(
    preset: type[ResidualFlow], door: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=r"a context .* was given to a model without"):
        door(preset(2, 8, 1), torch.zeros(4, 3))


@every_door
@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 1), (4,)])
def test_a_context_of_another_shape_is_named_as_it_was_given(
    door: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    given = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"\(batch, 3\), got {given}"):
        door(conditional(), torch.zeros(shape))


@every_data_door
@pytest.mark.parametrize("shape", [(5, 3), (1, 3), ()])
def test_a_context_with_other_rows_is_named(
    door: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="one row for each row of the inputs"):
        door(conditional(), torch.zeros(4, 2), torch.zeros(shape))


@every_door
def test_an_embedding_needs_its_context_too(door: Callable[..., Any]) -> None:
    flow = conditional()
    for net in (nn.Linear(7, 3), nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 3))):
        flow._embedding_net = net
        with pytest.raises(ValueError, match=f"context by {type(net).__name__}, but no context"):
            door(flow)
        for wrong in (torch.zeros(4, 7, dtype=torch.float64), torch.zeros(4, 7).long()):
            with pytest.raises(ValueError, match=r"the context (is|are) .*\.to\(torch\.float32\)"):
                door(flow, wrong)
    flow._embedding_net = nn.Embedding(5, 3)
    door(flow, torch.arange(4))


def test_faults_of_an_embedding_stay_what_they_are() -> None:
    flow = conditional()
    flow._embedding_net = nn.Linear(7, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        flow.sample(2, torch.zeros(4, 6))


def test_rows_of_samples_belong_to_their_context() -> None:
    flow = conditional().double().eval()
    context = 3 * torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]], dtype=torch.float64)
    with torch.no_grad():
        affine = next(
            each for each in flow.modules() if isinstance(each, transforms.ConditionalAffine)
        )
        affine.net = nn.Linear(3, 4, bias=False).double()
        affine.net.weight.copy_(2 * torch.eye(4, 3).roll(2, dims=0))
        for samples, scores in (
            flow.sample_and_log_prob(200, context),
            (flow.sample(200, context, batch_size=70), None),
        ):
            direct = [flow.log_prob(samples[i], context[i].expand(200, -1)) for i in range(2)]
            swapped = [flow.log_prob(samples[1 - i], context[i].expand(200, -1)) for i in range(2)]
            assert float(torch.stack(direct).mean() - torch.stack(swapped).mean()) > 9
            if scores is not None:
                torch.testing.assert_close(scores, torch.stack(direct), rtol=0, atol=1e-8)


# --- data -----------------------------------------------------------------------------------------


@every_preset
@every_data_door
@pytest.mark.parametrize("shape", [(5, 3), (2,), (), (5, 2, 2), (5, 2, 4, 4)])
def test_data_of_another_shape_are_named_without_a_word_of_images(
    preset: type[ResidualFlow], door: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"expected inputs of shape \(batch, 2\), got \(") as error:
        door(preset(2, 8, 1), torch.zeros(shape))
    assert "height" not in str(error.value)
    assert str(tuple(shape)) in str(error.value)


@every_preset
@every_data_door
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int32, torch.bool])
def test_data_of_another_precision_are_named_with_the_remedy(
    preset: type[ResidualFlow], door: Callable[..., Any], dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=r"the inputs are .* convert .*\.to\(torch\.float32\)"):
        door(preset(2, 8, 1), torch.zeros(5, 2, dtype=dtype))
    with pytest.raises(ValueError, match=r"\.to\(torch\.float64\)"):
        door(preset(2, 8, 1).double(), torch.zeros(5, 2))


@every_door
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_context_of_another_precision_is_named_with_the_remedy(
    door: Callable[..., Any], dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=r"the context is .*\.to\(torch\.float32\)"):
        door(conditional(), torch.zeros(4, 3, dtype=dtype))


@every_data_door
@pytest.mark.parametrize("given", [[[1.0, 2.0]], np.zeros((4, 2), np.float32), 1.0, None])
def test_what_is_no_tensor_is_named(door: Callable[..., Any], given: Any) -> None:
    with pytest.raises(ValueError, match=r"inputs must be a tensor, got .*torch\.as_tensor"):
        door(ResidualFlow(2, 8, 1), given)


@every_door
def test_a_context_that_is_no_tensor_is_named(door: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="context must be a tensor, got ndarray"):
        door(conditional(), np.zeros((4, 3), np.float32))


def test_whole_numbers_enter_a_flow_that_dequantises() -> None:
    parts = [transforms.UniformDequantization(), transforms.ActNorm(2)]
    flow = flows.Flow(transforms.CompositeTransform(parts), flows.StandardNormal([2]))
    assert flow.log_prob(torch.randint(0, 9, (5, 2)).float()).shape == (5,)


# --- numbers of samples ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, -1, 2.5, "3", True, None])
def test_numbers_of_samples_that_are_none_are_named(number: Any) -> None:
    flow = ResidualFlow(2, 8, 1)
    for draw in (flow.sample, flow.sample_and_log_prob):
        with pytest.raises(ValueError, match="num_samples must be"):
            draw(number)
    if number is not None:
        with pytest.raises(ValueError, match="batch_size must be"):
            flow.sample(3, batch_size=number)


def test_any_whole_number_of_samples_will_do() -> None:
    flow = ResidualFlow(2, 8, 1)
    numbers: list[Any] = [3, np.int64(3), np.uint8(3), torch.tensor(3)]
    for number in numbers:
        samples, log_prob = flow.sample_and_log_prob(number)
        assert flow.sample(number, batch_size=number).shape == samples.shape == (3, 2)
        assert log_prob.shape == (3,)
    samples, log_prob = conditional().sample_and_log_prob(np.int64(5), torch.zeros(0, 3))
    assert (samples.shape, log_prob.shape) == ((0, 5, 2), (0, 5))


# --- arguments ------------------------------------------------------------------------------------


@every_preset
def test_what_follows_the_four_sizes_is_by_keyword(preset: type[ResidualFlow]) -> None:
    with pytest.raises(TypeError, match="positional"):
        preset(2, 8, 1, 1, 3)  # type: ignore[call-arg]


@every_preset
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("size", [True, 0, -1, 2.0, "2", [2]])
def test_sizes_that_are_none_are_named(preset: type[ResidualFlow], place: int, size: Any) -> None:
    names = ("features", "hidden_features", "num_layers", "num_blocks_per_layer")
    sizes: list[Any] = [2, 8, 1, 2]
    sizes[place] = size
    with pytest.raises(ValueError, match=f"^{names[place]} must be"):
        preset(*sizes)


@pytest.mark.parametrize("bins", [True, False, -1, 2.0, "8"])
def test_numbers_of_bins_that_are_none_are_named(bins: Any) -> None:
    with pytest.raises(ValueError, match="marginal_bins must be"):
        ResidualFlow(2, 8, 1, marginal_bins=bins)
    ResidualFlow(2, 8, 1, marginal_bins=np.int64(0))


@every_preset
@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "exact"},
        {"solver": "anderson"},
        {"activation": "relu"},
        {"activation": nn.ELU},
    ],
    ids=str,
)
def test_names_and_classes_are_no_strategies(
    preset: type[ResidualFlow], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        preset(2, 8, 1, **options)


# --- precision and device -------------------------------------------------------------------------


def test_noise_of_other_distributions_takes_the_precision_of_the_transform() -> None:
    norm = nflows.distributions.StandardNormal([2])
    flow = flows.Flow(transforms.ActNorm(2), norm).double()
    assert flow.sample(3).dtype == torch.float64
    assert flow.sample_and_log_prob(3)[1].dtype == torch.float64


def test_the_standard_normal_alone_follows_its_precision() -> None:
    normal = flows.StandardNormal([2, 3])
    assert normal.sample(4).dtype == torch.float32
    assert normal.double().sample(4, torch.zeros(5, 1)).shape == (5, 4, 2, 3)
    assert normal.sample(4).dtype == normal.mean().dtype == torch.float64
    assert not normal.state_dict()
    assert not list(normal.buffers())
    rows = torch.randn(4, 2, 3, dtype=torch.float64)
    theirs = nflows.distributions.StandardNormal([2, 3]).log_prob(rows)
    torch.testing.assert_close(normal.log_prob(rows), theirs, rtol=1e-14, atol=0)
    other: Tensor = normal.float().sample(2)
    assert other.dtype == torch.float32


class Cold(flows.StandardNormal):
    """Samples at its mode."""

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        return torch.zeros_like(super()._sample(num_samples, context))


class Hot(flows.StandardNormal):
    """Samples twice as wide, through the public door."""

    def sample(
        self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None
    ) -> Tensor:
        return 2 * super().sample(num_samples, context, batch_size).sign()


class Named(flows.StandardNormal):
    """Samples as the normal does."""


@pytest.mark.parametrize(("kind", "values"), [(Cold, {0.0}), (Hot, {-2.0, 2.0})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_normal_with_samples_of_its_own_is_asked_for_them(
    kind: type[flows.StandardNormal], values: set[float], dtype: torch.dtype
) -> None:
    flow = flows.Flow(transforms.ActNorm(2).to(dtype), kind([2]))
    for context, shape in ((None, (40, 2)), (torch.zeros(3, 1, dtype=dtype), (3, 40, 2))):
        for samples in (flow.sample(40, context), flow.sample_and_log_prob(40, context)[0]):
            assert samples.shape == shape
            assert samples.dtype == dtype
            assert set(samples.flatten().tolist()) == values


def test_a_normal_without_samples_of_its_own_draws_in_the_precision_of_the_flow() -> None:
    flow = flows.Flow(transforms.ActNorm(1).double(), Named([1]))
    samples = flow.sample(100)
    assert not torch.equal(samples, samples.float().double())
    flow._distribution._sample = lambda num_samples, context: torch.ones(num_samples, 1)
    assert flow.sample(2).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_density_of_noise_in_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    normal, noise = flows.StandardNormal([768]), torch.randn(5, 768).to(dtype)
    found = normal.log_prob(noise)
    assert found.dtype == torch.float32
    assert torch.equal(found, normal.log_prob(noise.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_half_precision_meet_a_first_part_without_weights_in_that_of_the_others(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    parts = [transforms.LogitTransform(17), transforms.ActNorm(2)]
    flow = flows.Flow(transforms.CompositeTransform(parts), flows.StandardNormal([2])).eval()
    rows = (17 * torch.rand(50, 2)).to(dtype)
    for call in (flow.log_prob, flow.transform_to_noise):
        assert torch.equal(call(rows), call(rows.float()))
