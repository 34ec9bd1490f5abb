"""Transforms of images: the contract, exact bits per dimension, and nflows' faults beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from nflows.transforms import (
    CompositeTransform,
    MultiscaleCompositeTransform,
    PointwiseAffineTransform,
)
from nflows.transforms import SqueezeTransform as NflowsSqueeze
from torch import Tensor, nn

from nflows_iresnet import testing, transforms
from nflows_iresnet.transforms.image import CenteringTransform, MultiscaleTransform
from tests import device

CASES: dict[str, Callable[[], nn.Module]] = {
    "centring": lambda: CenteringTransform(levels=17),
    "logit": lambda: transforms.LogitTransform(levels=17, alpha=0.1),
    "squeeze": transforms.SqueezeTransform,
    "multiscale": lambda: transforms.multiscale((1, 4, 4), 2, act_norm),
}

EXCLUDED = {
    ("squeeze", "shapes_and_dtype"): "changes the shape",
    ("multiscale", "shapes_and_dtype"): "changes the shape",
}


def act_norm(shape: tuple[int, int, int]) -> list[nn.Module]:
    return [transforms.ActNorm(shape[0])]


def images(batch: int = 4) -> Tensor:
    torch.manual_seed(3)
    return 17 * torch.rand(batch, 1, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("clause", testing.CLAUSES)
@pytest.mark.parametrize("name", CASES)
def test_contract(name: str, clause: str) -> None:
    if (name, clause) in EXCLUDED:
        pytest.skip(EXCLUDED[name, clause])
    testing.check_transform(CASES[name](), images(), clauses=(clause,))


# --- dequantisation -------------------------------------------------------------------------------


def test_noise_never_reaches_the_next_level(monkeypatch: pytest.MonkeyPatch) -> None:
    almost_one = torch.full((1,), 1 - 2.0**-24)
    assert (torch.tensor(255.0) + almost_one).item() == 256.0, "float32 rounds up: the trap"
    monkeypatch.setattr(torch, "rand", lambda shape, **options: almost_one.expand(shape))
    values = transforms.dequantize(torch.tensor([0, 17, 255], dtype=torch.uint8))
    assert values.floor().tolist() == [0, 17, 255]


def test_noise_is_uniform_fresh_and_reproducible() -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(400)
    torch.manual_seed(0)
    first, second = transforms.dequantize(levels), transforms.dequantize(levels)
    assert not torch.equal(first, second)
    noise = (first - levels).sort().values
    expected = (torch.arange(len(noise)) + 0.5) / len(noise)
    assert (noise - expected).abs().max() < 3.1 / math.sqrt(len(noise))  # Kolmogorov, 1e-8
    draws = [transforms.dequantize(levels, generator=device.generator(5)) for _ in range(2)]
    assert torch.equal(*draws)


def test_dequantisation_in_front_of_a_flow() -> None:
    integers = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    transform = CompositeTransform(
        [transforms.UniformDequantization(), transforms.LogitTransform(levels=16)]
    )
    outputs, _ = transform(integers.float())
    back, _ = transform.inverse(outputs)
    assert torch.equal(back, integers.float())


@pytest.mark.parametrize(
    "preprocessing",
    [
        transforms.LogitTransform(256, alpha=0.05),
        transforms.LogitTransform(256, alpha=1e-6),
        PointwiseAffineTransform(shift=-0.5, scale=1 / 256),
    ],
    ids=["logit", "logit-thin", "affine"],
)
def test_bits_per_dim_of_uniform_noise_are_eight(preprocessing: nn.Module) -> None:
    """The pullback of the uniform density on [0, 256)^D has 8 bits/dim, whatever comes before."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8)
    values = transforms.dequantize(pixels, dtype=torch.float64)
    noise, logabsdet = preprocessing(values)
    _, inverse_logabsdet = preprocessing.inverse(noise)  # type: ignore[operator]
    log_uniform_of_noise = inverse_logabsdet - 16 * math.log(256)
    bits = -(log_uniform_of_noise + logabsdet) / (16 * math.log(2))
    torch.testing.assert_close(bits, torch.full_like(bits, 8.0), rtol=1e-6, atol=0)


