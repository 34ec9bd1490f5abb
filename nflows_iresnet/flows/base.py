"""The base distribution of the presets, and the flow that they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from nflows.distributions import Distribution
from nflows.distributions import StandardNormal as _NflowsStandardNormal
from nflows.flows import Flow as _NflowsFlow
from nflows.transforms import Transform
from torch import Tensor, nn

from nflows_iresnet.flows.lipschitz import FlowLipschitz, lipschitz_of_flow
from nflows_iresnet.precision import like_weights
from nflows_iresnet.transforms import UniformDequantisation
from nflows_iresnet.transforms.residual import inverse_values_only
from nflows_iresnet.validation import validated_size


class StandardNormal(_NflowsStandardNormal):
    """The standard normal of nflows, in the precision and on the device of the flow.

    nflows draws float32 samples whatever the precision of the model, so that a flow in float64
    cannot sample, and keeps a constant of the density in a buffer that no state holds, so that a
    model built on the meta device has another density than the one its state came from.

    Args:
        shape: the shape of one sample.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape)
        self.register_buffer("_like", torch.zeros(0), persistent=False)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        if inputs.shape[1:] != self._shape:
            raise ValueError(
                f"expected inputs of shape (batch, {', '.join(map(str, self._shape))}), got "
                f"{tuple(inputs.shape)}"
            )
        energy = 0.5 * inputs.square().flatten(start_dim=1).sum(1)
        return -energy - 0.5 * self._shape.numel() * math.log(2 * math.pi)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        leading = [num_samples] if context is None else [context.shape[0], num_samples]
        return torch.randn(*leading, *self._shape, dtype=self._like.dtype, device=self._like.device)

    def follow(self, parameter: Tensor) -> None:
        """Draw samples in the precision and on the device of a parameter from now on."""
        self._like = torch.zeros(0, dtype=parameter.dtype, device=parameter.device)


class Flow(_NflowsFlow):
    """A flow of nflows that says what is wrong with what it is given, and what it guarantees.

    nflows refuses numpy integers, fails to join batches of unequal size where there is a context,
    and computes log-determinants that it drops.

    Args:
        transform: from data to noise.
        distribution: of the noise.
        embedding_net: of the context, trained with the flow.
        data_shape: of one row of data, to be checked where it is given.
    """

    def __init__(
        self,
        transform: Transform,
        distribution: Distribution,
        embedding_net: nn.Module | None = None,
        *,
        data_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(transform, distribution, embedding_net)
        self._data_shape = None if data_shape is None else tuple(data_shape)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log p(x), shape (B,).

        Args:
            inputs: x, shape (B, *).
            context: shape (B, C), for a flow that was built with one.

        Raises:
            ValueError: if the inputs or the context have another shape or precision than the flow,
                or the context is missing, or is given to a flow without.
        """
        log_prob: Tensor = super().log_prob(*self._checked(inputs, context))
        return log_prob

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the noise of data, shape (B, *); raises as `log_prob` does."""
        noise: Tensor = super().transform_to_noise(*self._checked(inputs, context))
        return noise

    def sample_and_log_prob(
        self, num_samples: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return samples and their log p, with a context for each of its rows.

        Args:
            num_samples: samples to draw, for each row of the context.
            context: shape (B, C), or None.
        """
        self._follow_parameters()
        size = validated_size("num_samples", num_samples)
        samples, log_prob = super().sample_and_log_prob(size, self._checked_context(context))
        return samples, log_prob

    def sample(
        self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Return samples, shape (num_samples, *), with a context (B, num_samples, *).

        Args:
            num_samples: samples to draw, for each row of the context.
            context: shape (B, C), or None.
            batch_size: how many to draw at a time; all by default.
        """
        self._follow_parameters()
        context = self._checked_context(context)
        remaining = validated_size("num_samples", num_samples)
        size = remaining if batch_size is None else validated_size("batch_size", batch_size)
        batches = []
        while remaining:
            batches.append(super().sample(min(size, remaining), context))
            remaining -= min(size, remaining)
        return torch.cat(batches, dim=0 if context is None else 1)

    def lipschitz_bound(self) -> FlowLipschitz:
        """Return certified bounds for the present weights: of each block, and of the whole.

        Raises:
            ValueError: if the network of a block has no certified bound.
        """
        return lipschitz_of_flow(self._transform)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        """Return samples without log-determinants, where no transform could ask for those."""
        embedded = self._embedding_net(context)
        noise = self._distribution.sample(num_samples, context=embedded)
        if embedded is not None:
            noise = noise.flatten(start_dim=0, end_dim=1)
            embedded = embedded.repeat_interleave(num_samples, dim=0)
        is_known = all(map(_ignores_logabsdet, self._transform.modules()))
        with inverse_values_only() if is_known else nullcontext():
            samples: Tensor = self._transform.inverse(noise, context=embedded)[0]
        return samples if embedded is None else samples.unflatten(0, (-1, num_samples))

    def _follow_parameters(self) -> None:
        parameter = next(self._transform.parameters(), None)
        if parameter is not None and isinstance(self._distribution, StandardNormal):
            self._distribution.follow(parameter)

    def _checked(self, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shape = self._data_shape
        expected = "(batch, ...)" if shape is None else f"(batch, {', '.join(map(str, shape))})"
        if not isinstance(inputs, Tensor):
            raise ValueError(
                f"expected a tensor of shape {expected}, got {type(inputs).__name__}: "
                "use torch.as_tensor"
            )
        if inputs.dim() < 2 or (shape is not None and inputs.shape[1:] != shape):
            raise ValueError(f"expected inputs of shape {expected}, got {tuple(inputs.shape)}")
        takes_integers = any(isinstance(each, UniformDequantisation) for each in self.modules())
        if not takes_integers:
            inputs = like_weights(inputs, self._transform)
        context = self._checked_context(context)
        if context is not None and context.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"there are {inputs.shape[0]} rows of inputs, but {context.shape[0]} of context: "
                "give each row its own, context.expand(...) for one that stands for all"
            )
        return inputs, context

    def _checked_context(self, context: Tensor | None) -> Tensor | None:
        if context is None:
            return None
        if not isinstance(context, Tensor) or context.dim() < 2:
            given = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"expected a context of shape (batch, features), got {given}")
        if isinstance(self._embedding_net, nn.Identity):
            return like_weights(context, self._transform, "context")
        return context


_KNOWN_PACKAGES = ("nflows", "nflows_iresnet")


def _ignores_logabsdet(module: nn.Module) -> bool:
    """Whether a transform adds up the log-determinants of its parts and looks at none."""
    package = type(module).__module__.partition(".")[0]
    return not isinstance(module, Transform) or package in _KNOWN_PACKAGES
