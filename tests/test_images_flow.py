"""The residual flow for images: units, scales, and what it certifies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nflows_iresnet import logdet, transforms
from nflows_iresnet.flows.image import ImageResidualFlow


def flow(alpha: float | None = 0.05, num_scales: int = 2) -> ImageResidualFlow:
    torch.manual_seed(0)
    return ImageResidualFlow((1, 4, 4), 8, 1, num_scales=num_scales, levels=17, alpha=alpha)


def images(rows: int = 6) -> Tensor:
    integers = torch.randint(0, 17, (rows, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    return transforms.dequantise(integers, generator=torch.Generator().manual_seed(2))


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
