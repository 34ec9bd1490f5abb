"""Transforms for images (B, C, H, W) that nflows lacks or breaks."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import torch
from nflows.transforms import MultiscaleCompositeTransform, Transform
from nflows.transforms.reshape import SqueezeTransform as _NflowsSqueezeTransform
from torch import Generator, Tensor

from nflows_iresnet.transforms.composite import CompositeTransform

Shape = tuple[int, int, int]

_NOISE_STEPS = 2**16
"""The noise is a multiple of 2^-16, so that 255 + noise is a float32 below 256, never 256."""


def dequantise(
    images: Tensor, *, generator: Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Turn integers k into k + u, u uniform on [0, 1): a level becomes an interval of width 1.

    By Jensen's inequality E_u[log p(k + u)] <= log \int p(k + u) du, so the log-density of the
    result bounds the log-probability of the integers from below, with no correction for scale.

    References:
        Theis, van den Oord, Bethge. A note on the evaluation of generative models, 2016.

    Args:
        images: integers from 0 to 255, any shape.
        generator: draws the noise; torch's default generator by default. One on the CPU gives the
            same noise whatever the device of the images.
        dtype: float32 or float64.

    Returns:
        Same shape, values in [0, 256).

    Example:
        >>> images = torch.tensor([0, 255], dtype=torch.uint8)
        >>> dequantise(images).floor()
        tensor([  0., 255.])
    """
    device = images.device if generator is None else generator.device
    noise = torch.rand(images.shape, generator=generator, device=device).to(images.device)
    return images.to(dtype) + (noise * _NOISE_STEPS).floor().to(dtype) / _NOISE_STEPS


class UniformDequantisation(Transform):
    """`dequantise` as the first transform of a flow, so that `log_prob` takes whole numbers.

    Draws fresh noise at each call, in training and in evaluation: seed torch's generator for equal
    noise. The inverse rounds down; it undoes forward exactly. In a `CompositeTransform`, which adds
    log-determinants in the type of the inputs, give the whole numbers as floats: `images.float()`.

    Example:
        >>> outputs, logabsdet = UniformDequantisation()(torch.tensor([[3, 7]]))
        >>> UniformDequantisation().inverse(outputs)[0]
        tensor([[3., 7.]])
    """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (inputs + noise, 0), shapes (B, *) and (B,)."""
        dtype = inputs.dtype if inputs.is_floating_point() else torch.get_default_dtype()
        outputs = dequantise(inputs, dtype=dtype)
        return outputs, outputs.new_zeros(len(outputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (the integers below, 0), shapes (B, *) and (B,)."""
        return inputs.floor(), inputs.new_zeros(len(inputs))


class LogitTransform(Transform):
    r"""y = logit(alpha + (1 - 2 alpha) x / levels): from [0, levels] to the real line.

    log\|det\| = sum_i log((1 - 2 alpha) / levels) - log p_i - log(1 - p_i), p_i the number inside
    the logit. nflows' `Logit` clamps its inputs, where it has no inverse, and keeps its temperature
    outside its buffers, on the CPU.

    Args:
        levels: how many values a pixel took before its noise.
        alpha: distance that keeps the logit finite, in (0, 0.5).

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP, 2017.

    Example:
        >>> logit = LogitTransform(levels=256)
        >>> logit(torch.full((1, 1, 2, 2), 128.0))[0].abs().max().item()
        0.0
    """

    def __init__(self, levels: int = 256, alpha: float = 0.05) -> None:
        super().__init__()
        if levels < 2 or not 0 < alpha < 0.5:
            raise ValueError(
                f"levels must be at least 2 and alpha in (0, 0.5), got {levels} and {alpha}"
            )
        self.levels, self.alpha = levels, alpha
        self._slope = (1 - 2 * alpha) / levels

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, log|det|), shapes (B, *) and (B,); NaN where x is far outside [0, levels]."""
        inside = self.alpha + self._slope * inputs
        log_inside, log_outside = inside.log(), torch.log1p(-inside)
        logabsdet = math.log(self._slope) - log_inside - log_outside
        return log_inside - log_outside, logabsdet.flatten(start_dim=1).sum(1)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, log|det|), shapes (B, *) and (B,); x may leave [0, levels] by its alpha."""
        positive = torch.nn.functional.softplus(inputs)
        log_slopes = inputs - 2 * positive - math.log(self._slope)
        outputs = (torch.sigmoid(inputs) - self.alpha) / self._slope
        return outputs, log_slopes.flatten(start_dim=1).sum(1)

    def extra_repr(self) -> str:
        """Show the constants."""
        return f"levels={self.levels}, alpha={self.alpha}"