def test_logit_refuses_constants_out_of_range() -> None:
    for levels, alpha in ((1, 0.1), (256, 0.0), (256, 0.5)):
        with pytest.raises(ValueError, match="alpha in"):
            transforms.LogitTransform(levels, alpha)


# --- squeezing and scales -------------------------------------------------------------------------


@pytest.mark.peer
def test_nflows_squeeze_refuses_its_own_outputs() -> None:
    inputs = torch.arange(72.0).reshape(2, 1, 6, 6)
    outputs, _ = NflowsSqueeze(3)(inputs)
    with pytest.raises(ValueError, match="Invalid number of channel"):
        NflowsSqueeze(3).inverse(outputs)
    ours, _ = transforms.SqueezeTransform(np.int64(3))(inputs)
    assert torch.equal(ours, outputs)
    assert torch.equal(transforms.SqueezeTransform(3).inverse(ours)[0], inputs)
    with pytest.raises(ValueError, match="multiple of 9 channels"):
        transforms.SqueezeTransform(3).inverse(torch.zeros(1, 4, 2, 2))


def test_scales_halve_the_channels() -> None:
    seen: list[tuple[int, int, int]] = []

    def steps(shape: tuple[int, int, int]) -> list[nn.Module]:
        seen.append(shape)
        return []

    transforms.multiscale((3, 32, 32), 3, steps)
    assert seen == [(12, 16, 16), (24, 8, 8), (48, 4, 4)]
    with pytest.raises(ValueError, match="cannot have 3 scales"):
        transforms.multiscale((1, 28, 28), 3, steps)


# --- padding --------------------------------------------------------------------------------------


def test_padding_is_an_isometry_and_refuses_what_is_outside() -> None:
    padding, inputs = transforms.InjectivePadding(3), images()
    outputs, logabsdet = padding(inputs)
    assert outputs.shape == (4, 4, 4, 4)
    assert torch.equal(outputs.flatten(1).norm(dim=1), inputs.flatten(1).norm(dim=1))
    assert logabsdet.tolist() == [0.0] * 4
    assert torch.equal(padding.inverse(outputs)[0], inputs)
    outputs[2, 3, 1, 1] = 0.25
    assert padding.distance(outputs).tolist() == [0.0, 0.0, 0.25, 0.0]
    with pytest.raises(transforms.OutsideRangeError, match=r"1 of 4 rows .* up to 0\.25"):
        padding.inverse(outputs)
    projecting = transforms.InjectivePadding(3, tolerance=math.inf)
    assert torch.equal(projecting.inverse(outputs)[0], inputs)
    outputs[2, 3, 1, 1] = math.nan
    with pytest.raises(transforms.OutsideRangeError):
        padding.inverse(outputs)


def test_padding_by_nothing() -> None:
    padding, inputs = transforms.InjectivePadding(0), images()
    assert torch.equal(padding.inverse(padding(inputs)[0])[0], inputs)


# --- values and sizes that do not fit -------------------------------------------------------------


@pytest.mark.usefixtures("values_are_seen")
def test_pixels_outside_the_range_are_refused() -> None:
    """They were NaN: 0 to 255 where 17 levels are expected."""
    logit = transforms.LogitTransform(levels=17)
    pixels = transforms.dequantize(torch.arange(256).reshape(1, 1, 16, 16))
    with pytest.raises(transforms.OutsideRangeError, match=r"-0\.9444, 17\.94.*levels=17.*to 25"):
        logit(pixels)
    for bad in (-1.0, 18.0, math.inf, -math.inf):
        values = torch.full((2, 1, 2, 2), 5.0)
        values[1, 0, 1, 1] = bad
        with pytest.raises(transforms.OutsideRangeError, match="dequantize"):
            logit(values)
    with pytest.raises(transforms.OutsideRangeError, match="1 of 8 pixels are NaN"):
        logit(values.clamp(0, 17).where(values.isfinite(), torch.nan))
    assert logit(pixels[:0])[0].shape == (0, 1, 16, 16)


