"""The models for images: multi-scale flows that differ in the steps of a scale alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from nflows.transforms import Transform
from torch import Tensor, nn

from nflows_iresnet.experiments.adapters import DensityModel, NflowsModel, ResidualModel
from nflows_iresnet.experiments.models import MODELS, Architecture, ModelSpec

Shape = tuple[int, int, int]
Steps = Callable[[Shape], Sequence["Transform"]]


@dataclass(frozen=True)
class ImageArchitecture(Architecture):
    """The size of a model for images; `num_layers` counts the steps of one scale.

    Args:
        shape: channels, height and width of the images.
        levels: how many values a pixel can take.
        num_scales: how often the image is squeezed and half of it factored out.
        half_precision: whether networks compute in bfloat16 while training.
        alpha: of the logit in front of every model.
        marginal_bins: bins of the splines of residual-flow, which then has 1x1 convolutions; or 0.
        num_terms: of the power series that residual-flow is trained by, 0 for its default.
    """

    shape: Shape
    levels: int
    num_scales: int
    half_precision: bool = False
    alpha: float = 0.05
    marginal_bins: int = 0
    num_terms: int = 0

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        """The models that are built by such a size."""
        return IMAGE_MODELS


class CouplingNet(nn.Module):
    """A network that starts at zero and returns the precision of its inputs.

    Inside a training step it may compute in bfloat16: log-determinants, sums and the coupled values
    stay in full precision, and evaluation never uses bfloat16.

    Args:
        net: maps images to images.
        half_precision: whether to use bfloat16 while training.
    """

    def __init__(self, net: nn.Module, *, half_precision: bool) -> None:
        super().__init__()
        self.net, self.half_precision = net, half_precision

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the network's outputs in the precision of the inputs."""
        enabled = self.half_precision and self.training
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=enabled):
            outputs: Tensor = self.net(inputs)
        return outputs.to(inputs.dtype)


class FlattenTransform(Transform):
    """(B, C, H, W) -> (B, C H W).

    Args:
        shape: (C, H, W).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (the rows, 0), shapes (B, C H W) and (B,)."""
        return inputs.flatten(start_dim=1), inputs.new_zeros(inputs.shape[0])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (the images, 0), shapes (B, C, H, W) and (B,)."""
        return inputs.reshape(-1, *self.shape), inputs.new_zeros(inputs.shape[0])


class TruncatedModel(ResidualModel):
    """A residual flow that is trained by a truncated series, and evaluated without its bias."""

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the flow's own estimate in training, and an unbiased one in evaluation."""
        from nflows_iresnet import logdet, transforms

        if self.training:
            return super().log_prob(inputs)
        with transforms.using(self.flow, estimator=logdet.Auto()):
            return super().log_prob(inputs)


def _coupling(size: ImageArchitecture, mask: Tensor) -> Transform:
    """Build an affine coupling that changes the channels where the mask is one."""
    from nflows.nn.nets import ConvResidualNet
    from nflows.transforms import AffineCouplingTransform

    def build(in_channels: int, out_channels: int) -> nn.Module:
        net = ConvResidualNet(
            in_channels,
            out_channels,
            size.hidden_features,
            num_blocks=size.num_blocks_per_layer,
        )
        nn.init.zeros_(net.final_layer.weight)
        nn.init.zeros_(net.final_layer.bias)
        return CouplingNet(net, half_precision=size.half_precision)

    return AffineCouplingTransform(mask.long(), build)


def _flow(size: ImageArchitecture, steps: Steps) -> DensityModel:
    from nflows.transforms import CompositeTransform

    from nflows_iresnet.flows import Flow, StandardNormal
    from nflows_iresnet.transforms import LogitTransform, multiscale

    transform = CompositeTransform(
        [LogitTransform(size.levels, size.alpha), multiscale(size.shape, size.num_scales, steps)]
    )
    return NflowsModel(Flow(transform, StandardNormal([size.features])))


def glow_steps(size: ImageArchitecture) -> Steps:
    """Build the steps of Glow: ActNorm, invertible 1 x 1 convolution, affine coupling.

    The convolution starts as the identity, not as a random rotation: the halves that are coupled
    alternate instead.

    References:
        Kingma, Dhariwal. Glow: Generative flow with invertible 1x1 convolutions, 2018.
    """
    from nflows_iresnet.transforms import ActNorm, LinearTransform

    def steps(shape: Shape) -> list[Transform]:
        channels = shape[0]
        mask = torch.arange(channels) >= channels // 2
        layers: list[Transform] = []
        for layer in range(size.num_layers):
            coupling = _coupling(size, mask if layer % 2 else ~mask)
            layers += [ActNorm(channels), LinearTransform(channels), coupling]
        return layers

    return steps


