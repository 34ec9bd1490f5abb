"""Residual networks that classify images and can turn their features back into them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from nflows.transforms import PointwiseAffineTransform, Transform
from torch import Tensor
from torch import nn as torch_nn

from nflows_iresnet import nn
from nflows_iresnet.linearization import Linearization
from nflows_iresnet.logdet import LogDetEstimator
from nflows_iresnet.precision import is_foreign, training_products
from nflows_iresnet.solvers import Solver
from nflows_iresnet.transforms import (
    ActNorm,
    CompositeTransform,
    InjectivePadding,
    ResidualTransform,
    SqueezeTransform,
)
from nflows_iresnet.validation import validated_size, validated_strategy

Shape = tuple[int, int, int]
_POOLED = 2
"""Side of the pooled features. A block with a small Lipschitz constant hardly moves a mean over all
pixels, so that with 1 the training starts slowly (digits, c = 0.5, 200 steps: 9.5 % errors, with 2
3.4 %)."""


@dataclass(frozen=True)
class _NoLogDet(LogDetEstimator):
    """g(x) alone: classification needs no log-determinant, so it is NaN rather than wrong."""

    def logabsdet(
        self,
        at_inputs: Linearization,
        lipschitz: float | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, None]:
        """Return NaN."""
        like = at_inputs.like
        return like.new_full((like.shape[0],), math.nan), None


class ResidualClassifier(torch_nn.Module):
    r"""Images -> features by y = x + g(x) blocks -> logits, for any residual branches g.

    x / (levels - 1) - 1/2, zeros in more channels, then `num_scales` times a squeeze and
    `num_blocks` times ActNorm and y = x + g(x); an ActNorm makes the features. The head is ELU, the
    means over the four quarters of the image, and a linear map. All but the head is one transform
    of nflows, whose log-determinant is not computed: it is NaN.

    The inverse is guaranteed if and only if Lip(g) < 1 is certified for every block: see
    `lipschitz_bound`. Without that `decode` may still succeed, or raise.

    Args:
        shape: (C, H, W), H and W multiples of 2^num_scales.
        num_classes: number of logits.
        branch: makes g for a number of channels.
        num_blocks: residual blocks per scale.
        num_scales: how often the images are squeezed.
        padding: channels of zeros that are appended to the images, for wider blocks.
        levels: how many values a pixel can take.
        solver: strategy for the inverse; `solvers.Anderson()` by default.

    Raises:
        ValueError: if a size is not positive, the images cannot be squeezed so often, or `branch`
            or `solver` is none.
    """

    def __init__(
        self,
        shape: Shape,
        num_classes: int,
        branch: Callable[[int], torch_nn.Module],
        *,
        num_blocks: int = 4,
        num_scales: int = 1,
        padding: int = 0,
        levels: int = 256,
        solver: Solver | None = None,
    ) -> None:
        super().__init__()
        num_scales = validated_size("num_scales", num_scales)
        if len(shape) != 3 or any(side % 2**num_scales for side in shape[1:]):
            raise ValueError(
                f"images of shape {tuple(shape)} cannot be squeezed {num_scales} times: choose "
                "another num_scales, or pad the images"
            )
        if not callable(branch) or isinstance(branch, torch_nn.Module):
            raise ValueError(
                f"branch must make a network for a number of channels, such as "
                f"lambda channels: nn.LipschitzCNN(channels, [16, 16]), got {branch!r}"
            )
        if solver is not None:
            example = "solvers.Anderson()"
            validated_strategy("solver", solver, Solver, example)  # type: ignore[type-abstract]
        blocks = validated_size("num_blocks", num_blocks)
        channels = validated_size("channels of the images", shape[0]) + padding
        layers: list[Transform] = [_centred(levels), InjectivePadding(padding)]
        for _ in range(num_scales):
            channels *= 4
            layers.append(SqueezeTransform())
            for _ in range(blocks):
                block = ResidualTransform(branch(channels), estimator=_NoLogDet(), solver=solver)
                layers += [ActNorm(channels), block]
        self.transform = CompositeTransform([*layers, ActNorm(channels)])
        self.head = torch_nn.Sequential(
            torch_nn.ELU(),
            torch_nn.AdaptiveAvgPool2d(_POOLED),
            torch_nn.Flatten(),
            torch_nn.Linear(_POOLED**2 * channels, validated_size("num_classes", num_classes)),
        )

    @property
    def blocks(self) -> list[ResidualTransform]:
        """The residual blocks, from the image to the features."""
        return [each for each in self.modules() if isinstance(each, ResidualTransform)]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, C, H, W) with values 0, ..., levels - 1."""
        with training_products(self, "anything" if is_foreign(self) else "matrices"):
            logits: Tensor = self.head(self.encode(images))
        return logits

    def encode(self, images: Tensor) -> Tensor:
        """Return the features (B, 4^s (C + padding), H / 2^s, W / 2^s), s = num_scales."""
        weight = next(self.head.parameters())
        features: Tensor = self.transform(images.to(weight.dtype))[0]
        return features

    def decode(self, features: Tensor) -> Tensor:
        """Return the images (B, C, H, W) of features, up to the solver's tolerance.

        Raises:
            FixedPointNotConverged: if no preimage is found, which a certificate excludes.
            OutsideRangeError: if the features are those of no image: the padding is not zero.
        """
        images: Tensor = self.transform.inverse(features)[0]
        return images

    def lipschitz_bound(self) -> float | None:
        """Return the largest certified bound of Lip(g) over the blocks, for the present weights.

        Returns:
            The bound, or None if none is known for some branch. Below 1 `decode` inverts `encode`.
        """
        try:
            return max(nn.lipschitz_bound(block.net) for block in self.blocks)
        except ValueError:
            return None

    def has_guaranteed_inverse(self) -> bool:
        """Return whether the certified bound is below 1."""
        bound = self.lipschitz_bound()
        return bound is not None and bound < 1


