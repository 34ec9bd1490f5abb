"""Transforms for images (B, C, H, W) that nflows lacks or breaks."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from nflows.transforms import MultiscaleCompositeTransform, Transform
from nflows.transforms.reshape import SqueezeTransform as _NflowsSqueezeTransform
from torch import Generator, Tensor
from torch.nn import functional as F

from nflows_iresnet.linearization import is_traced
from nflows_iresnet.precision import at_least_single
from nflows_iresnet.settings import SettingsInState
from nflows_iresnet.solvers.base import read
from nflows_iresnet.transforms.composite import CompositeTransform
from nflows_iresnet.transforms.splines import (
    ElementwiseRationalQuadraticSpline,
)

Shape = tuple[int, int, int]

_NOISE_STEPS = 2**16
"""The noise is a multiple of 2^-16, so that 255 + noise is a float32 below 256, never 256."""


class OutsideRangeError(ValueError):
    """Values are outside of the range on which a map is defined, or can be inverted."""


_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""What torch can store, and not compare."""


def extremes(values: Tensor) -> tuple[float, float] | None:
    """Return the smallest and the largest value, NaN if one is NaN, where looking costs nothing.

    None on a GPU, for which the host would have to wait, where a compiler or a transform of
    `torch.func` watches, and of an empty batch.
    """
    if values.device.type != "cpu" or values.numel() == 0 or is_traced():
        return None
    known = values.double() if values.dtype in _UNSIGNED else values
    lowest, highest = read(torch.stack(known.detach().aminmax()).double())
    return float(lowest), float(highest)


def validated_levels(levels: int) -> int:
    """Return the number of values that a pixel can take as an int, if it is at least 2."""
    try:
        count = operator.index(levels)
    except TypeError:
        count = 0
    if count < 2:
        raise ValueError(f"levels must be a whole number of at least 2, got {levels}")
    return count


def validated_shape(shape: Sequence[int]) -> Shape:
    """Return the shape of images as three ints, if all are at least 1."""
    try:
        channels, height, width = map(operator.index, shape)
    except (TypeError, ValueError):
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise ValueError(
            f"shape must be three whole numbers (channels, height, width), got {shape}"
        )
    return channels, height, width