def test_what_the_inverse_returns_is_in_the_range() -> None:
    logit, noise = transforms.LogitTransform(levels=17), torch.linspace(-12, 12, 24)[:, None]
    outputs, logabsdet = logit.inverse(noise)
    assert float(outputs.min()) < 0
    assert float(outputs.max()) > 17
    back, forward_logabsdet = logit(outputs.double())
    torch.testing.assert_close(back, noise.double(), rtol=0.05, atol=0.05)
    torch.testing.assert_close(forward_logabsdet, -logabsdet.double(), rtol=0.05, atol=0.05)


def test_the_check_of_pixels_does_not_stop_a_transform_of_torch_func() -> None:
    """Where values cannot be looked at, they are not."""
    logit, values = transforms.LogitTransform(levels=17), torch.tensor([[5.0, 16.5]])
    slope = torch.func.vmap(torch.func.jacrev(lambda x: logit(x[None])[0][0]))(values)
    logabsdet = torch.linalg.slogdet(slope).logabsdet
    torch.testing.assert_close(logit(values)[1], logabsdet)


@pytest.mark.usefixtures("values_are_seen")
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_only_whole_numbers_are_dequantised(dtype: torch.dtype) -> None:
    for bad in (-1, 256):
        with pytest.raises(transforms.OutsideRangeError, match=f"0 to 255, got .*{bad}"):
            transforms.dequantize(torch.tensor([3, bad]).to(dtype))
    values = transforms.dequantize(torch.tensor([0, 255]).to(dtype))
    assert values.floor().tolist() == [0, 255]


@pytest.mark.usefixtures("values_are_seen")
def test_numbers_that_are_not_whole_are_not_dequantised() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8)
    for bad in (transforms.dequantize(images), images / 255 + 0.1, torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="whole numbers"):
            transforms.dequantize(bad)
    with pytest.raises(ValueError, match="dtype must be"):
        transforms.dequantize(images, dtype=torch.float16)
    large = transforms.dequantize(torch.tensor([65535]), dtype=torch.float64)
    assert large.floor().tolist() == [65535]
    assert transforms.dequantize(torch.zeros(0, 3)).shape == (0, 3)
    assert transforms.dequantize(torch.tensor([False, True])).floor().tolist() == [0, 1]


def test_levels_are_whole_numbers() -> None:
    for levels in (17.0, 16.5, "17", None):
        with pytest.raises(ValueError if levels != "17" and levels else (ValueError, TypeError)):
            transforms.LogitTransform(levels)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="whole number"):
            CenteringTransform(levels)  # type: ignore[arg-type]
    assert transforms.LogitTransform(np.int64(17)).levels == 17


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"multiples of 2, got \(1, 3, 5, 4\)"):
        transforms.SqueezeTransform()(torch.zeros(1, 3, 5, 4))
    with pytest.raises(ValueError, match=r"\(batch, channels, height, width\).* got \(3, 4, 4\)"):
        transforms.SqueezeTransform()(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"at least the 3 channels .* got \(1, 2, 4, 4\)"):
        transforms.InjectivePadding(3).inverse(torch.zeros(1, 2, 4, 4))
    for shape in ((8, 8), (1, 8, 8, 1), (0, 8, 8), (1, 8.0, 8), 8):
        with pytest.raises(ValueError, match="three whole numbers"):
            transforms.multiscale(shape, 1, act_norm)  # type: ignore[arg-type]


def test_centred_pixels_take_the_state_of_the_transform_before() -> None:
    centring, before = CenteringTransform(17), PointwiseAffineTransform(shift=-0.5, scale=1 / 17)
    centring.load_state_dict(before.state_dict())
    assert list(centring.state_dict()) == ["_extra_state"]
    torch.testing.assert_close(centring(images())[0], before(images())[0])
    torch.testing.assert_close(centring(images())[1], before(images())[1].double())
    torch.testing.assert_close(centring.inverse(centring(images())[0])[0], images())


