"""Clauses about values: shapes, round trips, log-determinants, rows, contexts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nflows_iresnet.testing.subject import (
    Subject,
    exact_logabsdet,
    require,
    require_close,
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
    """The log-determinant is that of the Jacobian, both ways, with and without gradients."""
    expected = exact_logabsdet(subject).detach()
    outputs = subject.forward()[0].detach()
    count = subject.num_draws if subject.is_random() else 1
    for with_grad in (True, False):
        with torch.set_grad_enabled(with_grad):
            forward = [subject.forward(seed)[1].detach() for seed in range(count)]
            inverse = [-subject.inverse(outputs, seed)[1].detach() for seed in range(min(count, 2))]
        what = f"logabsdet with gradients {'on' if with_grad else 'off'}"
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
    torch.autograd.gradcheck(outputs, (context,), eps=1e-5, atol=1e-4, rtol=1e-3)


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
