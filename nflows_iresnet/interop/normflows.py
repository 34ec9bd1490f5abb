r"""Transforms of nflows in models of normflows, and flows of normflows in models of nflows.

The two libraries differ in direction and in what a layer may return:

==========  ============================  =========================================
\           nflows `Transform`            normflows `Flow`
==========  ============================  =========================================
`forward`   data -> noise                 noise -> data
`inverse`   noise -> data                 data -> noise
log-det     of shape (B,)                 of shape (B,), a scalar, or the integer 0
`context`   always accepted               accepted by some layers
no inverse  `InverseNotAvailable`         `NotImplementedError`
order       first layer next to the data  first layer next to the noise
==========  ============================  =========================================

`forward_kld`, and `reverse_kld(score_fn=False)`, of normflows 1.7 sum up in float32 whatever the
precision of the layers; in float64, minimise `-model.log_prob(x).mean()` instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import normflows as nf
from nflows.transforms import InverseNotAvailable, Transform
from normflows.flows.residual import iResBlock
from torch import Tensor

from nflows_iresnet.precision import training_products

_STOCHASTIC = (nf.flows.MetropolisHastings, nf.flows.HamiltonianMonteCarlo)


class ToNormflows(nf.flows.Flow):
    r"""A transform of nflows as a flow of normflows: `forward` is noise -> data.

    With T the transform, `forward(z)` is T^{-1}(z) and log\|det dT^{-1}/dz\|, `inverse(x)` is T(x)
    and log\|det dT/dx\|. Goes into `NormalizingFlow`, `ConditionalNormalizingFlow`,
    `ClassCondFlow` and `MultiscaleFlow`, with all their losses.

    `transforms.ActNorm` starts from the first batch of data, in `inverse`: samples before do not
    matter, and what a loss on samples alone taught it (`reverse_kld`) is kept. nflows' own ActNorm
    overwrites that with the first batch: call `inverse` once before such training.

    Cost: that of the transform.

    References:
        Stimper et al. normflows: A PyTorch package for normalizing flows, 2023.

    Args:
        transform: any transform of nflows, with or without context, on rows of any shape.

    Example:
        >>> import normflows as nf, torch
        >>> from nflows_iresnet import ResidualTransform
        >>> from nflows_iresnet.nn import LipschitzMLP
        >>> block = ResidualTransform(LipschitzMLP(2, [32, 32]))
        >>> model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [ToNormflows(block)])
        >>> loss = model.forward_kld(torch.randn(64, 2))
        >>> loss.backward()
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, log|det dx/dz|), shapes (B, *) and (B,)."""
        outputs, logabsdet = self.transform.inverse(z, context)
        return outputs, _per_row(logabsdet, outputs)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the noise of data and log|det d noise / d data|, shapes (B, *) and (B,)."""
        outputs, logabsdet = self.transform(z, context)
        return outputs, _per_row(logabsdet, outputs)