def _centred(levels: int) -> Transform:
    """Return x / (levels - 1) - 1/2; nflows looks at the scale, which no meta device can show."""
    if validated_size("levels", levels) < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    with torch.device("cpu"):
        transform = PointwiseAffineTransform(shift=-0.5, scale=1 / (levels - 1))
    return transform.to(torch.get_default_device())


class InvertibleClassifier(ResidualClassifier):
    r"""A classifier whose features are invertible by certificate: Lip(g) <= coeff in every block.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen. Invertible residual networks, 2019.

    Args:
        shape: (C, H, W), H and W multiples of 2^num_scales.
        num_classes: number of logits.
        hidden_channels: channels of the two hidden layers of each g, with kernels 3, 1 and 3.
        num_blocks: residual blocks per scale.
        num_scales: how often the images are squeezed.
        padding: channels of zeros that are appended to the images, for wider blocks.
        levels: how many values a pixel can take.
        coeff: c, the bound of the Lipschitz constant of each WHOLE g, in (0, 1).
        activation: of the branches; `nn.ELU()` by default.
        norm: the norm that kernels are divided by; `nn.FourierNorm()` by default, which certifies.
        solver: strategy for the inverse; `solvers.Anderson()` by default.

    Example:
        >>> import torch
        >>> classifier = InvertibleClassifier((1, 8, 8), 10, 16, num_blocks=2, padding=1, levels=17)
        >>> images = torch.randint(0, 17, (5, 1, 8, 8))
        >>> classifier(images).shape, classifier.has_guaranteed_inverse()
        (torch.Size([5, 10]), True)
        >>> decoded = classifier.decode(classifier.encode(images))
        >>> bool((decoded - images).abs().max() < 1e-3)
        True
    """

    def __init__(
        self,
        shape: Shape,
        num_classes: int,
        hidden_channels: int,
        *,
        num_blocks: int = 4,
        num_scales: int = 1,
        padding: int = 0,
        levels: int = 256,
        coeff: float = 0.9,
        activation: torch_nn.Module | None = None,
        norm: nn.ConvNorm | None = None,
        solver: Solver | None = None,
    ) -> None:
        hidden: Sequence[int] = [validated_size("hidden_channels", hidden_channels)] * 2
        chosen = nn.ELU() if activation is None else activation

        def branch(channels: int) -> torch_nn.Module:
            return nn.LipschitzCNN(channels, hidden, activation=chosen, coeff=coeff, norm=norm)

        super().__init__(
            shape,
            num_classes,
            branch,
            num_blocks=num_blocks,
            num_scales=num_scales,
            padding=padding,
            levels=levels,
            solver=solver,
        )