def dequantize(
    images: Tensor, *, generator: Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Turn integers k into k + u, u uniform on [0, 1): a level becomes an interval of width 1.

    By Jensen's inequality E_u[log p(k + u)] <= log \int p(k + u) du, so the log-density of the
    result bounds the log-probability of the integers from below, with no correction for scale.

    References:
        Theis, van den Oord, Bethge. A note on the evaluation of generative models, 2016.

    Args:
        images: whole numbers from 0 to 255, any shape and type. Larger ones need float64.
        generator: draws the noise; torch's default generator by default. One on the CPU gives the
            same noise whatever the device of the images.
        dtype: float32 or float64.

    Returns:
        Same shape, values in [0, 256).

    Raises:
        OutsideRangeError: if numbers are negative, or too large for their noise.
        ValueError: if numbers are not whole, or `dtype` is another one. Values are checked on a CPU
            only: a GPU is not waited for.

    Example:
        >>> images = torch.tensor([0, 255], dtype=torch.uint8)
        >>> dequantize(images).floor()
        tensor([  0., 255.])
    """
    if dtype not in _LARGEST:
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    _check_whole(images, _LARGEST[dtype])
    device = images.device if generator is None else generator.device
    noise = torch.rand(images.shape, generator=generator, device=device).to(images.device)
    return images.to(dtype) + (noise * _NOISE_STEPS).floor().to(dtype) / _NOISE_STEPS


_LARGEST = {torch.float32: 2**8 - 1, torch.float64: 2**37 - 1}
"""The whole numbers up to which number + noise is exact."""


def _check_whole(images: Tensor, largest: int) -> None:
    if images.dtype in (torch.bool, torch.uint8) or (found := extremes(images)) is None:
        return
    lowest, highest = found
    if images.is_floating_point() and not bool(
        read(images.detach() == images.detach().round()).all()
    ):
        raise ValueError(
            f"dequantize takes whole numbers, got others in [{lowest:g}, {highest:g}]: were they "
            "dequantised, or scaled to [0, 1], before? NaN is no number either"
        )
    if lowest < 0 or highest > largest:
        raise OutsideRangeError(
            f"dequantize takes whole numbers from 0 to {largest}, got {lowest:g} to {highest:g}; "
            "dtype=torch.float64 has room for noise on larger ones"
        )


class UniformDequantization(Transform):
    """`dequantize` as the first transform of a flow, so that `log_prob` takes whole numbers.

    Draws fresh noise at each call, in training and in evaluation: seed torch's generator for equal
    noise. The inverse rounds down; it undoes forward exactly. In a `CompositeTransform`, which adds
    log-determinants in the type of the inputs, give the whole numbers as floats: `images.float()`.

    Example:
        >>> outputs, logabsdet = UniformDequantization()(torch.tensor([[3, 7]]))
        >>> UniformDequantization().inverse(outputs)[0]
        tensor([[3., 7.]])
    """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (inputs + noise, 0), shapes (B, *) and (B,)."""
        dtype = inputs.dtype if inputs.is_floating_point() else torch.get_default_dtype()
        outputs = dequantize(inputs, dtype=dtype)
        return outputs, outputs.new_zeros(outputs.shape[0])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (the integers below, 0), shapes (B, *) and (B,)."""
        return inputs.floor(), inputs.new_zeros(inputs.shape[0])


class LogitTransform(SettingsInState, Transform):
    r"""y = logit(alpha + (1 - 2 alpha) x / levels): from [0, levels] to the real line.

    log\|det\| = sum_i log((1 - 2 alpha) / levels) - log p_i - log(1 - p_i), p_i the number inside
    the logit. Both p_i and 1 - p_i are computed from the nearer end, so that a small alpha loses no
    digits. Half precision is computed in float32, and y rounded to it; the log-determinant, of
    thousands of nats, stays in float32. nflows' `Logit` clamps its inputs, where it has no inverse,
    and keeps its temperature outside its buffers, on the CPU.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP, 2017.

    Args:
        levels: how many values a pixel took before its noise.
        alpha: distance that keeps the logit finite, in (0, 0.5). A small one, such as 1e-6, spreads
            the noise of a pixel at either end over the width that a normal density has; with 0.05
            it stays within 0.07, and the flow has to stretch it fiftyfold.

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
        self.levels, self.alpha = validated_levels(levels), float(alpha)
        self._slope = (1 - 2 * self.alpha) / self.levels

    def settings(self) -> dict[str, object]:
        """Return the levels and alpha."""
        return {"levels": self.levels, "alpha": self.alpha}

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, log|det|), shapes (B, *) and (B,).

        Raises:
            OutsideRangeError: if x is NaN, or outside [0, levels] by more than alpha. On a GPU,
                which is not waited for, the log-determinant is NaN then.
        """
        margin = self.alpha / self._slope
        check_pixels(inputs, -margin, self.levels + margin, self.levels)
        given, inputs = inputs, at_least_single(inputs)
        log_inside = (self.alpha + self._slope * inputs).log()
        log_outside = (self.alpha + self._slope * (self.levels - inputs)).log()
        logabsdet = math.log(self._slope) - log_inside - log_outside
        outputs = _rounded_like(given, log_inside - log_outside)
        return outputs, logabsdet.flatten(start_dim=1).sum(1)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, log|det|), shapes (B, *) and (B,); x may leave [0, levels] by its alpha."""
        given, inputs = inputs, at_least_single(inputs)
        positive = F.softplus(inputs)
        log_slopes = inputs - 2 * positive - math.log(self._slope)
        outputs = (torch.sigmoid(inputs) - self.alpha) / self._slope
        return _rounded_like(given, outputs), log_slopes.flatten(start_dim=1).sum(1)

    @property
    def bound(self) -> float:
        """The largest |y| of x in [0, levels]."""
        return math.log1p(-self.alpha) - math.log(self.alpha)

    def extra_repr(self) -> str:
        """Show the constants."""
        return f"levels={self.levels}, alpha={self.alpha}"


