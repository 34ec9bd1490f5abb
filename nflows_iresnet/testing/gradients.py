"""Clauses about gradients: weighted, frozen, through the inverse, and in function transforms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nflows_iresnet.testing.subject import (
    Subject,
    exact_logabsdet,
    require,
    require_close,
    require_mean,
)


def weighted_gradient(subject: Subject) -> None:
    """The gradient of sum_i w_i logabsdet_i is right for unequal, negative and zero weights."""
    weights = torch.linspace(-1, 2, len(subject.inputs), dtype=subject.inputs.dtype)
    weights[0] = 0
    context = None if subject.context is None else subject.context.clone().requires_grad_()
    inputs = subject.inputs.clone().requires_grad_()
    moving = replace(subject, inputs=inputs, context=context)
    targets = [inputs, *subject.parameters, *([] if context is None else [context])]
    expected = _flat_gradient(weights @ exact_logabsdet(moving), targets)
    count = subject.num_draws if subject.is_random() else 1
    draws = [_flat_gradient(weights @ moving.forward(s)[1], targets) for s in range(count)]
    require_mean(torch.stack(draws), expected, subject, "gradient of a weighted logabsdet")


def _flat_gradient(loss: Tensor, targets: list[Any]) -> Tensor:
    if not loss.requires_grad:
        return torch.cat([torch.zeros_like(each).flatten() for each in targets])
    gradients = torch.autograd.grad(loss, targets, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def every_parameter_learns(subject: Subject) -> None:
    """Every parameter gets a finite gradient from a likelihood."""
    if not subject.parameters:
        return
    outputs, logabsdet = subject.forward()
    loss = outputs.square().sum() / 2 - logabsdet.sum()
    subject.transform.zero_grad()
    loss.backward()
    for name, parameter in subject.transform.named_parameters():
        require(parameter.grad is not None, f"parameter {name} gets no gradient")
        require(parameter.grad.isfinite().all(), f"gradient of {name} is not finite")


def frozen_parameters(subject: Subject) -> None:
    """With frozen parameters the gradient of the inputs is the same as before."""
    moving = replace(subject, inputs=subject.inputs.detach().requires_grad_())

    def input_gradient() -> Tensor:
        outputs, logabsdet = moving.forward()
        return _flat_gradient(outputs.square().sum() + logabsdet.sum(), [moving.inputs])

    before = input_gradient()
    subject.transform.requires_grad_(False)
    require_close(input_gradient(), before, subject.atol, "input gradient with frozen parameters")
    values, logabsdet = subject.inverse(moving.forward()[0])
    (values.sum() + logabsdet.sum()).backward()


class _Inverse(nn.Module):
    transform: Any

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, outputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        values, logabsdet = self.transform.inverse(outputs, context)
        return values, logabsdet


def inverse_gradients(subject: Subject) -> None:
    """Gradients through the inverse, and its logabsdet where exact, pass gradcheck.

    With respect to the outputs, the context, and every parameter along a random direction.
    """
    few = subject.rows(slice(0, 2))
    outputs = few.forward()[0].detach().requires_grad_()
    context = None if few.context is None else few.context.clone().requires_grad_()
    module, is_random = _Inverse(subject.transform), subject.is_random()
    parameters = dict(module.named_parameters())
    directions = {name: _direction(parameter) for name, parameter in parameters.items()}
    offsets = [outputs.new_zeros((), requires_grad=True) for _ in parameters]

    def inverse(
        targets: Tensor, conditions: Tensor | None, *steps: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        moved = {
            name: parameters[name].detach() + step * directions[name]
            for name, step in zip(parameters, steps, strict=True)
        }
        found = torch.func.functional_call(module, moved, (targets, conditions))
        for name, value in zip(("outputs", "logabsdet"), found, strict=True):
            is_attached = value.requires_grad or (name == "logabsdet" and not parameters)
            require(is_attached, f"{name} of the inverse are cut off from the gradient")
        return found[0] if is_random else found

    arguments: Any = (outputs, context, *offsets)
    torch.autograd.gradcheck(inverse, arguments, eps=1e-5, atol=1e-4, rtol=1e-3)


def _direction(parameter: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(parameter.numel())
    direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return direction / max(1, parameter.numel()) ** 0.5


def vmap_and_jacrev(subject: Subject) -> None:
    """`torch.func.vmap(jacrev(...))` over rows gives the Jacobian."""

    def row(inputs: Tensor, context: Tensor | None) -> Tensor:
        batch = None if context is None else context[None]
        outputs: Tensor = subject.transform.forward(inputs[None], batch)[0][0]
        return outputs

    in_dims = (0, None if subject.context is None else 0)
    jacobian_of = torch.func.vmap(torch.func.jacrev(row), in_dims, randomness="same")
    size = subject.inputs.shape[1:].numel()
    jacobian = jacobian_of(subject.inputs, subject.context).reshape(-1, size, size)
    actual = torch.linalg.slogdet(jacobian).logabsdet
    require_close(actual, exact_logabsdet(subject), subject.atol, "vmap(jacrev)")