class SqueezeTransform(_NflowsSqueezeTransform):
    """Squares of factor x factor pixels become channels; nflows' with an inverse for any factor.

    The inverse of nflows 0.14 refuses channel numbers that are no multiple of 4, whatever the
    factor, so that with factor 3 it refuses what its own forward returns.

    Args:
        factor: side of the squares.

    Example:
        >>> squeeze = SqueezeTransform(3)
        >>> outputs, _ = squeeze(torch.arange(9.0).reshape(1, 1, 3, 3))
        >>> outputs.shape, squeeze.inverse(outputs)[0].shape
        (torch.Size([1, 9, 1, 1]), torch.Size([1, 1, 3, 3]))
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__(operator.index(factor))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (the image with fewer channels, 0), shapes (B, *) and (B,)."""
        if inputs.dim() != 4 or inputs.shape[1] % self.factor**2:
            raise ValueError(
                f"expected inputs (batch, channels, height, width) with a multiple of "
                f"{self.factor**2} channels, got {tuple(inputs.shape)}"
            )
        outputs = torch.nn.functional.pixel_shuffle(inputs, self.factor)
        return outputs, inputs.new_zeros(len(inputs))


class OutsideRangeError(ValueError):
    """The values to be inverted are not in the range of an injective map."""


class InjectivePadding(Transform):
    r"""x -> (x, 0): zeros in additional channels, so that later blocks are wider.

    Injective, not bijective: an isometry onto its range, with log-determinant 0. A model with this
    transform classifies and inverts, but has no density on all of the padded space.

    Args:
        channels: how many channels of zeros are appended.
        tolerance: the largest value in those channels that `inverse` takes for zero.

    References:
        Jacobsen, Smeulders, Oyallon. i-RevNet: Deep invertible networks, 2018.

    Example:
        >>> padding = InjectivePadding(2)
        >>> outputs, _ = padding(torch.ones(5, 1, 4, 4))
        >>> outputs.shape, padding.inverse(outputs)[0].shape
        (torch.Size([5, 3, 4, 4]), torch.Size([5, 1, 4, 4]))
    """

    def __init__(self, channels: int, *, tolerance: float = 1e-3) -> None:
        super().__init__()
        if channels < 0 or tolerance < 0:
            raise ValueError(
                f"channels and tolerance must not be negative, got {channels} and {tolerance}"
            )
        self.channels, self.tolerance = operator.index(channels), tolerance

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ((x, 0), 0), shapes (B, C + channels, *) and (B,)."""
        zeros = inputs.new_zeros(len(inputs), self.channels, *inputs.shape[2:])
        return torch.cat([inputs, zeros], dim=1), inputs.new_zeros(len(inputs))

    def distance(self, inputs: Tensor) -> Tensor:
        """Return how far values (B, C + channels, *) are from the range: the largest |.|, (B,)."""
        dropped = inputs[:, inputs.shape[1] - self.channels :]
        return torch.cat([dropped.abs().flatten(1), inputs.new_zeros(len(inputs), 1)], 1).amax(1)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, 0), shapes (B, C, *) and (B,).

        Raises:
            OutsideRangeError: if a dropped channel holds more than the tolerance.
        """
        distance = self.distance(inputs)
        if not bool((distance <= self.tolerance).all()):
            raise OutsideRangeError(
                f"{int((distance > self.tolerance).sum())} of {len(inputs)} rows are not images of "
                f"an input: the padded channels hold up to {float(distance.max()):.3g}, allowed is "
                f"{self.tolerance:g}; raise tolerance to project them"
            )
        return inputs[:, : inputs.shape[1] - self.channels], inputs.new_zeros(len(inputs))

    def extra_repr(self) -> str:
        """Show the constants."""
        return f"channels={self.channels}, tolerance={self.tolerance}"


def multiscale(
    shape: Sequence[int], num_scales: int, steps: Callable[[Shape], Sequence[Transform]]
) -> MultiscaleCompositeTransform:
    """Build scales of squeeze and steps, with half of the channels factored out between them.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP, 2017.

    Args:
        shape: (C, H, W) of the images.
        num_scales: how many scales; H and W must be multiples of 2^num_scales.
        steps: makes the transforms of one scale from the shape that they work on.

    Returns:
        A transform from (B, C, H, W) to (B, C H W).

    Raises:
        ValueError: if the images cannot be squeezed so often.

    Example:
        >>> from nflows_iresnet.transforms import ActNorm
        >>> transform = multiscale((1, 8, 8), 2, lambda shape: [ActNorm(shape[0])])
        >>> transform(torch.randn(5, 1, 8, 8))[0].shape
        torch.Size([5, 64])
    """
    if len(shape) != 3 or num_scales < 1 or any(side % 2**num_scales for side in shape[1:]):
        raise ValueError(
            f"images of shape {tuple(shape)} cannot have {num_scales} scales: each halves height "
            "and width of (C, H, W); choose another num_scales, or pad the images"
        )
    transform = MultiscaleCompositeTransform(operator.index(num_scales))
    channels, height, width = shape
    for _ in range(num_scales):
        squeezed = (4 * channels, height // 2, width // 2)
        scale = CompositeTransform([SqueezeTransform(), *steps(squeezed)])
        transform.add_transform(scale, squeezed)
        channels, height, width = 2 * channels, height // 2, width // 2
    return transform