class PixelwiseSpline(ElementwiseRationalQuadraticSpline):
    """One monotone spline per pixel and channel: the shape of the marginals of images.

    Args:
        shape: (C, H, W).
        num_bins: bins of each spline.
        bound: where the splines end.

    Example:
        >>> spline = PixelwiseSpline((1, 2, 2), bound=14.0)
        >>> images = torch.randn(1000, 1, 2, 2).exp()
        >>> spline.initialize(images)
        >>> bool(spline(images)[0].median(0).values.abs().max() < 0.01)
        True
    """

    def __init__(self, shape: Shape, num_bins: int = 16, bound: float = 4.0) -> None:
        shape = validated_shape(shape)
        super().__init__(math.prod(shape), num_bins, bound)
        self.shape, self.starts_from_rows = shape, True

    lipschitz_constants = ElementwiseRationalQuadraticSpline.lipschitz_constants

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, log|det|), shapes (B, C, H, W) and (B,)."""
        outputs, logabsdet = super().forward(self._rows(inputs))
        return outputs.reshape(inputs.shape), logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, log|det|), shapes (B, C, H, W) and (B,)."""
        outputs, logabsdet = super().inverse(self._rows(inputs))
        return outputs.reshape(inputs.shape), logabsdet

    def initialize(self, rows: Tensor) -> None:
        """Start from the quantiles of images that are given, see the spline of features.

        Args:
            rows: images of shape (N, C, H, W); a few thousand are plenty.

        Raises:
            ValueError: if the shape is another, there is no image, or a value is not finite.
        """
        super().initialize(self._rows(rows))

    def _rows(self, inputs: Tensor) -> Tensor:
        if inputs.dim() != 4 or tuple(inputs.shape[1:]) != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(
                f"expected inputs of shape (batch, {expected}), got {tuple(inputs.shape)}"
            )
        return inputs.flatten(start_dim=1)


