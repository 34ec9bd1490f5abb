"""What comes in: finite, in the precision of the weights, and computed in it.

That is: autocast is off, and torch's settings of TensorFloat-32 do not count
(`nflows_iresnet.tensor_float`), except in training for who asks for it: `allow_tf32_in_training`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from nflows_iresnet.linearization import first_parameter, is_traced
from nflows_iresnet.tensor_float import (
    Work,
    constant_when_compiled,
    full_products,
    is_relaxed,
    relaxed,
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def full_precision(device: torch.device, work: Work = "matrices") -> AbstractContextManager[object]:
    """Return a context in which autocast is off, and products are those of the dtype.

    No setting of torch's that allows TensorFloat-32 counts, neither there nor in what
    differentiates it later. Where such a setting has to be switched off, that is for the whole
    process: other threads compute without TensorFloat-32, too, while one is in such a context, and
    what they set meanwhile is lost. The caller's settings are back when the last has left, by
    whatever way.

    Args:
        device: of the tensors.
        work: what is computed inside.
    """
    return _without_autocast(device, full_products(work))


def training_precision(
    module: nn.Module,
    device: torch.device,
    work: Work = "matrices",
) -> AbstractContextManager[object]:
    """Return `full_precision`, but for modules in training, inside `allow_tf32_in_training`.

    Args:
        module: that computes a value or its log-determinant.
        device: of the tensors.
        work: what is computed inside.
    """
    return _without_autocast(device, training_products(module, work))


def precision_of_here(device: torch.device) -> AbstractContextManager[object]:
    """Return `full_precision`, or where `training_precision` allows less the same without autocast.

    Args:
        device: of the tensors.
    """
    return _without_autocast(device, nullcontext() if is_relaxed() else full_products())


def training_products(module: nn.Module, work: Work = "matrices") -> AbstractContextManager[object]:
    """Return `training_precision`, with autocast as it is."""
    if module.training and torch.is_grad_enabled() and is_tf32_allowed():
        return relaxed()
    return full_products(work)


def work_of(function: object, inputs: Tensor) -> Work:
    """Return what a function, or a network, computes of inputs."""
    if is_foreign(function):
        return "anything"
    return "images" if inputs.dim() > 2 else "matrices"


def is_foreign(thing: object) -> bool:
    """Whether something is not of a class of this package."""
    return not type(thing).__module__.startswith("nflows_iresnet.")


def is_inside_autocast(device: torch.device) -> bool:
    """Whether autocast shortens what is computed on a device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _without_autocast(
    device: torch.device, inner: AbstractContextManager[object]
) -> AbstractContextManager[object]:
    if not is_inside_autocast(device):
        return inner
    return _Both(torch.autocast(device.type, enabled=False), inner)


class _Both:
    """Two contexts, one inside the other."""

    def __init__(
        self, outer: AbstractContextManager[object], inner: AbstractContextManager[object]
    ) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        try:
            self._inner.__enter__()
        except BaseException:
            self._outer.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self._inner.__exit__(*error)
        finally:
            self._outer.__exit__(*error)


_TF32_IN_TRAINING: ContextVar[bool] = ContextVar("tf32_in_training", default=False)


@constant_when_compiled
def is_tf32_allowed() -> bool:
    """Whether this is inside `allow_tf32_in_training`."""
    return _TF32_IN_TRAINING.get()


@contextmanager
def allow_tf32_in_training() -> Iterator[None]:
    """Let torch's settings of TensorFloat-32 count while modules are trained.

    For a model in training mode, and calls that record gradients: log-densities and their gradients
    are then as accurate as TensorFloat-32 is, where torch's settings allow it (for convolutions
    they do by default). Norms of weights, and so certificates, stay in full precision, as do
    inverses, samples, and all in evaluation mode or without gradients. On an H100 a captured
    training step of an image flow takes 68.6 ms instead of 86.7. For the error see
    docs/guarantees.md#tensorfloat-32.

    Only the forward pass has to be inside. It concerns this thread, and what it starts to compile.

    Example:
        >>> from nflows_iresnet import ResidualFlow
        >>> flow = ResidualFlow(2, 16, num_layers=2)
        >>> with allow_tf32_in_training():
        ...     loss = -flow.log_prob(torch.randn(8, 2)).mean()
        >>> loss.backward()
    """
    token = _TF32_IN_TRAINING.set(True)
    try:
        yield
    finally:
        _TF32_IN_TRAINING.reset(token)


