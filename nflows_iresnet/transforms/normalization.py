"""ActNorm of nflows with a data-dependent start that cannot fail."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from nflows.transforms import Transform
from nflows.transforms.normalization import ActNorm as _NflowsActNorm
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from nflows_iresnet.linearization import concrete, run_weight_hooks
from nflows_iresnet.precision import like_weights
from nflows_iresnet.transforms.channels import as_rows, for_each_input, require_channels
from nflows_iresnet.validation import validated_bound, validated_size

_ROUNDING_UNITS = 4.0
"""A feature whose standard deviation is less than so many units in the last place is constant."""
_FAR = 1000.0
"""Deviations from zero from which on the mean is kept apart from what is learned."""
ENOUGH_ROWS = 8
"""The deviation of fewer can be any number: for 3 the mean of 1 / s^2 is infinite."""
_INSIDE = 0.999
"""Part of the rows that starts within the bound of what follows, if that leaves out one at least:
the farthest may be an outlier."""
_LOWEST = [0.0, 0.356, 0.434, 0.483, 0.519, 0.546, 0.569, 0.588]
_HIGHEST = [math.inf, 159.6, 14.12, 6.468, 4.396, 3.485, 2.980, 2.660]
"""Ends of the 99 % interval of sigma / s by the freedom f of s^2: sqrt(f / chi^2)."""
_ERRORS_OF_ZERO = 2.5
"""A mean of few rows that is closer to zero than so many of its errors may be zero."""


class StartsFromData(Transform):
    """A transform that starts from the first batch in training mode, unless it has begun before.

    Its flag, the buffer `initialized`, says that for good. Parameters that are zero until then say
    it for states without the flag.
    """

    initialized: Tensor
    _has_started: bool
    """The flag as a number of the host, which no call has to wait for."""

    def _wait_for_rows(self, initialization: str, known: tuple[str, ...]) -> None:
        """Wait for a first batch, unless the start is the first that is known, the identity."""
        if initialization not in known:
            raise ValueError(
                f"initialization must be {' or '.join(map(repr, known))}, got {initialization!r}; "
                "for a start from rows call initialize(rows)"
            )
        self.starts_from_rows = initialization != known[0]
        self._has_started = not self.starts_from_rows
        self.register_buffer("initialized", torch.tensor(self._has_started))

    def has_learned(self) -> Tensor:
        """Return whether a parameter is not zero, as all are until it starts: shape ()."""
        raise NotImplementedError

    def _start_from(self, rows: Tensor) -> object:
        """Start from rows, if there are any."""
        raise NotImplementedError

    def _start(self, inputs: Tensor) -> None:
        if not may_start(self):
            return
        if bool(self.initialized | self.has_learned()):
            note_start(self)
        elif not depends_on(inputs, tuple(self.parameters())):  # its own samples are no data
            self._start_from(inputs)
            note_batch(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._has_started = not self.initialized.is_meta and bool(self.initialized)


class ActNorm(StartsFromData, _NflowsActNorm):
    r"""y = exp(s) (x - m) + t per feature or channel, started so that a batch has mean 0, std 1.

    Differs from `nflows.transforms.ActNorm` in m, a buffer, and in the start. m is zero but for
    features that start over 1,000 deviations from zero, where it is their mean: without it t would
    have to follow each change of s a thousandfold, and of features ten thousand deviations away
    nothing is learned. Who copies parameters from one model to another has to copy it, too, as the
    statistics of batch normalisation. The start is at the first forward pass in training mode:

    * It starts only what is still as it was built: s = t = m = 0. What was learned through the
      inverse (variational inference), or was restored without the flag, is kept; sampling before
      training changes nothing.
    * Samples of its own (`log_prob(samples)` with the graph of the samples, and all that a flow of
      this package computes while it samples) are no data: they start nothing, so that one step sees
      one model.
    * Any scale of the data is taken to 1, in float64 arithmetic. A feature that is constant up to
      its rounding is centred only. An empty batch starts nothing.
    * Fewer than 8 rows say little of a deviation s: taken for sigma it would cost others thousands
      of nats. So a mean is taken off only if it is over 2.5 of its errors, with sigma at the upper
      end of its 99 % interval (160 s for two rows, 3 s for seven); else it counts as zero, and s^2
      is the mean square. The scale stays 1 where the interval contains 1; if not, it is s above 1,
      and the upper end below. So standardised features stay as they are, whatever the first rows.
      What n rows, 8 or more, cost unseen normal ones is 1 / n nats a feature, for two numbers that
      are estimated.
    * With a `bound`, features with long tails are scaled down further: at most one row of 1,000
      starts beyond it, or one of fewer. Splines act within it, and map to its edge what is beyond.
    * A batch with values that are not finite is refused, and nothing is stored.
    * Where several processes train one model, they start from the statistics of the joined batch
      (three `all_reduce`, in which every process takes part, and all of them raise if one has to;
      with a `bound` one more, and the rows of all by `all_gather`).
    * Tensors that `torch.func.functional_call` lends, if they are no `nn.Parameter`, are started
      where they are lent, with the mean in t alone, and the module waits on. Inside the transforms
      of `torch.func`, and where scale or shift are computed from other parameters (`parametrize`,
      `prune`), a start is an error that names the remedy.
    * Once started, a forward pass neither waits for the device nor breaks a compiled graph.

    References:
        Kingma, Dhariwal. Glow: Generative flow with invertible 1x1 convolutions, 2018.

    Args:
        features: number of features (B, F), or of channels (B, C, H, W).
        bound: how far splines reach that follow, in deviations; None where there are none.

    Raises:
        ValueError: if `features` or `bound` is not positive; in use, if inputs have another shape
            or precision than scale and shift, the first batch is not finite, or a start cannot be
            stored.

    Example:
        >>> norm = ActNorm(2)
        >>> outputs, _ = norm(torch.randn(100, 2) * 20 + 7)
        >>> torch.allclose(outputs.mean(0), torch.zeros(2), atol=1e-5)
        True
    """

    center: Tensor
    bound: float | None = None

    def __init__(self, features: int, *, bound: float | None = None) -> None:
        super().__init__(validated_size("features", features))
        self.bound = None if bound is None else validated_bound(bound, 4.0)
        self.register_buffer("center", torch.zeros_like(self.shift.detach()))
        self._has_started = False

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, sum of s over what was scaled), shapes (B, *) and (B,)."""
        inputs = self._checked(inputs)
        if self.training and not self._has_started:
            self._start(inputs)
        scale, shift = self._broadcastable_scale_shift(inputs)
        outputs = scale * (inputs - self.center.view_as(shift)) + shift
        return outputs, for_each_input(self.log_scale.sum(), inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, minus the sum of s over what was scaled), shapes (B, *) and (B,)."""
        run_weight_hooks(self)
        inputs = self._checked(inputs)
        scale, shift = self._broadcastable_scale_shift(inputs)
        outputs = (inputs - shift) / scale + self.center.view_as(shift)
        return outputs, -for_each_input(self.log_scale.sum(), inputs)

    def lipschitz_constants(self) -> tuple[float, float]:
        """Return bounds of the Lipschitz constants of forward and inverse: the extreme scales."""
        run_weight_hooks(self)
        scales = self.log_scale.detach().double()
        bounds = _above(float(scales.max().exp())), _above(float((-scales.min()).exp()))
        return infinite_if_nan(bounds[0]), infinite_if_nan(bounds[1])

    def initialize(self, rows: Tensor) -> None:
        """Start from rows that are given, whatever scale and shift are.

        Args:
            rows: shape (N, features) or (N, features, H, W). Where several processes train one
                model, each gives its own, at the same time.

        Raises:
            ValueError: if there is no row, a value is not finite, or shape or precision is another.
        """
        if rows.shape[0] == 0:
            raise ValueError(f"at least one row is needed to start from, got {tuple(rows.shape)}")
        self._start_from(self._checked(rows))

    def _checked(self, inputs: Tensor) -> Tensor:
        require_channels(inputs, self.shift.shape[0])
        return like_weights(inputs, self)

    def has_learned(self) -> Tensor:
        """Return whether s, t or m is not zero, as all are until it starts: shape ()."""
        return self.log_scale.any() | self.shift.any() | self.center.any()

    @torch.no_grad()
    def _start_from(self, inputs: Tensor) -> None:
        require_own(self, "log_scale", "shift")
        rows = as_rows(inputs).to(self.log_scale.device, torch.float64)
        peak = _largest_over_processes(rows, inputs)
        if peak is None:
            return
        unit = torch.where(peak > 0, peak, 1.0)
        rows = rows / unit
        counted = torch.cat([rows.sum(0), rows.new_full((1,), float(rows.shape[0]))])
        totals, count = over_processes(counted, "SUM").split([rows.shape[1], 1])
        mean = totals / count
        squares = over_processes((rows - mean).square().sum(0), "SUM")
        std = (squares / (count - 1).clamp_min(1)).sqrt()
        limits = torch.finfo(self.log_scale.dtype)
        is_constant = std <= _ROUNDING_UNITS * limits.eps
        std = torch.where(is_constant, 0.0, std * unit)
        num_rows = int(count)
        mean, std = likely_moments(mean * unit, std, num_rows)
        bound = getattr(self, "bound", None)  # nflows' own has none, and no center
        if bound is not None and num_rows >= ENOUGH_ROWS:
            distances = (rows_of_all_processes(rows) * unit - mean).abs() / std
            inside = min(_INSIDE, 1 - 1.5 / num_rows)
            (reach,) = quantiles(distances, rows.new_full((1,), inside))
            std = torch.where(is_constant, std, std * (reach / bound).clamp_min(1.0))
        largest = -math.log(limits.tiny)
        self.log_scale.copy_(-std.log().clamp(-largest, largest))
        if isinstance(self, ActNorm):
            if owns_parameters(self):
                is_far = (mean.abs() > _FAR * std) & (unit < limits.max / 4)
                self.center.copy_(torch.where(is_far, mean, 0.0))
            mean = mean - self.center
        self.shift.copy_(-mean * self.scale.double())
        note_start(self)

    def _load_from_state_dict(
        self, state: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: Any
    ) -> None:
        super()._load_from_state_dict(state, prefix, metadata, strict, *lists)
        missing_keys: list[str] = lists[0]
        is_whole = f"{prefix}initialized" in state  # else of another part, or parameters alone
        if is_whole and f"{prefix}center" not in state:  # of nflows, or of a version without it
            if f"{prefix}center" in missing_keys:
                missing_keys.remove(f"{prefix}center")
            if self.center.is_meta:
                self.center = torch.zeros_like(self.shift.detach())
            self.center.zero_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickle, or that of a version without m."""
        super().__setstate__(state)
        if "center" not in self._buffers:
            self.register_buffer("center", torch.zeros_like(self.shift.detach()))


