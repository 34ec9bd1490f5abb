"""The residual flow for images."""

from __future__ import annotations

from nflows.transforms import PointwiseAffineTransform, Transform
from torch import nn

from nflows_iresnet.flows.base import Flow, StandardNormal
from nflows_iresnet.logdet import LogDetEstimator
from nflows_iresnet.nn import LipschitzCNN
from nflows_iresnet.solvers import Solver
from nflows_iresnet.transforms import (
    ActNorm,
    CompositeTransform,
    LogitTransform,
    ResidualTransform,
    multiscale,
)
from nflows_iresnet.validation import validated_size

Shape = tuple[int, int, int]


class ImageResidualFlow(Flow):
    r"""A multi-scale residual flow for images in whole numbers 0, ..., levels - 1, dequantised.

    A logit (or an affine map to [-1/2, 1/2]), then scales of: squeeze, `num_layers` times ActNorm
    and y = x + g(x) with a certified convolutional g, ActNorm, and half of the channels goes to the
    noise; the last scale keeps its channels. Context, if any, enters every g.

    Inputs are x = k + u, k the pixel in 0, ..., levels - 1 and u uniform on [0, 1), as
    `transforms.dequantise` makes them: floats in [0, levels). Samples are in these units too; their
    `floor()` is an image. The density is that of x, so that bits/dim are -log p(x) / (D log 2).

    Args:
        shape: (C, H, W), H and W multiples of 2^num_scales.
        hidden_channels: channels of the hidden layers of each g.
        num_layers: residual blocks per scale.
        num_blocks_per_layer: hidden layers of each g: kernels 3, then 1, and 3 at the end.
        context_features: number of context values, or None.
        num_scales: how often the image is squeezed.
        levels: how many values a pixel can take.
        alpha: of `LogitTransform`, or None for the affine map.
        estimator: strategy for the log-determinant; `logdet.Adaptive()` by default.
        solver: strategy for the inverse; `solvers.Anderson()` by default.
        activation: a unit-wise activation of `nflows_iresnet.nn`.
        coeff: bound of the Lipschitz constant of each g, in (0, 1).
        recompute: trade time for memory, see `transforms.CompositeTransform`.

    Raises:
        ValueError: if a size is not positive, or the images cannot be squeezed so often.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen. Invertible residual networks, 2019.
        Chen, Behrmann, Duvenaud, Jacobsen. Residual flows for invertible generative modeling, 2019.

    Example:
        >>> import torch
        >>> from nflows_iresnet.transforms import dequantise
        >>> flow = ImageResidualFlow((1, 8, 8), hidden_channels=16, num_layers=1, levels=17)
        >>> images = torch.randint(0, 17, (5, 1, 8, 8))
        >>> flow.log_prob(dequantise(images)).shape, flow.sample(3).shape
        (torch.Size([5]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        shape: Shape,
        hidden_channels: int,
        num_layers: int,
        num_blocks_per_layer: int = 2,
        context_features: int | None = None,
        *,
        num_scales: int = 2,
        levels: int = 256,
        alpha: float | None = 0.05,
        estimator: LogDetEstimator | None = None,
        solver: Solver | None = None,
        activation: nn.Module | None = None,
        coeff: float = 0.97,
        recompute: bool = False,
    ) -> None:
        depth = validated_size("num_blocks_per_layer", num_blocks_per_layer)
        layers = validated_size("num_layers", num_layers)

        def steps(scale: Shape) -> list[Transform]:
            transforms: list[Transform] = []
            for _ in range(layers):
                net = LipschitzCNN(
                    scale[0],
                    [hidden_channels] * depth,
                    context_features,
                    kernel_sizes=(3, *[1] * (depth - 1), 3),
                    activation=activation,
                    coeff=coeff,
                )
                block = ResidualTransform(net, estimator=estimator, solver=solver)
                transforms += [ActNorm(scale[0]), block]
            return [CompositeTransform([*transforms, ActNorm(scale[0])], recompute=recompute)]

        channels, height, width = shape
        scales = multiscale(shape, num_scales, steps)
        super().__init__(
            CompositeTransform([_preprocessing(levels, alpha), scales]),
            StandardNormal([channels * height * width]),
        )


def _preprocessing(levels: int, alpha: float | None) -> Transform:
    if alpha is None:
        return PointwiseAffineTransform(shift=-0.5, scale=1 / levels)
    return LogitTransform(levels, alpha)