class CenteringTransform(SettingsInState, Transform):
    """y = x / levels - 1/2: from [0, levels] to [-1/2, 1/2], for flows without a logit.

    Half precision is computed in float32, and y rounded to it; the log-determinant stays so. It has
    no parameters and no buffers. States of nflows' `PointwiseAffineTransform`, which was used
    before, are taken.

    Args:
        levels: how many values a pixel took before its noise.

    Example:
        >>> CenteringTransform(4)(torch.tensor([[0.0, 2.0, 4.0]]))[0]
        tensor([[-0.5000,  0.0000,  0.5000]])
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        self.levels = validated_levels(levels)

    def settings(self) -> dict[str, object]:
        """Return the levels, and that there is no alpha: the state is not that of a logit."""
        return {"levels": self.levels, "alpha": None}

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, log|det|), shapes (B, *) and (B,)."""
        outputs = at_least_single(inputs) / self.levels - 0.5
        return _rounded_like(inputs, outputs), -self._log_levels(outputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, log|det|), shapes (B, *) and (B,)."""
        outputs = (at_least_single(inputs) + 0.5) * self.levels
        return _rounded_like(inputs, outputs), self._log_levels(outputs)

    def _log_levels(self, inputs: Tensor) -> Tensor:
        total = inputs.shape[1:].numel() * math.log(self.levels)
        return inputs.new_full((inputs.shape[0],), total)

    def extra_repr(self) -> str:
        """Show the constant."""
        return f"levels={self.levels}"

    def _load_from_state_dict(  # type: ignore[override]
        self, state: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        for name in ("_shift", "_scale"):
            state.pop(prefix + name, None)
        super()._load_from_state_dict(state, prefix, *args)


def check_pixels(inputs: Tensor, lowest: float, highest: float, levels: int) -> None:
    """Refuse values outside of a range, on a CPU only.

    Raises:
        OutsideRangeError: naming the values and the range.
    """
    found = extremes(inputs)
    if found is None or (lowest <= found[0] and found[1] <= highest):
        return
    if math.isnan(found[0]):
        count = int(read(inputs.detach().isnan()).sum())
        raise OutsideRangeError(f"{count} of {inputs.numel()} pixels are NaN: check the data")
    raise OutsideRangeError(
        f"pixels must be in [{lowest:.4g}, {highest:.4g}] for levels={levels}, got values from "
        f"{found[0]:.6g} to {found[1]:.6g}: give whole numbers from 0 to {levels - 1} with their "
        "noise, transforms.dequantize(images), and as many levels as a pixel can take"
    )


def _rounded_like(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return outputs in half precision where the inputs are, else as they are."""
    return outputs.to(inputs.dtype) if inputs.is_floating_point() else outputs


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

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (the image with more channels, 0), shapes (B, *) and (B,)."""
        if inputs.dim() != 4 or any(side % self.factor for side in inputs.shape[2:]):
            raise ValueError(
                f"expected inputs (batch, channels, height, width), height and width multiples of "
                f"{self.factor}, got {tuple(inputs.shape)}"
            )
        return super().forward(inputs, context)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (the image with fewer channels, 0), shapes (B, *) and (B,)."""
        if inputs.dim() != 4 or inputs.shape[1] % self.factor**2:
            raise ValueError(
                f"expected inputs (batch, channels, height, width) with a multiple of "
                f"{self.factor**2} channels, got {tuple(inputs.shape)}"
            )
        outputs = F.pixel_shuffle(inputs, self.factor)
        return outputs, inputs.new_zeros(inputs.shape[0])


class InjectivePadding(Transform):
    r"""x -> (x, 0): zeros in additional channels, so that later blocks are wider.

    Injective, not bijective: an isometry onto its range, with log-determinant 0. A model with this
    transform classifies and inverts, but has no density on all of the padded space.

    References:
        Jacobsen, Smeulders, Oyallon. i-RevNet: Deep invertible networks, 2018.

    Args:
        channels: how many channels of zeros are appended.
        tolerance: the largest value in those channels that `inverse` takes for zero.

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
        zeros = inputs.new_zeros(inputs.shape[0], self.channels, *inputs.shape[2:])
        return torch.cat([inputs, zeros], dim=1), inputs.new_zeros(inputs.shape[0])

    def distance(self, inputs: Tensor) -> Tensor:
        """Return how far values (B, C + channels, *) are from the range: the largest |.|, (B,)."""
        dropped = inputs[:, inputs.shape[1] - self.channels :]
        return torch.cat([dropped.abs().flatten(1), inputs.new_zeros(inputs.shape[0], 1)], 1).amax(
            1
        )

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, 0), shapes (B, C, *) and (B,).

        Raises:
            OutsideRangeError: if a dropped channel holds more than the tolerance.
        """
        if inputs.dim() < 2 or inputs.shape[1] < self.channels:
            raise ValueError(
                f"expected inputs (batch, channels, *) with at least the {self.channels} channels "
                f"that were padded, got {tuple(inputs.shape)}"
            )
        distance = self.distance(inputs)
        if not bool((distance <= self.tolerance).all()):
            raise OutsideRangeError(
                f"{int((distance > self.tolerance).sum())} of {inputs.shape[0]} rows are not "
                f"images of an input: the padded channels hold up to {float(distance.max()):.3g}, "
                f"allowed is {self.tolerance:g}; raise tolerance to project them"
            )
        return inputs[:, : inputs.shape[1] - self.channels], inputs.new_zeros(inputs.shape[0])

    def extra_repr(self) -> str:
        """Show the constants."""
        return f"channels={self.channels}, tolerance={self.tolerance}"