def rows_of_all_processes(rows: Tensor) -> Tensor:
    """Return the rows (N, features) of all processes one below the other."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    counts = rows.new_zeros(distributed.get_world_size())
    counts[distributed.get_rank()] = rows.shape[0]
    sizes = [int(count) for count in over_processes(counts).tolist()]
    padded = F.pad(rows, (0, 0, 0, max(sizes) - rows.shape[0]))
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def quantiles(rows: Tensor, probabilities: Tensor) -> Tensor:
    """Return the quantiles of each column, (P, features), between the two nearest rows."""
    last = rows.shape[0] - 1
    position = (probabilities * rows.shape[0] - 0.5).clamp(0, last)
    below = position.long()
    ordered = rows.sort(dim=0).values
    lower, upper = ordered[below], ordered[(below + 1).clamp_max(last)]
    return lower.lerp(upper, (position - below)[:, None])


def likely_moments(mean: Tensor, std: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return what to take off features, and what to divide them by, as `ActNorm` describes it.

    Args:
        mean: shape (features,).
        std: with n - 1, zero for constants, shape (features,).
        count: n, at least 1.
    """
    if count >= ENOUGH_ROWS:
        return mean, torch.where(std > 0, std, 1.0)
    error = std * _HIGHEST[count - 1] / math.sqrt(count) if count > 1 else math.inf
    is_zero = mean.abs() <= _ERRORS_OF_ZERO * error
    about_zero = torch.hypot(mean, std * math.sqrt(1 - 1 / count))
    root = torch.where(is_zero, about_zero, std)
    lowest = root * torch.where(is_zero, _LOWEST[count], _LOWEST[count - 1])
    highest = root * torch.where(is_zero, _HIGHEST[count], _HIGHEST[count - 1])
    scale = torch.where(lowest > 1, root, highest.clamp_max(1))
    return torch.where(is_zero, 0.0, mean), torch.where(root > 0, scale, 1.0)


