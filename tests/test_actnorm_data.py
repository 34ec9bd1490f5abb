"""What ActNorm makes of its first batch, and which inputs it refuses."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from nflows_iresnet import ResidualFlow
from nflows_iresnet.transforms import ActNorm

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


def test_a_batch_of_one_is_centred_only() -> None:
    norm = ActNorm(2)
    outputs, _ = norm(torch.tensor([[1e-6, 1e6]]))
    assert torch.equal(outputs, torch.zeros(1, 2))
    assert torch.equal(norm.log_scale, torch.zeros(2))


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
