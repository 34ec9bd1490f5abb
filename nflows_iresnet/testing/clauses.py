"""The clauses of the contract: values, gradients, behaviour."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nflows_iresnet.linearization import held_by_graphs
from nflows_iresnet.testing.subject import (
    Subject,
    drawn,
    exact_logabsdet,
    require,
    require_close,
    require_gradients,
    require_mean,
)


def shapes_and_dtype(subject: Subject) -> None:
    """Outputs have the shape and dtype of inputs, logabsdet has shape (B,) and that dtype."""
    for name, (values, logabsdet) in {
        "forward": subject.forward(),
        "inverse": subject.inverse(subject.forward()[0]),
    }.items():
        require(values.shape == subject.inputs.shape, f"{name} returns shape {values.shape}")
        require(logabsdet.shape == subject.inputs.shape[:1], f"{name} logabsdet {logabsdet.shape}")
        for each in (values, logabsdet):
            require(each.dtype == subject.inputs.dtype, f"{name} returns {each.dtype}")
            require(each.isfinite().all(), f"{name} returns values that are not finite")


def round_trip(subject: Subject) -> None:
    """inverse(forward(x)) = x and forward(inverse(y)) = y, in training and evaluation."""
    for training in (True, False):
        subject.transform.train(training)
        outputs, _ = subject.forward()
        inputs, _ = subject.inverse(outputs.detach())
        mode = "training" if training else "evaluation"
        require_close(inputs, subject.inputs, subject.atol, f"round trip in {mode}")
        again, _ = replace(subject, inputs=inputs.detach()).forward()
        require_close(again, outputs, subject.atol, f"round trip from outputs in {mode}")


def logabsdet_is_exact_or_unbiased(subject: Subject) -> None:
    """The log-determinant is that of the Jacobian, both ways, with and without gradients.

    In the mode that the transform is in and, without gradients, in evaluation.
    """
    for is_evaluated, with_grad in ((False, True), (False, False), (True, False)):
        if is_evaluated:
            subject.transform.eval()
        expected = exact_logabsdet(subject).detach()
        outputs = subject.forward()[0].detach()
        count = subject.num_draws if subject.is_random() else 1
        with torch.set_grad_enabled(with_grad):
            forward = [subject.forward(seed)[1].detach() for seed in range(count)]
            inverse = [-subject.inverse(outputs, seed)[1].detach() for seed in range(min(count, 2))]
        mode = "training" if subject.transform.training else "evaluation"
        what = f"logabsdet in {mode} with gradients {'on' if with_grad else 'off'}"
        require_mean(torch.stack(forward), expected, subject, what)
        require_close(inverse[0], forward[0], subject.atol, what + ", inverse against forward")


def same_seed_negates(subject: Subject) -> None:
    """With the same seed, the inverse's logabsdet is minus the forward's."""
    outputs, forward = subject.forward(seed=3)
    _, inverse = subject.inverse(outputs.detach(), seed=3)
    require_close(-inverse, forward, subject.atol, "logabsdet of the inverse with the same seed")


def rows_are_independent(subject: Subject) -> None:
    """Changing one row changes no other row."""
    changed = subject.inputs.clone()
    changed[0] = changed[0].flip(-1) + 0.5
    before, after = subject.forward(), replace(subject, inputs=changed).forward()
    for left, right in zip(before, after, strict=True):
        require_close(right[1:], left[1:], subject.atol, "rows that were not changed")
    back, _ = subject.inverse(after[0].detach())
    require_close(back, changed, subject.atol, "inverse after one row was changed")


def context_matters(subject: Subject) -> None:
    """Another context gives other outputs, row by row, with its gradient."""
    if subject.context is None:
        return
    _check_context_gradient(subject, subject.context.clone().requires_grad_())
    changed = subject.context.clone()
    changed[0] += 1
    difference = replace(subject, context=changed).forward()[0] - subject.forward()[0]
    require(difference[0].abs().max() > 0, "the context is not used")
    require(difference[1:].abs().max() <= subject.atol, "the context of one row changes others")


def forgotten_context(subject: Subject) -> None:
    """To leave out the context is an error, not another density."""
    if subject.context is None:
        return
    try:
        replace(subject, context=None).forward()
    except Exception:
        return
    raise AssertionError("without its context it is another map: to forget it goes unnoticed")


def _check_context_gradient(subject: Subject, context: Tensor) -> None:
    def outputs(conditions: Tensor) -> Tensor:
        return replace(subject, context=conditions).forward()[0]

    require(outputs(context).requires_grad, "the context gets no gradient")
    require_gradients(outputs, (context,))


def few_rows(subject: Subject) -> None:
    """A batch of one gives the row's numbers, an empty batch gives empty results."""
    whole = subject.forward()[0]
    for rows in (slice(0, 1), slice(0, 0)):
        part = subject.rows(rows)
        outputs, logabsdet = part.forward()
        require_close(outputs, whole[rows], subject.atol, f"a batch of {len(part.inputs)}")
        require(logabsdet.shape == part.inputs.shape[:1], "logabsdet of a small batch")
        back, _ = part.inverse(outputs.detach())
        require_close(back, part.inputs, subject.atol, f"inverse of a batch of {len(part.inputs)}")