# --- half precision, empty batches, and other integers --------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", ["centring", "logit", "thin"])
def test_pixels_of_half_precision_are_computed_in_float32(
    name: str, direction: str, dtype: torch.dtype
) -> None:
    """Thousands of nats in half precision were off by up to eight."""
    torch.manual_seed(0)
    make = {
        "centring": CenteringTransform,
        "logit": transforms.LogitTransform,
        "thin": lambda: transforms.LogitTransform(alpha=1e-6),
    }[name]
    pixels = torch.rand(3, 3, 16, 16)
    given = (255 * pixels if direction == "forward" else pixels - 0.5).to(dtype)
    call = getattr(make(), direction)
    outputs, logabsdet = call(given)
    expected, expected_logabsdet = call(given.float())
    assert (outputs.dtype, logabsdet.dtype) == (dtype, torch.float32)
    assert torch.equal(outputs, expected.to(dtype))
    assert torch.equal(logabsdet, expected_logabsdet)
    assert float(logabsdet.abs().min()) > 1000


def test_whole_numbers_by_type_are_centred_as_floats() -> None:
    """The logarithm of their number of levels was cut off to a whole number."""
    pixels = torch.tensor([[0, 5, 17]])
    found, expected = CenteringTransform(17)(pixels), CenteringTransform(17)(pixels.float())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Large(nn.Module):
    """A transform whose log-determinant is large, and in float32 whatever its inputs are."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs, torch.full((inputs.shape[0],), self.value)

    inverse = forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_add_up_in_the_precision_of_their_parts(dtype: torch.dtype) -> None:
    scales = MultiscaleTransform(2)
    scales.add_transform(Large(1000.25), (4, 2, 2))
    scales.add_transform(Large(2000.5), (2, 2, 2))
    outputs, logabsdet = scales(torch.ones(3, 4, 2, 2, dtype=dtype))
    assert outputs.dtype == dtype
    for found in (logabsdet, scales.inverse(outputs)[1]):
        assert found.tolist() == [3000.75] * 3


def test_scales_are_those_of_nflows() -> None:
    torch.manual_seed(0)
    ours = transforms.multiscale((1, 8, 8), 3, act_norm).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs = MultiscaleCompositeTransform(3)
    for part, shape in zip(ours._transforms, [(4, 4, 4), (8, 2, 2), (16, 1, 1)], strict=True):
        theirs.add_transform(part, shape)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    pixels = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    for mode in (True, False):
        found, expected = ours.train(mode)(pixels), theirs.train(mode)(pixels)
        assert all(map(torch.equal, found, expected))
        found, expected = ours.inverse(found[0]), theirs.inverse(found[0])
        assert all(map(torch.equal, found, expected))


def test_scales_take_an_empty_batch_and_name_what_does_not_fit() -> None:
    scales = transforms.multiscale((1, 8, 8), 2, act_norm)
    outputs, logabsdet = scales(torch.zeros(0, 1, 8, 8))
    assert (outputs.shape, logabsdet.shape) == ((0, 64), (0,))
    assert scales.inverse(outputs)[0].shape == (0, 1, 8, 8)
    for shape in ((3, 65), (3, 63), (3, 1, 8, 8), (64,)):
        with pytest.raises(ValueError, match=r"\(batch, 64\), got"):
            scales.inverse(torch.zeros(shape))
    with pytest.raises(RuntimeError, match="expected 2 transforms, got 0"):
        MultiscaleTransform(2)(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers_are_dequantised(dtype: torch.dtype) -> None:
    pixels = torch.tensor([[0, 7, 255]]).to(dtype)
    assert transforms.dequantize(pixels).floor().tolist() == [[0, 7, 255]]
    assert transforms.UniformDequantization()(pixels)[0].floor().tolist() == [[0, 7, 255]]


@pytest.mark.usefixtures("values_are_seen")
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers_that_are_too_large_are_named(dtype: torch.dtype) -> None:
    with pytest.raises(transforms.OutsideRangeError, match="got 0 to 256"):
        transforms.dequantize(torch.tensor([0, 256]).to(dtype))