def _above(value: float) -> float:
    """Return a number above the exact result of a few operations in float64."""
    return value * (1 + 8 * torch.finfo(torch.float64).eps)


def infinite_if_nan(bound: float) -> float:
    """Return a bound, infinite where it is NaN: of such parameters nothing is known."""
    return math.inf if math.isnan(bound) else bound


_STARTS: ContextVar[bool] = ContextVar("starts", default=True)


def nothing_starts() -> AbstractContextManager[None]:
    """Let no part start from what it is given: what a flow makes of noise is no data.

    It concerns this thread alone, and not what is compiled, where the context would end the graph.
    """
    return nullcontext() if torch.compiler.is_compiling() else _nothing_starts()


@contextmanager
def _nothing_starts() -> Iterator[None]:
    token = _STARTS.set(False)
    try:
        yield
    finally:
        _STARTS.reset(token)


def may_start(part: Any) -> bool:
    """Whether a part that waits for data may start in this call, or be noted to have started.

    Not while a flow samples, and not inside the transforms of `torch.func`, where nothing outside
    may be written to: what has begun is used there as it is.

    Args:
        part: with a flag `initialized`, and `has_learned`.

    Raises:
        ValueError: inside such a transform, if the part, or a lane of a `vmap`, has not begun.
    """
    if not _STARTS.get():
        return False
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is None:
        return True
    if bool(concrete(part.initialized | part.has_learned()).all()):
        return False
    raise ValueError(
        f"{type(part).__name__} would start from this batch inside a transform of torch.func, "
        "where nothing can be stored: call initialize(rows) before, or eval() to use it unstarted"
    )