def weighted_gradient(subject: Subject) -> None:
    """The gradient of sum_i w_i logabsdet_i is right for unequal, negative and zero weights."""
    like = subject.inputs
    weights = torch.linspace(-1, 2, like.shape[0], dtype=like.dtype, device=like.device)
    weights[0] = 0
    context = None if subject.context is None else subject.context.clone().requires_grad_()
    inputs = subject.inputs.clone().requires_grad_()
    moving = replace(subject, inputs=inputs, context=context)
    targets = [inputs, *subject.parameters, *([] if context is None else [context])]
    expected = _flat_gradient(weights @ exact_logabsdet(moving), targets)
    count = subject.num_draws if subject.is_random() else 1
    draws = [_flat_gradient(weights @ moving.forward(s)[1], targets) for s in range(count)]
    require_mean(torch.stack(draws), expected, subject, "gradient of a weighted logabsdet")


def _flat_gradient(loss: Tensor, targets: list[Any], *, create_graph: bool = False) -> Tensor:
    if not loss.requires_grad:
        return torch.cat([torch.zeros_like(each).flatten() for each in targets])
    gradients = torch.autograd.grad(
        loss,
        targets,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.cat([gradient.flatten() for gradient in gradients])


def gradients_with_a_graph(subject: Subject) -> None:
    """First derivatives are the same where they are recorded, as scores and penalties need them.

    Of both results both ways, with respect to the inputs, the context and the parameters.
    """
    context = None if subject.context is None else subject.context.clone().requires_grad_()
    given = replace(subject, context=context)
    outputs = subject.forward()[0].detach()
    for name, values in (("forward", subject.inputs), ("inverse", outputs)):
        start = values.clone().requires_grad_()
        if name == "forward":
            found, logabsdet = replace(given, inputs=start).forward()
        else:
            found, logabsdet = given.inverse(start)
        loss = (found * drawn(found.shape, found, seed=1)).sum() + logabsdet.sum()
        targets = [start, *subject.parameters, *([] if context is None else [context])]
        recorded = _flat_gradient(loss, targets, create_graph=True)
        expected = _flat_gradient(loss, targets)
        require_close(recorded, expected, subject.atol, f"gradient of the {name} with a graph")


def every_parameter_learns(subject: Subject) -> None:
    """Every parameter that is not frozen gets a finite gradient from a likelihood."""
    if not subject.parameters:
        return
    outputs, logabsdet = subject.forward()
    loss = outputs.square().sum() / 2 - logabsdet.sum()
    subject.transform.zero_grad()
    loss.backward()
    for name, parameter in subject.transform.named_parameters():
        if not parameter.requires_grad:
            continue
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
    # away from the stored weights, which are there again when gradients come back
    offsets = [outputs.new_full((), 0.01, requires_grad=True) for _ in parameters]

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
    require_gradients(inverse, arguments)


def _direction(parameter: Tensor) -> Tensor:
    direction = drawn(parameter.shape, parameter, seed=parameter.numel())
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


def no_graph_without_gradients(subject: Subject) -> None:
    """Under no_grad and inference_mode the numbers are the same and nothing is recorded."""
    outputs, logabsdet = (each.detach() for each in subject.forward())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = subject.forward()
            back = subject.inverse(outputs)
        for name, value, expected in zip(
            ("outputs", "logabsdet", "inputs", "inverse logabsdet"),
            (*again, *back),
            (outputs, logabsdet, subject.inputs, -logabsdet),
            strict=True,
        ):
            require(not value.requires_grad, f"{name} under {mode.__name__} records a graph")
            require_close(value.clone(), expected, subject.atol, f"{name} under {mode.__name__}")


def graphs_are_freed(subject: Subject) -> None:
    """A pass whose results are dropped without a backward leaves no graph behind.

    What is left is memory that grows with each pass, and breaks the capture of a CUDA graph: the
    nodes that add up the gradients stay on the stream of that pass. Collected at the latest with
    cyclic garbage; a cycle through nodes of the graph, say a view of an output of a
    `torch.autograd.Function` among its saved tensors, is not.
    """
    outputs = subject.forward()[0].detach()
    learned = [each for each in subject.transform.parameters() if each.requires_grad]
    passes: dict[str, Callable[[], object]] = {
        "forward": subject.forward,
        "inverse": partial(subject.inverse, outputs),
    }
    for name, function in passes.items():
        function()
        left = held_by_graphs(learned)
        require(left == 0, f"{name} leaves a graph of {left} parameters behind")


def tensors_of_the_caller(subject: Subject) -> None:
    """Inputs, outputs and context keep their values, their version and their requires_grad."""
    inputs = subject.inputs.clone()
    context = None if subject.context is None else subject.context.clone()
    fresh = replace(subject, inputs=inputs, context=context)
    outputs = subject.forward()[0].detach().clone()
    given = {"inputs": inputs, "outputs": outputs}
    if context is not None:
        given["context"] = context
    values = {name: each.clone() for name, each in given.items()}
    versions = {name: each._version for name, each in given.items()}
    fresh.forward()
    fresh.inverse(outputs)
    for name, value in values.items():
        unchanged = torch.equal(given[name], value) and given[name]._version == versions[name]
        require(unchanged, f"the caller's {name} changed")
        require(not given[name].requires_grad, f"the caller's {name} got requires_grad")


def survives_serialisation(subject: Subject) -> None:
    """deepcopy, pickle and a state_dict into another instance give the same numbers.

    In evaluation; the other instance is one that has seen no batch, with other parameters.
    """
    subject.transform.eval()
    other = deepcopy(subject.untouched).double().eval()
    with torch.no_grad():
        expected = subject.forward()
        for parameter in other.parameters():
            if not is_lazy(parameter):
                parameter.add_(torch.randn_like(parameter))
    stored = io.BytesIO()
    torch.save(subject.transform.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    copies = {
        "deepcopy": deepcopy(subject.transform),
        "pickle": pickle.loads(pickle.dumps(subject.transform)),
        "state_dict": other,
    }
    for name, copy in copies.items():
        for actual, wanted in zip(
            replace(subject, transform=copy).forward(), expected, strict=True
        ):
            require_close(actual, wanted, subject.atol, f"after {name}")


def autocast(subject: Subject) -> None:
    """In float32 inside bfloat16 autocast the numbers are finite and the round trip holds."""
    context = None if subject.context is None else subject.context.float()
    single = replace(
        subject, transform=subject.transform.float(), inputs=subject.inputs.float(), context=context
    )
    with torch.autocast(subject.inputs.device.type, dtype=torch.bfloat16):
        outputs, logabsdet = single.forward()
        inputs, _ = single.inverse(outputs.detach())
    require(logabsdet.dtype == torch.float32, f"logabsdet is {logabsdet.dtype} in autocast")
    require_close(inputs.float(), single.inputs, 1e-3, "round trip in autocast")
