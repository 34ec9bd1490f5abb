"""Values that have a first derivative only, and say so when a second one is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SecondDerivativeError(RuntimeError):
    """A derivative was asked for that would have been wrong: only lower ones are right."""


def first_derivative_only(values: Tensor, message: str) -> Tensor:
    """Return the values, such that to differentiate their derivative raises, whatever by.

    What is held constant where the values are computed makes their first derivative right, and
    each further one wrong. That holds for graphs, `torch.func` and forward mode alike; compiled
    graphs refuse second derivatives themselves.

    Args:
        values: any shape.
        message: why, and what to do.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return values
    result: Tensor = _FirstDerivativeOnly.apply(values, message)
    return result


class _FirstDerivativeOnly(torch.autograd.Function):
    """The identity. Its derivative is the identity on what leads to `_Refusal`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, message: str) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.message = inputs[1]
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        if not torch.is_grad_enabled():
            return cotangent, None
        return _Refusal.apply(cotangent, *ctx.saved_tensors, ctx.message), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        refused: Tensor = _Refusal.apply(tangent, *ctx.saved_tensors, ctx.message)
        return refused


class _Refusal(torch.autograd.Function):
    """The identity on its first argument, which cannot be differentiated, by its second least."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, source: Tensor, message: str) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.message = inputs[2]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        raise SecondDerivativeError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise SecondDerivativeError(ctx.message)
