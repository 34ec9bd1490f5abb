r"""Transforms and flows of nflows as transforms and distributions of `torch.distributions`.

Pyro, zuko and others that build on `torch.distributions` can so use a residual block. The
directions differ:

=========================  ================================================
\                          maps
=========================  ================================================
nflows `Transform`         data -> noise
`ToTorchTransform(t)`      data -> noise, as `t.forward` does
`ToTorchTransform(t).inv`  noise -> data, as `t.inverse` does
`NormalizingFlow` of zuko  data -> noise: give it `ToTorchTransform(t)`
`TransformedDistribution`  noise -> data: give it `ToTorchTransform(t).inv`
`ToTorchDistribution(f)`   the distribution of the flow, ready made
=========================  ================================================

Log-determinants are those of the module at the time of the call: exact where its estimator is, and
else an unbiased estimate, another one in each call; `transforms.using(module,
estimator=logdet.Exact())` makes every one exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from nflows.distributions import (
    ConditionalDiagonalNormal,
    DiagonalNormal,
    StandardNormal,
)
from nflows.flows import Flow as NflowsFlow
from nflows.transforms import Transform
from torch import Size, Tensor, nn
from torch.distributions import Distribution, TransformedDistribution, constraints
from torch.distributions import Transform as TorchTransform
from torch.distributions.transforms import _InverseTransform

from nflows_iresnet.flows.base import Flow
from nflows_iresnet.validation import validated_size

Shape = Sequence[int]

_REPARAMETRISED = (StandardNormal, ConditionalDiagonalNormal, DiagonalNormal)


class ToTorchTransform(TorchTransform, nn.Module):
    r"""A transform, or that of a flow, as one of `torch.distributions`: data -> noise.

    `t(x)` is the forward of the transform, `t.inv(y)` its inverse, and
    `t.log_abs_det_jacobian(x, y)` the log-determinant of forward, of rows with any number of batch
    dimensions in front, or none. `t.inv` is the transform noise -> data that
    `TransformedDistribution` takes, and `t.inv.inv is t`.

    It is a module as well, so that `t.parameters()`, `t.to(device)` and `pyro.module` reach the
    weights, and the context goes where they go. Its weights, mode and strategies are those of the
    transform, not copies.

    A context belongs to the transform, which is then conditional: of shape (\*batch, C), it
    broadcasts against the batch dimensions of what is mapped, and what comes out has both. In a
    `TransformedDistribution` its batch dimensions become those of the distribution.

    With a cache (`t.with_cache()`) the latest (x, y) and its log-determinant are remembered: after
    `y = t(x)`, neither `t.log_abs_det_jacobian(x, y)` nor `t.inv(y)` computes anything, and both
    belong to the same draw of an estimator. Without it, `log_abs_det_jacobian` costs one more
    forward, never an inverse. As in torch, what comes from a cache has the graph that it was made
    with: `z = t.inv(t(x))` is x, and has no derivative in t(x). Unlike in torch, nothing is
    remembered beyond a change of the weights, of the mode or strategies of a module, of grad mode,
    or of x or y in place (what is written through `.data` excepted, which torch does not count).

    `sign` is not known: the transform may turn the orientation, and of several variables torch
    makes no use of it.

    Cost: that of the transform.

    References:
        Dillon et al. TensorFlow distributions, 2017 (bijectors, and their caches).

    Args:
        transform: any transform of nflows, or a flow, whose transform and embedding are used.
        context: shape (\*batch, C), or None; for a flow as it is before the embedding.
        event_dim: how many dimensions on the right are one row: 1 for vectors, 3 for images.
        shapes: the shape of one row that goes in, and of one that comes out. Needed only where they
            differ; `event_dim` is then that of the first. Those of a flow are known.
        context_event_dim: how many dimensions on the right are one context.
        cache_size: 1 to remember the latest pair, 0 to remember nothing.

    Raises:
        ValueError: if an argument is none of its kind; in use, if what is given has not the shape
            of a batch of rows, or does not broadcast with the context.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> from nflows_iresnet import ResidualTransform
        >>> from nflows_iresnet.nn import LipschitzMLP
        >>> t = ToTorchTransform(ResidualTransform(LipschitzMLP(2, [32, 32])))
        >>> base = Independent(Normal(torch.zeros(2), 1.0), 1)
        >>> distribution = TransformedDistribution(base, [t.inv])
        >>> samples = distribution.rsample((5, 4))
        >>> samples.shape, distribution.log_prob(samples).shape
        (torch.Size([5, 4, 2]), torch.Size([5, 4]))
    """

    bijective = True
    context: Tensor | None

    def __init__(
        self,
        transform: Transform | NflowsFlow,
        context: Tensor | None = None,
        *,
        event_dim: int = 1,
        shapes: tuple[Shape, Shape] | None = None,
        context_event_dim: int = 1,
        cache_size: int = 0,
    ) -> None:
        super().__init__(cache_size=cache_size)
        if not isinstance(transform, (Transform, NflowsFlow)):
            given = transform.__name__ if isinstance(transform, type) else repr(transform)
            raise ValueError(
                f"transform must be a transform or a flow of nflows, such as "
                f"ResidualTransform(net), got {given}"
            )
        if shapes is None and isinstance(transform, NflowsFlow):
            shapes = _shapes_of(transform)
        self.transform = transform
        self.training = transform.training
        self._rows = _Contexts(context_event_dim)
        self._rows.batch_shape(context)
        self.register_buffer("context", context, persistent=False)
        self._shapes = None if shapes is None else (Size(shapes[0]), Size(shapes[1]))
        sizes = [validated_size("event_dim", event_dim)] * 2
        if self._shapes is not None:
            sizes = [validated_size("the rank of a row", len(shape)) for shape in self._shapes]
        self._event_dims = sizes
        self._latest: _Pair | None = None

    __hash__ = nn.Module.__hash__
    __repr__ = nn.Module.__repr__

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """Return the real rows that go in."""
        return constraints.independent(constraints.real, self._event_dims[0])

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """Return the real rows that come out."""
        return constraints.independent(constraints.real, self._event_dims[1])

    @property
    def sign(self) -> int:
        """Raise: nothing says whether a transform keeps the orientation."""
        raise NotImplementedError(
            f"the sign of the determinant of {type(self.transform).__name__} is not known; torch "
            "needs it for cdf and icdf alone, which a density of several variables does not have"
        )

    @property
    def inv(self) -> TorchTransform:
        """Return the transform noise -> data, whose own `inv` is this one."""
        if self._inv is None:
            self._inv = _Inverse(self)
        return self._inv

    def with_cache(self, cache_size: int = 1) -> ToTorchTransform:
        """Return the same transform, of the same weights, with or without a cache."""
        if cache_size == self._cache_size:
            return self
        return type(self)(
            self.transform,
            self.context,
            event_dim=self._event_dims[0],
            shapes=self._shapes,
            context_event_dim=self._rows.event_dim,
            cache_size=cache_size,
        )

    def clear_cache(self) -> None:
        """Forget the latest pair, as Pyro does after each step."""
        self._latest = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the noise of data, shape (*batch, *row)."""
        return self.call_and_ladj(x)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._inverse_and_ladj(y)[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y = t(x) and its log-determinant from one call: what zuko asks for.

        Args:
            x: shape (*batch, *row).
        """
        latest = self._remembered()
        if latest is not None and x is latest.x:
            return latest.y, latest.logabsdet
        y, logabsdet = self._run(self._map(), x, is_inverse=False)
        self._remember(x, y, logabsdet)
        return y, logabsdet

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        latest = self._remembered()
        if latest is not None and y is latest.y:
            return latest.x, -latest.logabsdet
        x, logabsdet = self._run(self._map().inverse, y, is_inverse=True)
        self._remember(x, y, -logabsdet)
        return x, logabsdet

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log|det dy/dx|, shape (*batch,): remembered for this very pair, or one forward.

        Args:
            x: data, shape (*batch, *row).
            y: t(x).
        """
        latest = self._remembered()
        if latest is not None and x is latest.x and y is latest.y:
            return latest.logabsdet
        return self._run(self._map(), x, is_inverse=False)[1]

    def forward_shape(self, shape: Shape) -> Size:
        """Return the shape of what comes out for the shape of what goes in."""
        batch, row = self._split(shape, is_inverse=False)
        return batch + (row if self._shapes is None else self._shapes[1])

    def inverse_shape(self, shape: Shape) -> Size:
        """Return the shape of what goes in for the shape of what comes out."""
        batch, row = self._split(shape, is_inverse=True)
        return batch + (row if self._shapes is None else self._shapes[0])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cache, whose tensors have a graph."""
        return {**super().__getstate__(), "_latest": None}

    def _map(self) -> Transform:
        whole = self.transform
        return whole._transform if isinstance(whole, NflowsFlow) else whole

    def _run(
        self, direction: Callable[..., tuple[Tensor, Tensor]], values: Tensor, *, is_inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Run forward or inverse on values (*batch, *row) as rows, and shape the results alike."""
        if not isinstance(values, Tensor):
            raise ValueError(
                f"expected a tensor of shape (*batch, *row), got {type(values).__name__}: convert "
                "by torch.as_tensor(..., dtype=torch.float32), or what precision the weights have"
            )
        batch, row = self._split(values.shape, is_inverse=is_inverse)
        rows = values.expand(batch + row).reshape(batch.numel(), *row)
        outputs, logabsdet = direction(rows, self._context_of(batch))
        return outputs.reshape(batch + outputs.shape[1:]), logabsdet.reshape(batch)

    def _split(self, shape: Shape, *, is_inverse: bool) -> tuple[Size, Size]:
        """Return the batch shape, broadcast with the context's, and that of a row, or raise."""
        expected = None if self._shapes is None else self._shapes[is_inverse]
        batch, row = _parted(shape, self._event_dims[is_inverse], expected)
        return _broadcast(batch, self._rows.batch_shape(self.context)), row

    def _context_of(self, batch: Size) -> Tensor | None:
        """Return the embedded context of each row of a batch."""
        if self.context is None:
            return _embedded(self.transform, None)
        own = self._rows.batch_shape(self.context)
        embedded = _embedded(self.transform, self._rows.of_each(self.context, own))
        if embedded is None:
            return None
        row = embedded.shape[1:]
        return embedded.reshape(own + row).expand(batch + row).reshape(batch.numel(), *row)

    def _remember(self, x: Tensor, y: Tensor, logabsdet: Tensor) -> None:
        if self._cache_size and not (x.is_inference() or y.is_inference()):
            self._latest = _Pair(x, y, logabsdet, self._state(x, y))

    def _remembered(self) -> _Pair | None:
        """Return the latest pair, unless it would be another one by now."""
        latest = self._latest
        if latest is not None and self._state(latest.x, latest.y) != latest.state:
            latest = self._latest = None
        return latest

    def _state(self, *pair: Tensor) -> tuple[object, ...]:
        """Return what a remembered pair depends on."""
        settings = [
            (each.training, getattr(each, "estimator", None), getattr(each, "solver", None))
            for each in self.modules()
        ]
        tensors = [*self.parameters(), *self.buffers(), *pair]
        versions = [
            (
                *(id(each), each.dtype, each.device, each.requires_grad),
                None if each.is_inference() else each._version,
            )
            for each in tensors
        ]
        return settings, versions, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class _Inverse(_InverseTransform):
    """Noise -> data. Torch's own forgets what it inverts when it is pickled or copied."""

    _inv: ToTorchTransform

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._inv._inverse_and_ladj(y)

    def clear_cache(self) -> None:
        self._inv.clear_cache()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._inv._inv = self


@dataclass(frozen=True)
class _Pair:
    """A pair y = t(x), its log-determinant, and the state of all that it depends on."""

    x: Tensor
    y: Tensor
    logabsdet: Tensor
    state: tuple[object, ...]


class ToTorchDistribution(TransformedDistribution):
    r"""A flow as a distribution of `torch.distributions`, for one context, or without.

    `log_prob`, `sample` and `rsample` are the flow's own: the same numbers for the same seed
    without a context, one pass, and for `ImageResidualFlow` pixels inside the range. `base_dist`
    and `transforms` describe the flow as a `TransformedDistribution`: the noise, and
    `[ToTorchTransform(flow, context).inv]`.

    A context of shape (\*batch, C) gives a distribution of that batch shape, whose samples have the
    shape (\*sample, \*batch, \*row): sample dimensions come first, as torch has them, where nflows
    has them second.

    The weights are the flow's, not copies, and so is their precision and device, at any time.
    `expand` repeats the context, nothing else. With `validate_args` values that are not a number
    are refused.

    Cost: that of the flow.

    Args:
        flow: any flow of nflows.
        context: shape (\*batch, C), or None.
        shape: of one row of the data, where the flow does not know it and it is not the noise's.
        context_event_dim: how many dimensions on the right are one context.
        validate_args: see `torch.distributions.Distribution`.

    Raises:
        ValueError: if `flow` is no flow; in use, if values or context are not what the flow takes.

    Example:
        >>> from nflows_iresnet import ResidualFlow
        >>> flow = ResidualFlow(2, 16, num_layers=2, context_features=3)
        >>> distribution = ToTorchDistribution(flow, torch.randn(4, 3))
        >>> distribution.batch_shape, distribution.event_shape
        (torch.Size([4]), torch.Size([2]))
        >>> samples = distribution.rsample((5,))
        >>> samples.shape, distribution.log_prob(samples).shape
        (torch.Size([5, 4, 2]), torch.Size([5, 4]))
    """

    flow: NflowsFlow
    context: Tensor | None

    def __init__(
        self,
        flow: NflowsFlow,
        context: Tensor | None = None,
        *,
        shape: Shape | None = None,
        context_event_dim: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(flow, NflowsFlow):
            raise ValueError(
                f"flow must be a flow of nflows, such as ResidualFlow(2, 16, 4), got {flow!r}; "
                "for a transform use TransformedDistribution(base, [ToTorchTransform(it).inv])"
            )
        self.flow, self.context = flow, context
        self._contexts = _Contexts(context_event_dim)
        known = _shapes_of(flow)
        shapes = (known[0] if shape is None else Size(shape), known[1])
        transform = ToTorchTransform(
            flow, context, shapes=shapes, context_event_dim=context_event_dim
        )
        noise = _Noise(flow, context, self._contexts, self._contexts.batch_shape(context))
        super().__init__(noise, [transform.inv], validate_args=validate_args)

    def expand(
        self, batch_shape: Shape, _instance: ToTorchDistribution | None = None
    ) -> ToTorchDistribution:
        """Return the same distribution with more batch dimensions."""
        new = self._get_checked_instance(ToTorchDistribution, _instance)
        new.flow, new.context, new._contexts = self.flow, self.context, self._contexts
        super().expand(batch_shape, _instance=new)
        return cast(ToTorchDistribution, new)

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"{type(self).__name__}({type(self.flow).__name__}, {shapes})"

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of values (*, *row), shape (*,): that of the flow."""
        if self._validate_args:
            self._validate_sample(value)
        batch, rows = _rows_of(value, self.batch_shape, self.event_shape)
        context = self._contexts.of_each(self.context, batch)
        log_prob: Tensor = self.flow.log_prob(rows, context)
        return log_prob.reshape(batch)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Return samples without a graph, shape (*sample_shape, *batch, *row)."""
        with torch.no_grad():
            return self._draw(sample_shape)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Return samples that are differentiable in the weights and the context."""
        _require_reparametrised(self.flow)
        return self._draw(sample_shape)

    def _draw(self, sample_shape: Shape) -> Tensor:
        def draw(count: int, context: Tensor | None) -> Tensor:
            return cast(Tensor, self.flow.sample(count, context))

        context = self._contexts.of_each(self.context, self.batch_shape)
        return _in_front(draw, context, sample_shape, self.batch_shape, self.event_shape)


class _Noise(Distribution):
    """The noise of a flow, in the flow's present precision and place.

    Args:
        flow: the flow.
        context: shape (*batch, C), or None.
        contexts: how it is to be read.
        batch_shape: of the distribution.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(
        self, flow: NflowsFlow, context: Tensor | None, contexts: _Contexts, batch_shape: Size
    ) -> None:
        self.flow, self._context, self._contexts = flow, context, contexts
        super().__init__(batch_shape, _shapes_of(flow)[1], validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return isinstance(self.flow._distribution, _REPARAMETRISED)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> _Noise:
        return _Noise(self.flow, self._context, self._contexts, Size(batch_shape))

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(sample_shape)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        _require_reparametrised(self.flow)
        return self._draw(sample_shape)

    def _draw(self, sample_shape: Shape) -> Tensor:
        flow, context = self.flow, self._embedded(self.batch_shape)

        def draw(count: int, rows: Tensor | None) -> Tensor:
            if not isinstance(flow, Flow):
                return cast(Tensor, flow._distribution.sample(count, context=rows))
            noise = flow._noise(count, rows)[0]
            return noise if rows is None else noise.unflatten(0, (rows.shape[0], count))

        return _in_front(draw, context, sample_shape, self.batch_shape, self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        batch, rows = _rows_of(value, self.batch_shape, self.event_shape)
        log_prob = self.flow._distribution.log_prob(rows, context=self._embedded(batch))
        return cast(Tensor, log_prob).reshape(batch)

    def _embedded(self, batch: Size) -> Tensor | None:
        return _embedded(self.flow, self._contexts.of_each(self._context, batch))


@dataclass(frozen=True)
class _Contexts:
    """How a context of shape (*batch, *one) is read, `one` having so many dimensions."""

    event_dim: int

    def __post_init__(self) -> None:
        validated_size("context_event_dim", self.event_dim)

    def batch_shape(self, context: Tensor | None) -> Size:
        """Return the batch dimensions of a context, or raise if it is none."""
        if context is None:
            return Size()
        if not isinstance(context, Tensor) or context.dim() < self.event_dim:
            given = (
                f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else repr(context)
            )
            raise ValueError(
                f"context must be a tensor of shape (*batch, *one) where one context has "
                f"{self.event_dim} dimensions, got {given}"
            )
        return context.shape[: context.dim() - self.event_dim]

    def of_each(self, context: Tensor | None, batch: Size) -> Tensor | None:
        """Return a context for each row of a batch, shape (N, *one)."""
        if context is None:
            return None
        one = context.shape[context.dim() - self.event_dim :]
        return context.expand(batch + one).reshape(batch.numel(), *one)


def _rows_of(values: Tensor, batch_shape: Size, row: Size) -> tuple[Size, Tensor]:
    """Return the batch shape of values in a distribution, and the values as rows (N, *row)."""
    own, _ = _parted(values.shape, len(row), row)
    batch = _broadcast(own, batch_shape)
    return batch, values.expand(batch + row).reshape(batch.numel(), *row)


def _parted(shape: Shape, event_dim: int, expected: Size | None) -> tuple[Size, Size]:
    """Return the batch dimensions and those of a row, or raise."""
    whole = Size(shape)
    batch, row = whole[: max(0, len(whole) - event_dim)], whole[max(0, len(whole) - event_dim) :]
    if len(row) < event_dim or expected not in (None, row):
        wanted = f"{event_dim} dimensions" if expected is None else f"shape {tuple(expected)}"
        raise ValueError(
            f"expected rows of {wanted}, with any batch dimensions in front, got {tuple(whole)}"
        )
    return batch, row


def _broadcast(batch: Size, own: Size) -> Size:
    """Return the batch shape of values together with that of a context or a distribution."""
    try:
        return torch.broadcast_shapes(batch, own)
    except RuntimeError:
        raise ValueError(
            f"values of batch shape {tuple(batch)} do not broadcast with the batch shape "
            f"{tuple(own)} of the context or the distribution: give one row for each, or for all"
        ) from None


def _shapes_of(flow: NflowsFlow) -> tuple[Size, Size]:
    """Return the shapes of one row of a flow's data and of its noise."""
    noise = Size(flow._distribution._shape)
    expects = getattr(flow, "_expects", None)
    return (noise if expects is None else Size(expects.shape)), noise


def _embedded(module: nn.Module, context: Tensor | None) -> Tensor | None:
    """Return the context that a transform, or that of a flow, takes."""
    if isinstance(module, Flow):
        return module._embedded(context)
    if isinstance(module, NflowsFlow):
        return cast("Tensor | None", module._embedding_net(context))
    return context


def _require_reparametrised(flow: NflowsFlow) -> None:
    if not isinstance(flow._distribution, _REPARAMETRISED):
        raise NotImplementedError(
            f"samples of {type(flow._distribution).__name__} have no derivative: use sample()"
        )


def _in_front(
    draw: Callable[[int, Tensor | None], Tensor],
    context: Tensor | None,
    sample_shape: Shape,
    batch: Size,
    row: Size,
) -> Tensor:
    """Return samples (*sample, *batch, *row) of what draws (count, *row), or (B, count, *row).

    Args:
        draw: draws so many samples for each row of a context.
        context: shape (B, C), B being the size of the batch, or None.
        sample_shape, batch, row: the shapes.
    """
    whole, count = Size(sample_shape) + batch, Size(sample_shape).numel()
    if context is None:
        return draw(max(1, whole.numel()), None)[: whole.numel()].reshape(whole + row)
    return draw(max(1, count), context).transpose(0, 1)[:count].reshape(whole + row)
