"""The base distribution of the presets, and the flow that they are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from nflows.distributions import StandardNormal as _NflowsStandardNormal
from nflows.flows import Flow as _NflowsFlow
from nflows.transforms import Transform
from torch import Tensor, nn

from nflows_iresnet.conditioning import check_context
from nflows_iresnet.flows.lipschitz import FlowLipschitz, certified_blocks, lipschitz_constants
from nflows_iresnet.flows.summary import summarise
from nflows_iresnet.linearization import first_parameter
from nflows_iresnet.precision import (
    at_least_single,
    context_like_weights,
    is_foreign,
    like_weights,
    training_products,
)
from nflows_iresnet.transforms import initialize
from nflows_iresnet.transforms.initialization import evaluating
from nflows_iresnet.transforms.normalization import ENOUGH_ROWS, nothing_starts
from nflows_iresnet.transforms.residual import inverse_values_only
from nflows_iresnet.validation import require_tensor, validated_size


class StandardNormal(_NflowsStandardNormal):
    """The standard normal of nflows, sampled in the precision of the flow.

    nflows draws float32 samples whatever the precision of the model, so that a flow in float64
    cannot sample, and keeps the constant of the density in a buffer that is not saved, so that a
    model built on the meta device never gets it. Here it is a number, and no buffer is left. The
    density of noise in half precision is computed in float32.

    Args:
        shape: the shape of one sample.
    """

    _log_z: float

    def __init__(self, shape: tuple[int, ...] | list[int]) -> None:
        super().__init__(shape)
        del self._log_z
        self._log_z = 0.5 * math.log(2 * math.pi) * self._shape.numel()
        like = torch.zeros(0)
        self._like = torch.zeros(0, device="cpu") if like.is_meta else like

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StandardNormal:
        """Let the precision and device of samples follow `.double()` and `.to(device)`."""
        super()._apply(fn, recurse)
        like = fn(self._like)
        self._like = self._like.to(like.dtype) if like.is_meta else like
        return self

    def draw(self, num_samples: int, context: Tensor | None, like: Tensor) -> Tensor:
        """Return samples of the precision and on the device of a tensor.

        Args:
            num_samples: samples to draw, for each row of the context.
            context: shape (B, C), or None; its number of rows matters alone.
            like: any tensor.
        """
        leading = [num_samples] if context is None else [context.shape[0], num_samples]
        return torch.randn(*leading, *self._shape, dtype=like.dtype, device=like.device)

    @property
    def draws_itself(self) -> bool:
        """Whether `draw` is where samples come from: not in subclasses with a way of their own."""
        kind, names = type(self), ("sample", "_sample")
        is_kept = all(getattr(kind, name) is getattr(StandardNormal, name) for name in names)
        return is_kept and not any(name in vars(self) for name in names)

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        log_prob: Tensor = super()._log_prob(at_least_single(inputs), context)
        return log_prob

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        return self.draw(num_samples, context, self._like)

    def _mean(self, context: Tensor | None) -> Tensor:
        leading = [] if context is None else [context.shape[0]]
        return self._like.new_zeros(*leading, *self._shape)


@dataclass(frozen=True)
class Expected:
    """What a flow is to be given, checked where it comes in.

    Attributes:
        shape: of one row of the data.
        context_features: number of values of a context, after the embedding; None for none.
        optional_context: whether a flow with context may be called without one.
    """

    shape: tuple[int, ...]
    context_features: int | None = None
    optional_context: bool = False

    def check_inputs(self, inputs: Tensor) -> None:
        """Raise unless inputs have the shape (B, *shape)."""
        if inputs.dim() == 0 or inputs.shape[1:] != self.shape:
            raise ValueError(
                f"expected inputs of shape (batch, {', '.join(map(str, self.shape))}), "
                f"got {tuple(inputs.shape)}"
            )

    def check_context(self, context: Tensor | None) -> None:
        """Raise unless a context has the shape (B, context_features), or may be None and is."""
        check_context(context, self.context_features, optional=self.optional_context)


class Flow(_NflowsFlow):
    """A flow of nflows that checks what it is given, and samples any numbers in its own precision.

    nflows refuses numpy integers, fails to join batches of unequal size where there is a context,
    and computes log-determinants that it drops.

    Args:
        transform: from data to noise.
        distribution: of the noise.
        embedding_net: maps a context to the one that the transform takes; the identity by default.
        expects: what the flow is to be given; left to the transforms by default.
    """

    _expects: Expected | None = None

    def __init__(
        self,
        transform: Transform,
        distribution: nn.Module,
        embedding_net: nn.Module | None = None,
        *,
        expects: Expected | None = None,
    ) -> None:
        super().__init__(transform, distribution, embedding_net)
        self._expects = expects

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density of rows, shape (B,).

        Args:
            inputs: shape (B, *).
            context: shape (B, C), or None.

        Raises:
            ValueError: if inputs or context are not what the flow was built for.
        """
        self._check_given(inputs, context)
        log_prob: Tensor = super().log_prob(self._as_weights(inputs), context)
        return log_prob

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        embedded = self._embedded(context)
        noise, logabsdet = self._transform(inputs, context=embedded)
        normal = self._distribution
        is_own = isinstance(normal, StandardNormal) and not is_foreign(normal)
        with nullcontext() if is_own else self._of_others():
            log_prob: Tensor = self._distribution.log_prob(noise, context=embedded)
        return log_prob + logabsdet

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the noise that rows of data are mapped to, shape (B, *).

        Raises:
            ValueError: if inputs or context are not what the flow was built for.
        """
        self._check_given(inputs, context)
        given = self._as_weights(inputs)
        noise: Tensor = self._transform(given, context=self._embedded(context))[0]
        return noise

    def sample(
        self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Return samples, shape (num_samples, *), with a context (B, num_samples, *).

        Args:
            num_samples: samples to draw, for each row of the context.
            context: shape (B, C), or None.
            batch_size: how many to draw at a time; all by default.

        Raises:
            ValueError: if a number is not positive, or the context is not what the flow was built
                for.
        """
        remaining = validated_size("num_samples", num_samples)
        size = remaining if batch_size is None else validated_size("batch_size", batch_size)
        batches = []
        while remaining:
            batches.append(self._sample(min(size, remaining), context))
            remaining -= min(size, remaining)
        return torch.cat(batches, dim=0 if context is None else 1)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        """Return samples without log-determinants, where no transform could ask for those."""
        embedded = self._embedded(context)
        noise, repeated = self._noise(num_samples, embedded)
        is_known = all(map(_ignores_logabsdet, self._transform.modules()))
        with nothing_starts(), inverse_values_only() if is_known else nullcontext():
            samples: Tensor = self._transform.inverse(noise, context=repeated)[0]
        return _grouped(samples, num_samples, embedded)

    def sample_and_log_prob(
        self, num_samples: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return samples and their log-densities, (num_samples, *) and (num_samples,).

        With a context (B, C) the shapes are (B, num_samples, *) and (B, num_samples).

        Raises:
            ValueError: if `num_samples` is not positive, or the context is not what the flow was
                built for.
        """
        count = validated_size("num_samples", num_samples)
        embedded = self._embedded(context)
        noise, repeated = self._noise(count, embedded)
        with nothing_starts():
            samples, logabsdet = self._transform.inverse(noise, context=repeated)
        with self._of_others():
            log_prob = self._distribution.log_prob(noise, context=repeated) - logabsdet
        return _grouped(samples, count, embedded), _grouped(log_prob, count, embedded)

    def _noise(self, num_samples: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return noise (N, *) in the precision of the transform, and the context of each row."""
        like = first_parameter(self._transform)
        with self._of_others():
            if like is None:
                noise = self._distribution.sample(num_samples, context=context)
            elif isinstance(self._distribution, StandardNormal) and self._distribution.draws_itself:
                noise = self._distribution.draw(num_samples, context, like)
            else:
                noise = self._distribution.sample(num_samples, context=context).to(like)
        if context is None:
            return noise, None
        return noise.flatten(0, 1), context.repeat_interleave(num_samples, dim=0)

    def initialize(
        self, rows: Tensor, context: Tensor | None = None, *, batch_size: int = 1024
    ) -> None:
        """Start all that depends on data from rows that are given, instead of the first batch.

        A few thousand rows of the training set say more of scales, quantiles and correlations than
        a batch does. Each part is started from what comes out of those before, see
        `transforms.initialize`; afterwards no batch starts them again. Called again, or after
        training, it starts them anew. The weights of residual blocks and networks stay.

        Args:
            rows: as `log_prob` takes them, shape (N, *).
            context: shape (N, C), or None.
            batch_size: how many rows go through a transform at a time.

        A context whose values are far from unit scale is warned of: nothing standardises it.

        Raises:
            ValueError: if rows or context are not what the flow was built for, there is no row, or
                a value is not finite.

        Example:
            >>> from nflows_iresnet.flows import ResidualFlow
            >>> flow = ResidualFlow(2, 16, num_layers=3)
            >>> flow.initialize(torch.randn(5000, 2) * 30 + 1000)
            >>> flow.log_prob(torch.full((1, 2), 1000.0)).isfinite().item()
            True
        """
        self._check_given(rows, context)
        size = validated_size("batch_size", batch_size)
        if context is not None and (weight := first_parameter(self)) is not None:
            context = context.to(weight.device)
        with torch.no_grad(), evaluating(self):
            embedded = self._embedded_in_batches(context, size)
        if embedded is not None and isinstance(self._embedding_net, nn.Identity):
            _warn_of_scales(embedded)
        initialize(self._transform, rows, embedded, batch_size=size)

    def _embedded_in_batches(self, context: Tensor | None, size: int) -> Tensor | None:
        if context is None:
            return self._embedded(None)
        parts = [self._embedded(part) for part in context.split(size)]
        return torch.cat([part for part in parts if part is not None])

    def _as_weights(self, inputs: Tensor) -> Tensor:
        """Return inputs of half precision in that of the weights; parts without could not know."""
        is_half = inputs.dtype in (torch.bfloat16, torch.float16)
        return like_weights(inputs, self._transform) if is_half else inputs

    def _of_others(self) -> AbstractContextManager[object]:
        """Return full precision for what is not of this package."""
        return training_products(self, "anything")

    def _check_given(self, inputs: Tensor, context: Tensor | None) -> None:
        require_tensor("inputs", inputs)
        if self._expects is not None:
            self._expects.check_inputs(inputs)
        if context is None:
            return
        require_tensor("context", context)
        if inputs.shape[:1] != context.shape[:1]:
            raise ValueError(
                f"the context must have one row for each row of the inputs, but its shape is "
                f"{tuple(context.shape)}, that of the inputs {tuple(inputs.shape)}"
            )

    def _embedded(self, context: Tensor | None) -> Tensor | None:
        """Return the context that the transform takes, or raise."""
        if context is not None:
            require_tensor("context", context)
        elif self._expects is not None and self._expects.optional_context:
            return None
        embedded = self._embedded_by_net(context)
        if self._expects is not None:
            self._expects.check_context(embedded)
        return embedded

    def _embedded_by_net(self, context: Tensor | None) -> Tensor | None:
        net = self._embedding_net
        try:
            with nullcontext() if isinstance(net, nn.Identity) else self._of_others():
                embedded: Tensor | None = net(context)
        except (RuntimeError, TypeError, AttributeError) as error:
            if context is None:
                raise ValueError(
                    f"this flow embeds its context by {type(net).__name__}, but no context was "
                    "given: pass context=..."
                ) from error
            context_like_weights(context, net)
            raise
        return embedded

    def summary(self) -> str:
        """Return in at most 25 lines what the flow is made of, as `print(flow)` shows it.

        That is the layers from data to noise, those that repeat once; the number of parameters; of
        the residual blocks the network g, the bound of Lip(g) that holds whatever the weights are,
        the estimator and the solver; and whether the start from data has been made. Every module
        with its own name is in `print(flow._transform)`.

        Cost: nothing is computed from the weights, and a GPU is waited for a few times.

        Example:
            >>> from nflows_iresnet.flows import InvertibleResNet
            >>> print(InvertibleResNet(2, 16, num_layers=3).summary().splitlines()[1])
              3 x [ActNorm, ResidualTransform]
        """
        return summarise(self)

    def __repr__(self) -> str:
        """Return the summary."""
        return self.summary()

    def lipschitz_bound(self) -> FlowLipschitz:
        r"""Return certified Lipschitz constants of the blocks and of the whole transform.

        The whole is bounded by the product of its parts, in float64 and rounded up: correct, but
        loose for many layers, whose extremes rarely meet. What is known of no part is infinite.

        Returns:
            The bounds of Lip(g) of the residual blocks in their order from data to noise, and those
            of x -> noise and of noise -> x, for a fixed context.

        Example:
            >>> from nflows_iresnet.flows import ResidualFlow
            >>> bound = ResidualFlow(2, 16, num_layers=3, coeff=0.9).lipschitz_bound()
            >>> len(bound.blocks), max(bound.blocks) <= 0.9
            (3, True)
        """
        return FlowLipschitz(
            certified_blocks(self._transform), *lipschitz_constants(self._transform)
        )


def _warn_of_scales(context: Tensor) -> None:
    """Say of a context (B, C) which values are far from unit scale: nothing standardises them."""
    if context.dim() != 2 or context.shape[0] < ENOUGH_ROWS:
        return
    mean, std = context.double().mean(0), context.double().std(0)
    is_binary = ((context == context.amin(0)) | (context == context.amax(0))).all(0)
    is_small = (std < 1 / _FAR) & ~is_binary
    is_odd = (mean.abs() > _FAR) | (std > _FAR) | is_small
    for index in is_odd.nonzero().flatten().tolist()[:1]:
        warnings.warn(
            f"value {index} of the context has mean {float(mean[index]):.4g} and deviation "
            f"{float(std[index]):.3g}: a flow takes rows of any scale, but a context as it is. "
            "Subtract the mean of the training contexts and divide by their deviation, here and "
            "wherever the flow is given one",
            stacklevel=3,
        )


_FAR = 10.0
"""How many times larger or smaller than 1 a context may be before it is said."""


def _grouped(values: Tensor, num_samples: int, context: Tensor | None) -> Tensor:
    """Return values (N, *) as (B, num_samples, *) for the B rows of a context, if there is one."""
    if context is None:
        return values
    return values.unflatten(0, (context.shape[0], num_samples))


_KNOWN_PACKAGES = ("nflows", "nflows_iresnet")


def _ignores_logabsdet(module: nn.Module) -> bool:
    """Whether a transform adds up the log-determinants of its parts and looks at none."""
    package = type(module).__module__.partition(".")[0]
    return not isinstance(module, Transform) or package in _KNOWN_PACKAGES