class FromNormflows(Transform):
    r"""A flow of normflows as a transform of nflows: `forward` is data -> noise.

    With F the flow, `forward(x)` is F^{-1}(x) and log\|det dF^{-1}/dx\|, `inverse(y)` is F(y) and
    log\|det dF/dy\|. The log-determinant always has shape (B,). A context goes to the flow if it
    takes one, and is ignored if not, as transforms of nflows do.

    A model of normflows lists its flows from noise to data, so that all of them together are
    `CompositeTransform([FromNormflows(flow) for flow in reversed(model.flows)])`.

    Cost: that of the flow.

    References:
        Stimper et al. normflows: A PyTorch package for normalizing flows, 2023.

    Args:
        flow: any flow of normflows that maps one tensor to one tensor.

    Raises:
        ValueError: if the flow is a Markov chain, which is no bijection, or has residual blocks of
            normflows, whose log-determinants may be none, without `brute_force=True`, or with it
            and inputs that are not of two features. What such blocks invert is normflows' own
            iteration: nothing verifies it, and it may be off by 0.01.

    Example:
        >>> import normflows as nf, torch
        >>> transform = FromNormflows(nf.flows.GlowBlock(channels=4, hidden_channels=8))
        >>> images = torch.randn(3, 4, 6, 6)
        >>> outputs, logabsdet = transform(images)
        >>> outputs.shape, logabsdet.shape
        (torch.Size([3, 4, 6, 6]), torch.Size([3]))
        >>> torch.allclose(transform.inverse(outputs)[0], images, atol=1e-4)
        True
    """

    _is_planar = False

    def __init__(self, flow: nf.flows.Flow) -> None:
        super().__init__()
        if isinstance(flow, _STOCHASTIC):
            raise ValueError(
                f"{_name(flow)} is a Markov chain, not a bijection: it has no log-determinant"
            )
        blocks = [each for each in flow.modules() if isinstance(each, iResBlock)]
        if not all(block.brute_force for block in blocks):
            raise ValueError(
                f"{_name(flow)} may return another number than its log-determinant in training, a "
                "random one without its gradient in evaluation, and changes its inputs: use "
                "brute_force=True in two dimensions, or "
                "ResidualTransform(nn.LipschitzMLP(...)), see docs/coming-from.md"
            )
        self.flow, self._is_planar = flow, bool(blocks)
        self._forward_context = _context_parameter(flow.inverse)
        self._inverse_context = _context_parameter(flow.forward)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (noise, log|det|) of data, shapes (B, *) and (B,).

        Raises:
            InverseNotAvailable: if the flow is only known from noise to data.
            ValueError: if the flow needs a context and gets none, or maps to a list of tensors.
        """
        try:
            return self._transform(self.flow.inverse, inputs, self._forward_context, context)
        except NotImplementedError as error:
            raise InverseNotAvailable(
                f"{_name(self.flow)} is known from noise to data only ({error}): it can sample, "
                "but has no density of given data"
            ) from error

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (data, log|det|) of noise, shapes (B, *) and (B,).

        Raises:
            ValueError: if the flow needs a context and gets none, or maps to a list of tensors.
        """
        return self._transform(self.flow, inputs, self._inverse_context, context)

    def _transform(
        self,
        direction: Callable[..., Any],
        inputs: Tensor,
        parameter: inspect.Parameter | None,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if self._is_planar and inputs.shape[1:] != (2,):
            raise ValueError(
                f"{_name(self.flow)} has residual blocks of normflows, whose log-determinants are "
                f"exact for two features, and was given {tuple(inputs.shape)}: use "
                "ResidualTransform(nn.LipschitzMLP(...)), see docs/coming-from.md"
            )
        with training_products(self, "anything"):
            outputs, logabsdet = direction(inputs, **self._conditions(parameter, context))
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"{_name(self.flow)} maps to {len(outputs)} tensors; wrap the block that splits "
                "and merges, not its parts"
            )
        return outputs, _per_row(logabsdet, outputs)

    def _conditions(
        self, parameter: inspect.Parameter | None, context: Tensor | None
    ) -> dict[str, Tensor]:
        if parameter is None:
            return {}
        if context is not None:
            return {parameter.name: context}
        if parameter.default is inspect.Parameter.empty:
            raise ValueError(f"{_name(self.flow)} needs a context, as its {parameter.name!r}")
        return {}


def _context_parameter(direction: Callable[..., Any]) -> inspect.Parameter | None:
    """Return the parameter `context`, or else a second one that must be given, if there is any."""
    parameters = inspect.signature(direction).parameters
    required = (each for each in list(parameters.values())[1:] if each.default is each.empty)
    return parameters.get("context") or next(required, None)


def _per_row(logabsdet: Tensor | float, outputs: Tensor) -> Tensor:
    """Return a log-determinant of shape (B,) from one value per row, or one for all."""
    if isinstance(logabsdet, Tensor):
        logabsdet = logabsdet.reshape(-1)
    return outputs.new_zeros(outputs.shape[:1]) + logabsdet


def _name(flow: nf.flows.Flow) -> str:
    return type(flow).__name__