def note_start(part: Any) -> None:
    """Note that a part has started, for good, unless its parameters are lent to it.

    `torch.func.functional_call` takes back what it lends, which is mostly no `nn.Parameter`.
    """
    if owns_parameters(part):
        part.initialized.fill_(True)
        part._has_started = True


def owns_parameters(part: nn.Module) -> bool:
    """Whether none of the parameters of a part is lent to it for a call."""
    return all(isinstance(each, nn.Parameter) for each in part.parameters())


STARTED_BY_A_BATCH: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
"""Parts that a batch has started, not rows that were given, and their parameters by then."""


def note_batch(part: nn.Module) -> None:
    """Note that the batch of a forward pass has started a part."""
    if getattr(part, "_has_started", False):
        STARTED_BY_A_BATCH[part] = [each.detach().clone() for each in part.parameters()]


def require_own(part: nn.Module, *names: str) -> None:
    """Refuse to start what a start would be lost in: values that are computed anew at each call.

    Args:
        part: what starts.
        names: of its parameters, which are written to.

    Raises:
        ValueError: naming a parameter that is none of its own, and the remedy.
    """
    if getattr(part, "_is_replica", False):  # of `nn.DataParallel`: the first shares its memory
        return
    for name in names:
        own = part._parameters.get(name)
        if own is None or not own.is_leaf:
            raise ValueError(
                f"{type(part).__name__} cannot start from data: its {name} is no parameter of its "
                "own, but computed from others, as by torch.nn.utils.parametrize or prune. Start "
                "it before by initialize(rows), or keep its values by initialized.fill_(True)"
            )


def depends_on(values: Tensor, parameters: tuple[Tensor, ...]) -> bool:
    """Whether values carry a graph that leads back to a parameter."""
    waiting: list[Any] = [values.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        variable = getattr(node, "variable", None)
        if any(variable is parameter for parameter in parameters):
            return True
        seen.add(node)
        waiting += [each for each, _ in node.next_functions]
    return False


def _largest_over_processes(rows: Tensor, inputs: Tensor) -> Tensor | None:
    """Return the largest magnitude of each feature, shape (features,), or raise in all processes.

    None where no process has a row. It is here that the host waits for the first batch.

    Args:
        rows: shape (N, features), in float64.
        inputs: the same values as they were given, for the message.
    """
    zeros = rows.new_zeros(1, rows.shape[1])
    peak = torch.cat([zeros, rows.abs()]).amax(0)
    is_bad = (~peak.isfinite()).any()[None]
    has_rows = peak.new_full((1,), float(rows.shape[0] > 0))
    joined = torch.cat([is_bad.to(peak), has_rows, peak.nan_to_num(0.0, posinf=0.0)])
    flags, largest = over_processes(joined, "MAX").split([2, rows.shape[1]])
    is_refused, is_filled = cast(list[float], flags.tolist())
    if is_refused:
        raise ValueError(
            f"the first batch, from which ActNorm starts, is not finite: {_bad_rows(inputs)}. "
            "Drop or impute such rows of the data (or of the context); nothing was stored"
        )
    return largest if is_filled else None


def _bad_rows(inputs: Tensor) -> str:
    is_bad = ~inputs.isfinite().flatten(start_dim=1).all(dim=1)
    rows = cast(list[int], is_bad.nonzero()[:, 0].tolist())
    if not rows:
        return "rows of another process"
    values = inputs[rows[0]].flatten()[:8].tolist()
    return f"{len(rows)} of {inputs.shape[0]} rows of the inputs, first row {rows[0]}: {values}"


def over_processes(values: Tensor, operation: Literal["SUM", "MAX"] = "SUM") -> Tensor:
    """Return the sum or the maximum over all processes, if there are several."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values, op=getattr(distributed.ReduceOp, operation))
    return values