def as_now(step: _Function) -> _Function:
    """Let a function run with the permission of `allow_tf32_in_training` that is given now."""
    if not is_tf32_allowed():
        return step

    def permitted(*args: Any, **kwargs: Any) -> Any:
        with allow_tf32_in_training():
            return step(*args, **kwargs)

    return cast(_Function, permitted)


def in_full_precision(node: _Function) -> _Function:
    """Let the backward of a `torch.autograd.Function` run in the precision of its forward.

    A decorator of the class, whose backward torch runs when the contexts of the forward have been
    left. Its first tensor of cotangents tells the device.
    """
    kind: Any = node
    forward, backward = kind.forward, kind.backward

    @wraps(forward)
    def remembering(ctx: Any, *args: Any) -> Any:
        ctx.is_relaxed = is_relaxed()
        return forward(ctx, *args)

    @wraps(backward)
    def protected(ctx: Any, *cotangents: Any) -> Any:
        given = [each for each in cotangents if each is not None]
        device = given[0].device if given else torch.device("cpu")  # nothing will be computed
        work: Work = "images" if any(each.dim() > 3 for each in given) else "matrices"
        inner = relaxed() if ctx.is_relaxed else full_products(work)
        with _without_autocast(device, inner):
            return backward(ctx, *cotangents)

    kind.forward, kind.backward = staticmethod(remembering), staticmethod(protected)
    return node


def like_weights(values: Tensor, module: nn.Module, name: str = "inputs") -> Tensor:
    """Return values in the precision of a module's weights.

    Half precision, as an autocast region hands over, is converted. What else differs is an error:
    a silent conversion would change digits that the caller asked for.

    Args:
        values: any shape.
        module: its first parameter tells the precision; without parameters anything goes.
        name: what the values are, for the message.

    Raises:
        ValueError: if the values are integers, or of another precision than the weights.
    """
    parameter = first_parameter(module)
    if parameter is None or parameter.dtype == values.dtype:
        return values
    require_precision(values, parameter.dtype, name)
    return values.to(parameter.dtype)


def at_least_single(values: Tensor) -> Tensor:
    """Return values in float32 where they are of half precision, else as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def require_precision(values: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise unless values have the precision of the weights, or half of it as autocast gives.

    Args:
        values: any shape.
        dtype: of the weights.
        name: what the values are, for the message.

    Raises:
        ValueError: naming both precisions and what to do.
    """
    if values.dtype in (dtype, torch.bfloat16, torch.float16):
        return
    wanted, given = str(dtype), str(values.dtype)
    raise ValueError(
        f"the {name} {'are' if name.endswith('s') else 'is'} {given.removeprefix('torch.')}, the "
        f"weights {wanted.removeprefix('torch.')}: convert the {name} by .to({wanted})"
        + (", or the model by .double()" if values.dtype == torch.float64 else "")
    )


def context_like_weights(context: Tensor | None, module: nn.Module) -> Tensor | None:
    """Return a context, if there is one, in the precision of a module's weights."""
    return None if context is None else like_weights(context, module, "context")


def require_finite_rows(name: str, values: Tensor) -> None:
    """Raise if a row is not finite; only where asking costs nothing, that is on the CPU.

    A single bad row in training makes the loss, then every weight, not a number: one step later
    nobody could tell the data's fault from the learning rate's.

    Args:
        name: what the values are.
        values: shape (B, *).

    Raises:
        ValueError: that names the first bad row.
    """
    if values.device.type != "cpu" or is_traced() or math.isfinite(float(values.detach().sum())):
        return
    is_bad = ~values.isfinite().flatten(start_dim=1).all(dim=1)
    if bool(is_bad.any()):
        rows = is_bad.nonzero()[:, 0].tolist()
        raise ValueError(
            f"{len(rows)} of {values.shape[0]} rows of the {name} are not finite, "
            f"first row {rows[0]}: {values[rows[0]].flatten()[:8].tolist()}; drop or impute such "
            "rows before training"
        )


def require_finite_in_training(
    module: nn.Module, inputs: Tensor, context: Tensor | None = None
) -> None:
    """Require finite rows of what a module is trained on; in evaluation a bad row stays alone."""
    if module.training and torch.is_grad_enabled():
        require_finite_rows("inputs", inputs)
        if context is not None:
            require_finite_rows("context", context)