def realnvp_steps(size: ImageArchitecture) -> Steps:
    """Build the steps of Real NVP: couplings with checkerboard masks, then with channel masks.

    A checkerboard of pixels is, after the squeeze, the channels {0, 3} against {1, 2} of each
    square of four; both kinds of masks are masks of channels here. ActNorm takes the place of the
    paper's batch normalisation, whose inverse depends on the batch.

    References:
        Dinh, Sohl-Dickstein, Bengio. Density estimation using Real NVP, 2017.
    """
    from nflows_iresnet.transforms import ActNorm

    def steps(shape: Shape) -> list[Transform]:
        channels = shape[0]
        place = torch.arange(channels)
        checkerboard, halves = (place % 4 == 1) | (place % 4 == 2), place >= channels // 2
        layers: list[Transform] = []
        for layer in range(size.num_layers):
            mask = checkerboard if layer < (size.num_layers + 1) // 2 else halves
            coupling = _coupling(size, mask if layer % 2 else ~mask)
            layers += [ActNorm(channels), coupling]
        return layers

    return steps


def _glow(size: ImageArchitecture) -> DensityModel:
    return _flow(size, glow_steps(size))


def _realnvp(size: ImageArchitecture) -> DensityModel:
    return _flow(size, realnvp_steps(size))


def _glow_normflows(size: ImageArchitecture) -> DensityModel:
    import normflows

    from nflows_iresnet.interop.normflows import FromNormflows

    def block(channels: int) -> Transform:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.lu is deprecated")
            glow = normflows.flows.GlowBlock(channels, size.hidden_features)
        for flow in glow.flows:
            if isinstance(flow, normflows.flows.AffineCouplingBlock):
                coupling = flow.flows[1]
                net, half = coupling.param_map, size.half_precision
                coupling.param_map = CouplingNet(net, half_precision=half)
        return FromNormflows(glow)

    return _flow(size, lambda shape: [block(shape[0]) for _ in range(size.num_layers)])


def _flat(name: str) -> Callable[[ImageArchitecture], DensityModel]:
    """Return what builds a model for vectors on the flattened logits of the pixels."""

    def build(size: ImageArchitecture) -> DensityModel:
        from nflows.transforms import CompositeTransform

        from nflows_iresnet.flows import Flow, StandardNormal

        vector = MODELS[name].build(Architecture(*size.as_tuple()))
        transform = CompositeTransform([_flat_logits(size), vector.flow._transform])
        return NflowsModel(Flow(transform, StandardNormal([size.features])))

    return build


def _flat_logits(size: ImageArchitecture) -> Transform:
    from nflows.transforms import CompositeTransform

    from nflows_iresnet.transforms import ActNorm, LogitTransform

    flatten = FlattenTransform(size.shape)
    logit = LogitTransform(size.levels, size.alpha)
    return CompositeTransform([logit, flatten, ActNorm(size.features)])


def _ffjord(size: ImageArchitecture) -> DensityModel:
    from nflows_iresnet.experiments.continuous import ffjord

    depth = size.num_blocks_per_layer
    return ffjord(size.features, size.hidden_features, depth, _flat_logits(size))


def _i_resnet(size: ImageArchitecture) -> DensityModel:
    from nflows_iresnet import nn as lipschitz_nn
    from nflows_iresnet.flows import ImageResidualFlow
    from nflows_iresnet.logdet import Gaussian, PowerSeries
    from nflows_iresnet.solvers import FixedPointIteration

    flow = ImageResidualFlow(
        *(size.shape, size.hidden_features, size.num_layers, size.num_blocks_per_layer),
        num_scales=size.num_scales,
        levels=size.levels,
        alpha=size.alpha,
        estimator=PowerSeries(num_terms=10, probe=Gaussian(), exact_trace=False),
        solver=FixedPointIteration(),
        activation=lipschitz_nn.ELU(),
        coeff=0.9,
    )
    return TruncatedModel(flow)


def _residual_flow(size: ImageArchitecture) -> DensityModel:
    from nflows_iresnet.flows.image import ImageResidualFlow
    from nflows_iresnet.logdet import PowerSeries

    flow = ImageResidualFlow(
        *(size.shape, size.hidden_features, size.num_layers, size.num_blocks_per_layer),
        num_scales=size.num_scales,
        levels=size.levels,
        alpha=size.alpha,
        marginal_bins=size.marginal_bins,
        linear=size.marginal_bins > 0,
        estimator=PowerSeries(num_terms=size.num_terms) if size.num_terms else None,
    )
    return TruncatedModel(flow) if size.num_terms else ResidualModel(flow)


IMAGE_MODELS: dict[str, ModelSpec] = {
    "residual-flow": ModelSpec("images: ImageResidualFlow of this library", _residual_flow),
    "glow": ModelSpec("images: Glow, nflows' couplings and LinearTransform", _glow),
    "realnvp": ModelSpec("images: Real NVP from nflows' parts", _realnvp),
    "i-resnet": ModelSpec("images: ImageResidualFlow with the i-ResNet's strategies", _i_resnet),
    "nice": ModelSpec("images: nice on flattened logits", _flat("nice"), is_coarse=True),
    "made": ModelSpec("images: made on flattened logits", _flat("made"), is_coarse=True),
    "maf": ModelSpec("images: maf on flattened logits", _flat("maf"), is_coarse=True),
    "ffjord": ModelSpec("images: ffjord on flattened logits", _ffjord, is_coarse=True),
    "glow-normflows": ModelSpec("images: GlowBlock of normflows", _glow_normflows),
}
DEFAULT_IMAGE_MODELS = ("residual-flow", "glow", "realnvp")
