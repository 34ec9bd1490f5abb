"""The start of what depends on data, from rows that are given, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from nflows import transforms as nflows_transforms
from torch import Tensor, nn

from nflows_iresnet.linearization import bind, first_parameter
from nflows_iresnet.logdet import LogDetEstimate, LogDetEstimator
from nflows_iresnet.precision import like_weights
from nflows_iresnet.transforms.composite import CompositeTransform
from nflows_iresnet.transforms.image import MultiscaleTransform, PixelwiseSpline
from nflows_iresnet.transforms.normalization import STARTED_BY_A_BATCH, ActNorm
from nflows_iresnet.transforms.residual import ResidualTransform, using
from nflows_iresnet.validation import validated_size


def initialize(
    transform: nn.Module, rows: Tensor, context: Tensor | None = None, *, batch_size: int = 1024
) -> None:
    """Start all that depends on data from rows that are given, in one pass from data to noise.

    A part is started from what comes out of those before it, which have been started by then:
    `ActNorm` (nflows' too), `LinearTransform(initialization="whitening")`,
    `ElementwiseRationalQuadraticSpline(initialization="quantiles")`, and every transform of yours
    with a method `initialize(rows)` and an attribute `starts_from_rows` that is true. Afterwards
    no batch starts them again. Weights of other parts stay, and so does the mode of each module.

    It starts anew what has started before: do not call it on a flow that was trained, whose
    density would be another one. Parts that a transform uses through their inverse alone have no
    start, here as in training.

    Cost: one evaluation per row and transform without log-determinants, `batch_size` rows at a
    time, and all rows once between the transforms in memory. In what is no composition of nflows
    or of this package (a module of yours that has such parts inside) all rows at a time.

    Args:
        transform: any transform, data -> noise; for a flow of nflows its `_transform`.
        rows: shape (N, *); some thousands are plenty. They are moved to the device of the weights.
            Where several processes train one model, each gives its own, at the same time.
        context: shape (N, C), or None; as the transform takes it, after an embedding.
        batch_size: how many rows go through a transform at a time.

    Raises:
        ValueError: if there is no row, a value is not finite, the context has another number of
            rows, or a transform does not take such rows.

    Example:
        >>> from nflows_iresnet.transforms import LinearTransform
        >>> linear = LinearTransform(2, initialization="whitening")
        >>> transform = CompositeTransform([ActNorm(2), linear])
        >>> rows = torch.randn(3000, 2) @ torch.tensor([[3.0, 1.0], [0.0, 0.1]]) + 5
        >>> initialize(transform, rows)
        >>> torch.allclose(transform(rows)[0].T.cov(), torch.eye(2), atol=1e-3)
        True
    """
    size = validated_size("batch_size", batch_size)
    _check(rows, context)
    rows = like_weights(rows, transform, "rows") if rows.is_floating_point() else rows
    if (weight := first_parameter(transform)) is not None:
        rows = rows.to(weight.device)
        context = None if context is None else context.to(weight.device)
    with torch.no_grad(), evaluating(transform), _without_logabsdet(transform):
        _Pass(context, size).through(transform, rows)


@dataclass(frozen=True)
class _Pass:
    """One pass of all rows, `batch_size` at a time, with their context."""

    context: Tensor | None
    batch_size: int

    def through(self, transform: Any, rows: Tensor) -> Tensor:
        """Start what a transform holds, and return what comes out of it."""
        if _keeps_forward(transform, nflows_transforms.CompositeTransform, CompositeTransform):
            for each in transform._transforms:
                rows = self.through(each, rows)
            return rows
        if _keeps_forward(
            transform, nflows_transforms.MultiscaleCompositeTransform, MultiscaleTransform
        ):
            return self._through_scales(transform, rows)
        if starts_from_rows(transform):
            _start(transform, rows)
            return self._in_batches(transform, rows)
        if any(map(starts_from_rows, transform.modules())):
            return self._all_at_once(transform, rows)
        return self._in_batches(transform, rows)

    def _through_scales(self, transform: Any, rows: Tensor) -> Tensor:
        """Half of what a scale returns goes on to the next."""
        outputs: list[Tensor] = []
        for each in transform._transforms[:-1]:
            done, rows = self.through(each, rows).chunk(2, dim=transform._split_dim)
            outputs.append(done.flatten(start_dim=1))
        outputs.append(self.through(transform._transforms[-1], rows).flatten(start_dim=1))
        return torch.cat(outputs, dim=1)

    def _in_batches(self, transform: Any, rows: Tensor) -> Tensor:
        count, size = rows.shape[0], self.batch_size
        parts = [slice(start, start + size) for start in range(0, count, size)]
        return torch.cat(
            [transform(rows[part], self._context_of(part, count))[0] for part in parts]
        )

    def _context_of(self, part: slice, count: int) -> Tensor | None:
        is_one_for_all = self.context is None or self.context.shape[0] != count
        return self.context if is_one_for_all else self.context[part]  # type: ignore[index]

    def _all_at_once(self, transform: Any, rows: Tensor) -> Tensor:
        """Start each part inside of a transform when it is first called."""
        parts = filter(starts_from_rows, transform.modules())
        handles = [part.register_forward_pre_hook(_once()) for part in parts]
        try:
            outputs: Tensor = transform(rows, self.context)[0]
        finally:
            for handle in handles:
                handle.remove()
        return outputs


def _once() -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Return a hook that starts a part from the inputs of its first call."""
    is_done = False

    def hook(part: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal is_done
        if not is_done:
            _start(part, inputs[0])
        is_done = True

    return hook


def _keeps_forward(transform: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a transform is of one of these kinds, and calls its parts as they do."""
    return type(transform).forward in [kind.forward for kind in kinds]


def starts_from_rows(part: nn.Module) -> bool:
    """Whether `initialize` starts a part of a transform."""
    if isinstance(part, nflows_transforms.ActNorm):
        return True
    return bool(getattr(part, "starts_from_rows", False)) and hasattr(part, "initialize")


def is_waiting(part: nn.Module) -> bool:
    """Whether a part has not started: its flag says so, and it has learned nothing meanwhile."""
    flag = getattr(part, "initialized", None)
    is_flag = isinstance(flag, Tensor) or (isinstance(flag, bool) and starts_from_rows(part))
    return is_flag and not bool(flag) and not has_begun(part)


def has_begun(part: nn.Module) -> bool:
    """Whether to start a part would undo something.

    Its flag says so, but for that of splines of pixels, which start where they are told to alone.
    Parts of this package may also have learned through the inverse, or been loaded without it.
    """
    if not isinstance(part, PixelwiseSpline) and bool(getattr(part, "initialized", False)):
        return True
    has_learned = getattr(part, "has_learned", None)
    return has_learned is not None and bool(has_learned())


def waits_to_be_told(part: nn.Module) -> bool:
    """Whether a part has not started, and no batch will start it, as it seems.

    Splines of pixels are so, and parts of users, of which nothing else is known.
    """
    if not starts_from_rows(part) or has_begun(part):
        return False
    is_started_by_batches = isinstance(part, nflows_transforms.ActNorm)
    return not is_started_by_batches and bool(getattr(part, "_has_started", True))


def has_only_started(module: nn.Module) -> bool:
    """Whether a batch has started parts of a module that would learn, and are as they were then."""
    parts = [part for part in module.modules() if part in STARTED_BY_A_BATCH]
    return bool(parts) and all(map(_is_as_it_started, parts))


def _is_as_it_started(part: nn.Module) -> bool:
    now, then = list(part.parameters()), STARTED_BY_A_BATCH[part]
    pairs = zip(now, then, strict=True)
    learns = any(each.requires_grad for each in now)
    return learns and all(torch.equal(one, other.to(one.device)) for one, other in pairs)


def _start(part: Any, rows: Tensor) -> None:
    if hasattr(part, "initialize"):
        part.initialize(rows)
    else:
        ActNorm._start_from(part, rows)  # of nflows, whose own makes NaN of a constant feature
    STARTED_BY_A_BATCH.pop(part, None)


def _check(rows: object, context: Tensor | None) -> None:
    if not isinstance(rows, Tensor) or rows.dim() < 2 or rows.shape[0] == 0:
        given = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"expected a tensor of at least one row, (rows, ...), got {given}")
    if not bool(rows.isfinite().all()):
        bad = (~rows.isfinite()).flatten(start_dim=1).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(bad)} of {rows.shape[0]} rows to start from are not finite, first row {bad[0]}: "
            "drop or impute them; nothing was started"
        )
    if context is not None and context.shape[0] not in (1, rows.shape[0]):
        raise ValueError(
            f"the context must have one row for each of the {rows.shape[0]} rows, got shape "
            f"{tuple(context.shape)}"
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Let a module, and all in it, be in evaluation mode, and return each to its own mode.

    Through training mode: who keeps something in evaluation mode, as nflows' `LULinear` its inverse
    on request, is told by a call of `train` that it is out of date.
    """
    modes = [(each, each.training) for each in module.modules()]
    try:
        module.eval()
        yield
    finally:
        module.train()
        module.train(modes[0][1])
        for each, mode in modes:
            each.training = mode


@contextmanager
def _without_logabsdet(module: nn.Module) -> Iterator[None]:
    """Let residual blocks compute their outputs alone, and draw no random numbers."""
    if not any(isinstance(each, ResidualTransform) for each in module.modules()):
        yield
        return
    with using(module, estimator=_Nothing()):
        yield


@dataclass(frozen=True)
class _Nothing(LogDetEstimator):
    """g(x) alone."""

    def estimate(
        self,
        net: Callable[..., Tensor],
        inputs: Tensor,
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> LogDetEstimate:
        outputs = bind(net, context)(inputs)
        return LogDetEstimate(outputs, outputs.new_zeros(outputs.shape[0]), None)
