"""The residual flow for images: units, scales, and what it certifies."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nflows_iresnet import logdet, transforms
from nflows_iresnet.flows.image import ImageResidualFlow
from tests import device


def flow(alpha: float | None = 0.05, num_scales: int = 2) -> ImageResidualFlow:
    torch.manual_seed(0)
    return ImageResidualFlow((1, 4, 4), 8, 1, num_scales=num_scales, levels=17, alpha=alpha)


def images(rows: int = 6) -> Tensor:
    integers = torch.randint(0, 17, (rows, 1, 4, 4), generator=device.generator(1))
    return transforms.dequantize(integers, generator=device.generator(2))


@pytest.mark.parametrize("alpha", [0.05, None], ids=["logit", "affine"])
@pytest.mark.parametrize("num_scales", [1, 2])
def test_log_prob_is_that_of_the_pixels(alpha: float | None, num_scales: int) -> None:
    """Against the Jacobian from the pixels to the noise, in float64."""
    model, points = flow(alpha, num_scales).double().eval(), images().double()
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda pixels: model.transform_to_noise(pixels[None]).flatten(), point
            ).reshape(16, 16)
            for point in points
        ]
    )
    noise = model.transform_to_noise(points)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(dim=1)
    expected = base + torch.linalg.slogdet(jacobian).logabsdet
    with transforms.using(model, estimator=logdet.Exact()):
        torch.testing.assert_close(model.log_prob(points), expected, atol=1e-8, rtol=1e-8)
    back = model._transform.inverse(noise)[0]
    torch.testing.assert_close(back, points, atol=1e-4, rtol=1e-4)


def test_samples_are_images_in_the_units_of_the_data() -> None:
    model = flow()
    model.log_prob(images(64))
    with torch.no_grad():
        samples = model.eval().sample(50)
    assert samples.shape == (50, 1, 4, 4)
    below, above = -17 * 0.05 / 0.9, 17 * (1 + 0.05 / 0.9)
    assert below < float(samples.min()) < float(samples.max()) < above
    assert 4 < float(samples.median()) < 13


def test_every_block_is_certified_and_trained() -> None:
    model = flow().train()
    (-model.log_prob(images()).mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    blocks = [each for each in model.modules() if isinstance(each, transforms.ResidualTransform)]
    assert len(blocks) == 2
    assert all(block.lipschitz_bound() <= 0.97 for block in blocks)


def test_impossible_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="num_layers"):
        ImageResidualFlow((1, 4, 4), 8, 0)
    with pytest.raises(ValueError, match="cannot have 3 scales"):
        ImageResidualFlow((1, 28, 28), 8, 1, num_scales=3)
    with pytest.raises(ValueError, match="alpha in"):
        ImageResidualFlow((1, 4, 4), 8, 1, alpha=0.7)


def test_recomputing_gives_the_same_gradients() -> None:
    """The scale whose activations are not kept draws its probes and truncations again."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = ImageResidualFlow((1, 4, 4), 8, 2, levels=17, recompute=recompute)
        model.log_prob(images())
        torch.manual_seed(1)
        model.log_prob(images()).mean().backward()
        results.append([each.grad for each in model.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


# --- samples end inside the range -----------------------------------------------------------------


def spread(model: ImageResidualFlow) -> ImageResidualFlow:
    """Let the noise be so wide that most of it ends beyond the first and the last level."""
    for module in model.modules():
        if isinstance(module, transforms.ActNorm):
            module.initialized.fill_(True)
            module.log_scale.data.fill_(-2.0)
    return model.eval()


@pytest.mark.parametrize("alpha", [0.05, None], ids=["logit", "affine"])
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_images(alpha: float | None, levels: int, dtype: torch.dtype) -> None:
    """Rounded down they are whole numbers from 0 to levels - 1: 7 % of pixels were not."""
    torch.manual_seed(0)
    model = ImageResidualFlow((1, 4, 4), 8, 1, levels=levels, alpha=alpha).to(dtype)
    with torch.no_grad():
        samples = spread(model).sample(64, batch_size=48)
    assert samples.dtype == dtype
    assert float(samples.floor().min()) == 0
    assert float(samples.floor().max()) == levels - 1
    assert float(samples.max()) < levels
    assert model.log_prob(samples).isfinite().all()
    found = model.sample_images(64)
    assert found.dtype == torch.uint8
    assert (int(found.min()), int(found.max())) == (0, levels - 1)
    assert model.log_prob(transforms.dequantize(found, dtype=dtype)).isfinite().all()


def test_samples_with_a_context_are_images() -> None:
    torch.manual_seed(0)
    model = spread(ImageResidualFlow((1, 4, 4), 8, 1, context_features=2, levels=17))
    context = torch.randn(3, 2)
    for samples in (
        model.sample(5, context).floor(),
        model.sample_images(5, context, batch_size=2),
    ):
        assert samples.shape == (3, 5, 1, 4, 4)
        assert (int(samples.min()), int(samples.max())) == (0, 16)


def test_many_levels_need_more_than_a_byte() -> None:
    model = spread(ImageResidualFlow((1, 4, 4), 8, 1, levels=1000))
    assert model.sample_images(4).dtype == torch.int64
    assert int(model.sample_images(50).max()) == 999


def test_samples_come_with_the_density_at_themselves() -> None:
    torch.manual_seed(0)
    model = spread(ImageResidualFlow((1, 4, 4), 8, 1, context_features=2, levels=17).double())
    context = torch.randn(3, 2).double()
    with transforms.using(model, estimator=logdet.Exact()):
        samples, log_prob = (each.detach() for each in model.sample_and_log_prob(4, context))
        expected = model.log_prob(samples.flatten(0, 1), context.repeat_interleave(4, 0)).detach()
        torch.testing.assert_close(log_prob, expected.reshape(3, 4))
        alone, density = spread(flow().double()).sample_and_log_prob(np.int64(20))
    assert alone.shape == (20, 1, 4, 4)
    assert density.shape == (20,)
    assert float(samples.min()) == float(alone.detach().min()) == 0


def test_one_seed_gives_one_sample_as_floats_and_as_images() -> None:
    model = flow().eval()
    torch.manual_seed(3)
    floats = model.sample(5)
    torch.manual_seed(3)
    assert torch.equal(model.sample_images(5), floats.floor().to(torch.uint8))


# --- what does not fit is refused -----------------------------------------------------------------


@pytest.mark.usefixtures("values_are_seen")
@pytest.mark.parametrize("alpha", [0.05, None], ids=["logit", "affine"])
def test_pixels_outside_the_levels_are_refused(alpha: float | None) -> None:
    model = flow(alpha)
    for bad in (-0.5, 17.5, 255.0, math.inf):
        pixels = images()
        pixels[2, 0, 1, 1] = bad
        for call in (model.log_prob, model.transform_to_noise):
            with pytest.raises(transforms.OutsideRangeError, match=r"\[0, 17\] for levels=17"):
                call(pixels)
    pixels[2, 0, 1, 1] = math.nan
    with pytest.raises(transforms.OutsideRangeError, match="1 of 96 pixels are NaN"):
        model.log_prob(pixels)
    assert model.log_prob(torch.full((1, 1, 4, 4), 17.0)).isfinite().all()


def test_images_of_another_size_are_refused() -> None:
    model = flow()
    for shape in ((6, 3, 4, 4), (6, 1, 8, 8), (6, 1, 4, 5), (6, 16), (1, 4, 4)):
        for call in (model.log_prob, model.transform_to_noise):
            with pytest.raises(ValueError, match=r"\(batch, 1, 4, 4\), got \(.*\)"):
                call(torch.ones(shape))


def test_whole_numbers_by_type_have_no_density() -> None:
    with pytest.raises(ValueError, match="dequantize"):
        flow().log_prob(images().to(torch.uint8))


def test_impossible_shapes_and_levels_are_named() -> None:
    for shape in ((8, 8), (1, 8, 8, 1), 8, (1, 8.0, 8)):
        with pytest.raises(ValueError, match=r"\(channels, height, width\), got"):
            ImageResidualFlow(shape, 8, 1)  # type: ignore[arg-type]
    for levels in (17.0, 1, -3):
        with pytest.raises(ValueError, match="levels must be"):
            ImageResidualFlow((1, 4, 4), 8, 1, levels=levels, alpha=None)  # type: ignore[arg-type]


def test_what_follows_four_arguments_has_a_name() -> None:
    """The fifth of nflows' flows is another one: it became the number of context values."""
    with pytest.raises(TypeError, match="positional"):
        ImageResidualFlow((1, 4, 4), 8, 1, 2, True)  # type: ignore[call-arg]


@pytest.mark.parametrize("alpha", [0.05, None], ids=["logit", "affine"])
def test_a_transform_from_the_meta_device_is_the_same(alpha: float | None) -> None:
    model = flow(alpha).eval()
    with torch.device("meta"):
        empty = ImageResidualFlow((1, 4, 4), 8, 1, levels=17, alpha=alpha).eval()
    empty = empty.to_empty(device=device.current())
    empty.load_state_dict(model.state_dict())
    with transforms.using(model, estimator=logdet.Exact()):
        expected, logabsdet = model._transform(images())
    with transforms.using(empty, estimator=logdet.Exact()):
        found, found_logabsdet = empty._transform(images())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_logabsdet, logabsdet)


def test_a_forgotten_context_is_an_error_unless_it_is_optional() -> None:
    model = ImageResidualFlow((1, 4, 4), 8, 1, context_features=2, levels=17).eval()
    for call in (lambda: model.log_prob(images()), lambda: model.sample_images(2)):
        with pytest.raises(ValueError, match="context"):
            call()
    model = ImageResidualFlow(
        (1, 4, 4), 8, 1, context_features=2, optional_context=True, levels=17
    ).eval()
    assert model.log_prob(images()).shape == (6,)
    assert model.sample_images(2).shape == (2, 1, 4, 4)


def test_training_goes_on_after_an_evaluation_in_inference_mode() -> None:
    """What is kept from one call to the next must be usable in a graph."""
    torch.manual_seed(0)
    flow, images = ImageResidualFlow((1, 6, 14), 8, 2, num_scales=1), torch.rand(3, 1, 6, 14)
    flow.train()
    with torch.inference_mode():
        flow.log_prob(images)
    (-flow.log_prob(images).mean()).backward()


# --- half precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"alpha": None}, {"marginal_bins": 4, "linear": True}])
def test_pixels_of_half_precision_have_the_density_of_their_values(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """It was off by ten nats: thousands were added up in half precision."""
    torch.manual_seed(0)
    series = logdet.PowerSeries(num_terms=2)
    model = ImageResidualFlow((3, 16, 16), 4, 1, num_scales=1, estimator=series, **options).eval()
    pixels = transforms.dequantize(torch.randint(0, 255, (2, 3, 16, 16))).to(dtype)
    for call in (model.log_prob, model.transform_to_noise):
        torch.manual_seed(1)
        found = call(pixels)
        torch.manual_seed(1)
        assert torch.equal(found, call(pixels.float()))
        assert found.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [2, 200, 256, 260, 1000])
def test_samples_of_half_precision_end_at_the_last_level_that_there_is(
    levels: int, dtype: torch.dtype
) -> None:
    """The last of 256 was never sampled in bfloat16; 999 is no number there, and 996 is."""
    torch.manual_seed(0)
    model = spread(ImageResidualFlow((1, 4, 4), 8, 1, levels=levels, alpha=None).to(dtype))
    with torch.no_grad():
        samples = model.sample(64)
        last = torch.arange(levels).to(dtype)
    assert samples.dtype == dtype
    assert float(samples.floor().max()) == float(last[last < levels].max())
    assert float(samples.floor().min()) == 0


def test_a_model_of_half_precision_says_its_density_in_float32() -> None:
    """Of 256 pixels it was a multiple of eight."""
    torch.manual_seed(0)
    series = logdet.PowerSeries(num_terms=2)
    model = ImageResidualFlow((1, 16, 16), 4, 1, num_scales=1, estimator=series).bfloat16().eval()
    pixels = (255 * torch.rand(8, 1, 16, 16)).bfloat16()
    found = model.log_prob(pixels)
    assert found.dtype == torch.float32
    assert len(set(found.tolist())) == 8
    torch.testing.assert_close(found, model.float().log_prob(pixels), rtol=1e-2, atol=0)


# --- samples are no data --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "frozen"])
@pytest.mark.parametrize("context_features", [None, 2])
def test_a_flow_that_samples_does_not_start_from_its_samples(
    way: str, context_features: int | None
) -> None:
    """Without a graph nothing told them from data."""
    options: dict[str, Any] = {"marginal_bins": 4, "linear": True}
    model = ImageResidualFlow(
        (1, 8, 8), 4, 1, alpha=1e-6, context_features=context_features, **options
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.requires_grad_(way != "frozen")
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    context = None if context_features is None else torch.randn(3, 2)
    with modes.get(way, nullcontext)():
        samples, log_prob = model.sample_and_log_prob(8, context)
    assert log_prob.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(each.training for each in model.modules())
    with torch.no_grad():
        model.log_prob(samples.reshape(-1, 1, 8, 8), None if context is None else context[[0] * 24])
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