class MultiscaleTransform(MultiscaleCompositeTransform):
    """nflows' `MultiscaleCompositeTransform` for batches of any size and precision.

    nflows adds up log-determinants in the precision of the inputs, in which thousands of nats of
    half precision lose several, and refuses an empty batch. Here the sum has the precision of its
    parts. The same map, the same state_dict.

    Args:
        num_transforms: how often `add_transform` will be called.
        split_dim: the dimension that is halved between transforms.

    Example:
        >>> from nflows_iresnet.transforms import ActNorm
        >>> scales = MultiscaleTransform(2)
        >>> rest = scales.add_transform(ActNorm(4), (4, 2, 2))
        >>> rest, scales.add_transform(ActNorm(2), rest)
        ((2, 2, 2), None)
        >>> scales(torch.randn(0, 4, 2, 2))[0].shape
        torch.Size([0, 16])
    """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (the halves that leave, one after the other, and log|det|), (B, D) and (B,)."""
        *first, last = self._all()
        outputs, logabsdets, rest = [], [], inputs
        for transform in first:
            found, logabsdet = transform(rest, context)
            done, rest = found.chunk(2, dim=self._split_dim)
            outputs.append(done)
            logabsdets.append(logabsdet)
        found, logabsdet = last(rest, context)
        flat = [each.flatten(start_dim=1) for each in (*outputs, found)]
        return torch.cat(flat, dim=1), reduce(operator.add, [*logabsdets, logabsdet])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, log|det|), shapes (B, *) and (B,)."""
        *first, last = self._all()
        *done, rest = self._parts(inputs)
        found, logabsdet = last.inverse(rest, context)
        logabsdets = [logabsdet]
        for transform, part in zip(reversed(first), reversed(done), strict=True):
            whole = torch.cat([part, found], dim=self._split_dim)
            found, logabsdet = transform.inverse(whole, context)
            logabsdets.append(logabsdet)
        return found, reduce(operator.add, logabsdets)

    def _all(self) -> list[Any]:
        if len(self._transforms) != self._num_transforms:
            raise RuntimeError(
                f"expected {self._num_transforms} transforms, got {len(self._transforms)}: add "
                "them by add_transform"
            )
        return list(self._transforms)

    def _parts(self, inputs: Tensor) -> list[Tensor]:
        """Return what left after each transform, in the shape that it had."""
        sizes = [math.prod(shape) for shape in self._output_shapes]
        if inputs.dim() != 2 or inputs.shape[1] != sum(sizes):
            raise ValueError(
                f"expected inputs of shape (batch, {sum(sizes)}), got {tuple(inputs.shape)}"
            )
        parts = zip(inputs.split(sizes, dim=1), self._output_shapes, strict=True)
        return [part.reshape(part.shape[0], *shape) for part, shape in parts]


def multiscale(
    shape: Sequence[int], num_scales: int, steps: Callable[[Shape], Sequence[Transform]]
) -> MultiscaleTransform:
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
    channels, height, width = validated_shape(shape)
    if num_scales < 1 or height % 2**num_scales or width % 2**num_scales:
        raise ValueError(
            f"images of shape {tuple(shape)} cannot have {num_scales} scales: each halves height "
            "and width of (C, H, W); choose another num_scales, or pad the images"
        )
    transform = MultiscaleTransform(operator.index(num_scales))
    for _ in range(num_scales):
        squeezed = (4 * channels, height // 2, width // 2)
        scale = CompositeTransform([SqueezeTransform(), *steps(squeezed)])
        transform.add_transform(scale, squeezed)
        channels, height, width = 2 * channels, height // 2, width // 2
    return transform
